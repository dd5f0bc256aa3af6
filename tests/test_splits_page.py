"""What docs/splits.md shows runs as it stands, in its order: commands, then the code that reads their runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "splits.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "sh", "sh", "python", "sh"]
    for language, code in BLOCKS:
        words = ["-c", code] if language == "python" else ["-m", *shlex.split(code)]
        if language == "sh":
            assert words[1] == "hf-transfer"
            words[1] = "hf_transfer"
        shown = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr[-2000:]
    assert {path.name for path in (tmp_path / "runs" / "folds").iterdir()} >= {f"fold_{i}" for i in range(1, 6)}
    assert (tmp_path / "runs" / "all" / "sibling" / "results.json").is_file()
    assert {path.name for path in (tmp_path / "runs" / "seeds").iterdir()} >= {"seed_0", "seed_1"}
