"""What a config's ``init_fn`` does to a compressed table: it has no N x D weights, and takes their scale."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from recemb import Dense, EmbeddingBagCollection, EmbeddingBagConfig, MixedDimension, TensorTrain
from recemb.errors import ConfigError
from recemb.spec import Compression
from recemb.torchrec_io import configs
from recemb.torchrec_io.configs import table_spec

Init = Callable[[Tensor], object]


def config(init: Init, rows: int = 20_000, compression: Compression | None = None) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name="t",
        num_embeddings=rows,
        embedding_dim=16,
        feature_names=["f"],
        init_fn=init,
        compression=compression or TensorTrain(rank=4),
    )


@pytest.mark.parametrize(
    "init",
    [
        nn.init.xavier_uniform_,
        nn.init.xavier_normal_,
        partial(nn.init.kaiming_normal_, mode="fan_out"),
        nn.init.kaiming_uniform_,
        nn.init.orthogonal_,
    ],
)
def test_a_scale_that_depends_on_the_rows_is_that_of_the_table(init: Init) -> None:
    weight = torch.empty(20_000, 16)
    init(weight)
    assert table_spec(config(init)).row_std == pytest.approx(float(weight.std()), rel=0.05)


def test_a_table_too_large_to_measure_has_its_scale_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_PROBE_NUMEL", 2**14)
    for init in (nn.init.xavier_uniform_, nn.init.orthogonal_):
        with pytest.raises(ConfigError, match=r"table 't': init_fn's scale depends .*give weight_init_min"):
            EmbeddingBagCollection(tables=[config(init)])
        assert EmbeddingBagCollection(tables=[config(init, compression=Dense())]).to_dense("t").any()
    weight = torch.empty(20_000, 16)
    nn.init.kaiming_uniform_(weight)
    measured = table_spec(config(nn.init.kaiming_uniform_)).row_std
    assert measured == pytest.approx(float(weight.std()), rel=0.05)


def test_an_init_fn_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = torch.randn(20_000, 16)

    def load(weight: Tensor) -> None:
        weight.copy_(pretrained)

    # A part of the table is what it cannot fill.
    monkeypatch.setattr(configs, "_PROBE_NUMEL", 2**14)
    said = r"table 't': init_fn fails .*RuntimeError: .*20000.*from_dense"
    with pytest.raises(ConfigError, match=said) as caught:
        EmbeddingBagCollection(tables=[config(load)])
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("largest", [2**24, 2**14])
def test_values_that_are_given_are_not_dropped_unsaid(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_PROBE_NUMEL", largest)
    pretrained = torch.randn(20_000, 16)
    given = config(lambda weight: weight.copy_(pretrained[: len(weight)]))
    with pytest.warns(UserWarning, match=r"table 't': init_fn writes fixed values.*from_dense"):
        EmbeddingBagCollection(tables=[given], device="meta")
    assert table_spec(given).row_std == pytest.approx(1, rel=0.05)
    # It is said once.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        EmbeddingBagCollection(tables=[given], device="meta")
        table_spec(copy.deepcopy(given))
    # Another one is measured anew.
    given.init_fn = nn.init.zeros_
    assert table_spec(given).row_std == 0


@pytest.mark.parametrize("compression", [MixedDimension(dim=4), Dense()])
def test_values_that_are_drawn_or_one_constant_need_no_word(compression: Compression) -> None:
    pretrained = torch.randn(50, 16)
    inits: list[Init] = [nn.init.normal_, nn.init.zeros_, lambda weight: nn.init.constant_(weight, 0.5)]
    if isinstance(compression, Dense):
        inits.append(lambda weight: weight.copy_(pretrained))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for init in inits:
            EmbeddingBagCollection(tables=[config(init, 50, compression)])
