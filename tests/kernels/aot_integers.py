"""Compiles every shipped kernel with its integer arguments equal to 1, and multiples of 16, as Triton does.

It makes constants of the former, and takes the latter to divide addresses. A program of its own, for a
process that does not interpret Triton: see ``test_aot_shipped.py``. It prints how many kernels there are, and
what they spill.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

from recemb_kernels.aot.configuration import Configuration
from recemb_kernels.aot.registry import shipped
from recemb_kernels.aot.report import report


def _of_ones(c: Configuration, integers: tuple[str, ...]) -> Configuration:
    signature = {name: kind for name, kind in c.signature.items() if name not in integers}
    return replace(c, signature=signature, constants={**c.constants, **dict.fromkeys(integers, 1)})


def _of_sixteens(c: Configuration, integers: tuple[str, ...]) -> Configuration:
    left = set(c.function.do_not_specialize_on_alignment)
    return replace(c, aligned=(*(name for name in c.pointers if name not in left), *integers))


def main() -> None:
    first = {c.kernel: c for c in reversed(shipped())}
    specialised = []
    for c in first.values():
        left = set(c.function.do_not_specialize)
        integers = tuple(
            n for n, kind in c.signature.items() if not kind.startswith(("*", "fp")) and n not in left
        )
        specialised += [_of_ones(c, integers), _of_sixteens(c, integers)] if integers else []
    rows = report(specialised, ["sm_90"], threads=os.cpu_count() or 1)
    spills = [f"{row.configuration.label}: {row.code.spill_bytes} B" for row in rows if row.code.spill_bytes]
    print(json.dumps({"kernels": len(first), "compiled": len(rows), "spills": spills}))


if __name__ == "__main__":
    main()
