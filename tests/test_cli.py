"""The command: what it prints, and that a user's mistake is one line."""

import pytest

from hf_transfer.cli import main


def test_inspect_prints_the_chain_and_the_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect"])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith("embedded (timm ResNet), 10 classes, 32x32 px bicubic")
    names = [line.split()[1] for line in lines if line[:1].isdigit()]
    assert names == ["stem", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "head"]
    strategies = {line.split()[0]: line for line in lines if line}
    assert "before the classifier" in strategies["head"]
    assert "after layer4.0" in strategies["last(1)"]
    assert strategies["full"].endswith("100.0 %")
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if line[:1].isdigit()]
    assert sum(shares) == pytest.approx(100, abs=0.6)  # of the FLOPs, each rounded


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
