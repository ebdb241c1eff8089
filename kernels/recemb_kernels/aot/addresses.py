"""Finds address arithmetic that 32 bits could be too few for, in Triton's IR.

A pointer into a tensor of 2**31 elements or more needs a 64-bit offset, and 64 bits from the first
multiplication on: an offset that is computed in 32 bits and widened afterwards has already lost its upper
bits. So an offset is *narrow*

- when it is a 32-bit integer that compile-time constants do not bound (``tl.arange(0, 64)`` is bounded, an
  argument, a loaded number and ``tl.program_id(0) * 64`` are not), or
- when it is wider, but a 32-bit sum or product that could exceed 32 bits went into it.

Every ``tt.addptr`` counts whose pointer may lead into a large tensor: all but those traced back to an
argument of the configuration's ``small``. Pointers that the trace loses, read from memory for instance, count
as large.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from recemb_kernels.aot.ranges import GRID_MAX, NARROW, Value, bounded, evaluate, join, unbounded

_LOCATION = re.compile(r"\s*\bloc\((?:[^()\"]|\"[^\"]*\"|\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\))*\)")
_REFERENCE = re.compile(r"#loc\d*\b")
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')
_RESULT = re.compile(r"^(%[\w$.-]+)(?::(\d+))? = (.*)$")
_OPERATION = re.compile(r'^"?([a-z_]\w*(?:\.\w+)+)"?')
_OPERAND = re.compile(r"%[\w$.-]+(?:#\d+)?")
_BRACES = re.compile(r"<?\{[^{}]*\}>?")
_NAMED = re.compile(r"(%[\w$.-]+): ([^,()]+(?:\([^()]*\))?[^,()]*)")
_INTEGER = re.compile(r"(?:^|[x< ])i(\d+)\b|\b(index)\b")
_INITIAL = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")
_DIMENSION = re.compile(r"get_(?:program_id|num_programs) ([xyz])")
# Operations whose result is one of, or made of the elements of, their operands.
_MOVES = frozenset(
    f"tt.{name}"
    for name in (
        "splat",
        "unsplat",
        "broadcast",
        "expand_dims",
        "reshape",
        "trans",
        "cat",
        "join",
        "split",
        "gather",
    )
) | {"ttg.convert_layout", "tt.bitcast"}
_REGIONS = ("scf.for", "scf.if", "scf.while", "tt.reduce", "tt.scan", "tt.map_elementwise")


@dataclass
class _Region:
    """An operation whose braces are open: what its results are made of is known when they close."""

    op: str
    results: list[str]
    line: int
    operands: list[str] = field(default_factory=list)
    yields: list[list[Value]] = field(default_factory=list)


def narrow_offsets(ttir: str, small: Collection[str] = ()) -> list[str]:
    """Where 32 bits could be too few: one line for each ``tt.addptr`` concerned, with its line of source.

    Args:
        ttir: Triton's IR as ``triton.compile`` keeps it.
        small: arguments whose tensors can never hold 2**31 elements.
    """
    raw = [line for line in ttir.splitlines() if not line.startswith("#loc")]
    lines = [_LOCATION.sub("", line).strip() for line in raw]
    # What a loop carries round is known at its end, so the walk is repeated until it learns nothing new.
    carried: dict[tuple[int, int], Value] = {}
    while True:
        walk = _Walk(frozenset(small), dict(carried))
        for number, line in enumerate(lines):
            walk.step(number, line)
        if walk.carried == carried:
            places = _places(ttir)
            return [f"{_where(raw[number], places)}{finding}" for number, finding in walk.findings]
        carried = walk.carried


def _places(ttir: str) -> dict[str, str]:
    """Definition of each location alias, ``#loc7 = loc("kernel.py":12:4)``."""
    return dict(line.split(" = ", 1) for line in ttir.splitlines() if line.startswith("#loc"))


def _where(line: str, places: dict[str, str]) -> str:
    """``"kernel.py:12: "``, the line of source behind a line of IR, if it says so; of a helper, its own."""
    text = line.rsplit(" loc(", 1)[-1]
    for _ in range(8):
        if found := _PLACE.search(text):
            return f"{found[1].rsplit('/', 1)[-1]}:{found[2]}: "
        reference = _REFERENCE.search(text)
        if reference is None or reference[0] not in places:
            break
        text = places[reference[0]]
    return ""


class _Walk:
    """One pass over the lines of the IR, in order: definitions come before uses."""

    def __init__(self, small: frozenset[str], carried: dict[tuple[int, int], Value]) -> None:
        self._small = small
        self._values: dict[str, Value] = {}
        self._open: list[_Region] = []
        self.carried = carried
        self.findings: list[tuple[int, str]] = []
        self._number = 0

    def step(self, number: int, line: str) -> None:
        """Take in one line."""
        self._number = number
        if line.startswith("tt.func"):
            self._arguments(line)
        elif line.startswith("^"):
            self._block(line)
        elif line.startswith("}"):
            self._close(line)
        elif line.startswith(
            ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return", "tt.map_elem")
        ):
            self._yield(line)
        else:
            self._operation(line)

    def _arguments(self, line: str) -> None:
        # A helper that was not inlined may be called with any pointer.
        def origin(name: str) -> str | None:
            return name[1:] if " public " in line else None

        for name, kind in _NAMED.findall(_BRACES.sub("", line)):
            bits = _bits(kind)
            pointer = "!tt.ptr" in kind
            self._values[name] = Value(base=origin(name)) if pointer else unbounded(bits)

    def _block(self, line: str) -> None:
        region = self._open[-1] if self._open else None
        for place, (name, kind) in enumerate(_NAMED.findall(line)):
            value = Value() if "!tt.ptr" in kind else unbounded(_bits(kind))
            if region is not None and region.op == "scf.while" and region.yields:
                value = region.yields[0][place]
            elif region is None:
                # Arguments of a block that several branches reach: not followed, so nothing is vouched for.
                value = replace(value, wrapped=value.bits == NARROW)
            self._values[name] = value

    def _operation(self, line: str) -> None:
        found = _RESULT.match(line)
        name, several, rest = (found[1], found[2], found[3]) if found else ("", None, line)
        operation = _OPERATION.match(rest)
        if operation is None:
            return
        op = operation[1]
        results = [f"{name}#{i}" for i in range(int(several))] if several else [name]
        if op in _REGIONS and rest.endswith("{"):
            self._enter(op, rest, results)
            return
        text = _BRACES.sub("", rest)
        operands = [self._value(word) for word in _OPERAND.findall(text.split(" : ")[0])]
        if op == "tt.addptr":
            self._judge(operands)
        value = self._evaluate(op, rest, text, operands)
        for result in results:
            self._values[result] = value

    def _evaluate(self, op: str, rest: str, text: str, operands: list[Value]) -> Value:
        bits = _bits(_result_type(op, text))
        if op == "tt.addptr":
            return operands[0]
        if op == "arith.constant":
            return _constant(rest, bits)
        if op == "tt.make_range":
            limits = {key: int(number) for key, number in re.findall(r"(start|end) = (-?\d+)", rest)}
            return Value(NARROW, limits["start"], limits["end"] - 1)
        if dimension := _DIMENSION.search(rest):
            return bounded(bits, 0, GRID_MAX[dimension[1]] + int("num_programs" in op), False)
        if op in _MOVES and operands:
            return join(operands)
        if op == "arith.select" and operands and "!tt.ptr" in text:
            return join(operands[-2:])
        if bits == 0 or "!tt.ptr" in _result_type(op, text):
            return Value()
        if op.startswith("arith.") and not op.startswith("arith.fpto"):
            return evaluate(op, operands, bits)
        return unbounded(bits)

    def _enter(self, op: str, rest: str, results: list[str]) -> None:
        region = _Region(op, results, self._number)
        initial = _INITIAL.findall(rest)
        if op == "scf.for":
            counter, low, high = _OPERAND.findall(rest)[:3]
            initial = initial[1:] if initial and initial[0][0] == counter else initial
            first, last = self._value(low), self._value(high)
            # The counter stops below the upper bound.
            highest = last.high if last.full else last.high - 1
            wrapped = first.wrapped or last.wrapped
            self._values[counter] = replace(first, high=max(first.low, highest), wrapped=wrapped)
        region.operands = [word for _, word in initial]
        if op.startswith("tt."):
            region.operands = _OPERAND.findall(rest)
        for place, (name, word) in enumerate(initial):
            start = self._value(word)
            later = self.carried.get((self._number, place))
            value = start if later is None else join([start, later])
            self._values[name] = replace(_widest(value), base=value.base)
        self._open.append(region)

    def _yield(self, line: str) -> None:
        if not self._open:
            return
        words = _OPERAND.findall(line.split(" : ")[0])
        values = [self._value(word) for word in words[1 if line.startswith("scf.condition") else 0 :]]
        region = self._open[-1]
        if values:
            region.yields.append(values)
        carries = region.op == "scf.for" or (region.op == "scf.while" and line.startswith("scf.yield"))
        for place, value in enumerate(values if carries else []):
            key = (region.line, place)
            known = self.carried.get(key)
            start = self._value(region.operands[place])
            base = (
                value.base
                if value.base == start.base and (known is None or known.base == value.base)
                else None
            )
            wrapped = value.wrapped or (known is not None and known.wrapped)
            self.carried[key] = replace(_widest(value), base=base, wrapped=wrapped)

    def _close(self, line: str) -> None:
        if not self._open or line.endswith("{"):
            return
        region = self._open.pop()
        inside = region.yields[:1] if region.op == "scf.while" else list(region.yields)
        kinds = _bits(line.rsplit("->", 1)[-1]) if region.op.startswith("tt.") else None
        for place, result in enumerate(region.results):
            values = [values[place] for values in inside if place < len(values)]
            if region.op == "scf.for":
                values.append(
                    self._value(region.operands[place]) if place < len(region.operands) else Value()
                )
            if region.op.startswith("tt."):
                taken = [self._value(word) for word in region.operands]
                wrapped = any(value.wrapped for value in (*values, *taken))
                self._values[result] = unbounded(kinds or 0, wrapped)
            else:
                self._values[result] = join(values) if values else Value()

    def _judge(self, operands: list[Value]) -> None:
        pointer, offset = operands
        if pointer.base in self._small:
            return
        into = f"argument {pointer.base}" if pointer.base else "a pointer of unknown origin"
        if offset.wrapped:
            self.findings.append(
                (self._number, f"offset into {into} computed in 32 bits, which may overflow")
            )
        elif offset.bits <= NARROW and offset.full:
            self.findings.append((self._number, f"offset into {into} of 32 bits without a bound"))

    def _value(self, word: str) -> Value:
        return self._values.get(word, self._values.get(word.removesuffix("#0"), Value()))


def _widest(value: Value) -> Value:
    return replace(unbounded(value.bits), wrapped=value.wrapped) if value.bits else value


def _result_type(op: str, text: str) -> str:
    """The type at the end of a line, of what the operation gives; of a load, what its pointer points at."""
    kind = text.rsplit(" : ", 1)[-1] if " : " in text else ""
    if op.startswith("arith.cmp"):
        return "i1"
    for arrow in (" -> ", " to "):
        kind = kind.rsplit(arrow, 1)[-1]
    if op in ("tt.load", "tt.atomic_rmw", "tt.atomic_cas"):
        kind = kind.replace("!tt.ptr<", "")
    return kind


def _bits(kind: str) -> int:
    """Width of the integers in a type; 0 when it has none."""
    found = _INTEGER.search(kind)
    return (64 if found[2] else int(found[1])) if found else 0


def _constant(rest: str, bits: int) -> Value:
    if "true" in rest or "false" in rest:
        return Value(1, 0, 1)
    found = re.search(r"(?:constant|dense<)\s*(-?\d+)\b(?![.x])", rest.replace("constant dense", "dense"))
    return Value(bits, int(found[1]), int(found[1])) if found and bits else unbounded(bits)
