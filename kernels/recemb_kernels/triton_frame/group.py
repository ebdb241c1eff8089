"""Look-ups of a group of tables on the device: the counterpart of :class:`digit_tree.group.Group`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.triton_frame import ALIGNED, MICRO_BATCH_ROWS
from recemb_kernels.triton_frame.family import Backward, Call, Family, FamilyFeature
from recemb_kernels.triton_frame.plan import Keys, infinite, on_device
from recemb_kernels.triton_frame.steps import rates_of
from recemb_kernels.triton_frame.streams import HandOver, own_stream
from recemb_kernels.triton_frame.verdict import note, poll
from recemb_kernels.update import Update

_T = TypeVar("_T")


def not_finite() -> Exception:
    """The error of a backward with steps to take whose gradient is not finite."""
    return FloatingPointError("the gradient of the pooled rows is NaN or infinite; no weight was changed")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a backward asks of a group.

    Args:
        updates: per table, the step to take, or ``None`` for gradients.
        wanted: per parameter, whether its gradient is.
        want_weights: whether those of the per-sample weights are.
        rates: each family's, of the updates.
    """

    updates: Sequence[Update | None]
    wanted: Sequence[bool]
    want_weights: bool
    rates: Sequence[Tensor]


class TritonGroup:
    """Tables and features that are looked up together, in families that share launches.

    Args:
        tables: per table, its op's family class and its shape.
        features: in the order of the output's columns.
        device: where parameters and batches lie; the CPU in Triton's interpreter.
        dtypes: per table, how its parameters are stored.
        refusal: makes the error of a backward whose gradient is not finite and that had steps to take.
        micro_batch_rows: distinct rows of a family that are computed at once.

    Raises:
        OverflowError: the tables have more than 2**62 rows together.
    """

    alignment = ALIGNED

    def __init__(
        self,
        tables: Sequence[tuple[type[Family[Any]], Any]],
        features: Sequence[FeatureCode],
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        refusal: Callable[[], Exception] = not_finite,
        micro_batch_rows: int = MICRO_BATCH_ROWS,
    ) -> None:
        self.device, self._refusal = device, refusal
        members: dict[Hashable, list[int]] = {}
        for t, ((kind, shape), dtype) in enumerate(zip(tables, dtypes, strict=True)):
            members.setdefault((kind, kind.constants(shape), dtype), []).append(t)
        self.num_tables = len(tables)
        self._first = [0]  # each table's first parameter
        for kind, shape in tables:
            self._first.append(self._first[-1] + kind.num_parameters(shape))
        base, bounds = [0] * len(tables), [0]
        for own in members.values():
            end = bounds[-1]
            for t in own:
                base[t], end = end, end + tables[t][0].num_keys(tables[t][1])
            bounds.append(end)
        if bounds[-1] > 2**62:
            raise OverflowError(f"{bounds[-1]} rows in one group of tables are more than 2**62")
        columns = [0]
        for feature in features:
            columns.append(columns[-1] + tables[feature.table][1].dim)
        self.columns = columns[-1]
        rows = [tables[f.table][0].num_ids(tables[f.table][1], f.key_base) for f in features]
        self._keys = Keys(
            self._constant([base[f.table] + f.key_base for f in features]),
            self._constant(rows),
            self._constant(bounds),
            bounds[-1] < 2**31,
        )
        self._families: list[tuple[Family[Any], list[int]]] = []
        for index, own in enumerate(members.values()):
            kind, dtype = tables[own[0]][0], dtypes[own[0]]
            place = {t: k for k, t in enumerate(own)}
            served = [
                FamilyFeature(number, columns[number], f.mean, place[f.table], f.key_base)
                for number, f in enumerate(features)
                if f.table in place
            ]
            shapes = [tables[t][1] for t in own]
            family = kind(shapes, served, len(features), index, device, dtype)
            family.micro_batch_rows = micro_batch_rows
            self._families.append((family, own))

    def prepare(self, parameters: Sequence[Tensor], batch: Batch) -> Call:
        """Sort and group a batch ahead of its forward, on a stream beside what runs now."""
        if not (batch.size and batch.ids.numel()):
            return Call(batch, self.columns, self._keys)

        def run() -> Call:
            if self.device.type == "cuda":
                # Should the batch be dropped, nobody waits for what reads its memory here.
                for tensor in (batch.ids, batch.offsets):
                    tensor.record_stream(self._beside())
            return self.plan(batch)

        call, ready = self.run_beside(run)
        call.ready = ready
        return call

    def run_beside(self, run: Callable[[], _T]) -> tuple[_T, HandOver | None]:
        """Run launches on a stream beside the current one, and after what that has been given by now.

        Returns:
            Its result, and what a stream that reads it is to wait for; ``None`` where there are no streams.
        """
        if self.device.type != "cuda":
            return run(), None
        self.hold_beside()  # the ids may still be on their way
        with torch.cuda.stream(self._beside()):
            return run(), HandOver.now(self.device)

    def plans(self, keep: bool) -> bool:
        """Whether a look-up works on distinct rows, in the forward or in a backward to come."""
        return keep or any(family.plans_forward for family, _ in self._families)

    def hold_beside(self) -> None:
        """Have what runs beside from now on wait for what the current stream has been given."""
        if self.device.type == "cuda":
            self._beside().wait_stream(torch.cuda.current_stream(self.device))

    def _beside(self) -> torch.cuda.Stream:
        return own_stream("prepare", self.device)

    def on_device(self) -> AbstractContextManager[object]:
        """For launches, which go to the current device."""
        return on_device(self.device)

    def plan(self, batch: Batch) -> Call:
        """What the ids of a batch that has some decide, on the current stream."""
        call = Call(batch, self.columns, self._keys)
        for family, _ in self._families:
            family.prepare(call)
        return call

    def remembered(self) -> list[Tensor]:
        """The device's copies of what the host knows, which launches read."""
        return [tensor for family, _ in self._families for tensor in family.held()]

    def forward(
        self, parameters: Sequence[Tensor], batch: Batch, *, keep: bool, state: Call | None = None
    ) -> tuple[Tensor, Call]:
        """Pool a batch: [B, sum of D] float32, and what the backward needs when ``keep`` says that one comes.

        A ``state`` of the same batch comes from :meth:`prepare`, or is filled again for parameters that have
        changed since.
        """
        poll()
        return self.run_forward(parameters, batch, keep=keep, state=state)

    def run_forward(
        self, parameters: Sequence[Tensor], batch: Batch, *, keep: bool, state: Call | None = None
    ) -> tuple[Tensor, Call]:
        """:meth:`forward` without what is the host's: launches alone, which a CUDA graph can hold."""
        call = Call(batch, self.columns, self._keys) if state is None else state
        call.wait()
        call.batch = batch  # what was prepared has the weights of then
        out = torch.empty(batch.size, self.columns, dtype=torch.float32, device=self.device)
        if not batch.ids.numel():
            return out.zero_(), call
        if batch.size:
            with self.on_device():
                for family, own in self._families:
                    family.forward(call, self._parameters(parameters, own), out, keep)
        return out, call

    def backward(
        self,
        grad_out: Tensor,
        parameters: Sequence[Tensor],
        batch: Batch,
        state: Call,
        *,
        updates: Sequence[Update | None],
        wanted: Sequence[bool],
        want_weights: bool,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the parameters that are ``wanted``, and of the per-sample weights when asked for.

        A table with an update has its touched rows updated in place, and ``None`` for gradients. When
        ``grad_out`` is not finite, or the batch is marked as refused, nothing is updated.

        Raises:
            Exception: the ``refusal``; as the device alone knows, at a later call
                (:mod:`recemb_kernels.triton_frame.verdict`).
        """
        asked = Asked(updates, wanted, want_weights, self.begin_backward(updates))
        grads, grad_weights, mark = self.run_backward(grad_out, parameters, batch, state, asked)
        self.end_backward(updates, mark)
        return grads, grad_weights

    def begin_backward(self, updates: Sequence[Update | None]) -> list[Tensor]:
        """Count the steps; each family's rates, brought to the device where they have changed.

        Raises:
            Exception: of an earlier look-up or step.
        """
        poll()
        held = []
        for family, own in self._families:
            number = family.num_parameters(family.shapes[0])
            held.append(family.put_rates(rates_of([updates[t] for t in own], number)))
        return held

    def end_backward(self, updates: Sequence[Update | None], mark: Tensor) -> None:
        """Have a gradient that was not finite, as ``mark`` [1] tells, raise now or later."""
        if any(update is not None for update in updates):
            note(mark, self._refusal)

    def run_backward(
        self, grad_out: Tensor, parameters: Sequence[Tensor], batch: Batch, state: Call, asked: Asked
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
        """:meth:`backward` without what is the host's, as :meth:`run_forward`.

        Returns:
            The gradients, those of the weights, and [1] int32: not 0 when ``grad_out`` was not finite.
        """
        updates, wanted = asked.updates, asked.wanted
        grads: list[Tensor | None] = [None] * len(parameters)
        count = batch.ids.numel()
        want_weights = asked.want_weights
        grad_weights = grad_out.new_zeros(count, dtype=torch.float32) if want_weights else None
        grad_out = grad_out.float().contiguous()
        if batch.refused is not None and (want_weights or any(wanted)):
            # Gradients that no kernel steps on must not carry a bad batch to an optimizer outside.
            grad_out = grad_out.masked_fill(batch.refused != 0, 0)
        stepping = any(update is not None for update in updates)
        with self.on_device():
            mark = infinite(grad_out if stepping else grad_out[:0])
            refused = mark if batch.refused is None else mark | batch.refused
            for family, own in self._families:
                stored = self._parameters(parameters, own)
                places = [k for t in own for k in range(self._first[t], self._first[t + 1])]
                own_asked = Backward(
                    grad_out,
                    [updates[t] for t in own],
                    [wanted[k] for k in places],
                    grad_weights,
                    refused,
                    asked.rates[family.index],
                )
                if count and batch.size:
                    found = family.backward(state, stored, own_asked)
                else:
                    found = family.backward_without_ids(stored, own_asked)
                for k, grad in zip(places, found, strict=True):
                    grads[k] = grad
        return grads, grad_weights, mark

    def _parameters(self, parameters: Sequence[Tensor], tables: Sequence[int]) -> list[Tensor]:
        return [parameters[k] for t in tables for k in range(self._first[t], self._first[t + 1])]

    def _constant(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
