"""Orders in which batches are prepared, looked up and stepped on, once their graphs are recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

# Prepare (p), drop (x), look up (l; i in inference; t in a thread), step back (b) batches 1 to 3, move the
# parameters (m), forget the graphs (g).
SCRIPTS = {
    "two batches ahead": "p1 p2 l1 l2 b1 b2",
    "the later one first": "p1 p2 l2 l1 b1 b2",
    "never looked up": "p1 x1 p2 l2 b2 p3 l3 b3",
    "looked up twice": "p1 l1 p2 l1 b1 b1 l2 b2",
    "its place has been taken": "p1 l3 b3 p2 l1 b1 l2 b2",
    "another comes as it is": "p1 l2 b2 l1 b1",
    "before an earlier backward": "p1 l1 p2 l2 p3 b1 l3 b3 b2",
    "in inference": "p1 i1 p2 l2 b2",
    "parameters have moved": "p1 m l1 b1 p2 l2 b2",
    "in another thread": "p3 t3 b3 p1 l1 b1 p2 t2 b2",
    "no graph any more": "p1 g l1 b1 p2 l2 b2",
}


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
        if do == "p" and ahead:
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
            gradient = torch.sin(torch.arange(out.numel(), dtype=torch.float32, device=out.device))
            out.backward(gradient.view(out.shape))
        elif do == "m":
            for p in actor.parameters():
                p.data = p.data.clone()
        elif do == "g":
            actor.forget_graphs()
    return [*(out.detach() for out in found), *(p.detach().clone() for p in actor.parameters())]
