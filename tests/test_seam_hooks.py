"""Guards on optimizers and gradients, and the hooks of a method, with real trainers."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import ADAPTED, Module, adapters, fit, saved
from toys import net_lora as lora

from lit_peft.core.addition import Delta
from lit_peft.faults import TrainingFault
from lit_peft.methods import BitFit, FullFineTuning, LinearProbe, Method, TargetedMethod
from lit_peft.testing.conformance import assert_same, snapshot
from lit_peft.training.gradients import WATCHED

# ----------------------------------------------------------------------------------- optimizers and gradients


def test_an_optimizer_built_too_early_is_refused():
    class Early(Module):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())

        def configure_optimizers(self):
            return self.optimizer

    with pytest.raises(TrainingFault, match=r"4 trainable parameters are in no optimizer, net\.first\.peft\.default"):
        fit(Early(), lora())


def test_a_module_among_the_hyperparameters_is_refused_where_checkpoints_are_written(tmp_path):
    class Takes(Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(ValueError, match=r"Takes keeps 'backbone', of the class Linear, .*ignore=\['backbone'\]"):
        fit(Takes(nn.Linear(2, 2)), lora(), ModelCheckpoint(tmp_path))
    fit(Takes(nn.Linear(2, 2)), lora())


class Thaws(Module):
    """Unfreezes its base, in configure_optimizers or after an epoch, as gradual unfreezing by hand does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def configure_optimizers(self):
        if self.where == "configure_optimizers":
            self.requires_grad_(True)
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def on_train_epoch_start(self):
        if self.where == "add_param_group" and self.current_epoch == 1:
            self.net.head.requires_grad_(True)
            self.optimizers().optimizer.add_param_group({"params": list(self.net.head.parameters())})
        if self.where == "new list" and self.current_epoch == 1:
            self.requires_grad_(True)
            self.optimizers().optimizer.param_groups[0]["params"] = list(self.parameters())


@pytest.mark.parametrize("where", ["configure_optimizers", "add_param_group", "new list"])
def test_a_base_that_is_unfrozen_beside_the_methods_is_refused_before_it_moves(where):
    module, before = Thaws(where), snapshot(Thaws(where))
    with pytest.raises(TrainingFault, match=r"net\.\w+\.weight among them, and no method trains them.* train_also"):
        fit(module, lora(), max_epochs=3)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    fit(Thaws("configure_optimizers"), FullFineTuning())


class Backbone(Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.net.second = self.net.second, nn.Identity()

    def forward(self, x):
        net = self.net
        return net.head(torch.tanh(self.backbone(torch.tanh(net.first(x)))))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_backbone_finetuning_is_for_what_a_method_trains():
    def finetuning():
        return BackboneFinetuning(1, verbose=False)

    with pytest.raises(TrainingFault, match=r"backbone\.weight among them, and no method trains them"):
        fit(Backbone(), lora(target_modules=["first"]), finetuning(), max_epochs=2)
    module = Backbone()
    before = module.backbone.weight.detach().clone()
    fit(module, FullFineTuning(), finetuning(), max_epochs=2)
    assert not torch.equal(module.backbone.weight, before)


@pytest.mark.parametrize("other", [BitFit(name="biases"), LinearProbe(train_also=["net.head"], name="head")])
def test_what_another_method_trains_is_not_refused(other):
    fit(Module(), lora(), other)


def test_lbfgs_keeps_the_list_of_its_parameters(tmp_path):
    class Net(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    path = saved(tmp_path, Net(), lora(train_also=["net.head"]))
    whole, resumed = Net(), Net()
    run = fit(whole, lora(train_also=["net.head"]), max_epochs=3)
    fit(resumed, lora(train_also=["net.head"]), max_epochs=3, ckpt_path=path)
    (optimizer,) = run.optimizers
    assert optimizer._params is optimizer.param_groups[0]["params"] and len(optimizer._params) == 6
    assert_same(adapters(resumed), adapters(whole))
    assert any(not torch.equal(value, torch.load(path)["state_dict"][key]) for key, value in adapters(whole).items())


def test_reentrant_checkpointing_of_frozen_input_is_refused():
    class Checkpointed(Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.reentrant = reentrant

        def forward(self, x):
            h = checkpoint(lambda x: self.net.second(self.net.first(x)), x, use_reentrant=self.reentrant)
            return self.net.head(h)

    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(TrainingFault, match=r"4 tensors of 'default' got no gradient, .*use_reentrant=False"),
    ):
        fit(Checkpointed(True), lora(train_also=["head"]))
    fit(Checkpointed(False), lora(train_also=["head"]))


def test_an_adapter_that_the_forward_pass_leaves_out_is_refused():
    with pytest.raises(TrainingFault, match=r"2 tensors of 'default' got no gradient, net\.unused\.peft.*lora_A"):
        fit(Module(), lora(target_modules=["first", "unused"]), max_epochs=WATCHED)
    with pytest.raises(TrainingFault, match=r"2 tensors of 'default' got no gradient"):  # all of them: at once
        fit(Module(), lora(target_modules=["unused"], train_also=["head"]))
    with pytest.raises(TrainingFault, match=r"2 tensors of 'probe' got no gradient, net\.unused\.bias"):
        fit(Module(), lora(), LinearProbe(name="probe", train_also=["unused"]))


def test_a_layer_may_be_left_out_of_the_first_steps(recwarn):
    """Layer drop, or an expert without tokens."""

    class Drops(Module):
        def forward(self, x):
            h = torch.tanh(self.net.first(x))
            return self.net.head(h if self.global_step < 5 else torch.tanh(self.net.second(h)))

    fit(module := Drops(), lora(), max_epochs=WATCHED)
    assert all(value.any() for value in adapters(module).values())
    assert not [w for w in recwarn if "gradient" in str(w.message)]


@pytest.mark.parametrize("epochs, steps", [(WATCHED, WATCHED), (1, 4)])
def test_zero_gradients_throughout_are_told(epochs, steps):
    class Dead(Module):
        def forward(self, x):
            return self.net.head(0.0 * self.net.second(torch.tanh(self.net.first(x))))

    with pytest.warns(UserWarning, match=rf"without a gradient other than zero in {steps} steps: .* and 1 more"):
        fit(Dead(), lora(), max_epochs=epochs)


class Slow(Module):
    """The first factors' gradient stays zero for some steps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "a head of zeros":
            nn.init.zeros_(self.net.head.weight)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        if self.how == "a head of zeros":
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 1))
        interval = "epoch" if self.how == "a warm-up by epochs" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}


@pytest.mark.parametrize("how", ["a warm-up from rate zero", "a warm-up by epochs", "a head of zeros"])
def test_a_gradient_that_comes_late_is_no_fault(how, recwarn):
    module = Slow(how)
    fit(module, lora(train_also=["head"]), max_epochs=WATCHED)
    assert all(value.any() for value in adapters(module).values())
    assert not [w for w in recwarn if "gradient" in str(w.message)]


def test_an_unused_head_is_reported():
    with pytest.warns(UserWarning, match=r"other than zero in 20 steps: net\.unused\.bias, net\.unus"):
        fit(Module(), lora(train_also=["unused"]), max_epochs=WATCHED)


def test_a_tensor_beside_living_ones_that_gets_nothing_is_reported():
    class Half(Module):
        def forward(self, x):
            h = torch.tanh(self.net.first(x))
            return self.net.head(h + 0.0 * self.net.second(h))

    with pytest.warns(UserWarning, match=r"in 20 steps: net\.second\.peft\.default\.lora_A, .*lora_B\.$"):
        fit(Half(), lora(), max_epochs=WATCHED)


def test_two_optimizers_are_each_checked_for_their_own():
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.toggle_optimizer(optimizer)
                self.manual_backward(super().training_step(batch, index))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return [torch.optim.Adam(layer.parameters(), lr=0.05) for layer in (self.net.first, self.net.second)]

    module = Two()
    fit(module, lora())
    assert all(value.any() for value in adapters(module).values())
    with pytest.raises(ValueError, match="Hooked acts through `penalty`, which manual optimization leaves out"):
        fit(Two(), Hooked(target_modules=ADAPTED))


# ----------------------------------------------------------------------------------------------------- hooks


class Offset(Delta):
    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(out, in_))

    def weight(self, W):
        return W + self.change


class Hooked(TargetedMethod):
    """Notes when its hooks run, with what gradients, and pulls the weights towards one by its penalty."""

    def __init__(self, strength: float = 0.0, **common) -> None:
        super().__init__(**common)
        self.strength, self.calls = strength, []

    def build(self, site):
        return Offset(*site.size)

    def changes(self, module):
        return [module.get_submodule(path).peft[self.name].change for path in ADAPTED]

    def prepare(self, module, batches):
        self.calls.append(f"prepare {len(list(batches))}")
        with torch.no_grad():
            for change in self.changes(module):
                change.fill_(0.25)

    def before_optimizer_step(self, module):
        assert all(change.grad is not None for change in self.changes(module))
        self.seen = [change.clone() for change in self.changes(module)]
        self.calls.append("before")

    def after_optimizer_step(self, module):
        pairs = zip(self.seen, self.changes(module), strict=True)
        assert all(not torch.equal(before, after) for before, after in pairs)
        self.calls.append("after")

    def penalty(self, module):
        self.calls.append("penalty")
        return self.strength * sum((1 - change).square().sum() for change in self.changes(module))

    def param_groups(self, named, lr):
        self.calls.append("groups")
        return [{"params": [name], "lr": lr * i} for i, (name, _) in enumerate(named, 1)]


class Grouped(Module):
    """Asks its methods for parameter groups, as the tasks do."""

    def configure_optimizers(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [g for c in self.trainer.callbacks if isinstance(c, Method) for g in c.param_groups(named, 0.01)]
        by_name = dict(named)
        return torch.optim.Adam([{**g, "params": [by_name[n] for n in g["params"]]} for g in groups])


def test_hooks_run_once_an_optimizer_step():
    method, module = Hooked(target_modules=ADAPTED), Grouped()
    run = fit(module, method, accumulate_grad_batches=2)
    step = ["penalty", "penalty", "before", "after"]  # penalties belong to the loss, which is computed twice
    groups = ["groups", "groups"]  # by the module, and by the check that its optimizer has these rates
    assert method.calls == [*groups, "prepare 4", *step, *step]
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.01, 0.02]
    method.calls.clear()
    fit(module, method, accumulate_grad_batches=2)
    assert method.calls == [*groups, *step, *step]  # prepared once: a second fit goes on


def test_a_resumed_fit_is_not_prepared_again(tmp_path):
    path = saved(tmp_path, Grouped(), Hooked(target_modules=ADAPTED))
    method = Hooked(target_modules=ADAPTED)
    fit(Grouped(), method, max_epochs=2, ckpt_path=path)
    assert not any(call.startswith("prepare") for call in method.calls)


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_a_penalty_is_part_of_the_loss(kind):
    class Output(Grouped):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss if kind == "tensor" else {"loss": loss, "more": 1}

        def on_train_batch_end(self, outputs, batch, index):
            assert "more" in outputs or kind == "tensor"

    distances = []
    for strength in (0.0, 10.0):
        method = Hooked(strength, target_modules=ADAPTED)
        module = fit(Output(), method).lightning_module
        distances.append(sum((1 - change).square().sum().item() for change in method.changes(module)))
    assert distances[1] < 0.9 * distances[0]


def test_a_batch_that_the_module_skips_has_no_penalty_and_no_check():
    class Skips(Grouped):
        def training_step(self, batch, index):
            return None if index < 2 else super().training_step(batch, index)

    method = Hooked(1.0, target_modules=ADAPTED)
    method.after_optimizer_step = lambda module: None
    fit(Skips(), method)
    assert method.calls[3:] == ["penalty", "before"] * 2
