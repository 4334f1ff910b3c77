"""The files of ``python -m benchmarks readme``: the README's block, the results' page, the pictures of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, plots
from benchmarks.jobs import load_jobs
from benchmarks.png import save_png
from benchmarks.readme import Jobs, readme_block, results_page, write_between_markers
from benchmarks.results import ResultsError, merge

Results = Mapping[str, Any]


def write(files: Mapping[Path, Results], readme: Path, folder: Path, training: Path) -> list[Path]:
    """Write all of them.

    Args:
        files: results of one machine by the file they are from.
        readme: with the markers; what is between them is replaced.
        folder: of the results' page, ``README.md``, and of the pictures.
        training: where the training jobs left their files; it may be missing.

    Returns:
        what was written.

    Raises:
        ResultsError: if something cannot be read or written, or there is nothing to show.
    """
    page = folder / "README.md"
    if page.resolve() == readme.resolve():
        raise ResultsError(f"{page} would be written over with the results' page: expected another folder for the pictures")
    results, trained = merge(list(files.values())), load_jobs(training)
    speedups = plots.speedups(results, folder)
    pictures = {"Speed-up over torch.nn": [(_relative(speedups[0], folder), "speed-up for each shape and cell")]}
    pictures |= _pictures(results, folder / "pictures", folder)
    drawn = _job_pictures(training, trained, folder)
    pictures |= {"Whole trainings: loss and gradients": drawn} if drawn else {}
    sources = [(_source(path, folder), _origin(found["run"])) for path, found in files.items()]
    for name, rows in trained.items():
        run = {**rows[-1], "command": [f"python -m benchmarks.training.{name}"]} if rows else {}
        sources.append((_source(training / f"{name}.json", folder), _origin(run)))
    try:
        page.write_text(results_page(results, trained, pictures, sources), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {page}: {error.strerror or error}") from error
    picture, more = (_relative(path, readme.resolve().parent) for path in (speedups[0], page))
    write_between_markers(readme, readme_block(results, picture, trained, more))
    return [readme, page, *speedups]


def _source(path: Path, folder: Path) -> str:
    """A link to a file in the folder; of another one the name: where on a machine it lies says nothing to others."""
    inside = path.resolve().is_relative_to(folder.resolve())
    address = _relative(path, folder)
    return f"[{address}]({address})" if inside else path.name


def _origin(run: Mapping[str, Any]) -> str:
    """The command, the date and the commit of a run, as far as they are known."""
    command, date, commit = " ".join(run.get("command", ())), run.get("date"), run.get("commit")
    return ", ".join(
        part for part in (f"`{command}`" * bool(command), str(date or "")[:10], f"commit {commit}" * bool(commit)) if part
    )


def _pictures(results: Results, folder: Path, base: Path) -> dict[str, list[tuple[str, str]]]:
    """Draw the report's pictures that a page of figures cannot do without, as PNG files in ``folder``.

    Returns:
        heading -> (address relative to ``base``, caption).

    Raises:
        ResultsError: if they cannot be written.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in figures.pictures(results):
            if picture.section != "Memory":
                path = folder / f"{picture.name}.png"
                save_png(picture.figure, path, 150)
                found.setdefault(picture.section, []).append((_relative(path, base), picture.caption))
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from error
    return found


def _job_pictures(folder: Path, trained: Jobs, base: Path) -> list[tuple[str, str]]:
    """The pictures that the jobs drew, as (address relative to ``base``, caption)."""
    names = [path for name in trained for path in sorted(folder.glob(f"{name}*.png")) if ".partial" not in path.name]
    return [(_relative(path, base), path.stem.replace("_", " ")) for path in names]


def _relative(path: Path, base: Path) -> str:
    """The address of a file from a folder, as Markdown writes it."""
    return os.path.relpath(path.resolve(), base.resolve()).replace(os.sep, "/")
