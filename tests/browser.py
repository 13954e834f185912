"""A headless Chromium over WebDriver: JSON over HTTP to chromedriver, no package of its own."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# quiet: nothing that asks the network by itself
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--password-store=basic",
)
WANTED = 60.0


def find_browser() -> tuple[str, str]:
    """Paths of the browser and its driver. Without one a test is skipped, in CI it fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "no chromium and chromedriver here (apt-get install chromium chromium-driver)"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"{reason}, and CI must have them")
        pytest.skip(reason)
    return browser, driver


class Page:
    """A tab of the browser."""

    def __init__(self, session: httpx.Client) -> None:
        self._session = session

    def _post(self, path: str, **values: Any) -> Any:
        answer = self._session.post(path, json=values)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def cdp(self, command: str, **values: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._post("goog/cdp/execute", cmd=command, params=values)

    def show(self, url: str, width: int, height: int, scheme: str) -> None:
        """Open a page as a device of this size does whose user prefers light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._post("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._post("execute/sync", script=script, args=list(arguments))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries since the last call: "browser" for the console, "performance" for requests."""
        entries: list[dict[str, Any]] = self._post("se/log", type=kind)
        return entries

    def requests(self) -> list[str]:
        """URLs that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        asked = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in asked]

    def screenshot(self, file: Path) -> None:
        """Of the whole page, as PNG."""
        found = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """A browser with a profile of its own; it ends with the block."""
    browser, driver = find_browser()
    options = {
        "binary": browser,
        "args": [*FLAGS, f"--user-data-dir={profile}"],
    }
    capabilities = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    with subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            port = next(
                m[1]
                for line in server.stdout
                if (m := re.search(r"successfully on port (\d+)", line))
            )
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/", timeout=WANTED) as client:
                wanted = {"capabilities": {"alwaysMatch": capabilities}}
                answer = client.post("session", json=wanted)
                assert answer.status_code == 200, answer.text
                client.base_url = f"{client.base_url}session/{answer.json()['value']['sessionId']}/"
                try:
                    page = Page(client)
                    page.show("about:blank", 800, 600, "light")
                    page.log("performance")  # of the browser's own first tab
                    yield page
                finally:
                    client.delete("")
        finally:
            server.terminate()
