"""Orders in which batches are prepared, looked up and stepped on, once their graphs are recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from recemb_kernels.triton_frame.graph_plans import PlanGraph, Planned
from tests.kernels.triton.graph_cases import gradient

# Prepare (p; q in inference), drop (x), look up (l; i in inference; t in a thread), step back (b) batches 1
# to 3, move the parameters (m), forget the graphs (g); and of each batch that a graph beside plans, whether
# that was done ahead. Of two look-ups at once the second takes the plan alone; a capture plans its batch once
# more.
SCRIPTS: dict[str, tuple[str, list[bool]]] = {
    "two batches ahead": ("p1 p2 l1 l2 b1 b2", [True, True]),
    "two ahead all the time": ("p1 p2 l1 b1 p3 l2 b2 p1 l3 b3 l1 b1", 4 * [True]),
    "the later one first": ("p1 p2 l2 l1 b1 b2", [False, True]),
    "never looked up": ("p1 x1 p2 l2 b2 p3 l3 b3", [True, True]),
    "looked up twice": ("p1 l1 p2 l1 b1 b1 l2 b2", [True, True]),
    "its place has been taken": ("p1 l3 b3 p2 l1 b1 l2 b2 p3 l3 b3", [False, True, True, True]),
    "another comes as it is": ("p1 l2 b2 l1 b1", [False, True]),
    "before an earlier backward": ("p1 l1 p2 l2 p3 b1 l3 b3 b2", [True, True, True]),
    "in inference": ("q1 i1 p2 l2 b2", [True, True]),
    "parameters have moved": ("p1 m l1 b1 p2 l2 b2", [True, True]),
    "parameters move before a backward": ("p1 l1 m b1 p2 l2 b2", [True, True]),
    "parameters move before a late backward": ("l1 p2 l2 b2 m b1", [False, True]),
    "in another thread": ("p3 t3 b3 p1 l1 b1", [False, True, True]),
    "a later one waits": ("p1 p2 x1 p3 l2 b2 l3 b3", [True, True]),
    "no graph any more": ("p1 g l1 b1 p2 l2 b2", [False, False, True]),
}


@contextmanager
def brought() -> Iterator[list[bool]]:
    """Of each batch that a graph beside plans for a look-up: whether that had been done ahead."""
    seen: list[bool] = []
    late: list[Planned] = []
    give, in_turn = PlanGraph._give, PlanGraph._in_turn

    def given(self: PlanGraph, planned: Planned, take: Any) -> Any:
        seen.append(planned is not (late.pop() if late else None))
        return give(self, planned, take)

    def made(self: PlanGraph, *args: Any) -> Planned:
        late.append(in_turn(self, *args))
        return late[-1]

    with patch.object(PlanGraph, "_give", given), patch.object(PlanGraph, "_in_turn", made):
        yield seen


class Actor(Protocol):
    """A model with three batches."""

    def prepare(self, k: int) -> None: ...

    def drop(self, k: int) -> None: ...

    def look_up(self, k: int) -> Tensor: ...

    def forget_graphs(self) -> None: ...

    def parameters(self) -> Sequence[Tensor]: ...


def follow(script: str, actor: Actor, ahead: bool) -> list[Tensor]:
    """The outputs, and the parameters in the end; nothing is prepared unless ``ahead``."""
    outs: dict[int, list[Tensor]] = defaultdict(list)
    found: list[Tensor] = []

    def look_up(k: int) -> None:
        found.append(actor.look_up(k))

    for word in script.split():
        do, k = word[0], int(word[1:] or 0)
        if do in "pq" and ahead:
            with torch.inference_mode(do == "q"):  # what is prepared serves look-ups in the same mode
                actor.prepare(k)
        elif do == "x":
            actor.drop(k)
        elif do == "i":
            with torch.inference_mode():
                look_up(k)
        elif do in "lt":
            thread = Thread(target=look_up, args=(k,))
            thread.run() if do == "l" else thread.start()
            if do == "t":
                thread.join()
            outs[k].append(found[-1])
        elif do == "b":
            out = outs[k].pop(0)
            out.backward(gradient(out))
        elif do == "m":
            for p in actor.parameters():
                p.data = p.data.clone()
        elif do == "g":
            actor.forget_graphs()
    return [*(out.detach() for out in found), *(p.detach().clone() for p in actor.parameters())]
