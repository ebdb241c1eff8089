"""``recemb train``: train a DLRM on a prepared click log."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recemb.cli.ranks import launch, words_of
from recemb.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# Group -> flag -> (metavar, help); metavar ``None`` marks a switch. Values are checked by
# recemb.training.config, together with the YAML file's, so that all problems are reported at once.
_FLAGS: dict[str, dict[str, tuple[str | None, str]]] = {
    "data and output": {
        "data_dir": ("DIR", "a directory made by recemb prepare (required)"),
        "output": ("DIR", "the run directory to write (required)"),
        "overwrite": (None, "replace the result that --output already holds"),
        "dataset_name": ("NAME", "criteo_kaggle, criteo_1tb or synthetic: refuse a data_dir of another one"),
    },
    "compression": {
        "method": ("METHOD", "dense, tt, qr, robe or md (default dense)"),
        "compress_rate": ("R", "make all tables together R times smaller, e.g. 100"),
        "method_threshold": ("ROWS", "leave tables of at most this many rows uncompressed (default 200)"),
        "cache_fraction": (
            "F",
            "keep this part of each compressed table's rows, the hottest, uncompressed, e.g. 0.01; "
            "its bytes count in compress_rate",
        ),
        "cache_policy": ("NAME", "which rows are hot: lfu (default), lru or importance"),
        "cache_refresh_every": ("STEPS", "exchange cached rows every STEPS training steps; 64 when left out"),
        "compare": ("dense", "train the uncompressed twin too and print both side by side"),
    },
    "model": {
        "embedding_dim": ("D", "columns of each table (default 16)"),
        "num_embeddings": ("ROWS", "at most this many rows a table; larger ids are folded by id mod ROWS"),
        "num_embeddings_per_feature": ("N,N,...", "rows of each table (default: the log's vocabularies)"),
        "dense_arch_layer_sizes": ("N,N,...", "bottom MLP; ends with embedding_dim (default 512,256,D)"),
        "over_arch_layer_sizes": ("N,N,...", "top MLP; ends with 1 (default 512,512,256,1)"),
        "interaction_type": ("TYPE", "original (dot products, the default) or dcn (DCN-v2 cross layers)"),
        "dcn_num_layers": ("N", "cross layers of dcn (default 3)"),
        "dcn_low_rank_dim": ("N", "rank of the cross layers (default 512)"),
    },
    "training": {
        "batch_size": (
            "B",
            "training batch of each rank (default 512): under torchrun with W ranks a step takes W x B rows",
        ),
        "test_batch_size": (
            "B",
            "batch of evaluations, of each rank (default 4096 or batch_size, the larger)",
        ),
        "epochs": ("N", "passes over the train split (default 1)"),
        "limit_train_batches": ("N", "stop each epoch after N batches"),
        "limit_val_batches": ("N", "evaluate on the first N validation batches"),
        "limit_test_batches": ("N", "evaluate on the first N test batches"),
        "optimizer": (
            "NAME",
            "sgd, adagrad, rowwise_adagrad (dense layers: adagrad) or adam (default adam); tables step in "
            "their backward, where adam moves the rows of the batch only, as torch's SparseAdam does",
        ),
        "learning_rate": (
            "LR",
            "default 0.001 for adam, 0.01 for adagrad and rowwise_adagrad, 0.1 for sgd",
        ),
        "eps": ("EPS", "of adagrad, rowwise_adagrad and adam (default 1e-8)"),
        "seed": ("N", "of weights and batch order; equal seeds give equal runs (default 0)"),
        "validation_freq_within_epoch": ("STEPS", "evaluate every STEPS steps, besides each epoch's end"),
        "patience": ("N", "stop after N evaluations without a better one; the best weights are kept"),
        "device": ("DEVICE", "cpu or cuda (default cpu)"),
    },
    "checkpoints and ranks": {
        "checkpoint_freq": (
            "STEPS",
            "save a checkpoint to resume from every STEPS steps and at the end (default 0: only when a "
            "signal stops the run)",
        ),
        "resume": (None, "go on from the newest checkpoint in --output, or start where there is none"),
        "plan": ("FILE", "where each table goes, by recemb plan (default: whole tables, spread evenly)"),
        "communication_slices": (
            "N",
            "look sharded tables up in N slices and send one's rows while the next is computed (default 1)",
        ),
        "dist_timeout_seconds": (
            "S",
            "give up when the other ranks do not answer for S seconds (default 300)",
        ),
    },
}

_DESCRIPTION = """\
Train a DLRM on a prepared click log, and write a run directory: resolved_config.yaml, metrics.jsonl,
result.json, checkpoints/model.safetensors.

Every flag is also a key of the YAML file that --config names; flags win.
"""
_EPILOG = """\
examples:
  recemb train --data_dir data/kaggle --method tt --compress_rate 100 --compare dense \\
      --validation_freq_within_epoch 50 --epochs 3 --patience 4 --output runs/tt100

  recemb train --nproc_per_node 2 --max_restarts 3 --checkpoint_freq 1000 --resume --batch_size 256 \\
      --data_dir data/kaggle --method tt --compress_rate 100 --output runs/tt100x2
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "train",
        help="train a model with compressed tables",
        usage="recemb train --data_dir DIR --output DIR [--config FILE.yaml] [--method METHOD] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", default=None, help="read settings from a YAML file")
    parser.add_argument(
        "--nproc_per_node",
        metavar="N",
        type=_count,
        default=None,
        help="train on N ranks of this machine, as torchrun starts them",
    )
    parser.add_argument(
        "--max_restarts",
        metavar="N",
        type=_count,
        default=None,
        help="with --nproc_per_node: start all ranks again up to N times after one has failed",
    )
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (metavar, text) in flags.items():
            if metavar is None:
                group.add_argument(f"--{name}", action="store_true", help=text)
            else:
                group.add_argument(f"--{name}", metavar=metavar, help=text)
        if title == "training":
            group.add_argument(
                "--adagrad",
                dest="optimizer",
                action="store_const",
                const="adagrad",
                help="short for --optimizer adagrad",
            )
            group.add_argument(
                "--shuffle_batches",
                action=argparse.BooleanOptionalAction,
                help="train in a new random order each epoch (default yes)",
            )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Train; exit code 0, or an error of :mod:`recemb.errors`."""
    from recemb.training.config import load_config

    own = ("verb", "config", "nproc_per_node", "max_restarts")
    flags = {name: value for name, value in vars(args).items() if name not in own}
    config = load_config(flags, Path(args.config) if args.config is not None else None)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        # torchrun has started the ranks again: what they have reached is to be gone on from, not removed, but
        # what --overwrite was to replace, and they have not come to, still is.
        config = config.model_copy(update={"resume": True})
    if args.nproc_per_node is not None:
        return launch(
            args.nproc_per_node, args.max_restarts or 0, words_of("train", {"config": args.config, **flags})
        )
    if args.max_restarts is not None:
        raise ConfigError("--max_restarts needs --nproc_per_node; torchrun has --max-restarts of its own")

    # OpenMP's threads spin while they wait for each other. When something else wants a core, the one waited
    # for cannot run: a step took 389 ms on two busy cores, 78 ms with sleeping threads. Read as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # torch takes seconds to load, so a wrong configuration is reported before it.
    import logging
    import warnings

    from recemb.training.distributed import Launch
    from recemb.training.report import comparison_table, load_runs
    from recemb.training.run import train

    # torchrec 1.8 calls a name that torch 2.13 has deprecated, once per process.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # torchrec 1.8 shards with what torch 2.13 has deprecated.
    for start in ("Please use DTensor instead", "`broadcast_buffers` is deprecated"):
        warnings.filterwarnings("ignore", start, FutureWarning)
    directories = train(config)
    if Launch.of(os.environ).rank > 0:
        return 0
    print(comparison_table(load_runs(directories)))
    print(f"results: {', '.join(map(str, directories))}", file=sys.stderr)
    return 0
