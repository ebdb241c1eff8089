"""Hit rate and step time of one cached table on Zipf ids."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.optim import RowWiseAdagrad

from bench.ids import EXPONENT, draw
from recemb import EmbeddingBagCollection, EmbeddingBagConfig, HotRows, TensorTrain

DIM = 16


@dataclass(frozen=True)
class StepRow:
    """One cache size, or no cache (fraction 0).

    Args:
        ids: ``zipf`` in frequency order, ``permuted`` the same ids shuffled.
        hit_rate: like evictions and write-back error, of the timed steps.
        ideal_hit_rate: of the C most frequent ids.
        mean_us: of all timed steps, with the exchanges of rows among them.
        ratio: P50 of the round-by-round ratios to the table without a cache.
        mean_ratio: ratio of the means.
    """

    ids: str
    rows: int
    batch: int
    rank: int
    policy: str
    fraction: float
    cached_rows: int
    table_bytes: int
    hit_rate: float
    ideal_hit_rate: float
    evictions: int
    write_back_error: float
    rounds: int
    p20_us: float
    p50_us: float
    p80_us: float
    mean_us: float
    ratio: float = 1.0
    mean_ratio: float = 1.0


class _Case:
    """One table in training."""

    def __init__(self, args: argparse.Namespace, cache: HotRows | None) -> None:
        torch.manual_seed(0)
        self.cache = cache
        config = EmbeddingBagConfig(
            name="t",
            num_embeddings=args.rows,
            embedding_dim=DIM,
            feature_names=["f"],
            compression=TensorTrain(rank=args.rank, cache=cache),
        )
        self.collection = EmbeddingBagCollection(tables=[config])
        apply_optimizer_in_backward(RowWiseAdagrad, self.collection.parameters(), {"lr": 0.01})
        self.times: list[float] = []

    def step(self, batch: KeyedJaggedTensor, gradient: Tensor) -> None:
        started = time.perf_counter()
        self.collection(batch).values().backward(gradient)
        self.times.append(time.perf_counter() - started)

    def row(self, args: argparse.Namespace, ids: str, plain: _Case) -> StepRow:
        times, without = (np.array(case.times[args.steps :]) for case in (self, plain))
        p20, p50, p80 = np.percentile(times, [20, 50, 80]) * 1e6
        figures = self.collection.cache_metrics().get("t")
        rows = figures.rows if figures else 0
        return StepRow(
            ids=ids,
            rows=args.rows,
            batch=args.batch,
            rank=args.rank,
            policy=self.cache.policy if self.cache else "",
            fraction=(self.cache.fraction or 0.0) if self.cache else 0.0,
            cached_rows=rows,
            table_bytes=self.collection.memory().total.num_bytes,
            hit_rate=figures.hit_rate if figures else 0.0,
            ideal_hit_rate=_mass(rows, args.rows),
            evictions=figures.evictions if figures else 0,
            write_back_error=figures.write_back_error if figures else 0.0,
            rounds=args.rounds,
            p20_us=float(p20),
            p50_us=float(p50),
            p80_us=float(p80),
            mean_us=float(times.mean()) * 1e6,
            ratio=float(np.median(times / without)),
            mean_ratio=float(times.mean() / without.mean()),
        )


def step_rows(args: argparse.Namespace) -> list[StepRow]:
    """Train every case on the same batches in turns, kind of ids by kind; the last ``rounds`` steps count."""
    return [row for ids in args.ids for row in _rows_of(args, ids)]


def _rows_of(args: argparse.Namespace, ids: str) -> list[StepRow]:
    caches = [HotRows(fraction=f, policy=p) for p in args.policies for f in args.fractions]
    cases = [_Case(args, cache) for cache in (None, *caches)]
    generator = np.random.default_rng(1)
    for turn, (batch, gradient) in enumerate(_batches(args, ids)):
        if turn == args.steps:
            for case in cases:
                for cache in case.collection.hot_row_caches().values():
                    cache.counts.zero_()
                    cache.errors.zero_()
        for k in generator.permutation(len(cases)):
            cases[k].step(batch, gradient)
    return [case.row(args, ids, cases[0]) for case in cases]


def _batches(args: argparse.Namespace, ids: str) -> Iterator[tuple[KeyedJaggedTensor, Tensor]]:
    generator = np.random.default_rng(0)
    lengths = torch.ones(args.batch, dtype=torch.int64)
    gradients = torch.Generator().manual_seed(0)
    for _ in range(args.steps + args.rounds):
        values = torch.from_numpy(draw(ids, args.rows, args.batch, generator))
        batch = KeyedJaggedTensor(keys=["f"], values=values, lengths=lengths)
        yield batch, 1e-3 * torch.randn(args.batch, DIM, generator=gradients)


def _mass(hot: int, rows: int) -> float:
    """What part of the look-ups goes to the ``hot`` most frequent of ``rows`` ids."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -EXPONENT
    return math.fsum(weights[:hot]) / math.fsum(weights)


def step_table(rows: Sequence[StepRow]) -> str:
    """The figures as text, a table for each kind of ids."""
    kinds = dict.fromkeys(row.ids for row in rows)
    return "\n\n".join(_table_of([row for row in rows if row.ids == ids]) for ids in kinds)


def _table_of(rows: Sequence[StepRow]) -> str:
    kind = f"Zipf {EXPONENT:g} ids" + (", permuted" if rows[0].ids == "permuted" else "")
    lines = [
        f"{kind}, N={rows[0].rows:,}, D={DIM}, B={rows[0].batch:,}, TT R={rows[0].rank}",
        f"{'policy':<11}{'cached':>9}{'part':>8}{'KB':>9}{'hits':>7}{'ideal':>7}{'out':>7}{'lost':>6}"
        f"{'P50 us':>8}{'mean us':>9}{'x plain':>9}{'x mean':>8}",
    ]
    for r in rows:
        lines.append(
            f"{r.policy or 'no cache':<11}{r.cached_rows:>9,}{r.fraction:>8.2%}{r.table_bytes / 1e3:>9,.0f}"
            f"{r.hit_rate:>7.1%}{r.ideal_hit_rate:>7.1%}{r.evictions:>7,}{r.write_back_error:>6.2f}"
            f"{r.p50_us:>8,.0f}{r.mean_us:>9,.0f}{r.ratio:>9.2f}{r.mean_ratio:>8.2f}"
        )
    lines.append("out: rows that left in the timed steps; lost: what of what they had learned was not kept")
    return "\n".join(lines)
