"""The whole collection on a GPU against the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torchrec
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor

from recemb import (
    ROBE,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)
from recemb.errors import BatchError, NonFiniteError
from recemb_kernels.triton_frame.verdict import poll
from tests.gpu.device import BATCH, IS_REAL
from tests.kernels.triton.program_order import shuffled_programs

pytestmark = pytest.mark.gpu

METHODS = {
    "tt": TensorTrain(rank=16),
    "wide": TensorTrain(rank=8, num_cores=2),
    "qr": QuotientRemainder(collisions=7),
    "robe": ROBE(compress_rate=10, block_size=8),
    # Their products are one.
    "md": MixedDimension(dim=4),
    "md too": MixedDimension(dim=4),
    "dense": Dense(),
}
# Of sizes that the others have none of: a train's compression, and the table's dim.
TRAINS = {
    "four cores": (TensorTrain(rank=16, num_cores=4), 32),
    "rank 64": (TensorTrain(rank=64), 64),
}
OPTIMIZERS = {
    # Gradients of a mean over all of a batch are small.
    "sgd": (torch.optim.SGD, {"lr": 1e3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
}


def collection(
    device: str, weighted: bool = False, rows: int = 5000, names: Iterable[str] = METHODS
) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=rows,
            embedding_dim=32,
            feature_names=[name],
            compression=METHODS[name],
            pooling=torchrec.PoolingType.SUM,
        )
        for name in names
    ]
    made = EmbeddingBagCollection(tables=tables, is_weighted=weighted)
    return made.to(device)


def features(
    seed: int, batch: int = BATCH, weighted: bool = False, rows: int = 5000, shift: int = 0
) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (len(METHODS) * batch,), generator=generator)
    values = (torch.rand(int(lengths.sum()), generator=generator) ** 2 * rows).long().add(shift) % rows
    weights = torch.rand(values.numel(), generator=generator) if weighted else None
    return KeyedJaggedTensor(keys=list(METHODS), values=values, lengths=lengths, weights=weights)


def loss_of(pooled: Tensor) -> Tensor:
    return (pooled * torch.sin(torch.arange(pooled.shape[1], device=pooled.device))).square().mean()


def assert_near(found: Tensor, exact: Tensor, part: float = 1e-3) -> None:
    """No number is further off than a part of the largest, however small that is."""
    off = (found.cpu() - exact.cpu()).abs().max()
    assert off <= part * exact.abs().max()


def assert_same_gradients(
    gpu: EmbeddingBagCollection, cpu: EmbeddingBagCollection, kjt: KeyedJaggedTensor
) -> None:
    """Of outputs too."""
    ours, theirs = gpu(kjt.to("cuda")).values(), cpu(kjt).values()
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for mine, other in zip(gpu.parameters(), cpu.parameters(), strict=True):
        assert_near(mine.grad, other.grad)


@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_and_gradients(weighted: bool) -> None:
    cpu = collection("cpu", weighted)
    assert_same_gradients(copy.deepcopy(cpu).to("cuda"), cpu, features(1, weighted=weighted))


@pytest.mark.parametrize("name", TRAINS)
def test_trains_of_other_sizes(name: str) -> None:
    compression, dim = TRAINS[name]
    config = EmbeddingBagConfig(
        name="t_tt",
        num_embeddings=5000,
        embedding_dim=dim,
        feature_names=list(METHODS),
        compression=compression,
    )
    torch.manual_seed(0)
    cpu = EmbeddingBagCollection(tables=[config])
    assert_same_gradients(copy.deepcopy(cpu).to("cuda"), cpu, features(1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps(name: str) -> None:
    kind, settings = OPTIMIZERS[name]
    cpu = collection("cpu")
    gpu = copy.deepcopy(cpu).to("cuda")
    before = [parameter.detach().clone() for parameter in cpu.parameters()]
    for module in (cpu, gpu):
        apply_optimizer_in_backward(kind, module.parameters(), settings)
    for seed in range(3):
        kjt = features(seed)
        loss_of(gpu(kjt.to("cuda")).values()).backward()
        loss_of(cpu(kjt).values()).backward()
    for mine, other, old in zip(gpu.parameters(), cpu.parameters(), before, strict=True):
        # Adam divides gradients by their own size: those near rounding may point anywhere.
        loose = 5e-2 if name == "adam" else 1e-3
        torch.testing.assert_close(mine.cpu(), other, rtol=loose, atol=loose * 1e-1)
        if name == "sgd":
            # Steps of 1e-3, of which float32 keeps four digits.
            assert_near(mine.detach().cpu() - old, other.detach() - old, 1e-2)


@pytest.mark.parametrize("micro_batch_rows", [100, 150])
def test_several_micro_batches(micro_batch_rows: int) -> None:
    """A second one is another number to the compiler than the first; one of 150 rows can have all nodes."""
    torch.manual_seed(0)
    config = EmbeddingBagConfig(
        name="t_tt",
        num_embeddings=5000,
        embedding_dim=32,
        feature_names=list(METHODS),
        compression=TensorTrain(rank=16),
    )
    whole = EmbeddingBagCollection(tables=[config], device="cuda")
    sliced = EmbeddingBagCollection(tables=[config], device="cuda", micro_batch_rows=micro_batch_rows)
    sliced.load_state_dict(whole.state_dict())
    kjt = features(1).to("cuda")
    assert kjt.values().unique().numel() > micro_batch_rows
    outputs = [ebc(kjt).values() for ebc in (whole, sliced)]
    assert torch.equal(*outputs)
    for pooled in outputs:
        loss_of(pooled).backward()
    for first, second in zip(whole.parameters(), sliced.parameters(), strict=True):
        assert_near(second.grad, first.grad)


@pytest.mark.parametrize("policy", ["lfu", "lru", "importance"])
def test_cached_rows(policy: str) -> None:
    torch.manual_seed(0)
    hot = HotRows(rows=100, policy=policy, refresh_every=2, warmup=1, decay=0.25, track_every=1)
    tables = [
        EmbeddingBagConfig(
            name="t_tt",
            num_embeddings=5000,
            embedding_dim=32,
            feature_names=list(METHODS),
            compression=TensorTrain(rank=8, cache=hot),
        )
    ]
    cpu = EmbeddingBagCollection(tables=tables)
    gpu = copy.deepcopy(cpu).to("cuda")
    for module in (cpu, gpu):
        apply_optimizer_in_backward(torch.optim.Adagrad, module.parameters(), {"lr": 0.1})
    for seed in range(6):
        # Other rows are hot from the fourth batch on.
        kjt = features(seed, shift=2500 * (seed > 2))
        ours, theirs = gpu(kjt.to("cuda")).values(), cpu(kjt).values()
        # Adagrad's first step divides a gradient by its own size: one near rounding may point anywhere, and
        # the least squares of a write-back carry that into the rows beside it.
        apart = (ours.cpu() - theirs).abs() > 1e-3 + 1e-2 * theirs.abs()
        assert apart.float().mean() < 5e-2
        if policy != "importance":  # whose gradient norms differ by rounding
            held = (module.hot_row_caches()["t_tt"].ids.cpu() for module in (gpu, cpu))
            assert torch.equal(*held)
        loss_of(ours).backward()
        loss_of(theirs).backward()
    own, other = (module.cache_metrics()["t_tt"] for module in (gpu, cpu))
    assert other.promotions > 100
    assert own.promotions == pytest.approx(other.promotions, rel=0.05)
    assert other.evictions > 10
    assert own.evictions == pytest.approx(other.evictions, rel=0.05)
    assert own.lookups == other.lookups > 0
    assert own.hit_rate == pytest.approx(other.hit_rate, abs=0.02)
    assert own.hit_rate > 0
    assert own.write_back_error == pytest.approx(other.write_back_error, rel=0.05)
    assert 0 < own.write_back_error < 0.99


def trained(gpu: EmbeddingBagCollection, given: Sequence[KeyedJaggedTensor], ahead: bool) -> list[Tensor]:
    """The weights after a step on each batch, the next one prepared between forward and backward or not."""
    for k, kjt in enumerate(given):
        loss = loss_of(gpu(kjt).values())
        if ahead and k + 1 < len(given):
            gpu.prefetch(given[k + 1])
        loss.backward()
    return [p.detach().clone() for p in gpu.parameters()]


def step_without_waiting(gpu: EmbeddingBagCollection, kjt: KeyedJaggedTensor) -> None:
    """A step that raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(gpu(kjt).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_a_bad_id_changes_nothing(gpu: EmbeddingBagCollection, kjt: KeyedJaggedTensor) -> None:
    """Put one into the batch, and take a step with it."""
    before = [p.detach().clone() for p in gpu.parameters()]
    kjt.values()[3] = 7000

    def step() -> None:
        loss_of(gpu(kjt).values()).backward()
        poll(wait=True)

    with pytest.raises(BatchError, match=r"id 7000 is outside \[0, 5000\)"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, gpu.parameters(), strict=True))


def test_batches_prepared_ahead_give_the_bits_of_a_plain_run() -> None:
    given, states = [features(seed).to("cuda") for seed in range(5)], []
    for ahead in (False, True):
        gpu = collection("cuda")
        apply_optimizer_in_backward(torch.optim.Adagrad, gpu.parameters(), {"lr": 0.1})
        states.append(trained(gpu, given, ahead))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_step_never_waits_for_the_gpu() -> None:
    gpu = collection("cuda")
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, gpu.parameters(), {"lr": 0.1})
    kjt = features(1).to("cuda")
    kjt.sync()
    for _ in range(2):  # kernels are compiled and tuned
        loss_of(gpu(kjt).values()).backward()
    step_without_waiting(gpu, kjt)


def test_two_runs_give_the_same_bits() -> None:
    kjt, outputs = features(1).to("cuda"), []
    for seed in range(2):
        gpu = collection("cuda")
        apply_optimizer_in_backward(torch.optim.Adagrad, gpu.parameters(), {"lr": 0.1})
        with nullcontext() if IS_REAL else shuffled_programs(seed):
            loss_of(gpu(kjt).values()).backward()
        outputs.append([p.detach().clone() for p in gpu.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_bad_id_is_named_and_changes_nothing() -> None:
    gpu = collection("cuda")
    apply_optimizer_in_backward(torch.optim.SGD, gpu.parameters(), {"lr": 0.1})
    assert_a_bad_id_changes_nothing(gpu, features(1).to("cuda"))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    gpu = collection("cuda")
    apply_optimizer_in_backward(torch.optim.SGD, gpu.parameters(), {"lr": 0.1})
    before = [p.detach().clone() for p in gpu.parameters()]
    kjt = features(1).to("cuda")

    def step() -> None:
        (gpu(kjt).values().sum() * float("nan")).backward()
        poll(wait=True)

    with pytest.raises(NonFiniteError, match="none of their weights was changed"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, gpu.parameters(), strict=True))
