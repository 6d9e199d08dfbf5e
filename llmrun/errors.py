"""The one error tree. Raised where the cause is known, printed only in `cli.app.main`.

    LlmrunError                 exit 1   failed
    ├── UsageError              exit 2   usage
    ├── NotFoundError           exit 3   not_found
    ├── AuthError               exit 4   auth_required
    ├── WillNotFitError         exit 5   will_not_fit
    │   └── DiskFullError       exit 5   disk_full
    ├── HubUnreachableError     exit 6   hub_unreachable
    ├── DamagedFileError        exit 7   damaged
    │   └── GgufError           exit 7   bad_gguf
    ├── ContextOverflowError    exit 1   context_length_exceeded
    ├── EngineError             exit 1   engine
    │   └── EngineStoppedError  exit 1   engine
    ├── ServerError             exit 1   server
    │   └── ServerUnreachableError  exit 6   server_unreachable
    └── TemplateError           exit 1   template

Every error has three parts: what happened (`message`), why (`why`, may be None), and a next step
(`hint`, a command that can be pasted or a short sentence; may be None).
"""

from __future__ import annotations


class LlmrunError(Exception):
    """Base of all errors that a user may see.

    `exit_code` is the process's exit code and `code` the stable machine-readable name in JSON.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.hint = hint


class UsageError(LlmrunError):
    """The command was written wrongly."""

    exit_code = 2
    code = "usage"


class NotFoundError(LlmrunError):
    """A model, file or session does not exist."""

    exit_code = 3
    code = "not_found"


class AuthError(LlmrunError):
    """A login or an accepted licence is needed."""

    exit_code = 4
    code = "auth_required"


class WillNotFitError(LlmrunError):
    """Memory or disk is too small."""

    exit_code = 5
    code = "will_not_fit"


class DiskFullError(WillNotFitError):
    """Not enough free disk space."""

    code = "disk_full"


class HubUnreachableError(LlmrunError):
    """The network or the hub does not answer, or offline mode forbids asking."""

    exit_code = 6
    code = "hub_unreachable"


class DamagedFileError(LlmrunError):
    """A file is damaged or is not what it says it is."""

    exit_code = 7
    code = "damaged"


class GgufError(DamagedFileError):
    """A GGUF header breaks the format or one of the reader's bounds."""

    code = "bad_gguf"


class ContextOverflowError(LlmrunError):
    """A prompt has more tokens than the context can hold."""

    code = "context_length_exceeded"

    def __init__(self, n_prompt: int, n_ctx: int, *, hint: str | None = None) -> None:
        super().__init__(
            f"the prompt has {n_prompt} tokens, more than the context of {n_ctx} can hold",
            hint=hint or f"pass --ctx {-(-(n_prompt + 256) // 1024) * 1024}, or shorten the prompt",
        )
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class EngineError(LlmrunError):
    """llama.cpp refused or failed."""

    code = "engine"


class EngineStoppedError(EngineError):
    """The engine has come to an end by a failure of its own. Only loading the model again helps."""


class ServerError(LlmrunError):
    """A model server that llmrun is a client of refuses, or answers what cannot be understood."""

    code = "server"


class ServerUnreachableError(ServerError):
    """That server does not answer in time, or not at all."""

    exit_code = 6
    code = "server_unreachable"


class TemplateError(LlmrunError):
    """A chat template is broken, too expensive, or refuses the messages."""

    code = "template"
