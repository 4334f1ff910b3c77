"""The GRU with the reset gate before the product: the equations of one step, in plain torch.

Source: Cho et al. 2014; ONNX's GRU with linear_before_reset=0, Keras' with reset_after=False. torch.nn has no such cell.
"""

from __future__ import annotations

from torch import Tensor

from fused_rnn.data.cell import Cell
from fused_rnn.data.equations import Equations

GRU_RESET_BEFORE = Cell(
    "gru_reset_before",
    "GRU_RESET_BEFORE",
    gates=("r", "z", "n"),
    states=("h",),
    tape=("r", "z", "n", "m"),
    d_gates=("r", "z", "n"),
    reads_before="h",
    direct=True,
    later=("n",),
    operand="m",
)


def gru_reset_before_operand(gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]) -> Tensor:
    """What the later product reads.

    Args:
        gates_x: W_ih x + b_ih, (n, 3H), gate order r|z|n.
        gates_h: W_hh h₋ + b_hh of r and z, (n, 2H).
        states: h₋ (n, H).

    Returns:
        m, (n, H).
    """
    (h,) = states
    hidden = h.shape[-1]
    r = (gates_x[..., :hidden] + gates_h[..., :hidden]).sigmoid()  # (1) r = σ(W_ir x + b_ir + W_hr h₋ + b_hr)
    return r * h  #                                                  (2) m = r ⊙ h₋


def gru_reset_before_step(
    gates_x: Tensor, gates_h: Tensor, states: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take one step.

    Args:
        gates_x: W_ih x + b_ih, (n, 3H), gate order r|z|n.
        gates_h: W_hh h₋ + b_hh of r and z, then W_hn m + b_hn, (n, 3H).
        states: h₋ (n, H).

    Returns:
        the new states (h,), and the tape (r, z, n, m), all (n, H).
    """
    (h,) = states
    xr, xz, xn = gates_x.chunk(3, dim=-1)
    hr, hz, hn = gates_h.chunk(3, dim=-1)
    r = (xr + hr).sigmoid()  # (1)
    m = r * h  #               (2)
    z = (xz + hz).sigmoid()  # (3) z = σ(W_iz x + b_iz + W_hz h₋ + b_hz)
    n = (xn + hn).tanh()  #    (4) n = tanh(W_in x + b_in + W_hn m + b_hn)
    h = (1 - z) * n + z * h  # (5) h = (1 − z) ⊙ n + z ⊙ h₋
    return (h,), (r, z, n, m)


def gru_reset_before_gates(tape: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The blocks of a ``gates_x`` and a ``gates_h`` that lead to this tape: (1), (3) and (4) turned round."""
    r, z, n, _ = tape
    zero = r.new_zeros(r.shape)
    return (r.logit(), z.logit(), n.atanh()), (zero, zero, zero)


EQUATIONS = Equations(GRU_RESET_BEFORE, gru_reset_before_step, gru_reset_before_gates, operand=gru_reset_before_operand)
