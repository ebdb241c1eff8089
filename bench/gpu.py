"""Step time of compressed look-ups on a GPU, as a share of its roofline and against fbgemm's TBE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.program import RESULTS, add_output, make_parser, positive, require_gpu, run_program

if TYPE_CHECKING:
    from bench.ids import Batch
    from bench.results import Row
    from bench.settings import Setting

_DESCRIPTION = """\
Time a training step (forward, backward, fused row-wise Adagrad) of one look-up on the GPU. A round is a burst
of steps with no waiting in between, as in training: the slower of host and GPU decides. With --ahead 1 every
step is waited for. The roofline is the slower of a step's bytes at the copy bandwidth and its arithmetic at
the float32 GEMM rate, both measured in the same run; bytes and arithmetic are those that no step can do
without (bench/work.py). The column floor is the roofline's share of P50.
"""
_COPY_BYTES = 2**30
_GEMM = 4096
# Look-ups of one shape are captured as CUDA graphs at the fourth, and their backward at the fifth.
_WARM_UP = 6


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("gpu", _DESCRIPTION)
    parser.add_argument("--rows", type=positive, default=10_000_000, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--tables", type=positive, default=1, metavar="T", help="of N rows each (default %(default)s)"
    )
    parser.add_argument("--dim", type=positive, nargs="+", default=[16, 64, 128], metavar="D")
    parser.add_argument("--batch", type=positive, nargs="+", default=[4096, 65536], metavar="B")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[16, 32, 64], metavar="R")
    parser.add_argument("--ids", choices=("zipf", "permuted", "uniform"), default="zipf")
    parser.add_argument(
        "--ahead", type=positive, default=10, metavar="K", help="steps of a burst (default %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=50, metavar="K", help="default %(default)s")
    add_output(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    require_gpu("recemb bench ops measures the CPU kernels")
    from bench.guard import TESTS, require_green
    from bench.results import results_folder, table, this_machine, write_csv
    from bench.settings import Setting

    machine = this_machine(require_green(TESTS), "cuda")
    folder, rows = results_folder(args.output, RESULTS), []
    print(machine.heading())
    for dim in args.dim:
        for batch in args.batch:
            setting = Setting(rows=(args.rows,) * args.tables, dim=dim, batch=batch, ids=args.ids)
            own = measure(setting, args.ranks, args.rounds, "cuda", args.ahead)
            print(f"\n{setting.title()}\n{table(own)}", flush=True)
            rows += own
            if folder is not None:
                write_csv(folder / "gpu.csv", rows, machine)
    return 0


def measure(setting: Setting, ranks: Sequence[int], rounds: int, device: str, ahead: int = 10) -> list[Row]:
    """All cases at one setting, in turns: TBE first where it runs, then ours."""
    from bench.ids import make_batches
    from bench.ours import OurTables, table_bytes, table_specs
    from bench.peers import TBETables
    from bench.settings import OP, STORED, TBE, TT
    from bench.work import distinct_ids, work

    batches = make_batches(setting)
    moved = [batch.to(device) for batch in batches]
    cases: dict[str, Any] = {TBE: TBETables(setting.rows, setting.dim, setting.optimizer, device)}
    for case in (*(f"{TT}{rank}" for rank in ranks), *STORED):
        cases[case] = OurTables(case, setting.rows, setting.dim, setting.optimizer, device)
    steps = {case: held.steps[OP] for case, held in cases.items()}
    times = _take_turns(steps, moved, rounds, device, ahead)
    bandwidth, rate = _copy_rate(device), _gemm_rate(device)
    distinct, rows = distinct_ids(setting, batches), []
    for case, micros in times.items():
        todo = work(case, OP, setting, batches)
        least = 1e6 * max(todo.nbytes / bandwidth, todo.flop / rate)
        p20, p50, p80 = (_quantile(micros, q) for q in (0.2, 0.5, 0.8))
        dense = 4 * sum(setting.rows) * setting.dim
        stored = dense if case == TBE else table_bytes(table_specs(case, setting.rows, setting.dim))
        ratios = [own / other for own, other in zip(micros, times[TBE], strict=True)]
        rows.append(
            _row(
                setting,
                case=case,
                distinct=distinct,
                table_bytes=stored,
                rounds=rounds,
                p20_us=p20,
                p50_us=p50,
                p80_us=p80,
                ratio_tbe=None if case == TBE else _quantile(ratios, 0.5),
                gflop_s=todo.flop / p50 / 1e3,
                gbyte_s=todo.nbytes / p50 / 1e3,
                floor_us=least,
                gemm_gflop_s=rate / 1e9,
                copy_gbyte_s=bandwidth / 1e9,
            )
        )
    return rows


def _row(setting: Setting, **figures: Any) -> Row:
    from bench.results import Row
    from bench.settings import OP

    sizes = "+".join(map(str, setting.rows))
    return Row(
        setting=setting.title(),
        rows=sizes,
        dim=setting.dim,
        batch=setting.batch,
        hots=setting.hots,
        ids=setting.ids,
        optimizer=setting.optimizer,
        path=OP,
        **figures,
    )


def _take_turns(
    steps: dict[str, Callable[[Batch], object]],
    batches: Sequence[Batch],
    rounds: int,
    device: str,
    ahead: int,
) -> dict[str, list[float]]:
    """Microseconds of every step, round by round, after all have compiled, been tuned, and captured."""
    for step in steps.values():
        for turn in range(_WARM_UP):
            step(batches[turn % len(batches)])
    times: dict[str, list[float]] = {case: [] for case in steps}

    def burst(step: Callable[[Batch], object], first: int) -> None:
        for turn in range(first, first + ahead):
            step(batches[turn % len(batches)])

    for turn in range(rounds):
        for case, step in steps.items():
            times[case].append(_microseconds(partial(burst, step, turn * ahead), device) / ahead)
    return times


def _microseconds(call: Callable[[], object], device: str) -> float:
    """Of one call and the work that it starts on the device."""
    import time

    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - started)


def _copy_rate(device: str) -> float:
    """Bytes a second of a copy, reads and writes counted."""
    import torch

    size = _COPY_BYTES if device == "cuda" else 2**20
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (1e-6 * min(_microseconds(lambda: target.copy_(source), device) for _ in range(8)))


def _gemm_rate(device: str) -> float:
    """FLOP a second of a float32 matrix product."""
    import torch

    size = _GEMM if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / (1e-6 * min(_microseconds(lambda: left @ right, device) for _ in range(8)))


def _quantile(values: Sequence[float], q: float) -> float:
    import numpy as np

    return float(np.quantile(values, q))


if __name__ == "__main__":
    sys.exit(main())
