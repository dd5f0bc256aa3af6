"""The image preprocessing of a checkpoint. Training, the cache, the saved model and inference share it.

The checkpoint's own timm transform or transformers image processor computes the pixels, so the pixels equal the output of
plain `AutoImageProcessor`, whatever the order of its steps:

- Most processors resize and crop 8-bit images, and then rescale and normalize. For these, the processor only resizes and
  crops, pixels are stored as uint8, and `Colors` rescales and normalizes the pixels on the device.
- Other processors (DINOv3 rescales before it resizes, SAM pads after it normalizes) run as a whole, once per image. Their
  output is stored as float32. If their colors follow `Colors` too, augmented training images are normalized by `Colors`.
- If a processor changes colors in another way, its network cannot train on augmented images.

`load_preprocessing` decides between the three cases by comparing outputs on images of six sizes.

`Preprocessing.fast` is a faster approximation, and `Preprocessing.on_device` is for batches. A saved model uses neither.
"""

import copy
import hashlib
import importlib.metadata
import inspect
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Resize

from hf_transfer.capability import jpeg_device
from hf_transfer.config import Decoder
from hf_transfer.costs import DecodeCounts
from hf_transfer.logs import log_once
from hf_transfer.network import resizing
from hf_transfer.network.ragged import resize_together
from hf_transfer.network.timm_processor import find_timm_processor
from hf_transfer.network.vision_config import find_vision_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

SETTINGS_FILE = "preprocessor_config.json"
SIZE_SETTINGS = ("size", "crop_size", "pad_size")  # of transformers' processors
PARITY = 1e-5  # largest allowed difference from the checkpoint's processor, in normalized pixels (within +-3)
MAX_CHANGE = 0.05  # largest mean change of pixels by reducing the image first, relative to their standard deviation
COLOR_PARITY = 1e-4  # the same for the colors of images of one color, which only augmented images depend on
SAMPLE_SIZES_PX = ((149, 113), (96, 64), (64, 64), (200, 50), (40, 160), (31, 47))  # width and height
SAMPLE_COLORS = ((0, 0, 0), (255, 255, 255), (200, 30, 90))
DEFAULT_CROP_PCT = 0.875  # of processors that do not state it
LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # the weights of Pillow's convert("L")

# A processor raises such an error for an image that the processor cannot take.
_PROCESSOR_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)

PixelType = Literal["uint8", "float32"]
Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Colors:
    """The color steps of preprocessing, in this order: from values 0..255 (gray or RGB) to the network's input."""

    is_bgr: bool = False  # whether the network takes the channels in the order blue, green, red
    rescale: float  # factor by which the values are multiplied first
    offset: float = 0.0  # added after rescaling
    mean: tuple[float, ...]  # one value per channel; subtracted
    std: tuple[float, ...]  # one value per channel; divides
    second_std: tuple[float, ...] | None = None  # divides once more (EfficientNet's `include_top`)

    def constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns the means and divisors (1, C, 1, 1) on `device`, where they are copied once."""
        values = (self.mean, self.std, *([] if self.second_std is None else [self.second_std]))
        return tuple(_place_channels(value, device) for value in values)

    def apply(self, images: torch.Tensor, constants: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Normalizes float32 images (B, C, H, W) with values from 0 to 255, in place where possible.

        `constants`: those of the images' device. A compiled function must be given them, or it would copy them in every call.
        """
        mean, std, *second = self.constants(images.device) if constants is None else constants
        if self.is_bgr:
            images = images.flip(1)
        # Divides as torchvision's ToTensor does, since x / 255 differs from x * (1 / 255) in the last bit.
        images = images.div_(255.0) if self.rescale == 1 / 255 else images.mul_(self.rescale)
        if self.offset:
            images = images.add_(self.offset)
        images = images.sub_(mean).div_(std)
        return images.div_(second[0]) if second else images

    def reverse(self) -> "Colors":
        """Returns the steps whose results have the opposite order of channels."""
        mean, std = self.mean[::-1], self.std[::-1]
        return replace(
            self, is_bgr=not self.is_bgr, mean=mean, std=std, second_std=self.second_std and self.second_std[::-1]
        )

    def describe(self) -> str:
        """Returns the steps as text, for example `RGB / 255, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)`."""
        order = "gray" if len(self.mean) == 1 else "BGR" if self.is_bgr else "RGB"
        scale = "" if self.rescale == 1 else " / 255" if self.rescale == 1 / 255 else f" * {self.rescale:.4g}"
        offset = f" - {-self.offset:g}" if self.offset < 0 else f" + {self.offset:g}" if self.offset else ""
        second = "" if self.second_std is None else f", divided by {_format(self.second_std)}"
        is_plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        normalization = "" if is_plain else f", mean {_format(self.mean)}, std {_format(self.std)}"
        return f"{order}{scale}{offset}{normalization}{second}"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The two steps of preprocessing: image -> pixels (H, W, C), and pixels -> normalized floats (B, C, H, W)."""

    height_px: int
    width_px: int
    channels: int = 3  # 1 for a network of gray images
    interpolation: str
    crop_pct: float | None
    colors: Colors | None  # None: the processor changes colors in another way, so augmented images cannot be normalized
    pixel_type: PixelType = "uint8"  # float32 pixels are normalized already
    spec: Mapping[str, Any]  # everything that determines the pixels, as JSON values for cache keys
    processor: Any = field(repr=False)  # the checkpoint's image processor, which is saved beside the weights
    resize: Callable[[Image.Image], Pixels] = field(repr=False)  # takes an RGB image or, for one channel, a gray image
    native_resize: Callable[[Image.Image], Pixels] | None = field(default=None, repr=False)  # by torch, if possible
    least_px: int | None = None  # images may be reduced to sides of at least this many pixels; None: not reduced
    decode_device: torch.device | None = None  # where JPEGs are decoded and resized together; None: one by one
    decoded: DecodeCounts | None = field(default=None, repr=False, compare=False)  # counts images of `decode_device`

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image as the network's input."""
        return self.channels, self.height_px, self.width_px

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of the pixels of one image."""
        return self.height_px, self.width_px, self.channels

    def pixels(self, image: Image.Image) -> Pixels:
        """Returns an RGB image as pixels (H, W, C) of type `pixel_type`, resized and cropped as for evaluation."""
        return self.resize(image if self.channels == 3 else image.convert("L"))

    def pixels_together(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns decoded images (H, W, channels) uint8 of any sizes as pixels (B, height, width, channels), on their device.

        On a device with float64 they equal `pixels` to the bit.

        Raises:
            ValueError: the preprocessing does more than resize with a bilinear or bicubic filter and crop the center.
        """
        if not isinstance(self.native_resize, partial):
            raise ValueError(
                f"{type(self.processor).__name__} does not only resize and crop: decode the images one by one"
            )
        steps = self.native_resize.keywords
        resized = [_find_size(image.shape[0], image.shape[1], steps["sizes"]) for image in images]
        return resize_together(images, resized, steps["crop"], steps["kernel"])

    def decoded_by(self, decoder: Decoder, device: torch.device, counts: DecodeCounts | None = None) -> "Preprocessing":
        """Returns this preprocessing as `decoder` computes it. `device`: of the network; `counts`: counts decoded images."""
        if decoder == "device":
            return self.on_device(device, counts)
        return self.fast if decoder == "fast" else self

    @property
    def resizes_together(self) -> bool:
        """Whether `pixels_together` can compute the pixels of RGB images."""
        return isinstance(self.native_resize, partial) and self.channels == 3

    def on_device(self, device: torch.device, counts: DecodeCounts | None = None) -> "Preprocessing":
        """Returns this preprocessing for images that are decoded and resized together, on a GPU of CUDA or else on the CPU.

        nvJPEG interpolates colors in another way than the decoder of the CPU, so cache keys differ. Preprocessing that does
        more than resize and crop RGB images stays as it is.
        """
        if not self.resizes_together:
            return self
        device = jpeg_device(device)
        version = f"device {device.type}, torchvision {importlib.metadata.version('torchvision')}"
        return replace(self, decode_device=device, decoded=counts, spec={**self.spec, "decoder": version})

    @cached_property
    def fast(self) -> "Preprocessing":
        """This preprocessing with torch's kernels, and with large JPEGs decoded at a fraction of their size, where possible.

        Its pixels differ a little from the pixels of the checkpoint's processor, so its cache keys differ too.
        """
        resize = self.native_resize or self.resize
        least_px = None
        if self.native_resize is not None or _ignores_scale(self):
            resized_px = max(self.height_px, self.width_px) / (self.crop_pct or DEFAULT_CROP_PCT)
            least_px = int(np.ceil(resizing.REDUCING_GAP * resized_px))
        version = f"fast {resizing.KERNELS_VERSION}"
        return replace(self, resize=resize, least_px=least_px, spec={**self.spec, "decoder": version})

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns pixels (B, H, W, C) as normalized float32 (B, C, H, W), in channels-last memory on the same device."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        if self.pixel_type == "float32":
            return images
        assert self.colors is not None
        return self.colors.apply(images)

    def constants(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns the constants of `normalize_augmented` on `device`. Raises ValueError if `colors` is None."""
        if self.colors is None:
            raise ValueError(f"{type(self.processor).__name__} cannot normalize augmented images")
        return *self.colors.constants(device), _place_channels(LUMINANCE, device)

    def normalize_augmented(
        self, images: torch.Tensor, constants: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Normalizes augmented RGB images (B, 3, H, W) float32 with values from 0 to 255, in place where possible.

        A network of gray images gets their luminance. `constants`: see `Colors.apply`. Raises ValueError if `colors` is None.
        """
        *own, luminance = self.constants(images.device) if constants is None else constants
        assert self.colors is not None
        if self.channels == 1:
            images = images.mul_(luminance).sum(1, keepdim=True)
        return self.colors.apply(images, own)

    def describe(self) -> str:
        """Returns the steps as one line of text."""
        size = f"{self.height_px}x{self.width_px} pixels, {self.interpolation}"
        crop = f", crop {self.crop_pct:g}" if self.crop_pct else ""
        whole = f"; float32 pixels from {type(self.processor).__name__}" if self.pixel_type == "float32" else ""
        colors = "no augmentation, since its color steps are unknown" if self.colors is None else self.colors.describe()
        return f"{size}{crop}{whole}; {colors}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides warnings and progress bars of transformers in the `with` block, since this package checks the weights itself."""
    import transformers  # imported here because the import takes about a second, and timm checkpoints do not need it

    before, shows_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if shows_bars:
            transformers.logging.enable_progress_bar()


def load_preprocessing(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    preprocessing_from: Path | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Preprocessing:
    """Loads the preprocessing of the checkpoint in `folder` (Hub layout).

    `preprocessing_from`: another checkpoint's folder, or a preprocessor_config.json, whose preprocessing is used instead.
    `model_args`: arguments that replace those in config.json, and may change the number of channels. Raises ValueError if
    there is no preprocessing, if its output depends on the size of the image, or if the network takes neither RGB nor gray
    images.
    """
    config = json.loads((folder / "config.json").read_text())
    channels = _read_channels(_replace_arguments(config, model_args or {}))
    if channels not in (1, 3):
        raise ValueError(
            f"{folder.name} takes images of {channels} channels: images here have 3 channels (RGB) or 1 channel (gray); "
            "choose a checkpoint for such images"
        )
    processor = _load_processor(folder, preprocessing_from, trust_remote_code)
    is_timm = hasattr(processor, "val_transforms")
    if preprocessing_from is not None and is_timm != ("architecture" in config):
        library = "timm" if "architecture" in config else "transformers"
        raise ValueError(
            f"preprocessing_from={preprocessing_from.name}: {folder.name} is a {library} checkpoint, which is saved with the "
            f"preprocessing of {library} only; choose the preprocessing of a {library} checkpoint"
        )
    if channels == 1:
        processor = _make_gray(processor, folder.name)
    return _from_timm(processor) if is_timm else _from_transformers(processor, channels)


def resize_preprocessing(preprocessing: Preprocessing, image_size_px: int) -> Preprocessing:
    """Returns the preprocessing with output images of `image_size_px` squared, and the same share of each image cropped.

    Raises ValueError if the processor's output does not follow its settings of sizes.
    """
    height, width, processor = preprocessing.height_px, preprocessing.width_px, preprocessing.processor
    if hasattr(processor, "val_transforms"):
        size = (preprocessing.channels, image_size_px, image_size_px)
        config = {**processor.data_config, "input_size": size}
        return _from_timm(type(processor)(pretrained_cfg=config, architecture=processor.architecture))
    processor = copy.deepcopy(processor)
    rows, columns = image_size_px / height, image_size_px / width
    factors = {"height": rows, "max_height": rows, "width": columns, "max_width": columns}
    factors |= {"shortest_edge": max(rows, columns), "longest_edge": min(rows, columns)}
    for name in SIZE_SETTINGS:
        sizes = getattr(processor, name, None)
        if sizes is not None:
            setattr(processor, name, type(sizes)(**{k: round(v * factors.get(k, 1)) for k, v in dict(sizes).items()}))
    resized = _from_transformers(processor, preprocessing.channels)
    if (resized.height_px, resized.width_px) != (image_size_px, image_size_px):
        raise ValueError(
            f"image_size_px={image_size_px}: {type(processor).__name__} then gives images of {resized.width_px}x"
            f"{resized.height_px} pixels; omit image_size_px, or choose other preprocessing (--preprocessing_from)"
        )
    if preprocessing.crop_pct and not resized.crop_pct:
        log_once(
            log,
            f"image_size_px={image_size_px}: {type(processor).__name__} squashes whole images to a square at this size, and "
            f"crops their center at {width}x{height} pixels: ConvNeXt's processor does not crop from 384 pixels on",
        )
    return resized


def preprocessing_of_config(config: "PreTrainedConfig", name: str) -> Preprocessing:
    """Returns the preprocessing that `load_preprocessing` would load from a folder that contains only the config `config`."""
    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent:
        config.save_pretrained(Path(parent, name))
        return load_preprocessing(Path(parent, name))


def _load_processor(folder: Path, preprocessing_from: Path | None, trust_remote_code: bool) -> Any:
    origin = preprocessing_from or folder
    try:
        return find_timm_processor(origin) or _load_from_transformers(origin, trust_remote_code)
    except (OSError, ImportError, *_PROCESSOR_ERRORS) as error:
        raise ValueError(
            f"{origin.name} names no image preprocessing that transformers can read ({_first_line(error)}). Remedy: "
            "--preprocessing_from ID_OR_FILE, with a Hub id, folder or preprocessor_config.json of a checkpoint that was "
            "trained with the same preprocessing"
        ) from error


def _load_from_transformers(origin: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory(prefix="hf_transfer-") as parent, quiet_transformers():
        settings = _read_settings(origin)
        path = origin if settings is None else Path(parent)
        if settings is not None:
            Path(parent, SETTINGS_FILE).write_text(json.dumps(settings))
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)


def _read_settings(origin: Path) -> dict[str, Any] | None:
    """Returns the processor's settings if `origin` is a file, or a folder in which AutoImageProcessor does not find them."""
    if origin.is_dir():
        nested = origin / "processor_config.json"  # AutoImageProcessor reads only its key `image_processor`
        if (origin / SETTINGS_FILE).is_file() or not nested.is_file():
            return None
        origin = nested
    content: dict[str, Any] = json.loads(origin.read_text())
    settings = content.get("image_processor") or content.get("feature_extractor") or content
    return settings if "image_processor_type" in settings or origin.name == SETTINGS_FILE else None


def _replace_arguments(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a config.json with the setting model_args: arguments of timm, or fields of transformers."""
    if "architecture" in config:
        return {**config, "model_args": {**(config.get("model_args") or {}), **given}}
    nested = {
        name: _replace_arguments(config[name], value)
        for name, value in given.items()
        if isinstance(value, dict) and isinstance(config.get(name), dict)
    }
    return {**config, **given, **nested}


def _read_channels(config: Mapping[str, Any]) -> int:
    """Returns the number of channels that the network of a config.json takes; 3 if the config does not say."""
    body = config.get("body") or {}  # of a greedy stack
    stated = (
        (config.get("model_args") or body.get("model_args") or {}).get("in_chans"),
        config.get("num_channels"),
        *(inner.get("num_channels") for inner in find_vision_configs(config)),
        ((config.get("pretrained_cfg") or {}).get("input_size") or [None])[0],
    )
    return next((int(number) for number in stated if number is not None), 3)


def _make_gray(processor: Any, name: str) -> Any:
    """Returns a processor of gray images, which has one mean and one standard deviation: the averages of `processor`'s."""
    is_timm = hasattr(processor, "val_transforms")
    config = processor.data_config if is_timm else vars(processor)
    fields = ("mean", "std") if is_timm else ("image_mean", "image_std")
    averages = {f: [float(np.mean(values))] for f in fields if (values := config.get(f)) is not None}
    if any(len(np.atleast_1d(config[f])) > 1 for f in averages):
        log.info("%s takes gray images: its preprocessing uses the average of its means and standard deviations", name)
    if is_timm:
        gray = {**config, "input_size": (1, *config["input_size"][1:]), **{f: tuple(v) for f, v in averages.items()}}
        return type(processor)(pretrained_cfg=gray, architecture=processor.architecture)
    for key, value in averages.items():
        setattr(processor, key, value)
    if getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False
    return processor


def _from_timm(processor: Any) -> Preprocessing:
    config = processor.data_config
    *geometry, to_tensor, normalize = processor.val_transforms.transforms
    if not (hasattr(normalize, "mean") and "ToTensor" in type(to_tensor).__name__):
        raise ValueError(f"the checkpoint's transform must end with ToTensor and Normalize: {processor.val_transforms}")

    def resize(image: Image.Image) -> Pixels:
        for transform in geometry:
            image = transform(image)
        return np.atleast_3d(np.asarray(image))

    channels, height, width = config["input_size"]
    preprocessing = Preprocessing(
        height_px=height,
        width_px=width,
        channels=channels,
        interpolation=str(config["interpolation"]),
        crop_pct=config["crop_pct"],
        colors=Colors(
            rescale=1 / 255, mean=_per_channel(config["mean"], channels), std=_per_channel(config["std"], channels)
        ),
        spec={"library": "timm", "version": timm.__version__, **{k: str(v) for k, v in config.items()}},
        processor=processor,
        resize=resize,
        native_resize=_find_native(geometry),
    )
    return _fit(preprocessing, _run_on_samples(processor, channels))


def _find_native(geometry: Sequence[Any]) -> Callable[[Image.Image], Pixels] | None:
    """Returns a function that computes the transforms `geometry` with torch's kernels, or None for other transforms."""
    if [type(transform) for transform in geometry] != [Resize, CenterCrop]:
        return None
    resize, crop = geometry
    kernel, sizes = resize.interpolation.value, np.atleast_1d(resize.size)
    if kernel not in ("bilinear", "bicubic") or resize.max_size is not None or min(sizes) < max(crop.size):
        return None
    return partial(_resize_and_crop, sizes=tuple(sizes.tolist()), crop=tuple(crop.size), kernel=kernel)


def _resize_and_crop(
    image: Image.Image, *, sizes: tuple[int, ...], crop: tuple[int, int], kernel: resizing.Filter
) -> NDArray[np.uint8]:
    """Returns the center (H, W, C) of the resized image. `sizes`: height and width, or the shorter side alone, in pixels."""
    resized = _find_size(image.height, image.width, sizes)
    top, left = (round((resized[i] - crop[i]) / 2) for i in range(2))
    pixels = resizing.resize(image, resized[0], resized[1], kernel)
    return np.ascontiguousarray(pixels[top : top + crop[0], left : left + crop[1]])


def _find_size(height_px: int, width_px: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Returns the height and width of a resized image. `sizes`: both, or the shorter side alone, in pixels."""
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    shorter = min(height_px, width_px)
    return int(sizes[0] * height_px / shorter), int(sizes[0] * width_px / shorter)


def _from_transformers(processor: Any, channels: int) -> Preprocessing:
    outputs = _run_on_samples(processor, channels)
    spec = {k: v for k, v in processor.to_dict().items() if not k.startswith("_")}
    resample = Image.Resampling(getattr(processor, "resample", None) or Image.Resampling.BILINEAR)
    colors = _read_colors(processor, channels)
    crop_pct = getattr(processor, "crop_pct", None)
    preprocessing = Preprocessing(
        height_px=outputs[0].shape[1],
        width_px=outputs[0].shape[2],
        channels=channels,
        interpolation=resample.name.lower(),
        crop_pct=crop_pct if crop_pct and _crops(processor, channels) else None,
        colors=colors,
        spec={
            "library": "transformers",
            "class": type(processor).__name__,
            **_jsonable(spec),
            **_identify_code(processor),
            **({"channels": channels} if channels != 3 else {}),
            **({"pixels": "RGB"} if colors and colors.is_bgr else {}),  # not yet flipped
        },
        processor=processor,
        resize=partial(_resize_only, processor),
    )
    return _fit(preprocessing, outputs)


def _crops(processor: Any, channels: int) -> bool:
    """Whether the processor leaves out both ends of an image that is twice as wide as high."""
    dark = Image.new("RGB" if channels == 3 else "L", (64, 32))
    ends = dark.copy()
    for left in (0, 56):
        ends.paste(Image.new(dark.mode, (8, 32), "white"), (left, 0))
    plain, marked = (_run_checked(processor, image, channels) for image in (dark, ends))
    return torch.equal(plain, marked)


def _fit(preprocessing: Preprocessing, outputs: Sequence[torch.Tensor]) -> Preprocessing:
    """Returns the preprocessing, changed to run the processor as a whole if its steps do not compute the `outputs`."""
    if preprocessing.colors is not None and _measure_difference(preprocessing, outputs) <= PARITY:
        return preprocessing
    processor, colors = preprocessing.processor, preprocessing.colors
    # PP-LCNet reverses the channels, and no setting names this step.
    candidates = [] if colors is None else [colors, colors.reverse()]
    return replace(
        preprocessing,
        pixel_type="float32",
        native_resize=None,
        colors=next((c for c in candidates if _has_colors(processor, c)), None),
        spec={**preprocessing.spec, "pixels": "float32", "version": importlib.metadata.version("transformers")},
        resize=partial(_run_whole, processor),
    )


def _resize_only(processor: Any, image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels (H, W, C) of `image` after the processor's steps except its color steps."""
    color_steps = ("do_rescale", "do_normalize", "do_flip_channel_order", "include_top", "rescale_offset")
    always = ("do_rescale", "do_normalize")  # a processor may accept these without having the attributes
    off = {name: False for name in color_steps if name in always or hasattr(processor, name)}
    pixels: torch.Tensor = processor(images=image, **off, return_tensors="pt")["pixel_values"][0]
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _run_whole(processor: Any, image: Image.Image) -> NDArray[np.float32]:
    """Returns the processor's output for `image` as normalized pixels (H, W, C)."""
    output: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return output.to(torch.float32).permute(1, 2, 0).contiguous().numpy()


def _run_on_samples(processor: Any, channels: int) -> list[torch.Tensor]:
    """Returns the processor's outputs (C, H, W) for the sample images. Raises ValueError if their shapes differ."""
    name = type(processor).__name__
    outputs = [_run_checked(processor, image, channels) for image in _make_samples(channels)]
    _, height, width = outputs[0].shape
    large = Image.new("RGB" if channels == 3 else "L", (2 * width, height + 1))  # some processors cut it into tiles
    shapes = [tuple(output.shape) for output in (*outputs, _run_checked(processor, large, channels))]
    if len(set(shapes)) > 1:
        (_, height, width), (_, other_height, other_width), *_ = sorted(set(shapes))
        raise ValueError(
            f"{name} gives inputs of {len(set(shapes))} sizes for images of {len(shapes)} sizes, such as {width}x{height} and "
            f"{other_width}x{other_height} pixels; choose a checkpoint whose processor has a fixed size"
        )
    return outputs


def _run_checked(processor: Any, image: Image.Image, channels: int) -> torch.Tensor:
    """Returns the processor's output (C, H, W) for `image`. Raises ValueError if the processor does not return one image."""
    name = type(processor).__name__
    try:
        output: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    except (ImportError, *_PROCESSOR_ERRORS) as error:
        raise ValueError(
            f"{name} does not turn an image of {image.width}x{image.height} pixels into pixel_values ({type(error).__name__}: "
            f"{_first_line(error)}); choose a checkpoint that classifies single images"
        ) from error
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 4 or shape[:2] != (1, channels):
        raise ValueError(
            f"{name} turns an image into pixel_values {shape}, not into one image (1, {channels}, H, W), as for packed "
            "patches, tiles or videos; choose a checkpoint with whole images as input"
        )
    return output[0].float()


def _make_samples(channels: int) -> list[Image.Image]:
    """Returns an image of noise for each of SAMPLE_SIZES_PX, RGB or, for one channel, gray."""
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SAMPLE_SIZES_PX]
    return images if channels == 3 else [image.convert("L") for image in images]


def _measure_difference(preprocessing: Preprocessing, outputs: Sequence[torch.Tensor]) -> float:
    """Returns the largest difference between the sample images' normalized pixels and the processor's `outputs`."""
    differences = [0.0]
    for image, output in zip(_make_samples(preprocessing.channels), outputs, strict=True):
        try:
            pixels = preprocessing.resize(image)
        except _PROCESSOR_ERRORS:  # the processor cannot leave its color steps out
            return float("inf")
        if pixels.shape != preprocessing.pixel_shape:
            return float("inf")
        own = preprocessing.normalize(torch.from_numpy(pixels.copy())[None])[0]
        differences.append(float((own - output).abs().max()))
    return max(differences) if all(np.isfinite(differences)) else float("inf")


def _ignores_scale(preprocessing: Preprocessing) -> bool:
    """Whether pixels of a smooth image hardly change if the image is reduced first. They do if a part is cut out unresized."""
    side = 4 * max(preprocessing.height_px, preprocessing.width_px)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    try:
        whole, reduced = (preprocessing.pixels(image).astype(np.float32) for image in (smooth, smooth.reduce(2)))
    except _PROCESSOR_ERRORS:
        return False
    return bool(np.abs(whole - reduced).mean() <= MAX_CHANGE * whole.std())


def _has_colors(processor: Any, colors: Colors) -> bool:
    """Whether the processor maps images of a single color to what `colors` computes, at the center of the image."""
    for color in SAMPLE_COLORS:
        image = Image.new("RGB", (64, 64), color)
        image = image if len(colors.mean) == 3 else image.convert("L")
        values = torch.from_numpy(np.atleast_3d(np.asarray(image))[0, 0].astype(np.float32))
        output = torch.from_numpy(_run_whole(processor, image))
        center = output[output.shape[0] // 2, output.shape[1] // 2]
        if not torch.allclose(center, colors.apply(values.view(1, -1, 1, 1)).flatten(), rtol=0, atol=COLOR_PARITY):
            return False
    return True


def _read_colors(processor: Any, channels: int) -> Colors | None:
    """Returns the color steps that the settings of a transformers processor name, or None if settings are missing."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    normalizes = getattr(processor, "do_normalize", True)
    if normalizes and (mean is None or std is None):
        return None
    rescales = getattr(processor, "do_rescale", True) and hasattr(processor, "rescale_factor")
    return Colors(
        is_bgr=channels == 3 and bool(getattr(processor, "do_flip_channel_order", False)),
        rescale=float(processor.rescale_factor) if rescales else 1.0,
        offset=-1.0 if rescales and getattr(processor, "rescale_offset", False) else 0.0,
        mean=_per_channel(mean if normalizes else 0.0, channels),
        std=_per_channel(std if normalizes else 1.0, channels),
        second_std=_per_channel(std, channels) if getattr(processor, "include_top", False) else None,
    )


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    numbers = [float(v) for v in np.atleast_1d(values)]
    if len(numbers) not in (1, channels):
        raise ValueError(
            f"the checkpoint's preprocessing normalizes {len(numbers)} channels, but its network takes {channels}"
        )
    return tuple(numbers if len(numbers) == channels else numbers * channels)


def _identify_code(processor: Any) -> dict[str, str]:
    """Returns a hash of the processor's code if the code came with the checkpoint, else an empty dict."""
    module = inspect.getmodule(type(processor))
    if module is None or module.__name__.startswith("transformers."):
        return {}
    return {"code": hashlib.sha256(inspect.getsource(module).encode()).hexdigest()}


def _jsonable(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in spec.items()}


@lru_cache(maxsize=64)
def _place_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Returns the values (1, C, 1, 1) on `device`. They are copied there once, because the copy makes the host wait."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _format(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
