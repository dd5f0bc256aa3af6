"""Reads the settings of a run. Flags override the YAML file of `--config`, and the file overrides the strategy's defaults.

    config = parse("lora", prog="lora.py", description=__doc__).config

`--help` shows the most used settings, and `--help_all` shows all of them. A user's mistake ends the program with status 2 and
one line that says what is allowed. Heavy modules are not imported, so `--help` is fast.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from hf_transfer.config import RunConfig, StrategyConfig
from hf_transfer.errors import EXIT_STATUS, join_lines
from hf_transfer.locations import CONFIG, RESULTS, find_recipe
from hf_transfer.settings import Setting, find_nearest, list_settings, replace_settings, suggest_name
from hf_transfer.strategy import Strategy, default_config, strategy_names

HELP_ALL = "--help_all"
MAX_CONFIG_BYTES = 10**6
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
ESSENTIAL = ("checkpoint", "dataset", "output_dir", "epochs", "lr", "images_per_class", "seed")
NUM_ESSENTIAL = 5  # `--help` starts with the first five of ESSENTIAL that the strategy has
COMMON = frozenset((  # what `--help` shows beside ESSENTIAL and the settings that only this strategy has
    "optimizer", "weight_decay", "crop_scale", "hflip", "early_stopping_patience", "label_column", "images_per_class",
    "validation_fraction", "seed", "image_size_px", "folds", "seeds", "batch_size", "num_workers", "precision", "cache_gb",
    "overwrite_output_dir", "resume", "export", "push_to_hub",
))  # fmt: skip
_COMMON_TO_STRATEGIES = frozenset(list_settings(StrategyConfig()))
GROUPS: Mapping[str, str] = {  # nested config -> title, in the order of `--help`
    "strategy": "this strategy",
    "adapter": "adapters",
    "optimization": "optimizer",
    "augmentation": "augmentation",
    "training": "training",
    "data": "data",
    "model": "checkpoint",
    "repeat": "folds, seeds and training on all images",
    "compute": "machine and cache",
    "output": "output",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that prints every error in one line. `shows_all`: whether its help text will show all settings."""

    def __init__(self, *, shows_all: bool = False, **options: Any) -> None:
        self.shows_all = shows_all
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints the error in one line and exits with status 2."""
        self.exit(2, f"{self.prog}: {join_lines(message)}\n")

    def refuse(self, unknown: Sequence[str], words: Sequence[str]) -> NoReturn:
        """Ends with the error for the `unknown` ones among the words of a command line: the first flag, or else a value."""
        flags = {
            option[2:]: action for action in self._actions for option in action.option_strings if option[:2] == "--"
        }
        flag = next((word for word in unknown if word.startswith("-")), None)
        if flag is not None:
            name = flag.lstrip("-").partition("=")[0]
            help_flag = HELP_ALL if HELP_ALL[2:] in flags else "--help"
            self.error(f"unknown argument {flag}{suggest_name(name, flags, '--', help_flag=help_flag)}")
        for before, word in pairwise(words):
            action = flags.get(before.removeprefix("--"))
            if word == unknown[0] and action is not None and action.nargs == 0:
                self.error(f"{before} takes no value: write {' or '.join(action.option_strings)}")
        self.error(f"unexpected value {unknown[0]!r}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises ArgumentError, with the nearest choice, if `value` is not among the choices of `action`."""
        if action.choices is not None and value not in action.choices:
            choices = list(action.choices)
            close = find_nearest(str(value), choices)
            meant = "" if close is None else f"; did you mean {close!r}?"
            message = f"invalid choice: {value!r} (choose from {', '.join(map(repr, choices))}){meant}"
            raise argparse.ArgumentError(action, message)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The settings of a run, and how the run reports: `is_quiet`: errors only; `prints_json`: results.json on stdout."""

    config: RunConfig
    is_quiet: bool
    prints_json: bool


def parse(name: str, *, prog: str, description: str | None, arguments: Sequence[str] | None = None) -> CommandLine:
    """Returns what the command line says about a run of the strategy called `name`.

    `arguments` defaults to the words of the command line. `--config` names a YAML file, or a recipe of this package.
    """
    words = sys.argv[1:] if arguments is None else arguments
    default = default_config(name)
    settings = list_settings(default)
    parser = Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE.yaml] [--SETTING VALUE ...]",
        epilog=EXIT_STATUS,
        add_help=False,
        shows_all=HELP_ALL in words,
    )
    assert isinstance(default.strategy, Strategy)
    _add_flags(parser, settings, shown=COMMON - default.strategy.refused)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(unknown, words)
    flags = {k: v for k, v in vars(given).items() if k in settings and v is not None}
    try:
        config = default if given.config is None else read_config(given.config, default)
        config = replace_settings(config, flags)
        assert isinstance(config.strategy, Strategy)
        config.strategy.check(config)
        return CommandLine(config=config, is_quiet=given.quiet, prints_json=given.json)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def _add_flags(parser: Parser, settings: Mapping[str, Setting], *, shown: frozenset[str]) -> None:
    """Adds all flags of a recipe, in groups. The help text shows all of them, or only those of the strategy and `shown`."""
    essential = [name for name in ESSENTIAL if name in settings][:NUM_ESSENTIAL]
    own = {s.name for s in settings.values() if s.group in ("strategy", "adapter")} - _COMMON_TO_STRATEGIES
    group = parser.add_argument_group("most used")
    group.add_argument("--config", metavar="FILE.yaml", help="YAML file with settings; flags override the file")
    add_groups(parser, group, settings, essential=essential, shown=shown | own)
    group = parser.add_argument_group("help and messages")
    group.add_argument("--help", "-h", action="help", help="show the most used settings")
    add_help_all(group, len(settings))
    add_quiet(group)
    group.add_argument("--json", action="store_true", help="print the content of results.json on stdout at the end")


def add_groups(
    parser: Parser,
    most_used: Any,
    settings: Mapping[str, Setting],
    *,
    essential: Sequence[str],
    shown: Collection[str] = (),
) -> None:
    """Adds the flags of `settings`: those in `essential` to the group `most_used`, and the others to groups of their own.

    The help text shows those in `essential` and `shown`, or all of them with their allowed values if `parser.shows_all`.
    """
    add_settings(most_used, [settings[name] for name in essential], shows_ranges=parser.shows_all)
    for key, title in GROUPS.items():
        rest = [s for s in settings.values() if s.group == key and s.name not in essential]
        visible = [s for s in rest if parser.shows_all or s.name in shown]
        if rest:
            group = parser.add_argument_group(title)
            add_settings(group, visible, shows_ranges=parser.shows_all)
            add_settings(group, [s for s in rest if s not in visible], is_hidden=True)


def add_help_all(parser: Any, num_settings: int) -> None:
    """Adds --help_all, which needs a parser that `shows_all` where the command line has this word."""
    text = f"show all {num_settings} settings, with their allowed values"
    parser.add_argument(HELP_ALL, action="help", help=text)


def add_quiet(parser: Any) -> None:
    """Adds --quiet."""
    parser.add_argument("--quiet", action="store_true", help="print errors only: no log lines and no progress bars")


def add_settings(
    parser: Any, settings: Sequence[Setting], *, shows_ranges: bool = True, is_hidden: bool = False
) -> None:
    """Adds a flag for each setting. The value of a flag is None if the command line does not contain the flag.

    The help text shows the allowed numbers if `shows_ranges`, and leaves the setting out if `is_hidden`.
    """
    for setting in settings:
        help_text = argparse.SUPPRESS if is_hidden else _describe(setting, shows_range=shows_ranges)
        options: dict[str, Any] = {"default": None, "help": help_text}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.choices:
            options["choices"] = setting.choices
        else:
            options |= {"type": partial(_read_value, setting), "metavar": setting.kind.__name__.upper()}
            options |= {"nargs": "+"} if setting.is_list else {}
        parser.add_argument(f"--{setting.name}", **options)


def _describe(setting: Setting, *, shows_range: bool) -> str:
    """Returns the help text of a setting, with its default unless the text itself says the default."""
    value = "none" if setting.value is None else str(setting.value)
    facts = [] if setting.value is None and "default: " in setting.help else [f"default: {value}"]
    if shows_range and setting.allowed:
        facts.append(setting.allowed.describe("value"))
    text = f"{setting.help} ({'; '.join(facts)})" if facts else setting.help
    return text.replace("%", "%%")


def _read_value(setting: Setting, text: str) -> Any:
    """Returns the number that `text` stands for, or else `text`, which `Setting.check` refuses in the words of the setting."""
    try:
        return setting.kind(text)
    except ValueError:
        return text


def read_config(path: str, default: RunConfig) -> RunConfig:
    """Returns `default` with the settings that a YAML file gives.

    Raises ValueError for a missing file, an unknown name (with the nearest known name), or a value of the wrong type.
    """
    file = Path(path)
    if not os.path.isfile(file):  # noqa: PTH113 - pathlib raises an OSError for a name that is too long
        file = find_recipe(path) or file
    if not os.path.isfile(file):  # noqa: PTH113
        raise ValueError(f"--config {path}: there is no such file, and no recipe of this name")
    return replace_settings(default, _read_yaml(file, f"--config {path}: "), where=f"--config {path}: ")


def read_saved_config(run: Path) -> RunConfig:
    """Returns the settings in the folder of a finished run. Raises ValueError if they cannot be read."""
    strategy = json.loads((run / RESULTS).read_text(encoding="utf-8"))["strategy"]
    default = default_config(strategy if strategy in strategy_names() else "full")  # a plan made in Python
    return read_config(str(run / CONFIG), default)


def _read_yaml(file: Path, where: str) -> dict[str, Any]:
    """Returns the settings in a YAML file. Raises ValueError, with a message that starts with `where`."""
    import yaml  # imported here, so that `--help` is fast

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):  # a few aliases of aliases could fill the memory
                raise yaml.YAMLError("it has an alias (*name): write the value out")
            return super().compose_node(parent, index)

    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{where}the file is larger than {MAX_CONFIG_BYTES:,} bytes; give the config.yaml of a run")
    try:
        loader = Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{where}the file is not YAML ({join_lines(str(error))}); write lines `name: value`"
        ) from error
    except OSError as error:
        raise ValueError(f"{where}the file cannot be read ({error.strerror}); give yourself access to it") from error
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where}the file is a {type(values).__name__}; write lines of the form `name: value`")
    names = [key.value for key, _ in node.value]
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}{repeated[0]} is given twice; keep one of the two lines")
    return {name: _read_number(value) for name, value in values.items()}


def _read_number(value: Any) -> Any:
    """Returns the number that text such as `1e-3` stands for: YAML 1.1 reads a number without a point as text."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
