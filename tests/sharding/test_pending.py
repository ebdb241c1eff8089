"""What a GPU has found wrong is raised, at the latest, when a checkpoint is taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from recemb.checkpoint import save_checkpoint
from recemb.errors import NonFiniteError
from recemb.torchrec_io import get_sharders
from recemb_kernels.triton_frame import verdict
from tests.sharding.cases import Model, collection
from tests.sharding.places import Case


class OnItsWay:
    """The event of a mark that has not reached the host yet."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark of a gradient that was not finite, as :func:`verdict.note` leaves it."""
    mark = torch.ones(1, dtype=torch.int32)
    monkeypatch.setattr(
        verdict, "_pending", deque([(OnItsWay(), mark, lambda: NonFiniteError("found late"))])
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(collection(Case("table_wise", "sum", "sgd")))


@pytest.fixture(scope="module")
def sharded(model: Model) -> DistributedModelParallel:
    return DistributedModelParallel(
        Model(collection(Case("table_wise", "sum", "sgd"), "meta")),
        device=torch.device("cpu"),
        sharders=get_sharders(),
        init_data_parallel=False,
    )


@pytest.mark.usefixtures("pending")
def test_the_state_of_a_collection(model: Model) -> None:
    verdict.poll()
    with pytest.raises(NonFiniteError, match="found late"):
        model.state_dict()
    # It has been said once.
    assert model.state_dict()


@pytest.mark.usefixtures("pending")
def test_the_state_of_a_sharded_collection(sharded: DistributedModelParallel) -> None:
    verdict.poll()
    with pytest.raises(NonFiniteError, match="found late"):
        sharded.state_dict()
    assert sharded.state_dict()


@pytest.mark.usefixtures("pending")
def test_a_checkpoint_of_a_state_that_was_taken_before(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="found late"):
        save_checkpoint(tmp_path, 1, {"model": {"weight": torch.zeros(2)}}, {})
    assert not list(tmp_path.iterdir())
    assert save_checkpoint(tmp_path, 1, {"model": {"weight": torch.zeros(2)}}, {}).exists()
