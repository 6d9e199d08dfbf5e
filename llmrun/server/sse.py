"""Server-sent events with names, as the Anthropic and the Responses dialect stream them. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from llmrun.server.wire_json import to_json

MEDIA_TYPE = "text/event-stream"
COMMENT = b": keep-alive\n\n"
"""Without meaning; every reader of events passes it over."""


def encode_event(name: str, data: Mapping[str, object]) -> bytes:
    """One event: its name, its data as JSON on one line, an empty line."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), to_json(data))
