"""The published cache layout, read without the hub's library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrun.hub import layout

OLD, NEW, MAIN = "a" * 40, "b" * 40, "c" * 40


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d", "HOME": "/e"}, "/d/huggingface/hub"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
        ({"HF_HOME": "~/x", "HOME": "/e"}, "/e/x/hub"),
        ({"HF_HUB_CACHE": "", "HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_the_cache_folder_is_found_as_other_tools_find_it(
    environ: dict[str, str], expected: str
) -> None:
    assert layout.cache_dir(environ) == Path(expected)


@pytest.mark.parametrize(
    "environ", [{"HF_HOME": "~/x"}, {"XDG_CACHE_HOME": "/d"}, {"HF_HUB_CACHE": "/q"}, {}]
)
def test_the_hubs_library_agrees_on_the_folder(environ: dict[str, str]) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": "/e"} | environ
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == layout.cache_dir(env)


def test_folder_names_go_both_ways() -> None:
    assert layout.repo_folder("org/na.me-x_1") == "models--org--na.me-x_1"
    assert layout.repo_of_folder("models--org--na.me-x_1") == "org/na.me-x_1"
    assert layout.repo_folder("gpt2") == "models--gpt2"
    assert layout.repo_of_folder("datasets--a--b") is None
    assert layout.repo_of_folder(".locks") is None


@pytest.mark.parametrize("repo", ["", "a/b/c", "../x", "a/..", "a\\b", "a/b c", "a--b/c", "/a"])
def test_what_is_no_repository_id_makes_no_folder(repo: str) -> None:
    with pytest.raises(ValueError, match="not a repository id"):
        layout.repo_folder(repo)


def add_snapshot(cache: Path, commit: str, names: list[str], mtime: float) -> Path:
    folder = cache / "models--org--x" / "snapshots" / commit
    blobs = cache / "models--org--x" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    for name in names:
        blob = blobs / ("d" * 63 + name[0])
        blob.write_bytes(name.encode())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    os.utime(folder, (mtime, mtime))
    return folder


def test_the_main_branch_answers_first_then_the_newest(tmp_path: Path) -> None:
    assert layout.snapshots("org/x", cache=tmp_path) == ()
    add_snapshot(tmp_path, OLD, ["0.gguf"], 100)
    new = add_snapshot(tmp_path, NEW, ["1.gguf"], 200)
    assert layout.snapshots("org/x", cache=tmp_path)[0] == (NEW, new)
    main = add_snapshot(tmp_path, MAIN, ["2.gguf"], 50)
    ref = tmp_path / "models--org--x" / "refs" / "main"
    ref.parent.mkdir()
    ref.write_text(MAIN)
    assert layout.snapshots("org/x", cache=tmp_path)[0] == (MAIN, main)
    assert [name for name, _ in layout.snapshots("org/x", cache=tmp_path)] == [MAIN, NEW, OLD]


def test_a_branch_without_files_does_not_answer(tmp_path: Path) -> None:
    add_snapshot(tmp_path, NEW, ["1.gguf"], 200)
    (tmp_path / "models--org--x" / "snapshots" / MAIN / "empty").mkdir(parents=True)
    ref = tmp_path / "models--org--x" / "refs" / "main"
    ref.parent.mkdir()
    ref.write_text(MAIN)
    assert [name for name, _ in layout.snapshots("org/x", cache=tmp_path)] == [NEW]


def test_files_have_the_hash_of_their_blobs_name(tmp_path: Path) -> None:
    folder = add_snapshot(tmp_path, NEW, ["0.gguf", "sub/1.gguf"], 100)
    (folder / "copied.gguf").write_bytes(b"abc")
    (folder / "broken.gguf").symlink_to("../../blobs/" + "e" * 64)
    files = {f.path: f for f in layout.snapshot_files("org/x", NEW, cache=tmp_path)}
    assert files["0.gguf"].sha256 == "d" * 63 + "0"
    assert files["sub/1.gguf"].n_bytes == len("sub/1.gguf")
    assert files["copied.gguf"].sha256 is None
    assert (files["broken.gguf"].n_bytes, files["broken.gguf"].sha256) == (0, "e" * 64)


@pytest.mark.parametrize("text", ["", "main", "../" * 10, "A" * 40, "\0" * 40])
def test_a_damaged_ref_counts_as_none(tmp_path: Path, text: str) -> None:
    ref = tmp_path / "models--org--x" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(text)
    assert layout.read_ref("org/x", cache=tmp_path) is None


def test_reading_the_store_imports_no_hub_library(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom llmrun.hub.store import Store\n"
        "here = Path(sys.argv[1])\nassert Store(here, here, here).models() == ()\n"
        "assert not {'huggingface_hub', 'httpx2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
