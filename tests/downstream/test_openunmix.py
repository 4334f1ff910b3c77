"""Open-Unmix: music separated by three bidirectional LSTMs over a spectrogram, with what comes before and after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package_with_torchaudio

openunmix = package_with_torchaudio("openunmix.model")


@pytest.mark.parametrize("unidirectional", [False, True])
def test_model(unidirectional: bool) -> None:
    """Trained on spectrograms with dropout between the layers; evaluated with the running statistics of its norms."""

    def program(swap: Swap) -> dict[str, Any]:
        model = swap(openunmix.OpenUnmix(nb_bins=9, nb_channels=2, hidden_size=8, unidirectional=unidirectional, max_bin=7))
        mix = torch.rand(3, 2, 9, 11)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(3):
            loss = torch.nn.functional.mse_loss(model(mix), mix / 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"losses": losses, "estimate": model.eval()(mix).detach()}

    assert_same(program)


def test_separator() -> None:
    """The whole way: a signal, its spectrogram, a model for each source, Wiener filtering, signals again."""

    def program(swap: Swap) -> dict[str, Any]:
        targets = {
            name: openunmix.OpenUnmix(nb_bins=33, nb_channels=2, hidden_size=8, nb_layers=2) for name in ("vocals", "drums")
        }
        separator = swap(openunmix.Separator(targets, niter=1, n_fft=64, n_hop=16, nb_channels=2)).eval()
        return {"sources": separator(torch.rand(1, 2, 400)).detach()}

    assert_same(program, trains=False)
