"""`llmrun bench`: what it prints and keeps, how it is interrupted, and its profile in `run`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.bench import ablation, runner, tune
from llmrun.bench.busy import BusyWatch
from llmrun.bench.history import History
from llmrun.bench.profile import Profile, save_profile
from llmrun.cli import bench_session
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError
from llmrun.fit.plan import plan
from llmrun.gguf.info import read_info
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.openai_server import OpenAiServer

LONG = "x" * 400


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the machine that the tests run on."""
    monkeypatch.setattr(BusyWatch, "start", lambda self: None)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path, FakeEngine([LONG]))


def history(cli: Cli) -> History:
    return History(cli.folder / "state")


def test_the_report_and_the_history(cli: Cli) -> None:
    model = cli.model()
    run = cli("bench", model, "--quick")
    assert run.code == 0
    for words in ("first token", "4 streams", "peak", "50.0 tok/s", "4 cores", model):
        assert words in run.out
    (kept,) = history(cli).list()
    assert kept.model == model and kept.is_complete and kept.target == "engine"
    assert len(kept.model_sha256 or "") == 64 and kept.settings["speculative"] == "off"
    assert {m.name for m in kept.measures} >= {"pp128", "pp512", "tg32", "ttft_warm", "streams4"}
    # One context for a single answer, then one for the streams.
    options = [options for _, options in cli.services.opened]
    assert [o.n_seq_max for o in options] == [1, 1, 4] and {o.speculative for o in options} == {
        "off"
    }
    assert [o.kv_unified for o in options] == [True, True, False]
    assert cli.engine.closed


def test_json(cli: Cli) -> None:
    run = cli("bench", cli.model(), "--quick", "--repeats", "1", "--json")
    assert run.code == 0 and run.out.count("\n") == 1
    (kept,) = run.data["runs"]
    assert kept["id"] == history(cli).list()[0].id
    rows = {row["name"]: row for row in kept["measures"]}
    assert rows["tg32"]["median"] == 50.0 and rows["tg32"]["unit"] == "tok/s"
    assert run.data["profile"] is None and run.data["report"] is None


def test_csv_and_markdown(cli: Cli) -> None:
    model = cli.model()
    rows = list(csv.DictReader(io.StringIO(cli("bench", model, "--quick", "--csv").out)))
    assert "tg32" in [value for row in rows for value in row.values()]
    assert cli("bench", model, "--quick", "--md").out.startswith("# ")


def test_a_page_with_charts(cli: Cli) -> None:
    page = cli.folder / "page.html"
    run = cli("bench", cli.model(), "--quick", "--report", str(page))
    assert run.code == 0 and f"report: {page}" in run.err
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


def test_without_a_model_the_one_that_chat_would_take(cli: Cli) -> None:
    model = cli.model()
    cli.write_config(f"model = {json.dumps(model)}\n")
    assert cli("bench", "--quick", "--json").data["runs"][0]["model"] == model


def test_the_users_own_settings_are_measured(cli: Cli) -> None:
    cli("bench", cli.model(), "--quick", "--threads", "3", "--speculative", "auto", "--ctx", "900")
    options = cli.services.opened[0][1]
    assert (options.n_threads, options.steady_threads) == (3, False)
    assert (options.speculative, options.n_ctx) == ("auto", 900)


@pytest.mark.parametrize(("word", "kv_unified"), [("on", True), ("off", False), ("auto", False)])
def test_the_streams_cache_can_be_chosen(cli: Cli, word: str, kv_unified: bool) -> None:
    run = cli("bench", cli.model(), "--quick", "--kv-unified", word, "--json")
    single, *_, streams = (options for _, options in cli.services.opened)
    assert (single.kv_unified, streams.kv_unified) == (True, kv_unified)
    rows = {row["name"]: row for row in run.data["runs"][0]["measures"]}
    assert rows["streams4"]["parameters"]["kv_unified"] is kv_unified


def test_caches_of_their_own_are_not_measured_where_they_do_not_fit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrun.fit.parallel.is_as_good", lambda *_plans: False)
    cli("bench", cli.model(), "--quick")
    assert all(options.kv_unified for _, options in cli.services.opened)


def test_history_and_compare(cli: Cli) -> None:
    assert "nothing measured yet" in cli("bench", "history").err
    model = cli.model()
    for _ in range(2):
        cli("bench", model, "--quick")
    shown = cli("bench", "history")
    ids = [run.id for run in history(cli).list()]
    assert shown.code == 0 and all(each in shown.out for each in ids)
    data = cli("bench", "history", "--json")
    assert data.envelope["command"] == "bench history"
    assert [run["id"] for run in data.data["runs"]] == ids
    compared = cli("bench", "compare", "last~1", "last", "--json")
    assert compared.envelope["command"] == "bench compare"
    rows = {row["name"]: row for row in compared.data["rows"]}
    assert rows["tg32"]["ratio"] == 1.0 and rows["tg32"]["verdict"] == "no difference"
    assert "generation" in cli("bench", "compare", "last~1", "last").out
    assert cli("bench", "compare", "last", "none").code == 3


class Stopping(FakeEngine):
    """Ends the measurement at the n-th request."""

    def __init__(self, n: int, problem: BaseException) -> None:
        super().__init__([LONG])
        self.n = n
        self.problem = problem

    def submit(self, request):
        if len(self.requests) == self.n:
            raise self.problem
        return super().submit(request)


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    cli = Cli(tmp_path, Stopping(3, KeyboardInterrupt()))
    run = cli("bench", cli.model(), "--quick")
    assert run.code == 130 and "interrupted: not everything was measured" in run.out
    assert "error: interrupted" in run.err and cli.engine.closed
    (kept,) = history(cli).list()
    assert not kept.is_complete
    assert {measure.name for measure in kept.measures} == {"pp128", "pp512", "load"}
    as_json = Cli(tmp_path, Stopping(3, KeyboardInterrupt()))(
        "bench", cli.model(), "--quick", "--json"
    )
    assert as_json.code == 130 and as_json.data["runs"][0]["is_complete"] is False
    as_csv = Cli(tmp_path, Stopping(3, KeyboardInterrupt()))(
        "bench", cli.model(), "--quick", "--csv"
    )
    assert as_csv.code == 130 and "pp512" in as_csv.out


def test_ctrl_c_before_anything_was_measured(tmp_path: Path) -> None:
    def stop() -> FakeEngine:
        raise KeyboardInterrupt

    cli = Cli(tmp_path, stop)
    run = cli("bench", cli.model(), "--quick")
    assert (run.code, run.out) == (130, "") and history(cli).list() == ()


def test_an_engine_that_stops_is_an_error_with_what_there_is(tmp_path: Path) -> None:
    cli = Cli(tmp_path, Stopping(3, EngineError("it broke")))
    run = cli("bench", cli.model(), "--quick")
    assert run.code == 1 and "prompt, 512" in run.out and "error: it broke" in run.err


def test_what_pays(cli: Cli) -> None:
    run = cli("bench", cli.model(), "--quick", "--what-pays", "--json")
    assert run.code == 0
    (kept,) = run.data["runs"]
    settings = {row["setting"] for row in kept["ablations"]}
    assert settings == {
        "prefix cache", "FlashAttention", "speculation", "batching", "4 threads instead of 1",
        "steady threads", "a KV cache for each stream",
    }  # fmt: skip
    assert "What pays here" in cli("bench", cli.model(), "--quick", "--what-pays").out


def test_other_quants_on_disk_are_part_of_it(cli: Cli) -> None:
    cli.store_model(name="tiny-Q8_0.gguf")
    cli.store_model(name="tiny-Q4_0.gguf", file_type=2)
    run = cli("bench", "org/tiny-GGUF:Q8_0", "--quick", "--what-pays", "--offline", "--json")
    settings = {row["setting"] for row in run.data["runs"][0]["ablations"]}
    assert "quant Q4_0 instead" in settings
    names = {paths[0].name for paths, _ in cli.services.opened}
    assert names == {"tiny-Q8_0.gguf", "tiny-Q4_0.gguf"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b"], ["compare", "a"], ["history", "a", "b"], ["history", "--quick"],
        ["compare", "a", "b", "--tune"], ["a", "--repeats", "0"], ["a", "--repeats", "x"],
        ["a", "--csv", "--md"], ["a", "--tune", "--what-pays"],
        ["a", "--url", "http://127.0.0.1:9", "--tune"], ["a", "--served-model", "x"],
        ["a", "--report", "/no/such/folder/x.html"], ["a", "--report", "/"],
        ["--url", "http://127.0.0.1:9", "--api-key-env", "NOT_SET"], ["--url", "ftp://x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(cli: Cli, arguments: list[str]) -> None:
    run = cli("bench", *arguments)
    assert run.code == 2 and run.err.startswith("error: ") and run.out == ""
    assert not cli.services.opened


def test_a_server_that_is_not_there(cli: Cli) -> None:
    run = cli("bench", "--url", "http://127.0.0.1:9")
    assert run.code == 6 and run.out == ""


# ---- profiles


class Tuned(FakeEngine):
    """One thread answers faster than four."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__([LONG])
        self.options = options

    def submit(self, request):
        speed = 100.0 if self.options.n_threads == 1 else 50.0
        return _Timed(super().submit(request), speed)


class _Timed:
    def __init__(self, stream, speed: float) -> None:
        self.stream = stream
        self.speed = speed
        self.cancel = stream.cancel

    def __iter__(self):
        return self

    def __next__(self):
        event = next(self.stream)
        if hasattr(event, "timings"):
            return replace(event, timings=replace(event.timings, decode_tok_s=self.speed))
        return event


def tuning_cli(tmp_path: Path) -> Cli:
    cli = Cli(tmp_path)
    cli.engine = lambda: Tuned(cli.services.opened[-1][1])
    return cli


def test_tune_keeps_a_profile_that_run_uses(tmp_path: Path) -> None:
    cli = tuning_cli(tmp_path)
    model = cli.model()
    cli("run", model, "Hi")
    before = cli.services.opened[0][1]
    run = cli("bench", model, "--tune", "--quick", "--json")
    assert run.code == 0
    profile = run.data["profile"]
    assert (profile["threads"], profile["threads_batch"]) == (1, before.n_threads_batch)
    assert profile["gain"] > 1.2 and Path(profile["path"]).is_file()
    steps = [row["setting"] for row in run.data["runs"][0]["ablations"]]
    assert "threads for answers 1 instead of 4" in steps and steps[-1] == "all together"
    # While it searches, nothing moves the threads.
    assert not any(options.steady_threads for _, options in cli.services.opened)
    assert cli("run", model, "Hi").code == 0
    after = cli.services.opened[0][1]
    assert after == replace(before, n_threads=1) and before.n_threads == 4
    assert "profile" in cli("run", model, "Hi", "-v").err
    # Tuning begins with the planned settings, not with the profile.
    cli("bench", model, "--tune", "--quick")
    assert cli.services.opened[0][1].n_threads == 4
    # And bench measures what run would do.
    shown = cli("bench", model, "--quick", "--json").data["runs"][0]["settings"]
    assert (shown["n_threads"], shown["profile"]) == (1, "tuned")


def test_tune_that_finds_nothing_better_leaves_no_profile(cli: Cli) -> None:
    model = cli.model()
    run = cli("bench", model, "--tune", "--quick")
    assert run.code == 0 and "no profile is kept" in run.err
    assert not list((cli.folder / "state").glob("profiles/*.json"))


def test_an_interrupted_search_leaves_no_profile(tmp_path: Path) -> None:
    cli = Cli(tmp_path, Stopping(20, KeyboardInterrupt()))
    run = cli("bench", cli.model(), "--tune", "--quick")
    assert run.code == 130 and not list((tmp_path / "state").glob("profiles/*.json"))
    assert history(cli).list()[0].ablations


def profiled(tmp_path: Path, **changes) -> tuple[Cli, str]:
    """A program whose state folder holds a profile for its model."""
    cli = Cli(tmp_path)
    model = cli.model(n_ctx_train=8192)
    cli("run", model, "Hi")
    machine, info = cli.services.machine(), read_info([Path(model)])
    from llmrun.cli.measure import build_name

    profile = Profile(2, 3, 256, "f16", "off", build_name(), 1.3, 1.0)
    save_profile(
        tmp_path / "state", machine, info, plan(machine, info), replace(profile, **changes)
    )
    return cli, model


def test_the_profile_is_below_everything_that_the_user_sets(tmp_path: Path) -> None:
    cli, model = profiled(tmp_path)

    def opened(*flags: str) -> EngineOptions:
        assert cli("run", model, "Hi", *flags).code == 0
        return cli.services.opened[0][1]

    options = opened()
    assert (options.n_threads, options.n_threads_batch, options.n_ubatch) == (2, 3, 256)
    assert options.speculative == "off" and options.steady_threads
    assert opened("--threads", "4").n_threads == 4
    assert opened("--ubatch", "128").n_ubatch == 128
    assert opened("--speculative", "auto").speculative == "auto"
    cli.environ["LLMRUN_THREADS"] = "1"
    assert (opened().n_threads, opened().n_threads_batch) == (1, 1)
    del cli.environ["LLMRUN_THREADS"]
    cli.write_config("ubatch = 64\n")
    assert opened().n_ubatch == 64


def test_a_profile_that_cannot_be_is_left_alone(tmp_path: Path) -> None:
    # The tiny model's heads are no whole blocks of q8_0.
    cli, model = profiled(tmp_path, kv_type="q8_0")
    run = cli("run", model, "Hi", "-v")
    assert run.code == 0 and "not used" in run.err
    assert cli.services.opened[0][1].n_threads == 4


def test_the_sizes_of_a_quick_run_are_small() -> None:
    assert ablation.QUICK_SIZES.n_prompt < ablation.Sizes().n_prompt
    assert runner.QUICK.n_repeats < runner.Suite().n_repeats
    assert tune.TuneSizes().n_repeats > 1 and bench_session.Sizes(True, 7).suite().n_repeats == 7


def test_a_server_beside_the_model(cli: Cli) -> None:
    with OpenAiServer(models=("served",)) as server:
        run = cli("bench", cli.model(), "--quick", "--url", server.base, "--json")
        assert run.code == 0
        ours, theirs = run.data["runs"]
        assert (ours["target"], theirs["target"]) == ("engine", f"{server.base}/v1")
        assert theirs["model"] == "served" and theirs["is_complete"]
        names = {row["name"] for row in run.data["comparison"]}
        assert names >= {"ttft_cold", "tg32", "streams4"}
        assert len(history(cli).list()) == 2
        cli.environ["THE_KEY"] = "secret-key"
        flags = ["--quick", "--url", server.base, "--api-key-env", "THE_KEY"]
        alone = cli("bench", *flags)
        assert (
            alone.code == 0 and f"{server.base}/v1" in alone.out and "secret-key" not in alone.out
        )
        assert server.completions[-1].authorization == "Bearer secret-key"
    assert len(cli.services.opened) == 0
