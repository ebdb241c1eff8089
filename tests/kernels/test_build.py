"""The compile-and-cache layer: damaged entries, races, no compiler, sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recemb_kernels import build, native
from tests.kernels.cases import step_or_skip


def loading(cache: Path, source: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that prints what ``answer()`` of the library says: 7."""
    code = (
        "import sys; from pathlib import Path; from recemb_kernels.build import load\n"
        "print(load('answer', [Path(sys.argv[1])], {'ANSWER': 7}).answer())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source)],
        env={**os.environ, "RECEMB_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit code of each, what it printed and what it complained of."""
    said = [process.communicate() for process in running]
    return [(process.returncode, out.strip(), err) for process, (out, err) in zip(running, said, strict=True)]


def test_constants_and_sources_make_the_key(cache: Path, source: Path) -> None:
    assert build.load("answer", [source], {"ANSWER": 41}).answer() == 41
    assert build.load("answer", [source], {"ANSWER": 42}).answer() == 42
    source.write_text(source.read_text().replace("ANSWER;", "ANSWER + 1;"))
    assert build.load("answer", [source], {"ANSWER": 42}).answer() == 43
    assert len(list(cache.glob("*.so"))) == 3
    assert build.load("answer", [source], {"ANSWER": 42}, build.QUICK).answer() == 43
    assert len(list(cache.glob("*.so"))) == 4


@pytest.mark.parametrize("part", ["_compiler_version", "_cpu"])
def test_compiler_and_cpu_make_the_key(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    assert build.load("answer", [source], {"ANSWER": 1}).answer() == 1
    monkeypatch.setattr(build, part, lambda *_: "another")
    assert build.load("answer", [source], {"ANSWER": 1}).answer() == 1
    assert len(list(cache.glob("*.so"))) == 2


def test_second_load_does_not_compile(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load("answer", [source], {"ANSWER": 1})
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.load("answer", [source], {"ANSWER": 1}).answer() == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 8],
        lambda content: content[: len(content) // 2],
        lambda content: bytes(byte ^ (at == len(content) // 2) for at, byte in enumerate(content)),
        lambda content: content[:-32],
        lambda content: b"",
    ],
    ids=["an eighth", "half", "a flipped bit", "no digest", "nothing"],
)
def test_damaged_entry_is_rebuilt(cache: Path, source: Path, damage: Callable[[bytes], bytes]) -> None:
    """In processes of their own: one that loads such an entry dies, and one that has it loaded keeps it."""
    assert ended([loading(cache, source)]) == [(0, "7", "")]
    (entry,) = cache.glob("*.so")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    code, said, complaint = ended([loading(cache, source)])[0]
    assert (code, said) == (0, "7")
    assert f"rebuilding the damaged kernel cache entry {entry}" in complaint
    assert entry.read_bytes() == whole
    assert ended([loading(cache, source)]) == [(0, "7", "")]


def test_compile_error_is_reported_and_leaves_no_file(cache: Path, source: Path) -> None:
    source.write_text('extern "C" int answer() { return nonsense; }')
    with pytest.raises(build.KernelUnavailableError, match="nonsense"):
        build.load("answer", [source], {})
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_processes_at_once_share_one_compilation(cache: Path, source: Path, tmp_path: Path) -> None:
    log, slow = tmp_path / "log", tmp_path / "slow"
    # Slow enough that every process has come to ask before the first has its library.
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo once >> {log}; sleep 2;; esac\nexec g++ "$@"\n')
    slow.chmod(0o755)
    assert ended([loading(cache, source, CXX=str(slow)) for _ in range(3)]) == [(0, "7", "")] * 3
    assert log.read_text() == "once\n"
    assert len(list(cache.glob("*.so"))) == 1
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_threads_share_one_compilation(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    plain = build._compile
    monkeypatch.setattr(build, "_compile", lambda *a: (compiled.append(a[1]), plain(*a))[1])
    with ThreadPoolExecutor(6) as pool:
        wanted = [1, 2, 1, 2, 1, 2]
        libraries = list(pool.map(lambda k: build.load("answer", [source], {"ANSWER": k}), wanted))
    assert [library.answer() for library in libraries] == wanted
    assert len(compiled) == 2


def test_no_compiler_warns_once_and_names_the_fix(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert native.attempt("tt_gather", lambda: build.load("answer", [source], {})) is None
    assert len(caught) == 1
    assert "install g++" in str(caught[0].message)
    assert "no C++ compiler" in native.status()["tt_gather"]


_TRAINING = """
from dataclasses import replace

import torch
from recemb_kernels.digit_tree.group import Batch, FeatureCode, Group
from recemb_kernels import pooled_gather, robe_gather, tt_gather
from recemb_kernels.pooled_gather import Operation, RowShape
from recemb_kernels.robe_gather import RobeShape
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.update import Kind, Update

torch.manual_seed(0)
shapes = [
    TrainShape((9, 8, 7), (2, 2, 4), (1, 13, 9, 1)),
    TrainShape((11, 7), (3, 2), (1, 5, 1)),
    TrainShape((3, 3, 3, 3), (2, 1, 2, 2), (1, 2, 3, 2, 1)),
    TrainShape((5, 6, 7), (3, 1, 16), (1, 9, 5, 1)),
]
def cut(items, sizes):
    parts = iter(items)
    return [[next(parts) for _ in range(size)] for size in sizes]
features = [FeatureCode(t, mean) for t, mean in ((0, False), (1, True), (2, False), (0, True), (3, True))]
kernels = [tt_gather._kernel(shape) for shape in shapes]
# A free mirror, so that the batches below are read from either end.
eager = [replace(kernel, mirrored_cost=(1e-9,) * len(kernel.cost)) for kernel in kernels]
def cores_of(*shapes):
    return [
        torch.randn(p, r * q * s)
        for shape in shapes
        for p, q, r, s in zip(shape.row_shape, shape.dim_shape, shape.ranks, shape.ranks[1:])
    ]
of_trains = cores_of(*shapes)
stores = [
    RowShape(Operation.MULT, (56, 9), (5, 5)),
    RowShape(Operation.ROW, (77,), (3,)),
    RowShape(Operation.PROJECT, (81, 2), (2, 7)),
    RowShape(Operation.CONCAT, (27, 3), (2, 7)),
]
rows = Group([pooled_gather._kernel(shape) for shape in stores], [*features[:3], FeatureCode(3, False)])
tables = [torch.randn(n, w) for shape in stores for n, w in zip(shape.rows, shape.widths)]
arrays = [FeatureCode(0, False), FeatureCode(0, True, 504), FeatureCode(0, False, 581), FeatureCode(0, True)]
starts = (0, 504, 581)
# Two blocks a row with signs; one without.
robes = [
    RobeShape(6, 4, 9, True, (11, 13), (17, 19), starts, tuple(range(5, 17)), 662),
    RobeShape(4, 4, 9, False, (11, 13), (17, 19), starts, tuple(range(5, 11)), 662),
]
# A fifth feature reads the trains' fourth table.
groups = (
    *((Group(k, features, micro_batch_rows=m), of_trains, 5) for k in (kernels, eager) for m in (4, 2**18)),
    (rows, tables, 4),
    *((Group([robe_gather._kernel(shape)], arrays), [torch.randn(9, 4)], 4) for shape in robes),
)
sizes_of_batches = ((0, 1), (1, 1), (33, 4), (600, 1))
runs = [(g, p, [504, 77, 81, 81, 210][:n], b, 0) for g, p, n in groups for b in sizes_of_batches]
# Of one table, which all threads plan: sorted, counted, from the other end, and of keys wider than 32 bits.
torch.set_num_threads(3)
for sizes, of_table, cost in (
    ((40, 30, 20), 24000, 1e9),
    ((40, 30, 20), 900, 1e9),
    ((40, 30, 20), 24000, 1e-9),
    ((3, 2000, 2000, 1000), 12 * 10**9, 1e9),
):
    ends = [1] * (len(sizes) - 2)
    shape = TrainShape(sizes, (2, *ends, 2), (1, *(2 * end for end in ends), 2, 1))
    kernel = replace(tt_gather._kernel(shape), mirrored_cost=(cost,) * len(sizes))
    alone = Group([kernel], features[:1], micro_batch_rows=2**12)
    runs.append((alone, cores_of(shape), [of_table], (9000, 1), 1))
for group, cores, of_features, (batch_size, longest), shortest in runs:
    of_features = torch.tensor(of_features)
    lengths = torch.randint(shortest, longest + 1, (len(of_features) * batch_size,))
    assert not shortest or lengths.sum() >= 2**13
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = of_features.repeat_interleave(batch_size).repeat_interleave(lengths)
    ids = (torch.rand(rows.numel(), dtype=torch.float64) * rows).long()
    ids[-1:] = rows[-1:] - 1
    for w in (None, torch.rand(ids.numel())):
        batch = Batch(ids, offsets, w, batch_size)
        out, saved = group.forward(cores, batch, keep=True)
        grad_out = torch.randn_like(out)
        arguments = {"wanted": [True] * len(cores), "want_weights": w is not None}
        nothing = [None] * group.num_tables
        grads, of_weights = group.backward(grad_out, cores, batch, saved, updates=nothing, **arguments)
        # And with a row-wise step on copies.
        moved = [core.clone() for core in cores]
        sizes = [kernel.parameters for kernel in group._kernels]
        sums = [torch.zeros(len(core), 1) for core in moved]
        steps = [Update(Kind.ROWWISE_ADAGRAD, 1e-3, 1e-8, state=own) for own in cut(sums, sizes)]
        _, saved = group.forward(moved, batch, keep=True)
        group.backward(grad_out, moved, batch, saved, updates=steps, **arguments)
        seen = [] if of_weights is None else [of_weights]
        # Neither NaN nor the 1e38 of a local variable that was never set.
        assert all((tensor.abs() < 1e12).all() for tensor in (out, *grads, *moved, *sums, *seen))
print("clean")
"""


def _run_every_training_kernel(
    flags: tuple[str, ...], cache: Path, before: str = "", **environment: str
) -> None:
    program = f"import recemb_kernels.build as b; b.FLAGS = (*b.FLAGS, *{flags})\n{before}\n{_TRAINING}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RECEMB_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


def _address_sanitizer() -> dict[str, str]:
    """The environment of a process in which libraries find out about bad reads and writes."""
    # With what throws: the sanitizer looks for it as the process starts, when Python has loaded none.
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    assert all(Path(library).is_absolute() for library in found), "the compiler has no AddressSanitizer"
    # Python itself leaks by design; overflows are what is looked for.
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}


def test_address_sanitizer_finds_nothing(tmp_path: Path) -> None:
    # Unoptimised: vectors are then read as aligned as their types claim.
    _run_every_training_kernel(("-O0", "-fsanitize=address", "-g"), tmp_path, **_address_sanitizer())


def test_address_sanitizer_finds_nothing_in_look_ups_that_train() -> None:
    """``step.cpp`` alone is compiled for it, into the cache of all tests, where the kernels are."""
    step_or_skip()
    # Nothing is optimised away, and without -g, which would double the time that it takes to compile.
    program = (
        "from recemb_kernels.digit_tree import step; step.QUICK = ('-O0', '-fsanitize=address')\n"
        "import tests.kernels.step_paths"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        # Objects of Python are blocks of their own then.
        env={**os.environ, **_address_sanitizer(), "PYTHONMALLOC": "malloc"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stderr.partition("ERROR: AddressSanitizer")[2]
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), report[:3000] or done.stderr[-3000:]


def test_kernels_read_nothing_of_their_own_memory_unwritten(tmp_path: Path) -> None:
    """The driver's and the kernels' rooms full of NaN; locals full of 0xFE, where the compiler can."""
    poison = "from recemb_kernels.digit_tree.group import driver; driver().recemb_tree_poison(1)"
    flags = ["-O1", "-DRECEMB_POISON", "-ftrivial-auto-var-init=pattern"]
    words = [*build.compiler(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(words, capture_output=True, check=False).returncode == 0  # from g++ 12 on
    _run_every_training_kernel(tuple(flags if known else flags[:2]), tmp_path, poison)
