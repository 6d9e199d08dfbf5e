"""One call of `llmrun bench` that measures: what comes out is kept, and shown also when it is
interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun.cli.bench_result import BenchResult, ProfileData, compare_row, forecasts_of
from llmrun.cli.options import Invocation, Outcome
from llmrun.errors import LlmrunError
from llmrun.ui.output import Failed

if TYPE_CHECKING:
    from llmrun.bench.runner import Suite
    from llmrun.bench.tune import Choice
    from llmrun.bench.types import BenchRun
    from llmrun.cli.bench_subject import Prepared

_USUAL_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Sizes:
    quick: bool
    n_repeats: int | None

    def suite(self) -> Suite:
        from llmrun.bench.runner import QUICK, Suite

        suite = QUICK if self.quick else Suite()
        return suite if self.n_repeats is None else replace(suite, n_repeats=self.n_repeats)


class Session:
    """One call of `bench`: what was measured, kept and shown also when it is interrupted."""

    def __init__(
        self, invocation: Invocation, sizes: Sizes, *, csv: bool, md: bool, page: Path | None
    ) -> None:
        self._invocation = invocation
        self._sizes = sizes
        self._csv = csv
        self._md = md
        self._page = page
        self._runs: list[BenchRun] = []
        self._profile: ProfileData | None = None
        self.problem: LlmrunError | None = None

    # ---- measuring

    def measure(self, text: str) -> None:
        from llmrun.bench.runner import Bench
        from llmrun.cli.bench_subject import prepare, subject_of
        from llmrun.ui.steps import steps_for

        suite = self._sizes.suite()
        subject = prepare(self._invocation, text, n_ctx_enough=suite.n_ctx)
        with steps_for(self._invocation.output) as steps:
            measurement = Bench(subject_of(subject, suite), suite, steps)
            started_at = time.time()
            self._watch(measurement.run)
        self._add(
            self._run_of(
                subject,
                started_at,
                measures=measurement.measures,
                notes=measurement.notes,
            )
        )

    def measure_what_pays(self, text: str) -> None:
        from llmrun.bench.ablation import QUICK_SIZES, AblationRun, Sizes, list_switches
        from llmrun.bench.busy import BusyWatch
        from llmrun.cli.bench_subject import kv_types, other_quants, prepare, stream_options
        from llmrun.ui.steps import steps_for

        sizes = QUICK_SIZES if self._sizes.quick else Sizes()
        n_repeats = self._sizes.n_repeats or sizes.n_repeats
        n_ctx = 2 * (sizes.n_prompt + sizes.n_answer)
        subject = prepare(self._invocation, text, n_ctx_enough=n_ctx)
        n_ctx_streams = sizes.n_parallel * (sizes.n_parallel_prompt + sizes.n_parallel_tokens)
        switches = list_switches(
            subject.open,
            subject.options,
            sizes,
            stream_options=stream_options(subject, sizes.n_parallel, n_ctx_streams),
            small_kv="q8_0" if "q8_0" in kv_types(subject) else None,
            others=other_quants(subject),
        )
        busy = BusyWatch()
        with steps_for(self._invocation.output) as steps:
            ablation = AblationRun(switches, n_repeats, steps)
            started_at = time.time()

            def run() -> None:
                steps.begin(ablation.n_units)
                steps.describe("looking at the machine")
                busy.start()
                ablation.run()

            self._watch(run)
        warning = busy.warning()
        self._add(
            self._run_of(
                subject,
                started_at,
                ablations=ablation.ablations,
                notes=(*((warning,) if warning else ()), *ablation.notes),
            )
        )

    def tune(self, text: str) -> None:
        from llmrun.bench.busy import BusyWatch
        from llmrun.bench.tune import Tuner, TuneSizes
        from llmrun.cli.bench_subject import kv_types, options_of, prepare, start_of
        from llmrun.ui.steps import steps_for

        settings = self._invocation.settings
        n_repeats = self._sizes.n_repeats or (1 if self._sizes.quick else _USUAL_REPEATS)
        sizes = TuneSizes(n_repeats=n_repeats)
        if self._sizes.quick:
            sizes = TuneSizes(n_prompt=128, n_answer=24, n_repeats=n_repeats)
        # For the context that `chat` would have, and from what was planned for it.
        subject = prepare(
            self._invocation, text, n_ctx_enough=None, profile=False, speculative=None
        )
        keys = ("threads", "ubatch", "kv_type", "speculative")
        fixed = {key for key in keys if settings.is_set(key)}
        busy = BusyWatch()
        busy.start()
        notes: list[str] = []
        if busy.before is not None and busy.before.is_busy:
            # A profile bounds the threads, also when the other programs have gone.
            fixed.add("threads")
            notes.append("threads were not tuned beside other programs: tune again without them")
        with steps_for(self._invocation.output) as steps:
            tuner = Tuner(
                subject.open,
                options_of(subject),
                start_of(subject),
                sizes,
                steps,
                n_threads_max=subject.acquired.machine.cpu.n_affinity,
                kv_types=kv_types(subject),
                fixed=frozenset(fixed),
            )
            started_at = time.time()
            gain = 1.0

            def run() -> None:
                nonlocal gain
                steps.begin(tuner.n_units)
                gain = tuner.run()

            is_complete = self._watch(run)
        warning = busy.warning()
        self._add(
            self._run_of(
                subject,
                started_at,
                ablations=tuple(tuner.steps),
                notes=(*((warning,) if warning else ()), *notes, *tuner.notes),
            )
        )
        if is_complete and self.problem is None:
            self._profile = _keep_profile(self._invocation, subject, tuner.best, gain)

    def measure_server(self, url: str, model: str | None, api_key: str | None) -> None:
        from llmrun.bench.history import new_id
        from llmrun.bench.http import UrlWorkload, find_server, measure_url
        from llmrun.bench.types import BenchRun, Measure
        from llmrun.ui.steps import steps_for

        suite = self._sizes.suite()
        workload = UrlWorkload(
            n_prompt=suite.n_first,
            n_stream_prompt=suite.n_stream_prompt,
            n_generate=suite.n_generate,
            n_streams=suite.n_streams,
            n_stream_tokens=suite.n_stream_tokens,
            n_repeats=suite.n_repeats,
        )
        server = find_server(url, model=model, api_key=api_key)
        measures: list[Measure] = []
        started_at = time.time()
        n_before = 0
        with steps_for(self._invocation.output) as steps:

            def follow(name: str, n_done: int, n_all: int) -> None:
                nonlocal n_before
                if not n_before:
                    steps.begin(float(n_all))
                steps.describe(f"{server.base}: {name}")
                steps.advance(float(n_done - n_before))
                n_before = n_done

            def run() -> None:
                measure_url(
                    url,
                    workload,
                    model=server.model,
                    api_key=api_key,
                    on_measure=measures.append,
                    on_progress=follow,
                )

            is_complete = self._watch(run)
        self._add(
            BenchRun(
                id=new_id(started_at),
                started_at=started_at,
                model=server.model,
                model_sha256=None,
                quant=None,
                machine="the server's",
                build=server.software,
                target=server.base,
                settings={},
                measures=tuple(measures),
                is_complete=is_complete,
            )
        )

    def _watch(self, run: Callable[[], None]) -> bool:
        """Run to the end, or to Ctrl-C or an error, which is kept for later. Whether it ended."""
        from llmrun.cli.app import Interrupted

        try:
            run()
        except KeyboardInterrupt:
            self.problem = Interrupted("interrupted", why="what was measured until then is kept")
        except LlmrunError as error:
            self.problem = error
        return self.problem is None

    def _run_of(self, subject: Prepared, started_at: float, **found: Any) -> BenchRun:
        from llmrun.bench.history import new_id
        from llmrun.bench.types import BenchRun

        values: dict[str, Any] = {"measures": (), **found}
        return BenchRun(
            id=new_id(started_at),
            started_at=started_at,
            model=subject.acquired.reference,
            model_sha256=subject.sha256,
            quant=subject.acquired.resolved.quant or subject.acquired.info.quant,
            machine=subject.machine_words,
            build=subject.build,
            target="engine",
            settings=subject.settings,
            is_complete=self.problem is None,
            **values,
        )

    def _add(self, run: BenchRun) -> None:
        """Into the history, unless there is nothing in it."""
        from llmrun.bench.history import History

        if not run.measures and not run.ablations and self.problem is not None:
            return
        self._runs.append(run)
        History(self._invocation.environment.state_dir, self._invocation.output.warn).add(run)

    # ---- showing

    def finish(self) -> Outcome:
        if not self._runs and self.problem is not None:
            self.problem.why = None if self.problem.exit_code == 130 else self.problem.why
            raise self.problem
        output = self._invocation.output
        if self._page is not None:
            self._write_page(self._page)
        if self._csv or self._md:
            from llmrun.bench.report import to_csv, to_markdown

            for run in self._runs:
                text = to_csv(run) if self._csv else to_markdown(run, forecasts_of(run))
                output.stream(text)
            if self.problem is not None:
                raise self.problem
            return 0
        result = self._result()
        return result if self.problem is None else Failed(result, (self.problem,))

    def _result(self) -> BenchResult:
        from llmrun.bench.compare import compare
        from llmrun.bench.record import to_dict

        runs = self._runs
        rows = compare(runs[0], runs[1]) if len(runs) > 1 else ()
        return BenchResult(
            tuple(to_dict(run) for run in runs),
            tuple(compare_row(row) for row in rows),
            self._profile,
            self._page,
        )

    def _write_page(self, path: Path) -> None:
        from llmrun.bench.history import History
        from llmrun.bench.html import to_html

        first = self._runs[0]
        earlier = History(self._invocation.environment.state_dir).list(first.model, n=20)
        here = {run.id for run in self._runs}
        others = [run for run in earlier if run.id not in here and run.target == first.target]
        try:
            path.write_text(to_html(first, [*self._runs[1:], *others]), encoding="utf-8")
        except OSError as error:
            self._page = None
            self._invocation.output.warn(f"the report cannot be written: {error}")


def _keep_profile(
    invocation: Invocation, subject: Prepared, best: Choice, gain: float
) -> ProfileData | None:
    """Save what was found; what was kept before goes when the planned settings are the fastest."""
    from llmrun.bench.profile import Profile, remove_profile, save_profile
    from llmrun.cli.bench_subject import start_of

    acquired, state_dir = subject.acquired, invocation.environment.state_dir
    try:
        if best == start_of(subject):
            remove_profile(state_dir, acquired.machine, acquired.info, acquired.plan)
            invocation.output.note("the planned settings are the fastest here: no profile is kept")
            return None
        profile = Profile(
            n_threads=best.n_threads,
            n_threads_batch=best.n_threads_batch,
            n_ubatch=best.n_ubatch,
            kv_type=best.kv_type,
            speculative=best.speculative,
            build=subject.build,
            gain=round(gain, 4),
            tuned_at=time.time(),
        )
        path = save_profile(state_dir, acquired.machine, acquired.info, acquired.plan, profile)
    except OSError as error:
        invocation.output.warn(f"the profile cannot be kept: {error}")
        return None
    return ProfileData(
        threads=profile.n_threads,
        threads_batch=profile.n_threads_batch,
        ubatch=profile.n_ubatch,
        kv_type=profile.kv_type,
        speculative=profile.speculative,
        gain=profile.gain,
        path=path,
    )
