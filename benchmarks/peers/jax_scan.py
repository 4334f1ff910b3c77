"""JAX on the CPU: ``lax.scan`` over the steps under ``jit``, gradients by ``jax.vjp``."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Provider
from benchmarks.problem import Problem


def _unavailable() -> str | None:
    try:
        importlib.import_module("jax")
    except (ImportError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        return "not installed: jax (pip install jax)" if missing else f"cannot use jax: {error}"
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuses(case: Case) -> str | None:
    if case.dtype != "float32" or case.num_layers > 1 or case.bidirectional or case.ragged or case.unusual:
        return "compared for one dense float32 layer of one direction only"
    if case.threads not in (None, _cores()):
        return "takes all cores: compared with as many threads only"
    return None


def _rnn(jnp: Any, sigmoid: Any, gates_x: Any, gates_h: Any, states: Any) -> Any:
    return (jnp.tanh(gates_x + gates_h),)


def _lstm(jnp: Any, sigmoid: Any, gates_x: Any, gates_h: Any, states: Any) -> Any:
    i, f, g, o = jnp.split(gates_x + gates_h, 4, axis=1)
    c = sigmoid(f) * states[1] + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def _gru(jnp: Any, sigmoid: Any, gates_x: Any, gates_h: Any, states: Any) -> Any:
    (rx, zx, nx), (rh, zh, nh) = jnp.split(gates_x, 3, axis=1), jnp.split(gates_h, 3, axis=1)
    n = jnp.tanh(nx + sigmoid(rx + rh) * nh)
    return (n + sigmoid(zx + zh) * (states[0] - n),)


_STEPS = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}


def _prepare(problem: Problem, case: Case, threads: int) -> Provider:
    jax: Any = importlib.import_module("jax")
    jnp: Any = jax.numpy
    step, sigmoid = _STEPS[case.cell], jax.nn.sigmoid
    device = jax.devices("cpu")[0]

    def array(tensor: Tensor) -> Any:
        return jax.device_put(tensor.detach().numpy(), device)

    keep = None if problem.reset is None else array((~problem.reset).to(problem.input.dtype)[..., None])

    def forward(x: Any, initial: Any, parameters: Any) -> Any:
        weight_ih, weight_hh, bias_ih, bias_hh = parameters
        gates_x = x @ weight_ih.T + bias_ih

        def body(states: Any, inputs: Any) -> Any:
            gates, kept = inputs
            if kept is not None:
                states = tuple(state * kept for state in states)
            states = step(jnp, sigmoid, gates, states[0] @ weight_hh.T + bias_hh, states)
            return states, states[0]

        ends, out = jax.lax.scan(body, tuple(state[0] for state in initial), (gates_x, keep))
        return (out, *(end[None] for end in ends))

    def training(x: Any, initial: Any, parameters: Any, d_outputs: Any) -> Any:
        outputs, backward = jax.vjp(forward, x, initial, parameters)
        d_x, d_initial, d_parameters = backward(d_outputs)
        return (*outputs, d_x, *d_initial, *d_parameters)

    data = [
        array(problem.input),
        tuple(array(state) for state in problem.states),
        tuple(array(parameter) for parameter in problem.module.parameters()),
    ]
    if case.training:
        data.append(tuple(array(d) for d in problem.d_outputs))
    call = jax.jit(training if case.training else forward)

    def tensors(results: Any) -> tuple[Tensor, ...]:
        # A copy: JAX's own arrays cannot be written to, and torch warns of such memory.
        return tuple(torch.from_numpy(numpy.array(result)) for result in results)

    return Provider(step=lambda: jax.block_until_ready(call(*data)), tensors=tensors)


PEER = Peer(
    name="jax",
    title="JAX scan",
    unavailable=_unavailable,
    version=lambda: str(importlib.import_module("jax").__version__),
    refuses=_refuses,
    prepare=_prepare,
    compiles=True,
)
