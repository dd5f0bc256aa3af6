"""Settings: dataclass fields that serve as flag, YAML key and Python keyword, each with its help text and allowed values.

    @dataclass(frozen=True, kw_only=True)
    class Example(Settings):
        lr: float = flag(2e-4, "peak learning rate", allowed=Range(above=0, highest=1000))

    replace_settings(Example(), {"lr": 0.0})      # ValueError: lr=0.0: choose 0 < lr <= 1000

A value is checked wherever it comes from: when the dataclass is created, and when a flag, a file or a keyword sets the value.
The type annotation gives the type and the words of a choice. This module imports nothing heavy, so `--help` is fast.
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

MAX_LETTERS = 4096  # of a text; the longest path that Linux accepts
_MAX_SHOWN = 120  # letters of a wrong value in an error message
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may have. `lowest` and `highest` are allowed; `above` and `below` are not."""

    lowest: float = -math.inf
    highest: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.lowest <= value <= self.highest and self.above < value < self.below

    def describe(self, name: str) -> str:
        """Returns the range as text: "1 <= name <= 30", "1 or more", or "more than 0"."""
        low = f"{self.lowest} <= " if self.lowest > self.above else f"{self.above} < "
        if self.highest < self.below:
            return f"{low}{name} <= {self.highest}"
        if self.below < math.inf:
            return f"{low}{name} < {self.below}"
        return f"{self.lowest} or more" if self.lowest > self.above else f"more than {self.above}"


def flag(default: Any, help: str, *, name: str | None = None, allowed: Range | None = None) -> Any:  # noqa: A002 - argparse's own word
    """Returns a dataclass field that is a setting. `name` is the name of the flag if it differs from the field's name."""
    return field(default=default, metadata={"help": help, "flag": name, "allowed": allowed})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a config: its name, the nested config that contains it, its value, its type, help and allowed numbers."""

    name: str
    group: str  # name of the nested config that contains the setting; "" for the outermost config
    value: Any
    hint: Any  # type annotation of the field
    help: str
    allowed: Range | None = None  # None: every finite number

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words of a `Literal` setting; () for a setting of another type."""
        return _scalar(self.hint)[0]

    @property
    def kind(self) -> type:
        """The type of the values, or of the elements of a list: bool, int, float or str."""
        return _scalar(self.hint)[1]

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a number may be replaced by, such as "auto"."""
        parts = typing.get_args(self.hint) if typing.get_origin(self.hint) is typing.Union else ()
        return tuple(word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part))

    @property
    def is_list(self) -> bool:
        """Whether a value is a list of different texts."""
        return any(typing.get_origin(hint) is tuple for hint in (self.hint, *typing.get_args(self.hint)))

    @property
    def expected(self) -> str:
        """The allowed values as text, for errors and `--help`."""
        if self.choices:
            return " or ".join(map(repr, self.choices))
        numbers = _KINDS[self.kind] if self.allowed is None else self.allowed.describe(self.name)
        return " or ".join([numbers, *map(repr, self.words)])

    def check(self, value: Any, where: str = "") -> Any:
        """Returns `value`, as a float or a tuple if the setting is one. Raises ValueError if the value is not allowed."""
        if value is None and isinstance(self.hint, types.UnionType):
            return None
        if self.is_list:
            return self._check_list(value, where)
        remedy = self._find_remedy(value)
        if remedy is not None:
            raise ValueError(f"{where}{self.name}={_shorten(value)}: {remedy}")
        return float(value) if self.kind is float else value

    def _check_list(self, values: Any, where: str) -> tuple[Any, ...]:
        is_list = isinstance(values, (list, tuple)) and len(values) > 0
        if not is_list or any(self._find_remedy(value) for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{where}{self.name}={_shorten(values)}: choose a list of one or more different texts")
        return tuple(values)

    def _find_remedy(self, value: Any) -> str | None:
        """Returns the advice that ends the error message about `value`, or None if `value` is allowed."""
        if isinstance(value, str) and value in self.words:
            return None
        kinds: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.kind is bool):
            return f"choose {_KINDS[self.kind]}, {self.expected}" if self.allowed else f"choose {self.expected}"
        if self.choices:
            return None if value in self.choices else f"choose {self.expected}"
        if isinstance(value, str):
            is_text = value.strip() and "\0" not in value and len(value) <= MAX_LETTERS
            return None if is_text else f"give a text of 1 to {MAX_LETTERS} letters, or omit {self.name}"
        if self.allowed is not None:
            return None if value in self.allowed else f"choose {self.expected}"
        return None if math.isfinite(value) else "choose a finite number"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of dataclasses with settings. Creating an instance checks the value of every setting."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is not allowed. A subclass that overrides this method calls it first."""
        for setting in _own_settings(self, ""):
            setting.check(setting.value)


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
    values = {name: setting.value for name, setting in list_settings(config).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changed_settings(config: Any, default: Any) -> dict[str, Any]:
    """Returns the settings of `config` that are missing in `default` or have another value there."""
    before = to_settings(default)
    return {name: value for name, value in to_settings(config).items() if name not in before or value != before[name]}


# What transformers' TrainingArguments and examples, timm's train.py, fastai and peft call these settings.
KNOWN_ELSEWHERE: Mapping[str, str] = {
    "model_name_or_path": "checkpoint", "model_name": "checkpoint", "model": "checkpoint", "initial_checkpoint": "checkpoint",
    "dataset_name": "dataset", "data_dir": "dataset", "train_dir": "dataset", "data": "dataset",
    "image_column_name": "image_column", "label_column_name": "label_column", "image_dir": "image_root",
    "groups": "group_column", "train_val_split": "validation_fraction", "valid_pct": "validation_fraction",
    "val_split": "validation_split",
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "optim": "optimizer", "opt": "optimizer", "sched": "lr_scheduler_type", "schedule": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type", "warmup": "warmup_ratio", "warmup_steps": "warmup_ratio",
    "warmup_epochs": "warmup_ratio", "clip_grad": "max_grad_norm", "clip_norm": "max_grad_norm",
    "accumulate": "gradient_accumulation_steps", "grad_accum_steps": "gradient_accumulation_steps",
    "patience": "early_stopping_patience", "patience_epochs": "early_stopping_patience", "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing", "model_ema": "ema_decay", "model_ema_decay": "ema_decay",
    "metric_for_best_model": "select_by",
    "amp": "precision", "amp_dtype": "precision", "bf16": "precision", "fp16": "precision", "mixed_precision": "precision",
    "dtype": "precision", "torch_dtype": "precision", "workers": "num_workers", "dataloader_num_workers": "num_workers",
    "num_cpu_threads_per_process": "num_threads", "torch_num_threads": "num_threads",
    "torchcompile": "compile", "torch_compile": "compile",
    "grad_checkpointing": "gradient_checkpointing",
    "folds": "cv_folds", "n_folds": "folds", "num_folds": "folds", "k_folds": "folds", "n_splits": "folds",
    "scale": "crop_scale", "flip": "hflip", "colour": "color_jitter", "aa": "auto_augment", "reprob": "random_erasing",
    "erase": "random_erasing", "magnitude": "randaugment_magnitude", "least_side_px": "min_resolution_px",
    "report_to": "tracker", "log_wandb": "tracker", "resume_from_checkpoint": "resume", "save_steps": "save_every_s",
    "save_every": "save_every_s",
    "hub_model_id": "push_to_hub", "hub_private_repo": "private", "output": "output_dir", "r": "rank", "lora_r": "rank",
    "lora_rank": "rank", "lora_alpha": "alpha", "target_modules": "targets", "peft_type": "adapter",
    "model_kwargs": "model_args", "img_size": "image_size_px", "image_size": "image_size_px", "input_size": "image_size_px",
}  # fmt: skip


def find_nearest(word: str, names: Iterable[str]) -> str | None:
    """Returns the name that `word` is probably a misspelling of, or None. Capitals do not count.

    >>> find_nearest("Linear-Prob", ["full", "linear_probe"])
    'linear_probe'
    """
    import difflib  # imported here, because only errors need it

    return next(iter(difflib.get_close_matches(word.lower(), names, n=1)), None)


def suggest_name(word: str, names: Collection[str], prefix: str, *, help_flag: str = "--help_all") -> str:
    """Returns the end of an error message about an unknown setting: the nearest known name, or that `help_flag` lists all.

    A word may have hyphens for underscores. A name known elsewhere, of a setting that is not in `names`, is close to no other.
    """
    word = word.replace("-", "_")
    known = {other: name for other, name in KNOWN_ELSEWHERE.items() if name in names} | {name: name for name in names}
    close = None if word in KNOWN_ELSEWHERE.keys() - known else find_nearest(word, known)
    return f"; {help_flag} lists all settings" if close is None else f"; did you mean {prefix}{known[close]}?"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _own_settings(config: Any, group: str) -> Iterator[Setting]:
    """Yields the settings of a config, without those of its nested configs."""
    hints = _hints(type(config))  # type: ignore[arg-type]
    for item in dataclasses.fields(config):
        if "help" in item.metadata:
            yield Setting(
                name=item.metadata["flag"] or item.name,
                group=group,
                value=getattr(config, item.name),
                hint=hints[item.name],
                help=item.metadata["help"],
                allowed=item.metadata["allowed"],
            )


def _walk(config: Any, group: str) -> Iterator[Setting]:
    own = {setting.name: setting for setting in _own_settings(config, group)}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, item.name)
        elif "help" in item.metadata:
            yield own[item.metadata["flag"] or item.name]


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
    if typing.get_origin(hint) is tuple:
        return _scalar(typing.get_args(hint)[0])
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _scalar(next(a for a in typing.get_args(hint) if a is not type(None)))
    return (), hint


def _shorten(value: Any) -> str:
    """Returns the value as text for an error message, with three dots in place of the rest of a long value."""
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")
    return reprlib.repr(value)
