"""Lightning's learning-rate and batch-size finders, as callbacks and through Tuner, beside a method."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from toys import Module, loader, trainer
from toys import net_lora as lora

from lit_peft import LoRA
from lit_peft.data import TextClassificationDataModule
from lit_peft.tasks import TextClassification
from lit_peft.testing.conformance import assert_same, snapshot


class Tuned(Module):
    """Has the two attributes that the finders look for."""

    def __init__(self, built: str = "init") -> None:
        super().__init__(built)
        self.lr, self.batch_size = 0.05, 4
        self.sizes: list[int] = []

    def train_dataloader(self):
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader

    def training_step(self, batch, index):
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Start(pl.Callback):
    """What a fit starts from, and the rates that it goes through."""

    def on_train_start(self, trainer, pl_module):
        self.state = snapshot(pl_module)
        self.optimizer_state = dict(trainer.optimizers[0].state)
        self.held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.rates: list[float] = []
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.sizes.append(len(batch["labels"] if isinstance(batch, dict) else batch[0]))


def tune(run: pl.Trainer, kind: str, module: pl.LightningModule, **arguments) -> None:
    if kind == "rate":
        Tuner(run).lr_find(module, num_training=20, **arguments)
    else:
        Tuner(run).scale_batch_size(module, max_trials=3, **arguments)


def finder(kind: str) -> pl.Callback:
    return LearningRateFinder(num_training_steps=20) if kind == "rate" else BatchSizeFinder(max_trials=3)


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("way", ["callback", "tuner"])
@pytest.mark.parametrize("kind", ["rate", "size"])
def test_a_fit_starts_from_the_weights_before_the_finder(tmp_path, built, way, kind):
    plain, start, module = Start(), Start(), Tuned(built)
    trainer(lora(), plain).fit(Tuned(built))
    run = trainer(lora(), start, *[finder(kind)] * (way == "callback"), max_epochs=6, default_root_dir=tmp_path)
    if way == "tuner":
        tune(run, kind, module)
    run.fit(module)
    assert_same(start.state, plain.state)
    assert not start.optimizer_state and len(start.held) == 4
    if kind == "rate":
        assert module.lr != 0.05 and set(start.rates) == {module.lr}
    else:
        assert module.batch_size == 8 and set(start.sizes) == {8}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["callback", "tuner"])
@pytest.mark.parametrize("kind", ["rate", "size"])
def test_our_task_and_data_follow_the_finder(tmp_path, way, kind):
    """The schedule rises to the rate that was found, and falls to nothing within the steps that are left."""
    start, size = Start(), 16
    model = TextClassification(backbone="demo", schedule="linear", warmup=0.0)
    data = TextClassificationDataModule(
        path="demo", val_split="validation", limit_train=64, limit_val=16, batch_size=size, max_length=16
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    callbacks = [LoRA(r=2, target_modules=["query"]), start, *[finder(kind)] * (way == "callback")]
    run = pl.Trainer(**quiet, max_epochs=4, callbacks=callbacks, default_root_dir=tmp_path, enable_model_summary=False)
    if way == "tuner":
        tune(run, kind, model, datamodule=data)
    run.fit(model, data)
    peak = model.learning_rate if kind == "rate" else LoRA.learning_rate
    steps = 16 if kind == "rate" else 4 * 64 // 8
    assert peak is not None and (kind == "size" or peak != LoRA.learning_rate)
    assert start.sizes == [data.batch_size] * steps and data.batch_size == (size if kind == "rate" else 8)
    assert start.rates == pytest.approx([peak * (1 - i / steps) for i in range(steps)])


@pytest.mark.parametrize("way", ["callback", "tuner"])
@pytest.mark.parametrize("kind", ["rate", "size"])
def test_a_method_prepares_itself_after_the_finder(tmp_path, way, kind):
    class Prepared(LoRA):
        def prepare(self, module, batches):
            self.calls = getattr(self, "calls", 0) + 1

    method = Prepared(r=2, target_modules=["first", "second"])
    run = trainer(method, *[finder(kind)] * (way == "callback"), max_epochs=2, default_root_dir=tmp_path)
    module = Tuned()
    if way == "tuner":
        tune(run, kind, module)
        assert not hasattr(method, "calls")
    run.fit(module)
    assert method.calls == 1
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = Prepared(r=2, target_modules=["first", "second"])
    trainer(again, max_epochs=3).fit(Tuned(), ckpt_path=tmp_path / "run.ckpt")
    assert not hasattr(again, "calls")


@pytest.mark.parametrize("kind", ["rate", "size"])
def test_a_finder_in_a_resumed_fit_is_refused(tmp_path, kind):
    """Lightning would lose the epoch, the optimizer's state and the loops, and train the weights from step 0."""
    run = trainer(lora())
    run.fit(Tuned())
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="Finder would make the resumed fit start anew"):
        trainer(lora(), finder(kind), max_epochs=3).fit(Tuned(), ckpt_path=tmp_path / "run.ckpt")
    trainer(lora(), finder("size")).test(Tuned(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
