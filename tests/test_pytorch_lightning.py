"""Methods in trainers of pytorch_lightning, the other package of the same classes."""

import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch import Trainer as OtherTrainer
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import BitsandbytesPrecision
from toys import LORA_KEYS, Steps, adapters, loader
from toys import net_lora as lora

from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.testing.conformance import assert_same
from lit_peft.training.seam import AtomicCheckpointIO


class Module(Steps, pl.LightningModule):
    pass


def trainer(*callbacks: pl.Callback, **arguments) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**quiet | {"max_epochs": 1, "enable_checkpointing": False} | arguments, callbacks=list(callbacks))


def fit(module: Module, *callbacks, ckpt_path=None, **arguments) -> pl.Trainer:
    run = trainer(*callbacks, **arguments)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("averaged", [False, True])
def test_fit_save_resume_test_predict(tmp_path, averaged):
    def more() -> list[pl.Callback]:
        return [EMAWeightAveraging(decay=0.7)] if averaged else []

    whole, first, resumed, fresh = Module(), Module(), Module(), Module()
    fit(whole, lora(), *more(), max_epochs=3)
    keep = ModelCheckpoint(tmp_path, "{epoch}")
    run = fit(first, lora(), *more(), keep, enable_checkpointing=True)
    content = torch.load(tmp_path / "epoch=0.ckpt")
    assert set(content["state_dict"]) == LORA_KEYS and content["lit_peft"]
    assert isinstance(run.strategy.checkpoint_io, AtomicCheckpointIO)
    fit(resumed, lora(), *more(), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(adapters(resumed), adapters(whole))
    scores = trainer(lora()).test(fresh, loader(), tmp_path / "epoch=0.ckpt", verbose=False)
    assert scores == run.test(first, loader(), verbose=False)
    outputs = trainer(lora()).predict(fresh, loader())
    with torch.no_grad():
        assert all(torch.equal(out, fresh.eval()(x)) for out, (x, _) in zip(outputs, loader(), strict=True))
    with pytest.raises(CheckpointMismatch, match="another base model"):
        trainer(lora()).test(Module(seed=1), loader(), tmp_path / "epoch=0.ckpt", verbose=False)


def test_a_killed_save_leaves_the_old_file(tmp_path, monkeypatch):
    run = fit(Module(), lora())
    run.save_checkpoint(tmp_path / "run.ckpt")
    old = (tmp_path / "run.ckpt").read_bytes()

    def killed(content, file):
        file.write_bytes(old[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_peft.training.seam.torch.save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(tmp_path / "run.ckpt")
    assert (tmp_path / "run.ckpt").read_bytes() == old


def test_what_cannot_train_is_refused_here_too():
    for callbacks in ([lora(), StochasticWeightAveraging(0.01)], [EMAWeightAveraging(), lora()]):
        with pytest.raises(ValueError, match="WeightAveraging copies the module before the adapters are there"):
            fit(Module(), *callbacks)
    run = trainer(lora())
    run.strategy.precision_plugin = object.__new__(BitsandbytesPrecision)  # its constructor asks for a GPU
    with pytest.raises(ValueError, match="BitsandbytesPrecision turns every linear layer"):
        run.fit(Module(), loader())


def test_lightning_itself_refuses_to_mix_the_two():
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        OtherTrainer(callbacks=[lora()], logger=False, enable_checkpointing=False).fit(Module(), loader())
