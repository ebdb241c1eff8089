"""How many examples a test of the kernels draws: few and the same in CI, or many random ones.

``RECEMB_EXAMPLES=200 pytest --timeout 0 tests/kernels/triton -k "any_shape or exact"`` takes 200 for each
test instead, others each time, and shrinks what fails; ``--hypothesis-seed`` repeats a run.
"""

from __future__ import annotations

import os

from hypothesis import Phase, settings


def examples(usual: int) -> settings:
    """For a test that draws ``usual`` examples when nobody asks for more."""
    asked = os.environ.get("RECEMB_EXAMPLES")
    if asked is None:
        return settings(max_examples=usual, phases=[Phase.generate])
    phases = [Phase.generate, Phase.shrink]
    return settings(max_examples=int(asked), phases=phases, derandomize=False, print_blob=True)
