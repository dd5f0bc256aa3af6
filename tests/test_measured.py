"""Saved = measured: the reported metrics are those of the saved file, loaded fresh, in eager float32, in every precision."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from sessions import make_session

from hf_transfer.config import Engine
from hf_transfer.inference.predict import load_saved
from hf_transfer.metrics.records import Metrics, Score
from hf_transfer.network import resizing
from hf_transfer.network.forward import compute_logits
from hf_transfer.prefix import engine_choice
from hf_transfer.runs import train_session
from hf_transfer.session import Session
from hf_transfer.training import evaluate, plan
from hf_transfer.training.evaluate import agrees
from hf_transfer.training.phases import PhasesResult

SCHEMA = Path(__file__).resolve().parents[1] / "hf_transfer" / "reporting" / "results.schema.json"
LOG_LOSS = 1e-3  # a probe in low precision is scored on its features if these agree with the saved network so far


def measure(model_dir: Path, session: Session, name: str = "test") -> tuple[float, float]:
    """Accuracy and log-loss of the saved model on the images of a split, computed one plain batch after the other."""
    backbone, split = load_saved(str(model_dir)), getattr(session.data, name)
    logits = []
    for start in range(0, len(split), 50):
        rows = range(start, min(start + 50, len(split)))
        pixels = np.stack([backbone.preprocessing.pixels(split.image(i)) for i in rows])
        with torch.no_grad():
            logits.append(compute_logits(backbone.model, backbone.preprocessing.normalize(torch.from_numpy(pixels))))
    labels, scores = torch.from_numpy(split.labels), torch.cat(logits)
    return float((scores.argmax(1) == labels).double().mean()), float(torch.nn.functional.cross_entropy(scores, labels))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("strategy", "settings"), [("linear_probe", {}), ("full", {"wise_ft": True}), ("lora", {})])
def test_metrics_are_of_the_saved_file(
    strategy: str, settings: dict[str, object], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    session = make_session(strategy, tmp_path / "run", precision=precision, images_per_class=12, **settings)
    train_session(session)
    reported = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]
    accuracy, log_loss = measure(tmp_path / "run" / "model", session)
    assert reported["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert reported["nll"] == pytest.approx(log_loss, abs=LOG_LOSS if strategy == "linear_probe" else 1e-5)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"engine": "folded"}])
def test_a_probe_that_disagrees_with_the_saved_network_is_scored_again(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "AGREEING_LOG_LOSS", -1.0)
    session = make_session("linear_probe", tmp_path / "run", **settings)
    with caplog.at_level("INFO"):
        train_session(session)
    assert "scoring again" in caplog.text
    reported = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]
    assert reported["nll"] == pytest.approx(measure(tmp_path / "run" / "model", session)[1], abs=1e-5)


def assert_metrics_are_of_the_saved_file(run: Path, session: Session) -> None:
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    for split in ("validation", "test"):
        accuracy, log_loss = measure(run / "model", session, split)
        assert metrics[split]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert metrics[split]["nll"] == pytest.approx(log_loss, abs=1e-5)


@contextmanager
def counted_splits(noise_of: Collection[str] = ()) -> Iterator[list[tuple[str, str]]]:
    """Lists the split and the engine of each pass of the whole network. Engines in `noise_of` compute wrong logits."""
    passes: list[tuple[str, str]] = []
    plain = evaluate.compute_image_logits

    def compute(model: torch.nn.Module, images: Any, *args: Any, engine: Engine = "eager", **options: Any) -> Any:
        passes.append((images.name, engine))
        logits = plain(model, images, *args, engine=engine, **options)
        return -logits if engine in noise_of else logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "compute_image_logits", compute)
        patch.setattr(evaluate, "IMAGES_FOR_CHECK", 0)
        patch.setattr(engine_choice, "FOLDING_GFLOPS", 0.0)
        yield passes


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("full", {}),
        ("last_layers", {"probe_first": False}),
        ("last_layers", {"probe_first": False, "cache": "none"}),
        ("last_layers", {"probe_first": False, "wise_ft": True}),
    ],
)
def test_final_metrics_run_by_the_engine_and_repeat_no_validation(
    strategy: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = make_session(strategy, tmp_path, engine="folded", **settings)
    with counted_splits() as passes:
        train_session(session)
    repeated = [("validation", "folded")] if "wise_ft" in settings else []
    assert passes == [*repeated, ("test", "folded")]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert_metrics_are_of_the_saved_file(tmp_path, session)


def test_an_engine_that_disagrees_with_the_saved_network_is_replaced_by_eager(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = make_session("last_layers", tmp_path, engine="folded", probe_first=False)
    with counted_splits(noise_of={"folded"}) as passes:
        train_session(session)
    assert passes == [("test", "folded"), ("test", "eager")]
    assert caplog.text.count("the predictions of engine folded differ from those of the saved model") == 1
    assert_metrics_are_of_the_saved_file(tmp_path, session)


def test_validation_logits_of_other_weights_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plan.run_phases

    def run_phases(*args: Any, **options: Any) -> PhasesResult:
        ran = plain(*args, **options)
        assert ran.validation_logits is not None
        return replace(ran, validation_logits=np.roll(ran.validation_logits, 1, axis=1))

    monkeypatch.setattr(plan, "run_phases", run_phases)
    session = make_session("last_layers", tmp_path, probe_first=False)
    train_session(session)
    assert "the validation logits of the last epoch differ from those of the saved network" in caplog.text
    assert_metrics_are_of_the_saved_file(tmp_path, session)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"decoder": "fast"}])
def test_validation_logits_in_low_precision_or_of_fast_pixels_are_not_metrics(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    session = make_session("last_layers", tmp_path, engine="folded", probe_first=False, **settings)
    with counted_splits() as passes:
        train_session(session)
    assert [split for split, _ in passes] == ["validation", "test"]
    assert_metrics_are_of_the_saved_file(tmp_path, session)


@pytest.mark.parametrize(("strategy", "settings"), [("last_layers", {"probe_first": False}), ("full", {})])
def test_a_run_resumed_after_its_last_step_reports_the_same_metrics(
    strategy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = train_session(make_session(strategy, tmp_path, **settings))
    again = make_session(strategy, tmp_path, resume=True, **settings)
    resumed = train_session(again)
    assert resumed.resumed
    assert resumed.metrics == whole.metrics


def test_scores_that_chose_other_weights_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "VERIFIED_LOG_LOSS", {"fp32": -1.0, "bf16": -1.0})
    with caplog.at_level("WARNING"):
        train_session(make_session("full", tmp_path / "bf16", precision="bf16", epochs=1))
    assert "chosen by imprecise scores" in caplog.text
    with pytest.raises(RuntimeError, match="the saved network has a validation loss"):
        train_session(make_session("full", tmp_path / "fp32", precision="fp32", epochs=1))


def test_a_large_loss_is_compared_relative_to_its_size() -> None:
    session = make_session("full")
    for chosen, measured, is_same in ((61986.5487, 61986.5499, True), (0.5, 0.5005, True), (0.5, 0.502, False)):
        score = Score(quality=0.5, loss=measured)
        with nullcontext() if is_same else pytest.raises(RuntimeError, match="the saved network has"):
            plan._verify(Metrics(values={}, num_samples=2, score=score), replace(score, loss=chosen), session)
    labels = torch.tensor([1, 0])
    logits = torch.tensor([[0.0, -6e4], [-6e4, 0.0]])  # both wrong, with a loss of 60,000
    split = replace(session.data.validation.select(np.array([0, 1])), labels=labels.numpy())
    wide = torch.full((2, split.target.num_outputs - 2), -1e6)
    assert agrees(torch.cat([logits * (1 + 1e-7), wide], 1), torch.cat([logits, wide], 1), split)
    assert not agrees(torch.cat([logits * 1.01, wide], 1), torch.cat([logits, wide], 1), split)


@pytest.mark.parametrize("strategy", ["linear_probe", "full"])
def test_metrics_are_of_the_published_pixels_however_wrong_the_fast_ones_are(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    kernels = resizing.interpolate
    monkeypatch.setattr(
        resizing, "interpolate", lambda images, *size, **options: kernels(images, *size, **options).flip(2)
    )
    settings = {"readouts": "none"} if strategy == "linear_probe" else {"epochs": 1}
    session = make_session(strategy, tmp_path / "run", decoder="fast", **settings)
    with caplog.at_level("INFO"):
        train_session(session)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    accuracy, log_loss = measure(tmp_path / "run" / "model", session)
    assert results["metrics"]["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["metrics"]["test"]["nll"] == pytest.approx(log_loss, abs=1e-5)
    assert results["details"]["decoder_drift"]["mean"] > 10
    assert f"up to {results['details']['decoder_drift']['largest']:.3g} levels" in caplog.text
    expected = {"linear_probe": ("fitting the probe again on the published pixels",), "full": ("by imprecise scores",)}
    assert all(sentence in caplog.text for sentence in expected[strategy])


def test_metrics_with_the_fast_decoder_pass_the_check_and_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "cache"))
    session = make_session("linear_probe", tmp_path / "run", decoder="fast", readouts="none")
    with caplog.at_level("INFO"):
        train_session(session)
    assert "scoring again" not in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results["details"]["decoder_drift"]["largest"] <= 2
    assert results["config"]["decoder"] == "fast"
    assert "decoder" not in results["checkpoint"]["preprocessing"], "the saved model has the published preprocessing"
