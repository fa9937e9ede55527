"""Open a page in headless Chromium, and ask it what it shows. Tests skip where there is none."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
ANSWER = """<script>addEventListener('load', () => setTimeout(() => {
  const answer = document.createElement('pre'); answer.id = 'answer';
  answer.textContent = JSON.stringify((() => { %s })()); document.body.append(answer);
}, 500));</script></body>"""


def ask(page: str, function: str, folder: Path) -> Any:
    """Return what the body of a JavaScript function returns in the page, shown at 1400 x 900."""
    file = folder / "asked.html"
    file.write_text(page.replace("</body>", ANSWER % function))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=4000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"the page did not answer: {dom[-2000:]}"
    return json.loads(html.unescape(found[1]))
