"""From an acquired model and settings to a running engine and its sampling."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from llmrun.cli.acquire import Acquired, acquire, wishes_of
from llmrun.cli.judge import describe_change, plan_on_disk, require_fit
from llmrun.cli.measure import WatchedEngine, read_resident_bytes, record_speed
from llmrun.cli.options import Invocation
from llmrun.cli.sampling import sampling_of
from llmrun.config import Settings
from llmrun.engine.types import EngineLike, EngineOptions, SamplingParams
from llmrun.errors import LlmrunError, UsageError, WillNotFitError
from llmrun.ui.output import Output
from llmrun.ui.progress import load_progress_for

if TYPE_CHECKING:
    from llmrun.cli.services import Services
    from llmrun.engine.types import LoadProgress, Speculative

_MAX_RETRIES = 2


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model. The one who opened it closes it."""

    acquired: Acquired
    engine: WatchedEngine
    sampling: SamplingParams
    invocation: Invocation

    def close(self) -> None:
        """Free the model, and remember how fast it was."""
        measured_bytes = read_resident_bytes() if self.engine.last_finish is not None else None
        self.engine.close()
        record_speed(self.invocation, self.acquired, self.engine, measured_bytes)


def open_model(invocation: Invocation, text: str, *, n_ctx_enough: int | None = None) -> OpenModel:
    """Get the model `text` onto this machine and load it.

    `n_ctx_enough`: a context beyond which this run gains nothing (see `fit.plan.Wishes`).
    Raises every LlmrunError on the way, before anything is loaded where that can be known.
    """
    acquired = with_profile(invocation, get_model(invocation, text, n_ctx_enough))
    for reason in acquired.plan.reasons:
        invocation.output.detail(reason)
    return load_model(invocation, acquired)


def get_model(invocation: Invocation, text: str, n_ctx_enough: int | None) -> Acquired:
    """The model `text` on this machine, judged again when it had to be downloaded."""
    acquired = acquire(invocation, text, wishes_of(invocation.settings, n_ctx_enough))
    if acquired.was_downloaded:
        # What is free may have changed while the download ran.
        require_fit(
            invocation,
            acquired.resolved,
            acquired.info,
            acquired.plan,
            acquired.wishes,
            acquired.machine,
        )
    return acquired


def with_profile(invocation: Invocation, acquired: Acquired) -> Acquired:
    """The model with what `bench --tune` found for it here, where the user set nothing else. A
    profile that would cost context, or does not fit now, is left alone."""
    from llmrun.bench.profile import load_profile
    from llmrun.cli.measure import build_name

    settings, plan = invocation.settings, acquired.plan
    state_dir = invocation.environment.state_dir
    profile = load_profile(state_dir, acquired.machine, acquired.info, plan, build_name)
    if profile is None:
        return acquired
    wishes = acquired.wishes
    if not settings.is_set("ubatch"):
        wishes = replace(wishes, n_ubatch=profile.n_ubatch)
    if not settings.is_set("kv_type"):
        wishes = replace(wishes, type_k=profile.kv_type, type_v=profile.kv_type)
    try:
        made = plan_on_disk(invocation, acquired.machine, acquired.info, acquired.paths, wishes)
        is_worse = made.n_ctx < plan.n_ctx or (
            made.verdict != plan.verdict and made.verdict != "fits"
        )
    except UsageError:  # a KV type that does not go with --flash-attn off
        is_worse = True
    if is_worse:
        invocation.output.detail("the tuned profile does not fit beside the context: not used")
        return acquired
    if not settings.is_set("threads"):
        made = replace(made, n_threads=profile.n_threads, n_threads_batch=profile.n_threads_batch)
    invocation.output.detail("with the profile that llmrun bench --tune found for this model")
    return replace(acquired, plan=made, profile=profile)


def load_model(
    invocation: Invocation, acquired: Acquired, on_progress: LoadProgress | None = None
) -> OpenModel:
    """Load a model that is on this machine, as its plan says; with less when there is no memory
    for that after all (see `_load_smaller`). `on_progress` hears of it in the place of the screen.
    """
    output, services = invocation.output, invocation.services
    route_logs(output)
    acquired, engine = _load_smaller(invocation, acquired, on_progress)
    try:
        sampling = sampling_of(invocation.settings, acquired.info, acquired.entry, engine.tokenizer)
    except LlmrunError:
        engine.close()
        raise
    services.store().record_use(acquired.paths[0])
    return OpenModel(acquired, WatchedEngine(engine), sampling, invocation)


def _load_smaller(
    invocation: Invocation, acquired: Acquired, on_progress: LoadProgress | None
) -> tuple[Acquired, EngineLike]:
    """Load; when the allocator fails though the plan fitted, plan smaller and try again, twice at
    most. What the user fixed is not touched. What is given up is told.

    Raises the WillNotFitError of the last attempt, in the allocator's own words.
    """
    output, services = invocation.output, invocation.services
    for n_retries in range(_MAX_RETRIES + 1):
        try:
            if on_progress is not None:
                return acquired, _load(services, acquired, on_progress, invocation.settings)
            with load_progress_for(output) as shown:
                return acquired, _load(services, acquired, shown, invocation.settings)
        except WillNotFitError as error:
            smaller = None
            if n_retries < _MAX_RETRIES:
                smaller = _shrink(invocation, acquired)
            if smaller is None:
                if n_retries:
                    output.note(f"given up after {n_retries + 1} attempts")
                raise
            words = f"{error.message}: {error.why}" if error.why else error.message
            change = describe_change(acquired.plan, smaller.plan)
            output.warn(f"{words}; trying again with {change}")
            acquired = smaller
    raise AssertionError("unreachable")


def _shrink(invocation: Invocation, acquired: Acquired) -> Acquired | None:
    """The same model with the next smaller plan; None when there is none that is smaller."""
    from llmrun.fit.plan import shrink

    machine = invocation.services.machine()
    wishes = shrink(acquired.plan, acquired.wishes, machine, acquired.info)
    if wishes is None:
        return None
    made = plan_on_disk(invocation, machine, acquired.info, acquired.paths, wishes)
    is_same = made.setup == acquired.plan.setup and made.use_mmap == acquired.plan.use_mmap
    if is_same or (made.verdict == "no" and not invocation.settings.force):
        return None
    return replace(acquired, plan=made, wishes=wishes, machine=machine)


def _load(
    services: Services,
    acquired: Acquired,
    on_progress: LoadProgress | None,
    settings: Settings | None = None,
) -> EngineLike:
    """Load the weights. This thread meanwhile imports what comes next."""
    options = engine_options(acquired, settings)

    def prepare() -> None:
        import llmrun.chat.session  # noqa: F401 - ready by the time the weights are

    return load_engine(services, acquired, options, on_progress, meanwhile=prepare)


def load_engine(
    services: Services,
    acquired: Acquired,
    options: EngineOptions,
    on_progress: LoadProgress | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
) -> EngineLike:
    """Load the model's files with `options` in a thread, so that this one hears Ctrl-C, which a C
    call would keep waiting."""
    ended: queue.SimpleQueue[EngineLike | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def goes_on(progress: float) -> bool:
        return not stopped.is_set() and (on_progress is None or on_progress(progress))

    def load() -> None:
        try:
            ended.put(services.open_engine(acquired.paths, options, acquired.info, goes_on))
        except BaseException as error:  # noqa: BLE001 - raised again below
            ended.put(error)

    thread = threading.Thread(target=load, name="llmrun-load", daemon=True)
    try:
        _start_undisturbed(thread)
        if meanwhile is not None:
            meanwhile()
        engine = ended.get()
    except BaseException:
        stopped.set()
        if thread.ident is not None:
            _close_when_loaded(ended)
        raise
    if isinstance(engine, BaseException):
        raise engine
    return engine


def _start_undisturbed(thread: threading.Thread) -> None:
    """Start a thread; a signal that comes meanwhile is heard when the thread is surely running.
    The thread, and those that the library starts from it, leave signals to this one."""
    if not hasattr(signal, "pthread_sigmask"):
        thread.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close_when_loaded(ended: queue.SimpleQueue[EngineLike | BaseException]) -> None:
    """Wait for a load that was told to stop, however often the user says so: the process must not
    end below a thread that is inside the library."""
    while True:
        try:
            engine = ended.get()
        except (KeyboardInterrupt, SystemExit):
            continue
        if not isinstance(engine, BaseException):
            engine.close()
        return


def engine_options(acquired: Acquired, settings: Settings | None = None) -> EngineOptions:
    """The plan's values, and what is the user's own choice. A number of threads that was asked for
    is kept; one that was planned follows the load of the machine."""
    from llmrun.fit.pools import HOST

    plan, settings = acquired.plan, settings or Settings()
    speculative = settings.speculative
    if acquired.profile is not None and not settings.is_set("speculative"):
        speculative = acquired.profile.speculative
    on_gpu = plan.placement.companions_device not in (None, HOST)
    return EngineOptions(
        n_ctx=plan.n_ctx,
        n_seq_max=plan.n_seq,
        kv_unified=plan.kv_unified,
        n_gpu_layers=plan.n_gpu_layers,
        n_cpu_moe=plan.n_cpu_moe,
        tensor_split=plan.tensor_split,
        type_k=plan.type_k,
        type_v=plan.type_v,
        flash_attn=plan.flash_attn,
        n_ubatch=plan.n_ubatch,
        n_threads=plan.n_threads,
        n_threads_batch=plan.n_threads_batch,
        use_mmap=plan.use_mmap,
        use_repack=plan.use_repack,
        steady_threads=settings.threads is None,
        speculative=cast("Speculative", speculative),
        draft_model=acquired.draft_paths,
        draft_gpu_layers=-1 if on_gpu or not acquired.machine.devices else 0,
        checkpoint_bytes=plan.checkpoint_bytes,
    )


class _LogHandler(logging.Handler):
    """llama.cpp's log lines as notes, control characters escaped."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.DEBUG if output.verbose > 1 else logging.INFO)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.detail(record.getMessage())


def route_logs(output: Output) -> None:
    """Send llama.cpp's log to the person: what matters with `-v`, all with `-vv`."""
    logger = logging.getLogger("llmrun.llama")
    for handler in [h for h in logger.handlers if isinstance(h, _LogHandler)]:
        logger.removeHandler(handler)
    if output.verbose:
        handler = _LogHandler(output)
        logger.addHandler(handler)
        logger.setLevel(handler.level)
        logger.propagate = False
