"""``quantize_embeddings`` and the collection it makes."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torchrec
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.inference.modules import quantize_embeddings as torchrec_quantize
from torchrec.modules.embedding_configs import DataType
from torchrec.quant.embedding_modules import (
    EmbeddingBagCollection as TorchrecQuantEmbeddingBagCollection,
)
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types

from recemb import Compression, Dense, EmbeddingBagCollection, EmbeddingBagConfig, TensorTrain
from recemb.errors import BatchError, ConfigError
from recemb.torchrec_io import QuantEmbeddingBagCollection, quantize_embeddings
from tests.torchrec_io.inference.models import COMPRESSIONS, DIM, KEYS, ROWS, batch, collection, request

DTYPES = [torch.int8, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_keys_order_and_values_are_the_float_modules(dtype: torch.dtype, weighted: bool) -> None:
    trained = collection(weighted)
    served = quantize_embeddings(trained, dtype)
    assert isinstance(served, QuantEmbeddingBagCollection)
    for size in (0, 1, 5):
        features = batch(*request(size, weighted))
        expected, pooled = trained(features), served(features)
        assert pooled.keys() == expected.keys()
        assert pooled.length_per_key() == expected.length_per_key()
        assert pooled.values().dtype is torch.float32
        assert not pooled.values().requires_grad
        close = 0.25 if dtype is torch.int8 else 0.02
        torch.testing.assert_close(pooled.values(), expected.values().detach(), rtol=0, atol=close)
    # All bags empty.
    assert not served(batch(*request(3, weighted, most=1))).values().any()


def test_torchrec_alone_needs_to_be_told_and_then_gives_the_same() -> None:
    trained = collection()
    features = batch(*request(4))
    left = torchrec_quantize(nn.Sequential(trained), torch.qint8, inplace=False)
    assert type(left[0]) is EmbeddingBagCollection
    told = torchrec_quantize(
        nn.Sequential(trained),
        torch.qint8,
        inplace=False,
        additional_qconfig_spec_keys=[EmbeddingBagCollection],
        additional_mapping={EmbeddingBagCollection: QuantEmbeddingBagCollection},
    )
    ours = quantize_embeddings(trained, torch.int8)
    assert torch.equal(told[0](features).values(), ours(features).values())


def test_a_model_is_copied_unless_told_otherwise_and_torchrecs_collections_are_quantised_too() -> None:
    plain = torchrec.EmbeddingBagCollection(
        tables=[torchrec.EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])]
    )
    model = nn.ModuleDict({"ours": collection(), "theirs": plain})
    copied = quantize_embeddings(model, torch.int8)
    assert isinstance(model["ours"], EmbeddingBagCollection)
    assert type(copied["theirs"]) is TorchrecQuantEmbeddingBagCollection
    assert quantize_embeddings(model, torch.int8, inplace=True) is model
    assert isinstance(model["ours"], QuantEmbeddingBagCollection)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_uncompressed_tables_are_torchrecs_own(dtype: torch.dtype) -> None:
    trained = collection(compressions=(Dense(), Dense()))
    theirs = torchrec.EmbeddingBagCollection(tables=trained.embedding_bag_configs())
    theirs.load_state_dict(trained.state_dict())
    expected = torchrec_quantize(nn.Sequential(theirs), dtype, inplace=False)[0]
    served = quantize_embeddings(trained, dtype)
    assert type(served.dense) is TorchrecQuantEmbeddingBagCollection
    for name, weight in expected.state_dict().items():
        assert torch.equal(served.state_dict()[name], weight)
    ids, lengths = request(6)
    features = batch(ids, lengths)
    pooled, other = served(features), expected(features)
    for key in other.keys():  # noqa: SIM118 - a KeyedTensor is no dict
        torch.testing.assert_close(pooled[key], other[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_torchrecs_module_and_the_engine_read_the_same_weights(dtype: torch.dtype, weighted: bool) -> None:
    served = quantize_embeddings(collection(weighted), dtype)
    features = batch(*request(5, weighted))
    at_once = served(features)
    with patch("recemb.torchrec_io.inference.collection.in_place", return_value=None):
        served._memo.clear()
        in_parts = served(features)
    assert in_parts.keys() == at_once.keys()
    torch.testing.assert_close(in_parts.values(), at_once.values(), rtol=2e-6, atol=2e-6)


def test_scales_apart_from_weights_are_read_where_they_are() -> None:
    trained = collection()
    expected = quantize_embeddings(trained, torch.int8)
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types(trained, [EmbeddingBagCollection])
    served = quantize_embeddings(trained, torch.int8)
    state = served.state_dict()
    assert state["embedding_bags.t1.weight"].shape == (ROWS + 1, DIM)
    assert state["embedding_bags.t1.weight_qscale"].shape == (ROWS + 1, 1)
    features = batch(*request(5))
    assert torch.equal(served(features).values(), expected(features).values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_dict_makes_the_same_collection_elsewhere(dtype: torch.dtype) -> None:
    trained = collection()
    served = quantize_embeddings(trained, dtype)
    names = {name for name in trained.state_dict() if ".cache." not in name}
    kept = {name for name in served.state_dict() if ".cache." not in name}
    assert kept == names
    file = io.BytesIO()
    torch.save(served.state_dict(), file)
    file.seek(0)
    other = QuantEmbeddingBagCollection(served.embedding_bag_configs())
    features = batch(*request(5))
    assert not other(features).values().any()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(features).values(), served(features).values())
    assert torch.equal(copy.deepcopy(served).to("cpu")(features).values(), served(features).values())


def test_cached_rows_are_refused_by_a_collection_without_them() -> None:
    served = quantize_embeddings(collection(), torch.int8)
    configs = copy.deepcopy(served.embedding_bag_configs())
    for config in configs:
        if not isinstance(config.compression, Dense):
            config.compression = replace(config.compression, cache=None)
    other = QuantEmbeddingBagCollection(configs)
    with pytest.raises(
        ConfigError, match=r"table 't7': the state to load has a cache and this table has none"
    ):
        other.load_state_dict(served.state_dict())


@pytest.mark.parametrize("looked_up", [False, True])
def test_weights_cannot_be_assigned_beside_torchrecs_tables(looked_up: bool) -> None:
    served = quantize_embeddings(collection(), torch.int8)
    features, state = batch(*request(5)), served.state_dict()
    other = nn.Sequential(QuantEmbeddingBagCollection(served.embedding_bag_configs()))
    if looked_up:
        other(features)
    with pytest.raises(ConfigError, match="load without assign=True"):
        other.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)
    assert not other(features).values().any()
    # Compressed tables take them.
    compressed = collection(compressions=COMPRESSIONS[:1])
    served = quantize_embeddings(compressed, torch.int8)
    alone = QuantEmbeddingBagCollection(served.embedding_bag_configs())
    alone.load_state_dict(served.state_dict(), assign=True)
    features = KeyedJaggedTensor(keys=["f0", "shared"], values=torch.arange(4), lengths=torch.ones(4).long())
    assert torch.equal(alone(features).values(), served(features).values())


def test_memory_is_what_is_stored() -> None:
    trained = collection()
    previous = trained.memory().total.num_bytes
    for dtype in (torch.float16, torch.int8):
        served = quantize_embeddings(trained, dtype)
        tensors = served.state_dict().values()
        report = served.memory()
        assert report.total.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert report.total.num_bytes < previous
        assert [record.method for record in report] == [compression.method for compression in COMPRESSIONS]
        previous = report.total.num_bytes


def test_output_and_tables_of_other_types() -> None:
    trained = collection()
    features = batch(*request(5))
    half = quantize_embeddings(trained, torch.float16, output_dtype=torch.float16)
    assert half(features).values().dtype is torch.float16
    assert half.output_dtype() is torch.float16
    mixed = quantize_embeddings(
        trained, torch.int8, per_table_weight_dtype={"t0": torch.float32, "t1": torch.float16}
    )
    pooled, expected = mixed(features), trained(features)
    torch.testing.assert_close(pooled["f0"], expected["f0"].detach(), rtol=0, atol=0)
    torch.testing.assert_close(pooled["f1"], expected["f1"].detach(), rtol=0, atol=1e-3)
    assert mixed.state_dict()["embedding_bags.t2.q"].dtype is torch.uint8


def test_a_bad_id_is_named_before_anything_is_computed() -> None:
    served = quantize_embeddings(collection(), torch.int8)
    for key, table, rows in (("f3", "t3", ROWS + 3), ("f1", "t1", ROWS + 1)):
        lengths = torch.ones(len(KEYS), 2, dtype=torch.int64)
        ids = torch.zeros(lengths.numel(), dtype=torch.int64)
        ids[2 * KEYS.index(key) + 1] = rows
        message = rf"feature '{key}' \(table '{table}'\), sample 1, .* is outside \[0, {rows}\)"
        with pytest.raises(BatchError, match=message):
            served(batch(ids, lengths))
        with patch("recemb.torchrec_io.inference.collection.in_place", return_value=None):
            served._memo.clear()
            with pytest.raises(BatchError, match=message):
                served(batch(ids, lengths))


def test_what_cannot_be_stored_is_refused() -> None:
    trained = collection()
    with pytest.raises(ConfigError, match=r"torch\.bfloat16: compressed parameters are stored in"):
        quantize_embeddings(trained, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"'t4' \(INT8\) and 't6' \(FLOAT16\) share their parameters"):
        quantize_embeddings(trained, torch.int8, per_table_weight_dtype={"t6": torch.float16})
    with pytest.raises(ConfigError, match="has no qconfig"):
        QuantEmbeddingBagCollection.from_float(trained)
    trained.embedding_bags["t2"].q.data[3, 1] = float("inf")
    with pytest.raises(ConfigError, match="table 't2': q has a weight of inf in rows 0 to"):
        quantize_embeddings(trained, torch.int8)


@pytest.mark.parametrize(
    ("dtype", "weight", "refused"),
    [
        *((dtype, weight, True) for dtype in DTYPES for weight in (float("nan"), float("inf"), 7e4, -7e4)),
        (torch.float32, float("nan"), True),
        (torch.float32, 7e4, False),
    ],
)
@pytest.mark.parametrize("compression", [Dense(), TensorTrain(rank=8)])
def test_weights_beyond_a_type_are_refused_whatever_the_method(
    compression: Compression, dtype: torch.dtype, weight: float, refused: bool
) -> None:
    trained = collection(compressions=(TensorTrain(rank=8), compression))
    table = trained.embedding_bags["t1"]
    name, parameter = next(iter(table.named_parameters()))
    parameter.data[3, 1] = weight
    if not refused:
        assert type(quantize_embeddings(trained, dtype)) is QuantEmbeddingBagCollection
        return
    model = nn.Sequential(trained)
    said = rf"table 't1': {name} has a weight of (nan|inf|70000\.0) in rows 0 to"
    with pytest.raises(ConfigError, match=said):
        quantize_embeddings(model, dtype, inplace=True)
    assert model[0] is trained


def test_a_model_is_as_it_was_where_its_second_collection_is_refused() -> None:
    first, plain = collection(compressions=(TensorTrain(rank=8), Dense())), nn.Linear(2, 2)
    second = collection(compressions=(TensorTrain(rank=8),))
    second.embedding_bags["t0"].core_0.data[0, 0] = float("nan")
    model = nn.Sequential(nn.Sequential(plain, first), nn.ModuleDict({"ebc": second}))
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="table 't0': core_0 has a weight of nan"):
        quantize_embeddings(model, torch.int8, inplace=True)
    assert list(model.state_dict()) == keys
    assert all(module.training for module in model.modules())
    assert model[0][0] is plain
    assert model[0][1] is first
    assert model[1]["ebc"] is second
    second.embedding_bags["t0"].core_0.data[0, 0] = 0
    quantize_embeddings(model, torch.int8, inplace=True)
    assert isinstance(model[0][1], QuantEmbeddingBagCollection)
    assert isinstance(model[1]["ebc"], QuantEmbeddingBagCollection)


def test_a_model_is_as_it_was_where_its_second_collection_is_interrupted() -> None:
    """As by Ctrl-C: no Exception."""
    trained = [collection(compressions=(TensorTrain(rank=8), Dense())) for _ in range(2)]
    model = nn.Sequential(*trained)
    make = QuantEmbeddingBagCollection.from_float

    def interrupted(module: EmbeddingBagCollection) -> QuantEmbeddingBagCollection:
        if module is trained[1]:
            raise KeyboardInterrupt
        return make(module)

    with (
        patch.object(QuantEmbeddingBagCollection, "from_float", side_effect=interrupted) as made,
        pytest.raises(KeyboardInterrupt),
    ):
        quantize_embeddings(model, torch.int8, inplace=True)
    assert made.call_count == 2
    assert list(model) == trained
    assert all(module.training for module in model.modules())
    assert not any(hasattr(module, "qconfig") for module in model.modules())


def test_a_type_for_a_table_that_is_not_there_is_refused() -> None:
    plain = torchrec.EmbeddingBagCollection(
        tables=[torchrec.EmbeddingBagConfig(name="p", num_embeddings=9, embedding_dim=8, feature_names=["f"])]
    )
    model = nn.Sequential(collection(), plain)
    with pytest.raises(ConfigError, match=r"per_table_weight_dtype: no table 'tt'.*'t0'.*'p'"):
        quantize_embeddings(model, torch.int8, per_table_weight_dtype={"tt": torch.float16})
    served = quantize_embeddings(model, torch.int8, per_table_weight_dtype={"p": torch.float16})
    assert served[1].embedding_bag_configs()[0].data_type == DataType.FP16


def test_a_model_without_our_collections_takes_every_type_of_torchrecs() -> None:
    plain = torchrec.EmbeddingBagCollection(
        tables=[torchrec.EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])]
    )
    served = quantize_embeddings(nn.Sequential(plain), torch.quint4x2)
    assert type(served[0]) is TorchrecQuantEmbeddingBagCollection
    with pytest.raises(ConfigError, match=r"quint4x2: compressed parameters are stored in"):
        quantize_embeddings(nn.Sequential(plain, collection()), torch.quint4x2)


def test_torch_compile_gives_the_same() -> None:
    served = quantize_embeddings(collection(), torch.int8)
    features = batch(*request(5))
    expected = served(features).values()
    compiled = torch.compile(served, backend="eager")
    assert torch.equal(compiled(features).values(), expected)


def test_tables_without_kernels_are_looked_up_by_torch() -> None:
    served = quantize_embeddings(collection(compressions=(TensorTrain(rank=8), Dense())), torch.int8)
    features = batch(*request(5))
    expected = served(features).values()
    for table in [*served.embedding_bags.values(), *served._tables().values()]:
        table.native_shape = lambda: None  # type: ignore[method-assign]
        table.memo.clear()
    torch.testing.assert_close(served(features).values(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_uncompressed_table_of_an_odd_dim_is_refused_in_int8(inplace: bool) -> None:
    """fbgemm has no such rows; compressed tables do."""
    tables = [
        EmbeddingBagConfig(
            name=name, num_embeddings=20, embedding_dim=3, feature_names=[name], compression=compression
        )
        for name, compression in (("t", TensorTrain(rank=2)), ("plain", Dense()))
    ]
    model = nn.Sequential(EmbeddingBagCollection(tables=tables))
    asked = "table 'plain' is uncompressed and its embedding_dim=3 odd.*{'plain': torch.float16}"
    with pytest.raises(ConfigError, match=asked):
        quantize_embeddings(model, torch.int8, inplace=inplace)
    assert type(model[0]) is EmbeddingBagCollection
    features = KeyedJaggedTensor(["t", "plain"], torch.tensor([3, 4]), lengths=torch.tensor([1, 1]))
    expected = model(features).values().detach()
    dtypes = {"plain": torch.float16}
    served = quantize_embeddings(model, torch.int8, inplace=inplace, per_table_weight_dtype=dtypes)
    torch.testing.assert_close(served(features).values(), expected, rtol=0, atol=0.02)
