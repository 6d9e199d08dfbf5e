"""A run of `bench` as plain JSON values, and back. Pure.

What comes back may have been written by anything: it is checked, and bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from llmrun.bench.types import Ablation, BenchRun, Measure, Unit

FORMAT = 1

_MAX_ITEMS = 1000
_MAX_VALUES = 10_000
_MAX_TEXT = 4096
# A time that a calendar has.
_LAST_SECOND = 253_402_300_799


def to_dict(run: BenchRun) -> dict[str, Any]:
    """The run with the keys of its fields, and `format`; medians and gains are there to be read.
    Values that JSON has no number for are left out."""
    return {
        "format": FORMAT,
        "id": run.id,
        "started_at": run.started_at,
        "model": run.model,
        "model_sha256": run.model_sha256,
        "quant": run.quant,
        "machine": run.machine,
        "build": run.build,
        "target": run.target,
        "settings": _scalars(run.settings),
        "measures": [_measure_to_dict(measure) for measure in run.measures],
        "ablations": [
            {
                "setting": ablation.setting,
                "workload": ablation.workload,
                "off": _measure_to_dict(ablation.off),
                "on": _measure_to_dict(ablation.on),
                "gain": _number(ablation.gain),
            }
            for ablation in run.ablations
        ],
        "notes": list(run.notes),
        "is_complete": run.is_complete,
    }


def from_dict(value: object) -> BenchRun:
    """The run that `to_dict` made `value` of. Raises ValueError when it is none; keys that are not
    known are passed over."""
    data = _mapping(value)
    if data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format')!r}")
    started_at = _float(data.get("started_at"))
    if not 0 <= started_at <= _LAST_SECOND:
        raise ValueError("started_at")
    return BenchRun(
        id=_text(data.get("id")),
        started_at=started_at,
        model=_text(data.get("model")),
        model_sha256=_text_or_none(data.get("model_sha256")),
        quant=_text_or_none(data.get("quant")),
        machine=_text(data.get("machine")),
        build=_text(data.get("build")),
        target=_text(data.get("target")),
        settings=_scalars(_mapping(data.get("settings"))),
        measures=tuple(_measure(item) for item in _list(data.get("measures"))),
        ablations=tuple(_ablation(item) for item in _list(data.get("ablations"))),
        notes=tuple(_text(item) for item in _list(data.get("notes"))),
        is_complete=data.get("is_complete") is True,
    )


def _measure_to_dict(measure: Measure) -> dict[str, Any]:
    return {
        "name": measure.name,
        "unit": measure.unit,
        "group": measure.group,
        "higher_is_better": measure.higher_is_better,
        "median": _number(measure.middle),
        "values": [float(value) for value in measure.values if math.isfinite(value)],
        "parameters": _scalars(measure.parameters),
    }


def _measure(value: object) -> Measure:
    data = _mapping(value)
    unit: Unit | None = next((u for u in get_args(Unit) if u == data.get("unit")), None)
    if unit is None:
        raise ValueError("unit")
    return Measure(
        name=_text(data.get("name")),
        unit=unit,
        values=tuple(_float(item) for item in _list(data.get("values"), _MAX_VALUES)),
        higher_is_better=data.get("higher_is_better") is True,
        group=_text(data.get("group")),
        parameters={
            key: item
            for key, item in _scalars(_mapping(data.get("parameters"))).items()
            if item is not None
        },
    )


def _ablation(value: object) -> Ablation:
    data = _mapping(value)
    return Ablation(
        setting=_text(data.get("setting")),
        workload=_text(data.get("workload")),
        off=_measure(data.get("off")),
        on=_measure(data.get("on")),
    )


def _scalars(values: Mapping[str, object]) -> dict[str, str | int | float | bool | None]:
    """Text, numbers and yes or no; what is something else, as text."""
    if len(values) > _MAX_ITEMS:
        raise ValueError("too many items")
    plain: dict[str, str | int | float | bool | None] = {}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain[str(key)] = None
        elif value is None or isinstance(value, str | int | float | bool):
            plain[str(key)] = value
        else:
            plain[str(key)] = str(value)[:_MAX_TEXT]
    return plain


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("not a number") from None
    if not math.isfinite(number):
        raise ValueError("not a number")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError("not a text, or too long")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _list(value: object, most: int = _MAX_ITEMS) -> list[object]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("not a list, or too long")
    return value
