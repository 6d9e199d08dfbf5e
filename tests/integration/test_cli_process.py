"""The program as a process: what it imports, signals, pipes, completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.cli import Cli, model_bytes

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "llama_cpp", "huggingface_hub", "httpx", "httpx2", "prompt_toolkit", "jinja2", "numpy",
    "rich.markdown", "rich.console", "pydantic", "fastapi", "psutil",
)  # fmt: skip


def make_environ(folder: Path, **more: str) -> dict[str, str]:
    kept = {k: os.environ[k] for k in ("PATH", "LANG", "SYSTEMROOT") if k in os.environ}
    dirs = {f"XDG_{n}_HOME": str(folder / n.lower()) for n in ("CONFIG", "STATE", "DATA", "CACHE")}
    return kept | dirs | {
        "HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "PYTHONPATH": str(ROOT),
        "COLUMNS": "100", "HF_HUB_OFFLINE": "1",
    } | more  # fmt: skip


def llmrun(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environ = make_environ(folder, **options.pop("environ", {}))
    return subprocess.run(
        [sys.executable, "-m", "llmrun", *arguments], env=environ, capture_output=True, text=True,
        timeout=120, stdin=options.pop("stdin", subprocess.DEVNULL), check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["run", "--help"], ["chat", "--help"], ["config"], ["nonsense"]],
    ids=" ".join,
)
def test_what_must_be_fast_imports_nothing_heavy(arguments, tmp_path: Path) -> None:
    allowed = {"rich.console"} if arguments == ["config"] else set()
    code = (
        "import sys; from llmrun.__main__ import main\n"
        f"main({arguments!r})\n"
        f"found = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "print('\\nFOUND', *found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=make_environ(tmp_path), capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    found = set(done.stdout.splitlines()[-1].split()[1:])
    assert found <= allowed


def test_a_stored_model_runs_without_the_hubs_library(tmp_path: Path) -> None:
    Cli(tmp_path).store_model()
    code = (
        "import sys; from llmrun.__main__ import main\n"
        "code = main(['run', 'org/tiny-GGUF', 'Hi', '--max-tokens', '2'])\n"
        "print('\\nFOUND', code, *[m for m in ('huggingface_hub', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=make_environ(tmp_path), capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].split() == ["FOUND", "0"], done.stderr


def test_a_real_answer_is_bare_text(tmp_path: Path) -> None:
    Cli(tmp_path).store_model()
    words = ["run", "org/tiny-GGUF", "Hi", "--max-tokens", "8", "--temperature", "0"]
    first, second = llmrun(tmp_path, *words), llmrun(tmp_path, *words, "--json")
    assert first.returncode == 0 and first.stderr == "" and "\x1b" not in first.stdout
    data = json.loads(second.stdout)["data"]
    assert first.stdout.rstrip("\n") == data["text"].rstrip("\n")
    assert data["usage"]["completion_tokens"] <= 8 and data["timings"]["load_s"] > 0


def test_json_schema_output_parses(tmp_path: Path) -> None:
    Cli(tmp_path).store_model()
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    done = llmrun(tmp_path, "run", "org/tiny-GGUF", "Hi", "--json-schema", schema, "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["ok"], bool)


def test_no_color_and_no_terminal_mean_no_escapes(tmp_path: Path) -> None:
    done = llmrun(tmp_path, "run", "no-such-model", "Hi")
    assert done.returncode == 3 and done.stderr.startswith("error: ") and "\x1b" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(model_bytes(n_ctx_train=32768))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrun", "run", str(tmp_path / "tiny.gguf"), "Hi",
         "--logit-bias", "2=ban", "--logit-bias", "4=ban"],
        env=make_environ(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.read(1)  # it is in the middle of its answer
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err and (first + out).endswith(b"\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_that_is_ended_keeps_what_was_said(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(model_bytes(n_ctx_train=32768))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrun", "chat", str(tmp_path / "tiny.gguf"),
         "--logit-bias", "2=ban", "--logit-bias", "4=ban"],
        env=make_environ(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Traceback" not in err
    (saved,) = tmp_path.rglob("sessions/*.json")
    question, answer = json.loads(saved.read_text("utf-8"))["messages"]
    assert question["content"] == "Hi" and answer["interrupted"] and answer["content"]


def test_a_reader_that_leaves_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(model_bytes(n_ctx_train=32768))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrun", "run", str(tmp_path / "tiny.gguf"), "Hi",
         "--logit-bias", "2=ban", "--logit-bias", "4=ban"],
        env=make_environ(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1 and err == b""


def test_completion_of_model_names(tmp_path: Path) -> None:
    Cli(tmp_path).store_model()
    environ = {"_LLMRUN_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for words, expected in (
        ("llmrun run org/", ["org/tiny-GGUF:Q8_0"]),
        ("llmrun run smollm2-1", None),
        ("llmrun rm gemma", []),
        ("llmrun pu", ["pull"]),
    ):
        cword = str(len(words.split()) - 1)
        done = llmrun(tmp_path, environ=environ | {"COMP_WORDS": words, "COMP_CWORD": cword})
        names = done.stdout.split()
        assert done.returncode == 0 and done.stderr == ""
        assert names == expected if expected is not None else "smollm2-135m" in names


def test_completion_survives_a_broken_store(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("not a folder")
    environ = {"_LLMRUN_COMPLETE": "complete_bash", "COMP_CWORD": "2",
               "COMP_WORDS": "llmrun run smollm2-1"}  # fmt: skip
    done = llmrun(tmp_path, environ=environ)
    assert done.returncode == 0 and done.stderr == ""


def test_show_completion_prints_a_script(tmp_path: Path) -> None:
    done = llmrun(tmp_path, "--show-completion", "bash",
                  environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})  # fmt: skip
    assert done.returncode == 0 and "_LLMRUN_COMPLETE" in done.stdout


def test_closed_streams_are_no_trouble(tmp_path: Path) -> None:
    for redirect in ("<&-", ">&-", "2>&-"):
        done = subprocess.run(
            f'"{sys.executable}" -m llmrun config path {redirect}', shell=True,
            env=make_environ(tmp_path), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == "", redirect
