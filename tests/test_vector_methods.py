"""(IA)^3, VeRA and AdaLoRA against HF PEFT: outputs, one training step, AdaLoRA's masks step by step."""

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from models import logits, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import ADAPTED, Module, Net, adapters, fit, loader, trainer

import lit_peft
from lit_peft import IA3, AdaLoRA, VeRA
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.faults import TrainingFault
from lit_peft.testing.conformance import assert_same, perturb
from lit_peft.testing.subjects import holder, layer_input

SETS = {
    "distilbert": (["k_lin", "v_lin", "lin2"], ["lin2"]),
    "bert": (["key", "value", "intermediate.dense"], ["intermediate.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
}


KINDS = ["IA3", "VeRA", "AdaLoRA"]
CLOSE = 2e-6
"""Largest `distance`."""


def methods(kind: str, targets: list[str], feedforward: list[str]):
    """Ours, and HF PEFT's configuration of the same."""
    if kind == "IA3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
        return IA3(feedforward_modules=feedforward, target_modules=targets), config
    if kind == "VeRA":
        config = peft.VeraConfig(r=8, target_modules=targets, projection_prng_key=5)
        return VeRA(r=8, seed=5, target_modules=targets), config
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, total_step=10, target_modules=targets)
    return AdaLoRA(init_r=4, target_r=2, alpha=4, total_steps=10, target_modules=targets), config


def loud(name: str) -> nn.Module:
    """A tiny model with weights so large that its logits hear every layer; as built they hear the head alone."""
    model = tiny(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def move_far(model: nn.Module) -> None:
    for _ in range(3):
        perturb(model)


def pair(kind: str, name: str):
    """Our model and HF PEFT's with equal values, far from their start; the tensors in pairs."""
    ours, theirs = loud(name), loud(name)
    method, config = methods(kind, *SETS[name])
    method.attach(ours)
    move_far(ours)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    state, tensors = dict(theirs.named_parameters()), []
    for path in registry(ours).adapters["default"].sites:
        for key, value in ours.get_submodule(path).peft["default"].named_parameters():
            tensors.append((value, state[f"base_model.model.{path}.{key}.default"]))
    with torch.no_grad():
        for mine, other in tensors:
            other.copy_(mine.view_as(other))
    return ours, theirs, tensors


def distance(name: str, ours: nn.Module, theirs: nn.Module) -> float:
    """Norm of the difference of their logits, by that of what our adapter does to the base's."""
    mine, base = logits(ours, name).detach(), logits(loud(name), name).detach()
    effect = (mine - base).norm()
    assert effect > 0.1 * base.norm(), "the base's output hides the adapter"
    return ((mine - logits(theirs, name)).norm() / effect).item()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_one_step_equal_hf_peft(kind, name):
    ours, theirs, tensors = pair(kind, name)
    assert distance(name, ours, theirs) < CLOSE
    for model in (ours, theirs):
        logits(model, name).square().mean().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    for mine, other in tensors:
        largest = other.grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(mine.grad.view_as(other), other.grad, rtol=1e-3, atol=1e-4 * largest)
        clear = other.grad.abs() > 2e-2 * largest  # where it is almost zero, Adam's step may have either sign
        torch.testing.assert_close(mine.view_as(other)[clear], other[clear], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_hears_one_tensor_of_one_layer(kind, name):
    ours, theirs, tensors = pair(kind, name)
    for mine, _ in tensors[-3:]:
        kept = mine.detach().clone()
        with torch.no_grad():
            mine.mul_(1.01)
            assert distance(name, ours, theirs) > 5 * CLOSE
            mine.copy_(kept)


def test_veras_projections_are_hf_pefts_and_saved_once(tmp_path):
    ours, theirs, _ = pair("VeRA", "bert")
    (shared,) = {id(m): m for m in ours.modules() if hasattr(m, "vera_A")}.values()
    assert torch.equal(shared.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared.vera_B, theirs.base_model.vera_B["default"])
    assert sum(key.endswith("vera_A") for key in ours.state_dict()) == 1
    lit_peft.save(ours, tmp_path)
    other = loud("bert")
    lit_peft.load(other, tmp_path)
    (loaded,) = {id(m): m for m in other.modules() if hasattr(m, "vera_A")}.values()
    loaded.vera_A.zero_()  # all layers use the one that was loaded
    assert all(not d.factors(torch.zeros(1))[0].any() for d in other.modules() if hasattr(d, "vera_lambda_d"))


def test_veras_projections_are_drawn_on_the_host_whatever_the_context():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
        VeRA(r=2, target_modules="0").attach(model)  # a generator of the host draws nothing elsewhere


# ------------------------------------------------------------------------------------------------ folders


def opened_by_peft(name: str, folder) -> nn.Module:
    """What HF PEFT makes of a folder on the same base; any warning of its is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(loud(name), str(folder)).eval()


def peft_type(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def check_both_ways(name: str, ours: nn.Module, theirs: nn.Module, folder: Path) -> None:
    """A folder of ours and one of HF PEFT's, each opened on both sides."""
    expected = logits(theirs, name)
    lit_peft.save(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    assert peft_type(folder / "ours") == peft_type(folder / "theirs")
    mine, read = loud(name), loud(name)
    lit_peft.load(mine, folder / "ours")
    assert distance(name, mine, ours) < 1e-6
    lit_peft.load(read, folder / "theirs")
    lit_peft.save(read, folder / "again")
    assert distance(name, read, theirs) < CLOSE
    for each in ("ours", "again"):
        torch.testing.assert_close(logits(opened_by_peft(name, folder / each), name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_folders_go_both_ways(kind, name, tmp_path):
    ours, theirs, _ = pair(kind, name)
    check_both_ways(name, ours, theirs, tmp_path)


def test_pruned_ranks_are_left_out_of_folders_both_ways(tmp_path):
    """One layer keeps two of its ranks, one none, which HF PEFT's folder leaves out and ours keeps one of."""
    ours, theirs, _ = pair("AdaLoRA", "bert")
    sites, pattern = registry(ours).adapters["default"].sites, {}
    masks = [[False, True, True, False], [False] * 4, *[[True] * 4] * (len(sites) - 2)]
    for path, kept in zip(sites, masks, strict=True):
        delta = ours.get_submodule(path).peft["default"]
        delta.kept.copy_(torch.tensor(kept))
        delta.mask()
        theirs.get_parameter(f"base_model.model.{path}.lora_E.default").data.copy_(delta.lora_E)
        pattern[f"{path}.lora_E.default"] = kept
    theirs.peft_config["default"].rank_pattern = pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.utils.warning.PeftWarning)  # of the layer without ranks
        check_both_ways("bert", ours, theirs, tmp_path)
    for folder, left in (("ours", [2, 1, 4, 4, 4, 4]), ("theirs", [2, 4, 4, 4, 4])):
        model = loud("bert")
        method = AdaLoRA(**lit_peft.load(model, tmp_path / folder).spec["init_args"])
        assert [len(delta.kept) for delta in method.additions(model).values()] == left


@pytest.mark.parametrize("feedforward", ["re:.*", "re:none"])
def test_ia3_at_one_side_only_goes_both_ways(feedforward, tmp_path):
    ours = loud("bert")
    IA3(feedforward_modules=feedforward, target_modules=["attention.self.value", "output.dense"]).attach(ours)
    move_far(ours)
    lit_peft.save(ours, tmp_path)
    assert distance("bert", ours, opened_by_peft("bert", tmp_path)) < CLOSE


def test_ia3_tells_layers_of_one_name_apart(tmp_path):
    """BERT's `dense` is an input here, an output there."""
    ours, targets = loud("bert"), ["attention.output.dense", "intermediate.dense"]
    IA3(feedforward_modules=targets[1], target_modules=targets).attach(ours)
    move_far(ours)
    lit_peft.save(ours, tmp_path)
    assert distance("bert", ours, opened_by_peft("bert", tmp_path)) < CLOSE
    again = loud("bert")
    lit_peft.load(again, tmp_path)
    assert torch.equal(logits(again, "bert"), logits(ours, "bert"))


def test_a_folder_that_should_hold_veras_projections_and_does_not_is_refused(tmp_path):
    peft.get_peft_model(loud("bert"), peft.VeraConfig(r=8, target_modules=["query"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "vera_A" not in k}, file, {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="The folder lacks vera_A"):
        lit_peft.load(loud("bert"), tmp_path)


@pytest.mark.parametrize("method", [IA3, partial(VeRA, r=4), partial(AdaLoRA, init_r=4, target_r=2)])
def test_layers_that_hf_peft_lacks_are_written_in_our_own_form(method, tmp_path):
    ours, again = holder("embedding"), holder("embedding")
    method(target_modules="layer").attach(ours)
    perturb(ours)
    lit_peft.save(ours, tmp_path)
    assert peft_type(tmp_path) == "LIT_PEFT"
    lit_peft.load(again, tmp_path)
    assert torch.equal(again(layer_input("embedding")), ours(layer_input("embedding")))


# ------------------------------------------------------------------------------------------------ (IA)^3


def test_ia3_scales_inputs_of_feed_forward_modules_and_outputs_of_the_others():
    model = tiny("llama")
    IA3().attach(model)
    sites = registry(model).adapters["default"].sites
    assert {p.rpartition(".")[2]: model.get_submodule(p).peft["default"].describe()["scales"] for p in sites} == {
        "k_proj": "outputs",
        "v_proj": "outputs",
        "down_proj": "inputs",
    }


# ------------------------------------------------------------------------------------------------ AdaLoRA


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("every", [1, 3])
def test_adaloras_masks_follow_hf_pefts_step_by_step(every):
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        lora_alpha=6,
        tinit=2,
        tfinal=3,
        total_step=12,
        deltaT=every,
        target_modules=["first", "second"],
    )
    theirs = peft.get_peft_model(MLP(), config)
    ours = MLP()
    method = AdaLoRA(
        init_r=6,
        target_r=3,
        tinit=2 / 12,
        tfinal=3 / 12,
        every=every,
        total_steps=12,
        target_modules=["first", "second"],
    )
    method.attach(ours)
    perturb(ours)
    state, tensors = dict(theirs.named_parameters()), []
    for path in ("first", "second"):
        for key, value in ours.get_submodule(path).peft["default"].named_parameters():
            other = state[f"base_model.model.{path}.{key}.default"]
            other.data.copy_(value)
            tensors.append((key, value, other))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    generator = torch.Generator().manual_seed(1)
    left = []
    for step in range(12):
        x, y = torch.randn(4, 12, generator=generator), torch.randn(4, 8, generator=generator)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if model is ours:
                method.before_optimizer_step(ours)
            optimizer.step()
        method.after_optimizer_step(ours)
        theirs.base_model.update_and_allocate(step)
        for key, mine, other in tensors:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
            if key == "lora_E":
                assert torch.equal(mine == 0, other == 0)
        left.append(sum(int((mine != 0).sum()) for key, mine, _ in tensors if key == "lora_E"))
    assert left[0] == 12 and left[-1] == 6
    assert every > 1 or left == sorted(left, reverse=True)  # what is masked may grow again between two choices


def test_the_orthogonal_penalty_is_its_formula():
    module = holder("linear")
    method = AdaLoRA(init_r=4, target_r=2, orthogonal=0.3, target_modules="layer")
    method.attach(module)
    perturb(module)
    delta = module.layer.peft["default"]
    A, B = delta.lora_A.detach().numpy(), delta.lora_B.detach().numpy()
    terms = [np.linalg.norm(A @ A.T - np.eye(4)), np.linalg.norm(B.T @ B - np.eye(4))]
    assert method.penalty(module).item() == pytest.approx(0.3 * sum(terms) / 2, rel=1e-5)
    assert AdaLoRA(init_r=4, target_r=2, orthogonal=0.0).penalty(module) is None


def adalora(**arguments) -> AdaLoRA:
    """On two layers of `Net`, 8 ranks of which 4 stay."""
    return AdaLoRA(**{"init_r": 4, "target_r": 2, "tinit": 0.0, "target_modules": ADAPTED} | arguments)


def masks(module: nn.Module) -> Tensor:
    """Which numbers of `E` are not zero, of both layers."""
    return torch.cat([module.get_submodule(path).peft["default"].lora_E[:, 0] != 0 for path in ADAPTED])


@pytest.mark.parametrize(
    "arguments",
    [
        {"tfinal": 0.5},
        {"tfinal": 0.0},
        {"tfinal": 0.0, "every": 100},
        {"tfinal": 0.05, "every": 7},
        {"tinit": 0.95, "tfinal": 0.0},
        {"total_steps": 1, "every": 5},
        {"total_steps": 9, "tfinal": 0.1, "every": 4},
    ],
)
def test_the_budget_is_reached_at_the_end_whatever_the_schedule(arguments):
    module = Module()
    fit(module, adalora(**arguments), max_epochs=3)
    assert masks(module).sum() == 4


def test_a_run_without_an_end_is_refused():
    endless = trainer(adalora(), max_epochs=-1, limit_train_batches=1)
    with pytest.raises(ValueError, match="budget falls until the run ends"):
        endless.fit(Module(), loader())


def test_importances_are_the_modules_not_the_methods():
    """One method object for two modules masks each as a method of its own does."""
    alone, first, second = Module(seed=1), Module(seed=0), Module(seed=1)
    method = adalora()
    for module in (first, second):
        fit(module, method, max_epochs=2)
    fit(alone, adalora(), max_epochs=2)
    assert_same(adapters(second), adapters(alone))
    assert second.net.first.peft["default"].step == 8


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_module_that_zeroes_gradients_after_the_step_is_masked_alike(set_to_none):
    class Zeroes(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(optimizer_closure)
            optimizer.zero_grad(set_to_none=set_to_none)

    plain, zeroes = Module(), Zeroes()
    for module in (plain, zeroes):
        fit(module, adalora(), max_epochs=2)
    assert_same(adapters(zeroes), adapters(plain))


def test_masks_without_any_gradient_are_refused():
    model, method = Net(), AdaLoRA(init_r=4, target_r=2, tinit=0.0, total_steps=4, target_modules=["first", "second"])
    method.attach(model)
    method.after_optimizer_step(model)
    with pytest.raises(TrainingFault, match="has seen no gradient of theirs: call before_optimizer_step"):
        method.after_optimizer_step(model)


def test_a_layer_without_ranks_resumes(tmp_path):
    """Its `A` and `B` get no gradient, which is no fault."""
    arguments = {"orthogonal": 0.0, "total_steps": 8}
    module = Module()
    run = fit(module, adalora(**arguments), max_epochs=2)
    first, second = (module.get_submodule(path).peft["default"] for path in ADAPTED)
    first.kept.fill_(False)
    second.kept.fill_(True)
    first.mask()
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed = Module()
    fit(resumed, adalora(**arguments), max_epochs=3, ckpt_path=tmp_path / "run.ckpt")
    assert not masks(resumed)[:4].any() and masks(resumed)[4:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_r": 13}, "target_r must be at least 1 and at most 12, not 13"),
        ({"tinit": 0.8, "tfinal": 0.3}, "tfinal must be at least 0 and below 0.2, not 0.3"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1"),
        ({"beta1": 0}, "beta1 must be a number above 0, not 0"),
        ({"alpha": 0}, "alpha must be a number above 0"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be at least 1 and at most 12, not 0"),
        ({"total_steps": 0}, "total_steps must be at least 1, not 0"),
    ],
)
def test_what_adalora_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**arguments)
