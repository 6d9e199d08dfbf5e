"""What callers hear of an engine's thread that has come to its end. `what`: engine or embedder;
`failure`: what ended it, None where it was closed."""

from __future__ import annotations

from llmrun.errors import EngineError, EngineStoppedError, LlmrunError


def refusal(what: str, failure: BaseException | None) -> EngineError:
    """For who comes after the end."""
    kind = EngineError if failure is None else EngineStoppedError
    return kind(f"the {what} is closed", why=_words(failure))


def ended_by(what: str, failure: BaseException | None) -> EngineError:
    """For those who were there at the end."""
    if failure is None:
        return EngineError(f"the {what} was closed")
    if isinstance(failure, LlmrunError):
        return EngineStoppedError(failure.message, why=failure.why, hint=failure.hint)
    return EngineStoppedError(f"the {what} stopped", why=_words(failure))


def _words(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
