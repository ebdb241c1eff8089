"""Prints the report: two tables for a terminal of 100 columns, the same two as Markdown for a README."""

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
    "of one look-up; µs/M, the least time of a million look-ups by the datasheet:",
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
    """The same two tables, for the text between the markers of a README."""
    first: list[Column] = [("kernel", _heading)]
    return "\n".join(
        [
            "Written by `recemb kernels --write`.",
            *_RESOURCES_ARE,
            "",
            *_marked(rows, [*first, *_RESOURCES]),
            "",
            *_WORK_IS,
            *(f"- {line}" for line in _cards(rows)),
            "",
            *_marked(rows, [*first, *_WORK]),
        ]
    )


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


def _marked(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    return [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "|".join("---" if name in (*_LEFT, "kernel") else "---:" for name, _ in columns) + "|",
        *("| " + " | ".join(read(row).replace("|", "\\|") for _, read in columns) + " |" for row in rows),
    ]


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
