"""``QuantEmbeddingBagCollection``: a trained collection in int8 or half precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, data_type_to_dtype
from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchrecEmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.quant.embedding_modules import (
    MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT,
    _update_embedding_configs,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt
from torchrec.types import ModuleNoCopyMixin

from recemb.backends.base import Backend, Memo
from recemb.backends.memory import MemoryReport, TableMemory
from recemb.bags import Bags, check_bags
from recemb.engine import Engine
from recemb.errors import BatchError, ConfigError
from recemb.inference.rows import kind_of
from recemb.inference.table import QuantizedBackend, build_quantized, stored_bytes
from recemb.spec import DTYPE_BYTES, Dense, TableSpec
from recemb.torchrec_io.configs import as_recemb_config, is_compressed, table_spec
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.inference.dense import (
    check_storable,
    dense_bytes,
    empty_dense,
    in_place,
    quantize_dense,
)
from recemb.torchrec_io.inference.export import Traced
from recemb.torchrec_io.kjt import bags_from_kjt
from recemb.torchrec_io.loading import StrictKeys, check_caches, check_tensors, empty_caches
from recemb.torchrec_io.stored_settings import check_settings, note_settings


class QuantEmbeddingBagCollection(StrictKeys, EmbeddingBagCollectionInterface, ModuleNoCopyMixin):  # type: ignore[misc]
    """A trained :class:`recemb.EmbeddingBagCollection` for serving; made by :meth:`from_float`.

    Uncompressed tables are torchrec's own quantised ones, in the child ``dense``, which torchrec's
    quant sharder takes. Compressed parameters and cached rows are stored row by row: INT8 is a byte a weight,
    with a scale and a bias in half precision a row (:mod:`recemb.inference.rows`); rows of at most 4 weights,
    which that would not make smaller than FP16, are in FP16. The look-up widens the rows it touches.
    Keys and their order are the float module's, and so are state-dict keys:
    ``embedding_bags.<table>.<param>``.

    A module built by this constructor holds zeros until a state dict is loaded.

    Args:
        tables: recemb configs whose ``data_type`` says how each is stored: INT8, FP16 or FP32.
        is_weighted: whether the input carries per-sample weights.
        device: where the parameters live.
        output_dtype: of the pooled values.

    Raises:
        ConfigError: a compressed table cannot be stored as asked.
    """

    def __init__(
        self,
        tables: Sequence[TorchrecEmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str = "cpu",
        output_dtype: torch.dtype = torch.float,
    ) -> None:
        super().__init__()
        target = torch.device(device)
        self._setup(tables, is_weighted, target, output_dtype)
        dense = [config for config in self._configs if config.name not in self.embedding_bags]
        self.dense = empty_dense(dense, is_weighted, target, output_dtype) if dense else None

    def _setup(
        self,
        tables: Sequence[TorchrecEmbeddingBagConfig],
        is_weighted: bool,
        device: torch.device,
        output_dtype: torch.dtype,
    ) -> None:
        """Everything but the uncompressed tables."""
        self._configs = [as_recemb_config(config) for config in tables]
        # What a table is does not depend on how its weights are stored.
        as_trained = [copy.copy(config) for config in self._configs]
        for config in as_trained:
            config.data_type = DataType.FP32
        self._specs = [table_spec(config) for config in as_trained]
        self._is_weighted, self._output_dtype, self._device = is_weighted, output_dtype, device
        compressed = [spec for spec in self._specs if not isinstance(spec.compression, Dense)]
        kinds = {
            config.name: kind_of(data_type_to_dtype(config.data_type))
            for config, spec in zip(self._configs, self._specs, strict=True)
            if not isinstance(spec.compression, Dense)
        }
        self.embedding_bags = nn.ModuleDict(build_quantized(compressed, kinds, device))
        self._engine, self._own_engine, self._memo = Engine(self._specs), Engine(compressed), Memo()
        self._targets, self._dims = self._engine.targets, list(self._engine.dims)
        self._own = [f for f, target in enumerate(self._targets) if target.table in self.embedding_bags]
        self._others = [f for f in range(len(self._dims)) if f not in self._own]
        self._embedding_names = [
            name for names in get_embedding_names_by_table(self._configs) for name in names
        ]
        self.register_state_dict_post_hook(_after_state_dict)
        self.register_load_state_dict_pre_hook(_before_load)

    @classmethod
    def from_float(
        cls, module: EmbeddingBagCollection, use_precomputed_fake_quant: bool = False
    ) -> QuantEmbeddingBagCollection:
        """Quantise a trained collection, as torchrec's ``quantize_embeddings`` asks for.

        Args:
            module: has a ``qconfig`` with the weights' dtype, per table where they differ, and the output's.
            use_precomputed_fake_quant: ignored, as torchrec does.

        Raises:
            ConfigError: no ``qconfig``, or weights that cannot be stored so.
        """
        if getattr(module, "qconfig", None) is None:
            raise ConfigError(
                "the collection has no qconfig; use recemb.torchrec_io.quantize_embeddings(model, torch.int8)"
            )
        configs = copy.deepcopy(module.embedding_bag_configs())
        pruned = getattr(module, MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT, {})
        _update_embedding_configs(configs, module.qconfig, pruned)
        trained = cast(Mapping[str, Backend], module.embedding_bags)
        dense = [config for config in module.embedding_bag_configs() if not is_compressed(config)]
        for backend in trained.values():
            backend.renew()
        weights = {config.name: trained[config.name].weights()["weight"] for config in dense}
        check_storable([config for config in configs if config.name in weights], weights)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._setup(configs, module.is_weighted(), module.device, module.qconfig.activation().dtype)
        for name, table in made.embedding_bags.items():
            if name in pruned:
                raise ConfigError(
                    f"table {name!r} is compressed: its rows cannot be pruned; take it out of the dict"
                )
            cast(QuantizedBackend, table).fill(trained[name])
        made.dense = quantize_dense(dense, weights, module, module.is_weighted()) if dense else None
        made.train(module.training)
        return made

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool a batch, as the float module does.

        Raises:
            BatchError: names table, feature, sample and value; nothing has been computed by then.
        """
        features = maybe_td_to_kjt(features, None)
        # A program that switched gradients off itself would leave them off when it refuses a batch.
        return self._exported(features) if torch.compiler.is_exporting() else self._eager(features)

    @torch.no_grad()
    def _eager(self, features: KeyedJaggedTensor) -> KeyedTensor:
        bags, inverse = bags_from_kjt(features, self._targets, self._is_weighted)
        tables = self._tables()
        pooled = self._in_parts(bags) if tables is None else self._engine(tables, bags).to(self._output_dtype)
        if inverse is not None:
            pieces = torch.split(pooled, self._dims, dim=1)
            pooled = torch.cat([piece[rows] for piece, rows in zip(pieces, inverse, strict=True)], dim=1)
        return KeyedTensor(keys=self._embedding_names, values=pooled, length_per_key=self._dims)

    def _tables(self) -> Mapping[str, Backend] | None:
        """Every table as the engine looks it up; ``None`` when torchrec's module has to look its own up."""
        own = cast("dict[str, Backend]", self.embedding_bags)
        if self.dense is None:
            return own
        # torchrec's weights stay where they are, unless its module is sharded.
        known: tuple[nn.Module, Mapping[str, Backend] | None] | None = self._memo.get("tables")
        if known is None or known[0] is not self.dense or torch.compiler.is_exporting():
            dense = in_place(self.dense, self._specs)
            known = self.dense, None if dense is None else {**dict(own.items()), **dense}
            if not torch.compiler.is_exporting():
                self._memo["tables"] = known
        return known[1]

    def _exported(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The look-up as torch.export records it."""
        tables = self._tables()
        if tables is None:
            raise ConfigError(
                "torch.export takes quantised collections that are on the CPU and not sharded, and whose "
                "uncompressed tables have torchrec's default rows: no row alignment, scales and biases not "
                "apart from the weights, and in FP16 an embedding_dim that is a multiple of 8; export one "
                "that is"
            )
        traced = Traced.of(features, self._targets, self._is_weighted)
        kinds = {name: cast(QuantizedBackend, table).asked for name, table in tables.items()}
        pooled = traced.look_up(self._specs, tables, kinds).to(self._output_dtype)
        return KeyedTensor(keys=self._embedding_names, values=pooled, length_per_key=self._dims)

    def _in_parts(self, bags: Bags) -> Tensor:
        """[B, sum of D], uncompressed tables by torchrec's module."""
        if bags.ids.device != self.device:
            raise BatchError(
                f"the batch is on {bags.ids.device} and the tables on {self.device}; move the batch there, "
                f"e.g. features.to({str(self.device)!r})"
            )
        check_bags(bags, self._targets)
        columns: dict[int, Tensor] = {}
        if self._own:
            part = bags.select(self._own)
            part.checked = True
            own = self._own_engine(cast(Mapping[str, Backend], self.embedding_bags), part)
            pieces = torch.split(own.to(self._output_dtype), [self._dims[f] for f in self._own], dim=1)
            columns.update(zip(self._own, pieces, strict=True))
        dense = self._look_up_dense(bags.select(self._others))
        columns.update({f: dense[name] for f, name in self._dense_names.items()})
        return torch.cat([columns[f] for f in range(len(self._dims))], dim=1)

    def _look_up_dense(self, bags: Bags) -> dict[str, Tensor]:
        given = KeyedJaggedTensor(
            keys=[self._targets[f].feature for f in self._others],
            values=bags.ids,
            offsets=bags.offsets,
            weights=None if bags.weights is None else bags.weights.float(),
        )
        pooled: KeyedTensor = cast(nn.Module, self.dense)(given)
        return cast("dict[str, Tensor]", pooled.to_dict())

    @property
    def _dense_names(self) -> dict[int, str]:
        """What the dense module calls each feature's columns; it does not know of the compressed tables."""
        configs = [config for config in self._configs if config.name not in self.embedding_bags]
        names = [name for names in get_embedding_names_by_table(configs) for name in names]
        return dict(zip(self._others, names, strict=True))

    def memory(self) -> MemoryReport:
        """Per table the bytes it takes now, and those of the uncompressed float32 table."""
        own = stored_bytes(cast(Mapping[str, Any], self.embedding_bags))
        return MemoryReport(tuple(self._memory_of(spec, own) for spec in self._specs))

    def _memory_of(self, spec: TableSpec, own: Mapping[str, int]) -> TableMemory:
        stored = own[spec.name] if spec.name in own else dense_bytes(cast(nn.Module, self.dense), spec.name)
        return TableMemory(
            table=spec.name,
            num_embeddings=spec.num_embeddings,
            embedding_dim=spec.embedding_dim,
            method=spec.compression.method,
            num_bytes=stored,
            dense_bytes=spec.dense_numel * DTYPE_BYTES["float32"],
        )

    def embedding_bag_configs(self) -> list[TorchrecEmbeddingBagConfig]:
        """The tables' configs; ``data_type`` says how each is stored."""
        return list(self._configs)

    def is_weighted(self) -> bool:
        """Whether the input carries per-sample weights."""
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        """Of the pooled values."""
        return self._output_dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        parameter = next(self.embedding_bags.parameters(), None)
        return self._device if parameter is None else parameter.device

    def _get_name(self) -> str:
        return "QuantizedEmbeddingBagCollection"


_DENSE, _BAGS = "dense.embedding_bags.", "embedding_bags."


def _after_state_dict(
    module: QuantEmbeddingBagCollection, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Keys of uncompressed tables as in the float module."""
    note_settings(module._specs, metadata)
    for key in [key for key in state if key.startswith(prefix + _DENSE)]:
        state[prefix + _BAGS + key[len(prefix + _DENSE) :]] = state.pop(key)


def _before_load(
    module: QuantEmbeddingBagCollection,
    state: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    *_: object,
) -> None:
    check_settings(module._specs, state, prefix, metadata)
    tables = {key.removeprefix(_BAGS): tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    assign = bool(metadata.get("assign_to_params_buffers"))
    check_caches(module._specs, state, prefix, counted=False)
    check_tensors(tables, state, prefix, assign=assign)
    if assign and module.dense is not None:
        raise ConfigError(
            "torchrec's quantised tables look up the memory they were made with, not tensors that are "
            "assigned in its place; load without assign=True"
        )
    own = module.embedding_bags
    caches = {name: table.cache for name, table in own.items() if table.cache is not None}
    empty_caches(module._specs, caches, state, prefix)
    for key in [key for key in state if key.startswith(prefix + _BAGS)]:
        rest = key[len(prefix + _BAGS) :]
        if rest.split(".")[0] not in own:
            state[prefix + _DENSE + rest] = state.pop(key)
