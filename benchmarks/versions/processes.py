"""The leading end of a version's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import ResultsError

_WORKER = Path(__file__).with_name("worker.py")


class WorkerError(Exception):
    """A process could not do what it was told, or ended; the message is one line."""


def has_package(folder: Path) -> bool:
    """Whether a process could find the package in a folder."""
    return (folder / "fused_rnn" / "__init__.py").is_file()


class Process:
    """A version's process. Requests may be sent to several before their answers are waited for."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.folder = name, folder
        # The order of sets and dicts of strings must not differ from one process to the other.
        own = {"PYTHONHASHSEED": "0", **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
            cwd=folder,
        )
        try:
            self.receive()
        except WorkerError as error:
            self.close()
            raise ResultsError(f"--{name}: {error}") from error

    def send(self, do: str, **arguments: Any) -> None:
        """Tell the process to do something."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(self._ended()) from error

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            WorkerError: if it raised, or the process ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        message = json.loads(line)
        if "error" in message:
            raise WorkerError(" ".join(message["error"].split()))
        return message.get("answer")

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send and receive."""
        self.send(do, **arguments)
        return self.receive()

    @property
    def alive(self) -> bool:
        """Whether it can be told anything."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process does not answer"
        return f"its process ended with code {code}"
