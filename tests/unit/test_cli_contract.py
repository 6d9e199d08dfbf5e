"""What scripts may rely on: the envelope's keys, each command's data keys, and the exit codes.

A change here breaks users: it needs a line in the change log.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llmrun import errors
from llmrun.cli import bench_result, doctor, prune, pull, rm, run, search, show, verify
from llmrun.cli import list as list_verb
from llmrun.cli.config import ConfigChangeResult, ConfigPathResult, ConfigResult, SettingRow
from llmrun.ui.output import Result
from tests.fakes.cli import Cli

KEYS = {
    run.RunResult: "model text thinking finish_reason usage timings",
    run.UsageData: "prompt_tokens completion_tokens cached_tokens drafted_tokens accepted_tokens",
    run.TimingsData: "load_s ttft_s prompt_tok_s decode_tok_s",
    pull.PullResult: "models",
    pull.PulledModel: "model path files size quant commit origin downloaded fit",
    pull.FileRow: "path size sha256",
    pull.FitData: "verdict n_ctx needed_bytes available_bytes source tok_s reasons",
    list_verb.ListResult: "models total_size",
    list_verb.ModelRow: "model repo quant size context last_used age_s state origin commit path "
    "files",
    show.ShowResult: "model title path files size origin repo commit quant quant_mix architecture "
    "kind params params_active layers context embedding vocabulary sliding_window experts "
    "experts_used has_template capabilities licence gated sampling requirements projector drafter "
    "alternatives unverified notes",
    show.MixRow: "type size",
    show.RequirementRow: "quant memory_gb source",
    show.ChoiceRow: "tag size",
    rm.RemoveResult: "models freed",
    rm.RemovedRow: "model size state",
    verify.VerifyResult: "models",
    verify.VerifiedModel: "model ok header files",
    verify.VerifiedFile: "path local_path size expected actual ok",
    prune.PruneResult: "files total freed dry_run",
    prune.PruneRow: "path repo kind size age_s",
    search.SearchResult: "repos",
    search.SearchRow: "repo downloads likes updated params architecture context gated quants",
    search.QuantRow: "quant size",
    doctor.DoctorResult: "checks machine build",
    doctor.Check: "name status detail hint",
    doctor.MachineData: "name platform arch cpu memory devices",
    doctor.CpuData: "name logical usable cores quota threads features",
    doctor.MemoryData: "total available source",
    doctor.DeviceData: "name description backend free total shared",
    doctor.BuildData: "llmrun python binding llama_cpp backends features path",
    bench_result.BenchResult: "runs comparison profile report",
    bench_result.BenchHistoryResult: "runs",
    bench_result.BenchCompareResult: "a b rows differences",
    bench_result.CompareRow: "name unit a b ratio low high verdict note",
    bench_result.DifferenceRow: "what a b",
    bench_result.ProfileData: "threads threads_batch ubatch kv_type speculative gain path",
    ConfigResult: "path settings",
    SettingRow: "key value source origin",
    ConfigPathResult: "path exists",
    ConfigChangeResult: "path key value",
}


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_keys_of_json_data(kind: type) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == KEYS[kind].split()
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_every_result_of_a_command_is_pinned() -> None:
    modules = (run, pull, list_verb, show, rm, verify, prune, search, doctor, bench_result)
    for module in modules:
        for value in vars(module).values():
            is_own = isinstance(value, type) and value.__module__ == module.__name__
            if is_own and dataclasses.is_dataclass(value):
                assert value in KEYS, value
    assert all(issubclass(k, Result) for k in KEYS if k.__name__.endswith("Result"))


def test_exit_codes_of_errors() -> None:
    assert {cls.__name__: (cls.exit_code, cls.code) for cls in vars(errors).values()
            if isinstance(cls, type) and issubclass(cls, errors.LlmrunError)} == {
        "LlmrunError": (1, "failed"),
        "UsageError": (2, "usage"),
        "NotFoundError": (3, "not_found"),
        "AuthError": (4, "auth_required"),
        "WillNotFitError": (5, "will_not_fit"),
        "DiskFullError": (5, "disk_full"),
        "HubUnreachableError": (6, "hub_unreachable"),
        "DamagedFileError": (7, "damaged"),
        "GgufError": (7, "bad_gguf"),
        "ContextOverflowError": (1, "context_length_exceeded"),
        "EngineError": (1, "engine"),
        "EngineStoppedError": (1, "engine"),
        "ServerError": (1, "server"),
        "ServerUnreachableError": (6, "server_unreachable"),
        "TemplateError": (1, "template"),
    }  # fmt: skip


def test_envelope_of_success_and_of_failure(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    for arguments in (["list"], ["prune"], ["verify"], ["config"], ["show", "nothing-like-it"]):
        envelope = cli(*arguments, "--json").envelope
        assert list(envelope) == ["llmrun", "command", "status", "data", "errors"]
        assert envelope["llmrun"] == 1 and envelope["command"] == arguments[0]
        assert envelope["status"] == ("error" if envelope["errors"] else "ok")
        for error in envelope["errors"]:
            assert list(error) == ["code", "message", "hint"]


@pytest.mark.parametrize(
    "arguments",
    [["list", "--bad"], ["rum"], ["run"], ["run", "a", "b", "c"], ["config", "sett"],
     ["list", "--ctx", "1"], ["run", "x", "y", "--ctx"]],
)  # fmt: skip
def test_wrong_usage_is_2_as_text_and_as_json(arguments, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    text = cli(*arguments)
    assert text.code == 2 and text.out == ""
    lines = text.err.splitlines()
    assert lines[0].startswith("error: ") and lines[-1].startswith("try: llmrun")
    assert len(lines) <= 4
    as_json = cli(*arguments, "--json")
    assert as_json.code == 2 and as_json.err == ""
    assert as_json.envelope["errors"][0]["code"] == "usage"
    cli.environ["LLMRUN_JSON"] = "true"
    assert json.loads(cli(*arguments).out)["status"] == "error"


def test_a_mistyped_command_gets_the_close_one(tmp_path: Path) -> None:
    assert "Did you mean 'pull'?" in Cli(tmp_path)("pul").err


def test_json_after_two_dashes_is_text(tmp_path: Path) -> None:
    run_ = Cli(tmp_path)("list", "--bad", "--", "--json")
    assert run_.code == 2 and run_.out == ""


def test_help_and_version(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    bare = cli()
    assert bare.code == 2 and bare.out.startswith("Usage: llmrun")
    asked = cli("--help")
    assert asked.code == 0 and asked.out == bare.out and asked.err == ""
    for command in [
        "pull",
        "fit",
        "run",
        "chat",
        "bench",
        "list",
        "show",
        "search",
        "rm",
        "verify",
        "prune",
        "doctor",
        "config",
    ]:
        assert f"\n  {command} " in asked.out
        own = cli(command, "--help")
        assert own.code == 0 and own.out.startswith(f"Usage: llmrun {command}")
        for flag in ("--json", "--quiet", "--verbose", "--offline", "--yes"):
            assert flag in own.out
    version = cli("--version")
    assert version.code == 0 and version.out.startswith("llmrun ") and version.out.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "chat", "pull", "bench"])
def test_shared_load_flags(command: str, tmp_path: Path) -> None:
    out = Cli(tmp_path)(command, "--help").out
    flags = ["ctx", "gpu-layers", "kv-type", "flash-attn", "speculative", "threads", "force"]
    for flag in [*flags, "cpu-moe", "tensor-split", "ubatch"]:
        assert f"--{flag} " in out


def test_a_table_of_help_lines_is_not_cut(tmp_path: Path) -> None:
    commands = Cli(tmp_path)("--help").out.partition("Commands:")[2]
    assert "..." not in commands


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "x", "Hi", "--top-p", "7"], "llmrun run --help"),
        (["config", "set", "ctx", "few"], "llmrun config set --help"),
        (["run", "x", "--json-schema", "{}", "--grammar", "g", "Hi"], "llmrun run --help"),
    ],
)
def test_wrong_usage_always_says_what_to_try(arguments, hint, tmp_path: Path) -> None:
    (error,) = Cli(tmp_path)(*arguments, "--json").envelope["errors"]
    assert error["code"] == "usage" and error["hint"] == hint


def test_a_bad_value_says_how_to_get_rid_of_it(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.environ["LLMRUN_SEED"] = "x"
    assert "try: unset LLMRUN_SEED\n" in cli("list").err
    del cli.environ["LLMRUN_SEED"]
    for text, key in (('seed = "x"', "seed"), ("nonsense = 1", "nonsense")):
        path = cli.write_config(f"{text}\ntop_k = 3\n")
        assert f"try: llmrun config unset {key}\n" in cli("list").err
        assert cli("config", "unset", key).code == 0
        assert path.read_text() == "top_k = 3\n" and cli("list").code == 0


def test_the_envelope_names_the_subcommand_also_when_a_word_is_missing(tmp_path: Path) -> None:
    assert Cli(tmp_path)("config", "set", "--json").envelope["command"] == "config set"
