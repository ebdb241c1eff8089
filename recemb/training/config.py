"""The configuration of one training run: a typed model, read from a YAML file and command-line flags.

Keys, flags and fields carry the same names, those of torchrec's ``dlrm_main`` where it has one. Flags
override the file. All problems are reported together, each with its flag or ``file:line``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from recemb.errors import ConfigError
from recemb.spec import HotRows
from recemb.training.yaml_file import YamlDocument, parse_scalar, read_yaml

DEFAULT_LEARNING_RATE = {"adam": 1e-3, "adagrad": 1e-2, "rowwise_adagrad": 1e-2, "sgd": 0.1}
DEFAULT_EPS = 1e-8
# Evaluation keeps no gradients, so larger batches cost little memory; the figures do not depend on it.
DEFAULT_TEST_BATCH_SIZE = 4096
# Fields of how a run is carried out, which do not say what is trained; the data count by their contents.
OPERATIONAL_FIELDS = frozenset(
    {
        *("data_dir", "dataset_name", "output", "overwrite", "compare", "checkpoint_freq", "resume"),
        *("plan", "communication_slices", "dist_timeout_seconds"),
    }
)


def _split_commas(value: object) -> object:
    """``"512,256,16"`` and ``[512, 256, 16]`` both become a tuple, as dlrm_main's flags do."""
    if isinstance(value, str):
        return tuple(parse_scalar(part.strip()) for part in value.split(","))
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    return (value,) if isinstance(value, int) else tuple(value)


Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_split_commas)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class CrossFieldError(ValueError):
    """Problems between fields that are each valid alone: ``(field, message)`` pairs."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in problems))
        self.problems = list(problems)


class RunConfig(BaseModel):
    """One training run. ``recemb train --help`` describes every field.

    Fields left at ``None`` that have a default depending on others (``dense_arch_layer_sizes``,
    ``test_batch_size``, ``learning_rate``, ``eps``) are filled in: the model is its own resolved form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    data_dir: str = Field(min_length=1)
    output: str = Field(min_length=1)
    overwrite: bool = False
    dataset_name: Literal["criteo_kaggle", "criteo_1tb", "synthetic"] | None = None

    batch_size: PositiveInt = 512
    test_batch_size: PositiveInt | None = None
    epochs: PositiveInt = 1
    limit_train_batches: PositiveInt | None = None
    limit_val_batches: PositiveInt | None = None
    limit_test_batches: PositiveInt | None = None
    shuffle_batches: bool = True
    validation_freq_within_epoch: PositiveInt | None = None
    patience: PositiveInt | None = None

    embedding_dim: PositiveInt = 16
    num_embeddings: PositiveInt | None = None
    num_embeddings_per_feature: Sizes | None = None
    dense_arch_layer_sizes: Sizes | None = None
    over_arch_layer_sizes: Sizes = (512, 512, 256, 1)
    interaction_type: Literal["original", "dcn"] = "original"
    dcn_num_layers: PositiveInt = 3
    dcn_low_rank_dim: PositiveInt = 512

    method: Literal["dense", "tt", "qr", "robe", "md"] = "dense"
    compress_rate: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    method_threshold: Annotated[int, Field(ge=0)] = 200
    cache_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    cache_policy: Literal["lfu", "lru", "importance"] | None = None
    cache_refresh_every: PositiveInt | None = None
    compare: Literal["dense"] | None = None

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "adam"
    learning_rate: PositiveFloat | None = None
    eps: PositiveFloat | None = None
    seed: Seed = 0
    device: Literal["cpu", "cuda"] = "cpu"

    checkpoint_freq: Annotated[int, Field(ge=0)] = 0
    resume: bool = False
    plan: str | None = None
    communication_slices: PositiveInt = 1
    dist_timeout_seconds: PositiveInt = 300

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        problems = list(_cross_field_problems(self))
        if problems:
            raise CrossFieldError(problems)
        resolved: dict[str, object] = {
            "dense_arch_layer_sizes": self.dense_arch_layer_sizes or (512, 256, self.embedding_dim),
            "test_batch_size": self.test_batch_size or max(self.batch_size, DEFAULT_TEST_BATCH_SIZE),
            "learning_rate": self.learning_rate or DEFAULT_LEARNING_RATE[self.optimizer],
            "eps": self.eps or (None if self.optimizer == "sgd" else DEFAULT_EPS),
        }
        for name, value in resolved.items():
            # The model is frozen for its users; this is the one place that completes it.
            object.__setattr__(self, name, value)
        return self

    @property
    def hot_rows(self) -> HotRows | None:
        """The cache of every compressed table, or ``None``."""
        if self.cache_fraction is None:
            return None
        given: dict[str, Any] = {"policy": self.cache_policy, "refresh_every": self.cache_refresh_every}
        return HotRows(
            fraction=self.cache_fraction,
            **{name: value for name, value in given.items() if value is not None},
        )

    def dense_twin(self) -> RunConfig:
        """The same run with uncompressed tables: same data, model, optimizer and seed."""
        unset = ("compress_rate", "compare", "cache_fraction", "cache_policy", "cache_refresh_every")
        return self.model_copy(update={"method": "dense", **dict.fromkeys(unset)})

    def to_yaml(self) -> str:
        """The whole configuration as YAML that ``--config`` reads back to an equal model."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def load_config(flags: Mapping[str, str | bool], config_file: Path | None = None) -> RunConfig:
    """Build the configuration from a YAML file and the flags that override it.

    Args:
        flags: flag name (without dashes) -> text as typed, or a bool for a switch; only those given.
        config_file: a YAML file whose keys are :class:`RunConfig`'s fields, or ``None``.

    Raises:
        ConfigError: one message that lists every problem.
    """
    document = read_yaml(config_file) if config_file is not None else None
    values: dict[str, object] = dict(document.values) if document is not None else {}
    for name, text in flags.items():
        values[name] = text if isinstance(text, bool) or name in _TEXT_FIELDS else parse_scalar(text)
    return parse_config(values, document, frozenset(flags))


def parse_config(
    values: Mapping[str, object], document: YamlDocument | None = None, flags: frozenset[str] = frozenset()
) -> RunConfig:
    """Validate ``values``; :class:`ConfigError` lists every problem with the flag or line it came from."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _describe(detail, document, flags)]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError("\n  ".join([f"{count} in the run configuration:", *lines]))


def _is_text(annotation: object) -> bool:
    return annotation is str or any(
        isinstance(arg, str) or _is_text(arg) for arg in get_args(annotation) if arg is not None
    )


_TEXT_FIELDS = frozenset(
    name
    for name, info in RunConfig.model_fields.items()
    if _is_text(info.annotation) or name.endswith("_sizes") or name == "num_embeddings_per_feature"
)


def _cross_field_problems(config: RunConfig) -> list[tuple[str, str]]:
    problems = []
    dense_sizes, dim = config.dense_arch_layer_sizes, config.embedding_dim
    if dense_sizes is not None and dense_sizes[-1] != dim:
        problems.append(
            (
                "dense_arch_layer_sizes",
                f"its last size is {dense_sizes[-1]} but embedding_dim is {dim}; "
                f"end it with {dim}, e.g. {','.join(map(str, (*dense_sizes[:-1], dim)))}",
            )
        )
    if config.over_arch_layer_sizes[-1] != 1 or len(config.over_arch_layer_sizes) < 2:
        problems.append(
            ("over_arch_layer_sizes", "needs two sizes or more, the last one 1 (the logit), e.g. 512,256,1")
        )
    if config.num_embeddings is not None and config.num_embeddings_per_feature is not None:
        problems.append(("num_embeddings", "num_embeddings_per_feature is given too; keep one of them"))
    if config.method == "dense" and config.compress_rate not in (None, 1.0):
        problems.append(("compress_rate", "method is dense; choose --method tt, qr, robe or md"))
    if config.method != "dense" and config.compress_rate is None:
        problems.append(
            ("compress_rate", f"method {config.method} needs it: how many times smaller, e.g. 100")
        )
    if config.method == "dense" and config.compare is not None:
        problems.append(("compare", "the run is dense already; choose --method tt, qr, robe or md"))
    if config.method == "dense" and config.cache_fraction is not None:
        problems.append(("cache_fraction", "method is dense; choose --method tt, qr, robe or md"))
    for name in ("cache_policy", "cache_refresh_every"):
        if getattr(config, name) is not None and config.cache_fraction is None:
            problems.append((name, "there is no cache; give --cache_fraction, e.g. 0.01, or remove it"))
    if config.resume and config.overwrite:
        problems.append(("resume", "overwrite is given too; keep the run (resume) or replace it (overwrite)"))
    if config.optimizer == "sgd" and config.eps is not None:
        problems.append(("eps", "sgd has no eps; remove it or choose another --optimizer, e.g. adagrad"))
    return problems


def _describe(detail: ErrorDetails, document: YamlDocument | None, flags: frozenset[str]) -> list[str]:
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, CrossFieldError):
        return [f"{_origin((name,), document, flags)}: {text}" for name, text in error.problems]
    path = detail["loc"]
    return [f"{_origin(path, document, flags)}: {_explain(detail)}"]


def _origin(path: tuple[str | int, ...], document: YamlDocument | None, flags: frozenset[str]) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    top = path[0] if path else ""
    if document is None or top in flags or (top,) not in document.lines:
        return f"--{name}"
    return f"{document.where(path)}: {name}"


def _explain(detail: ErrorDetails) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), list(RunConfig.model_fields), n=1)
        return "unknown key" + (f"; did you mean {near[0]}?" if near else "; see recemb train --help")
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        choices = _choices(str(detail["loc"][0]))
        near = difflib.get_close_matches(str(given), choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        return f"{given!r} is not one of them; {hint}"
    message = detail["msg"].removeprefix("Input ")
    return f"{message}, not {given!r}"


def _choices(name: str) -> list[str]:
    annotation: Any = RunConfig.model_fields[name].annotation
    found = [arg for arg in get_args(annotation) if isinstance(arg, str)]
    return found or [arg for part in get_args(annotation) for arg in get_args(part) if isinstance(arg, str)]
