"""Click-through models on torchrec's own blocks, for any ``EmbeddingBagCollection``."""

from recemb.models.dlrm import dlrm

__all__ = ["dlrm"]
