"""Augmentation: an image's draws depend on that image alone, and operations match torchvision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from hf_transfer.config import AugmentationConfig
from hf_transfer.data.augment import (
    ERASED_SHARE,
    NUM_UNIFORM,
    augment,
    draw_crops,
    draw_operations,
    draw_uniform,
    map_geometry,
    mix,
)
from hf_transfer.data.image_operations import (
    COLOR_OPERATIONS,
    GEOMETRIC_OPERATIONS,
    NUM_RESOLUTIONS,
    OPERATIONS,
    apply_color,
    lower_resolution,
)

SIZE = 24
PLAIN: dict[str, Any] = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0}
EVERYTHING: dict[str, Any] = {"color_jitter": 0.4, "random_erasing": 0.5, "min_resolution_px": 6}
# Grid coordinates are float32: off by up to 1e-6 of the square's side, times 255 gray levels from pixel to pixel.
SAMPLING = 0.02


def make_pixels(count: int, side: int = SIZE, seed: int = 0) -> Tensor:
    """Noise (count, side, side, 3) uint8."""
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.manual_seed(seed))


def make_pictures(width: int, height: int) -> Tensor:
    """Slow waves (1, H, W, 3) uint8 that no flip or rotation leaves as they are."""
    x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)[:, None]
    waves = torch.stack([torch.sin(5 * x + 3 * y), torch.cos(4 * y - 2 * x), x * y * 2 - 1], -1)
    return (127 + 110 * waves).round().to(torch.uint8)[None]


def run(pixels: Tensor, augmentation: AugmentationConfig, **options: Any) -> Tensor:
    """`augment` of square originals at the store's size, unless `options` say otherwise."""
    side = pixels.shape[1]
    indices = options.pop("indices", np.arange(len(pixels)))
    uniform = draw_uniform(options.pop("seed", 0), options.pop("epoch", 0), indices)
    options = {"sizes": np.full((len(pixels), 2), side), "height_px": side, "width_px": side} | options
    return augment(pixels, uniform=uniform, augmentation=augmentation, **options)


def to_images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float()


# Random numbers


def test_uniform_numbers_fill_the_interval_evenly_at_every_position() -> None:
    uniform = draw_uniform(3, 1, np.arange(4000), 8)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # Five standard errors of a mean of 4000, and of a share of a tenth: chance fails one of 88 checks once in 10 000 seeds.
    assert np.abs(uniform.mean(0) - 0.5).max() < 5 * (1 / 12 / 4000) ** 0.5
    tenths = np.stack([np.histogram(column, 10, (0, 1))[0] for column in uniform.T]) / 4000
    assert np.abs(tenths - 0.1).max() < 5 * (0.09 / 4000) ** 0.5
    # Positions, and neighbouring images, are unrelated: correlations have a standard error of 4000 ** -0.5.
    related = np.corrcoef(np.vstack([uniform.T[:, :-1], uniform.T[:, 1:]])) - np.eye(16)
    assert np.abs(related).max() < 5 * 4000**-0.5


def test_uniform_numbers_of_an_image_depend_on_it_alone() -> None:
    indices = np.array([7, 2, 900, 2**40])
    together = draw_uniform(0, 5, indices, 6)
    for row, index in zip(together, indices, strict=True):
        np.testing.assert_array_equal(draw_uniform(0, 5, np.array([index]), 9)[0, :6], row)


def test_uniform_numbers_differ_by_seed_epoch_image_and_position() -> None:
    drawn = [draw_uniform(seed, epoch, np.arange(10), 10) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(drawn)) == 4 * 4 * 10 * 10


# Crops and flips


def draw(count: int, **options: Any) -> NDArray[np.float64]:
    return draw_uniform(options.get("seed", 0), options.get("epoch", 0), np.arange(count), NUM_UNIFORM)


def test_crops_keep_the_share_and_ratio_asked_for_in_original_pixels() -> None:
    augmentation = AugmentationConfig(crop_scale=0.2, crop_ratio=1.5)
    sizes = np.tile([[300, 200], [200, 300], [250, 250]], (400, 1))
    boxes = draw_crops(draw(1200), sizes, augmentation, 1.0)
    left_top, box = boxes[:, :2], boxes[:, 2:]
    assert (left_top >= 0).all()
    assert (left_top + box <= sizes + 1e-9).all()
    share, ratio = box.prod(1) / sizes.prod(1), box[:, 0] / box[:, 1]
    assert share.min() >= 0.2
    assert share.max() <= 1
    assert (ratio >= 1 / 1.5 - 1e-9).all()
    assert (ratio <= 1.5 + 1e-9).all()
    # All of the ranges is used.
    assert share.min() < 0.22
    assert share.max() > 0.95
    assert ratio.min() < 0.7
    assert ratio.max() > 1.45
    assert np.abs((left_top / (sizes - box + 1e-9)).mean(0) - 0.5).max() < 0.05  # six standard errors


def test_a_picture_too_long_for_any_crop_gets_the_largest_central_one_of_an_allowed_ratio() -> None:
    augmentation = AugmentationConfig(crop_scale=0.9, crop_ratio=2.0)
    boxes = draw_crops(draw(2), np.array([[1000, 10], [10, 1000]]), augmentation, 1.0)
    np.testing.assert_allclose(boxes, [[490, 0, 20, 10], [0, 490, 10, 20]])


def test_without_augmentation_an_image_is_its_center_crop() -> None:
    # The original is 48 x 24, the store squashed it to 24 x 24: the target's ratio 2:3 is 16 of its 48 columns, 8 of ours.
    pixels = make_pixels(2)
    images = run(pixels, AugmentationConfig(**PLAIN), sizes=np.tile([48, 24], (2, 1)), height_px=30, width_px=20)
    reference = tv.resized_crop(
        to_images(pixels), 0, 8, 24, 8, [30, 20], interpolation=InterpolationMode.BILINEAR, antialias=False
    )
    # torchvision crops before it resizes, so its outermost columns interpolate without the neighbors outside the crop.
    torch.testing.assert_close(images[..., 2:-2], reference[..., 2:-2], atol=SAMPLING, rtol=0)


def test_without_augmentation_a_square_picture_comes_back() -> None:
    pixels = make_pixels(3)
    images = run(pixels, AugmentationConfig(**PLAIN))
    torch.testing.assert_close(images, to_images(pixels), atol=SAMPLING, rtol=0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.float32


def test_the_squash_of_the_store_is_undone() -> None:
    width, height = 96, 48
    picture = make_pictures(width, height)
    squashed = np.asarray(Image.fromarray(picture[0].numpy()).resize((48, 48), Image.Resampling.BILINEAR))
    whole = run(
        torch.from_numpy(squashed.copy())[None],
        AugmentationConfig(**PLAIN),
        sizes=torch.tensor([[width, height]]),
        height_px=48,
    )
    # The store rounds to whole gray levels and loses a little detail; the waves are slow.
    torch.testing.assert_close(whole, to_images(picture[:, :, 24:72]), atol=2.0, rtol=0)


def test_a_random_crop_shows_what_its_box_holds() -> None:
    pixels, augmentation = make_pictures(SIZE, SIZE).repeat(6, 1, 1, 1), AugmentationConfig(hflip=0.0, color_jitter=0.0)
    sizes = np.tile([60, 40], (6, 1))
    images = run(pixels, augmentation, sizes=sizes)
    for i, box in enumerate(draw_crops(draw(6), sizes, augmentation, 1.0)):
        left, top, width, height = (box.reshape(2, 2) / [60, 40] * SIZE).ravel()
        # Column j of the output shows the square at this place; between pixels, waves are nearly straight.
        x = (left + (np.arange(SIZE) + 0.5) / SIZE * width - 0.5).clip(0, SIZE - 1)
        y = (top + (np.arange(SIZE) + 0.5) / SIZE * height - 0.5).clip(0, SIZE - 1)
        for channel in range(3):
            plane = pixels[i, :, :, channel].numpy().astype(float)
            rows = np.stack([np.interp(x, np.arange(SIZE), row) for row in plane])
            expected = np.stack([np.interp(y, np.arange(SIZE), column) for column in rows.T], 1)
            np.testing.assert_allclose(images[i, channel].numpy(), expected, atol=SAMPLING)


def test_flips_are_mirror_images_at_the_rate_asked_for() -> None:
    pixels = make_pixels(1, 8).repeat(400, 1, 1, 1)
    plain, mirrored = to_images(pixels[:1]), to_images(pixels[:1]).flip(3)
    images = run(pixels, AugmentationConfig(**(PLAIN | {"hflip": 0.3})))
    is_flipped = (images - mirrored).abs().amax((1, 2, 3)) < SAMPLING
    is_plain = (images - plain).abs().amax((1, 2, 3)) < SAMPLING
    assert bool((is_flipped ^ is_plain).all())
    assert is_flipped.float().mean().item() == pytest.approx(0.3, abs=0.1)  # four standard errors
    torch.testing.assert_close(run(pixels, AugmentationConfig(**(PLAIN | {"hflip": 1.0}))), mirrored.expand(400, -1, -1, -1),
                               atol=SAMPLING, rtol=0)  # fmt: skip


# Resolutions


def test_every_resolution_comes_as_often() -> None:
    images = run(make_pixels(1).expand(800, -1, -1, -1), AugmentationConfig(**PLAIN, min_resolution_px=8))
    spreads, counts = images.std((1, 2, 3)).round(decimals=2).unique(return_counts=True)
    assert len(spreads) == NUM_RESOLUTIONS  # coarser noise is smoother
    assert (counts / 800).tolist() == pytest.approx(
        [1 / NUM_RESOLUTIONS] * NUM_RESOLUTIONS, abs=0.05
    )  # four standard errors


def test_the_lowest_resolution_keeps_what_is_coarser_and_means() -> None:
    pictures = to_images(make_pictures(SIZE, SIZE))
    lowest = lower_resolution(pictures, np.zeros(1, np.int64), 8)
    blocks = F.avg_pool2d(pictures, 3)
    torch.testing.assert_close(F.avg_pool2d(lowest, 3)[..., 1:-1, 1:-1], blocks[..., 1:-1, 1:-1], atol=3, rtol=0)
    assert (lowest - pictures).abs().max() > 1
    torch.testing.assert_close(lower_resolution(pictures, np.array([7]), 8), pictures, atol=0, rtol=0)


def test_a_resolution_above_the_networks_own_is_an_error() -> None:
    with pytest.raises(ValueError, match=rf"min_resolution_px=25.*{SIZE}x{SIZE}; choose at most {SIZE}"):
        run(make_pixels(2), AugmentationConfig(min_resolution_px=SIZE + 1))


# Whole batches


@pytest.mark.parametrize("auto", ["none", "randaugment", "trivialaugment"])
def test_a_batch_is_augmented_as_each_of_its_images_alone(auto: Any) -> None:
    pixels, augmentation = make_pixels(40), AugmentationConfig(auto_augment=auto, **EVERYTHING)
    sizes = np.random.default_rng(0).integers(20, 60, (40, 2))
    together = run(pixels, augmentation, sizes=sizes, epoch=3)
    for i in range(40):
        alone = run(pixels[i : i + 1], augmentation, sizes=sizes[i : i + 1], indices=np.array([i]), epoch=3)
        # To the bit: no sum runs over the batch, and sums over an image are float64 before they are rounded.
        assert torch.equal(alone[0], together[i]), i


def test_epochs_and_seeds_vary_an_image_and_repeat_it() -> None:
    pixels, augmentation = make_pixels(4), AugmentationConfig(auto_augment="randaugment", **EVERYTHING)
    views = [run(pixels, augmentation, seed=seed, epoch=epoch) for seed in range(2) for epoch in range(2)]
    for i, view in enumerate(views):
        assert all(not torch.equal(view, other) for other in views[:i])
    assert torch.equal(run(pixels, augmentation, seed=1, epoch=1), views[3])


@pytest.mark.parametrize("auto", ["none", "randaugment", "trivialaugment"])
def test_images_stay_within_gray_levels_and_inputs_as_they_were(auto: Any) -> None:
    pixels = make_pixels(120, 16)
    before = pixels.clone()
    images = run(pixels, AugmentationConfig(auto_augment=auto, color_jitter=1.0, random_erasing=0.3))
    assert images.min() >= 0
    assert images.max() <= 255
    assert torch.equal(pixels, before)


def test_an_even_image_stays_even_under_auto_augmentation() -> None:
    # Sampling leaves 1e-5 of unevenness, which autocontrast, say, would stretch to 255 if it were not rounded away.
    pixels = torch.full((200, 16, 16, 3), 128, dtype=torch.uint8)
    images = run(pixels, AugmentationConfig(auto_augment="randaugment"))
    assert (images.amax((2, 3)) - images.amin((2, 3))).max() < 1e-3


# Policies


def apply_map(images: Tensor, operations: list[str], strengths: list[float]) -> Tensor:
    """Images under `map_geometry`, sampled here with zeros beyond the edges, as torchvision does."""
    height, width = images.shape[2:]
    numbers = np.array([[OPERATIONS.index(name) for name in operations]])
    (matrix,) = map_geometry(numbers, np.array([strengths]), height, width)
    scale = np.diag([2 / width, 2 / height, 1])
    theta = torch.from_numpy(scale @ matrix @ np.linalg.inv(scale))[None, :2].float()
    # affine_grid takes -1..1, edge to edge, on both sides.
    grid = torch.nn.functional.affine_grid(theta, [1, 3, height, width], align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def affine(images: Tensor, name: str, strength: float) -> Tensor:
    """torchvision's, called as its policies call it."""
    if name == "rotate":
        return tv.rotate(images, strength, interpolation=InterpolationMode.BILINEAR)
    move = {"translate_x": [strength, 0], "translate_y": [0, strength]}.get(name, [0, 0])
    degrees = float(np.degrees(np.arctan(strength)))
    shear = {"shear_x": [degrees, 0.0], "shear_y": [0.0, degrees]}.get(name, [0.0, 0.0])
    return tv.affine(images, 0.0, move, 1.0, shear, interpolation=InterpolationMode.BILINEAR,
                     center=[0, 0] if "shear" in name else None)  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", GEOMETRIC_OPERATIONS)
def test_geometric_operations_are_those_of_torchvision(name: str, sign: int) -> None:
    images = to_images(make_pictures(30, 20))
    strength = sign * {"rotate": 25.0, "translate_x": 4.0, "translate_y": 3.0}.get(name, 0.3)
    ours, theirs = apply_map(images, [name], [strength]), affine(images, name, strength)
    assert (theirs - images).abs().max() > 20
    inside = affine(torch.ones_like(images), name, strength) > 0.999  # at edges, roundings of float32 decide more
    torch.testing.assert_close(ours[inside], theirs[inside], atol=SAMPLING, rtol=0)


def test_two_geometric_operations_are_done_one_after_the_other() -> None:
    images = to_images(make_pictures(48, 48))
    ours = apply_map(images, ["rotate", "translate_x"], [20.0, 6.0])
    theirs = affine(affine(images, "rotate", 20.0), "translate_x", 6.0)
    inside = affine(affine(torch.ones_like(images), "rotate", 20.0), "translate_x", 6.0) > 0.999
    torch.testing.assert_close(ours[inside], theirs[inside], atol=SAMPLING, rtol=0)
    swapped = apply_map(images, ["translate_x", "rotate"], [6.0, 20.0])
    assert (swapped - ours)[inside].abs().max() > 5


AS_TORCHVISION: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "brightness": (tv.adjust_brightness, (0.1, 1.0, 1.9)),
    "saturation": (tv.adjust_saturation, (0.1, 1.0, 1.9)),
    "contrast": (tv.adjust_contrast, (0.1, 1.0, 1.9)),
    "sharpness": (tv.adjust_sharpness, (0.1, 1.0, 1.9)),
    "posterize": (tv.posterize, (2, 4, 7)),
    "solarize": (tv.solarize, (0.0, 127.5, 200.0)),
    "autocontrast": (lambda images, _: tv.autocontrast(images), (0.0, 0.0, 0.0)),
    "equalize": (lambda images, _: tv.equalize(images), (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", COLOR_OPERATIONS)
def test_color_operations_are_those_of_torchvision_at_each_images_own_strength(name: str) -> None:
    # Of less than the full range, so that autocontrast has something to do.
    whole = to_images(make_pixels(3, 48)).div(2).add(40).round()
    reference, strengths = AS_TORCHVISION[name]
    ours = apply_color(whole.clone(), name, torch.tensor(strengths))
    assert (ours - whole).abs().max() > 10
    for image, ours_one, strength in zip(whole, ours, strengths, strict=True):
        if name in ("posterize", "solarize", "equalize"):  # whole numbers: equal
            assert torch.equal(ours_one, reference(image.to(torch.uint8), strength).float())
        else:  # on floats, which torchvision wants within 0..1; 1e-3 is 16 roundings of float32 at 255
            torch.testing.assert_close(ours_one, reference(image / 255, strength) * 255, atol=1e-3, rtol=0)


def test_a_channel_of_one_value_is_left_by_autocontrast() -> None:
    images = to_images(make_pixels(1))
    images[:, 1] = 77.0
    stretched = apply_color(images.clone(), "autocontrast", torch.zeros(1))
    assert torch.equal(stretched[:, 1], images[:, 1])


@pytest.mark.parametrize("auto", ["randaugment", "trivialaugment"])
def test_every_operation_is_drawn_and_changes_the_image(auto: Any) -> None:
    augmentation = AugmentationConfig(auto_augment=auto, randaugment_magnitude=15, **PLAIN)
    count = 2000 if auto == "randaugment" else 300
    operations, strengths = draw_operations(draw(count), augmentation, SIZE, SIZE)
    shares = np.bincount(operations.ravel(), minlength=len(OPERATIONS)) / operations.size
    assert np.abs(shares - 1 / len(OPERATIONS)).max() < 5 * (1 / 14 / operations.size) ** 0.5  # five standard errors
    pixels = (make_pictures(SIZE, SIZE) // 2 + 60).repeat(count, 1, 1, 1)
    change = (run(pixels, augmentation) - to_images(pixels)).abs().amax((1, 2, 3)).numpy()
    # Pictures that drew it once and nothing else, at a strength that does something.
    neutral = {"posterize": 8.0, "solarize": 255.0} | dict.fromkeys(COLOR_OPERATIONS[:4], 1.0)
    neutral |= dict.fromkeys(GEOMETRIC_OPERATIONS, 0.0)
    assert change[(operations == OPERATIONS.index("identity")).all(1)].max() < SAMPLING
    for number, name in enumerate(OPERATIONS[1:], 1):
        acts = (operations == number) & (strengths != neutral.get(name))
        is_rest_identity = ((operations == number) | (operations == OPERATIONS.index("identity"))).all(1)
        drew = (acts.sum(1) == 1) & ((operations == number).sum(1) == 1) & is_rest_identity
        assert drew.any(), name
        # A weak solarize may find no pixel to change.
        assert (change[drew].max() if name == "solarize" else change[drew].min()) > SAMPLING, name


def test_randaugment_strengths_are_its_magnitudes() -> None:
    operations, strengths = draw_operations(
        draw(3000), AugmentationConfig(auto_augment="randaugment", randaugment_magnitude=9), 100, 200
    )
    third = 9 / 30
    expected = {
        "shear_x": {0.3 * third}, "shear_y": {0.3 * third}, "rotate": {30 * third},
        "translate_x": {150 / 331 * 200 * third}, "translate_y": {150 / 331 * 100 * third},
        **{name: {0.9 * third} for name in COLOR_OPERATIONS[:4]},
    }  # fmt: skip
    for number, name in enumerate(OPERATIONS):
        drawn = strengths[operations == number] - (name in COLOR_OPERATIONS[:4])
        if name in expected:
            np.testing.assert_allclose(np.unique(np.abs(drawn).round(6)), sorted(expected[name]), atol=1e-6)
            assert 0.35 < (drawn > 0).mean() < 0.65, f"{name} goes to both sides"
        else:
            assert set(drawn) == {"posterize": {7.0}, "solarize": {255 * (1 - third)}}.get(name, {0.0})


def test_trivialaugment_strengths_span_torchvisions_ranges() -> None:
    operations, strengths = draw_operations(draw(9000), AugmentationConfig(auto_augment="trivialaugment"), 100, 200)
    spans = {
        "shear_x": (-0.99, 0.99), "translate_y": (-32, 32), "rotate": (-135, 135), "contrast": (0.01, 1.99),
        "posterize": (2, 8), "solarize": (0, 255),
    }  # fmt: skip
    for name, span in spans.items():
        drawn = strengths[operations == OPERATIONS.index(name)]
        np.testing.assert_allclose([drawn.min(), drawn.max()], span, atol=1e-9)


def test_color_jitter_stays_within_its_factors() -> None:
    pixels = torch.full((300, 4, 4, 3), 100, dtype=torch.uint8)  # uniform gray: brightness alone can change it
    images = run(pixels, AugmentationConfig(**(PLAIN | {"color_jitter": 0.3})))
    assert images.min() >= 70 - SAMPLING
    assert images.max() <= 130 + SAMPLING
    assert images.min() < 72
    assert images.max() > 128


def test_erased_boxes_have_the_rate_the_area_and_the_images_mean_color() -> None:
    pixels = make_pixels(500, 20)
    plain, images = (
        run(pixels, AugmentationConfig(**PLAIN)),
        run(pixels, AugmentationConfig(random_erasing=0.4, **PLAIN)),
    )
    is_changed = (plain != images).any(1)  # (B, H, W)
    share = is_changed.float().mean((1, 2))
    assert (share > 0).float().mean().item() == pytest.approx(0.4, abs=0.09)  # four standard errors
    # A box's edges may gain or lose half a pixel a side, of at most 20.
    assert share.max() <= ERASED_SHARE[1] + 0.1
    assert share.max() > 0.25
    for i in share.nonzero()[:, 0].tolist():
        rows, columns = is_changed[i].any(1).nonzero(), is_changed[i].any(0).nonzero()
        box = images[i, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        mean = plain[i].mean((1, 2))[:, None, None]
        torch.testing.assert_close(box, mean.expand_as(box), atol=1e-3, rtol=0)


# Mixing


def make_targets(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 16, 20) of value i, and as targets the i-th unit vector: both tell who is in a mixture."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 20)
    return images.contiguous(memory_format=torch.channels_last), torch.eye(count)


def run_mix(augmentation: AugmentationConfig, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    images, targets = make_targets(count)
    mixed, soft = mix(images, targets, draw_uniform(0, 0, np.arange(count)), augmentation)
    assert torch.equal(images, make_targets(count)[0])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    return images, mixed, soft


def test_mixup_weighs_images_and_targets_alike() -> None:
    _, mixed, soft = run_mix(AugmentationConfig(mixup=0.4))
    own = soft.diagonal()
    # The image's value is its targets' mean index; float32 of values up to 200.
    torch.testing.assert_close(
        mixed, (soft @ torch.arange(200.0)).view(-1, 1, 1, 1).expand_as(mixed), atol=1e-3, rtol=0
    )
    assert own.mean().item() == pytest.approx(0.5, abs=0.12)
    # Beta(a, a) has the variance 1 / (8 a + 4); 0.139 here, against 0.083 of uniform weights.
    assert own.var().item() == pytest.approx(1 / (8 * 0.4 + 4), abs=0.025)


def test_cutmix_targets_are_the_area_pasted() -> None:
    images, mixed, soft = run_mix(AugmentationConfig(cutmix=1.0))
    is_own = (mixed == images).all(1)  # (B, H, W)
    assert torch.equal(is_own | (mixed == images.flip(0)).all(1), torch.ones_like(is_own))
    torch.testing.assert_close(soft.diagonal(), is_own.float().mean((1, 2)), atol=1e-6, rtol=0)
    for pasted in ~is_own:  # one box each
        assert int(pasted.sum()) == int(pasted.any(0).sum()) * int(pasted.any(1).sum())
    # Uniform weights of mean 1/2 (alpha 1), made larger by boxes that edges cut.
    assert 0.5 < soft.diagonal().mean() < 0.75


def test_mixup_and_cutmix_share_the_images_evenly() -> None:
    images, mixed, _ = run_mix(AugmentationConfig(mixup=1.0, cutmix=1.0), 400)
    is_cut = ((mixed == images) | (mixed == images.flip(0))).flatten(1).all(1)
    assert is_cut.float().mean().item() == pytest.approx(0.5, abs=0.1)  # four standard errors


def test_without_mixing_inputs_come_back() -> None:
    images, targets = make_targets(4)
    augmentation = AugmentationConfig(**EVERYTHING)
    mixed, soft = mix(images, targets, draw_uniform(0, 0, np.arange(4)), augmentation)
    assert not augmentation.is_mixing
    assert mixed is images
    assert soft is targets


# Mistakes


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("crop_scale", 0.0), ("crop_scale", 1.1), ("crop_scale", float("nan")), ("crop_ratio", 0.75), ("hflip", -0.1),
        ("hflip", 2), ("color_jitter", 1.5), ("auto_augment", "autoaugment"),
        ("randaugment_magnitude", 31), ("randaugment_magnitude", 2.5), ("random_erasing", 1.5),
        ("min_resolution_px", -1), ("min_resolution_px", 8.5), ("mixup", -1.0), ("cutmix", float("inf")),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_an_error_that_names_it(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{setting}={value!r}.*choose"):
        AugmentationConfig(**{setting: value})


@pytest.mark.parametrize("wrong", [{"sizes": np.ones((3, 2))}, {"indices": np.arange(5)}, {"sizes": np.zeros((2, 2))}])
def test_inputs_that_do_not_belong_together_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give pixels uint8"):
        run(make_pixels(2), AugmentationConfig(), **wrong)
    with pytest.raises(ValueError, match="give pixels uint8"):
        run(make_pixels(2).float(), AugmentationConfig())
