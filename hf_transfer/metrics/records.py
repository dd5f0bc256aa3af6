"""The score and the metrics of a network on one split, as records that every kind of target shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_transfer.config import SelectBy

Interval = tuple[float, float]
_TITLES = {"log_loss": "log-loss", "r2": "R2"}
SHARES = frozenset({
    "accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "ece", "mean_average_precision", "f1_micro", "f1_macro",
    "exact_match", "ordered_pairs_of_labels",
})  # fmt: skip
"""The metrics, and qualities of images, that are shown in percent. All others are shown as numbers."""
INTERVAL = "_interval"  # the end of the name of an interval in results.json


@dataclass(frozen=True, kw_only=True)
class Score:
    """The quality of a network on a split in two numbers, which every kind of target has.

    `quality` is the target's main metric, of which more is better: accuracy, mean average precision, R2, ... `loss` is the
    mean loss per image, such as the log-loss in nats. `names` are the names of both in results.json.

    >>> Score(quality=0.9, loss=0.3).to_dict()
    {'accuracy': 0.9, 'log_loss': 0.3}
    """

    quality: float
    loss: float
    names: tuple[str, str] = ("accuracy", "log_loss")

    def rank(self, select_by: SelectBy) -> tuple[float, float]:
        """Returns a sort key, which is lower for a better score. Among equal qualities, the lower loss is better."""
        return (-self.quality if select_by == "accuracy" else 0.0, self.loss)

    @property
    def titles(self) -> tuple[str, str]:
        """The names of quality and loss as words, such as "accuracy" and "log-loss"."""
        quality, loss = (_TITLES.get(name, name.replace("_", " ")) for name in self.names)
        return quality, loss

    def to_dict(self) -> dict[str, float]:
        """Returns the two numbers by name."""
        return dict(zip(self.names, (self.quality, self.loss), strict=True))

    def describe(self) -> str:
        """Returns the two numbers as text, for logs.

        >>> Score(quality=0.9, loss=0.3).describe()
        'accuracy 90.0 %, log-loss 0.3000'
        """
        return f"{self.describe_quality()}, {self.titles[1]} {self.loss:.4f}"

    def describe_quality(self) -> str:
        """Returns the quality with its name as text.

        >>> Score(quality=0.9, loss=0.3).describe_quality()
        'accuracy 90.0 %'
        """
        return f"{self.titles[0]} {self.format_quality()}"

    def format_quality(self) -> str:
        """Returns the quality as text: a share in percent, any other quality as a number.

        >>> Score(quality=0.9, loss=0.3, names=("r2", "squared_error")).format_quality()
        '0.900'
        """
        return f"{100 * self.quality:.1f} %" if self.is_share else f"{self.quality:.3f}"

    def format_gain(self, gain: float) -> str:
        """Returns a difference in quality as text: of shares in points.

        >>> Score(quality=0.9, loss=0.3).format_gain(0.02)
        '+2.0'
        """
        factor, digits = (100, 1) if self.is_share else (1, 3)
        return f"{round(factor * gain, digits) + 0.0:+.{digits}f}"  # adding 0.0 makes a zero positive

    @property
    def gain_unit(self) -> str:
        """The unit of a difference in quality, after a space: " points" for shares."""
        return " points" if self.is_share else ""

    @property
    def is_share(self) -> bool:
        """Whether the quality is a share, such as accuracy, which is shown in percent."""
        return self.names[0] in SHARES

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Score":
        """Creates a score from the result of `to_dict`."""
        (quality_name, quality), (loss_name, loss) = values.items()
        return cls(quality=quality, loss=loss, names=(quality_name, loss_name))


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of a network on one split. Numbers and intervals are also attributes: `accuracy`, `accuracy_interval`.

    Intervals are 95 % intervals, most of a bootstrap over images. `details` are tables as JSON values, such as `per_class`.

    >>> Metrics(values={"accuracy": 0.5}, num_samples=2, score=Score(quality=0.5, loss=1.0)).accuracy
    0.5
    """

    values: Mapping[str, float]
    num_samples: int
    score: Score
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):  # copy and pickle ask for special methods before the fields exist
            for named in (self.values, self.details):
                if name in named:
                    return named[name]
            if name.endswith(INTERVAL):
                return self.intervals.get(name.removesuffix(INTERVAL))
        raise AttributeError(f"no metric {name!r}: there are {', '.join(self.values)}" if name[0] != "_" else name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the metrics as JSON values, as in results.json."""
        intervals = {f"{name}{INTERVAL}": list(bounds) for name, bounds in self.intervals.items()}
        common = {"num_samples": self.num_samples, "score": self.score.to_dict(), "notes": list(self.notes)}
        return {**self.values, **intervals, **self.details, **common}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metrics":
        """Creates metrics from the result of `to_dict`."""
        rest = {name: value for name, value in values.items() if name not in ("num_samples", "score", "notes")}
        return cls(
            values={name: value for name, value in rest.items() if isinstance(value, int | float)},
            intervals={n.removesuffix(INTERVAL): (v[0], v[1]) for n, v in rest.items() if n.endswith(INTERVAL)},
            details={n: v for n, v in rest.items() if not isinstance(v, int | float) and not n.endswith(INTERVAL)},
            num_samples=values["num_samples"],
            score=Score.from_dict(values["score"]),
            notes=tuple(values["notes"]),
        )
