"""What torch.export sees of a collection: a check of the batch, and one node that looks all its tables up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.backends.base import Backend
from recemb.bags import Bags, LookupTargets
from recemb.errors import ConfigError
from recemb.inference.description import Description
from recemb.inference.op import checked_ids, look_up, stored_tensors
from recemb.spec import TableSpec
from recemb.torchrec_io.kjt import bags_of_keys
from recemb_kernels.storage import StoredAs


@dataclass(frozen=True)
class Traced:
    """A batch being traced, its ids checked.

    Attributes:
        bags: all features of the batch, in the order of its keys.
        keys: these.
        targets: every look-up of the collection.
    """

    bags: Bags
    keys: tuple[str, ...]
    targets: LookupTargets

    @staticmethod
    def of(features: KeyedJaggedTensor, targets: LookupTargets, is_weighted: bool) -> Traced:
        """Put the check of a batch into the graph; a batch that is refused then is when the program runs.

        Raises:
            ConfigError: batch sizes that differ per key.
        """
        if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
            raise ConfigError(
                "torch.export of a KeyedJaggedTensor with a batch size per key (VBE) is not supported; "
                "export with one batch size"
            )
        keys = tuple(features.keys())
        bags = bags_of_keys(_with_offsets(features), list(keys), targets, is_weighted)
        weights = None if bags.weights is None else bags.weights.float()
        traced = Traced(Bags(bags.ids, bags.offsets, bags.num_features, weights), keys, targets)
        bags = traced.bags
        bags.ids = checked_ids(bags.ids, bags.offsets, bags.weights, traced.describe((), {}))
        return traced

    def look_up(
        self, specs: Sequence[TableSpec], tables: Mapping[str, Backend], kinds: Mapping[str, StoredAs]
    ) -> Tensor:
        """[B, sum of D] float32 over the features of some tables.

        Args:
            specs: the tables, in the order of the columns.
            tables: their backends.
            kinds: how each is stored, for quantised ones.
        """
        stored = stored_tensors([tables[spec.name] for spec in specs])
        text = self.describe(specs, kinds)
        pooled: Tensor = look_up(stored, self.bags.ids, self.bags.offsets, self.bags.weights, text)
        return pooled

    def describe(self, specs: Sequence[TableSpec], kinds: Mapping[str, StoredAs]) -> str:
        """The text that says what is looked up."""
        checked = tuple((t.feature, t.table, t.num_embeddings) for t in self.targets)
        return Description(tuple(specs), dict(kinds), self.keys, checked).to_text()


def _with_offsets(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The batch with offsets that torch has summed up: a program can then be loaded without fbgemm."""
    if features.offsets_or_none() is not None:
        return features
    lengths = features.lengths().long()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=lengths,
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )
