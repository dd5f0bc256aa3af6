"""Law 10: networks that compute different functions never share a cache entry, whatever their weights."""

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hf_transfer.choosing.rank import rank
from hf_transfer.config import AdapterConfig, ComputeConfig, DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.splits import Split
from hf_transfer.locations import cache_dir
from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.chain import build_chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.fingerprint import describe_modules
from hf_transfer.network.forward import compute_logits
from hf_transfer.prefix.contents import list_caches
from hf_transfer.prefix.extract import Extracted, StoredActivations, extract, extract_images
from hf_transfer.prefix.pixels import EvaluationImages, store_evaluation_pixels
from hf_transfer.prefix.resources import Resources
from hf_transfer.prefix.taps import tap_activation
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import default_config
from tests.families import FAMILIES, built, make_model, make_pixels, randomize
from tests.test_recipes import run_recipe
from tests.test_save import write_upstream


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))


def from_timm(architecture: str, **common: Any) -> Any:
    return lambda **setting: timm.create_model(architecture, **{"num_classes": 5, **common, **setting})


def from_transformers(family: str, **common: Any) -> Any:
    def build(**setting: Any) -> nn.Module:
        config = getattr(transformers, f"{family}Config")(**{"num_labels": 5, **common, **setting})
        model: nn.Module = getattr(transformers, f"{family}ForImageClassification")(config)
        return model

    return build


HF_VIT = {
    "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
TIMM_VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
TIMM_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
HF_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
TIMM_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}
SWINV2 = {"img_size": 64, "embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
HF_DINO = {k: v for k, v in HF_VIT.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
EPS = partial(nn.LayerNorm, eps=0.1)
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "timm ViT, activation": (from_timm("vit_tiny_patch16_224", **TIMM_VIT), {"act_layer": "relu"}),
    "timm ViT, heads": (from_timm("vit_tiny_patch16_224", **TIMM_VIT), {"num_heads": 3}),
    "timm ViT, epsilon": (from_timm("vit_tiny_patch16_224", **TIMM_VIT), {"norm_layer": EPS}),
    "timm ViT, pooling": (from_timm("vit_tiny_patch16_224", fc_norm=False, **TIMM_VIT), {"global_pool": "avg"}),
    "timm DINOv3, rotary layout": (from_timm("vit_small_patch16_dinov3", **TIMM_VIT), {"rope_rotate_half": False}),
    "timm RegNet, last activation": (from_timm("regnety_002"), {"linear_out": True}),
    "BiT, groups of the norm": (from_transformers("Bit", embedding_size=8, num_groups=2, **HF_STAGES), {"num_groups": 4}),
    "timm ResNet, activation": (from_timm("resnet18", **TIMM_RESNET), {"act_layer": "silu"}),
    "timm ResNet, pooling": (from_timm("resnet18", **TIMM_RESNET), {"global_pool": "max"}),
    "timm ConvNeXt, activation": (from_timm("convnext_atto", **TIMM_STAGES), {"act_layer": "relu"}),
    "timm ConvNeXt, epsilon": (from_timm("convnext_atto", **TIMM_STAGES), {"norm_eps": 0.1}),
    "timm EfficientNet, padding": (from_timm("test_efficientnet"), {"pad_type": "same"}),
    "timm SwinV2, window": (from_timm("swinv2_tiny_window8_256", window_size=4, **SWINV2), {"window_size": 8}),
    "ViT, activation": (from_transformers("ViT", **HF_VIT), {"hidden_act": "relu"}),
    "ViT, epsilon": (from_transformers("ViT", **HF_VIT), {"layer_norm_eps": 0.1}),
    "ViT, heads": (from_transformers("ViT", **HF_VIT), {"num_attention_heads": 3}),
    "Swin, activation": (
        from_transformers("Swin", image_size=64, window_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2]),
        {"hidden_act": "relu"},
    ),
    "ConvNeXt, epsilon": (from_transformers("ConvNext", **HF_STAGES), {"layer_norm_eps": 0.1}),
    "ConvNeXt, activation": (from_transformers("ConvNext", **HF_STAGES), {"hidden_act": "relu"}),
    "DINOv2, activation": (from_transformers("Dinov2", **HF_DINO), {"hidden_act": "relu"}),
    "DINOv2, epsilon": (from_transformers("Dinov2", **HF_DINO), {"layer_norm_eps": 0.1}),
    "SigLIP, activation": (
        lambda **setting: from_transformers("Siglip", vision_config=HF_VIT | setting)(), {"hidden_act": "relu"}
    ),
    "BEiT, epsilon": (from_transformers("Beit", **HF_VIT), {"layer_norm_eps": 0.1}),
    "ResNet, activation": (
        from_transformers("ResNet", embedding_size=8, layer_type="basic", **HF_STAGES), {"hidden_act": "silu"}
    ),
}  # fmt: skip
IMAGE_PX = {"timm SwinV2": 64, "timm ResNet": 64, "Swin": 64, "ViT": 16, "DINOv2": 16, "SigLIP": 16, "BEiT": 16}


def make_pair(name: str) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """Two networks with equal tensors that differ in one setting, and the image that they take."""
    build, setting = SETTINGS[name]
    torch.manual_seed(0)
    one, other = randomize(build()).eval(), build(**setting).eval()
    other.load_state_dict(one.state_dict())
    px = IMAGE_PX.get(name.partition(",")[0], 32)
    return one, other, (3, px, px)


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_weights_and_another_setting_are_another_key(name: str) -> None:
    one, other, shape = make_pair(name)
    pixels = make_pixels(shape, 2)
    with torch.no_grad():
        assert not torch.equal(compute_logits(one, pixels), compute_logits(other, pixels))
    chains = [build_chain(model, shape) for model in (one, other)]
    cuts = [chain.features for chain in chains]
    assert all(cuts)
    keys = [chain.fingerprint([cut])["features"] for chain, cut in zip(chains, cuts, strict=True) if cut]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fingerprint_depends_on_nothing_but_the_network(name: str) -> None:
    """Built twice, before and after forwards (which fill caches) in both modes: the same description."""
    before = describe_modules(built(name)[0])
    again = make_model(name)
    assert describe_modules(again) == before
    pixels = make_pixels(FAMILIES[name].image_shape, 2)
    compute_logits(again.train(), pixels)
    with torch.no_grad():
        compute_logits(again.eval(), pixels)
    assert describe_modules(again) == before


def test_an_early_cut_does_not_depend_on_what_follows() -> None:
    _, chain = built("timm ViT")
    first, last = chain.layers[1].cut, chain.features
    assert first is not None
    assert last is not None
    before = chain.fingerprint([first, last])
    replica = chain.replicate()
    replica.model.get_submodule("blocks.1.mlp").act = nn.ReLU()
    after = replica.fingerprint([first, last])
    assert after[first.name] == before[first.name]
    assert after["features"] != before["features"]


PRINT_KEYS = """
import json, sys
from tests.families import built
print(json.dumps({name: built(name)[1].fingerprint(built(name)[1].cuts) for name in sys.argv[1:]}))
"""


def test_keys_are_equal_in_another_process() -> None:
    names = ["timm ViT", "timm MobileNetV3", "ViT", "Swin", "SigLIP"]
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRINT_KEYS, *names], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    expected = {name: built(name)[1].fingerprint(built(name)[1].cuts) for name in names}
    assert json.loads(shown.stdout.splitlines()[-1]) == expected


# --- through the stores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(root / label / f"{i:02d}.png")
    return load_data(DataConfig(dataset=str(root))).train


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    upstream = tmp_path_factory.mktemp("upstream")
    write_upstream("timm ViT", upstream)
    return load(str(upstream), ("a", "b"))


def resources(**compute: Any) -> Resources:
    return Resources(accelerator=Accelerator(), compute=ComputeConfig(**compute))


def run(backbone: Backbone, split: Split, **compute: Any) -> Extracted:
    chain = backbone.chain()
    assert chain.features is not None
    taps = {"it": tap_activation(chain.features)}
    return extract(chain, backbone.preprocessing, split, taps, resources(**compute))


@pytest.mark.parametrize("name", ["timm ViT, heads", "ViT, activation", "timm ResNet, pooling", "ConvNeXt, epsilon"])
def test_equal_weights_and_another_setting_are_another_store(name: str, backbone: Backbone, train: Split) -> None:
    one, other, shape = make_pair(name)
    preprocessing = replace(
        backbone.preprocessing, height_px=shape[1], width_px=shape[2],
        resize=lambda image: np.asarray(image.resize((shape[2], shape[1]))),
    )  # fmt: skip
    first = run(replace(backbone, model=one, preprocessing=preprocessing), train)
    second = run(replace(backbone, model=other, preprocessing=preprocessing), train)
    assert [first.images, second.images] == [len(train), len(train)]
    assert not np.allclose(first.stores["it"][:], second.stores["it"][:], atol=1e-5)


def tamper(row: int) -> None:
    """Changes a row of the one store, in place."""
    (entry,) = list_caches()
    files = (cache_dir() / "activations" / entry.key).glob("*.npy")
    file = max(files, key=lambda path: path.stat().st_size)  # the other one has the keys of the rows
    rows = np.load(file, mmap_mode="r+")
    rows[row] += 1
    rows.flush()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hit_is_checked_by_two_rows_that_count_apart(
    backbone: Backbone, train: Split, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(backbone, train, precision=precision)
    assert (first.images, first.checked_rows) == (len(train), 0)
    expected = first.stores["it"][:]
    hit = run(backbone, train, precision=precision)
    assert (hit.images, hit.checked_rows) == (0, 2)
    for row in (0, len(train) - 1):
        tamper(row)
        with caplog.at_level(logging.WARNING):
            mended = run(backbone, train, precision=precision)
        assert "discarding and rebuilding it" in caplog.text
        assert (mended.images, mended.checked_rows) == (len(train), 2)
        np.testing.assert_array_equal(mended.stores["it"][:], expected)
        caplog.clear()


def test_activations_computed_from_stored_ones_are_checked_from_there(
    backbone: Backbone, train: Split, caplog: pytest.LogCaptureFixture
) -> None:
    chain = backbone.chain()
    cut, images = chain.layers[1].cut, EvaluationImages(split=train, preprocessing=backbone.preprocessing)
    assert cut is not None
    assert chain.features is not None
    store = extract_images(chain, images, {"it": tap_activation(cut)}, resources()).stores["it"]
    stored = StoredActivations(images=images, store=store, cut=cut, through=(cut.name,))
    seen: list[int] = []
    chain.model.get_submodule("patch_embed.proj").register_forward_hook(lambda *_: seen.append(1))

    def again(cut: Cut) -> tuple[int, int]:
        extracted = extract_images(chain, stored, {"it": tap_activation(cut)}, resources())
        return extracted.images, extracted.checked_rows

    assert [again(chain.features), again(chain.features)] == [(len(train), 0), (0, 2)]
    assert seen == []


def test_stored_pixels_are_checked_exactly(backbone: Backbone, train: Split, caplog: pytest.LogCaptureFixture) -> None:
    expected = store_evaluation_pixels(train, backbone.preprocessing, resources()).read(np.arange(len(train)))
    tamper(0)
    with caplog.at_level(logging.WARNING):
        mended = store_evaluation_pixels(train, backbone.preprocessing, resources()).read(np.arange(len(train)))
    assert "discarding and rebuilding it" in caplog.text
    np.testing.assert_array_equal(mended, expected)


def test_adapters_at_their_start_share_the_plain_networks_store(backbone: Backbone, train: Split) -> None:
    assert run(backbone, train).images == len(train)
    same = replace(backbone, model=copy.deepcopy(backbone.model))
    adapted, chain = add_adapters(same, same.chain(), AdapterConfig(rank=2))
    assert chain.features is not None
    taps = {"it": tap_activation(chain.features)}
    assert extract(chain, same.preprocessing, train, taps, resources()).images == 0
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name in adapted.trained:
                parameter += 0.1
    assert extract(chain, same.preprocessing, train, taps, resources()).images == len(train)


# --- through a recipe and through rank --------------------------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """The embedded checkpoint, and one with the same weights and another activation function in its config."""
    source = load("embedded").source.folder
    folders = tmp_path / "one", tmp_path / "other"
    for folder, act in zip(folders, ("relu", "silu"), strict=True):
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["act_layer"] = act
        (folder / "config.json").write_text(json.dumps(config))
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return folders


@pytest.mark.soak  # the same through `rank` is below
def test_a_recipe_computes_each_checkpoints_own_features(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    def log_loss(folder: Path, cache: str) -> float:
        run = tmp_path / f"{cache} {folder.name}"
        arguments = ["--checkpoint", str(folder), "--output_dir", str(run), "--images_per_class", "8"]
        few = ["--readouts", "none", "--cv_folds", "1"]
        run_recipe("linear_probe", *arguments, *few, env={"HF_TRANSFER_CACHE": str(tmp_path / cache)})
        return float(json.loads((run / "results.json").read_text())["metrics"]["validation"]["nll"])

    one, other = two_folders
    first = log_loss(one, "shared")
    assert log_loss(other, "shared") == log_loss(other, "fresh") != first


def test_rank_computes_each_checkpoints_own_features(two_folders: tuple[Path, Path]) -> None:
    config = replace_settings(default_config("auto"), {"images_per_class": 8, "tracker": "none"})
    ranking = rank([str(folder) for folder in two_folders], config, accelerator=Accelerator(cpu=True))
    assert ranking.failures == {}
    assert all(row.images_computed > 0 for row in ranking.rows)
    one, other = ranking.rows
    assert (one.probe, one.knn, one.probe_interval) != (other.probe, other.knn, other.probe_interval)
