"""JSON files that show whether they are damaged: each contains a checksum of its own content."""

import json
import uuid
from pathlib import Path
from typing import Any

import xxhash


def seal(content: Any) -> str:
    """Returns one line of JSON that contains the JSON value `content` and its checksum."""
    return json.dumps({"content": content, "checksum": _checksum(content)})


def unseal(text: str | bytes) -> Any:
    """Returns the content of a line that `seal` made. Raises ValueError if the line is damaged."""
    try:
        value = json.loads(text)
        content, checksum = value["content"], value["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a JSON object with content and checksum ({type(error).__name__})") from error
    if checksum != _checksum(content):
        raise ValueError("the checksum does not match the content")
    return content


def write_sealed(file: Path, content: Any) -> None:
    """Writes the JSON value `content` and its checksum to `file`, so that readers see the old or the new file, never a part."""
    replace_file(file, seal(content).encode())


def replace_file(file: Path, content: bytes) -> None:
    """Writes `content` to `file`, so that readers see the old or the new file, never a part."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def share(file: Path) -> None:
    """Gives a file that safetensors wrote, which only its owner may read, the permissions of other new files."""
    probe = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    probe.touch()
    file.chmod(probe.stat().st_mode)
    probe.unlink()


def read_sealed(file: Path) -> Any:
    """Returns the JSON value in `file`. Raises ValueError if the file is damaged, OSError if it cannot be read."""
    return unseal(file.read_bytes())


def _checksum(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
