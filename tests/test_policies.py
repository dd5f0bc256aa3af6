"""A policy names the parameters that train; the rest, orphans included, is frozen."""

import pytest
import torch
from families import FAMILIES, built, make_model
from torch import nn

from hf_transfer.network.chain import build_chain
from hf_transfer.network.policies import Policy, biases, full, head, last, norms, set_trainable


def test_head_is_the_classifier_alone() -> None:
    _, chain = built("timm ViT")
    assert head().select(chain) == {"head.weight", "head.bias"}
    assert chain.lowest_cut(head().select(chain)) is chain.features


def test_last_counts_layers_and_holds_the_whole_head() -> None:
    _, chain = built("timm ResNet")
    assert last(0).select(chain) == set(chain.layers[-1].parameters)
    for k in range(len(chain) + 1):
        selected = last(k).select(chain)
        assert selected == {n for layer in chain.layers[len(chain.layers) - 1 - k :] for n in layer.parameters}
        assert chain.lowest_cut(last(k).select(chain)) is (chain.cuts[len(chain) - k] if k else chain.features)
    assert chain.lowest_cut(last(2).select(chain)) is chain.cut("layer2.1")


def test_last_of_all_layers_leaves_the_stem() -> None:
    _, chain = built("timm ViT")
    assert full().select(chain) - last(len(chain)).select(chain) == set(chain.layers[0].parameters)


@pytest.mark.parametrize("k", [-1, 6, 100])
def test_last_refuses_what_the_chain_has_not(k: int) -> None:
    _, chain = built("timm ResNet")
    with pytest.raises(ValueError, match=rf"last\(k={k}\): this chain has 5 layers; choose 0 <= k <= 5"):
        last(k).select(chain)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_scales_and_shifts_of_every_normalisation(name: str) -> None:
    model, chain = built(name)
    selected = norms().select(chain) - set(chain.classifier_parameters)
    assert selected
    by_module = {
        f"{prefix}.{n}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm | nn.RMSNorm)
        for n, _ in module.named_parameters(recurse=False)
    }
    assert by_module - set(chain.orphans) <= selected
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert all(shapes[n] == 1 or "grn" in n for n in selected)  # GRN of ConvNeXtV2 on transformers is (1, 1, 1, C)


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_are_every_bias_and_the_classifier(name: str) -> None:
    _, chain = built(name)
    selected = biases().select(chain)
    assert set(chain.classifier_parameters) <= selected
    assert all(n.endswith("bias") for n in selected - set(chain.classifier_parameters))
    assert selected.isdisjoint(chain.orphans)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_is_every_parameter_but_orphans(name: str) -> None:
    model, chain = built(name)
    assert full().select(chain) == {n for n, _ in model.named_parameters()} - set(chain.orphans)
    assert chain.lowest_cut(full().select(chain)) is None


def test_policies_have_names_for_people() -> None:
    assert [p.name for p in (head(), last(3), norms(), biases(), full())] == [
        "head",
        "last(3)",
        "norms",
        "biases",
        "full",
    ]


def test_a_policy_of_ones_own_is_a_name_and_a_function() -> None:
    _, chain = built("timm ResNet")
    own = Policy(name="layer3 and head", select=lambda c: frozenset(c.layer("layer3.0").parameters))
    assert chain.lowest_cut(own.select(chain)) is chain.cut("layer2.1")


def test_set_trainable_freezes_all_others_and_orphans() -> None:
    model = make_model("SigLIP")
    chain = build_chain(model, FAMILIES["SigLIP"].image_shape)
    set_trainable(model, full().select(chain))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(chain.orphans)
    assert set(chain.orphans) <= model.state_dict().keys()
    set_trainable(model, head().select(chain))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_set_trainable_refuses_an_unknown_name() -> None:
    model = make_model("timm ViT")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"not parameters of this model: head\.scale"):
        set_trainable(model, ["head.weight", "head.scale"])
    assert flags == [p.requires_grad for p in model.parameters()]


def test_what_a_policy_selects_gets_gradients() -> None:
    model = make_model("timm ResNet")
    chain = build_chain(model, FAMILIES["timm ResNet"].image_shape)
    for policy in (head(), last(2), norms(), biases(), full()):
        selected = policy.select(chain)
        set_trainable(model, selected)
        model.zero_grad(set_to_none=True)
        model(torch.randn(2, *chain.image_shape)).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == selected
