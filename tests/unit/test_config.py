"""Settings: precedence, provenance, bad values, and editing the file."""

from __future__ import annotations

import dataclasses
import io
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.cli.config_file import set_in_config_file
from llmrun.config import (
    OPTION_BY_KEY,
    OPTIONS,
    Environment,
    Settings,
    Source,
    load_settings,
    parse_value,
    read_config_file,
    require_option,
)
from llmrun.errors import UsageError


def make_environment(folder: Path, environ: dict[str, str] | None = None) -> Environment:
    return Environment(
        io.StringIO(), io.StringIO(), io.StringIO(), environ or {},
        folder / "config", folder / "state", folder / "data", folder / "cache",
    )  # fmt: skip


def write_config(environment: Environment, text: str) -> None:
    environment.config_dir.mkdir(parents=True, exist_ok=True)
    environment.config_path.write_text(text, encoding="utf-8")


def test_settings_have_one_field_for_each_option() -> None:
    fields = [field.name for field in dataclasses.fields(Settings) if field.name != "sources"]
    assert fields == [option.key for option in OPTIONS]


def test_defaults_of_the_table_and_of_settings_agree(tmp_path: Path) -> None:
    loaded = load_settings(make_environment(tmp_path), {})
    assert dataclasses.replace(loaded, sources={}) == Settings()
    assert all(source == Source("default") for source in loaded.sources.values())


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    environment = make_environment(tmp_path, {"LLMRUN_CTX": "2000", "LLMRUN_TOP_K": "20"})
    write_config(environment, "ctx = 1000\ntop_k = 10\nseed = 7\n")
    settings = load_settings(environment, {"ctx": "3000", "top_k": None})
    assert (settings.ctx, settings.top_k, settings.seed, settings.top_p) == (3000, 20, 7, None)
    assert settings.sources["ctx"] == Source("flag", "--ctx")
    assert settings.sources["top_k"] == Source("environment", "LLMRUN_TOP_K")
    assert settings.sources["seed"] == Source("file", str(environment.config_path))
    assert settings.sources["top_p"] == Source("default")
    assert settings.is_set("seed") and not settings.is_set("top_p")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_option_can_be_set_by_its_variable(option, tmp_path: Path) -> None:
    sample = {
        "flag": "1",
        "switch": "off",
        "count": "2",
        "text": "x",
        "texts": "x",
        "int": "17",
        "float": "0.5",
        "shares": "3,1",
        "choice": option.words[-1] if option.words else "",
    }
    environment = make_environment(tmp_path, {option.env_name: sample[option.kind]})
    settings = load_settings(environment, {})
    assert settings.sources[option.key] == Source("environment", option.env_name)
    assert getattr(settings, option.key) != option.default


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    settings = load_settings(make_environment(tmp_path, {"LLMRUN_CTX": ""}), {})
    assert settings.sources["ctx"] == Source("default")


def test_auto_is_none_and_beats_a_number_in_the_file(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    write_config(environment, 'ctx = 1000\ngpu_layers = "ALL"\n')
    settings = load_settings(environment, {"ctx": "auto"})
    assert (settings.ctx, settings.gpu_layers) == (None, "all")
    assert settings.is_set("ctx")


@pytest.mark.parametrize(
    ("flags", "environ", "file", "words"),
    [
        ({"ctx": "lots"}, {}, "", ["--ctx", "lots", "auto"]),
        ({"ctx": "1"}, {}, "", ["--ctx", "from 16"]),
        ({"temperature": "nan"}, {}, "", ["--temperature", "nan"]),
        ({"temperature": "1e400"}, {}, "", ["--temperature"]),
        ({"top_k": "1.5"}, {}, "", ["--top-k", "whole"]),
        ({}, {"LLMRUN_TOP_P": "2"}, "", ["LLMRUN_TOP_P", "from 0 to 1"]),
        ({}, {"LLMRUN_JSON": "perhaps"}, "", ["LLMRUN_JSON", "true or false"]),
        ({"kv_type": "q3"}, {}, "", ["--kv-type", "q8_0"]),
        ({"tensor_split": "3;1"}, {}, "", ["--tensor-split", "a number"]),
        ({"tensor_split": "0,0"}, {}, "", ["--tensor-split", "above 0", "auto"]),
        ({"tensor_split": "3,-1"}, {}, "", ["--tensor-split", "from 0"]),
        ({"tensor_split": ",".join("1" * 17)}, {}, "", ["--tensor-split", "commas"]),
        ({"cpu_moe": "some"}, {}, "", ["--cpu-moe", "auto, all"]),
        ({"ubatch": "3"}, {}, "", ["--ubatch", "from 16"]),
        ({}, {}, "ctx = true\n", ["config.toml", '"ctx"', "whole"]),
        ({}, {}, "stop = [1]\n", ["config.toml", "list"]),
        ({}, {}, "system = 3\n", ["config.toml", "text"]),
        ({}, {}, "temprature = 1\n", ["temprature", "config.toml"]),
        ({}, {}, "ctx = \n", ["config.toml", "not valid TOML"]),
    ],
)
def test_a_bad_value_names_its_source(flags, environ, file, words, tmp_path: Path) -> None:
    environment = make_environment(tmp_path, environ)
    write_config(environment, file)
    with pytest.raises(UsageError) as caught:
        load_settings(environment, flags)
    for word in words:
        assert word in caught.value.message
    assert "\n" not in caught.value.message


def test_shares_are_words_or_a_list_and_survive_the_file(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    assert load_settings(environment, {"tensor_split": "3, 1.5"}).tensor_split == (3.0, 1.5)
    assert load_settings(environment, {"tensor_split": "auto"}).tensor_split == ()
    write_config(environment, "tensor_split = [3, 0, 1]\n")
    assert load_settings(environment, {}).tensor_split == (3.0, 0.0, 1.0)
    set_in_config_file(environment.config_path, "tensor_split", (2.0, 1.0))
    assert load_settings(environment, {}).tensor_split == (2.0, 1.0)


def test_a_mistyped_key_gets_the_close_one() -> None:
    with pytest.raises(UsageError) as caught:
        require_option("temprature")
    assert "temperature" in (caught.value.why or "")


def test_dashes_are_as_good_as_underscores() -> None:
    assert require_option("max-tokens") is OPTION_BY_KEY["max_tokens"]


def test_editing_keeps_comments_and_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '# mine\nctx = 4096  # enough\n\n# greedy\ntemperature = 0.0\nsystem = "a # b"\n'
    )
    set_in_config_file(path, "ctx", 8192)
    set_in_config_file(path, "system", 'say "hi"\nback\\slash \x7f')
    set_in_config_file(path, "stop", ("a", "b"))
    set_in_config_file(path, "temperature", None)
    text = path.read_text()
    assert text.startswith("# mine\nctx = 8192  # enough\n\n# greedy\nsystem = ")
    assert tomllib.loads(text) == {
        "ctx": 8192, "system": 'say "hi"\nback\\slash \x7f', "stop": ["a", "b"],
    }  # fmt: skip


def test_a_file_that_cannot_be_edited_safely_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    before = 'system = """\nctx = 1\n"""\nctx = 2\n'
    path.write_text(before)
    with pytest.raises(UsageError, match="without spoiling"):
        set_in_config_file(path, "ctx", 3)
    assert path.read_text() == before


def test_setting_makes_the_folder_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    set_in_config_file(path, "quiet", True)
    assert path.read_text() == "quiet = true\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["config.toml"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    set_in_config_file(path, "system", text)
    assert read_config_file(path) == {"system": text}


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()))
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_any_value_is_taken_or_refused_as_usage(option, raw) -> None:
    try:
        parse_value(option, raw, Source("flag", "--x"))
    except UsageError:
        pass
