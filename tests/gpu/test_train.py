"""``recemb train`` on a device against the CPU, and stopped and resumed against a run that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recemb.errors import Interrupted
from recemb.training.config import RunConfig
from recemb.training.run import train
from tests.faults.conftest import assert_same_run, evaluations, result, weights
from tests.training.conftest import log_dir, make_config, stop_in

__all__ = ["log_dir", "make_config", "stop_in"]
pytestmark = pytest.mark.gpu

MakeConfig = Callable[..., RunConfig]
# Four steps, evaluated after the second and the last.
SIZES = {
    "batch_size": 16,
    "test_batch_size": 32,
    "limit_train_batches": 4,
    "validation_freq_within_epoch": 2,
    "limit_val_batches": 1,
    "limit_test_batches": 1,
    "learning_rate": 0.05,
}
TT = {"method": "tt", "compress_rate": 5, "optimizer": "rowwise_adagrad"}
CACHED = {
    "method": "md",
    "compress_rate": 3,
    "optimizer": "adagrad",
    "cache_fraction": 0.05,
    "cache_refresh_every": 2,
}


@pytest.mark.parametrize("method", [TT, CACHED], ids=["tt", "cached md"])
def test_a_run_is_as_on_the_cpu(method: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    cpu, cuda = (
        train(make_config(**SIZES, **method, device=device, output=str(tmp_path / device)))[0]
        for device in ("cpu", "cuda")
    )
    own, theirs = weights(cuda), weights(cpu)
    assert own.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert abs(evaluations(cpu)[0]["logloss"] - evaluations(cpu)[1]["logloss"]) > 1e-2  # it does train
    for mine, other in zip(evaluations(cuda), evaluations(cpu), strict=True):
        for figure in ("logloss", "train_logloss", "calibration"):
            assert mine[figure] == pytest.approx(other[figure], rel=1e-4)
        counts = [name for name, value in other.items() if isinstance(value, int)]
        assert {name: mine[name] for name in counts} == {name: other[name] for name in counts}
    assert bool(result(cpu)["caches"]) == (method is CACHED)
    assert result(cuda)["caches"].keys() == result(cpu)["caches"].keys()


def test_resumed_equals_unbroken(
    make_config: MakeConfig, stop_in: Callable[[str, int], None], tmp_path: Path
) -> None:
    """Stopped between two exchanges of cached rows."""
    settings = SIZES | CACHED | {"device": "cuda"}
    stop_in("_train_step", 2)
    with pytest.raises(Interrupted, match="after step 3"):
        train(make_config(resume=True, **settings))
    [path] = train(make_config(resume=True, **settings))
    [unbroken] = train(make_config(**settings, output=str(tmp_path / "unbroken")))
    assert_same_run(path, unbroken)
    assert result(path)["caches"] == result(unbroken)["caches"]
    assert result(path)["cache_promotions"] > 0
