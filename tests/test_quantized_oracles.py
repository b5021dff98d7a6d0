"""Forward passes and gradients on quantised layers are those of HF PEFT on bitsandbytes' own, of the same weights."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import lit_peft
from lit_peft import IA3, AdaLoRA, DoRA, HiRA, LoRA, VeRA
from lit_peft.core.dtypes import DTYPES
from lit_peft.core.quantize import make_quantizer
from lit_peft.methods.dora import DoRADelta
from lit_peft.methods.lora import LoRADelta
from lit_peft.testing.states import perturb

MODES = {
    "nf4": {"mode": "nf4", "compute_dtype": "float32"},
    "nf4, blocks of 128": {"mode": "nf4", "compute_dtype": "float32", "double_quant": False, "block_size": 128},
    "nf4, in bfloat16": {"mode": "nf4"},
    "fp4": {"mode": "fp4", "compute_dtype": "float32"},
    "int8": {"mode": "int8"},
}
METHODS = {
    "LoRA": LoRA(r=4, dropout=0.0, target_modules=["first", "second"]),
    "DoRA": DoRA(r=4, dropout=0.0, target_modules=["first", "second"]),
    "HiRA": HiRA(r=4, target_modules=["first", "second"]),
    "IA3": IA3(target_modules=["first", "second"], feedforward_modules=["second"]),
    "AdaLoRA": AdaLoRA(init_r=4, target_r=2, target_modules=["first", "second"]),
    "VeRA": VeRA(r=8, target_modules=["first", "second"]),
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
        common = {
            "quant_type": options["mode"],
            "compute_dtype": DTYPES[options.get("compute_dtype", "bfloat16")],
            "compress_statistics": options.get("double_quant", True),
        }
        net = Net(lambda *size, **more: bnb.nn.Linear4bit(*size, **more, **common))
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
    layers = [layer for layer in reference.modules() if knows_bitsandbytes(layer)]
    assert len(layers) == 2, "HF PEFT has no class for these"
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(3, 5, WIDTH, generator=generator) for _ in range(2))
    found = []  # without `ranknum`, a constant: HF PEFT's cast to the compute dtype has it train, in bfloat16
    for net in (mine.train(), reference.train()):
        given = x.clone().requires_grad_()
        y = net(given)
        if net is mine:
            assert (f"{name}FunctionBackward" in _nodes(y.grad_fn)) == (fused or name == "HiRA")
        y.backward(dy)
        trained = {key: p for key, p in net.named_parameters() if p.requires_grad and "ranknum" not in key}
        gradients = {_plain(key): p.grad for key, p in trained.items()}
        found.append({"output": y.detach(), "input": given.grad, **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    # The sums of products are taken in another order: to float32's rounding of the largest of them. In bfloat16, input,
    # weight and output of a product are rounded by up to 2^-9 each, of two layers, which a fused node, or one with a
    # composed weight, does at other places: four of these roundings at once, of the largest.
    rtol, atol = (0, 2**-7) if mode == "nf4, in bfloat16" else (1e-4, 2e-6)
    for key, value in found[0].items():
        expected = found[1][key].view_as(value)
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol * expected.abs().max().item(), msg=key)


def knows_bitsandbytes(layer):
    """Whether a layer is HF PEFT's for quantised ones: VeRA has one class for all, which asks a backend."""
    return type(layer).__module__.endswith(".bnb") or getattr(layer, "quantization_backend", None) is not None


def _nodes(node):
    """Names of all nodes of a graph."""
    return {type(node).__name__}.union(*(_nodes(child) for child, _ in node.next_functions if child is not None))


def _plain(key):
    """`first.lora_A` for either side's name of a parameter."""
    parts = key.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("peft", "default", "weight"))
