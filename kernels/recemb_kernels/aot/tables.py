"""Prints the report: two tables for a terminal of 100 columns, and one as Markdown for a README.

The README's has a line for each kernel, shape and dtype, with the worst of its architectures and variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from recemb_kernels.aot.roofline import CARDS

if TYPE_CHECKING:
    from recemb_kernels.aot.report import Row

WIDTH = 100
BEGIN, END = "<!-- recemb kernels -->", "<!-- /recemb kernels -->"

Column = tuple[str, Callable[["Row"], str]]

_WHICH: list[Column] = [
    ("arch", lambda row: row.arch),
    ("dtype", lambda row: row.configuration.dtype),
    ("warps", lambda row: str(row.configuration.num_warps)),
    ("stages", lambda row: str(row.configuration.num_stages)),
]
_RESOURCES: list[Column] = [
    *_WHICH,
    ("registers", lambda row: str(row.code.registers)),
    ("spill B", lambda row: str(row.code.spill_bytes)),
    ("shared B", lambda row: f"{row.shared_bytes:,}"),
    ("occupancy", lambda row: f"{row.occupancy.fraction:.0%}"),
    ("stated", lambda row: f"{row.configuration.min_occupancy:.0%}"),
    ("limit", lambda row: row.occupancy.limited_by),
    ("i32", lambda row: str(len(row.narrow))),
]


def _count(title: str, *kinds: str) -> Column:
    return title, lambda row: str(sum(row.code.instructions[kind] for kind in kinds))


_WORK: list[Column] = [
    *_WHICH[:3],
    _count("MMA", "tensor_core"),
    _count("FFMA", "ffma"),
    _count("LDG", "ldg", "ldgsts"),
    _count(".128", "ldg_128"),
    _count("STG", "stg"),
    _count(".128", "stg_128"),
    _count("LDS", "lds"),
    _count("STS", "sts"),
    _count("atom", "atomic"),
    ("FLOP", lambda row: f"{row.configuration.flops_per_lookup:,.0f}"),
    ("bytes", lambda row: f"{row.configuration.bytes_per_lookup:,.0f}"),
    ("µs/M", lambda row: f"{row.roofline.us_per_million:,.1f}"),
    ("bound", lambda row: row.roofline.bound),
]
# Words that a terminal and a README both show as they stand.
_RESOURCES_ARE = (
    "Resources: registers a thread, shared memory a block, occupancy as a share of an SM's 64 warps,",
    "i32: address computations that 32 bits could be too few for.",
)
_WORK_IS = (
    "Work: instructions in the machine code, .128 those that move 16 bytes a thread; FLOP and bytes",
    "of one look-up, without a core's slice where a group of rows shares one; µs/M, the least time",
    "of a million look-ups by the datasheet:",
    "",
)
_LEFT = ("arch", "dtype", "limit", "bound")


def text(rows: Sequence[Row]) -> str:
    """Two tables, no line longer than :data:`WIDTH` unless a kernel's own name is."""
    return "\n".join(
        [
            *_RESOURCES_ARE,
            "",
            *_plain(rows, _RESOURCES),
            "",
            *_WORK_IS,
            *(f"  {line}" for line in _cards(rows)),
            "",
            *_plain(rows, _WORK),
        ]
    )


def markdown(rows: Sequence[Row]) -> str:
    """One table for the text between the markers of a README, shorter than the terminal's two."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.configuration.listed:
            groups.setdefault((_heading(row), row.configuration.dtype), []).append(row)
    columns = [*_WORST, *(_least(arch) for arch in dict.fromkeys(row.arch for row in rows))]
    return "\n".join(
        [
            "Written by `recemb kernels --write`: of each kernel, shape and dtype the worst architecture and",
            "variant; `recemb kernels` prints them one by one. Registers are a thread's, shared memory a",
            "block's, occupancy is a share of an SM's 64 warps (and what CI insists on), MMA whether tensor",
            "cores are used. FLOP and bytes are one look-up's. Its bytes have no part of a core's slice",
            "that a group of rows shares, which a product reads once for each tile of 32 of its rows; they",
            "have the slice that `sum_children` reads for each row whose share it computes. µs/M is the",
            "least time of a million look-ups by the datasheet:",
            "",
            *(f"- {line}" for line in _cards(rows)),
            "",
            "| " + " | ".join(name for name, _ in columns) + " |",
            "|" + "|".join("---" if name in (*_LEFT, "kernel") else "---:" for name, _ in columns) + "|",
            *(
                "| " + " | ".join(read(group).replace("|", "\\|") for _, read in columns) + " |"
                for group in groups.values()
            ),
            *_unlisted([row for row in rows if not row.configuration.listed]),
        ]
    )


def _unlisted(rows: Sequence[Row]) -> list[str]:
    """What the Markdown says of the rows that it leaves out."""
    if not rows:
        return []
    return [
        "",
        f"Of {len(rows)} compilations more, which have no line here, the lowest occupancy is "
        f"{min(row.occupancy.fraction for row in rows):.0%}, the most spilled "
        f"{max(row.code.spill_bytes for row in rows)} B.",
    ]


def _least(arch: str) -> tuple[str, Callable[[Sequence[Row]], str]]:
    """The roofline on one architecture, which all variants share."""

    def read(group: Sequence[Row]) -> str:
        own = [row.roofline for row in group if row.arch == arch]
        return f"{own[0].us_per_million:,.1f} {own[0].bound}" if own else ""

    return f"µs/M {arch}", read


# Of the rows of one kernel, shape and dtype.
_WORST: list[tuple[str, Callable[[Sequence[Row]], str]]] = [
    ("kernel", lambda group: _heading(group[0])),
    ("dtype", lambda group: group[0].configuration.dtype),
    ("warps", lambda group: "/".join(dict.fromkeys(str(row.configuration.num_warps) for row in group))),
    ("registers", lambda group: str(max(row.code.registers for row in group))),
    ("spill B", lambda group: str(max(row.code.spill_bytes for row in group))),
    ("shared B", lambda group: f"{max(row.shared_bytes for row in group):,}"),
    ("occupancy", lambda group: f"{min(row.occupancy.fraction for row in group):.0%}"),
    ("at least", lambda group: f"{group[0].configuration.min_occupancy:.0%}"),
    ("MMA", lambda group: "yes" if any(row.code.instructions["tensor_core"] for row in group) else ""),
    ("FLOP", lambda group: f"{group[0].configuration.flops_per_lookup:,.0f}"),
    ("bytes", lambda group: f"{group[0].configuration.bytes_per_lookup:,.0f}"),
]


def replace_between_markers(document: str, tables: str) -> str:
    """``document`` with ``tables`` in place of what stands between its markers.

    Raises:
        ValueError: the document does not have both markers once, in order.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"must contain {BEGIN} and after it {END}, once each")
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def _heading(row: Row) -> str:
    note = row.configuration.note
    return f"{row.configuration.kernel} ({note})" if note else row.configuration.kernel


def _plain(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    cells = [[read(row) for _, read in columns] for row in rows]
    widths = [
        max(len(cell) for cell in column)
        for column in zip([name for name, _ in columns], *cells, strict=True)
    ]

    def line(words: Sequence[str]) -> str:
        placed = [
            f"{word:<{width}}" if name in _LEFT else f"{word:>{width}}"
            for word, width, (name, _) in zip(words, widths, columns, strict=True)
        ]
        return "  " + " ".join(placed).rstrip()

    lines = [line([name for name, _ in columns])]
    for heading, group in groupby(zip(rows, cells, strict=True), key=lambda pair: _heading(pair[0])):
        lines.append(heading)
        lines.extend(line(words) for _, words in group)
    return lines


def _cards(rows: Sequence[Row]) -> list[str]:
    """Datasheet figures of the cards in the report."""
    lines = []
    for arch in dict.fromkeys(row.arch for row in rows):
        card = CARDS[arch]
        tf32, half = card.tensor_flops["float32"] / 1e12, card.tensor_flops["float16"] / 1e12
        lines.append(
            f"{arch} {card.name}: {card.bytes_per_second / 1e9:,.0f} GB/s, "
            f"fp32 {card.flops / 1e12:g} TFLOP/s, tensor {tf32:g} (tf32), {half:g} (16-bit)"
        )
    return lines
