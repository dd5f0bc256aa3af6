"""CSV, TSV and JSON lines become columns of integers, floats and text, decided by the whole file."""

from pathlib import Path
from typing import Any

import pytest

from hf_transfer.config import DataConfig
from hf_transfer.data.dataset import load_data
from hf_transfer.data.text_tables import read_text_table


def read(folder: Path, text: str | bytes, suffix: str = ".csv") -> dict[str, list[Any]]:
    file = folder / f"x{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return dict(read_text_table(file)[:])


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "20", "3"], [1, 20, 3]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2", "x"], ["1", "2", "x"]),
        (["007", "8"], ["007", "8"]),
        (["12345678901234567890", "12345678901234567891"], ["12345678901234567890", "12345678901234567891"]),
        (["1.5", "2"], [1.5, 2.0]),
        (["00.5", "2"], ["00.5", "2"]),
        (["nan", "2"], ["nan", "2"]),
        (["true", "false"], ["true", "false"]),
        (["NA", "None"], ["NA", "None"]),
        (["+1", "2"], [1.0, 2.0]),
        (["9223372036854775808", "1"], [9223372036854775808.0, 1.0]),
        (['"a, b"', '"c\nd"'], ["a, b", "c\nd"]),
    ],
)
def test_a_column_has_one_type(cells: list[str], values: list[Any], tmp_path: Path) -> None:
    lines = "\n".join(f"{cell},z" for cell in cells)
    assert read(tmp_path, f"x,y\n{lines}\n") == {"x": values, "y": ["z"] * len(values)}


def test_a_late_line_decides_the_type(tmp_path: Path) -> None:
    numbers = [str(i) for i in range(300_000)]  # far beyond the first megabyte
    assert read(tmp_path, "x,y\n" + "".join(f"{i},z\n" for i in numbers) + "a,z\n")["x"] == [*numbers, "a"]


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("x,y\na,1\n", ".csv"), ("\ufeffx,y\r\na,1\r\n", ".csv"), ("x;y\na;1\n", ".csv"), ("x\ty\na\t1\n", ".csv"),
        ("x\ty\na\t1\n", ".tsv"), (" x , y \na,1\n", ".csv"), ('{"x": "a", "y": 1}\n', ".jsonl"),
    ],
)  # fmt: skip
def test_usual_forms_are_read(text: str, suffix: str, tmp_path: Path) -> None:
    assert read(tmp_path, text, suffix) == {"x": ["a"], "y": [1]}


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("", ".csv", "the file is empty"),
        ("x,y\n", ".csv", "the table has no rows"),
        ("x,x\na,b\n", ".csv", "several columns are called 'x'; rename one"),
        ("x,y\na\n", ".csv", "CSV parse error: Row #2: Expected 2 columns, got 1"),
        ("x,y\n\u00e9,1\n".encode("latin-1"), ".csv", "not UTF-8 text .*; save it as UTF-8"),
        ("{", ".jsonl", "JSON parse error"),
        ('{"x": 1}\n{"x": "a"}\n', ".jsonl", "JSON parse error"),
        ("[1, 2]\n", ".jsonl", "JSON parse error"),
    ],
)
def test_damaged_tables_are_one_line(text: str | bytes, suffix: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"pets{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"pets{suffix} cannot be read: .*{message}.*; repair, replace or"):
        load_data(DataConfig(dataset=str(file)))
