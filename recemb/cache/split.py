"""A batch split into rows that are cached and rows that are not, now or beside what runs now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recemb.bags import Bags
from recemb_kernels.lookup import Ahead, beside


@dataclass(frozen=True, eq=False)
class Split:
    """A batch split in two.

    Attributes:
        bags: F hot features, those of uncached tables as they were, then k cold ones.
        hot_bounds: F + 1 positions of the hot features' ids in ``bags.ids``.
        cold_bounds: k + 1 positions of the cold features' ids there.
    """

    bags: Bags
    hot_bounds: list[int]
    cold_bounds: list[int]


@dataclass(eq=False)
class SplitAhead:
    """A batch that is split before its look-up: in a thread on the CPU, else on the current stream.

    Attributes:
        index: the cached rows that it is split by, which may be others by then.
        wait: gives it.
        made: it, where that is done; a GPU's tensors, which another stream may take over.
        ahead: what the kernels make of its bags, for one look-up.
    """

    index: object
    wait: Callable[[], Split]
    made: Split | None = None
    ahead: Ahead | None = None

    @classmethod
    def begin(cls, index: object, splits: Callable[[], Split], in_thread: bool) -> SplitAhead:
        """Have ``splits``, which must not read what may change, make it."""
        if in_thread:
            return cls(index, beside(splits))
        made = splits()
        return cls(index, lambda: made, made)

    def bags(self) -> Bags:
        """Those of the two streams."""
        return self.wait().bags

    def take(self) -> Split:
        """It, and with it what the kernels have made of it."""
        split = self.wait()
        split.bags.ahead, self.ahead = self.ahead, None
        return split
