"""A plan as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from recemb.units import size


@dataclass(frozen=True)
class TableLine:
    """One table of a plan.

    Attributes:
        method: with its main setting.
        dense_bytes, num_bytes: of the weights, uncompressed and as stored.
        sharding: torchrec's abbreviation, and the kernel when it is not in HBM.
        ranks: where its shards lie.
        ms: of its slowest shard.
    """

    table: str
    method: str
    dense_bytes: int
    num_bytes: int
    sharding: str
    ranks: str
    ms: float


@dataclass(frozen=True)
class RankLine:
    """One rank of a plan.

    Attributes:
        shards: how many lie on it.
        hbm, ddr: bytes that they take, with optimizer state and buffers.
        compute_ms, comms_ms: forward and backward.
    """

    rank: int
    shards: int
    hbm: int
    ddr: int
    compute_ms: float
    comms_ms: float

    @property
    def ms(self) -> float:
        """Both together, as torchrec adds them."""
        return self.compute_ms + self.comms_ms


@dataclass(frozen=True)
class PlanLine:
    """One plan among those compared; without ``ms`` it does not fit.

    Attributes:
        ms: of its slowest rank.
        imbalance: slowest over mean rank, in time.
        most_bytes: of the fullest rank, HBM and DDR.
    """

    plan: str
    ms: float | None
    imbalance: float = 1.0
    most_bytes: int = 0
    total_bytes: int = 0


def milliseconds(ms: float) -> str:
    """Three figures, or more before the point."""
    return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"


def wrapped(text: str) -> list[str]:
    """Lines of at most 100 columns, the later ones indented."""
    return textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table_block(lines: Sequence[TableLine], top: int) -> list[str]:
    """The slowest ``top`` tables, and what the others add up to."""
    text = [
        f"{'table':<20} {'method':<14} {'dense -> stored':>20} {'ratio':>7} {'sharding':<9} "
        f"{'ranks':<14} {'ms':>8}"
    ]
    falling = sorted(lines, key=lambda line: -line.ms)
    for line in falling[:top]:
        stored = f"{size(line.dense_bytes)} -> {size(line.num_bytes)}"
        text.append(
            f"{_cut(line.table, 20):<20} {_cut(line.method, 14):<14} {stored:>20} "
            f"{line.dense_bytes / max(1, line.num_bytes):>6.3g}x {line.sharding:<9} "
            f"{_cut(line.ranks, 14):<14} {milliseconds(line.ms):>8}"
        )
    rest = falling[top:]
    if rest:
        dense, stored_bytes = sum(line.dense_bytes for line in rest), sum(line.num_bytes for line in rest)
        text.append(
            f"... and {len(rest)} faster tables, {size(dense)} -> {size(stored_bytes)} "
            f"(--top {len(lines)} shows all)"
        )
    return text


def rank_block(lines: Sequence[RankLine], top: int) -> list[str]:
    """The ranks; of many, the slowest and the fastest."""
    text = [f"{'rank':>6} {'shards':>7} {'HBM':>9} {'DDR':>9} {'compute ms':>11} {'comms ms':>9} {'ms':>9}"]
    falling = sorted(lines, key=lambda line: -line.ms)
    shown = lines if len(lines) <= top else [*falling[: top // 2], *falling[-(top // 2) :]]
    bottleneck = falling[0]
    for at, line in enumerate(shown):
        if len(lines) > top and at == top // 2:
            text.append(f"   ... {len(lines) - len(shown)} ranks in between")
        text.append(
            f"{line.rank:>6} {line.shards:>7,} {size(line.hbm):>9} {size(line.ddr):>9} "
            f"{milliseconds(line.compute_ms):>11} {milliseconds(line.comms_ms):>9} {milliseconds(line.ms):>9}"
            + ("  <- slowest" if line is bottleneck else "")
        )
    return text


def plan_block(lines: Sequence[PlanLine]) -> list[str]:
    """Plans side by side."""
    text = [f"{'plan':<36} {'step ms':>10} {'slowest/mean':>13} {'most on a rank':>15} {'all ranks':>10}"]
    for line in lines:
        if line.ms is None:
            text.append(f"{_cut(line.plan, 36):<36} {'does not fit':>24}")
            continue
        text.append(
            f"{_cut(line.plan, 36):<36} {milliseconds(line.ms):>10} {line.imbalance:>13.3f} "
            f"{size(line.most_bytes):>15} {size(line.total_bytes):>10}"
        )
    return text
