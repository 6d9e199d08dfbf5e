"""From sampled tokens to what each reader gets: text in whole characters, stop strings, the end."""

from __future__ import annotations

from collections.abc import Callable

from llmrun.engine.backend import Backend, Sampler
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.stream import Stream
from llmrun.engine.types import (
    FinishEvent,
    FinishReason,
    PromptEvent,
    Request,
    TextEvent,
    TokenLogprob,
)

# Text is handed out at most this often: to wake the reader costs more than all else around a
# token, and nobody sees more than thirty updates a second.
_MIN_EVENT_S = 1 / 30

_UNSEEN = b"unseen"  # no piece: compared by identity, so not one byte (Python shares those)


class Answers:
    """The readers' side of all requests. Runs in the engine's thread, but for `streams`, which
    `Engine.submit` adds to under the engine's lock. `n_completion`: tokens sampled so far."""

    def __init__(self, backend: Backend, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._clock = clock
        self.streams: dict[Sequence, Stream] = {}
        self.n_completion = 0
        # Bytes of the tokens seen so far, without and with the text of control tokens.
        self._pieces: tuple[dict[int, bytes | None], dict[int, bytes | None]] = ({}, {})
        self._whole_pieces: dict[int, bytes] = {}

    def new_sampler(self, sequence: Sequence) -> Sampler:
        """Raises UsageError for numbers or a grammar that cannot be used."""
        params = sequence.request.sampling
        sampler = self._backend.new_sampler(params, sequence.seed)
        penalised = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        if penalised != (1, 0, 0) or params.dry_multiplier > 0:
            # As llama.cpp's own programs do: the penalties see the prompt too.
            for token in sequence.request.prompt:
                sampler.accept(token)
        return sampler

    def sample(self, sequence: Sequence, row: int) -> FinishReason | None:
        """Choose the next token from a row of the last decode; the reason when it ends the answer.

        Raises the sampler's LlmrunError.
        """
        assert sequence.sampler is not None
        token = sequence.sampler.sample(row)
        now = self._clock()
        if not sequence.first_token_s:
            sequence.first_token_s = now
        request = sequence.request
        piece = self._pieces[request.show_special].get(token, _UNSEEN)
        if piece is _UNSEEN:
            piece = self._learn_piece(token, request.show_special)
        if piece is None:
            if not request.ignore_eog:
                return "stop"
            piece = b""
        sequence.last_token_s = now
        if sequence.token_times is not None:
            sequence.token_times.append(now - sequence.submitted_s)
        if sequence.pending_logprobs is not None:
            sequence.pending_logprobs.append(self._read_logprob(request, row, token))
        self.n_completion += 1
        tokens = sequence.tokens
        tokens.append(token)
        sequence.pending_tokens.append(token)
        text = sequence.text.feed(piece)
        if request.stop:
            text, stop = sequence.stops.feed(text)
            if stop is not None:
                sequence.pending_text += text
                sequence.stop = stop
                return "stop"
        sequence.pending_text += text
        if now - sequence.emitted_s >= _MIN_EVENT_S and sequence.pending_text:
            sequence.emitted_s = now
            self._emit_text(sequence)
        return "length" if len(tokens) >= sequence.n_tokens_max else None

    def report_prompt(self, sequence: Sequence) -> None:
        if sequence.n_past <= sequence.n_prompt and sequence.n_completion == 0:
            self.streams[sequence].put(PromptEvent(sequence.n_past, sequence.n_prompt))

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Hand out what is left and the FinishEvent."""
        if sequence.stop is None:
            text, sequence.stop = sequence.stops.feed(sequence.text.flush())
            sequence.pending_text += text + sequence.stops.flush()
        if sequence.pending_text or sequence.pending_tokens:
            self._emit_text(sequence)
        sequence.finish = reason
        finish = FinishEvent(
            reason,
            sequence.usage(),
            sequence.timings(self._clock()),
            sequence.seed,
            sequence.stop,
            tuple(sequence.token_times or ()),
        )
        self._end(sequence, finish)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        self._end(sequence, error)

    def _end(self, sequence: Sequence, last: FinishEvent | BaseException) -> None:
        sequence.phase = Phase.FINISHED
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        self.streams.pop(sequence).put(last)

    def _learn_piece(self, token: int, show_special: bool) -> bytes | None:
        """The token's bytes as such requests see them; None for an end token."""
        tokenizer = self._backend.tokenizer
        piece: bytes | None
        if tokenizer.is_eog(token):
            piece = None
        elif not show_special and tokenizer.is_control(token):
            piece = b""
        else:
            piece = tokenizer.piece(token)
        self._pieces[show_special][token] = piece
        return piece

    def _read_logprob(self, request: Request, row: int, token: int) -> TokenLogprob:
        assert request.n_logprobs is not None
        logprob, top = self._backend.logprobs(row, token, request.n_logprobs)
        return TokenLogprob(
            token,
            self._whole_piece(token),
            logprob,
            tuple((other, self._whole_piece(other), chance) for other, chance in top),
        )

    def _whole_piece(self, token: int) -> bytes:
        """The token's bytes; special tokens as their text, whatever the request shows."""
        piece = self._whole_pieces.get(token)
        if piece is None:
            piece = self._whole_pieces[token] = self._backend.tokenizer.piece(token)
        return piece

    def _emit_text(self, sequence: Sequence) -> None:
        logprobs = sequence.pending_logprobs
        event = TextEvent(
            sequence.pending_text,
            tuple(sequence.pending_tokens),
            () if logprobs is None else tuple(logprobs),
        )
        sequence.pending_text = ""
        sequence.pending_tokens.clear()
        if logprobs is not None:
            logprobs.clear()
        self.streams[sequence].put(event)
