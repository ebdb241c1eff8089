"""Exchanges of rows that are due and kept back: those that will not come by themselves are warned about."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from recemb.cache.refresh import cache_of
from recemb.optim.attached import stepping
from recemb.optim.state import version_of

if TYPE_CHECKING:
    from recemb.backends.base import Backend

# An exchange that is kept back over as many times ``refresh_every`` steps will not come by itself. A period
# counts as so many steps at least: a pipeline may hold a few.
_MANY_TIMES, _FEW = 4, 16
# Nor will one that gradients wait for over as many times as many look-ups, where no optimizer is seen to step
# on anything: nobody accumulates gradients for so long.
_FAR_TOO_MANY = 16


class KeptBack:
    """What keeps the exchanges of cached tables back, and for how long it has done so since the last one.

    It is told at each look-up in training that an exchange is due at and cannot be made, and warns once of
    each of the two reasons. Nothing is read from the device.
    """

    def __init__(self) -> None:
        self._by_graphs, self._by_gradients = _Steps(), _Steps()

    def over(self) -> None:
        """Rows have been exchanged."""
        for steps in (self._by_graphs, self._by_gradients):
            steps.forget()

    def by_graphs(self, due: Sequence[Backend], backwards: int) -> None:
        """Graphs have still to go backward; warn where many steps have been taken, each before one had.

        However many look-ups a step has, rows can be exchanged after it. Of torch's fused optimizers, which
        do not raise the version of what they write to, nothing is seen.

        Args:
            due: the tables.
            backwards: graphs that have gone backward so far.
        """
        steps = self._by_graphs
        steps.look([p for table in due for p in _named(table).values()], backwards)
        if steps.taken >= _many(due) and steps.first_to_tell():
            _warn(
                due,
                "after each of many steps the output of an earlier look-up, which has found its rows in the "
                "cache, had still to go backward. Call backward() before the next look-up, and "
                "prefetch(features) to prepare a batch ahead of that; look up under torch.no_grad() what is "
                "not to go backward",
            )

    def by_gradients(
        self, due: Sequence[Backend], tables: Sequence[Backend], waiting: Sequence[nn.Parameter]
    ) -> None:
        """Gradients wait for an optimizer; warn where it steps on other parameters many times, or never.

        However long gradients are accumulated, an optimizer that has all parameters steps on all of them.
        Steps taken in a backward tell nothing of what waits for one outside.

        Args:
            due: the tables that wait for it.
            tables: all cached tables.
            waiting: what the gradients are of.
        """
        steps = self._by_gradients
        steps.look([p for table in tables for p in _named(table).values()], 0)
        most = _many(due)
        if (steps.taken >= most or steps.looks >= _FAR_TOO_MANY * most) and steps.first_to_tell():
            held = {f"{each.table.name}.{name}": p for each in tables for name, p in _named(each).items()}
            names = [name for name, p in held.items() if any(p is other for other in waiting)]
            _warn(
                due,
                f"over many steps no optimizer has stepped on the gradients of {', '.join(names)}, which are "
                "of the rows as they are. Give an optimizer all parameters of the collection, the weights of "
                "caches too, as parameters() lists them",
            )


class _Steps:
    """How often the values of some parameters have been found to be others than at the look-up before.

    Attributes:
        looks: look-ups.
        taken: those that have found others.
    """

    def __init__(self) -> None:
        self.looks = self.taken = 0
        self._at: list[int | None] | None = None
        self._told = False

    def forget(self) -> None:
        """Begin anew."""
        self.looks = self.taken = 0
        self._at = None

    def look(self, parameters: Sequence[Tensor], backwards: int) -> None:
        """See what they are; of those that are stepped in their backward ``backwards`` says it."""
        at = [backwards if stepping(parameter) else version_of(parameter) for parameter in parameters]
        before, self._at = self._at, at
        self.looks += 1
        self.taken += before is not None and before != at

    def first_to_tell(self) -> bool:
        """Whether this has not been asked before."""
        told, self._told = self._told, True
        return not told


def _named(table: Backend) -> dict[str, nn.Parameter]:
    cached = {f"cache.{name}": p for name, p in cache_of(table).own_parameters().items()}
    return cached | table.own_parameters()


def _many(due: Sequence[Backend]) -> int:
    return _MANY_TIMES * max(_FEW, *(cache_of(table).settings.refresh_every for table in due))


def _warn(due: Sequence[Backend], why: str) -> None:
    warnings.warn(
        f"table {due[0].table.name!r}: its cached rows are due to be exchanged (refresh_every="
        f"{cache_of(due[0]).settings.refresh_every}) and cannot be: {why}",
        stacklevel=6,
    )
