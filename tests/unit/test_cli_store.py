"""The store commands: list, show, rm, verify, prune, search, pull of what is here; and config."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llmrun.cli.services import Services
from llmrun.errors import HubUnreachableError
from llmrun.hub.types import SearchHit
from tests.fakes.cli import COMMIT, Cli, model_bytes
from tests.fakes.fake_engine import FakeEngine

# ---- list


def test_list_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    run = Cli(tmp_path)("list")
    assert run.code == 0 and run.out == "" and "llmrun pull" in run.err


def test_list_shows_models_and_partials(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    cli.store_partial()
    run = cli("list")
    assert run.code == 0
    head, half, tiny = run.out.splitlines()
    assert head.split() == ["model", "size", "quant", "context", "last", "used", "where"]
    assert half.startswith("org/half-GGUF") and "partial" in half and "5.00 kB" in half
    assert tiny.split() == ["org/tiny-GGUF:Q8_0", *_size(link), "Q8_0", "2K", "never", "hub-cache"]


def _size(path: Path) -> list[str]:
    from llmrun.text import format_bytes

    return format_bytes(path.stat().st_size).split()


def test_list_json(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    data = cli("list", "--json").data
    assert set(data) == {"models", "total_size"}
    (row,) = data["models"]
    content = link.read_bytes()
    assert row == {
        "model": "org/tiny-GGUF:Q8_0", "repo": "org/tiny-GGUF", "quant": "Q8_0",
        "size": len(content), "context": 2048, "last_used": None, "age_s": None,
        "state": "complete", "origin": "hub-cache", "commit": COMMIT, "path": str(link),
        "files": [{"path": link.name, "size": len(content),
                   "sha256": hashlib.sha256(content).hexdigest()}],
    }  # fmt: skip


def test_quiet_list_is_names_only(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model()
    assert cli("list", "-q").out == "org/tiny-GGUF:Q8_0\n"


def test_list_reads_each_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    assert cli("list", "--json").data["models"][0]["context"] == 2048

    def fail(paths: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("llmrun.gguf.info.read_info", fail)
    assert cli("list", "--json").data["models"][0]["context"] == 2048
    monkeypatch.undo()
    (tmp_path / "cache" / "contexts.json").write_text('{"x": [1]} junk')
    assert cli("list", "--json").data["models"][0]["context"] == 2048
    link.resolve().write_bytes(model_bytes(n_ctx_train=4096))
    assert cli("list", "--json").data["models"][0]["context"] == 4096


def test_a_use_is_recorded(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model()
    assert cli("run", "org/tiny-GGUF", "Hi", "--offline").code == 0
    (row,) = cli("list", "--json").data["models"]
    assert row["last_used"] is not None and row["age_s"] > 0


# ---- show


def test_show_a_file(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model(metadata={"general.sampling.temp": 0.5})
    run = cli("show", model)
    assert run.code == 0
    for words in ("llama", "2048 tokens", "Q8_0", "apache-2.0", "yes", "temperature 0.5"):
        assert words in run.out
    data = cli("show", model, "--json").data
    size = Path(model).stat().st_size
    assert data["path"] == model and data["files"][0]["size"] == size
    assert data["has_template"] is True and data["layers"] == 2 and data["vocabulary"] == 512


def test_show_gives_the_catalogs_published_figures(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model("unsloth/gemma-4-E4B-it-GGUF", "gemma-4-E4B-it-Q4_K_M.gguf")
    data = cli("show", "gemma-4-e4b", "--json", "--offline").data
    assert data["requirements"] and data["requirements"][0]["source"]
    assert "tools" in data["capabilities"] or "vision" in data["capabilities"]
    assert data["origin"] == "cache" and data["commit"] == COMMIT


def test_show_of_an_unknown_name(tmp_path: Path) -> None:
    run = Cli(tmp_path)("show", "gema-4-e4b")
    assert run.code == 3 and "did you mean gemma-4-e4b" in run.err and run.out == ""


def test_show_of_a_damaged_file(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = Path(cli.model())
    path.write_bytes(path.read_bytes()[:2000])
    run = cli("show", str(path), "--json")
    assert run.code == 7 and run.envelope["errors"][0]["code"] == "bad_gguf"


# ---- rm


def test_rm_asks_on_a_terminal(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    run = cli("rm", "org/tiny-GGUF:q8_0", tty=True, stdin="n\n")
    assert run.code == 0 and "Remove org/tiny-GGUF:Q8_0" in run.err and link.exists()
    run = cli("rm", "org/tiny-GGUF:q8_0", tty=True, stdin="y\n")
    assert run.code == 0 and not link.exists() and "freed" in run.err


def test_rm_without_a_terminal_needs_yes(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    run = cli("rm", "org/tiny-GGUF:Q8_0", stdin="y\n")
    assert run.code == 2 and "--yes" in run.err and link.exists()
    assert cli("rm", "org/tiny-GGUF:Q8_0", "--json").code == 2
    size = link.stat().st_size
    run = cli("rm", "org/tiny-GGUF:Q8_0", "--yes", "--json")
    assert run.code == 0 and not link.exists()
    assert run.data == {
        "models": [{"model": "org/tiny-GGUF:Q8_0", "size": size, "state": "complete"}],
        "freed": size,
    }  # fmt: skip


def test_rm_removes_one_quant_and_never_guesses(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    one = cli.store_model(name="tiny-Q8_0.gguf")
    two = cli.store_model(name="tiny-F16.gguf", file_type=1)
    run = cli("rm", "org/tiny-GGUF", "--yes")
    assert run.code == 2 and "2 models" in run.err and "--all" in run.err
    assert cli("rm", "org/tiny-GGUF:f16", "--yes").code == 0
    assert one.exists() and not two.exists()
    assert cli("rm", "org/tiny-GGUF", "--all", "--yes").code == 0
    assert not one.exists()


def test_rm_by_catalog_name(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    default = cli.store_model("unsloth/gemma-4-E4B-it-GGUF", "gemma-4-E4B-it-Q4_K_M.gguf")
    other = cli.store_model("unsloth/gemma-4-E4B-it-GGUF", "gemma-4-E4B-it-Q8_0.gguf", seed=2)
    assert cli("rm", "gemma-4-e4b", "--yes").code == 0
    assert other.exists() and not default.exists()
    assert cli("rm", "gemma-4-e4b:q8_0", "--yes").code == 0
    assert not other.exists()


def test_rm_of_a_partial(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = cli.store_partial()
    assert cli("rm", "org/half-GGUF", "--yes").code == 0
    assert not path.exists()


def test_rm_leaves_files_of_the_users_own_alone(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    run = cli("rm", model, "--yes")
    assert run.code == 3 and Path(model).exists() and "your own" in run.err


@pytest.mark.parametrize("command", ["rm", "verify"])
def test_unknown_models_are_not_found(command: str, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model()
    run = cli(command, "org/tiny-GGUF:q9")
    assert run.code in (2, 3) and run.err.startswith("error: ")
    run = cli(command, "org/tinny-GGUF")
    assert run.code == 3 and "did you mean org/tiny-GGUF:Q8_0" in run.err


# ---- verify


def test_verify_finds_a_flipped_byte(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    run = cli("verify", "--offline")
    assert run.code == 0 and run.out.startswith("ok ")
    content = bytearray(link.read_bytes())
    content[-1] ^= 1
    link.resolve().write_bytes(content)
    run = cli("verify", "org/tiny-GGUF:Q8_0")
    assert run.code == 7 and run.out.startswith("DAMAGED") and "sha256" in run.err
    run = cli("verify", "--json")
    assert run.code == 7 and run.envelope["status"] == "error"
    (model,) = run.data["models"]
    assert set(model) == {"model", "ok", "header", "files"} and model["ok"] is False
    (file,) = model["files"]
    assert file["ok"] is False and file["expected"] == link.resolve().name
    assert file["actual"] == hashlib.sha256(content).hexdigest()


def test_verify_finds_a_dead_link_and_skips_partials(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_partial()
    cli.store_model().resolve().unlink()
    run = cli("verify")
    assert run.code == 7 and "DAMAGED" in run.out and "unfinished, skipped" in run.err


# ---- prune


def test_prune(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    partial = cli.store_partial()
    run = cli("prune", "--dry-run")
    assert run.code == 0 and partial.exists() and partial.name in run.out
    data = cli("prune", "--dry-run", "--json").data
    assert set(data) == {"files", "total", "freed", "dry_run"}
    assert data["files"][0]["kind"] == "partial" and data["freed"] == 0
    assert cli("prune").code == 2 and partial.exists()
    assert cli("prune", tty=True, stdin="\n").code == 0 and partial.exists()
    run = cli("prune", "--yes", "--json")
    assert run.code == 0 and run.data["freed"] > 0
    assert not partial.exists() and link.exists()
    assert "nothing to prune" in cli("prune", "--yes").err


# ---- pull


def test_pull_of_a_local_file_prints_its_path(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    assert cli("pull", model).out == f"{model}\n"
    (row,) = cli("pull", model, "--json").data["models"]
    assert row["path"] == model and row["downloaded"] is False
    assert row["fit"]["verdict"] == "fits" and row["fit"]["reasons"]


def test_pull_goes_on_after_a_bad_name(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    run = cli("pull", "no-such-model-at-all", model)
    assert run.code == 3 and run.out == f"{model}\n" and "no-such-model-at-all" in run.err


def test_pull_offline_of_a_missing_model(tmp_path: Path) -> None:
    run = Cli(tmp_path)("pull", "org/name", "--offline", "--json")
    assert run.code == 6 and run.envelope["errors"][0]["code"] == "hub_unreachable"
    run = Cli(tmp_path)("pull", "smollm2-135m", "--offline")
    assert run.code == 6 and "--offline" in run.err


# ---- search


class _Hub:
    def search(self, text: str, limit: int) -> tuple[SearchHit, ...]:
        if text == "down":
            raise HubUnreachableError("no answer")
        hit = SearchHit(
            "org/x-GGUF", 1234, 5, "2026-01-02", 8_000_000_000, "llama", 8192, True,
            (("Q2_K", 3 * 10**9), ("Q4_K_M", 5 * 10**9), ("Q8_0", 9 * 10**9), ("F16", None)),
        )  # fmt: skip
        return (hit,) * min(limit, 2)


def test_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Services, "hub", lambda self, *, offline: _Hub())
    cli = Cli(tmp_path)
    run = cli("search", "llama", "8b")
    assert run.code == 0 and run.out.count("org/x-GGUF (gated)") == 2
    assert "Q2_K 3.00 GB, Q4_K_M 5.00 GB, Q8_0 9.00 GB" in run.out and "8B" in run.out
    data = cli("search", "llama", "--limit", "1", "--json").data
    (row,) = data["repos"]
    assert set(row) == {
        "repo", "downloads", "likes", "updated", "params", "architecture", "context", "gated",
        "quants",
    }  # fmt: skip
    assert row["quants"][3] == {"quant": "F16", "size": None}
    assert cli("search", "down").code == 6
    assert cli("search", "x", "--offline").code == 6
    assert cli("search", "x", "--limit", "0").code == 2


# ---- config


def test_config_shows_values_with_their_sources(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = cli.write_config("ctx = 1000\n")
    cli.environ["LLMRUN_SEED"] = "4"
    run = cli("config", "--json")
    rows = {row["key"]: row for row in run.data["settings"]}
    assert rows["ctx"] == {"key": "ctx", "value": 1000, "source": "file", "origin": str(path)}
    assert rows["seed"]["source"] == "environment" and rows["seed"]["origin"] == "LLMRUN_SEED"
    assert rows["json"]["source"] == "flag"
    assert rows["top_p"] == {"key": "top_p", "value": None, "source": "default", "origin": None}
    text = cli("config").out
    assert "1000" in text and "environment LLMRUN_SEED" in text


def test_config_set_unset_path(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = cli.write_config("# mine\n")
    assert cli("config", "path").out == f"{path}\n"
    assert cli("config", "set", "max-tokens", "99").code == 0
    assert cli("config", "set", "ctx", "auto").code == 0
    assert path.read_text() == '# mine\nmax_tokens = 99\nctx = "auto"\n'
    run = cli("config", "set", "ctx", "few")
    assert run.code == 2 and "few" in run.err
    assert cli("config", "set", "nonsense", "1").code == 2
    assert cli("config", "unset", "ctx").code == 0
    assert path.read_text() == "# mine\nmax_tokens = 99\n"


def test_a_broken_config_file_can_still_be_found(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = cli.write_config("ctx = = 1\n")
    run = cli("list")
    assert run.code == 2 and str(path) in run.err
    assert cli("config", "path").code == 0
    assert cli("--version").code == 0


def test_config_file_and_environment_reach_a_run(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine())
    cli.write_config("temperature = 0.25\nstop = ['X']\nsystem = 'From the file.'\n")
    cli.environ |= {"LLMRUN_TOP_K": "11", "LLMRUN_JSON": "1"}
    run = cli("run", cli.model(), "Hi")
    assert json.loads(run.out)["status"] == "ok"
    request = cli.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_k) == (0.25, 11)
    assert request.stop == ("X",) and "From the file." in cli.engine.prompt_text()


def test_config_lists_can_be_changed_and_removed(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = cli.write_config('stop = ["a, ]", "b"]  # mine\nseed = 1\n')
    assert cli("config", "set", "stop", "# c").code == 0
    assert path.read_text() == 'stop = ["# c"]  # mine\nseed = 1\n'
    assert cli("config", "unset", "stop").code == 0
    assert path.read_text() == "seed = 1\n"


def test_a_dashed_key_in_the_config_file_counts(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.write_config("max-tokens = 7\n")
    rows = {row["key"]: row for row in cli("config", "--json").data["settings"]}
    assert rows["max_tokens"]["value"] == 7 and rows["max_tokens"]["source"] == "file"


def test_a_stored_model_with_a_broken_header_says_how_to_mend_it(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    link.resolve().write_bytes(b"XXXX" + link.read_bytes()[4:])
    name = "org/tiny-GGUF:Q8_0"
    for command in (["run", name, "Hi"], ["show", name], ["verify", name]):
        run = cli(*command)
        assert run.code == 7
        assert f"try: llmrun rm {name} --yes && llmrun pull {name}\n" in run.err


def test_a_question_nobody_can_answer_gives_the_command_that_asks_nothing(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model()
    cli.store_partial()
    run = cli("rm", "org/tiny-GGUF:Q8_0")
    assert "try: llmrun rm --yes org/tiny-GGUF:Q8_0\n" in run.err
    assert "try: llmrun prune --yes\n" in cli("prune").err
