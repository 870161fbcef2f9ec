"""A headless Chromium for tests, driven through chromedriver by the W3C WebDriver protocol: plain HTTP, no package."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes import free_port

# Nothing of Chromium's own may go to the network: no updates, no syncing, no look-ups.
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
)  # fmt: skip
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Space": " ", "Left": "\ue012", "Right": "\ue014", "End": "\ue010"}


def missing() -> str | None:
    """What is not installed."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed (Debian: chromium, chromium-driver)"
    return None


class Browser:
    def __init__(self, address: str):
        self.address, self.session = address, ""
        # Not through a proxy that the environment names: the driver is on this machine.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, method=method)
        try:
            with self.opener.open(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:1000]) from error

    def open(self, profile: Path) -> None:
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        logs = {"browser": "ALL", "performance": "ALL"}
        waits = {"script": 110_000, "pageLoad": 110_000}  # milliseconds: a busy machine stops for long
        wanted = {"browserName": "chrome", "timeouts": waits, "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self.session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def go(self, page: Path) -> None:
        self.command("POST", "url", {"url": page.resolve().as_uri()})

    def script(self, code: str, *arguments: Any) -> Any:
        return self.command("POST", "execute/sync", {"script": code, "args": list(arguments)})

    def press(self, *names: str) -> None:
        """Keys by name, or texts to type, one after another."""
        keys = [key for name in names for key in KEYS.get(name, name)]
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.command("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def colours(self, scheme: str) -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """Of the whole page, not only of what the window shows."""
        height = self.script("return document.documentElement.scrollHeight")
        width = self.script("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        image = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries of the `browser` (console) or `performance` log since the last call."""
        return list(self.command("POST", "se/log", {"type": kind}))

    def command(self, method: str, name: str, body: dict[str, Any]) -> Any:
        return self.send(method, f"/session/{self.session}/{name}", body)


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`; it and its driver have ended afterwards."""
    port = free_port()
    with (folder / "chromedriver.log").open("w") as log:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
    browser = Browser(f"http://127.0.0.1:{port}")
    try:
        _wait(browser, driver)
        browser.open(folder / "profile")
        yield browser
    finally:
        if browser.session:
            browser.send("DELETE", f"/session/{browser.session}")
        driver.terminate()
        driver.wait(30)


def _wait(browser: Browser, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and driver.poll() is None:
        try:
            if browser.send("GET", "/status")["ready"]:
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("chromedriver has not started")
