"""From a configuration and a prepared log to what the loop needs: tables, model, optimizer, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recemb.data.click_log import ClickBatch, ClickLog
from recemb.data.layout import SPLITS
from recemb.errors import ConfigError
from recemb.models import dlrm
from recemb.planner.budget import BudgetedTables, compress
from recemb.spec import TableSpec
from recemb.torchrec_io.batches import to_batch
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.training.config import RunConfig
from recemb.training.seeds import derive_seed, seeded
from recemb.training.table_step import find_collection

# --optimizer -> the optimizer of the tables, and that of the dense layers.
_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]] = {
    "sgd": (torch.optim.SGD, torch.optim.SGD),
    "adagrad": (torch.optim.Adagrad, torch.optim.Adagrad),
    "rowwise_adagrad": (RowWiseAdagrad, torch.optim.Adagrad),
    "adam": (torch.optim.Adam, torch.optim.Adam),
}


@dataclass(frozen=True)
class ClickBatches:
    """The log's batches as torchrec batches, in the order and number that the configuration asks for."""

    log: ClickLog
    config: RunConfig
    hash_sizes: tuple[int | None, ...] | None
    rank: int = 0
    world_size: int = 1

    def train(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """One epoch of the train split; shuffled anew each epoch when ``shuffle_batches`` is set.

        Args:
            epoch: its number.
            start_batch: the first batch to give, where a stopped run goes on.
        """
        config = self.config
        shuffle_seed = derive_seed(config.seed, "shuffle", epoch) if config.shuffle_batches else None
        return self._read("train", shuffle_seed, start_batch)

    def evaluation(self, split: str) -> Iterator[Batch]:
        """The val or test split in time order."""
        return self._read(split, None, 0)

    def count(self, split: str) -> int:
        """How many batches one pass over ``split`` has, on every rank alike."""
        # Rank 0 has the most: where the last rows do not reach every rank, some get an empty batch.
        batches = self.log.num_batches(split, self._batch_size(split), 0, self.world_size)
        limit = self._limit(split)
        return batches if limit is None else min(batches, limit)

    def num_rows(self, split: str, index: int) -> int:
        """Rows of batch ``index`` of a pass, over all ranks."""
        whole = self._batch_size(split) * self.world_size
        return min(whole, self.log.num_rows(split) - index * whole)

    def limited_rows(self) -> dict[str, int]:
        """Rows of one pass over all ranks, for each split of which ``limit_*_batches`` leaves some out."""
        rows = {s: self.count(s) * self._batch_size(s) * self.world_size for s in SPLITS}
        return {split: used for split, used in rows.items() if used < self.log.num_rows(split)}

    def _read(self, split: str, shuffle_seed: int | None, start_batch: int) -> Iterator[Batch]:
        clicks = self.log.batches(
            split,
            self._batch_size(split),
            shuffle_seed=shuffle_seed,
            rank=self.rank,
            world_size=self.world_size,
            start_batch=start_batch,
            limit_batches=self._limit(split),
        )
        names = self.log.feature_names
        empty = ClickBatch(
            dense=np.empty((0, len(self.log.dense_names)), np.float32),
            ids=np.empty((len(names), 0), np.int64),
            labels=np.empty(0, np.float32),
        )
        for _ in range(start_batch, self.count(split)):
            yield to_batch(next(clicks, empty), names, self.hash_sizes)

    def _batch_size(self, split: str) -> int:
        assert self.config.test_batch_size is not None  # the configuration fills it in
        return self.config.batch_size if split == "train" else self.config.test_batch_size

    def _limit(self, split: str) -> int | None:
        limits = {
            "train": self.config.limit_train_batches,
            "val": self.config.limit_val_batches,
            "test": self.config.limit_test_batches,
        }
        return limits[split]


def open_log(config: RunConfig) -> ClickLog:
    """Open ``data_dir`` and check that the configuration fits it, before anything is built.

    Raises:
        DataError: the directory is not a prepared log.
        ConfigError: another data set than ``dataset_name``, an empty train split, or ``patience`` without a
            validation split.
    """
    log = ClickLog.open(config.data_dir)
    found = log.stats.get("dataset_name")
    if config.dataset_name is not None and found is not None and found != config.dataset_name:
        raise ConfigError(
            f"--dataset_name {config.dataset_name}: {config.data_dir} holds {found}; "
            "give the directory of that data set, or leave --dataset_name out"
        )
    if log.num_rows("train") == 0:
        raise ConfigError(f"{config.data_dir} has no row to train on; prepare more rows")
    if config.patience is not None and log.num_rows("val") == 0:
        raise ConfigError(
            f"--patience {config.patience} needs a validation split and {config.data_dir} has none; "
            "prepare it with --val_fraction 0.1, or leave --patience out"
        )
    return log


def make_batches(config: RunConfig, log: ClickLog, rank: int = 0, world_size: int = 1) -> ClickBatches:
    """This rank's batches of ``log``; ids are folded for tables smaller than their feature's vocabulary."""
    sizes = table_sizes(config, log)
    fold = [size if size < n else None for size, n in zip(sizes, log.num_embeddings_per_feature, strict=True)]
    hash_sizes = tuple(fold) if any(size is not None for size in fold) else None
    return ClickBatches(log, config, hash_sizes, rank, world_size)


def table_sizes(config: RunConfig, log: ClickLog) -> list[int]:
    """Rows of each table: the vocabulary's, capped by ``num_embeddings``, or as given per feature."""
    vocabulary = log.num_embeddings_per_feature
    if config.num_embeddings_per_feature is not None:
        given = config.num_embeddings_per_feature
        if len(given) != len(vocabulary):
            raise ConfigError(
                f"--num_embeddings_per_feature has {len(given)} sizes and {config.data_dir} has "
                f"{len(vocabulary)} categorical features; give one size for each"
            )
        return list(given)
    if config.num_embeddings is not None:
        return [min(rows, config.num_embeddings) for rows in vocabulary]
    return list(vocabulary)


def choose_tables(config: RunConfig, log: ClickLog) -> BudgetedTables:
    """One table per categorical feature (``t_<feature>``, as dlrm_main names them), compressed as asked."""
    tables = [
        TableSpec(
            name=f"t_{feature}",
            num_embeddings=size,
            embedding_dim=config.embedding_dim,
            feature_names=(feature,),
        )
        for feature, size in zip(log.feature_names, table_sizes(config, log), strict=True)
    ]
    rate, threshold = config.compress_rate or 1.0, config.method_threshold
    return compress(tables, config.method, rate, threshold, config.hot_rows)


def build_model(config: RunConfig, log: ClickLog, tables: BudgetedTables) -> nn.Module:
    """The click model on ``config.device``, initialised from the configuration's seed."""
    assert config.dense_arch_layer_sizes is not None  # the configuration fills it in
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu, or see recemb doctor")
    with seeded(config.seed, "tables"):
        collection = EmbeddingBagCollection(tables=to_configs(tables.tables), device=config.device)
    with seeded(config.seed, "dense_layers"):
        model: nn.Module = dlrm(
            collection,
            len(log.dense_names),
            config.dense_arch_layer_sizes,
            config.over_arch_layer_sizes,
            config.device,
            config.interaction_type,
            config.dcn_num_layers,
            config.dcn_low_rank_dim,
        )
        return model.to(config.device)


def optimizer_settings(
    config: RunConfig,
) -> tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer of the tables, that of the dense layers, and the arguments of both."""
    settings: dict[str, Any] = {"lr": config.learning_rate}
    if config.eps is not None:
        settings["eps"] = config.eps
    return *_OPTIMIZERS[config.optimizer], settings


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Attach the tables' optimizer to their backward, and combine it with the dense layers' optimizer.

    Where a kernel takes the tables' step, no gradient of a table's size is made, and Adam moves and decays
    the rows of the batch only, as ``torch.optim.SparseAdam`` and FBGEMM's do. Elsewhere (no compiler, CUDA)
    plain torch steps, and its Adam moves every row. ``rowwise_adagrad`` keeps one sum a row of the tables,
    as torchrec's does, and gives the dense layers Adagrad.

    Returns:
        a ``CombinedOptimizer`` whose keys are the model's parameter names; call it once per model.
    """
    tables, layers, settings = optimizer_settings(config)
    # The fused CPU kernels update a parameter in one pass over memory: 8 instead of 53 ms for 9.6 M weights.
    fused: dict[str, Any] = {"fused": config.device == "cpu" or layers is not torch.optim.Adagrad}
    path, collection = find_collection(model)
    in_backward = settings | (fused if tables is layers else {})
    _apply_optimizer_in_backward(tables, collection.parameters(), in_backward)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: layers(parameters, **settings, **fused),
    )
    optimizer: torch.optim.Optimizer = CombinedOptimizer([(path, collection.fused_optimizer), dense])
    return optimizer
