"""A small LightningModule, quick trainers, and what tests ask of adapted modules."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_peft.core.checkpoint import adapter_keys
from lit_peft.methods import LoRA


def lora(**arguments) -> LoRA:
    return LoRA(**{"r": 2, "dropout": 0.0} | arguments)


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


ADAPTED = ["net.first", "net.second"]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.unused = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Steps:
    """What a user's module does: it builds its layers where it is told to, and hands all parameters to the optimizer.

    For a LightningModule of either package.
    """

    def __init__(self, built: str = "init", seed: int = 0) -> None:
        super().__init__()
        self.built, self.seed = built, seed
        self.build("init")

    def build(self, where: str) -> None:
        if where == self.built and not hasattr(self, "net"):
            self.net = Net(self.seed)

    def setup(self, stage):
        self.build("setup")

    def configure_model(self):
        self.build("configure_model")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self(x).float(), y)

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    test_step = validation_step

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Module(Steps, pl.LightningModule):
    pass


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def net_lora(**arguments) -> LoRA:
    """LoRA on two layers of `Net`."""
    return lora(**{"target_modules": ADAPTED} | arguments)


def trainer(*callbacks: pl.Callback, **arguments) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(**quiet | {"max_epochs": 1} | arguments, callbacks=list(callbacks))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path=None, **arguments) -> pl.Trainer:
    run = trainer(*callbacks, **arguments)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


def saved(path, module: pl.LightningModule, *callbacks: pl.Callback, **arguments):
    """Path of the checkpoint of a fit."""
    fit(module, *callbacks, **arguments).save_checkpoint(path / "run.ckpt")
    return path / "run.ckpt"


def adapters(module: nn.Module) -> dict[str, Tensor]:
    keys = adapter_keys(module)
    return {key: value.clone() for key, value in module.state_dict().items() if key in keys}


LORA_KEYS = {f"{path}.peft.default.lora_{x}" for path in ADAPTED for x in "AB"}


def dense_by_hand(codes: Tensor, state) -> Tensor:
    """The weight that bitsandbytes' 4-bit codes stand for, `code[index] * absmax[block]`, in the state's dtype.

    Its own kernel reads rows that do not fill their blocks with the scales of others, on CPUs with AVX512.
    """
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    two = codes.detach().flatten().view(torch.uint8).int()
    W = state.code[torch.stack((two >> 4, two & 15), 1)].flatten()[: state.shape.numel()]
    return (W * absmax.repeat_interleave(state.blocksize)[: W.numel()]).view(state.shape).to(state.dtype)
