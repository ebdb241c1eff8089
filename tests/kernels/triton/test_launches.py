"""How many kernels a step launches: tables that differ in nothing but their rows share every launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from recemb_kernels import triton_frame
from recemb_kernels.digit_tree.group import Batch, FeatureCode
from recemb_kernels.pooled_gather import Operation, RowShape, batched
from recemb_kernels.tt_gather import TrainShape
from recemb_kernels.update import Kind
from tests.kernels.triton import test_pooled_gather, test_robe_gather, test_tt_gather
from tests.kernels.triton.harness import assert_near, make_batch, make_updates, run, upstream
from tests.kernels.triton.launch_keys import Compiled

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")

# The module that makes tables of an op; the k-th of a family's; and one of other constants.
CASES: dict[str, tuple[Any, Callable[[int], Any], Any]] = {
    "tt": (
        test_tt_gather,
        lambda k: TrainShape((5 + k, 4, 7 + k), (2, 2, 4), (1, 8, 8, 1)),
        TrainShape((5, 4, 7), (2, 2, 4), (1, 8, 4, 1)),
    ),
    "row": (
        test_pooled_gather,
        lambda k: RowShape(Operation.ROW, (50 + k,), (5,)),
        RowShape(Operation.ROW, (50,), (6,)),
    ),
    "mult": (
        test_pooled_gather,
        lambda k: RowShape(Operation.MULT, (9 + k, 7 + 2 * k), (6, 6)),
        RowShape(Operation.MULT, (9, 7), (5, 5)),
    ),
    "project": (
        test_pooled_gather,
        lambda k: RowShape(Operation.PROJECT, (40 + k, 3), (3, 8)),
        RowShape(Operation.PROJECT, (40, 2), (2, 8)),
    ),
    "robe": (
        test_robe_gather,
        lambda k: test_robe_gather._shape(7, 3, 6 + k, True),
        test_robe_gather._shape(7, 2, 6, True),
    ),
}


class Torch(TorchDispatchMode):
    """Counts torch's own operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# What the interpreter does for each launch of its own; and to steps, which are counted on the host.
_OTHERS = {"empty", "new_empty", "set_", "copy_", "add_", "_local_scalar_dense"}


def _launches(module: Any, shapes: list[Any], kind: Kind | None) -> Counter[str]:
    """Of each kernel, and of each operation of torch's, in one step."""
    tables = module._tables(shapes, [FeatureCode(t, t % 2 == 1) for t in range(len(shapes))])
    batch, parameters = make_batch(tables, 2, 2), tables.parameters()
    updates = make_updates(tables, parameters, [kind] * len(shapes))
    group, grad, counted = tables.triton(), upstream(tables, batch), Counter[str]()
    launch = GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    run(group, parameters, batch, grad, updates)  # what is remembered from then on
    with patch.object(GridExecutor, "__call__", count), Torch() as of_torch:
        run(group, parameters, batch, grad, updates)
    return counted + Counter({name: n for name, n in of_torch.counted.items() if name not in _OTHERS})


@pytest.mark.parametrize("kind", [Kind.ROWWISE_ADAGRAD, None], ids=["step", "gradients"])
@pytest.mark.parametrize("op", CASES)
def test_launches_do_not_depend_on_the_number_of_tables(op: str, kind: Kind | None) -> None:
    """Three tables of one family take as many as one; two of two families take more."""
    module, shape, other = CASES[op]
    one, three, two = (
        _launches(module, shapes, kind)
        for shapes in ([shape(0)], [shape(k) for k in range(3)], [shape(0), other])
    )
    assert three == one
    assert two.total() > one.total()


def test_projections_gradients_of_long_batches_are_a_product_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, shape, _ = CASES["project"]
    tables = test_pooled_gather._tables([shape(k) for k in range(3)])
    batch = make_batch(tables, 6, 3)
    parameters, grad = tables.parameters(), upstream(tables, batch)
    for most, products in ((6, (3, 0)), (5, (2, 3))):
        monkeypatch.setattr(batched, "_BATCHED_SAMPLES", most)
        with Torch() as of_torch:
            run(tables.triton(), parameters, batch, grad)
        assert (of_torch.counted["bmm"], of_torch.counted["mm"]) == products
        assert_near(tables, batch)


def test_slices_and_turns_compile_nothing_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is compiled once for a set of constants, whatever part, turn or view it is launched for."""
    monkeypatch.setattr(triton_frame, "TURN_ROWS", 4)
    shapes = [
        TrainShape((50, 4, 7), (1, 1, 16), (1, 8, 8, 1)),
        TrainShape((60, 5, 8), (1, 1, 16), (1, 8, 8, 1)),
    ]
    tables = test_tt_gather._tables(shapes, [FeatureCode(0, False), FeatureCode(1, False)])
    # A number of ids that is a multiple of 16, as sizes may be, and arrays that torch aligns.
    batch = Batch(torch.arange(64) * 7 % 1400, torch.arange(65), None, 32)
    parameters, grad = tables.parameters(), upstream(tables, batch)
    updates = make_updates(tables, parameters, [Kind.ADAGRAD] * 2)
    with Compiled() as sliced:
        run(tables.triton(micro_batch_rows=4), parameters, batch, grad, updates)
    kernels = Counter((launch.module, launch.name, launch.constants) for launch in sliced.found)
    assert len(kernels) > 20
    assert [kernel for kernel, number in kernels.items() if number > 1] == []
