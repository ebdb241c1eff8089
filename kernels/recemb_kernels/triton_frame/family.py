"""Tables of one op and one static shape, which are looked up together, and what a call hands them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch
from recemb_kernels.triton_frame import MICRO_BATCH_ROWS
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.plan import BatchPlan, Keys, keys_of, plan_batch
from recemb_kernels.triton_frame.streams import HandOver, copied
from recemb_kernels.update import Update, is_stepped

_S = TypeVar("_S")


@dataclass(frozen=True)
class FamilyFeature:
    """One feature of a family.

    Args:
        number: its number in the batch.
        column: its first column of the output.
        mean: whether its bags are averaged.
        table: its table, by place in the family.
        key_base: what is added to its ids.
    """

    number: int
    column: int
    mean: bool
    table: int
    key_base: int


@dataclass(eq=False)
class Call:
    """One look-up, from its forward to the end of its backward.

    Attributes:
        batch: the bags.
        columns: width of the output.
        keys: how its ids become keys.
        kept: what each family's forward leaves for its backward.
        ready: what another stream has prepared of it.
    """

    batch: Batch
    columns: int
    keys: Keys
    kept: dict[int, Any] = field(default_factory=dict)
    ready: HandOver | None = None
    _key: Tensor | None = None

    def wait(self) -> None:
        """Have the current stream wait for what another one has prepared, and keep its memory until then."""
        if self.ready is not None:
            self.ready.take(self)

    def copied(self) -> Call:
        """The same, as far as it has been prepared, in memory of its own."""
        made = Call(copied(self.batch), self.columns, self.keys, copied(self.kept))
        known = {name: value for name, value in vars(self).items() if name in ("bag", "plan")}
        vars(made).update(copied(known))
        return made

    @cached_property
    def bag(self) -> Tensor:
        """[L] int32: the bag of each position."""
        self._key, bag = keys_of(self.batch.ids, self.batch.offsets, self.keys, self.batch.size)
        return bag

    @cached_property
    def plan(self) -> BatchPlan:
        """The distinct rows, worked out by the first kernel that asks."""
        _ = self.bag  # which comes with the keys
        key, self._key = self._key, None  # not kept: rows have theirs
        assert key is not None
        return plan_batch(key, self.keys.bounds)


@dataclass(frozen=True, eq=False)
class Backward:
    """What a backward asks of a family.

    Args:
        grad_out: [B, columns].
        updates: per table of the family, the step to take, or ``None`` for gradients.
        wanted: per parameter of the family, whether its gradient is.
        grad_weights: [L] to fill for this family's positions, or ``None``.
        refused: [1] int32, not 0 when no weight may change.
        rates: [parameters of a table, tables, 7] float32, of the updates
            (:func:`recemb_kernels.triton_frame.steps.rates_of`).
    """

    grad_out: Tensor
    updates: Sequence[Update | None]
    wanted: Sequence[bool]
    grad_weights: Tensor | None
    refused: Tensor
    rates: Tensor

    def writes(self, table: int, which: int, number: int) -> bool:
        """Whether the gradient of parameter ``which`` of the ``number`` of a table is to be given."""
        return self.wanted[table * number + which] and not is_stepped(self.updates[table], which)


class Family(ABC, Generic[_S]):
    """Tables of one op whose kernels have the same compile-time constants.

    Args:
        shapes: the tables.
        features: what is looked up in them.
        num_features: F, how many features the batch has.
        index: the family's place among those of its group.
        device: where everything lies.
        dtype: how parameters are stored; sums are float32.
    """

    micro_batch_rows = MICRO_BATCH_ROWS
    # Whether the forward works on distinct rows.
    plans_forward = False

    def __init__(
        self,
        shapes: Sequence[_S],
        features: Sequence[FamilyFeature],
        num_features: int,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shapes, self.own_features = tuple(shapes), tuple(features)
        self.index, self.device, self.dtype = index, device, dtype
        self.num_features = num_features
        self._remembered: dict[tuple[int, ...], Tensor] = {}
        self._rates: tuple[Any, Tensor] | None = None
        # What graphs read, of which a user's own may live as long as the family.
        self._captured: dict[tuple[int, ...], Tensor] = {}
        self._captured_rates: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    @abstractmethod
    def constants(shape: Any) -> Hashable:
        """What the kernels are compiled for; tables with equal constants make one family."""

    @staticmethod
    @abstractmethod
    def num_keys(shape: Any) -> int:
        """Keys that a table needs: one past its largest id plus key base."""

    @classmethod
    def num_ids(cls, shape: Any, key_base: int) -> int:
        """Ids that a feature with this key base has: those from here on are skipped."""
        return cls.num_keys(shape) - key_base

    @staticmethod
    @abstractmethod
    def num_parameters(shape: Any) -> int:
        """Parameters of one table."""

    def prepare(self, call: Call) -> None:
        """Work out what the ids alone decide, into ``call``."""
        _ = call.plan

    @abstractmethod
    def forward(self, call: Call, parameters: Sequence[Tensor], out: Tensor, keep: bool) -> None:
        """Fill the family's columns of ``out`` [B, columns].

        Args:
            call: the look-up; ``call.kept[self.index]`` is for the backward, when ``keep`` says one comes.
            parameters: contiguous, table by table.
        """

    @abstractmethod
    def backward(self, call: Call, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        """Gradients of the parameters, in their dtype, or ``None`` where not wanted or stepped on."""

    def backward_without_ids(self, parameters: Sequence[Tensor], asked: Backward) -> list[Tensor | None]:
        """The same for a batch without ids: gradients of zero, and steps that change nothing."""
        number = len(parameters) // len(asked.updates)
        written = [asked.writes(t, k, number) for t in range(len(asked.updates)) for k in range(number)]
        return [
            torch.zeros_like(parameter) if write else None
            for parameter, write in zip(parameters, written, strict=True)
        ]

    @cached_property
    def features(self) -> Tensor:
        """[F, 3] number, column and mean of the family's own features."""
        return self.constant([[f.number, f.column, f.mean] for f in self.own_features])

    @cached_property
    def batch_features(self) -> Tensor:
        """[F, 3] column, mean and place in the family of every feature of the batch, -1 for others."""
        rows = [[0, 0, -1] for _ in range(self.num_features)]
        for place, f in enumerate(self.own_features):
            rows[f.number] = [f.column, int(f.mean), place]
        return self.constant(rows)

    def constant(self, numbers: Sequence[Any]) -> Tensor:
        """An int64 tensor of numbers that never change."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def remembered(self, numbers: tuple[int, ...]) -> Tensor:
        """The same of numbers that rarely change, so that a step copies nothing to the device."""
        known = self._remembered.get(numbers)
        if known is None:
            if len(self._remembered) - len(self._captured) >= 256:
                self._remembered = dict(self._captured)
            known = self._remembered[numbers] = self.constant(numbers)
        if capturing():
            self._captured[numbers] = known
        return known

    def put_rates(self, rates: Sequence[Sequence[Sequence[float]]]) -> Tensor:
        """[parameters, tables, 7] float32 on the device, always in one place; copied where they have changed.

        Launches that are under way read the old ones: the copy is ordered after them. A user's own CUDA graph
        has a place to itself, and keeps the rates of its capture.
        """
        if capturing():
            there = torch.tensor(rates, dtype=torch.float32, device="cpu", pin_memory=True)
            held = torch.empty_like(there, device=self.device).copy_(there, non_blocking=True)
            self._captured_rates.append((there, held))
            return held
        if self._rates is not None and self._rates[0] == rates:
            return self._rates[1]
        pinned = self.device.type == "cuda"
        there = torch.tensor(rates, dtype=torch.float32, device="cpu", pin_memory=pinned)
        held = self._rates[1] if self._rates is not None else torch.empty_like(there, device=self.device)
        self._rates = (rates, held.copy_(there, non_blocking=True))
        return held

    def held(self) -> list[Tensor]:
        """What launches read and a later one might let go of."""
        return list(self._remembered.values())

    def addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        """[K] int64: where each tensor lies."""
        return self.remembered(tuple(tensor.data_ptr() for tensor in tensors))
