"""The search for 32-bit address arithmetic: bounds against brute force, and Triton IR written by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recemb_kernels.aot.addresses import narrow_offsets
from recemb_kernels.aot.ranges import Value, evaluate

ALL = 2**31


def _truncated(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "minsi": min,
    "maxsi": max,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "divsi": _truncated,
    "remsi": lambda a, b: a - _truncated(a, b) * b,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
}
_numbers = st.integers(-40, 40)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@given(first=st.tuples(_numbers, _numbers), second=st.tuples(_numbers, _numbers))
def test_bounds_hold_every_result(name: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    (low, high), b = sorted(first), sorted(second)
    if name in ("divsi", "remsi", "shli", "shrsi"):
        b = sorted(1 + abs(number) % 20 for number in b)
    found = evaluate(f"arith.{name}", [Value(32, low, high), Value(32, b[0], b[1])], 32)
    results = [OPERATIONS[name](x, y) for x in range(low, high + 1) for y in range(b[0], b[1] + 1)]
    assert found.low <= min(results)
    assert max(results) <= found.high


@pytest.mark.parametrize(
    ("name", "a", "b", "wrapped"),
    [
        ("addi", (0, ALL - 2), (1, 1), False),
        ("addi", (0, ALL - 1), (1, 1), True),
        ("muli", (0, 65_534), (32_767, 32_767), False),
        ("muli", (0, 65_534), (32_770, 32_770), True),
        ("subi", (-ALL, 0), (1, 1), True),
        ("remsi", (0, ALL - 1), (64, 64), False),
    ],
)
def test_32_bits_that_may_not_do(name: str, a: tuple[int, int], b: tuple[int, int], wrapped: bool) -> None:
    assert evaluate(f"arith.{name}", [Value(32, *a), Value(32, *b)], 32).wrapped is wrapped
    assert not evaluate(f"arith.{name}", [Value(64, *a), Value(64, *b)], 64).wrapped


def _kernel(*body: str) -> str:
    head = (
        "tt.func public @k(%w: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %n: i32, %m: i64) attributes {} {"
    )
    constants = [f"%c{number} = arith.constant {number} : i32" for number in (0, 1, 64)]
    return "\n".join(["module {", head, *constants, *body, "tt.return", "}", "}"])


_TAKE = "%p = tt.addptr %w, %o : !tt.ptr<f32>, i32"
_TAKE_64 = "%p = tt.addptr %w, %o : !tt.ptr<f32>, i64"


@pytest.mark.parametrize(
    ("body", "narrow"),
    [
        (("%p = tt.addptr %w, %c64 : !tt.ptr<f32>, i32",), 0),
        (("%p = tt.addptr %w, %n : !tt.ptr<f32>, i32",), 1),
        (("%p = tt.addptr %w, %m : !tt.ptr<f32>, i64",), 0),
        # Widened before, and after, the product that may exceed 32 bits.
        (("%a = arith.extsi %n : i32 to i64", "%o = arith.muli %a, %m : i64", _TAKE_64), 0),
        (("%a = arith.muli %n, %c64 : i32", "%o = arith.extsi %a : i32 to i64", _TAKE_64), 1),
        # Grid axes y and z end at 65,535; x does not.
        (("%a = tt.get_program_id y : i32", "%o = arith.muli %a, %c64 : i32", _TAKE), 0),
        (("%a = tt.get_program_id x : i32", "%o = arith.muli %a, %c64 : i32", _TAKE), 1),
        # A number cut to 32 bits; one that a remainder bounds; one from memory.
        (("%o = arith.trunci %m : i64 to i32", _TAKE), 1),
        (("%o = arith.remui %n, %c64 : i32", _TAKE), 1),
        (("%o = arith.remsi %n, %c64 : i32", _TAKE), 0),
        (("%q = tt.bitcast %w : !tt.ptr<f32> -> !tt.ptr<i32>", "%o = tt.load %q : !tt.ptr<i32>", _TAKE), 1),
        # A mask is no address.
        (("%a = arith.muli %n, %c64 : i32", "%b = arith.cmpi slt, %a, %n : i32", "tt.store %w, %c0, %b"), 0),
        # Counters of loops are bounded by constant ends only.
        (("scf.for %i = %c0 to %c64 step %c1  : i32 {", "%o = arith.muli %i, %c64 : i32", _TAKE, "}"), 0),
        (("scf.for %i = %c0 to %n step %c1  : i32 {", "%o = arith.muli %i, %c64 : i32", _TAKE, "}"), 1),
        # What a loop carries may have grown without end, and is found in its first use too.
        (
            (
                "%r = scf.for %i = %c0 to %c64 step %c1 iter_args(%a = %c0) -> (i32)  : i32 {",
                "%o = arith.extsi %a : i32 to i64",
                _TAKE_64,
                "%b = arith.addi %a, %c1 : i32",
                "scf.yield %b : i32",
                "}",
            ),
            1,
        ),
        # One of two branches multiplies.
        (
            (
                "%b = arith.cmpi slt, %n, %c0 : i32",
                "%a = scf.if %b -> (i32) {",
                "scf.yield %c64 : i32",
                "} else {",
                "%d = arith.muli %n, %c64 : i32",
                "scf.yield %d : i32",
                "}",
                "%o = arith.extsi %a : i32 to i64",
                _TAKE_64,
            ),
            1,
        ),
    ],
)
def test_what_counts_as_narrow(body: tuple[str, ...], narrow: int) -> None:
    assert len(narrow_offsets(_kernel(*body))) == narrow


_CARRIED = (
    "%p = scf.for %i = %c0 to %n step %c1 iter_args(%q = %w) -> (!tt.ptr<f32>)  : i32 {",
    "%t = tt.splat %q : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>",
    "%u = tt.expand_dims %t {axis = 1 : i32} : tensor<64x!tt.ptr<f32>> -> tensor<64x1x!tt.ptr<f32>>",
    "%s = tt.splat %n : i32 -> tensor<64x1xi32>",
    "%v = tt.addptr %u, %s : tensor<64x1x!tt.ptr<f32>>, tensor<64x1xi32>",
    "%next = tt.addptr %q, %n : !tt.ptr<f32>, i32",
    "scf.yield %next : !tt.ptr<f32>",
    "}",
    "%z = tt.addptr %p, %n : !tt.ptr<f32>, i32",
)


def test_pointers_are_traced_to_their_argument() -> None:
    found = narrow_offsets(_kernel(*_CARRIED))
    assert len(found) == 3
    assert all("argument w" in line for line in found)
    assert narrow_offsets(_kernel(*_CARRIED), small=("w",)) == []
    assert len(narrow_offsets(_kernel(*_CARRIED), small=("n",))) == 3


def test_pointers_of_unknown_origin_count_as_large() -> None:
    body = ("%a = tt.int_to_ptr %m : i64 -> !tt.ptr<f32>", "%p = tt.addptr %a, %n : !tt.ptr<f32>, i32")
    assert narrow_offsets(_kernel(*body), small=("w",)) == [
        "offset into a pointer of unknown origin of 32 bits without a bound"
    ]


def test_a_finding_names_its_line_of_source() -> None:
    take = "%p = tt.addptr %w, %n : !tt.ptr<f32>, i32 loc(#loc3)"
    places = """
#loc1 = loc("/src/kernel.py":12:4)
#loc2 = loc("x"(#loc1))
#loc3 = loc(callsite(#loc2 at #loc9))"""
    assert narrow_offsets(_kernel(take) + places) == [
        "kernel.py:12: offset into argument w of 32 bits without a bound"
    ]
