"""Each row of an epoch goes to one rank, once; metrics add up; the line between the ranks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from recemb.errors import ConfigError, DataError
from recemb.training import peers
from recemb.training.config import RunConfig, parse_config
from recemb.training.distributed import Launch, World
from recemb.training.metrics import NUM_BINS, ClickMetrics
from recemb.training.peers import PeerLink
from recemb.training.setup import ClickBatches, make_batches, open_log


@pytest.fixture(scope="module")
def whole(log_dir: Path) -> ClickBatches:
    config = parse_config({"data_dir": str(log_dir), "output": "unused"})
    return make_batches(config, open_log(config))


def rows_of(batch: Any) -> list[bytes]:
    """One string of bytes a row: all it holds."""
    ids = batch.sparse_features.values().reshape(26, -1).T.numpy()
    dense, labels = batch.dense_features.numpy(), batch.labels.numpy()
    return [a.tobytes() + b.tobytes() + c.tobytes() for a, b, c in zip(ids, dense, labels, strict=True)]


@settings(max_examples=25)
@given(
    batch_size=st.integers(150, 1300),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 2),
    limit=st.none() | st.integers(1, 4),
    split=st.sampled_from(["train", "val"]),
    data=st.data(),
)
def test_the_ranks_batches_are_one_process_larger_batches(
    whole: ClickBatches,
    batch_size: int,
    world_size: int,
    epoch: int,
    limit: int | None,
    split: str,
    data: st.DataObject,
) -> None:
    def batches(rank: int, size: int, rows: int) -> ClickBatches:
        changes = {"batch_size": rows, "test_batch_size": rows}
        changes |= {"limit_train_batches": limit, "limit_val_batches": limit}
        config = whole.config.model_copy(update=changes)
        return ClickBatches(whole.log, config, None, rank, size)

    single = batches(0, 1, batch_size * world_size)
    count = single.count(split)
    start = data.draw(st.integers(0, count)) if split == "train" else 0

    def read(source: ClickBatches) -> list[list[bytes]]:
        assert source.count(split) == count
        found = source.train(epoch, start) if split == "train" else source.evaluation(split)
        return [rows_of(batch) for batch in found]

    parts = [read(batches(rank, world_size, batch_size)) for rank in range(world_size)]
    together = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
    assert together == read(single)
    assert [len(rows) for rows in together] == [single.num_rows(split, i) for i in range(start, count)]


def test_counts_add_up_to_a_merge() -> None:
    generator = np.random.default_rng(3)
    parts = []
    for size in (0, 1, 5000):
        metrics = ClickMetrics()
        logits = generator.normal(0, 9, size)
        metrics.update(logits, (generator.random(size) < 0.3).astype(np.float64))
        parts.append(metrics)
    # Sums beyond 64 bits, as after years.
    parts[1]._loss += (1 << 93) + 12345
    merged = parts[0].merge(parts[1]).merge(parts[2])
    summed = ClickMetrics.from_counts(sum(part.counts() for part in parts))
    assert summed._loss == merged._loss
    assert summed.compute() == merged.compute()
    assert np.array_equal(summed.counts(), merged.counts())
    assert ClickMetrics.from_counts(ClickMetrics().counts()).compute().num_samples == 0
    assert len(merged.counts()) == 2 * NUM_BINS + 12


def test_one_process_agrees_with_itself(make_config: Callable[..., RunConfig]) -> None:
    world = World()
    assert world.agree() is None
    assert world.agree(stop="SIGTERM") == "SIGTERM"
    with pytest.raises(DataError, match=r"^bad$"):
        world.agree(DataError("bad"))
    with pytest.raises(ConfigError, match=r"^worse$"), world.agreeing():
        raise ConfigError("worse")
    assert world.exchange(3) == [3]
    world.check_equal("settings", {"a": 1})
    assert len(make_config().model_dump()) > 30


class Link(PeerLink):
    """One of several in a process that outlives a lost rank, whenever their threads hear of it."""

    def end_process_within(self, seconds: float, exit_code: int, message: str) -> None:
        pass


class Ends:
    """Ends of the line."""

    def __init__(self) -> None:
        self.store = HashStore()
        self.store.set_timeout(timedelta(seconds=10))

    def connect(self, rank: int, size: int) -> Link:
        return Link(rank, size, self.store, "127.0.0.1", 10)

    def connect_all(self, size: int) -> list[Link]:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(self.connect, range(size), [size] * size))


@pytest.fixture
def ends() -> Ends:
    return Ends()


def test_the_end_of_a_connection_is_a_death_that_everyone_hears_of(ends: Ends) -> None:
    links = ends.connect_all(3)
    assert links[0].loss() is None
    links[2]._lines[0].socket.shutdown(socket.SHUT_RDWR)
    for link in links[:2]:
        loss = link.loss(5)
        assert loss is not None
        assert (loss.rank, loss.exit_code) == (2, 1)
        assert loss.message.startswith("rank 2 died")


def test_who_leaves_with_a_reason_passes_it_on(ends: Ends) -> None:
    links = ends.connect_all(3)
    links[1].leave(0, "")
    links[1]._lines[0].socket.shutdown(socket.SHUT_RDWR)
    links[0].leave(5, "the loss is inf")
    loss = links[2].loss(5)
    assert loss is not None
    assert (loss.rank, loss.exit_code, loss.message) == (0, 5, "rank 0 stopped: the loss is inf")
    # Who has left does not mind.
    assert links[1].loss(0.2) is None
    assert links[0].loss() is None


@pytest.mark.parametrize("in_step", [True, False])
def test_a_rank_says_that_all_are_in_step_only_once_they_are(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, in_step: bool
) -> None:
    def barrier(group: object) -> None:
        if not in_step:
            raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")

    monkeypatch.setattr(dist, "barrier", barrier)
    links = ends.connect_all(2)
    world = World(Launch(1, 2), None, links[1])
    world.together = True
    world._part(DataError("row 7: 2 is neither 0 nor 1"))
    loss = links[0].loss(0.5 if in_step else 5)
    if in_step:
        assert loss is None
    else:
        assert loss is not None
        assert (loss.rank, loss.exit_code) == (1, 3)
        assert loss.message == "rank 1 stopped: row 7: 2 is neither 0 nor 1"
    # Its process group may wait for the others when it ends.
    assert world.together == in_step


def test_who_does_not_answer_is_named(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    links = ends.connect_all(3)
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)
    links[1].doing, links[2].doing = "reading train batch 3", "computing train batch 3"
    links[2].waiting = True
    for link in links:
        answer = link.who_is_missing()
        assert "every rank answers" in answer
        assert "rank 1 is reading train batch 3" in answer
        assert "rank 2 is waiting for the others after computing train batch 3" in answer
    monkeypatch.setattr(links[1], "_handle", lambda rank, message: None)
    assert links[2].who_is_missing() == "rank 1 does not answer: stopped, or the machine cannot be reached"


def test_strangers_are_not_ranks(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.2)
    opened: list[PeerLink] = []
    middle = threading.Thread(target=lambda: opened.append(ends.connect(0, 2)))
    middle.start()
    ends.store.wait(["recemb/peers"])
    port = peers.json.loads(ends.store.get("recemb/peers"))["port"]
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 1, "token": "guess"}\n', b"[1]\n", b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(noise)
    link = ends.connect(1, 2)
    middle.join(10)
    assert set(opened[0]._lines) == {1}
    assert "every rank answers" in link.who_is_missing()


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"no word from ranks 1, 2 in 0.2 s"):
        PeerLink(0, 3, HashStore(), "127.0.0.1", 0.2)
