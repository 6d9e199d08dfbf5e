"""`llmrun bench` on a real model, with as little of everything as can be. No time is looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.bench import ablation, runner, tune
from llmrun.bench.busy import BusyWatch
from llmrun.bench.workloads import Workloads
from llmrun.cli.app import main
from llmrun.cli.services import Services
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions
from tests.fakes.cli import Cli, Run
from tests.fakes.models import gemma3_path, smollm2_path

TINY = runner.Suite(
    n_prompts=(16,),
    n_generate=4,
    depths=(0, 80),
    n_first=32,
    n_streams=(1, 2),
    n_stream_prompt=4,
    n_stream_tokens=3,
    n_repeats=2,
)
TINY_TURNS = ablation.Sizes(
    n_prompt=32,
    n_answer=2,
    n_edit=3,
    n_parallel=2,
    n_parallel_prompt=4,
    n_parallel_tokens=2,
    n_repeats=1,
)


class Real(Cli):
    """The program with the real engine on this machine."""

    def __call__(self, *arguments: str, **_streams: object) -> Run:
        import io

        from llmrun.config import Environment

        out, err = io.StringIO(), io.StringIO()
        folders = [self.folder / name for name in ("config", "state", "data", "cache")]
        environment = Environment(io.StringIO(), out, err, self.environ, *folders)
        code = main(arguments, environment, Services(environment))
        return Run(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Real:
    monkeypatch.setattr(runner, "QUICK", TINY)
    monkeypatch.setattr(ablation, "QUICK_SIZES", TINY_TURNS)
    monkeypatch.setattr(tune, "TuneSizes", lambda **_sizes: TUNE)
    monkeypatch.setattr(BusyWatch, "start", lambda self: None)
    return Real(tmp_path)


TUNE = tune.TuneSizes(n_prompt=130, n_answer=2, n_repeats=1)


def test_the_standard_measurement(cli: Real) -> None:
    run = cli("bench", str(smollm2_path()), "--quick", "--json")
    assert run.code == 0, run.err
    (kept,) = run.data["runs"]
    assert kept["quant"] == "Q4_1" and kept["notes"] == []
    rows = {row["name"]: row for row in kept["measures"]}
    assert set(rows) >= {
        "pp16", "tg4", "pp16@80", "tg4@80", "bandwidth_share", "ttft_cold", "ttft_warm",
        "itl_p50", "itl_p99", "streams1", "streams2", "load", "memory_peak",
    }  # fmt: skip
    assert rows["ttft_warm"]["parameters"]["cached"] >= 31
    assert rows["memory_peak"]["median"] > 98_362_432
    assert rows["memory_peak"]["parameters"]["forecast"] > 98_362_432
    assert "generation, 4 tokens" in cli("bench", "compare", "last", "last").out


@pytest.mark.parametrize("path", [smollm2_path, gemma3_path])
def test_depth_is_kept_also_behind_a_window(path) -> None:
    """Gemma's window moves on: without a checkpoint the 80 tokens would be read each time."""
    subject = runner.Subject(
        lambda options: Engine.open([path()], options),
        EngineOptions(n_ctx=768, speculative="off"),
    )
    suite = replace(TINY, depths=(600,), n_streams=(), n_repeats=2)
    bench = runner.Bench(subject, suite, busy=BusyWatch(lambda: None))
    bench.run()
    assert [measure.name for measure in bench.measures[:2]] == ["pp16@600", "tg4@600"]
    assert all(len(measure.values) == 2 for measure in bench.measures[:2])


def test_what_pays(cli: Real) -> None:
    run = cli("bench", str(smollm2_path()), "--quick", "--what-pays", "--json")
    assert run.code == 0, run.err
    (kept,) = run.data["runs"]
    found = {row["setting"] for row in kept["ablations"]}
    wanted = {"prefix cache", "FlashAttention", "KV cache in q8_0", "speculation", "batching"}
    assert found >= wanted and kept["notes"] == []


def test_tune(cli: Real) -> None:
    flags = [
        "--quick",
        "--tune",
        "--threads",
        "1",
        "--speculative",
        "off",
        "--ctx",
        "256",
        "--json",
    ]
    run = cli("bench", str(smollm2_path()), *flags)
    assert run.code == 0, run.err
    steps = {row["setting"] for row in run.data["runs"][0]["ablations"]}
    assert steps >= {"ubatch 128 instead of 512", "KV cache q8_0 instead of f16"}


def test_the_text_to_edit_is_copied() -> None:
    """Else the speculation rows would measure nothing."""
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=768)) as engine:
        from llmrun.bench.drive import Driver

        usage = Driver(engine).generate(Workloads(engine.tokenizer).edit(700), 32).usage
    assert usage.n_accepted > 0
