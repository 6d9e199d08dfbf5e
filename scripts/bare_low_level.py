"""The least Python that answers a prompt with llama.cpp: the yardstick of `bench_startup.py`.

    python scripts/bare_low_level.py MODEL.gguf PROMPT MAX_TOKENS

No checks, no chat template engine (SmolLM2's ChatML is written out), defaults of the library but
for the context's size, its logits and the log.
"""

import ctypes
import sys

import llama_cpp.llama_cpp as C

path, prompt, max_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])


@C.llama_log_callback
def silent(_level, _text, _user):
    pass


C.llama_log_set(silent, None)
C.llama_backend_init()
model = C.llama_model_load_from_file(path.encode(), C.llama_model_default_params())
vocab = C.llama_model_get_vocab(model)
params = C.llama_context_default_params()
params.n_ctx = 2048  # what llmrun plans for so short an answer
params.n_batch = 512
params.n_threads = params.n_threads_batch = 2
params.n_outputs_max = 1
ctx = C.llama_init_from_model(model, params)

system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
text = (
    f"<|im_start|>system\n{system}<|im_end|>\n"
    f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
).encode()
tokens = (C.llama_token * len(text))()
n = C.llama_tokenize(vocab, text, len(text), tokens, len(text), False, True)
chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
C.llama_decode(ctx, C.llama_batch_get_one(tokens, n))
piece = ctypes.create_string_buffer(256)
one = (C.llama_token * 1)()
for step in range(max_tokens):
    one[0] = C.llama_sampler_sample(chain, ctx, -1)
    if C.llama_vocab_is_eog(vocab, one[0]):
        break
    length = C.llama_token_to_piece(vocab, one[0], piece, 256, 0, False)
    sys.stdout.write(piece.raw[:length].decode())
    sys.stdout.flush()
    if step + 1 < max_tokens:
        C.llama_decode(ctx, C.llama_batch_get_one(one, 1))
print()
C.llama_sampler_free(chain)
C.llama_free(ctx)
C.llama_model_free(model)
