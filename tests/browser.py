"""Opens pages in a headless Chromium, drives them with a script, and reads what the script found."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium chromium-driver)"
)
_LISTEN = "<script>window.pageErrors = []; window.onerror = (m) => window.pageErrors.push(String(m));</script>"
_START = """
const out = {};
const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""
_END = """
out.unnamed = [...document.querySelectorAll("img, svg:not([aria-hidden])")].filter(
  (each) => !each.alt && !each.getAttribute("aria-label")).length;
out.wider = Math.max(0, document.documentElement.scrollWidth - window.innerWidth);
out.errors = window.pageErrors;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(out);
document.body.append(result);
"""


def drive(page: str, script: str, folder: Path, width_px: int = 1100) -> dict[str, Any]:
    """Returns `out`, which `script` fills by the functions of the page; `errors` are those of all scripts.

    `press(element, key)` presses a key. `wider` is by how many pixels the page is wider than the window.
    """
    assert CHROMIUM is not None
    driven = page.replace("<body>", f"<body>{_LISTEN}", 1)
    driven = driven.replace("</body>", f"<script>{_START}{script}{_END}</script></body>")
    file = folder / "driven.html"
    file.write_text(driven, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={width_px},900", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run([CHROMIUM, *options, file.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', dom.stdout, re.DOTALL)
    assert found is not None, dom.stdout[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result
