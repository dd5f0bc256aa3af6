"""Stochastic depth and dropout before the classifier: in train mode, after the cut, and without a trace after training."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, built, make_model, make_pixels, randomize
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from hf_transfer.config import AdapterConfig
from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import load
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.dropping import (
    check_head_dropout,
    check_stochastic_depth,
    find_head_dropouts,
    head_dropout,
    stochastic_depth,
)
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.freezing import set_modes
from hf_transfer.network.policies import full, head, last

RESIDUAL = [
    "timm ViT",
    "timm DINOv2",
    "timm ConvNeXt",
    "timm ResNet",
    "timm RegNet",
    "timm MobileNetV2",
    "ConvNeXt",
    "DINOv2",
]
PLAIN = ["ViT", "ResNet", "timm EfficientNet"]  # the last one has no skip connection
SETTINGS = {"layers": (1, 2, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}


def compute(model: nn.Module, inputs: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return compute_logits(model, inputs)


def structure(model: nn.Module) -> list[tuple[str, str, list[str]]]:
    return [(name, repr(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    ("name", "drops"), [*((n, "depth") for n in RESIDUAL), *((n, "head") for n in (*RESIDUAL, *PLAIN))]
)
def test_random_in_train_mode_and_gone_afterwards(name: str, drops: str) -> None:
    model = make_model(name)
    chain = build_chain(model, FAMILIES[name].image_shape)
    images = make_pixels(FAMILIES[name].image_shape, 4)
    logits, before = compute(model, images, 0), structure(model)
    own = find_head_dropouts(chain)
    with stochastic_depth(chain, 0.9) if drops == "depth" else head_dropout(chain, 0.5, own):
        assert torch.equal(compute(model, images, 0), logits)  # eval
        set_modes(chain, None, full().select(chain), freeze_batchnorm=True)
        first = compute(model, images, 1)
        assert torch.equal(compute(model, images, 1), first)
        assert not torch.equal(compute(model, images, 2), first)
    model.eval()
    assert structure(model) == before
    set_modes(chain, None, full().select(chain), freeze_batchnorm=True)
    assert torch.equal(compute(model, images, 1), compute(model, images, 2))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}),
        ("convnext_atto", {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}),
        ("resnet18", SETTINGS),
    ],
)
def test_depth_drops_as_in_a_network_that_timm_builds_with_the_rate(architecture: str, options: dict[str, Any]) -> None:
    """The same rates in the same order: equal seeds leave out the same branches."""
    theirs = timm.create_model(architecture, num_classes=5, drop_path_rate=0.5, **options)
    ours = timm.create_model(architecture, num_classes=5, **options)
    ours.load_state_dict(randomize(theirs, 0).state_dict())
    images = make_pixels((3, 32, 32), 4)
    chain = build_chain(ours.eval(), (3, 32, 32))
    with stochastic_depth(chain, 0.5):
        for model in (ours, theirs):
            model.train()
            for module in model.modules():
                module.training = not isinstance(module, nn.BatchNorm2d)
        expected = compute(theirs, images, 3)
        assert torch.equal(compute(ours, images, 3), expected)
    assert not torch.equal(compute(ours, images, 3), expected)


def test_rates_are_those_of_a_transformers_network_built_with_the_rate() -> None:
    options = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
    theirs = ConvNextForImageClassification(ConvNextConfig(drop_path_rate=0.4, **options))
    rates = [getattr(m, "drop_prob", 0.0) for n, m in theirs.named_modules() if n.endswith("drop_path")]
    for own in (0.0, 0.2):  # a rate of the checkpoint's own is replaced
        model = ConvNextForImageClassification(ConvNextConfig(drop_path_rate=own, **options)).eval()
        chain, before = build_chain(model, (3, 32, 32)), structure(model)
        with stochastic_depth(chain, 0.4):
            now = [getattr(m, "rate", 0.0) for n, m in model.named_modules() if n.endswith("drop_path")]
            assert now == pytest.approx(rates)
        assert structure(model) == before
        assert model.config.drop_path_rate == own


@pytest.mark.parametrize("name", ["timm ResNet", "timm ViT", "ConvNeXt"])
def test_frozen_blocks_drop_nothing(name: str) -> None:
    """Of the blocks, only those after the cut are in train mode, also where None marks the branch (timm's ResNet)."""
    model = make_model(name)
    chain = build_chain(model, FAMILIES[name].image_shape)
    names = last(1).select(chain)
    cut = chain.lowest_cut(names)
    assert cut is not None
    activations = make_pixels(cut.shape, 4)
    branch = torch.ones(64, 1)
    with stochastic_depth(chain, 0.9), chain.part(start=cut) as suffix:
        set_modes(chain, cut, names)
        frozen = set(chain.before(cut)[0])
        drops = {n: m for n, m in model.named_modules() if type(m).__name__ == "_StochasticDepth"}
        for path, module in drops.items():
            block = path.rpartition(".")[0]
            is_frozen = any(parameter.startswith(f"{block}.") for parameter in frozen)
            module.rate = 0.9
            assert torch.equal(module(branch), branch) == is_frozen, path
        first, second = (compute(suffix, activations, seed) for seed in (1, 2))
        assert not torch.equal(first, second)


def compute_suffix(chain: Chain, rate: float, seed: int) -> torch.Tensor:
    """The inputs of the classifier (B, F), where only the classifier trains on stored features."""
    names = head().select(chain)
    cut, taken = chain.lowest_cut(names), list[torch.Tensor]()
    assert cut is not None
    assert chain.head is not None
    own = find_head_dropouts(chain)
    with chain.part(start=cut) as suffix, head_dropout(chain, rate, own):
        set_modes(chain, cut, names)
        classifier = chain.model.get_submodule(chain.head.modules[0])
        hook = classifier.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
        compute(suffix, torch.ones(64, *cut.shape), seed)
        hook.remove()
    return taken[0]


@pytest.mark.parametrize("name", ["timm ViT", "timm ResNet", "timm ConvNeXt", "ViT", "ResNet"])
def test_stored_features_are_dropped_before_the_classifier(name: str) -> None:
    _, chain = built(name)
    features = compute_suffix(chain, 0.25, 0)
    share = (features == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / features.numel()) ** 0.5)
    assert torch.allclose(features[features != 0], torch.tensor(1 / 0.75))
    assert bool((compute_suffix(chain, 0.0, 0) == 1).all())
    chain.model.eval()


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_the_rate_replaces_the_networks_own(architecture: str) -> None:
    """timm's networks drop features by a module, or by a rate in the forward."""
    options = SETTINGS if architecture == "resnet18" else {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model(architecture, num_classes=5, drop_rate=0.9, **options).eval()
    chain = build_chain(model, (3, 32, 32))
    images = make_pixels((3, 32, 32), 4)
    expected = compute(model, images, 0)
    with head_dropout(chain, 0.0, find_head_dropouts(chain)):
        set_modes(chain, None, full().select(chain), freeze_batchnorm=True)
        # The position dropout of a ViT has the same rate, and lies elsewhere.
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module is not getattr(model, "head_drop", None):
                module.eval()
        assert torch.equal(compute(model, images, 1), expected)
    assert not torch.equal(compute(model, images, 1), expected)


def test_adapted_classifiers_drop_too() -> None:
    backbone = load("embedded", ["a", "b", "c"])
    adapted, chain = add_adapters(backbone, backbone.chain(), AdapterConfig(rank=2))
    images = make_pixels(backbone.preprocessing.image_shape, 4)
    with stochastic_depth(chain, 0.5), head_dropout(chain, 0.5, find_head_dropouts(chain)):
        set_modes(chain, None, adapted.policy().select(chain), freeze_batchnorm=True)
        logits = [compute(chain.model, images, seed) for seed in (1, 1, 2)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", PLAIN)
def test_a_network_without_stochastic_depth_is_refused(name: str) -> None:
    _, chain = built(name)
    with pytest.raises(ValueError, match=r"drop_path=0\.1: \w+ has no blocks with stochastic depth; omit --drop_path"):
        check_stochastic_depth(chain, 0.1, [None])
    for rate in (None, 0.0):
        check_stochastic_depth(chain, rate, [None])
        check_head_dropout(chain, rate)


def test_rates_without_effect_are_refused() -> None:
    _, chain = built("timm ResNet")
    cuts = [chain.lowest_cut(policy.select(chain)) for policy in (head(), last(0))]
    with pytest.raises(ValueError, match=r"drop_path=0\.1: no block with stochastic depth trains; train more layers"):
        check_stochastic_depth(chain, 0.1, cuts)
    for cut in (chain.lowest_cut(last(1).select(chain)), None):
        check_stochastic_depth(chain, 0.1, [*cuts, cut])
    with pytest.raises(ValueError, match=r"dropout=0\.2: ResNet has no linear classifier .*omit --dropout"):
        check_head_dropout(replace(chain, head=None), 0.2)
