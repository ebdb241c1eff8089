"""Look-ups that train, from tensors to the driver in C++: ``step.cpp``, compiled against torch's own headers.

Around a look-up and its backward Python takes longer than the kernels of a small batch, most of all with the
caches that the rest of a training step leaves behind. Where there are no headers of Python, which some Linux
distributions keep apart, or where torch is one that ``step.cpp`` does not know, the same steps are taken from
Python.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.nn import Parameter

from recemb_kernels.build import QUICK, KernelUnavailableError, load
from recemb_kernels.digit_tree.group import Group
from recemb_kernels.update import Step

_SOURCE = Path(__file__).parent / "step.cpp"
# The module, once something trains: what can do without does not wait for its compilation.
loaded: list[Any] = []


class CompiledLookup(Protocol):
    """``step.cpp``'s object: a group of tables with what is asked for in its backwards."""

    def look_up(
        self,
        stored: list[Tensor],
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        samples: int,
        prepared: int,
    ) -> Tensor:
        """Pool a batch, [B, sum of D]: in training with its backward.

        Args:
            stored: the parameters, table by table.
            ids: [L] int64, checked.
            offsets: [F * B + 1] int64.
            weights: [L] float32 as autograd knows them, or ``None``.
            samples: B.
            prepared: a prepared state's memory, which it gives back; 0 without.
        """

    def watch(
        self,
        tables: list[dict[str, Parameter | None]],
        hooks: list[tuple[Mapping[int, Any], int]],
        aligned: int,
    ) -> None:
        """Note how parameters, their optimizers and these' hooks are.

        Args:
            tables: each storage's own parameters.
            hooks: where each is kept, under which id.
            aligned: what addresses are compared modulo.
        """

    def unchanged(self, tables: list[dict[str, Parameter | None]]) -> list[Tensor] | None:
        """The parameters when all is as it was then, but for learning rates.

        ``None`` also where it takes Python to say.
        """

    def serve(
        self,
        types: tuple[type, type],
        features: list[tuple[str, ReferenceType[Any]]],
        owners: list[ReferenceType[Any]],
        check: int,
        limits: tuple[int, object],
    ) -> Callable[[Any, Any], Tensor | None]:
        """What makes a whole look-up of tables by name and a batch, checks and all.

        It gives ``None`` where that is for Python to say or to do.

        Args:
            types: of the tables, ``dict`` or ``ModuleDict``, and of batches.
            features: of each its table's name there, and that table.
            owners: the module that holds the parameters of each storage, as :meth:`watch` has them.
            check: address of the driver's check of a batch.
            limits: of the features' numbers of rows, and what holds these.
        """


def compiled_lookup(
    group: Group,
    steps: Sequence[Step | None],
    stepped: Sequence[bool],
    wanted: Sequence[bool],
    error: Callable[[int, int, int], Exception],
    once: Callable[[list[Tensor | None], list[Tensor]], Sequence[Tensor | None]],
) -> CompiledLookup:
    """A look-up in C++.

    Args:
        group: the tables.
        steps: per table.
        stepped: per parameter, whether it takes its table's step.
        wanted: per parameter, whether its gradient is written out.
        error: makes what is raised, of what lacks, of ids and of samples, as :meth:`Group.error` has them.
        once: gradients that hang on some tensors, and that no one may differentiate.

    Raises:
        KernelUnavailableError: it cannot be compiled here.
    """
    makes = tuple(None if step is None else (step.make, step.sources) for step in steps)
    made: CompiledLookup = step_module().Lookup(
        group.driver_addresses, group.parameters, list(stepped), list(wanted), group, makes, error, once
    )
    return made


@cache
def step_module() -> Any:
    """The compiled module.

    Raises:
        KernelUnavailableError: it cannot be compiled here.
    """
    headers, python = Path(torch.__file__).parent / "include", _python_headers()
    others = (
        "-std=c++20",  # of torch's headers
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-I{folder}" for folder in (headers, headers / "torch/csrc/api/include", python)),
        # Behind the flag, as the linker would drop what no file before it has asked for.
        *(f"-L{headers.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_python", "-ltorch_cpu", "-lc10"),
    )
    library = load("tree_step", [_SOURCE], {"RECEMB_TORCH": torch.__version__}, QUICK, others)
    functions = ctypes.PyDLL(library._name, handle=library._handle)
    functions.recemb_step_module.restype = ctypes.py_object
    loaded[:] = [functions.recemb_step_module()]
    return loaded[0]


def _python_headers() -> str:
    """The folder of ``Python.h``.

    Raises:
        KernelUnavailableError: it is not there; some Linux distributions keep it apart.
    """
    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").exists():
        raise KernelUnavailableError(f"there is no {folder}/Python.h; install python3-dev, or python3-devel")
    return folder
