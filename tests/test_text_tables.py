"""CSV, TSV and JSON lines become columns of integers, floats and text, decided by the whole file."""

import re
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
        ("x,y\na\n", ".csv", "CSV parse error: Row #2: Expected 2 columns, got 1"),
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


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, suffix: str, tmp_path: Path) -> None:
    text = "x\ty\n\u00e9\u4e2d,\u00fc\t1\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert read(tmp_path, (mark + text).encode(encoding), suffix) == {"x": ["\u00e9\u4e2d,\u00fc"], "y": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x,x\na,b\n", "several columns are called 'x'; rename one"),
        *(
            (content, 'line 3 is not UTF-8 text; save the table as UTF-8 (in Excel: as "CSV UTF-8")')
            for content in (
                "x,y\na,1\n\u00e9,1\n".encode("latin-1"), b"x,y\na,1\nb\0,1\n", "x,y\na,1\n\u4e2d,1\n".encode("gbk")
            )
        ),
        ("x,y\na,1\n".encode("utf-16-le"), 'line 1 is not UTF-8 text; save the table as UTF-8 (in Excel: as "CSV UTF-8")'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["pets.csv", "metadata.csv"])
def test_tables_that_are_not_damaged_get_a_remedy_of_their_own(
    text: bytes, message: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text)
    (tmp_path / "1.png").touch()
    dataset = tmp_path if name == "metadata.csv" else tmp_path / name
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_data(DataConfig(dataset=str(dataset)))
    where = f"{tmp_path.name} cannot be read: metadata.csv" if name == "metadata.csv" else "pets.csv cannot be read"
    assert str(error.value) == f"{where}: {message}"
