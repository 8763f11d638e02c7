"""Looking at our pages with a real browser: Debian's chromium, driven by playwright where it is installed.

Both are optional: a test that needs them calls `chromium()` or takes `open_page` and is skipped with the reason where they are absent.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no chromium here (apt-get install --no-install-recommends chromium fonts-dejavu-core)")


def dump(url: str, milliseconds: int = 3000) -> str:
    """The document after its scripts ran for that long (virtual time), as HTML text."""
    done = subprocess.run(
        [
            chromium(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--virtual-time-budget={milliseconds}",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


def screenshot(url: str, target: Path, *, width: int = 1200, height: int = 700, dark: bool = False) -> None:
    """A PNG of the page."""
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(
        [
            chromium(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
            "--virtual-time-budget=3000",
            *options,
            f"--screenshot={target}",
            url,
        ],
        capture_output=True,
        timeout=60,
        check=True,
    )


class Watched:
    """A playwright page with what it complained about: console errors, page errors, and every address it asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@contextlib.contextmanager
def open_page(**options: Any) -> Iterator[Watched]:
    """A fresh browser page; skips the test where chromium or playwright is absent. `options` go to `new_context`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    path = chromium()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path)
        try:
            yield Watched(browser.new_context(**options).new_page())
        finally:
            browser.close()
