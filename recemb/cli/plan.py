"""``recemb plan``: which rank each embedding table goes to, without a GPU and without processes."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recemb.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PRESETS = ("criteo_kaggle", "mlperf_dlrm_dcnv2", "synthetic_10tb")
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", 1):
    _UNITS[f"{_letter}B"], _UNITS[f"{_letter}IB"] = 1000**_power, 1024**_power

_DESCRIPTION = """\
Plan the sharding of a model's embedding tables: which way each is cut, which ranks it lies on, what a step
takes, compared with the uncompressed model and with simple rules. Needs no GPU and starts no processes.
Exit code 4, with changes that fit, when the tables do not fit the ranks.
"""
_EPILOG = """\
examples:
  recemb plan --preset mlperf_dlrm_dcnv2 --method qr --compress_rate 4 --world_size 8 --device cuda --hbm 80GB
  recemb plan --config runs/tt100/resolved_config.yaml --world_size 2 --output plan.json
  recemb plan --statistics data/kaggle/stats.json --embedding_dim 16 --hbm 20MB --ddr 200MB
  recemb plan --calibrate --device cpu --output costs.json
"""


def size_in_bytes(text: str) -> int:
    """``80GB``, ``64GiB`` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 80GB, 64GiB or 80000000000")
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than 0 bytes")
    return num_bytes


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return int(text)


def _rows(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number >= 1, e.g. 100")
    return value


def _part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be in [0, 1), e.g. 0.15")
    return value


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "plan",
        help="plan the sharding of a model's tables over ranks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--config", metavar="FILE.yaml", help="the configuration of a recemb train run")
    model.add_argument("--preset", choices=_PRESETS, help="a model known by name")
    model.add_argument("--method", help="dense, tt, qr, robe or md (default dense, or the configuration's)")
    model.add_argument("--compress_rate", type=_rate, metavar="R", help="all tables together R times smaller")
    model.add_argument(
        "--method_threshold",
        type=_rows,
        metavar="ROWS",
        help="leave tables of at most this many rows uncompressed (default 200)",
    )
    model.add_argument(
        "--batch_size",
        type=_count,
        metavar="B",
        help="samples of a rank's batch (default: the configuration's, or the preset's global batch divided)",
    )
    model.add_argument(
        "--optimizer",
        choices=("sgd", "adagrad", "rowwise_adagrad", "adam"),
        help="of the tables, whose state is counted (default rowwise_adagrad, or the configuration's)",
    )
    cluster = parser.add_argument_group("ranks")
    cluster.add_argument("--world_size", type=_count, default=1, metavar="W", help="ranks (default 1)")
    cluster.add_argument(
        "--local_world_size", type=_count, metavar="L", help="ranks of a host (default 8, or W if fewer)"
    )
    cluster.add_argument("--device", choices=("cpu", "cuda"), help="default cpu, or the configuration's")
    cluster.add_argument("--hbm", type=size_in_bytes, metavar="SIZE", help="of a GPU (default 80GB)")
    cluster.add_argument("--ddr", type=size_in_bytes, metavar="SIZE", help="of a rank (default 128GB)")
    cluster.add_argument(
        "--reserved",
        type=_part,
        default=0.15,
        metavar="PART",
        help="of HBM and DDR, kept free for everything but tables (default %(default)s)",
    )
    costs = parser.add_argument_group("costs")
    costs.add_argument("--hardware", choices=("torchrec", "a100", "h100"), help="a GPU's datasheet")
    costs.add_argument("--costs", metavar="FILE.json", help="constants that --calibrate measured")
    costs.add_argument(
        "--calibrate", action="store_true", help="measure this machine's constants and write them to --output"
    )
    tiers = parser.add_argument_group("statistical sharding")
    tiers.add_argument(
        "--statistics",
        metavar="FILE",
        help="stats.json of recemb prepare: place hot rows in HBM, warm rows in DDR, and compress the others",
    )
    tiers.add_argument("--embedding_dim", type=_count, metavar="D", help="of --statistics (default 16)")
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=("table", "json"), default="table", help="default %(default)s")
    output.add_argument("--output", metavar="FILE", help="write the plan, or the constants, as JSON")
    output.add_argument("--top", type=_count, default=30, metavar="N", help="tables printed (default 30)")


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file, e.g. {path / 'plan.json'}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}; make it or name another file")


def run(args: argparse.Namespace) -> int:
    """Print and write a plan; exit code 0.

    Raises:
        ConfigError: settings that contradict each other.
        PlanError: the tables do not fit.
    """
    asked = [name for name in ("config", "preset", "statistics", "calibrate") if getattr(args, name)]
    if len(asked) != 1:
        given = " and ".join(f"--{name}" for name in asked) or "none"
        raise ConfigError(
            f"give one of --config, --preset, --statistics and --calibrate, not {given}; e.g. "
            "--preset mlperf_dlrm_dcnv2"
        )
    local = args.local_world_size or min(8, args.world_size)
    if args.world_size % local:
        raise ConfigError(
            f"--world_size {args.world_size} is not whole hosts of --local_world_size {local}; "
            f"e.g. --world_size {-(-args.world_size // local) * local}"
        )
    if args.calibrate and not args.output:
        raise ConfigError("--calibrate needs --output FILE.json for what it measures")
    if args.output:
        _check_output(Path(args.output))
    if args.embedding_dim is not None and not args.statistics:
        raise ConfigError(
            f"--embedding_dim {args.embedding_dim} is of --statistics; a preset or configuration has its own"
        )
    # torch takes seconds to load, so wrong flags are reported before it.
    import logging

    # torchrec announces every planner and topology on the root logger.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    if args.calibrate:
        from recemb.cli.plan_calibrate import calibrate

        text = calibrate(args.device or "cpu", Path(args.output))
    elif args.statistics:
        from recemb.cli.plan_rows import place_rows

        text = place_rows(args)
    else:
        from recemb.cli.plan_run import plan

        text = plan(args, local)
    print(text)
    if args.output:
        print(f"written: {Path(args.output)}", file=sys.stderr)
    return 0
