"""Step time of a compressed look-up against fbgemm's uncompressed one, in one process.

    python bench/ops.py                      # every method, N = 10 M, D = 16, B = 4,096
    python bench/ops.py --batch 65536 --ids permuted --optimizer sgd

A step is forward, backward and fused update of one table with one-hot bags. Cases take turns, round by round,
so that a machine that slows down slows all of them; each figure is a percentile over ``--rounds``, and the
ratio is the median of the round-by-round ratios to fbgemm's TBE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchrec
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Compression,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.backends.tt_shapes import flops_per_row, tt_shapes

Step = Callable[[Tensor], None]
_OPTIMIZERS = {
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    "sgd": (torch.optim.SGD, EmbOptimType.EXACT_SGD),
}
_LEARNING_RATE = 0.01
_BATCHES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--ids", choices=["zipf", "permuted", "uniform"], default="zipf")
    parser.add_argument("--optimizer", choices=[*_OPTIMIZERS], default="rowwise_adagrad")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()

    batches = _ids(args.ids, args.rows, args.batch)
    grad = torch.randn(args.batch, args.dim)
    cases: dict[str, Step] = {
        "fbgemm TBE": _tbe(args, grad),
        "torch EmbeddingBag sparse": _sparse(args, grad),
    }
    compressions = {f"TT R={rank}": TensorTrain(rank=rank) for rank in args.ranks} | {
        "ROBE Z=D 1000x": ROBE(compress_rate=1000, block_size=args.dim),
        "QR mult c=4": QuotientRemainder(collisions=4),
        "MD d=4": MixedDimension(dim=4),
        "Dense": Dense(),
    }
    for name, compression in compressions.items():
        cases[f"recemb {name}"] = _recemb(args, compression, grad)
    for step in cases.values():
        for ids in batches[:3]:
            step(ids)
    times = {name: np.empty(args.rounds) for name in cases}
    for k in range(args.rounds):
        for name, step in cases.items():
            times[name][k] = _time(step, batches[k % len(batches)])
    distinct = np.mean([ids.unique().numel() for ids in batches])
    print(
        f"N={args.rows:,} D={args.dim} B={args.batch:,} {args.ids} ids ({distinct:,.0f} distinct a batch), "
        f"{args.optimizer}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    _print(times)
    for rank in args.ranks:
        _, dims = tt_shapes(args.rows, args.dim, TensorTrain(rank=rank))
        flops = flops_per_row(dims, TensorTrain(rank=rank).ranks)
        print(f"TT R={rank}: {flops:,} FLOP a distinct row forward when no product is shared, 3x in a step")


def _print(times: dict[str, np.ndarray]) -> None:
    baseline = next(iter(times.values()))
    print(f"{'case':<28}{'P20 us':>10}{'P50 us':>10}{'P80 us':>10}{'x TBE':>9}")
    for name, samples in times.items():
        p20, p50, p80 = np.percentile(samples, [20, 50, 80]) * 1e6
        print(f"{name:<28}{p20:>10,.0f}{p50:>10,.0f}{p80:>10,.0f}{np.median(samples / baseline):>9.2f}")


def _time(step: Step, ids: Tensor) -> float:
    started = time.perf_counter()
    step(ids)
    return time.perf_counter() - started


def _ids(kind: str, rows: int, batch: int) -> Sequence[Tensor]:
    """Zipf 1.05 in frequency order, the same randomly permuted, or uniform."""
    generator = np.random.default_rng(0)
    permutation = generator.permutation(rows) if kind == "permuted" else None
    batches = []
    for _ in range(_BATCHES):
        u = generator.random(batch)
        ids = (u * rows).astype(np.int64)
        if kind != "uniform":
            # The continuous bounded Zipf: P(id >= x) falls as x**(1 - a).
            power = 1 - 1.05
            ids = ((u * (rows**power - 1) + 1) ** (1 / power)).astype(np.int64).clip(1, rows) - 1
        batches.append(torch.from_numpy(ids if permutation is None else permutation[ids]))
    return batches


def _tbe(args: argparse.Namespace, grad: Tensor) -> Step:
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(args.rows, args.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=_OPTIMIZERS[args.optimizer][1],
        learning_rate=_LEARNING_RATE,
    )
    table.init_embedding_weights_uniform(-0.01, 0.01)
    offsets = torch.arange(args.batch + 1)

    def step(ids: Tensor) -> None:
        table(ids, offsets).backward(grad)

    return step


def _sparse(args: argparse.Namespace, grad: Tensor) -> Step:
    table = torch.nn.EmbeddingBag(args.rows, args.dim, mode="sum", sparse=True, include_last_offset=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=_LEARNING_RATE)
    offsets = torch.arange(args.batch + 1)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        table(ids, offsets).backward(grad)
        optimizer.step()

    return step


def _recemb(args: argparse.Namespace, compression: Compression, grad: Tensor) -> Step:
    """The whole public path: a KeyedJaggedTensor through the collection, id checks included."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name="t",
                num_embeddings=args.rows,
                embedding_dim=args.dim,
                feature_names=["f"],
                compression=compression,
            )
        ]
    )
    apply_optimizer_in_backward(
        _OPTIMIZERS[args.optimizer][0], collection.parameters(), {"lr": _LEARNING_RATE}
    )
    lengths = torch.ones(args.batch, dtype=torch.int64)

    def step(ids: Tensor) -> None:
        features = KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths)
        collection(features).values().backward(grad)

    return step


if __name__ == "__main__":
    main()
