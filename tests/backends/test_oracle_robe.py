"""A ROBE row with Python's big integers (arXiv 2108.02191), and the hash's values as constants.

Element j of row x of table e: b = j // Z, s = (A e + B x + Q x**2 + C b + D mod P) mod |M|, and the value is
g * M[(s + j mod Z) mod |M|], g = +-1 by the lowest bit of a second hash when ``use_sign``. P = 2**61 - 1.
Coefficients: the first 8 bytes, big-endian, of SHA-256("recemb/<purpose>/<seed>/<letter>") mod P, where A, B,
C and Q are taken mod P - 1 and raised by 1 so that they are not 0; e is the same integer of the table's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.bags import Bags
from recemb.engine import Engine
from recemb.id_maps.hashing import UniversalHash, stable_integer
from recemb.spec import ROBE, TableSpec
from tests.backends.cases import bags_of, build_tables, table

P = 2305843009213693951
GOLDEN_TABLE = 1471497713413048038
GOLDEN_COEFFICIENTS = (
    1449703523108351160,
    586857078115404695,
    89028470066645938,
    1008383359505079200,
    2221101539498007718,
)
GOLDEN_SLOTS = [
    [2247173576982446466, 30359037835398453, 119387507902044391],
    [443446176168470977, 532474646235116915, 621503116301762853],
    [2137842614967045745, 2226871085033691683, 10056545886643670],
    [490672838450043715, 579701308516689653, 668729778583335591],
]
GOLDEN_SIGNS = [
    [1319573133764400054, 709434924733711555],
    [1793193996337963634, 1183055787307275135],
    [2225437852128393801, 1615299643097705302],
    [1451359029811923041, 841220820781234542],
]
FAR = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33 - 1]


def digest(text: str) -> int:
    value = 0
    for byte in hashlib.sha256(text.encode("utf-8")).digest()[:8]:
        value = value * 256 + byte
    return value % P


def oracle_hash(purpose: str, seed: int, name: str, row: int, block: int) -> int:
    a, b, c, q = (digest(f"recemb/{purpose}/{seed}/{letter}") % (P - 1) + 1 for letter in "ABCQ")
    d = digest(f"recemb/{purpose}/{seed}/D")
    return (a * digest(name) + b * row + q * row * row + c * block + d) % P


def oracle_row(array: list[float], spec: TableSpec, row: int) -> list[float]:
    compression = spec.compression
    assert isinstance(compression, ROBE)
    values = []
    for j in range(spec.embedding_dim):
        block, inside = divmod(j, compression.block_size)
        start = oracle_hash("robe/slot", compression.seed, spec.name, row, block) % len(array)
        value = array[(start + inside) % len(array)]
        odd = oracle_hash("robe/sign", compression.seed, spec.name, row, block) % 2 == 1
        values.append(-value if compression.use_sign and odd else value)
    return values


def check_rows(tables: Sequence[TableSpec], ids: Sequence[Sequence[int]]) -> None:
    built = build_tables(tables).double()
    array = built.backend(tables[0].name).own_parameters()["array"]
    compression = tables[0].compression
    assert isinstance(compression, ROBE)
    assert array.shape[1] == compression.block_size
    exact = sum(spec.num_embeddings * spec.embedding_dim for spec in tables) / compression.compress_rate
    assert abs(array.numel() - exact) <= max(compression.block_size / 2, compression.block_size - exact)
    flat = array.flatten().tolist()
    expected = [
        torch.tensor([oracle_row(flat, spec, i) for i in rows], dtype=torch.float64)
        for spec, rows in zip(tables, ids, strict=True)
    ]
    for spec, rows, want in zip(tables, ids, expected, strict=True):
        backend = built.backend(spec.name)
        assert torch.equal(backend.rows(backend.map_ids(torch.tensor(rows))), want)
    pooled = Engine(tables)(
        built, bags_of([i for rows in ids for i in rows], [1] * sum(map(len, ids)), len(tables))
    )
    assert torch.equal(pooled, torch.cat(expected, dim=1))


@given(
    st.data(),
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_rows(
    data: st.DataObject, shapes: list[tuple[int, int]], block_size: int, use_sign: bool, seed: int
) -> None:
    total = sum(rows * dim for rows, dim in shapes)
    least = block_size * -(-max(dim for _, dim in shapes) // block_size)
    rate = data.draw(st.floats(1, max(1.0, total / least)))
    if round(total / rate / block_size) * block_size < least:
        rate = 1.0
    if round(total / rate / block_size) * block_size < least:
        return
    compression = ROBE(compress_rate=rate, block_size=block_size, use_sign=use_sign, seed=seed)
    tables = [table(rows, dim, compression, name=f"t{k}") for k, (rows, dim) in enumerate(shapes)]
    ids = [
        [0, rows - 1, *data.draw(st.lists(st.integers(0, rows - 1), min_size=3, max_size=3))]
        for rows, _ in shapes
    ]
    check_rows(tables, ids)


@pytest.mark.parametrize("use_sign", [False, True])
@given(ids=st.lists(st.integers(0, 2**33 - 1), max_size=4), seed=st.integers(0, 10))
@settings(derandomize=True, deadline=None, max_examples=4)
def test_f5_ids_beyond_float32_and_int32(use_sign: bool, ids: list[int], seed: int) -> None:
    compression = ROBE(compress_rate=1e6, block_size=3, use_sign=use_sign, seed=seed)
    check_rows([table(2**33, 4, compression)], [[*ids, *FAR]])


def test_f14_two_to_the_33_rows_of_64() -> None:
    check_rows([table(2**33, 64, ROBE(compress_rate=1e6, block_size=64))], [[0, 1, 2**33 - 2, *FAR]])


def test_every_id_below_2_to_the_61() -> None:
    """Ids up to P - 1 through the hash itself: no limb overflows."""
    name = "edge"
    ids = [0, 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**61 - 3, 2**61 - 2]
    for seed in range(20):
        for purpose in ("robe/slot", "robe/sign"):
            got = UniversalHash.from_seed(seed, purpose).blocks(stable_integer(name), torch.tensor(ids), 5)
            want = [[oracle_hash(purpose, seed, name, i, b) for b in range(5)] for i in ids]
            assert got.tolist() == want


@pytest.mark.parametrize("edge", [0, 1, 2**31 - 1, 2**31, 2**60, P - 1])
def test_the_largest_coefficients(edge: int) -> None:
    ids = [0, 1, 2**31 - 1, 2**31, 2**60, P - 1]
    for other in (0, P - 1):
        got = UniversalHash(P - 1, edge, P - 1, other, P - 1 - edge).blocks(P - 1, torch.tensor(ids), 3)
        assert got.tolist() == [
            [((P - 1) ** 2 + edge * i + (P - 1 - edge) * i * i + (P - 1) * b + other) % P for b in range(3)]
            for i in ids
        ]


def test_a_wrapping_row() -> None:
    """The start is the last weight of the array for some id; its block goes on at weight 0."""
    compression = ROBE(compress_rate=40, block_size=4)
    spec = table(40, 4, compression)
    backend = build_tables([spec]).backend("t")
    array = backend.own_parameters()["array"].flatten()
    assert array.numel() == 4
    starts = backend.map_ids(torch.arange(40))[:, 0].tolist()
    assert sorted(set(starts)) == [0, 1, 2, 3]
    dense = backend.to_dense()
    for i, start in enumerate(starts):
        assert torch.equal(dense[i], torch.cat([array[start:], array[:start]]).detach())


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_gradients_of_an_array_of_few_rows(rows: int) -> None:
    """Threads share the array's rows; some have none, and a row's neighbours are others' or itself."""
    spec = table(40 * rows, 4, ROBE(compress_rate=40, block_size=4))
    backend = build_tables([spec]).backend("t")
    assert backend.own_parameters()["array"].shape == (rows, 4)
    torch.manual_seed(0)
    ids, upstream = torch.randint(0, 40 * rows, (700,)), torch.randn(700, 4)
    bags = Bags(ids, torch.arange(701), 1)
    (array,) = backend.own_parameters().values()
    (expected,) = torch.autograd.grad(backend.rows(backend.map_ids(ids)), array, upstream)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            (found,) = torch.autograd.grad(type(backend).pooled([backend], bags), array, upstream)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_golden_values_of_the_hash() -> None:
    """Constants, so that no checkpoint meets another hash: a change would break every stored ROBE table."""
    assert stable_integer("t_cat_0") == GOLDEN_TABLE
    slot = UniversalHash.from_seed(0, "robe/slot")
    assert (slot.a, slot.b, slot.c, slot.d, slot.q) == GOLDEN_COEFFICIENTS
    ids = torch.tensor([0, 1, 10_131_226, 2**33 - 1])
    assert slot.blocks(stable_integer("t_cat_0"), ids, 3).tolist() == GOLDEN_SLOTS
    sign = UniversalHash.from_seed(7, "robe/sign")
    assert sign.blocks(stable_integer("t_cat_0"), ids, 2).tolist() == GOLDEN_SIGNS
