"""The two DLRMs of ``bench.train``, their batches, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from bench.floor import floor
from bench.hand_over import HandOver
from bench.ids import Batch, make_batches
from bench.measure import Key, Runner, percentiles, ratio, take_turns
from bench.ours import build_collection, table_bytes, table_specs
from bench.peers import TBECollection, feature_names
from bench.results import Row
from bench.settings import BASE, DENSE, LARGEST_TT, MODULE, TBE, Setting
from bench.work import work
from recemb.data.synthetic import scaled_cardinalities
from recemb.models import dlrm

_DENSE_FEATURES = 13
_DENSE_ARCH, _OVER_ARCH = (512, 256, 16), (512, 512, 256, 1)
_CLICK_RATE = 0.256
_OPTIMIZERS = {"adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class TrainRow:
    """One model at one batch size.

    Args:
        samples_per_second: B over the median step.
        speed_ratio: samples per second over those of the uncompressed model, the median over the rounds.
        gflop_s: arithmetic of the look-up (:mod:`bench.work`) and of the linear layers, over the median step.
        gbyte_s: memory traffic of the look-up alone, over the median step.
        floor_us: the least time for that work on this machine (:mod:`bench.floor`).
        hand_over_ns: what a cache line took between the threads' cores (:mod:`bench.hand_over`).
    """

    model: str
    tables: int
    rows: int
    dim: int
    batch: int
    ids: str
    dense_optimizer: str
    table_bytes: int
    rounds: int
    p20_us: float
    p50_us: float
    p80_us: float
    samples_per_second: float
    speed_ratio: float
    gflop_s: float
    gbyte_s: float
    floor_us: float
    gemm_gflop_s: float
    copy_gbyte_s: float
    gather_gbyte_s: float
    hand_over_ns: float | None


@dataclass(frozen=True)
class Models:
    """Both models, and what they cost."""

    setting: Setting
    dense_optimizer: str
    models: dict[str, nn.Module]
    bytes: dict[str, int]

    @classmethod
    def build(cls, scale: Fraction, dense_optimizer: str) -> Models:
        """Equal dense layers on compressed and on uncompressed tables."""
        setting = replace(BASE, rows=tuple(scaled_cardinalities(scale)))
        specs = table_specs(LARGEST_TT, setting.rows, setting.dim)
        collections: dict[str, nn.Module] = {
            TBE: TBECollection(setting.rows, setting.dim, setting.optimizer),
            LARGEST_TT: build_collection(specs, setting.optimizer),
        }
        models: dict[str, nn.Module] = {}
        for name, collection in collections.items():
            torch.manual_seed(0)
            # TBECollection has the part of EmbeddingBagCollection's interface that DLRM reads.
            models[name] = dlrm(collection, _DENSE_FEATURES, _DENSE_ARCH, _OVER_ARCH)
        dense = table_bytes(table_specs(DENSE, setting.rows, setting.dim))
        return cls(setting, dense_optimizer, models, {TBE: dense, LARGEST_TT: table_bytes(specs)})


class _Step:
    """One training step; the tables are updated by their fused optimizer, the dense layers by torch's."""

    def __init__(self, model: nn.Module, dense_optimizer: str, features: int, labels: Tensor) -> None:
        self.model = model
        self.names = feature_names(features)
        self.labels = labels
        self.inputs = torch.rand(len(labels), _DENSE_FEATURES)
        dense = [p for name, p in model.named_parameters() if not name.startswith("sparse_arch.")]
        self.optimizer = _OPTIMIZERS[dense_optimizer](dense, lr=0.01)

    def __call__(self, batch: Batch) -> None:
        features = KeyedJaggedTensor(keys=self.names, values=batch.ids, lengths=batch.lengths)
        self.optimizer.zero_grad()
        logits = self.model(self.inputs, features).squeeze(1)
        F.binary_cross_entropy_with_logits(logits, self.labels).backward()
        self.optimizer.step()


def train_rows(models: Models, batch: int, rounds: int) -> list[TrainRow]:
    """Time both models at one batch size: the uncompressed one first."""
    setting = replace(models.setting, batch=batch)
    batches = make_batches(setting)
    labels = torch.bernoulli(torch.full((batch,), _CLICK_RATE))
    runners: dict[Key, Runner] = {
        (name, MODULE): Runner(_Step(model, models.dense_optimizer, len(setting.rows), labels), batches)
        for name, model in models.models.items()
    }
    apart = HandOver()
    times = take_turns(runners, rounds, each_round=apart)
    least = floor(setting.dim)
    rows = []
    for name, path in times:
        spread = percentiles(times[name, path])
        done = work(name, path, setting, batches)
        flop = done.flop + _linear_flop(models.models[name], batch)
        rows.append(
            TrainRow(
                model=name,
                tables=len(setting.rows),
                rows=sum(setting.rows),
                dim=setting.dim,
                batch=batch,
                ids=setting.ids,
                dense_optimizer=models.dense_optimizer,
                table_bytes=models.bytes[name],
                rounds=rounds,
                p20_us=spread.p20,
                p50_us=spread.p50,
                p80_us=spread.p80,
                samples_per_second=batch / spread.p50 * 1e6,
                speed_ratio=ratio(times[TBE, MODULE], times[name, path]),
                gflop_s=flop / spread.p50 / 1e3,
                gbyte_s=done.nbytes / spread.p50 / 1e3,
                floor_us=max(least.arithmetic(flop), least.memory(done.weights, done.streams)),
                gemm_gflop_s=least.gemm,
                copy_gbyte_s=least.copy,
                gather_gbyte_s=least.gather,
                hand_over_ns=apart.median,
            )
        )
    return rows


def _linear_flop(model: nn.Module, batch: int) -> float:
    """Of the linear layers in one step, backward at twice forward; dot products of features are left out."""
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    return 3 * 2 * batch * weights


def plot_rows(rows: Sequence[TrainRow]) -> list[Row]:
    """The compressed model's steps as :mod:`bench.plot` draws them, against the uncompressed model's."""
    return [
        Row(
            setting=f"DLRM, {row.tables} tables D={row.dim} B={row.batch:,} {row.ids} ids",
            rows=str(row.rows),
            dim=row.dim,
            batch=row.batch,
            hots=1,
            ids=row.ids,
            optimizer=row.dense_optimizer,
            distinct=None,
            case=row.model,
            path=MODULE,
            table_bytes=row.table_bytes,
            rounds=row.rounds,
            p20_us=row.p20_us,
            p50_us=row.p50_us,
            p80_us=row.p80_us,
            ratio_tbe=1 / row.speed_ratio,
        )
        for row in rows
        if row.model != TBE
    ]


def train_table(rows: Sequence[TrainRow]) -> str:
    """The figures of one batch size, within 100 columns."""
    lines = [
        f"{'tables':<19} {'bytes':>14} {'P20 ms':>8} {'P50 ms':>8} {'P80 ms':>8} {'samples/s':>10}  x TBE "
        f"{'GF/s':>6} floor"
    ]
    for row in rows:
        p20, p50, p80 = (f"{value / 1e3:>8.1f}" for value in (row.p20_us, row.p50_us, row.p80_us))
        lines.append(
            f"{row.model:<19} {row.table_bytes:>14,} {p20} {p50} {p80} {row.samples_per_second:>10,.0f} "
            f"{row.speed_ratio:>6.2f} {row.gflop_s:>6.0f} {row.floor_us / row.p50_us:>5.0%}"
        )
    return "\n".join(lines)
