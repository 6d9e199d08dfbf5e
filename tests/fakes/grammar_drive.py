"""A grammar under the real llama.cpp, without a decode: `python -m tests.fakes.grammar_drive MODEL
TEXT`, GBNF on standard input. In a process of its own, because a call that does not end cannot be
stopped in this one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 120


def drive(model: Path, grammar: str, text: str) -> str:
    """Write `text`, looking at the whole vocabulary before each of its first tokens. "done", or
    what went wrong; raises TimeoutExpired when llama.cpp comes to no end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.grammar_drive", str(model), text],
        input=grammar, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT_S,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return done.stdout.strip() or done.stderr[-300:]


def main() -> None:
    import llama_cpp as C

    model_path, text = sys.argv[1], sys.argv[2].encode()
    quiet = C.llama_log_callback(lambda *_: None)
    C.llama_log_set(quiet, ctypes.c_void_p(0))
    options = C.llama_model_default_params()
    options.vocab_only = True
    vocab = C.llama_model_get_vocab(C.llama_model_load_from_file(model_path.encode(), options))
    n_vocab = C.llama_vocab_n_tokens(vocab)
    sampler = C.llama_sampler_init_grammar(vocab, sys.stdin.read().encode(), b"root")
    if not sampler:
        sys.exit("llama.cpp takes no such grammar")
    tokens = (C.llama_token * (len(text) + 8))()
    n_tokens = C.llama_tokenize(vocab, text, len(text), tokens, len(tokens), False, False)
    for i, token in enumerate(tokens[:n_tokens]):
        if token not in allowed(C, sampler, range(n_vocab) if i < 6 else [token]):
            sys.exit(f"token {i} is refused")
        C.llama_sampler_accept(sampler, token)
    print("done")


def allowed(C: object, sampler: object, ids: range | list[int]) -> set[int]:
    """Which of these tokens the grammar takes next."""
    array = (C.llama_token_data * len(ids))()  # type: ignore[attr-defined]
    for i, token in enumerate(ids):
        array[i].id, array[i].logit = token, 1.0
    candidates = C.llama_token_data_array(array, len(ids), -1, False)  # type: ignore[attr-defined]
    C.llama_sampler_apply(sampler, ctypes.byref(candidates))  # type: ignore[attr-defined]
    return {each.id for each in array if each.logit > -1e30}


if __name__ == "__main__":
    main()
