"""Saved = measured: the reported metrics are those of the saved file, loaded fresh, in eager float32, in every precision."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from sessions import make_session

from hf_transfer.inference.predict import load_saved
from hf_transfer.network import resizing
from hf_transfer.network.forward import compute_logits
from hf_transfer.runs import execute
from hf_transfer.training import evaluate, plan

SCHEMA = Path(__file__).resolve().parents[1] / "hf_transfer" / "reporting" / "results.schema.json"
LOG_LOSS = 1e-3  # a probe in low precision is scored on its features if these agree with the saved network so far


def measure(model_dir: Path, session: object) -> tuple[float, float]:
    """Accuracy and log-loss of the saved model on the test images, computed one plain batch after the other."""
    backbone, split = load_saved(str(model_dir)), session.data.test  # type: ignore[attr-defined]
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
    execute(session)
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
        execute(session)
    assert "scoring again" in caplog.text
    reported = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]
    assert reported["nll"] == pytest.approx(measure(tmp_path / "run" / "model", session)[1], abs=1e-5)


def test_scores_that_chose_other_weights_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "VERIFIED_LOG_LOSS", {"fp32": -1.0, "bf16": -1.0})
    with caplog.at_level("WARNING"):
        execute(make_session("full", tmp_path / "bf16", precision="bf16", epochs=1))
    assert "chosen by imprecise scores" in caplog.text
    with pytest.raises(RuntimeError, match="the saved network has a validation log-loss"):
        execute(make_session("full", tmp_path / "fp32", precision="fp32", epochs=1))


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
        execute(session)
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
        execute(session)
    assert "scoring again" not in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results["details"]["decoder_drift"]["largest"] <= 2
    assert results["config"]["decoder"] == "fast"
    assert "decoder" not in results["checkpoint"]["preprocessing"], "the saved model has the published preprocessing"
