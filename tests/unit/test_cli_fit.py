"""`llmrun fit`: the table, its JSON, other machines, and what it says when little is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmrun.catalog.entries import Catalog
from llmrun.catalog.load import load_catalog
from llmrun.cli import fit_result
from llmrun.errors import AuthError, HubUnreachableError
from llmrun.fit.formula import estimate
from llmrun.fit.types import Allocator, BufferUse, Measurement, Setup
from llmrun.gguf.types import ByteSource, ModelInfo
from llmrun.hardware.machine import Machine
from llmrun.hub.types import RemoteFile, RepoListing
from llmrun.text import format_speed
from llmrun.ui.output import Result
from tests.fakes.cli import Cli, FakeServices, Run
from tests.fakes.header_hub import HeaderHub

QUANTS = ("q2_k", "q4_k_m", "q6_k", "q8_0")
REPO = "org/tall-GGUF"

KEYS = {
    fit_result.FitResult: "machine model rows notes advice",
    fit_result.FitRow: "quant model size n_ctx verdict settings memory source tok_s recommended "
    "reasons",
    fit_result.MemoryData: "device weights kv compute overhead free total",
    fit_result.SettingsData: "n_ctx type_k type_v flash_attn n_gpu_layers n_cpu_moe tensor_split "
    "n_ubatch use_mmap use_repack n_threads",
    fit_result.MachineData: "name cpu cores ram_total ram_free devices notes",
    fit_result.DeviceData: "device description memory free total",
    fit_result.ModelData: "model title repo commit origin architecture params params_active layers "
    "experts context",
    fit_result.RankResult: "machine models notes",
    fit_result.RankRow: "model title quant size params params_active verdict needed source tok_s "
    "recommended command reasons",
}


class Measuring:
    """Answers as the closed form does."""

    devices: tuple[str, ...] = ()
    problem: str | None = None

    def __init__(self, info: ModelInfo) -> None:
        self._info = info

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        answers = []
        for setup in setups:
            need = estimate(self._info, setup)
            use = BufferUse("CPU", "CPU", need.weights_bytes, need.kv_bytes, need.compute_bytes)
            answers.append(Measurement(setup, (use,)))
        return tuple(answers)


class ExactServices(FakeServices):
    """Services whose allocators answer."""

    def allocator_of_headers(
        self,
        headers: Sequence[tuple[str, bytes, int]],
        info: ModelInfo | None,
        machine: Machine,
    ) -> Allocator:
        super().allocator_of_headers(headers, info, machine)
        assert info is not None
        return Measuring(info)

    def allocator_of_files(
        self, paths: Sequence[Path], info: ModelInfo, machine: Machine
    ) -> Allocator:
        return Measuring(info)


def tall(folder: Path, shape: str = "gemma-4-e4b", quants: Sequence[str] = QUANTS) -> Cli:
    hub = HeaderHub(shape, quants, repo=REPO)
    return Cli(folder, hub=hub, services=ExactServices)  # type: ignore[arg-type]


def rows_of(run: Run) -> list[dict]:
    assert run.code == 0, run.err
    return run.data["rows"]


# ---- JSON


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_keys_of_json_data(kind: type) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == KEYS[kind].split()
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if kind.__name__.endswith("Result"):
        assert issubclass(kind, Result)


def test_rows_for_every_quant_and_context(tmp_path: Path) -> None:
    run = tall(tmp_path)("fit", REPO, "--machine", "rtx-3060-12gb", "--json")
    rows = rows_of(run)
    for quant in QUANTS:
        contexts = [row["n_ctx"] for row in rows if row["quant"] == quant.upper()]
        assert {4096, 8192, 32768, 131072} <= set(contexts) and contexts == sorted(contexts)
    (best,) = [row for row in rows if row["recommended"]]
    assert (best["quant"], best["verdict"]) == ("Q4_K_M", "fits")
    assert best["model"] == f"{REPO}:Q4_K_M"
    assert best["source"] == "exact" and best["reasons"]
    low, high = best["tok_s"]
    assert 0 < low < high
    ram, gpu = best["memory"]
    assert (ram["device"], gpu["device"]) == ("RAM", "CUDA0")
    assert gpu["total"] == 12 << 30 and gpu["free"] == 11 << 30
    assert 0 < gpu["kv"] < gpu["weights"] and all(value >= 0 for value in list(gpu.values())[1:])
    assert best["settings"]["n_gpu_layers"] == -1
    assert run.data["machine"]["name"] == "rtx-3060-12gb"
    assert run.data["model"]["architecture"] == "gemma4"
    assert {row["verdict"] for row in rows} <= set(fit_result.VERDICTS)
    other = next(row for row in rows if row["quant"] == "Q8_0")
    assert other["model"] == f"{REPO}:Q8_0"


def test_ctx_limits_the_rows(tmp_path: Path) -> None:
    rows = rows_of(tall(tmp_path)("fit", REPO, "--ctx", "16384", "--json"))
    assert [row["n_ctx"] for row in rows] == [16384] * len(QUANTS)
    assert sum(row["recommended"] for row in rows) == 1


def test_a_tag_or_quant_limits_the_rows(tmp_path: Path) -> None:
    cli = tall(tmp_path)
    for arguments in ([f"{REPO}:q6_k"], [REPO, "--quant", "Q6_K"], [REPO, "--quant", "q6-k"]):
        rows = rows_of(cli("fit", *arguments, "--json"))
        assert {row["quant"] for row in rows} == {"Q6_K"}
        assert {row["model"] for row in rows} == {f"{REPO}:Q6_K"}
        assert {row["source"] for row in rows} == {"exact"}


def test_load_options_are_kept(tmp_path: Path) -> None:
    options = ["--kv-type", "q8_0", "--gpu-layers", "7", "--ubatch", "256", "--threads", "3"]
    rows = rows_of(tall(tmp_path)("fit", REPO, "--machine", "rtx-4090-24gb", *options, "--json"))
    for row in rows:
        settings = row["settings"]
        assert (settings["type_k"], settings["type_v"]) == ("q8_0", "q8_0")
        assert (settings["n_gpu_layers"], settings["n_ubatch"]) == (7, 256)
        assert settings["n_threads"] == 3


def test_unified_memory_is_one(tmp_path: Path) -> None:
    rows = rows_of(tall(tmp_path)("fit", REPO, "--machine", "m4-max-64gb", "--json"))
    assert all(len(row["memory"]) == 1 for row in rows)


def test_memory_replaces_what_there_is(tmp_path: Path) -> None:
    cli = tall(tmp_path)
    small = cli("fit", REPO, "--memory", "3GiB", "--json")
    assert small.data["machine"]["ram_total"] == 3 << 30
    assert {row["verdict"] for row in rows_of(small)} == {"no"}
    large = cli("fit", REPO, "--memory", "64GiB", "--json")
    assert {row["verdict"] for row in rows_of(large)} == {"fits"}
    apple = cli("fit", REPO, "--machine", "m4-max-64gb", "--memory", "32GiB", "--json")
    (device,) = apple.data["machine"]["devices"]
    assert device["memory"] == "shared" and 20 << 30 < device["total"] < 32 << 30


@pytest.mark.parametrize("size", ["x", "0", "-1GiB", "12 parsecs", "1e9999"])
def test_a_bad_size_is_wrong_usage(tmp_path: Path, size: str) -> None:
    run = tall(tmp_path)("fit", REPO, f"--memory={size}")
    assert run.code == 2 and "size of memory" in run.err and "try: " in run.err


def test_a_machine_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    cli = tall(tmp_path)
    run = cli("fit", REPO, "--machine", "rtx-3060")
    assert run.code == 3 and "rtx-3060-12gb" in run.err
    bad = tmp_path / "bad.toml"
    bad.write_text("nonsense = [")
    assert cli("fit", REPO, "--machine", str(bad)).code == 2


# ---- errors


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_unknown_model_is_3(tmp_path: Path, options: list[str]) -> None:
    for name in ("gema-4-e4b", "org/nothing"):
        run = tall(tmp_path)("fit", name, *options)
        assert run.code == 3 and "Traceback" not in run.out + run.err


def test_an_unknown_quant_is_3_and_names_the_others(tmp_path: Path) -> None:
    run = tall(tmp_path)("fit", REPO, "--quant", "q5_k_m")
    assert run.code == 3 and "Q4_K_M, Q6_K, Q8_0" in run.err


def test_a_quant_without_a_model_is_wrong_usage(tmp_path: Path) -> None:
    assert tall(tmp_path)("fit", "--quant", "q8_0").code == 2


class AwayHub(HeaderHub):
    """A hub that goes away, in parts."""

    lists = opens = True
    error: Exception = HubUnreachableError("the hub cannot be reached")

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        if not self.lists:
            raise self.error
        return super().listing(repo, revision)

    def open_source(self, repo: str, commit: str, file: RemoteFile) -> ByteSource:
        if not self.opens:
            raise self.error
        return super().open_source(repo, commit, file)


def test_it_works_offline_from_what_was_kept(tmp_path: Path) -> None:
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    cli = Cli(tmp_path, hub=hub, services=ExactServices)  # type: ignore[arg-type]
    online = rows_of(cli("fit", REPO, "--json"))
    hub.opened.clear()
    hub.lists = hub.opens = False
    for options in ([], ["--offline"]):
        run = cli("fit", REPO, "--json", *options)
        assert rows_of(run) == online
        assert any("cannot be reached" in note for note in run.data["notes"])
    assert hub.opened == []


def test_headers_are_read_once(tmp_path: Path) -> None:
    hub = HeaderHub("gemma-4-e4b", QUANTS, repo=REPO)
    cli = Cli(tmp_path, hub=hub, services=ExactServices)  # type: ignore[arg-type]
    assert cli("fit", REPO).code == 0
    assert sorted(hub.opened) == sorted(f"tall-{quant.upper()}.gguf" for quant in QUANTS)
    assert cli("fit", REPO).code == 0
    assert len(hub.opened) == len(QUANTS)


def test_another_quants_header_will_do(tmp_path: Path) -> None:
    """The usual quant's header is not here, and the hub is away: one that was kept stands in."""
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    cli = Cli(tmp_path, hub=hub, services=ExactServices)  # type: ignore[arg-type]
    assert cli("fit", f"{REPO}:q8_0").code == 0
    hub.opens = False
    rows = rows_of(cli("fit", REPO, "--json"))
    sources = {row["quant"]: row["source"] for row in rows}
    assert sources.pop("Q8_0") == "exact" and set(sources.values()) == {"formula"}
    assert sum(row["recommended"] for row in rows) == 1


def test_a_hub_that_is_away_is_6(tmp_path: Path) -> None:
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    hub.lists = False
    run = Cli(tmp_path, hub=hub)("fit", REPO, "--json")  # type: ignore[arg-type]
    assert run.code == 6 and run.envelope["errors"][0]["code"] == "hub_unreachable"
    hub.lists, hub.opens = True, False
    assert Cli(tmp_path, hub=hub)("fit", REPO).code == 6  # type: ignore[arg-type]


def test_a_gated_header_is_4(tmp_path: Path) -> None:
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    hub.opens, hub.error = False, AuthError("accept the licence first")
    assert Cli(tmp_path, hub=hub)("fit", REPO).code == 4  # type: ignore[arg-type]


def test_a_catalog_model_without_a_header_has_published_figures(tmp_path: Path) -> None:
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    hub.lists = False
    cli = Cli(tmp_path, hub=hub)  # type: ignore[arg-type]
    run = cli("fit", "gemma-4-e4b", "--machine", "rtx-4090-24gb", "--json")
    rows = rows_of(run)
    assert rows and {row["source"] for row in rows} <= {"published", "filesize"}
    assert all(row["settings"] is None and row["memory"] for row in rows)
    assert sum(row["recommended"] for row in rows) == 1
    text = cli("fit", "gemma-4-e4b", "--machine", "rtx-4090-24gb")
    assert text.code == 0 and "nothing here is exact" in text.out and "warning: " in text.err


def test_a_packaged_model_that_is_not_here(tmp_path: Path) -> None:
    hub = AwayHub("gemma-4-e4b", QUANTS, repo=REPO)
    hub.lists = False
    run = Cli(tmp_path, hub=hub)("fit", "smollm2-135m", "--json")  # type: ignore[arg-type]
    (row,) = rows_of(run)
    assert row["quant"] == "Q4_1" and row["source"] == "filesize" and row["verdict"] == "fits"


def test_a_damaged_header_is_7(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    path = Path(cli.model())
    path.write_bytes(path.read_bytes()[:2000])
    run = cli("fit", str(path), "--json")
    assert run.code == 7 and run.envelope["errors"][0]["code"] == "bad_gguf"


# ---- files that are here


def test_a_local_file(tmp_path: Path) -> None:
    cli = Cli(tmp_path, services=ExactServices)
    model = cli.model()
    run = cli("fit", model, "--json")
    rows = rows_of(run)
    assert [row["n_ctx"] for row in rows] == [2048]
    assert rows[0]["source"] == "exact" and rows[0]["recommended"]
    assert rows[0]["model"] == model and run.data["model"]["origin"] == "local"


def test_quants_in_the_store_without_a_hub(tmp_path: Path) -> None:
    cli = Cli(tmp_path, services=ExactServices)
    cli.store_model(name="tiny-Q8_0.gguf")
    cli.store_model(name="tiny-F16.gguf", file_type=1)
    rows = rows_of(cli("fit", "org/tiny-GGUF", "--offline", "--json"))
    assert {row["quant"] for row in rows} == {"Q8_0", "F16"}
    assert {row["source"] for row in rows} == {"exact"}


def test_a_speed_that_was_measured_here_replaces_the_forecast(tmp_path: Path) -> None:
    from llmrun.cli.measure import build_name
    from llmrun.fit.plan import plan
    from llmrun.fit.speed_log import SpeedKey, SpeedLog
    from llmrun.gguf.info import read_info

    cli = Cli(tmp_path)
    model = cli.model()
    low, high = rows_of(cli("fit", model, "--json"))[0]["tok_s"]
    assert low < high
    info = read_info([Path(model)])
    assert cli.services is not None
    machine = cli.services.machine()
    key = SpeedKey.of(machine, build_name(), info, plan(machine, info))
    assert SpeedLog(tmp_path / "state").record(key, tok_s=12.5, n_tokens=100)
    assert rows_of(cli("fit", model, "--json"))[0]["tok_s"] == [12.5, 12.5]
    other = rows_of(cli("fit", model, "--machine", "cpu-16gb", "--json"))
    assert other[0]["tok_s"][0] < other[0]["tok_s"][1]


def test_a_projector_is_counted_where_it_is_asked_for(tmp_path: Path) -> None:
    hub = HeaderHub("gemma-4-e4b", ["q4_k_m"], repo=REPO, projector_bytes=10**9)
    cli = Cli(tmp_path, hub=hub, services=ExactServices)  # type: ignore[arg-type]
    without, with_it = (
        sum(entry["overhead"] for entry in rows_of(cli("fit", REPO, "--json", *more))[0]["memory"])
        for more in ([], ["--projector"])
    )
    assert with_it - without >= 10**9
    assert tall(tmp_path / "b")("fit", REPO, "--projector").code == 2


# ---- text


def test_text_on_a_pipe_is_plain_and_every_line_is_whole(tmp_path: Path) -> None:
    run = tall(tmp_path)("fit", REPO, "--machine", "rtx-3060-12gb")
    assert run.code == 0 and "\x1b" not in run.out and run.err == ""
    table = [line for line in run.out.splitlines() if " fits " in line or " tight " in line]
    assert len(table) >= 4 * len(QUANTS)
    for line in table:
        assert line[2:].split()[0] in {quant.upper() for quant in QUANTS}
    (best,) = [line for line in run.out.splitlines() if line.startswith("► ")]
    assert best.split()[1] == "Q4_K_M"
    assert "recommended: Q4_K_M with a context of" in run.out
    assert "█" in run.out and "weights" in run.out and "other programs" in run.out
    assert f"try: llmrun chat {REPO}" in run.out


def test_verdicts_have_a_word_and_a_colour(tmp_path: Path) -> None:
    cli = tall(tmp_path, "gemma-4-26b-a4b")
    run = cli("fit", REPO, "--machine", "rtx-3060-12gb", tty=True)
    assert "\x1b[36mpartly on CPU\x1b[0m" in run.out
    cli.environ["NO_COLOR"] = "1"
    plain = cli("fit", REPO, "--machine", "rtx-3060-12gb", tty=True)
    assert "partly on CPU" in plain.out and "\x1b[3" not in plain.out
    assert "no " in cli("fit", REPO, "--machine", "m2-8gb").out


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("machine", ["two-gpus", "m2-8gb", "cpu-16gb"])
def test_it_fits_the_terminal(tmp_path: Path, columns: int, machine: str) -> None:
    cli = tall(tmp_path)
    cli.environ |= {"COLUMNS": str(columns), "NO_COLOR": "1"}
    run = cli("fit", REPO, "--machine", machine, tty=True)
    lines = run.out.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    shown = lines.splitlines()
    table = [line for line in shown if line[2:].startswith(("quant", "Q", "  "))]
    assert len(table) > 4 * len(QUANTS) and all(len(line) <= columns for line in table)
    bars = [line for line in shown if "▕" in line or "██ weights" in line]
    assert len(bars) > 1 and all(len(line) <= columns for line in bars)
    reasons = run.out.partition("recommended: ")[2].partition("\n\n")[0].splitlines()[1:]
    assert reasons or machine == "m2-8gb"  # where nothing runs
    assert all(len(line) <= columns and line.startswith("  ") for line in reasons)


def test_what_would_run_is_said_where_nothing_does(tmp_path: Path) -> None:
    run = tall(tmp_path, "gemma-4-31b")("fit", REPO, "--machine", "m2-8gb")
    assert run.code == 0 and "none of these runs" in run.out and "►" not in run.out
    assert "what would run: " in run.out and "llmrun chat " in run.out
    smaller = tall(tmp_path / "b")("fit", f"{REPO}:q8_0", "--memory", "7GiB")
    assert "what would run: Q4_K_M" in smaller.out
    dense = tall(tmp_path / "c", "llama-3.1-8b")
    shorter = dense("fit", f"{REPO}:q8_0", "--memory", "12GiB", "--ctx", "131072")
    advice = shorter.out.partition("what would run: Q8_0 with a context of ")[2]
    assert f"llmrun chat {REPO}:Q8_0 --ctx {advice.partition(':')[0]}" in advice


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    evil = tmp_path / "e\x1b]0;x\x07vil.gguf"
    Path(model).rename(evil)
    run = cli("fit", str(evil))
    assert run.code == 0 and "\x1b" not in run.out and "\x07" not in run.out


@pytest.mark.parametrize(
    ("tok_s", "text"),
    [(None, "-"), ((9.4, 21.2), "9-21"), ((1.52, 2.8), "1.5-2.8"), ((7.0, 7.0), "7")],
)
def test_speeds_as_people_read_them(tok_s: tuple[float, float] | None, text: str) -> None:
    assert format_speed(tok_s) == text


# ---- without a model


def test_the_catalog_ranked(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("fit", "--machine", "rtx-3060-12gb", "--json")
    models = run.data["models"]
    assert run.code == 0 and models[0]["recommended"] and models[0]["verdict"] == "fits"
    assert sum(row["recommended"] for row in models) == 1
    assert models[0]["command"] == f"llmrun pull {models[0]['model']}"
    assert all(row["source"] in ("filesize", "formula", "exact") for row in models)
    assert [row["verdict"] for row in models].index("no") > len(models) // 2
    text = cli("fit", "--machine", "rtx-3060-12gb")
    assert text.out.count("►") == 1 and f"best here: {models[0]['command']}" in text.out


def test_the_ranking_uses_headers_that_are_kept(tmp_path: Path) -> None:
    entry = load_catalog().get("gemma-4-e4b")
    assert entry is not None
    hub = HeaderHub("gemma-4-e4b", QUANTS, repo=entry.repo)
    catalog = Catalog([entry])
    cli = Cli(tmp_path, hub=hub, catalog=catalog)  # type: ignore[arg-type]
    (before,) = cli("fit", "--json").data["models"]
    assert cli("fit", "gemma-4-e4b").code == 0
    (after,) = cli("fit", "--json").data["models"]
    assert (before["source"], after["source"]) == ("filesize", "formula")


def test_unknown_memory_recommends_nothing(tmp_path: Path) -> None:
    cli = Cli(tmp_path, memory=0)
    data = cli("fit", "--json").data
    assert not any(row["recommended"] for row in data["models"])
    assert any("could not be read" in note for note in data["notes"])


def test_json_is_json(tmp_path: Path) -> None:
    run = tall(tmp_path)("fit", REPO, "--json")
    assert run.err == "" and json.loads(run.out)["command"] == "fit"
