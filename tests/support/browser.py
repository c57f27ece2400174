# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A headless Chromium, controlled by chromedriver with the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import pathlib
import re
import subprocess
import typing as t
import urllib.error
import urllib.request

from .waiting import LIMIT

_CHROMEDRIVER = "/usr/bin/chromedriver"
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """A browser window; `close` ends the browser and its driver."""

    def __init__(self, folder: pathlib.Path) -> None:
        """:param folder: for the browser's profile."""
        self.driver = subprocess.Popen(
            [_CHROMEDRIVER, "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.base = ""
        for line in self.driver.stdout or ():
            match = re.search(r"on port (\d+)", line)
            if match and int(match.group(1)):
                self.base = f"http://127.0.0.1:{match.group(1)}"
                break
        options = {"args": [*_ARGUMENTS, f"--user-data-dir={folder}"]}
        # Console messages of the page, including refused requests.
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            answer = self._call("/session", {"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self.driver.terminate()
            raise
        self.base += f"/session/{answer['sessionId']}"

    def close(self) -> None:
        try:
            self._call("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait(LIMIT)

    def _call(self, path: str, body: t.Any = None, method: str = "POST") -> t.Any:
        request = urllib.request.Request(
            self.base + path,
            method=method,
            data=json.dumps(body if body is not None else {}).encode()
            if method == "POST"
            else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def cdp(self, command: str, **params: t.Any) -> t.Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})

    def show(self, page: pathlib.Path, width: int, height: int, dark: bool = False) -> None:
        """Open a file in a window of that size, in CSS pixels."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self._call("/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: t.Any) -> t.Any:
        """Run a script; returns the value of its `return`."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def console_messages(self) -> t.List[str]:
        """The messages of the page's console since the last call."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def picture(self, target: pathlib.Path, whole: bool = False) -> None:
        """Save the window, or the whole page, as PNG."""
        options: t.Dict[str, t.Any] = {"format": "png"}
        if whole:
            width, height = self.run(
                "const e=document.documentElement;return [e.scrollWidth,e.scrollHeight]"
            )
            clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}
            options.update(clip=clip, captureBeyondViewport=True)
        data = self.cdp("Page.captureScreenshot", **options)["data"]
        target.write_bytes(base64.b64decode(data))
