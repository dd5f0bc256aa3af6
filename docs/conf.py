"""How Sphinx builds these pages (`make docs`): Markdown by MyST, the API reference from the docstrings, the theme furo."""

from typing import Any

import hf_transfer
from hf_transfer.config import RunConfig
from hf_transfer.settings import Setting, list_settings, to_settings
from hf_transfer.strategy import get_strategy, strategy_names
from hf_transfer.task import NOT_OF_A_TASK

project = "hf_transfer"
author = "the authors of hf_transfer"
version = release = hf_transfer.__version__
language = "en"
smartquotes = False  # `--flag` keeps its dashes

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "hf_transfer"
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # links to headings, spelled as GitHub spells them
suppress_warnings = ["myst.header"]  # contributing.md includes a file

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True


def describe_settings(settings: dict[str, Setting]) -> list[str]:
    """Returns a list of settings as lines of reStructuredText: name, default and help."""
    return [f"- ``{name}`` (default: ``{setting.value!r}``): {setting.help}" for name, setting in settings.items()]


def add_settings(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Adds the keywords of a strategy to its docstring, and those of all tasks to that of Task."""
    short = name.removeprefix("hf_transfer.")
    if short in strategy_names():
        lines += ["", "Keywords:", "", *describe_settings(list_settings(get_strategy(short)()))]
    elif short == "Task":
        other = {*to_settings(get_strategy("linear_probe")()), *NOT_OF_A_TASK}
        known = {key: setting for key, setting in list_settings(RunConfig()).items() if key not in other}
        lines += ["", "Settings:", "", *describe_settings(known)]


def setup(app: Any) -> None:
    """Connects this file to Sphinx."""
    app.connect("autodoc-process-docstring", add_settings)
