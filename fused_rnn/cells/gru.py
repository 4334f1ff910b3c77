"""The GRU, reset after the product: the equations of one step, in plain torch.

Source: torch.nn.GRU and cuDNN; Cho et al. 2014, whose reset gate multiplies h₋ before the product with W_hn.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations

GRU = Cell(
    "gru",
    "GRU",
    gates=("r", "z", "n"),
    states=("h",),
    tape=("r", "z", "n", "hn"),
    d_gates=("hn", "r", "z", "n"),
    reads_before="h",
    direct=True,
    apart="hn",
)


def gru_step(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step.

    Args:
        gates_x: W_ih x + b_ih, (n, 3H), gate order r|z|n.
        gates_h: W_hh h₋ + b_hh, (n, 3H); its last block is the tape's hn.
        states: h₋ (n, H).

    Returns:
        the new states (h,), and the tape (r, z, n, hn), all (n, H).
    """
    (h,) = states
    xr, xz, xn = gates_x.chunk(3, dim=-1)
    hr, hz, hn = gates_h.chunk(3, dim=-1)
    r = (xr + hr).sigmoid()  #  (1) r = σ(W_ir x + b_ir + W_hr h₋ + b_hr)
    z = (xz + hz).sigmoid()  #  (2) z = σ(W_iz x + b_iz + W_hz h₋ + b_hz)
    n = (xn + r * hn).tanh()  # (3) n = tanh(W_in x + b_in + r ⊙ (W_hn h₋ + b_hn))
    h = (1 - z) * n + z * h  #  (4) h = (1 − z) ⊙ n + z ⊙ h₋
    return (h,), (r, z, n, hn)


def gru_gates(tape: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The blocks of a ``gates_x`` and a ``gates_h`` that lead to this tape: (1), (2) and (3) turned round."""
    r, z, n, hn = tape
    zero = r.new_zeros(r.shape)
    return (r.logit(), z.logit(), n.atanh() - r * hn), (zero, zero, hn)


EQUATIONS = Equations(GRU, gru_step, gru_gates)
