"""The torchrec face: the only package, with ``models``, that imports torchrec."""

from __future__ import annotations

from recemb.stack import check_stack

check_stack()
