"""WiSE-FT: the ends are the ends, what is kept is on the line between, and a run says what it chose."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.network.adapters import add_adapters
from hf_transfer.network.backbone import load
from hf_transfer.network.methods import AdapterConfig
from hf_transfer.network.policies import full, last
from hf_transfer.training.optim import Optimization
from hf_transfer.training.outcome import Outcome
from hf_transfer.training.phase import Phase, ProbePhase
from hf_transfer.training.plan import run_plan
from hf_transfer.training.wise import copy_weights, interpolate, mix_weights, set_weights

CONFIG = TrainConfig(images_per_class=8, epochs=1, batch_size=16, tracker="none", wise_ft=True)
STEPS = Optimization(lr=3e-3, warmup=0.0)


def test_the_ends_are_the_ends_to_the_bit() -> None:
    start, end = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    assert torch.equal(mix_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(mix_weights(start, end, 1.0)["w"], end["w"])
    torch.testing.assert_close(mix_weights(start, end, 0.25)["w"], 0.75 * start["w"] + 0.25 * end["w"])


def test_the_best_point_of_the_line_is_kept() -> None:
    """A score whose best lies at 3 of a weight that goes from 0 to 10; ties go to the fine-tuned end."""
    model = nn.Linear(1, 1, bias=False)
    set_weights(model, {"weight": torch.zeros(1, 1)})
    start = copy_weights(model, ["weight"])
    set_weights(model, {"weight": torch.full((1, 1), 10.0)})

    def score() -> dict[str, float]:
        return {"accuracy": 1 - abs(model.weight.item() - 3) / 10, "log_loss": 0.0}

    found = interpolate(model, start, score, select_by="accuracy")
    assert found["alpha"] == pytest.approx(0.3)
    assert model.weight.item() == pytest.approx(3.0)
    assert [row["alpha"] for row in found["curve"]] == [i / 10 for i in range(11)]
    set_weights(model, {"weight": torch.full((1, 1), 10.0)})
    assert interpolate(model, start, score, select_by="log_loss")["alpha"] == 1.0


def train(
    plan: list[Any], config: TrainConfig, folder: Path, adapter: AdapterConfig | None = None
) -> tuple[Outcome, Any]:
    data = load_data(config)
    torch.manual_seed(0)
    backbone = load("embedded", data.label_names)
    chain = backbone.chain()
    if adapter is not None:
        backbone, chain = add_adapters(backbone, chain, adapter)
        plan = [plan[0], replace(plan[1], policy=backbone.policy())]
    outcome = run_plan(
        plan, chain, backbone, data, config=config, accelerator=Accelerator(cpu=True), checkpoints=folder
    )
    return outcome, {n: v.clone() for n, v in backbone.model.state_dict().items()}


@pytest.mark.parametrize("name", ["last", "full", "full without a probe", "lora"])
def test_a_run_with_the_flag_keeps_a_point_of_the_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_transfer.training.loop.is_kept", lambda *_: True)  # one epoch is not better than the probe
    phase = Phase(policy=last(2) if name == "last" else full(), epochs=1, optimization=STEPS)
    plan = [phase] if "without" in name else [ProbePhase(), phase]
    adapter = AdapterConfig(method="lora", rank=2) if name == "lora" else None
    plain, end = train(plan, replace(CONFIG, wise_ft=False), tmp_path, adapter)
    outcome, kept = train(plan, CONFIG, tmp_path, adapter)
    found = outcome.details["wise_ft"]
    curve, alpha = {row["alpha"]: row for row in found["curve"]}, found["alpha"]
    # The far end is the run without the flag; what is kept was measured again, from files, by run_plan itself.
    assert curve[1.0]["accuracy"] == plain.metrics["validation"]["accuracy"]
    assert curve[1.0]["log_loss"] == pytest.approx(plain.metrics["validation"]["nll"], abs=1e-4)
    assert outcome.metrics["validation"]["accuracy"] == curve[alpha]["accuracy"]
    assert curve[alpha]["accuracy"] == max(row["accuracy"] for row in found["curve"])
    assert curve[0.0]["accuracy"] > 0.5  # the start has a head: the probe's, also where steps began without one
    assert "WiSE-FT" in outcome.plan[-1]["description"]
    assert outcome.curves[-1]["title"] == "WiSE-FT"
    if alpha == 1.0:
        assert all(torch.equal(end[n], kept[n]) for n in end)


def test_where_the_probe_is_kept_there_is_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.training.loop.is_kept", lambda *_: False)
    outcome, _ = train([ProbePhase(), Phase(policy=last(2), epochs=1, optimization=STEPS)], CONFIG, tmp_path)
    assert "wise_ft" not in outcome.details
    assert "fitted on validation images, too" in outcome.plan[0]["description"]


def test_the_start_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after the last phase: only the interpolation is left, and it needs the start."""
    monkeypatch.setattr("hf_transfer.training.loop.is_kept", lambda *_: True)
    plan = [ProbePhase(), Phase(policy=last(1), epochs=1, optimization=STEPS)]
    outcome, kept = train(plan, CONFIG, tmp_path)
    again, resumed = train(plan, replace(CONFIG, resume=True), tmp_path)
    assert again.details["resumed"]
    assert again.details["wise_ft"] == outcome.details["wise_ft"]
    assert all(torch.equal(kept[n], resumed[n]) for n in kept)


def test_running_statistics_that_move_are_refused() -> None:
    with pytest.raises(ValueError, match="running statistics that moved"):
        replace(CONFIG, freeze_batchnorm=False)
