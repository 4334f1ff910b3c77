"""The functions behind the modules: their own checks, and that they are what the modules call."""

import pytest
import torch

import fused_rnn
from fused_rnn import Weights, functional

NAMES = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def make(name: str, layers: int = 1, directions: int = 1, inputs: int = 3, hidden: int = 5) -> list[Weights]:
    gates = GATES[name] * hidden
    return [
        Weights(torch.randn(gates, inputs if index < directions else directions * hidden), torch.randn(gates, hidden))
        for index in range(layers * directions)
    ]


def states_of(name: str, *shape: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*shape) for _ in range(2 if name == "lstm" else 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("backend")
def test_a_walk_is_its_steps(name: str) -> None:
    """The sequence function, one step at a time, and the cell function agree."""
    (weights,) = make(name)
    states = states_of(name, 1, 2, 5)
    input = torch.randn(4, 2, 3)
    pack = (lambda s: tuple(s)) if name == "lstm" else (lambda s: s[0])
    unpack = (lambda s: s) if name == "lstm" else (lambda s: (s,))
    function, cell = getattr(functional, name), getattr(functional, f"{name}_cell")
    out, ends = function(input, [weights], pack(states))
    walked, stepped = states, tuple(state[0] for state in states)
    for t in range(4):
        step, after = function(input[t : t + 1], [weights], pack(walked))
        walked = unpack(after)
        torch.testing.assert_close(step[0], out[t])
        stepped = unpack(cell(input[t], weights, pack(stepped)))
        torch.testing.assert_close(stepped[0], out[t])
    torch.testing.assert_close(walked, unpack(ends))
    torch.testing.assert_close(stepped, tuple(end[0] for end in unpack(ends)))
    unbatched, _ = function(input[:, 1], [weights], pack([state[:, 1] for state in states]))
    torch.testing.assert_close(unbatched, out[:, 1])
    assert cell(input[0, 0], weights)[0].shape == ((5,) if name == "lstm" else ())


@pytest.mark.parametrize("name", NAMES)
def test_batch_first_and_directions(name: str) -> None:
    weights = make(name, layers=2, directions=2)
    input = torch.randn(4, 2, 3)
    function = getattr(functional, name)
    out, ends = function(input, weights, bidirectional=True)
    assert out.shape == (4, 2, 10)
    other, other_ends = function(input.transpose(0, 1), weights, bidirectional=True, batch_first=True)
    torch.testing.assert_close(other.transpose(0, 1), out)
    torch.testing.assert_close(other_ends, ends)
    # The second direction of the first layer is the first direction on the reversed sequence.
    backwards, _ = function(input.flip(0), weights[1:2])
    both, _ = function(input, weights[:2], bidirectional=True)
    torch.testing.assert_close(both[..., 5:], backwards.flip(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_for_training(name: str, dropout: float) -> None:
    weights = make(name, layers=2)
    input = torch.randn(4, 2, 3)
    function = getattr(functional, name)
    plain = function(input, weights)[0]
    torch.testing.assert_close(function(input, weights, dropout=dropout)[0], plain, rtol=0, atol=0)
    dropped = function(input, weights, dropout=dropout, training=True)[0]
    assert torch.equal(dropped, plain) == (dropout == 0.0)


def test_wrong_weights_raise() -> None:
    input = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="expected 2 for each layer, one or more layers, got 3"):
        functional.gru(input, make("gru", 3), bidirectional=True)
    with pytest.raises(ValueError, match="got 0"):
        functional.gru(input, [])
    (weights,) = make("gru")
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        functional.gru(input, [weights._replace(hr=torch.randn(2, 5))])
    with pytest.raises(RuntimeError, match=r"bias_hh of layer 0, direction 0: expected shape \(15,\), got \(5,\)"):
        functional.gru(input, [weights._replace(bias_hh=torch.randn(5))])
    with pytest.raises(RuntimeError, match=r"weight_ih of layer 1, direction 0: expected shape \(15, 5\), got \(15, 3\)"):
        functional.gru(input, [weights, weights])
    projected = Weights(torch.randn(20, 3), torch.randn(20, 2), hr=torch.randn(2, 5))
    with pytest.raises(RuntimeError, match=r"weight_hr of layer 1, direction 0: expected shape \(2, 5\), got None"):
        functional.lstm(input, [projected, Weights(torch.randn(20, 2), torch.randn(20, 2))])
    with pytest.raises(RuntimeError, match="must have 2 dimensions"):
        functional.gru(input, [weights._replace(hh=torch.randn(15))])


def test_one_bias_of_two() -> None:
    """The modules of torch have both biases or none; the function takes either."""
    (weights,) = make("gru")
    bias = torch.randn(15)
    zero = torch.zeros(15)
    input = torch.randn(4, 2, 3)
    for field in ("bias_ih", "bias_hh"):
        one = functional.gru(input, [weights._replace(**{field: bias})])[0]
        other = {"bias_ih": zero, "bias_hh": zero} | {field: bias}
        torch.testing.assert_close(one, functional.gru(input, [weights._replace(**other)])[0])


def test_expanded_input_whose_size_overflows_raises() -> None:
    module = fused_rnn.GRU(1, 4)
    with pytest.raises(RuntimeError, match="overflow"):
        module(torch.zeros(1, 1, 1).expand(2**40, 2**30, 1))
