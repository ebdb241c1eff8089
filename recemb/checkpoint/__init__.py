"""recemb's checkpoints: safetensors and a manifest, whole or absent after a crash, for any number of ranks.

::

    checkpoints/step-300/manifest.json             shapes, types, shards, checksums, values, extra
    checkpoints/step-300/rank-00000.safetensors    plain safetensors; keys such as
                                                   model/embedding_bags.t_cat_2.core_0
    checkpoints/LATEST                             "step-300"

Nothing is pickled, and nothing that is read is run. Example::

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(root, step, state, {"position": batches.position()})
    ...
    found = latest_checkpoint(root)
    if found is not None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        found.load(state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        batches.seek(found.extra["position"])
"""

from recemb.checkpoint.load import Checkpoint, latest_checkpoint
from recemb.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "latest_checkpoint", "save_checkpoint"]
