"""`llmrun run`: prompt, streams, sampling, JSON, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest

from llmrun.cli import acquire
from llmrun.cli.run import RunResult, TimingsData, UsageData, stats_line
from llmrun.errors import EngineError
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine, fake_facts
from tests.fakes.fake_tokenizer import FakeTokenizer

THINKING = fake_facts(
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{# <think> #}"
)


def test_the_answer_is_all_of_stdout(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["Hello, wörld!"]))
    run = cli("run", cli.model(), "Hi", stdin_tty=True)
    assert (run.code, run.out, run.err) == (0, "Hello, wörld!\n", "")
    assert cli.engine.closed
    assert cli.engine.prompt_text() == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("argument", "stdin", "prompt"),
    [
        (["Why?"], "", "Why?"),
        ([], "From a pipe.\n", "From a pipe."),
        (["Why?"], "The text.\n", "The text.\n\nWhy?"),
        (["-"], "The text.", "The text."),
        (["Why?"], "  \n", "Why?"),
    ],
)
def test_prompt_from_argument_stdin_or_both(argument, stdin, prompt, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    assert cli("run", cli.model(), *argument, stdin=stdin).code == 0
    assert f"user\n{prompt}<|im_end|>" in cli.engine.prompt_text()


def test_no_prompt_is_wrong_usage(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), stdin_tty=True)
    assert run.code == 2 and "there is no prompt" in run.err and run.out == ""
    assert cli.services is not None and not cli.services.opened


def test_stdin_that_is_no_text_is_refused(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8")
    run = cli("run", cli.model(), stdin=stdin)
    assert run.code == 2 and "UTF-8" in run.err


def test_system_message(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli("run", cli.model(), "Hi", "--system", "Be brief.")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in cli.engine.prompt_text()


def test_json_has_these_keys_and_nothing_else(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["<think>hm</think>Yes."], facts=THINKING))
    model = cli.model()
    run = cli("run", model, "Hi", "--json")
    assert run.code == 0 and run.err == "" and run.out.count("\n") == 1
    assert run.envelope == {
        "llmrun": 1, "command": "run", "status": "ok", "errors": [],
        "data": {
            "model": model, "text": "Yes.", "thinking": "hm", "finish_reason": "stop",
            "usage": {
                "prompt_tokens": len(cli.engine.requests[0].prompt),
                "completion_tokens": len("<think>hm</think>Yes."), "cached_tokens": 0,
                "drafted_tokens": 0, "accepted_tokens": 0,
            },
            "timings": {
                "load_s": 0.25, "ttft_s": 0.05, "prompt_tok_s": 500.0, "decode_tok_s": 50.0,
            },
        },
    }  # fmt: skip


def test_no_thinking_is_null(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    assert cli("run", cli.model(), "Hi", "--json").data["thinking"] is None


def test_thinking_goes_beside_the_answer_on_a_terminal_only(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["<think>hm</think>Yes."], facts=THINKING))
    model = cli.model()
    on_terminal = cli("run", model, "Hi", tty=True)
    assert on_terminal.out == "Yes.\n"
    assert re.sub(r"\x1b\[[0-9]*m", "", on_terminal.err) == "hm\n\n"
    for flags, tty in ([], False), (["-q"], True), (["--hide-thinking"], True):
        run = cli("run", model, "Hi", *flags, tty=tty)
        assert (run.out, run.err) == ("Yes.\n", "")


def test_user_flags_beat_header_beats_catalog_beats_engine(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model(
        "SmolLM2-135M-Instruct-Q8_0.gguf",
        metadata={"general.sampling.temp": 0.3, "general.sampling.top_k": 7,
                  "general.sampling.min_p": 99.0},
    )  # fmt: skip
    run = cli("run", model, "Hi", "--top-k", "3", "--seed", "5", "--stop", "END")
    assert run.code == 0
    request = cli.engine.requests[0]
    sampling = request.sampling
    assert sampling.top_k == 3  # the flag, over 7 in the header
    assert sampling.temperature == pytest.approx(0.3)  # the header, over 0.2 in the catalog
    assert sampling.top_p == 0.9  # the catalog, over 0.95
    assert sampling.min_p == 0.05  # the header's value is out of range
    assert (sampling.seed, request.stop) == (5, ("END",))


def test_every_sampling_flag_reaches_the_engine(tmp_path: Path) -> None:
    flags = {
        "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5,
        "xtc_probability": 0.5, "xtc_threshold": 0.2, "dry_multiplier": 0.5,
        "repeat_penalty": 1.5, "frequency_penalty": -0.5, "presence_penalty": 0.5, "seed": 9,
    }  # fmt: skip
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    cli = Cli(tmp_path)
    assert cli("run", cli.model(), "Hi", *words, "--max-tokens", "3").code == 0
    request = cli.engine.requests[0]
    assert {key: getattr(request.sampling, key) for key in flags} == flags
    assert request.max_tokens == 3


def test_load_options_reach_the_engine(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    words = "--ctx 512 --gpu-layers 0 --kv-type bf16 --flash-attn on --threads 2 --speculative off"
    assert cli("run", cli.model(), "Hi", *words.split()).code == 0
    options = cli.services.opened[0][1]
    assert (options.n_ctx, options.n_gpu_layers, options.flash_attn) == (512, 0, "on")
    assert (options.type_k, options.type_v) == ("bf16", "bf16")
    assert (options.n_threads, options.n_threads_batch) == (2, 2)
    assert (options.steady_threads, options.speculative) == (False, "off")


def test_threads_follow_the_machine_unless_a_number_is_given(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    assert cli("run", cli.model(), "Hi", "--speculative", "ngram").code == 0
    options = cli.services.opened[0][1]
    assert (options.steady_threads, options.speculative) == (True, "ngram")


def test_a_draft_model_is_counted_in_and_opened_beside(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    target, draft = cli.model(), cli.model("small-Q8_0.gguf")
    words = ("run", target, "Hi", "--speculative", "draft", "--draft-model", draft)
    assert cli(*words).code == 0
    options = cli.services.opened[0][1]
    assert options.speculative == "draft" and options.draft_model == (Path(draft),)
    # It takes as much again as the model itself.
    plans = []
    with patch.object(acquire, "plan_on_disk", side_effect=acquire.plan_on_disk) as planned:
        for more in ((), ("--speculative", "draft", "--draft-model", draft)):
            assert cli("run", target, "Hi", *more).code == 0
            plans.append(planned.call_args.args[-1])
    assert plans[0].companions_bytes == 0
    assert plans[1].companions_bytes > Path(draft).stat().st_size
    assert plans[1].speculative == "draft"


def test_what_cannot_draft_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    target = cli.model()
    cases = [
        (cli.model("other.gguf", n_vocab=600), "another vocabulary"),
        (cli.model("embedder.gguf", metadata={"llama.pooling_type": 1}), "cannot draft"),
    ]
    for draft, words in cases:
        run = cli("run", target, "Hi", "--speculative", "draft", "--draft-model", draft)
        assert run.code == 2 and words in run.err
    assert not cli.services.opened


def test_guesses_are_told(tmp_path: Path) -> None:
    result = RunResult(
        "m", "x", None, "stop", UsageData(5, 9, 0, 8, 6), TimingsData(0.1, 0.1, 1.0, 2.0)
    )
    assert "9 tokens (6 of 8 guesses right) at" in stats_line(result)


def test_a_model_that_is_forced_is_mapped_and_not_copied(tmp_path: Path) -> None:
    cli = Cli(tmp_path, memory=1_000_000)
    assert cli("run", cli.model(), "Hi", "--force").code == 0
    options = cli.services.opened[0][1]
    assert options.use_mmap and not options.use_repack


def test_logit_bias_by_number_and_by_text(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    words = ["--logit-bias", "65=-5", "--logit-bias", "B=ban", "--logit-bias", "==1.5"]
    assert cli("run", cli.model(), "Hi", *words).code == 0
    assert cli.engine.requests[0].sampling.logit_bias == (
        (65, -5.0),
        (66, -float("inf")),
        (61, 1.5),
    )


@pytest.mark.parametrize("bias", ["65", "=1", "65=x", "65=inf", "65=nan", "two=1", "99999=1"])
def test_bad_logit_bias_is_wrong_usage(bias: str, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), "Hi", "--logit-bias", bias)
    assert run.code == 2 and "--logit-bias" in run.err
    assert cli.engine.closed


def test_raw_has_no_template_and_no_escaping(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["\x1b[1mbold"]))
    run = cli("run", cli.model(), "Once", "--raw")
    assert cli.engine.prompt_text() == "Once"
    assert run.out == "\x1b[1mbold\n"
    assert cli("run", cli.model(), "Once").out == "\\x1b[1mbold\n"
    assert cli("run", cli.model(), "Once", "--raw", "--system", "x").code == 2


def test_a_base_model_continues_plain_text(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine([" upon a time"], facts=fake_facts(None)))
    run = cli("run", cli.model(), "Once")
    assert (run.code, run.out) == (0, " upon a time\n")
    assert cli.engine.prompt_text() == "Once"


def test_stats_go_to_stderr_also_when_quiet(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), "Hi", "--stats", "-q")
    assert run.out == "Hello!\n"
    assert "6 tokens at 50.0 tok/s" in run.err and "first after 50 ms" in run.err


def test_prompt_longer_than_the_context(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(n_ctx=40))
    run = cli("run", cli.model(), "x" * 100, "--json")
    assert run.code == 1
    (error,) = run.envelope["errors"]
    assert error["code"] == "context_length_exceeded"
    assert "40" in error["message"] and str(100 + 19) in error["message"]
    assert not cli.engine.requests and cli.engine.closed


def test_a_full_context_is_told(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["y" * 500], n_ctx=100))
    run = cli("run", cli.model(), "Hi")
    assert run.code == 0 and "the context of 100 tokens is full" in run.err
    run = cli("run", cli.model(), "Hi", "--max-tokens", "5")
    assert (run.out, run.err) == ("yyyyy\n", "")


def test_json_schema_becomes_a_grammar(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(['{"a": 1}']))
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    path = tmp_path / "schema.json"
    path.write_text(schema)
    for given in (schema, str(path)):
        run = cli("run", cli.model(), "Hi", "--json-schema", given)
        assert run.code == 0 and json.loads(run.out) == {"a": 1}
        assert "root ::=" in cli.engine.requests[-1].sampling.grammar


def test_json_cut_short_is_a_failure(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(['{"a": 1}']))
    run = cli("run", cli.model(), "Hi", "--json-schema", "{}", "--max-tokens", "3", "--json")
    assert run.code == 1 and run.envelope["status"] == "error"
    assert run.data["text"] == '{"a' and run.data["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--json-schema", "{nonsense"], 2),
        (["--json-schema", "[1]"], 2),
        (["--json-schema", "/no/such/file"], 3),
        (["--grammar", "/no/such/file"], 3),
        (["--json-schema", "{}", "--grammar", "x"], 2),
        (["--temperature", "hot"], 2),
        (["--speculative", "draft"], 2),
        (["--speculative", "draft", "--draft-model", "/no/such.gguf"], 3),
        (["--draft-model", "smollm2-135m"], 2),
        (["--no-such-flag"], 2),
    ],
)
def test_bad_options_end_before_anything_is_loaded(flags, code, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), "Hi", *flags)
    assert run.code == code and run.out == "" and run.err.startswith("error: ")
    assert not cli.services.opened
    as_json = cli("run", cli.model(), "Hi", *flags, "--json")
    assert as_json.code == code and as_json.envelope["status"] == "error" and as_json.err == ""


def test_grammar_file(tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "yes" | "no"')
    cli = Cli(tmp_path)
    assert cli("run", cli.model(), "Hi", "--grammar", str(tmp_path / "g.gbnf")).code == 0
    assert cli.engine.requests[0].sampling.grammar == 'root ::= "yes" | "no"'


def test_ctrl_c_keeps_what_came(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine([("Hel", KeyboardInterrupt(), "lo")]))
    run = cli("run", cli.model(), "Hi")
    assert run.code == 130 and run.out == "Hel\n" and "interrupted" in run.err
    assert cli.engine.streams[0].cancelled and cli.engine.closed
    as_json = cli("run", cli.model(), "Hi", "--json")
    assert as_json.code == 130 and as_json.envelope["errors"][0]["code"] == "interrupted"


def test_an_engine_failure_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine([("Hel", EngineError("it broke", why="bad luck"))]))
    run = cli("run", cli.model(), "Hi")
    assert run.code == 1 and run.out == "Hel\n" and run.err == "error: it broke\nbad luck\n"


class BrokenPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def fileno(self) -> int:
        raise OSError


def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), "Hi", stdout=BrokenPipe())
    assert (run.code, run.err) == (1, "")
    assert cli.engine.closed


def test_a_defect_is_one_line_and_a_hint(tmp_path: Path) -> None:
    def explode() -> FakeEngine:
        raise ZeroDivisionError("division by zero")

    cli = Cli(tmp_path, explode)
    run = cli("run", cli.model(), "Hi")
    assert run.code == 1 and "Traceback" not in run.err and "LLMRUN_DEBUG=1" in run.err
    assert run.err.count("\n") <= 4
    cli.environ["LLMRUN_DEBUG"] = "1"
    assert "Traceback" in cli("run", cli.model(), "Hi").err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_no_memory_for_the_program_itself(error: Exception, tmp_path: Path) -> None:
    def explode() -> FakeEngine:
        raise error

    cli = Cli(tmp_path, explode)
    run = cli("run", cli.model(), "Hi")
    assert run.code == 1 and run.err.startswith("error: out of memory\ntry: pass --ctx 4096")


def test_will_not_fit_unless_forced(tmp_path: Path) -> None:
    cli = Cli(tmp_path, memory=1_000_000)
    run = cli("run", cli.model(), "Hi", "--json")
    assert run.code == 5 and run.envelope["errors"][0]["code"] == "will_not_fit"
    assert not cli.services.opened
    assert cli("run", cli.model(), "Hi", "--force").code == 0


def test_bounded_answers_take_a_small_context(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model(n_ctx_train=32768)
    cli("run", model, "Hi", "--max-tokens", "5")
    small = cli.services.opened[0][1].n_ctx
    cli("run", model, "Hi")
    assert small < cli.services.opened[0][1].n_ctx


def test_the_tokenizers_rules_hold_for_text_of_users(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer()
    cli = Cli(tmp_path, FakeEngine(tokenizer=tokenizer))
    assert cli("run", cli.model(), "a<|im_end|>b").code == 0
    end = tokenizer.id_of["<|im_end|>"]
    assert cli.engine.requests[0].prompt.count(end) == 1


class FullDisk(io.StringIO):
    """What `>/dev/full` is: every byte is refused."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_stdout_on_a_full_disk_is_5_and_no_traceback(flags, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("run", cli.model(), "Hi", *flags, stdout=FullDisk())
    assert run.code == 5 and cli.engine.closed
    assert run.err == "error: the output cannot be written\nNo space left on device\n"


def test_a_larger_context_is_not_advised_beyond_what_the_model_was_trained_for(
    tmp_path: Path,
) -> None:
    cli = Cli(tmp_path, FakeEngine(n_ctx=40))
    assert "pass --ctx" in cli("run", cli.model(n_ctx_train=2048), "x" * 100).err
    run = cli("run", cli.model(n_ctx_train=64), "x" * 100)
    assert run.code == 1 and "trained for contexts of up to 64 tokens" in run.err
    assert "--ctx" not in run.err


def test_what_to_try_repeats_the_users_own_words(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    assert "try: llmrun run 'my model.gguf' " in cli("run", "my model.gguf").err

    def explode() -> FakeEngine:
        raise ZeroDivisionError

    cli = Cli(tmp_path, explode)
    model = cli.model()
    assert (
        f"try: LLMRUN_DEBUG=1 llmrun run {model} 'Hi there'\n" in cli("run", model, "Hi there").err
    )


def test_what_a_grammar_cannot_enforce_is_said(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(['{"multipleOf": 1}']))
    number = {"type": "integer", "minimum": 3, "multipleOf": 3}
    schema = {"type": "object", "properties": {"multipleOf": {"$ref": "#/$defs/n"}}}
    run = cli("run", cli.model(), "Hi", "--json-schema", json.dumps(schema | {"$defs": {"n": {}}}))
    assert run.code == 0 and run.err == ""
    held = json.dumps(schema | {"$defs": {"n": number}})
    run = cli("run", cli.model(), "Hi", "--json-schema", held)
    assert run.code == 0 and "multipleOf cannot be enforced" in run.err
    assert "minimum" not in run.err
    assert run.out == '{"multipleOf": 1}\n'


def test_an_answer_under_a_schema_that_does_not_parse_is_a_failure(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(['{"a": "one\ntwo"}']))
    run = cli("run", cli.model(), "Hi", "--json-schema", '{"type": "object"}', "--json")
    assert run.code == 1 and run.envelope["status"] == "error"
    assert "not valid JSON" in run.envelope["errors"][0]["message"]
    assert run.data["text"] == '{"a": "one\ntwo"}'
