"""Quantised tables of every method: the look-up of what is stored, and how far that is from the trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recemb.backends import BACKENDS, build
from recemb.backends.base import Backend
from recemb.backends.native import served_natively
from recemb.bags import Bags
from recemb.engine import Engine
from recemb.inference.table import QuantizedBackend, build_quantized, stored_bytes
from recemb.spec import (
    ROBE,
    Dense,
    HotRows,
    MixedDimension,
    QuotientRemainder,
    TableSpec,
    TensorTrain,
)
from recemb_kernels.storage import StoredAs

CPU = torch.device("cpu")
DIM, SIZE = 16, 7
_ROBE = ROBE(compress_rate=4, block_size=8, use_sign=True)
_COMPRESSIONS = (
    TensorTrain(rank=16),  # whose last core has whole vectors of columns
    TensorTrain(rank=3, num_cores=2),
    QuotientRemainder(collisions=9, operation="mult"),
    QuotientRemainder(collisions=9, operation="add"),
    QuotientRemainder(collisions=9, operation="concat"),
    MixedDimension(dim=6),
    MixedDimension(dim=2),
    _ROBE,
    replace(_ROBE, cache=HotRows(rows=9)),
    ROBE(compress_rate=4, block_size=5, group="narrow blocks"),
    TensorTrain(rank=8, cache=HotRows(rows=9)),
    Dense(),
)


def _specs(pooling: str = "") -> list[TableSpec]:
    return [
        TableSpec(
            name=f"t{k}",
            num_embeddings=90 + k,
            embedding_dim=DIM,
            feature_names=(f"f{k}", "shared") if k == 2 else (f"f{k}",),
            pooling=pooling or ("sum", "mean")[k % 2],  # type: ignore[arg-type]
            compression=compression,
            init_std=0.5,
        )
        for k, compression in enumerate(_COMPRESSIONS)
    ]


def _trained(specs: list[TableSpec]) -> dict[str, Backend]:
    torch.manual_seed(0)
    tables = build(specs, CPU)
    for table in tables.values():
        table.reset_parameters()
        if table.cache is not None:
            table.cache.ids[:7] = torch.randperm(90)[:7]
            table.cache.weight.data.normal_()
    return tables


def _quantized(
    specs: list[TableSpec], trained: dict[str, Backend], kind: StoredAs
) -> dict[str, QuantizedBackend]:
    tables = build_quantized(specs, {spec.name: kind for spec in specs}, CPU)
    for name, table in tables.items():
        table.fill(trained[name])
    return tables


def _read(table: QuantizedBackend, name: str) -> Tensor:
    """The values of a parameter, byte by byte."""
    stored, kind = table.own_parameters()[name], table.kinds[name]
    if kind is not StoredAs.INT8:
        return stored.detach().double()
    rows = []
    for row in stored:
        scale, bias = row[-4:].clone().view(torch.float16).tolist()
        rows.append([byte * scale + bias for byte in row[:-4].tolist()])
    return torch.tensor(rows, dtype=torch.float64)


def _with(specs: list[TableSpec], values: dict[str, dict[str, Tensor]]) -> dict[str, Backend]:
    """Float tables that hold these values, in float64."""
    tables = build(specs, CPU)
    for name, table in tables.items():
        table.double()
        for key, parameter in table.named_parameters(recurse=False):
            parameter.data.copy_(values[name][key])
    return tables


def _batch(specs: list[TableSpec], weighted: bool) -> Bags:
    generator = torch.Generator().manual_seed(1)
    rows = [spec.num_embeddings for spec in specs for _ in spec.feature_names]
    lengths = torch.randint(0, 4, (len(rows), SIZE), generator=generator)
    lengths[:, 2] = 0
    lengths[3] = 0
    parts = [
        torch.randint(0, n, (int(count),), generator=generator)
        for n, count in zip(rows, lengths.sum(1), strict=True)
    ]
    ids, offsets = (
        torch.cat(parts),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)]),
    )
    weights = torch.rand(ids.numel(), generator=generator) if weighted else None
    return Bags(ids, offsets, len(rows), weights)


def _pooled(specs: list[TableSpec], rows: dict[str, Tensor], bags: Bags) -> Tensor:
    """A scalar reading of the bags over dense tables in float64."""
    columns = []
    served = [spec for spec in specs for _ in spec.feature_names]
    for f, spec in enumerate(served):
        out = torch.zeros(SIZE, DIM, dtype=torch.float64)
        for b in range(SIZE):
            first, last = bags.offsets[f * SIZE + b : f * SIZE + b + 2].tolist()
            for i in range(first, last):
                weight = 1.0 if bags.weights is None else float(bags.weights[i])
                out[b] += weight * rows[spec.name][bags.ids[i]]
            if spec.pooling == "mean" and last > first:
                out[b] /= last - first
        columns.append(out)
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("kind", [StoredAs.INT8, StoredAs.FLOAT16])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_look_up_is_that_of_the_stored_values(kind: StoredAs, weighted: bool) -> None:
    specs = _specs("sum" if weighted else "")
    quantized = _quantized(specs, _trained(specs), kind)
    owners = {name: table._owner[0] if table._owner else table for name, table in quantized.items()}
    values = {
        name: {key: _read(owner, key) for key in owner.kinds}  # type: ignore[arg-type, union-attr]
        for name, owner in owners.items()
    }
    rows = {name: table.to_dense().double() for name, table in _with(specs, values).items()}
    for name, table in quantized.items():
        if table.cache is not None:
            cached = _read(table.cache, "weight")  # type: ignore[arg-type]
            for slot, row in enumerate(table.cache.ids.tolist()):
                if row >= 0:
                    rows[name][row] = cached[slot]
    bags = _batch(specs, weighted)
    assert all(served_natively([quantized[spec.name] for spec in specs]))
    with torch.no_grad():
        pooled = Engine(specs)(quantized, bags)
    assert pooled.dtype is torch.float32
    torch.testing.assert_close(pooled.double(), _pooled(specs, rows, bags), rtol=2e-6, atol=2e-6)
    # Where there are no kernels, and in to_dense, plain torch says the same.
    for name, table in quantized.items():
        torch.testing.assert_close(table.to_dense().double(), rows[name], rtol=2e-6, atol=2e-6)
    uncached = [spec for spec in specs if not spec.cache_rows]
    part = _batch(uncached, weighted)
    served = [quantized[spec.name] for spec in uncached for _ in spec.feature_names]
    with torch.no_grad():
        plain = QuantizedBackend.pooled_plain(served, part)
    torch.testing.assert_close(plain.double(), _pooled(uncached, rows, part), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [StoredAs.INT8, StoredAs.FLOAT16])
def test_rows_are_within_the_bound_of_the_trained_ones(kind: StoredAs) -> None:
    specs = [replace(spec, compression=replace(spec.compression, cache=None)) for spec in _specs()]
    trained = _trained(specs)
    quantized = _quantized(specs, trained, kind)
    low: dict[str, dict[str, Tensor]] = {}
    high: dict[str, dict[str, Tensor]] = {}
    for name, table in trained.items():
        owner = quantized[name]._owner[0] if quantized[name]._owner else quantized[name]
        for key, parameter in table.own_parameters().items():
            size = parameter.detach().double().abs()
            if owner.kinds[key] is StoredAs.INT8:  # type: ignore[union-attr]
                stored = owner.own_parameters()[key]
                off = stored[:, -4:-2].clone().view(torch.float16).double() / 2
            else:
                off = (size * 2**-11).clamp(min=2**-25)
            low.setdefault(name, {})[key] = size
            high.setdefault(name, {})[key] = size + off
    bounds = {name: table.to_dense().abs() for name, table in _with(specs, high).items()}
    for name, table in _with(specs, low).items():
        bound = bounds[name] - table.to_dense().abs()
        off = (quantized[name].to_dense().double() - trained[name].to_dense().double()).abs()
        assert bool((off <= bound + 1e-6).all()), name
        # It says something: the worst row comes within a factor of 20 of it.
        assert float((off / bound).max()) > 0.05, name


def test_every_method_is_here() -> None:
    assert {type(compression) for compression in _COMPRESSIONS} == {b.compression_type for b in BACKENDS}


def test_bytes_are_those_of_the_tensors() -> None:
    specs = _specs()
    trained = _trained(specs)
    for kind in (StoredAs.INT8, StoredAs.FLOAT16, StoredAs.FLOAT32):
        tables = _quantized(specs, trained, kind)
        tensors = [tensor for table in tables.values() for tensor in table.state_dict().values()]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert sum(stored_bytes(tables).values()) == total


def test_float32_keeps_every_bit() -> None:
    specs = _specs()
    trained = _trained(specs)
    bags = _batch(specs, weighted=False)
    with torch.no_grad():
        kept = Engine(specs)(_quantized(specs, trained, StoredAs.FLOAT32), bags)
        torch.testing.assert_close(kept, Engine(specs)(trained, bags), rtol=0, atol=0)
