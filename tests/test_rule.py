"""The rule: the table's corners, what is chosen by it, and that runs teach it what they show."""

import math

import numpy as np
import pytest

from hf_transfer.choosing.rule import (
    CORNERS,
    PRIOR,
    STRATEGIES,
    TABLE,
    Place,
    Run,
    choose,
    choose_by_textbook,
    expect_accuracy,
    expect_log_ratio,
    fit_table,
)

AT = {
    "little, similar": Place(images_per_class=10, similarity=1.0),
    "much, similar": Place(images_per_class=1000, similarity=1.0),
    "little, different": Place(images_per_class=10, similarity=0.0),
    "much, different": Place(images_per_class=1000, similarity=0.0),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_at_a_corner_the_table_is_read_as_it_stands(corner: str) -> None:
    place = AT[corner]
    assert place.cell == corner
    for name, row in TABLE.items():
        assert expect_log_ratio(name, place) == pytest.approx(row[CORNERS.index(corner)])
    assert expect_log_ratio("linear_probe", place) == 0.0


def test_between_corners_weights_sum_to_one_and_the_line_lies_at_a_hundred() -> None:
    place = Place(images_per_class=100, similarity=0.25)
    assert place.amount == pytest.approx(0.5)
    assert place.weights.sum() == pytest.approx(1)
    assert Place(images_per_class=99, similarity=0.1).is_trouble
    assert not Place(images_per_class=101, similarity=0.1).is_trouble
    assert Place(images_per_class=3, similarity=0.1).amount == 0.0


def test_the_margin_is_said_and_so_is_doubt_about_it() -> None:
    said = Place(images_per_class=20, similarity=0.7, similarity_spread=0.1).describe()
    assert "little, similar" in said
    assert "5.0 times below the line at 100" in said
    assert "0.20 above the line at 0.5" in said
    assert "do not agree" not in said
    assert "do not agree" in Place(images_per_class=20, similarity=0.7, similarity_spread=0.3).describe()


def test_the_expected_error_is_the_probes_times_the_ratio() -> None:
    place = AT["much, different"]
    accuracy, low, high = expect_accuracy("full", place, 0.8, (0.75, 0.85))
    assert accuracy == pytest.approx(1 - 0.2 * math.exp(TABLE["full"][3]))
    assert low < accuracy < high
    assert expect_accuracy("linear_probe", place, 0.8, (0.75, 0.85)) == (0.8, 0.75, 0.85)
    wide = expect_accuracy("full", place, 0.8, (0.6, 0.95))
    assert wide[1] < low  # doubt about the probe is doubt about what is built on it
    assert expect_accuracy("full", AT["little, similar"], 0.05, (0.0, 0.2))[0] >= 0.0


def test_the_cheapest_within_half_a_point_is_chosen() -> None:
    seconds = dict(zip(STRATEGIES, (1.0, 10.0, 50.0, 100.0, 90.0), strict=True))
    assert choose(dict.fromkeys(STRATEGIES, 0.9), seconds) == "linear_probe"
    better = dict.fromkeys(STRATEGIES, 0.9) | {"probe_then_full": 0.93, "lora": 0.928}
    assert choose(better, seconds) == "lora"
    assert choose(better, seconds, budget_s=20) == "linear_probe"
    assert choose(better, seconds, budget_s=0.1) == "linear_probe"  # none fits: the cheapest
    assert choose(better | {"probe_then_full": 0.95}, seconds) == "probe_then_full"


def test_the_textbook_is_the_textbook() -> None:
    assert [choose_by_textbook(AT[corner]) for corner in CORNERS] == [
        "linear_probe", "last_layers", "linear_probe", "full"
    ]  # fmt: skip


def runs(truth: dict[str, tuple[float, ...]], places: list[Place], noise: float, seed: int = 0) -> list[Run]:
    rng = np.random.default_rng(seed)
    made = []
    for name, row in truth.items():
        for place in places:
            ratio = float(place.weights @ np.array(row)) + noise * float(rng.standard_normal())
            made.append(Run(strategy=name, place=place, error=0.3 * math.exp(ratio), probe_error=0.3, num_test=10**7))
    return made


def test_runs_teach_the_table_what_they_show() -> None:
    truth = {"lora": (0.1, -0.3, -0.5, -1.2), "full": (0.9, 0.0, 0.1, -1.5)}
    rng = np.random.default_rng(0)
    places = [
        Place(images_per_class=float(10 ** rng.uniform(1, 3)), similarity=float(rng.uniform())) for _ in range(400)
    ]
    table, residual = fit_table(runs(truth, places, noise=0.2))
    for name, row in truth.items():
        np.testing.assert_allclose(table[name], row, atol=0.1)
    assert residual == pytest.approx(0.2, abs=0.03)
    assert table["last_layers"] == PRIOR["last_layers"]  # nothing was run of it


def test_a_corner_without_runs_keeps_what_was_thought_before() -> None:
    truth = {"full": (1.5, 1.5, 1.5, 1.5)}
    table, _ = fit_table(runs(truth, [AT["little, similar"]] * 50, noise=0.0))
    assert table["full"][0] == pytest.approx(1.5, abs=0.05)
    assert table["full"][1:] == pytest.approx(PRIOR["full"][1:])
    assert fit_table([])[0] == PRIOR


def test_errors_of_nought_have_a_ratio() -> None:
    run = Run(strategy="full", place=AT["much, similar"], error=0.0, probe_error=0.1, num_test=100)
    assert run.log_ratio == pytest.approx(math.log(0.005 / 0.105))
