"""Readouts: other depths and poolings of a network, only where a plain upstream model expresses them."""

import pytest
import torch

from hf_transfer.network.chain import Chain
from hf_transfer.network.readout import Tail, build_variant, find_readouts, read_features
from tests.families import FAMILIES, built, make_pixels

WITH_CLASSIFIER = [n for n in FAMILIES if n != "timm LeViT"]


@pytest.mark.parametrize("name", WITH_CLASSIFIER)
def test_every_readout_is_a_plain_model_with_the_same_features(name: str) -> None:
    model, chain = built(name)
    pixels = make_pixels(chain.image_shape, 3)
    for readout in find_readouts(chain, sweep="all"):
        activation = chain.run_prefix([readout.cut], pixels)[0]
        features = read_features(readout, chain, activation)
        assert features.shape == (3, readout.num_features)
        plain = build_variant(chain, readout.changes, num_classes=5)
        assert type(plain) is type(model)
        taken: list[torch.Tensor] = []
        assert chain.head is not None
        plain.get_submodule(chain.head.modules[0]).register_forward_pre_hook(
            lambda _, args, to=taken: to.append(args[0])
        )
        with torch.no_grad():
            plain(pixels)
        torch.testing.assert_close(features, taken[0].flatten(1), rtol=1e-5, atol=1e-5)


def names(chain: Chain, sweep: str) -> list[str]:
    return [r.name for r in find_readouts(chain, sweep=sweep)]  # type: ignore[arg-type]


def test_a_vit_reads_at_every_depth_and_through_its_mean() -> None:
    _, chain = built("timm ViT")
    assert names(chain, "none") == ["blocks.1 native"]
    assert names(chain, "pooling") == ["blocks.1 native", "blocks.1 avg"]
    assert names(chain, "layer") == ["blocks.1 native", "blocks.0 native"]
    assert len(names(chain, "all")) == 4


def test_a_convolutional_net_reads_through_its_mean_and_maximum_but_not_earlier() -> None:
    _, chain = built("timm ResNet")
    found = find_readouts(chain, sweep="all")
    assert [r.pooling for r in found] == ["native", "avg+max"]
    assert found[1].num_features == 2 * found[0].num_features


def test_reading_leaves_the_network_as_it_was() -> None:
    model, chain = built("timm ViT")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for readout in find_readouts(chain, sweep="all"):
        read_features(readout, chain, torch.zeros(1, *readout.cut.shape))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_network_without_a_linear_head_is_refused() -> None:
    _, chain = built("timm ViT")
    without = Chain(**{**chain.__dict__, "head": None})
    with pytest.raises(ValueError, match="not a weighted sum of linear maps"):
        find_readouts(without, sweep="none")


@pytest.mark.parametrize(("pooling", "num_tokens"), [("token", 1), ("avg", None)])
def test_a_readout_of_the_class_token_reads_this_token_alone(pooling: str, num_tokens: int | None) -> None:
    _, chain = built("timm ViT")
    pixels = make_pixels(chain.image_shape, 3)
    checked = 0
    for readout in find_readouts(chain, sweep="all"):
        is_token = readout.pooling == "token" or (readout.pooling == "native" and readout.cut != chain.features)
        if (pooling == "token") != is_token or (not is_token and readout.pooling != pooling):
            continue
        tail = Tail(readout, chain)
        assert tail.num_tokens == num_tokens
        (activation,) = chain.run_prefix([readout.cut], pixels)
        torch.testing.assert_close(tail(activation), read_features(readout, chain, activation), rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked
