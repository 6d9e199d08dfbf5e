"""The pages for people as HTTP sees them; a browser looks at them in `test_web_chat`."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from llmrun.server.page import GREETING, POLICY, greetings, pages

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
PATHS = sorted(pages())
FILES = sorted(
    entry.name
    for entry in files("llmrun.server.page").iterdir()
    if entry.is_file() and not entry.name.endswith((".py", ".pyc"))
)


@pytest.fixture
def client() -> TestClient:
    routes = [Route(path, handler, methods=["GET"]) for path, handler in pages().items()]
    return TestClient(Starlette(routes=routes), headers=HTML)


def text_of(name: str) -> str:
    return files("llmrun.server.page").joinpath(name).read_text(encoding="utf-8")


def test_every_file_is_served_and_nothing_else() -> None:
    assets = {name for name in FILES if not name.endswith(".html")}
    assert set(PATHS) == {"/", "/docs"} | {f"/ui/{name}" for name in assets}


@pytest.mark.parametrize("path", PATHS)
def test_type_policy_and_caching(client: TestClient, path: str) -> None:
    answer = client.get(path)
    suffix = path.rpartition(".")[2]
    expected = {
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }.get(suffix, "text/html; charset=utf-8")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == expected
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert re.fullmatch(r'"[0-9a-f]{32}"', answer.headers["etag"])
    assert answer.content


@pytest.mark.parametrize(
    "directive",
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ],
)
def test_the_policy_is_strict(directive: str) -> None:
    assert directive in POLICY.split("; ")
    assert "unsafe" not in POLICY and "*" not in POLICY


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
def test_what_the_browser_has_is_not_sent_again(client: TestClient, path: str, form: str) -> None:
    tag = client.get(path).headers["etag"]
    answer = client.get(path, headers={"If-None-Match": form.format(tag)})
    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == tag
    assert "content-type" not in answer.headers


def test_another_tag_gets_the_file(client: TestClient) -> None:
    answer = client.get("/ui/style.css", headers={"If-None-Match": '"0123"'})
    assert answer.status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_head_has_the_headers_and_no_body(client: TestClient, path: str) -> None:
    answer, whole = client.head(path), client.get(path)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers == whole.headers


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "text/plain, */*"])
def test_what_is_no_browser_gets_a_line(client: TestClient, accept: str) -> None:
    answer = client.get("/", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.content == GREETING == b"llmrun is running\n"
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["vary"] == "Accept"
    assert client.head("/", headers={"Accept": accept}).status_code == 200


def test_without_pages_the_line_stays() -> None:
    routes = [Route(path, handler) for path, handler in greetings().items()]
    client = TestClient(Starlette(routes=routes), headers=HTML)
    assert client.get("/").content == GREETING
    assert client.head("/").status_code == 200
    assert client.get("/docs").status_code == 404


def test_a_browser_gets_the_page(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.text.startswith("<!doctype html>")
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_server(name: str) -> None:
    text = text_of(name).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://[\w.]", text)
    assert not re.search(r"""(?:src|href|from|import|url)\s*[=(]?\s*["']?//""", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".html")])
def test_no_script_or_style_stands_in_a_page(name: str) -> None:
    text = text_of(name)
    assert re.findall(r"<script\b[^>]*>(.*?)</script>", text, re.DOTALL) == [""]
    assert "<style" not in text
    assert not re.search(r"""\s(?:on\w+|style)\s*=""", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_no_script_makes_html_or_code_of_text(name: str) -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\b"
        r"|new Function|createContextualFragment|setHTML|\.style\s*=|javascript:"
    )
    assert not re.search(forbidden, text_of(name))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".html"))])
def test_what_a_file_loads_is_served(client: TestClient, name: str) -> None:
    text = text_of(name)
    paths = [f"/ui/{found}" for found in re.findall(r'from "\./([^"]+)"', text)]
    paths += re.findall(r'(?:src|href)="(/[^"]*)"', text)
    known = {"/openapi.json"}
    for path in set(paths) - known:
        assert client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "path", ["/ui/", "/ui", "/ui/__init__.py", "/ui/../__init__.py", "/ui/%2e%2e/app.py", "/ui/x"]
)
def test_nothing_else_below_ui(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", PATHS)
def test_the_application_answers_get_and_head(path: str) -> None:
    from llmrun.server.app import build_app

    class NoService:
        version = "1.2.3"

    app = TestClient(build_app(NoService(), ui=pages()), headers=HTML)  # type: ignore[arg-type]
    assert app.get(path).status_code == 200
    assert app.head(path).status_code == 200
    assert path not in app.get("/openapi.json").json()["paths"]
