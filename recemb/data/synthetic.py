"""A synthetic click log in the form of a prepared directory, with a known best AUC.

Tables have the Criteo Kaggle cardinalities times ``scale``: ``max(min(n, 4), round(n * scale))`` rows. Ids
are Zipf(1.05) and their order is that of falling frequency, as ``recemb prepare`` gives them out; there is no
out-of-vocabulary row. Labels are drawn from the probability of :class:`recemb.data.teacher.Teacher`, so that
no model can be better than ``best_auc`` and ``best_logloss`` of ``stats.json`` by more than sampling noise.

The rows are a function of the arguments alone: every row group has its own Philox stream. Across machines
they agree up to the last bit of ``exp``, ``log`` and ``pow``, which can move a draw only where it falls
within 1e-15 of a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from recemb.data.dense import DENSE_TRANSFORM, log_shift
from recemb.data.layout import (
    CATEGORICAL_NAMES,
    DENSE_NAMES,
    FORMAT_VERSION,
    NUM_DENSE,
    PART_ROWS,
    ROW_GROUP_ROWS,
    SPLITS,
    part_name,
    require_free_space,
)
from recemb.data.parts import PartInfo, Rows, click_log_schema, rows_to_table, write_part
from recemb.data.splits import TimeSplit, parse_fraction
from recemb.data.statistics import CountHistogram, frequency_summary
from recemb.data.teacher import BestScore, Teacher
from recemb.data.workspace import finish, open_workspace
from recemb.data.zipf import BoundedZipf
from recemb.errors import ConfigError

# Cardinalities of C1..C26 of the Criteo Kaggle log (sum 33,762,577)
KAGGLE_CARDINALITIES: Final[tuple[int, ...]] = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)  # fmt: skip
ZIPF_EXPONENT: Final = 1.05
CLICK_RATE: Final = 0.25
MISSING_SHARE: Final = 0.1
_PILOT_STREAM: Final = 2**63
_BYTES_PER_ROW: Final = 64  # of a Parquet part at full cardinality: 51 measured


def scaled_cardinalities(scale: Fraction, cardinalities: Sequence[int] = KAGGLE_CARDINALITIES) -> list[int]:
    """``max(min(n, 4), round(n * scale))`` for every table of n rows."""
    return [max(min(rows, 4), round(rows * scale)) for rows in cardinalities]


class _Generator:
    """Rows of one synthetic log; ``stream`` numbers its independent row groups."""

    def __init__(self, cardinalities: Sequence[int], seed: int) -> None:
        self._zipf = [BoundedZipf(rows, ZIPF_EXPONENT) for rows in cardinalities]
        self._seed = seed
        self._teacher = Teacher(seed, len(cardinalities))
        pilot = np.random.Generator(np.random.Philox(key=[seed, _PILOT_STREAM]))
        ids, _, standardised = self._features(pilot, ROW_GROUP_ROWS)
        self._teacher.fit(ids, standardised, CLICK_RATE)

    def _features(
        self, generator: np.random.Generator, size: int
    ) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """ids F arrays [B], transformed dense [13, B], the teacher's standardised dense [13, B]."""
        ids = [zipf.sample(generator, size) - 1 for zipf in self._zipf]
        standardised = generator.standard_normal((NUM_DENSE, size), dtype=np.float32)
        np.clip(standardised, -4.0, 4.0, out=standardised)
        missing = generator.random((NUM_DENSE, size), dtype=np.float32) < MISSING_SHARE
        counts = np.exp(1.5 * standardised + 2.0).astype(np.int64)
        standardised[missing] = 0.0
        return ids, log_shift(counts, missing), standardised

    def rows(self, stream: int, size: int) -> tuple[Rows, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Rows of ``stream``, their click probability [B] and the dense-only score [B]."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, stream]))
        ids, dense, standardised = self._features(generator, size)
        probability, dense_score = self._teacher.probability(ids, standardised)
        clicked = generator.random(size) < probability
        return Rows(clicked.astype(np.uint8), dense, np.stack(ids)), probability, dense_score


class _Tally:
    """What the statistics need of the rows as they are written."""

    def __init__(self, cardinalities: Sequence[int]) -> None:
        self.counts = [np.zeros(rows, np.uint32) for rows in cardinalities]
        self.clicks = dict.fromkeys(SPLITS, 0)
        self.best = {split: BestScore() for split in SPLITS[1:]}
        self.dense_only = {split: BestScore() for split in SPLITS[1:]}
        self.missing_dense = np.zeros(NUM_DENSE, np.int64)

    def add(
        self,
        split: str,
        rows: Rows,
        probability: npt.NDArray[np.float64],
        dense_score: npt.NDArray[np.float64],
    ) -> None:
        self.clicks[split] += int(rows.labels.sum())
        if split == "train":
            self.missing_dense += (rows.dense == 0.0).sum(axis=1)
            for counts, ids in zip(self.counts, rows.ids, strict=True):
                np.add.at(counts, ids, np.uint32(1))
        else:
            clicked = rows.labels.astype(np.bool_)
            self.best[split].add(probability, clicked)
            self.dense_only[split].add(dense_score, clicked)


def write_synthetic(
    out_dir: str | Path,
    num_rows: int,
    scale: float | str | Fraction = "1/1000",
    seed: int = 0,
    *,
    val_fraction: float | str | Fraction = "0.1",
    test_fraction: float | str | Fraction = "0",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a synthetic click log of ``num_rows`` rows to ``out_dir`` and return its statistics.

    Args:
        scale: of the 26 cardinalities, in (0, 1], for example 0.01 or "1/1000".
        seed: 0 <= seed < 2^63; of rows and teacher.
        val_fraction, test_fraction: the last rows of the log, as for real data.
        progress: show a progress bar on stderr when it is a terminal.

    Raises:
        ConfigError: for an argument out of range, or an ``out_dir`` that holds something else. A directory
            finished with the same arguments is left as it is, and its statistics are returned.
    """
    if num_rows < 1:
        raise ConfigError(f"--rows {num_rows} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} must be in [0, 2^63)")
    factor = _parse_scale(scale)
    settings = {
        "dataset_name": "synthetic",
        "rows": num_rows,
        "scale": str(factor),
        "seed": seed,
        "val_fraction": str(parse_fraction(val_fraction, "--val_fraction")),
        "test_fraction": str(parse_fraction(test_fraction, "--test_fraction")),
    }
    ranges = TimeSplit.by_time(
        num_rows, Fraction(str(settings["val_fraction"])), Fraction(str(settings["test_fraction"]))
    ).ranges()
    cardinalities = scaled_cardinalities(factor)
    output = Path(out_dir)
    with open_workspace(output, settings) as finished:
        if finished is not None:
            return finished
        require_free_space(output, num_rows * _BYTES_PER_ROW, f"a synthetic log of {num_rows:,} rows")
        tally = _Tally(cardinalities)
        files: dict[str, list[PartInfo]] = {}
        generator = _Generator(cardinalities, seed)
        with tqdm(total=num_rows, unit="rows", unit_scale=True, disable=None if progress else True) as bar:
            for split in SPLITS:
                files[split] = _write_split(output, split, len(ranges[split]), generator, tally, bar)
        stats = _statistics(settings, cardinalities, files, tally)
        finish(output, stats)
    return stats


def _parse_scale(scale: float | str | Fraction) -> Fraction:
    try:
        factor = Fraction(str(scale).strip())
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--scale: {scale!r} is not a number; give for example 0.01 or 1/1000") from None
    if not 0 < factor <= 1:
        raise ConfigError(f"--scale {scale} must be in (0, 1]; 1 is the full Criteo Kaggle cardinality")
    return factor


def _write_split(
    output: Path, split: str, size: int, generator: _Generator, tally: _Tally, bar: Any
) -> list[PartInfo]:
    schema = click_log_schema([len(counts) for counts in tally.counts])

    def tables(part_start: int) -> Iterator[Any]:
        for start in range(part_start, min(part_start + PART_ROWS, size), ROW_GROUP_ROWS):
            stream = (SPLITS.index(split) << 48) + start // ROW_GROUP_ROWS
            rows, probability, dense_score = generator.rows(stream, min(ROW_GROUP_ROWS, size - start))
            tally.add(split, rows, probability, dense_score)
            bar.update(rows.labels.size)
            yield rows_to_table(rows, schema)

    return [
        write_part(output, part_name(split, index), schema, tables(start))
        for index, start in enumerate(range(0, size, PART_ROWS))
    ]


def _statistics(
    settings: dict[str, Any], cardinalities: Sequence[int], files: dict[str, list[PartInfo]], tally: _Tally
) -> dict[str, Any]:
    rows = {split: sum(part.rows for part in files[split]) for split in SPLITS}
    features = []
    for name, size, counts in zip(CATEGORICAL_NAMES, cardinalities, tally.counts, strict=True):
        histogram = CountHistogram.of(counts.astype(np.int64))
        features.append(
            {
                "name": name,
                "num_embeddings": size,
                "distinct": int(np.count_nonzero(counts)),
                "missing": 0,
                "oov_share": {split: 0.0 for split in SPLITS if rows[split]},
                **frequency_summary(histogram, histogram),
            }
        )
    val = "val" if rows["val"] else "test"
    return {
        "format_version": FORMAT_VERSION,
        "dataset_name": "synthetic",
        "settings": settings,
        "sources": [],
        "rows": rows,
        "clicks": tally.clicks,
        "rejects": 0,
        "oov_id": None,
        "dense_transform": DENSE_TRANSFORM,
        "dense": [
            {"name": name, "missing": int(count)}
            for name, count in zip(DENSE_NAMES, tally.missing_dense, strict=True)
        ],
        "features": features,
        "best_auc": tally.best[val].auc(),
        "best_logloss": tally.best[val].logloss(),
        "best_auc_without_embeddings": tally.dense_only[val].auc(),
        "files": {split: [part.to_json() for part in files[split]] for split in SPLITS},
    }
