"""DLRM (Naumov et al., arXiv 1906.00091) and DLRM with a DCN-v2 interaction (Wang et al., arXiv 2008.13535).

Both are torchrec's classes as they are; this file checks their arguments and puts every part on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recemb.errors import ConfigError

InteractionType = Literal["original", "dcn"]


def dlrm(
    embedding_bag_collection: EmbeddingBagCollection,
    dense_in_features: int,
    dense_arch_layer_sizes: Sequence[int],
    over_arch_layer_sizes: Sequence[int],
    device: torch.device | str | None = None,
    interaction_type: InteractionType = "original",
    dcn_num_layers: int = 3,
    dcn_low_rank_dim: int = 512,
) -> DLRM:
    """Build a click-through model: dense features [B, I] and a KeyedJaggedTensor in, logits [B, 1] out.

    Args:
        embedding_bag_collection: torchrec's or recemb's; all its tables have one ``embedding_dim`` D.
        dense_in_features: I, number of dense features.
        dense_arch_layer_sizes: sizes of the dense (bottom) MLP; the last one is D.
        over_arch_layer_sizes: sizes of the over (top) MLP; at least two, the last one is 1.
        device: where the dense layers live; the tables stay where they are.
        interaction_type: ``original`` for pairwise dot products, ``dcn`` for DCN-v2's low-rank cross layers.
        dcn_num_layers: number of cross layers (``dcn`` only).
        dcn_low_rank_dim: rank of each cross layer (``dcn`` only).

    Raises:
        ConfigError: sizes that do not fit together, or tables of different dimensions.
    """
    _check(
        {config.name: config.embedding_dim for config in embedding_bag_collection.embedding_bag_configs()},
        dense_in_features,
        dense_arch_layer_sizes,
        over_arch_layer_sizes,
    )
    target = torch.device(device) if device is not None else None
    if interaction_type == "original":
        return DLRM(
            embedding_bag_collection=embedding_bag_collection,
            dense_in_features=dense_in_features,
            dense_arch_layer_sizes=list(dense_arch_layer_sizes),
            over_arch_layer_sizes=list(over_arch_layer_sizes),
            dense_device=target,
        )
    if interaction_type != "dcn":
        raise ConfigError(f"interaction_type={interaction_type!r} must be 'original' or 'dcn'")
    for name, value in (("dcn_num_layers", dcn_num_layers), ("dcn_low_rank_dim", dcn_low_rank_dim)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be >= 1")
    model = DLRM_DCN(
        embedding_bag_collection=embedding_bag_collection,
        dense_in_features=dense_in_features,
        dense_arch_layer_sizes=list(dense_arch_layer_sizes),
        over_arch_layer_sizes=list(over_arch_layer_sizes),
        dcn_num_layers=dcn_num_layers,
        dcn_low_rank_dim=dcn_low_rank_dim,
        dense_device=target,
    )
    # torchrec 1.8 gives dense_device to both MLPs but builds the cross layers on the default device.
    model.inter_arch.to(target)
    return model


def _check(
    dims: dict[str, int], dense_in_features: int, dense_sizes: Sequence[int], over_sizes: Sequence[int]
) -> None:
    if not dims:
        raise ConfigError("the embedding bag collection has no table; give it at least one")
    first, dim = next(iter(dims.items()))
    for name, other in dims.items():
        if other != dim:
            raise ConfigError(
                f"table {name!r} has embedding_dim={other} but {first!r} has {dim}; DLRM needs one dimension "
                "for all tables (recemb.MixedDimension stores smaller rows and still returns wide ones)"
            )
    if dense_in_features < 1:
        raise ConfigError(f"dense_in_features={dense_in_features} must be >= 1")
    for label, sizes in (("dense_arch_layer_sizes", dense_sizes), ("over_arch_layer_sizes", over_sizes)):
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"{label}={list(sizes)} must hold sizes >= 1")
    if dense_sizes[-1] != dim:
        raise ConfigError(
            f"dense_arch_layer_sizes={list(dense_sizes)} must end with the tables' embedding_dim, {dim}"
        )
    if len(over_sizes) < 2 or over_sizes[-1] != 1:
        raise ConfigError(
            f"over_arch_layer_sizes={list(over_sizes)} needs two sizes or more, the last one 1 (the logit)"
        )
