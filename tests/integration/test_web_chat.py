"""The web chat in a real browser, before the real application with a fake engine."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.fakes.browser import answers, ask, finish, open_browser, open_page, questions
from tests.fakes.chat_server import WAIT_S, ChatServer

LONG = "One two three four five six seven eight nine ten."
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


# ---- asking


def test_it_loads_and_is_ready_for_the_keyboard(browser: Browser) -> None:
    with ChatServer(names=("fake-1b", "fake-7b")) as server, open_page(browser, server) as page:
        expect(page).to_have_title("llmrun")
        expect(page.get_by_label("Model")).to_be_enabled()
        assert page.get_by_label("Model").locator("option").all_inner_texts() == [
            "fake-1b",
            "fake-7b",
        ]
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        expect(page.get_by_text("What would you like to ask?")).to_be_visible()
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_question_is_answered_as_it_is_made(browser: Browser) -> None:
    with ChatServer([LONG]) as server, open_page(browser, server) as page:
        server.engine.hold(8)
        expect(page.get_by_label("Model")).to_be_enabled()
        page.keyboard.type("First line")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second <b>line</b>")
        page.keyboard.press("Enter")
        expect(questions(page).locator(".text")).to_have_text("First line\nsecond <b>line</b>")
        expect(answers(page).locator(".text")).to_contain_text("One")
        expect(answers(page)).to_have_attribute("aria-busy", "true")
        expect(answers(page)).not_to_contain_text("ten.")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        server.engine.release()
        answer = finish(page)
        expect(answer.locator(".text")).to_have_text(LONG)
        expect(answer).not_to_have_attribute("aria-busy", "true")
        expect(answer.locator(".usage")).to_have_text(
            re.compile(rf"^{len(LONG)} tokens · 50\.0 tok/s · \d+ prompt tokens$")
        )
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        assert "First line\nsecond <b>line</b>" in server.engine.prompt_text()


def test_the_conversation_goes_on_and_says_what_was_cached(browser: Browser) -> None:
    with ChatServer(["Blue.", "Green."]) as server, open_page(browser, server) as page:
        ask(page, "A color?")
        finish(page)
        ask(page, "Another?")
        answer = finish(page, 2)
        expect(answer.locator(".text")).to_have_text("Green.")
        expect(answer.locator(".usage")).to_contain_text(
            re.compile(r"\d+ of \d+ prompt tokens cached")
        )
        prompt = server.engine.prompt_text()
        assert prompt.index("A color?") < prompt.index("Blue.") < prompt.index("Another?")


def test_the_model_can_be_chosen(browser: Browser) -> None:
    with ChatServer(names=("fake-1b", "fake-7b")) as server, open_page(browser, server) as page:
        page.get_by_label("Model").select_option("fake-7b")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_label("Message", exact=True).focus()
            ask(page, "Hi")
        assert asked.value.post_data_json["model"] == "fake-7b"
        expect(finish(page)).to_have_attribute("aria-label", "fake-7b")
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("fake-7b")


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stopping_ends_the_answer_on_the_server(browser: Browser, way: str) -> None:
    with ChatServer([LONG, "Again."]) as server, open_page(browser, server) as page:
        server.engine.hold(9)
        ask(page, "Count")
        expect(answers(page).locator(".text")).to_contain_text("One")
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        assert server.engine.cancelled.wait(WAIT_S)
        answer = finish(page)
        expect(answer.locator(".text")).to_contain_text("One")
        expect(answer.locator(".note")).to_have_text("Stopped.")
        expect(page.get_by_role("alert")).to_have_text("")
        server.engine.release()
        ask(page, "And on")
        expect(finish(page, 2).locator(".text")).to_have_text("Again.")


def test_what_is_stopped_before_it_begins_leaves_the_question(browser: Browser) -> None:
    with ChatServer([LONG, "Now."]) as server, open_page(browser, server) as page:
        server.engine.hold(1)
        ask(page, "Count")
        assert server.engine.submitted.wait(WAIT_S)
        page.keyboard.press("Escape")
        assert server.engine.cancelled.wait(WAIT_S)
        expect(answers(page)).to_have_count(0)
        server.engine.release()
        ask(page, "Well?")
        finish(page)
        # Two questions in a row are one, which every template knows.
        assert "Count\n\nWell?" in server.engine.prompt_text()


def test_closing_the_page_ends_the_answer_on_the_server(browser: Browser) -> None:
    with ChatServer([LONG]) as server, open_page(browser, server) as page:
        server.engine.hold(5)
        ask(page, "Count")
        expect(answers(page).locator(".text")).to_contain_text("O")
        page.close()
        assert server.engine.cancelled.wait(WAIT_S)


def test_an_answer_that_was_cut_off_says_so(browser: Browser) -> None:
    with ChatServer([LONG]) as server, open_page(browser, server) as page:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Most tokens in an answer").fill("7")
        page.keyboard.press("Escape")
        page.get_by_label("Message", exact=True).focus()
        ask(page, "Count")
        answer = finish(page)
        expect(answer.locator(".text")).to_have_text("One two")
        expect(answer.locator(".note")).to_contain_text("Cut off")


# ---- thinking


def test_thinking_is_folded_and_opens_by_keyboard(browser: Browser) -> None:
    script = ["<think>\nHm, let me see.\n</think>\n\nIt is 4."]
    with ChatServer(script, can_think=True) as server, open_page(browser, server) as page:
        ask(page, "2 + 2?")
        answer = finish(page)
        expect(answer.locator(".text")).to_have_text("It is 4.")
        expect(answer.get_by_text("Hm, let me see.")).to_be_hidden()
        summary = answer.locator("summary")
        expect(summary).to_have_text(re.compile(r"^Thought"))
        summary.focus()
        page.keyboard.press("Enter")
        expect(answer.get_by_text("Hm, let me see.")).to_be_visible()


def test_thinking_can_be_turned_off_where_there_is_any(browser: Browser) -> None:
    with ChatServer(can_think=True) as server, open_page(browser, server) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Thinking").select_option("off")
        page.get_by_role("button", name="Done").click()
        page.get_by_label("Message", exact=True).focus()
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "Hi")
        assert asked.value.post_data_json["chat_template_kwargs"] == {"enable_thinking": False}
        finish(page)
    with ChatServer() as server, open_page(browser, server) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Thinking")).to_be_hidden()


# ---- settings and what is kept


def test_settings_reach_the_model_and_stay(browser: Browser) -> None:
    with ChatServer() as server, open_page(browser, server) as page:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("You are terse.")
        page.get_by_label("Temperature").fill("0.25")
        page.get_by_label("Most tokens in an answer").fill("100")
        page.get_by_role("button", name="Done").click()
        page.reload()
        ask(page, "Hi")
        finish(page)
        request = server.engine.requests[-1]
        assert "You are terse." in server.engine.prompt_text()
        assert request.sampling.temperature == 0.25
        assert request.max_tokens == 100


def test_settings_without_sense_are_not_taken(browser: Browser) -> None:
    with ChatServer() as server, open_page(browser, server) as page:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("9")
        expect(page.get_by_text("A number from 0 to 5")).to_be_visible()
        expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
        page.get_by_label("Most tokens in an answer").fill("0")
        page.keyboard.press("Escape")
        page.get_by_label("Message", exact=True).focus()
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "Hi")
        assert not {"temperature", "max_tokens"} & set(asked.value.post_data_json)
        finish(page)


def test_a_reload_keeps_the_conversation(browser: Browser) -> None:
    with ChatServer(["**Blue.**", "Green."]) as server, open_page(browser, server) as page:
        ask(page, "A color?")
        finish(page)
        page.reload()
        expect(questions(page).locator(".text")).to_have_text("A color?")
        expect(answers(page).locator(".text strong")).to_have_text("Blue.")
        expect(answers(page).locator(".usage")).to_contain_text("50.0 tok/s")
        ask(page, "Another?")
        finish(page, 2)
        assert "Blue." in server.engine.prompt_text()


def test_a_reload_in_mid_answer_keeps_what_there_was(browser: Browser) -> None:
    with ChatServer([LONG]) as server, open_page(browser, server) as page:
        server.engine.hold(9)
        ask(page, "Count")
        expect(answers(page).locator(".text")).to_contain_text("One")
        page.reload()
        assert server.engine.cancelled.wait(WAIT_S)
        expect(answers(page).locator(".text")).to_contain_text("One")
        expect(answers(page).locator(".note")).to_have_text("Stopped.")


def test_leaving_the_page_keeps_what_came_last(browser: Browser) -> None:
    with ChatServer([LONG]) as server, open_page(browser, server) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        # Where no time passes, nothing is kept in passing.
        page.clock.set_fixed_time("2030-01-01T00:00:00Z")
        server.engine.hold(9)
        ask(page, "Count")
        expect(answers(page).locator(".text")).to_contain_text("One")
        kept = "JSON.parse(localStorage.getItem('llmrun.chat')).messages.map(({text}) => text)"
        assert page.evaluate(kept) == ["Count", ""]
        other = page.context.new_page()
        other.goto(f"{server.url}/docs")
        page.close(run_before_unload=True)
        assert server.engine.cancelled.wait(WAIT_S)
        other.wait_for_function(f"{kept}[1].startsWith('One')")
        assert other.evaluate(kept)[0] == "Count"


@pytest.mark.parametrize("held", ["{", "null", "[1]", '{"messages": [null, {"role": "x"}, 3]}'])
def test_what_was_kept_may_be_anything(browser: Browser, held: str) -> None:
    with ChatServer() as server, open_page(browser, server) as page:
        page.evaluate("(text) => localStorage.setItem('llmrun.chat', text)", held)
        page.reload()
        ask(page, "Hi")
        expect(finish(page).locator(".text")).to_have_text("Hello!")


def test_without_storage_it_works_and_says_so(browser: Browser) -> None:
    deny = """for (const name of ["localStorage", "sessionStorage"]) {
      Object.defineProperty(window, name, { get() { throw new DOMException("denied"); } });
    }"""
    with ChatServer() as server, open_page(browser, server) as page:
        page.add_init_script(deny)
        page.reload()
        ask(page, "Hi")
        expect(finish(page).locator(".text")).to_have_text("Hello!")
        expect(page.get_by_role("status")).to_have_text(
            "The browser does not keep this conversation."
        )


def test_a_new_chat_can_be_taken_back(browser: Browser) -> None:
    with ChatServer(["Blue.", "Hi."]) as server, open_page(browser, server) as page:
        ask(page, "A color?")
        finish(page)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("article")).to_have_count(0)
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        page.reload()
        page.get_by_role("button", name="Bring back the last conversation").click()
        expect(answers(page).locator(".text")).to_have_text("Blue.")
        page.get_by_role("button", name="New chat").click()
        ask(page, "Hello")
        finish(page)
        assert "A color?" not in server.engine.prompt_text()


def test_retry_asks_again(browser: Browser) -> None:
    with ChatServer(["Blue.", "Green."]) as server, open_page(browser, server) as page:
        ask(page, "A color?")
        finish(page)
        page.get_by_role("button", name="Retry").click()
        expect(answers(page).locator(".text")).to_have_text("Green.")
        expect(questions(page)).to_have_count(1)
        assert "Blue." not in server.engine.prompt_text()


def test_the_last_question_can_be_edited(browser: Browser) -> None:
    with ChatServer(["Blue.", "Seven."]) as server, open_page(browser, server) as page:
        ask(page, "A color?")
        finish(page)
        page.keyboard.type("a draft")
        page.get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Message", exact=True)).to_have_value("A color?")
        page.keyboard.press("Escape")
        expect(page.get_by_label("Message", exact=True)).to_have_value("a draft")
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Message", exact=True).fill("A number?")
        page.keyboard.press("Enter")
        expect(answers(page).locator(".text")).to_have_text("Seven.")
        expect(questions(page).locator(".text")).to_have_text(["A number?"])
        assert "color" not in server.engine.prompt_text()


def test_answers_and_code_can_be_copied(browser: Browser) -> None:
    text = "Do this:\n\n```sh\nls -l\ncd ..\n```"
    allowed = {"permissions": ["clipboard-read", "clipboard-write"]}
    with ChatServer([text]) as server, open_page(browser, server, **allowed) as page:
        ask(page, "How?")
        answer = finish(page)
        answer.get_by_role("button", name="Copy code").click()
        expect(answer.get_by_role("button", name="Copy code")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "ls -l\ncd .."
        answer.get_by_role("button", name="Copy message").click()
        expect(answer.get_by_role("button", name="Copy message")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text


# ---- the key


def test_the_key_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    with (
        ChatServer(api_keys=(KEY,)) as server,
        open_page(browser, server, fails=True) as page,
    ):
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.type("wrong key")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("no spaces")
        dialog.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_have_text("The server did not take that key.")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.get_by_label("Model")).to_be_enabled()
        page.get_by_label("Message", exact=True).focus()
        ask(page, "Hi")
        expect(finish(page).locator(".text")).to_have_text("Hello!")
        assert page.evaluate("sessionStorage.getItem('llmrun.key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert KEY not in page.content()
        page.reload()
        ask(page, "Hi")
        finish(page, 2)
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget the API key").click()
        page.keyboard.press("Escape")
        assert page.evaluate("sessionStorage.getItem('llmrun.key')") == ""


def test_a_key_that_was_refused_later_is_asked_for_and_the_question_goes_on(
    browser: Browser,
) -> None:
    with (
        ChatServer(api_keys=(KEY,)) as server,
        open_page(browser, server, fails=True) as page,
    ):
        dialog = page.get_by_role("dialog", name="API key")
        page.get_by_role("button", name="Cancel").click()
        expect(dialog).to_be_hidden()
        expect(page.get_by_role("status")).to_have_text("The server asks for an API key.")
        page.get_by_label("Message", exact=True).fill("Hi")
        page.keyboard.press("Enter")
        dialog.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(finish(page).locator(".text")).to_have_text("Hello!")
        expect(page.get_by_label("Model")).to_have_value("fake-1b")
