"""How the pages look and read in a real browser: Markdown, themes, widths, assistive technology,
and the description of the API."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.fakes.browser import open_browser, open_page
from tests.fakes.chat_server import ChatServer

HOSTILE = """<script>window.pwned = 1</script>

<img src=x onerror="window.pwned = 2"> <svg onload=alert(1)>

[a](javascript:window.pwned=3) [b](data:text/html,<script>1</script>) [c](//evil.example)
[d](java\tscript:alert(1)) ![e](https://evil.example/x.png) <https://safe.example/?a=1&b="x">

| <b>x</b> | y |
|---|---|
| <img src=x onerror=alert(1)> | `<i>` |

```"><script>alert(1)</script>
</code></pre><script>window.pwned = 4</script>
```

- <iframe src="https://evil.example"></iframe>
"""

RENDER = """async (text) => {
  const { updateMarkdown } = await import("/ui/markdown.js");
  const place = document.createElement("div");
  updateMarkdown(place, text);
  return place.innerHTML;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """For what needs the scripts only."""
    with ChatServer() as server, open_page(browser, server) as page:
        yield page


def answer(page: Page, question: str = "Hi") -> None:
    expect(page.get_by_label("Model")).to_be_enabled()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()


# ---- Markdown


def link(address: str, text: str) -> str:
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{text}</a>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ntwo lines", "<p>plain\ntwo lines</p>"),
        ("a *b* _c_ **d** __e__ ~~f~~", "<p>a <em>b</em> <em>c</em> <strong>d</strong> "
         "<strong>e</strong> <del>f</del></p>"),
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        ("*a **b*", "<p><em>a **b</em></p>"),
        ("`a*b*` ``x`y`` `open", "<p><code>a*b*</code> <code>x`y</code> `open</p>"),
        (r"\*a\* \\ \x", r"<p>*a* \ \x</p>"),
        ("# One\n## Two #\n####### no", "<h3>One</h3><h4>Two</h4><p>####### no</p>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"
         "<p>c</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li>"
         "<li><p>d</p></li></ul>"),
        ("3. a\n\n   b\n\n4. c", '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>'),
        ("1. a\n   ```\n   x\n     y\n   ```\n2. b", None),
        ("It was\n2024. And on", "<p>It was\n2024. And on</p>"),
        ("a\n- b", "<p>a</p><ul><li><p>b</p></li></ul>"),
        ("| a | b |\n|---|--:|\n| 1 | 2\\|3 |\n| 4 |", '<div class="table"><table><thead><tr>'
         '<th>a</th><th class="right">b</th></tr></thead><tbody><tr><td>1</td><td class="right">'
         '2|3</td></tr><tr><td>4</td><td class="right"></td></tr></tbody></table></div>'),
        ("[x](https://a.example/b_(c))", f"<p>{link('https://a.example/b_(c)', 'x')}</p>"),
        ("see https://a.example/x?y=1, and", "<p>see "
         f"{link('https://a.example/x?y=1', 'https://a.example/x?y=1')}, and</p>"),
        ("[**b** [i](http://x.example)](http://y.example)",
         f"<p>{link('http://y.example/', '<strong>b</strong> i')}</p>"),
        ("[no](/ui/chat.js) [x] [y](ftp://a.example)",
         "<p>[no](/ui/chat.js) [x] [y](ftp://a.example)</p>"),
        ("é **ü**😀 _日本_", "<p>é <strong>ü</strong>😀 <em>日本</em></p>"),
        ("", ""),
        (" \n\n ", ""),
    ],
)  # fmt: skip
def test_markdown(page: Page, text: str, expected: str | None) -> None:
    html = page.evaluate(RENDER, text)
    if expected is None:
        assert html.count("<li>") == 2 and "<code>x\n  y</code>" in html
    else:
        assert html == expected


def test_code_blocks(page: Page) -> None:
    html = page.evaluate(
        RENDER, "```python\nif a < b:\n\n\tc\n```\nafter\n~~~\n```\n~~~\n```\nopen"
    )
    assert "<span>python</span>" in html
    assert "<code>if a &lt; b:\n\n\tc</code>" in html
    assert "<p>after</p>" in html
    assert "<code>```</code>" in html
    assert html.count("<pre>") == 3 and "<code>open</code>" in html


def test_hostile_text_stays_text(browser: Browser) -> None:
    with ChatServer([HOSTILE]) as server, open_page(browser, server) as page:
        answer(page, HOSTILE)
        for message in ("article.user", "article.assistant"):
            elements = page.locator(message).locator("script, img, svg, iframe, b, i")
            expect(elements).to_have_count(0)
        text = page.locator("article.assistant .text")
        expect(text).to_contain_text("<script>window.pwned = 1</script>")
        expect(text).to_contain_text('<img src=x onerror="window.pwned = 2">')
        expect(text).to_contain_text("[a](javascript:window.pwned=3)")
        addresses = text.locator("a").evaluate_all("links => links.map((link) => link.href)")
        assert addresses == [
            "https://evil.example/x.png",
            "https://safe.example/?a=1&b=",
            "https://evil.example/",
        ]
        for each in text.locator("a").all():
            assert each.get_attribute("rel") == "noopener noreferrer"
        page.reload()
        expect(page.locator("article.assistant .text")).to_contain_text("window.pwned = 4")
        assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize(
    "attempt",
    [
        "document.body.innerHTML = '<p>x</p>'",
        "document.body.setAttribute('style', 'color: red')",
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))",
        "fetch('http://127.0.0.1:9/')",
    ],
)
def test_the_browser_would_refuse_what_the_page_must_not_do(browser: Browser, attempt: str) -> None:
    with ChatServer() as server:
        page = browser.new_page()
        page.goto(server.url)
        refused = page.evaluate(
            f"""() => new Promise((resolve) => {{
              addEventListener("securitypolicyviolation", () => resolve(true));
              setTimeout(() => resolve(false), 10_000);
              try {{ Promise.resolve({attempt}).catch(() => {{}}); }} catch {{}}
            }})"""
        )
        page.close()
        assert refused is True


def test_growing_text_shows_what_it_would_at_once(page: Page) -> None:
    different = page.evaluate(
        """async (text) => {
          const { updateMarkdown } = await import("/ui/markdown.js");
          const growing = document.createElement("div");
          const different = [];
          for (let n = 0; n <= text.length; n++) {
            const fresh = document.createElement("div");
            updateMarkdown(growing, text.slice(0, n));
            updateMarkdown(fresh, text.slice(0, n));
            if (growing.innerHTML !== fresh.innerHTML) different.push(n);
          }
          const first = growing.firstChild;
          updateMarkdown(growing, text + " more");
          return [different, first === growing.firstChild];
        }""",
        f"# Head\n\nOne **two** three.\n\n- a\n- b\n\n{HOSTILE}",
    )
    assert different == [[], True]


@pytest.mark.parametrize(
    "piece",
    ["*", "**a ", "_a", "[", "[a](", "![", "](", "`", "`a``", "> ", "- ", "  - a\n", "#", "|",
     "|-", "| a |\n|---|\n", "\n", "~", "~~~`\n", "http", "http://%", "- \n\n", "\\", "1. a\n\n\n",
     "* ", "_ "],
)  # fmt: skip
def test_text_of_one_piece_is_rendered_in_time(page: Page, piece: str) -> None:
    """A pattern that tries again from everywhere would take minutes for each of these."""
    n_chars = 60_000
    text = (piece * n_chars)[:n_chars] + "x`"
    assert isinstance(page.evaluate(RENDER, text), str)


def test_events_are_the_same_however_they_are_cut(page: Page) -> None:
    found = page.evaluate(
        """async (text) => {
          const { EventParser } = await import("/ui/sse.js");
          const all = new Set();
          for (let n = 0; n <= text.length; n++) {
            for (let m = n; m <= text.length; m++) {
              const parser = new EventParser();
              const pieces = [text.slice(0, n), text.slice(n, m), text.slice(m)];
              all.add(JSON.stringify(pieces.flatMap((piece) => parser.feed(piece))));
            }
          }
          return [...all];
        }""",
        ": hello\r\n\r\ndata: a\r\ndata:  b\n\nevent: x\rdata:c\r\rid\n\ndata\n\n"
        "data: [DONE]\r\n\r\n",
    )
    assert found == ['["a\\n b","c","[DONE]"]']


# ---- looks

CONTRASTS = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backOf = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || !element.checkVisibility() || element.disabled) continue;
    const [a, b] = [getComputedStyle(element).color, backOf(element)].map(luminance).sort();
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 20)}`;
    if (ratio < 4.5) found[name] = ratio;
  }
  return [luminance(backOf(document.body)), found];
}"""

SAMPLE = """Hello **there** `code` [link](https://a.example)

> quote

```py
x
```

| a |
|--|
| b |
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_both_themes_have_contrast(browser: Browser, scheme: str, path: str) -> None:
    with (
        ChatServer([SAMPLE]) as server,
        open_page(browser, server, path, color_scheme=scheme, reduced_motion="reduce") as page,
    ):
        if path == "/":
            answer(page)
            page.get_by_role("button", name="Settings").click()
        else:
            page.locator("details").first.locator("summary").click()
        brightness, too_faint = page.evaluate(CONTRASTS)
        assert too_faint == {}
        assert brightness > 0.8 if scheme == "light" else brightness < 0.05


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_scrolls_sideways(browser: Browser, width: int) -> None:
    wide = f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n|{'a' * 90}|b|\n|--|--|\n|c|{'d' * 90}|"
    name = "a-model-with-a-rather-long-name-of-many-parts-q4_k_m"
    viewport = {"width": width, "height": 640}
    with (
        ChatServer([wide], names=(name,)) as server,
        open_page(browser, server, viewport=viewport) as page,
    ):
        for path in ("/", "/docs"):
            page.goto(server.url + path)
            if path == "/":
                answer(page, "z" * 300)
            else:
                page.locator("details").first.locator("summary").click()
            for place in ("document.documentElement", "document.querySelector('#scroller')"):
                over = f"{place} === null ? 0 : {place}.scrollWidth - {place}.clientWidth"
                assert page.evaluate(over) == 0, (path, place)
        page.goto(server.url)
        for label in ("New chat", "Settings", "Send"):
            box = page.get_by_role("button", name=label).bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
            assert box["height"] >= 32


def test_the_end_of_a_long_answer_is_followed(browser: Browser) -> None:
    text = "".join(f"Line {n}.\n\n" for n in range(80))
    with ChatServer([text]) as server, open_page(browser, server) as page:
        answer(page)
        expect(page.get_by_text("Line 79.")).to_be_in_viewport()
        expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()
        expect(page.get_by_role("button", name="Settings")).to_be_in_viewport()


# ---- assistive technology and the keyboard

UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, textarea, summary")]
  .filter((element) => element.checkVisibility())
  .filter((element) => !(element.textContent.trim() || element.getAttribute("aria-label")
    || element.labels?.length) || (element.matches("input, select, textarea")
    && !element.labels?.length && !element.getAttribute("aria-label")))
  .map((element) => element.outerHTML)"""


def test_everything_has_a_role_and_a_name(browser: Browser) -> None:
    with ChatServer([SAMPLE]) as server, open_page(browser, server) as page:
        answer(page)
        assert page.evaluate("document.documentElement.lang") == "en"
        expect(page.get_by_role("heading", level=1)).to_have_text("llmrun")
        for role in ("banner", "main", "contentinfo"):
            expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
        log = page.get_by_role("log", name="Messages")
        expect(log).to_have_attribute("aria-live", "polite")
        expect(log.get_by_role("article", name="You")).to_have_count(1)
        expect(log.get_by_role("article", name="fake-1b")).to_have_count(1)
        expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_visible()
        expect(page.get_by_role("combobox", name="Model")).to_be_visible()
        assert page.evaluate(UNNAMED) == []
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
        for label in ("System prompt", "Temperature", "Most tokens in an answer"):
            expect(page.get_by_label(label)).to_be_visible()
        assert page.evaluate(UNNAMED) == []


def focused(page: Page) -> str:
    return page.evaluate(
        "() => { const at = document.activeElement;"
        " return at.id || at.getAttribute('aria-label') || at.textContent; }"
    )


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(browser: Browser) -> None:
    with ChatServer([SAMPLE]) as server, open_page(browser, server) as page:
        answer(page)
        page.get_by_label("Model").focus()
        order = [focused(page)]
        while order[-1] != "send" and len(order) < 20:
            page.keyboard.press("Tab")
            order.append(focused(page))
            outline = page.evaluate(
                "() => { const style = getComputedStyle(document.activeElement);"
                " return `${style.outlineStyle} ${style.outlineWidth}`; }"
            )
            if order[-1] != "text":  # whose frame shows it
                assert outline == "solid 2px", order[-1]
        assert order == [
            "model", "new", "open-settings", "scroller", "Copy message", "Edit", "link",
            "Copy code", "Copy message", "Retry", "text", "send",
        ]  # fmt: skip


def test_a_dialog_is_left_by_escape_and_gives_the_focus_back(browser: Browser) -> None:
    with ChatServer() as server, open_page(browser, server) as page:
        expect(page.get_by_label("Model")).to_be_enabled()
        button = page.get_by_role("button", name="Settings")
        button.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="Settings")
        expect(page.get_by_label("System prompt")).to_be_focused()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(button).to_be_focused()


# ---- the description of the API


def test_the_api_is_described_by_tag(browser: Browser) -> None:
    with ChatServer() as server, open_page(browser, server, "/docs") as page:
        expect(page.locator("section h2")).to_have_text(["OpenAI", "Anthropic", "Ollama", "llmrun"])
        paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
        assert set(page.locator(".path").all_inner_texts()) == set(paths)
        chat = page.locator("details", has_text="/v1/chat/completions")
        expect(chat.get_by_text("A name of GET /v1/models.")).to_be_hidden()
        chat.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(chat.get_by_text("A name of GET /v1/models.")).to_be_visible()
        expect(chat.locator("dt", has_text="messages")).to_contain_text("required")


def test_the_commands_of_the_description_work(browser: Browser) -> None:
    with ChatServer() as server:
        with open_page(browser, server, "/docs") as page:
            expect(page.locator("section")).to_have_count(4)
            commands = page.locator("pre").all_text_contents()
        answered = {}
        for command in commands:
            words = shlex.split(command.replace("\\\n", ""))
            assert words[0] == "curl" and words[1].startswith(server.url)
            path = words[1].removeprefix(server.url)
            if len(words) == 2:
                answered[path] = httpx.get(words[1]).status_code
            else:
                assert words[2::2] == ["-H", "-d"]
                name, value = words[3].split(": ")
                body = words[5].encode()
                answered[path] = httpx.post(
                    words[1], headers={name: value}, content=body
                ).status_code
        # What is no chat is refused by this server's model, but not for its form.
        others = {"/v1/embeddings", "/api/embed", "/api/embeddings", "/rerank", "/v1/rerank"}
        assert {path for path, status in answered.items() if status != 200} <= others
        assert len(answered) > 15
