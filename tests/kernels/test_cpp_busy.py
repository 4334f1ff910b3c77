"""Threads that wait for a core: a call ends, and its results are the same to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Two threads on one core: one of them waits for it, whenever the other computes.
_PROGRAM = """
import os, torch, fused_rnn

torch.manual_seed(0)
I, H, N, T = 48, 80, 3, 40
layers = [
    fused_rnn.RNN(I, H),
    fused_rnn.LSTM(I, H),
    fused_rnn.LSTM(I, H, proj_size=24),
    fused_rnn.GRU(I, H, bidirectional=True),
    fused_rnn.GRU(I, H, reset_after=False),
]
dense, lengths = torch.randn(T, N, I), torch.tensor([T, 7, 31])
reset = torch.rand(T, N) < 0.1

def results(layer, threads):
    torch.set_num_threads(threads)
    found = []
    calls = [{}, {"lengths": lengths}] + ([] if layer.bidirectional else [{"reset": reset}])
    for arguments in calls:
        x = dense.clone().requires_grad_()
        out, _ = layer(x, **arguments)
        found += [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]
    return found

expected = [results(layer, 1) for layer in layers]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for turn in range(3):
    for layer, right in zip(layers, expected):
        for one, two in zip(right, results(layer, 2), strict=True):
            assert torch.equal(one, two), layer
print(len(os.listdir("/proc/self/task")) > 1, "same")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot confine a process to one core")
def test_two_threads_on_one_core_give_the_bits_of_one() -> None:
    environment = os.environ | {"FUSED_RNN_BACKEND": "cpp"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["True", "same"], done.stdout + done.stderr
