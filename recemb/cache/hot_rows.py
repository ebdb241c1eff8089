"""The cached rows of one table: storage, how hot each row is, and the choice of rows to exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from recemb.backends.dense import DenseBackend
from recemb.cache.before_step import BeforeStep
from recemb.cache.layout import NEVER, num_candidates, tried_at
from recemb.cache.loading import MARKS, misfit_of_state, policy_misfit
from recemb.cache.metrics import CacheMetrics
from recemb.cache.tracker import add, buckets_of, see, times_seen, vote
from recemb.errors import CheckpointError
from recemb.optim.state import version_of
from recemb.spec import CachePolicy, Dense, HotRows, TableSpec
from recemb_kernels.cache_split import Counters, count

# Native code reads and writes them by pointer: integers are int64, floats float32; float64 is left to torch.
_INTEGERS = ("ids", "owners", "steps", "refreshed", "counts")
_FLOATS = ("scores", "votes", "errors")
# How many times as hot as a cached row one outside has to be to take its place. At the edge of a cache most
# rows are looked up about as often, and their counts differ by chance; each exchange costs what the row that
# leaves has learned and the parameters cannot hold. Once a cache of 1 % of 1 M rows has settled on Zipf ids,
# 2 exchanges 0.4 of what 1 does, of 5 % 0.5-0.8, for hit rates within half a point. Of ``lru`` the later one
# is the hotter.
_HOTTER: dict[CachePolicy, float] = {"lfu": 2.0, "lru": 1.0, "importance": 2.0}
# A cache that nothing has been counted for is tried again once that has lasted longer by a part of this size.
_LATER = 16


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows to exchange.

    Attributes:
        leaving: [E] slots whose rows are evicted, coldest first.
        slots: [P] slots that take new rows, ascending; the E vacated ones and free ones.
        ids: [P] ids that enter, ascending: ``ids[i]`` goes to ``slots[i]``.
        scores: [P] how hot they are.
    """

    leaving: Tensor
    slots: Tensor
    ids: Tensor
    scores: Tensor


class HotRowCache(DenseBackend):
    """C plain rows beside a compressed table: ``weight`` [C, D], looked up by slot.

    A slot keeps its row until that leaves, and new ids take the free slots in ascending order, so that a
    cache of all rows has every id in the slot of its own number. Buffers are those of
    :mod:`recemb.cache.layout`: a checkpoint holds the cache as it is.

    ``on_replace`` holds functions of (cache, slots [P]) that are called after rows have been replaced. Of
    optimizers attached by ``apply_optimizer_in_backward`` the state of replaced rows starts anew by itself;
    for one that is stepped outside, it stays the former row's unless one of these mends it, as
    ``cache.on_replace.append(lambda cache, slots: reset_rows(optimizer, cache.weight, slots))`` does
    (:func:`recemb.cache.optimizer_state.reset_rows`). They are of this cache and its optimizer: copies and
    pickles start without any, and a collection that has some is not sharded.

    Args:
        table: the compressed table.
        device: where the rows live; ``meta`` allocates nothing.
    """

    ids: Tensor
    scores: Tensor
    owners: Tensor
    votes: Tensor
    steps: Tensor
    refreshed: Tensor
    counts: Tensor
    errors: Tensor

    def __init__(self, table: TableSpec, device: torch.device) -> None:
        rows = TableSpec(
            name=table.name,
            num_embeddings=table.cache_rows,
            embedding_dim=table.embedding_dim,
            feature_names=table.feature_names,
            pooling=table.pooling,
            compression=Dense(),
            dtype=table.dtype,
        )
        super().__init__(rows, (rows,), None, device)
        assert table.compression.cache is not None
        self.settings: HotRows = table.compression.cache
        self.num_embeddings = table.num_embeddings
        self.on_replace: list[Callable[[HotRowCache, Tensor], None]] = []
        self.before_step = BeforeStep()
        self._known: dict[str, tuple[Tensor, int, int]] = {}
        capacity, watched = table.cache_rows, num_candidates(table) + 1
        integers = dict(zip(_INTEGERS, ((capacity,), (watched,), (1,), (1,), (4,)), strict=True))
        floats = dict(zip(_FLOATS, ((capacity,), (watched,), (2,)), strict=True))
        for sizes, dtype in ((integers, torch.int64), (floats, torch.float32)):
            for name, shape in sizes.items():
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if not self.weight.is_meta:
            self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count their writes anew, and functions may be of another's optimizer.
        return super().__getstate__() | {"on_replace": [], "_known": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept: dict[str, Tensor] = {name: getattr(self, name) for name in (*_INTEGERS, *_FLOATS)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        for name, before in kept.items():
            after: Tensor = getattr(self, name)
            stays = (torch.int64,) if name in _INTEGERS else (torch.float32, torch.float64)
            if after.dtype not in stays:
                # Whatever rows are stored in: float16 counts to 2,048, and an id is no float.
                self._buffers[name] = before.to(after.device)
        return self

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything: no row is cached and no step has been taken."""
        for buffer in (self.counts, self.errors, self.steps, self.weight):
            buffer.zero_()
        self.ids.fill_(-1)
        self.refreshed.fill_(NEVER)
        self._count_anew()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *context: Any, **named: Any
    ) -> None:
        wrong = misfit_of_state(self.table.name, self.capacity, self.settings.policy, state_dict, prefix)
        if wrong:
            # torch raises them all together; nothing of this cache is loaded.
            context[-1].append(wrong)
            return
        counters = [prefix + name for name in ("scores", "owners", "votes")]
        if prefix + "ids" in state_dict and not all(name in state_dict for name in counters):
            # What has been counted here is of other rows, and of theirs a part says nothing.
            self._count_anew()
            for name in counters:
                state_dict.pop(name, None)
        super()._load_from_state_dict(state_dict, prefix, *context, **named)

    @torch.no_grad()
    def _count_anew(self) -> None:
        self.scores.zero_()
        self.votes.zero_()
        self.owners.fill_(-1)
        self.owners[-1] = MARKS[self.settings.policy]

    @property
    def capacity(self) -> int:
        """C."""
        return self.table.num_embeddings

    def host_value(self, name: str) -> int:
        """``steps`` or ``refreshed`` as an int, read from the device only after a write to it."""
        tensor: Tensor = self._buffers[name]  # type: ignore[assignment] # registered, never None
        known = self._known.get(name)
        # What is known is of a tensor that counts its writes.
        if known is not None and known[0] is tensor and known[1] == tensor._version:
            return known[2]
        return self.remember(name, int(tensor))

    def remember(self, name: str, value: int) -> int:
        """Say what ``steps`` or ``refreshed`` holds now, to save reading it."""
        tensor: Tensor = getattr(self, name)
        version = version_of(tensor)
        if version is not None:
            self._known[name] = (tensor, version, value)
        return value

    @property
    def due(self) -> bool:
        """Whether rows should be exchanged before the next training step."""
        hot, steps, last = self.settings, self.host_value("steps"), self.host_value("refreshed")
        if last >= 0:
            return steps - last >= hot.refresh_every
        if last == NEVER:
            return steps >= hot.first_refresh
        tried = tried_at(last)
        # Soon at first, and then ever more rarely: a table may see no id for long.
        waits = max(hot.track_every, (tried - hot.first_refresh) // _LATER)
        return steps - tried >= min(hot.refresh_every, waits)

    @property
    def tracks(self) -> bool:
        """Whether the ids of the training step under way are counted."""
        # A step of each window, drawn anew: batches may have a period of their own.
        window, place = divmod(self.host_value("steps"), self.settings.track_every)
        return place == (window * 0x9E3779B1 >> 16) % self.settings.track_every

    @torch.no_grad()
    def observe(self, slots: Tensor, misses: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> None:
        """Count the ids of one training step; nothing is read back from the device.

        Args:
            slots: [H] int64 slots that were hit; a negative one stands for none.
            misses: [M] int64 ids that were not cached; likewise.
            weights: what each counts for, [H] and [M] float32, 0 for none; or ``None`` for 1.
        """
        if self.settings.policy != "lru":
            counters = Counters(self.scores, self.owners, self.votes, self.num_embeddings)
            if count(counters, slots, misses, weights):
                return
        buckets = buckets_of(misses, self.owners.numel() - 1, self.num_embeddings)
        if self.settings.policy == "lru":
            now = self.host_value("steps")
            seen = times_seen(slots >= 0, now).to(self.scores.dtype)
            self.scores.scatter_reduce_(0, slots.clamp(min=0), seen, "amax")
            see(self.owners, self.votes, buckets, misses, now)
            return
        if weights is None:
            weights = (slots >= 0).float(), (misses >= 0).float()
        add(self.scores, slots.clamp(min=0), weights[0].to(self.scores.dtype))
        vote(self.owners, self.votes, buckets, misses, weights[1].to(self.votes.dtype))

    @torch.no_grad()
    def count(self, both: Tensor) -> None:
        """Add look-ups and hits, [2] int64, to the hit rate, which starts with the first exchange of rows."""
        if self.host_value("refreshed") >= 0:
            self.counts[:2].add_(both)

    @torch.no_grad()
    def choose(self) -> Exchange:
        """The hottest ids that are not cached, and the rows that are colder and make room for them.

        Free slots are filled first. Then the hottest id outside takes the place of the coldest row while it
        is more than ``_HOTTER`` times as hot. Equal scores go to the lower id.

        Raises:
            CheckpointError: the counters are another policy's, from a load that writes to tensors in place.
        """
        wrong = policy_misfit(self.table.name, self.settings.policy, self.owners)
        if wrong:
            raise CheckpointError(wrong)
        held = self.ids >= 0
        free = (~held).nonzero().flatten()
        ids, scores = self._candidates(free.numel())
        order = torch.argsort(ids)
        order = order[torch.argsort(scores[order], descending=True, stable=True)]
        ids, scores = ids[order], scores[order]
        filled = min(free.numel(), ids.numel())
        slots = held.nonzero().flatten()
        slots = slots[torch.argsort(self.ids[slots], descending=True)]
        slots = slots[torch.argsort(self.scores[slots], stable=True)]
        most = min(slots.numel(), ids.numel() - filled)
        # Hottest against coldest: once one loses, all later ones do.
        times = _HOTTER[self.settings.policy]
        wins = int((scores[filled : filled + most] > times * self.scores[slots[:most]]).sum())
        leaving, entering = slots[:wins], ids[: filled + wins]
        taken = torch.cat([leaving, free[:filled]]).sort().values
        order = torch.argsort(entering)
        return Exchange(leaving, taken, entering[order], scores[: filled + wins][order])

    def _candidates(self, free: int) -> tuple[Tensor, Tensor]:
        owners, votes = self.owners[:-1], self.votes[:-1]
        if self.capacity == self.num_embeddings:
            # Every row has a place: nothing is there to be found out.
            ids = torch.arange(self.num_embeddings if free else 0, device=self.ids.device)
            ids = ids[~torch.isin(ids, self.ids)]
            return ids, self.scores.new_zeros(ids.numel())
        watched = (owners >= 0) & (votes > 0)
        ids, scores = owners[watched], votes[watched]
        outside = ~torch.isin(ids, self.ids)
        return ids[outside], scores[outside]

    @torch.no_grad()
    def settle(self, exchange: Exchange, evicted: Tensor, scores: Tensor) -> None:
        """What is left to do after an exchange: counters, and counts decay.

        The first one is still to come where it has found nothing to hold, as nothing has been counted yet;
        that it has been tried is noted.

        Args:
            exchange: what has been exchanged.
            evicted: [E] ids that have left.
            scores: [E] how hot they were.
        """
        self.before_step.forget()
        now = self.host_value("steps")
        if self.host_value("refreshed") < 0 and not exchange.ids.numel():
            self._note_refreshed(tried_at(now))
            return
        gone = torch.isin(self.owners, exchange.ids)
        self.owners.masked_fill_(gone, -1)
        self.votes.masked_fill_(gone, 0)
        if self.settings.policy != "lru":
            # What has left is watched like the others.
            buckets = buckets_of(evicted, self.owners.numel() - 1, self.num_embeddings)
            vote(self.owners, self.votes, buckets, evicted, scores)
            self.scores.mul_(self.settings.decay)
            self.votes.mul_(self.settings.decay)
        self.owners[-1] = MARKS[self.settings.policy]
        moved = torch.tensor([exchange.ids.numel(), evicted.numel()], device=self.counts.device)
        self.counts[2:] += moved
        self._note_refreshed(now)

    def _note_refreshed(self, value: int) -> None:
        self.refreshed.fill_(value)
        self.remember("refreshed", value)

    def metrics(self) -> CacheMetrics:
        """The figures so far, read from the device."""
        lookups, hits, promotions, evictions = self.counts.tolist()
        after, learned = self.errors.tolist()
        return CacheMetrics(
            rows=self.capacity,
            cached_rows=int((self.ids >= 0).sum()),
            lookups=lookups,
            hit_rate=hits / lookups if lookups else 0.0,
            promotions=promotions,
            evictions=evictions,
            write_back_error=(after / learned) ** 0.5 if learned else 0.0,
            learned=learned**0.5,
        )


def read_again(caches: Sequence[HotRowCache]) -> None:
    """Read ``steps`` and ``refreshed`` of all at once: they have been written to, and do not count that."""
    found = torch.cat([value for cache in caches for value in (cache.steps, cache.refreshed)]).tolist()
    for cache, steps, refreshed in zip(caches, found[::2], found[1::2], strict=True):
        cache.remember("steps", steps)
        cache.remember("refreshed", refreshed)
