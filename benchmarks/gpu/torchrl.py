"""TorchRL's Triton kernels as a peer, where it is installed: a layer with or without resets."""

from __future__ import annotations

import torch

from benchmarks.gpu.problem import Problem, Results, Run


def torchrl(problem: Problem, backend: str = "triton") -> Run:
    """TorchRL's module around torch.nn's parameters; one direction, dense. backend: its ``recurrent_backend``."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule

    case = problem.case
    if case.directions != 1 or problem.steps.batch_sizes is not None:
        raise ValueError(f"expected one direction and a dense batch, got {case.name}")
    lstm = case.cell == "lstm"
    inner = (torch.nn.LSTM if lstm else torch.nn.GRU)(case.hidden, case.hidden, batch_first=True)
    inner = inner.to(problem.input.device, problem.input.dtype)
    with torch.no_grad():
        for parameter, value in zip(inner.parameters(), problem.weights[0], strict=False):
            parameter.copy_(value)
    states = ["h", "c"][: len(problem.states)]
    outputs = ["out", *(("next", name) for name in states)]
    options = {"lstm" if lstm else "gru": inner, "recurrent_backend": backend, "default_recurrent_mode": True}
    module = (LSTMModule if lstm else GRUModule)(in_keys=["x", *states, "is_init"], out_keys=outputs, **options)
    shape = (case.batch, problem.steps.length)

    def by_sequence(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (shape[1], shape[0])).transpose(0, 1).contiguous()

    is_init = torch.zeros(*shape, 1, dtype=torch.bool, device=problem.input.device)
    if problem.reset is not None:
        is_init = by_sequence(problem.reset)[..., None]
    d_out = by_sequence(problem.d_out)
    # It reads a state at every step, and takes that of the first, also where that is a reset.
    initial = []
    for state in problem.states:
        steps = state.new_zeros(*shape, 1, case.hidden)
        steps[:, 0] = state.detach().transpose(0, 1).masked_fill(is_init[:, :1], 0)
        initial.append(steps)

    def run(training: bool) -> Results:
        with torch.set_grad_enabled(training):
            x = by_sequence(problem.input.detach()).requires_grad_(training)
            given = {"x": x, "is_init": is_init} | dict(zip(states, initial, strict=True))
            out = module(TensorDict(given, batch_size=shape))["out"]
            found = {"out": out.detach().transpose(0, 1).flatten(0, 1)}
            if training:
                torch.autograd.grad(out, [x, *inner.parameters()], d_out)
            return found

    return run
