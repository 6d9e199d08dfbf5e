"""Who may ask this server, and with what: decisions only, on values of a request's head.

The middleware of `limits` calls these in the order in which they stand here. Each `check_*` returns
nothing or raises ApiError. What they are against:

* DNS rebinding: a page at a name of the attacker's that points to 127.0.0.1 is stopped by the list
  of `Host` names. An address literal cannot be rebound.
* Pages of other origins: the `Origin` header has to be the server's own or one that was named;
  where a browser sends none, `Sec-Fetch-Site` decides. A POST has to be JSON, which no form sends.
* Strangers on the network: any address but a loopback one needs a key.

Refusals of a host or an origin are 403, a broken `Host` or framing is 400.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from llmrun.errors import UsageError
from llmrun.server.types import ApiError

RawHeaders = Iterable[tuple[bytes, bytes]]
"""A request's headers as ASGI has them: names in lower case."""

_MAX_KEY_FILE_BYTES = 1 << 20
# Names under which containers see this machine; no public name can end in `.internal`.
_CONTAINER_HOSTS = frozenset(
    {"host.docker.internal", "gateway.docker.internal", "host.containers.internal"}
)
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_.-]+))(?::(?P<port>[0-9]{1,5}))?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """What is let through.

    `bound` is the address that the server listens on, `hosts` further names that requests may
    call it by (`box.lan`, `*.example.com`, see `parse_host_name`). `origins` are the browser
    origins that may ask (see `parse_origin`). Without `api_keys` everybody who can connect may.
    `open_paths` need no key for GET and HEAD; one that ends in `/*` means all below it.
    `receive_s` is how long a body may take, and a second more for each `min_body_rate` bytes of
    it. `max_buffered_bytes` bounds the bodies being received all together, `max_active` the
    requests that run or wait at once.
    """

    bound: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    open_paths: tuple[str, ...] = ("/", "/health")
    max_url_bytes: int = 8 << 10
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    max_body_bytes: int = 32 << 20
    max_buffered_bytes: int = 256 << 20
    min_body_rate: int = 64 << 10
    receive_s: float = 30.0
    max_active: int = 512

    def is_open(self, method: str, path: str) -> bool:
        """Whether this needs no key, and is answered while the server drains."""
        if method not in ("GET", "HEAD"):
            return False
        return any(
            path.startswith(entry[:-1]) if entry.endswith("/*") else path == entry
            for entry in self.open_paths
        )


# ---- where to listen


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, IPv6 with or without brackets) is this machine only."""
    name = _bare(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def check_bind(host: str, has_key: bool, insecure: bool) -> None:
    """Raises UsageError for an address that others can reach, unless a key is asked for or the
    person insists."""
    if is_loopback(host) or has_key or insecure:
        return
    raise UsageError(
        f"{host or 'an empty host'} can be reached from other machines, and no API key is set",
        why="whoever reaches the server could use it",
        hint="pass --api-key KEY (or set LLMRUN_API_KEY, or --api-key-file), "
        "or --insecure to serve everybody",
    )


# ---- keys


def parse_keys(text: str) -> tuple[str, ...]:
    """The keys of a key file: one a line, blank lines and those that begin with `#` left out.
    Raises ValueError for a key that no header can carry."""
    keys = []
    for line in text.splitlines():
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if any(char.isspace() or not char.isprintable() for char in key):
            raise ValueError("a key has a space or a control character in it")
        keys.append(key)
    return tuple(dict.fromkeys(keys))


def read_key_file(path: Path) -> tuple[tuple[str, ...], str | None]:
    """The keys of a file, and a warning when other users of this machine can read it.

    Raises UsageError when it cannot be read, holds no key, or other users can write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MAX_KEY_FILE_BYTES + 1)
        if len(raw) > _MAX_KEY_FILE_BYTES:
            raise ValueError("the file is too large")
        keys = parse_keys(raw.decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read", why=error.strerror) from None
    except UnicodeDecodeError:
        raise UsageError(f"the key file {path} is not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(f"the key file {path} is no list of keys", why=str(error)) from None
    if not keys:
        raise UsageError(f"the key file {path} has no key in it", hint="write one key a line")
    if os.name != "posix":  # elsewhere the mode says nothing of who may read
        return keys, None
    if mode & stat.S_IWOTH:
        raise UsageError(
            f"every user of this machine can write the key file {path}", hint=f"chmod 600 {path}"
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return keys, f"other users of this machine can read the key file {path}: chmod 600 {path}"
    return keys, None


def check_key(headers: RawHeaders, options: GuardOptions) -> None:
    """`Authorization: Bearer KEY` or `x-api-key: KEY`, either of them. How long it takes tells
    nothing of the keys: digests are compared, and always all of them."""
    if not options.api_keys:
        return
    given = []
    for name, value in headers:
        if name == b"x-api-key":
            given.append(value.strip())
        elif name == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                given.append(rest.strip())
    known = [
        hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in options.api_keys
    ]
    is_known = False
    for key in given:
        digest = hashlib.sha256(key).digest()
        for other in known:
            is_known |= hmac.compare_digest(digest, other)
    if is_known:
        return
    raise ApiError(
        "authentication",
        "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY",
        code="invalid_api_key",
    )


# ---- Host


def parse_host_name(text: str) -> str:
    """A name for `GuardOptions.hosts`, in lower case and without a port: a host name, an address,
    or `*.` and a domain for all names below it. Raises UsageError."""
    name = text.strip().lower().rstrip(".")
    plain = name.removeprefix("*.")
    match = _HOST.fullmatch(f"[{plain}]" if plain.count(":") > 1 and plain[:1] != "[" else plain)
    if match is None or ("." not in plain and name != plain):
        raise UsageError(
            f"{text!r} is not a host name",
            why="`*` alone would let every page in by DNS rebinding" if name == "*" else None,
            hint="--allowed-host box.lan, or --allowed-host '*.example.com'",
        )
    bare = _bare(match["v6"] or match["name"])
    return f"*.{bare}" if name != plain else bare


def known_hosts(bound: str, hostname: str) -> tuple[str, ...]:
    """Names that the server goes by without being told: on a network the machine's own."""
    if is_loopback(bound) or not _HOST.fullmatch(hostname.lower()):
        return ()
    name = hostname.lower().rstrip(".")
    return (name,) if "." in name else (name, f"{name}.local")


def check_host(headers: RawHeaders, options: GuardOptions) -> str:
    """The `Host` of the request, in lower case with its port.

    Raises ApiError: invalid_request (400) when there is none, more than one, or it is no host;
    permission (403) when it is not a name of this server. Any port will do: it says nothing
    about who asks, and ports are forwarded.
    """
    hosts = _values(headers, b"host")
    if len(hosts) != 1:
        raise _bad("the request must have exactly one Host header")
    host = hosts[0].decode("latin-1").strip().lower()
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 80) > 65535:
        raise _bad("the Host header is not a host name")
    name = (match["v6"] or match["name"]).rstrip(".")
    if not _is_our_name(name, options):
        raise ApiError(
            "permission",
            f"this server does not go by the name {name[:100]}; "
            "whoever runs it can allow that with --allowed-host",
            code="host_not_allowed",
        )
    return host


def _is_our_name(name: str, options: GuardOptions) -> bool:
    if is_loopback(name) or name in _CONTAINER_HOSTS or name == _bare(options.bound):
        return True
    for entry in options.hosts:
        if name == entry or (entry.startswith("*.") and name.endswith(entry[1:])):
            return True
    # No attacker's name, so nothing that could be rebound; but who listens on loopback only does
    # not expect to be called by an address of the network.
    return not is_loopback(options.bound) and _address(name) is not None


# ---- Origin


def parse_origin(text: str, has_key: bool) -> str:
    """An entry for `GuardOptions.origins`: `http://localhost:5173`; `null`; `app://*` (any of a
    scheme that is no web scheme); `*` where a key is needed anyway. Raises UsageError."""
    entry = text.strip().lower().rstrip("/")
    if entry == "null" or (entry == "*" and has_key):
        return entry
    if entry == "*":
        raise UsageError(
            "--cors-origin '*' would let every web page use the server",
            hint="name the origin, or set a key with --api-key",
        )
    if re.fullmatch(r"[a-z][a-z0-9+.-]*://\*", entry) and not entry.startswith(("http:", "https:")):
        return entry
    origin = _origin_of(entry)
    if origin is None:
        raise UsageError(
            f"{text!r} is not an origin", hint="--cors-origin http://localhost:5173 (no path)"
        )
    return origin


def check_origin(method: str, headers: RawHeaders, host: str, options: GuardOptions) -> str | None:
    """The origin that has been named and gets the CORS headers; None for the server's own pages
    and for what is no browser. `host` is the request's, as `check_host` gave it.

    Raises ApiError (permission) for pages of other origins.
    """
    headers = list(headers)
    origins = _values(headers, b"origin")
    if not origins:
        _check_fetch_site(method, headers)
        return None
    if len(origins) > 1:
        raise _bad("the request has more than one Origin header")
    origin = origins[0].decode("latin-1").strip()
    if _is_named(origin.lower(), options.origins):
        return origin
    if _is_same(origin, host):
        return None
    raise ApiError(
        "permission",
        f"pages of {origin[:100]} may not use this server; "
        "whoever runs it can allow that with --cors-origin",
        code="origin_not_allowed",
    )


def _is_named(origin: str, entries: Sequence[str]) -> bool:
    for entry in entries:
        if entry in ("*", origin) or (
            entry.endswith("://*") and origin.startswith(entry[:-1]) and len(origin) >= len(entry)
        ):
            return True
    return _origin_of(origin) in entries


def _is_same(origin: str, host: str) -> bool:
    """Whether a page is of this server. A proxy may speak TLS for it, so either scheme will do."""
    return any(
        (own := _origin_of(f"{scheme}://{host}")) is not None and own == _origin_of(origin.lower())
        for scheme in _DEFAULT_PORTS
    )


def _origin_of(text: str) -> str | None:
    """`scheme://host[:port]` in one spelling; None for what is none."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    is_bare = text.lower() == f"{parts.scheme}://{parts.netloc.lower()}"
    if not is_bare or not parts.hostname or not _HOST.fullmatch(parts.netloc.lower()):
        return None
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if port is None or port == _DEFAULT_PORTS.get(parts.scheme):
        return f"{parts.scheme}://{name}"
    return f"{parts.scheme}://{name}:{port}"


def _check_fetch_site(method: str, headers: RawHeaders) -> None:
    """A browser sends no Origin with a plain GET: of an image, a script, or a link. Only the last
    may come from elsewhere."""
    site = _values(headers, b"sec-fetch-site")
    if not site or site[0].strip().lower() in (b"same-origin", b"none"):
        return
    mode = _values(headers, b"sec-fetch-mode")
    target = _values(headers, b"sec-fetch-dest")
    if method in ("GET", "HEAD") and mode == [b"navigate"] and target == [b"document"]:
        return
    raise ApiError(
        "permission", "pages of other origins may not use this server", code="origin_not_allowed"
    )


def is_preflight(method: str, headers: RawHeaders) -> bool:
    """Whether a browser asks what it may send."""
    return method == "OPTIONS" and bool(_values(headers, b"access-control-request-method"))


def preflight_headers(headers: RawHeaders, origin: str) -> list[tuple[bytes, bytes]]:
    """What a named origin's page may send: any of our methods, and the headers that it asks for
    (clients add their own: `x-stainless-…`, `anthropic-version`)."""
    headers = list(headers)
    wished = [
        name.strip()
        for value in _values(headers, b"access-control-request-headers")
        for name in value.split(b",")
    ]
    allowed = [name for name in wished if _TOKEN.fullmatch(name.decode("latin-1"))][:50]
    answer = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
    ]
    if allowed:
        answer.append((b"access-control-allow-headers", b", ".join(allowed)))
    if _values(headers, b"access-control-request-private-network") == [b"true"]:
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


# ---- size and shape of a request


def check_head_size(target: bytes, headers: RawHeaders, options: GuardOptions) -> int | None:
    """The HTTP status of a head that is too large (414, 431); None when it is not."""
    if len(target) > options.max_url_bytes:
        return 414
    n_headers = n_bytes = 0
    for name, value in headers:
        n_headers += 1
        n_bytes += len(name) + len(value) + 4
    if n_headers > options.max_headers or n_bytes > options.max_header_bytes:
        return 431
    return None


def check_framing(headers: RawHeaders, options: GuardOptions) -> None:
    """Raises ApiError: too_large for a body that says so itself; invalid_request where a proxy in
    front could see another end of the body than this server."""
    headers = list(headers)
    lengths = _values(headers, b"content-length")
    if not lengths:
        return
    if _values(headers, b"transfer-encoding"):
        raise _bad("Content-Length and Transfer-Encoding exclude each other")
    if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,20}", lengths[0]):
        raise _bad("the Content-Length is not a number")
    if int(lengths[0]) > options.max_body_bytes:
        raise body_too_large(options)


def body_too_large(options: GuardOptions) -> ApiError:
    return ApiError("too_large", f"the body has more than {options.max_body_bytes} bytes")


def check_content_type(method: str, headers: RawHeaders) -> None:
    """What has a body, and each POST, has to say that it is JSON in UTF-8. Raises ApiError
    (unsupported_media_type)."""
    headers = list(headers)
    has_body = bool(_values(headers, b"transfer-encoding")) or any(
        value.strip(b"0 ") for value in _values(headers, b"content-length")
    )
    if not has_body and (method in _SAFE_METHODS or method == "DELETE"):
        return
    types = _values(headers, b"content-type")
    if len(types) == 1 and _is_json(types[0].decode("latin-1")):
        return
    raise ApiError(
        "unsupported_media_type",
        "the body must be JSON, with the header Content-Type: application/json",
    )


def _is_json(content_type: str) -> bool:
    media, _, parameters = content_type.lower().partition(";")
    if not re.fullmatch(r"application/(?:json|[a-z0-9!#$&^_.-]+\+json)", media.strip()):
        return False
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in (
            "utf-8",
            "utf8",
            "us-ascii",
        ):
            return False
    return True


# ---- helpers


def _values(headers: RawHeaders, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _bare(host: str) -> str:
    """A host name or address as it is compared: lower case, no brackets, no last dot."""
    return host.strip().lower().removeprefix("[").removesuffix("]").rstrip(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _bad(message: str) -> ApiError:
    return ApiError("invalid_request", message)
