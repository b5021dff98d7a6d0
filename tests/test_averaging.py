"""Lightning's weight averaging over adapters: what it averages, saves, resumes and tests."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from toys import ADAPTED, LORA_KEYS, Module, Net, adapters, fit, loader, trainer
from toys import net_lora as lora

from lit_peft import AdaLoRA, SparseLoRA
from lit_peft.testing.conformance import assert_same

BUILT = pytest.mark.parametrize("built", ["init", "setup", "configure_model"])


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.7)


def checkpoint(path, built: str = "init", **arguments) -> dict[str, Tensor]:
    """The averaged adapters after an epoch, whose checkpoint is `path`/epoch=0.ckpt."""
    fit(Module(built), lora(**arguments), ema(), ModelCheckpoint(path, "{epoch}"))
    return torch.load(path / "epoch=0.ckpt")["state_dict"]


def assert_base_is_untouched(module: nn.Module) -> None:
    state = module.state_dict()
    assert all(torch.equal(state[f"net.{key}"], value) for key, value in Net().state_dict().items())


@BUILT
def test_the_average_is_that_of_the_formula(built):
    class Recorded(Module):
        def on_train_batch_end(self, *_):
            self.after = [*getattr(self, "after", []), adapters(self)]

    module = Recorded(built)
    fit(module, lora(), ema())
    expected = module.after[0]
    for state in module.after[1:]:
        expected = {key: 0.7 * expected[key] + 0.3 * value for key, value in state.items()}
    assert len(module.after) == 4
    for key, value in adapters(module).items():
        torch.testing.assert_close(value, expected[key])
    assert_base_is_untouched(module)


@BUILT
def test_a_checkpoint_holds_both_states_of_the_adapters_and_resumes_exactly(tmp_path, built):
    averaged = checkpoint(tmp_path, built)
    content = torch.load(tmp_path / "epoch=0.ckpt")
    assert set(averaged) == set(content["current_model_state"]) == LORA_KEYS
    assert all(not torch.equal(content["current_model_state"][key], value) for key, value in averaged.items())
    whole, resumed = Module(built), Module(built)
    fit(whole, lora(), ema(), max_epochs=3)
    fit(resumed, lora(), ema(), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(adapters(resumed), adapters(whole))
    assert_base_is_untouched(resumed)


@BUILT
@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_scores_with_the_average(tmp_path, built, with_callback, verb):
    averaged = checkpoint(tmp_path, built)
    module = Module(built)
    run = trainer(lora(), *[ema()] * with_callback)
    scores = getattr(run, verb)(module, loader(), tmp_path / "epoch=0.ckpt", verbose=False)
    assert_same(adapters(module), averaged)
    seen = fit(Module(), lora(), ema())  # its callback has been through a fit
    assert getattr(seen, verb)(seen.lightning_module, loader(), tmp_path / "epoch=0.ckpt", verbose=False) == scores
    assert_same(adapters(seen.lightning_module), averaged)


def test_validation_within_a_fit_uses_the_average(tmp_path):
    class Noted(Module):
        def on_validation_batch_start(self, *_):
            self.validated = adapters(self)

    module = Noted()
    run = trainer(lora(), ema(), ModelCheckpoint(tmp_path, "{epoch}"))
    run.fit(module, loader(), loader())
    assert_same(module.validated, torch.load(tmp_path / "epoch=0.ckpt")["state_dict"])


def test_a_checkpoint_of_weights_alone_holds_the_average(tmp_path):
    averaged = checkpoint(tmp_path / "full")
    fit(Module(), lora(), ema(), ModelCheckpoint(tmp_path, "weights", save_weights_only=True))
    content = torch.load(tmp_path / "weights.ckpt")
    assert "current_model_state" not in content
    assert_same(content["state_dict"], averaged)


def test_a_checkpoint_without_average_goes_on_with_one(tmp_path):
    fit(Module(), lora()).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="not created with WeightAveraging"):
        fit(Module(), lora(), ema(), max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")


def test_neither_base_nor_integers_are_averaged():
    """A frozen base in bfloat16 would drift by rounding, and integers be cut off: 0.9 * 7 + 0.1 * 7 < 7."""

    class Coarse(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net.to(torch.bfloat16)
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("positions", torch.arange(50))

        def forward(self, x):
            return self.norm(self.net(x.bfloat16()).float())

    module, before = Coarse(), Coarse().state_dict()
    fit(module, lora(train_also=["norm"]), EMAWeightAveraging(decay=0.9), max_epochs=5)
    state = module.state_dict()
    for key in (key for key in before if key.startswith(("net", "positions"))):
        assert torch.equal(state[key], before[key]), key
    assert module.norm.num_batches_tracked == 20


@pytest.mark.parametrize("use_buffers", [False, True])
def test_masked_ranks_stay_zero_in_the_average(use_buffers):
    module = Module()
    method = AdaLoRA(init_r=4, target_r=1, tfinal=0.5, target_modules=ADAPTED)
    fit(module, method, EMAWeightAveraging(decay=0.7, use_buffers=use_buffers), max_epochs=3)
    deltas = list(method.additions(module).values())
    assert sum(int(delta.kept.sum()) for delta in deltas) == 2
    assert all(torch.equal(delta.lora_E[:, 0] != 0, delta.kept) for delta in deltas)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("sparsity", ["structured", "magnitude", "l1"])
def test_averages_keep_what_is_masked_at_zero(sparsity, use_buffers):
    module, method = Module(), SparseLoRA(sparsity, target_modules=ADAPTED, r=2, begin=0.5, every=1)
    fit(module, method, EMAWeightAveraging(decay=0.7, use_buffers=use_buffers), max_epochs=3)
    pairs = [
        pair for delta in method.additions(module).values() for pair in zip(delta.sparse(), delta.masks(), strict=True)
    ]
    assert all(torch.equal(p != 0, mask) for p, mask in pairs)
    assert sum(mask.sum() for _, mask in pairs) == sum(mask.numel() for _, mask in pairs) / 2


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_plain_average(use_buffers):
    module = fit(Module(), lora(), WeightAveraging(use_buffers=use_buffers)).lightning_module
    assert all(value.any() for value in adapters(module).values())
    assert_base_is_untouched(module)


def test_a_second_fit_starts_from_the_average(tmp_path):
    module, method = Module(), lora()
    fit(module, method, ema())
    first = adapters(module)
    fit(module, method, ema())
    assert all(not torch.equal(adapters(module)[key], value) for key, value in first.items())
    fit(module, ema())  # a trainer without the method
    assert_base_is_untouched(module)
