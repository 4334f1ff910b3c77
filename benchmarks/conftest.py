"""Options of ``pytest benchmarks``; the cases and peers are those of ``python -m benchmarks``."""

from __future__ import annotations

import pytest

from benchmarks import peers as peers_module
from benchmarks.peers import DEFAULT, OURS
from benchmarks.sets import ALL, SETS, select


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_rnn")
    group.addoption("--sets", type=_names, default=["goals"], help=f"which cases, of {','.join(SETS)}; {ALL} for all")
    group.addoption("--cells", type=_names, help="some of lstm,gru,rnn")
    group.addoption("--modes", type=_names, help="some of training,inference,streaming")
    group.addoption("--shapes", type=_names, help="some of the sets' shapes, or your own: BxTxH or BxTxIxH")
    group.addoption("--full", action="store_true", help="large cases too")
    group.addoption("--peers", type=_names, default=list(DEFAULT), help="whom to time beside ours")
    group.addoption("--threads", type=int, default=2, help="threads of every provider (default 2)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    known = peers_module.peers()
    for name in option("--peers"):
        if name not in known:
            raise pytest.UsageError(f"--peers: expected some of {','.join(known)}, got {name!r}")
    if option("--threads") < 1:
        raise pytest.UsageError(f"--threads: expected a whole number of 1 or more, got {option('--threads')}")
    try:
        cases = select(option("--cells"), option("--shapes"), option("--modes"), not option("--full"), option("--sets"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    names = list(dict.fromkeys((OURS, *option("--peers"))))
    pairs = [(case, known[name]) for case in cases for name in names]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{case.key}-{peer.name}" for case, peer in pairs])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, object]) -> None:
    """The file of ``--benchmark-json`` says which libraries ran."""
    output_json["versions"] = {
        name: peer.version() for name, peer in peers_module.peers().items() if peer.unavailable() is None
    }
