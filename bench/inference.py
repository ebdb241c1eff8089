"""Latency of a request's look-ups: uncompressed and compressed tables in float32, float16 and int8."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.program import RESULTS, add_output, make_parser, positive, rate, row_scale, run_program

if TYPE_CHECKING:
    from torch import nn

    from bench.ids import Batch
    from bench.settings import Setting

_DESCRIPTION = """\
Time the look-up of one request, from ready ids and lengths to the pooled rows of the 26 Criteo Kaggle tables,
one id each: torchrec's uncompressed tables in float32 and in int8 (its quantised collection), and tables
compressed by each method to 1/RATE of their bytes, in float32, float16 and int8. Requests take turns, round
by round; ratios are medians of the round-by-round ratios to torchrec's int8 of the same run.
"""
_METHODS = ("tt", "robe", "qr", "md")
_TYPES = ("float32", "float16", "int8")
_BASELINE = "uncompressed int8"


@dataclass(frozen=True)
class Row:
    """One model at one request size.

    Args:
        batch: samples of a request.
        case: method and type of the weights; uncompressed ones are torchrec's.
        model_bytes: weights as stored, padding of rows too.
        ratio: median time to torchrec's int8.
        bytes_ratio: bytes of torchrec's int8 to those of this model.
    """

    batch: int
    case: str
    tables: int
    ids: str
    rounds: int
    model_bytes: int
    p50_us: float
    p90_us: float
    p99_us: float
    ratio: float
    bytes_ratio: float


def build_parser() -> argparse.ArgumentParser:
    """The flags; imports nothing heavy, so that --help is instant."""
    parser = make_parser("inference", _DESCRIPTION)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=[1, 16, 128, 1024], metavar="B", help="1 16 128 1024")
    add("--methods", choices=_METHODS, nargs="+", default=list(_METHODS), help="default: all")
    add("--compress_rate", type=rate, default=100, metavar="RATE", help="default %(default)s")
    add("--ids", choices=("zipf", "permuted", "uniform"), default="zipf", help="default %(default)s")
    add("--scale", type=row_scale, default=Fraction(1), metavar="S", help="of the rows, e.g. 1/100 (1)")
    add("--rounds", type=positive, default=500, metavar="K", help="requests a model (default %(default)s)")
    add("--threads", type=positive, metavar="T", help="of a request (default: all cores)")
    add("--tests", nargs="+", metavar="PATH", help="tests that must pass first (default: the operators')")
    add_output(parser, where="bench/results at full scale")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code."""
    return run_program(build_parser(), argv, _run)


def _run(args: argparse.Namespace) -> int:
    import torch

    from bench.guard import TESTS, require_green
    from bench.results import results_folder, this_machine, write_csv
    from recemb.data.synthetic import scaled_cardinalities

    sources = require_green(args.tests or TESTS)
    folder = results_folder(args.output, RESULTS if args.scale == 1 else None)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = this_machine(sources)
    print(machine.heading())
    models = build_models(scaled_cardinalities(args.scale), args.methods, args.compress_rate)
    rows: list[Row] = []
    for batch in args.batch:
        found = measure(models, batch, args.ids, args.rounds)
        print(table(found, heading=not rows), flush=True)
        rows += found
    if folder is not None:
        write_csv(folder / "inference.csv", rows, machine)
    return 0


@dataclass(frozen=True)
class Models:
    """The collections by case, and the bytes of their weights."""

    setting: Setting
    collections: dict[str, nn.Module]
    num_bytes: dict[str, int]


def build_models(tables: Sequence[int], methods: Sequence[str], rate: float) -> Models:
    """Every collection, with random weights.

    Args:
        tables: rows of each.
        methods: that compress them.
        rate: all tables together take 1/rate of their bytes in float32.
    """
    import torch
    import torchrec
    from torch import nn
    from torchrec.inference.modules import quantize_embeddings as torchrec_quantize

    from bench.peers import feature_names
    from bench.settings import Setting
    from recemb import EmbeddingBagCollection
    from recemb.planner.budget import compress
    from recemb.spec import TableSpec
    from recemb.torchrec_io import quantize_embeddings
    from recemb.torchrec_io.configs import to_configs

    setting = Setting(rows=tuple(tables))
    specs = [
        TableSpec(name=f"t_{name}", num_embeddings=rows, embedding_dim=setting.dim, feature_names=(name,))
        for name, rows in zip(feature_names(len(tables)), tables, strict=True)
    ]
    plain = torchrec.EmbeddingBagCollection(tables=to_configs(specs))
    collections: dict[str, nn.Module] = {"uncompressed float32": plain}
    collections[_BASELINE] = torchrec_quantize(nn.ModuleList([plain]), torch.qint8, inplace=False)[0]
    num_bytes = {case: _stored(module) for case, module in collections.items()}
    for method in methods:
        trained = EmbeddingBagCollection(to_configs(compress(specs, method, rate).tables))
        for kind in _TYPES:
            case = f"{method} {kind}"
            made: Any = trained if kind == "float32" else quantize_embeddings(trained, getattr(torch, kind))
            collections[case] = made
            num_bytes[case] = made.memory().total.num_bytes
    return Models(setting, collections, num_bytes)


def _stored(module: nn.Module) -> int:
    """Bytes of its weights, with the padding of their rows."""
    weights = module.state_dict().values()
    return sum(weight.shape[0] * weight.stride(0) * weight.element_size() for weight in weights)


def measure(models: Models, batch: int, ids: str, rounds: int) -> list[Row]:
    """Every model at one request size, in turns."""
    from dataclasses import replace

    import numpy as np

    from bench.ids import make_batches
    from bench.measure import Runner, ratio, take_turns

    setting = replace(models.setting, batch=batch, ids=ids)
    batches = make_batches(setting)
    runners = {
        # Each starts at another batch, so that none finds the ids in cache that another has just read.
        (case, ""): Runner(partial(_request, module, setting), batches, first=3 * k)
        for k, (case, module) in enumerate(models.collections.items())
    }
    times = take_turns(runners, rounds)
    baseline, rows = times[_BASELINE, ""], []
    for case, stored in models.num_bytes.items():
        spent = times[case, ""]
        p50, p90, p99 = (float(p) for p in np.percentile(spent, [50, 90, 99]) * 1e6)
        relative = ratio(spent, baseline), models.num_bytes[_BASELINE] / stored
        rows.append(Row(batch, case, len(setting.rows), ids, rounds, stored, p50, p90, p99, *relative))
    return rows


def _request(collection: nn.Module, setting: Setting, batch: Batch) -> object:
    import torch
    from torchrec import KeyedJaggedTensor

    from bench.peers import feature_names

    with torch.inference_mode():
        names = feature_names(len(setting.rows))
        request = KeyedJaggedTensor(keys=names, values=batch.ids, lengths=batch.lengths)
        return collection(request).values()


def table(rows: Sequence[Row], heading: bool = True) -> str:
    """The figures, within 100 columns."""
    head = f"{'B':>6} {'tables':<21}{'bytes':>15}{'smaller':>9}"
    head += f"{'P50 us':>10}{'P90 us':>10}{'P99 us':>10}{'x int8':>8}"
    lines = [head] if heading else []
    for row in rows:
        lines.append(
            f"{row.batch:>6,} {row.case:<21}{row.model_bytes:>15,}{row.bytes_ratio:>8.1f}x"
            f"{row.p50_us:>10,.0f}{row.p90_us:>10,.0f}{row.p99_us:>10,.0f}{row.ratio:>8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
