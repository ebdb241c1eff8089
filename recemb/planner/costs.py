"""What the planner's estimates rest on: every constant with its unit and where it comes from.

Times of uncompressed tables and of communication are torchrec's formulas over the bandwidths here. The
look-up of a compressed table takes, forward,

    forward[method] * (ids * sort_ns_per_id + FLOP / flops + bytes / bandwidth of the device's memory)

with FLOP and bytes counted by :mod:`recemb.planner.work`, and ``backward[method]`` times that backward.
``recemb plan --calibrate`` measures what it can on the machine at hand and writes a file that ``--costs``
reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recemb.errors import ConfigError
from recemb.planner.work import Work
from recemb_kernels.aot.roofline import CARDS

GIB = 2**30
_FORMAT = "recemb-costs"


@dataclass(frozen=True)
class Constant:
    """A number of the cost model.

    Attributes:
        unit: of ``value``.
        origin: the datasheet, source file or measurement it comes from.
    """

    value: float
    unit: str
    origin: str


@dataclass(frozen=True)
class Costs:
    """The constants of one kind of device.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: of the hardware.
        constants: by name; :data:`UNITS` names them all.
    """

    device: str
    name: str
    constants: Mapping[str, Constant]

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value

    def forward_ms(self, method: str, work: Work) -> float:
        """Milliseconds of the forward look-up of a compressed table."""
        memory = self["hbm_bandwidth" if self.device == "cuda" else "ddr_bandwidth"]
        sort = work.ids * self["sort_ns_per_id"] * 1e-9
        least = sort + work.flop / self["flops"] + work.num_bytes / memory
        return 1e3 * self[f"{method}_forward"] * least

    def with_constants(self, changed: Mapping[str, Constant]) -> Costs:
        """The same with some constants replaced."""
        return replace(self, constants=MappingProxyType({**self.constants, **changed}))

    def as_dict(self) -> dict[str, Any]:
        """What a costs file holds."""
        return {
            "format": _FORMAT,
            "device": self.device,
            "name": self.name,
            "constants": {
                name: {"value": c.value, "unit": c.unit, "origin": c.origin}
                for name, c in self.constants.items()
            },
        }


METHODS = ("tt", "qr", "robe", "md")
UNITS: Mapping[str, str] = MappingProxyType(
    {
        "hbm_bandwidth": "byte/s",
        "ddr_bandwidth": "byte/s",
        "hbm_to_ddr_bandwidth": "byte/s",
        "intra_host_bandwidth": "byte/s",
        "inter_host_bandwidth": "byte/s",
        "flops": "FLOP/s",
        "backward_factor": "1",
        "id_skew": "1",
        "sort_ns_per_id": "ns",
        **{f"{method}_{part}": "1" for method in METHODS for part in ("forward", "backward")},
    }
)

_TORCHREC = "torchrec 1.8 planner/constants.py"
_SKEW = Constant(1.05, "1", "Zipf exponent of bench/ids.py and of recemb's synthetic log; 0 for uniform ids")
_SORT = "8 passes of a radix sort over 64-bit keys and 32-bit positions, read and written, at {} GB/s"


def _factors(forward: float, backward: float, origin: str) -> dict[str, Constant]:
    """The same factors for every method."""
    both = {"forward": forward, "backward": backward}
    return {f"{method}_{part}": Constant(both[part], "1", origin) for method in METHODS for part in both}


def _datasheet(name: str, memory: float, flops: float, sheet: str, network: tuple[float, float]) -> Costs:
    """A GPU that recemb has not run on: floors by the datasheet, nothing measured."""
    sort_ns = 8 * 2 * 12 / memory * 1e9
    sort = _SORT.format(f"{memory / 1e9:,.0f}")
    constants = {
        "hbm_bandwidth": Constant(memory, "byte/s", sheet),
        "ddr_bandwidth": Constant(51 * GIB, "byte/s", _TORCHREC),
        "hbm_to_ddr_bandwidth": Constant(32 * GIB, "byte/s", _TORCHREC),
        "intra_host_bandwidth": Constant(
            network[0], "byte/s", f"{_TORCHREC}: NVLink" if network[0] == 600 * GIB else sheet
        ),
        "inter_host_bandwidth": Constant(network[1], "byte/s", f"{_TORCHREC}: 100 Gbit/s a GPU"),
        "flops": Constant(flops, "FLOP/s", f"{sheet}: float32, no tensor cores"),
        "backward_factor": Constant(2.0, "1", f"{_TORCHREC} (BWD_COMPUTE_MULTIPLIER)"),
        "id_skew": _SKEW,
        "sort_ns_per_id": Constant(sort_ns, "ns", sort),
        **_factors(1.0, 2.0, "floor by the datasheet: recemb has no timing on a GPU yet"),
    }
    return Costs("cuda", name, MappingProxyType(constants))


_INTER = 12.5 * GIB
HARDWARE: Mapping[str, Costs] = MappingProxyType(
    {
        "torchrec": _datasheet(
            "torchrec's default GPU (V100 class)",
            897 * GIB,
            15.7e12,
            "torchrec 1.8 planner/constants.py; V100 SXM2 datasheet",
            (600 * GIB, _INTER),
        ),
        "a100": _datasheet(
            CARDS["sm_80"].name,
            CARDS["sm_80"].bytes_per_second,
            CARDS["sm_80"].flops,
            "NVIDIA A100 datasheet (2022), 80GB SXM",
            (600e9, _INTER),
        ),
        "h100": _datasheet(
            CARDS["sm_90"].name,
            CARDS["sm_90"].bytes_per_second,
            CARDS["sm_90"].flops,
            "NVIDIA H100 datasheet (2023), SXM",
            (900e9, _INTER),
        ),
    }
)


def default_costs(device: str, hardware: str | None = None) -> Costs:
    """The constants that recemb comes with.

    Args:
        device: ``cpu`` or ``cuda``.
        hardware: a key of :data:`HARDWARE`; ``None`` for torchrec's own constants.

    Raises:
        ConfigError: an unknown device or hardware, or hardware for the CPU.
    """
    if device == "cpu":
        if hardware is not None:
            raise ConfigError(f"--hardware {hardware} is a GPU and --device is cpu; leave one of them out")
        return CPU
    if device != "cuda":
        raise ConfigError(f"device {device!r} must be cpu or cuda")
    if hardware is not None and hardware not in HARDWARE:
        raise ConfigError(f"hardware {hardware!r} is unknown; use one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware or "torchrec"]


def read_costs(path: Path) -> Costs:
    """The constants of a file that ``recemb plan --calibrate`` wrote.

    Raises:
        ConfigError: the file is missing, damaged, or lacks a constant or its unit.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if (
        not isinstance(values, dict)
        or values.get("format") != _FORMAT
        or values.get("device") not in ("cpu", "cuda")
    ):
        raise ConfigError(f"{path} is not a costs file; recemb plan --calibrate --output {path} writes one")
    given = values.get("constants")
    problems, constants = [], {}
    for name, unit in UNITS.items():
        entry = given.get(name) if isinstance(given, dict) else None
        if not isinstance(entry, dict) or not {"value", "unit", "origin"} <= entry.keys():
            problems.append(f"{name} needs value, unit and origin")
            continue
        value = entry["value"]
        least = 0.0 if unit == "ns" or name == "id_skew" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            problems.append(f"{name}: value={value!r} must be a number >= {least:g}")
        elif entry["unit"] != unit:
            problems.append(f"{name}: unit={entry['unit']!r} must be {unit!r}")
        else:
            constants[name] = Constant(float(value), unit, str(entry["origin"]))
    if problems:
        raise ConfigError("\n  ".join([f"{path}: {len(problems)} problems", *problems]))
    return Costs(str(values["device"]), str(values.get("name", path)), MappingProxyType(constants))


_MEASURED = "recemb plan --calibrate, AMD EPYC, 1 thread, 2026-11-24, shared machine"


def _measured(values: Mapping[str, float]) -> dict[str, Constant]:
    return {name: Constant(value, UNITS[name], _MEASURED) for name, value in values.items()}


CPU = Costs(
    "cpu",
    "CPU as measured on an AMD EPYC, 1 thread",
    MappingProxyType(
        {
            "hbm_bandwidth": Constant(1.0, "byte/s", "a CPU has none"),
            "hbm_to_ddr_bandwidth": Constant(32 * GIB, "byte/s", _TORCHREC),
            "intra_host_bandwidth": Constant(
                _INTER, "byte/s", f"{_TORCHREC}: CROSS_NODE_BANDWIDTH, as gloo has no NVLink"
            ),
            "inter_host_bandwidth": Constant(_INTER, "byte/s", _TORCHREC),
            "id_skew": _SKEW,
            "sort_ns_per_id": Constant(0.0, "ns", "in the methods' factors"),
            **_measured(
                {
                    "ddr_bandwidth": 8.6e9,
                    "flops": 61e9,
                    "backward_factor": 2.1,
                    "tt_forward": 0.90,
                    "tt_backward": 2.4,
                    "qr_forward": 0.63,
                    "qr_backward": 2.7,
                    "robe_forward": 0.51,
                    "robe_backward": 4.2,
                    "md_forward": 0.45,
                    "md_backward": 4.0,
                }
            ),
        }
    ),
)
