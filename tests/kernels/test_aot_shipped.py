"""The laws of every shipped GPU kernel: no spills, occupancy, 64-bit addresses, exact float32, README."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from recemb.backends.tt_shapes import core_sizes, tt_shapes
from recemb.spec import TensorTrain
from recemb_kernels.aot.registry import MAX_VARIANTS, MODULES
from recemb_kernels.triton_frame.elements import tuned
from recemb_kernels.triton_frame.launches import join_constants as frame_join_constants
from recemb_kernels.triton_frame.launches import place_constants, segment_constants, update_constants
from recemb_kernels.triton_frame.variants import shipped as frame_shipped
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.tt_gather.triton_kernel import multiply, slice_gradient
from recemb_kernels.tt_gather.triton_shipped import shipped
from recemb_kernels.tt_gather.triton_variants import (
    EVERY,
    Tiles,
    children_constants,
    gradient_constants,
    gradient_variants,
    join_constants,
    multiply_constants,
    multiply_variants,
)
from recemb_kernels.update import Kind
from tests.kernels.apart import compiled_apart

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"

# All kernels are compiled in the first test's set-up, in about three minutes on two cores.
pytestmark = pytest.mark.timeout(900)

# A compilation takes a third of a second of one core, and CI does all of them.
MOST_COMPILATIONS = 1200


def _recemb(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "recemb", "kernels", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def renewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What one run of the command prints, and the README as it would write it."""
    copy = tmp_path_factory.mktemp("readme") / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    return _recemb("--format", "json", "--write", str(copy)), copy.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(renewed: tuple[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(renewed[0])
    assert found, "the registry ships no kernel, so no law was tested"
    return found


@pytest.mark.parametrize("num_cores", [2, 3, 4])
def test_trains_of_the_default_shapes_are_shipped(num_cores: int) -> None:
    """The README says so: of 16 to 64 dimensions, and of 128 in three cores, at ranks 16, 32 and 64."""
    found = {(c.kernel.split(".")[1], repr(dict(c.constants))) for c in shipped()}
    for dim, rank in product((16, 32, 64, 128) if num_cores == 3 else (16, 32, 64), (16, 32, 64)):
        method = TensorTrain(rank=rank, num_cores=num_cores)
        for split in {tt_shapes(int(100 * 1.9**k), dim, method)[1] for k in range(20)}:
            shape = TrainShape((1,) * num_cores, split, (1, *[rank] * (num_cores - 1), 1))
            for k, dtype in product(range(1, num_cores), (torch.float32, torch.bfloat16)):
                for forward in (True, False) if k < num_cores - 1 or shape.stores_shares else (True,):
                    assert ("multiply", repr(multiply_constants(shape, k, dtype, forward))) in found
                assert ("slice_gradient", repr(gradient_constants(shape, k, dtype))) in found
                children = children_constants(shape, dtype)
                children.pop("num_warps")
                assert ("sum_children", repr(children)) in found
            joined = join_constants(shape)
            joined.pop("num_warps")
            assert ("join_children", repr(joined)) in found


@pytest.mark.parametrize("num_cores", [2, 3, 4])
def test_steps_of_the_default_shapes_are_shipped(num_cores: int) -> None:
    """Of their slices and of whole rows, and the sums over their nodes: in float32, few in 16 bits."""
    found = {(c.kernel, repr(dict(c.constants))) for c in frame_shipped()}

    def compiled(kernel: str, launch: dict[str, Any]) -> bool:
        constants = {name: value for name, value in launch.items() if name != "num_warps"}
        return (f"frame.{kernel}", repr(constants)) in found

    def steps(
        kind: Kind,
        widths: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        state: torch.dtype | None = None,
    ) -> bool:
        return all(compiled("update_rows", update_constants(kind, w, dtype, state)) for w in widths)

    for dim, rank in product((16, 32, 64), (16, 32, 64)):
        method = TensorTrain(rank=rank, num_cores=num_cores)
        for split in {tt_shapes(int(100 * 1.9**k), dim, method)[1] for k in range(20)}:
            slices = core_sizes(split, method.ranks)
            assert steps(Kind.ROWWISE_ADAGRAD, (*slices, dim))
            if (dim, rank, num_cores) == (16, 32, 3):
                assert all(steps(kind, slices) for kind in set(Kind) - {Kind.GRADIENT})
                for dtype in (torch.bfloat16, torch.float16):
                    assert steps(Kind.SGD, slices, dtype)
                    assert all(steps(k, slices, dtype, dtype) for k in (Kind.ADAGRAD, Kind.ROWWISE_ADAGRAD))
            for width in (math.prod(split[:k]) * rank for k in range(1, num_cores - 1)):
                assert compiled("segment_sum", segment_constants(width, True))
            assert all(compiled("sum_places", place_constants(dim, scaled, True)) for scaled in (False, True))
            assert compiled("join_places", frame_join_constants(dim, True))


def test_what_is_tried_at_first_is_shipped() -> None:
    """Of every product's constants, all the warps and stages that a launch with them tries."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False  # whose launches try nothing
        tuners = {
            "tt_gather.multiply": tuned(multiply, ("Q",), EVERY, multiply_variants),
            "tt_gather.slice_gradient": tuned(slice_gradient, ("Q",), EVERY, gradient_variants),
        }
    for tuner in tuners.values():
        tuner.nargs = {}
    own: dict[tuple[object, ...], set[tuple[int, int]]] = {}
    constants: dict[tuple[object, ...], dict[str, object]] = {}
    for c in shipped():
        if c.kernel in tuners:
            key = (c.kernel, repr(dict(c.signature)), repr(dict(c.constants)))
            own.setdefault(key, set()).add((c.num_warps, c.num_stages))
            constants[key] = dict(c.constants)
    numbers = {len(each) for each in own.values()}
    assert numbers == {1, 2}
    for key, found in own.items():
        tried = tuners[str(key[0])].prune_configs(constants[key])
        assert found == {(c.num_warps, c.num_stages) for c in tried}, key


def _named(rows: list[dict[str, Any]], *keys: str) -> list[str]:
    which = ("kernel", "note", "arch", "dtype", "num_warps", *keys)
    return [", ".join(f"{key} {row[key]}" for key in which) for row in rows]


def test_every_module_ships_for_both_architectures(rows: list[dict[str, Any]]) -> None:
    assert 2 * len(MODULES) <= len(rows) <= MOST_COMPILATIONS
    assert sorted(row["arch"] for row in rows) == ["sm_80"] * (len(rows) // 2) + ["sm_90"] * (len(rows) // 2)


def test_no_kernel_spills(rows: list[dict[str, Any]]) -> None:
    assert _named([row for row in rows if row["spill_bytes"] != 0], "spill_bytes") == []


def test_every_kernel_reaches_its_stated_occupancy(rows: list[dict[str, Any]]) -> None:
    below = [row for row in rows if row["occupancy"] < row["min_occupancy"]]
    assert (
        _named(below, "occupancy", "min_occupancy", "occupancy_limited_by", "registers", "shared_bytes") == []
    )


def test_every_address_is_64_bit(rows: list[dict[str, Any]]) -> None:
    assert _named([row for row in rows if row["i32_offsets"] != 0], "problems") == []


def test_no_tensor_core_touches_float32(rows: list[dict[str, Any]]) -> None:
    """They would round it to TF32; Triton has made a dot of a sum of products before."""
    rounding = [row for row in rows if row["dtype"] == "float32" and row["instructions"]["tensor_core"]]
    assert _named([row for row in rounding if not row["rounds"]]) == []
    assert len(rounding) == sum(row["rounds"] for row in rows), "a user who allows TF32 gets it"
    assert any(row["instructions"]["tensor_core"] for row in rows if row["dtype"] == "bfloat16")


def test_no_kernel_adds_up_by_atomics(rows: list[dict[str, Any]]) -> None:
    """Their order would be another in every run, and so would be the bits."""
    assert _named([row for row in rows if row["instructions"]["atomic"]]) == []


def test_the_readme_shows_these_kernels(renewed: tuple[str, str]) -> None:
    renew = "recemb kernels --write kernels/README.md renews it"
    assert renewed[1] == README.read_text(encoding="utf-8"), renew


def test_integers_that_triton_specialises(rows: list[dict[str, Any]]) -> None:
    """1, a Python number without a tensor's methods then, and multiples of 16: nothing spills of either."""
    found = compiled_apart("aot_integers.py")
    assert found["spills"] == []
    assert found["kernels"] == len({row["kernel"] for row in rows})
    assert found["compiled"] > found["kernels"]


def test_a_few_that_are_not_shipped_keep_the_laws() -> None:
    """Rows of other widths, all of which ``recemb kernels --check`` compiles, and trains of other shapes."""
    found = compiled_apart("aot_unshipped.py")
    assert found["broken"] == []
    assert found["compiled"] == 48


def test_few_variants_are_tried() -> None:
    """Of every product that K and N can make: conditions look no further than at 64."""
    numbers = set()
    for inner, outer, forward, precision in product(
        range(1, 129), range(1, 129), (True, False), ("ieee", "tf32")
    ):
        dot = Tiles.of(inner, outer).dot
        constants = {"DOT": dot, "FORWARD": forward, "PRECISION": precision, "K": inner, "N": outer}
        for tried in (multiply_variants(constants), gradient_variants(constants)):
            assert set(tried) <= set(EVERY)
            numbers.add(len(set(tried)))
    assert numbers == {1, MAX_VARIANTS}
