"""Bounds of integers in Triton's IR: what an operation can give, and whether 32 bits can hold it.

A :class:`Value` is a scalar or all elements of a tensor. Only compile-time constants, tile indices and grid
limits bound anything; what comes from memory or from an argument can be any number of its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Largest program index of each grid axis: CUDA C++ Programming Guide, "Compute Capabilities".
GRID_MAX = {"x": 2**31 - 2, "y": 65_534, "z": 65_534}
NARROW = 32


@dataclass(frozen=True)
class Value:
    """An SSA value.

    Attributes:
        bits: width of an integer; 0 for what is no integer.
        low: least value an integer can have.
        high: greatest.
        wrapped: whether 32-bit arithmetic that could exceed 32 bits went into it.
        base: of a pointer, the kernel argument it points into; ``None`` when that is not known.
    """

    bits: int = 0
    low: int = 0
    high: int = 0
    wrapped: bool = False
    base: str | None = None

    @property
    def full(self) -> bool:
        """Whether nothing but its type bounds the integer from above or below."""
        return self.bits > 1 and (
            self.low <= -(1 << (self.bits - 1)) or self.high >= (1 << (self.bits - 1)) - 1
        )


def unbounded(bits: int, wrapped: bool = False) -> Value:
    """Any integer of ``bits`` bits."""
    return (
        Value(bits, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, wrapped) if bits > 1 else Value(bits, 0, bits)
    )


def bounded(bits: int, low: int, high: int, wrapped: bool) -> Value:
    """An integer computed to lie in ``[low, high]``, in ``bits`` bits: wrapped when they cannot hold it."""
    limit = 1 << max(bits - 1, 1)
    if -limit <= low and high < limit:
        return Value(bits, low, high, wrapped)
    return unbounded(bits, wrapped or bits <= NARROW)


def join(values: Sequence[Value]) -> Value:
    """A value that may be any of ``values``."""
    first = values[0]
    base = first.base if all(value.base == first.base for value in values) else None
    low, high = min(value.low for value in values), max(value.high for value in values)
    return Value(first.bits, low, high, any(value.wrapped for value in values), base)


def evaluate(op: str, operands: Sequence[Value], bits: int) -> Value:
    """The result, an integer of ``bits`` bits, of an arithmetic operation named as in MLIR's ``arith``."""
    wrapped = any(value.wrapped for value in operands)
    name = op.removeprefix("arith.")
    if name in ("extsi", "extui", "index_cast", "trunci"):
        value = operands[0]
        if name == "extsi" and value.bits == 1:
            return Value(bits, -1, 0, wrapped)
        if name == "extui" and value.low < 0:
            return bounded(bits, 0, (1 << value.bits) - 1, wrapped)
        return bounded(bits, value.low, value.high, wrapped)
    if name == "select":
        return replace(join(operands[-2:]), bits=bits)
    if len(operands) != 2:
        return unbounded(bits, wrapped)
    limits = _binary(name, operands[0], operands[1])
    return unbounded(bits, wrapped) if limits is None else bounded(bits, *limits, wrapped)


def _binary(name: str, a: Value, b: Value) -> tuple[int, int] | None:
    """Bounds of a binary operation before they are held against the type; ``None`` when nothing is known."""
    match name:
        case "addi":
            return a.low + b.low, a.high + b.high
        case "subi":
            return a.low - b.high, a.high - b.low
        case "muli":
            products = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
            return min(products), max(products)
        case "minsi" | "minui":
            return (min(a.low, b.low), min(a.high, b.high)) if name == "minsi" or _natural(a, b) else None
        case "maxsi" | "maxui":
            return (max(a.low, b.low), max(a.high, b.high)) if name == "maxsi" or _natural(a, b) else None
        case "shli" if b.low >= 0 and b.high < 64:
            return min(a.low << b.low, a.low << b.high), max(a.high << b.low, a.high << b.high)
        case "shrsi" | "shrui" if a.low >= 0 <= b.low and b.high < 64:
            return a.low >> b.high, a.high >> b.low
        case "divsi" | "divui" | "floordivsi" if b.low > 0 and (a.low >= 0 or name != "divui"):
            low = a.low // b.high if a.low >= 0 else -(-a.low // b.low)
            return low, a.high // b.low if a.high >= 0 else -(-a.high // b.high)
        case "remsi" | "remui" if b.low > 0 and a.low >= 0:
            return 0, min(a.high, b.high - 1)
        case "remsi" if b.low > 0:
            return 1 - b.high, min(max(a.high, 0), b.high - 1)
        case "andi" if a.low >= 0 or b.low >= 0:
            return 0, min(value.high for value in (a, b) if value.low >= 0)
        case "ori" | "xori" if _natural(a, b):
            return 0, (1 << max(a.high.bit_length(), b.high.bit_length())) - 1
        case _:
            return None


def _natural(a: Value, b: Value) -> bool:
    return a.low >= 0 and b.low >= 0
