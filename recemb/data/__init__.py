"""Criteo's TSV and the synthetic click log, both as one prepared directory that training reads.

Nothing here imports torch: ``recemb prepare`` needs numpy and pyarrow only.
"""

from __future__ import annotations

from recemb.data.click_log import ClickBatch, ClickLog
from recemb.data.synthetic import write_synthetic

__all__ = ["ClickBatch", "ClickLog", "write_synthetic"]
