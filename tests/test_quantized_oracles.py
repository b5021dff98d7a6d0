"""Forward passes and gradients on quantised layers are those of HF PEFT on bitsandbytes' own, of the same weights."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import lit_peft
from lit_peft import IA3, DoRA, HiRA, LoRA
from lit_peft.core.quantize import make_quantizer
from lit_peft.methods.dora import DoRADelta
from lit_peft.methods.lora import LoRADelta
from lit_peft.testing.states import perturb

MODES = {
    "nf4": {"mode": "nf4", "compute_dtype": "float32"},
    "nf4, blocks of 128": {"mode": "nf4", "compute_dtype": "float32", "double_quant": False, "block_size": 128},
    "fp4": {"mode": "fp4", "compute_dtype": "float32"},
    "int8": {"mode": "int8"},
}
METHODS = {
    "LoRA": LoRA(r=4, dropout=0.0, target_modules=["first", "second"]),
    "DoRA": DoRA(r=4, dropout=0.0, target_modules=["first", "second"]),
    "HiRA": HiRA(r=4, target_modules=["first", "second"]),
    "IA3": IA3(target_modules=["first", "second"], feedforward_modules=["second"]),
}
WIDTH = 128  # whole blocks in a row: bitsandbytes reads others with wrong scales on some CPUs


class Net(nn.Module):
    def __init__(self, make=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(WIDTH, 2 * WIDTH), make(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def ours(mode):
    net = Net()
    for layer in (net.first, net.second):
        make_quantizer(MODES[mode]).quantize(layer, torch.device("cpu"))
    return net


def theirs(mode):
    """As one does it with bitsandbytes alone."""
    dense, options = Net(), MODES[mode]
    if mode == "int8":
        net = Net(lambda *size, **more: bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0, **more))
        net.is_loaded_in_8bit = True
    else:
        net = Net(
            lambda *size, **more: bnb.nn.Linear4bit(
                *size, **more, quant_type=options["mode"], compress_statistics=options.get("double_quant", True)
            )
        )
        net.is_loaded_in_4bit = True
    for new, old in ((net.first, dense.first), (net.second, dense.second)):
        if mode != "int8":
            new.weight.blocksize = options.get("block_size", 64)
        new.load_state_dict(old.state_dict())
    return net.to("cpu")


@pytest.mark.parametrize("mode", MODES)
def test_codes_are_those_of_bitsandbytes(mode):
    for mine, reference in zip(ours(mode).children(), theirs(mode).children(), strict=True):
        assert torch.equal(mine.weight, reference.weight)
        mine, reference = mine.state_dict(), reference.state_dict()
        assert mine.keys() == reference.keys()
        assert all(torch.equal(value, reference[key]) for key, value in mine.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "fused"), [*((name, False) for name in METHODS), ("LoRA", True), ("DoRA", True)])
def test_forward_and_gradients_are_hf_pefts(name, fused, mode, tmp_path, monkeypatch):
    if fused:  # as large layers are
        for cls in (LoRADelta, DoRADelta):
            monkeypatch.setattr(cls, "fused_from", 1)
    mine = ours(mode)
    METHODS[name].attach(mine)
    perturb(mine)
    reference = peft.PeftModel.from_pretrained(theirs(mode), lit_peft.save(mine, tmp_path), is_trainable=True)
    layers = [layer for layer in reference.modules() if type(layer).__module__.endswith(".bnb")]
    assert len(layers) == 2, "HF PEFT has no class for these"
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(3, 5, WIDTH, generator=generator) for _ in range(2))
    found = []
    for net in (mine.train(), reference.train()):
        given = x.clone().requires_grad_()
        y = net(given)
        if net is mine:
            assert (f"{name}FunctionBackward" in _nodes(y.grad_fn)) == (fused or name == "HiRA")
        y.backward(dy)
        gradients = {_plain(key): p.grad for key, p in net.named_parameters() if p.requires_grad}
        found.append({"output": y.detach(), "input": given.grad, **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    for key, value in found[0].items():
        # The sums of products are taken in another order: to float32's rounding of the largest of them.
        expected = found[1][key].view_as(value)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-6 * expected.abs().max().item(), msg=key)


def _nodes(node):
    """Names of all nodes of a graph."""
    return {type(node).__name__}.union(*(_nodes(child) for child, _ in node.next_functions if child is not None))


def _plain(key):
    """`first.lora_A` for either side's name of a parameter."""
    parts = key.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("peft", "default", "weight"))
