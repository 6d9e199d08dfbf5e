"""Compiles and renders a chat template: the code that runs in the child process.

Run as a script it reads one JSON request a line from stdin and answers with one JSON line each; it
must import nothing of llmrun, so that a template can reach nothing of it. Known-good templates use
`compile_template` in the parent process.

    request  {"source"?, "limits", "today", "variables"}      `source` in the first one
    answer   {"ok": text} or {"error": kind, "detail": text}

Kinds: refused (the template called raise_exception), syntax, memory, depth, size, security, failed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

Renderer = Callable[[dict[str, Any], datetime.datetime, int], str]


class RefusedError(Exception):
    """The template itself refused the messages."""


class TooLongError(Exception):
    """The output passed its bound."""


def compile_template(source: str) -> Renderer:
    """The template as a function of (variables, today, most output characters).

    The environment is the one that Hugging Face renders chat templates in: trim_blocks,
    lstrip_blocks, loop controls, `{% generation %}`, `raise_exception`, `strftime_now` and a
    `tojson` that does not escape HTML. Raises what jinja2 raises.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training: only its body matters."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    template = environment.from_string(source)

    def render(variables: dict[str, Any], today: datetime.datetime, max_chars: int) -> str:
        parts: list[str] = []
        n_chars = 0
        for part in template.generate({**variables, "strftime_now": today.strftime}):
            n_chars += len(part)
            if n_chars > max_chars:
                raise TooLongError
            parts.append(part)
        return "".join(parts)

    return render


def describe_failure(error: BaseException) -> tuple[str, str]:
    """The kind and the detail of what a compilation or rendering raised."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    detail = str(error)[:500]
    if isinstance(error, RefusedError):
        return "refused", detail
    if isinstance(error, TemplateSyntaxError):
        return "syntax", f"line {error.lineno}: {detail}"
    if isinstance(error, TooLongError):
        return "size", ""
    if isinstance(error, MemoryError):
        return "memory", ""
    if isinstance(error, RecursionError):
        return "depth", ""
    if isinstance(error, SecurityError):
        return "security", detail
    return "failed", detail or type(error).__name__


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: object = "") -> NoReturn:
    raise RefusedError(str(message))


def _limit_memory(n_bytes: int) -> None:
    """Allow `n_bytes` of address space beyond what the process has now."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = _address_space_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _address_space_bytes() -> int:
    try:
        n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 512 * 1024 * 1024
    import resource

    return n_pages * resource.getpagesize()


def _limit_cpu(seconds: int) -> None:
    """Allow `seconds` more of CPU time from now on; the kernel ends the process at the bound."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def main() -> None:
    """Serve requests until stdin ends."""
    render: Renderer | None = None
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - before the limits, and while the parent is still busy

    for line in sys.stdin.buffer:
        request = json.loads(line)
        limits = request["limits"]
        _limit_memory(limits["memory_bytes"])
        _limit_cpu(limits["cpu_s"])
        try:
            if render is None:
                render = compile_template(request["source"])
            today = datetime.datetime.fromisoformat(request["today"])
            text = render(request["variables"], today, limits["output_chars"])
            answer: dict[str, str] = {"ok": text}
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
            kind, detail = describe_failure(error)
            answer = {"error": kind, "detail": detail}
        reply = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
