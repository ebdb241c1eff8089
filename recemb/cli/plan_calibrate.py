"""``recemb plan --calibrate``: the constants of the cost model, measured on the machine at hand."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.data.layout import write_json
from recemb.data.zipf import BoundedZipf
from recemb.errors import ConfigError
from recemb.planner.costs import Constant, Costs, default_costs
from recemb.planner.work import forward_work
from recemb.spec import ROBE, Compression, Dense, MixedDimension, QuotientRemainder, TableSpec, TensorTrain
from recemb.torchrec_io.configs import to_configs
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection

_ROWS, _DIM, _BATCH = 1_000_000, 64, 16_384
_REPEATS = 20
_SETTINGS: dict[str, Compression] = {
    "dense": Dense(),
    "tt": TensorTrain(rank=16),
    "qr": QuotientRemainder(collisions=4),
    "robe": ROBE(compress_rate=100, block_size=_DIM),
    "md": MixedDimension(dim=8),
}


def calibrate(device: str, output: Path) -> str:
    """Measure, write the file, and return the constants as text. Takes some seconds.

    Raises:
        ConfigError: no such device in this machine, or the file cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--calibrate --device cuda: torch sees no CUDA device; use --device cpu")
    costs = measure(torch.device(device))
    try:
        write_json(output, costs.as_dict())
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}; choose another file") from None
    lines = [f"{'constant':<24}{'value':>14} {'unit':<8} origin"]
    for name, constant in costs.constants.items():
        lines.append(f"{name:<24}{constant.value:>14.4g} {constant.unit:<8} {constant.origin}"[:100])
    return "\n".join(lines)


def measure(device: torch.device) -> Costs:
    """The constants of this machine; those of links and of other memories stay as they come along."""
    base = default_costs(device.type)
    where = _machine(device)
    memory = "hbm_bandwidth" if device.type == "cuda" else "ddr_bandwidth"
    draw = np.random.Generator(np.random.PCG64(0))
    ids = torch.from_numpy(BoundedZipf(_ROWS, base["id_skew"]).sample(draw, _BATCH)).to(device)
    changed = {
        memory: Constant(_gather_bandwidth(device), "byte/s", f"random rows of {4 * _DIM} bytes, {where}"),
        "flops": Constant(_flops(device), "FLOP/s", f"float32 product of 1024 x 1024, {where}"),
    }
    costs = replace(base, name=where).with_constants(changed)
    for method, compression in _SETTINGS.items():
        table = TableSpec(name="t", num_embeddings=_ROWS, embedding_dim=_DIM, compression=compression)
        forward, step = _look_ups(table, ids)
        if method == "dense":
            changed["backward_factor"] = _ratio(step - forward, forward, f"uncompressed table, {where}")
            continue
        work = forward_work(table, float(_BATCH), float(_BATCH), base["id_skew"])
        unit = {f"{method}_forward": Constant(1.0, "1", "")}
        least = costs.with_constants(unit).forward_ms(method, work)
        changed[f"{method}_forward"] = _ratio(forward, least, f"{_BATCH:,} ids, {where}")
        changed[f"{method}_backward"] = _ratio(step - forward, forward, f"{_BATCH:,} ids, SGD, {where}")
    return costs.with_constants(changed)


def _ratio(measured: float, of: float, origin: str) -> Constant:
    return Constant(max(measured / of, 0.01), "1", origin)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, {datetime.now(UTC):%Y-%m-%d}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _look_ups(table: TableSpec, ids: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of a forward without gradients and of a training step with SGD in the backward."""
    collection = EmbeddingBagCollection(tables=to_configs([table]), device=ids.device)
    _apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.0})
    lengths = torch.ones(len(ids), dtype=torch.int64, device=ids.device)
    batch = KeyedJaggedTensor(keys=list(table.feature_names), values=ids, lengths=lengths)
    gradient = torch.ones(len(ids), table.embedding_dim, device=ids.device)

    def forward() -> None:
        with torch.no_grad():
            collection(batch).values()

    def step() -> None:
        collection(batch).values().backward(gradient)

    return _best(forward, ids.device), _best(step, ids.device)


def _gather_bandwidth(device: torch.device) -> float:
    table = torch.ones(2**29 // (4 * _DIM), _DIM, device=device)
    rows = 2**17
    turns = [torch.randint(len(table), (rows,), device=device) for _ in range(_REPEATS + 2)]
    out = torch.empty(rows, _DIM, device=device)
    ms = _best(lambda: torch.index_select(table, 0, turns.pop(), out=out), device)
    # Read and written.
    return 2 * 4 * _DIM * rows / (ms * 1e-3)


def _flops(device: torch.device) -> float:
    left, right = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    ms = _best(lambda: torch.mm(left, right), device)
    return 2 * 1024**3 / (ms * 1e-3)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the fastest of a few calls, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return min(times[1:])
