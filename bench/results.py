"""One row a figure: the CSV, the table on the terminal, and what the machine is."""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bench.provenance import compiler_version, head_commit
from recemb.errors import ConfigError
from recemb.stack import versions

_UNSET = "default"


@dataclass(frozen=True)
class Row:
    """One case on one path at one setting; empty where a figure has no meaning.

    Args:
        ratio_tbe: P50 of the round-by-round ratios to fbgemm's TBE of the same setting.
        like: the like-for-like reference: ``TBE in a module`` for the module path, ``F.embedding_bag`` for
            forward only, our own tensor train for tltorch, the other commit under ``--base``.
        target: the bound, ``<=0.8``; ``met`` says whether it is kept.
        gflop_s: arithmetic of :mod:`bench.work` over P50; gbyte_s likewise.
        floor_us: what that work takes on this machine (:mod:`bench.floor`): the longer of its arithmetic and
            its bytes, ``memory_us``. Figures without that column took all bytes for random rows.
        hand_over_ns: what a cache line took between the threads' cores, the median over the rounds; of a
            process of its own, before and after them (:mod:`bench.hand_over`).
    """

    setting: str
    rows: str
    dim: int
    batch: int
    hots: int
    ids: str
    optimizer: str
    distinct: float | None
    case: str
    path: str
    table_bytes: int
    rounds: int
    p20_us: float
    p50_us: float
    p80_us: float
    ratio_tbe: float | None = None
    like: str = ""
    ratio_like: float | None = None
    target: str = ""
    met: bool | None = None
    gflop_s: float | None = None
    gbyte_s: float | None = None
    floor_us: float | None = None
    memory_us: float | None = None
    gemm_gflop_s: float | None = None
    copy_gbyte_s: float | None = None
    gather_gbyte_s: float | None = None
    hand_over_ns: float | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """Where and with what a run was made; part of every CSV row.

    Args:
        thp_mem_alloc: ``THP_MEM_ALLOC_ENABLE``: with ``1``, torch asks for huge pages for its tensors.
        load: runnable processes in the minute before; above 0.5 a core, others take part in the figures.
        compiler: of the kernels.
        commit: short hash; ``+`` when files differ from it, empty outside a git checkout.
        sources: hash of the kernels and of their tests, which were green (:mod:`bench.guard`), and those
            tests where they are other than by default.
    """

    date: str
    cpu: str
    cores: int
    threads: int
    omp_wait_policy: str
    thp_mem_alloc: str
    load: float
    versions: str
    compiler: str
    commit: str
    sources: str

    def heading(self) -> str:
        """One line above the tables."""
        line = (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, "
            f"OMP_WAIT_POLICY {self.omp_wait_policy}, {self.date}"
        )
        if self.thp_mem_alloc != _UNSET:
            # It makes peers up to 2.6 times as fast: runs with and without it are no series.
            line += f"\nTHP_MEM_ALLOC_ENABLE={self.thp_mem_alloc}"
        busy = self.load > 0.5 * self.cores
        return line + (
            f"\nthe machine is busy (load {self.load:.1f}): do not trust these figures" if busy else ""
        )


def columns(kind: type) -> list[str]:
    """The CSV columns of rows of one kind: their own, then the machine's."""
    names = [field.name for part in (kind, Machine) for field in fields(part)]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{kind.__name__} and Machine both have {sorted(twice)}: one would hide the other"
    return names


def this_machine(sources: str, device: str = "cpu") -> Machine:
    """The machine of this process; named by its GPU when that is what is measured (``cuda``)."""
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", _UNSET),
        thp_mem_alloc=os.environ.get("THP_MEM_ALLOC_ENABLE", _UNSET),
        load=os.getloadavg()[0],
        versions=" ".join(f"{name}={version}" for name, version in versions().items()),
        compiler=compiler_version(),
        commit=head_commit(),
        sources=sources,
    )


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def writable_folder(folder: Path) -> Path:
    """``folder``, made when missing.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder}: {error.strerror}; give a folder that can be written"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {folder} cannot be written; give another folder")
    return folder


def results_folder(output: Path | None, default: Path | None) -> Path | None:
    """Where files go: ``output`` when the user named one, else ``default`` when it can be written.

    Raises:
        ConfigError: ``output`` cannot be written.
    """
    if output is not None:
        return writable_folder(output)
    if default is None:
        return None
    try:
        return writable_folder(default)
    except ConfigError:
        print(f"nothing is written: {default} cannot be; name a folder with --output", file=sys.stderr)
        return None


def write_csv(path: Path, rows: Sequence[Any], machine: Machine) -> None:
    """Replace ``path`` with one line per row (dataclasses of one kind), machine and versions in each."""
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns(type(rows[0])))
        writer.writeheader()
        for row in rows:
            values = asdict(row) | asdict(machine)
            writer.writerow({name: _cell(name, value) for name, value in values.items()})
    # A run of hours that is stopped in the middle leaves the rows that it has.
    partial.replace(path)


def _cell(name: str, value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        words = ("missed", "met") if name == "met" else ("no", "yes")
        return words[value]
    return f"{value:.6g}" if isinstance(value, float) else value


def table(rows: Sequence[Row]) -> str:
    """The figures of one setting, within 100 columns; columns that no row fills are left out."""
    lines = [_HEAD, *map(_cells, rows)]
    # Numbers to the right, words to the left; head and cells are as wide as the widest of them.
    filled = [k for k in range(len(_HEAD)) if any(cells[k] for cells in lines[1:])]
    widths = {k: max(len(cells[k]) for cells in lines) for k in filled}
    return "\n".join(
        " ".join(
            cells[k].ljust(widths[k]) if _HEAD[k] in _WORDS else cells[k].rjust(widths[k]) for k in filled
        ).rstrip()
        for cells in lines
    )


_HEAD = (
    *("case", "path", "P20 us", "P50 us", "P80 us", "x TBE", "x like", "target", "", "GF/s", "GB/s", "floor"),
)
_WORDS = ("case", "path", "")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.case,
        row.path,
        *(f"{value:,.0f}" for value in (row.p20_us, row.p50_us, row.p80_us)),
        _short(row.ratio_tbe),
        _short(row.ratio_like),
        row.target,
        "" if row.met is None else "met" if row.met else "missed",
        _short(row.gflop_s),
        _short(row.gbyte_s),
        _share(row),
    )


def _share(row: Row) -> str:
    return "" if row.floor_us is None else f"{row.floor_us / row.p50_us:.0%}"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
