"""A method per table, import of a trained table, and what each costs.

python examples/methods_per_table.py
"""

from __future__ import annotations

import torch

from recemb import (
    ROBE,
    Dense,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    MixedDimension,
    QuotientRemainder,
    TensorTrain,
)

ROWS, DIM, TRUE_RANK = 20_000, 16, 4
METHODS = {
    "dense": Dense(),
    "tt": TensorTrain(rank=32),
    "qr": QuotientRemainder(collisions=16, operation="mult"),
    "robe": ROBE(compress_rate=16, block_size=16),
    "md": MixedDimension(dim=4),
}


def main() -> None:
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, compression=compression)
            for name, compression in METHODS.items()
        ]
    )
    # A "trained" table with structure: low rank plus noise, as embedding tables have.
    trained = torch.randn(ROWS, TRUE_RANK) @ torch.randn(TRUE_RANK, DIM) + 0.1 * torch.randn(ROWS, DIM)
    report = {record.table: record for record in tables.memory()}
    print(f"{'method':<8}{'bytes':>12}{'ratio':>8}{'relative error of the import':>32}")
    for name in METHODS:
        tables.from_dense(name, trained)
        error = (tables.to_dense(name) - trained).norm() / trained.norm()
        print(f"{name:<8}{report[name].num_bytes:>12,}{report[name].ratio:>7.1f}x{error.item():>32.3f}")
    print(
        "\nqr and robe share rows by id, tt by digits of the id: they are made for training. An import keeps"
    )
    print("what the table's structure allows; here that is low rank, which md stores and the others miss.")


if __name__ == "__main__":
    main()
