"""recemb: compressed embedding tables behind torchrec's ``EmbeddingBagCollection``.

Names load on first use, so that ``import recemb`` and ``recemb --help`` import neither torch nor torchrec.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recemb.spec import (
        ROBE,
        Compression,
        Dense,
        HotRows,
        MixedDimension,
        QuotientRemainder,
        TensorTrain,
    )
    from recemb.torchrec_io.configs import EmbeddingBagConfig, mixed_dimensions
    from recemb.torchrec_io.embedding_bag_collection import EmbeddingBagCollection

_HOME = {
    "Compression": "recemb.spec",
    "Dense": "recemb.spec",
    "HotRows": "recemb.spec",
    "MixedDimension": "recemb.spec",
    "QuotientRemainder": "recemb.spec",
    "ROBE": "recemb.spec",
    "TensorTrain": "recemb.spec",
    "EmbeddingBagConfig": "recemb.torchrec_io.configs",
    "mixed_dimensions": "recemb.torchrec_io.configs",
    "EmbeddingBagCollection": "recemb.torchrec_io.embedding_bag_collection",
}

__all__ = [
    "ROBE",
    "Compression",
    "Dense",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "HotRows",
    "MixedDimension",
    "QuotientRemainder",
    "TensorTrain",
    "__version__",
    "mixed_dimensions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
