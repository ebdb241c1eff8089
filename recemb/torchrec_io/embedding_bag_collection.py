"""``EmbeddingBagCollection``: torchrec's module, with compressed storage behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchrecEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from recemb.backends import build
from recemb.backends.base import Backend, Memo
from recemb.backends.dense import DenseBackend
from recemb.backends.memory import MemoryReport, memory_report
from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.metrics import CacheMetrics
from recemb.engine import Engine
from recemb.errors import ConfigError
from recemb.spec import TableSpec, as_python, is_int
from recemb.torchrec_io.configs import as_recemb_config, table_spec
from recemb.torchrec_io.fused_optimizer import CollectionOptimizer
from recemb.torchrec_io.kjt import bags_from_kjt, state_of
from recemb.torchrec_io.loading import StrictKeys, check_caches, check_tensors, empty_caches
from recemb.torchrec_io.replicated import refuse_to_drift, warn_of_replication
from recemb.torchrec_io.stored_settings import check_settings, note_settings
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.verdict import poll


class EmbeddingBagCollection(StrictKeys, TorchrecEmbeddingBagCollection):  # type: ignore[misc] # torchrec ships no types
    """A drop-in for ``torchrec.EmbeddingBagCollection`` whose tables may be compressed.

    With F features, B samples and table dimensions D_f, it maps a ``KeyedJaggedTensor`` of F keys to a
    ``KeyedTensor`` of values [B, sum of D_f]: the sum or mean over each bag of its rows, times the
    per-sample weights when ``is_weighted``. Keys, their order, dtypes and state-dict keys
    (``embedding_bags.<table>.<param>``) follow torchrec; uncompressed tables give the same bits (weighted
    bags to a rounding, where native kernels run).

    Args:
        tables: recemb configs, or plain torchrec configs for uncompressed tables.
        is_weighted: whether the input carries per-sample weights.
        device: where the parameters live, torch's default device when ``None``; ``meta`` allocates nothing.
        micro_batch_rows: distinct rows (on a GPU of all tables of one shape, else of a table) whose products
            of cores are computed at once, which bounds the workspace whatever the batch; ``None`` for 2**13
            on the CPU and 2**18 on a GPU, where batches of more than 2**17 ids take a power of two that is
            no more.

    Raises:
        ConfigError: a table that cannot be stored as asked, or ``micro_batch_rows`` that is no int in
            [1, 2**31), before anything is allocated.

    Example::

        #        0       1        2   <- sample
        # "f1"   [0,1]   []       [2]
        # "f2"   [3]     [4]      [5,6,7]
        ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name="t1", num_embeddings=1_000_000, embedding_dim=16,
                                   feature_names=["f1"], compression=TensorTrain(rank=16)),
                EmbeddingBagConfig(name="t2", num_embeddings=100, embedding_dim=8, feature_names=["f2"]),
            ]
        )
        features = KeyedJaggedTensor(
            keys=["f1", "f2"],
            values=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]),
            lengths=torch.tensor([2, 0, 1, 1, 1, 3]),
        )
        ebc(features)["f1"]   # [3, 16]
        print(ebc.memory())   # t1: 31,744 bytes instead of 64,000,000
    """

    def __init__(
        self,
        tables: Sequence[TorchrecEmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        micro_batch_rows: int | None = None,
    ) -> None:
        micro_batch_rows = as_python(micro_batch_rows)
        if micro_batch_rows is not None and not (is_int(micro_batch_rows) and micro_batch_rows >= 1):
            raise ConfigError(f"micro_batch_rows={micro_batch_rows!r} must be an int >= 1, e.g. 8192")
        if micro_batch_rows is not None and micro_batch_rows >= 2**31:
            raise ConfigError(f"micro_batch_rows={micro_batch_rows} must be below 2**31, e.g. 8192")
        configs = [as_recemb_config(config) for config in tables]
        specs = [table_spec(config) for config in configs]
        _check_weighted_mean(specs, is_weighted)
        target = torch.device(device) if device is not None else torch.get_default_device()
        built = build(specs, target)
        # The parent's own tables are placeholders on meta, replaced below: N x D is never allocated.
        super().__init__(tables=configs, is_weighted=is_weighted, device=torch.device("meta"))
        for name, backend in built.items():
            self.embedding_bags[name] = backend
        self._device = target
        self._engine = Engine(specs, micro_batch_rows)
        self._ahead = Memo()
        # By stream, when it had prepared the last batch that gave way to another: it has made their offsets.
        self._dropped = Memo()
        self._replication_checked = False
        self.register_state_dict_pre_hook(raise_what_is_pending)
        self.register_state_dict_post_hook(_after_state_dict)
        self.register_load_state_dict_pre_hook(_before_load)
        self._specs = tuple(specs)
        self._cached = [spec.name for spec in specs if spec.cache_rows]
        self.reset_parameters()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool a batch.

        Args:
            features: keys in any order; a TensorDict of jagged tensors is taken too.

        Returns:
            KeyedTensor with float32 values [B, sum of D_f].

        Raises:
            BatchError: names table, feature, sample and value; nothing has been computed by then.
            ConfigError: cached rows train on several ranks that would drift apart; nothing has changed.
        """
        if torch.compiler.is_exporting():
            return self._exported(features)
        if not self._replication_checked:
            self._replication_checked = warn_of_replication(self)
        if self._cached:
            refuse_to_drift([self._backend(table) for table in self._cached])
        ahead = self._ahead.pop(id(features), None) if self._ahead else None
        known = ahead[2] if ahead and ahead[0] is features and ahead[1] == state_of(features) else None
        if ahead is not None and (known is None or known[1] is not None):
            # Bags the engine takes over. A batch that was written to keeps the offsets that were made of it.
            _take_over(*ahead[2])
        dropped = self._dropped.values() if ahead is None and self._dropped and not capturing() else ()
        for handed in dropped:
            handed.take(())
        bags, inverse = self._bags(features) if known is None or known[0].prepared_outside else known
        for handed in dropped:
            handed.take((bags, inverse))
        pooled = self._engine(self.embedding_bags, bags).float()
        if inverse is not None:
            pieces = torch.split(pooled, self._lengths_per_embedding, dim=1)
            pooled = torch.cat([piece[rows] for piece, rows in zip(pieces, inverse, strict=True)], dim=1)
        return KeyedTensor(
            keys=self._embedding_names, values=pooled, length_per_key=self._lengths_per_embedding
        )

    def _exported(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The look-up as torch.export records it: ids are checked in the program too."""
        # Its ops are registered when a program is exported, or loaded.
        from recemb.torchrec_io.inference.export import Traced

        traced = Traced.of(maybe_td_to_kjt(features, None), self._engine.targets, self._is_weighted)
        tables = {config.name: self._backend(config.name) for config in self._embedding_bag_configs}
        return KeyedTensor(
            keys=self._embedding_names,
            values=traced.look_up(self._specs, tables, {}),
            length_per_key=self._lengths_per_embedding,
        )

    def prefetch(self, features: KeyedJaggedTensor) -> None:
        """Prepare the next batch beside what runs now: find cached rows, sort and group its ids.

        It is checked at once. The rest is done in a thread on the CPU; on a GPU on a stream of its own, by a
        CUDA graph once look-ups of as many prepared ids are replayed as one. The :meth:`forward` that is
        given this very object then finds that done; its results do not depend on it, and a batch that has
        been written to since is prepared anew. On the CPU do not write to it before that: the thread may
        still read it. What goes wrong in it is raised by the :meth:`forward`.
        Two batches can be under way; of more, the :meth:`forward` of the first ones finds nothing done.

        Example::

            for features, labels, following in batches:
                loss = model(features, labels)
                ebc.prefetch(following)
                loss.backward()

        Raises:
            BatchError: as in :meth:`forward`.
        """
        bags, inverse = self._bags(features)
        while len(self._ahead) > 1:  # of batches that were never looked up
            handed = self._ahead.pop(next(iter(self._ahead)))[2][0].handed
            if handed is not None:
                self._dropped[handed.stream] = handed
        if self._engine.prefetch(self.embedding_bags, bags):
            self._ahead[id(features)] = features, state_of(features), (bags, inverse)

    def _bags(self, features: KeyedJaggedTensor) -> tuple[Bags, Tensor | None]:
        kjt = maybe_td_to_kjt(features, None)
        return bags_from_kjt(kjt, self._engine.targets, self._is_weighted)

    @property
    def micro_batch_rows(self) -> int | None:
        """Distinct rows of a table that are computed at once; ``None`` for the device's default."""
        return self._engine.micro_batch_rows

    def memory(self) -> MemoryReport:
        """Per table: rows, dim, method, bytes, uncompressed bytes and their ratio; prints as a table."""
        return memory_report(self._specs)

    @property
    def fused_optimizer(self) -> CollectionOptimizer:
        """The optimizers that ``apply_optimizer_in_backward`` attached to the tables, as a live view.

        Keys are ``embedding_bags.<table>.<param>``; an array shared by several tables has one. It takes
        learning-rate schedules, and joins the dense layers' optimizer in torchrec's ``CombinedOptimizer``.

        Raises:
            ConfigError: no optimizer is attached.
        """
        return CollectionOptimizer(dict(self.named_parameters()))

    def to_dense(self, table: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rebuild a table, or its rows [start, stop), as a dense [rows, D] tensor, block by block."""
        return self._backend(table).to_dense(start, stop)

    def from_dense(self, table: str, weight: Tensor) -> None:
        """Overwrite a table, in place, with its method's best approximation of ``weight`` [N, D].

        Exact for ``Dense``, TT-SVD for ``TensorTrain``, truncated SVD for ``MixedDimension``, least squares
        for ``QuotientRemainder`` and for a ``ROBE`` table that has its array to itself.

        Raises:
            ConfigError: wrong shape, weights that are not finite in the table's type, or a ROBE array shared
                with other tables; no weight has changed.
        """
        self._backend(table).from_dense(weight)

    def hot_row_caches(self) -> dict[str, HotRowCache]:
        """The cache of each table that has one (``cache=HotRows(...)``), by table name."""
        backends = {config.name: self._backend(config.name) for config in self._embedding_bag_configs}
        return {name: backend.cache for name, backend in backends.items() if backend.cache is not None}

    def cache_metrics(self) -> dict[str, CacheMetrics]:
        """Per cached table: hit rate, promotions, evictions and write-back error since training began."""
        return {name: cache.metrics() for name, cache in self.hot_row_caches().items()}

    def reset_parameters(self) -> None:
        """Draw fresh parameters for every table; uncompressed tables use their config's ``init_fn``."""
        # torchrec's __init__ calls this before the tables exist.
        if not hasattr(self, "_specs"):
            return
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        configs = self._embedding_bag_configs
        reset_tables({config.name: self._backend(config.name) for config in configs}, configs)

    def _backend(self, table: str) -> Backend:
        if table not in self.embedding_bags:
            raise ConfigError(f"no table {table!r}; the tables are {list(self.embedding_bags.keys())}")
        backend = self.embedding_bags[table]
        assert isinstance(backend, Backend)
        return backend


def _take_over(bags: Bags, inverse: Tensor | None) -> None:
    """Have the current stream wait for the one that has prepared a batch; not where a graph would wait."""
    if bags.handed is not None and not bags.prepared_outside:
        bags.handed.take((bags, inverse))


def reset_tables(tables: Mapping[str, Backend], configs: Sequence[TorchrecEmbeddingBagConfig]) -> None:
    """Draw fresh parameters, by their config's ``init_fn`` where uncompressed, and empty the caches.

    Args:
        tables: by name.
        configs: of these tables, and of others maybe.
    """
    init_fns = {config.name: config.init_fn for config in configs}
    for name, table in tables.items():
        if isinstance(table, DenseBackend):
            with torch.no_grad():
                init_fns[name](table.weight)
        else:
            table.reset_parameters()
        if table.cache is not None:
            table.cache.reset()


def raise_what_is_pending(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a ``state_dict``: what the GPU has found wrong must not end up in a checkpoint unsaid.

    Raises:
        Exception: of an earlier look-up or step.
    """
    poll(wait=True)


def _after_state_dict(
    module: EmbeddingBagCollection, destination: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    note_settings(module._specs, metadata)


def _before_load(
    module: EmbeddingBagCollection,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    *_: Any,
) -> None:
    check_settings(module._specs, state_dict, prefix, metadata)
    check_caches(module._specs, state_dict, prefix)
    own = module.embedding_bags.state_dict(keep_vars=True)
    check_tensors(own, state_dict, prefix, assign=bool(metadata.get("assign_to_params_buffers")))
    empty_caches(module._specs, module.hot_row_caches(), state_dict, prefix)


def _check_weighted_mean(specs: Sequence[TableSpec], is_weighted: bool) -> None:
    for spec in specs:
        if is_weighted and spec.pooling == "mean":
            # nn.EmbeddingBag refuses it, sharded torchrec divides by the count or by the sum of weights
            # depending on the plan: no answer would be the right one.
            raise ConfigError(
                f"table {spec.name!r}: pooling MEAN with is_weighted=True has no agreed meaning; use SUM "
                "with weights divided by the bag length"
            )
