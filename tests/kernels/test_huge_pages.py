"""What is read in no order lies on huge pages, where the machine has them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

from recemb.backends import build
from recemb.backends.native import pooled_native
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.spec import TableSpec
from recemb_kernels import memory
from tests.kernels.cases import make_bags, make_engine, step_all

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(not ENABLED.exists(), reason="a kernel without huge pages")
if_asked_for = pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="huge pages are off on this machine, or all pages are",
)


def flags_at(address: int) -> list[str]:
    """What the kernel knows of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            first, past = (int(part, 16) for part in name.split("-"))
            inside = first <= address < past
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError("no such mapping")


def is_asked_for(tensor: Tensor) -> bool:
    return "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)


def huge_bytes() -> int:
    """Of this process. Mappings side by side are one: which pages of it are huge is not told."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def have_moved(tensors: Sequence[Tensor], before: int) -> bool:
    """Whether pages have become huge, or the kernel, which has none left, has been asked for them."""
    grown = huge_bytes() - before
    return grown > sum(tensor.nbytes for tensor in tensors) // 2 or all(map(is_asked_for, tensors))


def test_pages_of_large_outputs_are_huge() -> None:
    """glibc maps blocks of more than 32 MB anew for every batch: pages of 4 kB took half of a forward."""
    engine, tables = make_engine()
    step_all(tables, torch.optim.SGD, 0.1)
    out = pooled_native(
        [tables[target.table] for target in engine.targets], make_bags(engine, 10**5, 1, seed=0)
    )
    assert out is not None
    assert out.nbytes > 2**25
    assert is_asked_for(out)


@if_asked_for
@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adam])
def test_pages_of_large_states_are_huge_after_a_step(kind: type[torch.optim.Optimizer]) -> None:
    spec = TableSpec(name="t", num_embeddings=700_000, embedding_dim=16, feature_names=("t",))
    tables = build([spec], torch.device("cpu"))
    tables["t"].reset_parameters()
    (parameter,) = tables["t"].parameters()
    apply_optimizer_in_backward(kind, [parameter], {"lr": 0.1})
    before = huge_bytes()
    Engine([spec])(tables, Bags(torch.tensor([5, 7]), torch.arange(3), 1)).sum().backward()
    state = parameter._in_backward_optimizers[0].state[parameter]  # type: ignore[attr-defined]
    large = [value for value in state.values() if value.numel() > 1]
    assert large
    assert have_moved(large, before)


@if_asked_for
def test_moved_tensors_keep_their_place_and_their_numbers() -> None:
    tensor = torch.arange(2**23, dtype=torch.float32)
    at, before = tensor.data_ptr(), huge_bytes()
    memory.move_to_huge_pages(tensor)
    assert have_moved([tensor], before)
    assert tensor.data_ptr() == at
    assert torch.equal(tensor, torch.arange(2**23, dtype=torch.float32))


@if_asked_for
def test_other_memory_of_a_tensor_moves_as_well_but_not_what_processes_share() -> None:
    tensor = torch.full((2**23,), 1.0)
    memory.move_to_huge_pages(tensor)
    tensor.data = torch.full((2**23,), 2.0)
    before = huge_bytes()
    memory.move_to_huge_pages(tensor)
    assert have_moved([tensor], before)
    shared = torch.full((2**23,), 1.0).share_memory_()
    memory.move_to_huge_pages(shared)
    assert not is_asked_for(shared)


@if_asked_for
def test_no_page_moves_where_the_owner_has_turned_them_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = tmp_path / "enabled"
    off.write_text("always madvise [never]\n")
    tensor = torch.full((2**23,), 1.0)
    before = huge_bytes()
    for path in (off, tmp_path / "none"):
        monkeypatch.setattr(memory, "_ENABLED", path)
        memory.move_to_huge_pages(tensor)
    assert huge_bytes() - before < tensor.nbytes // 2


def test_a_kernel_that_moves_no_pages_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADV_COLLAPSE", 10**6)
    monkeypatch.setattr(memory, "_are_off", lambda: False)
    tensor = torch.full((2**23,), 1.0)
    memory.move_to_huge_pages(tensor)
    assert is_asked_for(tensor)
