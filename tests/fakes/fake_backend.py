"""A Backend without a model: the next token is a function of what is in the sequence's cache.

Every cell keeps a value computed from the cell before it, so that a token at a wrong place, a
missing one, or one out of a forgotten window changes all that follows: any slip of the engine's
bookkeeping shows as a wrong token. `ideal_answer` says what a request must give.

It is strict: a call that the real library would abort on, or silently take wrong, is kept in
`violations` and raises. Slowness, failures and aborts come from `on_decode`; steps wait while a
test holds `ready`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.types import ModelFacts, Request, SamplingParams, StateBytes
from llmrun.errors import UsageError
from tests.fakes.fake_engine import fake_facts
from tests.fakes.fake_tokenizer import FakeTokenizer

NextToken = Callable[[tuple[int, ...]], int]
BAD_GRAMMAR = "bad"
FAILING_GRAMMAR = "fails on the third token"


def hash_token(tokens: tuple[int, ...]) -> int:
    """A byte or, one time in 32, an end token of the default FakeTokenizer."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=2).digest()
    return 257 if digest[0] < 8 else digest[1]


def endless_token(tokens: tuple[int, ...]) -> int:
    """Printable ASCII without end."""
    return 33 + hashlib.blake2b(repr(tokens).encode(), digest_size=1).digest()[0] % 90


def copying_token(tokens: tuple[int, ...]) -> int:
    """Mostly the token five places before; now and then another, or an end token."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=2).digest()
    if len(tokens) < 5 or digest[0] < 24:
        return 257 if digest[1] < 12 else 33 + digest[1] % 90
    return tokens[-5]


def scripted(answer: bytes | Sequence[int], n_prompt: int) -> NextToken:
    """After a prompt of `n_prompt` tokens the model says `answer`, then ends."""
    tokens = [*answer, 257]
    return lambda held: tokens[min(len(held) - n_prompt, len(tokens) - 1)]


def ideal_logprobs(
    tokens: Sequence[int], token: int, n_top: int, n_vocab: int
) -> tuple[float, list[tuple[int, float]]]:
    """What the row after `tokens` says of `token`, and of the likeliest: some numbers that no other
    row has."""
    first = hashlib.blake2b(repr(tuple(tokens)).encode(), digest_size=4).digest()
    shift = int.from_bytes(first, "big") / 2**32
    top = [((first[0] + i) % n_vocab, -shift - i) for i in range(min(n_top, n_vocab))]
    return -shift - (token - first[0]) % n_vocab, top


@dataclass(slots=True, eq=False)
class Cell:
    """One place of the cache. `value` is -1 once the chain is broken: all after it is garbage.

    `owners` are the sequences that hold it, `window` those that hold it in the window layers too.
    """

    pos: int
    token: int
    value: int
    owners: set[int]
    window: set[int]


class Violation(AssertionError):
    """The engine called the backend in a way that the library forbids."""


class FakeSampler:
    def __init__(self, backend: FakeBackend, params: SamplingParams, seed: int) -> None:
        self._backend = backend
        self._params = params
        self.seed = seed
        self.accepted: list[int] = []
        self.n_sampled = 0
        self.closed = False

    def sample(self, row: int) -> int:
        backend = self._backend
        backend.check_thread()
        backend.require(not self.closed, "a closed sampler was used")
        backend.require(row in backend.rows, f"row {row} has no logits (or was sampled before)")
        self.n_sampled += 1
        if self._params.grammar == FAILING_GRAMMAR and self.n_sampled == 3:
            from llmrun.errors import EngineError

            raise EngineError("the grammar allows no token")
        return backend.rows.pop(row)

    def accept(self, token: int) -> None:
        self._backend.check_thread()
        self.accepted.append(token)

    def close(self) -> None:
        self._backend.check_thread()
        self._backend.require(not self.closed, "a sampler was closed twice")
        self.closed = True
        self._backend.open_samplers.remove(self)


class FakeBackend:
    """Implements `engine.backend.Backend`.

    `n_swa`: cells that no longer lie in a window of this size are forgotten at once, except the
    last `slack` of them; what is computed without a forgotten cell is wrong from there on.
    `recurrent`: a tail cannot be removed, and an abort leaves the state spoilt.
    `on_decode(step, chunks)` runs before each step in the engine's thread: it may raise, submit,
    cancel, or call `request_abort`, after which the step is aborted with `n_kept(n_rows)` rows
    computed (`sees_abort` False: never). `next_token` is given the sequence's tokens up to the row.
    """

    def __init__(
        self,
        *,
        n_ctx: int = 64,
        n_seq_max: int = 1,
        n_batch: int = 8,
        n_outputs_max: int | None = None,
        n_swa: int = 0,
        slack: int = 0,
        recurrent: bool = False,
        next_token: NextToken = hash_token,
        on_decode: Callable[[int, Sequence[Chunk]], None] | None = None,
        n_kept: Callable[[int], int] = lambda n_rows: 0,
        sees_abort: bool = True,
        tokenizer: FakeTokenizer | None = None,
        n_threads: int = 1,
        kv_unified: bool = True,
    ) -> None:
        self.tokenizer = tokenizer or FakeTokenizer()
        self.facts: ModelFacts = fake_facts(
            n_vocab=self.tokenizer.n_vocab, n_swa=n_swa, is_recurrent=recurrent
        )
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.n_seq_max = n_seq_max
        self.kv_unified = kv_unified
        self.n_swaps = self.n_moved = 0
        self.has_memory = True
        self.n_threads = self.n_threads_batch = n_threads
        self.n_outputs_max = n_outputs_max or n_seq_max
        self.next_token = next_token
        self.on_decode = on_decode
        self.n_kept = n_kept
        self.sees_abort = sees_abort
        self.rows: dict[int, int] = {}
        self.row_tokens: dict[int, tuple[int, ...]] = {}
        self.n_steps = 0
        self.batches: list[list[Chunk]] = []
        self.results: list[DecodeResult] = []
        self.open_samplers: list[FakeSampler] = []
        self.samplers: list[FakeSampler] = []
        self.violations: list[str] = []
        self.threads = (n_threads, n_threads)
        self.n_closed = 0
        self.ready = threading.Event()
        self.ready.set()
        self._slack = slack
        self._recurrent = recurrent
        self._cells: list[Cell] = []
        self._thread: int | None = None
        self._abort = threading.Event()

    # ---- checks

    def require(self, ok: bool, what: str) -> None:
        if not ok:
            self.violations.append(what)
            raise Violation(what)

    def check_thread(self) -> None:
        """All calls come from one thread, and none after close."""
        me = threading.get_ident()
        self._thread = self._thread or me
        self.require(me == self._thread, "called from a second thread")
        self.require(self.n_closed == 0, "called after close")

    def _check_seq(self, seq_id: int) -> None:
        self.check_thread()
        self.require(0 <= seq_id < self.n_seq_max, f"sequence {seq_id} does not exist")

    def held(self, seq_id: int) -> list[int]:
        """The tokens in the sequence's cache, in order. For tests, from any thread."""
        return [cell.token for cell in self._of(seq_id)]

    def _of(self, seq_id: int) -> list[Cell]:
        cells = [cell for cell in self._cells if seq_id in cell.owners]
        return sorted(cells, key=lambda cell: cell.pos)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """No step is computed inside, so that all that is submitted here comes together."""
        self.ready.clear()
        try:
            yield
        finally:
            self.ready.set()

    # ---- the protocol

    def decode(self, chunks: Sequence[Chunk]) -> DecodeResult:
        self.check_thread()
        self._check_batch(chunks)
        self.batches.append(list(chunks))
        self.rows = {}
        self.row_tokens = {}
        self.require(self.ready.wait(60), "the test never let the engine go on")
        if self.on_decode is not None:
            self.on_decode(self.n_steps, chunks)
        self.n_steps += 1
        result = self._decode(chunks)
        self.results.append(result)
        return result

    def decode_one(self, seq_id: int, token: int, pos: int) -> DecodeResult:
        return self.decode([Chunk(seq_id, [token], pos, 1)])

    def _check_batch(self, chunks: Sequence[Chunk]) -> None:
        n_rows = sum(len(chunk.tokens) for chunk in chunks)
        n_outputs = sum(chunk.n_outputs for chunk in chunks)
        self.require(0 < n_rows <= self.n_batch, f"{n_rows} rows in a batch of {self.n_batch}")
        self.require(n_outputs <= self.n_outputs_max, f"{n_outputs} > {self.n_outputs_max} outputs")
        seq_ids = [chunk.seq_id for chunk in chunks]
        self.require(len(set(seq_ids)) == len(seq_ids), "a sequence twice in one batch")
        for chunk in chunks:
            self._check_seq(chunk.seq_id)
            expected = self.seq_pos_max(chunk.seq_id) + 1
            self.require(chunk.pos == expected, f"position {chunk.pos}, not {expected}")
            self.require(0 <= chunk.n_outputs <= len(chunk.tokens), "more outputs than tokens")
            self.require(len(chunk.tokens) > 0, "an empty chunk")
            in_range = all(0 <= token < self.facts.n_vocab for token in chunk.tokens)
            self.require(in_range, "a token outside the vocabulary")
        if not self.kv_unified:
            self.require(seq_ids == sorted(seq_ids), "rows out of the order of their sequences")

    def _decode(self, chunks: Sequence[Chunk]) -> DecodeResult:
        n_rows = sum(len(chunk.tokens) for chunk in chunks)
        if self.kv_unified:
            is_full = len(self._cells) + n_rows > self.n_ctx
        else:
            is_full = any(chunk.pos + len(chunk.tokens) > self.n_ctx for chunk in chunks)
        if is_full:
            return DecodeResult.FULL
        if self.facts.n_swa:
            self._forget()
        aborted = self._abort.is_set() and self.sees_abort
        n_left = min(self.n_kept(n_rows), n_rows) if aborted else n_rows
        row = 0
        for chunk in chunks:
            for i, token in enumerate(chunk.tokens):
                if n_left == 0:
                    break
                value = self._append(chunk.seq_id, token, chunk.pos + i)
                if not aborted and i >= len(chunk.tokens) - chunk.n_outputs:
                    self.row_tokens[row] = tuple(self.held(chunk.seq_id))
                    self.rows[row] = self._choose(chunk.seq_id, value)
                row += 1
                n_left -= 1
        if aborted and self._recurrent:
            for chunk in chunks:
                self._spoil(chunk.seq_id)
        return DecodeResult.ABORTED if aborted else DecodeResult.DONE

    def _spoil(self, seq_id: int) -> None:
        """The sequence's own state is garbage; one that it shared was copied before it changed."""
        for cell in self._of(seq_id):
            cell.owners.discard(seq_id)
            self._cells.append(Cell(cell.pos, cell.token, -1, {seq_id}, {seq_id}))
        self._cells = [cell for cell in self._cells if cell.owners]

    def _append(self, seq_id: int, token: int, pos: int) -> int:
        n_swa = self.facts.n_swa
        before = self._of(seq_id)
        value = before[-1].value if before else 0
        if n_swa and not all(seq_id in cell.window for cell in before if cell.pos > pos - n_swa):
            value = -1  # attends to a cell that is gone
        if [cell.pos for cell in before] != list(range(pos)):
            value = -1
        value = -1 if value == -1 else hash((value, token, pos)) & 0xFFFFFFFF
        self._cells.append(Cell(pos, token, value, {seq_id}, {seq_id}))
        return value

    def _forget(self) -> None:
        """As llama.cpp when its window cache is as small as can be: a cell of one sequence only
        that lies before its window is overwritten by a batch (what the batch itself pushes out
        stays until the next), and all before it goes with it."""
        keep = self.facts.n_swa + self._slack
        for seq_id in range(self.n_seq_max):
            last = self.seq_pos_max(seq_id)
            alone = [cell.pos for cell in self._of(seq_id) if cell.window == {seq_id}]
            gone = max((pos for pos in alone if pos <= last + 1 - keep), default=-1)
            for cell in self._of(seq_id):
                if cell.pos <= gone:
                    cell.window.discard(seq_id)

    def _choose(self, seq_id: int, value: int) -> int:
        if value == -1:
            return 35  # garbage: an answer of ######
        return self.next_token(tuple(self.held(seq_id)))

    def new_sampler(self, params: SamplingParams, seed: int) -> FakeSampler:
        self.check_thread()
        if params.grammar == BAD_GRAMMAR:
            raise UsageError("the grammar cannot be used")
        sampler = FakeSampler(self, params, seed)
        self.open_samplers.append(sampler)
        self.samplers.append(sampler)
        return sampler

    def logprobs(self, row: int, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
        self.check_thread()
        self.require(row in self.row_tokens, f"row {row} has no logits")
        self.require(0 <= token < self.facts.n_vocab, "a token outside the vocabulary")
        return ideal_logprobs(self.row_tokens[row], token, n_top, self.facts.n_vocab)

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        self._check_seq(seq_id)
        self.require(p1 == -1, "only tails are removed")
        cells = self._of(seq_id)
        gone = [cell for cell in cells if cell.pos >= p0]
        if self._recurrent and gone and len(gone) < len(cells):
            return False
        for cell in gone:
            cell.owners.discard(seq_id)
            cell.window.discard(seq_id)
            if not cell.owners:
                self._cells.remove(cell)
        return True

    def seq_cp(self, source: int, target: int, n_tokens: int) -> bool:
        self._check_seq(source)
        self._check_seq(target)
        is_whole = n_tokens == self.seq_pos_max(source) + 1
        self.require(not self._recurrent or is_whole, "a recurrent state has no part to copy")
        self.require(source != target and not self._of(target), "the target must be empty")
        cells = [cell for cell in self._of(source) if cell.pos < n_tokens]
        self.require(len(cells) == n_tokens > 0, "the source does not hold what is copied")
        in_window = self._in_window(source)
        for cell in cells:
            if self.kv_unified:
                cell.owners.add(target)
                if source in cell.window:
                    cell.window.add(target)
            else:
                window = {target} if cell.pos in in_window else set()
                self._cells.append(Cell(cell.pos, cell.token, cell.value, {target}, window))
        return True

    def seq_swap(self, a: int, b: int) -> bool:
        self._check_seq(a)
        self._check_seq(b)
        self.require(not self.kv_unified and a != b, "only caches of their own can be swapped")
        self.require(not self._recurrent, "a recurrent state was moved")
        if not self.has_memory:
            return False
        self.n_swaps += 1
        held = [(old, new, self._of(old), self._in_window(old)) for old, new in ((a, b), (b, a))]
        for old, new, cells, in_window in held:
            for cell in cells:
                assert cell.owners == {old}
                cell.owners = {new}
                cell.window = {new} if cell.pos in in_window else set()
            self.n_moved += len(cells)
        return True

    def _in_window(self, seq_id: int) -> set[int]:
        """Positions of window cells that a state has: of the last window only."""
        n_swa, last = self.facts.n_swa, self.seq_pos_max(seq_id)
        return {
            cell.pos
            for cell in self._of(seq_id)
            if seq_id in cell.window and (not n_swa or cell.pos > last - n_swa)
        }

    def seq_pos_min(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return min((cell.pos for cell in self._of(seq_id) if seq_id in cell.window), default=-1)

    def seq_pos_max(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return max((cell.pos for cell in self._of(seq_id)), default=-1)

    @property
    def state_key(self) -> str:
        return f"fake {self.facts.n_swa}"

    def state_bytes(self, seq_id: int) -> int:
        return len(self.save_state(seq_id, partial=False))

    def save_state(self, seq_id: int, *, partial: bool) -> bytes:
        self._check_seq(seq_id)
        # As llama.cpp: of a window only what the next token can see.
        seen = self._in_window(seq_id)
        cells = [
            (cell.pos, cell.token, cell.value, cell.pos in seen)
            for cell in self._of(seq_id)
            if not partial or cell.pos in seen
        ]
        return json.dumps(cells).encode()

    def load_state(self, seq_id: int, state: StateBytes, *, partial: bool) -> bool:
        self._check_seq(seq_id)
        try:
            cells = json.loads(bytes(state))
        except ValueError:
            return False
        held = {cell.pos: cell for cell in self._of(seq_id)}
        same = {
            pos
            for pos, *is_, _ in cells
            if pos in held and [held[pos].token, held[pos].value] == is_
        }
        if not partial:
            self.require(not held, "a whole state is put into a sequence that is not empty")
            n_others = len(self._cells) if self.kv_unified else 0
            if n_others + len(cells) > self.n_ctx:
                return False
        if partial and not self._recurrent:
            # Only the window layers; the others must hold the very same tokens.
            self.require(len(same) == len(cells), "a window of other tokens is put back")
            for pos in same:
                held[pos].window.add(seq_id)
            return True
        # What a hybrid model's other layers hold, they may share.
        for pos, cell in held.items():
            if not partial or pos not in same:
                cell.owners.discard(seq_id)
        self._cells = [cell for cell in self._cells if cell.owners]
        for pos, token, value, in_window in cells:
            if not partial or pos not in same:
                window = {seq_id} if in_window else set()
                self._cells.append(Cell(pos, token, value, {seq_id}, window))
        return True

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        self.check_thread()
        self.threads = (n_threads, n_threads_batch)

    def request_abort(self) -> None:
        self._abort.set()

    def clear_abort(self) -> None:
        self.check_thread()
        self._abort.clear()

    def close(self) -> None:
        self.check_thread()
        self.require(not self.open_samplers, "samplers were left open")
        self.n_closed += 1


@dataclass(frozen=True, slots=True)
class Ideal:
    """What a request gives on an engine of its own."""

    tokens: tuple[int, ...]
    reason: str


def ideal_answer(request: Request, n_ctx: int, next_token: NextToken = hash_token) -> Ideal:
    """By the definition, without any engine: no cache, no batches. For requests without stops."""
    tokenizer = FakeTokenizer()
    tokens = list(request.prompt)
    while True:
        n_sampled = len(tokens) - len(request.prompt)
        if len(tokens) > n_ctx or n_sampled == request.max_tokens:
            return Ideal(tuple(tokens[len(request.prompt) :]), "length")
        token = next_token(tuple(tokens))
        if tokenizer.is_eog(token) and not request.ignore_eog:
            return Ideal(tuple(tokens[len(request.prompt) :]), "stop")
        tokens.append(token)
