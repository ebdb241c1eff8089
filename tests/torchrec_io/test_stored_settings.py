"""State dicts whose parameters fit by name and shape, and are other rows to another table."""

from __future__ import annotations

import copy
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

import recemb
from recemb.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from recemb.errors import CheckpointError, ConfigError
from recemb.spec import Compression
from recemb.torchrec_io import get_sharders, quantize_embeddings
from tests.checkpoint.ranks import on_ranks

QR = recemb.QuotientRemainder(collisions=4, operation="mult")
DENSE = recemb.Dense()
ROBE = recemb.ROBE(compress_rate=4, block_size=4)
PAIRS: dict[str, tuple[Compression, Compression, str]] = {
    "qr": (QR, replace(QR, operation="add"), r"operation='mult'.*operation='add'"),
    "robe seed": (ROBE, replace(ROBE, seed=1), "seed=0.*seed=1"),
    "robe sign": (ROBE, replace(ROBE, use_sign=True), "use_sign=False.*use_sign=True"),
    "tt": (
        recemb.TensorTrain(rank=4, dim_shape=(2, 2, 2)),
        recemb.TensorTrain(rank=(2, 8), dim_shape=(4, 2, 1)),
        r"dim_shape=\[2, 2, 2\].*dim_shape=\[4, 2, 1\]",
    ),
}
by_pair = pytest.mark.parametrize("pair", PAIRS)


def collection(**compressions: Compression) -> recemb.EmbeddingBagCollection:
    return recemb.EmbeddingBagCollection(
        tables=[
            recemb.EmbeddingBagConfig(
                name=name, num_embeddings=40, embedding_dim=8, feature_names=[name], compression=compression
            )
            for name, compression in compressions.items()
        ]
    )


def model(**compressions: Compression) -> nn.ModuleDict:
    """With the collection inside, where its keys have a prefix."""
    return nn.ModuleDict({"dense": nn.Linear(2, 2), "sparse": collection(**compressions)})


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        ({"rows": 3}, r"its cache has 3 rows in the state to load and 5 here.*HotRows\(rows=3\)"),
        ({"policy": "lru"}, r"policy='lru', and it has policy='lfu'.*HotRows\(policy='lru'\)"),
    ],
    ids=["rows", "policy"],
)
def test_a_state_of_another_cache_is_refused_before_any_table_has_changed(
    theirs: dict[str, Any], why: str, strict: bool
) -> None:
    hot = recemb.HotRows(rows=5)
    state = saved(model(a=QR, t=replace(QR, cache=replace(hot, **theirs))))
    own = model(a=QR, t=replace(QR, cache=hot))
    before = {name: value.clone() for name, value in own["sparse"].state_dict().items()}
    with pytest.raises(ConfigError, match=f"table 't': .*{why}"):
        own.load_state_dict(state, strict=strict)
    for name, value in own["sparse"].state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("key", "change", "why"),
    [
        ("t.q", lambda own: own[:-1], r"has shape \(9, 8\), not \(10, 8\)"),
        ("t.r", lambda own: own.tolist(), "has a list, not a tensor"),
        ("z.weight", lambda own: own[:, :4], r"has shape \(40, 4\), not \(40, 8\)"),
        ("t.cache.scores", lambda own: own.repeat(2), r"has shape \(10,\), not \(5,\)"),
        ("t.cache.owners", lambda own: own[:0], r"has shape \(0,\), not \(33,\)"),
        ("t.cache.steps", lambda own: own[0], r"has shape \(\), not \(1,\)"),
    ],
    ids=["rows", "no tensor", "dim", "scores", "owners", "steps"],
)
def test_a_state_of_other_shapes_is_refused_before_any_table_has_changed(
    key: str, change: Callable[[Tensor], Any], why: str
) -> None:
    """Though the tables before it, and the others of its arrays, fit."""
    methods: dict[str, Compression] = {"a": QR, "t": replace(QR, cache=recemb.HotRows(rows=5)), "z": DENSE}
    refused(model(**methods), model(**methods).state_dict(), f"sparse.embedding_bags.{key}", change, why)


@pytest.mark.parametrize("key", ["t.q", "z.weight"])
def test_a_quantised_state_of_other_shapes_is_refused_likewise(key: str) -> None:
    own, other = (quantize_embeddings(model(a=QR, t=QR, z=DENSE), torch.int8) for _ in range(2))
    refused(own, other.state_dict(), f"sparse.embedding_bags.{key}", lambda own: own[:-1], "has shape ")


def refused(
    own: nn.Module, state: dict[str, Any], key: str, change: Callable[[Tensor], Any], why: str
) -> None:
    """Loading ``state`` with one value changed raises and changes nothing; without that it loads."""
    before = {name: value.clone() for name, value in own.state_dict().items() if "sparse" in name}
    with pytest.raises(ConfigError, match=f"{key}: the state to load {why}"):
        own.load_state_dict({**state, key: change(state[key])})
    for name, value in before.items():
        assert torch.equal(own.state_dict()[name], value), name
    own.load_state_dict(state)
    assert not all(torch.equal(own.state_dict()[name], value) for name, value in before.items())


@by_pair
def test_a_state_of_other_settings_is_refused_before_any_table_has_changed(pair: str) -> None:
    first, second, why = PAIRS[pair]
    state = saved(model(a=QR, t=first))
    own = model(a=QR, t=second)
    for other in (own, copy.deepcopy(own)):
        before = parameters(other["sparse"])
        with pytest.raises(ConfigError, match=f"table 't': .*{why}.*build the table as it was saved"):
            other.load_state_dict(state)
        assert all(map(torch.equal, before, parameters(other["sparse"])))


@by_pair
def test_the_numbers_load_where_nothing_says_what_they_are_of(pair: str) -> None:
    first, second, _ = PAIRS[pair]
    state, other = saved(collection(t=first)), collection(t=second)
    other.load_state_dict(dict(state))
    assert all(map(torch.equal, state.values(), parameters(other)))


@by_pair
def test_equal_settings_load_and_add_no_key(pair: str) -> None:
    for compression in PAIRS[pair][:2]:
        own, state = model(t=compression), saved(model(t=compression))
        assert list(state) == [name for name, _ in own.named_parameters()]
        own.load_state_dict(state)
        assert all(map(torch.equal, state.values(), parameters(own)))


def test_tables_of_which_a_state_holds_nothing_are_not_asked_about() -> None:
    state = collection(a=recemb.Dense(), t=QR).state_dict()
    for key in ("q", "r"):
        del state[f"embedding_bags.t.{key}"]
    own = collection(a=recemb.Dense(), t=replace(QR, operation="add"))
    own.load_state_dict(state, strict=False)
    assert torch.equal(own.to_dense("a"), state["embedding_bags.a.weight"])


def test_a_table_is_not_taken_for_another_whose_name_begins_like_its_own() -> None:
    theirs = collection(a=QR, ab=QR)
    state = theirs.state_dict()
    for key in ("q", "r"):
        del state[f"embedding_bags.a.{key}"]
    own = collection(a=replace(QR, operation="add"), ab=QR)
    own.load_state_dict(state, strict=False)
    assert torch.equal(own.to_dense("ab"), theirs.to_dense("ab"))


def robe_pairs(*pairs: Sequence[str]) -> recemb.EmbeddingBagCollection:
    groups = {name: f"{len(pairs)} {k}" for k, pair in enumerate(pairs) for name in pair}
    return collection(**{name: replace(ROBE, group=groups[name]) for name in "abcd"})


def test_an_array_of_other_tables_is_refused() -> None:
    """Both have the keys a.array and b.array, of equal shapes."""
    with pytest.raises(ConfigError, match=r"table 'c'.*array_shared_with='b'.*array_shared_with='a'"):
        robe_pairs("ac", "bd").load_state_dict(robe_pairs("ad", "bc").state_dict())


@pytest.mark.parametrize(("saved_from", "to"), [("ba", "b"), ("b", "ba"), ("bc", "ba")])
def test_an_array_loads_whoever_else_shares_it(saved_from: str, to: str) -> None:
    def made(names: str) -> recemb.EmbeddingBagCollection:
        # Of one size, however many share it.
        return collection(**{name: replace(ROBE, compress_rate=2 * len(names)) for name in names})

    theirs, own = made(saved_from), made(to)
    own.load_state_dict(theirs.state_dict())
    assert torch.equal(own.to_dense("b"), theirs.to_dense("b"))


def test_an_array_loads_whatever_its_group_is_called() -> None:
    first, second = collection(a=replace(ROBE, group="x")), collection(a=replace(ROBE, group="y"))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.to_dense("a"), first.to_dense("a"))


def test_uncompressed_states_still_go_to_torchrec_and_back() -> None:
    ours = collection(a=recemb.Dense())
    plain = torchrec.EmbeddingBagConfig(name="a", num_embeddings=40, embedding_dim=8, feature_names=["a"])
    theirs = torchrec.EmbeddingBagCollection(tables=[plain])
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert set(ours.state_dict()._metadata[""]) == {"version"}  # type: ignore[attr-defined] # torch's


@by_pair
def test_quantised_collections_note_and_check_too(pair: str) -> None:
    first, second, why = PAIRS[pair]
    state = saved(quantize_embeddings(model(t=first), torch.int8))
    same, other = (quantize_embeddings(model(t=own), torch.int8) for own in (first, second))
    same.load_state_dict(state)
    assert all(map(torch.equal, state.values(), same.state_dict().values()))
    before = parameters(other["sparse"])
    with pytest.raises(ConfigError, match=f"table 't': .*{why}"):
        other.load_state_dict(state)
    assert all(map(torch.equal, before, parameters(other["sparse"])))


def checkpoint(folder: Path, state: Any) -> Checkpoint:
    save_checkpoint(folder, 1, {"model": state}, {})
    found = latest_checkpoint(folder)
    assert found is not None
    return found


@by_pair
@pytest.mark.parametrize("make", [collection, model])
def test_checkpoints_note_and_check_too(make: Any, pair: str, tmp_path: Path) -> None:
    first, second, why = PAIRS[pair]
    state = make(a=QR, t=first).state_dict()
    found = checkpoint(tmp_path, state)
    other = make(a=QR, t=second)
    before = parameters(other)
    theirs, ours = why.split(".*")
    said = f"table 't': {theirs} in the checkpoint, .*in the state".replace("=", " ")
    with pytest.raises(CheckpointError, match=said) as refused:
        found.load({"model": other.state_dict()})
    assert ours.partition("=")[2].replace("\\", "") in str(refused.value)
    assert all(map(torch.equal, before, parameters(other)))
    found.load({"model": dict(other.state_dict())})
    assert all(map(torch.equal, state.values(), parameters(other)))
    same = make(a=QR, t=first)
    found.load({"model": same.state_dict()})
    assert all(map(torch.equal, state.values(), parameters(same)))


def manifest_of(found: Checkpoint) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((found.path / "manifest.json").read_text())["manifest"]
    return body


def rewritten(found: Checkpoint, body: dict[str, Any]) -> Checkpoint:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file = found.path / "manifest.json"
    file.write_text(f'{{"crc32":{zlib.crc32(text.encode())},"manifest":{text}}}')
    again = latest_checkpoint(found.path.parent)
    assert again is not None
    return again


def test_a_checkpoint_without_settings_is_as_it_was_before_there_were_any(tmp_path: Path) -> None:
    """So that a recemb of then reads it; one with settings says by its version that they are to be known."""
    other = collection(t=PAIRS["qr"][1])
    for k, state in enumerate(
        (dict(collection(t=QR).state_dict()), collection(t=recemb.Dense()).state_dict())
    ):
        body = manifest_of(checkpoint(tmp_path / str(k), state))
        assert (body["format_version"], "settings" in body) == (1, False)
    found = latest_checkpoint(tmp_path / "0")
    assert found is not None
    found.load({"model": other.state_dict()})
    assert manifest_of(checkpoint(tmp_path, collection(t=QR).state_dict()))["format_version"] == 2


@pytest.mark.parametrize("settings", [{}, None])
def test_checkpoints_of_version_1_may_have_settings(settings: object, tmp_path: Path) -> None:
    """Between the two, they were written under it."""
    found = checkpoint(tmp_path, collection(t=QR).state_dict())
    body = manifest_of(found) | {"format_version": 1}
    if settings is not None:
        body["settings"] = settings
    again, other = rewritten(found, body), collection(t=PAIRS["qr"][1])
    if settings is None:
        with pytest.raises(CheckpointError, match="operation 'mult' in the checkpoint"):
            again.load({"model": other.state_dict()})
    else:
        again.load({"model": other.state_dict()})


def test_sharded_collections_note_and_check_too(tmp_path: Path) -> None:
    """A collection by itself, as the model around it hands it a plain dict; a checkpoint of the model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        models = [
            DistributedModelParallel(
                nn.ModuleDict({"sparse": collection(t=compression)}),
                device=torch.device("cpu"),
                sharders=get_sharders(),
            )
            for compression in PAIRS["qr"][:2]
        ]
        with pytest.raises(CheckpointError, match=r"table 't': operation 'mult' in the checkpoint, 'add'"):
            checkpoint(tmp_path, models[0].state_dict()).load({"model": models[1].state_dict()})
        first, second = (each.module["sparse"] for each in models)
        state = saved(first)
        for other in (second, collection(t=PAIRS["qr"][1])):
            before = parameters(other)
            with pytest.raises(ConfigError, match=r"table 't': .*operation='mult'"):
                other.load_state_dict(state)
            assert all(map(torch.equal, before, parameters(other)))
        whole = collection(t=PAIRS["qr"][1]).state_dict()
        with pytest.raises(ConfigError, match=r"table 't': .*operation='add'"):
            first.load_state_dict(whole)
        second.load_state_dict(whole)
        assert all(map(torch.equal, whole.values(), parameters(second)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("note", ["x", 3, None, {"t": "x"}, {"t": {}}, {"t": {"more": 1}}])
def test_notes_of_a_strange_file_are_no_reason_to_fail(note: object) -> None:
    state, own = collection(t=QR).state_dict(), collection(t=QR)
    state._metadata[""]["recemb"] = note  # type: ignore[attr-defined] # torch's
    own.load_state_dict(state)
    assert all(map(torch.equal, state.values(), parameters(own)))


def test_a_checkpoint_is_not_asked_about_tables_of_which_a_state_holds_nothing(tmp_path: Path) -> None:
    theirs = collection(a=recemb.Dense(), t=QR)
    found = checkpoint(tmp_path, theirs.state_dict())
    own = collection(a=recemb.Dense(), t=replace(QR, operation="add"))
    state = own.state_dict()
    for key in ("q", "r"):
        del state[f"embedding_bags.t.{key}"]
    found.load({"model": state}, ignore_unexpected=True)
    assert torch.equal(own.to_dense("a"), theirs.to_dense("a"))


def test_a_checkpoint_of_several_ranks_notes_the_settings_of_all(tmp_path: Path) -> None:
    """Each has a collection of its own; rank 1's and 2's are known to no other."""

    def state(rank: int, compression: Compression) -> dict[str, Any]:
        return {f"rank {rank}": collection(t=compression).state_dict()}

    on_ranks(3, lambda rank: save_checkpoint(tmp_path, 1, state(rank, QR), {}))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    for rank in range(3):
        found.load(state(rank, QR), ignore_unexpected=True)
        with pytest.raises(CheckpointError, match="table 't': operation 'mult' in the checkpoint, 'add'"):
            found.load(state(rank, replace(QR, operation="add")), ignore_unexpected=True)
