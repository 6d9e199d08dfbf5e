"""The decisions about who may ask the server: bind rules, keys, Host, Origin, sizes, types."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.errors import UsageError
from llmrun.server import guard
from llmrun.server.guard import GuardOptions
from llmrun.server.types import ApiError

LOCAL = GuardOptions()
NETWORK = GuardOptions(bound="0.0.0.0", api_keys=("k" * 20,), hosts=("box.lan", "*.example.com"))


def head(**headers: str | list[str]) -> list[tuple[bytes, bytes]]:
    return [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, values in headers.items()
        for value in ([values] if isinstance(values, str) else values)
    ]


def status_of(call, *args) -> int:
    """200, or the status of what `call` raises."""
    try:
        call(*args)
    except ApiError as error:
        return error.status
    return 200


# ---- where to listen


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.9.9.9",
        "localhost",
        "LOCALHOST",
        "a.localhost",
        "::1",
        "[::1]",
        "::ffff:127.0.0.1",
    ],
)
def test_loopback_is_free(host: str) -> None:
    guard.check_bind(host, has_key=False, insecure=False)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "",
        "192.168.1.5",
        "fe80::1",
        "box.lan",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "::ffff:10.0.0.1",
        "127.1",
    ],
)
def test_any_other_address_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError) as caught:
        guard.check_bind(host, has_key=False, insecure=False)
    assert "--api-key" in (caught.value.hint or "")
    assert "--insecure" in (caught.value.hint or "")
    guard.check_bind(host, has_key=True, insecure=False)
    guard.check_bind(host, has_key=False, insecure=True)


# ---- keys


def test_key_by_either_header() -> None:
    options = GuardOptions(api_keys=("first-key", "zweiter-schlüssel"))
    good = [
        head(authorization="Bearer first-key"),
        head(authorization="bearer   first-key "),
        head(x_api_key="first-key"),
        head(x_api_key="wrong", authorization="Bearer first-key"),
        [(b"authorization", "Bearer zweiter-schlüssel".encode())],
    ]
    for headers in good:
        guard.check_key(headers, options)
    bad = [
        head(),
        head(authorization="first-key"),
        head(authorization="Basic first-key"),
        head(authorization="Bearer"),
        head(authorization="Bearer "),
        head(x_api_key=""),
        head(x_api_key="first-ke"),
        head(x_api_key="first-key-"),
        head(x_api_key="FIRST-KEY"),
        [(b"x-api-key", b"\xff\xfe\x00")],
    ]
    for headers in bad:
        assert status_of(guard.check_key, headers, options) == 401, headers
    guard.check_key([], GuardOptions())


def test_each_key_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return a == b

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    options = GuardOptions(api_keys=("one", "two", "three"))
    guard.check_key(head(x_api_key="one"), options)
    assert len(seen) == 3
    # Of digests, so that not even a key's length takes its time.
    assert {len(side) for pair in seen for side in pair} == {32}


def test_keys_are_not_in_the_options_text() -> None:
    assert "sekret" not in repr(GuardOptions(api_keys=("sekret",)))


@given(st.binary(max_size=40))
def test_no_bytes_pass_for_a_key(value: bytes) -> None:
    options = GuardOptions(api_keys=("sufficiently-long-and-unlikely-key-of-a-server",))
    for name in (b"x-api-key", b"authorization"):
        assert status_of(guard.check_key, [(name, value)], options) == 401


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the house\nalpha\n\n  beta  \nalpha\n")
    path.chmod(0o600)
    assert guard.read_key_file(path) == (("alpha", "beta"), None)
    if os.name == "posix":
        path.chmod(0o644)
        keys, warning = guard.read_key_file(path)
        assert keys == ("alpha", "beta")
        assert warning is not None and "chmod 600" in warning
        path.chmod(0o666)
        with pytest.raises(UsageError, match="write"):
            guard.read_key_file(path)


@pytest.mark.parametrize("content", [b"", b"# none\n", b"two words\n", b"\xff\xfe", b"a\x00b\n"])
def test_bad_key_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError) as caught:
        guard.read_key_file(path)
    assert "two words" not in str(caught.value.why)
    with pytest.raises(UsageError, match="cannot be read"):
        guard.read_key_file(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read"):
        guard.read_key_file(tmp_path)


# ---- open paths


def test_open_paths_are_open_for_reading_only() -> None:
    options = GuardOptions(open_paths=("/", "/health", "/page/*"))
    for path in ("/", "/health", "/page/chat.js"):
        assert options.is_open("GET", path) and options.is_open("HEAD", path)
        assert not options.is_open("POST", path)
    for path in ("//", "/health/", "/Health", "/v1/models", "/page", "/healthx", ""):
        assert not options.is_open("GET", path)


# ---- Host


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8080",
        "localhost:8080",
        "localhost",
        "LocalHost:1",
        "x.localhost",
        "[::1]:8080",
        "localhost.",
        "127.0.0.1",
        "host.docker.internal:8080",
    ],
)
def test_own_names(host: str) -> None:
    assert guard.check_host(head(host=host), LOCAL) == host.lower()
    guard.check_host(head(host=host), NETWORK)


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:8080",
        "localhost.evil.com",
        "127.0.0.1.nip.io",
        "evil.internal",
        "192.168.1.5:8080",
        "box.lan",
        "127.1",
        "2130706433",
        "xlocalhost",
    ],
)
def test_foreign_names_on_loopback(host: str) -> None:
    assert status_of(guard.check_host, head(host=host), LOCAL) == 403


def test_names_on_a_network() -> None:
    for host in ("192.168.1.5:8080", "[fe80::1]:80", "box.lan", "a.example.com:443", "localhost"):
        guard.check_host(head(host=host), NETWORK)
    for host in ("evil.com", "example.com", "evilexample.com", "box.lan.evil.com", "x.box.lan"):
        assert status_of(guard.check_host, head(host=host), NETWORK) == 403, host
    guard.check_host(head(host="[FE80::1]:80"), GuardOptions(bound="fe80::1"))


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        ["localhost", "localhost"],
        ["localhost", "evil.com"],
        [""],
        ["a b"],
        ["user@localhost"],
        ["localhost:"],
        ["localhost:x"],
        ["localhost:99999"],
        ["localhost/"],
        ["[::1"],
        ["::1"],
        ["localhost, evil.com"],
        ["löcalhost"],
        ["localhost\\evil.com"],
        ["localhost#.evil.com"],
    ],
)
def test_broken_hosts(hosts: list[str]) -> None:
    assert status_of(guard.check_host, head(host=hosts), LOCAL) == 400


@given(st.text(max_size=30))
def test_no_text_is_a_host_by_accident(text: str) -> None:
    raw = text.encode()
    try:
        host = guard.check_host([(b"host", raw)], LOCAL)
    except ApiError as error:
        assert error.status in (400, 403)
    else:
        assert guard.is_loopback(host.partition(":")[0] if "[" not in host else host[1:-1])


def test_host_names_to_allow() -> None:
    assert guard.parse_host_name("Box.LAN:8080") == "box.lan"
    assert guard.parse_host_name("*.Example.com") == "*.example.com"
    assert guard.parse_host_name("[fd00::1]") == guard.parse_host_name("fd00::1") == "fd00::1"
    for text in ("*", "*.com*", "", "a b", "http://box.lan", "*.com", "a.*.b"):
        with pytest.raises(UsageError):
            guard.parse_host_name(text)
    assert guard.known_hosts("127.0.0.1", "box") == ()
    assert guard.known_hosts("0.0.0.0", "Box") == ("box", "box.local")
    assert guard.known_hosts("0.0.0.0", "box.lan") == ("box.lan",)


# ---- Origin


def origin_status(method: str, options: GuardOptions = LOCAL, **headers: str | list[str]) -> int:
    return status_of(guard.check_origin, method, head(**headers), "localhost:8080", options)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_only_own_pages(method: str) -> None:
    for own in ("http://localhost:8080", "https://localhost:8080", "HTTP://LOCALHOST:8080"):
        assert origin_status(method, origin=own) == 200
    foreign = ["http://evil.com", "http://localhost:8081", "http://127.0.0.1:8080", "null", ""]
    foreign += ["http://localhost:8080.evil.com", "http://localhost", "file://", "app://x", "*"]
    foreign += ["http://localhost:8080@evil.com", "http://evil.com#http://localhost:8080"]
    for origin in foreign:
        assert origin_status(method, origin=origin) == 403, origin
    both = ["http://localhost:8080", "http://evil.com"]
    assert origin_status(method, origin=both) == 400


def test_default_ports_are_no_difference() -> None:
    for host in ("localhost", "localhost:80"):
        for origin in ("http://localhost", "http://localhost:80"):
            assert guard.check_origin("GET", head(origin=origin), host, LOCAL) is None


def test_named_origins() -> None:
    options = GuardOptions(origins=("http://app.test:5173", "app://*", "null"))
    for origin in ("http://app.test:5173", "app://obsidian.md", "null"):
        assert guard.check_origin("POST", head(origin=origin), "localhost", options) == origin
    for origin in ("https://app.test:5173", "http://app.test", "app://", "apps://x", "http://x"):
        assert origin_status("POST", options, origin=origin) == 403, origin
    everyone = GuardOptions(origins=("*",))
    assert guard.check_origin("GET", head(origin="http://x"), "localhost", everyone) == "http://x"


def test_origins_to_name() -> None:
    assert guard.parse_origin("HTTP://App.Test:80/", False) == "http://app.test"
    assert guard.parse_origin("vscode-webview://*", False) == "vscode-webview://*"
    assert guard.parse_origin("*", True) == "*"
    for text in ("*", "http://*", "https://*", "app.test", "http://a/b", "http://u@a", "", "a:b"):
        with pytest.raises(UsageError):
            guard.parse_origin(text, False)


def test_requests_of_pages_without_an_origin() -> None:
    assert origin_status("GET", sec_fetch_site="same-origin") == 200
    assert origin_status("GET", sec_fetch_site="none", sec_fetch_mode="navigate") == 200
    link = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert origin_status("GET", sec_fetch_site="cross-site", **link) == 200
    assert origin_status("POST", sec_fetch_site="cross-site", **link) == 403
    for site in ("cross-site", "same-site"):
        assert origin_status("GET", sec_fetch_site=site, sec_fetch_mode="no-cors") == 403
        frame = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}
        assert origin_status("GET", sec_fetch_site=site, **frame) == 403


def test_preflight() -> None:
    asked = head(
        access_control_request_method="POST",
        access_control_request_headers="content-type, x-api-key, b\x7fd, ",
    )
    assert guard.is_preflight("OPTIONS", asked)
    assert not guard.is_preflight("POST", asked) and not guard.is_preflight("OPTIONS", [])
    answer = dict(guard.preflight_headers(asked, "http://app.test"))
    assert answer[b"access-control-allow-origin"] == b"http://app.test"
    assert answer[b"access-control-allow-headers"] == b"content-type, x-api-key"
    assert b"Origin" in answer[b"vary"]
    assert b"access-control-allow-credentials" not in answer
    assert b"access-control-allow-private-network" not in answer


# ---- sizes and types


def test_head_sizes() -> None:
    options = GuardOptions(max_url_bytes=10, max_headers=3, max_header_bytes=40)
    assert guard.check_head_size(b"/" * 10, head(a="b", c="d", e="f"), options) is None
    assert guard.check_head_size(b"/" * 11, [], options) == 414
    assert guard.check_head_size(b"/", head(a=["b"] * 4), options) == 431
    assert guard.check_head_size(b"/", head(a="b" * 40), options) == 431


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (head(), 200),
        (head(content_length="100"), 200),
        (head(transfer_encoding="chunked"), 200),
        (head(content_length="101"), 413),
        (head(content_length="9" * 20), 413),
        (head(content_length="-1"), 400),
        (head(content_length="1e2"), 400),
        (head(content_length=["5", "6"]), 400),
        (head(content_length="5", transfer_encoding="chunked"), 400),
    ],
)
def test_framing(headers: list[tuple[bytes, bytes]], status: int) -> None:
    assert status_of(guard.check_framing, headers, GuardOptions(max_body_bytes=100)) == status


@pytest.mark.parametrize(
    "value",
    [
        "application/json",
        "Application/JSON; charset=UTF-8",
        'application/json;charset="utf-8"',
        "application/problem+json",
        "application/json; odata=x",
    ],
)
def test_json_types(value: str) -> None:
    guard.check_content_type("POST", head(content_type=value, content_length="2"))


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "text/plain; application/json",
        "application/jsonx",
        "application/json; charset=utf-16",
        "text/json",
        "application/json, text/plain",
    ],
)
def test_other_types(value: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "GET"):
        headers = head(content_type=value, content_length="2")
        assert status_of(guard.check_content_type, method, headers) == 415
    both = head(content_type=["application/json", value], content_length="2")
    assert status_of(guard.check_content_type, "POST", both) == 415


def test_what_has_no_body_needs_no_type() -> None:
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        guard.check_content_type(method, head(content_length="0"))
        guard.check_content_type(method, [])
    assert status_of(guard.check_content_type, "POST", []) == 415
    assert status_of(guard.check_content_type, "GET", head(transfer_encoding="chunked")) == 415
