"""Memory and time of micro-batches, and of batches that are prepared ahead, at the 26 Kaggle tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.program import RESULTS, add_output, make_parser, positive, require_gpu, run_program

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

    from bench.ids import Batch
    from bench.settings import Setting

_DESCRIPTION = """\
Time a training step (forward, backward, fused row-wise Adagrad) of the 26 Criteo Kaggle tables, those of
200 rows and more as tensor trains, with products of cores computed for so many distinct rows at once: of a
table on a CPU, of all tables of one shape on a GPU. The workspace is what the native kernels hold for these
products and rows; with --device cuda, the most memory that an eager step takes above what is held before it
(tables, ids, the gradient) and its pooled rows, which are the caller's: plans are part of it, a prepared
batch's too. Steps take turns, round by round; ratios are medians of the round-by-round ratios to the whole
batch at once.
"""
_WHOLE = 2**30
_THRESHOLD = 200
# Smaller than what a device takes by default, and larger.
_SLICES = {"cpu": [2**14, 2**13, 2**12, 2**11], "cuda": [2**19, 2**18, 2**17, 2**16]}
# Steps of a shape that stay eager on a GPU: the last one's memory is measured.
_EAGER = 3
_PREPARED = 6


@dataclass(frozen=True)
class Row:
    """One way to take a step.

    Args:
        micro_batch_rows: distinct rows at once; 2**30 stands for all.
        prefetch: whether the next batch is prepared between forward and backward.
        tables: their rows.
        workspace_bytes: of one step, as the program's description says.
        ratio: median time to that of the whole batch at once.
    """

    batch: int
    ids: str
    tables: str
    rank: int
    micro_batch_rows: int
    prefetch: bool
    workspace_bytes: int
    p50_us: float
    ratio: float
    workspace_ratio: float


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("micro_batches", _DESCRIPTION)
    parser.add_argument("--batch", type=positive, nargs="+", default=[65536], metavar="B", help="65536")
    parser.add_argument("--rank", type=positive, default=32, metavar="R", help="default %(default)s")
    parser.add_argument(
        "--ids", choices=("zipf", "permuted", "uniform"), nargs="+", default=["zipf", "uniform"]
    )
    parser.add_argument(
        "--micro_batch_rows",
        type=positive,
        nargs="+",
        metavar="M",
        help="default 2**14 to 2**11, on a GPU 2**19 to 2**16",
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="26 tables of N rows in place of Kaggle's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=positive, default=11, metavar="K", help="default %(default)s")
    add_output(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    from bench.guard import TESTS, require_green
    from bench.results import results_folder, this_machine, write_csv
    from bench.settings import KAGGLE, Setting

    if args.device == "cuda":
        require_gpu("leave out --device cuda")
    machine = this_machine(require_green(TESTS), args.device)
    folder, rows = results_folder(args.output, RESULTS if args.rows is None else None), []
    print(machine.heading())
    tables = KAGGLE.rows if args.rows is None else (args.rows,) * len(KAGGLE.rows)
    slices = args.micro_batch_rows or _SLICES[args.device]
    for batch in args.batch:
        for ids in args.ids:
            rows += measure(
                Setting(tables, batch=batch, ids=ids), args.rank, slices, args.rounds, args.device
            )
    print(table(rows))
    if folder is not None:
        suffix = "" if args.device == "cpu" else f"_{args.device}"
        write_csv(folder / f"micro_batches{suffix}.csv", rows, machine)
    return 0


def measure(
    setting: Setting, rank: int, micro_batch_rows: Sequence[int], rounds: int, device: str = "cpu"
) -> list[Row]:
    """Every way to take a step at one batch size, in turns."""
    from functools import partial

    from bench.ids import make_batches
    from bench.measure import Runner, percentiles, ratio, take_turns

    batches = [batch.to(device) for batch in make_batches(setting)]
    ways = [(_WHOLE, False), *((rows, False) for rows in micro_batch_rows)]
    ways += [(micro_batch_rows[-1] if len(micro_batch_rows) == 1 else micro_batch_rows[1], True)]
    runners, collections = {}, {}
    for k, (rows, ahead) in enumerate(ways):
        steps = Steps(setting, rank, rows, ahead, device)
        if device == "cuda":
            steps.weigh(batches)
        key = (str(rows), str(ahead))
        # Each starts at another batch, so that none finds the rows in cache that another has just read.
        runners[key] = Runner(partial(steps.step, batches), batches, first=3 * k)
        collections[key] = steps
    times = take_turns(runners, rounds)
    whole = (str(_WHOLE), "False")
    base = max(1, collections[whole].workspace_bytes())
    found = []
    for (rows, ahead), key in zip(ways, runners, strict=True):
        space = collections[key].workspace_bytes()
        middle = percentiles(times[key]).p50
        found.append(
            Row(
                batch=setting.batch,
                ids=setting.ids,
                tables="+".join(map(str, setting.rows)),
                rank=rank,
                micro_batch_rows=rows,
                prefetch=ahead,
                workspace_bytes=space,
                p50_us=middle,
                ratio=ratio(times[key], times[whole]),
                workspace_ratio=space / base,
            )
        )
    return found


class Steps:
    """One collection, and its training step on ready KeyedJaggedTensors."""

    def __init__(
        self, setting: Setting, rank: int, micro_batch_rows: int, ahead: bool, device: str = "cpu"
    ) -> None:
        import torchrec
        from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

        from bench.peers import feature_names
        from recemb import Dense, EmbeddingBagCollection, TensorTrain
        from recemb.spec import TableSpec
        from recemb.torchrec_io.configs import to_configs

        self.names, self.ahead, self._device = feature_names(len(setting.rows)), ahead, device
        specs = [
            TableSpec(
                name=f"t_{name}",
                num_embeddings=rows,
                embedding_dim=setting.dim,
                feature_names=(name,),
                compression=TensorTrain(rank=rank) if rows >= _THRESHOLD else Dense(),
            )
            for name, rows in zip(self.names, setting.rows, strict=True)
        ]
        self.collection = EmbeddingBagCollection(
            to_configs(specs), micro_batch_rows=micro_batch_rows, device=device
        )
        kind = torchrec.optim.RowWiseAdagrad
        apply_optimizer_in_backward(kind, self.collection.parameters(), {"lr": 0.01})
        self._features: dict[int, KeyedJaggedTensor] = {}
        self._peak = 0

    def step(self, batches: Sequence[Batch], batch: Batch) -> None:
        """Forward, the next batch's preparation when asked for, backward."""
        import torch

        pooled = self.collection(self._kjt(batch)).values()
        if self.ahead:
            following = batches[(batches.index(batch) + 1) % len(batches)]
            self.collection.prefetch(self._kjt(following))
        pooled.backward(batch.grad)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def weigh(self, batches: Sequence[Batch]) -> None:
        """Take the eager steps of a GPU, and see what the last of them needs; record what is prepared."""
        import torch

        for batch in batches[: _EAGER + 1]:
            self._kjt(batch).offsets()
        ahead, self.ahead = self.ahead, False
        for batch in batches[: _EAGER - 2]:
            self.step(batches, batch)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        # The first of these prepares the second, whose plan is part of what is measured.
        self.ahead = ahead
        for batch in batches[_EAGER - 2 : _EAGER]:
            self.step(batches, batch)
        self._peak = torch.cuda.max_memory_allocated() - before - batches[0].grad.nbytes
        # The graphs of batches that are prepared are there once five of them have been looked up.
        for k in range(_PREPARED if ahead else 0):
            self.step(batches, batches[(_EAGER + k) % len(batches)])

    def workspace_bytes(self) -> int:
        """What :meth:`weigh` has seen; on a CPU, of all groups of the collection's native kernels."""
        total = self._peak
        for table in self.collection.embedding_bags.values():
            for prepared in table.memo.values():
                if prepared.lookup is not None and self._device == "cpu":
                    total += sum(group.workspace_bytes for group in prepared.lookup._groups.values())
        return total

    def _kjt(self, batch: Batch) -> KeyedJaggedTensor:
        from torchrec import KeyedJaggedTensor

        if id(batch) not in self._features:
            self._features[id(batch)] = KeyedJaggedTensor(
                keys=self.names,
                values=batch.ids,
                lengths=batch.lengths,
            )
        return self._features[id(batch)]


def table(rows: Sequence[Row]) -> str:
    """The figures, within 100 columns."""
    lines = [
        f"{'B':>8} {'ids':<9}{'rows at once':>13} {'prefetch':<9}{'workspace MB':>13}{'x':>7}"
        f"{'P50 ms':>9}{'x':>7}"
    ]
    for row in rows:
        size = "all" if row.micro_batch_rows == _WHOLE else f"{row.micro_batch_rows:,}"
        lines.append(
            f"{row.batch:>8,} {row.ids:<9}{size:>13} {'yes' if row.prefetch else '':<9}"
            f"{row.workspace_bytes / 1e6:>13,.1f}{row.workspace_ratio:>7.2f}"
            f"{row.p50_us / 1e3:>9.1f}{row.ratio:>7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
