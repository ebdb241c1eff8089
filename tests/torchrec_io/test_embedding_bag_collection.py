"""recemb's EmbeddingBagCollection in torchrec's place: the same bits for uncompressed tables."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torchrec
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

import recemb
from recemb.errors import ConfigError
from recemb.spec import Compression

FEATURES = ("f0", "f1", "f2", "f3")
COMPRESSIONS: tuple[Compression, ...] = (
    recemb.Dense(),
    recemb.TensorTrain(rank=2),
    recemb.QuotientRemainder(collisions=2),
    recemb.QuotientRemainder(collisions=3, operation="add"),
    recemb.ROBE(compress_rate=1.5, block_size=2, use_sign=True),
    recemb.MixedDimension(dim=1),
)


def both(
    configs: Sequence[Any], *, is_weighted: bool = False
) -> tuple[recemb.EmbeddingBagCollection, torchrec.EmbeddingBagCollection]:
    """recemb's collection and torchrec's, with the same weights."""
    ours = recemb.EmbeddingBagCollection(tables=configs, is_weighted=is_weighted)
    plain = [
        torchrec.EmbeddingBagConfig(
            name=c.name,
            num_embeddings=c.num_embeddings,
            embedding_dim=c.embedding_dim,
            feature_names=list(c.feature_names),
            pooling=c.pooling,
            data_type=c.data_type,
        )
        for c in configs
    ]
    theirs = torchrec.EmbeddingBagCollection(tables=plain, is_weighted=is_weighted)
    with torch.no_grad():
        for config in plain:
            theirs.embedding_bags[config.name].weight.copy_(ours.to_dense(config.name))
    return ours, theirs


def config(name: str, rows: int, dim: int, features: Sequence[str], **more: Any) -> recemb.EmbeddingBagConfig:
    return recemb.EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features), **more
    )


def backward(output: Any) -> None:
    values = output.values()
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (values * direction).sum().backward()


def assert_same_bits(ours: Any, theirs: Any, kjt: Any) -> None:
    got, want = ours(kjt), theirs(kjt)
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    assert got.values().dtype == want.values().dtype
    assert torch.equal(got.values(), want.values())
    backward(got)
    backward(want)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = expected.pop(name).grad
        assert parameter.grad is not None
        assert other is not None
        assert torch.equal(parameter.grad, other)
    assert not expected


@st.composite
def lookups(draw: st.DrawFn) -> tuple[list[recemb.EmbeddingBagConfig], KeyedJaggedTensor, bool]:
    """Tables that share features, and a batch with its keys shuffled and one key too many."""
    is_weighted = draw(st.booleans())
    poolings = [PoolingType.SUM] if is_weighted else [PoolingType.SUM, PoolingType.MEAN]
    configs = [
        config(
            f"t{k}",
            draw(st.integers(3, 20)),
            draw(st.integers(1, 9)),
            draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3, unique=True)),
            pooling=draw(st.sampled_from(poolings)),
            data_type=DataType.FP32 if is_weighted else draw(st.sampled_from([DataType.FP32, DataType.FP16])),
        )
        for k in range(draw(st.integers(1, 4)))
    ]
    keys = draw(st.permutations([*{f for c in configs for f in c.feature_names}, "extra"]))
    # torchrec raises IndexError on 0 samples; that case has a test of its own.
    size = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 4), min_size=size * len(keys), max_size=size * len(keys)))
    limits = {
        key: min([c.num_embeddings for c in configs if key in c.feature_names], default=10**6) for key in keys
    }
    ids = [
        draw(st.integers(0, limits[key] - 1))
        for k, key in enumerate(keys)
        for _ in range(sum(lengths[k * size : (k + 1) * size]))
    ]
    weights = [draw(st.floats(-2, 2, width=32)) for _ in ids] if is_weighted else None
    kjt = KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor(ids, dtype=draw(st.sampled_from([torch.int64, torch.int32]))),
        lengths=torch.tensor(lengths, dtype=draw(st.sampled_from([torch.int64, torch.int32]))),
        weights=None if weights is None else torch.tensor(weights),
    )
    return configs, kjt, is_weighted


@given(lookups())
@settings(derandomize=True, deadline=None, max_examples=120)
def test_uncompressed_tables_give_torchrecs_bits(
    drawn: tuple[list[recemb.EmbeddingBagConfig], KeyedJaggedTensor, bool],
) -> None:
    configs, kjt, is_weighted = drawn
    if kjt.values().dtype != kjt.lengths().dtype:
        # nn.EmbeddingBag wants ids and offsets of one type; recemb widens both.
        ours, theirs = both(configs, is_weighted=is_weighted)
        wide = KeyedJaggedTensor(kjt.keys(), kjt.values().long(), kjt.weights_or_none(), kjt.lengths().long())
        assert torch.equal(ours(kjt).values(), theirs(wide).values())
        return
    assert_same_bits(*both(configs, is_weighted=is_weighted), kjt)


@given(lookups(), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_compressed_tables_equal_torchrec_on_their_dense_rows(
    drawn: tuple[list[recemb.EmbeddingBagConfig], KeyedJaggedTensor, bool], data: st.DataObject
) -> None:
    configs, kjt, is_weighted = drawn
    mixed = [
        config(
            c.name,
            c.num_embeddings + 10,
            c.embedding_dim,
            c.feature_names,
            pooling=c.pooling,
            compression=data.draw(st.sampled_from(COMPRESSIONS)),
        )
        for c in configs
    ]
    ours, theirs = both(mixed, is_weighted=is_weighted)
    wide = KeyedJaggedTensor(kjt.keys(), kjt.values().long(), kjt.weights_or_none(), kjt.lengths().long())
    got, want = ours(kjt), theirs(wide)
    assert got.keys() == want.keys()
    assert got.length_per_key() == want.length_per_key()
    torch.testing.assert_close(got.values(), want.values(), rtol=1e-5, atol=1e-6)
    backward(got)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def shared_configs(**more: Any) -> list[recemb.EmbeddingBagConfig]:
    return [config("t1", 10, 4, ["f0", "f1"], **more), config("t2", 20, 6, ["f1", "f2"], **more)]


def small_kjt(keys: Sequence[str] = ("f0", "f1", "f2"), **more: Any) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.tensor([0, 1, 9, 3, 3, 2, 5, 9]),
        lengths=torch.tensor([2, 0, 1, 0, 2, 3]),
        **more,
    )


def test_f10_one_feature_in_two_tables_has_a_key_per_table() -> None:
    ours, theirs = both(shared_configs())
    assert ours(small_kjt()).keys() == ["f0", "f1@t1", "f1@t2", "f2"] == theirs(small_kjt()).keys()
    assert_same_bits(ours, theirs, small_kjt())


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: f"{c.method}")
def test_f10_the_order_of_keys_changes_nothing(compression: Compression) -> None:
    ours = recemb.EmbeddingBagCollection(tables=shared_configs(compression=compression))
    kjt = small_kjt()
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        assert torch.equal(ours(kjt.permute(order)).values(), ours(kjt).values())


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: f"{c.method}")
@pytest.mark.parametrize("lengths", [[], [0] * 6], ids=["0-rows", "all-bags-empty"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_f9_batches_without_ids(compression: Compression, lengths: list[int], is_weighted: bool) -> None:
    ours = recemb.EmbeddingBagCollection(
        tables=shared_configs(compression=compression), is_weighted=is_weighted
    )
    empty = torch.empty(0, dtype=torch.int64)
    forms = [
        KeyedJaggedTensor(
            keys=["f0", "f1", "f2"],
            values=empty,
            weights=torch.empty(0) if is_weighted else None,
            **{name: torch.tensor(value, dtype=torch.int64)},
        )
        for name, value in (("lengths", lengths), ("offsets", [0] * (len(lengths) + 1)))
    ]
    for kjt in forms:
        ours.zero_grad()
        output = ours(kjt)
        assert torch.equal(output.values(), torch.zeros(len(lengths) // 3, 20))
        assert output.keys() == ["f0", "f1@t1", "f1@t2", "f2"]
        output.values().sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: f"{c.method}")
def test_a_tensordict_is_taken(compression: Compression) -> None:
    ours, theirs = both(shared_configs(compression=compression))
    bags = {
        "f2": JaggedTensor(values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 2])),
        "f0": JaggedTensor(values=torch.tensor([9]), lengths=torch.tensor([0, 1])),
        "f1": JaggedTensor(values=torch.tensor([4, 4]), lengths=torch.tensor([2, 0])),
    }
    got, want = ours(TensorDict(bags)), theirs(TensorDict(bags))
    torch.testing.assert_close(got.values(), want.values(), rtol=1e-5, atol=1e-6)
    kjt = KeyedJaggedTensor(
        keys=["f0", "f1", "f2"],
        values=torch.tensor([9, 4, 4, 1, 2, 3]),
        lengths=torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    assert torch.equal(got.values(), ours(kjt).values())


def test_it_is_a_torchrec_collection() -> None:
    configs = shared_configs(compression=recemb.TensorTrain(rank=2))
    ours = recemb.EmbeddingBagCollection(tables=configs, device="cpu")
    assert isinstance(ours, torchrec.EmbeddingBagCollection)
    assert ours.embedding_bag_configs() == configs
    assert ours.is_weighted() is False
    assert recemb.EmbeddingBagCollection(tables=shared_configs(), is_weighted=True).is_weighted() is True
    assert ours.device == torch.device("cpu")
    assert recemb.EmbeddingBagCollection(tables=configs, device=torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
def test_state_dicts_go_both_ways(data_type: DataType) -> None:
    ours, theirs = both(shared_configs(data_type=data_type))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.state_dict()) == ["embedding_bags.t1.weight", "embedding_bags.t2.weight"]
    fresh, plain = both(shared_configs(data_type=data_type))
    plain.load_state_dict(ours.state_dict())
    fresh.load_state_dict(theirs.state_dict())
    for name in ("t1", "t2"):
        assert torch.equal(plain.embedding_bags[name].weight, ours.to_dense(name))
        assert torch.equal(fresh.to_dense(name), theirs.embedding_bags[name].weight)


def test_state_dict_keys_of_compressed_tables() -> None:
    robe = recemb.ROBE(compress_rate=1, block_size=4, group="g")
    ours = recemb.EmbeddingBagCollection(
        tables=[
            config("a", 10, 4, ["a"], compression=recemb.TensorTrain(rank=2)),
            config("b", 10, 4, ["b"], compression=recemb.QuotientRemainder(collisions=3)),
            config("c", 10, 4, ["c"], compression=robe),
            config("d", 10, 4, ["d"], compression=robe),
            config("e", 10, 4, ["e"], compression=recemb.MixedDimension(dim=2)),
        ]
    )
    stored = ["a.core_0", "a.core_1", "a.core_2", "b.q", "b.r", "c.array", "e.e", "e.p"]
    assert list(ours.state_dict()) == [f"embedding_bags.{key}" for key in stored]
    assert [name for name, _ in ours.named_parameters()] == list(ours.state_dict())


def test_copies_and_meta_round_trips() -> None:
    robe = recemb.ROBE(compress_rate=1, block_size=4)
    configs = [
        config("c", 10, 4, ["f0"], compression=robe),
        config("d", 9, 4, ["f1", "f2"], compression=robe),
    ]
    kjt = small_kjt()
    kjt.values().clamp_(max=8)
    ours = recemb.EmbeddingBagCollection(tables=configs)
    expected = ours(kjt).values()
    # After a look-up: what has been worked out for it stays out of copies.
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    meta = recemb.EmbeddingBagCollection(tables=configs, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert all(p.isfinite().all() for p in meta.parameters())
    meta.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(kjt).values(), expected)
    assert torch.equal(meta(kjt).values(), expected)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda c: f"{c.method}")
def test_tables_live_on_torchs_default_device(compression: Compression) -> None:
    tables = [config("t", 40, 8, ["f0"], compression=compression, init_fn=torch.nn.init.normal_)]
    with torch.device("meta"):
        ours = recemb.EmbeddingBagCollection(tables=tables)
        theirs = torchrec.EmbeddingBagCollection(tables=tables)
        assert recemb.EmbeddingBagCollection(tables=tables, device="cpu").device == torch.device("cpu")
    assert ours.device == theirs.device == torch.device("meta")
    assert all(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])


def test_plain_torchrec_configs_are_taken() -> None:
    plain = [
        torchrec.EmbeddingBagConfig(
            name="t1", num_embeddings=10, embedding_dim=4, feature_names=["f0", "f1"]
        ),
        torchrec.EmbeddingBagConfig(
            name="t2", num_embeddings=20, embedding_dim=6, feature_names=["f1", "f2"]
        ),
    ]
    assert_same_bits(*both(plain), small_kjt())


def test_a_table_without_features_serves_its_own_name() -> None:
    ours = recemb.EmbeddingBagCollection(tables=[config("f0", 10, 4, [])])
    assert ours(small_kjt()).keys() == ["f0"]


def test_weight_init_range_and_custom_init_fn_are_honoured_uncompressed() -> None:
    ranged = recemb.EmbeddingBagCollection(
        tables=[config("t", 500, 8, ["f0"], weight_init_min=0.25, weight_init_max=0.5)]
    )
    weight = ranged.to_dense("t")
    assert 0.25 <= float(weight.min()) < 0.26
    assert 0.49 < float(weight.max()) <= 0.5
    constant = config("t", 5, 8, ["f0"], init_fn=lambda w: torch.nn.init.constant_(w, 3.0))
    assert recemb.EmbeddingBagCollection(tables=[constant]).to_dense("t").eq(3).all()


@pytest.mark.parametrize("compression", COMPRESSIONS[1:], ids=lambda c: f"{c.method}")
@pytest.mark.parametrize(
    "init",
    [
        {"weight_init_min": -0.9, "weight_init_max": 0.9},
        {"init_fn": lambda w: torch.nn.init.normal_(w, 0.0, 0.9 / 3**0.5)},
        {"init_fn": partial(torch.nn.init.uniform_, a=-0.9, b=0.9)},
    ],
    ids=["range", "normal", "partial-uniform"],
)
def test_the_scale_of_the_init_is_honoured_compressed(compression: Compression, init: dict[str, Any]) -> None:
    squares = []
    for seed in range(30):
        torch.manual_seed(seed)
        ours = recemb.EmbeddingBagCollection(
            tables=[config("t", 400, 8, ["f0"], compression=compression, **init)]
        )
        squares.append(float(ours.to_dense("t").square().mean()))
    assert sum(squares) / 30 == pytest.approx(0.9**2 / 3, rel=0.2)


def test_measuring_an_init_fn_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    recemb.EmbeddingBagCollection(
        tables=[
            config("t", 40, 8, ["f0"], compression=recemb.TensorTrain(rank=2), init_fn=torch.nn.init.normal_)
        ],
        device="meta",
    )
    assert torch.equal(torch.rand(3), expected)


def test_to_dense_and_from_dense_by_name() -> None:
    ours = recemb.EmbeddingBagCollection(tables=shared_configs(compression=recemb.TensorTrain(rank=64)))
    weight = torch.randn(10, 4)
    ours.from_dense("t1", weight)
    torch.testing.assert_close(ours.to_dense("t1"), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.to_dense("t1", 3, 7), weight[3:7], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"no table 'missing'.*t1.*t2"):
        ours.to_dense("missing")
    with pytest.raises(ConfigError, match=r"'t1'.*\[3, 11\)"):
        ours.to_dense("t1", 3, 11)
