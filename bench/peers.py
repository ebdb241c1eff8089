"""The peers: fbgemm's table-batched embedding, torch's own embedding bags, and tensorly-torch's tensor train.

Each class holds tables of one (rows, D, optimizer) and has a dict ``steps``: path -> one step on a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from bench.ids import Batch
from bench.settings import EMPTY, FORWARD, FUNCTIONAL, MODULE, OP, SPARSE, TBE, TLTORCH, Setting
from recemb.backends.tt_shapes import tt_shapes
from recemb.spec import TensorTrain

Step = Callable[[Batch], object]
LEARNING_RATE = 0.01
_TLTORCH_BYTES = 10**9
_PLACES = {
    "cpu": (EmbeddingLocation.HOST, ComputeDevice.CPU),
    "cuda": (EmbeddingLocation.DEVICE, ComputeDevice.CUDA),
}
_FUSED = {"rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "sgd": EmbOptimType.EXACT_SGD}


def feature_names(tables: int) -> list[str]:
    """Names of the features, one a table."""
    return [f"cat_{k}" for k in range(tables)]


def absent(case: str, setting: Setting) -> str | None:
    """Why a peer cannot be measured at a setting, or ``None``."""
    if case not in (TBE, FUNCTIONAL) and len(setting.rows) > 1:
        return "one table only"
    if not case.startswith(TLTORCH):
        return None
    missing = [name for name in ("tltorch", "tensorly", "scipy", "opt_einsum") if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install --no-deps -r requirements-bench.txt"
    rank = int(case.removeprefix(TLTORCH))
    _, dim_shape = tt_shapes(setting.rows[0], setting.dim, TensorTrain(rank=rank))
    # It gathers a slice of the middle core for every id.
    gathered = 4 * setting.batch * setting.hots * rank * rank * dim_shape[1]
    if gathered > _TLTORCH_BYTES:
        return f"it gathers {gathered / 1e9:.1f} GB a step; the limit is {_TLTORCH_BYTES / 1e9:.0f} GB"
    return None


class TBECollection(nn.Module):
    """One uncompressed fbgemm TBE behind an EmbeddingBagCollection's interface.

    With F tables of D columns, it maps a KeyedJaggedTensor of F keys to a KeyedTensor [B, F * D]; backward
    updates the tables (fused optimizer).

    Args:
        rows: N of each table.
        dim: D.
        optimizer: ``rowwise_adagrad`` or ``sgd``.
        learning_rate: of the fused optimizer.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        rows: Sequence[int],
        dim: int,
        optimizer: str,
        learning_rate: float = LEARNING_RATE,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.names = feature_names(len(rows))
        self.dims = [dim] * len(rows)
        self.configs = [
            EmbeddingBagConfig(name=f"t_{f}", num_embeddings=n, embedding_dim=dim, feature_names=[f])
            for f, n in zip(self.names, rows, strict=True)
        ]
        place = _PLACES[device]
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(n, dim, *place) for n in rows],
            optimizer=_FUSED[optimizer],
            learning_rate=learning_rate,
        )
        for weight in self.weights():
            weight.uniform_(-(weight.shape[0] ** -0.5), weight.shape[0] ** -0.5)

    def weights(self) -> list[Tensor]:
        """[N, D] views of the tables."""
        views: list[Tensor] = self.tables.split_embedding_weights()
        return [view.detach() for view in views]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """As torchrec's."""
        return self.configs

    def is_weighted(self) -> bool:
        """As torchrec's."""
        return False

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.tables(features.values(), features.offsets())
        return KeyedTensor(keys=self.names, values=pooled, length_per_key=self.dims)


class TBETables:
    """``fbgemm TBE``: ready ids and offsets, and from a KeyedJaggedTensor to a KeyedTensor."""

    def __init__(self, rows: Sequence[int], dim: int, optimizer: str, device: str = "cpu") -> None:
        self.collection = TBECollection(rows, dim, optimizer, device=device)
        self.steps: dict[str, Step] = {OP: self._op, MODULE: self._module, FORWARD: self._forward}

    def _op(self, batch: Batch) -> None:
        self.collection.tables(batch.ids, batch.offsets).backward(batch.grad)

    def _module(self, batch: Batch) -> None:
        features = KeyedJaggedTensor(keys=self.collection.names, values=batch.ids, lengths=batch.lengths)
        self.collection(features).values().backward(batch.grad)

    @torch.no_grad()
    def _forward(self, batch: Batch) -> None:
        self.collection.tables(batch.ids, batch.offsets)


class FunctionalTables:
    """``F.embedding_bag``, forward only, a call a table, on the TBE's own weights."""

    def __init__(self, tbe: TBETables) -> None:
        self.weights = tbe.collection.weights()
        self.steps: dict[str, Step] = {FORWARD: self._forward}

    @torch.no_grad()
    def _forward(self, batch: Batch) -> list[Tensor]:
        # All bags are equally long: every table's offsets are the first one's.
        offsets = batch.offsets[: batch.grad.shape[0] + 1]
        return [
            F.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True)
            for ids, weight in zip(batch.ids.chunk(len(self.weights)), self.weights, strict=True)
        ]


class SparseTables:
    """``nn.EmbeddingBag``: ``nn.EmbeddingBag(sparse=True)`` with SGD, whatever the fused optimizer is."""

    def __init__(self, rows: int, dim: int) -> None:
        self.bag = nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, include_last_offset=True)
        self.optimizer = torch.optim.SGD(self.bag.parameters(), lr=LEARNING_RATE)
        self.steps: dict[str, Step] = {OP: self._op}

    def _op(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.bag(batch.ids, batch.offsets).backward(batch.grad)
        self.optimizer.step()


class _Empty(torch.autograd.Function):
    """[B, D] that nothing is written to; its gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ids: Tensor, offsets: Tensor, dim: int) -> Tensor:
        return torch.empty(offsets.shape[0] - 1, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, None


class EmptyTables:
    """``empty step``: an autograd function that computes nothing, for one table of any size.

    The time that torch itself takes to record and run back a step, which no look-up in Python can be under.
    """

    def __init__(self, dim: int) -> None:
        self.parameter = torch.zeros((), requires_grad=True)
        self.dim = dim
        self.steps: dict[str, Step] = {OP: self._op}

    def _op(self, batch: Batch) -> None:
        _Empty.apply(self.parameter, batch.ids, batch.offsets, self.dim).backward(batch.grad)


class TLTorchTables:
    """``tltorch R=r``: tensorly-torch's block tensor train, in the shape of our own, with dense SGD."""

    def __init__(self, rows: int, dim: int, rank: int) -> None:
        from tltorch import FactorizedEmbedding

        row_shape, dim_shape = tt_shapes(rows, dim, TensorTrain(rank=rank))
        # It takes no more rows than the product of the factors, and no fewer.
        self.embedding = FactorizedEmbedding(
            torch.tensor(row_shape).prod().item(),
            dim,
            auto_tensorize=False,
            tensorized_num_embeddings=row_shape,
            tensorized_embedding_dim=dim_shape,
            factorization="blocktt",
            rank=rank,
        )
        self.optimizer = torch.optim.SGD(self.embedding.parameters(), lr=LEARNING_RATE)
        self.steps: dict[str, Step] = {OP: self._op, FORWARD: torch.no_grad()(self._pooled)}

    def _pooled(self, batch: Batch) -> Tensor:
        rows: Tensor = self.embedding(batch.ids)
        bags = batch.grad.shape[0]
        return rows if rows.shape[0] == bags else rows.view(bags, -1, rows.shape[1]).sum(1)

    def _op(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self._pooled(batch).backward(batch.grad)
        self.optimizer.step()


def build_peer(case: str, rows: Sequence[int], dim: int, optimizer: str, built: dict[str, Any]) -> Any:
    """The tables of a peer; ``built`` holds those that exist already (F.embedding_bag reads the TBE's)."""
    if case == TBE:
        return TBETables(rows, dim, optimizer)
    if case == FUNCTIONAL:
        return FunctionalTables(built[TBE])
    if case == SPARSE:
        return SparseTables(rows[0], dim)
    if case == EMPTY:
        return EmptyTables(dim)
    return TLTorchTables(rows[0], dim, int(case.removeprefix(TLTORCH)))
