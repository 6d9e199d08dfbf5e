"""A headless Chromium, and a page in it of which all is noticed that must not happen.

Where none is installed the tests are skipped, unless LLMRUN_REQUIRE_CHROMIUM=1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.fakes.chat_server import ChatServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 30_000

# A refused script or style, and a text refused as HTML, end up here and on the console.
_NOTE_VIOLATIONS = """
  window.violations = [];
  addEventListener("securitypolicyviolation", (event) => {
    window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
  });
"""


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        words = f"no Chromium is installed (looked for {', '.join(NAMES)})"
        if os.environ.get("LLMRUN_REQUIRE_CHROMIUM") == "1":
            pytest.fail(words)
        pytest.skip(words)
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Browser,
    server: ChatServer,
    path: str = "/",
    *,
    fails: bool = False,
    **options: object,
) -> Iterator[Page]:
    """A page at `path` of the server, of its own storage. `options` are the context's.

    Raises AssertionError at the end for errors on the console (but of answers with an error's
    status, where the test `fails` on purpose), violations of the policy, and requests to others.
    """
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_default_timeout(TIMEOUT_MS)
    context.add_init_script(_NOTE_VIOLATIONS)
    page = context.new_page()
    bad: list[str] = []

    def note_console(kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (fails and "Failed to load resource" in text):
            bad.append(f"console: {text}")

    def note_request(url: str) -> None:
        if not url.startswith((f"{server.url}/", "data:")):
            bad.append(f"request: {url}")

    page.on("console", lambda message: note_console(message.type, message.text))
    page.on("pageerror", lambda error: bad.append(f"error: {error}"))
    page.on("request", lambda request: note_request(request.url))
    try:
        page.goto(server.url + path)
        yield page
        bad += [] if page.is_closed() else page.evaluate("window.violations")
        assert bad == []
    finally:
        context.close()


def ask(page: Page, text: str) -> None:
    """With the keyboard only: the field has the focus from the start."""
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.get_by_label("Model")).to_be_enabled()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant")


def questions(page: Page) -> Locator:
    return page.locator("article.user")


def finish(page: Page, n_answers: int = 1) -> Locator:
    """The last answer, when it is whole."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answers(page)).to_have_count(n_answers)
    return answers(page).last
