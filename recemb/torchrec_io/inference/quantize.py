"""torchrec's ``quantize_embeddings``, which takes recemb's collections too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torchrec.inference import modules as torchrec_inference
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchrecEmbeddingBagCollection

from recemb.errors import ConfigError
from recemb.inference.rows import kind_of
from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection
from recemb.torchrec_io.inference.collection import QuantEmbeddingBagCollection


def quantize_embeddings(
    module: nn.Module,
    dtype: torch.dtype,
    inplace: bool = False,
    additional_qconfig_spec_keys: Sequence[type[nn.Module]] | None = None,
    additional_mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    output_dtype: torch.dtype = torch.float,
    per_table_weight_dtype: Mapping[str, torch.dtype] | None = None,
) -> nn.Module:
    """Replace the collections of a trained model, recemb's and torchrec's, by quantised ones.

    torchrec's function of that name, and of those arguments, leaves recemb's collections as they are without
    a word, because it looks modules up by their exact type. This one tells it of them, and takes a collection
    by itself too.

    Args:
        module: a model, or a collection, on the device that it is to serve on: torchrec's tables do not move.
        dtype: ``torch.int8`` (or ``torch.qint8``), ``torch.float16``, or ``torch.float32``.
        inplace: change the model itself rather than a copy. What is replaced is let go when all is done.
        additional_qconfig_spec_keys: further types of modules to quantise.
        additional_mapping: what becomes of them.
        output_dtype: of pooled values.
        per_table_weight_dtype: by table name, where it differs from ``dtype``.

    Raises:
        ConfigError: weights cannot be stored so, or ``per_table_weight_dtype`` names a table that the model
            does not have. As after any other error, the model has not changed.

    Example::

        model = quantize_embeddings(model.eval(), dtype=torch.int8)
        torch.save(model.state_dict(), "served.pt")
    """
    if any(type(child) is EmbeddingBagCollection for child in module.modules()):
        kind_of(dtype)
    # Modules of further types may have tables that are not seen here.
    if per_table_weight_dtype and not additional_qconfig_spec_keys:
        _check_names(per_table_weight_dtype, module)
    mapping: dict[type[nn.Module], type[nn.Module]] = {EmbeddingBagCollection: QuantEmbeddingBagCollection}
    mapping.update(additional_mapping or {})
    # Modules are replaced within their parents.
    whole = nn.ModuleDict({"module": module})
    told = {child for child in module.modules() if hasattr(child, "qconfig")}
    # torch replaces parent by parent: what one refuses comes after others have been replaced.
    before = {parent: (parent.training, dict(parent._modules)) for parent in whole.modules()}
    try:
        done = torchrec_inference.quantize_embeddings(
            whole,
            dtype=dtype,
            inplace=inplace,
            additional_qconfig_spec_keys=[EmbeddingBagCollection, *(additional_qconfig_spec_keys or ())],
            additional_mapping=mapping,
            output_dtype=output_dtype,
            per_table_weight_dtype=dict(per_table_weight_dtype) if per_table_weight_dtype else None,
        )
    except BaseException:
        for parent, (training, children) in before.items():
            parent.training = training
            parent._modules.clear()
            parent._modules.update(children)
        # In place, the next attempt would find what this one has asked for.
        for child in module.modules():
            if child not in told:
                vars(child).pop("qconfig", None)
        raise
    return cast(nn.Module, cast(Any, done)["module"])


def _check_names(per_table: Mapping[str, torch.dtype], module: nn.Module) -> None:
    known = [
        config.name
        for child in module.modules()
        if isinstance(child, TorchrecEmbeddingBagCollection)
        for config in child.embedding_bag_configs()
    ]
    for name in per_table:
        if name not in known:
            raise ConfigError(
                f"per_table_weight_dtype: no table {name!r} in the model, whose tables are {known}; "
                "correct the name"
            )
