"""What the web chat says when things go wrong, and while there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from llmrun.errors import EngineError
from tests.fakes.browser import answers, ask, finish, open_browser, open_page
from tests.fakes.chat_server import ChatServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


def refuse(page: Page, status: int, error: dict[str, object], headers: dict[str, str]) -> None:
    """The next question is answered so."""

    def answer(route: Route) -> None:
        route.fulfill(
            status=status,
            headers={"content-type": "application/json", **headers},
            body=json.dumps({"error": error}),
        )

    page.route("**/v1/chat/completions", answer, times=1)


def failure(page: Page) -> Locator:
    return page.locator("#failure")


def test_a_conversation_that_is_too_long_says_what_to_do(browser: Browser) -> None:
    with (
        ChatServer(n_ctx=64) as server,
        open_page(browser, server, fails=True) as page,
    ):
        ask(page, "word " * 30)
        expect(failure(page)).to_contain_text("longer than the model's context (")
        expect(failure(page)).to_contain_text("there is room for 64")
        expect(answers(page)).to_have_count(0)


@pytest.mark.parametrize(
    ("status", "error", "headers", "words"),
    [
        (
            429,
            {"message": "64 requests wait already", "code": "rate_limit_exceeded"},
            {"Retry-After": "7"},
            "The server is busy: 64 requests wait already. Try again in 7 s.",
        ),
        (
            503,
            {"message": "the server is shutting down", "code": "shutting_down"},
            {"Retry-After": "5"},
            "The server is shutting down. Try again in 5 s.",
        ),
        (
            404,
            {"message": "there is no model x; llmrun pull x", "code": "model_not_found"},
            {},
            "There is no model x; llmrun pull x.",
        ),
        (500, {}, {}, "The server answered with status 500."),
    ],
)
def test_errors_are_said_in_words(
    browser: Browser, status: int, error: dict[str, object], headers: dict[str, str], words: str
) -> None:
    with ChatServer() as server, open_page(browser, server, fails=True) as page:
        refuse(page, status, error, headers)
        ask(page, "Hi")
        expect(failure(page).locator("p")).to_have_text(words)
        page.get_by_role("button", name="Try again").click()
        expect(finish(page).locator(".text")).to_have_text("Hello!")
        expect(failure(page)).to_have_text("")


def test_a_draining_server_says_so(browser: Browser) -> None:
    with ChatServer() as server, open_page(browser, server, fails=True) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        server.state.begin_drain()
        ask(page, "Hi")
        expect(failure(page)).to_contain_text("The server is shutting down.")


def test_an_answer_that_fails_on_the_way_keeps_its_beginning(browser: Browser) -> None:
    script = [("Half of ", EngineError("the GPU went away"))]
    with ChatServer(script) as server, open_page(browser, server) as page:
        ask(page, "Hi")
        expect(failure(page)).to_contain_text("The GPU went away.")
        expect(answers(page).locator(".text")).to_contain_text("Half of")


def test_a_server_that_is_gone_is_noticed(browser: Browser) -> None:
    server = ChatServer()
    with server, open_page(browser, server, fails=True) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        ask(page, "Hi")
        expect(failure(page)).to_contain_text("The server does not answer.")
        page.reload()
        expect(page.get_by_role("status")).to_contain_text("The server does not answer.")
        page.unroute("**/v1/**")
        expect(page.get_by_label("Model")).to_be_enabled()
        expect(page.get_by_role("status")).to_have_text("")


def test_loading_is_shown(browser: Browser) -> None:
    loading = {"name": "fake-1b", "doing": "loading", "share": 0.43}
    health = {"status": "loading", "models": [], "loading": [loading]}
    with ChatServer() as server, open_page(browser, server) as page:
        page.route("**/health", lambda route: route.fulfill(json=health))
        page.reload()
        expect(page.get_by_role("status")).to_have_text("Loading fake-1b (43 %)…")
        server.engine.hold(0)
        ask(page, "Hi")
        expect(answers(page).locator(".waiting")).to_have_text("Loading fake-1b (43 %)…")
        page.unroute("**/health")
        expect(page.get_by_role("status")).to_have_text("")
        expect(answers(page).locator(".waiting")).to_have_text("Reading…")
        server.engine.release()
        expect(finish(page).locator(".waiting")).to_be_hidden()
