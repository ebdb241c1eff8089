"""Compiles configurations for an architecture that need not be in the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recemb_kernels.aot.configuration import Configuration

# Compute capability that Triton's target takes, times ten.
CAPABILITY = {"sm_80": 80, "sm_90": 90}
_WARP_THREADS = 32
# cudaMalloc aligns to 256 bytes, torch's allocator to 512; 16 is what the JIT looks for at a launch.
_ALIGNMENT_BYTES = 16

Result = TypeVar("Result")


class CompileError(RuntimeError):
    """A configuration that does not compile, or an environment in which none does."""


@dataclass(frozen=True)
class Binary:
    """One configuration, compiled.

    Attributes:
        configuration: what was compiled.
        arch: ``"sm_80"`` or ``"sm_90"``.
        ttir: Triton's IR, after inlining and before layouts.
        ptx: the virtual assembly.
        cubin: machine code, an ELF file.
        shared_bytes: dynamic shared memory a block asks for.
    """

    configuration: Configuration
    arch: str
    ttir: str
    ptx: str
    cubin: bytes
    shared_bytes: int


def compile_one(configuration: Configuration, arch: str) -> Binary:
    """Compile one configuration, or take it from Triton's cache.

    Raises:
        CompileError: the compiler refused it, or ``TRITON_INTERPRET`` was set when the kernel was defined.
    """
    if not isinstance(configuration.function, triton.JITFunction):
        raise CompileError(
            f"{configuration.kernel} cannot be compiled: it was defined under TRITON_INTERPRET=1; unset it"
        )
    names = configuration.function.arg_names
    aligned = configuration.aligned
    if aligned is None:
        left = set(configuration.function.do_not_specialize_on_alignment)
        aligned = tuple(name for name in configuration.pointers if name not in left)
    source = ASTSource(
        fn=configuration.function,
        signature={name: configuration.signature.get(name, "constexpr") for name in names},
        constexprs=dict(configuration.constants),
        attrs={(names.index(name),): [["tt.divisibility", _ALIGNMENT_BYTES]] for name in aligned},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    try:
        target = GPUTarget("cuda", CAPABILITY[arch], _WARP_THREADS)
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        # Triton raises many types; which configuration it was is what the reader needs, the cause is kept.
        raise CompileError(f"{configuration.label} does not compile for {arch}: {error}") from error
    asm = compiled.asm
    return Binary(configuration, arch, asm["ttir"], asm["ptx"], asm["cubin"], compiled.metadata.shared)


def for_all(
    work: Callable[[Configuration, str], Result],
    configurations: Sequence[Configuration],
    archs: Sequence[str],
    threads: int,
    done: Callable[[], None],
) -> list[Result]:
    """``work`` on every configuration and architecture, on several threads; results in the given order.

    Args:
        work: called with a configuration and an architecture.
        configurations: what to work on.
        archs: keys of :data:`CAPABILITY`.
        threads: how many at once. Threads are enough: the compiler and ptxas hold no lock of python.
        done: called after each, on the caller's thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(work, configuration, arch) for configuration in configurations for arch in archs]
        results = []
        try:
            for task in tasks:
                results.append(task.result())
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
