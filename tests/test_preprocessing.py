"""Pixels are those of the checkpoint's own processor, whatever the order of its steps, before and after it is saved."""

import json
import os
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.auto import modeling_auto
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)

from hf_transfer.cli import main
from hf_transfer.config import AugmentationConfig, ComputeConfig
from hf_transfer.data.dataset import Data
from hf_transfer.data.images import read_image, read_reduced
from hf_transfer.hub.fresh_process import compute
from hf_transfer.hub.verify import REFERENCE, find_libraries, verify
from hf_transfer.inference.predict import load_saved, predict
from hf_transfer.network.backbone import load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.preprocessing import PARITY, Preprocessing, load_preprocessing, quiet_transformers
from hf_transfer.prefix.pixels import EvaluationImages, TrainingSquares, store_evaluation_pixels, store_training_squares
from hf_transfer.prefix.resources import Resources
from hf_transfer.runs import train_session
from hf_transfer.training.phases import describe_identity
from tests.processors import EXCEPTIONS, PROCESSORS, REFUSED
from tests.sessions import make_session

MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16")
SIZES = ((50, 40), (300, 100), (37, 91), (64, 64), (20, 24), (90, 360), (224, 224), (151, 80), (33, 32), (48, 200))
TIMM_CONFIGS: tuple[dict[str, Any], ...] = (
    {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.9},
    {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
    {"input_size": (3, 32, 24), "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "squash"},
    {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "border"},
    {"input_size": (1, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.4,), "std": (0.3,)},
)  # fmt: skip

RED_BLUE = (200, 30, 90)

STRETCHING = '''
import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class StretchingImageProcessor(BaseImageProcessor):
    """Stretches the contrast of each image, which no constant color steps describe."""

    def preprocess(self, images, return_tensors=None, **kwargs):
        images = images if isinstance(images, list) else [images]
        arrays = [np.asarray(image.resize((16, 16)), np.float32) for image in images]
        stretched = [(a - a.min()) / max(a.max() - a.min(), 1) for a in arrays]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack(stretched)).permute(0, 3, 1, 2)})
'''


@cache
def photos(count: int) -> tuple[Image.Image, ...]:
    """Images of several sizes, aspects and modes, as `read_image` gives them: smooth colors with noise."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        smooth = np.stack([255 * x, 255 * y, 255 * (1 - x)], -1) + rng.normal(0, 20, (height, width, 3))
        rgb = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
        mode = MODES[i % len(MODES)]
        if mode == "I;16":
            image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
        elif mode in ("RGBA", "LA"):
            image = rgb.convert(mode)
            image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        else:
            image = rgb.convert(mode)
        images.append(read_image(image, mode))
    return tuple(images)


def write_settings(
    folder: Path, name: str = "ViTImageProcessor", config: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """Writes a processor's settings and a config.json without weights, which is what `load_preprocessing` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"image_processor_type": name, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **(config or {})}))
    return folder


def write_vit(folder: Path, *, channels: int = 3, processor: str = "ViTImageProcessor", **settings: Any) -> Path:
    """Writes a tiny ViT for images of 16 pixels, with a processor of the given class."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_channels=channels, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    values = {"image_processor_type": processor, "size": {"height": 16, "width": 16}, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def write_timm(folder: Path, *, channels: int = 3, **data_config: Any) -> Path:
    """Writes a tiny ResNet of timm for images of 16 pixels."""
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet18", num_classes=3, in_chans=channels, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8
    )
    size = {"input_size": (channels, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0}
    timm.models.save_for_hf(
        model, str(folder), safe_serialization=True, data_config=size | data_config, model_args={"in_chans": channels,
        "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8},
    )  # fmt: skip
    return folder


def normalize(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    return preprocessing.normalize(torch.from_numpy(preprocessing.pixels(image).copy())[None])[0]


# --- the law of processors ------------------------------------------------------------------------------------------------


def check_law(preprocessing: Preprocessing, saved: Any, count: int) -> None:
    """Our pixels equal the saved processor's, and augmented images get the same colors as images in evaluation."""
    images = photos(count)
    mode = "L" if preprocessing.channels == 1 else "RGB"
    theirs = saved(images=[image.convert(mode) for image in images], return_tensors="pt")["pixel_values"]
    for image, expected in zip(images, theirs, strict=True):
        own = normalize(preprocessing, image)
        assert own.shape == preprocessing.image_shape
        assert float((own - expected).abs().max()) <= PARITY
    height, width = preprocessing.height_px, preprocessing.width_px
    red = normalize(preprocessing, Image.new("RGB", (64, 64), RED_BLUE))[:, height // 2, width // 2]
    augmented = preprocessing.normalize_augmented(torch.tensor(RED_BLUE).float().view(1, 3, 1, 1))[0, :, 0, 0]
    # Pillow rounds luminance to whole numbers, and a gray value is 1/255/std in normalized units.
    torch.testing.assert_close(red, augmented, rtol=0, atol=1e-4 if preprocessing.channels == 3 else 0.01)


def check_class(name: str, settings: dict[str, Any], folder: Path, count: int) -> None:
    preprocessing = load_preprocessing(write_settings(folder, name, **settings))
    assert type(preprocessing.processor).__name__ == name
    preprocessing.processor.save_pretrained(folder / "saved")
    with quiet_transformers():
        saved = AutoImageProcessor.from_pretrained(folder / "saved")
    check_law(preprocessing, saved, count)


NAMED = [f"{i}-{name}" for i, (name, _) in enumerate(PROCESSORS)]


@pytest.mark.parametrize(("name", "settings"), PROCESSORS, ids=NAMED)
def test_pixels_are_those_of_the_saved_processor(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    check_class(name, settings, tmp_path, count=4)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "settings"), PROCESSORS, ids=NAMED)
def test_pixels_of_twenty_images_are_those_of_the_saved_processor(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_class(name, settings, tmp_path, count=20)


@pytest.mark.parametrize("data_config", TIMM_CONFIGS, ids=lambda config: f"{config['input_size']}-{config['crop_pct']}")
def test_pixels_are_those_of_timm(data_config: dict[str, Any], tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": data_config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_law(load_preprocessing(tmp_path), AutoImageProcessor.from_pretrained(tmp_path), count=20)


def image_classes() -> set[str]:
    """The processor classes of image classifiers, backbones and masked image models in transformers."""
    mappings = (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES,
    )
    kinds = [IMAGE_PROCESSOR_MAPPING_NAMES.get(model) or {} for mapping in mappings for model in mapping]
    return {kind.get("torchvision") or kind["pil"] for kind in kinds if kind} - {"TimmWrapperImageProcessor"}


@pytest.mark.skipif(not transformers.__version__.startswith("5.24"), reason="the lists are of transformers 5.24")
def test_the_lists_are_complete() -> None:
    listed = {name for name, _ in PROCESSORS}
    assert image_classes() - listed == set(EXCEPTIONS)
    names = {name for kind in IMAGE_PROCESSOR_MAPPING_NAMES.values() for name in kind.values()}
    known = {name for name in names if name.removesuffix("Pil") not in names - {name}} - {"TimmWrapperImageProcessor"}
    assert known == listed | set(EXCEPTIONS) | set(REFUSED)


def check_refused(name: str, folder: Path, **settings: Any) -> None:
    folder = write_settings(folder, name, **settings)
    with pytest.raises(ValueError, match=f"{name} (turns|gives|does not)") as error:
        load_preprocessing(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*EXCEPTIONS, "Cohere2VisionImageProcessor", "VideoMAEImageProcessor"])
def test_inputs_that_are_not_one_image_of_one_size_are_refused(name: str, tmp_path: Path) -> None:
    settings = {
        "ImageGPTImageProcessor": {"clusters": [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], "size": {"height": 16, "width": 16}},
        "TextNetImageProcessor": {"size": {"shortest_edge": 32}},
        "Cohere2VisionImageProcessor": {"size": {"height": 256, "width": 256}},  # cuts only larger images into tiles
    }
    check_refused(name, tmp_path, **settings.get(name, {}))


@pytest.mark.soak
@pytest.mark.parametrize("name", REFUSED)
def test_processors_of_other_models_are_refused(name: str, tmp_path: Path) -> None:
    if get_image_processor_class_from_name(name) is None:
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    check_refused(name, tmp_path)


# --- how pixels are stored ----------------------------------------------------------------------------------------------


def test_only_processors_with_another_order_of_steps_give_float_pixels(tmp_path: Path) -> None:
    small = {"size": {"height": 16, "width": 16}}
    vit = load_preprocessing(write_settings(tmp_path / "vit", **small))
    dinov3 = load_preprocessing(write_settings(tmp_path / "dinov3", "DINOv3ViTImageProcessor", **small))
    mobilevit = load_preprocessing(
        write_settings(tmp_path / "m", "MobileViTImageProcessor", size={"shortest_edge": 16}, crop_size=small["size"])
    )
    efficientnet = load_preprocessing(write_settings(tmp_path / "e", "EfficientNetImageProcessor", **small))
    assert [p.pixel_type for p in (vit, dinov3, mobilevit, efficientnet)] == ["uint8", "float32", "uint8", "uint8"]
    assert vit.describe() == "16x16 pixels, bilinear; RGB / 255, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    assert dinov3.describe() == (
        "16x16 pixels, bilinear; float32 pixels from DINOv3ViTImageProcessor; RGB / 255, mean (0.485, 0.456, 0.406), "
        "std (0.229, 0.224, 0.225)"
    )
    assert mobilevit.describe() == "16x16 pixels, bicubic; BGR / 255"
    assert efficientnet.describe().endswith("std (0.5, 0.5, 0.5), divided by (0.5, 0.5, 0.5)")
    # Stores of checkpoints that always loaded keep their keys.
    assert not {"pixels", "version", "channels", "code"} & set(vit.spec)
    assert vit.spec != dinov3.spec


@pytest.mark.parametrize("processor", ["DINOv3ViTImageProcessor", "MobileViTImageProcessor"])
def test_stored_pixels_and_squares_give_the_same_colors(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    square = {"height": 16, "width": 16}
    size = {"size": {"shortest_edge": 16}, "crop_size": square} if "MobileViT" in processor else {"size": square}
    preprocessing = load_preprocessing(write_settings(tmp_path / "model", processor, **size))
    for label, color in (("a", RED_BLUE), ("b", (10, 200, 60))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), color).save(tmp_path / "images" / label / f"{i}.png")
    split = make_data(tmp_path / "images").train
    resources = Resources(accelerator=Accelerator(), compute=ComputeConfig())
    stored = store_evaluation_pixels(split, preprocessing, resources)
    rows = np.arange(len(split))
    assert stored.read(rows).dtype == preprocessing.pixel_type
    evaluated = stored.prepare(torch.from_numpy(stored.read(rows)), rows)
    decoded = EvaluationImages(split=split, preprocessing=preprocessing)
    assert torch.equal(evaluated, decoded.prepare(torch.from_numpy(decoded.read(rows)), rows))
    plain = AugmentationConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)
    squares = store_training_squares(
        split, preprocessing, TrainingSquares(side_px=16, augmentation=plain, seed=0), resources
    )
    trained = squares.prepare(torch.from_numpy(squares.read(rows)), rows)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)


def make_data(folder: Path) -> Data:
    from hf_transfer.config import DataConfig
    from hf_transfer.data.dataset import load_data

    return load_data(DataConfig(dataset=str(folder), validation_fraction=0.25))


# --- the fast approximation -------------------------------------------------------------------------------------------


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_timm_settings(folder: Path, config: dict[str, Any]) -> Path:
    """Writes the config.json of a timm checkpoint without weights."""
    folder.mkdir()
    content = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("config", TIMM_CONFIGS)
def test_fast_pixels_are_close_to_the_published_pixels(config: dict[str, Any], tmp_path: Path) -> None:
    """On images of all sizes and modes, so the crop is at the same place."""
    exact = load_preprocessing(write_timm_settings(tmp_path / "model", config))
    fast = exact.decoded_by("fast", torch.device("cpu"))
    for image in photos(20):
        difference = np.abs(fast.pixels(image).astype(int) - exact.pixels(image).astype(int))
        assert difference.mean() < 0.5  # a crop that is shifted by one pixel differs by more than 5
    is_plain = config.get("crop_mode") is None
    assert (fast.native_resize is not None) == is_plain
    assert exact.decoded_by("exact", torch.device("cpu")) is exact
    assert fast.spec != exact.spec
    assert exact.least_px is None


@pytest.mark.parametrize("side_px", [(400, 300), (1203, 905), (906, 1605), (2048, 1536)])
def test_fast_pixels_of_large_jpegs_are_close(side_px: tuple[int, int], tmp_path: Path) -> None:
    exact = load_preprocessing(write_timm_settings(tmp_path / "model", TIMM_CONFIGS[0]))
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    jpeg = encode_jpeg(Image.fromarray(coarse).resize(side_px, Image.Resampling.BICUBIC))
    reduced, size = read_reduced(jpeg, "it", exact.fast.least_px)
    assert size == side_px
    assert reduced.width < side_px[0]
    difference = exact.fast.pixels(reduced).astype(int) - exact.pixels(read_image(jpeg, "it"))
    assert np.abs(difference).mean() < 1.5  # a shift by one pixel changes these images by 9 levels


@pytest.mark.parametrize("resizes", [True, False])
def test_images_are_reduced_only_if_the_processor_resizes_them(resizes: bool, tmp_path: Path) -> None:
    """A processor that cuts the center out of the image as it is must get the whole image."""
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "do_resize": resizes}
    exact = load_preprocessing(write_settings(tmp_path / "model", "CLIPImageProcessor", **settings))
    assert (exact.fast.least_px is not None) == resizes
    for image in photos(4):
        np.testing.assert_array_equal(exact.fast.pixels(image), exact.pixels(image))  # the processor itself uses torch


# --- networks that train on such pixels -------------------------------------------------------------------------------


def run_and_reload(strategy: str, checkpoint: Path, output_dir: Path, **settings: Any) -> Path:
    """Trains, and checks in this process that transformers and timm alone compute the saved reference from the folder."""
    session = make_session(strategy, output_dir, checkpoint=str(checkpoint), **settings)
    train_session(session)
    model = output_dir / "model"
    backbone = load_saved(str(model), trust_remote_code=True)
    images = list(photos(4))
    mode = "L" if backbone.preprocessing.channels == 1 else "RGB"
    for library in find_libraries(model):
        inputs, logits, _ = compute(model, [image.convert(mode) for image in images], library)
        own = torch.stack([normalize(backbone.preprocessing, image) for image in images])
        torch.testing.assert_close(inputs, own, rtol=0, atol=PARITY)
        with torch.no_grad():
            torch.testing.assert_close(logits, compute_logits(backbone.model, own), rtol=1e-4, atol=1e-4)
    best = [p.labels[0] for p in predict(backbone, images)]
    with torch.no_grad():
        expected = compute_logits(backbone.model.cpu(), own).argmax(1).tolist()
    assert best == [backbone.label_names[i] for i in expected]
    return model


def test_a_network_trains_on_float_pixels_and_is_saved_with_its_processor(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "upstream", processor="DINOv3ViTImageProcessor")
    model = run_and_reload("full", folder, tmp_path / "run", epochs=1)
    saved = json.loads((model / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DINOv3ViTImageProcessor"
    assert "float32 pixels from DINOv3ViTImageProcessor" in (model / "README.md").read_text()


def write_stretching(folder: Path) -> Path:
    write_vit(folder)
    (folder / "stretching.py").write_text(STRETCHING)
    auto_map = {"AutoImageProcessor": "stretching.StretchingImageProcessor"}
    settings = {"image_processor_type": "StretchingImageProcessor", "auto_map": auto_map}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_processor_without_constant_colors_works_without_augmentation(tmp_path: Path) -> None:
    given = {"checkpoint": str(write_stretching(tmp_path / "upstream")), "trust_remote_code": True, "epochs": 1}
    session = make_session("last_layers", **given, k=1)
    preprocessing = session.backbone.preprocessing
    assert preprocessing.colors is None
    assert preprocessing.pixel_type == "float32"
    assert "code" in preprocessing.spec
    assert "no augmentation" in preprocessing.describe()
    assert train_session(session).test.accuracy >= 0
    plain = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0}
    assert train_session(make_session("full", **given, **plain)).test.accuracy >= 0
    for strategy, settings in (("full", {}), ("last_layers", {"cache_views": 2, "k": 1}), ("auto", {})):
        session = make_session(strategy, **given, **settings)
        with pytest.raises(ValueError, match="cannot follow augmentation: choose the strategy linear_probe") as error:
            train_session(session)
        assert "\n" not in str(error.value)
        assert session.costs.read().seconds.keys() <= {
            "data",
            "checkpoint",
            "engine",
            "chain",
            "total",
        }  # nothing heavy ran


# --- channels ---------------------------------------------------------------------------------------------------------------


def test_a_saved_classifier_over_a_backbone_of_gray_images_is_loaded_again(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8, num_channels=1)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    gray = {"image_mean": [0.5], "image_std": [0.5]}
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, **gray).save_pretrained(tmp_path / "tower")
    made: Any = load(str(tmp_path / "tower"), ["a", "b"])
    assert made.model.config.model_type == "backbone_classifier"
    for part in (made.model, made.preprocessing.processor):
        part.save_pretrained(tmp_path / "saved")
    again: Any = load(str(tmp_path / "saved"))
    assert again.preprocessing.image_shape == made.preprocessing.image_shape == (1, 16, 16)
    assert again.model(torch.zeros(2, 1, 16, 16)).logits.shape == (2, 2)


def test_model_args_may_make_a_network_of_gray_images(tmp_path: Path) -> None:
    # timm sums the kernels of the first convolution.
    colored: Any = load(str(write_timm(tmp_path / "timm"))).model
    gray: Any = load(str(tmp_path / "timm"), ["a", "b"], model_args='{"in_chans": 1}')
    assert gray.preprocessing.image_shape == (1, 16, 16)
    first = next(name for name, tensor in colored.state_dict().items() if tensor.ndim == 4)
    summed = colored.get_parameter(first).sum(1, keepdim=True)
    torch.testing.assert_close(gray.model.get_parameter(first), summed)
    assert gray.chain().image_shape == (1, 16, 16)
    write_vit(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"lacks weights outside the head: .*patch_embeddings"):
        load(str(tmp_path / "vit"), ["a", "b"], model_args='{"num_channels": 1}')


def test_a_backbone_that_is_only_named_states_no_channels(tmp_path: Path) -> None:
    folder = write_vit(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "backbone": "resnet50", "num_channels": None}))
    assert load_preprocessing(folder).channels == 3


def test_gray_pixels_are_those_of_the_saved_processor(tmp_path: Path) -> None:
    """The settings have three means, as timm and transformers write them by default; the saved ones have the average."""
    folder = write_vit(tmp_path, channels=1, image_mean=[0.4, 0.5, 0.6], image_std=[0.5, 0.5, 0.5], do_convert_rgb=True)
    preprocessing = load_preprocessing(folder)
    assert preprocessing.image_shape == (1, 16, 16)
    assert preprocessing.describe() == "16x16 pixels, bilinear; gray / 255, mean (0.5), std (0.5)"
    preprocessing.processor.save_pretrained(tmp_path / "saved")
    check_law(preprocessing, AutoImageProcessor.from_pretrained(tmp_path / "saved"), count=8)


@pytest.mark.parametrize(("write", "strategy"), [(write_vit, "full"), (write_timm, "linear_probe")])
def test_a_network_of_gray_images_trains_predicts_and_is_saved(write: Any, strategy: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "upstream", channels=1)
    settings = {"epochs": 1} if strategy == "full" else {}
    model = run_and_reload(strategy, folder, tmp_path / "run", **settings)
    assert 'convert("L")' in (model / "README.md").read_text()
    assert load(str(model)).preprocessing.image_shape == (1, 16, 16)


@pytest.mark.parametrize("write", [write_vit, write_timm])
def test_other_numbers_of_channels_are_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes images of 4 channels: images here have 3"):
        load(str(write(tmp_path, channels=4)))


@pytest.mark.soak
@pytest.mark.parametrize(("write", "channels"), [(write_vit, 1), (write_timm, 1), (write_vit, 3)])
def test_saved_pixels_are_those_of_a_fresh_process(write: Any, channels: int, tmp_path: Path) -> None:
    settings = {"processor": "DINOv3ViTImageProcessor"} if channels == 3 else {}
    folder = write(tmp_path / "upstream", channels=channels, **settings)
    train_session(make_session("full", tmp_path / "run", checkpoint=str(folder), epochs=1))
    model = tmp_path / "run" / "model"
    assert verify(model, tmp_path / "run" / REFERENCE, find_libraries(model))


# --- where preprocessing comes from -----------------------------------------------------------------------------------------


SETTINGS = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "image_mean": [0.1] * 3}


@pytest.mark.parametrize("content", [{"image_processor": SETTINGS}, {"feature_extractor": SETTINGS}, SETTINGS])
def test_a_processor_config_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    write_settings(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    colors = load_preprocessing(tmp_path).colors
    assert colors is not None
    assert colors.mean == (0.1, 0.1, 0.1)


def test_preprocessing_from_replaces_missing_preprocessing_and_is_saved(tmp_path: Path) -> None:
    upstream, origin = write_vit(tmp_path / "upstream"), write_settings(tmp_path / "origin", **SETTINGS)
    (upstream / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="Remedy: --preprocessing_from ID_OR_FILE"):
        load(str(upstream))
    for given in (origin, origin / "preprocessor_config.json"):
        colors = load(str(upstream), preprocessing_from=str(given)).preprocessing.colors
        assert colors is not None
        assert colors.mean == (0.1, 0.1, 0.1)
    model = run_and_reload("linear_probe", upstream, tmp_path / "run", preprocessing_from=str(origin))
    assert json.loads((model / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.1, 0.1]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["preprocessing_from"] == "origin"  # no local path
    assert "from `origin`" in (model / "README.md").read_text()
    with pytest.raises(ValueError, match="neither a file or folder here nor a Hub id"):
        load(str(upstream), preprocessing_from="./missing")
    with pytest.raises(ValueError, match="not in the local Hub cache"):
        load(str(upstream), preprocessing_from="owner/name")


def in_hub_cache(name: str) -> Path:
    """The snapshot folder of `someone/<name>` in the Hub cache of this test session."""
    repo, commit = (
        Path(os.environ["HF_HOME"], "hub", f"models--someone--{name}"),
        "0123456789abcdef0123456789abcdef01234567",
    )
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def test_an_adapter_brings_the_preprocessing_that_its_base_lacks(tmp_path: Path) -> None:
    base = write_vit(in_hub_cache("without-preprocessing"))
    (base / "preprocessor_config.json").unlink()
    write_settings(in_hub_cache("with-preprocessing"), **SETTINGS)
    given = {"checkpoint": "someone/without-preprocessing", "preprocessing_from": "someone/with-preprocessing"}
    train_session(make_session("lora", tmp_path / "run", **given, merge=False, epochs=1, rank=2))
    colors = load_saved(str(tmp_path / "run" / "model")).preprocessing.colors
    assert colors is not None
    assert colors.mean == (0.1, 0.1, 0.1)


def test_a_timm_base_with_other_preprocessing_is_not_left_to_plain_timm(tmp_path: Path) -> None:
    """An adapter that is saved alone would be read with the base's own preprocessing."""
    one, other = write_timm(tmp_path / "one"), write_timm(tmp_path / "other")
    assert load(str(one)).is_auto_class
    assert not load(str(one), preprocessing_from=str(other)).is_auto_class


def test_preprocessing_of_the_other_library_is_refused(tmp_path: Path) -> None:
    vit, resnet = write_vit(tmp_path / "vit"), write_timm(tmp_path / "resnet")
    with pytest.raises(ValueError, match="vit is a transformers checkpoint, which is saved with the preprocessing of"):
        load(str(vit), preprocessing_from=str(resnet))
    with pytest.raises(ValueError, match="resnet is a timm checkpoint, which is saved with the preprocessing of"):
        load(str(resnet), preprocessing_from=str(vit))


def test_inspect_takes_preprocessing_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upstream = write_vit(tmp_path / "upstream")
    (upstream / "preprocessor_config.json").unlink()
    main(["inspect", str(upstream), "--preprocessing_from", str(write_settings(tmp_path / "origin", **SETTINGS))])
    assert "16x16" in capsys.readouterr().out


def test_a_run_with_other_preprocessing_is_not_resumed(tmp_path: Path) -> None:
    vit, other = write_vit(tmp_path / "vit"), write_settings(tmp_path / "other", **SETTINGS)
    own, changed = (
        describe_identity(make_session("full", checkpoint=str(vit), preprocessing_from=origin), [], None)
        for origin in (None, str(other))
    )
    assert {key for key in own if own[key] != changed[key]} == {"preprocessing"}
