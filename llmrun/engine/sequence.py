"""One request on its way through the engine: known, computed, next. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llmrun.engine.backend import Sampler
from llmrun.engine.detokenize import IncrementalText, StopMatcher
from llmrun.engine.ngram import CopyModel
from llmrun.engine.types import FinishReason, Request, Timings, TokenLogprob, Usage


class Phase(enum.Enum):
    """WAITING for a cache slot, PREFILL (the prompt is being read), DECODE, FINISHED."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    FINISHED = 3


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    `tokens` are the prompt and everything sampled after it; the first `n_past` of them are in the
    cache. So `tokens[n_past:]` is what must be decoded next: the rest of the prompt, then one
    token a step. The answer ends at `n_tokens_max` of them. `draft` are guesses that the next
    step checks; at `boundaries` (numbers of tokens) a chunk of the prompt must end. Times are
    seconds of one monotonic clock.
    """

    request: Request
    seed: int
    submitted_s: float
    n_ctx: int
    n_tokens_max: int = field(init=False)
    tokens: list[int] = field(init=False)
    n_past: int = 0
    n_cached: int = 0
    seq_id: int = -1
    phase: Phase = Phase.WAITING
    cancelled: bool = False
    sampler: Sampler | None = None
    boundaries: set[int] = field(default_factory=set)
    draft: list[int] = field(default_factory=list)
    copying: CopyModel | None = None
    n_drafted: int = 0
    n_accepted: int = 0
    text: IncrementalText = field(default_factory=IncrementalText)
    stops: StopMatcher = field(init=False)
    pending_text: str = ""
    pending_tokens: list[int] = field(default_factory=list)
    pending_logprobs: list[TokenLogprob] | None = None
    emitted_s: float = 0.0
    started_s: float | None = None
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    token_times: list[float] | None = None
    finish: FinishReason | None = None
    stop: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        # The last sampled token needs no cell in the cache, hence one more than the context.
        self.n_tokens_max = self.n_ctx + 1
        if self.request.max_tokens is not None:
            self.n_tokens_max = min(self.n_tokens_max, self.n_prompt + self.request.max_tokens)
        self.stops = StopMatcher(self.request.stop)
        if self.request.with_times:
            self.token_times = []
        if self.request.n_logprobs is not None:
            self.pending_logprobs = []

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def n_completion(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.n_past

    def usage(self) -> Usage:
        return Usage(
            self.n_prompt, self.n_completion, self.n_cached, self.n_drafted, self.n_accepted
        )

    def timings(self, now_s: float) -> Timings:
        n_read = self.n_prompt - self.n_cached
        prompt_s = 0.0 if self.started_s is None else self.first_token_s - self.started_s
        decode_s = self.last_token_s - self.first_token_s
        return Timings(
            ttft_s=max(self.first_token_s - self.submitted_s, 0.0),
            prompt_tok_s=n_read / prompt_s if prompt_s > 0 else 0.0,
            decode_tok_s=(self.n_completion - 1) / decode_s if decode_s > 0 else 0.0,
            total_s=now_s - self.submitted_s,
        )
