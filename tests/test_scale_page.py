"""docs/scale.md is what scripts/write_scale.py calculates from the stored results, and its figures multiply as they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_scale", ROOT / "scripts" / "write_scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert (ROOT / "docs" / "scale.md").read_text() == script.write_page()


def test_the_bytes_of_an_image_are_those_of_the_networks() -> None:
    """Shapes at the cuts that the page names, of the same architectures."""
    import timm
    import torch

    images = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        mobilenet = timm.create_model("mobilenetv2_100").eval()
        x = mobilenet.bn1(mobilenet.conv_stem(images))
        assert mobilenet.blocks[:6](x).numel() == 160 * 7 * 7
        assert mobilenet.num_features == 1280
        deit = timm.create_model("deit_tiny_patch16_224").eval()
        assert deit.forward_features(images).numel() == 197 * 192


def test_numbers_have_two_digits_and_a_unit(script: ModuleType) -> None:
    assert [script.format_bytes(n) for n in (410_000, 7.68e6, 51.2e9, 1.1e12)] == [
        "0.41 MB",
        "7.7 MB",
        "51 GB",
        "1.1 TB",
    ]
    assert [script.format_seconds(s) for s in (92, 3600, 5 * 3600, 3 * 86400)] == [
        "1.5 min",
        "60 min",
        "5.0 h",
        "3.0 days",
    ]
