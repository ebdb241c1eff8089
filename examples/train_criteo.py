"""Prepare a click log and train a DLRM on it, dense and compressed, from Python.

    python examples/train_criteo.py                        # a small synthetic log
    python examples/train_criteo.py path/to/train.txt      # Criteo's Kaggle train.txt (or .gz)

The command line does the same: ``recemb prepare`` and ``recemb train --compare dense``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from recemb.data import write_synthetic
from recemb.data.prepare import prepare
from recemb.data.prepare_settings import PrepareSettings
from recemb.training.config import RunConfig
from recemb.training.report import comparison_table, load_runs
from recemb.training.run import train


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder) / "data", Path(folder) / "runs"
        if len(sys.argv) > 1:
            prepare(PrepareSettings(inputs=(Path(sys.argv[1]),), output=data))
        else:
            write_synthetic(data, num_rows=60_000, scale="1/500", seed=0)
        config = RunConfig(
            data_dir=str(data),
            output=str(runs),
            method="tt",
            compress_rate=20,
            compare="dense",
            dense_arch_layer_sizes=(64, 16),
            over_arch_layer_sizes=(64, 1),
        )
        train(config)
        print(comparison_table(load_runs([runs])))


if __name__ == "__main__":
    main()
