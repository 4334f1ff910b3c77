"""Losses with gradients in them, and a graph that is used more than once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_rnn


def pair(name: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, name)(3, 5, dtype=dtype, **options)
    ours = getattr(fused_rnn, name)(3, 5, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def penalised(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """A critic's loss with the penalty of Gulrajani et al. 2017: the gradient with respect to the input should have norm 1."""
    x = x.clone().requires_grad_()
    out, _ = module(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
    return (out.mean(-1) - target).square().mean() + 0.1 * penalty


@pytest.mark.usefixtures("backend")
def test_a_gradient_penalty_trains() -> None:
    """Two bidirectional layers, step by step as with torch.nn, and the loss falls."""
    ours, theirs = pair("LSTM", num_layers=2, bidirectional=True)
    x, target = torch.randn(6, 9, 3, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
    losses: list[list[float]] = []
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        losses.append([])
        for _ in range(12):
            optimizer.zero_grad()
            loss = penalised(module, x, target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-6, atol=1e-9)
    assert losses[0][-1] < 0.7 * losses[0][0]
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_backward_in_eval_mode(name: str) -> None:
    """With dropout, which eval mode turns off; the gradients are torch.nn's."""
    found = []
    for module in pair(name, num_layers=2, bidirectional=True, dropout=0.5):
        module.eval()
        x = torch.linspace(-1, 1, 4 * 2 * 3, dtype=torch.float64).view(4, 2, 3).requires_grad_()
        found.append(torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()]))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch", [2, 11])
def test_a_graph_used_twice_gives_the_same_bits(name: str, batch: int) -> None:
    """In eval mode too; what the first backward kept in memory must not reach the second."""
    module, _ = pair(name, torch.float32, num_layers=2, bidirectional=True)
    for training in (True, False):
        module.train(training)
        x = torch.randn(7, batch, 3, requires_grad=True)
        loss = module(x)[0].square().sum()
        leaves = [x, *module.parameters()]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        copies = [grad.clone() for grad in first]
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        third = torch.autograd.grad(loss, leaves)
        for kept, copy, *others in zip(first, copies, second, third, strict=True):
            assert torch.equal(kept, copy)
            assert all(torch.equal(copy, other) for other in others)
