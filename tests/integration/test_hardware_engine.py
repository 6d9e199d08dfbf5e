"""The real library, asked in a real child."""

from __future__ import annotations

from llmrun.hardware.advice import find_problems
from llmrun.hardware.engine_devices import ask_engine, find_libraries
from llmrun.hardware.probe import Probe, detect_machine


def test_the_engine_lists_its_processor():
    report = ask_engine(Probe(), always=True)
    assert report.problem is None
    assert "CPU" in report.backends
    assert any(device.kind == "cpu" for device in report.devices)
    assert report.version


def test_the_processors_features_are_spelled_as_the_library_spells_them():
    machine = detect_machine(devices=True)
    report = ask_engine(Probe(), always=True)
    # A build for this very processor has them all; a portable one has some.
    assert set(report.features) & set(machine.cpu.features)


def test_the_installed_libraries_are_found_by_name():
    assert {"base", "cpu"} <= (find_libraries(Probe()) or set())


def test_this_machine_is_advised_without_failing():
    probe = Probe()
    for problem in find_problems(detect_machine(probe, devices=True), probe):
        assert problem.hint
