"""Advice: its content, that the run after it computes no feature twice, and that its commands run what it advises."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_transfer.choosing.advise import Advice, Estimate, _add_pilots, _recommend, advise
from hf_transfer.choosing.candidates import count_own_epochs, find_candidates, list_candidates, make_command, to_k
from hf_transfer.choosing.expected_accuracy import CurvePoint, DepthScore, LearningCurve
from hf_transfer.choosing.pilots import Pilot, run_pilots
from hf_transfer.choosing.rule import STRATEGIES, DataRegime
from hf_transfer.choosing.suggestions import suggest
from hf_transfer.choosing.table import format_advice
from hf_transfer.cli import main
from hf_transfer.costs import Costs
from hf_transfer.flags import parse
from hf_transfer.launch import run_recipe
from hf_transfer.metrics.records import Score
from hf_transfer.network.backbone import load
from hf_transfer.runs import open_session
from hf_transfer.session import Session
from hf_transfer.settings import changed_settings, replace_settings, to_settings
from hf_transfer.strategy import default_config, make_strategy
from hf_transfer.training.pricing import count_activation_bytes
from tests.families import built

ROOT = Path(__file__).parents[1]
SETTINGS = {"images_per_class": 8, "epochs": 2, "batch_size": 16, "tracker": "none"}


def make_session(output_dir: Path | None = None, **settings: Any) -> Session:
    config = replace_settings(default_config("auto"), SETTINGS | settings)
    return open_session(config, output_dir=output_dir)


@pytest.fixture(scope="module")
def session() -> Session:
    return make_session()


@pytest.fixture(scope="module")
def advice() -> Advice:
    return advise(make_session())


def test_advice_reports_measurements_and_expectations(advice: Advice) -> None:
    # The session sets `epochs`, which replaces the length of training of auto's candidates.
    also = [f"probe_then_full {own}" for own in ("head_scale=0.0", "lr=0.001", "head_scale=0.0 crop_scale=0.08")]
    assert [e.strategy for e in advice.estimates] == [*STRATEGIES, *also]
    sources = {e.strategy: e.source for e in advice.estimates}
    assert sources.pop("linear_probe") == "measured"
    assert set(sources.values()) == {"expected"}
    assert all(0 <= e.low <= e.accuracy <= e.high <= 1 for e in advice.estimates)
    assert all(e.seconds > 0 and e.memory_bytes > 0 for e in advice.estimates)
    assert advice.regime.cell == "little, similar"  # MNIST's network on digits, 8 a class
    assert advice.images_per_class == {"smallest": 8, "median": 8, "largest": 8}
    assert advice.depths[-1].is_native
    shown = format_advice(advice)
    for part in (advice.reason, advice.command, "95 % interval", "confidence", "batchnorm"):
        assert part in shown
    assert json.loads(json.dumps(advice.to_dict(), allow_nan=False))["recommended"] == advice.recommended


def test_the_estimated_probe_agrees_with_the_recipes_probe(advice: Advice, session: Session) -> None:
    """Other folds and a coarser grid of C: the recipe's accuracy lies within the advised interval."""
    strategy = make_strategy("linear_probe")
    result = strategy.run(strategy.restart(session.without_test()))
    probe = advice.estimates[0]
    chosen = result.details["readouts"][0]["held_out_accuracy"]  # of train and validation, cross-validated
    assert probe.low <= chosen <= probe.high


@pytest.mark.parametrize(
    ("name", "after_advice"),
    # last_layers also stores activations at its cut; advice stores only pooled features.
    [("linear_probe", False), ("last_layers", True), ("lora", False), ("probe_then_full", False)],
)
def test_the_run_that_follows_makes_no_second_pass(
    name: str, after_advice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costs count the images that the frozen network ran on for features: none after advice, all without."""
    seen = []
    for is_advised in (False, True):
        monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / str(is_advised)))
        session = make_session(epochs=1).without_test()
        data = session.data
        if is_advised:
            assert advise(session).cost["images_computed"] == len(data.train) + len(data.validation)
        session = replace(session, costs=Costs())
        strategy = find_candidates(session)[name]
        strategy.run(strategy.restart(session))
        cost = session.costs.read()
        assert "features" in cost.seconds
        seen.append("features" in cost.images_per_second)
        assert "store" not in cost.images_per_second
    assert seen == [True, after_advice]


def test_variants_of_a_strategy_have_folders_of_their_own() -> None:
    session = make_session(images_per_class=4)
    commands = [make_command(session, candidate.strategy) for candidate in list_candidates(session)]
    folders = [command.split("--output_dir ")[1] for command in commands]
    assert folders[0] == "runs/probe_then_full"
    assert len(set(folders)) == len(folders) == 4


def test_the_command_runs_the_advised_settings(advice: Advice, session: Session) -> None:
    """Parsed again, it is the session's configuration with the strategy's settings; only the output folder is new."""
    for estimate in advice.estimates:
        program, train, name, *flags = shlex.split(estimate.command)
        assert (program, train, name) == ("hf-transfer", "train", estimate.strategy.split()[0])
        assert flags[flags.index("--images_per_class") + 1] == "8"
        parsed = to_settings(parse(name, prog="test", description=None, arguments=flags).config)
        advised = to_settings(replace(session.config, strategy=find_candidates(session)[estimate.strategy]))
        folder = flags[flags.index("--output_dir") + 1]
        assert folder.startswith(f"runs/{name}")
        assert "--engine" not in flags, "the run decides in the same way"
        elsewhere = {"output_dir": folder, "tracker": "auto", "engine": "auto"}
        assert parsed == advised | {k: v for k, v in elsewhere.items() if k in parsed}
    other = make_session(dataset="sklearn/digits", on_bad_image="skip", trust_remote_code=True)
    spaced = replace(other.config.data, dataset="a b/c")
    command = make_command(replace(other, config=replace(other.config, data=spaced)), make_strategy("lora"))
    own = replace(session, config=replace_settings(session.config, {"engine": "eager"}), decides_engine=False)
    assert "--engine eager" in make_command(own, make_strategy("lora")), "the user chose it"
    assert "'a b/c'" in command
    assert "--trust_remote_code" in shlex.split(command)
    assert shlex.split(command)[:3] == ["hf-transfer", "train", "lora"]


def test_candidates_have_their_own_defaults_and_the_settings_that_were_changed(session: Session) -> None:
    candidates = find_candidates(session)
    assert tuple(candidates)[: len(STRATEGIES)] == STRATEGIES
    for name in STRATEGIES:
        strategy = candidates[name]
        given = changed_settings(strategy, make_strategy(name))
        assert given == {k: v for k, v in {"epochs": 2, "tracker": "none"}.items() if k in to_settings(strategy)}
    lora = make_strategy("lora")
    assert to_settings(candidates["lora"])["lr"] == to_settings(lora)["lr"] != session.gradient.optimization.lr
    changed = session.with_strategy(replace_settings(session.config.strategy, {"lr": 5e-5}))
    assert to_settings(find_candidates(changed)["lora"])["lr"] == 5e-5  # the user's value wins
    assert to_k(candidates["last_layers"]) <= len(session.chain)


def test_advice_compares_the_candidates_of_auto(session: Session) -> None:
    """With their settings, except that a run of its own may select an epoch."""
    candidates = find_candidates(session)
    for candidate in list_candidates(session):
        kept = changed_settings(candidate.strategy, candidates[candidate.name])
        assert set(kept) <= {"keep_last_epoch"}, candidate.name


def test_activation_bytes_shrink_with_a_later_cut_and_flags_stay() -> None:
    model, chain = built("timm ResNet")
    flags = [p.requires_grad for p in model.parameters()]
    whole = count_activation_bytes(chain, None)
    upper = count_activation_bytes(chain, chain.layers[-3].cut)
    assert 0 < upper < whole
    assert flags == [p.requires_grad for p in model.parameters()]


def estimate(name: str, accuracy: float, spread: float = 0.05) -> Estimate:
    low, high = accuracy - spread, min(1.0, accuracy + spread)
    return Estimate(
        strategy=name, accuracy=accuracy, low=low, high=high, source="expected", seconds=10.0, memory_bytes=1, command="c"
    )  # fmt: skip


def pilot(name: str, epochs: int, accuracy: float) -> Pilot:
    return Pilot(strategy=name, epochs=epochs, score=Score(quality=accuracy, loss=0.3), seconds=1.0)


def test_a_pilot_moves_the_estimate_by_its_precision() -> None:
    """The gain over the probe's pilot counts, on the same images: from 0.8 to 0.9."""
    probe, expected = estimate("linear_probe", 0.7, spread=0.01), estimate("full", 0.7)
    pilots = [pilot("linear_probe", 0, 0.8), pilot("full", 2, 0.9)]
    few, many = (_add_pilots(expected, probe, pilots, n) for n in (10, 100_000))
    assert 0.7 < few.accuracy < many.accuracy < 0.8
    assert many.high - many.low < few.high - few.low < expected.high - expected.low
    assert few.source == "expected and pilot"
    easy = [pilot("linear_probe", 0, 1.0), pilot("full", 2, 1.0)]  # no misses: no evidence
    assert _add_pilots(expected, probe, easy, 20).accuracy == pytest.approx(0.7)
    assert _add_pilots(expected, probe, pilots[:1], 10) == expected
    assert _add_pilots(probe, probe, pilots, 10) == probe


def test_pilots_change_the_choice(advice: Advice) -> None:
    many = replace(
        advice,
        pilots=(pilot("linear_probe", 0, 0.8), pilot("probe_then_full", 12, 1.0)),
        num_images={"train": 4000, "validation": 1000},
        estimates=tuple(  # seconds of our own: measured ones may order the strategies differently on a busy machine
            replace(e, accuracy=0.8, low=0.7, high=0.9, seconds=float(i)) for i, e in enumerate(advice.estimates, 1)
        ),
    )
    assert _recommend(many, None).recommended == "probe_then_full"
    assert _recommend(replace(many, pilots=()), None).recommended == "linear_probe"
    width = {n: _recommend(replace(many, validation_groups=n), None).estimates[3] for n in (None, 10)}
    assert width[None].high - width[None].low < width[10].high - width[10].low  # images of one group count once
    within = _recommend(many, 1.5)
    assert within.recommended == "linear_probe"
    assert "does not fit" in within.reason


def test_pilots_halve_within_the_budget() -> None:
    session = make_session(epochs=3)
    candidates = find_candidates(session)
    two = {name: candidates[name] for name in ("last_layers", "full")}
    pilots = run_pilots(session, two, dict.fromkeys(STRATEGIES, 0.0), budget_s=1e6)
    assert [(p.strategy, p.epochs) for p in pilots[:3]] == [("linear_probe", 0), ("last_layers", 1), ("full", 1)]
    best = min(pilots[1:3], key=lambda p: p.score.rank("accuracy")).strategy
    assert [(p.strategy, p.epochs) for p in pilots[3:]] == [(best, 2)]
    alone = run_pilots(session, {"full": candidates["full"]}, {"full": 1e9}, budget_s=1.0)
    assert [p.strategy for p in alone] == ["linear_probe"]


def test_a_pilot_takes_its_share_of_the_candidates_own_epochs(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when its time is estimated: a full run takes a second for each of its own epochs."""
    own = session.with_strategy(replace_settings(session.config.strategy, {"epochs": 12}))
    candidates = {name: s for name, s in find_candidates(own).items() if name != "linear_probe"}
    full = {name: count_own_epochs(own, strategy) for name, strategy in candidates.items()}
    assert full["full"] == 12
    assert full["probe_then_full epochs=20 head_scale=0.0 crop_scale=0.08"] == 20
    assert full["probe_then_full min_steps=100 lr=0.001"] > 24, "more than the session has"
    monkeypatch.setattr("hf_transfer.choosing.pilots._run", lambda name, _, epochs, __: pilot(name, epochs, 0.5))
    seconds = {name: float(epochs) for name, epochs in full.items()}
    first = {p.strategy: p.epochs for p in reversed(run_pilots(own, candidates, seconds, budget_s=1e6))}
    assert first == {"linear_probe": 0, **{name: round(epochs / 6) for name, epochs in full.items()}}
    with caplog.at_level("INFO"):
        assert len(run_pilots(own, candidates, seconds, budget_s=1.5)) == 1
    for name, epochs in full.items():
        share = round(epochs / 6)
        assert f"trial run of {name} with {share} epochs, which needs about {share} s" in caplog.text


CURVE = LearningCurve(
    images_per_class=(2.0, 4.0),
    accuracy=(0.4, 0.5),
    exponent=0.3,
    ahead=(
        CurvePoint(images_per_class=5.0, accuracy=0.5, low=0.4, high=0.6),
        CurvePoint(images_per_class=10.0, accuracy=0.6, low=0.45, high=0.7),
    ),
)


def depth_score(layer: str, probe: float, *, is_native: bool) -> DepthScore:
    return DepthScore(
        layer=layer, position=1.0, is_native=is_native, probe=probe, probe_interval=(0.0, 1.0), knn=0.5, num_features=8
    )


def test_only_the_trouble_cell_has_suggestions(session: Session) -> None:
    model, chain = built("timm ViT")
    vit = session.with_network(replace(session.backbone, model=model), chain)
    candidates = find_candidates(vit)
    depths = [depth_score("blocks.0", 0.7, is_native=False), depth_score("blocks.1", 0.5, is_native=True)]
    trouble = DataRegime(images_per_class=8, similarity=0.1)
    suggestions = {s.title: s for s in suggest(vit, candidates, trouble, depths, CURVE)}
    assert suggestions["more labels"].evidence == (
        "a probe is expected to reach 60.0 % (45.0 to 70.0) with 10 images per class; the learning curve gives 50.0 % for the "
        "5 images per class that you have"
    )
    earlier = suggestions["features of earlier layers"]
    assert earlier.command is not None
    assert "--from_layer blocks.1" in earlier.command
    assert suggestions["another checkpoint"].command is not None
    assert any("--wise_ft" in str(s.command) for s in suggestions.values())
    assert any("trivialaugment" in str(s.command) for s in suggestions.values())
    assert any("--trains biases" in str(s.command) for s in suggestions.values())
    for regime in (
        DataRegime(images_per_class=800, similarity=0.1),
        DataRegime(images_per_class=8, similarity=0.9),
    ):
        assert suggest(vit, candidates, regime, depths, CURVE) == ()


def test_the_recipe_keeps_to_a_budget_and_records_the_advice(tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--budget_s", "60", "--images_per_class", "8", "--tracker", "none"]
    run_recipe("auto", arguments=[*flags, "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["strategy"] == "auto"
    assert results["details"]["advice"]["estimates"]
    assert results["metrics"]["test"]["accuracy"] > 0.8
    card = (tmp_path / "model" / "README.md").read_text()
    assert "auto kept" in card
    assert load(str(tmp_path / "model")).label_names == tuple("0123456789")


def test_the_command_prints_advice_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["advise", "--images_per_class", "8"])
    assert "recommended: " in capsys.readouterr().out
    main(["advise", "--images_per_class", "8", "--json", "--epochs", "3"])
    assert json.loads(capsys.readouterr().out)["num_images"]["train"] > 0
    with pytest.raises(SystemExit):
        main(["advise", "--budget_s", "-1"])
    assert "choose 0 < budget_s" in capsys.readouterr().err
