"""Formats numbers and text for readers, and makes the Jinja environments of the report, its charts and the model card.

Templates escape all text unless they mark it `safe`, because names of classes, files and data sets may contain markup.
"""

import functools
import html
import math
import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_transfer.targets.target import MetricInfo

_BLANK = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ufffe\uffff]+")  # control characters and line ends too
_COMMAND = re.compile("`(hf-transfer [a-z -]+)`")
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
# Characters that may begin Markdown markup, math or a block (in the first column), except underscores inside a word.
_MARKUP = re.compile(r"([\\`*\[\]|~$]|^[-+#=]|(?<![^\W_])_|_(?![^\W_]))")


@functools.cache  # so that a template is compiled once
def make_environment(room: str, *, is_markdown: bool = False) -> Environment:
    """Returns the Jinja environment for the templates in the folder `room` of the package hf_transfer.

    Templates of every room may import those of this room, such as the parts that all pages share.
    Templates escape text for Markdown if `is_markdown`, and for HTML and SVG otherwise. A missing variable is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("hf_transfer", room), PackageLoader("hf_transfer", "reporting")]),
        autoescape=not is_markdown,
        finalize=escape_markdown if is_markdown else _replace_control,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "number": format_number,
        "seconds": format_seconds,
        "bytes": format_bytes,
        "code": format_code,
        "literal": format_literal,
        "metric": format_metric,
        "lower_first": lower_first,
        "spans": format_spans,
    }
    return environment


def lower_first(text: str) -> str:
    """Returns a title as it stands inside a sentence: "accuracy" for "Accuracy", and "R2" unchanged."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def format_metric(value: float, info: MetricInfo, has_unit: bool = True) -> str:
    """Returns the value of a metric as text, in percent or as a number."""
    if info.kind == "percent":
        return f"{format_percent(value)}{' %' if has_unit else ''}"
    return format_number(value)


def join_lines(text: str) -> str:
    """Returns `text` as one line. Each sequence of whitespace and control characters becomes one space."""
    return _BLANK.sub(" ", text).strip()


def escape_markdown(value: Any) -> Any:
    """Returns text as one line with Markdown and HTML markup escaped. Returns numbers and `Markup` unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\1", html.escape(_BLANK.sub(" ", value), quote=False)))


def format_code(text: str) -> Markup:
    """Returns text as a Markdown code span, or as escaped plain text if the text contains a backtick, <, > or &."""
    is_plain = re.search(r"[`<>&]", text) is None
    return Markup(f"`{join_lines(text)}`") if is_plain else escape_markdown(text)


def format_spans(text: str) -> Markup:
    """Returns text as HTML, with the commands of this package between backticks as code. Other backticks stay, as in names.

    >>> format_spans("`hf-transfer audit` found a<b, `name`")
    Markup('<code>hf-transfer audit</code> found a&lt;b, `name`')
    """
    return Markup(_COMMAND.sub(r"<code>\1</code>", str(escape(_replace_control(text)))))


def format_literal(value: Any) -> Markup:
    """Returns `value` as a Python literal for a code block in Markdown."""
    return Markup(repr(value).replace("<", r"\x3c"))


def _replace_control(value: Any) -> Any:
    """Replaces each character that XML forbids with U+FFFD if `value` is text. Returns any other value unchanged."""
    return _NOT_XML.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def format_percent(fraction: float | None) -> str:
    """Returns a fraction in percent without the percent sign, such as "93.1" for 0.9314. Returns a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def format_number(value: float | None) -> str:
    """Returns a number as text such as 0.0123, 1.23 or 12 345, rounded to three significant digits or to an integer.

    Returns a dash for None.
    """
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}".replace(",", "\u202f").replace("-", "−")


def format_seconds(seconds: float) -> str:
    """Returns a duration such as 0.42 s, 12.3 s, 4 min 05 s or 2 h 07 min."""
    if seconds < 59.95:  # 59.95 rounds to 60.0
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_bytes(num_bytes: float) -> str:
    """Returns a number of bytes in decimal megabytes or gigabytes, such as 640 MB or 1.52 GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
