"""Tables with cached rows on two gloo ranks, against the unsharded module on both batches together.

Such a table lies whole on one rank, which looks the bags of all ranks up in their order, and the loss is a
sum over samples: what is compared is equal to the bit, over exchanges of rows with evictions.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.sharding.cached_cases import (
    CACHED,
    CASES,
    PLACES,
    TABLES,
    CachedCase,
    Model,
    attach,
    batch,
    collection,
)
from tests.sharding.cached_worker import ALONE, of_cached, step, stepper
from tests.sharding.cases import joined
from tests.sharding.saved import FORMATS, load, save
from tests.sharding.shared import Found, of_case, of_ranks

# Tables that are cut or replicated: their sums over a batch are taken in another order.
ROUNDING = 5e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cached")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Found]:
    """What each rank found in each case; it goes on from what one process saved after five steps of nine."""
    model, optimizer = unsharded()
    for at in range(9):
        if at in (5, 7):
            torch.save(state_of(model), folder / f"reference{at}.pt")
        if at == 5:
            for kind in FORMATS:
                save(kind, folder / f"{kind}1", state_of(model))
        step(model, optimizer, joined([batch(10 * at + who, RESHARDED) for who in (0, 1)]))
    torch.save(state_of(model), folder / "reference9.pt")
    return of_ranks("tests.sharding.cached_worker", 2, folder / "ranks")


RESHARDED = CachedCase("importance", "sum", "adagrad")


def unsharded() -> tuple[Model, torch.optim.Optimizer]:
    model = Model(collection(RESHARDED))
    attach(RESHARDED, list(model.ebc.parameters()))
    return model, stepper(model)


def state_of(model: Model) -> dict[str, dict[str, object]]:
    own = model.ebc.fused_optimizer.state_dict()["state"]
    return {"model": model.state_dict(), "optimizer": {f"ebc.{key}": value for key, value in own.items()}}


def of_table(differences: dict[str, float | None], name: str) -> dict[str, float | None]:
    return {key: by for key, by in differences.items() if key.split(".")[2] == name}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_module(found: list[Found], case: CachedCase) -> None:
    both = of_case(found, str(case))
    for rank, one in enumerate(both):
        assert one["keys"], "state-dict keys differ from the unsharded module's"
        for name, rank_of in PLACES[case.place].items():
            features = TABLES[name][1]
            columns = {key for key in one["outputs"] if key.split("@")[0] in features}
            columns = {key for key in columns if "@" not in key or key.endswith(f"@{name}")}
            assert {one["outputs"][key] for key in columns} == {0.0}, name
            expected = 0.0 if rank == rank_of else None
            # The array of robe_b is robe_a's.
            own = of_table(one["weights"], name)
            assert set(own.values()) == ({expected} if name in CACHED else set()), name
            assert set(of_table(one["state"], name).values()) <= {expected}, name
        for name in ("plain_dp", "md_rw"):
            assert all(by <= ROUNDING for by in of_table(one["weights"], name).values())
    if case.optimizer is not None:
        fused = {key for one in both for key in one["fused"] if key.endswith("cache.weight")}
        assert fused == {f"ebc.embedding_bags.{name}.cache.weight" for name in CACHED}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_figures_of_a_cache_are_on_the_rank_of_its_table(found: list[Found], case: CachedCase) -> None:
    both = of_case(found, str(case))
    for rank, one in enumerate(both):
        assert set(one["metrics"]) == {name for name in CACHED if PLACES[case.place][name] == rank}
    together = both[0]["metrics"] | both[1]["metrics"]
    assert together == both[0]["expected"]
    for name, figures in together.items():
        assert figures["evictions"] > 3, "no exchange of rows was compared"
        assert figures["promotions"] > figures["evictions"]
        assert 0 < figures["hit_rate"] < 1
        assert (figures["write_back_error"] < 0.9) == (name != "md"), "one table does not write back"


def test_frozen_tables_stay_as_they_are(found: list[Found]) -> None:
    both = of_case(found, "frozen")
    for one in both:
        assert {by for key, by in one["weights"].items() if key.split(".")[2] in CACHED} == {0.0, None}
        assert not [key for key in one["asks"] if key.split(".")[2] in ("qr", "tt")]
    together = both[0]["metrics"] | both[1]["metrics"]
    assert together["qr"]["evictions"] == together["qr"]["promotions"] == 0
    assert together["md"]["promotions"] > 3


def test_accumulated_gradients_hold_rows_back(found: list[Found]) -> None:
    both = of_case(found, "accumulated")
    for one in both:
        assert {by for key, by in one["weights"].items() if key.split(".")[2] in CACHED} == {0.0, None}
    together = both[0]["metrics"] | both[1]["metrics"]
    assert together == both[0]["expected"]
    # Rows are exchanged after the optimizer's two steps within nine batches, not at every second batch.
    often = both[0]["metrics"]["tt"]["evictions"]
    assert 3 < often < of_case(found, "lfu-sum-sgd-both")[0]["metrics"]["tt"]["evictions"]


@pytest.mark.parametrize("name", ["TrainPipelineSparseDist", "PrefetchTrainPipelineSparseDist"])
def test_a_pipeline_equals_the_plain_loop(found: list[Found], name: str) -> None:
    for one in of_case(found, "pipeline"):
        piped = one[name]
        assert all(piped["equal"].values()), piped["equal"]
        assert piped["evictions"] > 3
        # Nine batches, in the kernel of cached tables and in two of others.
        assert piped["prepared"] == (27 if name.startswith("Prefetch") else 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_f32_checkpoints_hold_caches_as_they_are(found: list[Found], kind: str) -> None:
    for rank, one in enumerate(of_case(found, kind)):
        for place, own in (("both", "tt"), ("swapped", "qr")):
            name = own if rank == 0 else {"tt": "qr", "qr": "tt"}[own]
            for when in ("loaded", "trained"):
                differences = one[f"{place} {when}"]
                assert set(differences.values()) == {0.0, None}
                held = {key for key, by in differences.items() if by is not None}
                prefix = f"ebc.embedding_bags.{name}.cache"
                assert {f"{prefix}.{part}" for part in ("weight", "ids", "votes", "steps", "counts")} <= held
            assert f"ebc.embedding_bags.{name}.cache.weight.sum" in one[f"{place} loaded"]


@pytest.mark.parametrize("kind", FORMATS)
def test_f32_a_cache_comes_back_to_one_process(found: list[Found], kind: str, folder: Path) -> None:
    of_case(found, kind)
    model, _ = unsharded()
    step(model, stepper(model), joined([batch(50 + who, RESHARDED) for who in (0, 1)]))
    state = state_of(model)
    state = {part: of_cached(state[part]) for part in state}
    load(kind, folder / f"{kind}swapped", state)
    expected = torch.load(folder / "reference9.pt", weights_only=True)
    for key, value in state["model"].items():
        assert torch.equal(value, expected["model"][key]), key
    for key, own in state["optimizer"].items():
        for name, value in own.items():
            assert torch.equal(value, expected["optimizer"][key][name]), (key, name)


def test_looking_up_changes_no_cache(found: list[Found]) -> None:
    for one in of_case(found, "looking_up"):
        assert all(one["kept"].values()), one["kept"]


def test_a_batch_size_per_feature(found: list[Found]) -> None:
    for one in of_case(found, "variable"):
        for name, by in one["outputs"].items():
            assert by <= ROUNDING or name.endswith(("@d_rw", "@d_dp")), (name, by)
        assert min(one["filled"].values()) > 3


def test_a_state_with_another_cache_is_refused_on_every_rank(found: list[Found]) -> None:
    for one in of_case(found, "another_cache"):
        assert "table 'tt': its cache has 15 rows in the state to load and 14 here" in one["message"]
        assert "table 'qr': the counters of its cache are of policy='lru'" in one["of_policy"]
        assert not one["moved"]


def test_ranks_that_would_drift_apart_are_refused(found: list[Found]) -> None:
    for one in of_case(found, "left_whole"):
        for how in ("without sharders", "not broadcast"):
            assert "table 'tt': its cached rows" in one[how]["message"]
            for mend in ("sharders=recemb.torchrec_io.get_sharders()", "broadcast_buffers=True"):
                assert mend in one[how]["message"]
            assert one[how]["apart"] == 0
            assert one[how]["moved"] == []
        for how in ("broadcast", "evaluated", "frozen"):
            assert one[how]["message"] == ""
            assert one[how]["apart"] == 0
        assert one["broadcast"]["filled"] > 3


@pytest.mark.parametrize("name", ALONE)
def test_replicas_exchange_the_same_rows(found: list[Found], name: str) -> None:
    """Whatever one of them does alone; nothing of what it does beside the model counts."""
    both = [one[name] for one in of_case(found, "replicas")]
    assert [one["apart"] for one in both] == [0, 0]
    assert both[0]["exchanged"] == both[1]["exchanged"]
    assert len(set(both[0]["exchanged"])) > 4
    assert [one["held"] for one in both] == [name == "holds a graph", False]


def test_replicas_that_have_drifted_apart_are_told(found: list[Found]) -> None:
    first, second = of_case(found, "left_out")
    assert first["at"] == second["at"] > 0
    assert not first["message"]
    said = (
        r"table 'tt': the cached rows of rank 1 have been exchanged at other steps .*: \d+, \d+\).*shard it"
    )
    assert re.search(said, second["message"]), second["message"]


def test_whole_weights_are_exact(found: list[Found]) -> None:
    for one in of_case(found, "gathered"):
        assert one["keys"]
        assert one["equal"]


def test_fresh_parameters_come_with_empty_caches(found: list[Found]) -> None:
    for one in of_case(found, "fresh"):
        assert min(one["filled"].values()) > 8
        assert set(one["left"].values()) == set(one["steps"].values()) == {0}
