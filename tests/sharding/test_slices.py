"""Tables parted into slices: the numbers of one slice to the bit, and rows that travel meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import EmbeddingTableConfig
from torchrec.distributed.types import ParameterSharding

from recemb import ROBE, Compression, Dense
from recemb.errors import ConfigError
from recemb.spec import TableSpec
from recemb.torchrec_io import get_sharders
from recemb.torchrec_io.sharding.slices import sliced
from tests.sharding.places import ROWS, Case
from tests.sharding.shared import Found, of_case, of_ranks
from tests.sharding.sliced_worker import CASES, SLICES

# The parity tests' bounds.
OUTPUTS = WEIGHTS = 5e-7


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    folder = tmp_path_factory.mktemp("slices")
    return {world: of_ranks("tests.sharding.sliced_worker", world, folder / f"{world}") for world in (2, 4)}


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_change_no_bit(found: dict[int, list[Found]], case: Case, slices: int) -> None:
    each = [one[str(slices)] for one in of_case(found[case.world], str(case))]
    # The collective adds up partial sums of more than two ranks in an order that its buffer's size decides.
    exact = case.world == 2 or ROWS not in case.places.values()
    for one in each:
        assert one["outputs"] <= (0 if exact else OUTPUTS)
        assert max(one["different"].values(), default=0) <= (0 if exact else WEIGHTS)
        assert one["keys"]
        assert one["kinds"] == each[0]["kinds"]
        assert one["types"] == [kind.partition(":")[0] for kind in one["kinds"]]
        assert len(one["tables"]) == len(set(one["tables"]))
    assert sum(one["moved"] for one in each) >= 10, "nothing was trained"
    assert any(kind.endswith(":1") for kind in each[0]["kinds"])


@pytest.mark.parametrize("name", ["TrainPipelineSparseDist", "PrefetchTrainPipelineSparseDist"])
def test_pipelines_take_slices(found: dict[int, list[Found]], name: str) -> None:
    for one in of_case(found[2], "pipelines"):
        assert one[name]["different"] == {}
        # Five batches; the kernels of both slices of row-wise tables, and of a rank's own tables.
        assert (one[name]["prepared"] >= 10) == name.startswith("Prefetch")


def test_one_slices_checkpoint_goes_on_in_three(found: dict[int, list[Found]]) -> None:
    for one in of_case(found[2], "resumed"):
        assert one["different"] == {}


def test_a_users_order_of_sharding_types_is_kept(found: dict[int, list[Found]]) -> None:
    for one in of_case(found[2], "ordered"):
        kinds = [kind for k, kind in enumerate(one["types"]) if k == 0 or one["types"][k - 1] != kind]
        assert kinds == ["table_wise", "data_parallel", "row_wise", "column_wise"]
        assert len(one["types"]) > len(kinds)


def test_slices_take_a_batch_size_per_feature(found: dict[int, list[Found]]) -> None:
    for one in of_case(found[2], "variable"):
        assert one["outputs"] == 0
        assert one["different"] == {}


def test_rows_travel_while_the_next_slice_is_computed(found: dict[int, list[Found]]) -> None:
    for one in of_case(found[2], "order"):
        split = one["2"].index("loss")
        forward, backward = one["2"][:split], one["2"][split + 1 :]
        assert forward[:4] == ["compute", "send", "compute", "send"]
        # All gradients are under way before the first is awaited; a slice steps while another's travel.
        assert backward.count("step") == 2
        sends, first = backward.count("send"), backward.index("step")
        assert backward[:sends] == ["send"] * sends
        assert "wait" in backward[first:]
        whole = one["1"]
        assert (whole.count("compute"), whole.count("step")) == (1, 1)
        assert "wait" not in whole[whole.index("step") :]


def test_a_rank_s_columns_are_spread_evenly_and_shared_arrays_stay_together() -> None:
    tables = {"a": (64, 0), "b": (32, 0), "c": (32, 0), "d": (16, 1), "e": (16, 1), "f": (8, 1), "g": (8, 1)}
    shared = [
        _table("f", 8, ROBE(compress_rate=10, block_size=8)),
        _table("g", 8, ROBE(compress_rate=10, block_size=8)),
    ]
    alone = [[_table(name, own[0], Dense())] for name, own in tables.items() if name not in ("f", "g")]
    infos = {
        "table_wise": [_info(name, dim, rank) for name, (dim, rank) in tables.items()],
        "data_parallel": [_info("h", 16, 0)],
    }
    parts = sliced(infos, 2, [*alone, shared])
    names = {kind: [info.embedding_config.name for info in own] for kind, own in parts.items()}
    assert sorted(names) == ["data_parallel", "table_wise", "table_wise:1"]
    of_rank_0 = [{name for name in names[kind] if tables[name][1] == 0} for kind in sorted(names)[1:]]
    assert sorted(of_rank_0, key=len) == [{"a"}, {"b", "c"}]
    widths = [
        sum(tables[name][0] for name in names[kind] if tables[name][1] == 1) for kind in sorted(names)[1:]
    ]
    assert sorted(widths) == [16, 32]
    assert any({"f", "g"} <= set(own) for own in names.values())


@pytest.mark.parametrize("slices", [0, -2, 2.5, "4", None, True])
def test_what_is_no_number_of_slices_is_refused(slices: Any) -> None:
    with pytest.raises(ConfigError, match=f"communication_slices={slices!r} .* int >= 1"):
        get_sharders(slices)


def _table(name: str, dim: int, compression: Compression) -> TableSpec:
    return TableSpec(
        name=name, num_embeddings=100, embedding_dim=dim, feature_names=(name,), compression=compression
    )


def _info(name: str, dim: int, rank: int) -> EmbeddingShardingInfo:
    config = EmbeddingTableConfig(
        num_embeddings=100, embedding_dim=dim, name=name, feature_names=[name], embedding_names=[name]
    )
    return EmbeddingShardingInfo(config, ParameterSharding("table_wise", "fused", [rank]), None)
