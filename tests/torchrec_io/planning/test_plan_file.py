"""Plans as files: back to the very plan torchrec made, onto processes, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints

from recemb.errors import ConfigError
from recemb.planner.costs import default_costs
from recemb.spec import ROBE, Dense, TableSpec
from recemb.torchrec_io import load_plan
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.planning import planned as module
from recemb.torchrec_io.planning.plan_file import PlanDocument, plan_document, save_plan
from recemb.torchrec_io.planning.planned import MODULE_PATH, Planned, Ranks, Request, plan_tables
from recemb.torchrec_io.planning.planner import planner
from recemb.torchrec_io.planning.summary import rank_lines
from tests.processes import run_ranks
from tests.torchrec_io.planning.models import MIXED, Model


def request(world: int, local: int, device: str = "cuda") -> Request:
    return Request(
        tuple(Model(MIXED).tables),
        (20.0,) * len(MIXED),
        256,
        "rowwise_adagrad",
        Ranks(world, local, 10**9, 10**9, 0.1),
        default_costs(device),
    )


def save(planned: Planned, path: Path) -> PlanDocument:
    document = plan_document(planned, {"step_ms": 1.0})
    save_plan(path, document)
    return document


@pytest.mark.parametrize(
    ("world", "local", "device"), [(1, 1, "cpu"), (2, 2, "cpu"), (8, 4, "cuda"), (16, 8, "cuda")]
)
def test_a_file_gives_back_torchrecs_plan(world: int, local: int, device: str, tmp_path: Path) -> None:
    planned = plan_tables(request(world, local, device))
    save(planned, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json", world_size=world)
    assert loaded == planned.plan
    assert list(loaded.plan) == [MODULE_PATH]
    assert load_plan(str(tmp_path / "plan.json")) == planned.plan


KINDS = (
    *("table_wise", "row_wise", "column_wise", "data_parallel"),
    *("table_row_wise", "table_column_wise", "grid_shard"),
)


@pytest.fixture
def planned_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str], int, int], Planned]:
    """A plan of one table ``t_<kind>`` for each sharding type, on so many ranks, so many of them a host."""

    def plan(kinds: Sequence[str], world: int, local: int) -> Planned:
        tables = tuple(
            TableSpec(name=f"t_{kind}", num_embeddings=1003, embedding_dim=64, compression=Dense())
            for kind in kinds
        )
        limits = {
            f"t_{kind}": ParameterConstraints(sharding_types=[kind], min_partition=16) for kind in kinds
        }

        def constrained(ranks: Any, batch: Any, constraints: Any, *rest: Any, **named: Any) -> object:
            return planner(ranks, batch, limits, *rest, **named)

        monkeypatch.setattr(module, "planner", constrained)
        found = plan_tables(
            replace(request(world, local), tables=tables, pooling_factors=(1.0,) * len(kinds))
        )
        assert {option.sharding_type for option in found.options} == set(kinds)
        return found

    return plan


def test_every_sharding_type_survives(
    tmp_path: Path, planned_as: Callable[[Sequence[str], int, int], Planned]
) -> None:
    planned = planned_as(KINDS, 8, 2)
    save(planned, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == planned.plan


@pytest.mark.parametrize(("planned_local", "local"), [(8, 4), (4, 8)])
def test_hosts_of_another_size(
    tmp_path: Path,
    planned_as: Callable[[Sequence[str], int, int], Planned],
    planned_local: int,
    local: int,
) -> None:
    """What lies on ranks is taken, on the devices of these hosts; what lies within hosts is refused."""
    path = tmp_path / "plan.json"
    planned = planned_as(KINDS[:4], 8, planned_local)
    save(planned, path)
    assert planned.plan is not None
    before = planned.plan.plan[MODULE_PATH]
    for name, sharding in load_plan(path, world_size=8, local_world_size=local).plan[MODULE_PATH].items():
        assert (sharding.sharding_type, sharding.ranks) == (before[name].sharding_type, before[name].ranks)
        if sharding.sharding_type == "data_parallel":
            continue
        shards, ranks = sharding.sharding_spec.shards, sharding.ranks
        assert [str(shard.placement) for shard in shards] == [f"rank:{r}/cuda:{r % local}" for r in ranks]
        assert [(shard.shard_offsets, shard.shard_sizes) for shard in shards] == [
            (shard.shard_offsets, shard.shard_sizes) for shard in before[name].sharding_spec.shards
        ]
    for kind in KINDS[4:]:
        planned = planned_as(("table_wise", kind), 8, planned_local)
        save(planned, path)
        assert load_plan(path, world_size=8, local_world_size=planned_local) == planned.plan
        with pytest.raises(ConfigError) as refused:
            load_plan(path, world_size=8, local_world_size=local)
        said = str(refused.value)
        assert f"plans {planned_local} ranks on each host and there are {local}: table 't_{kind}'" in said
        assert f"--world_size 8 --local_world_size {local}" in said


def test_the_launcher_says_how_many_ranks_a_host_has(
    tmp_path: Path,
    planned_as: Callable[[Sequence[str], int, int], Planned],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(planned_as(("table_row_wise",), 8, 8), tmp_path / "plan.json")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    load_plan(tmp_path / "plan.json")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="8 ranks on each host and there are 4"):
        load_plan(tmp_path / "plan.json")


def test_uncompressed_tables_with_adam_are_planned_as_they_run_on_a_cpu() -> None:
    """Never column-wise, which pays for wide tables of fbgemm."""
    tables = tuple(
        TableSpec(name=f"t{k}", num_embeddings=5000, embedding_dim=256, feature_names=(f"t{k}",))
        for k in range(3)
    )
    wide = replace(request(2, 2, "cpu"), tables=tables, pooling_factors=(20.0,) * 3)
    kinds = {
        optimizer: {
            option.sharding_type for option in plan_tables(replace(wide, optimizer=optimizer)).options
        }
        for optimizer in ("sgd", "adam")
    }
    assert "column_wise" in kinds["sgd"]
    assert kinds["adam"] <= {"table_wise", "row_wise", "data_parallel"}


def test_a_plan_is_given_out_under_the_models_own_path(tmp_path: Path) -> None:
    save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json")
    model = Model(MIXED)
    loaded = load_plan(tmp_path / "plan.json", model, 2)
    assert list(loaded.plan) == ["ebc"]
    assert set(loaded.plan["ebc"]) == set(MIXED)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json")
    tables = [
        replace(table, num_embeddings=77) if table.name == "tt" else table
        for table in Model(MIXED).tables
        if table.name != "small"
    ]
    other = nn.Module()
    other.ebc = EmbeddingBagCollection(tables=to_configs(tables), device=torch.device("meta"))
    with pytest.raises(ConfigError) as refused:
        load_plan(tmp_path / "plan.json", other)
    assert "table 'small' is only in the plan" in str(refused.value)
    assert "table 'tt': num_embeddings is 40000 in the plan, 77 in the model" in str(refused.value)
    with pytest.raises(ConfigError, match="no EmbeddingBagCollection"):
        load_plan(tmp_path / "plan.json", nn.Linear(2, 2))


def test_another_shape_than_the_models_is_refused(tmp_path: Path) -> None:
    document = save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json").model_dump(
        mode="json", exclude_none=True
    )
    document["modules"][MODULE_PATH]["tt"]["shape"] = [7, 16]
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"shape of table 'tt' is \[7, 16\] in the plan"):
        load_plan(tmp_path / "other.json", Model(MIXED))


def test_figures_are_of_the_plan_that_is_given_out() -> None:
    """Also where simply the first option of every table takes equal time, and other bytes."""
    tables = tuple(
        TableSpec(
            name=f"t{k}", num_embeddings=rows, embedding_dim=16, compression=c, feature_names=(f"f{k}",)
        )
        for k, (rows, c) in enumerate([(16072, Dense()), (20263, ROBE(compress_rate=20, block_size=8))])
    )
    ranks = Ranks(2, 2, 10**9, 10**9, 0.15)
    planned = plan_tables(Request(tables, (3.0, 3.0), 256, "adam", ranks, default_costs("cuda")))
    used = [[line.hbm, line.ddr] for line in rank_lines(planned)]
    assert planned.found.placement is not None
    assert used == planned.found.placement.used[:, :2].tolist()


def test_no_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="no tables to plan"):
        plan_tables(replace(request(2, 2, "cpu"), tables=(), pooling_factors=()))


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"plans 2 ranks and there are 4.*--world_size 4"):
        load_plan(tmp_path / "plan.json", world_size=4)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"world_size": 0}, "world_size"),
        ({"tables": {}}, "different tables"),
        ({"modules": {"ebc": {"tt": 3}}}, "modules.ebc.tt"),
    ],
)
def test_damaged_files_are_refused(damage: dict[str, object], named: str, tmp_path: Path) -> None:
    save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(document | damage))
    with pytest.raises(ConfigError, match=named):
        load_plan(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"ranks": [7]},
        {"ranks": [0, 1, 0]},
        {"sharding_type": "sideways"},
        {"compute_kernel": "magic"},
        {"columns": 4},
        {"ranks": [-1]},
        {"shape": [10]},
        {"sharding_type": "row_wise", "ranks": [1, 0]},
        {"sharding_type": "data_parallel", "ranks": [0, 0]},
    ],
)
def test_entries_that_cannot_be_followed_are_refused(entry: dict[str, object], tmp_path: Path) -> None:
    document = save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json").model_dump(
        mode="json", exclude_none=True
    )
    document["modules"][MODULE_PATH]["big"].update(entry)
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="big"):
        load_plan(tmp_path / "bad.json")


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path / "missing.json")
    for text in ("", "{", "[]", "[" * 5000, '{"format": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="is not a plan"):
            load_plan(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="--output"):
        save(plan_tables(request(1, 1, "cpu")), tmp_path / "no" / "plan.json")


def test_two_ranks_run_a_loaded_plan(tmp_path: Path) -> None:
    """Each loads the file, shards by it, takes one step, and agrees with the unsharded model."""
    save(plan_tables(request(2, 2, "cpu")), tmp_path / "plan.json")
    ended = run_ranks("tests.torchrec_io.planning.worker", 2, [tmp_path], tmp_path, 120)
    assert ended.codes == [0, 0], "\n".join(ended.said)
    assert all("agrees" in text for text in ended.said)
