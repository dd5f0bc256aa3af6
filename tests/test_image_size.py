"""--image_size_px: the network computes what its own library computes at that size, and is saved with that size (law 7)."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor

from hf_transfer.cli import main
from hf_transfer.config import ModelConfig
from hf_transfer.hub.fresh_process import compute
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import find_libraries
from hf_transfer.network.adapters import Adapted, merge_adapters
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.image_size import resize_network
from hf_transfer.network.peft_checkpoints import load_checkpoint
from hf_transfer.network.preprocessing import load_preprocessing, quiet_transformers, resize_preprocessing
from hf_transfer.prefix.extract import extract
from hf_transfer.prefix.taps import tap_activation
from hf_transfer.strategy import Strategy
from hf_transfer.training.phases import describe_identity
from tests.families import FAMILIES, make_model, make_pixels
from tests.headless import LAYOUTS
from tests.sessions import make_session
from tests.test_adapters import move
from tests.test_preprocessing import check_law, normalize, photos, run_and_reload, write_settings, write_timm, write_vit
from tests.test_save import LABELS, results_for, write_upstream

# The name of a family in tests/families.py or of a layout in tests/headless.py, and two sizes.
SIZES_PX = {
    "timm ViT": (16, 64), "timm DINOv2": (42,), "timm DINOv3": (48,), "timm Swin": (16, 64), "timm ConvNeXt": (47,),
    "timm ResNet": (17,), "timm MobileNetV2": (48,), "ViT": (8, 32), "DeiT": (24,), "DINOv2": (8,), "Swin": (72,),
    "ConvNeXt": (47,), "SigLIP": (8, 24), "BEiT, masked images": (48,), "DINOv3": (16,), "CLIP tower": (48,),
    "Hiera, pretraining": (96,),
}  # fmt: skip
CASES = [(name, size_px) for name, sizes in SIZES_PX.items() for size_px in sizes]


def write_checkpoint(name: str, folder: Path) -> None:
    if name in FAMILIES:
        write_upstream(name, folder)
    else:
        with quiet_transformers():
            LAYOUTS[name].save(folder)


def compute_with_library(backbone: Backbone, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the logits that timm or transformers computes at another size with the network of the checkpoint's own size."""
    model: Any = backbone.model
    if backbone.library == "timm":
        try:
            arguments = {"num_classes": len(LABELS), "img_size": pixels.shape[-1]}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # timm's interpolation uses deprecated indexing
                resized: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
        except TypeError:
            resized = model
        resized.load_state_dict({n: t for n, t in model.state_dict().items() if "head" in n or "fc" in n}, strict=False)
        return compute_logits(resized, pixels)
    for settings in ({"interpolate_pos_encoding": True}, {}):
        try:
            if hasattr(model, "backbone"):
                return model.head(model.pool(model.backbone(pixels, **settings)))  # type: ignore[no-any-return]
            return model(pixel_values=pixels, **settings).logits  # type: ignore[no-any-return]
        except TypeError:
            pass
    raise AssertionError("no forward")


@pytest.mark.parametrize(("name", "size_px"), CASES)
def test_a_resized_network_is_its_librarys_and_is_saved_as_such(name: str, size_px: int, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path / "upstream")
    torch.manual_seed(0)
    own = load(str(tmp_path / "upstream"), LABELS)
    torch.manual_seed(0)
    resized = load(str(tmp_path / "upstream"), LABELS, image_size_px=size_px)
    shape = (own.preprocessing.channels, size_px, size_px)
    assert resized.preprocessing.image_shape == shape
    pixels = make_pixels(shape, 2)
    with torch.no_grad():
        expected = compute_with_library(own, tmp_path / "upstream", pixels)
        logits = compute_logits(resized.model, pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    save_model(resized, results_for(resized), tmp_path / "model")
    images = list(photos(3))
    prepared = torch.stack([normalize(resized.preprocessing, image) for image in images])
    with torch.no_grad():
        trained = compute_logits(resized.model, prepared)
    for library in find_libraries(tmp_path / "model"):
        inputs, saved, labels = compute(tmp_path / "model", images, library)
        torch.testing.assert_close(inputs, prepared, rtol=0, atol=1e-5)
        torch.testing.assert_close(saved, trained, rtol=1e-4, atol=1e-5)
        assert tuple(labels) in (LABELS, ())


@pytest.mark.parametrize("name", ["timm ViT", "ViT"])
def test_the_own_size_changes_nothing(name: str, tmp_path: Path) -> None:
    write_upstream(name, tmp_path)
    own, given = load(str(tmp_path)), load(str(tmp_path), image_size_px=FAMILIES[name].image_px)
    assert given.is_auto_class
    assert given.preprocessing.spec == own.preprocessing.spec
    assert all(torch.equal(t, given.model.state_dict()[n]) for n, t in own.model.state_dict().items())


@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize("size_px", [160, 288])
def test_a_real_checkpoint_is_resized_as_by_timm(size_px: int, shared_data: Path) -> None:
    folder = shared_data / "checkpoints" / "deit_tiny_patch16_224.fix_in1k"
    resized = load(str(folder), image_size_px=size_px)
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size_px).eval()
    pixels = make_pixels((3, size_px, size_px), 1)
    with torch.no_grad():  # timm rounds the resized table to the file's half precision
        torch.testing.assert_close(compute_logits(resized.model, pixels), expected(pixels), rtol=1e-3, atol=1e-3)
    assert resized.preprocessing.crop_pct == load(str(folder)).preprocessing.crop_pct


# --- preprocessing --------------------------------------------------------------------------------------------------------

PROCESSORS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}, {"size": {"height": 48, "width": 48}}),
    ("DonutImageProcessor", {"size": {"height": 32, "width": 24}}, {"size": {"height": 48, "width": 48}}),
    (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 54}, "crop_size": {"height": 48, "width": 48}},
    ),
    (
        "BeitImageProcessor",
        {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 60, "width": 60}, "crop_size": {"height": 48, "width": 48}},
    ),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}, {"size": {"shortest_edge": 48}}),
    (
        "SamImageProcessor",
        {"size": {"longest_edge": 24}, "pad_size": {"height": 32, "width": 32}},
        {"size": {"longest_edge": 36}, "pad_size": {"height": 48, "width": 48}},
    ),
)


def test_a_processor_that_squashes_images_from_384_pixels_on_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_pct": 0.875}
    own = load_preprocessing(write_settings(tmp_path, "ConvNextImageProcessor", **settings))
    image = Image.new("RGB", (200, 100))
    image.paste((255, 255, 255), (0, 0, 40, 100))  # a bar that the crop of the center leaves out
    with caplog.at_level(logging.INFO):
        below, above = (resize_preprocessing(own, size_px) for size_px in (352, 384))
    for preprocessing, is_cropped in ((own, True), (below, True), (above, False)):
        assert (np.asarray(preprocessing.pixels(image)).max() == 0) == is_cropped
        assert ("crop 0.875" in preprocessing.describe()) == is_cropped
    lines = [record.getMessage() for record in caplog.records if "squashes whole images" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("image_size_px=384: ConvNextImageProcessor")


@pytest.mark.parametrize(("name", "settings", "expected"), PROCESSORS, ids=[name for name, *_ in PROCESSORS])
def test_a_processor_is_scaled_in_all_its_sizes(
    name: str, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    own = load_preprocessing(write_settings(tmp_path, name, **settings))
    resized = resize_preprocessing(own, 48)
    assert resized.image_shape == (3, 48, 48)
    assert (own.image_shape, own.crop_pct) == ((3, *own.image_shape[1:]), resized.crop_pct)
    assert own.processor.to_dict() != resized.processor.to_dict()
    resized.processor.save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    for key, sizes in expected.items():
        assert dict(getattr(saved, key)) == sizes
    check_law(resized, saved, count=4)


def test_a_processor_whose_size_is_no_such_setting_is_refused(tmp_path: Path) -> None:
    own = load_preprocessing(write_settings(tmp_path, "AriaImageProcessor", max_image_size=490))
    with pytest.raises(
        ValueError, match="image_size_px=48: AriaImageProcessor then gives images of 490x490 pixels; omit"
    ):
        resize_preprocessing(own, 48)


# --- refusals -------------------------------------------------------------------------------------------------------------

REFUSED = (
    ("timm ViT", 40, "image_size_px=40: the network's patches have 16 pixels; choose 32 or 48$"),
    ("timm ViT", 10, "the network's patches have 16 pixels; choose 16$"),
    ("DINOv2", 20, "the network's patches have 8 pixels; choose 16 or 24$"),
    ("Swin", 32, r"image_size_px=32: SwinForImageClassification does not take images of this size \(.*\); omit image_size_px$"),
    ("ConvNeXt", 16, r"does not take images of this size \(.*Kernel size.*\); omit image_size_px$"),
    ("timm ConvNeXt", 16, r"does not take images of this size \(.*Kernel size.*\); omit image_size_px$"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "size_px", "message"), REFUSED)
def test_a_size_that_the_network_cannot_have_is_refused(name: str, size_px: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resize_network(make_model(name), FAMILIES[name].image_shape, size_px)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_the_nearest_sizes_that_work() -> None:
    with pytest.raises(ValueError, match=r"choose 32, or omit image_size_px$"):
        resize_network(make_model("timm ConvNeXt"), (3, 48, 48), 29)


def test_tables_that_the_library_does_not_resize_are_named() -> None:
    cait = timm.create_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3).eval()
    with pytest.raises(ValueError, match=r"\(timm does not resize pos_embed\); omit image_size_px$"):
        resize_network(cait, (3, 32, 32), 48)
    levit = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 16, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    model = transformers.LevitForImageClassification(levit).eval()
    with pytest.raises(
        ValueError, match=r"\(transformers does not resize levit\..*attention_biases\); omit image_size_px$"
    ):
        resize_network(model, (3, 64, 64), 96)


def test_rank_and_inspect_take_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upstream = write_vit(tmp_path / "vit")
    main(["inspect", str(upstream), "--image_size_px", "24"])
    assert "24x24 pixels" in capsys.readouterr().out
    few = ["--images_per_class", "2", "--cache", "none", "--sample", "20", "--json"]
    main(["rank", str(upstream), "--image_size_px", "24", *few])
    assert not json.loads(capsys.readouterr().out)["failures"]


# --- runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_at_another_size_is_saved_with_it(tmp_path: Path) -> None:
    upstream = write_vit(tmp_path / "upstream")
    model = run_and_reload("linear_probe", upstream, tmp_path / "run", image_size_px=24, images_per_class=3)
    assert load(str(model)).preprocessing.image_shape == (3, 24, 24)
    assert "image_size_px: 24" in (tmp_path / "run" / "config.yaml").read_text()
    assert "24x24 pixels" in (model / "README.md").read_text()


def test_two_sizes_share_no_cache_entry(tmp_path: Path) -> None:
    """A convolutional network has the same weights at both sizes."""
    checkpoint = str(write_timm(tmp_path / "upstream"))
    computed = []
    for size_px in (None, 24, 16, 24):
        session = make_session("linear_probe", checkpoint=checkpoint, image_size_px=size_px, images_per_class=3)
        cut = session.chain.features
        assert cut is not None
        taps = {"features": tap_activation(cut)}
        extracted = extract(session.chain, session.backbone.preprocessing, session.data.train, taps, session.resources)
        computed.append(extracted.images)
    everything = computed[0]
    assert everything > 0
    assert computed == [everything, everything, 0, 0]  # 16 is the checkpoint's own size


def test_a_run_at_another_size_is_not_resumed(tmp_path: Path) -> None:
    checkpoint = str(write_timm(tmp_path / "upstream"))
    own, changed = (
        describe_identity(make_session("full", checkpoint=checkpoint, image_size_px=px), [], None) for px in (None, 24)
    )
    assert {key for key in own if own[key] != changed[key]} == {"image_size_px", "preprocessing"}


def test_adapters_at_another_size_are_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter folder cannot resize its base, which plain peft loads at the base's own size."""
    settings = {"checkpoint": str(write_vit(tmp_path / "vit")), "base_model": "someone/base", "rank": 2, "merge": False}
    for size_px, is_merged in ((None, False), (24, True)):
        session = make_session("lora", image_size_px=size_px, images_per_class=3, **settings)
        assert isinstance(session.strategy, Strategy)
        with caplog.at_level(logging.INFO, logger="hf_transfer"):
            session.strategy.prepare(session)
        assert ("the adapters will be merged" in caplog.text) == is_merged


def test_an_adapter_is_merged_into_its_base_before_the_resize(tmp_path: Path) -> None:
    base = Path(os.environ["HF_HOME"], "hub", "models--someone--resizable")
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40)
    session = make_session("lora", checkpoint=str(write_vit(base / "snapshots" / ("0" * 40))), rank=2, merge=False)
    assert isinstance(session.strategy, Strategy)
    adapted = session.strategy.prepare(session).backbone
    assert isinstance(adapted, Adapted)
    move(adapted)
    save_model(adapted, results_for(adapted), tmp_path / "adapter")
    merged: Any = merge_adapters(adapted).model
    resized = load_checkpoint(ModelConfig(checkpoint=str(tmp_path / "adapter"), image_size_px=24))
    pixels = make_pixels((3, 24, 24), 2)
    with torch.no_grad():
        expected = merged(pixel_values=pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(compute_logits(resized.model, pixels), expected, rtol=1e-4, atol=1e-5)
    assert resized.preprocessing.image_shape == (3, 24, 24)


def test_a_greedy_stack_grows_on_a_resized_checkpoint_and_is_resized_itself(tmp_path: Path) -> None:
    stack = {
        "layers": 1,
        "block": "transformer",
        "stage_epochs": 1,
        "epochs": 1,
        "images_per_class": 3,
        "cache": "memory",
    }
    write_upstream("timm ViT", tmp_path / "vit")
    session = make_session("greedy_stack", checkpoint=str(tmp_path / "vit"), image_size_px=48, **stack)
    assert isinstance(session.strategy, Strategy)
    backbone = session.strategy.make_stack(session).backbone  # type: ignore[attr-defined]
    save_model(backbone, results_for(backbone), tmp_path / "model")
    inputs, logits, _ = compute(tmp_path / "model", list(photos(2)), "transformers")
    assert inputs.shape[-1] == 48
    again = load(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(logits, compute_logits(again.model, inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="image_size_px=64: GreedyForImageClassification does not take images"):
        load(str(tmp_path / "model"), image_size_px=64)
    # Convolutional blocks take any size, and their preprocessing is in config.json.
    blocks = make_session("greedy_stack", layers=1, width=4, downsample="0", image_size_px=16, images_per_class=3)
    save_model(blocks.backbone, results_for(blocks.backbone), tmp_path / "blocks")
    resized = load(str(tmp_path / "blocks"), image_size_px=24)
    save_model(resized, results_for(resized), tmp_path / "resized")
    assert compute(tmp_path / "resized", list(photos(2)), "transformers")[0].shape[-1] == 24


def test_pretraining_starts_at_the_size(tmp_path: Path) -> None:
    sizes = [make_session("pretrain", image_size_px=px).backbone.preprocessing.height_px for px in (None, 48)]
    assert sizes == [32, 48]
