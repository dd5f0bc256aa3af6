"""Ranking: the better network first, one that cannot be loaded beside it, and what the scores agree on."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from accelerate import Accelerator

from hf_transfer.choosing.plot import draw_ranking
from hf_transfer.choosing.rank import SCORES, Ranking, Row, compare_scores, rank, sample_data
from hf_transfer.choosing.table import format_ranking
from hf_transfer.cli import main
from hf_transfer.config import TrainConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.network.backbone import load

CONFIG = TrainConfig(images_per_class=12, tracker="none")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded network with noise on its weights: as large, and worse."""
    folder = tmp_path_factory.mktemp("rank") / "spoilt"
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
def ranking(spoilt: str) -> Ranking:
    return rank([spoilt, "./nowhere", "embedded"], CONFIG, accelerator=Accelerator(cpu=True))


def test_the_better_network_is_first_by_every_score(ranking: Ranking, spoilt: str) -> None:
    assert len(ranking.rows) == 2
    first, second = ranking.rows
    assert second.name == spoilt
    for name in SCORES:
        assert first.scores[name] > second.scores[name], name
    assert first.num_parameters == second.num_parameters
    assert first.seconds["pass"] > 0


def test_what_cannot_be_loaded_is_named_and_the_others_go_on(ranking: Ranking) -> None:
    assert list(ranking.failures) == ["./nowhere"]
    assert "neither a folder here nor a Hub id" in ranking.failures["./nowhere"]
    assert "left out: ./nowhere" in format_ranking(ranking)


def test_a_mistake_of_the_whole_list_is_refused() -> None:
    with pytest.raises(ValueError, match="each once"):
        rank(["embedded", "embedded"], CONFIG)
    with pytest.raises(ValueError, match="sample=-1"):
        rank(["embedded"], CONFIG, sample=-1)


def test_the_picture_is_well_formed_and_names_all(ranking: Ranking) -> None:
    picture = ElementTree.fromstring(draw_ranking(ranking))
    words = " ".join(e.text or "" for e in picture.iter())
    assert all(score in words for score in SCORES)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 2
    with pytest.raises(ValueError, match="nothing was ranked"):
        draw_ranking(Ranking(data_name="d", num_images=0, num_classes=2, rows=(), agreement={}, failures={}))


def row(name: str, **scores: float) -> Row:
    return Row(
        name=name, scores=scores, probe_interval=(0.0, 1.0), num_features=1, num_parameters=1, images_per_second=1.0,
        images_computed=0, seconds={},
    )  # fmt: skip


def test_agreement_by_hand() -> None:
    """Probe order a < b < c; one score agrees, one is reversed, one swaps a pair: tau (3 - 0)/3, -1, (2 - 1)/3."""
    rows = [
        row("a", probe=0.1, knn=1.0, LogME=3.0, **{"H-score": 2.0}),
        row("b", probe=0.2, knn=2.0, LogME=2.0, **{"H-score": 1.0}),
        row("c", probe=0.3, knn=3.0, LogME=1.0, **{"H-score": 3.0}),
    ]
    found = compare_scores(rows)
    assert found["knn"] == pytest.approx({"kendall": 1.0, "spearman": 1.0})
    assert found["LogME"] == pytest.approx({"kendall": -1.0, "spearman": -1.0})
    assert found["H-score"] == pytest.approx({"kendall": 1 / 3, "spearman": 0.5})
    assert "LEEP" not in found
    assert compare_scores(rows[:2]) == {}


def test_a_sample_has_every_class_and_no_test_image() -> None:
    data = load_data(CONFIG)
    few = sample_data(data, 50, seed=0)
    assert few.test is None
    assert len(few.train) + len(few.validation) <= 50
    assert (few.train.counts() + few.validation.counts() >= 4).all()
    assert sample_data(data, 0, seed=0).train is data.train


def test_the_command_prints_a_table_or_json_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "ranking.svg"
    main(["rank", "embedded", "--images_per_class", "8", "--plot", str(picture)])
    assert "LogME" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    main(["rank", "embedded", "--images_per_class", "8", "--json"])
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["scores"]["probe"] > 0.5
    with pytest.raises(SystemExit):
        main(["rank", "./nowhere", "--images_per_class", "8"])
    assert "neither a folder here nor a Hub id" in capsys.readouterr().err
