"""What is measured: settings (sizes, ids, optimizer), the cases run at each, and the presets.

Letters: N = rows of a table, D = columns, B = batch, R = tensor-train rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recemb.data.synthetic import KAGGLE_CARDINALITIES

M, G = 10**6, 10**9
OP, MODULE, FORWARD = "op", "module", "forward"
PATHS = (OP, MODULE, FORWARD)
IDS = ("zipf", "permuted", "uniform")
# Of bench.scale alone: its trains; Zipf ids of a billion rows laid on a smaller one, with as many prefixes.
SCALE_RANK, TREE_OF_1G = 32, "tree of 1G"
OPTIMIZERS = ("rowwise_adagrad", "sgd")
RANKS = (16, 32, 64)

TBE = "fbgemm TBE"
SPARSE = "nn.EmbeddingBag"
FUNCTIONAL = "F.embedding_bag"
TLTORCH = "tltorch R="
# What torch asks of any step that it differentiates.
EMPTY = "empty step"
TT = "TT R="
ROBE, QR, MD = "ROBE Z=D 1000x", "QR mult c=4", "MD d=4"
HASHING, DENSE = "hashing to N/4", "uncompressed"
STORED = (ROBE, QR, MD, HASHING, DENSE)
# What a batch costs when its rows need not be computed and lie side by side, in a small uncompressed table.
AT_HAND, AT_HAND_ROWS = "its rows at hand", 2**16
LARGEST_TT = "7 largest TT R=32"
PEERS = (TBE, SPARSE, FUNCTIONAL, TLTORCH, EMPTY)
METHODS = ("tt", "robe", "qr", "md", "hashing", "dense")
_CASE_OF = dict(zip(METHODS[1:], STORED, strict=True))


@dataclass(frozen=True)
class Setting:
    """Sizes that all cases of a comparison share.

    Args:
        rows: N of each table; one look-up serves all of them.
        dim: D, the same for every table.
        batch: B samples.
        hots: ids in a bag, the same for every bag.
        ids: ``zipf`` (exponent 1.05, in frequency order), ``permuted`` (the same, ids shuffled), ``uniform``.
        optimizer: the fused update, ``rowwise_adagrad`` or ``sgd``.
    """

    rows: tuple[int, ...] = (10 * M,)
    dim: int = 16
    batch: int = 4096
    hots: int = 1
    ids: str = "zipf"
    optimizer: str = "rowwise_adagrad"

    @property
    def tables_key(self) -> tuple[object, ...]:
        """Settings with equal keys can use the same tables."""
        return self.rows, self.dim, self.optimizer

    def title(self) -> str:
        """One line for tables and plots."""
        n = f"N={count(self.rows[0])}" if len(self.rows) == 1 else f"{len(self.rows)} tables"
        return (
            f"{n} D={self.dim} B={self.batch:,} {self.hots}-hot {self.ids} ids, "
            f"{self.optimizer.replace('_', ' ')}"
        )


@dataclass(frozen=True)
class Comparison:
    """The cases that take turns at one setting, and the paths that each is measured on."""

    setting: Setting
    cases: tuple[str, ...]
    paths: tuple[str, ...] = PATHS


KAGGLE = Setting(rows=KAGGLE_CARDINALITIES)
BASE = Setting()


def count(number: int) -> str:
    """``10M``: rows in thousands, millions or billions when that is exact."""
    for unit, name in ((G, "G"), (M, "M"), (1000, "k")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{name}"
    return f"{number:,}"


def methods(names: Iterable[str], ranks: Iterable[int]) -> tuple[str, ...]:
    """The cases of ours that ``--methods`` and ``--ranks`` ask for."""
    names, ranks = list(names), list(ranks)
    trains = [f"{TT}{rank}" for rank in ranks] if "tt" in names else []
    return (*trains, *(_CASE_OF[name] for name in names if name != "tt"))


def is_ours(case: str) -> bool:
    """Whether a case is recemb's, not a peer's."""
    return not case.startswith(PEERS)


def against_peers(*cases: str) -> tuple[str, ...]:
    """Cases with TBE and its forward pass before them and tensorly-torch's trains of the same ranks after."""
    foreign = (TLTORCH + case.removeprefix(TT) for case in cases if case.startswith(TT))
    # When memory runs short, the last cases are left out.
    return (TBE, FUNCTIONAL, *cases, *foreign)


def targets_preset() -> list[Comparison]:
    """Every setting that :mod:`bench.targets` has a target for, with the peers that belong to it."""
    trains = methods(["tt"], RANKS)
    few = against_peers(f"{TT}32")
    return [
        Comparison(BASE, against_peers(*trains, *STORED, AT_HAND, SPARSE)),
        Comparison(replace(BASE, ids="permuted"), few),
        Comparison(replace(BASE, ids="uniform"), few),
        Comparison(replace(BASE, batch=64), against_peers(*trains, *STORED, AT_HAND, SPARSE, EMPTY)),
        Comparison(replace(BASE, batch=65536), against_peers(f"{TT}32", AT_HAND)),
        Comparison(replace(BASE, batch=65536, ids="permuted"), against_peers(f"{TT}32", AT_HAND)),
        Comparison(replace(BASE, optimizer="sgd"), against_peers(*trains[:2], SPARSE)),
        Comparison(replace(BASE, dim=64), against_peers(f"{TT}32", ROBE, AT_HAND)),
        Comparison(replace(BASE, dim=128), against_peers(*trains, ROBE, AT_HAND)),
        # The sizes of bench.scale: there a train against itself, here against tensorly-torch's.
        *(Comparison(replace(BASE, rows=(n,)), few) for n in (M, G)),
        Comparison(KAGGLE, against_peers(LARGEST_TT)),
    ]


def quick_preset() -> list[Comparison]:
    """The base setting and a small batch, without the slow peers."""
    cases = (TBE, *methods(METHODS, RANKS))
    return [Comparison(BASE, cases), Comparison(replace(BASE, batch=64), cases)]


def grid(
    axes: Mapping[str, Sequence[Any]],
    names: Sequence[str] = METHODS,
    ranks: Sequence[int] = RANKS,
    paths: Sequence[str] = PATHS,
) -> list[Comparison]:
    """All combinations of some fields of :class:`Setting`; fields left out keep the base setting's value.

    Peers run everywhere, the torch and tltorch ones on single tables. Neighbours share tables when they can.
    """
    settings = [
        replace(BASE, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]
    order = {key: k for k, key in enumerate(dict.fromkeys(setting.tables_key for setting in settings))}
    cases = against_peers(*methods(names, ranks), SPARSE)
    return [
        Comparison(setting, cases, tuple(paths))
        for setting in sorted(settings, key=lambda setting: order[setting.tables_key])
    ]


def grid_preset() -> list[Comparison]:
    """The whole grid; :mod:`bench.session` leaves out the tables that do not fit in memory."""
    return grid(
        {
            "rows": [(100_000,), (M,), (10 * M,), (G,)],
            "dim": [16, 64, 128],
            "optimizer": OPTIMIZERS,
            "batch": [64, 4096, 65536],
            "hots": [1, 20],
            "ids": IDS,
        }
    )


def sample_preset() -> list[Comparison]:
    """Settings of the grid that take in every value of every size, each of our methods and rank at each.

    Of tensorly-torch the smallest rank alone: the others take longer than all the rest together.
    """
    sizes = [
        (100_000, 16, 4096, 20, "zipf", "rowwise_adagrad"),
        (100_000, 64, 65536, 1, "zipf", "rowwise_adagrad"),
        (100_000, 128, 4096, 1, "uniform", "rowwise_adagrad"),
        (M, 16, 4096, 20, "permuted", "rowwise_adagrad"),
        (M, 16, 65536, 20, "zipf", "rowwise_adagrad"),
        (M, 64, 64, 20, "zipf", "sgd"),
        (M, 128, 4096, 20, "zipf", "rowwise_adagrad"),
        (M, 128, 65536, 1, "zipf", "rowwise_adagrad"),
        (10 * M, 16, 4096, 20, "zipf", "rowwise_adagrad"),
        (10 * M, 64, 4096, 1, "uniform", "rowwise_adagrad"),
        (G, 16, 4096, 20, "zipf", "rowwise_adagrad"),
        (G, 128, 4096, 1, "permuted", "rowwise_adagrad"),
    ]
    cases = (TBE, FUNCTIONAL, *methods(METHODS, RANKS), SPARSE, f"{TLTORCH}{RANKS[0]}")
    return [Comparison(Setting((rows,), *others), cases, (OP, FORWARD)) for rows, *others in sizes]


PRESETS = {"targets": targets_preset, "grid": grid_preset, "sample": sample_preset, "quick": quick_preset}
