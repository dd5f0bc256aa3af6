"""What all tests share: no network, no user's caches, two threads, the real data if it is here."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before any Hugging Face library is imported: they read these once. Subprocesses inherit them.
_scratch = Path(tempfile.mkdtemp(prefix="hf_transfer-tests-"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=str(_scratch / "huggingface"),
    HF_TRANSFER_CACHE=str(_scratch / "hf_transfer"),
)
# One thread on every machine: sums are then split alike, and neither gloo processes nor pytest's workers crowd.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_SHARED_DATA_VARIABLE = "HF_TRANSFER_SHARED_DATA"


def pytest_unconfigure() -> None:
    shutil.rmtree(_scratch, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for the fixture carry its marker: `-m "not shared_data"` leaves them out."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("shared_data")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real checkpoints and data sets: `checkpoints/<name>`, `datasets/<name>`."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(_SHARED_DATA_VARIABLE, beside))
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"no real data at {folder}; name its folder in {_SHARED_DATA_VARIABLE}")
    return folder
