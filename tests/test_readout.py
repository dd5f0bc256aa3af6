"""Readouts: other depths and poolings of a network, only where a plain upstream model expresses them."""

import pytest
import timm
import torch

from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.readout import Tail, build_variant, find_readouts, read_features
from tests.families import FAMILIES, built, make_pixels, randomize

WITH_CLASSIFIER = [n for n in FAMILIES if n != "timm LeViT"]


@pytest.mark.parametrize("name", WITH_CLASSIFIER)
def test_every_readout_is_a_plain_model_with_the_same_features(name: str) -> None:
    model, chain = built(name)
    pixels = make_pixels(chain.image_shape, 3)
    for readout in find_readouts(chain, sweep="all"):
        activation = chain.run_prefix([readout.cut], pixels)[0]
        features = read_features(readout, chain, activation)
        assert features.shape == (3, readout.num_features)
        torch.testing.assert_close(Tail(readout, chain)(activation), features, rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize(("pooling", "tokens"), [("token", slice(0, 1)), ("avg", slice(1, None))])
def test_a_readout_of_tokens_is_computed_without_the_network(pooling: str, tokens: slice) -> None:
    _, chain = built("timm ViT")
    pixels = make_pixels(chain.image_shape, 3)
    checked = 0
    for readout in find_readouts(chain, sweep="all"):
        is_token = readout.pooling == "token" or (readout.pooling == "native" and readout.cut != chain.features)
        if (pooling == "token") != is_token or (not is_token and readout.pooling != pooling):
            continue
        tail = Tail(readout, chain)
        assert tail.is_direct
        assert tail.tokens == tokens
        (activation,) = chain.run_prefix([readout.cut], pixels)
        torch.testing.assert_close(tail(activation), read_features(readout, chain, activation), rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked


def test_a_readout_that_normalizes_after_the_mean_runs_the_end_of_the_network() -> None:
    options = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", fc_norm=True, **options)
    chain = build_chain(randomize(model).eval(), (3, 32, 32))
    readout = next(r for r in find_readouts(chain, sweep="layer") if r.cut != chain.features)
    tail = Tail(readout, chain)
    assert not tail.is_direct
    activation = torch.randn(3, *readout.cut.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tail(activation), read_features(readout, chain, activation))
