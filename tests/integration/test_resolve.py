"""Names and repositories to files: a fake hub, a real cache folder, and what happens offline."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from llmrun.catalog.load import load_catalog
from llmrun.catalog.names import RepoRef, parse_reference
from llmrun.catalog.resolve import resolve
from llmrun.errors import (
    AuthError,
    DamagedFileError,
    HubUnreachableError,
    NotFoundError,
    UsageError,
)
from llmrun.hub.bundled import bundled_path
from llmrun.hub.layout import RepoPaths
from llmrun.hub.store import Store
from llmrun.hub.types import RemoteFile, RepoListing, StoredFile, StoredModel

CATALOG = load_catalog()
E4B = "unsloth/gemma-4-E4B-it-GGUF"
SMOL = "bartowski/SmolLM2-135M-Instruct-GGUF"
C1, C2 = "1" * 40, "2" * 40


def remote(*paths: str, n_bytes: int = 1_000_000_000) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(path, n_bytes + i * 100_000_000, f"{i:064x}") for i, path in enumerate(paths)
    )


E4B_FILES = remote(
    "README.md",
    "gemma-4-E4B-it-Q4_K_M.gguf",
    "gemma-4-E4B-it-Q5_K_M.gguf",
    "gemma-4-E4B-it-UD-Q4_K_XL.gguf",
    "gemma-4-E4B-it-Q8_0.gguf",
    "BF16/gemma-4-E4B-it-BF16-00001-of-00002.gguf",
    "BF16/gemma-4-E4B-it-BF16-00002-of-00002.gguf",
    "mmproj-F16.gguf",
    "mtp-gemma-4-E4B-it.gguf",
)


@dataclass
class FakeHub:
    """Listings by repository; `down` raises for every question; `asked` records them."""

    repos: dict[str, tuple[RemoteFile, ...]] = field(default_factory=dict)
    commit: str = C1
    down: Exception | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        self.asked.append((repo, revision))
        if self.down is not None:
            raise self.down
        if repo not in self.repos:
            raise NotFoundError(f"no repository {repo}")
        return RepoListing(repo, revision, self.commit, self.repos[repo], licence="apache-2.0")


@dataclass
class FakeStore:
    stored: tuple[StoredModel, ...] = ()

    def models(self) -> tuple[StoredModel, ...]:
        return self.stored


@dataclass
class World:
    hub: FakeHub
    store: FakeStore
    cache: Path
    cwd: Path

    def resolve(self, text: str, **options):
        return resolve(
            text,
            catalog=CATALOG,
            hub=self.hub,
            store=self.store,
            cache=self.cache,
            cwd=self.cwd,
            **options,
        )

    def put(self, repo: str, commit: str, files, *, main: bool = True) -> None:
        """Store files as a snapshot of the shared cache; sizes are made small but true."""
        paths = RepoPaths(self.cache, repo)
        for file in files:
            blob = paths.blob(file.sha256)
            blob.parent.mkdir(parents=True, exist_ok=True)
            with blob.open("wb") as out:
                out.truncate(file.n_bytes)
            pointer = paths.pointer(commit, file.path)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.symlink_to(blob)
        if main:
            paths.ref("main").parent.mkdir(parents=True, exist_ok=True)
            paths.ref("main").write_text(commit)


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "cwd").mkdir()
    hub = FakeHub({E4B: E4B_FILES, SMOL: remote("SmolLM2-135M-Instruct-Q8_0.gguf")})
    return World(hub, FakeStore(), tmp_path / "hub", tmp_path / "cwd")


OFFLINE = HubUnreachableError("the hub cannot be reached", why="no network")


def small(files):
    return tuple(RemoteFile(f.path, 1000 + i, f.sha256) for i, f in enumerate(files))


def pick(files, *parts: str):
    return tuple(f for f in files if any(part in f.path for part in parts))


# ---- the hub answers ---------------------------------------------------------------------------


def test_a_catalog_name_gives_the_default_file_pinned_to_a_commit(world: World) -> None:
    found = world.resolve("gemma-4-e4b")
    assert found.reference == "gemma-4-e4b"
    assert found.title == "Gemma 4 E4B"
    assert found.entry is CATALOG.get("gemma-4-e4b")
    assert (found.repo, found.revision, found.commit) == (E4B, "main", C1)
    assert [file.path for file in found.files] == ["gemma-4-E4B-it-Q4_K_M.gguf"]
    assert (found.quant, found.origin, found.local_paths) == ("Q4_K_M", "hub", ())
    assert found.projector.path == "mmproj-F16.gguf"
    assert found.drafter.path == "mtp-gemma-4-E4B-it.gguf"
    assert [c.label for c in found.alternatives] == [
        "Q4_K_M",
        "Q5_K_M",
        "UD-Q4_K_XL",
        "Q8_0",
        "BF16",
    ]
    assert (found.notes, found.bundled, found.licence) == ((), None, "apache-2.0")
    assert world.hub.asked == [(E4B, "main")]
    wanted = found.file_set(projector=True)
    assert [file.path for file in wanted.files] == ["gemma-4-E4B-it-Q4_K_M.gguf", "mmproj-F16.gguf"]
    assert wanted.commit == C1


@pytest.mark.parametrize(
    ("text", "reference", "quant"),
    [
        ("gemma-4-e4b:q8_0", "gemma-4-e4b:q8_0", "Q8_0"),
        ("GEMMA-4-E4B:Q8_0", "gemma-4-e4b:q8_0", "Q8_0"),
        ("gemma-4-e4b:q4_k_m", "gemma-4-e4b", "Q4_K_M"),
        ("gemma-4-e4b:latest", "gemma-4-e4b", "Q4_K_M"),
        ("gemma4:e4b", "gemma-4-e4b", "Q4_K_M"),
        ("gemma-4", "gemma-4-e4b", "Q4_K_M"),
        ("gemma-4-e4b:q4_k_xl", "gemma-4-e4b:ud-q4_k_xl", "UD-Q4_K_XL"),
        ("gemma-4-e4b:bf16", "gemma-4-e4b:bf16", "BF16"),
        (E4B, f"{E4B}:Q4_K_M", "Q4_K_M"),
        (f"{E4B}:q8_0", f"{E4B}:Q8_0", "Q8_0"),
        (f"hf.co/{E4B}:gemma-4-E4B-it-Q8_0.gguf", f"{E4B}:Q8_0", "Q8_0"),
        (f"https://hf.co/{E4B}/blob/main/gemma-4-E4B-it-Q5_K_M.gguf", f"{E4B}:Q5_K_M", "Q5_K_M"),
        (f"{E4B}@dev:q8_0", f"{E4B}@dev:Q8_0", "Q8_0"),
        (f"{E4B}:gemma-4-e4b-it-q8_0", f"{E4B}:Q8_0", "Q8_0"),
    ],
)  # fmt: skip
def test_references_are_canonical_and_resolve_to_the_same_again(
    world, text, reference, quant
) -> None:
    found = world.resolve(text)
    assert (found.reference, found.quant) == (reference, quant)
    assert found.entry.name == "gemma-4-e4b"
    assert world.resolve(found.reference).files == found.files


def test_the_revision_is_asked_of_the_hub(world: World) -> None:
    assert world.resolve(f"{E4B}@dev").revision == "dev"
    assert world.resolve(f"gemma-4-e4b@{C2}").revision == C2
    assert world.hub.asked == [(E4B, "dev"), (E4B, C2)]


def test_shards_are_one_model(world: World) -> None:
    found = world.resolve("gemma-4-e4b:bf16")
    assert [file.path[-11:-5] for file in found.files] == ["-00002", "-00002"]
    assert [file.path for file in found.files] == [file.path for file in E4B_FILES[5:7]]
    assert found.n_bytes == E4B_FILES[5].n_bytes + E4B_FILES[6].n_bytes


def test_a_repository_that_lacks_a_shard_is_damaged(world: World) -> None:
    world.hub.repos[E4B] = tuple(f for f in E4B_FILES if "00002-of" not in f.path)
    with pytest.raises(DamagedFileError) as caught:
        world.resolve("gemma-4-e4b:bf16")
    assert caught.value.message == f"{E4B} has only 1 of 2 parts of BF16"
    assert caught.value.hint == "llmrun pull gemma-4-e4b:Q4_K_M"
    assert world.resolve("gemma-4-e4b").quant == "Q4_K_M"


def test_a_quant_that_is_not_there_lists_what_is(world: World) -> None:
    with pytest.raises(NotFoundError) as caught:
        world.resolve(f"{E4B}:Q5_K_X")
    error = caught.value
    assert error.message == f'no file matches quant "Q5_K_X" in {E4B}'
    assert error.why == (
        "available: Q4_K_M 1.10 GB, Q5_K_M 1.20 GB, UD-Q4_K_XL 1.30 GB, Q8_0 1.40 GB, BF16 3.10 GB"
    )
    assert error.hint == f"llmrun pull {E4B}:Q5_K_M"


def test_a_long_list_is_cut(world: World) -> None:
    world.hub.repos["o/many"] = remote(
        *(f"x{i}-v.gguf" for i in range(20)),
    )
    with pytest.raises(NotFoundError) as caught:
        world.resolve("o/many:Q4_0")
    assert caught.value.why.endswith("and 8 more")


def test_a_projector_is_no_model(world: World) -> None:
    with pytest.raises(UsageError, match="projector"):
        world.resolve(f"{E4B}:mmproj-F16.gguf")


def test_a_repository_without_gguf(world: World) -> None:
    world.hub.repos["google/gemma-4-E4B-it"] = remote("model.safetensors", "config.json")
    world.hub.repos["who/knows"] = remote("model.safetensors")
    with pytest.raises(NotFoundError) as caught:
        world.resolve("google/gemma-4-E4B-it")
    assert caught.value.hint == "llmrun pull gemma-4-e4b"
    with pytest.raises(NotFoundError) as caught:
        world.resolve("who/knows")
    assert caught.value.hint == "llmrun search knows"


def test_another_repository_of_a_known_model_finds_its_entry(world: World) -> None:
    world.hub.repos["mradermacher/SmolLM3-3B-i1-GGUF"] = remote("SmolLM3-3B.i1-Q4_K_M.gguf")
    found = world.resolve("mradermacher/SmolLM3-3B-i1-GGUF")
    assert found.entry.name == "smollm3-3b"
    assert found.title == "SmolLM3 3B"
    world.hub.repos["o/all-in-one"] = remote("Qwen3-8B-Q4_K_M.gguf", "Phi-4-Q4_0.gguf")
    assert world.resolve("o/all-in-one").entry.name == "qwen3-8b"
    assert world.resolve("o/all-in-one:q4_0").entry.name == "phi-4"
    world.hub.repos["o/unknown"] = remote("zzz.gguf")
    found = world.resolve("o/unknown")
    assert (found.entry, found.title, found.quant) == (None, "unknown", None)
    assert found.reference == "o/unknown:zzz.gguf"


def test_a_quant_that_two_files_share_is_named_by_file(world: World) -> None:
    world.hub.repos["o/two"] = remote("a-Q4_0.gguf", "b-Q4_0.gguf")
    assert world.resolve("o/two:b-Q4_0.gguf").reference == "o/two:b-Q4_0.gguf"


def test_auth_and_missing_repositories_are_passed_on(world: World) -> None:
    with pytest.raises(NotFoundError, match="no repository o/nothing"):
        world.resolve("o/nothing")
    world.hub.down = AuthError("gated")
    with pytest.raises(AuthError):
        world.resolve("gemma-4-e4b")


# ---- unknown names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("gema-4-e4b", "gemma-4-e4b"), ("gemma4-e4b:q8_0", "gemma4:e4b"), ("qwen3_8b", "qwen3-8b")],
)
def test_a_mistyped_name_is_answered_without_the_network(world, typed, meant) -> None:
    with pytest.raises(NotFoundError) as caught:
        world.resolve(typed)
    assert caught.value.message == f"no model is called '{typed}'"
    assert caught.value.why.startswith("did you mean ")
    assert meant in caught.value.why
    assert caught.value.hint.startswith("llmrun pull ")
    assert world.hub.asked == []


def test_a_name_like_nothing_else(world: World) -> None:
    with pytest.raises(NotFoundError) as caught:
        world.resolve("zzzzqqqq")
    assert caught.value.hint == "llmrun search zzzzqqqq"
    assert world.hub.asked == []


def test_cached_models_are_among_the_names_that_are_offered(world: World) -> None:
    model = StoredModel("me/Wunderding-GGUF:Q4_0", "me/Wunderding-GGUF", C1, "Q4_0", (), 5, None,
                        "complete", "hub-cache")  # fmt: skip
    world.store.stored = (model,)
    with pytest.raises(NotFoundError) as caught:
        world.resolve("wunderding-gguf")
    assert "me/Wunderding-GGUF:Q4_0" in caught.value.why


# ---- the cache ---------------------------------------------------------------------------------


def test_a_cached_copy_answers_without_the_network(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q4_K_M", "mmproj")))
    found = world.resolve("gemma-4-e4b", prefer_cache=True)
    assert (found.origin, found.commit, found.quant) == ("cache", C2, "Q4_K_M")
    pointer = RepoPaths(world.cache, E4B).pointer(C2, "gemma-4-E4B-it-Q4_K_M.gguf")
    assert found.local_paths == (pointer,)
    assert found.files[0].sha256 == E4B_FILES[1].sha256
    assert found.projector.path == "mmproj-F16.gguf"
    assert found.notes == ()
    assert world.hub.asked == []


def test_the_cache_answers_without_importing_huggingface_hub(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q4_K_M")))
    code = f"""
import sys
from pathlib import Path
from llmrun.catalog.load import load_catalog
from llmrun.catalog.resolve import resolve
from llmrun.hub.client import Hub
class Store:
    def models(self): return ()
cache = Path({str(world.cache)!r})
found = resolve("gemma-4-e4b", catalog=load_catalog(), hub=Hub(cache=cache), store=Store(),
                prefer_cache=True, cache=cache)
assert found.local_paths, found
print(sorted({{"huggingface_hub", "httpx2", "llama_cpp"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_hub_is_asked_when_the_cache_is_not_preferred_or_lacks_it(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q8_0")))
    assert world.resolve("gemma-4-e4b:q8_0").origin == "hub"
    found = world.resolve("gemma-4-e4b:q5_k_m", prefer_cache=True)
    assert (found.origin, found.quant) == ("hub", "Q5_K_M")


def test_without_a_tag_another_cached_quant_is_used_and_said(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q8_0")))
    found = world.resolve("gemma-4-e4b", prefer_cache=True)
    assert (found.quant, found.reference) == ("Q8_0", "gemma-4-e4b:q8_0")
    assert found.notes == ("using Q8_0, which is in the cache; the default is Q4_K_M",)


def test_the_default_in_an_older_snapshot_comes_before_another_quant(world: World) -> None:
    world.put(E4B, C1, small(pick(E4B_FILES, "Q4_K_M")), main=False)
    world.put(E4B, C2, small(pick(E4B_FILES, "Q8_0")))
    assert world.resolve("gemma-4-e4b", prefer_cache=True).commit == C1
    assert world.resolve("gemma-4-e4b:q8_0", prefer_cache=True).commit == C2


def test_of_two_snapshots_the_one_of_main_answers(world: World) -> None:
    files = small(pick(E4B_FILES, "Q4_K_M"))
    world.put(E4B, C2, files)
    world.put(E4B, C1, files, main=False)
    assert world.resolve("gemma-4-e4b", prefer_cache=True).commit == C2
    by_hash = f"{E4B}@{C1[:10]}"
    found = world.resolve(by_hash, prefer_cache=True)
    assert (found.commit, found.origin) == (C1, "cache")
    assert world.resolve(f"{E4B}@11111", prefer_cache=True).origin == "hub"
    assert world.resolve(f"{E4B}@main", prefer_cache=True).commit == C2
    world.hub.down = OFFLINE
    with pytest.raises(HubUnreachableError):
        world.resolve(f"{E4B}@dev", prefer_cache=True)


def test_a_torn_or_broken_cached_model_does_not_answer(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "BF16-00001")))
    assert world.resolve("gemma-4-e4b:bf16", prefer_cache=True).origin == "hub"
    world.put(E4B, C1, small(pick(E4B_FILES, "Q8_0")))
    RepoPaths(world.cache, E4B).blob(E4B_FILES[4].sha256).unlink()
    assert world.resolve("gemma-4-e4b:q8_0", prefer_cache=True).origin == "hub"


def test_cached_shards(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "BF16")))
    found = world.resolve("gemma-4-e4b:bf16", prefer_cache=True)
    assert [path.name for path in found.local_paths] == [
        "gemma-4-E4B-it-BF16-00001-of-00002.gguf",
        "gemma-4-E4B-it-BF16-00002-of-00002.gguf",
    ]


def test_offline_the_cached_snapshot_answers_with_a_note(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q4_K_M")))
    world.hub.down = OFFLINE
    found = world.resolve("gemma-4-e4b")
    assert (found.origin, found.commit) == ("cache", C2)
    assert found.notes == ("the hub cannot be reached: this is the copy in the cache",)
    assert world.resolve(f"{E4B}:q4_k_m").origin == "cache"


def test_offline_with_another_quant_only(world: World) -> None:
    world.put(E4B, C2, small(pick(E4B_FILES, "Q8_0")))
    world.hub.down = OFFLINE
    with pytest.raises(HubUnreachableError) as caught:
        world.resolve("gemma-4-e4b:q4_k_m")
    assert caught.value.why == "no network; in the cache: Q8_0 1.00 kB"
    assert caught.value.hint == "llmrun run gemma-4-e4b:Q8_0"
    with pytest.raises(HubUnreachableError) as caught:
        world.resolve("qwen3-8b")
    assert caught.value is OFFLINE


def test_what_the_hub_lists_is_found_on_disk(world: World) -> None:
    files = small(E4B_FILES)
    world.hub.repos[E4B] = files
    world.put(E4B, C2, pick(files, "Q4_K_M", "BF16"))
    found = world.resolve("gemma-4-e4b")
    assert (found.origin, found.commit) == ("hub", C1)
    assert [path.parent.name for path in found.local_paths] == [C2]
    assert len(world.resolve("gemma-4-e4b:bf16").local_paths) == 2
    assert world.resolve("gemma-4-e4b:q8_0").local_paths == ()
    with RepoPaths(world.cache, E4B).blob(E4B_FILES[1].sha256).open("wb") as cut_short:
        cut_short.truncate(10)
    assert world.resolve("gemma-4-e4b").local_paths == ()
    world.put("o/fresh", C1, files[:2])
    world.hub.repos["o/fresh"] = files
    assert len(world.resolve("o/fresh").local_paths) == 1
    changed = tuple(RemoteFile(f.path, f.n_bytes, "f" * 64) for f in files)
    world.hub.repos["o/fresh"] = changed
    assert world.resolve("o/fresh").local_paths == ()


# ---- the bundled file --------------------------------------------------------------------------


def bundled_copy(path: Path) -> StoredModel:
    spec = CATALOG.get("smollm2-135m").bundled
    file = StoredFile("SmolLM2-135M-Instruct.Q4_1.gguf", path, spec.n_bytes, spec.sha256)
    return StoredModel("smollm2-135m", "x", None, "Q4_1", (file,), spec.n_bytes, None, "complete",
                       "bundled")  # fmt: skip


@pytest.mark.parametrize("error", [OFFLINE, AuthError("403"), NotFoundError("404")])
def test_the_bundled_file_answers_when_the_hub_does_not(world: World, error) -> None:
    world.hub.down = error
    found = world.resolve("smollm2-135m", prefer_cache=True)
    assert (found.origin, found.quant, found.local_paths) == ("bundled", "Q4_1", ())
    assert found.bundled is CATALOG.get("smollm2-135m").bundled
    assert found.files[0].n_bytes == 98_362_432
    assert len(found.notes) == 1 and found.notes[0].startswith("the hub ")
    assert (found.repo, found.commit) == (None, None)
    assert found.reference == "smollm2-135m"
    assert world.resolve(SMOL).reference == "smollm2-135m"
    assert world.resolve("smollm2-135m:q4_1").origin == "bundled"
    assert world.resolve("smollm2-135m:Q4_1").reference == "smollm2-135m:q4_1"
    with pytest.raises(type(error)):
        world.resolve("smollm2-135m:q8_0")
    with pytest.raises(type(error)):
        world.resolve("smollm2-135m@dev")
    with pytest.raises(ValueError, match="no repository"):
        found.file_set()


def test_the_hub_comes_first_while_it_answers(world: World) -> None:
    found = world.resolve("smollm2-135m", prefer_cache=True)
    assert (found.origin, found.quant) == ("hub", "Q8_0")
    assert world.resolve("smollm2-135m:q4_1").origin == "bundled"


def test_a_fetched_bundled_file_needs_no_network(world: World, tmp_path: Path) -> None:
    place = tmp_path / "bundled.gguf"
    world.store.stored = (bundled_copy(place),)
    found = world.resolve("smollm2-135m", prefer_cache=True)
    assert (found.origin, found.local_paths) == ("bundled", (place,))
    assert world.hub.asked == []
    world.store.stored = (replace(bundled_copy(place), state="partial"),)
    assert world.resolve("smollm2-135m", prefer_cache=True).origin == "hub"
    world.put(SMOL, C1, small(remote("SmolLM2-135M-Instruct-Q8_0.gguf")))
    assert world.resolve("smollm2-135m", prefer_cache=True).origin == "cache"


def test_the_real_store_shows_the_fetched_bundled_file(world: World, tmp_path: Path) -> None:
    spec = CATALOG.get("smollm2-135m").bundled
    place = bundled_path(spec, tmp_path / "data")
    place.parent.mkdir(parents=True)
    with place.open("wb") as out:
        out.truncate(spec.n_bytes)
    world.store = Store(world.cache, tmp_path / "data", tmp_path / "state")
    found = world.resolve("smollm2-135m", prefer_cache=True)
    assert (found.origin, found.local_paths) == ("bundled", (place,))
    assert [model.reference for model in world.store.models()] == [found.reference]


# ---- anything else -----------------------------------------------------------------------------


def test_a_mirror_from_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://mirror.example/{E4B}"
    with pytest.raises(UsageError):
        world.resolve(url)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert world.resolve(url).repo == E4B
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:x/")
    with pytest.raises(UsageError):
        world.resolve(url)


def test_a_folder_named_like_a_model_does_not_hide_it(world: World) -> None:
    (world.cwd / "gemma-4-e4b").mkdir()
    assert world.resolve("gemma-4-e4b").repo == E4B
    (world.cwd / "gemma-4-e4b" / "x.gguf").write_bytes(b"GGUF")
    assert world.resolve("gemma-4-e4b").origin == "local"


def test_every_catalog_repository_is_a_reference() -> None:
    for entry in CATALOG.entries():
        assert parse_reference(entry.repo, exists=lambda _: False) == RepoRef(entry.repo)
