"""A cache under what surrounds it: mixed precision, frozen tables, other dtypes, batches with a period."""

from __future__ import annotations

import warnings
from threading import Thread
from typing import Any

import pytest
import torch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from recemb.bags import Bags
from recemb.cache.hot_rows import HotRowCache
from recemb.errors import RecembError
from recemb.spec import HotRows, MixedDimension, QuotientRemainder, TensorTrain
from tests.cache.cases import METHODS, Collection, forever, hold, one_id_bags, spec

EACH_STEP = HotRows(rows=2, warmup=1, refresh_every=1, track_every=1)


def made(compression: Any, rows: int = 40) -> Collection:
    torch.manual_seed(0)
    return Collection([spec(compression, rows)])


def train(collection: Collection, batches: list[list[int]], rate: float = 0.01) -> None:
    optimizer = torch.optim.SGD([p for p in collection.parameters() if p.requires_grad], rate)
    for ids in batches:
        optimizer.zero_grad()
        collection(one_id_bags(ids)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_exchanged_as_ever_inside_autocast(method: str) -> None:
    ways = []
    for enabled in (False, True):
        collection = made(METHODS[method](EACH_STEP))
        # Look-ups alone, so that rounding of the model's own does not tell the two apart.
        for k in range(6):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                collection(one_id_bags([k, k, k + 1] * (k + 1)))
        ways.append(collection)
    assert ways[0].cache().metrics().evictions > 0
    for (name, plain), inside in zip(ways[0].named_parameters(), ways[1].parameters(), strict=True):
        assert torch.equal(plain, inside), name
    assert torch.equal(ways[0].cache().ids, ways[1].cache().ids)


@pytest.mark.parametrize("frozen", ["all", "cached rows", "the rest"])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_table_keeps_its_rows(method: str, frozen: str) -> None:
    collection = made(METHODS[method](EACH_STEP))
    train(collection, [[1, 1, 2, 2, 3]] * 4)
    cache = collection.cache()
    for parameter in collection.parameters():
        of_cache = parameter is cache.weight
        if frozen == "all" or of_cache == (frozen == "cached rows"):
            parameter.requires_grad_(False)
    before, held = [p.detach().clone() for p in collection.parameters()], cache.ids.clone()
    head = torch.nn.Linear(8, 1)
    for _ in range(4):
        head(collection(one_id_bags([5, 5, 6, 6]))).sum().backward()
        collection.zero_grad()  # nothing accumulated keeps an exchange back
    assert torch.equal(cache.ids, held)
    for parameter, known in zip(collection.parameters(), before, strict=True):
        assert torch.equal(parameter, known)


def test_a_frozen_table_has_no_other_copied_at_each_step() -> None:
    """Its rows are due for good; those of the other are not."""
    collection = Collection(
        [
            spec(TensorTrain(rank=4, cache=EACH_STEP), 40, name="frozen"),
            spec(TensorTrain(rank=4, cache=forever(rows=2)), 40, name="other"),
        ]
    )
    collection.backend("frozen").requires_grad_(False)
    for _ in range(3):
        collection(Bags(torch.tensor([1, 1, 2, 2]), torch.arange(5), 2)).sum().backward()
        collection.zero_grad()
    assert collection.cache("frozen").due
    seen = collection.cache("other").before_step._seen
    assert seen
    assert all(values is None for _, _, values in seen)


def test_cached_rows_may_train_on_frozen_parameters_that_nothing_is_written_to() -> None:
    hot = HotRows(rows=2, warmup=1, refresh_every=1, track_every=1, write_back=False)
    collection = made(TensorTrain(rank=4, cache=hot))
    cores = list(collection.backend().own_parameters().values())
    for core in cores:
        core.requires_grad_(False)
    before = [core.clone() for core in cores]
    train(collection, [[1, 1, 2, 2], [5] * 5 + [6] * 5, [5, 6]])
    assert set(collection.cache().ids.tolist()) == {5, 6}
    assert all(torch.equal(*pair) for pair in zip(cores, before, strict=True))


def test_a_parameter_that_rows_are_not_written_to_may_be_frozen() -> None:
    collection = made(MixedDimension(dim=3, cache=EACH_STEP))
    collection.backend().p.requires_grad_(False)
    train(collection, [[1, 1, 2, 2], [5] * 5 + [6] * 5, [5, 6]])
    assert set(collection.cache().ids.tolist()) == {5, 6}


@pytest.mark.parametrize("period", [2, 3, 4])
def test_batches_that_take_turns_are_all_counted(period: int) -> None:
    """Each kind of batch has ids of its own; the cache has room for one of each."""
    hot = HotRows(rows=period, warmup=100, refresh_every=100, track_every=4)
    collection = made(QuotientRemainder(collisions=4, cache=hot))
    train(collection, [[step % period] * 5 for step in range(301)], rate=1e-4)
    assert set(collection.cache().ids.tolist()) == set(range(period))


def test_one_step_of_each_window_is_tracked() -> None:
    for every in (1, 2, 4, 7):
        hot = HotRows(rows=2, track_every=every)
        cache = HotRowCache(spec(TensorTrain(rank=2, cache=hot)), torch.device("cpu"))
        tracked = []
        for step in range(20 * every):
            cache.steps.fill_(step)
            tracked.append(cache.tracks)
        windows = [tracked[first : first + every] for first in range(0, len(tracked), every)]
        assert all(sum(window) == 1 for window in windows)
        assert every == 1 or len({window.index(True) for window in windows}) == every


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("policy", ["lfu", "lru"])
def test_counters_count_on_whatever_the_rows_are_stored_in(policy: Any, dtype: torch.dtype) -> None:
    hot = HotRows(rows=2, policy=policy, warmup=8, refresh_every=8, track_every=1)
    collection = made(QuotientRemainder(collisions=4, operation="add", cache=hot)).to(dtype)
    cache = collection.cache()
    assert cache.weight.dtype == dtype
    with torch.no_grad():
        # Beyond what float16 holds.
        cache.steps.fill_(70_000)
        cache.refreshed.fill_(69_992)
    for _ in range(17):
        collection(one_id_bags([1] * 40 + [2] * 40))
    assert set(cache.ids.tolist()) == {1, 2}
    for _ in range(60):
        collection(one_id_bags([7] * 400 + [8] * 400 + [1] * (40 if policy == "lfu" else 0)))
    assert set(cache.ids.tolist()) == {7, 8}
    assert bool(torch.isfinite(cache.scores).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ids_and_counts_stay_integers_whatever_the_module_is_converted_to(dtype: torch.dtype) -> None:
    collection = made(QuotientRemainder(collisions=4, cache=HotRows(rows=2)))
    hold(collection, [1, 7])
    before = {name: value.clone() for name, value in collection.cache().named_buffers()}
    collection.type(dtype)
    assert collection.cache().weight.dtype == dtype
    for name, value in collection.cache().named_buffers():
        wide = torch.float64 if value.is_floating_point() and dtype is torch.float64 else before[name].dtype
        assert value.dtype == wide, name
        assert torch.equal(value, before[name].to(wide)), name


def test_a_checkpointed_forward_finds_its_rows_again() -> None:
    """Reentrant: it keeps no graph, and is repeated within the backward."""
    hot = HotRows(rows=4, warmup=1, refresh_every=2, track_every=1, decay=0.3)
    collection = made(TensorTrain(rank=2, cache=hot))
    optimizer = torch.optim.SGD(collection.parameters(), 0.05)
    for k in range(8):
        bags, seen = one_id_bags([k, k, k, k + 1]), []

        def look_up(scale: torch.Tensor, bags: Any = bags, seen: Any = seen) -> torch.Tensor:
            seen.append(collection(bags).detach().clone())
            return collection(bags) * scale

        optimizer.zero_grad()
        scale = torch.ones(1, requires_grad=True)
        checkpoint(look_up, scale, use_reentrant=True).square().sum().backward()
        optimizer.step()
        first, again = seen
        assert torch.equal(first, again)
    assert collection.cache().metrics().evictions > 0


@pytest.mark.parametrize("before", ["nothing", "a product"])
@pytest.mark.parametrize("policy", ["lfu", "importance"])
@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_that_is_not_reentrant_counts_each_step_once(
    double: bool, policy: Any, before: str
) -> None:
    """Its forward keeps a graph, and is repeated wherever the backward first asks for what was not saved."""
    hot = HotRows(rows=4, policy=policy, warmup=2, refresh_every=3, track_every=1, decay=0.3)
    found = []
    for how in ("plain", "checkpointed"):
        # Plain torch saves what its backward needs, and has the look-up repeated after that of the sum.
        collection = made(TensorTrain(rank=2, cache=hot))
        collection = collection.double() if double else collection
        optimizer, at, looked_up = torch.optim.SGD(collection.parameters(), 0.05), [], 0
        for k in range(9):
            bags, scale = one_id_bags([k, k, k, k + 1]), torch.ones(1, requires_grad=True)

            def look_up(scale: torch.Tensor, own: Any = collection, bags: Any = bags) -> torch.Tensor:
                nonlocal looked_up
                looked_up += 1
                out = own(bags)
                return out * scale if before == "a product" else out

            optimizer.zero_grad()
            with set_checkpoint_early_stop(before == "a product"):
                # Else the repeat ends before the streams are summed up.
                pooled = look_up(scale) if how == "plain" else checkpoint(look_up, scale, use_reentrant=False)
            # Its backward needs nothing of what was looked up.
            (pooled * torch.linspace(-1, 1, 8)).sum().backward()
            optimizer.step()
            at.append(collection.cache().host_value("refreshed"))
        state = [value.clone() for value in collection.state_dict().values()]
        found.append((at, collection.cache().metrics(), state, looked_up))
    (at, figures, state, once), (again_at, again_figures, again_state, twice) = found
    assert again_at == at
    assert again_figures == figures
    assert figures.evictions > 0
    assert all(torch.equal(*pair) for pair in zip(state, again_state, strict=True))
    assert (once, twice) == (9, 18)


def test_two_look_ups_of_a_reentrant_checkpoint_are_two_steps() -> None:
    collection = made(TensorTrain(rank=2, cache=forever(rows=4)))

    def look_up(scale: torch.Tensor) -> torch.Tensor:
        return collection(one_id_bags([1, 2])) * scale + collection(one_id_bags([3, 3])) * scale

    for steps in (2, 4):
        checkpoint(look_up, torch.ones(1, requires_grad=True), use_reentrant=True).sum().backward()
        assert collection.cache().host_value("steps") == steps
    assert float(collection.cache().votes.sum()) == 2 * 4


def look_up_ahead(collection: Collection, steps: int) -> None:
    """Always the next batch before the backward of the one before, which steps."""
    apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.01})
    ahead = collection(one_id_bags([1, 2]))
    for _ in range(steps):
        now, ahead = ahead, collection(one_id_bags([1, 2, 3]))
        now.sum().backward()


# The first look-ups are up to the warmup, and tell nothing of a step yet.
@pytest.mark.parametrize(("every", "first"), [(1, 65), (20, 81)])
def test_a_loop_that_never_lets_rows_be_exchanged_is_told_once(every: int, first: int) -> None:
    collection = made(TensorTrain(rank=4, cache=HotRows(rows=2, warmup=1, refresh_every=every)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look_up_ahead(collection, first - 1)
    assert collection.cache().due
    collection = made(TensorTrain(rank=4, cache=HotRows(rows=2, warmup=1, refresh_every=every)))
    said = rf"table 't': .*refresh_every={every}\) and cannot be: .*Call backward\(\) before the next look-up"
    with pytest.warns(UserWarning, match=said) as told:
        look_up_ahead(collection, 3 * first)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("every", "look_ups", "how"),
    [(1, 70, "one backward"), (64, 330, "one backward"), (1, 70, "one behind"), (1, 70, "fused")],
)
def test_many_look_ups_in_each_step_are_no_reason_to_warn(every: int, look_ups: int, how: str) -> None:
    cache = HotRows(rows=2, warmup=1, refresh_every=every, track_every=1)
    collection = made(QuotientRemainder(collisions=6, operation="add", cache=cache))
    optimizer = torch.optim.SGD(collection.parameters(), 1e-6)
    if how == "fused":
        apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 1e-6})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = []
        for _ in range(look_ups):
            outputs.append(collection(one_id_bags([1, 2])).sum())
            if how == "one behind" and len(outputs) > 1:
                outputs.pop(0).backward()
        torch.stack(outputs).sum().backward()
        if how != "fused":
            optimizer.step()
        optimizer.zero_grad()
        collection(one_id_bags([1, 2]))
    assert collection.cache().refreshed == look_ups


def test_outputs_that_are_kept_and_never_go_backward_are_told_of() -> None:
    collection = made(QuotientRemainder(collisions=6, operation="add", cache=EACH_STEP))
    optimizer = torch.optim.SGD(collection.parameters(), 0.01)
    kept = []

    def train() -> None:
        for _ in range(70):
            kept.append(collection(one_id_bags([1, 2, 3])))
            collection(one_id_bags([1, 2, 3])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"refresh_every=1\) and cannot be") as told:
        train()
    assert len(told) == 1
    kept.clear()
    collection(one_id_bags([1, 2, 3]))
    assert collection.cache().metrics().promotions


def test_gradients_that_wait_for_a_step_are_no_reason_to_warn() -> None:
    collection = made(TensorTrain(rank=4, cache=EACH_STEP))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            collection(one_id_bags([1, 2])).sum().backward()
    assert collection.cache().due


@pytest.mark.parametrize(
    ("every", "how", "first"), [(1, "outside", 64), (20, "outside", 80), (1, "fused", 16 * 64)]
)
def test_a_cache_that_no_optimizer_was_given_is_told_of_once(every: int, how: str, first: int) -> None:
    """The parameters beside it are stepped, outside or in the backward, and its gradients wait for ever."""
    cache = HotRows(rows=2, warmup=1, refresh_every=every, track_every=1)
    collection = made(QuotientRemainder(collisions=6, operation="add", cache=cache))
    own = list(collection.backend().own_parameters().values())
    optimizer = torch.optim.SGD(own, 1e-6)
    if how == "fused":
        apply_optimizer_in_backward(torch.optim.SGD, own, {"lr": 1e-6})

    def train(steps: int) -> None:
        for _ in range(steps):
            collection(one_id_bags([1, 2, 3])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The first row is cached at the second look-up, and its gradient there is waited for ever after.
        train(every + first)
    assert collection.cache().metrics().promotions == 2
    said = rf"'t': .*refresh_every={every}\) and cannot be: .* gradients of t\.cache\.weight, .*Give an opt"
    with pytest.warns(UserWarning, match=said) as told:
        train(20)
    assert len(told) == 1
    assert collection.cache().metrics().promotions == 2


@pytest.mark.parametrize("how", ["outside", "fused"])
def test_long_accumulations_that_are_stepped_on_are_no_reason_to_warn(how: str) -> None:
    collection = made(QuotientRemainder(collisions=6, operation="add", cache=EACH_STEP))
    optimizer = torch.optim.SGD(collection.parameters(), 1e-6)
    if how == "fused":
        own = collection.backend().own_parameters().values()
        apply_optimizer_in_backward(torch.optim.SGD, own, {"lr": 1e-6})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 1201):
            collection(one_id_bags([1, 2, 3, 4])).sum().backward()
            if step % 400 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert collection.cache().refreshed == 800


def test_a_graph_whose_rows_another_thread_has_exchanged_says_so() -> None:
    collection = made(TensorTrain(rank=4, cache=EACH_STEP))
    collection(one_id_bags([1, 2])).sum().backward()
    out = collection(one_id_bags([1, 2])).sum()
    other = Thread(target=hold, args=(collection, [3, 4]))
    other.start()
    other.join()
    with pytest.raises(RecembError, match=r"exchanged, .*since the forward .*another thread trains"):
        out.backward()


def test_look_ups_without_gradients_are_no_reason_to_warn() -> None:
    """Not even where the exchange has been put off from within a backward to any look-up after it."""
    collection = made(TensorTrain(rank=4, cache=EACH_STEP))

    def look_up(scale: torch.Tensor) -> torch.Tensor:
        return collection(one_id_bags([1, 2])) * scale

    for _ in range(2):
        collection.zero_grad()
        checkpoint(look_up, torch.ones(1, requires_grad=True), use_reentrant=True).sum().backward()
    assert collection.engine._streams[0]._put_off
    out = collection(one_id_bags([1, 2]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(100):
            collection(one_id_bags([1, 2]))
    assert collection.cache().due
    out.sum().backward()


def stepped(policy: str) -> Collection:
    """A table whose optimizer is fused, so that kernels add its streams up."""
    collection = made(TensorTrain(rank=2, cache=HotRows(rows=2, policy=policy, warmup=10**9, track_every=1)))
    apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.01})
    return collection


def test_the_gradient_of_the_output_alone_is_no_backward() -> None:
    """As adversarial training asks for it first."""
    collection = stepped("importance")
    out = collection(one_id_bags([1, 2, 3]))
    (grad,) = torch.autograd.grad(out.square().sum(), out, retain_graph=True)
    (token,) = (held() for held in collection.engine._streams[0]._open)
    assert token is not None
    assert collection.cache().votes.sum() == 0
    (out.square().sum() * 100).backward()
    torch.testing.assert_close(collection.cache().votes.sum(), 100 * grad.norm(dim=1).sum())


def test_importance_is_of_the_gradient_that_arrives() -> None:
    collection = stepped("importance")
    out = collection(one_id_bags([1, 2, 3]))
    out.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    (100 * out).sum().backward()
    torch.testing.assert_close(collection.cache().votes.sum(), torch.tensor(3 * 0.01 * 8**0.5))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_no_gradient_counts_for_nothing() -> None:
    collection = stepped("importance")
    _Nothing.apply(collection(one_id_bags([1, 2, 3]))).sum().backward()
    assert collection.cache().votes.sum() == 0
