"""Where the tables of the sharding tests lie: chosen cases, and drawn ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torchrec.distributed.sharding_plan import (
    column_wise,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)

# A rank, None where a table is replicated, or how it is cut. Hosts have two ranks.
ROWS, COLUMNS, HOST_ROWS, GRID = "rows", "columns", "rows of a host", "grid"
Place = int | str | None

COMPRESSED = ("tt", "qr", "robe_a", "md", "robe_b", "qr_cat")
CUT = ("qr", "md", "qr_cat")
_DENSE: dict[str, Place] = {"d_rw": ROWS, "d_tw": 1, "d_dp": None, "d_cw": COLUMNS}
# Under torchrec's row-wise Adagrad each column shard has sums of its own: not the unsharded optimizer.
_WHOLE_ROWS = {"d_cw": 0}
PLACES: dict[str, dict[str, Place]] = {
    "table_wise": {"tt": 0, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 0, "qr_cat": 1},
    "data_parallel": dict.fromkeys(COMPRESSED),
    "empty_rank": dict.fromkeys(COMPRESSED, 1),
    "variable": {"tt": 0, "qr": 1, "robe_a": None, "robe_b": None, "md": 0, "qr_cat": None, "d_rw": 0},
    "variable_rows": {"tt": 0, "qr": ROWS, "robe_a": None, "robe_b": None, "md": ROWS, "qr_cat": ROWS},
    # No uncompressed table is replicated: there is nothing to wrap in DDP.
    "mixed": {"tt": None, "qr": 1, "robe_a": None, "robe_b": None, "md": ROWS, "qr_cat": None, "d_dp": 0},
    "whole": {"tt": 0, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 0, "d_rw": 1, "d_dp": 0, "d_cw": 0},
    "row_wise": {"tt": 0, "qr": ROWS, "robe_a": 1, "robe_b": 1, "md": ROWS, "qr_cat": ROWS},
    # fbgemm has no Adam on the CPU: our kernels step uncompressed tables too.
    "adam": {"tt": 0, "qr": 1, "robe_a": 1, "robe_b": 1, "md": 0, "d_rw": ROWS, "d_dp": 0, "d_cw": 0},
    "adam_replicated": dict.fromkeys(COMPRESSED) | {"qr": ROWS, "md": ROWS, "d_rw": 1, "d_dp": 0, "d_cw": 0},
    "four": {"tt": 3, "qr": ROWS, "robe_a": 2, "robe_b": 2, "md": ROWS, "qr_cat": None, "d_tw": 3},
    "four_whole": {"tt": 3, "qr": 2, "robe_a": 2, "robe_b": 2, "md": 3, "d_rw": 3, "d_tw": 1, "d_cw": 1},
    "hosts": {"tt": 1, "qr": ROWS, "robe_a": None, "robe_b": None, "md": 3, "d_rw": HOST_ROWS, "d_cw": GRID},
    "variable_hosts": dict.fromkeys(COMPRESSED) | {"qr": ROWS, "d_rw": HOST_ROWS, "d_cw": 0},
}


@dataclass(frozen=True)
class Case:
    """One sharded model: where its tables lie, how they pool, and the optimizer fused into their backward."""

    place: str
    pooling: str
    optimizer: str | None
    world: int = 2

    def __str__(self) -> str:
        ranks = "" if self.world == 2 else f"{self.world}-"
        return f"{ranks}{self.place}-{self.pooling}-{self.optimizer or 'dense'}"

    @property
    def places(self) -> dict[str, Place]:
        """Of every table."""
        whole = _WHOLE_ROWS if self.optimizer == "rowwise_adagrad" and self.place != "hosts" else {}
        return {"qr_cat": 0} | _DENSE | whole | PLACES[self.place]

    def ways(self) -> Mapping[str, Any]:
        """torchrec's ways to plan the tables there."""
        kernel = "dense" if self.optimizer is None else "fused"
        made = {}
        for name, at in self.places.items():
            named = {} if name in COMPRESSED else {"compute_kernel": kernel}
            if at is None:
                made[name] = data_parallel()
            elif at == ROWS:
                made[name] = row_wise(**named)
            elif at == COLUMNS:
                made[name] = column_wise([0, 1], **named)
            elif at == HOST_ROWS:
                made[name] = table_row_wise(host_index=1)
            elif at == GRID:
                made[name] = grid_shard([0])
            else:
                made[name] = table_wise(at, **named)
        return made


def _drawn(world: int) -> list[Case]:
    """Cases of drawn places, poolings and optimizers; the same in every process."""
    ranks = st.integers(0, world - 1)
    whole = st.one_of(ranks, st.none())
    cut = st.one_of(ranks, st.none(), st.just(ROWS))
    places = st.fixed_dictionaries(
        {
            "tt": whole,
            "robe": whole,
            **dict.fromkeys(CUT, cut),
            **dict.fromkeys(("d_rw", "d_tw", "d_dp"), cut),
        }
    )
    poolings = st.sampled_from(["sum", "mean", "weighted", "mixed_pooling"])
    optimizers = st.sampled_from([None, "sgd", "rowwise_adagrad"])
    cases: list[Case] = []

    @settings(
        derandomize=True,
        database=None,
        max_examples=8,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(places, poolings, optimizers)
    def draw(own: dict[str, Place], pooling: str, optimizer: str | None) -> None:
        name, robe = f"drawn{len(cases)}", own["robe"]
        rest = {key: at for key, at in own.items() if key != "robe"}
        PLACES[f"{world}_{name}"] = rest | {"robe_a": robe, "robe_b": robe}
        cases.append(Case(f"{world}_{name}", pooling, optimizer, world))

    draw()
    return cases


CASES = [
    Case(*case)
    for case in (
        *product(
            ("table_wise", "data_parallel", "row_wise"),
            ("sum", "mean", "weighted"),
            (None, "sgd", "rowwise_adagrad"),
        ),
        *product(("empty_rank", "mixed"), ("mixed_pooling",), ("rowwise_adagrad",)),
        ("adam", "mean", "adam"),
        ("adam_replicated", "sum", "adam"),
        ("four", "mixed_pooling", "rowwise_adagrad", 4),
        ("four", "weighted", None, 4),
        ("hosts", "sum", "sgd", 4),
        ("hosts", "mean", "rowwise_adagrad", 4),
    )
]
CASES += [*_drawn(2), *_drawn(4)]
# Samples of each rank, where tables are cut by rows: compressed ones, uncompressed ones beside them or alone.
UNEVEN: list[tuple[Case, tuple[int, ...]]] = [
    *((Case("row_wise", "sum", "sgd"), sizes) for sizes in ((5, 2), (6, 0), (0, 3))),
    (Case("row_wise", "mean", "rowwise_adagrad"), (5, 2)),
    (Case("row_wise", "weighted", None), (1, 6)),
    (Case("table_wise", "sum", "rowwise_adagrad"), (2, 5)),
    (Case("four", "mixed_pooling", "rowwise_adagrad", 4), (3, 0, 6, 1)),
    *((Case("hosts", "sum", "sgd", 4), sizes) for sizes in ((3, 0, 6, 1), (0, 2, 0, 5), (4, 1, 2, 5))),
]
