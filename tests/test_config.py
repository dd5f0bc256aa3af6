"""Settings: flags and YAML files share one flat list of names, and a mistake is one line that says what is allowed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from hf_transfer.choosing.candidates import to_flags
from hf_transfer.config import DataConfig, RunConfig, split_repo_id
from hf_transfer.errors import EXIT_STATUS
from hf_transfer.flags import GROUPS, parse, read_config
from hf_transfer.settings import KNOWN_ELSEWHERE, changed_settings, flag, list_settings, replace_settings, to_settings
from hf_transfer.strategy import Strategy, default_config, make_strategy, strategy_names

ROOT = Path(__file__).parents[1]


def parsed(*arguments: str, strategy: str = "lora") -> RunConfig:
    return parse(strategy, prog="try", description="A recipe.", arguments=arguments).config


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, strategy: str = "lora") -> str:
    """The one line that a mistake ends with."""
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments, strategy=strategy)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("try: ")
    assert error.count("\n") == 1
    return error


def values(config: RunConfig, *names: str) -> tuple[object, ...]:
    settings = to_settings(config)
    return tuple(settings[name] for name in names)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr: 1\nadapter: dora\nseed: 3\n")
    config = parsed("--config", str(file), "--adapter", "loha", "--rank", "5")
    assert values(config, "lr", "adapter", "seed", "rank") == (1.0, "loha", 3, 5)
    assert isinstance(to_settings(config)["lr"], float)


@pytest.mark.parametrize("name", strategy_names())
def test_saved_settings_repeat_the_run(name: str, tmp_path: Path) -> None:
    config = parsed("--images_per_class", "7", "--trust_remote_code", "--class_balance", "loss", strategy=name)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_settings(config)))
    assert parsed("--config", str(file), strategy=name) == config
    assert changed_settings(config, default_config(name)) == {
        "images_per_class": 7, "trust_remote_code": True, "class_balance": "loss"
    }  # fmt: skip


def test_a_list_of_columns_survives_the_file(tmp_path: Path) -> None:
    config = parsed("--label_columns", "a", "b c", "--seed", "1", strategy="full")
    assert config.data.label_columns == ("a", "b c")
    assert to_flags({"label_columns": to_settings(config)["label_columns"]}) == ["--label_columns", "a", "b c"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_settings(config)))
    assert parsed("--config", str(tmp_path / "config.yaml"), strategy="full") == config
    with pytest.raises(ValueError, match=r"label_columns=\['a', 'a'\]: choose a list of one or more different texts"):
        replace_settings(config, {"label_columns": ["a", "a"]})


def test_where_to_push_is_checked_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--push_to_hub", "me/my-model@v2", "--private").output.private
    assert split_repo_id("me/my-model@feature/x") == ("me/my-model", "feature/x")
    for wrong in ("my-model", "me/my/model", "me/", "https://hub.example/me/model"):
        assert "give OWNER/NAME" in refused(capsys, "--push_to_hub", wrong)
    assert "--push_to_hub" in refused(capsys, "--private")


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("bach_size", "batch_size"),
        ("learning_rate", "lr"),
        ("num_train_epochs", "epochs"),
        ("model_name_or_path", "checkpoint"),
        ("per_device_train_batch_size", "batch_size"),
        ("lora_alpha", "alpha"),
        ("clip_grad", "max_grad_norm"),
        ("clip-grad", "max_grad_norm"),
        ("data-dir", "dataset"),
        ("warmup-epochs", "warmup_ratio"),
        ("layer-decay", "layer_decay"),
        ("bach-size", "batch_size"),
        ("lerning_rate", "lr"),
        ("qiet", "quiet"),
        ("valid_pct", "validation_fraction"),
        ("val-split", "validation_split"),
        ("model-ema", "ema_decay"),
    ],
)
def test_an_unknown_flag_suggests_the_name_used_here(
    capsys: pytest.CaptureFixture[str], given: str, suggested: str
) -> None:
    """Names with a typo, and the names of the same settings in TrainingArguments, timm and peft."""
    expected = f"try: unknown argument --{given}; did you mean --{suggested}?\n"
    assert refused(capsys, f"--{given}", "8") == expected
    assert refused(capsys, f"--{given}=8") == expected.replace(f"--{given};", f"--{given}=8;")


@pytest.mark.parametrize("switch", ["freeze_batchnorm", "no-freeze_batchnorm"])
def test_a_value_after_a_switch_is_explained(capsys: pytest.CaptureFixture[str], switch: str) -> None:
    expected = f"try: --{switch} takes no value: write --freeze_batchnorm or --no-freeze_batchnorm\n"
    assert refused(capsys, f"--{switch}", "false") == expected
    assert refused(capsys, "--epochs", "false", "false") == "try: unexpected value 'false'\n"
    assert refused(capsys, "folder") == "try: unexpected value 'folder'\n"
    assert (
        refused(capsys, f"--{switch}", "false", "--epoch", "2")
        == "try: unknown argument --epoch; did you mean --epochs?\n"
    )


def test_an_abbreviated_flag_is_not_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --batch" in refused(capsys, "--batch", "8")


def test_a_setting_that_this_strategy_does_not_have_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("learning_rate", "epochs"):
        assert "did you mean" not in refused(capsys, f"--{name}", "8", strategy="linear_probe")
    assert "did you mean" not in refused(capsys, "--warmup-epochs", "8", strategy="linear_probe")


def test_names_known_elsewhere_stand_for_settings_that_exist() -> None:
    names = {name for strategy in strategy_names() for name in list_settings(default_config(strategy))}
    assert set(KNOWN_ELSEWHERE.values()) <= names
    assert set(KNOWN_ELSEWHERE) & names == {"folds"}, "a setting of a run, and what a strategy's cv_folds was called"


def test_an_unknown_name_in_a_file_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("learning: 1\nsede: 2\n")
    assert "unknown setting 'learning'" in refused(capsys, "--config", str(file))
    file.write_text("sede: 2\n")
    assert "did you mean seed?" in refused(capsys, "--config", str(file))
    file.write_text("learning_rate: 2\n")
    assert "did you mean lr?" in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: one\n", "seed='one': choose a whole number, 0 <= seed <= 4294967295"),
        ("adapter: c\n", "adapter='c': choose 'lora' or 'dora' or 'loha' or 'ia3'"),
        ("lr: true\n", "lr=True: choose a number"),
        ("- 1\n", "list"),
        ("a: [\n", "not YAML"),
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
        ("validation_fraction", "1.5", "0 < validation_fraction < 1"),
        ("batch_size", "0", "choose 1 <= batch_size <= 65536"),
        ("images_per_class", "0", "choose 1 <= images_per_class"),
        ("cache_gb", "-1", "0 < cache_gb"),
        ("num_workers", "-1", "0 <= num_workers <= 512"),
        ("seed", "-1", "0 <= seed"),
        ("train_split", "none", "training needs images"),
        ("warmup_ratio", "1", "0 <= warmup_ratio < 1"),
        ("hflip", "2", "0 <= hflip <= 1"),
        ("precision", "fp8", "'auto', 'fp32', 'bf16', 'fp16'"),
    ],
)
def test_values_are_checked_before_anything_starts(
    capsys: pytest.CaptureFixture[str], name: str, value: str, expected: str
) -> None:
    assert expected in refused(capsys, f"--{name}", value)


def test_one_split_cannot_serve_twice() -> None:
    with pytest.raises(ValueError, match="named twice"):
        DataConfig(train_split="all", test_split="all")


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = flag(0.1, "a share")
    kind: Literal["a", "b"] = flag("a", "which", name="inner_kind")
    constant: int = 3  # no flag: not a setting


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int | None = flag(None, "how many")
    inner: Inner = field(default=Inner())


def test_settings_of_nested_configs_are_one_flat_list() -> None:
    assert to_settings(Outer()) == {"count": None, "share": 0.1, "inner_kind": "a"}
    changed = replace_settings(Outer(), {"inner_kind": "b", "share": 1, "count": 2})
    assert changed == Outer(count=2, inner=Inner(share=1.0, kind="b"))
    assert changed_settings(changed, Outer(count=2)) == {"share": 1.0, "inner_kind": "b"}
    assert replace_settings(changed, to_settings(Outer())) == Outer()
    with pytest.raises(ValueError, match="here: unknown setting 'constant'"):
        replace_settings(Outer(), {"constant": 4}, where="here: ")


def test_two_settings_cannot_share_a_name() -> None:
    @dataclass(frozen=True)
    class Twice:
        share: float = flag(0.1, "a share")
        inner: Inner = field(default=Inner())

    with pytest.raises(AssertionError, match="two settings are called share"):
        list_settings(Twice())


@pytest.mark.parametrize("name", strategy_names())
def test_a_strategy_is_called_after_its_file_and_names_are_checked(name: str) -> None:
    strategy = make_strategy(name)
    assert isinstance(strategy, Strategy)
    assert strategy.name == name
    with pytest.raises(ValueError, match=f"{name}: unknown setting 'dataset'"):
        make_strategy(name, dataset="x")  # belongs to the task


def read_help(capsys: pytest.CaptureFixture[str], word: str, strategy: str) -> dict[str, list[str]]:
    """The names of the flags that a help text shows, by title."""
    with pytest.raises(SystemExit) as stop:
        parsed(word, strategy=strategy)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"{EXIT_STATUS}\n")
    shown = shown.removesuffix(f"{EXIT_STATUS}\n")
    sections: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            sections[line[:-1]] = []
        elif line.startswith("  --") and sections:
            sections[list(sections)[-1]].append(line.split()[0].rstrip(",").removeprefix("--"))
    return sections


@pytest.mark.parametrize("name", strategy_names())
def test_help_is_short_and_names_the_flag_that_shows_all(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sections = read_help(capsys, "--help", name)
    assert sections.pop("help and messages") == ["help", "help_all", "quiet", "json"]
    shown = [name for names in sections.values() for name in names if name != "config"]
    own = {s.name for s in list_settings(default_config(name)).values() if s.group in ("strategy", "adapter")}
    assert own - {"class_balance", "calibrate"} <= set(shown)
    assert {"checkpoint", "dataset", "output_dir", "resume", "push_to_hub", "hflip"} & set(
        list_settings(default_config(name))
    ) <= set(shown)
    assert len(set(shown) - own) <= 25
    assert "dropout" not in shown


@pytest.mark.parametrize("name", strategy_names())
def test_help_leaves_out_what_the_strategy_refuses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = default_config(name).strategy
    assert isinstance(strategy, Strategy)
    sections = read_help(capsys, "--help", name)
    assert not strategy.refused & {flag for flags in sections.values() for flag in flags}
    values = {"folds": 3, "train_on_all": True, "select_by": "log_loss", "wise_ft": True, "early_stopping_patience": 1}
    for setting in strategy.refused:
        config = replace_settings(default_config(name), {setting: values[setting]})
        with pytest.raises(ValueError, match=f"{setting}="):
            config.strategy.check(config)  # type: ignore[attr-defined]


@pytest.mark.parametrize("chooser", [{"wise_ft": True}, {"early_stopping_patience": 2}])
def test_validation_images_choose_nothing_where_the_last_epoch_is_kept(chooser: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"validation images would choose .* omit one of the two"):
        replace_settings(default_config("full"), {"keep_last_epoch": True, **chooser})


@pytest.mark.parametrize("name", strategy_names())
def test_all_help_is_grouped_and_shows_the_most_used_flags_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sections = read_help(capsys, "--help_all", name)
    assert sections.pop("help and messages") == ["help", "help_all", "quiet", "json"]
    first, *rest = sections
    takes_steps = "lr" in list_settings(default_config(name))
    most_used = [
        "checkpoint",
        "dataset",
        "output_dir",
        *(["epochs", "lr"] if takes_steps else ["images_per_class", "seed"]),
    ]
    assert (first, sections[first]) == ("most used", ["config", *most_used])
    assert rest == [title for title in GROUPS.values() if title in rest]
    assert len(rest) >= 4
    shown = [name for names in sections.values() for name in names if name != "config"]
    assert sorted(shown) == sorted(list_settings(default_config(name)))  # each once


def test_an_old_settings_file_names_the_setting_that_replaced_save_every(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("save_every: 100\n")
    with pytest.raises(ValueError, match="unknown setting 'save_every'; did you mean save_every_s"):
        read_config(str(file), default_config("full"))
