"""The pages of `hf-transfer advise` and `hf-transfer rank`, the table of candidates of `auto`, and their intervals."""

import re
from pathlib import Path
from typing import Any

import pytest
from browser import drive, needs_chromium
from test_report import check_that_nothing_is_loaded

from hf_transfer.choosing.advise import Advice, Estimate
from hf_transfer.choosing.expected_accuracy import CurvePoint, DepthScore, LearningCurve
from hf_transfer.choosing.pilots import Pilot
from hf_transfer.choosing.rank import CheckpointScore, RankCorrelation, Ranking
from hf_transfer.choosing.rule import STRATEGIES, DataRegime
from hf_transfer.choosing.similarity import Measure, Similarity
from hf_transfer.choosing.suggestions import Suggestion
from hf_transfer.cli import main
from hf_transfer.metrics.records import Score
from hf_transfer.reporting.advice_page import write_advice
from hf_transfer.reporting.ranking_page import describe_winner, write_ranking
from hf_transfer.reporting.report import render_report

NAMES = (*STRATEGIES, "probe_then_full lr=0.001")


def make_score(name: str, probe: float, half: float, images_per_second: float) -> CheckpointScore:
    return CheckpointScore(
        name=name,
        probe=probe,
        probe_interval=(probe - half, probe + half),
        knn=probe - 0.02,
        num_features=512,
        num_parameters=5_000_000,
        images_per_second=images_per_second,
        images_computed=0,
        seconds={"loading": 1.0, "pass": 2.0, "probe": 0.5, "knn": 0.1},
    )


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    return Ranking(
        data_name="<b>cats</b> & dogs",
        num_images=400,
        num_classes=2,
        rows=(
            make_score("timm/large", 0.93, 0.03, 10),
            make_score("timm/" + "quick_" * 12, 0.92, 0.03, 100),
            make_score("timm/small", 0.7, 0.04, 120),
        ),
        agreement={"knn": RankCorrelation(kendall=1.0, spearman=1.0)},
        failures={"./nowhere": "neither a folder here nor a Hub id"},
    )


@pytest.fixture(scope="module")
def advice() -> Advice:
    accuracies = dict(zip(NAMES, (0.8, 0.81, 0.83, 0.86, 0.78, 0.85), strict=True))
    return Advice(
        data_name="cats",
        checkpoint="timm/large",
        num_images={"train": 80, "validation": 20},
        images_per_class={"smallest": 40, "median": 50, "largest": 60},
        imbalance=1.5,
        regime=DataRegime(images_per_class=50, similarity=0.3),
        similarity=Similarity(
            score=0.3, spread=None, measures=(Measure(name="confidence", value=0.2, score=0.3, words="<i>words</i>"),)
        ),
        depths=(
            DepthScore(
                layer="blocks.3",
                position=1.0,
                is_native=True,
                probe=0.8,
                probe_interval=(0.7, 0.87),
                knn=0.7,
                num_features=64,
            ),
        ),
        curve=LearningCurve(
            images_per_class=(10, 20, 40),
            accuracy=(0.6, 0.7, 0.8),
            exponent=0.3,
            ahead=tuple(
                CurvePoint(images_per_class=n, accuracy=a, low=a - 0.05, high=a + 0.05)
                for n, a in ((50, 0.8), (100, 0.85), (500, 0.9))
            ),
        ),
        estimates=tuple(
            Estimate(
                strategy=name,
                accuracy=accuracy,
                low=accuracy - 0.1,
                high=accuracy + 0.1,
                source="measured" if name == "linear_probe" else "expected",
                seconds=10.0 * (k + 1) ** 3,
                memory_bytes=10**9,
                command=f"hf-transfer train {name} --checkpoint timm/large --dataset {'long/' * 30}cats",
            )
            for k, (name, accuracy) in enumerate(accuracies.items())
        ),
        pilots=(Pilot(strategy="lora", epochs=2, score=Score(quality=0.85, loss=0.5), seconds=12.0),),
        recommended="probe_then_full",
        reason="probe_then_full is expected to reach 86.0 %",
        suggestions=(Suggestion(title="more labels", evidence="the error falls", command=None),),
        images_per_second=10.0,
        probe_seconds=0.1,
        cost={"loading": 1.0, "features": 2.0, "images_computed": 100.0},
    )


def read_rows(html: str, table: str) -> list[list[str]]:
    """The texts of the cells of each row in the body of a table."""
    body = re.search(rf'<table class="list {table}">.*?<tbody>(.*?)</tbody>', html, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_ranking_says_what_is_chance(ranking: Ranking, tmp_path: Path) -> None:
    write_ranking(ranking, tmp_path / "rank.html")
    html = (tmp_path / "rank.html").read_text(encoding="utf-8")
    check_that_nothing_is_loaded(html)
    assert "<b>cats</b>" not in html
    rows = read_rows(html, "ranking")
    assert [row[1] for row in rows] == [row.name for row in ranking.rows]
    assert rows[0][2:4] == ["93.0", "90.0 to 96.0"]
    assert "neither a folder here nor a Hub id" in html
    sentences = describe_winner(ranking)
    assert "overlaps with that of timm/quick_" in sentences[0]
    assert "small" not in sentences[0]
    assert "10.0 times as fast" in sentences[1]
    alone = Ranking(**{**vars(ranking), "rows": (ranking.rows[0], ranking.rows[2])})
    assert describe_winner(alone)[0].startswith("timm/large is better than every other checkpoint")


def test_points_of_the_ranking_are_accuracy_and_seconds(ranking: Ranking, tmp_path: Path) -> None:
    write_ranking(ranking, tmp_path / "rank.html")
    html = (tmp_path / "rank.html").read_text(encoding="utf-8")
    dots = [(float(x), float(y)) for x, y in re.findall(r'class="point s\d" cx="([\d.]+)" cy="([\d.]+)"', html)]
    assert [x for x, _ in dots] == sorted((x for x, _ in dots), reverse=True)  # the best is the slowest
    assert [y for _, y in dots] == sorted(y for _, y in dots)
    whiskers = re.findall(r'<path class="stroke s\d" d="M([\d.]+) ([\d.]+)V([\d.]+)"/>\s*<circle', html)
    for (x, y), (at, low, high) in zip(dots, whiskers, strict=True):
        assert float(at) == x
        assert float(low) > y > float(high)


def test_the_advice_shows_every_strategy_with_its_gain(advice: Advice, tmp_path: Path) -> None:
    write_advice(advice, tmp_path / "advice.html")
    html = (tmp_path / "advice.html").read_text(encoding="utf-8")
    check_that_nothing_is_loaded(html)
    assert "<i>words</i>" not in html
    rows = {row[1]: row for row in read_rows(html, "strategies")}
    assert list(rows) == list(NAMES)
    assert rows["linear_probe"][4] == ""
    assert rows["probe_then_full"][4] == "+6.0 (−4.0 to +16.0)"
    assert rows["full"][4] == "−2.0 (−12.0 to +8.0)"
    assert html.count('<tr class="chosen">') == 1
    assert html[html.index('<tr class="chosen">') :].startswith(
        '<tr class="chosen"><td>4</td><th scope="row">probe_then_full'
    )
    for part in (advice.reason, advice.command, "Trial runs", "more labels", "the error falls", "500"):
        assert part in html


def make_candidate(name: str, verdict: str, gain: float | None, **others: Any) -> dict[str, Any]:
    measured = None if gain is None else {"mean": gain, "error": 0.02}
    return {
        "name": name,
        "strategy": name,
        "verdict": verdict,
        "prior": {"mean": 0.01, "error": 0.05},
        "posterior": {"mean": gain or 0.01, "error": 0.02},
        "judged_by": None if gain is None else "folds",
        "runs": 5,
        "num_images": 120,
        "gain": measured,
        "seconds": 30.0,
        **others,
    }


def test_candidates_of_auto_show_gain_and_reason() -> None:
    scores = {"accuracy": 0.9, "accuracy_interval": [0.85, 0.94], "num_samples": 200}
    candidates = [
        make_candidate("lora", "kept", 0.05),
        make_candidate("full", "unlikely", -0.03),
        make_candidate("last_layers", "over_budget", None),
    ]
    details = {"auto": {"kept": "lora", "candidates": candidates, "trained_on_all": True, "probe": {"accuracy": 0.85}}}
    rows = read_rows(render_report({"metrics": {"test": scores}, "details": details}), "candidates")
    assert [row[0] for row in rows] == ["linear_probe", "lora", "full", "last_layers"]
    assert rows[0][2] == "85.0 %"
    assert rows[1][1:4] == ["+1.0", "+5.0 on 120", "+5.0 (+1.1 to +8.9)"]
    assert rows[1][-1].startswith("kept")
    assert rows[2][3] == "−3.0 (−6.9 to +0.9)"
    assert rows[2][-1] == "dropped: worse than the probe on these images, stopped early"
    assert rows[3][2:4] == ["–", "–"]
    assert "did not fit" in rows[3][-1]
    without = render_report({"metrics": {"test": scores}, "details": {}})
    assert "What auto tried" not in without


def test_candidates_of_auto_show_the_measured_gain_beside_the_estimated_one() -> None:
    scores = {"accuracy": 0.9, "accuracy_interval": [0.85, 0.94], "num_samples": 200}
    candidates = [
        make_candidate("lora", "not_better", 0.012, quality=0.75, probe_quality=0.8),
        make_candidate("full", "over_budget", None, quality=None, probe_quality=None),
    ]
    details = {"auto": {"kept": "linear_probe", "candidates": candidates, "trained_on_all": True}}
    html = render_report({"metrics": {"test": scores}, "details": details})
    rows = read_rows(html, "candidates")
    assert rows[1][2:5] == ["−5.0 on 120", "+1.2", "+1.2 (−2.7 to +5.1)"]
    assert rows[2][2:5] == ["–", "–", "–"]
    assert len(rows[0]) == len(rows[1])
    assert "Measured: the difference on the held-out images." in html
    assert "From hits and probabilities" in html


def test_candidates_of_auto_say_on_which_images_each_was_judged() -> None:
    """With a budget, some are judged on folds, and others on the validation split."""
    scores = {"accuracy": 0.9, "accuracy_interval": [0.85, 0.94], "num_samples": 200}
    by_folds, by_split = (
        make_candidate(name, "not_better", 0.05, judged_by=judged_by, num_images=count)
        for name, judged_by, count in (("lora", "folds", 120), ("full", "validation", 24))
    )
    skipped = make_candidate("last_layers", "over_budget", None)

    def show(*candidates: dict[str, Any]) -> tuple[str, list[str]]:
        details = {"auto": {"kept": "linear_probe", "candidates": candidates, "trained_on_all": True}}
        html = render_report({"metrics": {"test": scores}, "details": details})
        head = html[html.index("Gain over the linear probe") :].split(".")[0]
        return head, [row[2] for row in read_rows(html, "candidates")[1:]]

    folds, split = "held-out images of folds", "held-out images of the validation split"
    assert show(by_folds, skipped) == (
        f"Gain over the linear probe in points of accuracy, on {folds}",
        ["+5.0 on 120", "–"],
    )
    assert show(skipped, by_split) == (
        f"Gain over the linear probe in points of accuracy, on {split}",
        ["–", "+5.0 on 24"],
    )
    head, measured = show(by_split, by_folds)
    assert head == f"Gain over the linear probe in points of accuracy, on {folds} or the validation split"
    assert measured == ["+5.0 on 24 of the validation split", "+5.0 on 120 of folds"]


@pytest.mark.parametrize("words", [["rank", "./nowhere"], ["advise", "--checkpoint", "./nowhere"]])
def test_a_page_that_cannot_be_written_is_refused_first(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--report", "missing/page.html"])
    assert "report='missing/page.html': give a file in a folder that exists" in capsys.readouterr().err


@needs_chromium
@pytest.mark.parametrize("width_px", [1100, 500])  # Chromium has no narrower window
def test_pages_in_a_browser(ranking: Ranking, advice: Advice, tmp_path: Path, width_px: int) -> None:
    write_ranking(ranking, tmp_path / "rank.html")
    write_advice(advice, tmp_path / "advise.html")
    for name in ("rank.html", "advise.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        script = (
            'out.cut = [...document.querySelectorAll("pre")].filter((pre) => pre.scrollWidth > pre.clientWidth).length;'
        )
        out = drive(page, script, tmp_path, width_px)
        assert out["errors"] == []
        assert width_px > 640 or not out["cut"], "commands are cut on a phone"
        assert (out["unnamed"], out["wider"]) == (0, 0), name
