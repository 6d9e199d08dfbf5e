"""Hostile clients against the real server, byte by byte on a loopback socket."""

from __future__ import annotations

import re
import socket
import struct
import threading
import tracemalloc

import pytest

from llmrun.server.guard import GuardOptions
from llmrun.server.lifecycle import ServeOptions
from tests.fakes.raw_http import Client, Running, TinyApp, running

KEY = "a-key-of-sixteen"


def options(**changes: float) -> ServeOptions:
    return ServeOptions(port=0, drain_s=0.0, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server() -> Running:
    with running(GuardOptions(max_body_bytes=1000, max_active=3), options()) as each:
        yield each


# ---- who may ask


def test_a_plain_request_is_answered(server: Running) -> None:
    answer = server.ask("POST /echo", body=b"{}")
    assert answer.status == 200 and answer.json() == {"n": 2, "path": "/echo"}
    assert server.ask().status == 200
    assert server.ask("GET /health?x=1", "Host: 127.0.0.1:99").status == 200


def test_foreign_hosts(server: Running) -> None:
    for host in ("evil.com", "evil.com:8080", "192.168.0.1", "localhost.evil.com"):
        answer = server.ask("GET /health", f"Host: {host}")
        assert answer.status == 403, host
        assert "--allowed-host" in answer.json()["error"]["message"]
    assert server.ask("GET /api/tags", "Host: evil.com").json()["error"].startswith("this server")
    assert server.ask("GET /health", "Host: a b").status == 400
    assert server.ask("GET /health", "Host:").status == 400


def test_no_host_and_many(server: Running) -> None:
    client = server.connect()
    client.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert client.read_answer().status == 400
    client = server.connect()
    client.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert client.read_answer().status == 400
    client = server.connect()
    client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n")
    assert client.read_answer().status == 400


def test_an_address_in_the_request_line_is_no_way_around(server: Running) -> None:
    for target in ("http://evil.com/health", "//evil.com/health", "*", "localhost:80", "health"):
        assert server.ask(f"GET {target}").json().get("path") != "/health"
    assert server.ask("GET http://localhost/health", "Host: evil.com").status == 403
    assert server.ask("CONNECT localhost:80").status == 400


def test_foreign_pages(server: Running) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = server.ask(f"{method} /echo", "Origin: http://evil.com")
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = ("Origin: http://evil.com", "Access-Control-Request-Method: POST")
    assert server.ask("OPTIONS /echo", *preflight).status == 403
    assert server.ask("GET /echo", "Sec-Fetch-Site: cross-site").status == 403
    own = server.ask("POST /echo", "Origin: http://localhost", body=b"{}")
    assert own.status == 200 and "access-control-allow-origin" not in own.headers
    assert "vary" not in own.headers


def test_a_form_of_a_page_without_origin(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = server.ask("POST /echo", f"Content-Type: {kind}", body=b"{}")
        assert answer.status == 415
        assert "application/json" in answer.json()["error"]["message"]


def test_named_pages() -> None:
    guard = GuardOptions(origins=("http://app.test",), api_keys=(KEY,))
    with running(guard) as server:
        origin = "Origin: http://app.test"
        asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-api-key")
        answer = server.ask("OPTIONS /echo", origin, *asked)
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == ["http://app.test"]
        assert answer.headers["access-control-allow-headers"] == ["x-api-key"]
        assert "access-control-allow-credentials" not in answer.headers
        assert server.ask("OPTIONS /echo", "Origin: http://b.test", *asked).status == 403
        # A page has to be able to read what went wrong.
        refused = server.ask("POST /echo", origin, body=b"{}")
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == ["http://app.test"]
        assert "Origin" in refused.headers["vary"]
        good = server.ask("POST /echo", origin, f"x-api-key: {KEY}", body=b"{}")
        assert good.status == 200
        assert good.headers["access-control-allow-origin"] == ["http://app.test"]
        # What another page gets must not come from a cache.
        assert "Origin" in server.ask().headers["vary"]


def test_keys() -> None:
    with running(GuardOptions(api_keys=("other", KEY))) as server:
        assert server.ask("GET /health").status == 200
        for headers in (
            (),
            ("Authorization: Bearer wrong",),
            (f"Authorization: Bearer {KEY[:-1]}",),
            (f"Authorization: {KEY}",),
            (f"Cookie: key={KEY}",),
        ):
            answer = server.ask("GET /v1/models", *headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == ["Bearer"]
            assert KEY not in str(answer)
        assert server.ask(f"GET /v1/models?api_key={KEY}").status == 401
        assert server.ask("GET /v1/models", f"Authorization: Bearer {KEY}").status == 200
        assert server.ask("GET /v1/models", f"X-API-Key: {KEY}").status == 200
        assert server.ask("POST /health", body=b"{}").status == 401
        assert server.ask("GET /health/../v1/models").status == 401
        assert server.ask("GET //health").status == 401
        # A body is not waited for when its sender may not send it.
        client = server.connect()
        client.request("POST /echo", "Content-Length: 900")
        assert client.read_answer().status == 401
        assert KEY not in "".join(server.log) and "?" not in "".join(server.log)


def test_headers_of_all_answers(server: Running) -> None:
    for answer in (server.ask(), server.ask("GET /page"), server.ask("GET /", "Host: evil.com")):
        assert answer.headers["x-content-type-options"] == ["nosniff"]
        assert answer.headers["referrer-policy"] == ["no-referrer"]
        assert "server" not in answer.headers
        is_page = answer.headers["content-type"][0].startswith("text/html")
        policy = answer.headers.get("content-security-policy", [""])[0]
        assert ("frame-ancestors 'none'" in policy) == is_page


# ---- too much


def test_bodies_that_are_too_large(server: Running) -> None:
    assert server.ask("POST /echo", body=b"x" * 1000).json()["n"] == 1000
    client = server.connect()
    client.request("POST /echo", "Content-Length: 1001")
    answer = client.read_answer()
    assert answer.status == 413 and "1000" in answer.json()["error"]["message"]
    chunks = b"64\r\n" + b"x" * 100 + b"\r\n"
    client = server.connect()
    client.request("POST /echo", "Transfer-Encoding: chunked", body=chunks * 10 + b"0\r\n\r\n")
    assert client.read_answer().json()["n"] == 1000
    client = server.connect()
    client.request("POST /echo", "Transfer-Encoding: chunked", body=chunks * 11)
    assert client.read_answer().status == 413


def test_a_client_that_first_sends_all_still_hears_that_it_was_too_much(server: Running) -> None:
    client = server.connect()
    client.request("POST /echo", body=b"x" * 8_000_000)
    assert client.read_answer().status == 413
    client.request()
    assert client.read_answer().status == 200


def test_a_stream_of_chunks_without_end() -> None:
    with running(GuardOptions(max_body_bytes=1000), options(head_s=0.5)) as server:
        client = server.connect()
        client.request("POST /echo", "Transfer-Encoding: chunked")
        sent = 0
        with pytest.raises(ConnectionError):
            while True:
                sent += client.sock.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        assert server.ask().status == 200


def test_heads_that_are_too_large(server: Running) -> None:
    assert server.ask("GET /health?" + "x" * 9000).status == 414
    assert server.ask("GET /health", *[f"X-{i}: y" for i in range(120)]).status == 431
    for n_bytes in (40_000, 400_000):
        client = server.connect()
        client.request("GET /health", "X-Long: " + "y" * n_bytes)
        assert client.read_answer().status in (400, 431)


def test_a_head_without_end(server: Running) -> None:
    client = server.connect()
    client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    with pytest.raises(ConnectionError):
        while True:
            client.send(b"X: " + b"y" * 1000 + b"\r\n")


def test_a_trailer_without_end(server: Running) -> None:
    client = server.connect()
    client.request("POST /echo", "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n")
    with pytest.raises(ConnectionError):
        while True:
            client.send(b"Authorization: " + b"y" * 1000 + b"\r\n")


def test_bodies_all_together() -> None:
    guard = GuardOptions(max_body_bytes=1000, max_buffered_bytes=1500)
    with running(guard) as server:
        first = server.connect()
        first.request("POST /echo", "Expect: 100-continue", "Content-Length: 1000")
        assert first.read_head().status == 100
        first.send(b"x" * 999)
        statuses = []
        while 503 not in statuses:  # the first one's bytes may not have come in yet
            answer = server.ask("POST /echo", body=b"y" * 800)
            statuses.append(answer.status)
        assert answer.headers["retry-after"] == ["1"]
        first.send(b"x")
        assert first.read_answer().json()["n"] == 1000
        assert server.ask("POST /echo", body=b"y" * 800).status == 200


def test_requests_all_together(server: Running) -> None:
    busy = [server.connect() for _ in range(3)]
    for client in busy:
        client.request("GET /quiet")
        client.read_head()
    answer = server.ask("GET /v1/models")
    assert answer.status == 503 and answer.headers["retry-after"] == ["1"]
    assert server.ask("GET /health").status == 200
    for client in busy:
        client.close()
    for _ in busy:
        server.app.wait_for(("/quiet", "gone"))
    assert server.ask("GET /v1/models").status == 200


def test_connections_all_together() -> None:
    with running(options=options(max_connections=20)) as server:
        working = server.connect()
        working.request("GET /quiet")
        working.read_until(b"tick\r\n")
        idle = [server.connect() for _ in range(100)]
        # The oldest idle ones made room, and the one that is being answered stayed.
        assert idle[0].read_end() == b""
        assert server.ask().status == 200
        working.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            working.sock.recv(1)
        working.close()
        server.app.wait_for(("/quiet", "gone"))


# ---- too slow


@pytest.mark.parametrize(
    "start",
    [b"", b"GET", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "],
)
def test_a_head_that_does_not_come(start: bytes) -> None:
    with running(options=options(head_s=0.2)) as server:
        client = server.connect()
        client.send(start)
        assert client.read_end() == b""


def test_a_head_that_comes_byte_by_byte() -> None:
    with running(options=options(head_s=0.3)) as server:
        client = server.connect()
        client.request()
        assert client.read_answer().status == 200
        # Between requests it may be idle; from the first byte on the clock runs again.
        with pytest.raises(ConnectionError):
            client.send(b"GET /health HTTP/1.1\r\n")
            ended = threading.Event()
            while not ended.wait(0.02):
                client.send(b"X")
        assert server.ask().status == 200


def test_a_connection_may_rest_between_requests() -> None:
    with running(options=options(head_s=0.1, keep_alive_s=1)) as server:
        client = server.connect()
        client.request()
        client.read_answer()
        assert not threading.Event().wait(0.4)  # longer than a head may take
        client.request()
        assert client.read_answer().status == 200
        assert client.read_end() == b""


def test_a_body_that_does_not_come() -> None:
    guard = GuardOptions(receive_s=0.2)
    with running(guard) as server:
        for framing in ("Content-Length: 10", "Transfer-Encoding: chunked"):
            client = server.connect()
            client.request("POST /api/echo", framing)
            answer = client.read_answer()
            assert answer.status == 408 and isinstance(answer.json()["error"], str)
            assert client.read_end() == b""


def test_a_body_that_comes_byte_by_byte() -> None:
    guard = GuardOptions(receive_s=0.3, min_body_rate=1000)
    with running(guard) as server:
        client = server.connect()
        client.request("POST /echo", "Content-Length: 100000")
        client.sock.settimeout(0.02)
        while True:
            try:
                answer = client.read_answer()
                break
            except TimeoutError:
                client.send(b"x")
        assert answer.status == 408
        # One that is quick enough has more time than that.
        client = server.connect()
        client.request("POST /echo", "Content-Length: 2000")
        for _ in range(20):
            client.send(b"x" * 100)
            threading.Event().wait(0.02)
        assert client.read_answer().json()["n"] == 2000


def test_a_client_that_reads_nothing() -> None:
    with running(options=options(stall_s=0.3)) as server:
        client = server.connect(receive_buffer=4096)
        client.request("GET /flood")
        server.app.wait_for(("/flood", "gone"))
        server.wait_idle()
        assert server.ask().status == 200


def test_many_slow_ones_beside_a_real_one() -> None:
    with running() as server:
        slow = [server.connect() for _ in range(100)]
        for client in slow[:50]:
            client.send(b"POST /echo HTTP/1.1\r\nHost: local")
        assert server.ask("POST /echo", body=b"{}").status == 200


# ---- clients that go


@pytest.mark.parametrize("path", ["/quiet", "/ticks", "/silent"])
@pytest.mark.parametrize("way", ["close", "reset", "half", "unread", "pipelined"])
def test_a_client_that_goes_ends_its_work(server: Running, path: str, way: str) -> None:
    client = server.connect()
    client.request(f"GET {path}")
    server.app.wait_for(path)
    if path != "/silent":
        client.read_until(b"tick")
    if way == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if way == "pipelined":
        client.request("GET /echo")
        client.send(b"\x00garbage" * 20_000)
    if way == "half":
        client.sock.shutdown(socket.SHUT_WR)
        server.app.wait_for((path, "gone"))
    client.close()
    if way != "half":
        server.app.wait_for((path, "gone"))
    assert server.ask().status == 200


def test_a_client_that_goes_in_the_middle_of_its_request(server: Running) -> None:
    for start in (b"GET /heal", b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"):
        for way in ("close", "half"):
            client = server.connect()
            client.send(start)
            if way == "half":
                client.sock.shutdown(socket.SHUT_WR)
                assert client.read_end() == b""
            client.close()
    client = server.connect()
    client.request("POST /echo", "Content-Length: 10", body=b"")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.read_end() == b""
    assert server.ask().status == 200
    server.wait_idle()


# ---- no HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
        b"hello\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX\x00: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
        b"GET /he\xffalth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Length: 5\r\nContent-Type: application/json\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\n-2\r\nhi\r\n",
    ],
)
def test_what_is_no_http_is_refused(server: Running, data: bytes) -> None:
    client = server.connect()
    client.send(data)
    answer = client.read_answer()
    assert answer.status == 400
    assert answer.json()["error"]["message"]
    assert server.ask().status == 200


def test_garbage_in_a_body_that_is_refused_already(server: Running) -> None:
    client = server.connect()
    client.request("POST /echo", "Transfer-Encoding: chunked", "Host: evil.com")
    assert client.read_answer().status == 403
    client.send(b"zz\r\n")
    assert client.read_end() == b""


def test_garbage_behind_a_request(server: Running) -> None:
    for tail in (b"\x00\x01garbage\r\n\r\n", b"GET /late HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50):
        client = server.connect()
        client.send(b"GET /first HTTP/1.1\r\nHost: localhost\r\n\r\n" + tail)
        assert client.read_answer().json()["path"] == "/first"
        # One answer, or more where what follows was a request; then it is over.
        client.sock.shutdown(socket.SHUT_WR)
        client.read_end()
    assert server.ask().status == 200


def test_what_follows_a_request_is_not_kept(server: Running) -> None:
    client = server.connect()
    client.request("GET /quiet")
    server.app.wait_for("/quiet")
    data = b"x" * (1 << 20)
    tracemalloc.start()
    try:
        for _ in range(64):  # more than the system holds, so that the server has read most of it
            client.send(data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 << 20
    client.close()
    server.app.wait_for(("/quiet", "gone"))


def test_an_upgrade_is_not_taken_up(server: Running) -> None:
    for protocol in ("websocket", "h2c"):
        answer = server.ask(
            "GET /echo",
            "Connection: Upgrade",
            f"Upgrade: {protocol}",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        )
        assert answer.status == 200
    client = server.connect()
    client.request("GET /quiet", "Connection: Upgrade", "Upgrade: websocket")
    server.app.wait_for("/quiet")
    client.close()
    server.app.wait_for(("/quiet", "gone"))


# ---- what is told


def test_a_defect_tells_nothing(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    answer = server.ask("GET /boom")
    assert answer.status == 500
    assert b"secret" not in answer.body and b"Traceback" not in answer.body
    client = server.connect()
    client.request("GET /late-boom")
    assert client.read_head().status == 200
    # Without the last chunk: no client takes this for an end.
    assert not client.read_end().endswith(b"0\r\n\r\n")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_log_has_one_line_a_request() -> None:
    with running() as server:
        server.ask("POST /echo?key=secret", "X-Secret: secret", body=b'"secret"')
        server.ask("GET /a%0d%0ab%1b%5b2J%e2%80%ae", "Host: evil.com")
        client = server.connect()
        client.request("GET /quiet")
        server.app.wait_for("/quiet")
        client.close()
        server.app.wait_for(("/quiet", "gone"))
    lines = [re.sub(r" [0-9]+ ms$", "", line) for line in server.log]
    assert lines[:2] == ["POST /echo 200", "GET /a??b?[2J\\u202e 403"]
    assert lines[2].startswith("GET /quiet")


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # nothing to be tested on a machine without it
        return
    with running(GuardOptions(bound="::1"), ServeOptions(host="::1", port=0, drain_s=0)) as server:
        assert server.url.startswith("http://[::1]:")
        assert server.ask("GET /health", f"Host: [::1]:{server.address[1]}").status == 200


def test_localhost_is_both_families() -> None:
    with running(options=ServeOptions(host="localhost", port=0, drain_s=0)) as server:
        assert server.ask().status == 200
        try:
            client = Client(("::1", server.address[1]))
        except OSError:
            return
        client.request()
        assert client.read_answer().status == 200
        client.close()


def test_an_application_is_not_asked_what_is_refused() -> None:
    app = TinyApp()
    with running(GuardOptions(api_keys=(KEY,)), app=app) as server:
        server.ask("GET /v1/models")
        server.ask("GET /v1/models", "Host: evil.com")
        server.ask("GET /v1/models", f"X-API-Key: {KEY}", "Origin: http://evil.com")
    assert app.seen.empty()
