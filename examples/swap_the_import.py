"""Shrink the tables of a torchrec model by changing one import.

    python examples/swap_the_import.py

Before: ``from torchrec import EmbeddingBagCollection, EmbeddingBagConfig``. The model, the batch and the
training step below are plain torchrec and stay as they are.
"""

from __future__ import annotations

import torch
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRMTrain

from recemb import EmbeddingBagCollection, EmbeddingBagConfig, TensorTrain

BATCH, DIM = 64, 16
ROWS = {"user": 100_000, "item": 20_000, "country": 200}


def main() -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{key}", num_embeddings=rows, embedding_dim=DIM, feature_names=[key])
        for key, rows in ROWS.items()
    ]
    for table in tables:
        if table.num_embeddings > 1000:
            table.compression = TensorTrain(rank=16)
    tables_of_model = EmbeddingBagCollection(tables=tables)
    model = DLRMTrain(DLRM(tables_of_model, 4, [32, DIM], [32, 1]))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)

    # Two ids per bag: user, item and country of each sample.
    features = KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.cat([torch.randint(rows, (2 * BATCH,)) for rows in ROWS.values()]),
        lengths=torch.full((len(ROWS) * BATCH,), 2),
    )
    dense, labels = torch.rand(BATCH, 4), torch.randint(2, (BATCH,))
    for step in range(20):
        optimizer.zero_grad()
        logits = model.model(dense_features=dense, sparse_features=features).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1:2d}  loss {loss.item():.4f}")
    print(tables_of_model.memory())


if __name__ == "__main__":
    main()
