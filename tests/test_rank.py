"""Ranking: the better network first, a checkpoint that cannot be loaded, and rank correlations with the probe."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from hf_transfer.choosing.rank import CheckpointScore, RankCorrelation, Ranking, correlate_with_probe, rank, sample_data
from hf_transfer.choosing.table import format_ranking
from hf_transfer.cli import main
from hf_transfer.config import RunConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.network.backbone import load
from hf_transfer.settings import replace_settings

CONFIG = replace_settings(RunConfig(), {"images_per_class": 12})


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded network with noise on its weights: as large, and worse."""
    folder = tmp_path_factory.mktemp("rank") / "spoiled"
    backbone = load("embedded")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            if parameter.ndim == 4:
                parameter += 1.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    import timm.models

    timm.models.save_for_hf(
        backbone.model, str(folder), model_config={"label_names": list(backbone.label_names)}, safe_serialization=True
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def ranking(spoiled: str) -> Ranking:
    return rank([spoiled, "./nowhere", "embedded"], CONFIG, accelerator=Accelerator(cpu=True))


def test_the_better_network_is_first_by_probe_and_knn(ranking: Ranking, spoiled: str) -> None:
    assert len(ranking.rows) == 2
    first, second = ranking.rows
    assert second.name == spoiled
    assert first.probe > second.probe
    assert first.knn > second.knn
    assert first.num_parameters == second.num_parameters
    assert first.seconds["pass"] > 0


def test_a_checkpoint_that_cannot_be_loaded_is_reported_and_the_others_continue(ranking: Ranking) -> None:
    assert list(ranking.failures) == ["./nowhere"]
    assert "neither a folder here nor a Hub id" in ranking.failures["./nowhere"]
    assert "skipped: ./nowhere" in format_ranking(ranking)


def test_a_mistake_of_the_whole_list_is_refused() -> None:
    with pytest.raises(ValueError, match="each once"):
        rank(["embedded", "embedded"], CONFIG)
    with pytest.raises(ValueError, match="sample=-1"):
        rank(["embedded"], CONFIG, sample=-1)


def row(probe: float, knn: float, num_parameters: int) -> CheckpointScore:
    return CheckpointScore(
        name="net", probe=probe, probe_interval=(0.0, 1.0), knn=knn, num_features=1, num_parameters=num_parameters,
        images_per_second=1.0, images_computed=0, seconds={},
    )  # fmt: skip


def test_rank_correlations_by_hand() -> None:
    """Of three pairs: all agree, tau (3 - 0) / 3; all are reversed, tau (0 - 3) / 3; one is swapped, tau (2 - 1) / 3."""
    agree_and_reversed = [row(0.1, 0.2, 30), row(0.2, 0.3, 20), row(0.3, 0.4, 10)]
    correlations = correlate_with_probe(agree_and_reversed)
    assert vars(correlations["knn"]) == pytest.approx({"kendall": 1.0, "spearman": 1.0})
    assert vars(correlations["num_parameters"]) == pytest.approx({"kendall": -1.0, "spearman": -1.0})
    swapped_and_tied = [row(0.1, 0.3, 10), row(0.2, 0.2, 10), row(0.3, 0.4, 10)]
    correlations = correlate_with_probe(swapped_and_tied)
    assert vars(correlations["knn"]) == pytest.approx({"kendall": 1 / 3, "spearman": 0.5})
    assert list(correlations) == ["knn"]  # networks of one size have no order by size
    assert correlate_with_probe(agree_and_reversed[:2]) == {}


def test_the_table_reports_the_size_baseline(ranking: Ranking) -> None:
    assert "static baseline" not in format_ranking(ranking)  # two checkpoints: no correlation
    shown = format_ranking(replace(ranking, agreement={"num_parameters": RankCorrelation(kendall=0.4, spearman=-0.5)}))
    assert "number of parameters (static baseline" in shown
    assert ": +0.40, -0.50" in shown


def test_a_sample_has_every_class_and_no_test_image() -> None:
    data = load_data(CONFIG.data)
    few = sample_data(data, 50, seed=0)
    assert few.test is None
    assert len(few.train) + len(few.validation) <= 50
    assert (few.train.counts() + few.validation.counts() >= 4).all()
    assert sample_data(data, 0, seed=0).train is data.train


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["rank", "embedded", "--images_per_class", "8"])
    assert "kNN, %" in capsys.readouterr().out
    main(["rank", "embedded", "--images_per_class", "8", "--json"])
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["probe"] > 0.5
    with pytest.raises(SystemExit):
        main(["rank", "./nowhere", "--images_per_class", "8"])
    assert "neither a folder here nor a Hub id" in capsys.readouterr().err
