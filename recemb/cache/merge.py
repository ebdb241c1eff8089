"""The sum of a cached batch's two streams, and the way of its gradient back to both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recemb.cache.hot_rows import HotRowCache
from recemb.cache.refresh import is_frozen
from recemb.errors import RecembError

if TYPE_CHECKING:
    from recemb.backends.base import Backend
    from recemb.cache.split import Split
    from recemb.cache.streams import Index, Streams


# Told apart by identity: slices cannot be hashed.
@dataclass(frozen=True, eq=False)
class Piece:
    """Neighbouring columns of the output.

    Attributes:
        own: the columns, of the hot stream too.
        cold: those of the cold stream; ``None`` without a cache.
        mean: the first feature and which cached one that is, of ``count`` whose bags are averaged in parts;
            ``None`` where streams are added up as they are.
        count: how many features.
    """

    own: slice
    cold: slice | None
    mean: tuple[int, int] | None = None
    count: int = 1

    def precedes(self, other: Piece) -> bool:
        """Whether one operation does both: theirs are neighbours in both streams, means of one width."""
        if self.cold is None or other.cold is None:
            return self.cold is other.cold
        if self.mean is None or other.mean is None:
            return self.mean is other.mean and bool(self.cold.stop == other.cold.start)
        return self.width == other.width and bool(self.cold.stop == other.cold.start)

    @property
    def width(self) -> int:
        """D, of each mean feature."""
        columns: int = self.own.stop - self.own.start
        return columns // self.count

    def joined(self, other: Piece) -> Piece:
        """Both as one."""
        cold = self.cold and other.cold and slice(self.cold.start, other.cold.stop)
        return Piece(slice(self.own.start, other.own.stop), cold, self.mean, self.count + other.count)


class Token:
    """Lives while a graph may still go backward.

    Attributes:
        task: the backward that the forward was part of, -1 for none.
    """

    def __init__(self) -> None:
        self.task = backward_under_way()


def backward_under_way() -> int:
    """The number of the backward that autograd runs this in, never given twice; -1 for none."""
    task: int = torch._C._current_graph_task_id()
    return task


@dataclass(eq=False)
class Step:
    """One forward: what its backward needs.

    Attributes:
        streams: how it was split.
        tables: the cached tables, each once.
        caches: theirs.
        split: the batch.
        watching: per table, whether its gradients are to be measured.
        token: lives as long as its cached rows are held.
        index: which those are.
    """

    streams: Streams
    tables: Sequence[Backend]
    caches: Sequence[HotRowCache]
    split: Split
    watching: list[bool]
    token: Token | None
    index: Index
    shares: dict[Piece, tuple[Tensor, ...]] = field(default_factory=dict)
    # Whether rows have been held for its backward.
    held: bool = field(init=False)

    def __post_init__(self) -> None:
        self.held = self.token is not None

    def begin_backward(self, grad: Tensor | None) -> None:
        """What comes before the gradient [B, W] of the sum, ``None`` for zeros, goes back to both streams.

        Raises:
            RecembError: other rows are cached than at the forward.
        """
        if not self.streams.still_holds(self.index, self.caches):
            # What holds its rows keeps them from being exchanged, not from what is loaded over them.
            if self.token is not None:
                why = "; where none of that was done, another thread trains these tables, and only one may"
            elif self.held:
                why = ", which has gone backward once already (retain_graph=True)"
            else:
                why = ", which was made in eval() or beside DDP's forward, where it does not hold them"
            raise RecembError(
                "the cached rows have been exchanged, or a state loaded or the cache reset, since the "
                f"forward of this graph{why}; run the forward again"
            )
        # From here to the optimizer's step, accumulated gradients are of the rows as they are.
        if self.token is not None and self.token.task == -1:
            self.streams.left_in = backward_under_way()
        self.streams.backwards += self.token is not None
        self.token = None
        self.streams.replicas.have_counted()
        pairs = list(zip(self.caches, self.tables, strict=True))
        due = any(cache.due and not is_frozen(table) for cache, table in pairs)
        # One of each parameter, which several tables may share.
        copies: dict[nn.Parameter, Tensor] | None = {} if due else None
        for cache, table in pairs:
            cache.before_step.note(
                [*cache.own_parameters().values(), *table.own_parameters().values()], copies
            )
        for k, t in enumerate(self.streams.owner):
            if self.watching[t] and grad is not None:
                self.streams.measure(k, self, grad)
        self.watching = [False for _ in self.caches]

    def scaled(self, piece: Piece, hot: Tensor, cold: Tensor) -> tuple[Tensor, Tensor]:
        """[B, columns] each: columns of the mean features of a piece, times each stream's part of the bag."""
        assert piece.mean is not None
        known = self.shares.get(piece)
        if known is None or known[0].dtype != hot.dtype:
            f, k = piece.mean
            ids = [self.lengths(first, piece.count) for first in (f, len(self.streams.lookups) + k)]
            whole = (ids[0] + ids[1]).clamp(min=1).to(hot.dtype)
            # [B, count, 1]
            known = self.shares[piece] = tuple((part / whole).T[:, :, None] for part in ids)
        shape = (hot.shape[0], piece.count, piece.width)
        parts = [columns.view(shape) * share for columns, share in zip((hot, cold), known, strict=True)]
        return parts[0].flatten(1), parts[1].flatten(1)

    def lengths(self, first: int, count: int = 1) -> Tensor:
        """[count, B] ids in each bag of some of the F + k features."""
        size = self.split.bags.batch_size
        return self.split.bags.offsets[first * size : (first + count) * size + 1].diff().view(count, size)


class Merge(torch.autograd.Function):
    """hot + cold per cached feature, where kernels have not added them up; both get the same gradient."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, step: Step) -> Tensor:
        ctx.step = step
        streams = step.streams
        if len(streams.pieces) == 1 and (piece := streams.pieces[0]).cold and piece.mean is None:
            return pooled[:, piece.own] + pooled[:, piece.cold]
        out = pooled.new_empty(pooled.shape[0], streams.width)
        for piece in streams.pieces:
            own = pooled[:, piece.own]
            if piece.cold is None:
                out[:, piece.own] = own
                continue
            parts = own, pooled[:, piece.cold]
            if piece.mean is not None:
                parts = step.scaled(piece, *parts)
            torch.add(*parts, out=out[:, piece.own])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        step: Step = ctx.step
        step.begin_backward(grad)
        return torch.cat(Merge._parts(step.streams, step, grad), dim=1), None

    @staticmethod
    def _parts(streams: Streams, step: Step, grad: Tensor) -> list[Tensor]:
        """The gradients of both streams, left to right."""
        hot, cold, at = [], [], streams.width
        for piece in streams.pieces:
            own = grad[:, piece.own]
            parts = own, own
            if piece.mean is not None:
                parts = step.scaled(piece, own, own)
            hot.append(parts[0])
            if piece.cold is None:
                continue
            if piece.cold.start > at:
                # Columns that nothing is looked up for.
                cold.append(grad.new_zeros(grad.shape[0], piece.cold.start - at))
            cold.append(parts[1])
            at = piece.cold.stop
        if at < streams.pooled_width:
            cold.append(grad.new_zeros(grad.shape[0], streams.pooled_width - at))
        return hot + cold
