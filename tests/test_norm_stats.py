"""Running statistics of frozen normalisation layers that `update_norm_stats` lets move: trained, saved, given back."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import adapters, lora, trainer

import lit_peft
from lit_peft.core.attach import detach
from lit_peft.core.checkpoint import CheckpointMismatch, adapter_keys
from lit_peft.testing.conformance import assert_same, snapshot

STATISTICS = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
IMAGES = 3 + torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class ConvNet(pl.LightningModule):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4, momentum=momentum), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES), batch_size=4)


def method(**arguments):
    return lora(**{"target_modules": ["conv", "head"], "update_norm_stats": True} | arguments)


def fit(module: nn.Module, *callbacks, ckpt_path=None, **arguments) -> pl.Trainer:
    run = trainer(*callbacks, **arguments)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in snapshot(module).items() if key in STATISTICS}


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_when_asked_to_and_are_in_the_checkpoint(tmp_path, update, momentum):
    module = ConvNet(momentum)
    before = snapshot(module)
    run = fit(module, method(update_norm_stats=update), max_epochs=3)
    after = statistics(module)
    assert after["norm.num_batches_tracked"] == (6 if update else 0)
    assert torch.equal(after["norm.running_mean"], before["norm.running_mean"]) is not update
    for frozen in ("norm.weight", "norm.bias", "conv.weight"):
        assert torch.equal(module.state_dict()[frozen], before[frozen])
    run.save_checkpoint(tmp_path / "run.ckpt")
    held = torch.load(tmp_path / "run.ckpt")["state_dict"]
    assert STATISTICS & held.keys() == (STATISTICS if update else set())
    assert held.keys() == adapter_keys(module)


def test_they_are_those_that_a_plain_module_would_get():
    """Both nets see the same batches with the same weights, as B is zero and nothing moves it."""
    plain, adapted = ConvNet().train(), ConvNet().train()
    method().attach(adapted)
    for (batch,) in loader():
        plain(batch), adapted(batch)
    assert_same(statistics(adapted), statistics(plain))


def test_validation_reads_the_statistics_and_leaves_them():
    module = ConvNet()
    run = fit(module, method())
    before = statistics(module)
    loss = run.validate(module, loader(), verbose=False)[0]["loss"]
    assert_same(statistics(module), before)
    twin = ConvNet()
    method().attach(twin)
    twin.load_state_dict(adapters(module), strict=False)
    with torch.no_grad():
        assert twin.eval()(IMAGES).square().mean().item() == pytest.approx(loss, rel=1e-5)
    twin.norm.reset_running_stats()
    assert twin(IMAGES).square().mean().item() != pytest.approx(loss, rel=1e-2)


def test_a_resumed_fit_ends_where_an_uninterrupted_one_ends(tmp_path):
    whole, resumed = ConvNet(), ConvNet()
    fit(whole, method(), max_epochs=3)
    fit(ConvNet(), method(), max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    fit(resumed, method(), max_epochs=3, ckpt_path=tmp_path / "run.ckpt")
    assert_same(adapters(resumed), adapters(whole))
    assert resumed.norm.num_batches_tracked == 6


@pytest.mark.parametrize("update", [False, True])
def test_a_checkpoint_with_the_other_value_is_refused(tmp_path, update):
    fit(ConvNet(), method(update_norm_stats=update)).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointMismatch, match=rf"made with LoRA\(update_norm_stats={update}\), not {not update}"):
        fit(ConvNet(), method(update_norm_stats=not update), ckpt_path=tmp_path / "run.ckpt")


@pytest.mark.parametrize("first", ["moves", "stays"])
def test_among_several_adapters_one_that_asks_is_enough(first):
    module = ConvNet().train()
    before = snapshot(module)
    both = [method(name="moves", target_modules="conv"), lora(name="stays", target_modules="head")]
    for each in sorted(both, key=lambda each: each.name != first):
        each.attach(module)
    module(IMAGES)
    assert module.norm.num_batches_tracked == 1 and adapter_keys(module) >= STATISTICS
    detach(module, "moves")
    assert not STATISTICS & adapter_keys(module)
    module(IMAGES)
    assert_same(statistics(module), {key: value for key, value in before.items() if key in STATISTICS})
    method(name="again").attach(module)
    module(IMAGES)
    assert module.norm.num_batches_tracked == 1
    detach(module)
    assert_same(snapshot(module), before)
    assert module.norm.training and type(module.norm) is nn.BatchNorm2d


def test_nothing_to_update_is_told():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="update_norm_stats: Sequential has no layer with running statistics"):
        lora(target_modules="0", update_norm_stats=True).attach(module)


@pytest.mark.parametrize("also", [[], ["norm"]])
def test_an_adapter_folder_keeps_them(tmp_path, also):
    import peft

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(1, 4, 2), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)})

    def run(module: nn.Module) -> Tensor:
        return module["head"](module["norm"](module["conv"](IMAGES)).mean((2, 3)))

    model, twin = net(), net().eval()
    method(target_modules="head", train_also=also).attach(model)
    run(model.train())
    with torch.no_grad():
        model["head"].peft["default"].lora_B.fill_(0.5)
    expected = run(model.eval())
    assert not torch.allclose(expected, run(twin), atol=1e-2)
    lit_peft.save(model, tmp_path)
    lit_peft.load(twin, tmp_path)
    assert torch.equal(run(twin), expected)
    opened = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(run(opened.base_model.model), expected)
