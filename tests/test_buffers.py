"""Buffers of the frozen base that move all the same: what moved is saved, loaded, averaged and given back."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import lora, trainer

import lit_peft
from lit_peft.core.attach import detach
from lit_peft.core.checkpoint import CheckpointMismatch, adapter_keys
from lit_peft.core.fingerprint import fingerprint
from lit_peft.core.registry import registry
from lit_peft.methods import IA3, BitFit, FullFineTuning, LinearProbe, LoRA
from lit_peft.testing.conformance import assert_same, snapshot

WAYS = {
    "in place": lambda layer, new: layer.mean.copy_(new),
    "by data": lambda layer, new: layer.mean.data.copy_(new),
    "assigned": lambda layer, new: setattr(layer, "mean", new),
}


class Whitened(nn.Module):
    """A frozen layer with a moving average beside its parameter, as a codebook of a vector quantiser has it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scale, self.way = nn.Parameter(torch.full((4,), 0.5)), way
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("table", torch.linspace(0.1, 0.7, 4))  # never moves
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                WAYS[self.way](self, 0.9 * self.mean + 0.1 * x.mean(0))
        return (x - self.mean) * self.scale + self.table + self.seen


class Net(pl.LightningModule):
    """A counter at the root, beside a parameter, is part of the loss."""

    def __init__(self, way: str = "in place", offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.white, self.head = nn.Linear(4, 4), Whitened(way), nn.Linear(4, 2)
        self.norm, self.temperature = nn.BatchNorm1d(4), nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.norm.running_mean += offset

    def forward(self, x):
        return self.head(self.norm(self.white(self.first(x)))) * self.temperature

    def training_step(self, batch, _):
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1]) * (1 + 0.1 * self.steps)

    def validation_step(self, batch, _):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


MOVED = {"white.mean", "steps"}
method = partial(lora, target_modules=["first"], train_also=["head"])


def loader() -> DataLoader:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) + 1
    return DataLoader(TensorDataset(x, (x.sum(1) > 4).long()), batch_size=4)


def fit(module: nn.Module, *callbacks, ckpt_path=None, **arguments) -> pl.Trainer:
    run = trainer(*callbacks, **arguments)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module.eval()(loader().dataset[:][0])


@pytest.mark.parametrize("way", WAYS)
def test_what_moved_is_saved_loaded_resumed_and_given_back(tmp_path, way):
    module, before = Net(way), snapshot(Net(way))
    run = fit(module, method())
    run.save_checkpoint(tmp_path / "run.ckpt")
    held = torch.load(tmp_path / "run.ckpt")["state_dict"]
    assert {key for key in held if ".peft." not in key} == {"head.weight", "head.bias"} | MOVED
    assert held["steps"] == 4 and held["white.mean"].any()

    fresh = Net(way)
    (loss,) = trainer(method()).test(fresh, loader(), tmp_path / "run.ckpt", verbose=False)
    assert [loss] == run.validate(module, loader(), verbose=False) and loss["loss"] > 0
    assert_same(snapshot(fresh), snapshot(module))
    loaded = Net(way)
    lit_peft.load(loaded, tmp_path / "run.ckpt")
    assert torch.equal(outputs(loaded), outputs(module)) and adapter_keys(loaded) == adapter_keys(module)

    whole, resumed = Net(way), Net(way)
    fit(whole, method(), max_epochs=3)
    fit(resumed, method(), max_epochs=3, ckpt_path=tmp_path / "run.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))
    for each in (module, loaded, resumed):
        detach(each)
        assert_same(snapshot(each), before)


@pytest.mark.parametrize("other", [IA3(target_modules=["first"]), BitFit(), LinearProbe(train_also=["head"])])
def test_every_method_saves_them(tmp_path, other):
    module = Net()
    fit(module, other).save_checkpoint(tmp_path / "run.ckpt")
    loaded = Net()
    lit_peft.load(loaded, tmp_path / "run.ckpt")
    assert_same(snapshot(loaded), snapshot(module))
    detach(module)
    assert_same(snapshot(module), snapshot(Net()))


def test_full_fine_tuning_copies_none_that_it_saves_anyway():
    module = Net()
    fit(module, FullFineTuning())
    assert registry(module).originals == {} and adapter_keys(module) == set(Net().state_dict())


def test_the_set_does_not_shrink_and_an_earlier_checkpoint_puts_back(tmp_path):
    module = Net()
    run = trainer(method())
    run.fit(module, loader())
    first = Net().state_dict()
    assert adapter_keys(module) >= MOVED
    module.steps.zero_()
    assert adapter_keys(module) >= MOVED
    run.save_checkpoint(tmp_path / "later.ckpt")  # holds a buffer that is where it was
    again = Net()
    trainer(method()).test(again, loader(), tmp_path / "later.ckpt", verbose=False)
    assert_same(snapshot(again), snapshot(module))
    early = trainer(method(), max_steps=0)
    early.fit(Net(), loader())
    early.save_checkpoint(tmp_path / "early.ckpt")
    assert not MOVED & torch.load(tmp_path / "early.ckpt")["state_dict"].keys()
    trainer(method()).test(module, loader(), tmp_path / "early.ckpt", verbose=False)
    assert all(torch.equal(module.state_dict()[key], first[key]) for key in MOVED)
    assert not MOVED & adapter_keys(module)


def test_they_go_back_with_the_last_adapter():
    module = Net()
    fit(module, method(), BitFit(name="biases"))
    detach(module, "biases")
    assert module.steps == 4 and adapter_keys(module) >= MOVED
    detach(module)
    assert_same(snapshot(module), snapshot(Net()))


def test_a_buffer_of_another_shape_is_saved_and_given_back():
    module = Net()
    method().attach(module)
    module.white.mean = torch.ones(6)
    assert "white.mean" in adapter_keys(module)
    detach(module)
    assert_same(snapshot(module), snapshot(Net()))


def test_neither_a_dtype_nor_a_nan_moves_a_buffer():
    module = Net()
    module.white.table[0] = float("nan")
    method().attach(module)
    module.to(torch.bfloat16)
    assert not {"white.table", "white.mean", "norm.running_mean"} & adapter_keys(module)


def test_a_checkpoint_that_lacks_one_or_has_no_place_for_one_is_refused(tmp_path):
    fit(Net(), method()).save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt")

    class Renamed(Net):
        def __init__(self):
            super().__init__()
            del self.steps

    for read in (
        lambda net: lit_peft.load(net, tmp_path / "run.ckpt"),
        lambda net: trainer(method()).test(net, loader(), tmp_path / "run.ckpt", verbose=False),
    ):
        with pytest.raises(CheckpointMismatch, match=r"holds steps, which has no place|1 unknown \(steps\)"):
            read(Renamed())
    del content["state_dict"]["white.mean"]
    torch.save(content, tmp_path / "run.ckpt")
    for read in (
        lambda net: lit_peft.load(net, tmp_path / "run.ckpt"),
        lambda net: trainer(method()).test(net, loader(), tmp_path / "run.ckpt", verbose=False),
    ):
        with pytest.raises(CheckpointMismatch, match=r"lacks white\.mean|1 missing \(white\.mean\)"):
            read(Net())


def test_a_folder_keeps_them_and_hf_peft_reads_it(tmp_path):
    import peft

    def net() -> nn.Module:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 4), Whitened("in place"), nn.Linear(4, 2))
        body[0].register_buffer("count", torch.zeros(()))
        return nn.ModuleDict({"first": body[0], "white": body[1], "head": body[2]})

    def run(module: nn.Module) -> Tensor:
        first = module["first"]
        x = module["white"](first(loader().dataset[:][0]))
        return module["head"](x * (1 + getattr(first, "base_layer", first).count))

    def trained() -> nn.Module:
        module = net()
        lora(target_modules=["first"], train_also=["head"]).attach(module)
        run(module.train())
        module["first"].count += 1  # beside the weight of an adapted layer
        with torch.no_grad():
            module["first"].peft["default"].lora_B.fill_(0.5)
        return module

    module, twin = trained(), net().eval()
    expected = run(module.eval())
    lit_peft.save(module, tmp_path)
    lit_peft.load(twin, tmp_path)
    assert torch.equal(run(twin), expected) and not torch.allclose(run(net().eval()), expected)
    assert adapter_keys(twin) == adapter_keys(module)
    detach(twin)
    assert_same(snapshot(twin), snapshot(net()))
    opened = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(run(opened.base_model.model), expected)


def test_averaging_averages_what_moves_and_leaves_what_does_not(tmp_path):
    class Recorded(Net):
        def on_train_batch_end(self, *_):
            self.after = [*getattr(self, "after", []), self.white.mean.clone()]

    module = Recorded()
    fit(module, method(), EMAWeightAveraging(decay=0.7))
    expected = module.after[0]
    for value in module.after[1:]:
        expected = 0.7 * expected + 0.3 * value
    torch.testing.assert_close(module.white.mean, expected)
    first = Net().state_dict()
    for key in ("white.table", "white.scale", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(module.state_dict()[key], first[key])
    fit(Net(), method(), EMAWeightAveraging(decay=0.7), ModelCheckpoint(tmp_path, "{epoch}"))
    whole, resumed = Net(), Net()
    fit(whole, method(), EMAWeightAveraging(decay=0.7), max_epochs=3)
    fit(resumed, method(), EMAWeightAveraging(decay=0.7), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))


# --------------------------------------------------------------------------------------------- fingerprint


def test_a_base_with_other_statistics_is_refused(tmp_path):
    module = Net()
    fit(module, method()).save_checkpoint(tmp_path / "run.ckpt")
    lit_peft.save(module, tmp_path)
    for read in (
        lambda net: lit_peft.load(net, tmp_path / "run.ckpt"),
        lambda net: lit_peft.load(net, tmp_path),
        lambda net: trainer(method()).test(net, loader(), tmp_path / "run.ckpt", verbose=False),
    ):
        read(Net())
        other = Net()
        other.norm.num_batches_tracked += 1  # tells nothing of a base
        other.white.seen += 1  # no state dict holds it
        other.white.mean += 1  # comes with the adapter
        read(other)
        with pytest.raises(CheckpointMismatch, match=r"another base model: norm\.running_mean holds other values"):
            read(Net(offset=3.0))


def test_digests_of_buffers_do_not_depend_on_the_dtype():
    module = Net(offset=0.3)
    digests = fingerprint(module)
    assert {"norm.running_mean", "norm.running_var", "white.mean", "white.table"} <= digests.keys()
    assert not {"norm.num_batches_tracked", "white.seen", "steps"} & digests.keys()
    assert fingerprint(module.to(torch.bfloat16)) == digests


class Odd(nn.Module):
    """A frozen layer with buffers that are no plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("phase", torch.ones(4, dtype=torch.complex64).conj())
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.full((4,), 0.5)
        return torch.sparse.mm(self.adjacency, (x @ self.weight).t()).t() * self.mask * self.expanded


def test_buffers_that_are_sparse_expanded_conjugate_or_made_on_first_use_do_no_harm(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Odd(), nn.Linear(4, 2))

    module, x = net(), torch.randn(3, 4)
    method = LoRA(r=2, target_modules=["1"])
    method.attach(module)
    nn.init.ones_(module[1].peft["default"].lora_B)
    expected = module(x)
    lit_peft.save(module, tmp_path / "folder")
    loaded = net()
    lit_peft.load(loaded, tmp_path / "folder")
    assert torch.equal(loaded(x), expected)
    method.detach(module)
    assert torch.equal(module(x), net()(x))


def test_a_buffer_may_hold_what_no_parameter_may(tmp_path):
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Masked())

    module = net()
    LoRA(r=2, target_modules=["0"], train_also=["1"]).attach(module)
    lit_peft.save(module, tmp_path / "folder")
    lit_peft.load(loaded := net(), tmp_path / "folder")
    assert torch.equal(loaded[1].mask, module[1].mask)
