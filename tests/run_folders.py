"""Writes folders that look like the output of a run."""

import json
from pathlib import Path

from hf_transfer.config import RunConfig
from hf_transfer.reporting.results import write_config

RESULTS = {"strategy": "lora", "plan": [], "config": {}}


def leave(folder: Path, name: str) -> None:
    """Writes one of the files that tell others that a run has written to `folder`."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "checkpoints/config.yaml":
        write_config(folder / "checkpoints", RunConfig())
    else:
        (folder / name).write_text(json.dumps(RESULTS) if name == "results.json" else "process 1 on host")
