"""Two gloo ranks under DistributedModelParallel against the unsharded module on both batches together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.optim.keyed import CombinedOptimizer

from tests.sharding.cases import BAD_ID, BATCH, PARTLY_FROZEN, Model, attach, batch, collection, is_fused
from tests.sharding.places import CASES, COMPRESSED, ROWS, UNEVEN, Case
from tests.sharding.processed import PLACES as PROCESSED
from tests.sharding.saved import FORMATS, load, of_compressed, save
from tests.sharding.shared import Found, differences, of_case, of_ranks

# Sums over a batch are taken in another order: a few units in the last place of numbers around 1, after
# three steps whose smallest effect on a tensor is hundreds of times that.
OUTPUTS, GRADIENTS, WEIGHTS, MOVED = 5e-7, 1e-7, 5e-7, 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[Found]]:
    """What each rank found in each case, by number of ranks: two run all their cases, then four theirs."""
    model, optimizer = unsharded()
    for step in range(2):
        model(batch(step, Case("row_wise", "sum", "rowwise_adagrad")))[0].backward()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    torch.save(state, folder / "reference.pt")
    for kind in FORMATS:
        save(kind, folder / f"{kind}1", state)
    return {world: of_ranks("tests.sharding.worker", world, folder / f"ranks{world}") for world in (2, 4)}


def unsharded() -> tuple[Model, CombinedOptimizer]:
    """The model in one process, with an optimizer in the tables' backward."""
    case = Case("row_wise", "sum", "rowwise_adagrad")
    model = Model(collection(case))
    attach(case, list(model.ebc.parameters()))
    return model, CombinedOptimizer([("ebc", model.ebc.fused_optimizer)])


def _of(found: dict[int, list[Found]], name: str, world: int = 2) -> list[Found]:
    return of_case(found[world], name)


def assert_equals_the_unsharded_module(every_rank: list[Found]) -> None:
    for one in every_rank:
        assert one["keys"], "state-dict keys differ from the unsharded module's"
        assert one["outputs"] <= OUTPUTS
        assert one["gradients"] <= GRADIENTS
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]
        assert min(one["moved"].values()) >= MOVED, "the steps are too small for the bound to mean anything"


@pytest.mark.parametrize(("case", "sizes"), UNEVEN, ids=str)
def test_ranks_batches_may_differ_in_size(
    found: dict[int, list[Found]], case: Case, sizes: tuple[int, ...]
) -> None:
    """torchrec gathers the gradients of row-wise tables as they are, which gloo refuses."""
    assert_equals_the_unsharded_module(_of(found, f"{case} {sizes}", case.world))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_module(found: dict[int, list[Found]], case: Case) -> None:
    every_rank = _of(found, str(case), case.world)
    assert_equals_the_unsharded_module(every_rank)
    every = {key for key in every_rank[0]["moved"] if "embedding_bags" in key}
    fused = {key for key in every if is_fused(case, key)}
    assert set().union(*(one["fused"] for one in every_rank)) == fused
    for one in every_rank:
        assert not set(one["dense"]) & fused, "the dense optimizer would step on a fused table again"
    stepped = {key for one in every_rank for key in one["compared"]}
    owned = {key for key in every - fused if key.split(".")[2] in COMPRESSED}
    assert owned <= stepped, "a gradient of a compressed table was not compared"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_each_rank_holds(found: dict[int, list[Found]], case: Case) -> None:
    every_rank = _of(found, str(case), case.world)
    whole = {record.table: record for record in collection(case).memory()}
    uncompressed = dict.fromkeys(whole, 0)
    for one in every_rank:
        records = {record["table"]: record for record in one["memory"]}
        assert list(records) == [name for name in whole if name in records]
        num_bytes = {name: record["num_bytes"] for name, record in records.items()}
        # They share an array, which the state has under the first.
        num_bytes["robe_a"] = num_bytes.get("robe_a", 0) + num_bytes.pop("robe_b", 0)
        assert num_bytes == {name: size for name, size in one["stored"].items() if size or name == "robe_a"}
        for name, record in records.items():
            assert record["method"] == whole[name].method
            assert record["embedding_dim"] <= whole[name].embedding_dim
            assert record["dense_bytes"] == 4 * record["num_embeddings"] * record["embedding_dim"]
            uncompressed[name] += record["dense_bytes"]
    for name, record in whole.items():
        copies = 1 if case.places[name] is not None else case.world
        assert uncompressed[name] == copies * record.dense_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_kernel_serves_all_compressed_tables_of_a_rank(found: dict[int, list[Found]], case: Case) -> None:
    served = case.places if case.optimizer == "adam" else COMPRESSED
    places = [case.places[name] for name in served]
    for rank, one in enumerate(_of(found, str(case), case.world)):
        assert one["kernels"] == (rank in places) + (None in places) + (ROWS in places)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", FORMATS)
def test_f32_ranks_load_what_half_as_many_saved(found: dict[int, list[Found]], kind: str, world: int) -> None:
    each = _of(found, kind, world)
    for one in each:
        assert max(one["weights"].values()) == 0
        assert max(one["state"].values()) == 0
        assert all(by > 0.01 or by == 0 for by in one["fresh"].values())
        assert sum(by > 0.01 for by in one["fresh"].values()) > 6, (
            "the weights were there before they were loaded"
        )
    seen = {key for one in each for key in one["state"]}
    assert {"ebc.embedding_bags.tt.core_1.sum", "ebc.embedding_bags.qr.q.sum"} <= seen


@pytest.mark.parametrize("kind", FORMATS)
def test_f32_sharded_weights_come_back_to_one_process(
    found: dict[int, list[Found]], kind: str, folder: Path
) -> None:
    _of(found, kind, 4)
    model, optimizer = unsharded()
    state = {"model": model.state_dict(), "optimizer": of_compressed(optimizer.state_dict()["state"])}
    load(kind, folder / f"{kind}4", state)
    expected = torch.load(folder / "reference.pt", weights_only=True)
    assert max(differences(state["model"], expected["model"]).values()) == 0
    for key, own in state["optimizer"].items():
        assert max(differences(own, expected["optimizer"][key]).values()) == 0


def test_weights_come_back_into_the_unsharded_module(found: dict[int, list[Found]]) -> None:
    for one in _of(found, "round_trip"):
        assert max(one["weights"].values()) == 0
        assert "ebc.embedding_bags.robe_a.array" in one["weights"]


def test_replicas_start_equal(found: dict[int, list[Found]]) -> None:
    for one in _of(found, "round_trip"):
        assert one["replicas"] == 0
        assert one["spread"] > 0.1


@pytest.mark.parametrize(("place", "world"), [("variable", 2), ("variable_rows", 2), ("variable_hosts", 4)])
def test_a_batch_size_per_feature(found: dict[int, list[Found]], place: str, world: int) -> None:
    for one in _of(found, place, world):
        assert one["outputs"] <= OUTPUTS
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]


def test_a_collection_that_was_not_sharded_says_so_once(found: dict[int, list[Found]]) -> None:
    first, second = _of(found, "left_whole")
    for how in ("without sharders", "without a plan"):
        [said] = first.pop(how)
        assert "did not shard its module 'ebc'" in said
        assert "DistributedModelParallel(..., sharders=recemb.torchrec_io.get_sharders())" in said
        assert second.pop(how) == []
    assert first == second == {"sharded": [], "by the user": []}


def test_a_learning_rate_schedule_reaches_the_backward(found: dict[int, list[Found]]) -> None:
    both = _of(found, "schedule")
    for one in both:
        assert not one["stepped"], (
            "the kernels step; a hook's step would need a gradient of each table's size"
        )
        assert one["still"] == 0
        assert one["moves"] > 0.01
    for one, key in zip(both, ("tt.core_0", "qr.q"), strict=True):
        assert f"ebc.embedding_bags.{key}" in one["state"]
        assert f"ebc.embedding_bags.{key}" in one["watched"]


@pytest.mark.parametrize("place", ["mixed", "whole"])
@pytest.mark.parametrize("name", ["TrainPipelineSparseDist", "PrefetchTrainPipelineSparseDist"])
def test_a_pipeline_equals_the_plain_loop(found: dict[int, list[Found]], name: str, place: str) -> None:
    # Five batches, in each of the kernels: replicated tables, row-wise ones and rank 1's own; or each rank's.
    least = {"mixed": 10, "whole": 5}[place] if name.startswith("Prefetch") else 0
    for one in _of(found, "pipeline"):
        piped = one[f"{name} {place}"]
        assert all(piped["equal"].values()), piped["equal"]
        assert all(shape[0] == BATCH for shape in piped["shapes"])
        assert piped["prepared"] >= least


@pytest.mark.parametrize("place", PROCESSED)
def test_feature_processors_around_a_collection(found: dict[int, list[Found]], place: str) -> None:
    for one in _of(found, f"processed {place}"):
        assert one["outputs"] <= OUTPUTS
        assert one["ahead"] <= OUTPUTS, "what was prepared had other weights"
        assert len(one["gradients"]) == 8
        assert max(one["gradients"].values()) <= GRADIENTS
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]
        assert min(one["moved"].values()) >= MOVED


def test_a_batch_without_the_weights_that_a_collection_needs(found: dict[int, list[Found]]) -> None:
    for one in _of(found, "without_weights"):
        assert "is_weighted=True but the KeyedJaggedTensor has no weights" in one["message"]


def test_a_bad_id_is_named_where_it_is_and_hangs_nobody(found: dict[int, list[Found]]) -> None:
    bad, waiting = _of(found, "bad_id")
    assert bad["kind"] == "BatchError"
    for part in ("'f3'", "'qr'", str(BAD_ID), "sample 0"):
        assert part in bad["message"]
    assert waiting["kind"] == "RuntimeError"
    assert waiting["seconds"] < 25


def test_frozen_tables_and_half_precision(found: dict[int, list[Found]]) -> None:
    for rank, one in enumerate(_of(found, "frozen")):
        assert one["outputs"] <= OUTPUTS
        assert one["dtype"] == "torch.bfloat16"
        moved = {key.removeprefix("ebc.embedding_bags."): by for key, by in one["moved"].items()}
        assert moved["qr.q"] == moved["qr.r"] == moved["robe_a.array"] == 0
        assert moved["tt.core_0"] > 0 or rank == 1
        assert moved["md.p"] > 0 or rank == 1
        assert not any("qr.q" in key or "robe_a" in key for key in one["asks"])


@pytest.mark.parametrize("place", ["adam", "adam_replicated"])
def test_tables_with_a_frozen_parameter_step_lazily_beside_it(
    found: dict[int, list[Found]], place: str
) -> None:
    each = _of(found, f"partly_frozen {place}")
    for one in each:
        assert max(one["weights"].values()) <= WEIGHTS, one["weights"]
        assert all(by == 0 for key, by in one["moved"].items() if key.endswith(PARTLY_FROZEN))
    for key in each[0]["moved"]:
        assert key.endswith(PARTLY_FROZEN) or max(one["moved"][key] for one in each) >= MOVED, key


def test_a_state_of_another_table_is_refused_on_every_rank(found: dict[int, list[Found]]) -> None:
    for one in _of(found, "another_table"):
        assert "tt.core_1: the state to load has shape (3, 3)" in one["message"]
        assert max(by for key, by in one["moved"].items() if "embedding_bags" in key) == 0


def test_f32_a_checkpoint_of_another_plan_goes_on_as_if_it_had_not_been_interrupted(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    both = _of(found, "other_plan")
    for one in both:
        assert max(one["saved"].values()) == 0, "the unsharded module has loaded other weights"
        assert max(one["loaded"].values()) == 0
        assert max(one["trained"].values()) <= WEIGHTS, one["trained"]
        assert max(one["forgetful"].values()) > MOVED, "the optimizer's state made no difference"
    # The state of a compressed table's optimizer is on its rank alone.
    assert not {"ebc.embedding_bags.tt.core_0"} & set(both[1]["optimizer"])
    assert not {"ebc.embedding_bags.qr.q"} & set(both[0]["optimizer"])
