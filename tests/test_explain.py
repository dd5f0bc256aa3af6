"""Heat maps are where theory and a hidden window say, in every family, and depend on the head."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.inference.explain import choose_map_cut, explain, occlude
from hf_transfer.inference.heat_maps import draw_explanation, make_explainer
from hf_transfer.inference.predict import predict
from hf_transfer.network.backbone import load
from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.positions import Layout, find_layouts
from tests.families import FAMILIES, built, make_pixels

CONV = ["timm ConvNeXt", "timm ResNet", "timm EfficientNet", "timm MobileViT", "ConvNeXt", "ResNet"]
PREFIX = {"timm ViT": 1, "timm DINOv2": 5, "timm DINOv3": 5, "ViT": 1, "DeiT": 2, "DINOv2": 1, "SigLIP": 0, "Swin": 0}


class Bright(nn.Module):
    """Logits are sums of positions: class 0 counts red ones, class 1 blue ones. No layer mixes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)))
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            for block in self.blocks:
                block[0].weight.copy_(torch.eye(3)[..., None, None])
                block[0].bias.zero_()
            self.fc.weight.copy_(torch.tensor([[1.0, 0, -1], [-1, 0, 1]]))
            self.fc.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.pool(images)).mean((2, 3)))


def squares() -> torch.Tensor:
    """Two black images (3, 32, 32) with a red square at the top left and a blue one at the bottom right."""
    images = torch.zeros(2, 3, 32, 32)
    images[:, 0, 4:12, 4:12] = 1
    images[:, 2, 20:28, 20:28] = 2
    return images


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_explained(name: str) -> None:
    model, chain = built(name)
    map_cut = choose_map_cut(chain)
    heat = explain(chain, make_pixels(FAMILIES[name].image_shape, 3), at=map_cut)
    assert heat.shape == (3, *FAMILIES[name].image_shape[1:])
    assert heat.dtype == torch.float32
    assert 0 <= float(heat.min()) <= float(heat.max()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    if name in PREFIX:
        assert (map_cut.layout.kind, map_cut.layout.num_prefix) == ("tokens", PREFIX[name])
    elif name == "timm Swin":
        assert map_cut.layout.kind == "channels_last"
    else:
        assert map_cut.layout.kind == "channels_first"


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_of_a_cut_lie_where_the_image_changes(name: str) -> None:
    """One corner patch of the image changes; at the first cut, its position changes most."""
    _, chain = built(name)
    layouts = find_layouts(chain)
    cut = next(cut for cut in chain.cuts if cut.name in layouts)
    layout = layouts[cut.name]
    before = make_pixels(chain.image_shape, 1)
    height, width = chain.image_shape[1] // layout.height, chain.image_shape[2] // layout.width
    for is_low, is_right in ((False, False), (False, True), (True, False)):
        after = before.clone()
        rows = slice(-height, None) if is_low else slice(height)
        columns = slice(-width, None) if is_right else slice(width)
        after[:, :, rows, columns] += 3
        first, second = (layout.arrange(chain.run_prefix([cut], each)[0]) for each in (before, after))
        row, column = divmod(int((second - first).abs().sum(1).argmax()), layout.width)
        # A kernel may reach one position further.
        assert row in ((layout.height - 2, layout.height - 1) if is_low else (0, 1))
        assert column in ((layout.width - 2, layout.width - 1) if is_right else (0, 1))


def test_grad_cam_is_cam_where_the_logits_are_linear_in_the_map() -> None:
    """arXiv 1610.02391, section 3.1: before average pooling and a linear head, the map is CAM's weighted sum of channels."""
    model = Bright()
    chain = build_chain(model, (3, 32, 32))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = torch.tensor([0, 1, 1, 0])
    activation = model.blocks(model.pool(images))
    cam = torch.einsum("bc,bchw->bhw", model.fc.weight[outputs], activation).relu()
    enlarged = nn.functional.interpolate(cam[:, None], size=(32, 32), mode="bilinear")[:, 0].detach()
    expected = enlarged / enlarged.amax((1, 2), keepdim=True)
    torch.testing.assert_close(explain(chain, images, outputs=outputs, at="blocks.1.0"), expected)


@pytest.mark.parametrize("method", [explain, occlude])
def test_the_heat_is_on_the_region_of_the_output(method: object) -> None:
    assert callable(method)
    chain = build_chain(Bright(), (3, 32, 32))
    heat = method(chain, squares(), outputs=torch.tensor([0, 1]))
    for (row, column), own in zip(((8, 8), (24, 24)), heat, strict=True):
        assert float(own[row, column]) > 0.9
        assert float(own[31 - row, 31 - column]) < 0.1
    without = method(chain, squares())  # blue is brighter
    assert torch.equal(without[0], heat[1])


def test_an_image_that_does_not_speak_for_the_output_is_cold() -> None:
    chain = build_chain(Bright(), (3, 32, 32))
    images = squares()
    images[:, 0] = 0
    heat = explain(chain, images, outputs=torch.tensor([0, 1]))
    assert not heat[0].any()
    assert heat[1].any()


def shuffle_head(chain: Chain, seed: int) -> None:
    """Draws the weights of the linear head anew, in place, with the spread that they had."""
    assert chain.head is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in chain.model.named_parameters():
            if chain.head.owns(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())


def test_another_head_has_other_maps() -> None:
    """The sanity check of arXiv 1810.03292, section 3: a map that does not depend on the head explains no prediction."""
    run = ht.Task("sklearn/digits", images_per_class=20, cache="none", engine="eager").fit(
        ht.linear_probe(readouts="none")
    )
    chain = run.backbone.chain()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    pixels = np.stack([run.backbone.preprocessing.pixels(photo) for photo in photos])
    images = run.backbone.preprocessing.normalize(torch.from_numpy(pixels))
    outputs = torch.arange(12) % 10
    map_cut = choose_map_cut(chain)
    own = explain(chain, images, outputs=outputs, at=map_cut)
    assert torch.equal(own, explain(chain, images, outputs=outputs, at=map_cut))
    similarity = []
    for seed in range(3):
        shuffle_head(chain, seed)
        other = explain(chain, images, outputs=outputs, at=map_cut)
        pairs = [(a, b) for a, b in zip(own, other, strict=True) if a.any() and b.any()]  # some maps are cold
        similarity += [spearmanr(a.flatten(), b.flatten()).statistic for a, b in pairs]
    assert len(similarity) > 20
    assert np.mean(similarity) < 0.3


@pytest.mark.parametrize("name", ["timm ViT", "ViT"])
def test_the_cut_of_a_class_token_lies_before_the_last_layer(name: str) -> None:
    _, chain = built(name)
    last = chain.layers[-2].name
    assert choose_map_cut(chain).cut.name != last
    with pytest.raises(ValueError, match=f"explain_at='{last}': the outputs depend on no map"):
        choose_map_cut(chain, last)
    with pytest.raises(ValueError, match="is no cut of this chain"):
        choose_map_cut(chain, "nothing")


class Flat(nn.Module):
    """A network that mixes all positions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(192, 192), nn.ReLU()) for _ in range(2)))
        self.fc = nn.Linear(192, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(images.flatten(1)))


class Latents(nn.Module):
    """A network with sixteen vectors that are no positions, as many as a map of 4 x 4 would have."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(192, 192)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2)))
        self.fc = nn.Linear(12, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.mix(images.flatten(1)).unflatten(1, (16, 12))).mean(1))


@pytest.mark.parametrize("kind", [Flat, Latents])
def test_a_network_without_positions_is_named(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    chain = build_chain(kind(), (3, 8, 8))
    assert not find_layouts(chain)
    with pytest.raises(ValueError, match=r"no cut of this network has a map .* --explain_by occlusion"):
        explain(chain, torch.zeros(1, 3, 8, 8))
    assert occlude(chain, torch.randn(1, 3, 8, 8)).shape == (1, 8, 8)


def test_layouts_of_images_that_are_not_square() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()) for _ in range(2)))
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    chain = build_chain(model, (3, 20, 36))
    assert find_layouts(chain)["blocks.1.0"] == Layout(kind="channels_first", height=5, width=9)
    heat = explain(chain, torch.rand(2, 3, 20, 36))
    assert heat.shape == (2, 20, 36)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.jpg", "b/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b/bad.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("flags", [(), ("--explain_by", "occlusion"), ("--explain_at", "layer2.1")])
def test_predict_writes_one_picture_per_image(
    flags: tuple[str, ...], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "embedded", str(photos), "--explain", str(tmp_path / "why"), "--json", *flags])
    assert stop.value.code == 1  # of the unreadable image
    rows = json.loads(capsys.readouterr().out)
    names = [Path(row["explanation"]).relative_to(tmp_path / "why").as_posix() for row in rows]
    assert names == ["a/1.png", "a/2.png", "b/1.png"]
    assert sorted(path.relative_to(tmp_path / "why").as_posix() for path in tmp_path.rglob("*.png")) == names
    with Image.open(tmp_path / "why" / "a/1.png") as picture:
        assert picture.size == (448, 224)  # 32 pixels, seven times as large, twice
    with pytest.raises(SystemExit) as stop:
        main(["predict", "embedded", str(photos), "--explain", str(tmp_path / "why"), *flags])
    assert stop.value.code == 1, "older explanations are replaced"


def test_explanations_do_not_replace_the_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(photo)
    content = photo.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["predict", "embedded", str(photo.parent), "--explain", str(photo.parent)])
    assert stop.value.code == 2
    assert "is no explanation that may be replaced: give another folder" in capsys.readouterr().err
    explainer = make_explainer(load("embedded"))
    with pytest.raises(ValueError, match="no explanation that may be replaced"):
        explainer.write(predict(load("embedded"), [photo]), photo.parent)
    assert photo.read_bytes() == content


@pytest.mark.parametrize("folder", ["a", "b/..", "."])
def test_explanations_are_not_written_around_photos(
    folder: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(photos.rglob("*"))
    with pytest.raises(SystemExit):
        main(["predict", "embedded", str(photos / "a/2.jpg"), "--explain", str(photos / folder)])
    assert "contains images to explain, from" in capsys.readouterr().err
    assert sorted(photos.rglob("*")) == before


def test_the_picture_shows_the_image_and_the_heat() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    heat = np.zeros((224, 224), np.float32)
    heat[:50, :50] = 1
    shown = np.asarray(draw_explanation(pixels, heat), np.int64)
    np.testing.assert_array_equal(shown[:, :224], pixels)
    cold, hot = shown[60:, 224 + 60 :], shown[:50, 224 : 224 + 50]
    assert np.ptp(cold, axis=2).max() == 0  # gray
    assert (hot[..., 0] > hot[..., 2]).all()  # yellow


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--explain_by", "occlusion"), "explain_by='occlusion': nothing is explained without --explain"),
        (("--explain_at", "stem"), "explain_at='stem': nothing is explained without --explain"),
        (("--explain", "why", "--adapter", "x"), "--explain and --adapter"),
        (("--explain", "why", "--explain_by", "occlusion", "--explain_at", "stem"), "occlusion needs no cut"),
        (("--explain", __file__), "is a file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: tuple[str, ...], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "embedded", str(photos / "a"), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_explanations_agree_with_occlusion_on_photos(shared_data: Path) -> None:
    """A real network on photos of ants and bees: the two methods share no code, and agree on where to look."""
    from hf_transfer.network.backbone import load

    backbone = load(str(shared_data / "checkpoints/mobilenetv2_100.tflite_quant_in1k"))
    chain = backbone.chain()
    files = sorted((shared_data / "datasets/hymenoptera/test").rglob("*.jpg"))[::38]
    photos = [Image.open(file).convert("RGB") for file in files]
    pixels = np.stack([backbone.preprocessing.pixels(photo) for photo in photos])
    images = backbone.preprocessing.normalize(torch.from_numpy(pixels))
    maps = [nn.functional.avg_pool2d(heat, 16) for heat in (explain(chain, images), occlude(chain, images))]
    similarity = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(*maps, strict=True)]
    assert np.mean(similarity) > 0.3
