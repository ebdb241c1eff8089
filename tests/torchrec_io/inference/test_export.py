"""torch.export of whole collections: other sizes, refused batches, and another process."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torchrec.quant.embedding_modules import quant_prep_enable_quant_state_dict_split_scale_bias_for_types

from recemb import EmbeddingBagCollection
from recemb.backends import BACKENDS
from recemb.errors import BatchError, ConfigError
from recemb.inference.description import Description
from recemb.inference.op import _idle_programs
from recemb.spec import ROBE, HotRows, TableSpec, TensorTrain
from recemb.torchrec_io import quantize_embeddings
from recemb_kernels.storage import StoredAs
from tests.torchrec_io.inference.models import COMPRESSIONS, KEYS, ROWS, Served, batch, collection, request

KINDS = ["float", torch.int8, torch.float16]


def _served(kind: object, weighted: bool = False) -> nn.Module:
    trained = collection(weighted)
    return trained if kind == "float" else quantize_embeddings(trained, kind)


def _export(ebc: nn.Module, given: tuple[Tensor, ...]) -> ExportedProgram:
    sizes: Any = ({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    return export(Served(ebc), given, dynamic_shapes=sizes[: len(given)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_program_gives_the_collections_bits_at_other_sizes(kind: object, weighted: bool) -> None:
    ebc = _served(kind, weighted)
    given = request(6, weighted)
    program = _export(ebc, given).module()
    for size, most in ((6, 4), (1, 2), (23, 9), (3, 1), (0, 4)):
        other = request(size, weighted, most, seed=size)
        with torch.no_grad():
            assert torch.equal(program(*other), ebc(batch(*other)).values()), size


def test_one_look_up_serves_all_tables() -> None:
    program = _export(_served("float"), request(6))
    calls = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("recemb.")]
    assert calls == ["recemb.check_bags.default", "recemb.embedding_bags.default"]


@pytest.mark.parametrize("kind", ["float", torch.int8])
def test_a_bad_batch_is_refused_when_the_program_runs(kind: object) -> None:
    program = _export(_served(kind), request(6)).run_decompositions().module()
    lengths = torch.ones(len(KEYS), 3, dtype=torch.int64)
    for key, table, rows in (("f3", "t3", ROWS + 3), ("f5", "t5", ROWS + 5)):
        for bad in (rows, -1):
            ids = torch.zeros(lengths.numel(), dtype=torch.int64)
            ids[3 * KEYS.index(key) + 2] = bad
            with pytest.raises(
                BatchError, match=rf"feature '{key}' \(table '{table}'\), sample 2, .* id {bad} is"
            ):
                program(ids, lengths)
            assert torch.is_grad_enabled()
    ids = torch.zeros(lengths.numel(), dtype=torch.int64)
    # Nobody looks these up.
    ids[3 * KEYS.index("nobody's")] = 10**9
    program(ids, lengths)
    lengths[0, 0] = -1
    with pytest.raises(BatchError, match="sample 0 has length -1"):
        program(ids, lengths)
    lengths[0, 0] = 7
    with pytest.raises(BatchError, match="lengths must sum to the number of values"):
        program(ids, lengths)


def test_two_programs_of_one_description_keep_their_weights() -> None:
    given = request(4)
    first, second = collection(), collection()
    for parameter in second.parameters():
        parameter.data.mul_(-0.5)
    programs = [_export(ebc, given).module() for ebc in (first, second)]
    for _ in range(2):
        for program, ebc in zip(programs, (first, second), strict=True):
            with torch.no_grad():
                assert torch.equal(program(*given), ebc(batch(*given)).values())
    # What is loaded later counts.
    programs[0].load_state_dict(programs[1].state_dict())
    assert torch.equal(programs[0](*given), programs[1](*given))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_in_a_program_once(kind: object) -> None:
    assert not _export(_served(kind), request(6)).constants


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_with_their_program(kind: object) -> None:
    given = request(4)
    ebc = _served(kind)
    program = _export(ebc, given).module()
    program(*given)
    held = [weakref.ref(tensor.untyped_storage()) for tensor in program.state_dict().values()]
    del program, ebc
    gc.collect()
    assert not any(memory() is not None for memory in held)


def test_any_number_of_programs_is_kept_ready() -> None:
    given = request(4)
    first = _export(_served("float"), given).module()
    programs = [first, *(copy.deepcopy(first) for _ in range(20))]
    for program in programs:
        program(*given)
    with patch("recemb.inference.op._Program", side_effect=AssertionError("built again")):
        for program in programs:
            program(*given)


def test_threads_share_a_program() -> None:
    program = _export(_served(torch.int8), request(6)).module()
    requests = [request(size, seed=size) for size in range(1, 9)]
    expected = [program(*given) for given in requests]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(lambda given: program(*given), requests), expected, strict=True):
                assert torch.equal(found, right)


def test_stored_tensors_of_other_tables_are_refused() -> None:
    program = _export(_served(torch.int8), request(6)).module()
    ids, lengths = request(6)
    with patch("recemb.inference.op._idle_programs", wraps=_idle_programs) as seen:
        program(ids, lengths)
    text, stored = seen.call_args.args
    given = (ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)]), None, text)
    first, second = "table 't0': core_0", "table 't0': core_1"
    for wrong, message in (
        ([stored[0][:1], *stored[1:]], f"{first} is torch.uint8 of shape .* and stored has"),
        ([stored[0], stored[1].float(), *stored[2:]], f"{second} is .* and stored has torch.float32 of"),
        (
            [*stored, stored[0]],
            rf"stored has {len(stored) + 1} tensors and the tables {len(stored)} \({first}",
        ),
        (stored[:-1], rf"stored has {len(stored) - 1} tensors and the tables {len(stored)} "),
        ([], f"stored has 0 tensors and the tables {len(stored)} "),
    ):
        with pytest.raises(ConfigError, match=message):
            torch.ops.recemb.embedding_bags(wrong, *given)
    strided = torch.stack([stored[0], stored[0]], dim=2)[:, :, 0]
    expected = torch.ops.recemb.embedding_bags(stored, *given)
    torch.testing.assert_close(torch.ops.recemb.embedding_bags([strided, *stored[1:]], *given), expected)


def test_an_exported_program_is_not_trained() -> None:
    given = request(4)
    pooled = _export(_served("float"), given).module()(*given)
    with pytest.raises(RuntimeError, match="exported programs are for inference"):
        pooled.sum().backward()


def test_a_saved_program_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    given = request(6)
    for kind, name in (("float", "float"), (torch.int8, "int8")):
        ebc = _served(kind)
        torch.export.save(_export(ebc, given), tmp_path / f"{name}.pt2")
        other = request(9, seed=3)
        with torch.no_grad():
            torch.save((*other, ebc(batch(*other)).values()), tmp_path / f"{name}.pt")
    script = f"""
import sys, torch, recemb.inference.op
for name in ("float", "int8"):
    program = torch.export.load(r"{tmp_path}/" + name + ".pt2").module()
    ids, lengths, expected = torch.load(r"{tmp_path}/" + name + ".pt")
    assert torch.equal(program(ids, lengths), expected), name
    ids[0] = 10**9
    try:
        program(ids, lengths)
    except ValueError as error:
        print(error)
assert "torchrec" not in sys.modules and "fbgemm_gpu" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("id 1000000000 is outside [0, 90)") == 2


def test_other_batch_sizes_per_key_are_refused() -> None:
    from torchrec import KeyedJaggedTensor

    class VariableBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = collection()

        def forward(self, ids: Tensor, lengths: Tensor, inverse: Tensor) -> Tensor:
            features = KeyedJaggedTensor(
                keys=KEYS,
                values=ids,
                lengths=lengths,
                stride_per_key_per_rank=[[1]] * len(KEYS),
                inverse_indices=(KEYS, inverse),
            )
            pooled: Tensor = self.ebc(features).values()
            return pooled

    ones = torch.ones(len(KEYS), dtype=torch.int64)
    inverse = torch.zeros(len(KEYS), 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"batch size per key \(VBE\) is not supported"):
        export(VariableBatch(), (ones, ones, inverse))


def test_tables_that_torchrec_looks_up_are_not_exported() -> None:
    served = quantize_embeddings(collection(), torch.int8)
    with (
        patch("recemb.torchrec_io.inference.collection.in_place", return_value=None),
        pytest.raises(ConfigError, match="that are on the CPU and not sharded"),
    ):
        _export(served, request(3))


def test_what_is_not_exported_is_named() -> None:
    trained = collection()
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types(trained, [EmbeddingBagCollection])
    with pytest.raises(ConfigError, match="scales and biases not apart from the weights"):
        _export(quantize_embeddings(trained, torch.int8), request(3))


def test_a_description_comes_back_equal() -> None:
    every = [
        *COMPRESSIONS,
        TensorTrain(rank=(2, 3), num_cores=3, row_shape=(5, 5, 5), dim_shape=(2, 2, 2)),
        ROBE(compress_rate=2, block_size=4, group="other", seed=7, cache=HotRows(fraction=0.1, policy="lru")),
    ]
    assert {type(compression) for compression in every} == {b.compression_type for b in BACKENDS}
    tables = tuple(
        TableSpec(
            name=f"t{k}",
            num_embeddings=100,
            embedding_dim=8,
            pooling="mean",
            compression=compression,
            dtype="float16",
        )
        for k, compression in enumerate(every)
    )
    kinds = {"t0": StoredAs.INT8, "t1": StoredAs.TBE_INT8}
    description = Description(tables, kinds, ("a", "b"), (("a", "t0", 100),))
    assert Description.from_text(description.to_text()) == description
    with pytest.raises(ConfigError, match="exported in format 0 and this recemb reads format 1"):
        Description.from_text(description.to_text().replace('"format": 1', '"format": 0'))
