"""The table of measured choices: rows that ``python -m benchmarks gpu --tune`` wrote, read once.

A row says, for one device, cell, direction of the walk, dtype, H, N and D, which regime and tiles were fastest. The table that
comes with the package is empty until somebody has measured; ``FUSED_RNN_TUNED`` names another file.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
PATH = Path(__file__).with_name("tuned.json")
ENVIRONMENT = "FUSED_RNN_TUNED"
KEYS = ("device", "cell", "backward", "dtype", "hidden", "batch", "directions")
CHOICE = ("regime", "units", "tile", "warps")


def table_path() -> Path:
    """The file that is read."""
    return Path(os.environ.get(ENVIRONMENT) or PATH)


@functools.lru_cache(maxsize=4)
def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a table.

    Raises:
        ValueError: if the file is not such a table.
        OSError: if it cannot be read.
    """
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a table of tile sizes in JSON: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("rows"), list):
        raise ValueError(f"{path}: expected a table of tile sizes of format {FORMAT}")
    for row in table["rows"]:
        missing = [name for name in (*KEYS, *CHOICE) if name not in row]
        if missing:
            raise ValueError(f"{path}: a row lacks {', '.join(missing)}")
    return list(table["rows"])


def find(device: str, cell: str, backward: bool, dtype: str, hidden: int, batch: int, directions: int) -> dict[str, Any] | None:
    """The row of the nearest sizes that are no smaller in H and N, and in H not twice as large; or None.

    Raises:
        ValueError, OSError: as ``rows``.
    """
    alike = [
        row
        for row in rows(table_path())
        if (row["device"], row["cell"], row["backward"], row["dtype"], row["directions"])
        == (device, cell, backward, dtype, directions)
        and hidden <= row["hidden"] < 2 * hidden
        and row["batch"] >= batch
    ]
    return min(alike, key=lambda row: (row["hidden"], row["batch"]), default=None)
