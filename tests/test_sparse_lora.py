"""SparseLoRA against numpy: proximal steps, cubic schedule and masks; its folders against HF PEFT."""

import itertools
import json
import math
import warnings

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import logits, tiny
from safetensors import safe_open
from test_cli import fit as fit_by_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ADAPTED, Module, fit, loader, saved, trainer

from lit_peft import LoRA, SparseLoRA, load, save
from lit_peft.core.addition import Call
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.files import pack_mask, unpack_mask
from lit_peft.core.merge import merge
from lit_peft.core.registry import registry
from lit_peft.core.targets import make_site
from lit_peft.methods.sparse_lora import GATE
from lit_peft.testing.conformance import assert_same, snapshot

WAYS = ["structured", "magnitude", "l1"]


def sparse(sparsity: str = "magnitude", **arguments) -> SparseLoRA:
    return SparseLoRA(sparsity, **{"r": 4, "dropout": 0.0, "target_modules": ADAPTED} | arguments)


def deltas(module: nn.Module) -> list:
    return [module.get_submodule(path).peft["default"] for path in registry(module).adapters["default"].sites]


def sites(module: nn.Module) -> list:
    return [make_site(path, module.get_submodule(path)) for path in registry(module).adapters["default"].sites]


def random_(module: nn.Module, seed: int = 0) -> None:
    """Gives every trainable tensor of the adapter values of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ".peft." in name:
                noise = 0.5 * torch.randn(p.shape, generator=generator)
                p.copy_(GATE * (1.5 + noise) if name.endswith("gate") else noise)


class Decayed(Module):
    """AdamW whose momentum and weight decay would move whatever they can."""

    RATE = 0.05

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.RATE, weight_decay=0.3)


class Watch(pl.Callback):
    """Notes what holds before and after each step."""

    def __init__(self, method: SparseLoRA) -> None:
        self.method, self.before, self.logged, self.factors, self.masks = method, [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(sum(p.abs().sum().item() for d in deltas(pl_module) for p in d.sparse()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        self.factors.append([p.detach().clone() for d in deltas(pl_module) for p in (d.lora_A, d.lora_B)])
        self.masks.append([m.clone() for d in deltas(pl_module) for m in d.masks()])


# ------------------------------------------------------------------------------------------ proximal steps


class Regression(pl.LightningModule):
    """One linear layer under plain gradient descent, whose rate changes at every step."""

    RATES = (0.3, 0.2, 0.4, 0.1, 0.25, 0.15)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)

    def training_step(self, batch, _):
        x, t = batch
        return (self.layer(x) - t).square().sum() / len(x)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.RATES[step % len(self.RATES)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def regression_data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randn(12, 5, generator=generator)


def soft_threshold(p: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(p) * np.maximum(np.abs(p) - threshold, 0.0)


def ista(module: Regression, strength: float, steps: int, gated: bool) -> dict[str, np.ndarray]:
    """Proximal gradient descent in double precision, its gradients worked out by hand."""
    delta = module.layer.peft["default"]
    A, B, W, b = (
        t.detach().double().numpy() for t in (delta.lora_A, delta.lora_B, module.layer.weight, module.layer.bias)
    )
    g = delta.gate.detach().double().numpy() if gated else np.full(len(A), GATE)
    s, (xs, ts) = delta.scaling, (t.double().numpy() for t in regression_data())
    for step in range(steps):
        rows = slice(4 * (step % 3), 4 * (step % 3) + 4)
        x, t, rate = xs[rows], ts[rows], module.RATES[step % len(module.RATES)]
        d = g / GATE
        dy = 2 * (x @ (W + s * B @ (d[:, None] * A)).T + b - t) / len(x)
        dM = s * dy.T @ x
        dA, dB, dg = d[:, None] * (B.T @ dM), dM @ A.T * d, (B * (dM @ A.T)).sum(0) / GATE
        A, B = A - rate * dA, B - rate * dB
        if gated:
            g = soft_threshold(g - rate * dg, rate * strength)
        else:
            A, B = soft_threshold(A, rate * strength), soft_threshold(B, rate * strength)
    return {"lora_A": A, "lora_B": B} | ({"gate": g} if gated else {})


@pytest.mark.parametrize(("sparsity", "strength", "rate"), [("l1", 0.5, 0.1), ("structured", 100.0, 2e-4)])
def test_a_fit_is_proximal_gradient_descent(sparsity, strength, rate, monkeypatch):
    monkeypatch.setattr(Regression, "RATES", tuple(rate * r for r in Regression.RATES))
    method = sparse(sparsity, strength=strength, target_modules="layer")
    watch, module = Watch(method), Regression()
    method.attach(module)
    random_(module)
    expected = ista(module, strength, 30, sparsity == "structured")
    data = DataLoader(TensorDataset(*regression_data()), batch_size=4)
    trainer(method, watch, max_epochs=10).fit(module, data)
    found = {name: p.detach().numpy() for name, p in module.layer.peft["default"].named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isfinite(value).all()
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[name] == 0, value == 0)
    counted = [expected["gate"]] if sparsity == "structured" else list(expected.values())
    share = np.mean(np.concatenate([(v == 0).ravel() for v in counted]))
    assert 0.1 < share < 0.9
    assert watch.logged[-1]["train/sparsity"] == pytest.approx(share)
    # what is logged is l |p| at the values that the step's loss was taken at
    assert [entry["train/l1"] for entry in watch.logged] == pytest.approx([strength * v for v in watch.before])


@pytest.mark.parametrize("sparsity", ["structured", "l1"])
def test_the_penalty_is_a_number_of_the_loss_without_a_gradient(sparsity):
    method, losses = sparse(sparsity, strength=0.2), []

    class Losses(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses.append((loss.item(), pl_module.task, pl_module.trainer.callback_metrics["train/l1"].item()))

    class Told(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.task = loss.item()
            return loss

    module = Told()
    fit(module, method, Losses())
    for total, task, penalty in losses:
        assert penalty > 0.01
        assert total == pytest.approx(task + penalty, rel=1e-5)
    assert not method.penalty(module).requires_grad
    assert sparse("magnitude").penalty(module) is None


def test_adam_shrinks_by_rate_times_strength_beside_its_step():
    module, twin = Regression(), Regression()
    method = sparse("l1", strength=0.3, target_modules="layer")
    for each, its in ((module, method), (twin, LoRA(r=4, dropout=0.0, target_modules="layer"))):
        its.attach(each)
        random_(each)
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.02)
        each.training_step(regression_data(), 0).backward()
        optimizer.step()
        if each is module:
            method.sparsify(each, [optimizer], step=1, steps=10)
    for ours, plain in zip(deltas(module)[0].parameters(), deltas(twin)[0].parameters(), strict=True):
        expected = soft_threshold(plain.detach().numpy(), 0.02 * 0.3)
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_a_rate_at_which_one_step_would_end_all_gates_is_refused():
    with pytest.raises(
        ValueError, match=r"^A step at rate 0\.05 with strength 0\.7 shrinks gates by 0\.035, and they st"
    ):
        fit(Module(), sparse("structured", strength=0.7))


def test_shrinking_in_bfloat16_is_refused():
    with pytest.raises(ValueError, match=r"^Shrinking gets lost in bfloat16's rounding: train with adapter_dtype fl"):
        fit(Module(), sparse("l1", strength=0.1, adapter_dtype="bfloat16"))
    with pytest.raises(ValueError, match="bfloat16's rounding"):
        fit(Module(), sparse("structured", strength=0.1), precision="bf16-true")
    for sparsity in WAYS:
        method = sparse(sparsity, adapter_dtype="bfloat16", every=1)
        fit(module := Module(), method)
        assert method.achieved(module).item() == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------------------------- masks


def cubic(step: int, steps: int, target: float, begin: float, end: float) -> float:
    first, last = math.floor(begin * steps), math.ceil(end * steps)
    return 0.0 if step <= first else target * (1 - (1 - min(1, (step - first) / (last - first))) ** 3)


@pytest.mark.parametrize("arguments", [{}, {"target": 0.8, "begin": 0.2, "end": 1.0}, {"target": 0.3, "every": 3}])
def test_masks_follow_the_cubic_schedule_and_take_the_smallest(arguments):
    method = sparse(**{"every": 1} | arguments)
    watch, steps = Watch(method), 20
    fit(Decayed(), method, watch, max_epochs=5)
    assert len(watch.masks) == steps
    settings = (method.target or 0.5, method.begin, method.end)
    kept = [np.ones(m.shape, bool) for m in watch.masks[0]]
    for step in range(1, steps + 1):
        first, last = math.floor(method.begin * steps), math.ceil(method.end * steps)
        if step > first and ((step - first) % method.every == 0 or step >= last):
            for mask, factor in zip(kept, watch.factors[step - 1], strict=True):
                count = round(cubic(step, steps, *settings) * mask.size)
                assert (~watch.masks[step - 1][next(i for i, k in enumerate(kept) if k is mask)]).sum() == count
                masked = ~np.asarray(watch.masks[step - 1][next(i for i, k in enumerate(kept) if k is mask)])
                assert masked[~mask].all()  # what was masked stays so
                mask &= ~masked
                assert not factor[torch.tensor(masked)].any()
        for mask, found in zip(kept, watch.masks[step - 1], strict=True):
            np.testing.assert_array_equal(found, mask)
    shares = [entry["train/sparsity"] for entry in watch.logged]
    assert shares == sorted(shares) and abs(shares[-1] - settings[0]) <= 0.02
    assert shares[0] == 0 if method.begin * steps >= 1 else shares[0] > 0


def test_the_smallest_of_each_factor_are_masked():
    module = Module()
    method = sparse(begin=0.0, end=0.1)
    method.attach(module)
    random_(module)
    before = [p.detach().clone().abs() for d in deltas(module) for p in (d.lora_A, d.lora_B)]
    method.sparsify(module, [], step=10, steps=10)
    for old, mask in zip(before, (m for d in deltas(module) for m in d.masks()), strict=True):
        assert mask.float().mean() == 0.5
        assert old[~mask].max() < old[mask].min()


def test_masked_entries_stay_zero_and_out_of_the_clipped_norm():
    method = sparse(begin=0.0, end=0.3, every=1)
    norms = []

    class Norms(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for d in deltas(pl_module):
                for p, mask in zip((d.lora_A, d.lora_B), d.masks(), strict=True):
                    norms.append((p.grad[~mask].abs().sum().item(), p.grad[mask].abs().sum().item()))

    watch = Watch(method)
    fit(Decayed(), method, watch, Norms(), max_epochs=5)
    assert all(masked == 0 for masked, _ in norms) and sum(kept for _, kept in norms) > 0
    seen = 0
    for factors, masks in zip(watch.factors, watch.masks, strict=True):
        for p, mask in zip(factors, masks, strict=True):
            assert not p[~mask].any()
            seen += int((~mask).sum())
    assert seen > 500


def test_l1_shrinks_by_the_quantile_that_meets_the_share():
    module, method = Module(), sparse("l1", begin=0.0, end=1.0, every=5)
    method.attach(module)
    random_(module)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
    before = [p.detach().clone().numpy() for d in deltas(module) for p in d.sparse()]
    method.sparsify(module, [optimizer], step=4, steps=10)
    for p, old in zip((p for d in deltas(module) for p in d.sparse()), before, strict=True):
        np.testing.assert_array_equal(p.detach(), old)
    method.sparsify(module, [optimizer], step=5, steps=10)
    share, penalty = 0.5 * (1 - 0.5**3), 0.0
    for p, old in zip((p for d in deltas(module) for p in d.sparse()), before, strict=True):
        threshold = np.sort(np.abs(old), axis=None)[round(share * old.size) - 1]
        np.testing.assert_allclose(p.detach(), soft_threshold(old, threshold), rtol=1e-6)
        assert (p == 0).sum() == round(share * old.size)
        penalty += threshold / (5 * 0.01) * p.abs().sum().item()
    assert method.penalty(module).item() == pytest.approx(penalty, rel=1e-5)
    method.sparsify(module, [optimizer], step=10, steps=10)
    method.sparsify(module, [optimizer], step=15, steps=10)
    assert method.penalty(module) == 0  # nothing shrinks once the target is reached
    assert sparse("structured").penalty(module) is None


def test_the_gates_of_the_smallest_ranks_of_all_layers_close():
    module, method = Module(), sparse("structured", begin=0.0, end=0.1, rank_pattern={"first": 3})
    method.attach(module)
    random_(module)
    with torch.no_grad():
        deltas(module)[0].lora_B.mul_(0.1)
    sizes = []
    for d in deltas(module):
        for i in range(len(d.gate)):
            added = d.scaling * d.gate[i] / GATE * torch.outer(d.lora_B[:, i], d.lora_A[i])
            sizes.append(torch.linalg.matrix_norm(added).item())
    method.sparsify(module, [], step=10, steps=10)
    closed = torch.cat([d.gate == 0 for d in deltas(module)])
    assert closed.tolist() == (np.argsort(np.argsort(sizes)) < 4).tolist()  # round(.5 * 7)
    assert method.achieved(module).item() == pytest.approx(4 / 7)
    assert [len(d.compacted(site, False).lora_A) for d, site in zip(deltas(module), sites(module), strict=True)] == [
        max(1, int(d.mask_gate.sum())) for d in deltas(module)
    ]


class Descent(Module):
    """Plain gradient descent under a schedule that ends at a rate of zero."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("sparsity", WAYS)
@pytest.mark.parametrize("module", [Module, Decayed, Descent])
@pytest.mark.parametrize(
    "arguments",
    [{"max_epochs": 3}, {"max_steps": 7, "max_epochs": -1}, {"max_epochs": 6, "accumulate_grad_batches": 3}],
)
def test_the_target_is_reached_whatever_the_run(sparsity, module, arguments):
    run = fit(module := module(), sparse(sparsity, r=4), **arguments)
    assert run.callback_metrics["train/sparsity"].item() == pytest.approx(0.5, abs=0.02)
    zeros = torch.cat([p.flatten() == 0 for d in deltas(module) for p in d.sparse()])
    assert zeros.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert ("train/l1" in run.callback_metrics) == (sparsity == "l1")


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sparsity", WAYS)
def test_layers_may_lose_all_ranks_in_the_first_steps(sparsity, steps):
    module, method = Module(), sparse(sparsity, r=1, target=0.9, begin=0.0, every=1)
    fit(module, method, max_steps=steps, max_epochs=-1)
    assert method.achieved(module) >= 0.88


def test_an_endless_run_is_refused():
    with pytest.raises(ValueError, match=r"^The masks' schedule needs the run's end: set trainer\.max_epochs or max_s"):
        fit(Module(), sparse(), max_epochs=-1, limit_train_batches=1)


def test_a_longer_run_goes_on_from_a_checkpoint(tmp_path):
    first = Module()
    path = saved(tmp_path, first, sparse(every=1), max_epochs=2)
    module = Module()
    watch = Watch(method := sparse(every=1))
    fit(module, method, watch, max_epochs=6, ckpt_path=path)
    shares = [entry["train/sparsity"] for entry in watch.logged]
    assert len(shares) == 16
    assert shares[0] == pytest.approx(0.5, abs=0.02)  # reached before; what is masked stays so
    assert max(shares) == pytest.approx(0.5, abs=0.02)
    for old, new in zip((m for d in deltas(first) for m in d.masks()), watch.masks[-1], strict=True):
        assert torch.equal(old, new)


# ------------------------------------------------------------------------------------------------ resuming


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Killed


@pytest.mark.parametrize(("sparsity", "strength"), [*((way, None) for way in WAYS), ("structured", 0.4), ("l1", 0.4)])
def test_a_killed_fit_resumes_exactly(sparsity, strength, tmp_path):
    method = lambda: sparse(sparsity, every=2, strength=strength)  # noqa: E731
    whole = Decayed()
    fit(whole, method(), max_epochs=5)
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1)
    with pytest.raises(Killed):
        fit(Decayed(), method(), keep, KillAt(8), max_epochs=5)
    resumed = Decayed()
    fit(resumed, method(), max_epochs=5, ckpt_path=tmp_path / "last.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))
    share = method().achieved(whole).item()
    assert 0.05 < share < 0.95
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].keys()
    assert ("net.first.peft.default.mask_A" in keys) == (strength is None and sparsity != "structured")
    assert ("net.first.peft.default.mask_gate" in keys) == (strength is None and sparsity == "structured")


def test_a_checkpoint_of_another_way_is_refused(tmp_path):
    path = saved(tmp_path, Module(), sparse("magnitude"))
    with pytest.raises(CheckpointMismatch, match=r"SparseLoRA\(sparsity='magnitude'\), not 'l1'"):
        fit(Module(), sparse("l1"), max_epochs=2, ckpt_path=path)
    fit(Module(), sparse("magnitude", target=0.7, end=0.9), max_epochs=2, ckpt_path=path)


# ------------------------------------------------------------------------------------------------- folders

MODELS = {
    "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "embed_tokens"],
}
FORMS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "alpha": 5},
    "patterns": {"alpha": 3, "rank_pattern": {"*.0.*": 3}, "alpha_pattern": {"*.1.*": 7}},
}


def pruned(name: str, sparsity: str, **arguments) -> nn.Module:
    """A tiny model with a SparseLoRA of which ranks are gone, another number in each layer; in the first, all."""
    model = tiny(name)
    sparse(sparsity, target_modules=MODELS[name], **arguments).attach(model)
    random_(model)
    with torch.no_grad():
        for i, delta in enumerate(deltas(model)):
            delta.lora_B.mul_(4)  # random models hardly hear a change of their queries
            for rank in range(len(delta.lora_A)) if i == 0 else range(i % 3):
                if sparsity == "structured":
                    delta.gate[rank] = 0
                elif rank % 2:
                    delta.lora_A[rank] = 0
                else:
                    delta.lora_B[:, rank] = 0
            if sparsity != "structured":
                delta.lora_A[:, 1::3], delta.lora_B[1::3] = 0, 0
            for p, mask in zip(delta.sparse(), delta.masks(), strict=False):
                mask.copy_(p != 0)
            if sparsity != "structured":
                delta.lora_A[-1, 0] = 0  # zero, and not masked
    return model


def opened_by_peft(name: str, folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(tiny(name), str(folder)).eval()


@pytest.mark.parametrize("sparsity", WAYS)
@pytest.mark.parametrize(("name", "form"), [*((name, "plain") for name in MODELS), *(("bert", form) for form in FORMS)])
def test_a_folder_is_a_smaller_lora_to_hf_peft(name, form, sparsity, tmp_path):
    model = pruned(name, sparsity, **FORMS[form])
    before = snapshot(model)
    folder = save(model, tmp_path)
    assert_same(snapshot(model), before)  # shapes of the live module stay
    theirs = opened_by_peft(name, folder)
    found, expected = logits(theirs, name), logits(model, name)
    assert (expected - logits(tiny(name), name)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ranks = [len(d.lora_A) - (len(d.lora_A) - 1 if i == 0 else i % 3) for i, d in enumerate(deltas(model))]
    theirs_ranks = [len(p) for n, p in theirs.named_parameters() if "_A" in n]
    assert sorted(theirs_ranks) == sorted(ranks)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["rank_pattern"]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "gate" in key or "mask" in key]  # noqa: SIM118


@pytest.mark.parametrize("sparsity", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_becomes_a_sparse_lora_again(form, sparsity, tmp_path):
    model = pruned("bert", sparsity, **FORMS[form])
    folder = save(model, tmp_path / "one")
    again = tiny("bert")
    adapter = load(again, folder)
    torch.testing.assert_close(logits(again, "bert"), logits(model, "bert"), rtol=1e-5, atol=1e-6)
    assert [len(d.lora_A) for d in deltas(again)] == [1, 3 if form != "patterns" else 2, *[2, 4]][: len(deltas(again))]
    method = SparseLoRA(**adapter.spec["init_args"])
    assert (method.sparsity, method.r) == (sparsity, 4)
    other = tiny("bert")
    method.attach(other)  # what the record says builds the same shapes and scalings
    for ours, theirs in zip(deltas(again), deltas(other), strict=True):
        assert ours.lora_A.shape == theirs.lora_A.shape and ours.scaling == theirs.scaling
    for new, old in zip(deltas(again), deltas(model), strict=True):
        A, B = old.factors()
        keep = A.any(1) & B.any(0)
        if sparsity == "structured":
            assert new.mask_gate.all()
            continue
        for mask, whole in zip(new.masks(), old.masks(), strict=True):
            cut = whole[keep] if mask is new.mask_A else whole[:, keep]
            assert not cut.numel() or torch.equal(mask, cut)
        if keep.any():
            assert not new.mask_A[0, 1] and not new.mask_B[1, 0]
            assert new.mask_A[-1, 0] and new.lora_A[-1, 0] == 0
    twice = tiny("bert")
    load(twice, save(again, tmp_path / "two"))  # nothing more is dropped
    assert torch.equal(logits(twice, "bert"), logits(again, "bert"))
    assert registry(twice).adapters["default"].spec == adapter.spec


def test_a_path_named_before_has_the_ranks_that_are_left(tmp_path):
    model = tiny("bert")
    path = "bert.encoder.layer.0.attention.self.query"
    sparse("structured", target_modules=MODELS["bert"], rank_pattern={path: 3}, alpha_pattern={path: 5}).attach(model)
    random_(model)
    with torch.no_grad():
        model.get_submodule(path).peft["default"].gate[0] = 0
    arguments = load(again := tiny("bert"), save(model, tmp_path)).spec["init_args"]
    assert arguments["rank_pattern"][path] == 2 and arguments["alpha_pattern"][path] == pytest.approx(10 / 3)
    SparseLoRA(**arguments).attach(other := tiny("bert"))
    for ours, theirs in zip(deltas(again), deltas(other), strict=True):
        assert ours.lora_A.shape == theirs.lora_A.shape and ours.scaling == theirs.scaling


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sparsity", WAYS)
def test_what_was_loaded_trains_on(sparsity, strength, tmp_path, monkeypatch):
    monkeypatch.setattr(Decayed, "RATE", 0.01)
    module = Decayed()
    strength = None if sparsity == "magnitude" else strength
    fit(module, sparse(sparsity, strength=strength, end=0.5, every=1), max_epochs=5)
    folder = save(module, tmp_path / "folder")
    again = Decayed()
    spec = load(again, folder).spec
    again.eval(), module.eval()
    x = next(iter(loader()))[0]
    torch.testing.assert_close(again(x), module(x), rtol=1e-5, atol=1e-6)
    method = SparseLoRA(**spec["init_args"])
    masks = [m.clone() for d in deltas(again) for m in d.masks()]
    before = snapshot(again)
    again.train()
    path = saved(tmp_path, again, method, max_epochs=3)
    assert any(not torch.equal(value, before[key]) for key, value in snapshot(again).items())
    for old, new in zip(masks, (m for d in deltas(again) for m in d.masks()), strict=True):
        assert not new[~old].any()
        assert strength is not None or sparsity != "structured" or torch.equal(old, new)  # the target was reached
    last = Decayed()
    load(last, path)
    assert_same(snapshot(last), snapshot(again))


@pytest.mark.parametrize("strength", [None, 0.35])
@pytest.mark.parametrize("sparsity", ["structured", "l1"])
def test_a_fit_goes_on_where_a_layer_has_lost_all_its_ranks(sparsity, strength, tmp_path):
    keep = ModelCheckpoint(tmp_path, "last")

    class Prune(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            for i, p in enumerate(deltas(pl_module)[0].sparse() if trainer.global_step == 4 else ()):
                nn.init.zeros_(p)
                for mask in deltas(pl_module)[0].masks()[i : i + 1]:
                    mask.fill_(False)
                trainer.optimizers[0].state[p]["exp_avg_sq"].fill_(1e12)  # nothing moves them off zero any more

    module, again, loaded = Module(), Module(), Module()
    method = lambda: sparse(sparsity, strength=strength, target=None if strength else 0.2)  # noqa: E731
    fit(module, method(), Prune(), keep)
    fit(again, method(), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    spec = load(loaded, save(module, tmp_path / "folder")).spec
    first, second = deltas(loaded)
    assert len(first.lora_A) == 1 < len(second.lora_A) and not first.lora_B.any()
    x = next(iter(loader()))[0]
    torch.testing.assert_close(loaded(x), module(x), rtol=1e-5, atol=1e-6)
    fit(loaded, SparseLoRA(**spec["init_args"]))
    assert deltas(loaded)[0].lora_B.any()  # the rank that is kept can be trained


@pytest.mark.parametrize("sparsity", WAYS)
def test_an_untrained_adapter_keeps_its_ranks(sparsity, tmp_path):
    model = tiny("bert")
    sparse(sparsity, target_modules=MODELS["bert"]).attach(model)
    again = tiny("bert")
    load(again, save(model, tmp_path))
    for new, old in zip(deltas(again), deltas(model), strict=True):
        assert torch.equal(new.lora_A, old.lora_A) and not new.lora_B.any()
        assert all(mask.all() for mask in new.masks())
    opened_by_peft("bert", tmp_path)


def test_a_damaged_mask_is_named(tmp_path):
    mask = torch.rand(5, 7) > 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)
    with pytest.raises(CheckpointMismatch, match=r"^A mask of 5 bytes is none of \[6, 7\]"):
        unpack_mask(pack_mask(mask), torch.Size([6, 7]))


@pytest.mark.parametrize("sparsity", WAYS)
def test_merging_gives_the_equation_without_the_zeros(sparsity):
    model = pruned("bert", sparsity)
    path = next(itertools.islice(registry(model).adapters["default"].sites, 1, None))
    layer = model.get_submodule(path)
    delta, W = layer.peft["default"], layer.weight.detach().clone()
    gate = delta.gate / GATE if sparsity == "structured" else torch.ones(4)
    expected = W + delta.scaling * sum(gate[i] * torch.outer(delta.lora_B[:, i], delta.lora_A[i]) for i in range(1, 4))
    torch.testing.assert_close(Call(layer, layer.peft.chain()).matrix(), expected, rtol=1e-5, atol=1e-6)
    merge(model)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ elsewhere


def test_a_loop_without_a_trainer():
    module = Module()
    method = sparse(every=1)
    method.attach(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for step, batch in enumerate(itertools.islice(itertools.cycle(loader()), 10), 1):
        module.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.sparsify(module, [optimizer], step, steps=10)
    assert method.achieved(module).item() == pytest.approx(0.5, abs=0.02)


def test_two_adapters_log_under_names_of_their_own():
    one, two = sparse("l1"), sparse("magnitude", name="second")
    run = fit(Module(), one, two, max_epochs=2)
    assert {"train/l1", "train/sparsity", "train/sparsity/second"} <= run.callback_metrics.keys()
    assert "train/l1/second" not in run.callback_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "random"}, "^sparsity must be structured, magnitude or l1, not 'random'"),
        ({"strength": 0.0}, "^strength must be a number above 0, not 0.0"),
        ({"strength": math.nan}, "^strength must be a number above 0, not nan"),
        (
            {"strength": 0.1, "target": 0.5},
            "^strength = 0.1 is a fixed penalty, and target = 0.5 asks for a share: leav",
        ),
        ({"strength": 0.1, "sparsity": "magnitude"}, "^strength = 0.1 is a fixed penalty, and sparsity = magnitude as"),
        ({"target": 1.0}, "^target must be at least 0 and below 1, not 1.0"),
        ({"begin": -0.1}, "^begin must be at least 0 and below 1, not -0.1"),
        ({"end": 0.05}, "^end must be at least 0.1 and at most 1, not 0.05"),
        ({"every": 0}, "^every must be at least 1, not 0"),
        ({"r": 0}, "^r must be at least 1, not 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseLoRA(**arguments)


def test_the_table_says_what_is_pruned():
    module = Module()
    method = sparse(target=0.4)
    method.attach(module)
    assert deltas(module)[0].describe() == {"r": 4, "alpha": 8, "alpha/r": 2.0, "sparsity": "magnitude"}
    assert method.notes(module) == ["Sparsity: 40% of A and B are masked, between 10% and 70% of the steps."]
    assert sparse("structured").notes(module)[0].startswith("Sparsity: 50% of the ranks are masked, between 10% and")
    assert "shrinks by 0.2 x its rate" in sparse("l1", strength=0.2).notes(module)[0]


@pytest.mark.slow
def test_the_demo_reaches_its_sparsity(tmp_path):
    folder = fit_by_cli(
        *(tmp_path, "--config", "quickstart", "--method", "SparseLoRA", "--method.sparsity", "magnitude"),
        *("--data.limit_train", "320", "--data.limit_val", "32", "--data.limit_test", "32", "--data.batch_size", "8"),
        *("--trainer.log_every_n_steps", "1", "--method.r", "8"),
    )
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    factors = [value for key, value in state.items() if ".lora_" in key]
    share = 1 - sum(v.count_nonzero().item() for v in factors) / sum(v.numel() for v in factors)
    assert share == pytest.approx(0.5, abs=0.02)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("train/sparsity")
    assert len(events) == 80 and events[-1].value == pytest.approx(share, abs=1e-6)
