"""The rule: the table's corners, the choice it makes, and that a fit recovers the table behind the runs."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hf_transfer.choosing.rule import CORNERS, STRATEGIES, TABLE, DataRegime, choose, expect_accuracy, expect_log_ratio

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fit_rule() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("fit_rule")


REGIMES = {
    "little, similar": DataRegime(images_per_class=10, similarity=1.0),
    "much, similar": DataRegime(images_per_class=1000, similarity=1.0),
    "little, different": DataRegime(images_per_class=10, similarity=0.0),
    "much, different": DataRegime(images_per_class=1000, similarity=0.0),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_at_a_corner_the_tables_own_value_is_expected(corner: str) -> None:
    regime = REGIMES[corner]
    assert regime.cell == corner
    for name, row in TABLE.items():
        assert expect_log_ratio(name, regime) == pytest.approx(row[CORNERS.index(corner)])
    assert expect_log_ratio("linear_probe", regime) == 0.0


def test_between_corners_weights_sum_to_one_and_the_boundary_is_at_a_hundred() -> None:
    regime = DataRegime(images_per_class=100, similarity=0.25)
    assert regime.amount == pytest.approx(0.5)
    assert regime.weights.sum() == pytest.approx(1)
    assert DataRegime(images_per_class=99, similarity=0.1).is_trouble
    assert not DataRegime(images_per_class=101, similarity=0.1).is_trouble
    assert DataRegime(images_per_class=3, similarity=0.1).amount == 0.0


def test_the_description_has_margins_and_reports_disagreement() -> None:
    description = DataRegime(images_per_class=20, similarity=0.7, similarity_spread=0.1).describe()
    assert "little, similar" in description
    assert "20 images per class (little is below 100)" in description
    assert "similarity 0.70 (similar is 0.5 or more)" in description
    assert "disagree" not in description
    assert "disagree" in DataRegime(images_per_class=20, similarity=0.7, similarity_spread=0.3).describe()


def test_the_expected_error_is_the_probes_times_the_ratio() -> None:
    regime = REGIMES["much, different"]
    accuracy, low, high = expect_accuracy("full", regime, (0.8, 0.75, 0.85))
    assert accuracy == pytest.approx(1 - 0.2 * math.exp(TABLE["full"][3]))
    assert low < accuracy < high
    assert expect_accuracy("linear_probe", regime, (0.8, 0.75, 0.85)) == (0.8, 0.75, 0.85)
    wide = expect_accuracy("full", regime, (0.8, 0.6, 0.95))
    assert wide[1] < low  # a wider interval of the probe widens the strategy's
    assert expect_accuracy("full", REGIMES["little, similar"], (0.05, 0.0, 0.2))[0] >= 0.0


def test_the_cheapest_within_half_a_point_is_chosen() -> None:
    seconds = dict(zip(STRATEGIES, (1.0, 10.0, 50.0, 100.0, 90.0), strict=True))
    assert choose(dict.fromkeys(STRATEGIES, 0.9), seconds) == "linear_probe"
    better = dict.fromkeys(STRATEGIES, 0.9) | {"probe_then_full": 0.93, "lora": 0.928}
    assert choose(better, seconds) == "lora"
    assert choose(better, seconds, budget_s=20) == "linear_probe"
    assert choose(better, seconds, budget_s=0.1) == "linear_probe"  # none fits: the fastest
    assert choose(better | {"probe_then_full": 0.95}, seconds) == "probe_then_full"


def test_the_textbook_choice_follows_the_classical_table(fit_rule: ModuleType) -> None:
    assert [fit_rule.choose_by_textbook(REGIMES[corner]) for corner in CORNERS] == [
        "linear_probe", "last_layers", "linear_probe", "full"
    ]  # fmt: skip


def runs(
    fit_rule: ModuleType, truth: dict[str, tuple[float, ...]], regimes: list[DataRegime], noise: float, seed: int = 0
) -> list[Any]:
    rng = np.random.default_rng(seed)
    made = []
    for name, row in truth.items():
        for regime in regimes:
            ratio = float(regime.weights @ np.array(row)) + noise * float(rng.standard_normal())
            made.append(
                fit_rule.BenchmarkRun(
                    data_set="a",
                    strategy=name,
                    regime=regime,
                    error=0.3 * math.exp(ratio),
                    probe_error=0.3,
                    num_test=10**7,
                )
            )
    return made


def test_the_fit_recovers_the_table_behind_the_runs(fit_rule: ModuleType) -> None:
    truth = {"lora": (0.1, -0.3, -0.5, -1.2), "full": (0.9, 0.0, 0.1, -1.5)}
    rng = np.random.default_rng(0)
    regimes = [
        DataRegime(images_per_class=float(10 ** rng.uniform(1, 3)), similarity=float(rng.uniform())) for _ in range(400)
    ]
    table, residual = fit_rule.fit_table(runs(fit_rule, truth, regimes, noise=0.2))
    for name, row in truth.items():
        np.testing.assert_allclose(table[name], row, atol=0.1)
    assert residual == pytest.approx(0.2, abs=0.03)
    assert table["last_layers"] == fit_rule.PRIOR["last_layers"]  # it has no runs


def test_a_corner_without_runs_keeps_its_prior(fit_rule: ModuleType) -> None:
    truth = {"full": (1.5, 1.5, 1.5, 1.5)}
    table, _ = fit_rule.fit_table(runs(fit_rule, truth, [REGIMES["little, similar"]] * 50, noise=0.0))
    assert table["full"][0] == pytest.approx(1.5, abs=0.05)
    assert table["full"][1:] == pytest.approx(fit_rule.PRIOR["full"][1:])
    assert fit_rule.fit_table([])[0] == fit_rule.PRIOR


def test_an_error_of_zero_has_a_finite_log_ratio(fit_rule: ModuleType) -> None:
    run = fit_rule.BenchmarkRun(
        data_set="a", strategy="full", regime=REGIMES["much, similar"], error=0.0, probe_error=0.1, num_test=100
    )
    assert run.log_ratio == pytest.approx(math.log(0.005 / 0.105))


def test_the_spread_is_that_of_the_ratio_on_a_data_set_that_was_left_out(fit_rule: ModuleType) -> None:
    """Equal data sets predict each other, up to the one difference that stands for what was expected. Unequal ones do not."""
    truth = dict.fromkeys(STRATEGIES[1:], (-0.1, -0.2, -0.3, -0.4))
    alike = runs(fit_rule, truth, list(REGIMES.values()) * 30, noise=0.0)
    halves = [replace(run, data_set=name) for run in alike for name in ("a", "b")]
    assert max(fit_rule.fit_spread(halves).values()) < 0.06
    worse = [replace(run, error=run.error * (2 if run.data_set == "b" else 1)) for run in halves]
    assert min(fit_rule.fit_spread(worse).values()) > 0.4
