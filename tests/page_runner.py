"""Runs the code blocks of a page in its order, in one folder and one process, as a reader would paste them.

`hf-transfer` and recipes run in this process, so that heavy imports are paid once. Everything else is left to bash. The flags
and files of `accelerate launch` are read by accelerate's own parser; the recipe then runs here, as it would in one process.
"""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hf_transfer.cli import main
from tests.pages import CODE, ROOT, read_blocks

SHELL_SIGNS = ("|", ">", "&&", ";", "$")


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs the blocks that carry no mark, and returns their number. Python blocks of a page share their names."""
    monkeypatch.chdir(folder)
    names = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", names)
    blocks = [block for block in read_blocks(page) if block.language in CODE and block.reason is None]
    for block in blocks:
        print(f"--- {block.place}")
        if block.language == "python":
            exec(compile(block.code, block.place, "exec"), vars(names))
        else:
            for line in block.code.replace("\\\n", " ").splitlines():
                run_line(line, monkeypatch)
    return len(blocks)


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one line of a shell block."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if any(word in SHELL_SIGNS for word in words) or words[0] not in ("hf-transfer", "accelerate", "python"):
        run_in_bash(line)
    elif words[0] == "hf-transfer":
        call(words[1:])
    elif words[0] == "python":
        run_script(words[1:], monkeypatch)
    else:
        assert words[:2] == ["accelerate", "launch"], line
        given = launch_command_parser().parse_args(words[2:])
        config = load_config_from_file(given.config_file) if given.config_file else given
        assert (config.num_processes or 1) == 1, f"{line}: several processes; mark the block"
        script = [given.training_script, *given.training_script_args]
        if given.module:
            assert script[0] == "hf_transfer", line
            call(script[1:])
        else:
            run_script(script, monkeypatch)


def call(arguments: Sequence[str]) -> None:
    """Runs `hf-transfer`, which must not fail."""
    status = None
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code
    assert not status, f"hf-transfer {shlex.join(arguments)}: exit status {status}"


def run_script(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        runpy.run_path(words[0], run_name="__main__")


def run_in_bash(line: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
