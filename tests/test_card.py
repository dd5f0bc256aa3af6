"""The card: metadata that the Hub accepts, licenses that base and data state, tables and charts of the metrics."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_transfer.costs import Cost
from hf_transfer.data.license import read_license
from hf_transfer.hub.card import address_card, make_card, record_verified
from hf_transfer.hub.card_data import make_card_data
from hf_transfer.hub.licenses import BINDING, PERMISSIVE, derive_license
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import Verified
from hf_transfer.network.backbone import Backbone, load
from hf_transfer.reporting.report import render_report
from hf_transfer.training.records import to_json
from tests.card_rules import LICENSES, find_errors
from tests.test_save import results_for

LABELS = ("ant", "bee", "Wespe | <groß>")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load("embedded", LABELS, base_model="someone/upstream")


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "model"
    save_model(backbone, results_for(backbone), folder)
    return folder


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [
        ("apache-2.0", "mit", "apache-2.0"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-4.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("CC-BY-SA-4.0 ", None, "cc-by-sa-4.0"),
        ("apache-2.0", None, "apache-2.0"),
        ("apache-2.0", "unknown", "apache-2.0"),
        (None, "mit", None),
        (None, "cc-by-nc-4.0", None),
        (None, None, None),
        ("gpl-3.0", "cc-by-nc-4.0", None),
        ("apache-2.0", "cc-by-nc-nd-4.0", None),
    ],
)
def test_a_license_is_one_that_base_and_data_allow(base: str | None, data: str | None, expected: str | None) -> None:
    assert derive_license(base, data).id == expected


def test_unknown_and_conflicting_licenses_are_reported() -> None:
    assert "license of the dataset is unknown" in " ".join(derive_license("mit", None).notes)
    assert "license of the base model is unknown" in " ".join(derive_license(None, "mit").notes)
    assert "conflict" in " ".join(derive_license("gpl-3.0", "cc-by-nc-4.0").notes)
    assert "no derivatives" in " ".join(derive_license("mit", "cc-by-nd-4.0").notes)
    assert not any("**" in note for note in derive_license("mit", "mit").notes)
    # A model trained from random weights has no base to state a license.
    scratch = derive_license(None, "cc-by-sa-4.0", has_base=False)
    assert (scratch.id, len(scratch.notes)) == ("cc-by-sa-4.0", 1)
    assert derive_license(None, "mit", has_base=False).id is None


def test_a_license_that_the_hub_does_not_know_is_other() -> None:
    derived = derive_license("dinov3-license", "mit")
    assert (derived.id, derived.name) == ("other", "dinov3-license")
    assert PERMISSIVE | BINDING <= LICENSES


def test_the_license_of_a_dataset_comes_from_its_card(tmp_path: Path) -> None:
    assert read_license(tmp_path) is None
    (tmp_path / "README.md").write_text("no header")
    assert read_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense:\n- cc-by-4.0\n---\nBees.")
    assert read_license(tmp_path) == "cc-by-4.0"


@pytest.mark.parametrize("column", [None, "patient"])
def test_the_card_says_what_its_intervals_draw(column: str | None, backbone: Backbone, folder: Path) -> None:
    results = results_for(backbone)
    results["config"] |= {"group_column": column}
    text = str(make_card(backbone, results, folder))
    assert f"a bootstrap over {'images' if column is None else 'whole groups'}" in text
    assert ("but exact for an accuracy" in text) == (column is None)


def test_the_hub_accepts_the_metadata(backbone: Backbone, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert find_errors(card) == []
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-classification")
    assert (data.base_model, data.base_model_relation) == ("someone/upstream", "finetune")
    assert data.license == "apache-2.0"
    assert {r.metric_type: r.metric_value for r in data.eval_results}["accuracy"] == 0.75
    results = results_for(backbone)
    results["data"] |= {"name": "someone/insects:large", "revision": "0" * 40, "license": "dinov3-license"}
    hub_data = make_card_data(backbone, results)
    assert hub_data.datasets == ["someone/insects"]
    assert (hub_data.license, hub_data.license_name) == ("other", "dinov3-license")
    assert find_errors(f"---\n{hub_data.to_yaml()}\n---") == []
    assert find_errors("---\nlicense: Apache\nbase_model: my model\n---")  # the rules do refuse


def test_a_model_from_random_weights_has_no_base(backbone: Backbone) -> None:
    data = make_card_data(backbone, results_for(backbone) | {"config": {"checkpoint": "none"}})
    assert data.base_model is None
    assert data.license is None


@pytest.mark.parametrize(
    ("is_resumed", "words"),
    [(False, "before saving and the report"), (True, "since the last resume, before saving and the report")],
)
def test_the_card_says_which_part_of_a_resumed_run_the_cost_is_of(
    is_resumed: bool, words: str, backbone: Backbone, folder: Path
) -> None:
    cost = Cost(
        seconds={"train": 3.0, "total": 4.0}, images_per_second={"train": 32.0}, peak_memory_bytes=1, memory_is="resident",
        device="CPU, 1 thread", decoded={}, is_resumed=is_resumed,
    )  # fmt: skip
    card = str(make_card(backbone, results_for(backbone) | {"cost": to_json(cost)}, folder))
    assert f"Cost: 4.00 s {words}, 32.0 images per second in train; peak memory" in card


def test_the_card_reports_the_metrics_and_the_limits(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "| Accuracy | 75.0 % | 25.0 to 100.0 |" in card
    assert "| ant | 75.0 | 100.0 | 86.0 | 4 |" in card
    assert r"| Wespe \| &lt;groß&gt; | – | – | – | 0 |" in card
    assert "fewer than 20 images to train on: ant (4), bee (4)" in card
    assert "fewer than 10 images to score on: bee (0)" in card
    assert "off by 12.0 % on average" in card
    assert "license of the dataset is unknown" in card
    assert "1. a solved head" in card
    assert "32x32 pixels, bicubic" in card


@pytest.mark.parametrize(
    ("error", "by_chance", "verdict"),
    [
        (0.03, 0.02, "the model is well calibrated."),
        (0.072, None, "use probabilities only to rank labels."),
        (0.072, 0.05, "use probabilities only to rank labels."),
        (0.072, 0.084, "within chance, since a calibrated model would be off by up to 8.4 % on 4 test images."),
    ],
)
def test_a_calibration_error_within_chance_is_no_verdict(
    error: float, by_chance: float | None, verdict: str, backbone: Backbone, folder: Path
) -> None:
    results = results_for(backbone)
    results["metrics"]["test"] |= {"ece": error, **({} if by_chance is None else {"ece_by_chance": by_chance})}
    card = str(make_card(backbone, results, folder))
    assert f"Probabilities are off by {100 * error:.1f} % on average (calibration error): {verdict}" in card


def test_the_charts_are_small_and_contain_the_numbers(folder: Path) -> None:
    for name in ("confusion_matrix.svg", "curve_1.svg"):
        assert f"]({name})" in (folder / "README.md").read_text()
        assert (folder / name).stat().st_size < 20_000
        ElementTree.parse(folder / name)
    texts = [e.text for e in ElementTree.parse(folder / "confusion_matrix.svg").iter() if e.tag.endswith("text")]
    assert {"3", "1"} <= set(texts)
    assert any("Wespe | <groß>" in str(text) for text in texts)


def test_the_pushed_card_names_the_repository_and_the_verified_libraries(folder: Path) -> None:
    card = (folder / "README.md").read_text() + "\nBy hand: FOLDER is a word.\n"
    verified = Verified(library="timm", logits=3e-7, pixels=0.0, labels_agree=True)
    sent = address_card(card, "me/name", None, [verified])
    assert 'pipeline("image-classification", model="me/name")' in sent
    assert 'timm.create_model("hf-hub:me/name", pretrained=True)' in sent
    assert "timm: logits differ by at most 3e-07" in sent
    assert "is not verified yet" not in sent
    assert sent.count("FOLDER") == 1  # text of the owner stays
    again = record_verified(record_verified(card, [replace(verified, library="peft")]), [verified])
    assert "timm: logits differ by at most 3e-07" in again
    assert not re.search("is not verified yet|peft: logits", again)
    assert again.count("A fresh process") == 1
    assert address_card(again, "me/name", None, [verified]) == sent
    branch = address_card(card, "me/name", "v2", [verified])
    assert 'model="me/name", revision="v2")' in branch
    assert '"hf-hub:me/name@v2"' in branch


HOSTILE = (
    "<script>alert(1)</script>", "<!-- checked -->", "<!-- /checked -->", "<!-- local -->", "```", "`code`", "a\n---\n# b",
    "a\n```\n<script>", "../../up", "/etc/cron.d/x", "![x](https://example.org)", "__b__ **b** $x$ | ~~x~~", "\0\x1b[31m",
    '"};</style><script>', "</details>", "{{ 7 * 7 }}", "\\<script>",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_strangers_are_shown_and_do_nothing(name: str, tmp_path: Path) -> None:
    """As a class, dataset, setting, title, sentence and license, in Markdown, YAML, SVG and HTML."""
    backbone = load("embedded", (name, f"{name} 2", "bee"), base_model="a/b")
    results = results_for(backbone)
    results["config"] |= {"dataset": name, "train_split": f"x\n{name}"}
    results["data"] |= {"name": name, "notes": [f"skipped: {name}", name], "license": name}
    results["plan"] = [{"description": name}]
    results["metrics"]["test"]["notes"] = [name]
    curve = results["curves"][0]
    curve |= {"title": name, "y_label": name, "x_label": name}
    curve["series"][0]["name"] = name
    model = tmp_path / "run" / "model"
    save_model(backbone, results, model)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"run/model/{file}" for file in (
        "README.md", "config.json", "confusion_matrix.svg", "curve_1.svg", "model.safetensors"
    )}  # fmt: skip
    local = (model / "README.md").read_text()
    sent = address_card(local, "me/name", None, [Verified(library="timm", logits=0.0, pixels=0.0, labels_agree=True)])
    for card, markers in ((local, ["local", "/local", "checked", "/checked"]), (sent, [])):
        assert find_errors(card) == []
        front, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert yaml.safe_load(front) == ModelCard(card).data.to_dict()
        assert re.findall(r"<(?:!-- )?([^\s>]+)", front + body) == [
            *markers, "details", "summary", "/summary", "/details"
        ]  # fmt: skip
        headings = re.findall(r"^#+ .*$", body, re.MULTILINE)[1:]
        expected = ["Use", "Results", "Training", "Limits", "License", "Verification", "Config"]
        assert headings == [f"## {title}" for title in expected]
        settings = body.split("```yaml\n")[1].split("\n```\n")[0]
        assert yaml.safe_load(settings) == results["config"]
        assert len(re.findall(r"^ *```", body, re.MULTILINE)) == 6  # two examples and the settings
    for picture in model.glob("*.svg"):
        assert not [e for e in ElementTree.parse(picture).iter() if e.tag.endswith("script")]
    assert render_report(results).count("<script") == 2  # the page's own


def test_yaml_and_missing_licenses_are_written_correctly(backbone: Backbone, tmp_path: Path) -> None:
    results = results_for(backbone)
    results["config"] |= {"dataset": "a: b"}
    results["data"]["notes"] = ["2 images were left out."]
    odd = replace(backbone, source=replace(backbone.source, license=None))
    save_model(odd, results, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert ModelCard(card).data.license is None
    assert "No license is stated" in card
    settings = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == results["config"]
    assert "- 2 images were left out." in card
    assert AutoConfig.from_pretrained(tmp_path / "model").num_labels == 3
