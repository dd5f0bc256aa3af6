"""Reads tables that are text: .csv, .tsv and .jsonl files, as `datasets` tables in memory.

The whole file decides the type of a column. A CSV column becomes integers only if every number is written as Python would
write it, so that "007" stays text. An empty cell is None. A file is UTF-8, or UTF-16 with a byte order mark.
"""

import codecs
import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

_DELIMITERS = (",", ";", "\t")
_MAX_BYTES = 2**31 - 1  # pyarrow reads the file as one block


class TextTableError(ValueError):
    """The error for a table that is not damaged, but must be changed. Its message contains the remedy."""


def read_text_table(path: Path) -> datasets.Dataset:
    """Returns the table in a .csv, .tsv or .jsonl file.

    Raises:
        TextTableError: the file has another encoding, or several columns have one name.
        ValueError: the file is empty, too large, or not such a table. pyarrow's errors are ValueErrors too.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    if len(content) > _MAX_BYTES:
        raise ValueError(f"the file has more than {_MAX_BYTES:,} bytes; save the table as parquet")
    content = _as_utf8(content)
    if not content.strip():
        raise ValueError("the file is empty")
    header = content.split(b"\n", 1)[0].decode()
    if path.suffix.casefold() == ".jsonl":
        options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
        table = pyarrow.json.read_json(io.BytesIO(content), read_options=options)
    else:
        delimiter = "\t" if path.suffix.casefold() == ".tsv" else max(_DELIMITERS, key=header.count)
        table = _read_csv(content, delimiter)
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise TextTableError(f"several columns are called {repeated[0]!r}; rename one")
    if not table.num_rows:
        raise ValueError("the table has no rows")
    return datasets.Dataset(table)


def _as_utf8(content: bytes) -> bytes:
    """Returns text as UTF-8 without a byte order mark. Raises TextTableError for other encodings, which carry no mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    content = content.removeprefix(codecs.BOM_UTF8)
    wrong = content.find(b"\0")  # of UTF-16 without a mark
    try:
        content.decode()
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = content.count(b"\n", 0, wrong) + 1
        raise TextTableError(f'line {line} is not UTF-8 text; save the table as UTF-8 (in Excel: as "CSV UTF-8")')
    return content


def _read_csv(content: bytes, delimiter: str) -> pa.Table:
    """Returns a CSV file as a table with columns of integers, floats and text."""
    text = pyarrow.csv.read_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=_all_text(content, delimiter), strings_can_be_null=True, null_values=[""]
        ),
    )
    names = [name.strip() for name in text.column_names]
    return pa.table([_typed(text.column(i)) for i in range(text.num_columns)], names=names)


def _all_text(content: bytes, delimiter: str) -> dict[str, pa.DataType]:
    """Returns the type text for each column in the header of a CSV file."""
    reader = pyarrow.csv.open_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    )
    return dict.fromkeys(reader.schema.names, pa.string())


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column of text as integers or floats if all its cells are numbers, and else unchanged."""
    if column.null_count == len(column):
        return column
    numbers = _cast(column, pa.int64())
    if numbers is not None and numbers.cast(pa.string()).equals(column):
        return numbers
    has_leading_zero = pc.any(pc.match_substring_regex(column, r"^[-+]?0\d")).as_py()
    numbers = None if has_leading_zero else _cast(column, pa.float64())
    if numbers is None or pc.any(pc.is_nan(numbers)).as_py():
        return column
    is_whole = pc.all(pc.match_substring_regex(column, r"^[-+]?\d+$")).as_py()
    # Long integers, such as numbers of patients, may become equal as floats.
    merges = is_whole and pc.count_distinct(numbers).as_py() < pc.count_distinct(column).as_py()
    return column if merges else numbers


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return None
