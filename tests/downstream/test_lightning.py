"""Lightning: its own demo of a language model and a tagger of packed sentences, under Trainer and under Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from downstream_support import Swap, assert_same, package
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

lightning = package("lightning")
# Of what a program under test does, none is about these: few processors, no validation, a state that is saved as a whole.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def _trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


def _words() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(0, 11, (12, 7), generator=draw)
    return TensorDataset(words[:, :-1], words[:, 1:])


def _demo(swap: Swap) -> Any:
    """The language model of lightning.pytorch.demos, with a small vocabulary and without its download."""
    demos = package("lightning.pytorch.demos")

    class Demo(demos.LightningLSTM):
        losses: list[float]

        def __init__(self) -> None:
            super().__init__(vocab_size=11)
            self.model = swap(demos.SimpleLSTM(vocab_size=11, ninp=5, nhid=6, nlayers=2, dropout=0.2))
            self.losses = []

        def prepare_data(self) -> None:
            pass

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

        def train_dataloader(self) -> Any:
            return DataLoader(_words(), batch_size=4)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Demo()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}], ids=["plain", "clipped"])
def test_demo(tmp_path: Path, options: dict[str, Any]) -> None:
    """The states pass from batch to batch, detached."""

    def program(swap: Swap) -> dict[str, Any]:
        demo = _demo(swap)
        _trainer(tmp_path, **options).fit(demo)
        return {"losses": demo.losses}

    assert_same(program)


def test_demo_in_bfloat16(tmp_path: Path) -> None:
    """Mixed precision: both run the layer in bfloat16, and the losses agree to what that holds."""
    losses = {}

    def program(swap: Swap) -> dict[str, Any]:
        demo = _demo(swap)
        _trainer(tmp_path, precision="bf16-mixed").fit(demo)
        losses[swap.convert] = torch.tensor(demo.losses)
        return {}

    for convert in (False, True):
        swap = Swap(convert=convert)
        swap.run(program)
        swap.assert_trained()
    # bfloat16 rounds at 4e-3, and losses are of the order of 2; torch.nn rounds every gate, ours none.
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=0)


def test_checkpoint_and_resume(tmp_path: Path) -> None:
    """A checkpoint of one run is resumed by another model, with the optimizer's state; torch.nn's serves a converted one."""

    def program(swap: Swap) -> dict[str, Any]:
        first = _demo(swap)
        trainer = _trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        trainer.fit(first)
        saved = tmp_path / f"{swap.convert}.ckpt"
        trainer.save_checkpoint(saved)
        second = _demo(swap)
        # The one that torch.nn's run wrote, in both.
        _trainer(tmp_path, max_epochs=2).fit(second, ckpt_path=tmp_path / "False.ckpt", weights_only=False)
        return {"first": first.losses, "second": second.losses}

    assert_same(program)


class Tagger(lightning.LightningModule):
    """Packed sentences of different lengths; validated beside the training, and asked for predictions afterwards."""

    def __init__(self, swap: Swap) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.rnn = nn.GRU(4, 5, bidirectional=True)
        self.tags = nn.Linear(10, 3)
        self.losses: list[float] = []
        swap(self)

    def forward(self, sentences: list[Tensor]) -> Tensor:
        packed = pack_sequence([self.words(sentence) for sentence in sentences], enforce_sorted=False)
        return self.tags(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    def _loss(self, sentences: list[Tensor]) -> Tensor:
        tags = nn.utils.rnn.pad_sequence([sentence % 3 for sentence in sentences], batch_first=True, padding_value=-100)
        loss = nn.functional.cross_entropy(self(sentences).flatten(0, 1), tags.flatten())
        self.losses.append(loss.item())
        return loss

    def training_step(self, sentences: list[Tensor], _: int) -> Tensor:
        return self._loss(sentences)

    def validation_step(self, sentences: list[Tensor], _: int) -> None:
        self._loss(sentences)

    def predict_step(self, sentences: list[Tensor], _: int) -> Tensor:
        return self(sentences)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def _sentences() -> Any:
    draw = torch.Generator().manual_seed(2)
    sentences = [torch.randint(0, 9, (int(n),), generator=draw) for n in (3, 1, 6, 2, 5, 4)]
    return DataLoader(sentences, batch_size=3, collate_fn=list)


def test_tagger(tmp_path: Path) -> None:
    def program(swap: Swap) -> dict[str, Any]:
        tagger = Tagger(swap)
        trainer = _trainer(tmp_path)
        trainer.fit(tagger, _sentences(), _sentences())
        return {"losses": tagger.losses, "tags": torch.cat(trainer.predict(tagger, _sentences()), 1)}

    assert_same(program)


def test_fabric() -> None:
    """Fabric wraps the module and its optimizer, and the loop is the user's."""

    def program(swap: Swap) -> dict[str, Any]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        tagger = Tagger(swap)
        model, optimizer = fabric.setup(tagger, torch.optim.Adam(tagger.parameters(), lr=0.01))
        for sentences in fabric.setup_dataloaders(_sentences()):
            optimizer.zero_grad()
            fabric.backward(model(sentences).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
        return {"tags": model(next(iter(_sentences()))).detach()}

    assert_same(program)
