"""``recemb``, in which rank 1 is killed at its step 10 in the first attempt of torchrun's."""

from __future__ import annotations

import os
import sys

from recemb.cli.main import main
from tests.faults import hooks

if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        hooks.install("kill", "forward", 10)
    sys.exit(main())
