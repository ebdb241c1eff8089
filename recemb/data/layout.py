"""Names and sizes of a prepared directory, and the few file operations that make writing it crash-proof.

::

    OUT/stats.json                      written last: a directory without it is unfinished
    OUT/train/part-00000.parquet ...    label uint8, int_0..int_12 float32, cat_0..cat_25 int32 or int64
    OUT/val/..., OUT/test/...           the same schema; a split of 0 rows has no files
    OUT/vocabulary/cat_0.parquet ...    token and count in id order (real data only)
    OUT/rejects.jsonl                   the rows that ``--bad_rows skip`` left out (only if there are any)
    OUT/.prepare/                       intermediate files, removed at the end

``stats.json`` holds ``format_version``, ``dataset_name``, ``settings``, ``sources`` (input files with
their rows and rejects), ``rows`` and ``clicks`` per split, ``rejects``, ``oov_id`` (0, or null when no
row is out-of-vocabulary), ``dense_transform``, ``dense`` (per feature: name, missing), ``best_auc`` and
``best_logloss`` of the validation split (synthetic logs; else null), ``files`` (per split:
:class:`recemb.data.parts.PartInfo`), and ``features``, each with ``name``, ``num_embeddings``,
``distinct`` tokens and ``missing`` fields in training, ``oov_share`` per split, and the look-up
frequencies of :func:`recemb.data.statistics.frequency_summary`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from recemb.errors import ConfigError, DataError
from recemb.files import commit_file, is_full
from recemb.units import size

FORMAT_VERSION: Final = 1
NUM_DENSE: Final = 13
NUM_CATEGORICAL: Final = 26
NUM_FIELDS: Final = 1 + NUM_DENSE + NUM_CATEGORICAL
LABEL_NAME: Final = "label"
# torchrec.datasets.criteo's DEFAULT_INT_NAMES and DEFAULT_CAT_NAMES
DENSE_NAMES: Final[tuple[str, ...]] = tuple(f"int_{i}" for i in range(NUM_DENSE))
CATEGORICAL_NAMES: Final[tuple[str, ...]] = tuple(f"cat_{i}" for i in range(NUM_CATEGORICAL))
COLUMN_NAMES: Final[tuple[str, ...]] = (LABEL_NAME, *DENSE_NAMES, *CATEGORICAL_NAMES)

SPLITS: Final[tuple[str, ...]] = ("train", "val", "test")
OOV_ID: Final = 0
ROW_GROUP_ROWS: Final = 65_536
PART_ROWS: Final = 16 * ROW_GROUP_ROWS

STATS_FILE: Final = "stats.json"
REJECTS_FILE: Final = "rejects.jsonl"
VOCABULARY_DIR: Final = "vocabulary"
WORK_DIR: Final = ".prepare"


def part_name(split: str, index: int) -> str:
    """``train/part-00007.parquet``: the path of a part below the prepared directory."""
    return f"{split}/part-{index:05d}.parquet"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    commit_file(temporary, path)


def read_json(path: Path) -> Any:
    """Parse the JSON file ``path``; :class:`DataError` names the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable or damaged ({error}); prepare the directory again") from None


def require_free_space(directory: Path, needed: int, what: str) -> None:
    """:class:`ConfigError` unless the file system of ``directory`` has ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"{directory}: {what} needs about {size(needed)} of disk and {size(free)} are free; "
            "choose another --output or free some space"
        )


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do; other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise DataError(
                f"{directory}: the disk is full; free some space and give the same command again: it "
                "goes on from the last finished part"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{error.filename or directory}: {error.strerror}; choose another --output"
            ) from error
        raise


@contextmanager
def directory_lock(work_dir: Path) -> Iterator[None]:
    """Hold ``work_dir/lock`` so that two commands never write the same directory at once."""
    with open(work_dir / "lock", "w", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{work_dir.parent}: another `recemb prepare` is writing this directory; wait for it "
                "or choose another --output"
            ) from None
        yield
