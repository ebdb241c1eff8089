"""Runs comparisons: builds the tables that fit, lets the cases take turns, turns times into rows."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.floor import floor
from bench.hand_over import HandOver
from bench.ids import Batch, make_batches
from bench.measure import Key, Runner, Seconds, percentiles, ratio, take_turns
from bench.ours import OurTables, table_bytes, table_specs
from bench.peers import absent, build_peer
from bench.results import Row
from bench.settings import (
    EMPTY,
    FORWARD,
    FUNCTIONAL,
    MODULE,
    OP,
    TBE,
    TLTORCH,
    TT,
    Comparison,
    Setting,
    is_ours,
)
from bench.targets import TARGETS
from bench.work import distinct_ids, work
from recemb.errors import ConfigError

_LARGEST_SHARE = 1 / 3
# Of a step that takes part in every round: tensorly-torch's take 30 to 200 times as long as ours.
_SLOW_SECONDS = 0.06


@dataclass(frozen=True)
class Skipped:
    """A case that was not measured, and why."""

    case: str
    reason: str


def case_bytes(case: str, setting: Setting) -> int:
    """Bytes of a case's tables; F.embedding_bag reads the TBE's, an empty step none."""
    if case in (FUNCTIONAL, EMPTY):
        return 0
    if case.startswith(TLTORCH):
        case = TT + case.removeprefix(TLTORCH)
    if is_ours(case):
        return table_bytes(table_specs(case, setting.rows, setting.dim))
    return 4 * sum(setting.rows) * setting.dim


class Tables:
    """The tables of the setting at hand, kept from one comparison to the next while they can be used.

    Args:
        memory_limit: bytes that all tables of a comparison may take together; one case may take a third.
    """

    def __init__(self, memory_limit: float) -> None:
        self.memory_limit = memory_limit
        self._key: tuple[object, ...] = ()
        self._built: dict[str, Any] = {}

    def prepare(self, comparison: Comparison) -> tuple[dict[str, Any], list[Skipped]]:
        """Build the cases of a comparison in their order, as many as fit."""
        setting = comparison.setting
        if setting.tables_key != self._key:
            self.clear()
            self._key = setting.tables_key
        ready: dict[str, Any] = {}
        skipped: list[Skipped] = []
        taken = 0
        for case in comparison.cases:
            try:
                needed = case_bytes(case, setting)
                reason = self._reason(case, setting, ready) or self._too_large(needed, taken)
                if reason is None:
                    ready[case] = self._build(case, setting)
                    taken += needed
            except ConfigError as error:
                reason = str(error)
            if reason is not None:
                skipped.append(Skipped(case, reason))
        return ready, skipped

    def clear(self) -> None:
        """Give the memory back."""
        self._built.clear()
        gc.collect()

    def _reason(self, case: str, setting: Setting, ready: Mapping[str, Any]) -> str | None:
        if is_ours(case):
            return None
        if case == FUNCTIONAL and TBE not in ready:
            return f"it reads the weights of {TBE}, which is not measured"
        return absent(case, setting)

    def _too_large(self, needed: int, taken: int) -> str | None:
        left = min(self.memory_limit * _LARGEST_SHARE, self.memory_limit - taken)
        if needed <= left:
            return None
        # As `recemb.units` would, which commits that are compared with do not have.
        return f"its tables take {needed / 1e6:,.1f} MB, at most {left / 1e6:,.1f} MB are given to them"

    def _build(self, case: str, setting: Setting) -> Any:
        if case not in self._built:
            sizes = (setting.rows, setting.dim, setting.optimizer)
            self._built[case] = (
                OurTables(case, *sizes) if is_ours(case) else build_peer(case, *sizes, self._built)
            )
        return self._built[case]


def compare(comparison: Comparison, tables: Tables, rounds: int) -> tuple[list[Row], list[Skipped]]:
    """Measure one comparison."""
    setting = comparison.setting
    ready, skipped = tables.prepare(comparison)
    batches = make_batches(setting)
    runners = make_runners(ready, comparison.paths, batches)
    apart = HandOver()
    times = take_turns(runners, rounds, _SLOW_SECONDS, apart)
    rows = [_row(key, setting, times, batches) for key in sorted(times, key=lambda key: _PLACE[key[1]])]
    return [replace(row, hand_over_ns=apart.median) for row in rows], skipped


_PLACE = {OP: 0, MODULE: 1, FORWARD: 2}


def make_runners(
    ready: Mapping[str, Any], paths: Sequence[str], batches: Sequence[Batch]
) -> dict[Key, Runner]:
    """(case, path) -> runner, path by path, for the paths that a case has."""
    return {
        (case, path): Runner(subject.steps[path], batches, _PLACE[path] * len(batches) // len(_PLACE))
        for path in paths
        for case, subject in ready.items()
        if path in subject.steps
    }


def like_reference(case: str, path: str) -> Key | None:
    """The case that does the same with the same input."""
    if case.startswith(TLTORCH):
        return TT + case.removeprefix(TLTORCH), path
    if path == MODULE:
        return TBE, MODULE
    return (FUNCTIONAL, FORWARD) if path == FORWARD else None


def _row(key: Key, setting: Setting, times: Mapping[Key, Seconds], batches: Sequence[Batch]) -> Row:
    case, path = key
    # Training is held against a training step of plain TBE, forward only against its forward.
    tbe = times.get((TBE, FORWARD if path == FORWARD else OP))
    like = like_reference(case, path)
    like_times = times.get(like) if like else None
    ratio_tbe = None if tbe is None else ratio(times[key], tbe)
    ratio_like = None if like_times is None else ratio(times[key], like_times)
    target = TARGETS.get((setting, case, path))
    spread = percentiles(times[key])
    done, least = work(case, path, setting, batches), floor(setting.dim)
    memory = least.memory(done.weights, done.streams)
    return Row(
        **describe(setting),
        distinct=distinct_ids(setting, batches),
        case="TBE in a module" if key == (TBE, MODULE) else case,
        path=path,
        table_bytes=case_bytes(case, setting),
        rounds=int(np.isfinite(times[key]).sum()),
        p20_us=spread.p20,
        p50_us=spread.p50,
        p80_us=spread.p80,
        ratio_tbe=ratio_tbe,
        like="" if like is None or like_times is None else f"{like[0]} ({like[1]})",
        ratio_like=ratio_like,
        target="" if target is None else target.text(),
        met=None if target is None else target.met(ratio_tbe, ratio_like),
        gflop_s=done.flop / spread.p50 / 1e3,
        gbyte_s=done.nbytes / spread.p50 / 1e3,
        floor_us=max(least.arithmetic(done.flop), memory),
        memory_us=memory,
        gemm_gflop_s=least.gemm,
        copy_gbyte_s=least.copy,
        gather_gbyte_s=least.gather,
    )


def describe(setting: Setting) -> dict[str, Any]:
    """The columns of a row that name its setting."""
    return {
        "setting": setting.title(),
        "rows": ";".join(map(str, setting.rows)),
        "dim": setting.dim,
        "batch": setting.batch,
        "hots": setting.hots,
        "ids": setting.ids,
        "optimizer": setting.optimizer,
    }
