"""Types and tile sizes of the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from recemb_kernels.triton_frame.captures import exclusive

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Keys of a batch are 32-bit where that will do: their types in Triton's signatures, and bytes.
KEYS = (("*i32", 4), ("*i64", 8))

# What Triton takes when a launch does not say how many stages its pipelines have.
STAGES = 3
# Names in reports, and pointer types in Triton's signatures.
NAMES = {
    torch.float32: ("float32", "*fp32"),
    torch.bfloat16: ("bfloat16", "*bf16"),
    torch.float16: ("float16", "*fp16"),
}


# Arguments that say where a launch reads or writes: views of small arrays, which begin at any number, and
# parts and turns by number. Triton would compile a kernel again where they are aligned, or 1.
_BASES = ("base", "out_base", "source_base", "grad_base")
_PLACES = (*_BASES, "cuts", "node_cuts", "limits", "first_key", "rates")
_NUMBERS = ("part", "turn", "past", "turns")


def launched(function: Any) -> Any:
    """A Triton kernel that is launched: compiled once for all slices of a batch, and all families."""
    return triton.jit(function, do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_PLACES)


def tuned(
    kernel: Any,
    key: Sequence[str],
    every: Sequence[tuple[int, int]],
    variants: Callable[[Mapping[str, Any]], Sequence[tuple[int, int]]],
    restore: Sequence[str] = (),
) -> Any:
    """A kernel that tries its variants at the first call of each shape, and keeps the fastest.

    Args:
        kernel: a Triton kernel.
        key: arguments that make a shape.
        every: (warps, pipeline stages) of any launch. The interpreter, which has neither, takes the first.
        variants: those of a launch with these constants.
        restore: arguments that the kernel adds to, which a trial must not leave changed.
    """
    tried = every[:1] if triton.knobs.runtime.interpret else every
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in tried]

    def of_launch(configs: Sequence[Any], _: Any, **constants: Any) -> list[Any]:
        return [c for c in configs if (c.num_warps, c.num_stages) in variants(constants)]

    tuner = triton.autotune(
        configs=configs,
        key=list(key),
        restore_value=list(restore),
        prune_configs_by={"early_config_prune": of_launch},
        do_bench=_time,
    )(kernel)
    run = tuner.run

    def run_alone(*args: Any, **launch: Any) -> Any:
        # The tuner keeps the arguments of a launch, tuned or not, and what it restores, in itself.
        with exclusive:
            try:
                return run(*args, **launch)
            finally:
                tuner.nargs = None  # which Triton forgets after an error, and they hold a batch's memory

    tuner.run = run_alone
    return tuner


def _time(call: Any, quantiles: Any) -> Any:
    # Milliseconds; Triton's own 25 and 100 would make the first step of a model take minutes.
    try:
        return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)
    except torch.OutOfMemoryError:
        # A trial takes memory that the launch itself does not: without one the first variant will do.
        return [math.inf] * 3


def tile(width: int, most: int, least: int = 1) -> int:
    """The power of two that holds ``width``, between ``least`` and ``most``."""
    return max(least, min(most, int(triton.next_power_of_2(width))))


def tile_of(width: int, most: int, area: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of about ``area`` elements, of at most ``most`` columns."""
    columns = tile(width, most)
    return max(1, area // columns), columns


def tile_or_half(width: int, largest: tuple[int, int], halved: bool) -> tuple[int, int]:
    """The same of (columns, area), or of half of that area."""
    most, area = largest
    return tile_of(width, most, area // 2 if halved else area)


def cdiv(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator)."""
    return -(-numerator // denominator)


def factor(dtype: torch.dtype) -> tl.dtype:
    """What ``tl.dot`` multiplies of a table stored in ``dtype``; it adds up in float32.

    Triton's interpreter takes bfloat16 for the integers that hold its bits; float32 gives the same products.
    """
    interpreted = dtype is torch.bfloat16 and triton.knobs.runtime.interpret
    return tl.float32 if interpreted else ELEMENTS[dtype]


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies float32 operands.

    Exactly for float32 tables, unless the user has allowed torch's own products to round to TF32. The others
    are stored with no more than TF32's 10 bits of mantissa.
    """
    return "ieee" if dtype is torch.float32 and not _rounds() else "tf32"


def _rounds() -> bool:
    """Whether torch multiplies float32 in TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # set through the newer name, beside which the older one refuses to be read
        return bool(matmul.fp32_precision == "tf32")


def as_compiled(kernel: Any, launch: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """What a :class:`~recemb_kernels.aot.configuration.Configuration` has to say about a launch.

    Args:
        kernel: a Triton kernel.
        launch: the constants that it is launched with, and ``num_warps``.
        types: of the arguments; those without one of their own are int64 arrays.
    """
    constants = {name: value for name, value in launch.items() if name != "num_warps"}
    signature = {arg: types.get(arg, "*i64") for arg in kernel.arg_names if arg not in constants}
    return {
        "function": kernel,
        "signature": signature,
        "constants": constants,
        "num_warps": launch["num_warps"],
        "num_stages": STAGES,
    }
