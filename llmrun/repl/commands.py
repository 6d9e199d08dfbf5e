"""The slash commands: a table of names, help and handlers.

A handler gets the state and what was typed after the command's name. It raises LlmrunError for
what the user must mend and returns what the loop shall do next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llmrun.chat.session import FALLBACK_NOTICE
from llmrun.chat.store import Conversation, check_name, is_new_id
from llmrun.errors import NotFoundError, UsageError
from llmrun.repl.parameters import PARAMETERS, restore_settings, set_parameter, show_parameters
from llmrun.repl.state import ReplState, ThinkMode
from llmrun.text import close_names, escape_line, format_bytes, format_count, format_duration


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the loop does after a command. `text` is the last question. `retry`: answer it anew.
    `edit`: let the user edit it, and answer that."""

    action: Literal["go_on", "leave", "retry", "edit"] = "go_on"
    text: str = ""


GO_ON = Outcome()

Handler = Callable[[ReplState, str], Outcome]
Choices = Callable[[ReplState, list[str]], Iterable[tuple[str, str]]]
"""The words that may follow the words typed so far, each with a short help."""


def _no_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    return ()


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    args: str
    help: str
    handler: Handler
    synonyms: tuple[str, ...] = ()
    choices: Choices = _no_choices


def is_command(line: str) -> bool:
    """A line that begins with one slash. Two are a message that begins with one."""
    return line.startswith("/") and not line.startswith("//")


def unescape_message(line: str) -> str:
    return line[1:] if line.startswith("//") else line


def run_command(state: ReplState, line: str) -> Outcome:
    """Run one line that `is_command`. Raises UsageError for an unknown command."""
    word, _, rest = line[1:].strip().partition(" ")
    command = COMMAND_BY_NAME.get(word.lower())
    if command is None:
        near = [f"/{name}" for name in close_names(word, COMMAND_BY_NAME)]
        raise UsageError(
            f"there is no command /{escape_line(word)}",
            why=f"did you mean {' or '.join(near)}?" if near else None,
            hint=f"{near[0] if near else '/help'}, or // to send a line that begins with a slash",
        )
    return command.handler(state, rest.strip())


def complete_command(state: ReplState, before: str) -> list[tuple[str, str]]:
    """Completions of the last word of `before`, a line that begins with a slash."""
    words = before[1:].split(" ")
    current = words[-1].lower()
    if len(words) == 1:
        return [(f"/{c.name}", c.help) for c in COMMANDS if c.name.startswith(current)] or [
            (f"/{name}", c.help) for name, c in COMMAND_BY_NAME.items() if name.startswith(current)
        ]
    command = COMMAND_BY_NAME.get(words[0].lower())
    if command is None:
        return []
    choices = command.choices(state, [word for word in words[1:-1] if word])
    return [(text, help) for text, help in choices if text.lower().startswith(current)]


# ---- handlers ----------------------------------------------------------------------------------


def _help(state: ReplState, rest: str) -> Outcome:
    say = state.screen.say
    if rest:
        command = COMMAND_BY_NAME.get(rest.removeprefix("/").lower())
        if command is None:
            raise UsageError(f"there is no command /{escape_line(rest)}", hint="/help")
        say(f"/{command.name} {command.args}".rstrip())
        say(f"  {command.help}")
        if command.synonyms:
            say(f"  also: {', '.join('/' + name for name in command.synonyms)}")
        return GO_ON
    width = max(len(command.name) + len(command.args) for command in COMMANDS) + 2
    for command in COMMANDS:
        say(f"/{f'{command.name} {command.args}'.rstrip():{width}}  {command.help}")
    say()
    for keys, what in KEYS:
        say(f"{keys:{width + 1}}  {what}")
    return GO_ON


KEYS = (
    ('"""', "begin and end a message of several lines"),
    ("Alt-Enter", "break the line"),
    ("Ctrl-G", "write in your editor"),
    ("Ctrl-C", "stop the answer, or clear the line"),
    ("Ctrl-D", "leave"),
    ("//text", "send a message that begins with a slash"),
)


def _set(state: ReplState, rest: str) -> Outcome:
    name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
    value = value.strip()
    if not name:
        show_parameters(state)
    elif name == "system":
        return _system(state, value)
    elif name == "think":
        return _think(state, value)
    else:
        set_parameter(state, name, value)
    return GO_ON


def _set_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    return ((p.name, p.help) for p in PARAMETERS) if not words else (("default", ""),)


def _show(state: ReplState, rest: str) -> Outcome:
    session, say = state.session, state.screen.say
    facts = session.engine.facts
    rows = [
        ("model", state.model),
        ("type", f"{facts.description}, {format_count(facts.n_params)} parameters, "
                 f"{format_bytes(facts.n_bytes)}"),
        ("context", f"{session.n_ctx} tokens, the model was trained for {facts.n_ctx_train}"),
        ("template", "none: plain transcript" if session.is_fallback else "the model's own"),
        ("thinking", state.think_mode if session.can_think else "this model does not think"),
        ("system", session.system or "none"),
        ("messages", str(len(session.messages))),
    ]  # fmt: skip
    if state.conversation is not None:
        rows.append(("saved as", state.conversation.id))
    for name, value in rows:
        say(f"{name:9} {value}")
    return GO_ON


def _system(state: ReplState, rest: str) -> Outcome:
    session = state.session
    if not rest:
        state.screen.say(session.system or "There is no system message. Set one: /system TEXT")
        return GO_ON
    if rest.lower() in ("none", "off", "clear"):
        session.set_system(None)
        state.screen.note("System message removed.")
    else:
        session.set_system(rest.strip().strip('"') if rest.startswith('"') else rest)
        state.screen.note("System message set; it holds from the next answer on.")
    return GO_ON


def _think(state: ReplState, rest: str) -> Outcome:
    session, note = state.session, state.screen.note
    word = rest.lower()
    if word == "show":
        if not state.last_thinking:
            raise UsageError("the last answer came without thinking")
        state.screen.say(state.last_thinking.strip(), "dim")
        return GO_ON
    if not session.can_think:
        note("This model does not think before it answers.")
        return GO_ON
    if not word:
        state.screen.say(f"thinking is {state.think_mode} (on, hide, off; show: the last one)")
        return GO_ON
    modes: dict[str, tuple[ThinkMode, str]] = {
        "on": ("on", "The model thinks, and you see it."),
        "hide": ("hide", "The model thinks; /think show unfolds the last one."),
        "off": ("off", "The model answers without thinking."),
    }
    if word not in modes:
        raise UsageError(f"/think takes on, hide, off or show, not {rest!r}", hint="/think hide")
    state.think_mode, text = modes[word]
    session.enable_thinking = word != "off"
    note(text)
    return GO_ON


def _clear(state: ReplState, rest: str) -> Outcome:
    state.save()
    state.keep_prefix(is_last=True)
    state.session.clear()
    state.begin_conversation()
    state.screen.note("New conversation; the system message stays.")
    return GO_ON


def _undo(state: ReplState, rest: str) -> Outcome:
    question = state.session.undo()
    if question is None:
        raise UsageError("there is nothing to take back")
    state.save()
    line = question.strip().partition("\n")[0]
    state.screen.note(f"Taken back: {line[:60]}{'…' if line[60:] or chr(10) in question else ''}")
    return GO_ON


def _last_question(state: ReplState) -> str:
    questions = [m.content for m in state.session.messages if m.role == "user"]
    if not questions:
        raise UsageError("there is no question yet")
    return questions[-1]


def _retry(state: ReplState, rest: str) -> Outcome:
    return Outcome("retry", _last_question(state))


def _edit(state: ReplState, rest: str) -> Outcome:
    return Outcome("edit", _last_question(state))


def _save(state: ReplState, rest: str) -> Outcome:
    store, note = state.store, state.screen.note
    if store is None:
        raise UsageError("this session is not saved", why="there is no folder for conversations")
    if not any(message.role == "user" for message in state.session.messages):
        raise UsageError("there is nothing to save yet")
    name, _, word = rest.partition(" ")
    old = state.conversation
    if name and (old is None or name != old.id):
        if store.path_of(check_name(name)).exists() and word.strip() != "force":
            raise UsageError(
                f"there is a conversation {name} already", hint=f"/save {name} force replaces it"
            )
        state.conversation = replace(
            old or Conversation(name, state.model, ()), id=name, stamp=None
        )
        state.save()
        if old is not None and is_new_id(old.id):
            with contextlib.suppress(NotFoundError):
                store.delete(old.id)
    else:
        state.save()
    assert state.conversation is not None
    note(f"Saved as {state.conversation.id}; later turns are saved there too.")
    return GO_ON


def _load(state: ReplState, rest: str) -> Outcome:
    if state.store is None:
        raise UsageError("there are no saved conversations here")
    if not rest:
        raise UsageError("/load needs a name", hint="/list shows the saved conversations")
    # First, for it may be the very one that is loaded.
    state.save()
    try:
        conversation = state.store.resume(rest)
    except NotFoundError as error:
        raise NotFoundError(error.message, why=error.why, hint="/list") from error
    state.keep_prefix(is_last=True)
    state.put_messages(conversation.messages)
    state.begin_conversation()
    state.conversation = conversation
    restore_settings(state, conversation)
    state.restore_prefix()
    note = state.screen.note
    note(f"Loaded {conversation.id}: {len(conversation.messages)} messages.")
    if conversation.model != state.model:
        note(f"It was held with {escape_line(conversation.model)}; /model switches to that.")
    if conversation.title:
        note(f"It began with: {conversation.title}")
    return GO_ON


def _list(state: ReplState, rest: str) -> Outcome:
    say = state.screen.say
    if rest == "models":
        return _show_models(state)
    saved = state.store.list() if state.store is not None else ()
    if not saved:
        say("No saved conversations.")
    width = max((len(entry.id) for entry in saved), default=0)
    for entry in saved[:50]:
        when = entry.updated.astimezone().strftime("%Y-%m-%d %H:%M") if entry.updated else ""
        about = "damaged" if entry.is_damaged else escape_line(entry.title)
        say(f"{entry.id:{width}}  {when}  {about}")
    return GO_ON


def _show_models(state: ReplState) -> Outcome:
    state.screen.say(f"{escape_line(state.model)} (in use)")
    for name in state.list_models() if state.list_models else ():
        if name != state.model:
            state.screen.say(escape_line(name))
    return GO_ON


def _model(state: ReplState, rest: str) -> Outcome:
    if not rest:
        return _show_models(state)
    if state.switch_model is None:
        raise UsageError("the model cannot be changed here", hint=f"llmrun chat {rest}")
    if rest == state.model:
        state.screen.note(f"{escape_line(rest)} is in use already.")
        return GO_ON
    switched = state.switch_model(rest)
    old = state.session
    state.adopt(switched.session)
    old.close()
    if switched.error is not None:
        state.screen.note(f"Still talking to {escape_line(state.model)}.")
        raise switched.error
    state.model = rest
    state.save()
    state.screen.note(
        f"Now talking to {escape_line(rest)}; the conversation goes on."
        if any(message.role == "user" for message in state.session.messages)
        else f"Now talking to {escape_line(rest)}."
    )
    if state.session.is_fallback:
        state.screen.note(FALLBACK_NOTICE)
    return GO_ON


def _stats(state: ReplState, rest: str) -> Outcome:
    say, finish = state.screen.say, state.session.last_finish
    if finish is None or not state.n_answers:
        raise NotFoundError("there is no answer yet to tell about")
    usage, timings = finish.usage, finish.timings
    answers = "1 answer" if state.n_answers == 1 else f"{state.n_answers} answers"
    rows = [
        ("prompt", f"{usage.n_prompt} tokens, {usage.n_cached} of them from the cache, "
                   f"{timings.prompt_tok_s:.0f} tok/s"),
        ("answer", f"{usage.n_completion} tokens, {timings.decode_tok_s:.1f} tok/s"),
        ("guesses", f"{usage.n_accepted} of {usage.n_drafted} right"),
        ("first token", f"after {format_duration(timings.ttft_s)}"),
        ("in all", format_duration(timings.total_s)),
        ("seed", str(finish.seed)),
        ("loading", format_duration(state.session.engine.load_s)),
        ("session", f"{answers}, {state.n_tokens_total} tokens, "
                    f"{format_duration(state.busy_s_total)}"),
    ]  # fmt: skip
    for name, value in rows:
        say(f"{name:12} {value}")
    return GO_ON


def _context(state: ReplState, rest: str) -> Outcome:
    n_ctx = state.session.n_ctx
    used = min(state.session.context_used, n_ctx)
    n_cells = 30
    filled = min(n_cells, -(-used * n_cells // n_ctx))
    bar = "█" * filled + "░" * (n_cells - filled)
    state.screen.say(f"{bar} {used} of {n_ctx} tokens ({100 * used // n_ctx} %)")
    state.screen.say(f"{len(state.session.messages)} messages, {max(n_ctx - used, 0)} tokens left")
    return GO_ON


def _bye(state: ReplState, rest: str) -> Outcome:
    return Outcome("leave")


def _think_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    if not words:
        yield from (
            ("on", "think, and show it"),
            ("hide", "think, one line in its place"),
            ("off", "do not think"),
            ("show", "show the last one"),
        )


def _saved_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    if not words and state.store is not None:
        yield from ((entry.id, escape_line(entry.title)) for entry in state.store.list())


def _model_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    if not words and state.list_models is not None:
        yield from ((name, "") for name in state.list_models())


def _help_choices(state: ReplState, words: list[str]) -> Iterable[tuple[str, str]]:
    return ((command.name, command.help) for command in COMMANDS) if not words else ()


COMMANDS: tuple[Command, ...] = (
    Command("help", "[COMMAND]", "this list, or one command", _help, ("?", "h"), _help_choices),
    Command("set", "[NAME VALUE]", "sampling: show all values, or change one", _set, (),
            _set_choices),
    Command("show", "", "the model and this session", _show, ("info",)),
    Command("system", "[TEXT|none]", "show, set or remove the system message", _system,
            ("system-prompt",)),
    Command("think", "on|hide|off|show", "whether the model thinks first, and how it is shown",
            _think, ("reasoning",), _think_choices),
    Command("clear", "", "begin a new conversation", _clear, ("new", "forget", "reset")),
    Command("undo", "", "take back the last question and its answer", _undo),
    Command("retry", "", "answer the last question anew", _retry, ("regen", "regenerate")),
    Command("edit", "", "edit the last question and send it again", _edit),
    Command("save", "[NAME]", "give the saved conversation a name", _save),
    Command("load", "NAME", "go on with a saved conversation", _load, ("resume",), _saved_choices),
    Command("list", "[models]", "saved conversations, or the models on this machine", _list,
            ("ls",)),
    Command("model", "[NAME]", "show the models, or change to one", _model, ("models",),
            _model_choices),
    Command("stats", "", "speed of the last answer", _stats),
    Command("context", "", "how full the context is", _context, ("ctx",)),
    Command("bye", "", "leave", _bye, ("exit", "quit", "q")),
)  # fmt: skip

COMMAND_BY_NAME: dict[str, Command] = {
    name: command for command in COMMANDS for name in (command.name, *command.synonyms)
}
