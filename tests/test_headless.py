"""Checkpoints of transformers without a classifier: upstream's function and weights, under a new linear head."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import find_libraries, verify, write_reference
from hf_transfer.network.adapters import merge_adapters
from hf_transfer.network.backbone import load, with_new_head
from hf_transfer.network.chain import FEATURES
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.transformers_models import find_heads
from hf_transfer.network.weights import find_changed_weights
from tests.families import make_pixels, randomize
from tests.headless import LAYOUTS, MORE_LAYOUTS, Layout, our_features, upstream_features
from tests.sessions import make_session
from tests.test_save import results_for

LABELS = ("ant", "bee", "cat")
PROCESSOR = "ViTImageProcessor"  # for tests of networks, whatever their own processor does
FAST = (
    "MAE", "ViT", "BEiT, masked images", "Swin, backbone", "DINOv3", "CLIP", "ChineseCLIP tower", "SAM",
)  # fmt: skip
EVERY = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.soak, id=name) for name in {**LAYOUTS, **MORE_LAYOUTS}
]


def assert_same(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors of the checkpoint, or removes those that are None."""
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in (weights | changes).items() if value is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- every layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_upstreams_function_and_weights_under_a_new_head(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = {**LAYOUTS, **MORE_LAYOUTS}[name]
    upstream = layout.save(tmp_path, processor=PROCESSOR)
    with caplog.at_level(logging.INFO):
        found = load(str(tmp_path), LABELS)
    model: Any = found.model
    assert (type(model).__name__, found.label_names, found.new_head) == (layout.expected, LABELS, True)
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    hidden, pooled = upstream_features(name, upstream, pixels)
    ours, features = our_features(found, pixels)
    assert_same(ours, hidden)
    if name in ("ViT", "ViT of gray images"):  # its classifier leaves out the pooler, and reads the class token
        assert_same(features, hidden[:, 0])
    elif pooled is not None:  # DINOv2's classifier appends the mean of the grid
        assert_same(features[:, : pooled.shape[1]], pooled)
        assert features.shape == pooled.shape or name.startswith("DINOv2")
    else:
        assert layout.expected != "BackboneForImageClassification" or model.config.pooling == layout.pooling
    # Upstream's weights: all but the head and norms that are named.
    heads = find_heads(model).parameters
    changed = find_changed_weights(model, tmp_path, heads)
    named = {n.rpartition(".")[0] for n in changed}
    assert all("norm" in norm and f"lacks the weights of {norm}" in caplog.text for norm in named)
    victim = next(n for n, p in model.named_parameters() if n not in heads and p.ndim > 1)
    with torch.no_grad():
        model.get_parameter(victim).flatten()[-1] += 1e-3
    assert set(find_changed_weights(model, tmp_path, heads)) == {*changed, victim}
    if name == "LeViT":
        return  # the head is a norm and a linear map
    chain = found.chain()
    assert len(chain) >= (1 if name == "MLCD" else 2)
    assert chain.features is not None
    assert chain.cut(FEATURES).shape == features.shape[1:]


def journey(layout: Layout, folder: Path, strategy: str = "linear_probe", **settings: Any) -> Path:
    """A run on a few digits, saved, and reloaded by plain transformers in a fresh process."""
    layout.save(folder / "upstream", processor=PROCESSOR)
    session = make_session(strategy, checkpoint=str(folder / "upstream"), images_per_class=4, cache="none", **settings)
    result = session.config.strategy.run(session)
    write_reference(result.backbone, session.data.test, folder / "reference.safetensors")
    save_model(result.backbone, results_for(result.backbone), folder / "model")
    assert find_libraries(folder / "model") == ("transformers",)
    verify(folder / "model", folder / "reference.safetensors", ("transformers",))
    return folder / "model"


@pytest.mark.parametrize(
    "name", [p if p == "ChineseCLIP tower" else pytest.param(p, marks=pytest.mark.soak) for p in LAYOUTS]
)
def test_a_probe_is_saved_and_plain_transformers_loads_it(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    saved = journey(layout, tmp_path)
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == [layout.expected]
    generic = layout.expected == "BackboneForImageClassification"
    assert (saved / "modeling_backbone.py").is_file() == ("auto_map" in config) == generic
    again = load(str(saved))  # here without trust_remote_code, since the class is our own
    assert not again.new_head
    assert again.label_names == tuple(config["id2label"].values())


@pytest.mark.soak
@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_are_merged_where_peft_cannot_create_the_base(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[name]
    with caplog.at_level(logging.INFO):
        journey(layout, tmp_path, "lora", merge=layout.model != "ViTMAEForPreTraining", epochs=1, rank=2)
    assert ("adapters will be merged" in caplog.text) == (name == "MAE")


def test_adapters_on_a_generic_classifier_merge(tmp_path: Path) -> None:
    LAYOUTS["CLIP tower"].save(tmp_path, processor=PROCESSOR)
    session = make_session("lora", checkpoint=str(tmp_path), images_per_class=4, rank=2, merge=False)
    strategy = session.config.strategy
    prepared = strategy.prepare(session)
    adapted: Any = prepared.backbone
    assert not adapted.is_auto_class
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name in adapted.trained:
                parameter += 0.05
    pixels = make_pixels(adapted.preprocessing.image_shape, 2)
    expected = compute_logits(adapted.model, pixels).detach()
    merged = merge_adapters(adapted)
    torch.testing.assert_close(compute_logits(merged.model, pixels).detach(), expected, rtol=1e-4, atol=1e-4)


# --- which class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("CLIP tower", "CLIP"), ("SigLIP tower", "Siglip")],
)
def test_another_pooling_is_used_if_asked_for(name: str, kind: str, tmp_path: Path) -> None:
    """The tower's own activation function goes with it: with CLIP's default, the hidden states would differ."""
    upstream = LAYOUTS[name].save(tmp_path, processor=PROCESSOR)
    found = load(str(tmp_path), LABELS, pooling="class")
    assert type(found.model).__name__ == f"{kind}ForImageClassification"
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    assert_same(our_features(found, pixels)[0], upstream_features(name, upstream, pixels)[0])


def test_equal_names_of_tensors_are_no_reason_for_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ChineseCLIP's tower has the names of CLIP's; without its activation function, CLIP's class computes something else."""
    layout = LAYOUTS["ChineseCLIP tower"]
    replace(layout, settings={**layout.settings, "hidden_act": "gelu"}).save(tmp_path, processor=PROCESSOR)
    clip = transformers.CLIPForImageClassification
    own = transformers.CLIPConfig(vision_config=dict(layout.settings))
    monkeypatch.setattr("hf_transfer.network.headless._candidates", lambda *_: iter([(clip, own)]))
    assert type(load(str(tmp_path), LABELS).model).__name__ == "BackboneForImageClassification"
    with pytest.raises(
        ValueError, match=r"pooling=class: .* hidden states of ChineseCLIPVisionModel; choose pooling=auto"
    ):
        load(str(tmp_path), LABELS, pooling="class")


def test_a_masked_autoencoder_masks_nothing(tmp_path: Path) -> None:
    LAYOUTS["MAE"].save(tmp_path, processor=PROCESSOR)
    found = load(str(tmp_path), LABELS)
    pixels = make_pixels(found.preprocessing.image_shape, 2)
    with torch.no_grad():
        first = compute_logits(found.model, pixels)
        changed = [pixels.clone() for _ in range(2)]
        changed[0][..., :8, :8] += 1
        changed[1][..., -8:, -8:] += 1
        assert torch.equal(first, compute_logits(found.model, pixels))
        assert not any(torch.equal(first, compute_logits(found.model, other)) for other in changed)


@pytest.mark.parametrize(
    ("config", "model", "said"),
    [
        ("Siglip2VisionConfig", "Siglip2VisionModel", "also takes pixel_attention_mask, spatial_shapes"),
        ("BertConfig", "BertModel", "BertModel takes text"),
        ("Wav2Vec2Config", "Wav2Vec2Model", "Wav2Vec2Model takes audio"),
        ("VideoMAEConfig", "VideoMAEModel", "VideoMAEModel takes videos"),
        ("YolosConfig", "YolosForObjectDetection", "YolosForObjectDetection is a detector"),
        ("LlamaConfig", "LlamaForCausalLM", "LlamaForCausalLM takes text"),
    ],
)
def test_what_takes_no_single_images_is_refused_before_its_weights_are_read(
    config: str, model: str, said: str, tmp_path: Path
) -> None:
    settings = getattr(transformers, config)(architectures=[model])
    settings.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said) as caught:
        load(str(tmp_path), LABELS)
    assert "choose a checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- heads and missing weights ------------------------------------------------------------------------------------------


def save_vit(folder: Path, num_labels: int, kind: str = "ViT", model: str = "ViTForImageClassification") -> nn.Module:
    """A classifier whose tokens are 32 wide."""
    settings = LAYOUTS["ViT"].settings
    config = getattr(transformers, f"{kind}Config")(**settings, num_labels=num_labels)
    made: Any = randomize(getattr(transformers, model)(config))
    made.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return made  # type: ignore[no-any-return]


def test_as_many_classes_as_the_width_hide_no_missing_matrix(tmp_path: Path) -> None:
    save_vit(tmp_path, 10)
    names = [n for n in load_file(tmp_path / "model.safetensors") if n.endswith(("query.weight", "dense.bias"))][:5]
    assert len(names) == 5
    edit_weights(tmp_path, dict.fromkeys(names))
    labels = [str(i) for i in range(32)]
    with pytest.raises(ValueError, match=r"lacks weights outside the head: vit\.layers\.0\..*vit\.layers\.1") as caught:
        load(str(tmp_path), labels)
    assert str(caught.value).count("vit.layers") == 5


@pytest.mark.parametrize("count", [3, 32])
def test_all_heads_of_a_distilled_network_are_new(count: int, tmp_path: Path) -> None:
    upstream: Any = save_vit(tmp_path, 32, "DeiT", "DeiTForImageClassificationWithTeacher")
    labels = tuple(f"new {i}" for i in range(count))
    found = load(str(tmp_path), labels)
    for model in (found.model, with_new_head(found, labels).model):
        assert find_heads(model).linear == ("cls_classifier", "distillation_classifier")  # type: ignore[arg-type]
        for name in ("cls_classifier", "distillation_classifier"):
            head, old = model.get_submodule(name), upstream.get_submodule(name)
            assert head.weight.shape == (count, 32)
            assert count != 32 or not torch.equal(head.weight, old.weight)
    assert compute_logits(with_new_head(found, LABELS).model, make_pixels((3, 32, 32), 2)).shape == (2, 3)
    assert not find_changed_weights(found.model, tmp_path, find_heads(found.model).parameters)  # type: ignore[arg-type]


BEIT = "BEiT, masked images"


def test_a_norm_behind_the_last_layer_may_start_as_the_identity(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LAYOUTS[BEIT].save(tmp_path, processor=PROCESSOR)
    with caplog.at_level(logging.INFO):
        found = load(str(tmp_path), LABELS)
    norm = found.model.get_submodule("beit.pooler.layernorm")
    assert torch.equal(norm.weight, torch.ones(32))
    assert torch.equal(norm.bias, torch.zeros(32))
    assert "lacks the weights of beit.pooler.layernorm: this norm starts with weight 1 and bias 0" in caplog.text
    assert "tensors that the classifier does not use: layernorm (2), lm_head (2)" in caplog.text


def test_a_norm_under_its_old_spelling_is_read(tmp_path: Path) -> None:
    LAYOUTS[BEIT].save(tmp_path, processor=PROCESSOR)
    weight, bias = torch.rand(32), torch.rand(32)
    edit_weights(tmp_path, {"beit.pooler.layernorm.gamma": weight, "beit.pooler.layernorm.beta": bias})
    norm = load(str(tmp_path), LABELS).model.get_submodule("beit.pooler.layernorm")
    assert torch.equal(norm.weight, weight)
    assert torch.equal(norm.bias, bias)


@pytest.mark.parametrize(
    ("kind", "model"),
    [("ViT", "ViTForImageClassification"), ("Beit", "BeitForImageClassification"), ("ViT", "ViTModel")],
)
def test_norms_of_layers_under_their_old_spelling_are_read(kind: str, model: str, tmp_path: Path) -> None:
    # transformers renames `encoder.layer.0` to `layers.0` while it loads, so the file's names are not the model's.
    expected = save_vit(tmp_path / "old", 3, kind, model).state_dict()
    spelling = {"weight": "gamma", "bias": "beta"}
    weights = load_file(tmp_path / "old" / "model.safetensors")
    norms = [name for name in weights if "norm" in name]
    respelled = {name.rpartition(".")[0] + "." + spelling[name.rpartition(".")[2]]: weights[name] for name in norms}
    assert len(respelled) == len(norms) > 4
    edit_weights(tmp_path / "old", {**dict.fromkeys(norms), **respelled})
    found = load(str(tmp_path / "old"), LABELS)
    own: Any = found.model
    prefix = "" if model.endswith("Classification") else f"{own.base_model_prefix}."
    body = {name: tensor for name, tensor in own.state_dict().items() if not name.startswith("classifier")}
    assert len(body) > len(norms)
    for name, tensor in body.items():
        assert torch.equal(tensor, expected[name.removeprefix(prefix)]), name
    own.save_pretrained(tmp_path / "saved")  # with the names that plain transformers reads
    assert not [
        name for name in load_file(tmp_path / "saved" / "model.safetensors") if name.endswith(("gamma", "beta"))
    ]


@pytest.mark.parametrize("key", ["teacher.beit.pooler.layernorm.weight", "module.pooler.layernorm.gamma"])
def test_a_norm_that_the_file_has_under_another_name_is_not_lost(key: str, tmp_path: Path) -> None:
    save_vit(tmp_path, 10, "Beit", "BeitForImageClassification")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_mean_pooling"]
    lost = {f"beit.pooler.layernorm.{n}": None for n in ("weight", "bias")}
    edit_weights(tmp_path, {**lost, key: torch.rand(32)})
    with pytest.raises(ValueError, match=r"lacks weights outside the head: beit\.pooler\.layernorm\.bias"):
        load(str(tmp_path), LABELS)


def test_a_norm_inside_a_layer_is_never_missing(tmp_path: Path) -> None:
    save_vit(tmp_path, 10)
    edit_weights(tmp_path, {"vit.encoder.layer.1.layernorm_after.weight": None})
    with pytest.raises(ValueError, match=r"outside the head: vit\.layers\.1\.layernorm_after\.weight"):
        load(str(tmp_path), LABELS)


def test_one_missing_matrix_of_a_tower_is_refused_by_name(tmp_path: Path) -> None:
    LAYOUTS["CLIP"].save(tmp_path, processor=PROCESSOR)
    edit_weights(tmp_path, {"vision_model.encoder.layers.1.mlp.fc1.weight": None})
    with pytest.raises(ValueError, match=r"lacks weights outside the head: vision_model\.encoder\.layers\.1\.mlp\.fc1"):
        load(str(tmp_path), LABELS)


def test_without_labels_there_is_no_head(tmp_path: Path) -> None:
    LAYOUTS["SAM tower"].save(tmp_path, processor=PROCESSOR)
    with pytest.raises(ValueError, match="has no trained head: give labels for a new head"):
        load(str(tmp_path))
