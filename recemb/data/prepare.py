"""``recemb prepare`` for Criteo's logs: TSV to a prepared directory, resumable, in bounded memory.

Stages, each of which leaves finished files that a later run of the same command finds:

1. parse: every row once, validated, to raw Parquet parts (:mod:`recemb.data.raw_log`);
2. count: per feature the tokens of the *training rows only*, and from them ids
  (:mod:`recemb.data.vocabulary`);
3. write: dense transform and ids to the parts of train, val and test;
4. ``stats.json``, which makes the directory a finished one; the intermediate files go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from recemb.data.dense import DENSE_TRANSFORM, log_shift
from recemb.data.layout import (
    CATEGORICAL_NAMES,
    DENSE_NAMES,
    FORMAT_VERSION,
    LABEL_NAME,
    OOV_ID,
    PART_ROWS,
    REJECTS_FILE,
    ROW_GROUP_ROWS,
    SPLITS,
    VOCABULARY_DIR,
    WORK_DIR,
    part_name,
    read_json,
    require_free_space,
    write_json,
)
from recemb.data.parts import PartInfo, Rows, click_log_schema, rows_to_table, write_part
from recemb.data.prepare_settings import PrepareSettings
from recemb.data.raw_log import RawLog
from recemb.data.splits import TimeSplit
from recemb.data.token_counts import TokenCounter
from recemb.data.token_map import TokenMap, open_maps
from recemb.data.vocabulary import FeatureVocabulary, write_vocabulary
from recemb.data.workspace import finish, open_workspace
from recemb.errors import DataError

# Measured at 100 M tokens: 55 bytes per entry at the peak of counting, 97 at that of giving out ids.
_BYTES_PER_ENTRY: Final = 128
# Bytes on disk per byte of text: 0.20-0.35 for raw parts, 0.16-0.20 for finished ones (measured on both
# samples and on random tokens), the rest for spilled counts.
_DISK_PER_TEXT_BYTE: Final = 0.75
_TEXT_PER_GZIP_BYTE: Final = 3.5


@dataclass(frozen=True)
class PrepareResult:
    """``stats.json`` as it is on disk; ``already_done`` when nothing was left to do."""

    stats: dict[str, Any]
    already_done: bool


def prepare(settings: PrepareSettings, *, progress: bool = False) -> PrepareResult:
    """Prepare a Criteo log, or go on where an earlier, interrupted call with the same settings stopped.

    Raises:
        DataError: for a bad row, an unreadable input, or a full disk.
        ConfigError: for an output directory that holds something else or was made with other settings.
    """
    described = settings.to_json()
    with open_workspace(settings.output, described) as finished:
        if finished is not None:
            return PrepareResult(finished, already_done=True)
        work = settings.output / WORK_DIR
        raw = RawLog(
            work / "raw", settings.inputs, settings.max_bad_rows if settings.bad_rows == "skip" else None
        )
        if not raw.parts:
            require_free_space(settings.output, _disk_estimate(settings), "preparing this log")
        raw.parse(progress)
        if settings.to_json() != described:
            raise DataError("an --input file changed while it was read; remove the output and start over")
        ranges = TimeSplit.by_time(raw.num_rows, settings.val_fraction, settings.test_fraction).ranges()
        vocabularies = _count(settings, raw, ranges["train"], progress)
        written = _write(settings, raw, ranges, vocabularies, progress)
        raw.collect_rejects(settings.output / REJECTS_FILE)
        stats = _statistics(described, raw, vocabularies, written)
        finish(settings.output, stats)
    return PrepareResult(stats, already_done=False)


def _disk_estimate(settings: PrepareSettings) -> int:
    total = 0.0
    for path in settings.inputs:
        with open(path, "rb") as handle:
            packed = handle.read(2) == b"\x1f\x8b"
        total += path.stat().st_size * (_TEXT_PER_GZIP_BYTE if packed else 1.0) * _DISK_PER_TEXT_BYTE
    return int(total)


def _count(settings: PrepareSettings, raw: RawLog, rows: range, progress: bool) -> list[FeatureVocabulary]:
    work = settings.output / WORK_DIR
    (settings.output / VOCABULARY_DIR).mkdir(exist_ok=True)
    (work / "map").mkdir(exist_ok=True)
    entries = max(settings.memory_budget // _BYTES_PER_ENTRY, 1)
    vocabularies = []
    disable = None if progress else True
    total = len(rows) * len(CATEGORICAL_NAMES)
    with tqdm(total=total, unit="ids", unit_scale=True, desc="count", disable=disable) as bar:
        for name in CATEGORICAL_NAMES:
            state = work / "map" / f"{name}.json"
            if state.exists():
                vocabularies.append(FeatureVocabulary(**read_json(state)))
                bar.update(len(rows))
                continue
            counter = TokenCounter(work / "map" / name, entries)
            missing = 0
            for table in raw.row_groups(rows, [name]):
                column = table.column(0)
                missing += column.null_count
                counter.add(column.drop_null().to_numpy())
                bar.update(len(column))
            counted = counter.finish()
            paths = (settings.output / VOCABULARY_DIR / f"{name}.parquet", work / "map" / name)
            limits = (settings.min_count, settings.max_ind_range)
            vocabulary = write_vocabulary(name, counted, missing, limits, paths, entries)
            counted[0].delete()
            write_json(state, asdict(vocabulary))
            vocabularies.append(vocabulary)
    return vocabularies


@dataclass(frozen=True)
class _WrittenPart:
    """A finished part of the output and what it adds to the statistics."""

    info: PartInfo
    clicks: int
    oov: list[int]


def _write(
    settings: PrepareSettings,
    raw: RawLog,
    ranges: dict[str, range],
    vocabularies: list[FeatureVocabulary],
    progress: bool,
) -> dict[str, list[_WrittenPart]]:
    map_dir = settings.output / WORK_DIR / "map"
    maps = open_maps(
        vocabularies, [map_dir / vocabulary.name for vocabulary in vocabularies], settings.memory_budget
    )
    schema = click_log_schema([vocabulary.num_embeddings for vocabulary in vocabularies])
    done_dir = settings.output / WORK_DIR / "written"
    done_dir.mkdir(exist_ok=True)
    written: dict[str, list[_WrittenPart]] = {split: [] for split in SPLITS}
    with tqdm(
        total=raw.num_rows, unit="rows", unit_scale=True, desc="write", disable=None if progress else True
    ) as bar:
        for split, rows in ranges.items():
            for index, start in enumerate(range(rows.start, rows.stop, PART_ROWS)):
                part_rows = range(start, min(start + PART_ROWS, rows.stop))
                state = done_dir / f"{split}-{index:05d}.json"
                if state.exists():
                    value = read_json(state)
                    part = _WrittenPart(PartInfo.from_json(value["info"]), value["clicks"], value["oov"])
                else:
                    chunks = raw.chunks(part_rows, ROW_GROUP_ROWS)
                    part = _write_part(settings.output, part_name(split, index), schema, chunks, maps)
                    write_json(state, asdict(part))
                written[split].append(part)
                bar.update(len(part_rows))
    return written


def _write_part(
    root: Path, name: str, schema: Any, chunks: Iterator[Any], maps: list[TokenMap]
) -> _WrittenPart:
    clicks = 0
    oov = np.zeros(len(maps), np.int64)

    def tables() -> Iterator[Any]:
        nonlocal clicks
        for chunk in chunks:
            rows = _map_rows(chunk, maps)
            clicks += int(rows.labels.sum())
            np.add(oov, (rows.ids == OOV_ID).sum(axis=1), out=oov)
            yield rows_to_table(rows, schema)

    info = write_part(root, name, schema, tables())
    return _WrittenPart(info, clicks, oov.tolist())


def _map_rows(chunk: Any, maps: list[TokenMap]) -> Rows:
    dense = [
        log_shift(pc.fill_null(column, 0).to_numpy(), pc.is_null(column).to_numpy())
        for column in (chunk.column(name) for name in DENSE_NAMES)
    ]
    ids = [
        token_map.lookup(pc.fill_null(column, 0).to_numpy(), pc.is_null(column).to_numpy())
        for token_map, column in zip(maps, (chunk.column(name) for name in CATEGORICAL_NAMES), strict=True)
    ]
    return Rows(chunk.column(LABEL_NAME).to_numpy(), np.stack(dense), np.stack(ids))


def _statistics(
    settings: dict[str, Any],
    raw: RawLog,
    vocabularies: list[FeatureVocabulary],
    written: dict[str, list[_WrittenPart]],
) -> dict[str, Any]:
    rows = {split: sum(part.info.rows for part in written[split]) for split in SPLITS}
    sources = []
    for index, source in enumerate(settings["inputs"]):
        parts = [part for part in raw.parts if part.source == index]
        counts = {"rows": sum(part.rows for part in parts), "rejects": sum(part.rejects for part in parts)}
        sources.append({**source, **counts})
    features = []
    for index, vocabulary in enumerate(vocabularies):
        oov = {
            split: sum(part.oov[index] for part in written[split]) / rows[split]
            for split in SPLITS
            if rows[split]
        }
        features.append(
            {
                "name": vocabulary.name,
                "num_embeddings": vocabulary.num_embeddings,
                **vocabulary.summary,
                "oov_share": oov,
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "dataset_name": settings["dataset_name"],
        "settings": settings,
        "sources": sources,
        "rows": rows,
        "clicks": {split: sum(part.clicks for part in written[split]) for split in SPLITS},
        "rejects": raw.rejects,
        "oov_id": OOV_ID,
        "dense_transform": DENSE_TRANSFORM,
        "dense": [
            {"name": name, "missing": sum(part.missing_dense[index] for part in raw.parts)}
            for index, name in enumerate(DENSE_NAMES)
        ],
        "features": features,
        "best_auc": None,
        "best_logloss": None,
        "files": {split: [part.info.to_json() for part in written[split]] for split in SPLITS},
    }
