"""The engine of a run: decided once, written to config.yaml, kept when the run resumes, and harmless to the metrics."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import hf_transfer as ht
from hf_transfer.inference.predict import predict
from hf_transfer.locations import CHECKPOINTS, CONFIG
from hf_transfer.prefix import pixels
from hf_transfer.prefix.extract import Recomputed
from hf_transfer.prefix.store import Store
from hf_transfer.runs import train_session
from hf_transfer.solvers.probe import ProbeOptions
from hf_transfer.training.evaluate import AGREEING_IMAGES
from hf_transfer.training.readouts import choose_readout, extract_readouts, install_probe, measures_saved
from tests.sessions import make_session


def read_engine(file: Path) -> str:
    engine: str = yaml.safe_load(file.read_text())["engine"]
    return engine


@pytest.mark.parametrize(("requested", "engines"), [("auto", {"eager"}), ("measure", {"eager", "folded", "openvino"})])
def test_the_engine_is_decided_and_written(tmp_path: Path, requested: str, engines: set[str]) -> None:
    session = make_session("linear_probe", tmp_path / "run", engine=requested)
    engine = session.config.compute.engine
    assert engine in engines
    assert read_engine(tmp_path / "run" / CHECKPOINTS / CONFIG) == engine
    train_session(session)
    assert read_engine(tmp_path / "run" / CONFIG) == engine


def test_a_resumed_run_keeps_its_engine(tmp_path: Path) -> None:
    first = make_session("last_layers", tmp_path, engine="folded")
    assert first.config.compute.engine == "folded"
    assert make_session("last_layers", tmp_path, resume=True).config.compute.engine == "folded"
    assert make_session("last_layers", tmp_path).config.compute.engine == "eager"  # a fresh run decides again
    file = tmp_path / CHECKPOINTS / CONFIG
    file.write_text("engine: [")
    assert make_session("last_layers", tmp_path, resume=True).config.compute.engine == "eager"


@pytest.mark.parametrize("strategy", ["linear_probe", "last_layers"])
def test_every_engine_gives_the_accuracy_of_eager(tmp_path: Path, strategy: str) -> None:
    exact, folded = (train_session(make_session(strategy, engine=engine)) for engine in ("eager", "folded"))
    for split, metrics in exact.metrics.items():
        assert folded.metrics[split].accuracy == pytest.approx(metrics.accuracy, abs=0.02)
        assert folded.metrics[split].nll == pytest.approx(metrics.nll, abs=1e-2)


def test_metrics_from_an_engine_are_those_of_the_saved_network() -> None:
    session = make_session("linear_probe", engine="folded")
    candidates, _ = extract_readouts(session, sweep="none")
    best, _ = choose_readout(candidates, session, ProbeOptions())
    backbone = install_probe(session.backbone, session.chain, best)
    test = session.data.test
    assert test is not None
    assert measures_saved(session, backbone, best, test)
    assert session.chain.head is not None
    head = backbone.model.get_submodule(session.chain.head.modules[0])
    with torch.no_grad():
        head.bias[0] += 100  # now the saved network predicts another class than the features of the engine
    assert not measures_saved(session, backbone, best, test)


def test_metrics_from_wrong_features_of_an_engine_are_refused() -> None:
    session = make_session("linear_probe", engine="folded")
    candidates, _ = extract_readouts(session, sweep="none")
    best, _ = choose_readout(candidates, session, ProbeOptions())
    backbone = install_probe(session.backbone, session.chain, best)
    test = session.data.test
    assert test is not None
    stores = best.features.stores
    wrong = stores | {"test": Store([stores["test"][:] + 0.1 * stores["test"][:].std()])}
    assert not measures_saved(session, backbone, replace(best, features=replace(best.features, stores=wrong)), test)


def test_a_second_comparison_with_eager_reads_only_the_images_that_check_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path))
    session = make_session("linear_probe", engine="folded")
    candidates, _ = extract_readouts(session, sweep="none")
    best, _ = choose_readout(candidates, session, ProbeOptions())
    backbone = install_probe(session.backbone, session.chain, best)
    test, decoded = session.data.test, [0, 0]
    assert test is not None
    read = pixels.read_evaluation_pixels

    def count(*arguments: Any) -> Any:
        decoded[-1] += 1
        return read(*arguments)

    monkeypatch.setattr(pixels, "read_evaluation_pixels", count)
    assert measures_saved(session, backbone, best, test)
    decoded.append(0)
    assert measures_saved(session, backbone, best, test)
    # The first and last image are run by eager to check the cache, and by the whole network.
    assert decoded[1:] == [min(AGREEING_IMAGES, len(test)) + 2, 4]


def test_evaluate_and_predict_run_by_an_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = make_session("linear_probe", tmp_path)
    result = train_session(session)
    model = str(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        exact, folded = (
            ht.evaluate(model, "sklearn/digits", split="test", engine=engine) for engine in ("eager", "folded")
        )
        assert caplog.text.count("engine folded: prepared") == 1
        assert folded.accuracy == exact.accuracy
        assert folded.nll == pytest.approx(exact.nll, abs=1e-4)
        assert session.data.test is not None
        images = [np.asarray(session.data.test.image(i)) for i in range(5)]
        by_eager, by_folded = (predict(result.backbone, images, engine=engine) for engine in ("eager", "folded"))
        assert caplog.text.count("engine folded: prepared") == 2
    for a, b in zip(by_eager, by_folded, strict=True):
        assert a.labels == b.labels
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)


def test_without_a_cache_one_pass_serves_all_readouts() -> None:
    session = make_session("linear_probe", cache="none")
    readouts, computed = extract_readouts(session, sweep="all")
    assert readouts
    assert computed == sum(len(s) for s in (session.data.train, session.data.validation, session.data.test) if s)
    assert all(not isinstance(store, Recomputed) for each in readouts for store in each.stores.values())
