"""Reads the settings of a run. Flags override the YAML file of `--config`, and the file overrides the strategy's defaults.

    config = parse("lora", prog="lora.py", description=__doc__)

A user's mistake ends the program with status 2 and one line that says what is allowed. Heavy modules are not imported, so
`--help` is fast.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hf_transfer.config import RunConfig
from hf_transfer.errors import join_lines
from hf_transfer.locations import find_recipe
from hf_transfer.settings import Setting, list_settings, replace_settings, suggest_name
from hf_transfer.strategy import Strategy, default_config

MAX_CONFIG_BYTES = 10**6
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
ESSENTIAL = ("checkpoint", "dataset", "output_dir", "epochs", "lr", "images_per_class", "seed")
NUM_ESSENTIAL = 5  # `--help` starts with the first five of ESSENTIAL that the strategy has
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
    """An argument parser that prints every error in one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints the error in one line and exits with status 2."""
        self.exit(2, f"{self.prog}: {join_lines(message)}\n")


def parse(name: str, *, prog: str, description: str | None, arguments: Sequence[str] | None = None) -> RunConfig:
    """Returns the settings of a run of the strategy called `name`.

    `arguments` defaults to the words of the command line. `--config` names a YAML file, or a recipe of this package.
    """
    parser = Parser(prog=prog, description=description, usage=f"{prog} [--config FILE.yaml] [--SETTING VALUE ...]")
    default = default_config(name)
    settings = list_settings(default)
    essential = [setting for n in ESSENTIAL if (setting := settings.get(n))][:NUM_ESSENTIAL]
    group = parser.add_argument_group("most used")
    group.add_argument("--config", metavar="FILE.yaml", help="YAML file with settings; flags override the file")
    add_settings(group, essential)
    for key, title in GROUPS.items():
        rest = [s for s in settings.values() if s.group == key and s not in essential]
        if rest:
            add_settings(parser.add_argument_group(title), rest)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = next((u for u in unknown if u.startswith("-")), unknown[0])
        name = word.lstrip("-").partition("=")[0]
        parser.error(f"unknown argument {word}{suggest_name(name, settings, '--')}")
    flags = {k: v for k, v in vars(given).items() if k != "config" and v is not None}
    try:
        config = default if given.config is None else read_config(given.config, default)
        config = replace_settings(config, flags)
        assert isinstance(config.strategy, Strategy)
        config.strategy.check(config)
        return config
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def add_settings(parser: Any, settings: Sequence[Setting]) -> None:
    """Adds a flag for each setting. The value of a flag is None if the command line does not contain the flag."""
    for setting in settings:
        text = setting.help.replace("%", "%%")
        shown = "none" if setting.value is None else str(setting.value).replace("%", "%%")
        numbers = f"; {setting.allowed.describe('value')}" if setting.allowed else ""
        options: dict[str, Any] = {"default": None, "help": f"{text} (default: {shown}{numbers})"}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.choices:
            options["choices"] = setting.choices
        else:
            options |= {"type": partial(_read_value, setting), "metavar": setting.kind.__name__.upper()}
            options |= {"nargs": "+"} if setting.is_list else {}
        parser.add_argument(f"--{setting.name}", **options)


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
