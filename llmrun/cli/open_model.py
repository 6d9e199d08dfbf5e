"""From an acquired model and settings to a running engine and its sampling."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrun.cli.acquire import Acquired, acquire, wishes_of
from llmrun.cli.options import Invocation
from llmrun.config import OPTION_BY_KEY, Settings, Source, parse_value
from llmrun.engine.types import EngineLike, EngineOptions, SamplingParams, Tokenizer
from llmrun.errors import LlmrunError, UsageError
from llmrun.ui.output import Output
from llmrun.ui.progress import load_progress_for

if TYPE_CHECKING:
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.cli.services import Services
    from llmrun.engine.types import LoadProgress
    from llmrun.gguf.types import ModelInfo

# Keys of Settings that are fields of SamplingParams under the same name.
SAMPLING_KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)
# general.sampling.* in a header, where the word is not ours.
_HEADER_WORDS = {"temp": "temperature", "penalty_repeat": "repeat_penalty"}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model. The one who opened it closes the engine."""

    acquired: Acquired
    engine: EngineLike
    sampling: SamplingParams


def open_model(invocation: Invocation, text: str, *, n_ctx_enough: int | None = None) -> OpenModel:
    """Get the model `text` onto this machine and load it.

    `n_ctx_enough`: a context beyond which this run gains nothing (see `fit.plan.Wishes`).
    Raises every LlmrunError on the way, before anything is loaded where that can be known.
    """
    acquired = acquire(invocation, text, wishes_of(invocation.settings, n_ctx_enough))
    for reason in acquired.plan.reasons:
        invocation.output.detail(reason)
    return load_model(invocation, acquired)


def load_model(invocation: Invocation, acquired: Acquired) -> OpenModel:
    """Load a model that is on this machine, as its plan says."""
    output, services = invocation.output, invocation.services
    route_logs(output)
    with load_progress_for(output) as on_progress:
        engine = _load(services, acquired, on_progress)
    try:
        sampling = sampling_of(invocation.settings, acquired.info, acquired.entry, engine.tokenizer)
    except LlmrunError:
        engine.close()
        raise
    services.store().record_use(acquired.paths[0])
    return OpenModel(acquired, engine, sampling)


def _load(services: Services, acquired: Acquired, on_progress: LoadProgress | None) -> EngineLike:
    """Load the weights in a thread. This one meanwhile imports what comes next, and hears Ctrl-C,
    which a C call would keep waiting."""
    ended: queue.SimpleQueue[EngineLike | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def goes_on(progress: float) -> bool:
        return not stopped.is_set() and (on_progress is None or on_progress(progress))

    def load() -> None:
        try:
            ended.put(
                services.open_engine(
                    acquired.paths, engine_options(acquired), acquired.info, goes_on
                )
            )
        except BaseException as error:  # noqa: BLE001 - raised again below
            ended.put(error)

    thread = threading.Thread(target=load, name="llmrun-load", daemon=True)
    try:
        _start_undisturbed(thread)
        import llmrun.chat.session  # noqa: F401 - ready by the time the weights are

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


def engine_options(acquired: Acquired) -> EngineOptions:
    plan = acquired.plan
    return EngineOptions(
        n_ctx=plan.n_ctx,
        n_gpu_layers=plan.n_gpu_layers,
        type_k=plan.type_k,
        type_v=plan.type_v,
        flash_attn=plan.flash_attn,
        n_ubatch=plan.n_ubatch,
        n_threads=plan.n_threads,
        n_threads_batch=plan.n_threads_batch,
        use_mmap=plan.use_mmap,
        use_repack=plan.use_repack,
    )


def sampling_of(
    settings: Settings,
    info: ModelInfo | None,
    entry: CatalogEntry | None,
    tokenizer: Tokenizer | None = None,
    *,
    grammar: str | None = None,
) -> SamplingParams:
    """The user's values, else the header's `general.sampling.*`, else the catalog's, else the
    engine's own. Values of a header that are out of range count as not given."""
    values = recommended_sampling(info, entry, thinking=settings.think is not False)
    for key in SAMPLING_KEYS:
        given = getattr(settings, key)
        if given is not None:
            values[key] = given
    bias = tuple(_parse_bias(text, tokenizer) for text in settings.logit_bias) if tokenizer else ()
    return SamplingParams(**values, seed=settings.seed, logit_bias=bias, grammar=grammar)


def recommended_sampling(
    info: ModelInfo | None, entry: CatalogEntry | None, *, thinking: bool = True
) -> dict[str, Any]:
    """What the model's makers advise, by the names of SAMPLING_KEYS."""
    values = _catalog_sampling(entry, thinking=thinking)
    if info is not None:
        values.update(_header_sampling(info.sampling))
    return values


def _catalog_sampling(entry: CatalogEntry | None, *, thinking: bool) -> dict[str, Any]:
    advice = entry.sampling_for(thinking=thinking) if entry is not None else None
    if advice is None:
        return {}
    found = {key: getattr(advice, key, None) for key in SAMPLING_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _header_sampling(advice: Mapping[str, float | int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word, value in advice.items():
        key = _HEADER_WORDS.get(word, word)
        if key not in SAMPLING_KEYS:
            continue
        try:
            found[key] = parse_value(OPTION_BY_KEY[key], value, Source("default"))
        except UsageError:
            continue
    return found


def _parse_bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    """`TOKEN=BIAS`: a token's number, or a text that is one token; a number, or `ban`."""
    hint = '--logit-bias "15043=-5", or a text that is one token: --logit-bias " the=ban"'
    token_text, equals, bias_text = text.rpartition("=")
    try:
        bias = float("-inf") if bias_text == "ban" else float(bias_text)
    except ValueError:
        bias = float("nan")
    if not equals or not token_text or bias != bias or bias == float("inf"):
        raise UsageError(f"option --logit-bias: {text!r} is not TOKEN=BIAS", hint=hint)
    if token_text.isascii() and token_text.isdigit():
        token = int(token_text)
        if token >= tokenizer.n_vocab:
            raise UsageError(
                f"option --logit-bias: there is no token {token}",
                why=f"the vocabulary has {tokenizer.n_vocab} tokens",
            )
        return token, bias
    tokens = tokenizer.tokenize(token_text, add_special=False, parse_special=False)
    if len(tokens) != 1:
        raise UsageError(
            f"option --logit-bias: {token_text!r} is {len(tokens)} tokens, not one", hint=hint
        )
    return tokens[0], bias


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
