"""A headless Chromium for tests of HTML reports: the system's, installed from Debian where there is none.

``python -m tests.browser`` prints where it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_INSTALL = ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]


def chromium() -> Path:
    """The browser's program: ``$CHROMIUM``, one on the path, or a fresh installation (as root on Debian).

    Raises FileNotFoundError, saying what to do, where there is none and none can be installed.
    """
    found = _found()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update"], check=True, stdout=sys.stderr, timeout=300)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(_INSTALL, check=True, stdout=sys.stderr, timeout=600, env=environment)
        found = _found()
    if found is None:
        raise FileNotFoundError("no Chromium: install one (apt-get install chromium), or set CHROMIUM to it")
    return found


def _found() -> Path | None:
    given = os.environ.get("CHROMIUM")
    names = (given,) if given else _NAMES
    return next((Path(place) for name in names if (place := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser for several pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, dark: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """A page that shows a local file, and the list that collects its errors and its requests elsewhere."""
    troubles: list[str] = []
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.on("request", lambda it: None if it.url == file.as_uri() else troubles.append(it.url))
    try:
        page.goto(file.as_uri())
        yield page, troubles
    finally:
        page.close()


if __name__ == "__main__":
    sys.stdout.write(f"{chromium()}\n")
