"""Open a page in headless Chromium, and ask it what it shows. Tests skip where there is none."""

from __future__ import annotations

import base64
import fcntl
import html
import json
import os
import re
import shutil
import subprocess
import time
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


class Tab:
    """Drive one tab of headless Chromium over its debugging pipe: a live page, in real time."""

    def __init__(self, folder: Path, width: int = 1400, height: int = 900, is_dark: bool = False) -> None:
        """folder: for the browser's profile. width, height: of the page, in CSS pixels."""
        pipes = [os.pipe(), os.pipe()]
        (child_in, self._out), (self._in, child_out) = [[fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends] for ends in pipes]
        for end in (*pipes[0], *pipes[1]):  # 3 and 4 must be free for what the browser expects there
            os.close(end)
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "about:blank"]
        # Chromium reads commands from descriptor 3 and writes answers to 4
        shell = f'exec "$@" 3<&{child_in} 4>&{child_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL
        )
        os.close(child_in), os.close(child_out)
        self._number, self._rest, self._session = 0, b"", None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 720)

    def before_each_page(self, script: str) -> None:
        """Run JavaScript in each page before its own."""
        self._call("Page.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30.0) -> Any:
        """Return the expression's first value that is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self.ask(expression):
                return found
            time.sleep(0.1)
        raise AssertionError(f"never true: {expression}; the page shows: {self.ask('document.body?.innerText')[:2000]}")

    def processor_seconds(self) -> float:
        """Return the processor time of the page's main thread so far, whatever else the machine does."""
        self._call("Performance.enable", timeDomain="threadTicks")
        metrics = self._call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def picture(self, file: Path) -> None:
        """Write what the tab shows as PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._out), os.close(self._in)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._in, 1 << 20)
                assert part, "the browser has gone"
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
