"""The sockets that the server listens on."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from llmrun.errors import LlmrunError, UsageError
from llmrun.server import guard

_BACKLOG = 1024


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of `host`, at one port. `localhost` is both 127.0.0.1 and
    ::1 where there is IPv6, and never anything else.

    Raises UsageError (no such address) and LlmrunError (port in use, not allowed).
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"{port} is no port", hint="--port 8080")
    sockets: list[socket.socket] = []
    for family, address in _addresses(host, port):
        if sockets and port == 0:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(_bind(family, address))
        except OSError as error:
            # One address is enough, but not where another server has the port at a second one.
            if sockets and (port == 0 or error.errno != errno.EADDRINUSE):
                continue
            for sock in sockets:
                sock.close()
            raise _bind_error(host, port, error) from None
    return sockets


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and socket addresses, IPv4 first: a machine may have no IPv6."""
    bare = host.strip().removeprefix("[").removesuffix("]")
    ipv4, ipv6 = (socket.AF_INET, (bare, port)), (socket.AF_INET6, (bare, port, 0, 0))
    if bare.lower() == "localhost":
        # Some resolvers name one of the two only, and clients try either.
        return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port, 0, 0))]
    if re.fullmatch(r"[0-9.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", bare):
        return [ipv6 if ":" in bare else ipv4]
    try:
        found = socket.getaddrinfo(
            bare or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _no_address(host, why) from None
    targets = list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))
    if guard.is_loopback(bare):
        targets = [entry for entry in targets if guard.is_loopback(str(entry[1][0]))]
    if not targets:
        raise _no_address(host)
    return sorted(targets, key=lambda entry: entry[0] != socket.AF_INET)


def _no_address(host: str, why: str | None = None) -> UsageError:
    return UsageError(f"{host!r} is no address of this machine", why=why, hint="--host 127.0.0.1")


def _bind(family: int, address: Any) -> socket.socket:
    # asyncio sets TCP_NODELAY only where the protocol is named. Without it an answer's body waits
    # for the client's delayed acknowledgement of its head: 40 ms on each connection kept alive.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            # A server that has just ended may have left connections behind in TIME_WAIT.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        # Two can bind one port when neither listens yet.
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_error(host: str, port: int, error: OSError) -> LlmrunError:
    if error.errno == errno.EADDRINUSE:
        return LlmrunError(
            f"port {port} is in use",
            why="another server listens there, maybe another llmrun",
            hint=f"pass --port {port + 1 if port < 65535 else 0}, or --port 0 for any free one",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return LlmrunError(
            f"port {port} is not allowed", why=error.strerror, hint="pass --port 8080"
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(
        error, socket.gaierror
    ):
        return _no_address(host, error.strerror)
    return LlmrunError(f"cannot listen on {host}, port {port}", why=error.strerror)


def url_of(sockets: Sequence[socket.socket]) -> str:
    """An address that this machine reaches the server at."""
    host, port = sockets[0].getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - nothing is bound here
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
