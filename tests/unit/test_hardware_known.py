"""Machines by name and from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.errors import NotFoundError, UsageError
from llmrun.hardware.bandwidth import bandwidth_of
from llmrun.hardware.known import describe_names, dump_machine, load_machine, machine_names
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.hardware.machine_file import parse_machine
from llmrun.text import parse_bytes
from tests.fakes.probes import GIB, MIB

ASKED_FOR = {
    "rtx-3060-12gb",
    "rtx-4090-24gb",
    "h100-80gb",
    "m2-8gb",
    "m4-max-64gb",
    "dgx-spark",
    "cpu-16gb",
    "two-gpus",
    "m1-8gb",
    "m1-16gb",
    "m3-pro-36gb",
    "m4-16gb",
    "strix-halo-128gb",
    "rtx-4060-8gb",
    "rtx-5090-32gb",
    "rx-7900-xtx-24gb",
    "container-4gb",
    "wsl-32gb",
}


def test_every_promised_name_is_there():
    assert not ASKED_FOR - set(machine_names())
    assert set(describe_names()) == set(machine_names())
    assert all(describe_names().values())


@pytest.mark.parametrize("name", machine_names())
def test_known_machines_are_sane(name):
    machine = load_machine(name)
    assert machine.name == name
    memory = machine.memory
    assert 0 < memory.available_bytes < memory.total_bytes
    assert memory.bandwidth_bytes_s
    assert machine.cpu.features
    for device in machine.devices:
        assert 0 < device.free_bytes <= device.total_bytes
        assert device.bandwidth_bytes_s
        if device.shares_host_memory:
            assert device.free_bytes <= memory.available_bytes
            assert device.total_bytes <= memory.total_bytes
        else:
            assert device.free_bytes < device.total_bytes
    sizes = [int(word[:-2]) for word in name.split("-") if word.endswith("gb")]
    pools = [device.total_bytes for device in machine.devices] + [memory.total_bytes]
    # What a name promises is in the machine, up to what the firmware keeps.
    if name != "wsl-32gb":
        assert all(any(0.9 <= pool / GIB / size <= 1.01 for pool in pools) for size in sizes)


def test_names_are_found_in_any_case_and_bounded_by_blanks():
    assert load_machine(" RTX-3060-12GB ") == load_machine("rtx-3060-12gb")


def test_two_gpus_are_unequal_and_the_spark_shares():
    totals = [device.total_bytes // GIB for device in load_machine("two-gpus").devices]
    assert totals == [24, 12]
    (spark,) = load_machine("dgx-spark").devices
    assert spark.shares_host_memory
    assert load_machine("container-4gb").cpu.quota == 2.0


def test_an_unknown_name_gives_close_ones():
    with pytest.raises(NotFoundError) as caught:
        load_machine("rtx-3060")
    assert "rtx-3060-12gb" in caught.value.hint
    with pytest.raises(NotFoundError) as caught:
        load_machine("qqqqqqq\x1b")
    assert "\x1b" not in str(caught.value)
    assert "cpu-16gb" in caught.value.hint


@pytest.mark.parametrize("text", ["./none.toml", "none.json", "/no/where", "a\0b/c", "x" * 5000])
def test_a_file_that_is_not_there(text):
    with pytest.raises(NotFoundError):
        load_machine(text)


def write(tmp_path: Path, text: str, name: str = "box.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_the_shortest_file(tmp_path):
    machine = load_machine(write(tmp_path, '[memory]\ntotal = "16GiB"\n'))
    assert machine == Machine(Cpu(4, 4, 4), Memory(16 * GIB, 12 * GIB), name="box")


FULL = """
name = "my PC"
platform = "win32"
arch = "AMD64"
notes = ["with a fan"]
[cpu]
name = "AMD Ryzen 7 7700"
n_logical = 16
n_physical = 8
n_performance = 4
quota = 2.5
features = ["AVX2"]
[memory]
total = "32GiB"
available = 27917287424
bandwidth = "80 GB/s"
limit_source = "somewhere"
[[device]]
name = "CUDA0"
description = "NVIDIA GeForce RTX 3060"
backend = "CUDA"
total = "12GiB"
[[device]]
backend = "Vulkan"
kind = "igpu"
total = "16GiB"
free = 0
shares_host_memory = true
bandwidth = 5e10
"""


def test_a_full_file(tmp_path):
    machine = load_machine(write(tmp_path, FULL))
    assert machine == Machine(
        cpu=Cpu(16, 16, 8, 2.5, 4, "AMD Ryzen 7 7700", ("AVX2",)),
        memory=Memory(32 * GIB, 26 * GIB, "somewhere", 80e9),
        devices=(
            Device(
                "CUDA0", "NVIDIA GeForce RTX 3060", "gpu", 12 * GIB - 768 * MIB, 12 * GIB,
                False, "CUDA", 360e9,
            ),
            Device("Vulkan1", "Vulkan1", "igpu", 0, 16 * GIB, True, "Vulkan", 50e9),
        ),
        platform="win32",
        arch="AMD64",
        name="my PC",
        notes=("with a fan",),
    )  # fmt: skip


def test_json_has_the_same_form(tmp_path):
    values = {"memory": {"total": "8GiB"}, "device": [{"backend": "ROCm", "total": "8GiB"}]}
    machine = load_machine(write(tmp_path, json.dumps(values), "box.json"))
    assert machine.devices[0].name == "ROCm0"
    assert machine.name == "box"


OK = '[memory]\ntotal = "16GiB"\n'


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "memory.total is missing"),
        ("[memory]\n", 1, "memory.total is missing"),
        ('[memory]\n# RAM\ntotal = "16 apples"\n', 3, 'a size such as "16GiB"'),
        ("[memory]\ntotal = 16\n", 2, "no size of a memory"),
        ("[memory]\ntotal = -5\n", 2, "no size of a memory"),
        ("[memory]\ntotal = 1e10\n", 2, "no size of a memory"),
        ("[memory]\ntotal = true\n", 2, "should be a size"),
        ('[memory]\ntotal = "100TiB"\n', 2, "above 64 TiB"),
        ('[memory]\ntotal = "1GiB"\navailable = "2GiB"\n', 3, "above memory.total"),
        ('memory = "16GiB"\n', 1, "memory is not a table"),
        (OK + 'totl = "1GiB"\n', 3, "did you mean total?"),
        ("zzz = 1\n" + OK, 1, "zzz is not a key"),
        ("name = 5\n" + OK, 1, 'a text in "quotes"'),
        ('name = "a\\u001bb"\n' + OK, 1, "printable"),
        ("notes = [1]\n" + OK, 1, "printable texts"),
        (OK + "bandwidth = inf\n", 3, "no speed"),
        (OK + 'bandwidth = "9"\n', 3, "no speed"),
        (OK + 'bandwidth = "fast"\n', 3, "a speed such as"),
        (OK + "[cpu]\nn_logical = 0\n", 4, "whole number"),
        (OK + "[cpu]\nn_physical = 8\nn_logical = 4\n", 4, "above the 4 hardware threads"),
        (OK + "[cpu]\nn_affinity = 9\nn_logical = 4\n", 4, "above n_logical"),
        (OK + "[cpu]\nn_performance = 5\nn_logical = 4\n", 4, "above n_physical"),
        (OK + "[cpu]\nquota = nan\n", 4, "count of cores"),
        (OK + '[cpu]\nquota = "2"\n', 4, "should be a number"),
        (OK + "[device]\ntotal = 5\n", 3, "begin with [[device]]"),
        (OK + "[[device]]\nname = 'a'\n", 3, "device.0.total is missing"),
        (OK + "[[device]]\ntotal = '9GiB'\n[[device]]\ntotal = 'x'\n", 6, "device.1.total"),
        (OK + "[[device]]\ntotal = '9GiB'\nfree = '10GiB'\n", 5, "free is above total"),
        (OK + "[[device]]\ntotal = '9GiB'\nkind = 'cpu'\n", 5, "neither gpu nor igpu"),
        (OK + "[[device]]\ntotal = '17GiB'\nshares_host_memory = true\n", 4, "memory.total"),
        (OK + "[[device]]\ntotal = '1GiB'\nshares_host_memory = 1\n", 5, "true or false"),
        (OK + "[[device]]\nname='a'\ntotal=0\n" * 2, 3, "two entries of the same name"),
        (OK + "[[device]]\ntotal=0\n" * 65, 3, "at most 64"),
    ],
)  # fmt: skip
def test_a_slip_is_an_error_that_names_the_line(tmp_path, text, line, words):
    with pytest.raises(UsageError) as caught:
        load_machine(write(tmp_path, text))
    message = caught.value.message
    assert "\x1b" not in message + str(caught.value.why)
    assert words in message
    assert (f"line {line}:" in message) == (line is not None)
    if line is not None:
        assert text.splitlines()[line - 1].strip() in caught.value.why


@pytest.mark.parametrize("text", ["[memory", "a = ", "[[[[", "x = {" * 3000, "\0"])
def test_what_is_no_toml(tmp_path, text):
    with pytest.raises(UsageError, match="is not TOML"):
        load_machine(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 10_000])
def test_what_is_no_json(tmp_path, text):
    with pytest.raises(UsageError, match="is not JSON"):
        load_machine(write(tmp_path, text, "box.json"))


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_table(tmp_path, text):
    with pytest.raises(UsageError, match="not a table"):
        load_machine(write(tmp_path, text, "box.json"))


def test_files_that_cannot_be_read(tmp_path):
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="too large"):
        load_machine(str(large))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_machine(str(binary))
    with pytest.raises(NotFoundError):
        load_machine(str(tmp_path))


@pytest.mark.parametrize("name", machine_names())
def test_known_machines_survive_a_round_trip(name):
    machine = load_machine(name)
    assert parse_machine(dump_machine(machine), "x") == machine


words = st.text(
    st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1, max_size=20
)
names = st.none() | words
bandwidths = st.none() | st.floats(1e6, 1e14)


@st.composite
def machines(draw) -> Machine:
    n_logical = draw(st.integers(1, 512))
    n_affinity = draw(st.integers(1, n_logical))
    n_physical = draw(st.integers(1, n_affinity))
    n_fast = draw(st.none() | st.integers(1, n_physical))
    quota = draw(st.none() | st.floats(0.01, 512))
    features = tuple(draw(st.lists(words, max_size=4)))
    total = draw(st.integers(1 << 20, 1 << 46))
    memory = Memory(total, draw(st.integers(0, total)), draw(words), draw(bandwidths))
    devices = []
    for i in range(draw(st.integers(0, 3))):
        shares = draw(st.booleans())
        size = draw(st.integers(0, total if shares else 1 << 46))
        devices.append(
            Device(
                f"X{i}",
                draw(words),
                draw(st.sampled_from(["gpu", "igpu"])),
                draw(st.integers(0, size)),
                size,
                shares,
                draw(words | st.just("")),
                draw(bandwidths),
            )
        )
    return Machine(
        Cpu(n_logical, n_affinity, n_physical, quota, n_fast, draw(names), features),
        memory,
        tuple(devices),
        draw(words),
        draw(words),
        draw(names),
        tuple(draw(st.lists(words, max_size=2))),
    )


@given(machines())
def test_any_machine_survives_a_round_trip(machine):
    assert parse_machine(dump_machine(machine), "x") == machine


def test_a_device_of_unknown_speed_stays_unknown():
    card = Device("CUDA0", "NVIDIA GeForce RTX 3060", "gpu", GIB, 12 * GIB)
    machine = Machine(Cpu(4, 4, 4), Memory(16 * GIB, 8 * GIB), (card,))
    assert bandwidth_of(card.description)
    assert parse_machine(dump_machine(machine), "x") == machine


def test_names_from_drivers_cannot_break_the_file():
    card = Device("A", 'evil"\n[memory]\ntotal = 1 \x7f\ud800', "gpu", GIB, 2 * GIB)
    machine = Machine(Cpu(4, 4, 4), Memory(16 * GIB, 8 * GIB), (card,))
    loaded = parse_machine(dump_machine(machine), "x")
    assert loaded.memory == machine.memory
    assert loaded.devices[0].description.startswith('evil"\\n[memory]')


@given(st.text())
def test_no_text_makes_the_parser_fail_in_another_way(text):
    for is_json in (False, True):
        try:
            parse_machine(text, "x", is_json=is_json)
        except UsageError:
            pass


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("16", 16),
        ("16B", 16),
        ("16GiB", 16 * GIB),
        (" 16 gib ", 16 * GIB),
        ("16G", 16 * GIB),
        ("16GB", 16 * 10**9),
        ("1.5GiB", GIB + GIB // 2),
        ("0.1kB", 100),
        ("512m", 512 * MIB),
        ("2TiB", 2048 * GIB),
        ("123456789012345677", 123456789012345677),
    ],
)
def test_sizes_as_people_write_them(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "1.GiB", "16iB", "16Gi B", "1_000", "٣GiB", "9" * 19, "1 2"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_a_folder_is_no_machine_file(tmp_path):
    with pytest.raises(NotFoundError, match="is a folder"):
        load_machine(str(tmp_path))
    for text in (f"./{'x' * 5000}", "./a\0b"):
        with pytest.raises(NotFoundError):
            load_machine(text)
