"""bitsandbytes' 8-bit and paged optimizers in a fit: exact resumes, on any device; names on the command line."""

import io
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
import yaml
from bitsandbytes import optim
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from test_cli import SMALL, fit
from torch import nn
from toys import Module, loader, trainer

import lit_peft
from lit_peft import LoRA, QLoRA
from lit_peft.tasks import TextClassification
from lit_peft.training.paged import NAMES, adopt


class Wide(Module):
    """Has factors of 4,096 entries, from which bitsandbytes keeps state in 8 bit, and smaller ones."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, 0.01
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        groups = lit_peft.param_groups(self, self.lr)
        return getattr(optim, self.optimizer)(groups, weight_decay=0.1)


def method() -> LoRA:
    return LoRA(r=32, target_modules=["net.2"], dropout=0.0, loraplus_ratio=4)


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def run(module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path=None, **arguments) -> pl.Trainer:
    found = trainer(method(), *callbacks, **arguments)
    found.fit(module, ckpt_path=ckpt_path)
    return found


@pytest.mark.filterwarnings("ignore:.*no such GPU here")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("average", [False, True], ids=["", "averaged"])
def test_a_fit_resumes_exactly(name, average, tmp_path):
    """With gradients clipped, and with an average of the weights beside it, if there is one."""
    options = {"gradient_clip_val": 0.1, "default_root_dir": tmp_path}

    def more() -> list[pl.Callback]:
        return [EMAWeightAveraging(decay=0.7)] if average else []

    whole = Wide(name)
    run(whole, *more(), max_epochs=3, **options)
    run(Wide(name), *more(), ModelCheckpoint(tmp_path, "{epoch}"), max_epochs=2, **options)
    half = tmp_path / "epoch=1.ckpt"
    state = torch.load(half, weights_only=True)["optimizer_states"][0]["state"]
    kinds = {s["__bnb_optimizer_quant_state__"]["state1"].dtype for s in state.values()}
    assert kinds == ({torch.uint8} if name.endswith("8bit") else {torch.float32})
    resumed = Wide(name)
    run(resumed, *more(), max_epochs=3, ckpt_path=half, **options)
    ours, theirs = trained(resumed), trained(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_in_32_bit_it_is_adamw():
    """bitsandbytes keeps the two moments under other names, and computes the same in another order."""

    class Plain(Wide):
        def configure_optimizers(self):
            return torch.optim.AdamW(lit_peft.param_groups(self, self.lr), weight_decay=0.1)

    plain, paged = Plain(""), Wide("PagedAdamW")
    run(plain, max_epochs=3)
    with pytest.warns(UserWarning, match="it runs as AdamW, all its state in memory"):
        run(paged, max_epochs=3)
    torch.testing.assert_close(trained(paged), trained(plain), atol=1e-5, rtol=1e-4)


def test_one_warning_where_nothing_can_be_paged():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(Wide("PagedAdamW8bit"), max_epochs=2)
    told = [str(w.message) for w in caught if "page" in str(w.message).lower()]
    assert len(told) == 1 and "runs as AdamW8bit" in told[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(Wide("AdamW8bit"))
    assert not [w for w in caught if "page" in str(w.message).lower()]


def test_another_optimizer_is_refused_on_resume(tmp_path):
    run(Wide("AdamW8bit")).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="The optimizer is bitsandbytes's AdamW, and was bitsandbytes's AdamW8bit"):
        run(Wide("AdamW"), max_epochs=2, ckpt_path=tmp_path / "run.ckpt")


def test_a_rate_finder_goes_before(tmp_path):
    module, finder = Wide("AdamW8bit"), LearningRateFinder(num_training_steps=20)
    plain = LoRA(r=32, target_modules=["net.2"], dropout=0.0)
    found = trainer(plain, finder, default_root_dir=tmp_path, max_epochs=6)
    found.fit(module)
    assert module.lr != 0.01
    assert [g["lr"] for g in found.optimizers[0].param_groups] == [module.lr]
    assert {state["step"] for state in found.optimizers[0].state.values()} == {24}  # not the finder's too


# ----------------------------------------------------------------------------- what a GPU does, played on a CPU


def stepped(name: str = "PagedAdamW") -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 8))
    optimizer = getattr(optim, name)([parameter], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adopt(optimizer)
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> dict:
    (state,) = optimizer.state.values()
    return state


def test_marks_of_shared_memory_stay_out_of_checkpoints():
    """A tensor keeps its attributes in a file: what says that it is paged would be believed on a CPU, and crash."""
    optimizer = stepped()
    for key in ("state1", "state2"):
        state_of(optimizer)[key].is_paged = True
    file = io.BytesIO()
    torch.save(state_of(optimizer)["state1"], file)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True).is_paged  # hence
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = stepped()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for key in ("state1", "state2"):
        assert torch.equal(state_of(other)[key], state_of(optimizer)[key])
        assert not hasattr(state_of(other)[key], "is_paged")
    assert state_of(optimizer)["state1"].is_paged  # the run itself goes on with its own


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdEMAMix"])
def test_what_is_restored_is_paged_before_the_next_step(name, monkeypatch):
    optimizer = stepped(name)
    saved = optimizer.state_dict()
    made: list[torch.Tensor] = []

    def shared(p, dtype):
        made.append(torch.zeros_like(p, dtype=dtype))
        made[-1].is_paged = True
        return made[-1]

    other = stepped(name)
    other.is_paged = True
    monkeypatch.setattr(other, "get_state_buffer", shared)
    monkeypatch.setattr(other, "prefetch_state", lambda p: None)
    for target in (optimizer, other):
        target.load_state_dict(saved)
    for _ in range(2):
        optimizer.step()
        other.step()
    assert len(made) == 2  # once
    for key in ("state1", "state2"):
        assert any(state_of(other)[key] is buffer for buffer in made)
        assert torch.equal(state_of(other)[key], state_of(optimizer)[key])


# ----------------------------------------------------------------------------------------- on the command line


def optimizer_of(folder) -> dict | None:
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["optimizer"]


SHORT = ["--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_steps", "2"]


@pytest.mark.filterwarnings("ignore:.*no such GPU here")
def test_optimizers_by_short_name(tmp_path, monkeypatch):

    class AdamW8bit(torch.optim.AdamW):
        """As torchao has one, of which the parser would not know which is meant."""

    monkeypatch.setattr(torch.optim, "AdamW8bit", AdamW8bit, raising=False)
    AdamW8bit.__module__, AdamW8bit.__qualname__ = "torch.optim", "AdamW8bit"
    folder = fit(tmp_path, *SHORT, "--model.optimizer=AdamW8bit")
    assert optimizer_of(folder)["class_path"] == "bitsandbytes.optim.AdamW8bit"
    folder = fit(tmp_path, *SHORT, "--model.optimizer", "PagedAdamW8bit", "--model.optimizer.betas", "[0.9, 0.95]")
    assert optimizer_of(folder)["class_path"] == "bitsandbytes.optim.PagedAdamW8bit"
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    groups = content["optimizer_states"][0]["param_groups"]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.95)] * 3
    assert [group["weight_decay"] for group in groups] == [0.0, 0.01, 0.0]  # adapter, head, biases of the head
    given = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"eps": 1e-6}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": given}}}))
    folder = fit(tmp_path, *SHORT, "--config", str(tmp_path / "own.yaml"))
    assert optimizer_of(folder)["class_path"] == "bitsandbytes.optim.AdamW8bit"
    fit(tmp_path, "--run", str(folder), "--trainer.max_steps", "3", "--trainer.max_epochs", "3")
    assert json.loads((folder / "metrics.json").read_text())["test/acc"] is not None


def test_none_is_the_methods_own(tmp_path):
    folder = fit(tmp_path, *SHORT)
    assert optimizer_of(folder) is None
    began = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["lit_peft"]["optimizers"]
    assert {group["optimizer"] for group in began} == {"AdamW"}
    task = TextClassification(label_names=["bad", "good"])
    task.configure_model()
    QLoRA(r=2).attach(task)
    task.trainer = trainer(max_steps=3)
    assert type(task.configure_optimizers()["optimizer"]) is optim.PagedAdamW
