"""timm checkpoints as people publish them: with arguments that config.json lacks, without classifier, in shards, as pickles."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import timm.models
import timm.models._builder as builder
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_transfer.cli import main
from hf_transfer.config import ModelConfig
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import find_libraries, verify
from hf_transfer.network.backbone import Backbone, create, load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.peft_checkpoints import load_checkpoint
from hf_transfer.network.weights import find_changed_weights
from tests.families import make_pixels, randomize
from tests.test_backbone import OWN, edit_config, edit_weights, publish_transformers
from tests.test_publish import make_run
from tests.test_save import results_for

LABELS = ("ant", "bee", "Wespe")
PX = 28
VIT = {"img_size": PX, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
FORGOTTEN = {
    "init_values": 1e-5,
    "reg_tokens": 2,
    "mlp_layer": "SwiGLUPacked",
    "act_layer": "SiLU",
    "mlp_ratio": 5.3375,
}


def publish(folder: Path, architecture: str = "vit_tiny_patch16_224", px: int = PX, **arguments: Any) -> nn.Module:
    """Writes a random checkpoint; config.json has the arguments that JSON has."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(architecture, **{"num_classes": 0, **arguments})).eval()
    model._model_args = {k: v for k, v in arguments.items() if not callable(v)}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, data_config={"input_size": (3, px, px)})
    return model


def publish_pathology(folder: Path) -> nn.Module:
    """As UNI, Virchow and H-optimus: arguments only in the card's code, an empty pooling, two values of num_classes."""
    layers = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    model = publish(folder, **{**VIT, **FORGOTTEN, **layers})

    def forget(config: dict[str, Any]) -> None:
        config["model_args"] = {**VIT, "global_pool": ""}
        config["num_classes"] = 0
        config["pretrained_cfg"]["num_classes"] = 1000

    edit_config(folder, forget)
    return model


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        pooled: torch.Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return pooled


def assert_published(backbone: Backbone, folder: Path) -> None:
    """Plain timm and transformers compute the logits of `backbone` from what is saved."""
    save_model(backbone, results_for(backbone), folder)
    pixels = make_pixels(backbone.preprocessing.image_shape, 2)
    expected = compute_logits(backbone.model, pixels)
    own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(own(pixels), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(wrapped(pixels).logits, expected, rtol=1e-5, atol=1e-6)
    assert not list(folder.glob("*.bin"))


# --- arguments that config.json lacks ---------------------------------------------------------------------------------


def test_arguments_of_the_card_give_upstreams_features_and_are_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = publish_pathology(tmp_path / "upstream")
    with caplog.at_level(logging.INFO):
        backbone = load(str(tmp_path / "upstream"), LABELS, model_args=json.dumps(FORGOTTEN))
    pixels = make_pixels((3, PX, PX), 2)
    assert torch.equal(features(backbone.model, pixels), features(upstream, pixels))
    assert builder.load_pretrained.__module__ == builder.__name__  # timm's own function is in its place again
    assert not backbone.is_auto_class  # plain timm creates another network from upstream's files
    assert "names no pooling: the default of vit_giant_patch14_dinov2, 'token', is used and saved" in caplog.text
    assert "layers GluMlp, LayerNorm, SiLU" in caplog.text
    assert_published(backbone, tmp_path / "saved")


@pytest.mark.parametrize("forgotten", ["init_values", "reg_tokens", "mlp_layer"])
def test_a_forgotten_argument_is_an_error_with_names(forgotten: str, tmp_path: Path) -> None:
    """Without init_values, all tensors of the network are in the file, which has more."""
    publish_pathology(tmp_path)
    arguments = {name: value for name, value in FORGOTTEN.items() if name != forgotten}
    tensor = {"init_values": "ls1.gamma", "reg_tokens": "reg_token", "mlp_layer": "other shapes .*mlp.fc"}[forgotten]
    with pytest.raises(ValueError, match=f"{tensor}.*--model_args"):
        load(str(tmp_path), LABELS, model_args=json.dumps(arguments))


def test_the_log_names_the_activation_that_leaves_no_tensor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path, **VIT)
    for given, shown in ((None, "GELU, LayerNorm, Mlp"), ('{"act_layer": "silu"}', "LayerNorm, Mlp, SiLU")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            backbone = load(str(tmp_path), LABELS, model_args=given)
        assert f"layers {shown}" in caplog.text
    assert_published(backbone, tmp_path / "saved")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"mlp_layer": "NoSuchLayer"}', "cannot create vit_tiny_patch16_224 with .*NoSuchLayer"),
        ('{"no_such_argument": 1}', "cannot create vit_tiny_patch16_224 with .*no_such_argument"),
        ('{"block_fn": "Sequential"}', "cannot create vit_tiny_patch16_224 with .*Sequential"),
        ('{"mlp_layer": "GluMlp"}', "plain timm creates no vit_tiny_patch16_224 with .* so the trained model could not"),
        ('{"checkpoint_path": "x.pth"}', "omit checkpoint_path; weights come from --checkpoint alone"),
    ],
)  # fmt: skip
def test_wrong_arguments_end_in_one_line(given: str, message: str, tmp_path: Path) -> None:
    publish(tmp_path, **VIT)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(tmp_path), LABELS, model_args=given)
    assert "\n" not in str(caught.value)


# --- heads and poolings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "test_vit2"])
def test_an_empty_pooling_becomes_the_default_behind_the_files_norm(architecture: str, tmp_path: Path) -> None:
    """The default pooling of these networks has a norm behind it, and an empty one a norm before it, which is in the file."""
    upstream: Any = publish(tmp_path / "upstream", architecture, px=32, **POOLED, global_pool="")
    backbone = load(str(tmp_path / "upstream"), LABELS)
    pixels = make_pixels((3, 32, 32), 2)
    with torch.no_grad():
        tokens = upstream.forward_features(pixels)
    expected = tokens[:, upstream.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(features(backbone.model, pixels), expected)
    assert_published(backbone, tmp_path / "saved")


def test_a_missing_attention_pool_has_a_remedy(tmp_path: Path) -> None:
    publish(tmp_path / "upstream", "vit_base_patch16_siglip_224", px=32, **POOLED, global_pool="")
    remedy = '{"global_pool": "avg"}'
    with pytest.raises(ValueError, match=re.escape(f"--model_args '{remedy}'")):
        load(str(tmp_path / "upstream"), LABELS)
    assert_published(load(str(tmp_path / "upstream"), LABELS, model_args=remedy), tmp_path / "saved")


def test_a_projection_is_no_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream = publish(tmp_path, "vit_base_patch32_clip_224", **{**VIT, "num_classes": 16})
    with pytest.raises(ValueError, match="has no trained head: give labels"):
        load(str(tmp_path))
    with caplog.at_level(logging.INFO):
        backbone = load(str(tmp_path), LABELS)
    assert "its 16 outputs are a projection and no classes" in caplog.text
    pixels = make_pixels((3, PX, PX), 2)
    assert torch.equal(features(backbone.model, pixels), features(upstream, pixels))
    assert backbone.new_head


def test_a_file_without_the_heads_weights_gets_a_new_head(tmp_path: Path) -> None:
    publish(tmp_path, **VIT)
    edit_config(tmp_path, lambda config: config.update(num_classes=1000))
    with pytest.raises(ValueError, match="has no trained head: give labels"):
        load(str(tmp_path))
    assert load(str(tmp_path), LABELS).new_head


POOLED = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"out_features": 8, "img_size": 84},
    "qwen3_vit_88m": {"img_size": 64},
    "gemma4_vit_167m": {"img_size": 96, "intermediate_size": 32, "head_dim": 12, "position_embedding_size": 64},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gets_timms_classifier_over_it(name: str, tmp_path: Path) -> None:
    """timm's image encoders of multimodal models have no reset_classifier."""
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, **ENCODERS[name]}
    upstream: Any = publish(tmp_path / "upstream", f"{name}_enc", px=arguments["img_size"], **arguments)
    backbone = load(str(tmp_path / "upstream"), LABELS)
    model: Any = backbone.model
    pixels = make_pixels(backbone.preprocessing.image_shape, 1)
    with torch.no_grad():
        assert torch.equal(model.encoder.forward_features(pixels), upstream.forward_features(pixels))
    assert_published(backbone, tmp_path / "saved")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_last_norm_may_start_as_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream: Any = publish(tmp_path, **VIT)
    edit_weights(tmp_path, lambda weights: [weights.pop(f"norm.{n}") for n in ("weight", "bias")])
    with caplog.at_level(logging.INFO):
        backbone = load(str(tmp_path), LABELS)
    assert "lacks the weights of norm: this norm starts with weight 1 and bias 0" in caplog.text
    nn.init.ones_(upstream.norm.weight)
    nn.init.zeros_(upstream.norm.bias)
    pixels = make_pixels((3, PX, PX), 2)
    assert torch.equal(features(backbone.model, pixels), features(upstream, pixels))


def rename(prefix: str, to: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if n.startswith(prefix)]:
            weights[name.replace(prefix, to, 1)] = weights.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (rename("norm.", "encoder.norm."), "norm.bias, norm.weight"),
        (rename("norm.", "fc_norm."), "fc_norm.bias, fc_norm.weight"),
        (rename("blocks.1.norm2.", "old.norm2."), "blocks.1.norm2.bias, blocks.1.norm2.weight"),
        (rename("blocks.1.", "layers.1."), "blocks.1.attn.proj.bias, .* and 7 more"),
    ],
    ids=["the norm's other name", "another norm", "a layer's norm", "a layer"],
)
def test_other_missing_weights_are_an_error(change: Any, names: str, tmp_path: Path) -> None:
    publish(tmp_path, **VIT)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=f"{names}.*--model_args"):
        load(str(tmp_path), LABELS)


def test_what_stays_behind_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path, **VIT)
    extra = {"decoder.0.weight": 2, "decoder.1.weight": 2, "text.proj": 3, "logit_scale": 1, "head.weight": 4}
    edit_weights(tmp_path, lambda weights: weights.update({n: torch.ones(k) for n, k in extra.items()}))
    with caplog.at_level(logging.INFO):
        load(str(tmp_path), LABELS)
    assert "does not use: decoder (2), head (1), logit_scale (1), text (1)" in caplog.text


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "eva02_tiny_patch14_224": {**VIT, "patch_size": 14},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "test_resnet": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 2, "embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_outside_the_head_is_upstreams(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ARCHITECTURES[architecture]
    publish(tmp_path, architecture, px=arguments.get("img_size", 32), **arguments)
    expected: dict[str, torch.Tensor] = {}

    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights.update({n: t.half() if t.is_floating_point() else t for n, t in weights.items()})
        expected.update({n: t.float() if t.is_floating_point() else t for n, t in weights.items()})

    edit_weights(tmp_path, halve)
    with caplog.at_level(logging.INFO):
        model: Any = load(str(tmp_path), LABELS).model
    head = {id(p) for p in model.get_classifier().parameters()}
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) not in head}
    assert own.keys() == expected.keys()
    assert all(torch.equal(t.detach(), expected[n]) for n, t in own.items())
    assert "timm computed these tensors" not in caplog.text


def test_tensors_that_timm_computes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path, **VIT)
    edit_config(tmp_path, lambda config: config["model_args"].update(img_size=2 * PX))
    edit_config(tmp_path, lambda config: config["pretrained_cfg"].update(input_size=[3, 2 * PX, 2 * PX]))
    with caplog.at_level(logging.INFO):
        load(str(tmp_path), LABELS)
    assert "timm computed these tensors from the file's (merged, summed or at another size): pos_embed\n" in caplog.text


# --- files ------------------------------------------------------------------------------------------------------------


def store(folder: Path, kind: str) -> None:
    """Replaces model.safetensors by the same tensors in shards, in a pickle, or in shards of pickles."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    suffix, save = (".bin", torch.save) if "bin" in kind else (".safetensors", save_file)
    stem = "pytorch_model" if "bin" in kind else "model"
    if "shards" not in kind:
        save(weights, folder / f"{stem}{suffix}")
        return
    names = list(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save({n: weights[n] for n in part}, folder / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["shards", "bin", "shards of bin"])
def test_shards_and_pickles_load_and_are_published_as_safetensors(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = publish(tmp_path / "upstream", **VIT)
    store(tmp_path / "upstream", kind)
    with caplog.at_level(logging.INFO):
        backbone = load(str(tmp_path / "upstream"), LABELS)
    pixels = make_pixels((3, PX, PX), 2)
    assert torch.equal(features(backbone.model, pixels), features(upstream, pixels))
    assert ("from the pickle pytorch_model" in caplog.text) == ("bin" in kind)
    assert backbone.is_auto_class == (kind == "bin")  # timm reads no shards
    assert_published(backbone, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["bin", "shards of bin"])
def test_pickles_of_transformers_load(kind: str, tmp_path: Path) -> None:
    expected = publish_transformers(tmp_path).state_dict()
    store(tmp_path, kind)
    backbone = load(str(tmp_path), OWN)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.model.state_dict().items())
    assert not find_changed_weights(
        load(str(tmp_path), LABELS).model, tmp_path, {"classifier.weight", "classifier.bias"}
    )


class Hostile:
    """A pickle of this object, read by `pickle.load`, creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("is_timm", [True, False])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_hostile_pickle_executes_nothing(is_zip: bool, is_timm: bool, tmp_path: Path) -> None:
    publish(tmp_path / "upstream", **VIT) if is_timm else publish_transformers(tmp_path / "upstream")
    (tmp_path / "upstream" / "model.safetensors").unlink()
    file, touched = tmp_path / "upstream" / "pytorch_model.bin", tmp_path / "touched"
    torch.save({"norm.weight": Hostile(touched)}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="more than tensors, which is refused because a pickle can run code") as caught:
        load(str(tmp_path / "upstream"), LABELS)
    assert "\n" not in str(caught.value)
    assert not touched.exists()
    torch.load(file, weights_only=False)
    assert touched.exists()


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    publish(tmp_path, **VIT)
    edit_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(ValueError, match=r"has quantized weights.*choose the checkpoint that was quantized"):
        load(str(tmp_path), LABELS)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("CLIP-ViT-B-32-laion2B-s34B-b79K", "choose --checkpoint timm/vit_base_patch32_clip_224.laion2b"),
        ("unknown", "search the organization timm"),
    ],
)
def test_an_open_clip_folder_names_its_twin_in_timm(name: str, remedy: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=f"is an open_clip checkpoint, .*: {remedy}"):
        load(str(folder), LABELS)


# --- PEFT repositories ------------------------------------------------------------------------------------------------


def publish_adapter(base: Path, folder: Path, **settings: Any) -> nn.Module:
    """Writes a random LoRA adapter, with a head of four classes, as peft saves it; returns the merged network."""
    torch.manual_seed(1)
    model: Any = timm.create_model(f"local-dir:{base}", pretrained=True, num_classes=4)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False, **settings)
    network: Any = peft.get_peft_model(model, config)
    network.peft_config["default"].base_model_name_or_path = str(base)
    network.save_pretrained(folder)
    merged: nn.Module = network.merge_and_unload().eval()
    return merged


def test_a_peft_repository_is_merged_into_its_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upstream = publish(tmp_path / "upstream", **VIT)
    merged = publish_adapter(tmp_path / "upstream", tmp_path / "adapter")
    config = ModelConfig(checkpoint=str(tmp_path / "adapter"))
    with caplog.at_level(logging.INFO):
        backbone = load_checkpoint(config, LABELS)
    assert "merged into 2 modules of its base" in caplog.text
    assert caplog.text.endswith(": blocks.0.attn.qkv, blocks.1.attn.qkv\n")
    pixels = make_pixels((3, PX, PX), 2)
    assert torch.equal(features(backbone.model, pixels), features(merged, pixels))
    assert not torch.allclose(features(backbone.model, pixels), features(upstream, pixels))
    assert backbone.new_head
    assert all(p.requires_grad for p in backbone.model.parameters())
    assert_published(backbone, tmp_path / "saved")
    with pytest.raises(ValueError, match="names no labels: give labels"):
        load_checkpoint(config)


@pytest.mark.parametrize(
    "given",
    [{"base_model": "a/b"}, {"preprocessing_from": "a/b"}, {"pooling": "class"}, {"model_args": "{}"}],
    ids=lambda given: next(iter(given)),
)
def test_settings_that_an_adapter_records_are_refused(given: dict[str, str], tmp_path: Path) -> None:
    publish(tmp_path / "upstream", **VIT)
    publish_adapter(tmp_path / "upstream", tmp_path / "adapter")
    config = ModelConfig(checkpoint=str(tmp_path / "adapter"), **given)  # type: ignore[arg-type]
    (tmp_path / "adapter" / "task.json").write_text("{}")  # as this package saves it
    with pytest.raises(
        ValueError, match=rf"^--{next(iter(given))}: .* is an adapter.*; omit --{next(iter(given))}, or"
    ):
        load_checkpoint(config, LABELS)
    (tmp_path / "adapter" / "task.json").unlink()  # as peft saves it: it records only its base
    if "base_model" in given:
        with pytest.raises(ValueError, match="omit --base_model, or give the base"):
            load_checkpoint(config, LABELS)
    elif "model_args" in given:
        assert load_checkpoint(config, LABELS).label_names == LABELS


def test_an_adapter_of_another_network_ends_in_one_line(tmp_path: Path) -> None:
    publish(tmp_path / "upstream", **VIT)
    publish(tmp_path / "other", **VIT | {"embed_dim": 32})
    publish_adapter(tmp_path / "upstream", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("/upstream", "/other"))
    with pytest.raises(ValueError, match="does not fit its base") as caught:
        load_checkpoint(ModelConfig(checkpoint=str(tmp_path / "adapter")), LABELS)
    assert "\n" not in str(caught.value)


def test_inspect_shows_the_arguments_of_a_feature_extractor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_pathology(tmp_path)
    main(["inspect", str(tmp_path), "--model_args", json.dumps(FORGOTTEN)])
    shown = capsys.readouterr().out
    assert '"reg_tokens": 2' in shown
    assert "layers GluMlp, LayerNorm, SiLU" in shown


@pytest.mark.soak
def test_a_fresh_process_loads_what_arguments_of_the_card_made(tmp_path: Path) -> None:
    publish_pathology(tmp_path / "upstream")
    run = make_run(load(str(tmp_path / "upstream"), LABELS, model_args=json.dumps(FORGOTTEN)), tmp_path / "run")
    model = run / "model"
    assert np.isfinite([v.logits for v in verify(model, run / "reference.safetensors", find_libraries(model))]).all()


@pytest.mark.parametrize(
    "names",
    [
        {"num_classes": 1000},
        {"num_classes": 21843},
        {"num_classes": 3, "label_names": ["ant", "bee", "Wespe"]},
        {"num_classes": 3, "label_names": ["ant", "ant", "bee"]},
        {"num_classes": 3, "label_names": ["ant", "bee"]},
        {"num_classes": 2, "id2label": {"0": "ant", "1": "bee"}},
        {"num_classes": 2, "id2label": {"0": "ant", "1": "bee"}, "label_names": ["fly", "gnat"]},
        {"num_classes": 5},
    ],
    ids=lambda names: "-".join(map(str, names.values()))[:40],
)
def test_labels_are_those_of_transformers(names: dict[str, Any], tmp_path: Path) -> None:
    publish(tmp_path, num_classes=names["num_classes"], **VIT)
    edit_config(tmp_path, lambda config: config.update(names))
    expected = AutoConfig.from_pretrained(tmp_path).id2label
    assert load(str(tmp_path)).label_names == tuple(expected.get(i, f"LABEL_{i}") for i in range(names["num_classes"]))


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """CoaT's blocks share their position encodings, and safetensors refuses tensors that share memory."""
    sizes = {"embed_dims": [16, 16, 16, 16], "serial_depths": [2, 1, 1, 1]}
    backbone = create("coat_lite_tiny", LABELS, image_size_px=32, model_args=json.dumps(sizes))
    state = backbone.model.state_dict()
    assert state["serial_blocks1.0.cpe.proj.weight"].data_ptr() == state["serial_blocks1.1.cpe.proj.weight"].data_ptr()
    assert_published(backbone, tmp_path / "model")


def test_a_network_that_timm_creates_otherwise_for_its_own_weights_is_published_with_the_difference(
    tmp_path: Path,
) -> None:
    """timm gives fbnetc another epsilon only if pretrained=True, which transformers does not pass."""
    publish(tmp_path / "upstream", "fbnetc_100", px=32, num_classes=3)
    backbone = load(str(tmp_path / "upstream"), LABELS)
    assert {m.eps for m in backbone.model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert_published(backbone, tmp_path / "saved")


def test_no_other_architecture_depends_on_pretrained() -> None:
    sources = Path(timm.models.__file__).parent.glob("*.py")
    conditions = [f.stem for f in sources for _ in re.finditer(r"^ +if pretrained:$", f.read_text(), re.MULTILINE)]
    assert sorted(conditions) == ["_builder", "_registry", "efficientnet"]
