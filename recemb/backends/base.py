"""The seam between the engine and a compression method, and the laws every method keeps.

A backend is the storage of one table: a module whose parameters are all 2-D, so that a row is the unit of
row-wise optimizers, sparse updates and sharded checkpoints. One file per method implements it.

Laws (``tests/backends/test_contract.py`` runs them over every method):

1. ``num_params(tables) == sum(p.numel())`` over the built parameters, exactly and without building them.
2. ``map_ids`` is a pure integer function: equal ids give equal slots, whatever else is in the batch.
3. ``pooled(tables, bags)`` and ``pooled_plain`` equal pooling ``rows(map_ids(ids))`` feature by feature:
   values and gradients.
4. ``rows`` is differentiable in every parameter (gradcheck in float64).
5. ``to_dense()[ids] == rows(map_ids(ids))``.
6. A fresh table's elements have standard deviation ``table.row_std`` and mean 0, whatever the method.
7. ``from_dense(to_dense())`` reproduces the table when the method has a closed form, and raises
   :class:`ConfigError` without touching a weight when it has none.
8. ``split_rows(table, W)``, where it is not ``None``: the rows that the W tables hold for the numbers of an
   id add up to its row, and cut parameters put together are the whole one's
   (``tests/backends/test_row_split.py``).
9. ``write_back(ids, values, cost)`` leaves the rows of ``ids`` no further from ``values``, and changes the
   others by no more than that gain over ``cost``; so does ``write_back_together`` of the rows of all its
   tables (``tests/cache/test_write_back.py``).

With cached rows (:mod:`recemb.cache`) 3 and 5 are of the parameters alone: the engine looks cached rows up
beside them, and ``to_dense`` puts them in their places.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recemb.backends.native import owner_of, pooled_native
from recemb.backends.row_split import RowSplit
from recemb.bags import Bags
from recemb.errors import ConfigError
from recemb.spec import Compression, TableSpec
from recemb_kernels.lookup import TableShape
from recemb_kernels.memory import hint_huge_pages

if TYPE_CHECKING:
    from recemb.cache.hot_rows import HotRowCache

# A block of rows being rebuilt takes at most this many elements (64 MB of fp32).
BLOCK_NUMEL = 2**24


class Memo(dict[Any, Any]):
    """What can be worked out again, such as compiled kernels: copies and pickles of its owner start empty."""

    def __deepcopy__(self, memo: object) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


@dataclass(frozen=True, eq=False)
class Leaving:
    """Rows that leave the cache of a table.

    Attributes:
        table: theirs.
        ids: [E] int64, each once.
        values: [E, D], finite, as are the rows of ``ids`` and :meth:`Backend.read_to_write_back`.
        cost: how often another row is looked up for each time that one of these is, >= 0.
    """

    table: Backend
    ids: Tensor
    values: Tensor
    cost: float


class Backend(nn.Module, ABC):
    """Storage of one table under one compression method.

    Args:
        table: the table.
        peers: the tables that share its storage, ``table`` among them; ``(table,)`` for most methods.
        owner: the backend of the first peer, which holds the parameters, or ``None`` when this is it.
        device: where the parameters live; ``meta`` allocates nothing.
    """

    compression_type: ClassVar[type[Compression]]
    # Whether column k of ``map_ids`` is a row of parameter k: a look-up can then do with the rows it touches.
    slots_are_rows: ClassVar[bool] = False
    # Parameters of which an optimizer steps every row, whatever rows the batch looks up.
    stepped_whole: ClassVar[frozenset[str]] = frozenset()
    # Whether training takes the native kernels only for a fused optimizer.
    native_when_fused: ClassVar[bool] = False

    def __init__(
        self,
        table: TableSpec,
        peers: Sequence[TableSpec],
        owner: Backend | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.table = table
        self.peers = tuple(peers)
        # In a tuple, so that nn.Module does not register the owner's parameters a second time: a shared
        # array then has one state-dict key, and .to(), to_empty() and assign-loading cannot split it.
        self._owner = () if owner is None else (owner,)
        self.memo = Memo()
        # What the kernels read, in this order; fewer or others stand there once a parameter is pruned or
        # parametrized.
        self.layout = tuple(self.param_shapes(self.peers).items())
        # Filled in by :func:`recemb.backends.build`: a cache is a table of plain rows, a backend itself.
        # Not a child of None: torch would take the keys of another table's cache for known, and drop them.
        self.cache: HotRowCache | None = None
        if owner is None:
            dtype = getattr(torch, table.dtype)
            for name, shape in self.layout:
                empty = torch.empty(shape, device=device, dtype=dtype)
                hint_huge_pages(empty)
                self.register_parameter(name, nn.Parameter(empty))

    @classmethod
    def storage_key(cls, table: TableSpec) -> str:
        """Tables of one method with equal keys share their storage."""
        return table.name

    @classmethod
    @abstractmethod
    def param_shapes(cls, tables: Sequence[TableSpec]) -> dict[str, tuple[int, int]]:
        """Name and 2-D shape of each parameter of one storage.

        Args:
            tables: every table that shares the storage.

        Raises:
            ConfigError: the tables cannot be stored together, or not with these settings.
        """

    @classmethod
    def num_params(cls, tables: Sequence[TableSpec]) -> int:
        """Exact number of parameters of the storage shared by ``tables``, cached rows too; builds nothing."""
        cached = sum(table.cache_rows * table.embedding_dim for table in tables)
        return cached + sum(math.prod(shape) for shape in cls.param_shapes(tables).values())

    @classmethod
    def stored_settings(cls, table: TableSpec, peers: Sequence[TableSpec]) -> dict[str, Any]:
        """Settings by which parameters of the same names and shapes are other rows, as plain data.

        State dicts keep them beside the parameters.

        Args:
            table: one of ``peers``.
            peers: every table that shares the storage.
        """
        return {}

    @classmethod
    def split_rows(cls, table: TableSpec, ranks: int) -> RowSplit | None:
        """How this table's rows are cut over ``ranks``; ``None`` for a method without a store of rows.

        Raises:
            ConfigError: it has too few rows for so many ranks.
        """
        return None

    @abstractmethod
    def map_ids(self, ids: Tensor) -> Tensor:
        """Slots of each id: [L] int64 -> [L, K] int64."""

    @abstractmethod
    def rows(self, slots: Tensor) -> Tensor:
        """The rows stored at ``slots``: [L, K] -> [L, D], the paper's formula in plain torch."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh parameters from torch's generator so that rows have deviation ``table.row_std``."""

    def native_shape(self) -> TableShape | None:
        """What the native kernels need to know of this storage, or ``None`` when they cannot serve it."""
        return None

    def lacks_kernel(self) -> str | None:
        """Why the native kernels of its method cannot serve this storage; ``None`` when they can."""
        return None

    @classmethod
    def pooled(cls, tables: Sequence[Any], bags: Bags) -> Tensor:
        """Pool every feature of a batch in its table: by the native kernels, or :meth:`pooled_plain`.

        Args:
            tables: F backends of this method, ``tables[f]`` for feature f; one may occur several times.
            bags: F features, ids already checked.

        Returns:
            [B, sum of the tables' D].
        """
        native = pooled_native(tables, bags)
        return cls.pooled_plain(tables, bags) if native is None else native

    @classmethod
    def pooled_plain(cls, tables: Sequence[Any], bags: Bags) -> Tensor:
        """The same in plain torch, on any device and dtype."""
        for table in dict.fromkeys(map(owner_of, tables)):
            table.renew()
        pooled = [table.pooled_feature(bags.feature(f)) for f, table in enumerate(tables)]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def pooled_feature(self, bags: Bags) -> Tensor:
        """[B, D]: one feature's bags; each distinct id of the batch is rebuilt once."""
        unique, inverse = torch.unique(bags.ids, return_inverse=True)
        return self.pool(self.rows(self.map_ids(unique)), inverse, bags)

    def pool(self, rows: Tensor, index: Tensor, bags: Bags) -> Tensor:
        """Sum or average ``rows[index]`` over each bag: [U, D], [L] -> [B, D]; an empty bag gives 0."""
        if not rows.shape[0]:
            # embedding_bag refuses an empty table; keep the graph so that gradients are zero, not missing.
            return rows.sum(dim=0, keepdim=True).expand(bags.batch_size, -1)
        return F.embedding_bag(
            index,
            rows,
            bags.offsets,
            mode=self.table.pooling,
            per_sample_weights=None if bags.weights is None else bags.weights.to(rows.dtype),
            include_last_offset=True,
        )

    @property
    def key_base(self) -> int:
        """Rows of the peers before this table: ids plus it are distinct over a shared storage."""
        before = self.peers[: self.peers.index(self.table)]
        return sum(peer.num_embeddings for peer in before)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this table's storage, those of its owner when it shares one; no cached rows."""
        # named_parameters() walks the module tree, which costs more than the kernel at B = 64.
        own = owner_of(self)._parameters
        return {name: parameter for name, parameter in own.items() if parameter is not None}

    def weights(self) -> dict[str, Tensor]:
        """The same as rows are made of them: what their names give, when they are pruned or parametrized."""
        owner = owner_of(self)
        return {name: getattr(owner, name) for name, _ in self.layout}

    def renew(self) -> None:
        """Make what stands in a parameter's place anew, of the parameters as they are now.

        torch does so, for pruned ones, before a module's ``forward``, which nobody calls here.
        """
        owner = owner_of(self)
        if all(name in owner._parameters for name, _ in owner.layout):
            return
        for hook in owner._forward_pre_hooks.values():
            hook(owner, ())

    def __getstate__(self) -> dict[str, Any]:
        # What stands in a parameter's place may have a graph, which torch does not copy.
        state = self.__dict__
        made = {name: state[name] for name, _ in self.layout if isinstance(state.get(name), Tensor)}
        return state | {name: value.detach() for name, value in made.items()}

    @property
    def device(self) -> torch.device:
        """Where this table's storage lies."""
        return self._first.device

    @property
    def row_dtype(self) -> torch.dtype:
        """Of what :meth:`rows` gives."""
        return self._first.dtype

    @property
    def _first(self) -> Tensor:
        owner, name = owner_of(self), self.layout[0][0]
        # Every look-up asks for its device, and a module finds its attributes slowly.
        first = owner._parameters.get(name)
        return getattr(owner, name) if first is None else first

    @torch.no_grad()
    def to_dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` .. ``stop`` - 1 as a dense [stop - start, D] tensor, rebuilt block by block.

        Cached rows are taken from the cache, as in a look-up.
        """
        stop = self.table.num_embeddings if stop is None else stop
        if not 0 <= start <= stop <= self.table.num_embeddings:
            raise ConfigError(
                f"table {self.table.name!r}: rows [{start}, {stop}) are not within "
                f"[0, {self.table.num_embeddings})"
            )
        self.renew()
        parameter = self._first
        if parameter.is_meta:
            raise ConfigError(
                f"table {self.table.name!r} is on the meta device and has no rows yet; call "
                "to_empty(device=...) and reset_parameters() or load a checkpoint first"
            )
        dense = torch.empty(
            stop - start, self.table.embedding_dim, dtype=self.row_dtype, device=parameter.device
        )
        for first, last in self.row_blocks(start, stop):
            ids = torch.arange(first, last, device=parameter.device)
            dense[first - start : last - start] = self.rows(self.map_ids(ids))
        if self.cache is not None:
            slots = ((self.cache.ids >= start) & (self.cache.ids < stop)).nonzero().flatten()
            dense[self.cache.ids[slots] - start] = self.cache.rows(slots[:, None]).to(dense.dtype)
        return dense

    def from_dense(self, weight: Tensor) -> None:
        """Overwrite the parameters, in place, with the method's best approximation of ``weight`` [N, D].

        Cached rows take their values exactly, and stay cached.

        Raises:
            ConfigError: wrong shape or dtype, values that are not finite or not in the table's type, a
                parameter that is pruned or parametrized, or the method has no closed form here.
        """
        expected = (self.table.num_embeddings, self.table.embedding_dim)
        if tuple(weight.shape) != expected or not weight.is_floating_point():
            raise ConfigError(
                f"table {self.table.name!r}: from_dense needs a floating-point tensor of shape {expected}, "
                f"got {weight.dtype} of shape {tuple(weight.shape)}"
            )
        if any(parameter.is_meta for parameter in self.own_parameters().values()):
            raise ConfigError(
                f"table {self.table.name!r} is on the meta device; call to_empty(device=...) first"
            )
        self.check_writable("from_dense", [name for name, _ in self.layout])
        if not _finite(weight, weight.dtype):
            raise ConfigError(f"table {self.table.name!r}: from_dense was given NaN or infinite weights")
        too_large = ConfigError(
            f"table {self.table.name!r}: from_dense was given weights that {self.row_dtype} does not hold, "
            f"it goes to {torch.finfo(self.row_dtype).max:g}; scale them, or give the table a wider data_type"
        )
        if not _finite(weight, self.row_dtype):
            raise too_large
        with torch.no_grad():
            try:
                own, found = self.own_parameters(), self.approximate(weight.detach())
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # of sums that overflow
                raise too_large from error
            # A factor can be larger than the rows.
            if not all(_finite(value, own[name].dtype) for name, value in found.items()):
                raise too_large
            for name, value in found.items():
                own[name].copy_(value)
            if self.cache is not None:
                slots = (self.cache.ids >= 0).nonzero().flatten()
                self.cache.weight[slots] = weight[self.cache.ids[slots]].to(self.cache.weight.dtype)

    def check_writable(self, who: str, names: Sequence[str]) -> None:
        """That some of what rows are made of, and the cached rows, are parameters, which can be written to.

        Args:
            who: wants to.
            names: of this storage's layout.

        Raises:
            ConfigError: one is pruned or parametrized.
        """
        holders: list[tuple[str, Backend, Sequence[str]]] = [("", self, names)]
        if self.cache is not None:
            holders.append((".cache", self.cache, ["weight"]))
        for path, holder, held in holders:
            for name in held:
                if name not in owner_of(holder)._parameters:
                    where = f"collection.embedding_bags[{self.table.name!r}]{path}"
                    raise ConfigError(
                        f"table {self.table.name!r}: {who} cannot write to {name!r}, which is pruned or "
                        "parametrized and is made anew of other parameters; make it a parameter again first, "
                        f"e.g. by torch.nn.utils.prune.remove({where}, {name!r})"
                    )

    def write_back(self, ids: Tensor, values: Tensor, cost: float) -> None:
        """Change the parameters, in place, so that the rows of ``ids`` come close to ``values``.

        What a cached row has learned goes back where other rows are stored too. Each method minimises

            sum over ids of |value - row|**2 + cost * sum over the other rows of |change|**2

        over parameters that it names, and so leaves the rows together no further from ``values`` than they
        were, and the others changed by no more than that gain over ``cost``. Without a cost the rows are met
        exactly where that is possible. Arguments as of :class:`Leaving`.
        """
        raise NotImplementedError(
            f"method {self.table.compression.method!r} does not write rows back; use "
            "cache=HotRows(write_back=False, ...)"
        )

    def write_back_together(self, leaving: Sequence[Leaving]) -> None:
        """:meth:`write_back` of rows of tables of this storage, at once where one's would move another's."""
        for own in leaving:
            own.table.write_back(own.ids, own.values, own.cost)

    def written_parameters(self) -> Sequence[str]:
        """Parameters that :meth:`write_back` changes."""
        return [name for name, _ in self.layout]

    def read_to_write_back(self) -> Sequence[str]:
        """Parameters that :meth:`write_back` reads all of, whatever the ids; they must be finite for it."""
        return ()

    def approximate(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters, by name, that come closest to ``weight`` [N, D] in the Frobenius norm.

        Raises:
            ConfigError: the method has no closed form for this table.
        """
        raise ConfigError(
            f"table {self.table.name!r}: method {self.table.compression.method!r} has no from_dense"
        )

    @property
    def row_numel(self) -> int:
        """Elements that rebuilding a row holds."""
        return self.table.embedding_dim

    def compressed_rows(self, ids: Tensor) -> Tensor:
        """[E, D], ``rows(map_ids(ids))`` of [E] ids, rebuilt block by block, without gradients."""
        found = torch.empty(len(ids), self.table.embedding_dim, dtype=self.row_dtype, device=ids.device)
        with torch.no_grad():
            for first, last in self.row_blocks(0, len(ids)):
                found[first:last] = self.rows(self.map_ids(ids[first:last]))
        return found

    def row_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Split rows [start, stop) into blocks that take at most ``BLOCK_NUMEL`` elements."""
        step = max(1, BLOCK_NUMEL // self.row_numel)
        for first in range(start, stop, step):
            yield first, min(stop, first + step)

    def extra_repr(self) -> str:
        return f"{self.table.num_embeddings}, {self.table.embedding_dim}, {self.table.compression}"


def _finite(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether [rows, W] values are finite in ``dtype``; converted block by block."""
    step = max(1, BLOCK_NUMEL // values.shape[1])
    blocks = (values[first : first + step].to(dtype) for first in range(0, len(values), step))
    return all(bool(torch.isfinite(block).all()) for block in blocks)
