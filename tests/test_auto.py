"""The strategy `auto`: which images judge, what decides, that its model is a recipe's own, and how it is interrupted."""

import json
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import hf_transfer as ht
from hf_transfer.choosing import budget, candidates, contest, decide
from hf_transfer.choosing.budget import Budget
from hf_transfer.choosing.candidates import Candidate, Contender, find_trained_share, list_candidates
from hf_transfer.choosing.contest import Allowance, Contest, Entry, Outcome, sort_entries
from hf_transfer.choosing.decide import list_entries
from hf_transfer.choosing.gain import expect_gain, find_best, measure_gain, probability_above, update
from hf_transfer.choosing.judging import (
    Division,
    HeldOutPart,
    HeldOutResult,
    divide_images,
    hold_out_validation,
    run_once,
)
from hf_transfer.choosing.premises import Premises
from hf_transfer.choosing.rule import DataRegime, expect_accuracy
from hf_transfer.data.dataset import Data
from hf_transfer.flags import parse
from hf_transfer.repeats import run_config
from hf_transfer.sealed import read_sealed
from hf_transfer.session import Session
from hf_transfer.settings import to_settings
from hf_transfer.strategy import make_strategy
from hf_transfer.training import loop
from hf_transfer.training.final_fit import HeldOutRun
from hf_transfer.training.pricing import Pricing
from hf_transfer.training.records import Gain, Judging
from hf_transfer.training.steps import NonFiniteLossError
from tests.sessions import make_config, make_session, read_data

SCHEMA = json.loads((Path(ht.__file__).parent / "reporting" / "results.schema.json").read_text())
FEW = {"images_per_class": 4, "epochs": 1, "cache": "auto"}


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """The content of results.json of a small run of auto, which fits the schema."""
    session, _ = run_config(make_config("auto", **{**FEW, **settings}), output_dir=folder)
    session.costs.stop()
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    return results


def contender(strategy: str, gain: float = 0.0, **settings: Any) -> Contender:
    """A contender whose log ratio is a number that tests read as its gain."""
    return Contender(strategy=strategy, settings=settings, log_ratios=(gain,) * 4, spread=0.1)


def expect(monkeypatch: pytest.MonkeyPatch, **gains: float) -> None:
    """Lets auto compare these strategies, and expect these gains so firmly that measurements do not matter."""
    monkeypatch.setattr(candidates, "AUTO", [contender(name, gain) for name, gain in gains.items()])

    def expected(log_ratio: float, spread: float, probe_error: float) -> Gain:
        return Gain(mean=log_ratio, error=1e-6)

    monkeypatch.setattr(decide, "expect_gain", expected)
    monkeypatch.setattr(decide, "find_trained_share", lambda *_: 1.0)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def run_command(command: str, folder: Path) -> dict[str, Any]:
    """The results of the command in results.json, in this process."""
    program, train, name, *flags = shlex.split(command)
    assert (program, train) == ("hf-transfer", "train")
    config = parse(name, prog="test", description=None, arguments=[*flags, "--output_dir", str(folder)]).config
    session, _ = run_config(config, output_dir=folder)
    session.costs.stop()
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that keeps probe_then_full, and stops full after one fold."""
    folder = tmp_path_factory.mktemp("auto") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        expect(monkeypatch, probe_then_full=0.1, full=-0.1)
        return folder, run(folder)


# Which images judge


def test_few_images_are_judged_in_folds_and_many_by_the_validation_split() -> None:
    few, more, many = (read_data(make_config("auto", images_per_class=n).data) for n in (4, 40, 110))
    assert [len(divide_images(data, 0).parts) for data in (few, more, many)] == [5, 3, 1]
    folds = divide_images(few, 0)
    assert sorted(np.concatenate([part.rows for part in folds.parts]).tolist()) == list(range(40))
    assert all(part.data.test is None and part.data.holds_out_validation for part in folds.parts)
    stored = divide_images(replace(few, draws_validation=False), 0)
    assert stored.judged_by is Judging.VALIDATION, "a data set's own validation split is not divided"
    assert stored.parts[0].rows.tolist() == list(range(30, 40))


def test_images_that_cannot_be_divided_are_judged_by_the_validation_split(caplog: pytest.LogCaptureFixture) -> None:
    data = read_data(make_config("auto", images_per_class=2).data)
    one = replace(data, validation=data.validation.select(np.flatnonzero(data.validation.labels > 0)))
    with caplog.at_level("INFO"):
        assert divide_images(one, 0).judged_by is Judging.VALIDATION
    assert "one image" in caplog.text


# What decides


def test_the_posterior_lies_between_prior_and_measurement_by_their_precision() -> None:
    prior = Gain(mean=0.1, error=0.05)
    few, many = (update(prior, Gain(mean=-0.1, error=error)) for error in (0.2, 0.001))
    assert few.mean == pytest.approx((0.1 * 400 - 0.1 * 25) / 425)
    assert many.mean == pytest.approx(-0.1, abs=1e-3)
    assert few.error < prior.error
    assert probability_above(few, few.mean + 1.96 * few.error) == pytest.approx(0.025, abs=1e-4)


def test_a_gain_of_no_image_still_has_an_error() -> None:
    assert measure_gain(np.zeros(10), np.zeros(10)) == Gain(mean=0.0, error=pytest.approx(0.1))


def draw_differences(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences of hits (N,) and of probabilities (N,) between a good and a poor network for two classes."""
    known = 2 * generator.normal(size=count)
    logits = [own * known + other * generator.normal(size=count) for own, other in ((0.9, 0.8), (0.7, 1.4))]
    labels = generator.random(count) < 1 / (1 + np.exp(-known))
    hits = [((each > 0) == labels).astype(float) for each in logits]
    probabilities = [1 / (1 + np.exp(np.where(labels, -each, each))) for each in logits]
    return hits[0] - hits[1], probabilities[0] - probabilities[1]


def test_on_few_images_probabilities_measure_the_gain_more_exactly_than_hits() -> None:
    generator = np.random.default_rng(0)
    accuracy_gain = draw_differences(400_000, generator)[0].mean()
    drawn = [draw_differences(60, generator) for _ in range(400)]
    by_hits = np.array([hits.mean() for hits, _ in drawn])
    gains = [measure_gain(*each) for each in drawn]
    errors = np.array([gain.mean for gain in gains]) - accuracy_gain
    assert np.sqrt((errors**2).mean()) < 0.7 * np.sqrt(((by_hits - accuracy_gain) ** 2).mean())
    assert np.mean([abs(error) < 1.96 * gain.error for error, gain in zip(errors, gains, strict=True)]) > 0.95


def test_on_many_images_hits_measure_the_gain() -> None:
    hits, probabilities = draw_differences(50_000, np.random.default_rng(0))
    assert abs(hits.mean() - probabilities.mean()) > 0.02
    assert measure_gain(hits, probabilities).mean == pytest.approx(hits.mean(), abs=0.001)


def test_the_expected_gain_is_a_share_of_the_probes_error() -> None:
    poor, good = (expect_gain(-1.5, 0.3, error) for error in (0.4, 0.04))
    assert poor.mean == pytest.approx(0.4 * (1 - np.exp(-1.5)))
    assert poor.error == pytest.approx(0.4 * 0.3)
    assert poor.mean / good.mean == pytest.approx(10)
    assert poor.error / good.error == pytest.approx(10)
    assert expect_gain(0.0, 0.3, 0.1).mean == 0


def test_two_lucky_images_of_twenty_do_not_outweigh_an_expected_loss() -> None:
    """Few images like those of pretraining, where full fine-tuning is expected to make more errors than the probe."""
    prior = expect_gain(0.55, 0.37, 5.5 / 21)
    lucky, many = np.array([1.0] * 3 + [-1.0] + [0.0] * 16), np.array([1.0] * 150 + [-1.0] * 50 + [0.0] * 800)
    assert prior.mean < -0.1
    assert update(prior, measure_gain(lucky, lucky)).mean < 0
    assert update(prior, measure_gain(many, many)).mean > 0.05


def test_equal_gains_go_to_the_cheaper_and_no_gain_to_the_probe() -> None:
    a, b = Gain(mean=0.02, error=0.1), Gain(mean=0.02, error=0.01)
    assert find_best([a, b]) == 0
    assert find_best([Gain(mean=0.0, error=0.1)]) is None
    assert find_best([]) is None


def make_entry(name: str = "full", gain: float = 0.01, cost: float = 1.0, seconds: float | None = 10.0) -> Entry:
    candidate = Candidate(name=name, strategy=make_strategy("full"), contender=contender("full"))
    return Entry(candidate=candidate, prior=Gain(mean=gain, error=0.1), estimated_s=seconds, cost=cost)


def make_contest(division: Division, logits: NDArray[np.float32], given: Budget | None = None) -> Contest:
    session = replace(make_session("auto", **FEW), data=division.data)
    probe = make_strategy("linear_probe", readouts="none")
    return Contest(session=session, division=division, probe=probe, probe_logits=logits, budget=given or Budget(None))


def test_the_highest_expected_gain_per_cost_comes_first() -> None:
    entries = [
        make_entry("loss", -0.1, 1),
        make_entry("dear", 0.02, 10),
        make_entry("cheap", 0.01, 1),
        make_entry("less", -0.2),
    ]
    assert [e.candidate.name for e in sort_entries(entries)] == ["cheap", "dear", "loss", "less"]


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [
        (None, (Judging.FOLDS, 5, True)),
        (63.4, (Judging.FOLDS, 5, True)),
        (45.0, (Judging.FOLDS, 3, True)),
        (25.0, (Judging.VALIDATION, 1, True)),
        (15.0, (Judging.VALIDATION, 1, False)),
        (9.0, None),
    ],
)
def test_a_budget_decides_how_much_of_a_candidate_runs(
    left_s: float | None, expected: tuple[Judging, int, bool] | None
) -> None:
    """A run takes 10 s, and a run on all images 13.3 s."""
    division = divide_images(read_data(make_config("auto", images_per_class=4).data), 0)
    own = make_contest(division, predict(division), Budget(left_s))
    allowance = own._allow(make_entry(), left_s)
    found = allowance and (allowance.division.judged_by, allowance.num_runs, allowance.has_final)
    assert found == expected


def predict(division: Division, *, misses: int = 0) -> NDArray[np.float32]:
    """Logits (N, 10) for the images of the pool, right except for the first `misses` images."""
    wanted = (division.pool.labels + (np.arange(len(division.pool)) < misses)) % 10
    return np.eye(10, dtype=np.float32)[wanted]


def test_nothing_runs_where_nothing_is_left_to_gain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = read_data(make_config("auto", images_per_class=9).data)
    many = divide_images(read_data(make_config("auto", images_per_class=10).data), 0)
    monkeypatch.setattr(Contest, "_allow", lambda *_: pytest.fail("the candidate was about to run"))
    own = make_contest(many, predict(many))
    with caplog.at_level("INFO"):
        own.enter(make_entry())
    assert [record.verdict for record in own.finish()] == ["nothing_to_gain"]
    assert "the best so far has accuracy 100.0 %" in caplog.text
    # 90 images are too few to know, and an error on one of 100 is 1 %.
    for division, misses in ((divide_images(few, 0), 0), (many, 1)):
        logits = predict(division, misses=misses)
        own = make_contest(division, logits)
        with pytest.raises(pytest.fail.Exception):
            own.enter(make_entry())


def divide_other_labels() -> Division:
    """Validation images of another kind than the training images: each digit is called by the name of the next one."""
    data = read_data(make_config("auto", images_per_class=8).data)
    other = replace(data.validation, labels=(data.validation.labels + 1) % 10)
    return divide_images(replace(data, validation=other, draws_validation=False), 0)


def test_the_probe_that_a_candidate_is_compared_with_has_not_seen_the_held_out_images_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    division = divide_other_labels()
    (part,) = division.parts
    wrong = np.eye(10, dtype=np.float32)[(part.data.validation.labels - 1) % 10]  # what the training images teach

    def pretend(*_: object) -> HeldOutResult:
        return HeldOutResult(run=HeldOutRun(phases=()), logits=wrong, seconds=1.0)

    monkeypatch.setattr(contest, "run_held_out", pretend)
    own = make_contest(division, predict(division))
    own.session = replace(own.session, data=division.data)
    own.probe_logits = predict(division, misses=len(division.pool) // 2)
    own.enter(make_entry())
    (record,) = own.finish()
    assert record.probe_quality is not None
    assert record.probe_quality < 0.2
    assert record.gain is not None
    assert abs(record.gain.mean) < 0.2


def test_a_candidate_that_diverges_is_dropped_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expect(monkeypatch, full=0.2, probe_then_full=0.1)
    run_held_out = contest.run_held_out

    def diverge(session: Any, candidate: Candidate, part: HeldOutPart) -> HeldOutResult:
        if candidate.name == "full" and part.name == "fold_2":
            raise NonFiniteLossError("the loss is nan")
        return run_held_out(session, candidate, part)

    monkeypatch.setattr(contest, "run_held_out", diverge)
    results = run(tmp_path / "run")
    assert [(row["name"], row["verdict"]) for row in results["details"]["auto"]["candidates"]] == [
        ("full", "diverged"),
        ("probe_then_full", "kept"),
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 of 2 candidates diverged" in page
    assert "the best of 1 judged candidate" in page


@pytest.mark.parametrize("kept", ["full", "linear_probe"])
def test_if_the_final_fit_diverges_the_next_best_takes_its_place(
    kept: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gains = {"probe_then_full": 0.2, "full": 0.1 if kept == "full" else -0.1}
    expect(monkeypatch, **gains)
    log_epoch, plans = loop._log_epoch, []

    def diverge(record: Any, run: Any, *rest: Any) -> None:
        if run.length is not None:
            plans.append(run.session.strategy.name)
            if plans[-1] == "probe_then_full":
                raise NonFiniteLossError("the loss is nan")
        log_epoch(record, run, *rest)

    monkeypatch.setattr(loop, "_log_epoch", diverge)
    with caplog.at_level("INFO"):
        choice = run(tmp_path / "run", save_every_s=0.0)["details"]["auto"]
    verdicts = {row["name"]: row["verdict"] for row in choice["candidates"]}
    assert verdicts == {"probe_then_full": "diverged", "full": "kept" if kept == "full" else "unlikely"}
    assert choice["kept"] == kept
    assert choice["command"].startswith(f"hf-transfer train {kept}")
    assert "auto drops probe_then_full: its training on all images diverged (the loss is nan)" in caplog.text
    assert plans == ["probe_then_full", *(["full"] if kept == "full" else [])]
    alone = run_command(choice["command"], tmp_path / "alone")
    assert choice["command_is_exact"] == (kept == "linear_probe"), "full was stopped after a fold"
    if choice["command_is_exact"]:
        one, other = read_weights(tmp_path / "run"), read_weights(tmp_path / "alone")
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert alone["metrics"]["validation"]["accuracy"] == choice["probe"]["accuracy"]


def test_a_model_of_the_training_images_is_trained_on_the_images_of_the_command() -> None:
    """Without a pool, whose images would choose the size of the squares."""
    session, opened = make_session("auto", **FEW), list[Data]()

    class StopError(Exception):
        pass

    def restart(own: Session) -> Session:
        opened.append(own.data)
        raise StopError

    candidate = make_entry().candidate
    object.__setattr__(candidate.strategy, "restart", restart)
    with pytest.raises(StopError):
        run_once(session, candidate)
    assert opened == [replace(session.data, test=None)]


def test_fewer_epochs_let_expect_less() -> None:
    """Expectations are of runs with a candidate's own epochs; with a sixth of them, a sixth of the gain is expected."""
    settings = {"images_per_class": 10}
    whole, longer, shorter = (make_session("auto", **settings, epochs=epochs) for epochs in (12, 24, 2))
    (first, *_) = list_candidates(whole)
    assert (first.name, to_settings(first.strategy)["epochs"]) == ("probe_then_full", 12)
    for session, share in ((whole, 1.0), (longer, 1.0), (shorter, 1 / 6)):
        (candidate, *_) = list_candidates(session)
        assert find_trained_share(session, candidate.strategy, candidate.contender) == pytest.approx(share)
    assert find_trained_share(shorter, make_strategy("linear_probe"), None) == 1.0
    regime, probe = DataRegime(images_per_class=1000, similarity=0.1), (0.6, 0.5, 0.7)
    gains = [expect_accuracy("full", regime, probe, trained_share=share)[0] - 0.6 for share in (0.0, 0.2, 1.0)]
    assert gains[0] == pytest.approx(0.0)
    assert 0 < gains[1] < gains[2] / 2


def test_a_head_of_zeros_does_not_run_for_a_small_part_of_its_epochs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a head starts at chance, so with few epochs nothing like the probe is to be expected of it."""
    premises = Premises(
        regime=DataRegime(images_per_class=4, similarity=0.5),
        images_per_second=100.0, probe_seconds=0.1, doubt=1.0, images_computed=0, advice=None,
    )  # fmt: skip
    division = divide_images(read_data(make_config("auto", images_per_class=4).data), 0)

    def diverge(*_: object) -> Outcome:
        raise NonFiniteLossError("the loss is nan")

    monkeypatch.setattr(Contest, "_judge", diverge)
    monkeypatch.setattr(decide, "measure_step_speed", lambda _: 100.0)
    for epochs, num_left_out in ((1, 2), (12, 0)):  # 12 is the default: each candidate has its own epochs
        own = make_contest(division, predict(division, misses=9))
        own.session = replace(make_session("auto", images_per_class=4, epochs=epochs), data=division.data)
        with caplog.at_level("INFO"):
            for entry in list_entries(own.session, premises, 0.2):
                own.enter(entry)
        verdicts = {record.name: record.verdict for record in own.finish()}
        left_out = [name for name, verdict in verdicts.items() if verdict == "too_short"]
        assert (len(verdicts), len(left_out)) == (4, num_left_out)
        assert all("head_scale=0.0" in name for name in left_out)
        assert set(verdicts.values()) <= {"too_short", "diverged"}
    assert "5 % of its own epochs are too few for a head that starts from zeros" in caplog.text


def test_candidates_keep_their_last_epoch_and_take_the_settings_that_the_user_gave() -> None:
    session = make_session("auto", lr=1e-3, **FEW)
    for candidate in list_candidates(session):
        settings = to_settings(candidate.strategy)
        assert (settings["keep_last_epoch"], settings["lr"], settings["epochs"]) == (True, 1e-3, 1)
        assert settings["min_steps"] == 0, "the user said how long to train"
    assert len(list_candidates(make_session("auto", **FEW))) == 4
    assert len({candidate.name for candidate in list_candidates(session)}) == len(list_candidates(session)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 3}, "auto chooses its own folds"),
        ({"train_on_all": True}, "auto chooses its own folds"),
        ({"wise_ft": True}, "wise_ft=True: the images that compare .* omit --wise_ft"),
        ({"early_stopping_patience": 2}, "omit --early_stopping_patience"),
        ({"select_by": "log_loss"}, "omit --select_by"),
        ({"seeds": 2, "budget_s": 60.0}, "omit --budget_s or --seeds"),
    ],
)
def test_settings_that_auto_decides_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_session("auto", **settings)


# The model


def test_results_list_every_candidate(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, results = tuned
    choice = results["details"]["auto"]
    kept, stopped = choice["candidates"]
    assert (kept["name"], kept["verdict"], kept["runs"], kept["num_images"]) == ("probe_then_full", "kept", 5, 40)
    assert (stopped["name"], stopped["verdict"], stopped["runs"], stopped["num_images"]) == ("full", "unlikely", 1, 8)
    assert kept["gain"]["mean"] == pytest.approx(kept["quality"] - kept["probe_quality"])
    assert results["metrics"]["validation"]["accuracy"] == pytest.approx(kept["quality"])
    assert results["metrics"]["validation"]["estimated_by"] == "folds"
    assert results["metrics"]["validation"]["num_samples"] == 40
    assert "auto kept probe_then_full: the highest expected gain in accuracy over the linear probe" in choice["reason"]
    assert "points (95 % interval" in choice["reason"]
    assert not (folder / "so_far").exists()
    assert "on 40 images of 5 folds" in (folder / "model" / "README.md").read_text()


def test_without_test_images_log_and_card_say_that_the_metrics_are_of_the_best_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expect(monkeypatch, probe_then_full=0.1)
    with caplog.at_level("INFO"):
        run(tmp_path / "chosen", test_split="none")
        *_, line = [line for line in caplog.messages if line.startswith("validation: ")]
        assert "had not trained on its fold; optimistic" in line
        caplog.clear()
        run(tmp_path / "alone", test_split="none", budget_s=1e-3)
        *_, line = [line for line in caplog.messages if line.startswith("validation: ")]
        assert "optimistic" not in line
    sentence = "These predictions also chose the strategy, so the metrics are optimistic."
    for file in ("report.html", "model/README.md"):
        assert sentence in (tmp_path / "chosen" / file).read_text()
        assert sentence not in (tmp_path / "alone" / file).read_text()


def test_the_kept_model_is_that_of_the_command(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, results = tuned
    alone = run_command(results["details"]["auto"]["command"], tmp_path / "alone")
    one, other = read_weights(folder), read_weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["metrics"]["test"]["accuracy"] == alone["metrics"]["test"]["accuracy"]
    assert results["metrics"]["validation"]["accuracy"] == alone["metrics"]["validation"]["accuracy"]


@pytest.mark.parametrize("judged", ["folds", "validation", "two folds"])
def test_the_command_gives_the_same_temperature_unless_folds_are_missing(
    judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, probe_then_full=0.3)

    def allow(own: Contest, entry: Entry, left_s: float | None) -> Allowance:
        division = hold_out_validation(own.division) if judged == "validation" else own.division
        return Allowance(
            division=division, num_runs=2 if judged == "two folds" else len(division.parts), has_final=True
        )

    monkeypatch.setattr(contest.Contest, "_allow", allow)
    results = run(tmp_path / "run", images_per_class=8, epochs=4, lr=2e-3, label_smoothing=0.3)
    choice, (temperature,) = results["details"]["auto"], set(results["details"]["confidence"]["temperatures"])
    alone = run_command(choice["command"], tmp_path / "alone")
    (of_command,) = set(alone["details"]["confidence"]["temperatures"])
    one, other = read_weights(tmp_path / "run"), read_weights(tmp_path / "alone")
    assert 0.1 < temperature < 0.95
    assert choice["command_is_exact"] == (judged != "two folds")
    if choice["command_is_exact"]:
        assert temperature == of_command
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        assert "its command fits the temperature on all folds" in choice["reason"]
        assert temperature != of_command
        head = {name for name in one if not torch.equal(one[name], other[name])}
        assert head == {name for name in one if name.startswith("fc.")}
        for name in head:  # each is rounded to float32 once
            torch.testing.assert_close(one[name] * temperature, other[name] * of_command, rtol=1e-6, atol=1e-6)


def test_a_short_path_is_replaced_in_commands_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder "." has the name e, which sentences and numbers must not get in place of each full stop."""
    for name in "ab":
        (tmp_path / "e" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((8, 8, 3), 40 + 100 * (name == "b") + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "e" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path / "e")
    results = run(tmp_path / "run", dataset=".", images_per_class=None, budget_s=1e-3)
    advice, choice = results["details"]["advice"], results["details"]["auto"]
    assert re.match(r"[^.]*\d\.\d %", advice["reason"])
    commands = [choice["command"], advice["command"], *(each["command"] for each in advice["estimates"])]
    commands += [each["command"] for each in advice["suggestions"] if each["command"]]
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("--dataset") + 1] == "e"
        assert str(tmp_path) not in command


def test_a_kept_probe_is_the_probe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, probe_then_full=-0.1, full=-0.1)
    results = run(tmp_path / "run")
    choice = results["details"]["auto"]
    assert choice["kept"] == "linear_probe"
    assert [each["runs"] for each in choice["candidates"]] == [1, 1], "stopped after the first fold"
    alone = run_command(choice["command"], tmp_path / "alone")
    assert results["metrics"] == alone["metrics"]
    one, other = read_weights(tmp_path / "run"), read_weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_time_for_a_final_fit_the_model_of_the_training_images_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, probe_then_full=0.1, full=-0.1)

    def allow(own: Contest, entry: Entry, left_s: float | None) -> Allowance | None:
        if entry.candidate.name == "full":
            return None
        return Allowance(division=hold_out_validation(own.division), num_runs=1, has_final=False)

    monkeypatch.setattr(contest.Contest, "_allow", allow)
    results = run(tmp_path / "run")
    choice = results["details"]["auto"]
    assert (choice["kept"], choice["trained_on_all"]) == ("probe_then_full", False)
    assert [each["verdict"] for each in choice["candidates"]] == ["kept", "over_budget"]
    alone = run_command(choice["command"], tmp_path / "alone")
    assert results["metrics"] == alone["metrics"]
    one, other = read_weights(tmp_path / "run"), read_weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fewer_folds_give_metrics_of_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, probe_then_full=0.1, full=-0.1)

    def allow(own: Contest, entry: Entry, left_s: float | None) -> Allowance | None:
        return Allowance(division=own.division, num_runs=2, has_final=True) if entry.prior.mean > 0 else None

    monkeypatch.setattr(contest.Contest, "_allow", allow)
    results = run(tmp_path / "run")
    assert results["metrics"]["validation"]["num_samples"] == 16
    rows = ht.load_run(tmp_path / "run").results["metrics"]["test"]["num_samples"]
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert sum(row["split"] != "test" for row in table) == 16
    assert sum(row["split"] == "test" for row in table) == rows


def test_a_finished_run_keeps_what_resuming_needs_and_no_optimizer(
    tuned: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = tuned
    states = list((folder / "checkpoints").rglob("*.safetensors"))
    assert {path.name for path in states} == {"state.safetensors"}
    weights = (folder / "model" / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in states) < 1.5 * weights
    expect(monkeypatch, probe_then_full=0.1, full=-0.1)
    shutil.copytree(folder, tmp_path / "run")
    epochs: list[Any] = []
    monkeypatch.setattr(loop, "_log_epoch", lambda *values, **_: epochs.append(values))
    results = run(tmp_path / "run", resume=True)
    assert not epochs
    assert results["metrics"] == expected["metrics"]
    one, other = read_weights(folder), read_weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


# An interrupted run


def test_a_resumed_run_repeats_what_the_budget_decided_and_another_budget_decides_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the final fit would follow from other folds than the state that it continues from."""
    expect(monkeypatch, probe_then_full=0.1)
    num_runs, epochs, log_epoch = 2, list[Any](), loop._log_epoch

    def allow(own: Contest, entry: Entry, left_s: float | None) -> Allowance:
        return Allowance(division=own.division, num_runs=num_runs, has_final=True)

    def count(*values: Any, **named: Any) -> None:
        epochs.append(values)
        log_epoch(*values, **named)

    monkeypatch.setattr(contest.Contest, "_allow", allow)
    monkeypatch.setattr(loop, "_log_epoch", count)
    first = run(tmp_path / "run", budget_s=1e6)
    assert (len(epochs), first["metrics"]["validation"]["num_samples"]) == (3, 16)
    num_runs = 5
    again = run(tmp_path / "run", budget_s=1e6, resume=True)
    assert (len(epochs), again["metrics"]) == (3, first["metrics"])
    more = run(tmp_path / "run", budget_s=2e6, resume=True)
    assert (len(epochs), more["metrics"]["validation"]["num_samples"]) == (3 + 3 + 1, 40)


def test_the_time_of_an_interrupted_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now)
    own = Budget(100.0, tmp_path / "auto")
    now = 30.0
    assert own.decide("a", lambda left_s: left_s) == 70.0
    now = 1000.0  # of another process
    own = Budget(100.0, tmp_path / "auto", resumes=True)
    assert (own.starts_over, own.decide("a", lambda left_s: 0.0), own.decide("b", lambda left_s: left_s)) == (
        False,
        70,
        70,
    )
    now = 1020.0
    own.save()
    assert Budget(100.0, tmp_path / "auto", resumes=True).decide("c", lambda left_s: left_s) == 50
    own = Budget(200.0, tmp_path / "auto", resumes=True)
    assert (own.starts_over, own.decide("a", lambda left_s: left_s)) == (True, 200.0)
    assert Budget(None, tmp_path / "auto", resumes=True).starts_over
    assert Budget(None, tmp_path / "other", resumes=True).decide("a", lambda left_s: left_s) is None
    assert not Budget(None, tmp_path / "other", resumes=True).starts_over


def test_the_time_of_an_interrupted_fold_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each epoch takes 1,000 s more than it does."""
    expect(monkeypatch, probe_then_full=0.1)
    perf_counter, log_epoch, passed_s, interrupts = time.perf_counter, loop._log_epoch, 0.0, True

    def allow(own: Contest, entry: Entry, left_s: float | None) -> Allowance:
        return Allowance(division=own.division, num_runs=1, has_final=True)

    def take_long(record: Any, *rest: Any) -> None:
        nonlocal passed_s
        passed_s += 1000
        if interrupts and record.epoch == 2:
            raise KeyboardInterrupt
        log_epoch(record, *rest)

    monkeypatch.setattr(contest.Contest, "_allow", allow)
    monkeypatch.setattr(loop, "_log_epoch", take_long)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + passed_s)
    settings = {"budget_s": 1e6, "epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", **settings)
    assert 2000 < read_sealed(tmp_path / "run" / "checkpoints" / "auto" / "decisions.json")["passed_s"] < 3000
    interrupts = False
    (record,) = run(tmp_path / "run", resume=True, **settings)["details"]["auto"]["candidates"]
    assert 2000 < record["seconds"] < 3000, "the first epoch, and the second one again"


def test_processes_share_the_time_of_passes_and_steps_but_not_of_the_solver() -> None:
    session = make_session("auto", **FEW)
    several = SimpleNamespace(num_processes=4, gradient_accumulation_steps=1, device=session.accelerator.device)
    alone, shared = (
        Pricing(session=each, images_per_second=1.0, probe_seconds=8.0)
        for each in (session, replace(session, accelerator=several))  # type: ignore[arg-type]
    )
    assert (alone.price_probe().seconds, shared.price_probe().seconds) == (40 + 8, 10 + 8)
    full = make_strategy("full", epochs=1)
    prices = [full.price(pricing) for pricing in (alone, shared)]
    assert prices[0] is not None
    assert prices[1] is not None
    assert prices[0].seconds == pytest.approx(4 * prices[1].seconds)


def test_estimates_follow_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    division = divide_other_labels()
    (part,) = division.parts
    logits = np.zeros((len(part.data.validation), 10), np.float32)

    def pretend(*_: object) -> HeldOutResult:
        return HeldOutResult(run=HeldOutRun(phases=()), logits=logits, seconds=30.0)

    monkeypatch.setattr(contest, "run_held_out", pretend)
    own = make_contest(division, predict(division, misses=30))
    for name in ("first", "second"):
        own.enter(make_entry(name, seconds=10.0))
    assert [record.estimated_s for record in own.finish()] == [10.0, 30.0]


def test_an_interrupted_run_leaves_a_model_and_continues(
    tuned: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, expected = tuned
    expect(monkeypatch, probe_then_full=0.1, full=-0.1)
    epochs, log_epoch = [], loop._log_epoch

    def stop_in_the_third(*values: Any, **named: Any) -> None:
        epochs.append(values)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        log_epoch(*values, **named)

    monkeypatch.setattr(loop, "_log_epoch", stop_in_the_third)
    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    assert caplog.text.count("so_far") == 1
    for words in ("Kept:", "validation: ", "temperature", "wrote "):
        assert words not in caplog.text, "nothing says that the run had ended"
    caplog.clear()
    assert not (tmp_path / "run" / "results.json").exists()
    so_far = ht.load_run(tmp_path / "run" / "so_far")
    jsonschema.validate(json.loads((tmp_path / "run" / "so_far" / "results.json").read_text()), SCHEMA)
    assert (so_far.strategy, set(so_far.metrics)) == ("linear_probe", {"validation"})
    assert so_far.predict(np.zeros((8, 8, 3), np.uint8))
    with caplog.at_level("INFO"):
        results = run(tmp_path / "run", resume=True)
    assert len(epochs) == 7 + 1, "five folds, a fold of full, the final fit, and the epoch that was cut off"
    assert caplog.text.count("keeping the finished run of probe_then_full") == 2
    assert "auto tries full without fold 1 of 5" in caplog.text
    assert sum(line.startswith("epoch ") for line in caplog.messages) == 1, "only the final fit logs its epochs"
    assert results["metrics"] == expected["metrics"]
    weights = [read_weights(each) for each in (whole, tmp_path / "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "run" / "so_far").exists()
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"other settings: .*lr was"):
        run(tmp_path / "run", resume=True, lr=0.1)
