"""`--batch_size auto`: the size follows from memory and images, the learning rate from the size, and both are decided once."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from sessions import make_config, make_session

from hf_transfer.flags import parse
from hf_transfer.settings import list_settings
from hf_transfer.strategy import default_config, strategy_names
from hf_transfer.training import batch_size
from hf_transfer.training.batch_size import BatchFacts, choose_batch_size, measure_facts, scale_lr

# ViT-B/16 in float32 on a card of 80 GB: it keeps about 100 MB for the backward pass of an image.
CARD = BatchFacts(free_bytes=80 * 10**9, fixed_bytes=2 * 10**9, bytes_per_image=10**8, num_images=10**6)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 256),
        ({"bytes_per_image": 10**7}, 1024),  # the most
        ({"free_bytes": 8 * 10**9}, 16),
        ({"free_bytes": 10**9}, 1),  # at least 1
        ({"num_images": 3000}, 128),  # 20 steps or more in an epoch
        ({"num_images": 3000, "batches_per_step": 4}, 32),
        ({"num_images": 100}, 32),  # never below the default for few images
        ({"num_images": 100, "free_bytes": 8 * 10**9}, 16),
        ({"free_bytes": 8 * 10**9, "most_at_once": 8}, 1024),  # batches that are divided further
        ({"free_bytes": 5 * 10**9, "most_at_once": 8}, 4),
    ],
)
def test_the_size_follows_from_memory_and_images(changes: dict[str, Any], size: int) -> None:
    assert choose_batch_size(replace(CARD, **changes)) == size


def test_the_learning_rate_follows_from_the_size() -> None:
    for size in (8, 32, 256):
        assert scale_lr(1e-3, size, "adamw") == pytest.approx(1e-3 * math.sqrt(size / 32))
        assert scale_lr(1e-3, size, "sgd") == pytest.approx(1e-3 * size / 32)


def test_the_facts_of_a_network_grow_with_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session("full")
    facts = measure_facts(session)
    parameters = sum(p.nbytes for p in session.backbone.model.parameters())
    assert facts.fixed_bytes == 5 * parameters
    assert facts.bytes_per_image > session.chain.features.bytes_per_image
    assert facts.num_images == len(session.data.train)
    assert facts.most_at_once == 8
    assert measure_facts(make_session("full", freeze_batchnorm=False)).most_at_once is None


def choose_twice(folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], **settings: Any) -> list[Any]:
    """The configs of two sessions in one folder, for which `choose_batch_size` returns `sizes` in turn."""
    left = list(sizes)
    monkeypatch.setattr(batch_size, "choose_batch_size", lambda facts: left.pop(0))
    return [
        make_session("full", folder, batch_size="auto", resume=resume, **settings).config for resume in (False, True)
    ]


def test_a_resumed_run_keeps_size_and_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, resumed = choose_twice(tmp_path, monkeypatch, [128, 64], lr=1e-3, head_lr=1e-2)
    assert (first.compute.batch_size, resumed.compute.batch_size) == (128, 128)
    for config in (first, resumed):
        assert config.strategy.optimization.lr == pytest.approx(2e-3)
        assert config.strategy.optimization.head_lr == pytest.approx(2e-2)
    written = yaml.safe_load((tmp_path / "checkpoints" / "config.yaml").read_text())
    assert (written["batch_size"], written["lr"]) == (128, pytest.approx(2e-3))
    # The written config repeats the run: its learning rate is not scaled again.
    again = parse(
        "full", prog="x", description=None, arguments=["--config", str(tmp_path / "checkpoints" / "config.yaml")]
    )
    assert list_settings(again)["lr"].value == pytest.approx(2e-3)


def test_a_run_trains_with_the_size_that_it_decided(tmp_path: Path) -> None:
    """On a CPU with free memory, few images keep the default, and with it the learning rate."""
    config = make_session("full", tmp_path, batch_size="auto").config
    assert (config.compute.batch_size, config.strategy.optimization.lr) == (
        32,
        default_config("full").strategy.optimization.lr,
    )  # type: ignore[attr-defined]


def test_auto_is_refused_where_networks_could_differ() -> None:
    refused = []
    for name in strategy_names():
        config = make_config(name, batch_size="auto")
        try:
            config.strategy.check(config)  # type: ignore[attr-defined]
        except ValueError as error:
            assert str(error).startswith("batch_size='auto': ")  # noqa: PT017 - which strategies raise is checked below
            refused.append(name)
    assert {"auto", "linear_probe", "greedy_stack"} <= set(refused)
    assert {"full", "lora", "last_layers", "gradual", "probe_then_full"}.isdisjoint(refused)
    for settings in ({"folds": 3}, {"train_on_all": True}, {"seeds": 2}):
        config = make_config("full", batch_size="auto", **settings)
        with pytest.raises(ValueError, match="choose a number, such as --batch_size 64"):
            config.strategy.check(config)  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["automatic", "0", "1.5"])
def test_a_size_is_a_number_or_auto(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("full", prog="x", description=None, arguments=["--batch_size", value])
    assert "1 <= batch_size <= 65536 or 'auto'" in capsys.readouterr().err
