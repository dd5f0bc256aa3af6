"""WiSE-FT: both ends are exact, what is kept lies on the line between them, and the run says which point it chose."""

from pathlib import Path

import pytest
import torch
from sessions import make_config, make_session
from torch import nn

from hf_transfer.config import OptimizerConfig
from hf_transfer.metrics.records import Score
from hf_transfer.network.adapters import Adapted
from hf_transfer.network.policies import full, last
from hf_transfer.reporting.sentences import describe_phase
from hf_transfer.strategy import Strategy
from hf_transfer.training.phase import SolveHeadPhase, TrainPhase
from hf_transfer.training.plan import run_plan
from hf_transfer.training.records import RunResult
from hf_transfer.training.wise import copy_weights, interpolate, mix_weights, set_weights

STEPS = OptimizerConfig(lr=3e-3, warmup_ratio=0.0)


def test_the_ends_are_exact_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = {"w": torch.randn(5, generator=generator)}, {"w": torch.randn(5, generator=generator)}
    assert torch.equal(mix_weights(start, end, 0.0)["w"], start["w"])
    assert torch.equal(mix_weights(start, end, 1.0)["w"], end["w"])
    torch.testing.assert_close(mix_weights(start, end, 0.25)["w"], 0.75 * start["w"] + 0.25 * end["w"])


def test_the_best_point_of_the_line_is_kept() -> None:
    """One weight goes from 0 to 10 and scores best at 3; ties go to the fine-tuned end."""
    model = nn.Linear(1, 1, bias=False)
    set_weights(model, {"weight": torch.zeros(1, 1)})
    start = copy_weights(model, ["weight"])
    set_weights(model, {"weight": torch.full((1, 1), 10.0)})

    def score() -> Score:
        return Score(quality=1 - abs(model.weight.item() - 3) / 10, loss=0.0)

    result = interpolate(model, start, score, select_by="accuracy")
    assert result.best.alpha == pytest.approx(0.3)
    assert model.weight.item() == pytest.approx(3.0)
    assert [point.alpha for point in result.points] == [i / 10 for i in range(11)]
    set_weights(model, {"weight": torch.full((1, 1), 10.0)})
    assert interpolate(model, start, score, select_by="log_loss").best.alpha == 1.0


def train(
    name: str, folder: Path, *, wise_ft: bool = True, **settings: object
) -> tuple[RunResult, dict[str, torch.Tensor]]:
    """One epoch of the strategy-like plan called `name`: the result, and the weights after it."""
    if name == "lora":  # stored activations, as the other plans have
        settings |= {"rank": 2, "cache_views": 1}
    session = make_session("lora" if name == "lora" else "full", folder, epochs=1, wise_ft=wise_ft, **settings)
    assert isinstance(session.strategy, Strategy)
    session = session.strategy.prepare(session)
    policy = last(2) if name == "last" else full()
    if isinstance(session.backbone, Adapted):
        policy = session.backbone.policy()
    steps = TrainPhase(policy=policy, epochs=1, optimization=STEPS)
    result = run_plan(session, [steps] if "without" in name else [SolveHeadPhase(), steps])
    return result, {n: v.clone() for n, v in session.backbone.model.state_dict().items()}


@pytest.mark.parametrize("name", ["last", "full", "full without a probe", "lora"])
def test_a_run_with_the_flag_keeps_a_point_of_the_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_transfer.training.selection.is_kept", lambda *_: True)  # one epoch does not beat the probe
    plain, end = train(name, tmp_path, wise_ft=False)
    result, kept = train(name, tmp_path)
    line, alpha = result.details["wise_ft"], result.details["wise_ft"]["alpha"]
    scores = {point["alpha"]: Score.from_dict(point["score"]) for point in line["points"]}
    # The far end is the run without the flag; run_plan itself scored what is kept once more, from the files.
    assert scores[1.0].quality == plain.validation.accuracy
    assert scores[1.0].loss == pytest.approx(plain.validation.nll, abs=1e-4)
    hits = result.logits["validation"].argmax(1) == make_session("full", tmp_path).data.validation.labels
    assert hits.mean() == scores[alpha].quality
    assert scores[alpha].quality == max(score.quality for score in scores.values())
    assert scores[0.0].quality > 0.5  # the start has the probe as its head, even if the plan does not solve for one
    assert result.phases[-1].wise_ft_alpha == alpha
    assert "WiSE-FT" in describe_phase(result.phases[-1])
    assert result.curves[-1].title == "WiSE-FT"
    if alpha == 1.0:
        assert all(torch.equal(end[n], kept[n]) for n in end)


def test_a_run_that_keeps_the_probe_has_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_transfer.training.selection.is_kept", lambda *_: False)
    result, _ = train("last", tmp_path)
    assert "wise_ft" not in result.details
    assert result.kept_probe
    assert result.phases[0].refitted
    assert "fitted on validation images too" in describe_phase(result.phases[0])


def test_the_start_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after the last phase: only the interpolation is left, and it needs the start."""
    monkeypatch.setattr("hf_transfer.training.selection.is_kept", lambda *_: True)
    result, kept = train("last", tmp_path)
    again, resumed = train("last", tmp_path, resume=True)
    assert again.resumed
    assert again.details["wise_ft"] == result.details["wise_ft"]
    assert all(torch.equal(kept[n], resumed[n]) for n in kept)


def test_running_statistics_that_move_are_refused() -> None:
    with pytest.raises(ValueError, match="running statistics do not fit mixed weights"):
        make_config(wise_ft=True, freeze_batchnorm=False)
