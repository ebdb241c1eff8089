"""F18: a state saved at any moment of training, of an exchange too, is the live one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.cache import refresh as refresh_module
from recemb.cache.hot_rows import HotRowCache
from recemb.errors import CheckpointError, RecembError
from recemb.spec import HotRows, TableSpec
from tests.backends.cases import make_bags
from tests.cache.cases import METHODS, Collection, forever, hold, one_id_bags, spec


def table(method: str, policy: Any = "lfu", **settings: Any) -> TableSpec:
    hot = HotRows(rows=4, policy=policy, warmup=1, refresh_every=2, track_every=1, decay=0.5, **settings)
    return spec(METHODS[method](hot), 60)


def built(table: TableSpec, seed: int = 0) -> Collection:
    torch.manual_seed(seed)
    collection = Collection([table])
    apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.005})
    return collection


def train(collection: Collection, steps: range) -> None:
    for seed in steps:
        bags = make_bags([collection.backend().table], 12, weighted=False, seed=seed)
        collection(bags).square().sum().backward()


def snapshot(collection: Collection) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in collection.state_dict().items()}


@pytest.mark.parametrize("policy", ["lfu", "lru", "importance"])
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_a_saved_state_as_it_would_have(
    method: str, policy: str, tmp_path: Path
) -> None:
    live = built(table(method, policy))
    train(live, range(7))
    save_file(live.state_dict(), tmp_path / "state.safetensors")
    loaded = built(table(method, policy), seed=9)
    loaded.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(live, range(7, 14))
    train(loaded, range(7, 14))
    for name, value in live.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert live.cache().metrics() == loaded.cache().metrics()
    assert live.cache().metrics().evictions > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
@pytest.mark.parametrize("steps", range(1, 12))
def test_a_copy_loads_a_state_as_a_fresh_collection_does(
    steps: int, copied: Callable[[Collection], Collection]
) -> None:
    """Whatever its tensors had been written to by then."""
    live, own = built(table("tt")), built(table("tt"))
    train(live, range(23))
    train(own, range(steps))
    twin = copied(own)
    twin.load_state_dict(live.state_dict())
    for name in ("steps", "refreshed"):
        assert twin.cache().host_value(name) == int(getattr(live.cache(), name))
    assert twin.cache().due == live.cache().due


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_copies_start_without_functions_on_replaced_rows(
    copied: Callable[[Collection], Collection],
) -> None:
    """Which are of the optimizer of the original, and often lambdas."""
    own, seen = built(table("tt")), []
    own.cache().on_replace.append(lambda cache, slots: seen.append(cache))
    twin = copied(own)
    for _ in range(4):  # without a backward: a copy's optimizers are not attached
        twin(one_id_bags([1, 2, 2]))
    assert twin.cache().metrics().promotions > 0
    assert not seen
    train(own, range(4))
    assert seen
    assert all(cache is own.cache() for cache in seen)


def test_saving_does_not_change_the_run() -> None:
    saved, other = built(table("tt")), built(table("tt"))
    for start in range(10):
        train(saved, range(start, start + 1))
        snapshot(saved)
        train(other, range(start, start + 1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in saved.state_dict().items())


def test_dcp_loads_in_place(tmp_path: Path) -> None:
    live = built(table("tt"))
    train(live, range(7))
    dcp_save(live.state_dict(), checkpoint_id=str(tmp_path / "dcp"))
    loaded = built(table("tt"), seed=9)
    train(loaded, range(20, 23))
    state = loaded.state_dict()
    dcp_load(state, checkpoint_id=str(tmp_path / "dcp"))
    # Into the tensors themselves: even without load_state_dict the index of cached rows follows.
    bags = make_bags([live.backend().table], 12, weighted=False, seed=50)
    assert torch.equal(live(bags), loaded(bags))
    train(live, range(7, 12))
    train(loaded, range(7, 12))


@pytest.mark.parametrize("write_back", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_state_saved_in_any_phase_is_the_live_one(
    method: str, write_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the write-back, each promotion, and inside the promotion at the optimizer's turn."""
    collection = built(table(method, write_back=write_back))
    checked: list[str] = []

    @torch.enable_grad()  # type: ignore[untyped-decorator] # torch leaves it untyped
    def check(phase: str) -> None:
        loaded = built(table(method, write_back=write_back), seed=9)
        loaded.load_state_dict(snapshot(collection))
        ids = one_id_bags(list(range(60)))
        with torch.no_grad():
            assert torch.equal(loaded(ids), collection(ids)), phase
        assert torch.equal(loaded.backend().to_dense(), collection.backend().to_dense()), phase
        assert bool(torch.isfinite(loaded.backend().to_dense()).all())
        checked.append(phase)

    def around(owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*args: Any) -> Any:
            check(f"before {name}")
            if name == "reset_in_backward":
                # The new rows are in their slots, which no id has yet: not the old ones', not their own.
                assert bool((collection.cache().ids[args[1]] == -1).all())
            result = inner(*args)
            check(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, outer)

    around(refresh_module, "evict")
    around(refresh_module, "promote")
    around(refresh_module, "reset_in_backward")
    around(HotRowCache, "settle")
    around(type(collection.backend()), "write_back_together")
    collection.cache().on_replace.append(lambda cache, slots: check("on_replace"))
    train(collection, range(8))
    check("between steps")
    names = {"evict", "promote", "reset_in_backward", "settle"} | (
        {"write_back_together"} if write_back else set()
    )
    assert {f"{when} {name}" for when in ("before", "after") for name in names} <= set(checked)


def test_a_state_saved_between_accumulated_backwards() -> None:
    kinds = [built(table("md"), seed) for seed in (0, 9)]
    live, loaded = kinds
    train(live, range(5))
    live(one_id_bags([1, 2, 2])).sum().backward()
    loaded.load_state_dict(snapshot(live))
    with torch.no_grad():
        ids = one_id_bags(list(range(60)))
        assert torch.equal(live(ids), loaded(ids))
    train(live, range(5, 9))
    train(loaded, range(5, 9))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in live.state_dict().items())


def test_a_cache_of_another_size_is_refused() -> None:
    live = built(table("tt"))
    other = built(spec(METHODS["tt"](HotRows(rows=5)), 60))
    said = r"table 't': its cache has 4 rows in the state to load and 5 here; .*HotRows\(rows=4\)"
    with pytest.raises(RuntimeError, match=said):
        other.load_state_dict(live.state_dict())


def test_cached_rows_are_refused_by_a_table_without_a_cache() -> None:
    live, other = built(table("tt")), built(spec(METHODS["tt"](None), 60))
    train(live, range(5))
    state = snapshot(live)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"tables\.t\.cache\.weight"'):
        other.load_state_dict(state)
    found = other.load_state_dict(state, strict=False)
    assert sorted(found.unexpected_keys) == sorted(name for name in state if ".cache." in name)
    assert not found.missing_keys
    copied = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    assert copied.backend().cache is None


@pytest.mark.parametrize("theirs", ["lfu", "lru", "importance"])
@pytest.mark.parametrize("own", ["lfu", "lru", "importance"])
def test_counters_of_another_policy_are_refused(own: str, theirs: str, tmp_path: Path) -> None:
    live, other = built(table("tt", theirs)), built(table("tt", own), seed=9)
    train(live, range(5))
    before = snapshot(other)
    state = snapshot(live)
    if own == theirs:
        other.load_state_dict(state)
        return
    said = f"table 't': the counters of its cache are of policy='{theirs}', and it has policy='{own}'"
    with pytest.raises(RuntimeError, match=said):
        other.load_state_dict(state)
    cached = [name for name in before if ".cache." in name]
    assert cached
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in cached)
    # Without them it counts anew, with the rows that are cached.
    train(other, range(20, 25))
    assert bool(other.cache().scores.any())
    counters = {name for name in cached if name.endswith(("scores", "owners", "votes"))}
    other.load_state_dict({k: v for k, v in state.items() if k not in counters}, strict=False)
    assert torch.equal(other.cache().ids, live.cache().ids)
    assert not bool(other.cache().scores.any() or other.cache().votes.any())
    assert bool((other.cache().owners[:-1] == -1).all())
    train(other, range(5, 10))
    # What loads in place is noticed before it moves a row.
    dcp_save(live.state_dict(), checkpoint_id=str(tmp_path / "dcp"))
    dcp_load(other.state_dict(), checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(CheckpointError, match=said):
        train(other, range(10, 14))
    assert torch.equal(other.cache().ids, live.cache().ids)


def test_a_state_from_before_policies_were_noted_is_loaded() -> None:
    live, other = built(table("tt", "lru")), built(table("tt", "lru"), seed=9)
    train(live, range(5))
    old = snapshot(live)
    (owners,) = (value for name, value in old.items() if name.endswith("owners"))
    owners[-1] = -1
    other.load_state_dict(old)
    train(live, range(5, 12))
    train(other, range(5, 12))
    for name, value in live.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _load_in_place(collection: Collection, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in collection.state_dict().items():
            value.copy_(state[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda own, state: own.load_state_dict(state),
        lambda own, state: own.load_state_dict(state, assign=True),
        _load_in_place,
        lambda own, state: own.cache().reset(),
    ],
    ids=["load", "assign", "in place", "reset"],
)
@pytest.mark.parametrize("method", ["tt", "mult"])
def test_a_gradient_does_not_go_to_rows_loaded_since_the_forward(
    method: str, change: Callable[[Collection, dict[str, Tensor]], object]
) -> None:
    own, other = (built(spec(METHODS[method](forever(rows=2)), 60), seed) for seed in (0, 9))
    hold(own, [1, 2])
    hold(other, [50, 51])
    loss = own(one_id_bags([1, 2])).sum()
    change(own, snapshot(other))
    before = snapshot(own)
    with pytest.raises(
        RecembError, match="a state loaded or the cache reset, since the forward of this graph;"
    ):
        loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_ids_written_anew_as_they_were_are_no_other_rows() -> None:
    """As when a state that has been loaded is loaded again."""
    own, alone = (built(spec(METHODS["tt"](forever(rows=2)), 60)) for _ in range(2))
    for collection in (own, alone):
        hold(collection, [1, 2])
        loss = collection(one_id_bags([1, 2, 3])).sum()
        if collection is own:
            collection.cache().ids.copy_(collection.cache().ids.clone())
        loss.backward()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in alone.state_dict().items())
