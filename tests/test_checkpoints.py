"""Saved states: loaded as they were saved, to the bit, and never half written."""

from pathlib import Path

import pytest
import torch

from hf_transfer.training import checkpoints
from hf_transfer.training.checkpoints import STATE, load_state, remove_state, save_state


def make_state() -> dict[str, object]:
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return {
        "numbers": [1, 2.5, None, True, "text"],
        "empty": {},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": shared.bfloat16()}, 7: {}}},
        "betas": (0.9, 0.999),
        "views": [shared, shared.T],  # shared memory, and another layout
        "nothing": torch.empty(0, 2),
    }


def test_a_state_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert loaded is not None

    def compare(a: object, b: object) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, dict) and isinstance(b, dict):
            assert list(a) == list(b)
            [compare(a[k], b[k]) for k in a]
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
            assert len(a) == len(b)
            [compare(x, y) for x, y in zip(a, b, strict=True)]
        else:
            assert a == b

    compare(state, loaded)


def test_without_a_state_none_is_loaded(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    save_state(tmp_path, {"a": 1})
    remove_state(tmp_path)
    assert load_state(tmp_path) is None


def test_a_crash_while_saving_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, {"step": 1})

    def crash(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, {"step": 2})
    assert load_state(tmp_path) == {"step": 1}
    assert (tmp_path / STATE).stat().st_size > len(b"half")
