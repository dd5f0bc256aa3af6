"""Formats numbers for readers (percent, three digits, seconds, bytes), also as filters of Jinja templates."""

import math

from jinja2 import Environment, PackageLoader, StrictUndefined


def make_environment(room: str, *, autoescape: bool = True) -> Environment:
    """Returns the Jinja environment of the templates in hf_transfer/`room`, in which a missing variable is an error."""
    environment = Environment(
        loader=PackageLoader("hf_transfer", room),
        autoescape=autoescape,
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
    }
    return environment


def format_percent(fraction: float | None) -> str:
    """Returns 0.9314 as "93.1", without the percent sign, and None as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def format_number(value: float) -> str:
    """Returns three significant digits, with a space between thousands: 0.0123, 1.23, 12 300."""
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
    """Returns decimal megabytes or gigabytes: 640 MB, 1.52 GB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
