"""A message about one image, epoch or label has its noun and verb in the singular, and keeps its plural for more."""

from pathlib import Path

import pytest
import torch

from hf_transfer import doctor, threads
from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.notes import hide_names
from hf_transfer.reporting.sentences import describe_phase, describe_quality
from hf_transfer.targets.regression import Regression
from hf_transfer.targets.single_label import SingleLabel
from hf_transfer.training.records import Kept, PhaseResult
from tests.test_images import encoded, photo


@pytest.mark.parametrize(("count", "words"), [(1, "1 image is"), (2, "2 images are")])
def test_images_outside_the_class_folders(count: int, words: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(photo(8 + i, 8)))
    for i in range(count):
        (tmp_path / f"loose_{i}.png").write_bytes(encoded(photo(20 + i, 8)))
    notes = load_data(DataConfig(dataset=str(tmp_path))).notes
    [note] = [note for note in notes if "outside" in note]
    verb = words.split()[-1]
    assert note.startswith(f"{words} outside the class folders and {verb} not used: 'loose_0.png'")
    assert hide_names(note) == f"{words} outside the class folders and {verb} not used."


@pytest.mark.parametrize(("epochs", "words"), [(1, "up to 1 epoch;"), (2, "up to 2 epochs;")])
def test_the_epochs_of_a_phase(epochs: int, words: str) -> None:
    score = SingleLabel(names=("a", "b")).measure(torch.eye(2).numpy(), torch.arange(2).numpy(), groups=None).score
    phase = PhaseResult(
        policy="full", cut=None, optimizer="AdamW", epochs=epochs, lr=0.1, lr_scheduler_type="cosine", num_trainable=3,
        kept=Kept.LAST, kept_epoch=epochs, score=score,
    )  # fmt: skip
    assert words in describe_phase(phase)


def test_the_images_of_a_metric() -> None:
    target = SingleLabel(names=("a", "b"))
    metrics = target.measure(torch.eye(2).numpy()[:1], torch.arange(1).numpy(), groups=None)
    assert describe_quality(metrics).endswith("1 image)")


def test_the_threads_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.get_num_threads()
    monkeypatch.setattr(threads, "count_physical_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    text = doctor._check_threads()[0].text
    torch.set_num_threads(chosen)
    assert "computes with 1 thread, on 1 usable core (" in text


def test_labels_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="1 label such as 'a' is no number;"):
        Regression.read([1.0, "a", 2.0], None, "data")
