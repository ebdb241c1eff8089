"""Batches prepared ahead, and micro-batches: the results are those of a plain run."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import Event, current_thread, main_thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.bags import Bags
from recemb.errors import BatchError, ConfigError
from recemb.torchrec_io.kjt import state_of
from recemb_kernels import lookup
from recemb_kernels.cache_split import Splitter
from recemb_kernels.digit_tree.group import Group
from recemb_kernels.lookup import Ahead
from tests.processes import fork, status_of

ROWS = 3000
HOT = HotRows(rows=40, refresh_every=3, warmup=1)
METHODS = {
    "plain": {
        "tt": TensorTrain(rank=8),
        "qr": QuotientRemainder(collisions=9),
        "robe": ROBE(compress_rate=10, block_size=8),
        "md": MixedDimension(dim=3),
    },
    "cached": {
        "tt": TensorTrain(rank=8, cache=HOT),
        "qr": QuotientRemainder(collisions=9),
        "md": MixedDimension(dim=3, cache=HOT),
    },
}


def make(methods: str, micro_batch_rows: int | None = None) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=ROWS,
            embedding_dim=16,
            feature_names=[name],
            compression=compression,
            pooling=torchrec.PoolingType.MEAN if name == "qr" else torchrec.PoolingType.SUM,
        )
        for name, compression in METHODS[methods].items()
    ]
    return EmbeddingBagCollection(tables=tables, micro_batch_rows=micro_batch_rows)


def batches(methods: str, count: int = 8, longest: int = 3) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(1)
    keys, found = list(METHODS[methods]), []
    for _ in range(count):
        lengths = torch.randint(0, longest + 1, (len(keys) * 50,), generator=generator)
        values = (torch.rand(int(lengths.sum()), generator=generator) ** 3 * ROWS).long()
        found.append(KeyedJaggedTensor(keys=keys, values=values, lengths=lengths))
    return found


def train(ebc: EmbeddingBagCollection, given: Sequence[KeyedJaggedTensor], ahead: int) -> list[Tensor]:
    """Outputs of every step and the state after the last, with ``ahead`` batches under way."""
    apply_optimizer_in_backward(torch.optim.Adagrad, ebc.parameters(), {"lr": 0.1})
    outputs = []
    for k, features in enumerate(given):
        pooled = ebc(features).values()
        for following in given[k + 1 : k + 1 + ahead]:
            ebc.prefetch(following)
        pooled.square().mean().backward()
        outputs.append(pooled.detach())
    return [*outputs, *ebc.state_dict().values()]


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("methods", METHODS)
def test_prefetched_batches_give_the_bits_of_a_plain_run(methods: str, ahead: int, longest: int) -> None:
    given = batches(methods, longest=longest)
    plain, prepared = train(make(methods), given, 0), train(make(methods), given, ahead)
    assert len(plain) == len(prepared)
    assert all(torch.equal(a, b) for a, b in zip(plain, prepared, strict=True))


def test_what_was_prepared_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would pass without any."""
    ebc, (features,) = make("plain"), batches("plain", 1)
    ebc.prefetch(features)
    monkeypatch.setattr("recemb.torchrec_io.embedding_bag_collection.bags_from_kjt", None)
    monkeypatch.setattr("recemb.engine.check_bags", None)
    ebc(features)
    with pytest.raises(TypeError):
        ebc(features)


@torch.no_grad()  # no rows are exchanged
@pytest.mark.parametrize("methods", METHODS)
def test_a_thread_beside_prepares_what_is_used(methods: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached rows are told from others there, too, and no more at the look-up."""
    seen: list[str] = []

    def watch(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def watched(self: Any, *args: Any) -> Any:
            seen.append(f"{owner.__name__} in {current_thread().name.partition('_')[0]}")
            return real(self, *args)

        monkeypatch.setattr(owner, name, watched)

    plans: list[Any] = []
    state_for = Ahead.state_for
    monkeypatch.setattr(
        Ahead, "state_for", lambda self, group: plans.append(state_for(self, group)) or plans[-1]
    )
    watch(Group, "prepare")
    watch(Splitter, "__call__")
    ebc, given = make(methods), batches(methods, 2)
    for features in given:
        ebc.prefetch(features)
    for features in given:
        ebc(features)
    once = ["Group in recemb-prefetch"]
    if methods == "cached":
        once.insert(0, "Splitter in recemb-prefetch")
    assert seen == 2 * once
    assert len(plans) == 2
    assert None not in plans
    ebc(given[0])
    assert len(plans) == 2
    assert seen == 2 * once + (["Splitter in MainThread"] if methods == "cached" else [])


BUSY: list[tuple[str, type, str]] = [
    ("plain", Group, "prepare"),
    ("cached", Group, "prepare"),
    ("cached", Splitter, "__call__"),
    ("cached", Bags, "find_bounds"),
]


@pytest.mark.parametrize(("methods", "owner", "name"), BUSY, ids=[f"{m}-{n}" for m, _, n in BUSY])
def test_a_child_prepares_anew_what_its_fork_has_cut_short(
    methods: str, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that a thread is busy with, the one that waits behind it, and one that comes after both."""
    if owner is Bags:
        monkeypatch.setattr(Splitter, "of", lambda *args: None)  # split by torch
    ebc, given = make(methods), batches(methods, 3)
    train(ebc, batches(methods, 3), 0)
    monkeypatch.setattr(ebc, "forward", torch.no_grad()(ebc.forward))  # no more rows are exchanged
    expected = [ebc(features).values() for features in given]
    busy, go_on, real = Event(), Event(), getattr(owner, name)

    def slow(self: Any, *args: Any) -> Any:
        if current_thread() is not main_thread():
            busy.set()
            go_on.wait()
        return real(self, *args)

    def look_up() -> None:
        found = [ebc(features).values() for features in given]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def work() -> None:
        signal.alarm(30)
        torch.set_num_threads(1)  # of the parent's OpenMP threads there are none here
        look_up()
        go_on.set()
        ebc.prefetch(given[0])
        ebc(given[0])

    monkeypatch.setattr(owner, name, slow)
    for features in given[:2]:
        ebc.prefetch(features)
    assert busy.wait(30)
    child = fork(work)
    try:
        assert status_of(child) == 0
    finally:
        go_on.set()
    look_up()


@torch.no_grad()
def test_a_child_finds_what_was_done_before_its_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    ebc, (features,) = make("cached"), batches("cached", 1)
    expected = ebc(features).values()
    ebc.prefetch(features)
    lookup._beside().submit(int).result()  # behind what prepares the batch

    def work() -> None:
        signal.alarm(30)
        torch.set_num_threads(1)
        Group.prepare = Splitter.__call__ = None  # type: ignore[assignment, method-assign]
        assert torch.equal(ebc(features).values(), expected)

    assert status_of(fork(work)) == 0


def test_a_bad_batch_is_named_when_it_is_prepared() -> None:
    ebc, (features,) = make("plain"), batches("plain", 1)
    features.values()[0] = ROWS
    with pytest.raises(BatchError, match=rf"id {ROWS} is outside"):
        ebc.prefetch(features)


def test_a_prepared_batch_that_never_comes_is_let_go() -> None:
    ebc, given = make("plain"), batches("plain", 6)
    for features in given[:5]:
        ebc.prefetch(features)
    assert len(ebc._ahead) == 2
    assert torch.equal(ebc(given[5]).values(), make("plain")(given[5]).values())
    assert torch.equal(ebc(given[0]).values(), make("plain")(given[0]).values())


@pytest.mark.parametrize("prepared", ["before", "in it"])
def test_a_callers_capture_reads_the_batch_itself(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays find other ids there, of which a copy made before would be stale; so is one of it, after it."""
    ebc, keys, lengths = make("plain"), list(METHODS["plain"]), torch.ones(200, dtype=torch.int64)
    narrow = KeyedJaggedTensor(keys, torch.zeros(200, dtype=torch.int32), lengths=lengths)
    capturing = prepared == "in it"
    for name in ("recemb.engine.capturing", "recemb.bags.capturing"):
        monkeypatch.setattr(name, lambda: capturing)
    ebc.prefetch(narrow)
    for _, _, (bags, _) in ebc._ahead.values():
        bags.handed = SimpleNamespace(take=lambda held: pytest.fail("it waits"))  # as on a GPU
    narrow.values().copy_(torch.arange(200))
    capturing = prepared == "before"
    wide = KeyedJaggedTensor(keys, torch.arange(200), lengths=lengths)
    assert torch.equal(ebc(narrow).values(), ebc(wide).values())


def test_a_collection_is_copied_without_what_is_under_way() -> None:
    ebc, (features,) = make("plain"), batches("plain", 1)
    ebc.prefetch(features)
    twin = copy.deepcopy(ebc)
    assert torch.equal(twin(features).values(), ebc(features).values())


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_micro_batches_give_the_same_outputs(rows: int) -> None:
    given = batches("plain", 1)
    plain, sliced = make("plain"), make("plain", micro_batch_rows=rows)
    outputs = [ebc(given[0]).values() for ebc in (plain, sliced)]
    assert torch.equal(*outputs)
    for pooled in outputs:
        pooled.square().mean().backward()
    for first, second in zip(plain.parameters(), sliced.parameters(), strict=True):
        assert first.grad is not None
        assert second.grad is not None
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("rows", [1, 16])
def test_micro_batches_train_alike(rows: int, methods: str) -> None:
    """Over exchanges of cached rows too, which are the same ones."""
    plain, sliced = make(methods), make(methods, micro_batch_rows=rows)
    for ebc in (plain, sliced):
        apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, ebc.parameters(), {"lr": 0.05})
    for features in batches(methods, 12):
        outputs = [ebc(features).values() for ebc in (plain, sliced)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)
        for pooled in outputs:
            pooled.square().mean().backward()
    for first, second in zip(plain.state_dict().values(), sliced.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    for name, cache in plain.hot_row_caches().items():
        assert torch.equal(cache.ids, sliced.hot_row_caches()[name].ids)
        assert cache.metrics().evictions > 0


def test_micro_batch_rows_may_be_numpys() -> None:
    rows = make("plain", micro_batch_rows=np.int64(16)).micro_batch_rows  # type: ignore[arg-type]
    assert (rows, type(rows)) == (16, int)


@pytest.mark.parametrize("rows", [0, -1, 2.5, 8192.0, True, np.True_, "a", [1]])
def test_micro_batch_rows_must_be_a_positive_int(rows: Any) -> None:
    message = re.escape(f"micro_batch_rows={rows!r} must be an int >= 1, e.g. 8192")
    with pytest.raises(ConfigError, match=message):
        make("plain", micro_batch_rows=rows)


@pytest.mark.parametrize("rows", [2**31, 2**64])
def test_micro_batch_rows_must_not_wrap(rows: int) -> None:
    with pytest.raises(ConfigError, match=rf"micro_batch_rows={rows} must be below 2\*\*31, e\.g\. 8192"):
        make("plain", micro_batch_rows=rows)
    given = batches("plain", 1)[0]
    largest = make("plain", micro_batch_rows=2**31 - 1)
    assert torch.equal(largest(given).values(), make("plain")(given).values())


@pytest.mark.parametrize("methods", METHODS)
def test_a_batch_that_has_been_written_to_is_prepared_anew(methods: str) -> None:
    module, plain = make(methods), make(methods)
    first, second = batches(methods, 2)
    module.prefetch(first)
    first.values().copy_(ROWS - 1 - first.values())
    assert torch.equal(module(first).values(), plain(first).values())
    module.prefetch(second)
    second.values()[0] = 10**12
    with pytest.raises(BatchError, match="id 1000000000000 is outside"):
        module(second)


def entry(ids: list[int]) -> Tensor:
    """A bag of one id for each."""
    return torch.nested.nested_tensor([torch.tensor([k]) for k in ids], layout=torch.jagged)


@pytest.mark.parametrize("written", ["values", "in place", "replaced", "bags", "another order", "nothing"])
def test_a_tensordict_that_has_been_written_to_is_prepared_anew(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensordict = pytest.importorskip("tensordict")
    module = two_tables()
    features = tensordict.TensorDict({"a": entry([1, 2, 3]), "b": entry([4, 5, 6])}, batch_size=[3])
    before = module(features).values()
    module.prefetch(features)
    if written == "values":
        features["a"].values().copy_(torch.tensor([7, 8, 9]))
    elif written == "in place":
        features["a"].mul_(2)
    elif written == "replaced":
        features["b"] = entry([7, 8, 9])
    elif written == "bags":
        features["a"].offsets().copy_(torch.tensor([0, 0, 2, 3]))
    elif written == "another order":
        features["b"], features["a"] = features.pop("a"), features.pop("b")
    else:
        monkeypatch.setattr("recemb.torchrec_io.embedding_bag_collection.bags_from_kjt", None)
    pooled = module(features).values()
    assert torch.equal(pooled, before) == (written == "nothing")
    if written != "nothing":
        assert torch.equal(pooled, module(features).values())  # for which nothing has been prepared


def two_tables(is_weighted: bool = False, cache: HotRows | None = None) -> EmbeddingBagCollection:
    """A table for each of the features a and b."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=100,
            embedding_dim=8,
            feature_names=[name],
            compression=TensorTrain(rank=4, cache=cache),
        )
        for name in ("a", "b")
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=is_weighted)


@pytest.mark.parametrize("written", ["inverse indices", "lengths", "another tensor"])
def test_all_of_a_batch_is_seen_to_have_been_written_to(written: str) -> None:
    module = two_tables()
    features = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.arange(5),
        lengths=torch.ones(5, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])),
    )
    module.prefetch(features)
    if written == "inverse indices":
        features.inverse_indices()[1].copy_(torch.tensor([[1, 0, 1, 0], [2, 1, 0, 0]]))
    elif written == "lengths":
        features.lengths().copy_(torch.tensor([2, 0, 1, 1, 1]))
    else:
        features._values = torch.arange(5) + 50
    pooled = module(features).values()
    assert torch.equal(pooled, module(features).values())  # for which nothing has been prepared


def test_a_part_that_torchrec_cuts_out_anew_is_known_until_it_is_written_to() -> None:
    whole = KeyedJaggedTensor(["a", "b"], torch.arange(4), lengths=torch.ones(4, dtype=torch.int64))

    def part() -> list[object]:
        return state_of(whole.split([1, 1])[1], cut=True)

    first = part()
    assert first == part()
    whole.values()[0] = 9  # of the other part, but the memory is one
    assert first != part()


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
@pytest.mark.parametrize("cache", [None, HotRows(rows=4, warmup=1, refresh_every=1000, track_every=1)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_get_their_gradient_wherever_a_batch_was_prepared(
    mode: Callable[[], AbstractContextManager[None]], cache: HotRows | None, order: list[str]
) -> None:
    gradients = []
    for prepared in (False, True):
        torch.manual_seed(0)
        module = two_tables(is_weighted=True, cache=cache)
        ids = torch.tensor([1, 1, 2, 3, 4, 5])
        weights = torch.linspace(1, 2, 6).requires_grad_()
        for _ in range(3):
            features = KeyedJaggedTensor(
                keys=order, values=ids, lengths=torch.tensor([2, 1, 1, 2]), weights=weights
            )
            features.offsets()
            if prepared:
                with mode():
                    module.prefetch(features)
            weights.grad = None
            module(features).values().square().sum().backward()
        assert weights.grad is not None
        gradients.append(weights.grad)
    assert torch.equal(*gradients)
