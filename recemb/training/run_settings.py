"""Which settings decide a run's figures: what a report tells runs apart by, pairs them by and calls them.

A setting counts by what it does in this run: the data by their contents, defaults as if they had been given,
and nothing that changes no figure (where files are, how often a checkpoint is saved, a limit or a patience
that is never reached). Every other field of the configuration counts, new ones too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recemb.data.layout import SPLITS
from recemb.training.config import OPERATIONAL_FIELDS, RunConfig

Settings = dict[str, Hashable]

_STORAGE_FIELDS = frozenset(
    {
        *("method", "compress_rate", "method_threshold"),
        *("cache_fraction", "cache_policy", "cache_refresh_every"),
    }
)
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
# These are in every label.
_ALWAYS_SHOWN = frozenset({"method", "compress_rate", "cache_fraction", "cache_policy"})
_SHORT = {
    "data": "{}",
    "optimizer": "{}",
    "device": "{}",
    "interaction_type": "{}",
    "learning_rate": "lr {}",
    "batch_size": "batch {}",
    "embedding_dim": "dim {}",
    "validation_freq_within_epoch": "validation {}",
    "dense_arch_layer_sizes": "bottom {}",
    "over_arch_layer_sizes": "top {}",
    "shuffle_batches": "shuffle {}",
    "method_threshold": "threshold {}",
    "cache_refresh_every": "refresh {}",
}
_LONGEST_VALUE = 24


@dataclass(frozen=True)
class Named:
    """Something that is compared by what it is and shown by its name."""

    identity: str
    name: str = field(compare=False)


def storage_settings(config: RunConfig) -> Settings:
    """How the tables are stored, as far as it applies."""
    values: Settings = {"method": config.method}
    if config.method == "dense":
        return values
    values |= {"compress_rate": config.compress_rate, "method_threshold": config.method_threshold}
    cache = config.hot_rows
    if cache is not None:
        values |= {
            "cache_fraction": cache.fraction,
            "cache_policy": cache.policy,
            "cache_refresh_every": cache.refresh_every,
        }
    return values


def training_settings(config: RunConfig, result: Mapping[str, Any]) -> Settings:
    """What else decides the figures, besides the seed: a run is compared with the dense one of the same.

    Args:
        config: the run's.
        result: its ``result.json``; one of before it told the data and rows falls back on path and flags.
    """
    handled = {"seed", "test_batch_size", *_LIMITS}
    fields = config.model_dump(exclude={*OPERATIONAL_FIELDS, *_STORAGE_FIELDS, *handled})
    path = Path(config.data_dir).resolve()
    values: Settings = {"data": Named(result.get("data") or str(path), path.name), **fields}
    # Ranks share the rows of a step, whose gradients are averaged.
    values["batch_size"] = config.batch_size * _ranks(result)
    if config.interaction_type != "dcn":
        del values["dcn_num_layers"], values["dcn_low_rank_dim"]
    return values | _rows(config, result) | _validation(config, result)


def placement_settings(config: RunConfig, result: Mapping[str, Any]) -> Settings:
    """What decides the speed alone, and is left out of pairing for that: how ranks share the tables."""
    if _ranks(result) == 1:
        return {"ranks": 1}
    plan = json.dumps(result.get("sharding"), sort_keys=True)
    return {
        "ranks": _ranks(result),
        "plan": Named(plan, Path(config.plan).stem if config.plan is not None else "default"),
        "communication_slices": config.communication_slices,
    }


def labels(settings: Sequence[Settings], paths: Sequence[Path]) -> list[str]:
    """Names that tell ``settings`` apart: method, rate and cache, and of the rest what differs among them.

    Args:
        settings: of each group of runs.
        paths: a run of each; its directory is added where names alone do not tell groups apart.
    """
    paths = [path.resolve() for path in paths]
    # By key and value; what has several names, as copies of the data have, is called by the first.
    known: dict[tuple[str, Hashable], Hashable] = {}
    for each in settings:
        for key, value in each.items():
            known.setdefault((key, value), value)
    texts: dict[str, list[str]] = {}
    for (key, _), value in known.items():
        texts.setdefault(key, []).append(_text(value))
    # Settings that do not have a key are told apart by what makes it apply.
    shown = [key for key, each in texts.items() if len(set(each)) > 1 and key not in _ALWAYS_SHOWN]
    names = [_name(each, {key: known[key, each[key]] for key in shown if key in each}) for each in settings]
    equal = [path for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    root = Path(os.path.commonpath(equal)) if equal else None
    return [
        name if names.count(name) == 1 or root is None else f"{path.relative_to(root)}: {name}"
        for name, path in zip(names, paths, strict=True)
    ]


def difference(dense: Settings, own: Settings) -> list[str]:
    """``learning_rate (0.001, not 0.01)`` for each setting in which two runs differ."""
    found = []
    for key in dict.fromkeys([*own, *dense]):
        one, other = dense.get(key), own.get(key)
        if one != other:
            texts = _text(one), _text(other)
            told = f"{texts[0]}, not {texts[1]}" if texts[0] != texts[1] else "equal in name alone"
            found.append(f"{key} ({told})")
    return found


def _ranks(result: Mapping[str, Any]) -> int:
    return int(result.get("world_size", 1))


def _rows(config: RunConfig, result: Mapping[str, Any]) -> Settings:
    """How many rows of each split are used, where those are not all."""
    limited = result.get("limited_rows")
    if limited is not None:
        return {f"{split}_rows": limited.get(split) for split in SPLITS}
    values: Settings = {name: getattr(config, name) for name in _LIMITS}
    if config.limit_val_batches is not None or config.limit_test_batches is not None:
        values["test_batch_size"] = (config.test_batch_size or config.batch_size) * _ranks(result)
    return values


def _validation(config: RunConfig, result: Mapping[str, Any]) -> Settings:
    """When the run is evaluated: the figures are those of the best evaluation's weights."""
    frequency, patience = config.validation_freq_within_epoch, config.patience
    steps = result.get("steps_per_epoch")
    if steps is not None:
        if frequency is not None and frequency >= steps:
            frequency = None
        evaluations = config.epochs * math.ceil(steps / (frequency or steps))
        # After the last evaluation there is nothing left to stop, before the second nothing to compare.
        if patience is not None and patience > evaluations - 2:
            patience = None
    if result.get("best_step") is None:
        # There is no validation split: nothing has been evaluated.
        frequency = patience = None
    return {"validation_freq_within_epoch": frequency, "patience": patience}


def _name(settings: Settings, shown: Settings) -> str:
    parts = [_text(settings["method"])]
    if settings.get("compress_rate"):
        parts.append(f"{_text(settings['compress_rate'])}x")
    if "cache_fraction" in settings:
        parts.append(f"cache {_text(settings['cache_fraction'])} {settings['cache_policy']}")
    # One that is not given in this run is in the labels of those where it is.
    for key, value in shown.items():
        if value is not None:
            parts.append(_SHORT.get(key, f"{key} {{}}").format(_text(value)))
    return " ".join(parts)


def _text(value: Hashable) -> str:
    if isinstance(value, Named):
        text = value.name
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    elif isinstance(value, tuple):
        text = ",".join(map(str, value))
    else:
        text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
