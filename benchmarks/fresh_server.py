"""Loads saved models with transformers and timm alone, one folder after another, in one process without hf_transfer.

python fresh_server.py FRESH_PROCESS_FILE    # reads lines of JSON: folder, reference, libraries; answers each with a line
"""

import importlib.util
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any


def main() -> None:
    """Answers each line of stdin with the results of `hub/fresh_process.py`, or with the error."""
    spec = importlib.util.spec_from_file_location("fresh_process", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    fresh_process = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh_process)
    for line in sys.stdin:
        sys.argv[1:] = json.loads(line)
        printed = StringIO()
        answer: dict[str, Any] = {}
        try:
            with redirect_stdout(printed):
                fresh_process.main()
        except Exception as error:  # noqa: BLE001 - any: it becomes a row of the table
            answer["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        answer["results"] = [json.loads(text) for text in printed.getvalue().splitlines() if text.startswith("{")]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
