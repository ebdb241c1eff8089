"""Cached tables of which something is pruned or parametrized: written to by nobody, read by whoever reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from recemb.errors import ConfigError
from recemb.spec import HotRows
from tests.cache.cases import METHODS, Collection, hold, one_id_bags, spec


def _trained(collection: Collection, steps: int = 12) -> None:
    """Each step's ids are others than the last one's, so that rows leave."""
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.01)
    for step in range(steps):
        ids = [(7 * step + k // 4) % 60 for k in range(40)]
        loss = collection(one_id_bags(ids)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _cached(method: str, write_back: bool = True) -> Collection:
    cache = HotRows(rows=4, warmup=2, refresh_every=1, track_every=1, decay=0.1, write_back=write_back)
    return Collection([spec(METHODS[method](cache), features=["f"])])


WRITTEN = {"tt": ["core_0", "core_1", "core_2"], "add": ["q"], "concat": ["q", "r"], "md": ["e"]}
WRITTEN |= {"mult": WRITTEN["add"], "robe": ["array"]}


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize(("method", "name"), [(m, n) for m, names in WRITTEN.items() for n in names])
def test_rows_are_not_written_back_through_a_mask(method: str, name: str, how: str) -> None:
    collection = _cached(method)
    if how == "pruned":
        prune.random_unstructured(collection.backend(), name, 0.5)
    else:
        parametrize.register_parametrization(collection.backend(), name, nn.Identity())
    with pytest.raises(ConfigError, match=rf"table 't': an exchange .* write to '{name}'.*prune\.remove\("):
        _trained(collection)
    assert int(collection.cache().steps) == 2
    assert (collection.cache().ids == -1).all()


def test_cached_rows_that_are_pruned_are_not_exchanged() -> None:
    collection = _cached("mult", write_back=False)
    prune.random_unstructured(collection.cache(), "weight", 0.5)
    with pytest.raises(ConfigError, match=r"write to 'weight'.*\['t'\]\.cache, 'weight'"):
        _trained(collection)


@pytest.mark.parametrize(
    ("method", "name", "write_back"),
    [("add", "r", True), ("mult", "r", True), ("md", "p", True), ("tt", "core_1", False)],
)
def test_rows_are_exchanged_beside_a_mask_that_nothing_is_written_through(
    method: str, name: str, write_back: bool
) -> None:
    collection = _cached(method, write_back)
    prune.random_unstructured(collection.backend(), name, 0.5)
    _trained(collection)
    assert collection.cache().metrics().evictions
    hold(collection, [3, 4])
    own = collection.backend()
    masked = getattr(own, f"{name}_orig") * getattr(own, f"{name}_mask")
    assert torch.equal(getattr(own, name), masked)
    assert torch.equal(collection.cache().weight[collection.cache().ids == 3][0], own.to_dense()[3])
