"""benchmarks/gpu.py runs from end to end, where there is no GPU, on the embedded checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_benchmark(output: Path, *flags: str) -> dict[str, dict[str, float]]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(output),
    ]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows: dict[str, dict[str, float]] = json.loads(output.read_text())
    return rows


def test_rates_stand_beside_the_ceiling(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path / "gpu.json", "--rows", "ceiling", "full")
    rate, ceiling = (rows[name]["images_per_second"] for name in ("full", "ceiling"))
    assert rows["share_of_ceiling"] == pytest.approx(rate / ceiling)
    assert rate > 0


def test_the_pass_is_measured_by_each_decoder(tmp_path: Path) -> None:
    decoders: dict[str, Any] = run_benchmark(tmp_path / "gpu.json", "--rows", "pass")["pass"]
    assert list(decoders) == ["exact", "fast", "device"]
    assert all(each["images_per_second"] > 0 for each in decoders.values())
    assert set(decoders["device"]["decoded"]) == {"together"}
    assert decoders["exact"]["decoded"] == {}
    assert decoders["exact"]["drift"] is None
    assert decoders["device"]["drift"]["largest"] == 0


def test_engines_and_augmentation_are_measured_beside_eager(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path / "gpu.json", "--rows", "engines", "augmentation")
    engines: dict[str, Any] = rows["engines"]
    assert {name for name in engines if "GFLOPs" not in name} == {
        f"{name}, {size} images" for name in ("eager", "folded", "compiled") for size in (8, 16)
    }
    assert {row["ran"] for name, row in engines.items() if name.startswith("compiled")} == {"_CompiledRunner"}
    augmentation: dict[str, Any] = rows["augmentation"]
    assert all(rates["eager"] > 0 and rates["compiled"] > 0 for rates in augmentation.values())
    assert len(augmentation) == 3


@pytest.mark.soak
def test_every_strategy_resumes_and_every_row_is_measured(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path / "gpu.json")
    assert set(rows) == {
        "machine", "strategies", "ceiling", "full", "default", "pass", "linear_probe", "engines", "augmentation",
        "share_of_ceiling"
    }  # fmt: skip
    assert rows["strategies"]["full"]["interrupted"]  # type: ignore[index]
