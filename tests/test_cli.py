"""The command: what it prints and trains, and that a user's mistake is one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_transfer.cli import COMMANDS, main
from hf_transfer.errors import EXIT_STATUS
from hf_transfer.strategy import strategy_names
from tests.headless import LAYOUTS


def test_without_arguments_five_things_to_do_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    commands = re.findall(r"^  hf-transfer (\S+) ?(\S*)", shown, re.MULTILINE)
    assert [name for name, _ in commands] == ["train", "advise", "train", "predict", "publish"]
    assert {word for name, word in commands if name == "train"} <= set(strategy_names())
    assert set(re.findall(r"hf-transfer ([a-z][a-z-]*)", shown)) <= {*COMMANDS, "fine-tunes"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_explains_exit_statuses_and_can_be_quiet(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"{EXIT_STATUS}\n")
    assert "--quiet" in shown


@pytest.mark.parametrize("name", ["advise", "rank", "audit"])
def test_help_shows_the_settings_that_matter_and_help_all_the_rest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            main([name, word])
        assert stop.value.code == 0
        shown[word] = capsys.readouterr().out
    assert len(shown["--help"].splitlines()) <= 55
    for flag in ("--dataset", "--images_per_class", "--help_all", "--json"):
        assert f"  {flag} " in shown["--help"], flag
    for flag in ("--split_column", "--decoder", "--where"):
        assert flag not in shown["--help"], flag
        assert f"  {flag} " in shown["--help_all"], flag
    assert "1 <= value" in shown["--help_all"]


def test_an_audit_of_photos_by_the_embedded_network_says_so_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for label in ("ant", "bee"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    main(["audit", "--dataset", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "audit")])
    (line,) = [line for line in caplog.messages if "checkpoint embedded, the default" in line]
    assert "choose a pretrained one, such as --checkpoint timm/" in line
    caplog.clear()
    main(["audit", "--images_per_class", "4", "--output_dir", str(tmp_path / "digits")])
    assert "checkpoint embedded" not in caplog.text


def run_command(*words: str) -> tuple[str, str]:
    """What `hf-transfer` prints on stdout and stderr in a process of its own, as a user runs it."""
    result = subprocess.run(
        [sys.executable, "-m", "hf_transfer", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


PROBE = ("train", "linear_probe", "--images_per_class", "4", "--readouts", "none", "--cv_folds", "1")


def test_a_quiet_run_prints_nothing_but_its_results_as_json(tmp_path: Path) -> None:
    shown, log = run_command(*PROBE, "--quiet", "--json", "--output_dir", str(tmp_path / "run"))
    assert log == ""
    assert json.loads(shown) == json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_finished_run_says_the_result_the_report_and_the_next_command(tmp_path: Path) -> None:
    shown, log = run_command(*PROBE, "--output_dir", str(tmp_path / "my run"))
    assert shown == ""
    (kept,) = (line for line in log.splitlines() if line.startswith("Kept: "))
    (validation,) = (line for line in log.splitlines() if line.startswith("validation: "))
    (test,) = (line for line in log.splitlines() if line.startswith("test: "))
    *_, wrote, report, following = log.splitlines()
    results = json.loads((tmp_path / "my run" / "results.json").read_text())
    assert kept.startswith("Kept: the linear probe, a logistic regression on 80 frozen features.")
    assert validation.startswith("validation: accuracy ")
    assert validation.endswith(
        "; each image was predicted by a model of the same recipe that had not trained on it"
    )  # one fit
    assert test.startswith(f"test: accuracy {100 * results['metrics']['test']['accuracy']:.1f} % (95 % interval ")
    assert wrote.startswith(f"wrote {tmp_path / 'my run'} (")
    assert Path(report.removeprefix("report: ")).is_file()
    predict = shlex.split(following.removeprefix("next: hf-transfer ").partition(", or ")[0])
    assert predict == ["predict", str(tmp_path / "my run"), "path/to/photos"]
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    shown, log = run_command(*predict[:-1], str(tmp_path / "photo.png"), "--quiet")
    assert shown.count(" %") == 3
    assert log == ""


def test_inspect_prints_the_chain_and_the_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect"])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.partition(":")[0] for line in lines[:6]] == ["network", "preprocessing", "cuts", "head", "size", ""]
    assert lines[0].startswith("network: embedded, timm ResNet, pooling: avg, architecture resnet18d with {")
    assert lines[0].endswith("}, layers BatchNorm2d, ReLU")
    assert lines[1].startswith("preprocessing: 3 channels, 32x32 pixels, bicubic")
    assert lines[2] == "cuts: 10 verified cuts; 8 layers, layer1.0 ... layer4.1"
    assert lines[3] == "head: trained for 10 labels (0, 1, 2, ...); affine: fc of 80 features"
    assert lines[4] == "size: 400,952 parameters without the head, 1.6 MB"
    names = [line.split()[1] for line in lines if line[:1].isdigit()]
    assert names == ["stem", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "head"]
    strategies = {line.split()[0]: line for line in lines if line}
    assert "before the classifier" in strategies["head"]
    assert "after layer4.0" in strategies["last(1)"]
    assert strategies["full"].endswith("100.0 %")
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if line[:1].isdigit()]
    assert sum(shares) == pytest.approx(100, abs=0.6)  # of the FLOPs, each rounded


def test_inspect_says_what_happens_to_a_checkpoint_without_a_head(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    LAYOUTS["MAE"].save(tmp_path)
    main(["inspect", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    name = f"{tmp_path.name}, transformers ViTForImageClassification, from ViTMAEForPreTraining"
    assert lines[0] == f"network: {name}, pooling: that of the class"
    assert lines[3] == "head: none yet: a new one is trained; affine: classifier of 32 features"
    assert "stay behind: decoder (" in lines[4]
    LAYOUTS["CLIP"].save(tmp_path)
    main(["inspect", str(tmp_path), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["network"].endswith("BackboneForImageClassification, from CLIPModel, pooling: pooler_output")
    assert "text_model (" in shown["size"]
    assert shown["layers"][0]["name"] == "stem"
    main(["inspect", str(tmp_path), "--pooling", "class"])
    assert "transformers CLIPForImageClassification" in capsys.readouterr().out


def test_a_mistake_is_one_line_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "./nowhere"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "neither a folder here nor a Hub id" in error


def test_cache_lists_and_clears(
    capsys: pytest.CaptureFixture[str], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path))
    main(["cache"])
    assert capsys.readouterr().out == "no caches\n"
    with pytest.raises(SystemExit):
        main(["cache", "--clear", "abc"])
    assert "no such cache: abc" in capsys.readouterr().err


def test_predict_and_evaluate_print_a_table_or_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for split, label in (("train", "0"), ("train", "1"), ("test", "0"), ("test", "1")):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (i * 50, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    image = str(tmp_path / "test" / "0" / "1.png")
    main(["predict", "embedded", image, "--top_k", "2"])
    shown = capsys.readouterr().out
    assert shown.startswith(image)
    assert shown.count(" %") == 2
    main(["predict", "embedded", str(tmp_path / "test"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    assert len(rows[0]["labels"]) == 3
    assert rows[0]["labels"][0]["label"] in shown or rows[0]["image"] != image
    main(["evaluate", "embedded", "--dataset", str(tmp_path)])
    assert capsys.readouterr().out.startswith("all: 12 images")
    main(["evaluate", "embedded", "--dataset", str(tmp_path), "--split", "test"])
    assert capsys.readouterr().out.startswith("test: 6 images")
    main(["evaluate", "embedded", "--dataset", str(tmp_path), "--split", "train", "--json"])
    assert json.loads(capsys.readouterr().out)["num_samples"] == 6  # nothing is split off
    main(["evaluate", "embedded", "--dataset", str(tmp_path), "--split", "all"])
    assert capsys.readouterr().out.startswith("all: 12 images")
    main(["evaluate", "embedded", "--dataset", str(tmp_path / "train")])
    assert capsys.readouterr().out.startswith("all: 6 images")
    with pytest.raises(SystemExit):
        main(["evaluate", "embedded", "--dataset", str(tmp_path), "--split", "validation"])
    assert "only train, test; omit --split to evaluate all labeled images" in capsys.readouterr().err


def test_train_runs_a_strategy_and_its_model_predicts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--images_per_class", "4", "--readouts", "none", "--cv_folds", "1", "--output_dir", str(tmp_path / "run")]
    main(["train", "linear_probe", *flags])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["strategy"], results["config"]["images_per_class"]) == ("linear_probe", 4)
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    main(["predict", str(tmp_path / "run" / "model"), str(tmp_path / "image.png"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert {label["label"] for label in row["labels"]} <= set("0123456789")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "lroa"], "invalid choice: 'lroa'"),
        (["train", "LoRA"], "; did you mean 'lora'?\n"),
        (["train", "linear-probe"], "; did you mean 'linear_probe'?\n"),
        (["train", "prob_then_full", "--epochs", "3"], "; did you mean 'probe_then_full'?\n"),
        (["train", "full", "--precision", "fp23"], "; did you mean 'fp32'?\n"),
        (
            ["predict", "run", "photos", "--topk", "3"],
            "hf-transfer predict: unknown argument --topk; did you mean --top_k?",
        ),
        (["predict", "run", "photos", "--workers", "3"], "--workers; did you mean --num_workers?"),
        (["predict", "run", "photos", "--nonsense"], "unknown argument --nonsense; --help lists all settings"),
        (["rank", "embedded", "--nonsense"], "unknown argument --nonsense; --help_all lists all settings"),
        (["train"], "required: NAME"),
        (
            ["train", "full", "--learning_rate", "1"],
            "hf-transfer train full: unknown argument --learning_rate; did you mean --lr?",
        ),
        (["advise", "--budget_s", "0"], "budget_s=0.0: choose 0 < budget_s"),
        (["inspect", "--rank", "0"], "rank=0: choose 1 <= rank"),
        (["rank", "embedded", "embedded"], "embedded"),
        (["predict", "embedded", "nowhere.png"], "no such file"),
        (["trian"], "invalid choice: 'trian'"),
        (["trian"], "; did you mean 'train'?\n"),
    ],
)
def test_every_commands_mistake_is_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-transfer")
    assert error.count("\n") == 1
    assert expected in error
