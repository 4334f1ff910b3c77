"""The backends: what each of them does is said in ``fused_rnn.kernels.protocol``."""

from __future__ import annotations

import importlib
import importlib.util

from fused_rnn.cells import CELLS


def cell_modules(package: str) -> dict[str, str]:
    """For each cell that a backend has kernels of, the module that holds them.

    Args:
        package: of the backend.
    """
    places = {cell.name: f"{package}.{cell.module}" for cell in CELLS.values()}
    return {name: place for name, place in places.items() if importlib.util.find_spec(place) is not None}


def import_cells(package: str) -> None:
    """Import a backend's modules of all cells that it has."""
    for place in dict.fromkeys(cell_modules(package).values()):
        importlib.import_module(place)
