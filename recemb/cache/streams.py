"""A batch over cached tables as two streams, rows that are cached and rows that are not, and their sum.

Feature f of a cached table becomes two features: f, looked up by slot among the plain rows of its cache, and
a cold one after all others, looked up by id in the compressed parameters. Every position of the batch is in
exactly one of them, so one call of the engine's serves all tables::

    features  [f_0 .. f_{F-1}, cold ones]       pooled [B, W + W_cold]       out[:, f] = hot + cold

The native kernels of the CPU add both up themselves, [B, W], and divide a mean by the length of both parts.
Elsewhere, the mean of a bag of n ids, n_h of them cached, is n_h / n times the mean of its hot part plus
n_c / n times that of its cold part. Where all are cached, both are a plain table's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from recemb.bags import Bags, runs_of
from recemb.cache.hot_rows import HotRowCache
from recemb.cache.kept_back import KeptBack
from recemb.cache.merge import Merge, Piece, Step, Token, backward_under_way
from recemb.cache.refresh import cache_of, is_frozen, refresh
from recemb.cache.replicas import Replicas
from recemb.cache.split import Split, SplitAhead
from recemb.optim.state import version_of
from recemb.spec import Dense, TableSpec
from recemb_kernels.cache_split import Splitter
from recemb_kernels.triton_frame.captures import capturing
from recemb_kernels.triton_frame.streams import HandOver

if TYPE_CHECKING:
    from recemb.backends.base import Backend

# Ids of each cache and how often they had been written to, sorted keys of all, their slots.
Index = tuple[list[tuple[Tensor, int | None]], Tensor, Tensor, HandOver | None]
# Above every id plus its table's base.
NO_KEY = torch.iinfo(torch.int64).max


class Streams:
    """The cached features of a list of look-ups.

    Args:
        lookups: the table of each of the F features.
    """

    # Whether each stream holds its own positions alone, so that the mean of a bag is of a part of it.
    compact = True

    def __init__(self, lookups: Sequence[TableSpec]) -> None:
        self.lookups = tuple(lookups)
        self.cached = tuple(f for f, table in enumerate(lookups) if table.cache_rows)
        first: dict[str, int] = {}
        for f in self.cached:
            first.setdefault(lookups[f].name, f)
        # The first feature of each cached table, and per cached feature which of these tables is its own.
        self.firsts = tuple(first.values())
        self.owner = tuple(list(first).index(lookups[f].name) for f in self.cached)
        # An id plus its table's base is distinct over all cached tables.
        rows = [lookups[f].num_embeddings for f in self.firsts]
        self.bases = tuple(sum(rows[:t]) for t in self.owner)
        self._keys: Index | None = None
        self._splitter: tuple[Tensor, Splitter | None] | None = None
        # Graphs whose backward is still to come; they hold slots that must keep their rows until then.
        self._open: list[ref[Token]] = []
        # Whether an exchange is due since a look-up within a backward.
        self._put_off = False
        self._kept_back = KeptBack()
        self.replicas = Replicas()
        # Graphs that have gone backward.
        self.backwards = 0
        # The backward that the last graph of a forward outside of any has gone through.
        self.left_in = -1

    def __getstate__(self) -> dict[str, Any]:
        # What can be worked out again stays out of copies, and a graph is not copied.
        return self.__dict__ | {
            "_keys": None,
            "_splitter": None,
            "_open": [],
            "_kept_back": KeptBack(),
            "left_in": -1,
        }

    @property
    def expanded(self) -> list[TableSpec]:
        """The tables that the F + k features are looked up in; a cache is an uncompressed one."""
        hot = [replace_by_rows(table) for table in self.lookups]
        return hot + [self.lookups[f] for f in self.cached]

    def served(self, tables: Sequence[Backend]) -> list[Backend]:
        """The backends of the F + k features, of those of the F."""
        hot = [table if table.cache is None else table.cache for table in tables]
        return hot + [tables[f] for f in self.cached]

    @cached_property
    def joins(self) -> tuple[int, ...]:
        """Per feature of the F + k the one whose bags it holds the rest of, or -1; empty where none does."""
        return (*(-1 for _ in self.lookups), *self.cached) if self.compact else ()

    def begin(self, tables: Sequence[Backend]) -> bool:
        """Exchange rows where that is due; whether this is a training step.

        Nothing is exchanged while a backward is to come, or while gradients are accumulated that no optimizer
        has stepped on yet: those belong to the rows as they are. It is made up for afterwards. Replicas
        exchange the same rows, or none. A frozen table stays as it is: where its cached rows, or parameters
        that they would be written to, take no gradient. One in ``eval()`` is not counted either, whatever the
        others are in.

        A look-up within a backward repeats that of a checkpointed forward (``torch.utils.checkpoint``), and
        must find its rows. A reentrant one's forward keeps no graph and is no training step: the repeat is,
        and the next forward exchanges. With ``use_reentrant=False`` the forward was the step, whose graph is
        there or has gone backward by now, and the repeat is none. Where one collection is looked up in both
        ways, or without any, in one graph, the repeats of all are taken to be none.
        """
        if self._repeats():
            return False
        backends = [tables[f] for f in self.firsts]
        caches = [cache_of(backend) for backend in backends]
        training, task = torch.is_grad_enabled(), backward_under_way()
        if task == -1:
            if self.replicas.look_up(caches):
                self._open = []  # of this rank alone: what holds rows has to hold them on all
            if self.replicas.are_beside:
                return False
        if not (any(cache.training for cache in caches) and (training or self._put_off)):
            return False
        due = [backend for backend, cache in zip(backends, caches, strict=True) if cache.due]
        due = [backend for backend in due if not is_frozen(backend)]
        if due and task != -1:
            self._put_off = True
        elif due and not self.replicas.may_differ:
            self._exchange(due, backends, training)
        if training:
            self.replicas.have_counted()
        return training

    def _exchange(self, due: Sequence[Backend], tables: Sequence[Backend], training: bool) -> None:
        """Exchange rows unless something has to come before."""
        self._open = [token for token in self._open if token() is not None]
        waiting = [] if self._open else self._unstepped([cache_of(table) for table in tables])
        if not self._open and not waiting:
            refresh(due)
            self._put_off = False
            self._kept_back.over()
        elif training and self._open:
            self._kept_back.by_graphs(due, self.backwards)
        elif training:
            self._kept_back.by_gradients(due, tables, waiting)

    def _repeats(self) -> bool:
        """Whether a look-up is the repeat of one whose graph counts as a step already."""
        task = backward_under_way()
        if task == -1:
            return False
        held = (token() for token in self._open)
        return task == self.left_in or any(token is not None and token.task == -1 for token in held)

    def _unstepped(self, caches: Sequence[HotRowCache]) -> list[nn.Parameter]:
        """Parameters of the first table that has gradients no optimizer has stepped on."""
        return next(filter(None, (cache.before_step.pending() for cache in caches)), [])

    def split(self, tables: Sequence[Backend], bags: Bags) -> Split:
        """Send every position to one of the two streams.

        The streams are compacted, for which the host has to know their lengths;
        :class:`recemb.cache.device_streams.DeviceStreams` does without.
        """
        keys, slots = self._index([cache_of(tables[f]) for f in self.firsts])
        ahead = bags.split
        if ahead is not None and ahead.index is self._keys:
            return ahead.take()
        return self._splits(keys, slots, bags)()

    def split_ahead(self, tables: Sequence[Backend], bags: Bags) -> SplitAhead:
        """Begin to split a batch by the rows that are cached now."""
        keys, slots = self._index([cache_of(tables[f]) for f in self.firsts])
        # In a thread of its own, beside those of the step.
        splits = self._splits(keys, slots, bags, threads=1)
        return SplitAhead.begin(self._keys, splits, in_thread=bags.ids.is_cpu)

    def _splits(
        self, keys: Tensor, slots: Tensor, bags: Bags, threads: int | None = None
    ) -> Callable[[], Split]:
        """What splits a batch; it reads nothing that an exchange of rows changes."""
        splitter = self._splitter_of(keys, slots) if bags.ids.is_cpu else None

        def split() -> Split:
            if splitter is None:
                both = self._split_in_torch(keys, slots, bags)
                both.feature_bounds = both.find_bounds()
            else:
                both = self._split_natively(splitter, bags, threads)
            edges = both.feature_bounds
            return Split(both, edges[: bags.num_features + 1], edges[bags.num_features :])

        return split

    def _splitter_of(self, keys: Tensor, slots: Tensor) -> Splitter | None:
        if self._splitter is None or self._splitter[0] is not keys:
            bases = [-1] * len(self.lookups)
            for f, base in zip(self.cached, self.bases, strict=True):
                bases[f] = base
            # Without the last key, which no id has.
            self._splitter = keys, Splitter.of(keys[:-1], slots[:-1], bases)
        return self._splitter[1]

    def _split_natively(self, splitter: Splitter, bags: Bags, threads: int | None) -> Bags:
        weights = bags.weights
        parts = splitter(bags.ids, bags.offsets, bags.batch_size, weights is not None, threads)
        both = Bags(
            ids=parts.ids,
            offsets=parts.offsets,
            num_features=bags.num_features + len(self.cached),
            weights=None if weights is None or parts.order is None else weights[parts.order],
        )
        both.feature_bounds = parts.bounds
        return both

    def _split_in_torch(self, keys: Tensor, slots: Tensor, bags: Bags) -> Bags:
        bounds, mask, ids = bags.find_bounds(), None, bags.ids
        segments = runs_of(self.cached)
        parts = [ids[bounds[first] : bounds[last + 1]] for first, last in segments]
        wanted = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(self.firsts) > 1:
            counts = torch.tensor([bounds[f + 1] - bounds[f] for f in self.cached], device=ids.device)
            bases = torch.tensor(self.bases, device=ids.device)
            wanted = wanted + bases.repeat_interleave(counts, output_size=wanted.numel())
        at = torch.searchsorted(keys, wanted)
        hit = keys[at] == wanted
        if wanted.numel() == ids.numel():
            mask, rows = hit, slots[at]
        else:
            mask, rows = torch.ones_like(ids, dtype=torch.bool), ids.clone()
            done = 0
            for first, last in segments:
                part = slice(bounds[first], bounds[last + 1])
                found = slice(done, done := done + bounds[last + 1] - bounds[first])
                mask[part], rows[part] = hit[found], slots[at[found]]
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        hot_offsets = before[bags.offsets]
        cold_offsets = bags.offsets - hot_offsets
        miss, size = ~mask, bags.batch_size
        hot, cold = rows[mask], ids[miss]
        chosen = [cold_offsets[first * size : (last + 1) * size] for first, last in segments]
        # Uncached features have nothing in the cold stream, so its offsets run on over them.
        offsets = torch.cat([hot_offsets[:-1], *(part + hot.numel() for part in chosen), bags.offsets[-1:]])
        weights = bags.weights
        return Bags(
            ids=torch.cat([hot, cold]),
            offsets=offsets,
            num_features=bags.num_features + len(self.cached),
            weights=None if weights is None else torch.cat([weights[mask], weights[miss]]),
        )

    def _index(self, caches: Sequence[HotRowCache]) -> tuple[Tensor, Tensor]:
        """Sorted keys of all cached rows, ending with one that no id has, and their slots.

        Worked out when ids have been written to, by an exchange or by loading a state.
        """
        seen = [(ids, version_of(ids)) for ids in [cache.ids for cache in caches]]
        if self._keys is not None and all(
            ids is known and version is not None and version == before
            for (ids, version), (known, before) in zip(seen, self._keys[0], strict=True)
        ):
            # Another stream may have worked it out; a graph that the caller captures must not wait for that.
            _, keys, slots, handed = self._keys
            if handed is not None and not capturing():
                handed.take((keys, slots))
            return keys, slots
        keys, slots = self._sorted([cache.ids for cache in caches])
        self._keys = seen, keys, slots, HandOver.now(keys.device)
        return keys, slots

    def _sorted(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        bases = dict(zip(self.owner, self.bases, strict=True))
        parts = []
        for t, ids in enumerate(held):
            taken = (ids >= 0).nonzero().flatten()
            parts.append((ids[taken] + bases[t], taken))
        end = held[0].new_tensor([NO_KEY])
        keys, order = torch.cat([*(key for key, _ in parts), end]).sort()
        return keys, torch.cat([*(slot for _, slot in parts), torch.zeros_like(end)])[order]

    def still_holds(self, index: Index, caches: Sequence[HotRowCache]) -> bool:
        """Whether the ids that an index was made of are what they were, maybe written anew."""
        seen, keys, slots, _ = index
        for (ids, version), cache in zip(seen, caches, strict=True):
            if cache.ids is not ids or version is None or version_of(ids) != version:
                break
        else:
            return True
        now = self._sorted([cache.ids for cache in caches])
        return torch.equal(now[0], keys) and torch.equal(now[1], slots)

    def merge(self, tables: Sequence[Backend], pooled: Tensor, split: Split, training: bool) -> Tensor:
        """Add the streams up unless kernels have: [B, W + W_cold] -> [B, W]. In training, count the ids."""
        backends = [tables[f] for f in self.firsts]
        caches = [cache_of(backend) for backend in backends]
        tracked = [training and cache.training and cache.tracks for cache in caches]
        if any(tracked):
            self._count([caches[t] for t in self.owner], split, [tracked[t] for t in self.owner])
        watching = [
            now and cache.settings.policy == "importance" for now, cache in zip(tracked, caches, strict=True)
        ]
        assert self._keys is not None
        step = Step(self, backends, caches, split, watching, Token() if training else None, self._keys)
        if step.token is not None:
            self._open.append(ref(step.token))
        if pooled.shape[1] > self.width:
            pooled = cast(Tensor, cast(Any, Merge).apply(pooled, step))
        elif pooled.grad_fn is not None:
            # Of the node, not of the tensor: those run where the gradient of the output alone is asked for,
            # and before hooks of the caller's that change it.
            pooled.grad_fn.register_prehook(lambda grads: step.begin_backward(grads[0]))
        if training:
            own = [cache for cache in caches if cache.training]
            known = [cache.host_value("steps") for cache in own]
            torch._foreach_add_([cache.steps for cache in own], 1)
            for cache, before in zip(own, known, strict=True):
                cache.remember("steps", before + 1)
        return pooled

    def _count(self, caches: Sequence[HotRowCache], split: Split, tracked: Sequence[bool]) -> None:
        for k, (f, cache) in enumerate(zip(self.cached, caches, strict=True)):
            if not tracked[k]:
                continue
            hits, misses = self.positions(k, f, split)
            hit = hits.stop - hits.start
            cache.count(torch.tensor([hit + misses.stop - misses.start, hit], device=cache.counts.device))
            if cache.settings.policy != "importance":
                cache.observe(split.bags.ids[hits], split.bags.ids[misses])

    @torch.no_grad()
    def measure(self, k: int, step: Step, grad: Tensor) -> None:
        """Count the gradient norm that reaches each row that cached feature number k has looked up.

        Args:
            grad: [B, W] of the sum.
        """
        bags, (f, own, _) = step.split.bags, self.columns[k]
        hits, misses = self.positions(k, f, step.split)
        both, parts = [step.lengths(feature)[0] for feature in (f, len(self.lookups) + k)], []
        norms = grad[:, own].float().norm(dim=1).nan_to_num(0, 0, 0)
        if self.lookups[f].pooling == "mean":
            norms = norms / (both[0] + both[1]).clamp(min=1)
        for lengths, where in zip(both, (hits, misses), strict=True):
            each = norms.repeat_interleave(lengths, output_size=where.stop - where.start)
            parts.append(each if bags.weights is None else each * bags.weights[where].detach().abs().float())
        step.caches[self.owner[k]].observe(bags.ids[hits], bags.ids[misses], (parts[0], parts[1]))

    def positions(self, k: int, f: int, split: Split) -> tuple[slice, slice]:
        """Where the ids of cached feature number k, which is feature f, are: its hits, its misses."""
        return slice(*split.hot_bounds[f : f + 2]), slice(*split.cold_bounds[k : k + 2])

    @cached_property
    def columns(self) -> list[tuple[int, slice, slice]]:
        """Per cached feature: f, its columns of the output, and those of its cold stream."""
        dims = [table.embedding_dim for table in self.lookups]
        cold, found = sum(dims), []
        for f in self.cached:
            begin = sum(dims[:f])
            found.append((f, slice(begin, begin + dims[f]), slice(cold, cold + dims[f])))
            cold += dims[f]
        return found

    @cached_property
    def width(self) -> int:
        """W, columns of the output."""
        return sum(table.embedding_dim for table in self.lookups)

    @property
    def pooled_width(self) -> int:
        """W + W_cold, columns of both streams."""
        return self.width + sum(self.lookups[f].embedding_dim for f in self.cached)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The columns of the output in order, with neighbours that are added up alike made one."""
        cached = {f: (k, cold) for k, (f, _, cold) in enumerate(self.columns)}
        joined: list[Piece] = []
        begin = 0
        for f, table in enumerate(self.lookups):
            k, cold = cached.get(f, (-1, None))
            own = slice(begin, begin := begin + table.embedding_dim)
            mean = cold is not None and self.compact and table.pooling == "mean"
            piece = Piece(own, cold, (f, k) if mean else None)
            last = joined[-1] if joined else None
            if last is not None and last.precedes(piece):
                joined[-1] = last.joined(piece)
            else:
                joined.append(piece)
        return joined


def replace_by_rows(table: TableSpec) -> TableSpec:
    """An uncompressed stand-in for a cached table; others as they are."""
    if not table.cache_rows:
        return table
    return TableSpec(
        name=table.name,
        num_embeddings=table.cache_rows,
        embedding_dim=table.embedding_dim,
        pooling=table.pooling,
        compression=Dense(),
        dtype=table.dtype,
    )
