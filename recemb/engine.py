"""The one path of a lookup: ids -> one fused call, or one per method where kernels differ -> [B, sum of D].

The unsharded module calls it in its forward, and a sharded rank calls it on its local tables, so that
eager, sharded and cached use cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recemb.backends.base import Backend, Memo
from recemb.backends.native import (
    WholeLookup,
    pooled_native,
    prepare_native,
    served_natively,
    whole_look_up,
)
from recemb.bags import Bags, LookupTarget, LookupTargets, check_bags
from recemb.cache.device_streams import DeviceStreams
from recemb.cache.streams import Streams
from recemb.errors import BatchError, ConfigError
from recemb.spec import TableSpec
from recemb_kernels.digit_tree.step import loaded
from recemb_kernels.gather_op import opaque
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.streams import HandOver


class Engine:
    """Looks up every feature of a set of tables, table by table and feature by feature in their order.

    Args:
        tables: the tables; feature f of a batch is the f-th entry of ``targets``.
        micro_batch_rows: distinct rows (on a GPU of all tables of one shape, else of a table) that the native
            kernels compute at once, which bounds their workspace whatever the batch; the device's default
            when ``None``.
    """

    def __init__(self, tables: Sequence[TableSpec], micro_batch_rows: int | None = None) -> None:
        self.micro_batch_rows = micro_batch_rows
        lookups = [(feature, table) for table in tables for feature in table.feature_names]
        self.targets = LookupTargets(
            LookupTarget(feature, table.name, table.num_embeddings) for feature, table in lookups
        )
        self.dims = tuple(table.embedding_dim for _, table in lookups)
        served = [table for _, table in lookups]
        # With cached rows a batch is looked up as more features than it has.
        self._streams = _both_streams(served) if any(table.cache_rows for table in served) else None
        # In training and without gradients, a look-up like the last one's, where it can be had in one call.
        self._whole: dict[bool, WholeLookup | None] = Memo()

    def __call__(self, tables: Mapping[str, Backend], bags: Bags) -> Tensor:
        """Pool a batch.

        Args:
            tables: the backends by table name.
            bags: one feature per entry of ``targets``, in that order.

        Returns:
            [B, sum of D over the features], columns in the order of ``targets``.

        Raises:
            BatchError: malformed bags or an id without a row, before anything is computed.
            ConfigError: within a transform of torch.func's.
        """
        try:
            return self._call(tables, bags)
        except RuntimeError as error:
            # Tensors in a transform have no memory of their own, which kernels and checks ask for.
            if torch._C._functorch.peek_interpreter_stack() is None:
                raise
            raise ConfigError(
                "a look-up cannot be transformed by torch.func (grad, vjp, jvp, vmap, jacrev, ...); use "
                "torch.autograd.grad, with torch.func.functional_call for weights that are not the module's, "
                "or transform what comes after the look-up, given its output detached"
            ) from error

    def _call(self, tables: Mapping[str, Backend], bags: Bags) -> Tensor:
        if not torch.compiler.is_compiling():
            whole = self._whole.get(torch.is_grad_enabled())
            pooled = None if whole is None else whole(tables, bags)
            if pooled is not None:
                return pooled
        return self._look_up(tables, bags)

    # torch.compile breaks its graph here, as it does at torchrec's own jagged tensors: the look-up inside is
    # the eager one, with its fused optimizers.
    @opaque
    def _look_up(self, tables: Mapping[str, Backend], bags: Bags) -> Tensor:
        served = [tables[target.table] for target in self.targets]
        if bags.prepared_outside:
            bags = Bags(bags.ids, bags.offsets, bags.num_features, bags.weights)
        if not bags.checked:
            self._check(served, bags)
        if bags.handed is not None:
            bags.handed.take(bags)
        if self._streams is None:
            pooled = self._pool(served, bags)
            if loaded and served:
                found = whole_look_up(served, type(tables), self.targets, self.micro_batch_rows)
                self._whole[torch.is_grad_enabled()] = found
            return pooled
        streams = self._choose(self._streams, served, bags)
        training = streams.begin(served)
        split = streams.split(served, bags)
        pooled = self._pool(streams.served(served), split.bags, streams.joins)
        return streams.merge(served, pooled, split, training)

    @opaque
    def prefetch(self, tables: Mapping[str, Backend], bags: Bags) -> bool:
        """Prepare a batch for its look-up, beside what runs now: check it, sort and group its ids.

        A cached table's ids are split into cached rows and others too, which is done again if rows have been
        exchanged by the time of the look-up. What that computes does not depend on this.

        Args:
            bags: as of the look-up, which must be given this very object.

        Returns:
            Whether to keep it: while the caller captures a CUDA graph, all is left to the look-up.

        Raises:
            BatchError: as in the look-up.
        """
        if capturing():
            return False
        served = [tables[target.table] for target in self.targets]
        self._check(served, bags)
        bags.checked = True
        if bags.batch_size:
            self._begin(served, bags)
        bags.handed = HandOver.now(bags.ids.device)
        return True

    def _begin(self, served: Sequence[Backend], bags: Bags) -> None:
        """Begin to split a batch, to sort and to group it; the thread of the CPU does one after the other."""
        if self._streams is None:
            bags.ahead = prepare_native(served, lambda: bags, self.micro_batch_rows)
            return
        streams = self._choose(self._streams, served, bags)
        split = bags.split = streams.split_ahead(served, bags)
        both = streams.served(served)
        split.ahead = prepare_native(both, split.bags, self.micro_batch_rows, streams.joins)

    def _check(self, served: Sequence[Backend], bags: Bags) -> None:
        """Check a batch; without waiting for the GPU when kernels that skip bad ids serve all of it."""
        if served:
            device = served[0].device
            if device != bags.ids.device and "meta" not in (device.type, bags.ids.device.type):
                raise BatchError(
                    f"the batch is on {bags.ids.device} and table {self.targets[0].table!r} on {device}; "
                    f"move the batch there, e.g. features.to({str(device)!r})"
                )
        check_bags(bags, self.targets, later=bags.ids.is_cuda and all(served_natively(served)))

    @staticmethod
    def _choose(both: tuple[Streams, Streams], served: Sequence[Backend], bags: Bags) -> Streams:
        """How to split this batch: plain torch cannot skip positions."""
        compacted, in_place = both
        skips = bags.ids.is_cuda and all(served_natively(in_place.served(served)))
        return in_place if skips else compacted

    def _pool(self, served: Sequence[Backend], bags: Bags, joins: tuple[int, ...] = ()) -> Tensor:
        """[B, sum of D over the features]; of those that ``joins`` names in others' columns, where it can."""
        # The native kernels serve all methods at once, and write every column in its place.
        whole = pooled_native(served, bags, self.micro_batch_rows, joins)
        if whole is not None:
            return whole
        # Else those that they can serve, so that one table on plain torch takes no other with it.
        outputs: list[tuple[Sequence[int], Tensor]] = []
        rest = set(range(len(served)))
        native = [f for f, fits in enumerate(served_natively(served)) if fits]
        pooled = None
        if native:
            pooled = pooled_native([served[f] for f in native], bags.select(native), self.micro_batch_rows)
        if pooled is not None:
            outputs.append((native, pooled))
            rest -= set(native)
        for backend, members in _by_backend(served).items():
            own = [f for f in members if f in rest]
            if own:
                outputs.append((own, backend.pooled([served[f] for f in own], bags.select(own))))
        if len(outputs) == 1:
            return outputs[0][1]
        columns: dict[int, Tensor] = {}
        for features, output in outputs:
            pieces = torch.split(output, [served[f].table.embedding_dim for f in features], dim=1)
            columns.update(zip(features, pieces, strict=True))
        return torch.cat([columns[f] for f in range(len(served))], dim=1)


def _by_backend(served: Sequence[Backend]) -> dict[type[Backend], list[int]]:
    """The features that each method serves."""
    members: dict[type[Backend], list[int]] = {}
    for f, table in enumerate(served):
        members.setdefault(type(table), []).append(f)
    return members


def _both_streams(served: Sequence[TableSpec]) -> tuple[Streams, Streams]:
    """How batches are split on the CPU, and for kernels on a GPU."""
    return Streams(served), DeviceStreams(served)
