"""Labels of any number and numbers, through every strategy: trained, saved, reloaded, scored and described; or refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, pipeline

import hf_transfer as ht
from hf_transfer.choosing.rank import rank
from hf_transfer.cli import main
from hf_transfer.config import DataConfig, RunConfig
from hf_transfer.data.dataset import load_splits
from hf_transfer.hub.verify import REFERENCE, find_libraries, verify
from hf_transfer.metrics.records import Score
from hf_transfer.network.adapters import load_adapted
from hf_transfer.reporting.sentences import describe_seeds
from hf_transfer.run import Run
from hf_transfer.settings import replace_settings
from hf_transfer.strategy import strategy_names
from hf_transfer.targets.multi_label import MultiLabel
from hf_transfer.targets.reading import read_column
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training.plan import run_plan
from tests.sessions import make_session
from tests.shapes import COLORS, write_shapes
from tests.test_recipes import check_results

LABELS: dict[str, Any] = {"label_column": "shapes", "problem_type": "multi_label_classification"}
NUMBERS: dict[str, Any] = {"label_columns": ("brightness", "angle"), "problem_type": "regression"}
COLUMNS = {"labels": LABELS, "numbers": NUMBERS}
SMALL: dict[str, Any] = {"split_column": "split", "num_workers": 1, "num_threads": 1, "batch_size": 16}
EMBEDDED = resources.files("hf_transfer") / "assets" / "embedded"

# Settings that keep each strategy short, and reach what is special about a target: mixing of labels, mixtures of weights, ...
SHORT: dict[str, dict[str, Any]] = {
    "linear_probe": {},
    "last_layers": {"epochs": 1, "wise_ft": True},
    "full": {"epochs": 1, "mixup": 0.4, "cutmix": 1.0},
    "full norms": {"epochs": 1, "trains": "norms"},
    "probe_then_full": {"epochs": 1},
    "gradual": {"epochs": 1, "phase_epochs": 1, "phases": 3},
    "lora": {"epochs": 1},
    "pretrain": {"epochs": 1},
    "greedy_stack": {"epochs": 1, "stage_epochs": 1, "layers": 2},
    "greedy_stack resnet18": {"epochs": 1, "stage_epochs": 1, "layers": 2, "architecture": "resnet18"},
    "greedy_stack embedded": {"epochs": 1, "stage_epochs": 1, "layers": 1, "checkpoint": "embedded"},
    "auto": {"epochs": 1},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def train(case: str, kind: str, table: Path, folder: Path | None = None, **settings: Any) -> Run:
    settings = {**SHORT[case], **settings}
    task = ht.Task(str(table), settings.pop("checkpoint", None), **SMALL, **COLUMNS[kind])
    assert task.data.target.problem_type == COLUMNS[kind]["problem_type"]
    return task.fit(getattr(ht, case.split()[0])(**settings), output_dir=folder)


def read_reference(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized test images, and the logits of the trained network."""
    with safe_open(folder / REFERENCE, framework="pt") as file:
        return file.get_tensor("inputs"), file.get_tensor("logits")


def check_run(run: Run, kind: str, table: Path, folder: Path) -> None:
    """What is on the disk says, predicts and scores what the run in memory does."""
    again = ht.load_run(folder)
    assert again.backbone.target == run.backbone.target
    assert again.metrics == run.metrics
    check_results(dict(again.results))
    scored = ht.evaluate(folder / "model", table, split="test", split_column="split", **COLUMNS[kind])
    assert dict(scored.values) == pytest.approx(dict(run.test.values), abs=1e-4)
    images = [str(table.parent / f"{i}.png") for i in range(48, 52)]
    for predicted, expected in zip(again.predict(images), run.predict(images), strict=True):
        assert predicted.labels == expected.labels
        assert predicted.values == pytest.approx(expected.values, rel=1e-3, abs=1e-4)
    check_words(run, kind, folder)


def check_words(run: Run, kind: str, folder: Path) -> None:
    card, report = (folder / "model" / "README.md").read_text(), (folder / "report.html").read_text()
    main_metric, other_words = ("mean average precision", "R2") if kind == "labels" else ("R2", "average precision")
    text = card[: card.index("## Config")]
    assert re.search(rf"Its {main_metric} is \S+( %)? \(95 % interval .*\) on \d+ test images\.", text)
    assert not re.search(rf"\b(classes|class|accuracy|{other_words})\b", text, re.IGNORECASE), text
    page = re.sub(
        r"<style>.*?</style>|<script.*?</script>|<pre>.*?</pre>|class=\"[^\"]*\"|<th scope=\"row\">select_by<.*?</tr>",
        "",
        report,
        flags=re.DOTALL,
    )
    assert not re.search(rf"\b(classes|class|accuracy|{other_words})\b", page, re.IGNORECASE)
    assert ("4 labels." if kind == "labels" else "2 numbers.") in page
    quality = run.test.score.quality
    shown = f"{100 * quality:.1f} %" if kind == "labels" else f"{quality:.3f}"
    assert f"test {main_metric} {shown}" in repr(run)
    assert (
        "ridge regression" in text
        or "logistic regression per label" in text
        or not run.results["plan"][0].get("linear_model")
    )


# Every strategy runs here with one target, and with both in `make soak`, which also reloads in a fresh process.
FAST = [
    ("linear_probe", "labels"),
    ("last_layers", "numbers"),
    ("full", "labels"),
    ("lora", "numbers"),
    ("greedy_stack", "numbers"),
    ("greedy_stack resnet18", "labels"),
]


@pytest.mark.parametrize(("case", "kind"), FAST)
def test_what_a_strategy_saves_is_what_it_trained(case: str, kind: str, table: Path, tmp_path: Path) -> None:
    check_run(train(case, kind, table, tmp_path / "run"), kind, table, tmp_path / "run")


@pytest.mark.parametrize(("case", "kind"), [("probe_then_full", "labels"), ("greedy_stack", "numbers")])
def test_plain_libraries_load_what_is_saved(case: str, kind: str, table: Path, tmp_path: Path) -> None:
    train(case, kind, table, tmp_path / "run")
    model = tmp_path / "run" / "model"
    verified = verify(model, tmp_path / "run" / REFERENCE, find_libraries(model))
    assert [each.library for each in verified] == (["transformers"] if "greedy" in case else ["transformers", "timm"])


@pytest.mark.soak
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("case", SHORT)
def test_every_strategy_with_every_target(case: str, kind: str, table: Path, tmp_path: Path) -> None:
    run = train(case, kind, table, tmp_path / "run")
    check_run(run, kind, table, tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert verify(model, tmp_path / "run" / REFERENCE, find_libraries(model))


def test_every_strategy_is_among_the_cases() -> None:
    assert {case.split()[0] for case in SHORT} == set(strategy_names())


def advise(table: Path, columns: dict[str, Any]) -> object:
    return ht.Task(str(table), **SMALL, **columns).advise()


def rank_embedded(table: Path, columns: dict[str, Any]) -> object:
    return rank(["embedded"], replace_settings(RunConfig(), {"dataset": str(table), **SMALL, **columns}))


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize(("command", "run"), [("advise", advise), ("rank", rank_embedded)])
def test_what_compares_accuracies_refuses_in_one_line(
    command: str, run: Callable[..., object], columns: dict[str, Any], table: Path
) -> None:
    expected = f"{command} compares accuracies, and a {columns['problem_type']} target has none: train auto"
    with pytest.raises(ValueError, match=f"^{expected}") as error:
        run(table, columns)
    assert "\n" not in str(error.value)


# --- saved models in other hands ----------------------------------------------------------------------------------------


def test_the_pipeline_of_transformers_gives_a_score_for_each_label(table: Path, tmp_path: Path) -> None:
    train("linear_probe", "labels", table, tmp_path / "run")
    _, logits = read_reference(tmp_path / "run")
    answers = pipeline("image-classification", model=str(tmp_path / "run" / "model"))(str(table.parent / "48.png"))
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert [scores[name] for name in COLORS] == pytest.approx(logits[0].sigmoid().tolist(), abs=1e-4)


def test_the_pipeline_of_transformers_gives_plain_numbers(table: Path, tmp_path: Path) -> None:
    run = train("linear_probe", "numbers", table, tmp_path / "run")
    answers = pipeline("image-classification", model=str(tmp_path / "run" / "model"))(str(table.parent / "48.png"))
    numbers = {answer["label"]: answer["score"] for answer in answers}
    [predicted] = run.predict(str(table.parent / "48.png"))
    assert numbers == pytest.approx(dict(zip(predicted.labels, predicted.values, strict=True)), rel=1e-3)
    assert abs(numbers["brightness"] - 70) < 60  # in the units of the table


def test_an_adapter_of_numbers_gives_numbers_on_plain_timm(table: Path, tmp_path: Path) -> None:
    """The head of an adapter folder has taken over the scale of the numbers, too."""
    run = ht.Task(str(table), base_model="someone/embedded", **SMALL, **NUMBERS).fit(
        ht.lora(epochs=4, lr=1e-2, rank=2, merge=False), output_dir=tmp_path / "run"
    )
    model = tmp_path / "run" / "model"
    assert find_libraries(model) == ("peft",)
    inputs, logits = read_reference(tmp_path / "run")
    base = timm.create_model(f"local-dir:{EMBEDDED}", pretrained=True, num_classes=2)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, str(model)).eval()(inputs), logits)
    again = load_adapted(model, checkpoint="embedded")
    assert again.target == run.backbone.target
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(inputs), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_saved_greedy_stack_computes_the_loss_of_its_target(kind: str, table: Path, tmp_path: Path) -> None:
    train("greedy_stack", kind, table, tmp_path / "run")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    inputs, logits = read_reference(tmp_path / "run")
    labels = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    expected = (F.binary_cross_entropy_with_logits if kind == "labels" else F.mse_loss)(logits, labels)
    torch.testing.assert_close(model(inputs, labels=labels).loss, expected, rtol=1e-4, atol=1e-4)


def test_inspect_evaluate_and_predict_name_labels_and_numbers(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, column in (
        ("labels", ["--label_column", "shapes"]),
        ("numbers", ["--label_columns", "brightness", "angle"]),
    ):
        run = train("linear_probe", kind, table, tmp_path / kind)
        model = str(tmp_path / kind / "model")
        capsys.readouterr()
        main(["inspect", model])
        names = "4 labels (blue, green, red, ...)" if kind == "labels" else "2 numbers (brightness, angle)"
        assert f"trained for {names}" in capsys.readouterr().out
        main(["evaluate", model, "--dataset", str(table), "--split_column", "split", "--split", "test", *column])
        title, shown = ("Mean average precision", f"{100 * run.test.score.quality:.1f} %")
        if kind == "numbers":
            title, shown = "R2", f"{run.test.score.quality:.4f}"
        assert re.search(rf"^{title} +{re.escape(shown)}", capsys.readouterr().out, re.MULTILINE)
        main(["predict", model, str(table.parent / "48.png"), "--top_k", "2", "--json"])
        [row] = json.loads(capsys.readouterr().out)
        assert len(row["labels"]) == 2


# --- before anything trains ---------------------------------------------------------------------------------------------


def test_a_head_that_cannot_take_over_the_scale_is_refused_before_it_trains(table: Path, tmp_path: Path) -> None:
    session = make_session("full", tmp_path, dataset=str(table), images_per_class=None, **SMALL, **NUMBERS)
    for chain in (replace(session.chain, head=None), session.chain):
        session.backbone.model.get_classifier().bias = None
        with pytest.raises(
            ValueError, match="no linear map of features with a bias, so they cannot be scaled to numbers"
        ):
            run_plan(session.with_chain(chain), session.strategy.plan(session))
    assert not (tmp_path / "checkpoints" / "state.safetensors").exists()


def test_a_number_is_published_under_the_name_of_its_column(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for evaluation on a table whose column has another name."""
    columns: dict[str, Any] = {"label_column": "angle", "problem_type": "regression"}
    run = ht.Task(str(table), **SMALL, **columns).fit(ht.linear_probe(), output_dir=tmp_path / "run")
    assert run.results["label_names"] == ["angle"]
    model = tmp_path / "run" / "model"
    assert AutoModelForImageClassification.from_pretrained(model).config.id2label == {0: "angle"}
    assert "predicts a number for an image (angle)" in (model / "README.md").read_text()
    renamed = table.with_name("renamed.csv")
    renamed.write_text(table.read_text().replace(",angle,", ",degrees,", 1))
    scores = []
    for file, column in ((table, "angle"), (renamed, "degrees")):
        flags = ["--label_column", column, "--split_column", "split", "--json"]
        main(["evaluate", str(model), "--dataset", str(file), *flags])
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["mae"] == scores[1]["mae"]
    frame = pd.DataFrame({"image": [str(table.parent / f"{i}.png") for i in range(8)], "age": range(30, 38)})
    assert ht.Task(frame, label_column="age", problem_type="regression").data.label_names == ("age",)


def test_class_names_are_the_numbers_of_a_regression() -> None:
    target, labels = read_column([2, 0, -1], problem_type="regression", names=["1", "3", "10"], where="data")
    assert target.names == ("value",)
    np.testing.assert_array_equal(labels, [[10.0], [1.0], [np.nan]])


@pytest.mark.parametrize(
    ("name", "shown"), [("accuracy", "93.1 %"), ("mean_average_precision", "93.1 %"), ("r2", "0.931")]
)
def test_shares_are_in_percent_and_other_qualities_are_numbers(name: str, shown: str) -> None:
    assert Score(quality=0.931, loss=0.2, names=(name, "loss")).format_quality() == shown


def test_blank_cells_are_unknown_and_a_lone_separator_is_none_of_the_labels(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("image,label\n0.png,a|b\n1.png,|\n2.png,b\n3.png,\n")
    with pytest.raises(
        ValueError, match=r"1 of 4 images have no label .* write \| or an empty list for an image with none"
    ):
        ht.Task(str(tmp_path / "labels.csv"), label_column="label", problem_type=LABELS["problem_type"]).data  # noqa: B018
    columns = DataConfig(dataset=str(tmp_path / "labels.csv"), label_column="label", where="image != 3.png")
    [split] = load_splits(columns, MultiLabel(names=("a", "b"))).values()
    assert split.labels.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]


def test_a_saved_network_of_numbers_reads_columns_of_zero_and_one_as_numbers(table: Path) -> None:
    data = DataConfig(dataset=str(table), label_columns=("blue", "red"), split_column="split")
    target = Regression(names=("blue", "red"), folded=True)
    assert {split.target for split in load_splits(data, target).values()} == {target}


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        (SingleLabel.image_quality, "accuracy: +5.0 points (95 % interval +1.0"),
        (MultiLabel.image_quality, "ordered pairs of labels: +5.0 points (95 % interval +1.0"),
        (Regression.image_quality, "negative squared error: +0.050 (95 % interval +0.010"),
    ],
)
def test_the_gain_over_a_probe_is_in_points_only_for_shares(metric: str, shown: str) -> None:
    gain = {"metric": metric, "split": "test", "mean": 0.05, "interval": [0.01, 0.09]}
    [line] = describe_seeds({"seeds": [0, 1], "metrics": {}, "gain_over_probe": gain})
    assert shown in line
    [line] = describe_seeds({"seeds": [0, 1], "metrics": {}, "gain_over_probe": gain | {"interval": None}})
    assert line.endswith("(no interval, since all images are of one group, on the same images)")
    equal = gain | {"mean": 0.0, "interval": [0.0, 0.0]}
    [line] = describe_seeds({"seeds": [0, 1], "metrics": {}, "gain_over_probe": equal})
    assert line.endswith("(no interval, since the two are equally good on each image, on the same images)")
