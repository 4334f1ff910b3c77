"""SpeechBrain: its wrappers of torch.nn's layers and cells, a decoder with attention, and CRDNN, an encoder of speech."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package_with_torchaudio
from torch import nn

rnn = package_with_torchaudio("speechbrain.nnet.RNN")
# CRDNN imports this one when it is built.
package_with_torchaudio("speechbrain.nnet.CNN")
crdnn = package_with_torchaudio("speechbrain.lobes.models.CRDNN")


def _step(model: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layers(kind: str) -> None:
    """Packed by relative lengths; flatten_parameters is called before each run; weights initialised by name."""

    def program(swap: Swap) -> dict[str, Any]:
        layer = swap(getattr(rnn, kind)(hidden_size=5, input_size=3, num_layers=2, bidirectional=True, dropout=0.2))
        rnn.rnn_init(layer)
        sequences, lengths = torch.rand(3, 6, 3), torch.tensor([1.0, 0.66, 0.33])
        for _ in range(2):
            out, state = layer(sequences, lengths=lengths)
            _step(layer, out.square().sum())
        state = state if isinstance(state, tuple) else (state,)
        return {"out": out.detach(), "h": state[0].detach(), "c": state[-1].detach()}

    assert_same(program)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(kind: str) -> None:
    def program(swap: Swap) -> dict[str, Any]:
        cells = swap(getattr(rnn, kind)(hidden_size=5, input_size=3, num_layers=2, dropout=0.2))
        for _ in range(2):
            out, state = None, None
            for step in torch.rand(4, 2, 3):
                out, state = cells(step, hx=state)
            _step(cells, out.square().sum())
        return {"out": out.detach()}

    assert_same(program)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_decoder_with_attention(kind: str) -> None:
    """A cell a step, fed with what the last step attended to."""

    def program(swap: Swap) -> dict[str, Any]:
        decoder = swap(
            rnn.AttentionalRNNDecoder(
                rnn_type=kind,
                attn_type="location",
                hidden_size=5,
                attn_dim=4,
                num_layers=2,
                enc_dim=6,
                input_size=3,
                channels=2,
                kernel_size=3,
            )
        )
        encoded, words, lengths = torch.rand(2, 5, 6), torch.rand(2, 4, 3), torch.tensor([1.0, 0.6])
        for _ in range(2):
            out, attention = decoder(words, encoded, lengths)
            _step(decoder, out.square().sum())
        return {"out": out.detach(), "attention": attention.detach()}

    assert_same(program)


def test_crdnn() -> None:
    """Convolutions, LSTMs and a dense part, as in SpeechBrain's recipes."""

    def program(swap: Swap) -> dict[str, Any]:
        encoder = swap(
            crdnn.CRDNN(
                input_shape=(None, None, 8),
                cnn_blocks=1,
                cnn_channels=(3,),
                rnn_class=rnn.LSTM,
                rnn_layers=2,
                rnn_neurons=5,
                rnn_bidirectional=True,
                dnn_blocks=1,
                dnn_neurons=4,
            )
        )
        speech = torch.rand(2, 12, 8)
        for _ in range(2):
            out = encoder(speech)
            _step(encoder, out.square().mean())
        return {"out": out.detach()}

    assert_same(program)
