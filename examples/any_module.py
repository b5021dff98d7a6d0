"""LoRA on a module of one's own: a convolutional net with batch norm, taken from one kind of images to another."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_peft import LoRA


class Net(pl.LightningModule):
    """An ordinary LightningModule, which knows nothing of lit-peft."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
        second = [nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
        self.body = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def test_step(self, batch, _):
        self.log("accuracy", (self.head(self.body(batch[0])).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def stripes(turned: float, contrast: float) -> DataLoader:
    """Noisy stripes in four directions, the classes; `turned` by a part of the 45 degrees between two of them."""
    y = torch.arange(512) % 4
    angle, phase = ((y + turned) * torch.pi / 4)[:, None, None], 6 * torch.rand(512, 1, 1)
    across = torch.arange(12) * angle.cos() + torch.arange(12)[:, None] * angle.sin()
    x = contrast * (torch.sin(across + phase) + 0.5 * torch.randn(512, 12, 12)) + (1 - contrast)
    return DataLoader(TensorDataset(x[:, None], y), batch_size=32)


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    """A quiet trainer of four epochs."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(max_epochs=4, callbacks=list(callbacks), **quiet)


pl.seed_everything(0)
net = Net()
trainer().fit(net, stripes(turned=0, contrast=1))  # an ordinary training, of everything
torch.save(net.state_dict(), "net.pt")

train, test = (stripes(turned=0.5, contrast=0.5) for _ in range(2))
before = trainer().test(net, test, verbose=False)[0]["accuracy"]

# The convolutions get adapters, the head trains whole, and the statistics of batch norm follow the new images.
adapting = trainer(LoRA(r=4, target_modules="body.*", train_also="head", update_norm_stats=True))
adapting.fit(net, train)
after = adapting.test(net, test, verbose=False)[0]["accuracy"]
adapting.save_checkpoint("adapter.ckpt", weights_only=True)

fresh = Net()
fresh.load_state_dict(torch.load("net.pt"))
again = adapting.test(fresh, test, ckpt_path="adapter.ckpt", verbose=False)[0]["accuracy"]
print(f"accuracy: {before:.3f} before, {after:.3f} after, {again:.3f} in a fresh module")
print(f"bytes: {Path('adapter.ckpt').stat().st_size:,} the checkpoint, {Path('net.pt').stat().st_size:,} the model")
