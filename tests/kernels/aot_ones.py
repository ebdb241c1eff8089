"""Compiles every shipped kernel with its integer arguments equal to 1, which Triton turns into constants.

A program of its own, for a process that does not interpret Triton: see ``test_aot_shipped.py``.
"""

from __future__ import annotations

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recemb_kernels.aot.registry import shipped


def main() -> int:
    seen: set[str] = set()
    for c in shipped():
        if c.kernel in seen:
            continue
        seen.add(c.kernel)
        ones = {name: 1 for name, kind in c.signature.items() if not kind.startswith(("*", "fp"))}
        constants = {**c.constants, **ones}
        kinds = {n: "constexpr" if n in constants else c.signature[n] for n in c.function.arg_names}
        source = ASTSource(fn=c.function, signature=kinds, constexprs=constants)
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
        compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    return len(seen)


if __name__ == "__main__":
    print(main())
