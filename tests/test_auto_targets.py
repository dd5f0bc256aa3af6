"""The strategy `auto` for labels of any number and for numbers: units of the gain, what is expected, and whole runs."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import hf_transfer as ht
from hf_transfer.choosing import candidates, decide
from hf_transfer.choosing.candidates import find_trained_share
from hf_transfer.choosing.evidence import gather_evidence, read_head
from hf_transfer.choosing.gain import expect_gain, measure_gain
from hf_transfer.choosing.paired import compare, find_error, read_probabilities
from hf_transfer.choosing.premises import UNSEEN, gather_premises
from hf_transfer.choosing.similarity import measure_similarity
from hf_transfer.cli import main
from hf_transfer.metrics.bootstrap import Bootstrap
from hf_transfer.session import Session
from hf_transfer.strategy import make_strategy
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.targets.target import Target
from hf_transfer.training import loop
from hf_transfer.training.finish import _fit_decisions, finish_target
from hf_transfer.training.records import Gain
from tests.sessions import make_session
from tests.test_auto import expect, run_command
from tests.test_targets_of_runs import COLUMNS, SMALL, check_run, write_shapes

TITLES = {"labels": "mean average precision", "numbers": "R2"}
LABELED = MultiLabel(names=("a", "b", "c"))
NUMBERED = Regression(names=("x", "y"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def open_shapes(kind: str, table: Path) -> Session:
    return make_session("auto", dataset=str(table), images_per_class=None, **SMALL, **COLUMNS[kind])


def fit(kind: str, table: Path, folder: Path, **settings: Any) -> ht.Run:
    output = {"resume": True} if settings.pop("resume", False) else {}
    task = ht.Task(str(table), "embedded", **SMALL, **COLUMNS[kind])
    return task.fit(ht.auto(**{"epochs": 1, **settings}), output_dir=folder, **output)


def draw(
    target: Target, count: int, noise: float, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Random labels, and logits of a good and of a poor network, whose errors have a part in common."""
    shape = (count, target.num_outputs)
    latent, common, own, other = (generator.normal(size=shape).astype(np.float32) for _ in range(4))
    labels = (latent > 0).astype(np.float32) if isinstance(target, MultiLabel) else latent
    return labels, latent + noise * (0.5 * common + own), latent + 2 * noise * (0.5 * common + other)


# --- units of the gain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [LABELED, NUMBERED], ids=["labels", "numbers"])
def test_the_gain_is_in_the_quality_that_reports_show(target: Target) -> None:
    labels, good, poor = draw(target, 60, 0.5, np.random.default_rng(0))
    compared = compare(target, labels, good, poor)
    shown = [
        target.compute_metrics(logits, labels, Bootstrap(resamples=0)).values[target.metrics[0].key]
        for logits in (good, poor)
    ]
    assert (compared.quality, compared.probe_quality) == pytest.approx(tuple(shown))
    assert compared.gain.mean == pytest.approx(shown[0] - shown[1])
    assert compared.gain.mean > 0.05
    assert find_error(target, shown[0], 60) == pytest.approx(((1 - shown[0]) * 60 + 0.5) / 61)


def test_classes_are_compared_by_hits_and_by_probabilities_at_their_best_temperatures() -> None:
    target, generator = SingleLabel(names=("a", "b", "c")), np.random.default_rng(0)
    labels, noise = generator.integers(0, 3, 50), generator.normal(size=(2, 50, 3))
    one, other = 2 * np.eye(3)[labels] + noise[0], np.eye(3)[labels] + noise[1]
    compared = compare(target, labels, one, other)
    hits = [(logits.argmax(1) == labels).astype(float) for logits in (one, other)]
    assert (compared.quality, compared.probe_quality) == pytest.approx((hits[0].mean(), hits[1].mean()))
    probabilities = [read_probabilities(target, logits, labels) for logits in (one, other)]
    assert compared.gain == measure_gain(hits[0] - hits[1], probabilities[0] - probabilities[1])
    sure = compare(target, labels, 5 * one, other).gain  # five times as sure, with the same decisions
    assert sure.mean == pytest.approx(compared.gain.mean, abs=0.01)


@pytest.mark.parametrize("target", [LABELED, NUMBERED], ids=["labels", "numbers"])
def test_the_error_of_a_gain_is_its_spread_over_data_sets(target: Target) -> None:
    """Within 25 %: the spread over 100 data sets is known within 7 % (one standard deviation), and one image is added."""
    generator = np.random.default_rng(0)
    gains = [compare(target, *draw(target, 120, 0.7, generator)).gain for _ in range(100)]
    assert np.mean([gain.error for gain in gains]) == pytest.approx(np.std([gain.mean for gain in gains]), rel=0.25)


@pytest.mark.parametrize("target", [SingleLabel(names=("a", "b")), NUMBERED], ids=["classes", "numbers"])
def test_images_of_a_group_count_once(target: Target) -> None:
    """Twenty copies of each of 30 images know no more than the 30 images do."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 30) if target.has_classes else generator.normal(size=(30, 1))
    one, other = generator.normal(size=(2, 30, target.num_outputs))
    once = compare(target, labels, one, other, np.arange(30)).gain
    copies = [np.repeat(each, 20, axis=0) for each in (labels, one, other)]
    assert compare(target, *copies, np.repeat(np.arange(30), 20)).gain.error == pytest.approx(once.error, rel=0.05)
    assert compare(target, *copies).gain.error < once.error / 2
    if target.has_classes:
        assert once.error == pytest.approx(compare(target, labels, one, other).gain.error, rel=0.1)


def test_equal_predictions_have_no_gain_but_an_error() -> None:
    labels, logits, _ = draw(NUMBERED, 20, 0.5, np.random.default_rng(0))
    assert compare(NUMBERED, labels, logits, logits).gain == Gain(mean=0.0, error=pytest.approx(1 / 20))


def test_a_target_whose_best_quality_is_zero_counts_errors_from_there() -> None:
    class Negative(Regression):
        best_quality = 0.0

    assert find_error(Negative(names=("x",)), -0.2, 100) == pytest.approx((20 + 0.5) / 101)


def test_thresholds_are_fitted_to_no_fold_and_a_note_says_that_f1_is_optimistic(table: Path) -> None:
    session = open_shapes("labels", table)
    probe = make_strategy("linear_probe", readouts="none")
    session = session.with_strategy(probe)
    result = probe.run(probe.restart(session))
    finished = finish_target(session, result)
    assert finished.backbone.target != result.backbone.target, "the thresholds moved"
    assert any("metrics of decisions are optimistic" in note for note in finished.validation.notes)
    held_out = replace(session, data=replace(session.data, holds_out_validation=True))
    assert _fit_decisions(held_out, result, is_scored=True) is result


# --- what is expected ----------------------------------------------------------------------------------------------------


def test_the_amount_of_data_is_counted_for_each_output() -> None:
    assert SingleLabel(names=("a", "b")).count_examples(np.array([0, 1, 1, 1])).tolist() == [1, 3]
    flags = np.array([[1, 1, np.nan], [0, 1, 1], [0, 1, 0], [0, 0, 0]], np.float32)
    assert LABELED.count_examples(flags).tolist() == [1, 1, 1], "the rarer of present and absent"
    numbers = np.array([[1.0, np.nan], [2.0, 3.0], [3.0, np.nan], [4.0, 5.0]], np.float32)
    assert NUMBERED.count_examples(numbers).tolist() == [2, 1], "above and below the median of the known ones"


@pytest.mark.parametrize("kind", COLUMNS)
def test_premises_need_no_classes(kind: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_shapes(kind, table)
    evidence = gather_evidence(session, head=read_head(session.config.model, session.chain), readouts=False)
    similarity = measure_similarity(evidence)
    assert [m.name for m in similarity.measures] == ["confidence", "batchnorm"]
    premises = gather_premises(session)
    assert (premises.advice, premises.doubt) == (None, UNSEEN)
    assert premises.regime.similarity == pytest.approx(similarity.score, abs=1e-6)
    examples = session.data.target.count_examples(evidence.labels)
    assert premises.regime.images_per_class == np.median(examples)
    assert premises.images_per_second > 0
    assert premises.probe_seconds > 0
    entries = decide.list_entries(session, premises, 0.2)
    for entry in entries:
        contender = entry.candidate.contender
        log_ratio = float(premises.regime.weights @ np.array(contender.log_ratios))
        log_ratio *= find_trained_share(session, entry.candidate.strategy, contender)
        assert entry.prior == expect_gain(log_ratio, UNSEEN * contender.find_spread(premises.regime), 0.2)
        assert entry.estimated_s


def test_classes_are_expected_as_advised() -> None:
    session = make_session("auto", images_per_class=4)
    premises = gather_premises(session)
    assert premises.advice is not None
    assert premises.doubt == 1
    assert premises.regime == premises.advice.regime


def test_what_is_expected_for_much_data_is_as_uncertain_for_every_candidate() -> None:
    session = make_session("auto", images_per_class=4)
    few = gather_premises(session)
    many = replace(few, regime=replace(few.regime, images_per_class=1000))
    errors = [{entry.prior.error for entry in decide.list_entries(session, each, 0.2)} for each in (few, many)]
    assert len(errors[0]) == len(candidates.AUTO), "each as fitted"
    assert errors[1] == {0.2 * candidates.GUESSED_SPREAD}


# --- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=COLUMNS)
def kept(
    request: pytest.FixtureRequest, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, ht.Run]:
    """A run that keeps probe_then_full."""
    folder = tmp_path_factory.mktemp("auto") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        expect(monkeypatch, probe_then_full=0.1)
        return request.param, folder, fit(request.param, table, folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_says_what_it_kept_in_the_units_of_its_target(kept: tuple[str, Path, ht.Run], table: Path) -> None:
    kind, folder, run = kept
    choice, validation = run.results["details"]["auto"], run.results["metrics"]["validation"]
    (candidate,) = choice["candidates"]
    assert (candidate["verdict"], candidate["runs"], candidate["num_images"]) == ("kept", 5, 48)
    assert (choice["trained_on_all"], validation["estimated_by"]) == (True, "folds")
    assert candidate["quality"] == pytest.approx(run.validation.score.quality)
    assert candidate["gain"]["mean"] == pytest.approx(candidate["quality"] - candidate["probe_quality"])
    assert "advice" not in run.results["details"]
    assert f"the highest expected gain in {TITLES[kind]} over the linear probe" in choice["reason"]
    number = r"[+-]\d+\.\d points" if kind == "labels" else r"[+-]\d\.\d{3}"
    assert re.search(rf"probe_then_full {number} \(95 % interval [^ ]+ to [^ ]+; measured ", choice["reason"])
    check_run(run, kind, table, folder)


def test_the_kept_model_is_that_of_the_command(kept: tuple[str, Path, ht.Run], table: Path, tmp_path: Path) -> None:
    _, folder, run = kept
    words = shlex.split(run.results["details"]["auto"]["command"])
    assert words[words.index("--dataset") + 1] == table.parent.name, "without the path of this machine"
    words[words.index("--dataset") + 1] = str(table)
    alone = run_command(shlex.join(words), tmp_path / "alone")
    one, other = read_weights(folder), read_weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)
    # Predictions of the folds differ in the last bits, and so do thresholds and losses after calibration, which they fit.
    for split, scores in json.loads((folder / "results.json").read_text())["metrics"].items():
        assert alone["metrics"][split]["score"] == pytest.approx(scores["score"], rel=1e-3)


def test_without_time_the_command_of_the_page_keeps_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "auto.md").read_text()
    (command,) = re.findall(r"^(hf-transfer train auto .*--label_columns .*)$", page, re.MULTILINE)
    (tmp_path / "shapes").mkdir()
    write_shapes(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    words = [*shlex.split(command), "--budget_s", "0.001"]
    main(words[1:])
    results = json.loads((Path(words[words.index("--output_dir") + 1]) / "results.json").read_text())
    choice = results["details"]["auto"]
    assert results["target"]["problem_type"] == "regression"
    assert {each["verdict"] for each in choice["candidates"]} == {"over_budget"}
    assert choice["kept"] == "linear_probe"
    assert "accuracy" not in choice["reason"]
    assert choice["reason"].startswith(
        "auto kept linear_probe: no candidate was judged; probe_then_full, one run of which"
    )


def test_an_interrupted_run_continues_to_the_same_model(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expect(monkeypatch, probe_then_full=0.1)
    monkeypatch.setattr("hf_transfer.choosing.judging.FOLDS", ((1000, 2),))
    whole = fit("numbers", table, tmp_path / "whole")
    epochs, log_epoch = [], loop._log_epoch

    def stop_in_the_second(*values: Any, **named: Any) -> None:
        epochs.append(values)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        log_epoch(*values, **named)

    monkeypatch.setattr(loop, "_log_epoch", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        fit("numbers", table, tmp_path / "run")
    so_far = tmp_path / "run" / "so_far"
    assert ht.load_run(so_far).strategy == "linear_probe"
    task = ht.Task(str(table), "embedded", **SMALL, **COLUMNS["numbers"])
    task.fit(ht.linear_probe(), output_dir=tmp_path / "alone")
    alone, unfinished = read_weights(tmp_path / "alone"), read_weights(so_far)
    assert all(torch.equal(alone[name], unfinished[name]) for name in alone), (
        "the head computes numbers in their own unit"
    )
    with caplog.at_level("INFO"):
        resumed = fit("numbers", table, tmp_path / "run", resume=True)
    assert caplog.text.count("keeping the finished run of probe_then_full") == 1
    assert resumed.metrics == whole.metrics
    one, other = read_weights(tmp_path / "whole"), read_weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "run" / "so_far").exists()
