"""Headless Chromium, and pages in it that notice what a person would not see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright
from servers import absent

OpenPage = Callable[..., Page]
Answer = Callable[[Route], None]

# A machine under load is slow, not wrong.
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it: Playwright's own is not downloaded."""
    path = (
        os.environ.get("ONNX_QAT_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as playwright:
        try:
            # Without a path Playwright looks for its own. Containers have no sandbox to offer.
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            absent("chromium", error)
            raise
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens an address; at the end no script has failed and nothing was loaded from elsewhere.

    `answer` answers the requests to the API in place of the service.
    """
    contexts = []
    complaints: list[str] = []

    def open_(
        url: str, *, width: int = 1280, height: int = 900, answer: Answer | None = None, **options: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])

        def on_request(request: Any) -> None:
            if not request.url.startswith((origin, "blob:")):
                complaints.append(f"loaded {request.url}")

        page.on("request", on_request)
        # From the start: asked for only when a key is pressed, the file chooser of a slow browser is missed.
        page.on("filechooser", lambda chooser: None)
        page.on("pageerror", lambda error: complaints.append(f"script failed: {error}"))
        page.on("console", lambda message: _judge(message, complaints))
        if answer is not None:
            page.route("**/v1/**", answer)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def _judge(message: Any, complaints: list[str]) -> None:
    # Chromium logs every answer that is an error, and the tests provoke those.
    if message.type == "error" and not message.text.startswith("Failed to load resource"):
        complaints.append(f"console: {message.text}")


@pytest.fixture
def screenshot(tmp_path: Path) -> Callable[[Page, str], None]:
    """Saves a picture of the whole page, in ONNX_QAT_TEST_SCREENSHOTS where that is set."""
    folder = Path(os.environ.get("ONNX_QAT_TEST_SCREENSHOTS", tmp_path))

    def save(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return save
