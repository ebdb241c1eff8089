"""What the sharded form of a collection takes over from it, and how torchrec's planners see its tables."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torchrec
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig

from recemb.backends import build, storages
from recemb.backends.base import Backend
from recemb.id_maps.radix import ceil_div
from recemb.optim.attachment import Attachment
from recemb.spec import Dense, TableSpec
from recemb.torchrec_io.configs import table_spec
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection

_ADAMS = (torch.optim.Adam, torchrec.optim.Adam)
_IN_BACKWARD = ("_in_backward_optimizers", "_optimizer_classes", "_optimizer_kwargs")


@dataclass(frozen=True, eq=False)
class CompressedTables:
    """The tables of a collection that recemb's engine looks up on the ranks.

    These are the compressed ones and, on the CPU, uncompressed ones with Adam attached: fbgemm, which serves
    all other uncompressed tables, has no Adam there.

    Attributes:
        specs: by table name, in the collection's order.
        attached: ``<table>.<param>`` -> its optimizer in the backward.
        frozen: the ``<table>.<param>`` that take no gradient.
        micro_batch_rows: as given to the collection.
    """

    specs: Mapping[str, TableSpec]
    attached: Mapping[str, Attachment]
    frozen: frozenset[str]
    micro_batch_rows: int | None

    @classmethod
    def of(cls, module: EmbeddingBagCollection, device: torch.device | None = None) -> CompressedTables:
        """Those of ``module``.

        Args:
            device: where the tables will live; where they are when ``None``.

        Raises:
            ConfigError: a parameter has several optimizers attached.
        """
        every = [table_spec(config) for config in module.embedding_bag_configs()]
        specs = {spec.name: spec for spec in every if _is_ours(module, spec, device or module.device)}
        attached, frozen = {}, set()
        for name in specs:
            for param, parameter in module.embedding_bags[name].named_parameters():
                key = f"{name}.{param}"
                found = Attachment.of(key, parameter)
                if found is not None:
                    attached[key] = found
                if not parameter.requires_grad:
                    frozen.add(key)
        return cls(specs, attached, frozenset(frozen), module.micro_batch_rows)

    @cached_property
    def storages(self) -> list[tuple[type[Backend], list[TableSpec]]]:
        """The tables grouped by the storage they share; the first of each holds it."""
        return storages(self.specs.values())

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """``<table>.<tensor>`` -> a stand-in on ``meta`` for all that the tables keep, whole.

        Parameters and, of a cached table, its rows (``<table>.cache.weight``) and buffers: what the state
        dict of the collection on one device holds of them.
        """
        built = nn.ModuleDict(build(list(self.specs.values()), torch.device("meta")))
        return dict(built.state_dict(keep_vars=True))


def _is_ours(module: EmbeddingBagCollection, spec: TableSpec, device: torch.device) -> bool:
    if not isinstance(spec.compression, Dense):
        return True
    # The classes, which a table that is only planned carries too.
    kinds = getattr(module.embedding_bags[spec.name].weight, "_optimizer_classes", ())
    return device.type == "cpu" and any(issubclass(kind, _ADAMS) for kind in kinds)


class LogicalTables:
    """A collection as torchrec's sharded module and planners read it: one 2-D weight per table.

    A compressed table is stood in for by a proxy on ``meta`` of ceil(P / D) rows of D columns, which tells
    the stock estimators its P parameters and its D columns. Tables that share one array count it once.

    Args:
        module: the collection.
        tables: its compressed tables.
        communication_slices: into how many slices torchrec is to part them, which it asks a class method for.
    """

    device = torch.device("meta")

    def __init__(
        self, module: EmbeddingBagCollection, tables: CompressedTables, communication_slices: int = 1
    ) -> None:
        self._module = module
        self.tables = tables
        self.communication_slices = communication_slices

    def embedding_bag_configs(self) -> list[TorchrecEmbeddingBagConfig]:
        configs: list[TorchrecEmbeddingBagConfig] = self._module.embedding_bag_configs()
        return configs

    def is_weighted(self) -> bool:
        return bool(self._module.is_weighted())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``embedding_bags.<table>.weight`` of every table; the proxies say nothing of optimizers.

        torchrec maps an optimizer to one of fbgemm's, which compressed tables do not depend on.
        """
        proxies = self.proxies()
        for config in self.embedding_bag_configs():
            name = config.name
            weight = proxies[name] if name in proxies else self._dense(name)
            yield f"embedding_bags.{name}.weight", weight

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def for_planner(self) -> dict[str, nn.Parameter]:
        """Table name -> weight or proxy; the proxies carry the optimizers, whose state the planner counts."""
        proxies = self.proxies()
        for _, peers in self.tables.storages:
            own = next(self._module.embedding_bags[peers[0].name].parameters(recurse=False))
            for name in _IN_BACKWARD:
                if hasattr(own, name):
                    setattr(proxies[peers[0].name], name, copy.copy(getattr(own, name)))
        names = [config.name for config in self.embedding_bag_configs()]
        return {name: proxies[name] if name in proxies else self._dense(name) for name in names}

    def proxies(self) -> dict[str, nn.Parameter]:
        """The stand-in of each compressed table."""
        made = {}
        for backend, peers in self.tables.storages:
            for table in peers:
                numel = backend.num_params(peers) if table is peers[0] else 0
                rows = max(1, ceil_div(numel, table.embedding_dim))
                dtype = getattr(torch, table.dtype)
                made[table.name] = nn.Parameter(
                    torch.empty(rows, table.embedding_dim, dtype=dtype, device="meta")
                )
        return made

    def _dense(self, name: str) -> nn.Parameter:
        weight: nn.Parameter = self._module.embedding_bags[name].weight
        if hasattr(weight, "_optimizer_kwargs"):
            # torchrec writes to it; the user's own dict stays as it is.
            weight._optimizer_kwargs = [dict(arguments) for arguments in weight._optimizer_kwargs]
        return weight
