"""A headless Chromium, for tests of pages; without a package for it."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def need_chromium() -> None:
    """Skip the test where there is none."""
    if BROWSER is None or os.name != "posix":
        pytest.skip("no Chromium here; the page was not opened in a browser")


class Chromium:
    """A headless Chromium that is spoken to through pipes: its DevTools protocol, a JSON text and a NUL a message."""

    def __init__(self, folder: Path) -> None:
        assert BROWSER is not None
        (theirs, self.out), (self.back, ours) = os.pipe(), os.pipe()

        def give_pipes() -> None:
            one, two = os.dup(theirs), os.dup(ours)
            os.dup2(one, 3)
            os.dup2(two, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-dev-shm-usage", "--disable-quic", "--disable-background-networking", "--disable-sync"]
        flags += ["--disable-component-update", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        with open(os.devnull, "w") as nowhere:
            self.process = subprocess.Popen(
                [BROWSER, *flags, "about:blank"], preexec_fn=give_pipes, close_fds=False, stdout=nowhere, stderr=nowhere
            )
        os.close(theirs)
        os.close(ours)
        self.rest, self.count, self.session, self.events = b"", 0, "", list[dict[str, Any]]()
        [page] = [target for target in self.ask("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Performance.enable", timeDomain="threadTicks")
        self.ask("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], 60)[0], "Chromium says nothing"
            told = os.read(self.back, 1 << 20)
            assert told, "Chromium ended"
            self.rest += told
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def run(self, script: str) -> Any:
        said = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def open(self, url: str, ready: str = "true") -> tuple[float, float]:
        """Opens it from nothing; seconds until everything is drawn and on the screen, and the main thread's of them.

        Args:
            ready: a condition, in JavaScript, that the page makes true when it is.
        """
        self.ask("Page.navigate", url="about:blank")
        self.events.clear()
        before, end = self._thread_seconds(), time.monotonic() + 60
        self.ask("Page.navigate", url=url)
        while not self.run(f"document.readyState === 'complete' && location.href !== 'about:blank' && ({ready})"):
            assert time.monotonic() < end and not self.complaints(), self.complaints()
            time.sleep(0.02)
        painted = "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
        wall = self.run(f"new Promise((done) => {painted})") / 1000
        after = self._thread_seconds()
        return wall, after - before if after > before else after  # a new process counts from 0

    def _thread_seconds(self) -> float:
        metrics = self.ask("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    def complaints(self) -> list[dict[str, Any]]:
        """All that went to the console, errors that nobody caught, and what else the browser logged."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def loaded(self) -> list[str]:
        """Addresses that were asked for; what a page has inside (`data:`) is none."""
        requests = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in requests]
        return [url for url in urls if not url.startswith("data:")]

    def png(self) -> bytes:
        """The whole page."""
        size = self.run("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def picture(self) -> Any:
        """float (height, width, 3): the whole page."""
        from matplotlib.image import imread

        return imread(io.BytesIO(self.png()))[..., :3]

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            buttons = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.out)
        os.close(self.back)
