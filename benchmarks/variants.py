"""``python -m benchmarks variants``: cells that torch.nn lacks, and a user's own, against loops of torch's operations.

Every cell runs as ``fused_rnn.Recurrent``, and as a loop over time with the same weights in three forms: plain, under
TorchScript, and under torch.compile, which unrolls it. The product with the input is one for all steps in each of them, as a
careful author writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import paged, timing
from benchmarks.arguments import Parser, names, number, positive_seconds
from benchmarks.cases import parse_shape
from benchmarks.peers import compiling
from benchmarks.peers.base import Provider
from benchmarks.peers.fused import package
from benchmarks.results import ResultsError, check_writable, default_path, describe_run

# Steps that torch.compile is to unroll, half a minute of compiling for each cell, shape and mode.
MOST_UNROLLED = 20
# BxTxH; those of up to MOST_UNROLLED steps are compiled too.
SHAPES = ("1x100x128", "16x64x128", "32x100x256", "20x35x650", "256x20x64")
QUICK_SHAPES = ("16x20x64",)
MODES = ("training", "inference")
# Seconds for each cell, shape and mode.
SECONDS, QUICK_SECONDS = 4.0, 0.5
# Of float32, against the same loop in float64, as a share of the largest value.
TOLERANCE = 2e-5

_positive_int = number(int, lambda value: value >= 1, "a whole number of 1 or more")


# The loops' steps: the gates' shares of the input, h, the other state, and the recurrent weights. Functions that TorchScript
# takes; a cell of one state hands the other one back.
def _lstm(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + F.linear(h, w, b)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_coupled(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    i, g, o = (x + F.linear(h, w, b)).chunk(3, 1)
    c = c + torch.sigmoid(i) * (torch.tanh(g) - c)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_reset_before(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    H = h.shape[1]
    r, z = torch.sigmoid(x[:, : 2 * H] + F.linear(h, w[: 2 * H], b[: 2 * H])).chunk(2, 1)
    n = torch.tanh(x[:, 2 * H :] + F.linear(r * h, w[2 * H :], b[2 * H :]))
    return n + z * (h - n), c


def _mgu(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    H = h.shape[1]
    f = torch.sigmoid(x[:, :H] + F.linear(h, w[:H], b[:H]))
    n = torch.tanh(x[:, H:] + F.linear(f * h, w[H:], b[H:]))
    return h + f * (n - h), c


def _forgetful(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    f, g = (x + F.linear(h, w, b)).chunk(2, 1)
    f = torch.sigmoid(f)
    return f * h + (1 - f) * torch.tanh(g), c


@dataclass(frozen=True)
class Variant:
    """A cell: how ours is found, and the loop's step.

    Attributes:
        cell: -> what ``Recurrent`` takes.
        step: the same step as a loop has it.
        gates: how many.
        beside: the module of this package whose time it is to be compared with, on the same backend; or None.
    """

    cell: Callable[[], Any]
    step: Callable[..., tuple[Tensor, Tensor]]
    gates: int
    beside: str | None = None


def _own_lstm() -> Any:
    """An LSTM as a user writes it."""
    from fused_rnn.cells import sigmoid, tanh

    @package().cell(gates="i f g o", states="h c")
    def own_lstm(x: Any, W: Any, h: Any, c: Any) -> Any:
        i = sigmoid(x.i + W.i(h))
        f = sigmoid(x.f + W.f(h))
        g = tanh(x.g + W.g(h))
        o = sigmoid(x.o + W.o(h))
        c = f * c + i * g
        return o * tanh(c), c

    return own_lstm


def _own_forgetful() -> Any:
    """A cell with a forget gate alone."""
    from fused_rnn.cells import sigmoid, tanh

    @package().cell(gates="f g")
    def own_forgetful(x: Any, W: Any, h: Any) -> Any:
        f = sigmoid(x.f + W.f(h))
        return f * h + (1 - f) * tanh(x.g + W.g(h))

    return own_forgetful


def _of_package(name: str) -> Any:
    return getattr(package().cells, name)


VARIANTS: dict[str, Variant] = {
    "gru_reset_before": Variant(partial(_of_package, "gru_reset_before"), _gru_reset_before, 3, "GRU"),
    "lstm_coupled": Variant(partial(_of_package, "lstm_coupled"), _lstm_coupled, 3, "LSTM"),
    "mgu": Variant(partial(_of_package, "mgu"), _mgu, 2, "GRU"),
    "own_lstm": Variant(_own_lstm, _lstm, 4, "LSTM"),
    "own_forgetful": Variant(_own_forgetful, _forgetful, 2),
}


class Loop(nn.Module):
    """One layer as a loop over time, with the parameters of ``Recurrent``; TorchScript takes it too."""

    def __init__(self, parameters: Mapping[str, Tensor], step: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step = step
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, input: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """Input (T, B, I), states (B, H); returns h of every step."""
        x = F.linear(input, self.weight_ih_l0, self.bias_ih_l0)
        # TorchScript wants to be told.
        outs: list[Tensor] = []
        for t in range(input.shape[0]):
            h, c = self.step(x[t], h, c, self.weight_hh_l0, self.bias_hh_l0)
            outs.append(h)
        return torch.stack(outs)


def _provider(module: nn.Module, call: Callable[..., Tensor], input: Tensor, d_out: Tensor, training: bool) -> Provider:
    leaves = [input.clone().requires_grad_(training), *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        out = call(leaves[0])
        return (out, *torch.autograd.grad(out, leaves, d_out)) if training else (out,)

    return Provider(step=step, scope=compiling.scope)


def providers_of(
    variant: Variant, B: int, T: int, H: int, training: bool, compiled: bool = True
) -> tuple[dict[str, Provider], list[Tensor]]:
    """Everybody who can be measured, by name, and the results in float64."""
    rnn = package()
    cell = variant.cell()
    ours = rnn.Recurrent(cell, H, H)
    parameters = dict(ours.named_parameters())
    input, d_out = torch.randn(T, B, H), torch.randn(T, B, H)
    zeros = torch.zeros(B, H)
    found = {"ours": _provider(ours, lambda x: ours(x)[0], input, d_out, training)}
    if variant.beside is not None:
        beside = getattr(rnn, variant.beside)(H, H)
        # What makes kernels of a user's equations is compared with itself.
        backend = "numba" if cell.row.derived else None
        found[f"our {variant.beside}"] = _provider(beside, lambda x: _on(backend, beside, x), input, d_out, training)
    loop = Loop(parameters, variant.step)
    found["loop"] = _provider(loop, lambda x: loop(x, zeros, zeros), input, d_out, training)
    scripted = torch.jit.script(Loop(parameters, torch.jit.script(variant.step)))
    found["TorchScript"] = _provider(scripted, lambda x: scripted(x, zeros, zeros), input, d_out, training)
    if compiled and T <= MOST_UNROLLED and compiling.unavailable() is None:
        unrolled = Loop(parameters, variant.step)
        unrolled.compile(dynamic=False)
        found["torch.compile"] = _provider(unrolled, lambda x: unrolled(x, zeros, zeros), input, d_out, training)
    exact = Loop({name: value.double() for name, value in parameters.items()}, variant.step)
    wide = _provider(exact, lambda x: exact(x, zeros.double(), zeros.double()), input.double(), d_out.double(), training)
    with torch.set_grad_enabled(training):
        return found, [value.detach() for value in wide.step()]


def _on(backend: str | None, module: Any, input: Tensor) -> Tensor:
    if backend is None:
        out: Tensor = module(input)[0]
        return out
    with package().backend(backend):
        out = module(input)[0]
    return out


def measure(name: str, shape: str, mode: str, seconds: float, compiled: bool = True) -> list[dict[str, Any]]:
    """The rows of a cell at a shape in a mode: each with its time, and how often ours fits into it."""
    B, T, _, H = parse_shape(shape).sizes
    training = mode == "training"
    torch.manual_seed(0)
    found, exact = providers_of(VARIANTS[name], B, T, H, training, compiled)
    rows: dict[str, dict[str, Any]] = {}
    for who, provider in found.items():
        rows[who] = {"cell": name, "shape": shape, "mode": mode, "provider": who, "status": "ok"}
        with torch.set_grad_enabled(training), provider.scope():
            results = [value.detach() for value in provider.step()]
        if who.startswith("our "):
            continue
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, exact, strict=True))
        rows[who]["error"] = error
        if error > TOLERANCE:
            rows[who] |= {"status": "wrong", "reason": f"an error of {error:.1e}, at most {TOLERANCE:.0e} was expected"}
    samples = timing.interleave(found, training, seconds)
    if samples.interrupted:
        raise KeyboardInterrupt
    for who, row in rows.items():
        own, ours = samples.rounds[who], samples.rounds["ours"]
        row["ms"] = timing.quantiles([value * 1e3 for value in own])
        row["ratio"] = timing.quantiles([a / b for a, b in zip(own, ours, strict=True)])
        row["rounds"] = samples.num_rounds
    return list(rows.values())


def markdown(rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str:
    """The rows as a page: a line for each cell, mode and shape."""
    lines = [
        "# Cells that torch.nn lacks, and a user's own",
        "",
        f"`{' '.join(info['command'])}` on {info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
        f"{info['date'][:10]}, commit {info['commit']}. One layer, float32. Milliseconds of ours; the others' times over ours, "
        "median of the rounds. `own_…` are cells as a user writes them, on the backend that compiles equations (numba), and "
        "`our LSTM` beside them is this package's on the same backend.",
        "",
    ]
    others = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "ours"))
    lines += [f"| cell | mode | B×T×H | ours, ms | {' | '.join(others)} |", "|---|---|---|---:|" + "---:|" * len(others)]
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["mode"], row["shape"]), {})[row["provider"]] = row
    for (cell, mode, shape), found in groups.items():
        ratios = [f"{found[who]['ratio']['median']:.2f} ×" if who in found else "-" for who in others]
        lines.append(f"| {cell} | {mode} | {shape} | {found['ours']['ms']['median']:.3g} | {' | '.join(ratios)} |")
    wrong = [row for row in rows if row["status"] == "wrong"]
    lines += ["", *(f"{row['cell']} {row['mode']} {row['shape']}, {row['provider']}: {row['reason']}" for row in wrong)]
    return "\n".join(lines).rstrip() + "\n"


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks variants", description="Measure cells that torch.nn lacks, and a user's own.")
    parser.add_argument("--threads", type=_positive_int, default=2, help="threads of everybody (default 2)")
    parser.add_argument("--cells", type=names, default=list(VARIANTS), help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--shapes", type=names, help=f"BxTxH (default {','.join(SHAPES)})")
    parser.add_argument("--modes", type=names, default=list(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument("--seconds", type=positive_seconds, help=f"for each cell, shape and mode (default {SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help="one small shape, without torch.compile")
    parser.add_argument("--json", type=Path, help="results file (default benchmarks/out/<date>.json); a page goes beside it")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code: 0, 1 if a result was wrong, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path: Path = options.json or default_path()
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    for given, known, what in ((options.cells, VARIANTS, "cells"), (options.modes, MODES, "modes")):
        for name in given:
            if name not in known:
                parser.error(f"--{what}: expected some of {','.join(known)}, got {name!r}")
    try:
        for shape in shapes:
            parse_shape(shape)
        check_writable(path)
    except (ValueError, ResultsError) as error:
        parser.error(str(error))
    info = describe_run({}, None, options.threads)
    jobs = [
        partial(measure, name, shape, mode, seconds, compiled=not options.quick)
        for name in options.cells
        for shape in shapes
        for mode in options.modes
    ]
    return paged.run(jobs, info, path, parser, lambda row: f"{row['cell']} {row['shape']} {row['mode']}", markdown)
