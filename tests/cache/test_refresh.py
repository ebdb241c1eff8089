"""When rows are exchanged, and what an exchange leaves alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.bags import Bags
from recemb.cache.optimizer_state import reset_rows
from recemb.cache.refresh import refresh
from recemb.errors import NonFiniteError, RecembError
from recemb.spec import ROBE, HotRows, MixedDimension, TensorTrain
from tests.cache.cases import METHODS, Collection, forever, hold, one_id_bags, spec


def every_step(capacity: int = 2, **settings: Any) -> Collection:
    torch.manual_seed(0)
    hot = HotRows(rows=capacity, warmup=1, refresh_every=1, track_every=1, decay=0.5, **settings)
    return Collection([spec(TensorTrain(rank=4, cache=hot), 40)])


def step(collection: Collection, ids: list[int], optimizer: torch.optim.Optimizer | None = None) -> None:
    loss = collection(one_id_bags(ids)).square().sum()
    if optimizer is not None:
        optimizer.zero_grad()
    loss.backward()
    if optimizer is not None:
        optimizer.step()


def sgd(collection: Collection, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(collection.parameters(), rate)


def cached(collection: Collection) -> set[int]:
    return {i for i in collection.cache().ids.tolist() if i >= 0}


def test_rows_move_by_themselves_as_the_data_moves() -> None:
    collection = every_step()
    optimizer = sgd(collection)
    seen = []
    for ids in ([1, 1, 2, 3], [4, 4, 5, 5], [4, 4, 5, 5], [4, 5], [6]):
        step(collection, ids, optimizer)
        seen.append(cached(collection))
    # 1 was seen twice, and 2 is the lower of the two seen once.
    assert seen[0] == set()
    assert seen[1] == {1, 2}
    assert seen[-1] == {4, 5}
    assert collection.cache().metrics().evictions >= 2


def test_a_graph_that_may_still_go_backward_holds_the_rows() -> None:
    collection = every_step()
    step(collection, [1, 1, 2], sgd(collection))
    waiting = collection(one_id_bags([1, 3, 3, 3]))
    assert cached(collection) == {1, 2}
    for _ in range(3):
        collection(one_id_bags([3, 3, 4, 4]))
    assert cached(collection) == {1, 2}
    waiting.sum().backward()
    collection.zero_grad()
    collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}


def test_a_graph_that_is_dropped_does_not_hold_them() -> None:
    collection = every_step()
    step(collection, [1, 1, 2], sgd(collection))
    dropped = collection(one_id_bags([3, 3, 3, 4, 4, 4]))
    del dropped
    gc.collect()
    collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "fused-adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "foreach-adagrad": lambda p: torch.optim.Adagrad(p, 0.01, foreach=True),
    "rowwise-adagrad": lambda p: torchrec.optim.RowWiseAdagrad(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulated_gradients_hold_them_until_the_step(name: str) -> None:
    collection = every_step()
    optimizer = OPTIMIZERS[name](collection.parameters())
    step(collection, [1, 1, 2], optimizer)
    optimizer.zero_grad()
    for _ in range(3):
        collection(one_id_bags([3, 3, 4, 4])).sum().backward()
        assert cached(collection) == {1, 2}
    optimizer.step()
    # The gradient is there still, but has been stepped on: many loops clear it after the forward.
    assert collection.cache().weight.grad is not None
    collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}


def test_gradients_that_no_hook_steps_on_hold_them_too() -> None:
    collection = every_step()
    cores = list(collection.parameters())
    apply_optimizer_in_backward(torch.optim.SGD, cores, {"lr": 0.01}, register_hook=False)

    def stepped() -> None:
        for parameter in cores:
            for optimizer in parameter._in_backward_optimizers:
                optimizer.step()
                optimizer.zero_grad()

    step(collection, [1, 1, 2])
    stepped()
    for _ in range(3):
        collection(one_id_bags([3, 3, 4, 4])).sum().backward()
        assert cached(collection) == {1, 2}
    stepped()
    collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}


def copies(collection: Collection, name: str = "t") -> dict[Tensor, Tensor]:
    """Parameters of a table and what is kept of their values."""
    seen = collection.cache(name).before_step._seen
    return {parameter: values for parameter, _, values in seen if values is not None}


def test_values_are_copied_only_before_an_exchange() -> None:
    hot = HotRows(rows=2, warmup=2, refresh_every=3, track_every=1)
    collection = Collection([spec(TensorTrain(rank=4, cache=hot), 40)])
    optimizer, due = sgd(collection), []
    for taken in range(1, 11):
        step(collection, [1, 2, taken], optimizer)
        kept = copies(collection)
        assert set(kept) in (set(), set(collection.parameters()))
        if kept:
            due.append(taken)
    # Exchanges take place at the look-ups that follow, and drop them.
    assert due == [2, 5, 8]
    assert collection.cache().metrics().promotions


def test_what_no_optimizer_steps_outside_is_not_copied() -> None:
    collection = every_step()
    cores = list(collection.backend().own_parameters().values())
    apply_optimizer_in_backward(torch.optim.SGD, cores[:1], {"lr": 0.01})
    step(collection, [1, 1, 2])
    assert set(copies(collection)) == {collection.cache().weight, *cores[1:]}
    # Rows are exchanged no more.
    cores[1].requires_grad_(False)
    step(collection, [1, 1, 2])
    assert not copies(collection)


def test_a_parameter_of_several_features_and_tables_is_copied_once() -> None:
    shared = ROBE(compress_rate=4, block_size=8, cache=HotRows(rows=2, warmup=1))
    tables = [spec(shared, 40, name="a", features=("f", "g")), spec(shared, 40, name="b")]
    collection = Collection(tables)
    collection(Bags(torch.tensor([1, 2, 3]), torch.arange(4), 3)).sum().backward()
    (array,) = collection.backend("b").own_parameters().values()
    assert copies(collection, "a")[array] is copies(collection, "b")[array]


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "kept"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_long_before_an_exchange_hold_it(name: str, cleared: bool) -> None:
    hot = HotRows(rows=2, warmup=3, refresh_every=1, track_every=1)
    collection = Collection([spec(TensorTrain(rank=4, cache=hot), 40)])
    optimizer = OPTIMIZERS[name](collection.parameters())
    collection(one_id_bags([3, 3, 4, 4])).sum().backward()
    assert not copies(collection)
    for _ in range(3):
        # Graphs that are dropped: nothing says what values were when it falls due.
        collection(one_id_bags([3]))
        assert not cached(collection)
    optimizer.step()
    if cleared:
        optimizer.zero_grad()
    collection(one_id_bags([3]))
    if name == "fused-adam" and not cleared:
        # It cannot be seen to have stepped; the exchange is late by one step of the loop.
        assert not cached(collection)
        step(collection, [3], optimizer)
        collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}


def test_a_new_row_has_no_gradient_of_the_old_one() -> None:
    collection = Collection([spec(TensorTrain(rank=4, cache=forever(rows=2)), 40)])
    cache = hold(collection, [1, 2])
    step(collection, [1, 2], sgd(collection))
    gradient = cache.weight.grad
    assert gradient is not None
    kept = gradient[0].clone()
    with torch.no_grad():
        cache.scores[0] = 1e9
    hold(collection, [9])
    assert cache.ids.tolist() == [1, 9]
    assert torch.equal(gradient[0], kept)
    assert bool(kept.any())
    assert not bool(gradient[1].any())


def test_accumulation_equals_one_large_batch() -> None:
    batches = [[1, 2, 3, 3], [3, 3, 4, 4], [5, 5, 5, 1]]
    whole, parts = every_step().double(), every_step().double()
    for _ in range(4):
        for collection, chunks in ((whole, [[i for batch in batches for i in batch]]), (parts, batches)):
            optimizer = sgd(collection, 0.1)
            optimizer.zero_grad()
            for chunk in chunks:
                collection(one_id_bags(chunk)).square().sum().backward()
            optimizer.step()
            # The count of steps differs; what the rows are must not.
            hold(collection, [3, 5])
    torch.testing.assert_close(whole.backend().to_dense(), parts.backend().to_dense(), rtol=1e-6, atol=1e-7)


def test_going_back_again_after_an_exchange_is_refused() -> None:
    collection = every_step()
    step(collection, [1, 1, 2], sgd(collection))
    out = collection(one_id_bags([3, 3, 3, 4, 4, 4])).sum()
    out.backward(retain_graph=True)
    collection.zero_grad()
    collection(one_id_bags([3]))
    with pytest.raises(RecembError, match=r"exchanged, .* since the forward.*has gone backward once already"):
        out.backward()


def test_going_back_through_a_graph_of_eval_after_an_exchange_says_so() -> None:
    collection = every_step()
    step(collection, [1, 1, 2], sgd(collection))
    step(collection, [1, 1, 2], sgd(collection))
    out = collection.eval()(one_id_bags([1, 2, 3])).sum()
    collection.train().zero_grad()
    collection(one_id_bags([3] * 5 + [4] * 5))
    collection(one_id_bags([3]))
    assert cached(collection) == {3, 4}
    with pytest.raises(RecembError, match=r"exchanged, .* since the forward.*was made in eval\(\)"):
        out.backward()


@pytest.mark.parametrize("policy", ["lfu", "importance"])
@pytest.mark.parametrize("still", ["a", "b"])
def test_each_table_trains_or_evaluates_by_itself(still: str, policy: Any) -> None:
    hot = HotRows(rows=2, policy=policy, warmup=1, refresh_every=1, track_every=1)
    tables = [spec(TensorTrain(rank=4, cache=hot), 40, name=name) for name in ("a", "b")]
    collection = Collection(tables)
    collection.backend(still).eval()
    other = "b" if still == "a" else "a"
    before = {name: value.clone() for name, value in collection.cache(still).named_buffers()}
    for ids in ([1, 1, 2, 2], [4, 4, 5, 5], [4, 4, 5, 5]):
        collection(Bags(torch.tensor(ids + ids), torch.arange(9), 2)).square().sum().backward()
        collection.zero_grad()
    for name, value in collection.cache(still).named_buffers():
        assert torch.equal(value, before[name]), name
    metrics = collection.cache(other).metrics()
    assert (metrics.cached_rows, metrics.lookups) == (2, 8)
    assert int(collection.cache(other).steps) == 3


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_changes_nothing(how: str) -> None:
    collection = every_step()
    step(collection, [1, 1, 2], sgd(collection))
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    collection.train(how != "eval")
    modes = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes[how]():
        for _ in range(3):
            collection(one_id_bags([7, 7, 8]))
    assert all(torch.equal(value, before[name]) for name, value in collection.state_dict().items())


@pytest.mark.parametrize("every", [1, 3])
def test_ids_are_counted_every_so_many_steps(every: int) -> None:
    hot = HotRows(rows=2, warmup=100, refresh_every=100, track_every=every)
    collection = Collection([spec(TensorTrain(rank=4, cache=hot), 30)])
    for _ in range(6):
        collection(one_id_bags([4]))
    assert float(collection.cache().votes.sum()) == 6 / every


def test_importance_is_the_gradient_that_reaches_a_row() -> None:
    hot = HotRows(rows=2, policy="importance", warmup=0, refresh_every=100, track_every=1)
    for pooling, parts in (("sum", 1), ("mean", 3)):
        collection = Collection([spec(TensorTrain(rank=4, cache=hot), 30, pooling=pooling)])  # type: ignore[arg-type]
        cache = hold(collection, [7])
        from tests.backends.cases import bags_of

        bags = bags_of([7, 8, 7, 8, 9], [3, 0, 2], 1, [2, -3, 1, 1, 1] if pooling == "sum" else None)
        out = collection(bags)
        gradient = torch.zeros_like(out)
        gradient[0, 0], gradient[2, 1], gradient[2, 2] = 6.0, 3.0, 4.0
        before = float(cache.scores[0])
        out.backward(gradient, retain_graph=True)
        out.backward(gradient)  # counted once
        hit = 6.0 * 3 if pooling == "sum" else 6.0 / 3 * 2
        eight = 6.0 * 3 + 5.0 if pooling == "sum" else 6.0 / 3 + 5.0 / 2
        assert float(cache.scores[0]) - before == pytest.approx(hit, abs=0.1)
        assert float(cache.votes[8]) == pytest.approx(eight, rel=1e-5)
        assert float(cache.votes[9]) == pytest.approx(5.0 if parts == 1 else 2.5, rel=1e-5)


KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], float]] = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.25}, 0.25),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}, 0.0),
    "adam": (torch.optim.Adam, {"lr": 0.1}, 0.0),
}


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "hook"])
@pytest.mark.parametrize("name", KINDS)
def test_a_new_row_starts_with_fresh_state_under_in_backward_optimizers(name: str, kernel: bool) -> None:
    kind, settings, start = KINDS[name]
    collection = Collection([spec(TensorTrain(rank=4, cache=forever(rows=2)), 40)])
    collection = collection if kernel else collection.double()
    hold(collection, [1, 2])
    apply_optimizer_in_backward(kind, collection.parameters(), dict(settings))
    step(collection, [1, 2, 2, 5])
    cache = collection.cache()
    (optimizer,) = cache.weight._in_backward_optimizers
    state = {k: v for k, v in optimizer.state[cache.weight].items() if v.dim() == 2}
    kept = {k: v[0].clone() for k, v in state.items()}
    assert all(bool((v[1] != start).any()) for v in state.values())
    with torch.no_grad():
        cache.scores[0] = 1e9
    hold(collection, [9])
    assert cache.ids.tolist() == [1, 9]
    for key, value in state.items():
        assert torch.equal(value[0], kept[key])
        assert torch.equal(value[1], torch.full_like(value[1], start))
    # The next step is the first one of the new row, and no other's.
    step(collection, [9])


def test_a_new_row_starts_with_the_step_size_of_rprop() -> None:
    collection = Collection([spec(TensorTrain(rank=4, cache=forever(rows=2)), 40)])
    apply_optimizer_in_backward(torch.optim.Rprop, collection.parameters(), {"lr": 0.03})
    cache = hold(collection, [1, 2])
    for _ in range(3):
        step(collection, [1, 2])
    (optimizer,) = cache.weight._in_backward_optimizers
    sizes = optimizer.state[cache.weight]["step_size"]
    kept = sizes[0].clone()
    assert bool((sizes != 0.03).any(dim=1).all())
    with torch.no_grad():
        cache.scores[0] = 1e9
    hold(collection, [9])
    assert cache.ids.tolist() == [1, 9]
    assert torch.equal(sizes, torch.stack([kept, torch.full_like(kept, 0.03)]))


def test_an_optimizer_outside_can_be_mended() -> None:
    collection = Collection([spec(TensorTrain(rank=4, cache=forever(rows=2)), 40)])
    hold(collection, [1, 2])
    optimizer = torch.optim.Adam(collection.parameters(), 0.1)
    step(collection, [1, 2], optimizer)
    cache = collection.cache()
    moments = optimizer.state[cache.weight]["exp_avg"]
    assert bool(moments.any())
    seen: list[Tensor] = []
    cache.on_replace.append(lambda cache, slots: reset_rows(optimizer, cache.weight, slots))
    cache.on_replace.append(lambda cache, slots: seen.append(slots))
    with torch.no_grad():
        cache.scores.zero_()
    hold(collection, [8, 9])
    assert [slots.tolist() for slots in seen] == [[0, 1]]
    assert not bool(moments.any())
    assert float(optimizer.state[cache.weight]["step"]) == 1


def test_a_row_that_diverged_is_not_written_back() -> None:
    collection = Collection([spec(MixedDimension(dim=2, cache=forever(rows=1)), 40)])
    hold(collection, [3])
    cache = collection.cache()
    with torch.no_grad():
        cache.weight[0, 1] = float("nan")
        cache.owners[5], cache.votes[5] = 5, 1e9
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"table 't'.*id 3 is NaN"):
        refresh([collection.backend()])
    for name, value in collection.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", ["leaves", "enters", "neither"])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_diverged_are_named_before_anything_is_exchanged(
    method: str, row: str, bad: float
) -> None:
    torch.manual_seed(0)
    collection = Collection([spec(METHODS[method](forever(rows=1)), 40)])
    hold(collection, [3])
    cache, table = collection.cache(), collection.backend()
    slots = table.map_ids(torch.tensor([3, 8, 39]))[["leaves", "enters", "neither"].index(row)]
    with torch.no_grad():
        cache.owners[8], cache.votes[8] = 8, 1e9
        cache.weight.add_(1)
        if method == "robe":
            array = table.own_parameters()["array"].view(-1)
            index, _ = table._elements(slots[None])
            array[index.flatten()[0]] = bad
        else:
            name, parameter = next(iter(table.own_parameters().items()))
            parameter[slots[0], 0] = bad
    touched = not bool(torch.isfinite(table.rows(table.map_ids(torch.tensor([3, 8])))).all())
    broken = torch.isfinite(table.to_dense()).logical_not()
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    if touched or method == "tt":
        with pytest.raises(NonFiniteError, match=r"table 't': the .* is NaN or infinite and .* be "):
            refresh([table])
        for name, value in collection.state_dict().items():
            assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    else:
        refresh([table])
        assert cache.ids.tolist() == [8]
        assert bool(torch.isfinite(cache.weight).all())
        # It has not spread.
        assert torch.equal(torch.isfinite(table.to_dense()).logical_not(), broken)


@pytest.mark.parametrize("method", ["md", "mult"])
def test_a_parameter_that_all_rows_are_written_back_by_is_named(method: str) -> None:
    collection = Collection([spec(METHODS[method](forever(rows=1)), 40)])
    hold(collection, [3])
    cache, table = collection.cache(), collection.backend()
    with torch.no_grad():
        # Of the factors in r, one that neither row has.
        (table.p if method == "md" else table.r)[1, 2] = float("nan")
        cache.owners[8], cache.votes[8] = 8, 1e9
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"table 't': the row 1 of [pr] is NaN or infinite"):
        refresh([table])
    for name, value in collection.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
