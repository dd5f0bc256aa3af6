"""Sealed JSON: a damaged line is recognized, and a file is replaced as a whole."""

import json
from pathlib import Path

import pytest

from hf_transfer.sealed import read_sealed, seal, unseal, write_sealed

CONTENT = {
    "stem": [{"side": "after", "module": "patch_embed", "index": 0}, False],
    "text": "\u00e9",
    "numbers": [1, 2.5, None],
}


def test_no_flipped_bit_changes_the_content() -> None:
    intact = seal(CONTENT).encode()
    detected = 0
    for place in range(len(intact)):
        for bit in range(8):
            damaged = bytearray(intact)
            damaged[place] ^= 1 << bit
            try:
                assert unseal(bytes(damaged)) == CONTENT, (place, bit)
            except ValueError:
                detected += 1
    assert detected > 7.5 * len(intact)  # the others change white space, or the case of an escaped letter


def test_other_json_is_refused() -> None:
    for text in ("", "{}", "[]", "1", "null", json.dumps(CONTENT), seal(CONTENT)[:-1], "[" * 10**5):
        with pytest.raises(ValueError, match=r"not a JSON object|checksum"):
            unseal(text)


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_sealed(file, CONTENT)
    with pytest.raises(TypeError):
        write_sealed(file, object())
    assert read_sealed(file) == CONTENT
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_sealed(tmp_path / "folder", CONTENT)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "folder"}
