"""``make demo``: one DLRM on a synthetic click log, with dense, tensor-train and ROBE tables, compared.

Takes about two minutes on two cores. Everything lands in runs/demo; the log is made once and kept.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from recemb.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
# Criteo Kaggle's 26 tables at 1/50 of their rows: 43 MB uncompressed, large enough that 100x can hurt.
ROWS, SCALE, COMPRESS_RATE = 1_000_000, "1/50", 100
# A large batch, few steps and small layers keep it short; the learning rate is scaled to that batch.
MODEL = "--dense_arch_layer_sizes 128,64,16 --over_arch_layer_sizes 256,128,1"
TRAINING = "--batch_size 2048 --learning_rate 4e-3 --validation_freq_within_epoch 80 --seed 0 --overwrite"

NEXT = """
pictures and details: {report}/report.html (and comparison.png)

Next, with real data (Criteo's Kaggle Display Advertising train.txt):
  recemb prepare --dataset_name criteo_kaggle --input train.txt --output data/kaggle
  recemb train --data_dir data/kaggle --method tt --compress_rate 100 --compare dense \\
      --epochs 3 --validation_freq_within_epoch 2000 --patience 3 --output runs/kaggle_tt100"""


def recemb(command: str) -> None:
    """Run one ``recemb`` command in this process, as a user would type it."""
    print(f"$ recemb {command}", file=sys.stderr, flush=True)
    code = main(shlex.split(command))
    if code != 0:
        sys.exit(code)


def demo() -> None:
    """Make the log, train the three models, report."""
    started = time.monotonic()
    folder = ROOT / "runs" / "demo"
    data, report = shlex.quote(str(folder / "data")), folder / "report"
    recemb(f"prepare --dataset_name synthetic --rows {ROWS} --scale {SCALE} --seed 0 --output {data}")
    runs = []
    for method in ("dense", "tt", "robe"):
        run = shlex.quote(str(folder / method))
        rate = "" if method == "dense" else f" --compress_rate {COMPRESS_RATE}"
        recemb(f"train --data_dir {data} --method {method}{rate} {MODEL} {TRAINING} --output {run}")
        runs.append(run)
    recemb(f"report {' '.join(runs)} --output {shlex.quote(str(report))}")
    print(NEXT.format(report=report.relative_to(ROOT)))
    print(f"({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    demo()
