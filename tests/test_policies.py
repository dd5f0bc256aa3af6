"""A policy names the parameters that train; the rest, orphans included, is frozen."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, built, make_model
from torch import nn

from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.freezing import set_trainable
from hf_transfer.network.policies import Policy, biases, from_layer, full, gradual, head, last, matching, norms


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
def test_from_layer_is_that_layer_and_all_after_it(name: str) -> None:
    _, chain = built(name)
    for i, layer in enumerate(chain.layers):
        selected = from_layer(layer.name).select(chain)
        assert selected == {n for above in chain.layers[i:] for n in above.parameters}
        if i and i <= len(chain):
            assert selected == last(len(chain) + 1 - i).select(chain)
            assert chain.lowest_cut(selected) is chain.layers[i - 1].cut
    assert from_layer("stem").select(chain) == full().select(chain)


def test_from_layer_takes_a_stage_from_its_first_layer() -> None:
    _, chain = built("timm ResNet")
    assert from_layer("layer2").select(chain) == from_layer("layer2.0").select(chain)
    assert from_layer("layer2").select(chain) > from_layer("layer2.1").select(chain)


def test_from_layer_lists_what_there_is() -> None:
    _, chain = built("timm ResNet")
    policy = from_layer("layer5")  # a mistake shows where a chain is there to compare with
    with pytest.raises(ValueError, match=r"from_layer\('layer5'\).*stem, layer1.0, .*head; aliases layer1, layer2"):
        policy.select(chain)


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
    assert by_module - set(chain.unused_parameters) <= selected
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert all(shapes[n] == 1 or "grn" in n for n in selected)  # GRN of ConvNeXtV2 on transformers is (1, 1, 1, C)


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_are_every_bias_and_the_classifier(name: str) -> None:
    _, chain = built(name)
    selected = biases().select(chain)
    assert set(chain.classifier_parameters) <= selected
    assert all(n.endswith("bias") for n in selected - set(chain.classifier_parameters))
    assert selected.isdisjoint(chain.unused_parameters)


def test_biases_of_attention_that_are_parameters_of_their_own_are_biases() -> None:
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=16, num_heads=2, img_size=32, num_classes=2)
    names = {name for name, _ in model.named_parameters()}
    chain: Any = SimpleNamespace(
        layers=[SimpleNamespace(parameters=names)], classifier_parameters=frozenset({"head.weight", "head.bias"})
    )
    selected = biases().select(chain)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.attn.proj.bias"} <= selected
    assert not {name for name in names if "weight" in name or "table" in name} & (selected - {"head.weight"})


def test_matching_selects_by_name_and_adds_the_classifier() -> None:
    _, chain = built("timm ViT")
    classifier = {"head.weight", "head.bias"}
    assert matching(r"attn\.qkv\.weight$").select(chain) == {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)} | classifier
    assert matching("head").select(chain) == classifier
    assert matching("").select(chain) == full().select(chain)


def test_matching_may_train_the_stem_alone() -> None:
    _, chain = built("timm ViT")
    selected = matching("patch_embed").select(chain)
    assert selected == {"patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
    assert chain.lowest_cut(selected) is None


def test_matching_refuses_what_is_no_expression_before_there_is_a_chain() -> None:
    with pytest.raises(ValueError, match=r"matching\('blocks\.\(1'\): this is not a regular expression: missing \)"):
        matching("blocks.(1")


def test_matching_nothing_names_what_is_near() -> None:
    _, chain = built("timm ViT")
    with pytest.raises(ValueError, match=r"matches no parameter; similar names are .*blocks\.1\.attn\.qkv\.weight"):
        matching(r"blocks\.1\.attention\.qkv\.weight$").select(chain)


def test_matching_does_not_select_orphans() -> None:
    _, chain = built("SigLIP")
    orphan = chain.unused_parameters[0]
    assert matching("").select(chain).isdisjoint(chain.unused_parameters)
    with pytest.raises(ValueError, match=f"matches no parameter but {orphan}, which never reaches the logits"):
        matching(f"^{orphan}$").select(chain)


def phases_of(chain: Chain, count: int) -> list[str]:
    return [policy.name for policy in gradual(chain, count)]


def test_gradual_goes_from_the_classifier_to_everything_in_even_steps() -> None:
    _, chain = built("timm ResNet")
    assert phases_of(chain, 2) == ["head", "full"]
    assert phases_of(chain, 3) == ["head", "last(3)", "full"]
    assert phases_of(chain, 4) == ["head", "last(2)", "last(4)", "full"]
    assert phases_of(chain, 7) == ["head", "last(1)", "last(2)", "last(3)", "last(4)", "last(5)", "full"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_phase_of_gradual_trains_more_and_cuts_lower(name: str) -> None:
    _, chain = built(name)
    cuts = [*reversed(chain.cuts)]
    for count in range(2, len(chain) + 3):
        selected = [policy.select(chain) for policy in gradual(chain, count)]
        assert len(selected) == count
        assert all(low < high for low, high in pairwise(selected))
        at = [chain.lowest_cut(names) for names in selected]
        assert at[0] is chain.features
        assert at[-1] is None
        places = [cuts.index(cut) for cut in at if cut is not None]
        assert places == sorted(set(places))


@pytest.mark.parametrize("phases", [-1, 0, 1, 8])
def test_gradual_refuses_phases_that_are_none(phases: int) -> None:
    _, chain = built("timm ResNet")
    with pytest.raises(
        ValueError, match=rf"gradual\(phases={phases}\): this chain has 5 layers; choose 2 <= phases <= 7"
    ):
        gradual(chain, phases)


def test_gradual_has_two_phases_where_there_are_no_layers() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.fc(x.mean((2, 3)))
            return logits

    chain = build_chain(Pooled(), (3, 8, 8))
    assert len(chain) == 0
    assert phases_of(chain, 2) == ["head", "full"]
    with pytest.raises(ValueError, match="choose 2 <= phases <= 2"):
        gradual(chain, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_is_every_parameter_but_orphans(name: str) -> None:
    model, chain = built(name)
    assert full().select(chain) == {n for n, _ in model.named_parameters()} - set(chain.unused_parameters)
    assert chain.lowest_cut(full().select(chain)) is None


def test_policies_have_names_for_people() -> None:
    policies = (head(), last(3), from_layer("layer3"), norms(), biases(), matching("attn"), full())
    assert [p.name for p in policies] == [
        "head",
        "last(3)",
        "from_layer(layer3)",
        "norms",
        "biases",
        "matching(attn)",
        "full",
    ]


def test_a_policy_of_ones_own_is_a_name_and_a_function() -> None:
    _, chain = built("timm ResNet")
    own = Policy(name="layer3 and head", select=lambda c: frozenset(c.layer("layer3.0").parameters))
    assert chain.lowest_cut(own.select(chain)) is chain.cut("layer2.1")


def test_what_a_policy_selects_gets_gradients() -> None:
    model = make_model("timm ResNet")
    chain = build_chain(model, FAMILIES["timm ResNet"].image_shape)
    for policy in (head(), last(2), norms(), biases(), full(), from_layer("layer3"), matching(r"^conv1\.")):
        selected = policy.select(chain)
        set_trainable(model, selected)
        model.zero_grad(set_to_none=True)
        model(torch.randn(2, *chain.image_shape)).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == selected
