"""Flags are the field names, files hold the same names, and a mistake is answered with what is allowed."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from hf_transfer.config import DataConfig, RecipeConfig, flag, parse, split_repo_id, to_settings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    lr: float = flag(0.1, "step size")
    kind: Literal["a", "b"] = flag("a", "which")
    limit: int | None = flag(None, "most")


def parsed(*arguments: str) -> Config:
    return parse(Config, recipe="try", description="A recipe.", arguments=arguments)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr: 1\nkind: b\nseed: 3\n")
    config = parsed("--config", str(file), "--kind", "a", "--limit", "5")
    assert (config.lr, config.kind, config.seed, config.limit) == (1.0, "a", 3, 5)
    assert isinstance(config.lr, float)


def test_saved_settings_repeat_the_run(tmp_path: Path) -> None:
    config = parsed("--images_per_class", "7", "--trust_remote_code")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_settings(config)))
    assert parsed("--config", str(file)) == config


def test_the_output_folder_is_named_after_the_recipe() -> None:
    assert parsed().output_dir == "runs/try"


def test_where_to_push_is_checked_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--push_to_hub", "me/my-model@v2", "--private").private
    assert split_repo_id("me/my-model@feature/x") == ("me/my-model", "feature/x")
    for wrong in ("my-model", "me/my/model", "me/", "https://hub.example/me/model"):
        assert "give OWNER/NAME" in refused(capsys, "--push_to_hub", wrong)
    assert "--push_to_hub" in refused(capsys, "--private")


def test_an_unknown_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--bach_size; did you mean --batch_size?" in refused(capsys, "--bach_size", "8")
    assert "--batch" in refused(capsys, "--batch", "8")  # no silent abbreviation


def test_an_unknown_name_in_a_file_is_answered_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("learning: 1\nsede: 2\n")
    assert "unknown name 'learning'" in refused(capsys, "--config", str(file))
    file.write_text("sede: 2\n")
    assert "did you mean seed?" in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: one\n", "'one' is not int"),
        ("kind: c\n", "'c' is not a or b"),
        ("lr: true\n", "not float"),
        ("- 1\n", "list"),
    ],
)
def test_a_wrong_value_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert expected in refused(capsys, "--config", str(file))


def test_a_missing_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refused(capsys, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("validation_fraction", "1.5", "share"),
        ("batch_size", "0", "1 or more"),
        ("images_per_class", "0", "1 or more"),
        ("cache_gb", "-1", "more than 0"),
        ("num_threads", "-1", "0 (by cores)"),
        ("seed", "-1", "0 or more"),
        ("train_split", "none", "something must be trained on"),
    ],
)
def test_relations_are_checked_before_anything_starts(
    capsys: pytest.CaptureFixture[str], name: str, value: str, expected: str
) -> None:
    assert expected in refused(capsys, f"--{name}", value)


def test_one_split_cannot_serve_twice() -> None:
    with pytest.raises(ValueError, match="named for two splits"):
        DataConfig(train_split="all", test_split="all")


HEAVY = ("torch", "numpy", "transformers", "timm", "datasets", "accelerate", "evaluate", "sklearn", "yaml")


@pytest.mark.parametrize(
    "command",
    [
        "from hf_transfer.cli import main; main(['--help'])",
        "import runpy; runpy.run_path({recipe!r}, run_name='__main__')",
    ],
    ids=["command", "recipe"],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    recipe = str(ROOT / "recipes" / "linear_probe.py")
    code = (
        "import sys\nsys.argv = ['x', '--help']\n"
        f"try:\n    {command.format(recipe=recipe)}\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.rstrip().endswith("LOADED []")
    assert "usage:" in shown.stdout
