"""``recemb prepare``: Criteo's TSV files, or a synthetic click log, to the directory that training reads."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recemb.errors import ConfigError, Interrupted

_DESCRIPTION = """\
Turn Criteo's click logs (Kaggle's train.txt or the 1TB log's day_N, plain or gzip) into Parquet
files of training, validation and test rows, with a vocabulary per feature and stats.json.

Rows are split by time: the order of the --input files and of their lines. Ids are counted on the
training rows only and given out by falling frequency; row 0 of every table is out-of-vocabulary.
The command can be interrupted at any time: given again, it goes on from the last finished part.

With --dataset_name synthetic, write a click log of any size with Criteo Kaggle's 26 tables and a
known best AUC instead."""

_EPILOG = """\
examples:
  recemb prepare --dataset_name criteo_kaggle --input train.txt --output data/kaggle \\
      --val_fraction 1/14 --test_fraction 1/14
  recemb prepare --dataset_name criteo_1tb --input day_{0..23}.gz --output data/1tb \\
      --max_ind_range 40000000
  recemb prepare --dataset_name synthetic --rows 1000000 --scale 1/100 --output data/synthetic"""

_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_CRITEO_FLAGS = ("input", "min_count", "max_ind_range", "bad_rows", "max_bad_rows", "memory_budget")
_SYNTHETIC_FLAGS = ("rows", "scale", "seed")
_DEFAULTS: dict[str, Any] = {
    "min_count": 2,
    "max_ind_range": None,
    "bad_rows": "error",
    "max_bad_rows": 1000,
    "memory_budget": "1GB",
    "rows": 1_000_000,
    "scale": "1/100",
    "seed": 0,
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb ``prepare``."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn Criteo's TSV files, or a synthetic click log, into a directory to train on",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset_name",
        choices=("criteo_kaggle", "criteo_1tb", "synthetic"),
        default="criteo_kaggle",
        help="what to prepare (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--val_fraction",
        default="0.1",
        metavar="F",
        help="share of the rows, at the end of the log, for validation: 0.1 or 1/14 (default: %(default)s)",
    )
    parser.add_argument(
        "--test_fraction",
        default="0",
        metavar="F",
        help="share of the rows, after the validation rows, for testing (default: %(default)s)",
    )
    # the flags below default to None, so that one given to the wrong data set is noticed
    criteo = parser.add_argument_group("Criteo logs")
    criteo.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="the TSV files in time order")
    criteo.add_argument(
        "--min_count",
        type=int,
        metavar="N",
        help=f"a category seen fewer times in training goes to row 0 (default: {_DEFAULTS['min_count']})",
    )
    criteo.add_argument(
        "--max_ind_range",
        type=int,
        metavar="N",
        help="at most N rows per table: the N-1 most frequent categories and row 0 (default: no limit)",
    )
    criteo.add_argument(
        "--bad_rows",
        choices=("error", "skip"),
        help="stop at a malformed row, or leave it out and record it in DIR/rejects.jsonl "
        f"(default: {_DEFAULTS['bad_rows']})",
    )
    criteo.add_argument(
        "--max_bad_rows",
        type=int,
        metavar="N",
        help=f"with --bad_rows skip, stop after more than N of them (default: {_DEFAULTS['max_bad_rows']})",
    )
    criteo.add_argument(
        "--memory_budget",
        metavar="SIZE",
        help="memory for counting categories, as 512MB or 2GB; what does not fit spills to DIR "
        f"(default: {_DEFAULTS['memory_budget']})",
    )
    synthetic = parser.add_argument_group("synthetic click log")
    synthetic.add_argument(
        "--rows", type=int, metavar="N", help=f"rows in all (default: {_DEFAULTS['rows']})"
    )
    synthetic.add_argument(
        "--scale",
        metavar="S",
        help=f"of Criteo Kaggle's 26 cardinalities, in (0, 1] (default: {_DEFAULTS['scale']})",
    )
    synthetic.add_argument("--seed", type=int, metavar="N", help=f"(default: {_DEFAULTS['seed']})")
    parser.set_defaults(run=run)


def parse_size(text: str, flag: str) -> int:
    """``"1GB"``, ``"512MiB"`` or ``"1000000"`` in bytes; :class:`ConfigError` names ``flag``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{flag}: {text!r} is not a size; give for example 512MB or 2GB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def run(args: argparse.Namespace) -> int:
    """Prepare what ``args`` ask for, print a summary and the next command, and return 0."""
    synthetic = args.dataset_name == "synthetic"
    for flag in _CRITEO_FLAGS if synthetic else _SYNTHETIC_FLAGS:
        if getattr(args, flag) is not None:
            kind = "Criteo logs" if synthetic else "--dataset_name synthetic"
            raise ConfigError(
                f"--{flag} is for {kind} only; leave it out with --dataset_name {args.dataset_name}"
            )
    given = {flag: getattr(args, flag) for flag in _DEFAULTS}
    chosen = {flag: _DEFAULTS[flag] if value is None else value for flag, value in given.items()}
    try:
        stats, already_done = _run_synthetic(args, chosen) if synthetic else _run_criteo(args, chosen)
    except KeyboardInterrupt:
        how = "starts over" if synthetic else "goes on from the last finished part"
        raise Interrupted(f"{args.output}: interrupted; the same command {how}") from None
    if already_done:
        print(f"{args.output}: already prepared with these settings, nothing to do")
    print("\n".join(summary_lines(stats)))
    print(
        f"\nnext: recemb train --data_dir {args.output} --method tt --compress_rate 10 --compare dense "
        "--output runs/tt10"
    )
    return 0


def _run_synthetic(args: argparse.Namespace, chosen: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    from recemb.data.layout import STATS_FILE
    from recemb.data.synthetic import write_synthetic

    already_done = (args.output / STATS_FILE).exists()
    stats = write_synthetic(
        args.output,
        chosen["rows"],
        chosen["scale"],
        chosen["seed"],
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        progress=True,
    )
    return stats, already_done


def _run_criteo(args: argparse.Namespace, chosen: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    if not args.input:
        raise ConfigError(
            f"--input: give the TSV files of {args.dataset_name}, for example --input train.txt"
        )
    memory_budget = parse_size(chosen["memory_budget"], "--memory_budget")
    from recemb.data.prepare import prepare
    from recemb.data.prepare_settings import PrepareSettings
    from recemb.data.splits import parse_fraction

    for earlier, later in out_of_order(args.input):
        print(
            f"warning: {later} comes after {earlier}; rows are taken in the order given, and the split needs "
            "time order (a shell sorts day_10 before day_2; day_{0..23} keeps it)",
            file=sys.stderr,
        )
    result = prepare(
        PrepareSettings(
            inputs=tuple(args.input),
            output=args.output,
            dataset_name=args.dataset_name,
            min_count=chosen["min_count"],
            max_ind_range=chosen["max_ind_range"],
            val_fraction=parse_fraction(args.val_fraction, "--val_fraction"),
            test_fraction=parse_fraction(args.test_fraction, "--test_fraction"),
            bad_rows=chosen["bad_rows"],
            max_bad_rows=chosen["max_bad_rows"],
            memory_budget=memory_budget,
        ),
        progress=True,
    )
    return result.stats, result.already_done


def out_of_order(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Neighbours whose numbers fall, as in ``day_10 day_2``: probably a shell's order, not that of time."""

    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return [(a, b) for a, b in itertools.pairwise(paths) if key(b) < key(a)]


def summary_lines(stats: dict[str, Any]) -> list[str]:
    """The summary table, at most 100 columns wide."""
    lines = [f"{stats['dataset_name']}:"]
    lines += [
        f"  {split:<6}{rows:>14,} rows, {stats['clicks'][split] / rows:.2%} clicks"
        for split, rows in stats["rows"].items()
        if rows
    ]
    if stats["rejects"]:
        lines.append(f"{stats['rejects']:,} bad rows left out, see rejects.jsonl")
    lines.append("")
    lines.append(
        f"{'feature':<8}{'rows':>13}{'distinct':>13}{'missing':>10}{'OOV train':>11}{'OOV val':>10}"
        f"{'look-ups in the top 1 % rows':>30}"
    )
    train_rows = max(stats["rows"]["train"], 1)
    for feature in stats["features"]:
        oov = feature["oov_share"]
        val = f"{oov['val']:.2%}" if "val" in oov else "-"
        lines.append(
            f"{feature['name']:<8}{feature['num_embeddings']:>13,}{feature['distinct']:>13,}"
            f"{feature['missing'] / train_rows:>10.2%}{oov['train']:>11.2%}{val:>10}"
            f"{feature['top_1_percent_share']:>30.1%}"
        )
    rows = sum(feature["num_embeddings"] for feature in stats["features"])
    distinct = sum(feature["distinct"] for feature in stats["features"])
    lines.append(f"{'all':<8}{rows:>13,}{distinct:>13,}")
    if stats.get("best_auc") is not None:
        lines.append(
            f"\nbest possible AUC {stats['best_auc']:.4f}, logloss {stats['best_logloss']:.4f}; without "
            f"embedding tables {stats['best_auc_without_embeddings']:.4f}"
        )
    return lines
