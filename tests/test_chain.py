"""The chain is an ordered, complete partition of a network, named as people name its layers; and it says what it cannot do."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from families import FAMILIES, assert_same_state, built, make_model, make_pixels, state_of
from torch import nn

import hf_transfer.network.chain as chain_module
from hf_transfer.network.chain import FEATURES, Chain, build_chain
from hf_transfer.network.forward import compute_logits
from hf_transfer.sealed import read_sealed, seal

SHAPE = (3, 8, 8)


def layer_names(chain: Chain) -> list[str]:
    return [layer.name for layer in chain.layers]


def numbered(prefix: str, counts: Sequence[int], between: str = ".") -> list[str]:
    return [f"{prefix}{i}{between}{j}" for i, count in enumerate(counts) for j in range(count)]


# --- a complete partition (law 2) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_lies_in_one_layer_or_is_an_orphan(name: str) -> None:
    model, chain = built(name)
    placed = [n for layer in chain.layers for n in layer.parameters] + list(chain.unused_parameters)
    assert sorted(placed) == sorted(n for n, _ in model.named_parameters())
    assert sorted(n for layer in chain.layers for n in layer.buffers) == sorted(n for n, _ in model.named_buffers())
    assert len(set(layer_names(chain))) == len(chain.layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_holds_its_own_module_and_the_downsampling_before_it(name: str) -> None:
    """A layer may hold more than the module that it is named after, but never leave a parameter of it to another."""
    model, chain = built(name)
    for layer in chain.layers[1:-1]:
        own = {f"{layer.name}.{n}" for n, _ in model.get_submodule(layer.name).named_parameters()}
        assert own <= set(layer.parameters)
        own_buffers = {f"{layer.name}.{n}" for n, _ in model.get_submodule(layer.name).named_buffers()}
        assert own_buffers <= set(layer.buffers)


@pytest.mark.parametrize("name", FAMILIES)
def test_building_a_chain_leaves_no_mark(name: str) -> None:
    model = make_model(name).train()
    before = state_of(model)
    build_chain(model, FAMILIES[name].image_shape)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_one_vector_an_image_before_one_linear_map(name: str) -> None:
    model, chain = built(name)
    assert chain.features is not None
    assert chain.head is not None
    assert chain.head.is_direct
    (name,) = chain.head.modules
    assert torch.Size(chain.features.shape).numel() == max(chain.features.shape)
    pixels = make_pixels(chain.image_shape, 2)
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(linear(chain.run_prefix([chain.features], pixels)[0]), compute_logits(model, pixels))
    assert chain.classifier_parameters == (f"{name}.weight", f"{name}.bias")
    assert not chain.notes


# --- the tables of DESIGN ---------------------------------------------------------------------------------------------


def chain_of_timm(architecture: str, image_px: int, **options: object) -> Chain:
    return build_chain(timm.create_model(architecture, num_classes=5, **options), (3, image_px, image_px))


def test_layers_of_resnet18() -> None:
    chain = chain_of_timm("resnet18", 32, channels=(8, 8, 16, 16), stem_width=8)
    assert layer_names(chain) == ["stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)), "head"]
    assert len(chain) == 8
    assert chain.layer("layer3.1").aliases == ("layer3",)
    assert "layer3.0.downsample.0.weight" in chain.layer("layer3.0").parameters
    assert chain.layers[0].parameters == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert chain.layers[-1].parameters == ("fc.weight", "fc.bias")


def test_layers_of_mobilenet_v2() -> None:
    chain = chain_of_timm("mobilenetv2_035", 32)
    blocks = numbered("blocks.", (1, 2, 3, 4, 3, 3, 1))
    assert layer_names(chain) == ["stem", *blocks, "conv_head", "head"]
    assert len(chain) == 18
    assert {"conv_head.weight", "bn2.weight", "bn2.bias"} == set(chain.layer("conv_head").parameters)


def test_layers_of_swin_tiny() -> None:
    chain = chain_of_timm(
        "swin_tiny_patch4_window7_224",
        32,
        img_size=32,
        window_size=2,
        embed_dim=8,
        depths=(2, 2, 6, 2),
        num_heads=(1, 1, 2, 2),
    )
    assert layer_names(chain) == ["stem", *numbered("layers.", (2, 2, 6, 2), ".blocks."), "head"]
    assert len(chain) == 12
    assert chain.layer("layers.2.blocks.3").aliases == ("layers.2", "layers.2.blocks")
    # Patch merging belongs to the block after it.
    assert "layers.1.downsample.reduction.weight" in chain.layer("layers.1.blocks.0").parameters
    assert {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"} == set(chain.layers[-1].parameters)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_layers_of_vit_and_deit_tiny(architecture: str) -> None:
    chain = chain_of_timm(architecture, 32, img_size=32, embed_dim=24, num_heads=2)
    assert layer_names(chain) == ["stem", *(f"blocks.{i}" for i in range(12)), "head"]
    assert len(chain) == 12
    assert {"cls_token", "pos_embed"} < set(chain.layers[0].parameters)
    assert {"norm.weight", "norm.bias", "head.weight", "head.bias"} == set(chain.layers[-1].parameters)
    assert chain.layer("blocks.3").aliases == ()


class PartlyBounded(nn.Module):
    """A bounded attention, then an MLP whose skip connection hides it: together one block, as in Perceiver or RepViT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Block(4, 4)
        self.mlp = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        return x + self.mlp(x).tanh()


def test_a_block_of_which_only_a_part_is_bounded_stays_whole() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 1), *(PartlyBounded() for _ in range(4)))
    chain = build_chain(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval(), SHAPE)
    assert layer_names(chain) == ["stem", "0.1", "0.2", "0.3", "0.4", "head"]


def test_a_networks_own_head_is_part_of_the_chains() -> None:
    """timm's SelecSLS calls its last convolutions `head`, a name that the chain needs itself."""

    class OwnHead(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = Block(4, 4)

        def pooled(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x).mean((2, 3))

    chain = build_chain(OwnHead().eval(), SHAPE)
    assert layer_names(chain) == ["stem", "layers.0", "layers.1", "layers.2", "head"]
    assert {"head.0.weight", "fc.weight"} <= set(chain.layers[-1].parameters)
    assert chain.cut(FEATURES) is chain.features


def test_scales_of_shape_1_1_c_are_no_weights() -> None:
    """timm's ResMLP normalises with `Affine`: behind the last block it is the head's, as any final norm is."""
    chain = chain_of_timm("resmlp_12_224", 32, img_size=32)
    assert layer_names(chain) == ["stem", *(f"blocks.{i}" for i in range(12)), "head"]
    assert {"norm.alpha", "norm.beta"} <= set(chain.layers[-1].parameters)


# --- cuts and what lies before them ---------------------------------------------------------------------------------------


def test_cuts_are_found_by_name() -> None:
    _, chain = built("timm ResNet")
    assert [c.name for c in chain.cuts] == [*layer_names(chain)[:-1], FEATURES]
    assert chain.cut("layer2.0") is chain.layer("layer2.0").cut
    assert chain.cut(FEATURES) is chain.features
    with pytest.raises(ValueError, match=r"'layer9.0' is no cut of this chain; its cuts are stem, layer1.0"):
        chain.cut("layer9.0")
    with pytest.raises(ValueError, match=r"'layer9.0' is no layer of this chain; its layers are stem, layer1.0"):
        chain.layer("layer9.0")


def test_lowest_cut_is_the_deepest_before_which_nothing_trains() -> None:
    _, chain = built("timm ResNet")
    assert chain.lowest_cut(["fc.weight", "fc.bias"]) is chain.features
    assert chain.lowest_cut(["fc.bias", "layer4.0.bn1.bias"]) is chain.cut("layer3.0")
    assert chain.lowest_cut(["layer2.0.bn1.bias"]) is chain.cut("layer1.0")
    assert chain.lowest_cut(["layer1.0.bn1.bias"]) is chain.cut("stem")
    assert chain.lowest_cut(["fc.bias", "conv1.weight"]) is None
    with pytest.raises(ValueError, match=r"not parameters of this chain: fc\.scale"):
        chain.lowest_cut(["fc.scale"])


def test_a_head_that_is_more_than_its_classifier_is_cut_before_the_head_where_all_of_it_trains() -> None:
    _, chain = built("timm ViT")
    assert chain.lowest_cut(["head.weight", "norm.weight"]) is chain.cut("blocks.1")
    assert chain.lowest_cut(["head.weight"]) is chain.features


@pytest.mark.parametrize("name", ["timm ResNet", "timm ViT", "DINOv2"])
def test_before_a_cut_lie_all_layers_up_to_it(name: str) -> None:
    _, chain = built(name)
    assert chain.before(None) == ([], [])
    for i, layer in enumerate(chain.layers[:-1]):
        assert layer.cut is not None
        parameters, buffers = chain.before(layer.cut)
        assert parameters == [n for x in chain.layers[: i + 1] for n in x.parameters]
        assert buffers == [n for x in chain.layers[: i + 1] for n in x.buffers]
    assert chain.features is not None
    parameters, _ = chain.before(chain.features)
    everything = {n for x in chain.layers for n in x.parameters}
    assert set(parameters) == everything - set(chain.classifier_parameters)


def test_bytes_per_image_are_those_of_the_activation() -> None:
    _, chain = built("timm ResNet")
    activations = chain.run_prefix(chain.cuts, make_pixels(chain.image_shape, 3))
    for cut, activation in zip(chain.cuts, activations, strict=True):
        assert 3 * cut.bytes_per_image == activation.numel() * activation.itemsize


# --- fallbacks ----------------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(nn.Conv2d(width_in, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3, padding=1))


class Net(nn.Module):
    """Three blocks, pooled, and one linear map."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(i, width) for i in (3, width, width))
        self.fc = nn.Linear(width, 5)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pooled(x))


class LongSkip(Net):
    """The image itself is added at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pooled(x) + x.mean((1, 2, 3))[:, None])


class SkipToLogits(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pooled(x)) + x.mean((1, 2, 3))[:, None]


def test_without_interior_cuts_the_cut_before_the_classifier_remains() -> None:
    model = LongSkip().eval()
    chain = build_chain(model, SHAPE)
    assert [c.name for c in chain.cuts] == [FEATURES]
    assert layer_names(chain) == ["stem", "head"]
    assert any("no interior cuts" in note and "the cut before the classifier" in note for note in chain.notes)
    pixels = make_pixels(SHAPE, 3)
    assert chain.features is not None
    activation = chain.run_prefix([chain.features], pixels)[0]
    with chain.part(chain.features) as suffix:
        logits = suffix(activation)
    torch.testing.assert_close(logits, model(pixels))
    assert chain.lowest_cut(["fc.weight"]) is chain.features
    assert chain.lowest_cut(["layers.2.0.weight"]) is None


def test_without_any_cut_nothing_is_cached_and_the_chain_says_so() -> None:
    chain = build_chain(SkipToLogits().eval(), SHAPE)
    assert chain.cuts == ()
    assert chain.features is None
    assert layer_names(chain) == ["stem", "head"]
    assert any("no activations can be cached" in note for note in chain.notes)
    assert chain.lowest_cut(chain.classifier_parameters) is None


def test_a_network_that_cannot_be_traced_is_one_head_and_says_why() -> None:
    class NoGradient(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    chain = build_chain(NoGradient().eval(), SHAPE)
    assert chain.cuts == ()
    assert any("no gradient reaches the image" in note for note in chain.notes)
    assert len(chain.layers[-1].parameters) == 14
    assert chain.classifier_parameters == chain.layers[-1].parameters


def test_without_a_linear_head_the_whole_last_layer_counts_as_classifier() -> None:
    class Maximum(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = self.pooled(x)
            return torch.maximum(self.fc(pooled), self.second(pooled))

    chain = build_chain(Maximum().eval(), SHAPE)
    assert chain.head is None
    assert any("not a weighted sum of the linear maps fc, second" in note for note in chain.notes)
    assert set(chain.classifier_parameters) == {"fc.weight", "fc.bias", "second.weight", "second.bias"}
    assert chain.lowest_cut(chain.classifier_parameters) is chain.cut("layers.2")


def test_an_inner_map_of_as_many_outputs_as_classes_is_not_the_classifier() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(super().forward(x)[:, None])[:, 0]

    chain = build_chain(Late().eval(), SHAPE)
    assert chain.head is None
    assert {"fc.weight", "mix.weight"} <= set(chain.classifier_parameters)


def test_the_last_layer_may_be_the_classifiers_input() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(i, 6), nn.Tanh(), nn.Linear(6, 6)) for i in (192, 6, 6))
            self.fc = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            for layer in self.layers:
                x = layer(x)
            return self.fc(x)

    chain = build_chain(Direct().eval(), SHAPE)
    assert layer_names(chain) == ["stem", "layers.0", "layers.1", "layers.2", "head"]
    assert chain.layers[-1].parameters == ("fc.weight", "fc.bias")
    assert chain.lowest_cut(["fc.weight", "layers.2.0.weight"]) is chain.cut("layers.1")


class SharedAcross(Net):
    """The second block's kernel is used again in the third: the cut between them would split one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2][0].weight = self.layers[1][0].weight


def test_a_parameter_used_on_both_sides_makes_a_cut_illegal() -> None:
    model = SharedAcross().eval()
    chain = build_chain(model, SHAPE)
    assert layer_names(chain) == ["stem", "layers.0", "layers.2", "head"]
    assert "layers.1.0.weight" in chain.layer("layers.2").parameters
    assert any("both sides" in note and "layers.1.0.weight" in note for note in chain.notes)
    placed = [n for layer in chain.layers for n in layer.parameters]
    assert sorted(placed) == sorted(n for n, _ in model.named_parameters())


def test_a_layer_that_is_called_again_ends_with_its_last_call() -> None:
    class Again(Net):
        """The same block at the second and at the third place: weights tied over depth, as in ALBERT."""

        def __init__(self) -> None:
            super().__init__()
            self.layers[2] = Block(4, 4)
            self.last = Block(4, 4)

        def pooled(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[1](self.layers[2](self.layers[1](self.layers[0](x))))
            return self.last(x).mean((2, 3))

    model = Again().eval()
    chain = build_chain(model, SHAPE)
    assert layer_names(chain) == ["stem", "layers.0", "layers.1", "last", "head"]
    assert len(chain.layer("layers.1").parameters) == 8
    pixels = make_pixels(SHAPE, 3)
    whole = model(pixels)
    for cut, activation in zip(chain.cuts, chain.run_prefix(chain.cuts, pixels), strict=True):
        with chain.part(cut) as suffix:
            torch.testing.assert_close(suffix(activation), whole)


def test_coat_shares_its_position_encoding_within_a_stage() -> None:
    """timm's CoaT: one conv relative position encoding serves all blocks of a stage, so a stage is the smallest layer."""
    model = timm.create_model(
        "coat_lite_tiny", num_classes=5, img_size=32, embed_dims=[8, 8, 16, 16], serial_depths=[2, 2, 2, 2]
    ).eval()
    chain = build_chain(model, (3, 32, 32))
    placed = [n for layer in chain.layers for n in layer.parameters] + list(chain.unused_parameters)
    assert sorted(placed) == sorted(n for n, _ in model.named_parameters())
    assert any("both sides" in note for note in chain.notes)
    pixels = make_pixels(chain.image_shape, 2)
    whole = model(pixels)
    for cut, activation in zip(chain.cuts, chain.run_prefix(chain.cuts, pixels), strict=True):
        model.zero_grad(set_to_none=True)
        with chain.part(cut) as suffix:
            logits = suffix(activation)
            logits.sum().backward()
        torch.testing.assert_close(logits, whole)
        reached = {n for n, p in model.named_parameters() if p.grad is not None}
        assert reached == set(placed) - {*chain.before(cut)[0], *chain.unused_parameters}


class WithOrphan(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.ones(4))


def test_a_parameter_that_never_reaches_the_logits_is_an_orphan() -> None:
    chain = build_chain(WithOrphan().eval(), SHAPE)
    assert chain.unused_parameters == ("mask_token",)
    assert all("mask_token" not in layer.parameters for layer in chain.layers)
    with pytest.raises(ValueError, match="not parameters of this chain: mask_token"):
        chain.lowest_cut(["mask_token"])


def test_orphans_of_real_families() -> None:
    assert built("DINOv2")[1].unused_parameters == ("dinov2.embeddings.mask_token",)
    orphans = built("SigLIP")[1].unused_parameters
    assert orphans
    assert all(n.startswith("vision_model.head.") for n in orphans)


# --- verification -------------------------------------------------------------------------------------------------------


def test_a_wrong_cut_does_not_hide_behind_a_zero_initialised_branch() -> None:
    """The branch reads the pixels through a plain array, unseen by autograd; at first its last weight is zero."""

    class Smuggler(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(1, 4, bias=False)
            nn.init.zeros_(self.gate.weight)

        def pooled(self, x: torch.Tensor) -> torch.Tensor:
            return super().pooled(x) + self.gate(x.detach().mean((1, 2, 3))[:, None])

    chain = build_chain(Smuggler().eval(), SHAPE)
    assert [c.name for c in chain.cuts] == [FEATURES]
    assert any("no verified cut after" in note for note in chain.notes)


def test_verified_sites_are_remembered_by_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_chain(make_model("timm ViT"), FAMILIES["timm ViT"].image_shape, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("verified again")

    monkeypatch.setattr(chain_module, "_verify", refuse)
    again = build_chain(make_model("timm ViT", seed=1), FAMILIES["timm ViT"].image_shape, cache_dir=tmp_path)
    assert again.cuts == first.cuts
    assert layer_names(again) == layer_names(first)
    with pytest.raises(AssertionError, match="verified again"):
        build_chain(make_model("ViT"), FAMILIES["ViT"].image_shape, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"garbage", bytes(range(256)), seal({"stem": 1}).encode(), b"[" * 10**6]
)
def test_a_damaged_file_of_sites_is_discarded_and_written_again(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, shape = Net().eval(), SHAPE
    first = build_chain(model, shape, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage)
    for _ in range(2):
        assert build_chain(model, shape, cache_dir=tmp_path).cuts == first.cuts
    assert caplog.text.count("discarding the damaged file of verified cuts") == 1
    assert file.read_bytes() == intact
    assert list(tmp_path.iterdir()) == [file]


def test_sites_that_cannot_be_written_stop_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(blocked))
    assert build_chain(Net().eval(), SHAPE, cache_dir=blocked / "chains").cuts
    assert f"cannot write to the cache folder {blocked} (Not a directory): set HF_TRANSFER_CACHE" in caplog.text


def test_remembered_sites_hold_nothing_of_the_machine(tmp_path: Path) -> None:
    build_chain(make_model("timm ViT"), FAMILIES["timm ViT"].image_shape, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    assert set(read_sealed(file)) == {"stem", "blocks.0", "blocks.1", FEATURES}


def test_dropped_sites_are_explained_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="hf_transfer"):
        build_chain(LongSkip().eval(), SHAPE)
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
