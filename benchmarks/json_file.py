"""JSON files of results: a row on each line, so that two files can be compared by eye and by diff, and six digits a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# No timing has more; the same figures in full take twice the room.
_DIGITS = 6


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a list of rows, whole or not at all."""
    _write(path, _list(rows))


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write an object whose lists hold rows, whole or not at all."""
    parts = (
        f"{json.dumps(key)}: {_list(value) if isinstance(value, list) else _text(value, indent=1)}"
        for key, value in document.items()
    )
    _write(path, "{\n" + ",\n".join(parts) + "\n}")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _list(rows: Sequence[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(_text(row) for row in rows) + "\n]" if rows else "[]"


def _text(value: Any, indent: int | None = None) -> str:
    return json.dumps(_short(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    if isinstance(value, float):
        # NaN and infinity are no JSON: a diverged loss is written as null.
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
