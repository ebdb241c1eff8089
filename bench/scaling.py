"""A sharded DLRM step on one, two, ... processes: time, and bytes between them, compressed against dense."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.program import RESULTS, add_output, make_parser, positive, row_scale, run_program, speed
from recemb.errors import ConfigError

_DESCRIPTION = """\
Time a DLRM training step on the 26 tables of Criteo Kaggle under torchrec's DistributedModelParallel (gloo,
one process a rank, one thread each by default): uncompressed tables table-wise; the 7 largest as tensor
trains of rank 32, on every rank or table-wise; table-wise ones in 4 slices too, whose rows travel while the
next is looked up. The global batch stays. The models take turns; ratios are medians of the round-by-round
ratios to the uncompressed model. What the tables send is counted in one step. With --link_gbits it takes as
long as over a link of that speed from and to each rank, and the CPU is free meanwhile; what the dense layers
send, the same in all models, does not.
"""
_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT = 900


@dataclass(frozen=True)
class Row:
    """One model on one number of processes.

    Args:
        rank_bytes: parameters of tables on the fullest rank.
        sent_bytes: what the tables of a rank send in a step, the mean over the ranks; ``expected_bytes`` says
            what the design asks for (ids, lengths, pooled rows, gradients), without the sizes of messages.
        link_gbits: of the simulated link between ranks, Gbit/s; none when ``None``.
        speed_ratio: steps a second over the uncompressed model's on as many processes.
        speed_up: over this model's on one process.
    """

    model: str
    processes: int
    rank_threads: int
    link_gbits: float | None
    global_batch: int
    table_bytes: int
    rank_bytes: int
    sent_bytes: float
    expected_bytes: float
    rounds: int
    p50_us: float
    speed_ratio: float
    speed_up: float | None


@dataclass(frozen=True)
class Asked:
    """What each rank is asked to measure.

    Args:
        batch: samples of each rank.
        scale: of the tables' rows, a fraction as text.
        link_gbits: speed of the simulated link, Gbit/s; none when ``None``.
        timeout: seconds until a rank gives the others up.
    """

    world: int
    models: list[str]
    batch: int
    threads: int
    scale: str
    rounds: int
    link_gbits: float | None = None
    timeout: int = _TIMEOUT

    @classmethod
    def of(cls, args: argparse.Namespace, processes: int, models: list[str]) -> Asked:
        batch, scale = args.batch // processes, str(args.scale)
        return cls(processes, models, batch, args.threads, scale, args.rounds, args.link_gbits)


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("scaling", _DESCRIPTION)
    parser.add_argument(
        "--processes",
        type=positive,
        nargs="+",
        default=[1, 2],
        metavar="W",
        help="they divide --batch (1 2)",
    )
    parser.add_argument("--batch", type=positive, default=4096, metavar="B", help="of all ranks (4096)")
    parser.add_argument("--threads", type=positive, default=1, metavar="T", help="of each process (1)")
    parser.add_argument(
        "--link_gbits", type=speed, default=None, metavar="G", help="of each rank's simulated link, Gbit/s"
    )
    parser.add_argument("--scale", type=row_scale, default=Fraction(1), metavar="S", help="of the rows (1)")
    parser.add_argument("--rounds", type=positive, default=15, metavar="K", help="default %(default)s")
    add_output(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    for processes in args.processes:
        if args.batch % processes:
            raise ConfigError(f"--batch {args.batch} does not divide among --processes {processes}")
    from bench.guard import TESTS, require_green
    from bench.results import results_folder, this_machine, write_csv
    from bench.scaling_rank import MODELS

    machine = this_machine(require_green(TESTS))
    folder = results_folder(args.output, RESULTS)
    print(machine.heading())
    found = {
        processes: run_ranks(processes, Asked.of(args, processes, list(MODELS)))
        for processes in args.processes
    }
    rows = rows_of(found, args.threads, args.batch, args.link_gbits)
    print(table(rows))
    if folder is not None:
        name = "scaling.csv" if args.link_gbits is None else "scaling_link.csv"
        write_csv(folder / name, rows, machine)
    return 0


def run_ranks(processes: int, asked: Asked) -> list[list[dict[str, Any]]]:
    """What each rank measured of each model.

    Raises:
        ConfigError: a rank ended otherwise; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="recemb-scaling-") as name:
        folder = Path(name)
        (folder / "asked.json").write_text(json.dumps(asdict(asked)))
        environment = os.environ | {
            "OMP_NUM_THREADS": str(asked.threads),
            "LOCAL_WORLD_SIZE": str(processes),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        logs = [(folder / f"log{rank}").open("w") for rank in range(processes)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.scaling_rank", str(rank), name],
                cwd=_ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            _wait(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            for log in logs:
                log.close()
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def _wait(ranks: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while True:
        ends = [process.poll() for process in ranks]
        for rank, end in enumerate(ends):
            if end:
                last = (folder / f"log{rank}").read_text().strip().splitlines()[-1:]
                raise ConfigError(f"rank {rank} of {len(ranks)} ended with {end}: {' '.join(last)}")
        if None not in ends:
            return
        if time.monotonic() > deadline:
            running = [rank for rank, end in enumerate(ends) if end is None]
            raise ConfigError(f"the ranks {running} of {len(ranks)} did not end in {_TIMEOUT} s")
        time.sleep(0.1)


def rows_of(
    found: dict[int, list[list[dict[str, Any]]]], threads: int, batch: int, link_gbits: float | None = None
) -> list[Row]:
    """The figures; the first model of each rank is the uncompressed one."""
    import numpy as np

    from bench.measure import percentiles, ratio

    alone: dict[str, float] = {}
    rows = []
    for processes, ranks in sorted(found.items()):
        base = np.array(ranks[0][0]["seconds"])
        for k, first in enumerate(ranks[0]):
            seconds = np.array(first["seconds"])
            own = [rank[k] for rank in ranks]
            middle = percentiles(seconds).p50
            if processes == 1:
                alone[first["model"]] = middle
            rows.append(
                Row(
                    model=first["model"],
                    processes=processes,
                    rank_threads=threads,
                    link_gbits=link_gbits,
                    global_batch=batch,
                    table_bytes=first["table_bytes"],
                    rank_bytes=max(one["rank_bytes"] for one in own),
                    sent_bytes=_mean(own, "traffic"),
                    expected_bytes=_mean(own, "expected"),
                    rounds=len(seconds),
                    p50_us=middle,
                    speed_ratio=ratio(base, seconds),
                    speed_up=alone[first["model"]] / middle if first["model"] in alone else None,
                )
            )
    return rows


def _mean(own: Sequence[dict[str, Any]], name: str) -> float:
    kinds = ("integers", "pooled", "reduced")
    return sum(one[name][kind] for one in own for kind in kinds) / len(own)


def table(rows: Sequence[Row]) -> str:
    """The figures, within 100 columns."""
    lines = [
        f"{'tables':<39}{'ranks':>6}{'MB a rank':>11}{'sent MB':>9}{'design':>8}"
        f"{'P50 ms':>9}{'x dense':>9}{'x 1 rank':>9}"
    ]
    for row in rows:
        up = "" if row.speed_up is None else f"{row.speed_up:.2f}"
        lines.append(
            f"{row.model:<39}{row.processes:>6}{row.rank_bytes / 1e6:>11,.1f}{row.sent_bytes / 1e6:>9.3f}"
            f"{row.expected_bytes / 1e6:>8.3f}{row.p50_us / 1e3:>9.1f}{row.speed_ratio:>9.2f}{up:>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
