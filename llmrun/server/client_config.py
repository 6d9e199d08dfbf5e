"""Settings to paste into programs that talk to this server. Pure.

A key is never printed: it stands in the variable LLMRUN_API_KEY. Programs that refuse to run
without a key get a word that says nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmrun.errors import UsageError
from llmrun.text import close_names

_NO_KEY = "local"
_VARIABLE = "LLMRUN_API_KEY"


@dataclass(frozen=True, slots=True)
class _Site:
    """Where the server is and what it serves; the first of `models` is the one to use."""

    url: str
    models: tuple[str, ...]
    has_key: bool

    @property
    def model(self) -> str:
        return self.models[0]

    @property
    def shell_key(self) -> str:
        """The key as a word of a shell's command line."""
        return f'"${_VARIABLE}"' if self.has_key else _NO_KEY

    @property
    def python_key(self) -> str:
        return f'os.environ["{_VARIABLE}"]' if self.has_key else json.dumps(_NO_KEY)

    @property
    def python_import(self) -> str:
        return "import os\n\n" if self.has_key else ""


def client_names() -> list[tuple[str, str]]:
    """The clients that are known, each with what is printed for it."""
    return [(name, client.words) for name, client in _CLIENTS.items()]


def client_config(client: str, url: str, models: Sequence[str], *, has_key: bool) -> str:
    """The settings of `client` for the server at `url` (without a slash at its end). `models` has
    one at least. Raises UsageError, with close names, for a client that is not known."""
    found = _CLIENTS.get(client)
    if found is None:
        near = close_names(client, _CLIENTS)
        why = f"did you mean {', '.join(near)}?" if near else None
        raise UsageError(
            f"no settings are known for {client!r}",
            why=why,
            hint="llmrun serve --print-config list",
        )
    return found.write(_Site(url, tuple(models), has_key)).rstrip("\n")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _exports(**variables: str) -> str:
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


def _claude_code(site: _Site) -> str:
    model = shlex.quote(site.model)
    return (
        _exports(
            ANTHROPIC_BASE_URL=site.url,
            ANTHROPIC_AUTH_TOKEN=site.shell_key,
            ANTHROPIC_MODEL=model,
            ANTHROPIC_DEFAULT_OPUS_MODEL=model,
            ANTHROPIC_DEFAULT_SONNET_MODEL=model,
            ANTHROPIC_DEFAULT_HAIKU_MODEL=model,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
        + "\nclaude"
    )


def _opencode(site: _Site) -> str:
    return _json(
        {
            "$schema": "https://opencode.ai/config.json",
            "model": f"llmrun/{site.model}",
            "provider": {
                "llmrun": {
                    "npm": "@ai-sdk/openai-compatible",
                    "name": "llmrun",
                    "options": {
                        "baseURL": f"{site.url}/v1",
                        "apiKey": f"{{env:{_VARIABLE}}}" if site.has_key else _NO_KEY,
                    },
                    "models": {name: {"name": name} for name in site.models},
                }
            },
        }
    )


def _continue(site: _Site) -> str:
    # A JSON string is a YAML string.
    key = f"${{{{ secrets.{_VARIABLE} }}}}" if site.has_key else _NO_KEY
    lines = ["name: llmrun", "version: 1.0.0", "schema: v1", "models:"]
    for name in site.models:
        lines += [
            f"  - name: {json.dumps(name)}",
            "    provider: openai",
            f"    model: {json.dumps(name)}",
            f"    apiBase: {site.url}/v1",
            f"    apiKey: {key}",
            "    roles: [chat, edit, apply]",
        ]
    return "\n".join(lines)


def _zed(site: _Site) -> str:
    return _json(
        {
            "language_models": {
                "openai_compatible": {
                    "llmrun": {
                        "api_url": f"{site.url}/v1",
                        "available_models": [
                            {"name": name, "display_name": name, "max_tokens": 8192}
                            for name in site.models
                        ],
                    }
                }
            }
        }
    )


def _aider(site: _Site) -> str:
    variables = _exports(OPENAI_API_BASE=f"{site.url}/v1", OPENAI_API_KEY=site.shell_key)
    return f"{variables}\naider --model {shlex.quote(f'openai/{site.model}')}"


def _codex(site: _Site) -> str:
    key = [f'env_key = "{_VARIABLE}"'] if site.has_key else []
    return "\n".join(
        [
            f"model = {json.dumps(site.model)}",
            'model_provider = "llmrun"',
            "",
            "[model_providers.llmrun]",
            'name = "llmrun"',
            f'base_url = "{site.url}/v1"',
            'wire_api = "responses"',
            *key,
        ]
    )


def _open_webui(site: _Site) -> str:
    return _exports(
        OPENAI_API_BASE_URL=f"{site.url}/v1",
        OPENAI_API_KEY=site.shell_key,
        ENABLE_OLLAMA_API="false",
    )


def _openai_python(site: _Site) -> str:
    return f'''\
{site.python_import}from openai import OpenAI

client = OpenAI(base_url="{site.url}/v1", api_key={site.python_key})
answer = client.chat.completions.create(
    model={json.dumps(site.model)},
    messages=[{{"role": "user", "content": "Hi!"}}],
)
print(answer.choices[0].message.content)'''


def _anthropic_python(site: _Site) -> str:
    return f'''\
{site.python_import}from anthropic import Anthropic

client = Anthropic(base_url="{site.url}", api_key={site.python_key})
answer = client.messages.create(
    model={json.dumps(site.model)},
    max_tokens=256,
    messages=[{{"role": "user", "content": "Hi!"}}],
)
print(answer.content[0].text)'''


def _ollama_python(site: _Site) -> str:
    headers = ""
    if site.has_key:
        headers = f', headers={{"Authorization": "Bearer " + {site.python_key}}}'
    return f'''\
{site.python_import}from ollama import Client

client = Client(host="{site.url}"{headers})
answer = client.chat(
    model={json.dumps(site.model)},
    messages=[{{"role": "user", "content": "Hi!"}}],
)
print(answer.message.content)'''


def _curl(site: _Site) -> str:
    body = {"model": site.model, "messages": [{"role": "user", "content": "Hi!"}]}
    key = f' \\\n  -H "Authorization: Bearer ${_VARIABLE}"' if site.has_key else ""
    return (
        f"curl {site.url}/v1/chat/completions{key} \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}"
    )


def _environment(site: _Site) -> str:
    return _exports(
        OPENAI_BASE_URL=f"{site.url}/v1",
        OPENAI_API_KEY=site.shell_key,
        ANTHROPIC_BASE_URL=site.url,
        ANTHROPIC_AUTH_TOKEN=site.shell_key,
        OLLAMA_HOST=site.url,
    )


@dataclass(frozen=True, slots=True)
class _Client:
    words: str
    write: Callable[[_Site], str]


_CLIENTS = {
    "claude-code": _Client("variables for the shell", _claude_code),
    "codex": _Client("~/.codex/config.toml", _codex),
    "opencode": _Client("opencode.json", _opencode),
    "continue": _Client("~/.continue/config.yaml", _continue),
    "zed": _Client("settings.json", _zed),
    "aider": _Client("variables for the shell", _aider),
    "open-webui": _Client("variables for the shell", _open_webui),
    "openai-python": _Client("a program", _openai_python),
    "anthropic-python": _Client("a program", _anthropic_python),
    "ollama-python": _Client("a program", _ollama_python),
    "curl": _Client("a command", _curl),
    "env": _Client("variables that most clients read", _environment),
}
