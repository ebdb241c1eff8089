"""State dicts of other keys and types, and with a part of a cache: refused before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan

import recemb
from recemb.checkpoint import latest_checkpoint, save_checkpoint
from recemb.errors import CheckpointError, ConfigError
from recemb.spec import Compression
from recemb.torchrec_io import quantize_embeddings
from recemb.torchrec_io.sharding.sharder import EmbeddingBagCollectionSharder

HOT = recemb.HotRows(rows=5, warmup=1, refresh_every=2, track_every=1)
QR = recemb.QuotientRemainder(collisions=4)
TT = recemb.TensorTrain(rank=4)
ROBE = recemb.ROBE(compress_rate=4, block_size=4)
Change = Callable[[Tensor], Tensor]


def collection(seed: int = 0, **compressions: Compression) -> recemb.EmbeddingBagCollection:
    torch.manual_seed(seed)
    made = recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name=name, num_embeddings=40, embedding_dim=8, feature_names=[name], compression=compression
            )
            for name, compression in compressions.items()
        ]
    )
    apply_optimizer_in_backward(torch.optim.SGD, made.parameters(), {"lr": 0.1})
    return made


def train(made: nn.Module, names: str, ids: range) -> None:
    for _ in range(5):
        lengths = torch.ones(len(ids) * len(names), dtype=torch.int64)
        features = KeyedJaggedTensor(
            keys=list(names), values=torch.tensor([*ids] * len(names)), lengths=lengths
        )
        made(features).values().square().sum().backward()


def cached(seed: int = 0, first: int = 0, compression: Any = TT) -> recemb.EmbeddingBagCollection:
    """Table t with trained rows from this one on cached, between two others."""
    made = collection(seed, a=QR, t=replace(compression, cache=HOT), z=recemb.Dense())
    train(made, "atz", range(first, first + 5))
    assert made.cache_metrics()["t"].cached_rows == 5
    return made


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def refused(module: nn.Module, state: Mapping[str, Any], why: str, **settings: bool) -> None:
    before = tensors(module)
    with pytest.raises(ConfigError, match=why):
        module.load_state_dict(state, **settings)
    same = [torch.equal(value, before[name]) for name, value in module.state_dict().items()]
    assert all(same)
    assert len(same) == len(before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["ids", "owners", "steps", "refreshed", "counts"])
def test_floats_are_not_loaded_as_integers(name: str, strict: bool) -> None:
    key = f"embedding_bags.t.cache.{name}"
    state = tensors(cached())
    state[key] = state[key].float()
    refused(cached(9), state, rf"{key}: .*torch\.float32, not torch\.int64; convert it", strict=strict)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ids", torch.int32), ("owners", torch.int32), ("owners", torch.float64), ("votes", torch.float64)],
)
def test_counters_are_not_assigned_in_another_type(name: str, dtype: torch.dtype) -> None:
    key, live, own = f"embedding_bags.t.cache.{name}", cached(), cached(9, 20)
    state = tensors(live)
    state[key] = state[key].to(dtype)
    refused(own, state, rf"{key}: .*{dtype}, not .* assign=True .*convert it", assign=True)
    if dtype is not torch.float64 or name == "votes":
        # Copied, they are converted.
        own.load_state_dict(state)
        assert torch.equal(own.state_dict()[key], live.state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_parameters_are_not_assigned_as_anything_but_floats(dtype: torch.dtype) -> None:
    key, state = "embedding_bags.t.cache.weight", tensors(cached())
    state[key] = state[key].to(dtype)
    refused(cached(9), state, rf"{key}: .*{dtype}, not torch\.float32 and assign=True", assign=True)


def test_what_torch_would_have_refused_is_still_its_error() -> None:
    state = tensors(cached())
    state["embedding_bags.t.cache.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="has shape"):
        cached(9).load_state_dict(state)
    with pytest.raises(TypeError, match="state_dict to be dict-like"):
        cached(9).load_state_dict(None)  # type: ignore[arg-type]


def test_parameters_may_be_assigned_in_another_type() -> None:
    state, own = tensors(cached()), cached(9)
    state["embedding_bags.t.cache.weight"] = state["embedding_bags.t.cache.weight"].double()
    own.load_state_dict(state, assign=True)
    assert own.hot_row_caches()["t"].weight.dtype is torch.float64


def test_quantised_states_are_checked_likewise() -> None:
    made = collection(t=replace(TT, cache=HOT))
    train(made, "t", range(5))
    own, other = (
        quantize_embeddings(each, torch.int8) for each in (made, collection(t=replace(TT, cache=HOT)))
    )
    state, p = tensors(own), "embedding_bags.t."
    refused(other, {**state, p + "cache.ids": state[p + "cache.ids"].float()}, "not torch.int64; convert it")
    narrow = {**state, p + "cache.ids": state[p + "cache.ids"].int()}
    refused(other, narrow, "torch.int32, not torch.int64 and assign=True", assign=True)
    refused(other, {p + "cache.ids": state[p + "cache.ids"]}, "not the rows", strict=False)
    refused(
        other, {k: v for k, v in state.items() if "core_1" not in k}, "table 't': .*has core_0, core_2 and"
    )
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    other.load_state_dict({k: v for k, v in state.items() if ".cache." not in k}, strict=False)
    assert bool((other.state_dict()[p + "cache.ids"] == -1).all())


@pytest.mark.parametrize(
    ("theirs", "own", "why"),
    [
        (
            {"t": QR},
            {"t": replace(QR, cache=HOT)},
            "has no cache; build it without .*strict=False, which starts",
        ),
        (
            {"t": replace(QR, cache=HOT)},
            {"t": QR},
            r"has a cache .*HotRows\(rows=5\), or load with strict=F",
        ),
        ({"t": TT}, {"t": QR}, "has core_0, core_1, core_2 and this table has q, r: .* another compression"),
        (
            {"t": recemb.Dense()},
            {"t": QR},
            "has weight and this table has q, r: it is of another compression",
        ),
        ({}, {"t": QR}, "has nothing of it; load with strict=False"),
        ({"t": QR}, {}, "has q, r, and the collection has no such table; build it with the tables"),
        ({"s": ROBE, "t": ROBE}, {"s": ROBE, "t": replace(ROBE, cache=HOT)}, "has no cache; build"),
    ],
    ids=["no cache", "cache", "compression", "uncompressed", "no table", "table", "shared"],
)
def test_other_keys_are_refused_by_a_strict_load(
    theirs: dict[str, Compression], own: dict[str, Compression], why: str
) -> None:
    state = tensors(collection(1, a=QR, **theirs, z=recemb.Dense()))
    module = collection(2, a=QR, **own, z=recemb.Dense())
    for each in (module, copy.deepcopy(module)):
        refused(each, state, f"table 't': the state to load {why}")
    if "t" in own and "t" in theirs and own["t"].method != theirs["t"].method:
        return
    module.load_state_dict(state, strict=False)
    assert torch.equal(module.to_dense("z"), state["embedding_bags.z.weight"])


def test_a_cache_that_lacks_counters_is_refused_by_a_strict_load() -> None:
    state, own = tensors(cached()), cached(9)
    del state["embedding_bags.t.cache.scores"]
    state["embedding_bags.t.cache.more"] = torch.zeros(1)
    why = "table 't': .*lacks cache.scores and has cache.more, unlike this table; load with strict=False"
    refused(own, state, why)
    own.load_state_dict(state, strict=False)


def test_a_state_of_something_else_is_left_to_torch() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        cached().load_state_dict({"weight": torch.zeros(1)})
    cached().load_state_dict({}, strict=False)


def test_hooks_that_rename_keys_do_so_first() -> None:
    live, own = collection(1, t=QR), collection(2, t=QR)

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        state[prefix + "embedding_bags.t.q"] = state.pop(prefix + "embedding_bags.t.old")

    own.register_load_state_dict_pre_hook(rename)
    state = tensors(live)
    state["embedding_bags.t.old"] = state.pop("embedding_bags.t.q")
    own.load_state_dict(state)
    assert torch.equal(own.to_dense("t"), live.to_dense("t"))


@pytest.mark.parametrize("lacks", ["ids", "weight"])
@pytest.mark.parametrize("inside", [False, True])
def test_ids_are_not_loaded_without_their_rows_nor_rows_without_ids(lacks: str, inside: bool) -> None:
    own, state = cached(9, 20), tensors(cached())
    module = nn.ModuleDict({"sparse": own}) if inside else own
    prefix = "sparse." if inside else ""
    part = {prefix + name: value for name, value in state.items() if not name.endswith(f".cache.{lacks}")}
    refused(module, part, "table 't': the state to load has the .*ids.*an empty one", strict=False)
    refused(module, part, "table 't': the state to load (has the|lacks cache)")


@pytest.mark.parametrize("compression", [TT, QR, ROBE])
def test_a_table_loaded_without_a_cache_has_the_rows_that_are_loaded(compression: Any) -> None:
    plain = collection(3, a=QR, t=compression, z=recemb.Dense())
    own = cached(9, compression=compression)
    own.load_state_dict(tensors(plain), strict=False)
    for table in "atz":
        assert torch.equal(own.to_dense(table), plain.to_dense(table))
    cache, fresh = own.hot_row_caches()["t"], collection(a=QR, t=replace(compression, cache=HOT))
    for name, value in fresh.hot_row_caches()["t"].state_dict().items():
        assert torch.equal(cache.state_dict()[name], value), name
    train(own, "atz", range(7, 12))
    assert set(cache.ids.tolist()) == {*range(7, 12)}


def test_the_caches_of_a_shared_array_are_emptied_when_it_is_loaded() -> None:
    hot = replace(ROBE, cache=HOT)
    plain, own = collection(3, s=ROBE, t=ROBE), collection(4, s=hot, t=hot)
    train(own, "st", range(5))
    own.load_state_dict(tensors(plain), strict=False)
    for table in "st":
        assert torch.equal(own.to_dense(table), plain.to_dense(table))


def test_a_state_without_a_table_leaves_its_cache_alone() -> None:
    own = cached()
    before, other = tensors(own), tensors(cached(9, 20))
    own.load_state_dict({k: v for k, v in other.items() if ".t." not in k}, strict=False)
    for name, value in own.state_dict().items():
        assert torch.equal(value, (before if ".t." in name else other)[name]), name


@pytest.mark.parametrize("plain", [False, True], ids=["a state dict", "a plain dict"])
def test_a_checkpoint_with_a_cache_of_another_policy_is_refused_before_anything_has_changed(
    plain: bool, tmp_path: Path
) -> None:
    def made(seed: int, policy: Any) -> recemb.EmbeddingBagCollection:
        own = collection(seed, a=QR, t=replace(TT, cache=replace(HOT, policy=policy)))
        train(own, "at", range(seed, seed + 5))
        return own

    def state(own: nn.Module) -> dict[str, Any]:
        return {"model": dict(own.state_dict()) if plain else own.state_dict()}

    saved, other, same = made(0, "lru"), made(9, "lfu"), made(9, "lru")
    save_checkpoint(tmp_path, 1, state(saved), {})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    before = tensors(other)
    said = r"embedding_bags\.t\.cache\.owners: policy 'lru' in the checkpoint, 'lfu' in the state"
    with pytest.raises(CheckpointError, match=said):
        found.load(state(other))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    found.load(state(same))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in same.state_dict().items())
    # From before policies were noted.
    saved.hot_row_caches()["t"].owners[-1] = -1
    save_checkpoint(tmp_path, 2, state(saved), {})
    old = latest_checkpoint(tmp_path)
    assert old is not None
    old.load(state(other))


def test_sharded_collections_empty_their_caches_likewise() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharder = EmbeddingBagCollectionSharder()
        ways = {name: table_wise(0) for name in "atz"}
        plan = construct_module_sharding_plan(cached(), ways, sharder, world_size=1, device_type="cpu")
        own = DistributedModelParallel(
            nn.ModuleDict({"sparse": cached()}),
            device=torch.device("cpu"),
            sharders=[sharder],
            plan=ShardingPlan({"sparse": plan}),
        ).module["sparse"]
        own.load_state_dict(tensors(cached()))
        plain = collection(3, a=QR, t=TT, z=recemb.Dense())
        half = {k: v for k, v in tensors(cached()).items() if not k.endswith("cache.weight")}
        with pytest.raises(
            ConfigError, match="table 't': the state to load has the ids of its cache and not"
        ):
            own.load_state_dict(half, strict=False)
        cache = own.hot_row_caches()["t"]
        assert bool((cache.ids >= 0).all())
        own.load_state_dict(tensors(plain), strict=False)
        assert bool((cache.ids == -1).all())
    finally:
        dist.destroy_process_group()
