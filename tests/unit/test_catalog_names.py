"""The reference grammar: every row of the contract, ambiguity, hostile text, any text at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmrun.catalog.names import (
    CatalogRef,
    PathRef,
    RepoRef,
    echo,
    is_local_model,
    parse_reference,
)
from llmrun.errors import LlmrunError, UsageError
from llmrun.text import escape_line


def parse(text: str, *existing: str):
    return parse_reference(text, exists=lambda name: name in existing)


REPO = "unsloth/gemma-4-E4B-it-GGUF"
COMMIT = "b4243c15" * 5

ROWS = [
    ("gemma-4-e4b", CatalogRef("gemma-4-e4b")),
    ("gemma-4-e4b:q8_0", CatalogRef("gemma-4-e4b", "q8_0")),
    ("Gemma-4-E4B:Q8_0", CatalogRef("Gemma-4-E4B", "Q8_0")),
    ("  gemma-4-e4b  ", CatalogRef("gemma-4-e4b")),
    ("qwen3:8b", CatalogRef("qwen3", "8b")),
    ("qwen3.5-0.8b", CatalogRef("qwen3.5-0.8b")),
    ("gemma-4-e4b:file.gguf", CatalogRef("gemma-4-e4b", "file.gguf")),
    ("gemma-4-e4b@main:q8_0", CatalogRef("gemma-4-e4b", "q8_0", "main")),
    (f"{REPO}", RepoRef(REPO)),
    (f"{REPO}:Q4_K_M", RepoRef(REPO, "Q4_K_M")),
    (f"{REPO}:ud-q4_k_xl", RepoRef(REPO, "ud-q4_k_xl")),
    (f"{REPO}:gemma-4-E4B-it-Q4_K_M.gguf", RepoRef(REPO, "gemma-4-E4B-it-Q4_K_M.gguf")),
    (f"{REPO}:BF16/x-00001-of-00002.gguf", RepoRef(REPO, "BF16/x-00001-of-00002.gguf")),
    (f"{REPO}:my model.gguf", RepoRef(REPO, "my model.gguf")),
    (f"{REPO}@{COMMIT}", RepoRef(REPO, None, COMMIT)),
    (f"{REPO}@v1.0:Q8_0", RepoRef(REPO, "Q8_0", "v1.0")),
    (f"{REPO}:Q8_0@v1.0", RepoRef(REPO, "Q8_0", "v1.0")),
    (f"{REPO}@refs/pr/3:Q8_0", RepoRef(REPO, "Q8_0", "refs/pr/3")),
    (f"{REPO}@main", RepoRef(REPO)),
    (f"hf.co/{REPO}:Q4_K_M", RepoRef(REPO, "Q4_K_M")),
    (f"HF.co/{REPO}", RepoRef(REPO)),
    (f"huggingface.co/{REPO}", RepoRef(REPO)),
    (f"hf://{REPO}:Q4_K_M", RepoRef(REPO, "Q4_K_M")),
    (f"hf://models/{REPO}", RepoRef(REPO)),
    (f"hf://{REPO}@dev", RepoRef(REPO, None, "dev")),
    (f"hf://{REPO}@dev/sub/x.gguf", RepoRef(REPO, "sub/x.gguf", "dev")),
    (f"hf://{REPO}@refs/pr/3/x.gguf", RepoRef(REPO, "x.gguf", "refs/pr/3")),
    (f"hf.co/{REPO}@refs/pr/3:Q8_0", RepoRef(REPO, "Q8_0", "refs/pr/3")),
    (f"hf.co/{REPO}:sub/x.gguf", RepoRef(REPO, "sub/x.gguf")),
    (f"hf://{REPO}/sub/x-Q4_0.gguf", RepoRef(REPO, "sub/x-Q4_0.gguf")),
    (f"https://huggingface.co/{REPO}", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}/", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}.git", RepoRef(REPO)),
    (f"http://hf.co/{REPO}", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}:Q8_0", RepoRef(REPO, "Q8_0")),
    (f"https://huggingface.co/{REPO}/blob/main/x-Q4_K_M.gguf", RepoRef(REPO, "x-Q4_K_M.gguf")),
    (
        f"https://huggingface.co/{REPO}/resolve/{COMMIT}/Q8_0/x-00001-of-00002.gguf?download=true",
        RepoRef(REPO, "Q8_0/x-00001-of-00002.gguf", COMMIT),
    ),
    (
        f"https://huggingface.co/{REPO}/resolve/refs%2Fpr%2F3/x.gguf",
        RepoRef(REPO, "x.gguf", "refs/pr/3"),
    ),
    (
        f"https://huggingface.co/{REPO}/resolve/refs/pr/3/x.gguf",
        RepoRef(REPO, "x.gguf", "refs/pr/3"),
    ),
    (f"https://huggingface.co/{REPO}/tree/main", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}/tree/v2", RepoRef(REPO, None, "v2")),
    (f"https://huggingface.co/{REPO}/tree/main/BF16", RepoRef(REPO, "BF16")),
    (f"https://huggingface.co/{REPO}/tree/main/docs", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}/blob/main/README.md", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}/discussions/3", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}?show_file_info=x-Q5_K_M.gguf", RepoRef(REPO, "x-Q5_K_M.gguf")),
    (f"https://huggingface.co/{REPO}?library=llama-cpp#usage", RepoRef(REPO)),
    (f"https://huggingface.co/api/models/{REPO}", RepoRef(REPO)),
    (f"https://huggingface.co/{REPO}/blob/main/a%20b.gguf", RepoRef(REPO, "a b.gguf")),
    (f"-hf {REPO}:Q4_K_M", RepoRef(REPO, "Q4_K_M")),
    (f"--hf-repo={REPO}:Q4_K_M", RepoRef(REPO, "Q4_K_M")),
    ("./model.gguf", PathRef(Path("./model.gguf"))),
    ("../m/model", PathRef(Path("../m/model"))),
    ("/models/x.gguf", PathRef(Path("/models/x.gguf"))),
    ("model.gguf", PathRef(Path("model.gguf"))),
    ("models/llama/x.GGUF", PathRef(Path("models/llama/x.GGUF"))),
    ("C:\\models\\x.gguf", PathRef(Path("C:\\models\\x.gguf"))),
    ("D:/models/x", PathRef(Path("D:/models/x"))),
    ("c:x.gguf", PathRef(Path("c:x.gguf"))),
    ("models\\x", PathRef(Path("models\\x"))),
    ("\\\\host\\share\\x.gguf", PathRef(Path("\\\\host\\share\\x.gguf"))),
    (".", PathRef(Path())),
    ("file:///models/a%20b.gguf", PathRef(Path("/models/a b.gguf"))),
    ("file:///C:/m/x.gguf", PathRef(Path("C:/m/x.gguf"))),
]


@pytest.mark.parametrize(("text", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_grammar(text: str, expected) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "existing", "expected"),
    [
        ("gemma-4-e4b", "gemma-4-e4b", PathRef(Path("gemma-4-e4b"))),
        ("org/name", "org/name", PathRef(Path("org/name"))),
        ("org/name:Q4_0", "org/name", RepoRef("org/name", "Q4_0")),
        ("odd:name", "odd:name", PathRef(Path("odd:name"))),
        ("-dash", "-dash", PathRef(Path("-dash"))),
        (" padded", " padded", PathRef(Path(" padded"))),
        ("-hf org/name", "org/name", RepoRef("org/name")),
    ],
)
def test_an_existing_path_wins(text, existing, expected) -> None:
    assert parse(text, existing) == expected


def test_only_files_and_folders_with_models_exist(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.GGUF").touch()
    (tmp_path / "blob").touch()
    found = {name: is_local_model(str(tmp_path / name)) for name in ("bare", "full", "blob", "no")}
    assert found == {"bare": False, "full": True, "blob": True, "no": False}
    assert not is_local_model("\0")
    assert not is_local_model("x" * 5000)
    assert not is_local_model("\ud800")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse("~/x.gguf") == PathRef(tmp_path / "x.gguf")
    assert parse("~no-such-user-here/x") == PathRef(Path("~no-such-user-here/x"))


def test_a_mirror_may_be_named() -> None:
    url = "https://mirror.example:8443/org/name/blob/main/x.gguf"
    assert parse_reference(url, hosts=("mirror.example:8443",)) == RepoRef("org/name", "x.gguf")
    with pytest.raises(UsageError, match="not a model reference") as caught:
        parse(url)
    assert "HF_ENDPOINT" in caught.value.why


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "a/b/c",
        "org/",
        "/".join("abc") + "/d",
        "org/na me",
        "org/../name",
        "org/name--x",
        "org/name:",
        "gemma:",
        "gemma@",
        "gemma:q4@",
        "org/name@../../x",
        "org/name@a//b",
        "org/name:../x.gguf",
        "org/name:/etc/x.gguf",
        "org/name:a//b.gguf",
        "org/name:sub/Q4_K_M",
        "org/name:" + "x" * 600 + ".gguf",
        "o" * 90 + "/" + "n" * 90,
        "x" * 5000,
        "name with spaces",
        "gemma\x1b[31m",
        "gemma\u202e4",
        "gemma\nq4",
        "./a\x1b[31m.gguf",
        "org/name:\x07.gguf",
        "gemma\ud800",
        "-x",
        "--model",
        "-hf",
        "-hf " * 1000 + "a/b",
        "https://example.com/org/name",
        "https://huggingface.co",
        "https://huggingface.co/org",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/spaces/org/name",
        "https://huggingface.co/org/name/resolve/..%2F..%2Fx/a.gguf",
        "https://huggingface.co/org/name/blob/main/%2e%2e/a.gguf",
        "https://huggingface.co/org/name/blob/main/a%1b.gguf",
        "https://huggingface.co/o%2fr/n%00",
        "https://[::1/org/name",
        "https://huggingface.co:99999/org/name",
        "ollama://library/x",
        "s3://bucket/x.gguf",
        "file://",
        "file://server/x.gguf",
        "file:///a%00b.gguf",
        "hf://",
        "hf.co/",
        "hf.co/org",
        "café/naïve",
        "模型",
    ],
)
def test_refused_text(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    for part in (caught.value.message, caught.value.why or "", caught.value.hint or ""):
        assert escape_line(part) == part
        assert len(part) < 400
        part.encode()


def test_echo_is_short_escaped_and_encodable() -> None:
    assert echo("a\x1b]0;x\x07\ud800") == "a\\x1b]0;x\\x07\\ud800"
    assert len(echo("x" * 10_000)) == 120


PIECES = st.sampled_from(
    """https:// http:// hf:// hf.co/ huggingface.co/ file:// -hf ./ ../ ~ ~/ / // \\ C:\\ : @ # ? %
    %2e %00 %1b .. . .gguf org name gemma-4-e4b q4_k_m blob main resolve tree refs pr models
    datasets show_file_info= [ ] \ud800 \x00 \x1b \u202e é""".split()  # noqa: SIM905
) | st.text(max_size=5)


@given(st.lists(PIECES, max_size=12).map("".join) | st.text())
@example("-hf " * 300)
@example("~\x00")
@example("https://[")
@example("file://[")
@example("https://huggingface.co:x/a/b")
def test_any_text_gives_a_reference_or_an_llmrun_error(text: str) -> None:
    try:
        found = parse_reference(text, exists=lambda _: False)
    except LlmrunError as error:
        assert error.exit_code == 2
        assert escape_line(error.message) == error.message
        error.message.encode()
        return
    assert isinstance(found, CatalogRef | RepoRef | PathRef)
    if isinstance(found, RepoRef):
        assert found.repo.count("/") == 1
        for part in (found.repo, found.tag or "", found.revision or ""):
            assert ".." not in part.split("/")
            assert escape_line(part) == part


@given(
    st.sampled_from(["org/name", "a/b.c-d_e"]),
    st.none() | st.sampled_from(["Q4_K_M", "UD-Q4_K_XL", "x.gguf", "s/x-00001-of-00002.gguf"]),
    st.none() | st.sampled_from(["dev", "refs/pr/1", COMMIT]),
)
def test_what_is_written_by_the_grammar_is_read_back(repo, tag, revision) -> None:
    at = "" if revision is None else f"@{revision}"
    colon = "" if tag is None else f":{tag}"
    expected = RepoRef(repo, tag, revision)
    assert parse(f"{repo}{at}{colon}") == expected
    assert parse(f"hf.co/{repo}{colon}") == RepoRef(repo, tag)
    if tag is None or not tag.endswith(".gguf"):
        assert parse(f"{repo}{colon}{at}") == expected
