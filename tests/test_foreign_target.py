"""A target that this file defines, as a user would: ordered grades. Runs a probe, `full`, `evaluate` and reloading with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

import hf_transfer as ht
from hf_transfer.hub.verify import find_libraries, verify
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.run import load_run
from hf_transfer.targets import target as registry
from hf_transfer.targets.target import MetricInfo, Target, register_target


@dataclass(frozen=True, kw_only=True)
class Graded:
    """The outcome on each image: the difference between the predicted and the true grade, and the loss."""

    errors: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def qualities(self) -> NDArray[np.float64]:
        return 1.0 - self.errors

    @property
    def score(self) -> Score:
        names = ("one_minus_mae", "cumulative_log_loss")
        return Score(quality=float(self.qualities.mean()), loss=float(self.losses.mean()), names=names)


@dataclass(frozen=True, kw_only=True)
class Ordinal(Target):
    """Grades 0, 1, ..., G. Output k is the logit of "the grade is above k". Labels are grades (N,) int64."""

    problem_type: ClassVar[str] = "ordinal"
    metrics: ClassVar[tuple[MetricInfo, ...]] = (
        MetricInfo(key="one_minus_mae", title="One minus mean error", kind="number"),
        MetricInfo(key="mean_grade_error", title="Mean error in grades", kind="number"),
    )

    @classmethod
    def read(cls, values: Sequence[Any], names: Sequence[str] | None, where: str) -> tuple[Ordinal, NDArray[np.int64]]:
        grades = np.array([int(value) for value in values], np.int64)
        return cls(names=tuple(f"above {k}" for k in range(int(grades.max())))), grades

    def find_unlabeled(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray(labels < 0)

    def check_labels(self, labels: torch.Tensor) -> None:
        assert labels.ndim == 1

    def stratify(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        return labels

    def count(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        return np.asarray((labels[:, None] > np.arange(len(self.names))).sum(0))

    def describe_label(self, label: Any) -> str:
        return str(int(label))

    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, None] > torch.arange(len(self.names))).float()

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = self.encode(labels) if labels.ndim == 1 else labels
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="none").sum(1)

    def score(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Score:
        return self.read_outcomes(logits[weights > 0], labels[weights > 0]).score

    def read_outcomes(self, logits: Any, labels: Any) -> Graded:
        given, grades = torch.as_tensor(logits).double(), torch.as_tensor(labels)
        errors = (self.decide(given) - grades).abs().double()
        return Graded(errors=errors.numpy(), losses=self.losses(given, grades).numpy())

    def compute_metrics(self, logits: Any, labels: Any, bootstrap: Bootstrap) -> Metrics:
        outcomes = self.read_outcomes(logits, labels)
        errors, score = outcomes.errors, outcomes.score
        intervals, notes = bootstrap.find_intervals(
            lambda rows: {"mean_grade_error": errors[rows].mean(1)}, len(errors)
        )
        values = {"one_minus_mae": score.quality, "mean_grade_error": float(errors.mean())}
        return Metrics(values=values, num_samples=len(errors), score=score, intervals=intervals, notes=notes)

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits > 0).sum(1)

    def describe_network(self) -> str:
        return f"a network that grades images from 0 to {len(self.names)}"

    def write_decision(self, names: str) -> list[str]:
        return ["print(int((logits > 0).sum()))"]


@pytest.fixture(autouse=True)
def _ordinal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    register_target(Ordinal)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose brightness is their grade, 0 to 3, in a table."""
    folder = tmp_path_factory.mktemp("graded")
    generator = np.random.default_rng(0)
    rows = ["image,grade,split"]
    for i in range(96):
        grade = i % 4
        pixels = np.clip(generator.normal(40 + 60 * grade, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{grade},{'test' if i >= 72 else 'train'}")
    (folder / "grades.csv").write_text("\n".join(rows))
    return folder / "grades.csv"


COLUMNS = {"label_column": "grade", "split_column": "split", "problem_type": "ordinal"}


@pytest.mark.parametrize("strategy", ["linear_probe", "full"])
def test_a_target_outside_the_package_trains_scores_saves_and_reloads(
    images: Path, tmp_path: Path, strategy: str
) -> None:
    task = ht.Task(str(images), **COLUMNS)
    assert task.data.label_names == ("above 0", "above 1", "above 2")
    # Brightness is the grade, so it must not change at random.
    settings = {} if strategy == "linear_probe" else {"epochs": 8, "lr": 3e-3, "color_jitter": 0.0}
    run = task.fit(getattr(ht, strategy)(), output_dir=tmp_path / "run", **settings)
    assert run.test.mean_grade_error < 0.5  # guessing the middle grades is off by 1
    assert "grades images from 0 to 3" in (tmp_path / "run/model/README.md").read_text()
    assert "One minus mean error" in (tmp_path / "run/report.html").read_text()
    again = load_run(tmp_path / "run")
    assert again.backbone.target == Ordinal(names=("above 0", "above 1", "above 2"))
    assert again.metrics == run.metrics
    scored = ht.evaluate(tmp_path / "run/model", images, split="test", **COLUMNS)
    assert scored.mean_grade_error == run.test.mean_grade_error
    model = tmp_path / "run/model"
    assert all(
        each.labels_agree for each in verify(model, tmp_path / "run/reference.safetensors", find_libraries(model))
    )


def test_intervals_of_a_target_outside_the_package_draw_whole_groups() -> None:
    """And without intervals, no note speaks of them."""
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 4, 30).repeat(20), generator.normal(size=(30, 3)).repeat(20, axis=0)
    target = Ordinal(names=("above 0", "above 1", "above 2"))
    alone, together = (target.measure(logits, labels, groups=each) for each in (None, np.arange(30).repeat(20)))
    assert alone.values == together.values
    low, high = alone.mean_grade_error_interval
    wide_low, wide_high = together.mean_grade_error_interval
    assert wide_high - wide_low > 3 * (high - low)
    without = target.compute_metrics(logits, labels, Bootstrap(resamples=0))
    assert without.values == alone.values
    assert without.intervals == {}
    assert without.notes == ()


def test_a_saved_network_of_an_unknown_target_is_refused(images: Path, tmp_path: Path) -> None:
    ht.Task(str(images), **COLUMNS).fit(ht.linear_probe(), output_dir=tmp_path / "run")
    del registry._TARGETS["ordinal"]
    with pytest.raises(ValueError, match=r"problem_type='ordinal': choose one of .* import the module that defines it"):
        _ = load_run(tmp_path / "run").model
