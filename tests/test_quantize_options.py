"""`quantize` as users write it: what is understood, what is told, and how it goes with recipes and other methods."""

import importlib.util
import json
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from lit_peft import BitFit, LoRA, QLoRA
from lit_peft.arguments import change_method, join_quantize, options, read_config, resolve
from lit_peft.core import quantize as core
from lit_peft.core.quantize import GROUP, parse
from lit_peft.lightning_cli import Parser
from lit_peft.methods.base import Method
from lit_peft.tasks import TextClassification

NF4 = {
    "mode": "nf4",
    "double_quant": True,
    "compute_dtype": "bfloat16",
    "block_size": 64,
    "storage_dtype": "uint8",
    "skip_modules": [],
}


def test_every_option_has_its_name():
    assert parse(None) is None
    assert parse("nf4") == parse({"mode": "nf4"}) == LoRA(quantize="nf4").quantize == QLoRA().quantize == NF4
    assert parse({"mode": "fp4", "skip_modules": "ffn"}) == NF4 | {"mode": "fp4", "skip_modules": ["ffn"]}


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("NF4", r"no mode 'NF4'\. Did you mean nf4\? Modes:"),
        ("4bit", r"Did you mean nf4 or fp4\?"),
        ("int4", r"Did you mean nf4 or fp4\?"),
        ("8-bit", r"Did you mean int8 or int8_torchao\?"),
        ("nf", r"Did you mean nf4\?"),
        ("gguf", r"no mode 'gguf'\. Modes: "),
        ({"double_quant": False}, "names no mode; modes: "),
        (True, "True names no mode; modes: "),
        (["nf4"], r"\['nf4'\] names no mode; modes: "),
        ({"mode": "nf4", "blocksize": 128}, r"nf4 has no option 'blocksize'\. Did you mean block_size\?"),
        ({"mode": "int8", "double_quant": True}, r"int8 has no option 'double_quant'\. Options: threshold, skip_mod"),
        ({"mode": "nf4", "block_size": "big"}, "block_size is 'big', expected one of 32, 64, "),
        ({"mode": "nf4", "block_size": 64.0}, r"block_size is 64\.0, expected one of"),
        ({"mode": "nf4", "block_size": True}, "block_size is True, expected one of"),
        ({"mode": "nf4", "double_quant": 1}, "double_quant is 1, expected true or false"),
        (
            {"mode": "nf4", "compute_dtype": "bf16"},
            "compute_dtype must be float32, bfloat16, float16 or auto, not",
        ),
        ({"mode": "nf4", "skip_modules": ["lin", "re:("]}, r"skip_modules: 're:\(' is no regular expression: missing"),
        ({"mode": "nf4", "skip_modules": 3}, r"skip_modules is 3, expected names, \[a, b\]"),
        ({"mode": "int8", "threshold": "high"}, "threshold must be a number, not 'high'"),
        ({"mode": "int8", "threshold": -1}, "threshold must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(quantize, message):
    with pytest.raises(ValueError, match=f"^quantize: .*{message}"):
        LoRA(quantize=quantize)


def test_a_package_that_is_missing_is_named(monkeypatch):
    points = [EntryPoint("ao8", "package_that_is_not_there:Int8", GROUP)]
    monkeypatch.setattr(core, "entry_points", lambda group: points)
    with pytest.raises(ValueError, match="ao8 needs a package that is not installed: No module named 'package_that"):
        parse("ao8")
    points[:] = [EntryPoint("nf4", "lit_peft.quantizers.bnb:NF4", GROUP)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lit_peft.quantizers.bnb", raising=False)
    with pytest.raises(ValueError, match="nf4 needs a package that is not installed: No module named 'bitsandbytes'"):
        QLoRA()


class Grouped(core.Quantizer):
    """One that asks for an option."""

    def __init__(self, group: int, **common):
        super().__init__(**common)
        self.group = group


def test_an_option_that_has_no_default_is_asked_for(monkeypatch):
    points = [EntryPoint("grouped", f"{__name__}:Grouped", core.GROUP)]
    monkeypatch.setattr(core, "entry_points", lambda group: points)
    with pytest.raises(ValueError, match=r"quantize: grouped needs group: give \{mode: grouped, group: …\}"):
        parse("grouped")
    assert parse({"mode": "grouped", "group": 3}) == {"mode": "grouped", "group": 3, "skip_modules": []}


def test_a_gpu_without_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="nf4 computes in bfloat16, which Tesla T4 has no units for .*float16"):
        core.make_quantizer("nf4").check_device(device)
    core.make_quantizer({"mode": "nf4", "compute_dtype": "float16"}).check_device(device)
    core.make_quantizer("int8").check_device(device)


def test_biases_train_on_a_quantised_base_that_a_task_loads():
    task = TextClassification(label_names=["bad", "good"])
    task.configure_model()
    method = BitFit(quantize="nf4")
    assert not method.trains("model.distilbert.transformer.layer.0.ffn.lin1.weight")  # asked before it has seen any
    method.attach(task)
    assert core.stored_as(task) and task.model.distilbert.transformer.layer[0].ffn.lin1.bias.requires_grad


def test_nothing_to_quantise_is_told():
    with pytest.raises(ValueError, match=r"could be quantised\. Left alone: 1 of 1, such as 0 \(it trains\)\."):
        BitFit(train_also="0", quantize="nf4").attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(ValueError, match=r"quantize: Sequential has no linear layer\."):
        BitFit(quantize="nf4").attach(nn.Sequential(nn.Conv2d(2, 2, 1)))


def test_of_several_reasons_the_commonest_is_told():
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with pytest.raises(ValueError, match=r"Left alone: 2 of 4, such as 1 \(skip_modules names it\)\."):
        BitFit(train_also="0", quantize={"mode": "nf4", "skip_modules": ["1", "2"]}).attach(module)


# ----------------------------------------------------------------------------------------- on the command line


def quantize_of(*arguments: str) -> object:
    """The `quantize` that a command line comes to."""
    words, _ = change_method(join_quantize(resolve(["fit", *arguments])))
    parser = Parser(exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_subclass_arguments(Method, "method")
    sections = [
        (flag, json.dumps({"method": read_config(value)["method"]}) if flag == "--config" else value)
        for _, _, flag, value in options(words)
        if flag == "--config" or flag.startswith("--method")
    ]
    return parser.parse_args([f"{flag}={value}" for flag, value in sections]).method.init_args.quantize


LORA, Q = ("--config", "sst2/lora"), "--method.quantize"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (LORA, None),
        ((*LORA, Q, "nf4"), "nf4"),
        ((*LORA, f"{Q}=nf4", f"{Q}.block_size=128"), {"mode": "nf4", "block_size": 128}),
        ((*LORA, f"{Q}.mode", "nf4", f"{Q}.double_quant", "false"), {"mode": "nf4", "double_quant": False}),
        ((*LORA, "--config", "quantize/nf4"), NF4),
        ((*LORA, "--config", "quantize/nf4", f"{Q}.block_size", "128"), NF4 | {"block_size": 128}),
        ((*LORA, "--config", "quantize/nf4", "--method", "DoRA"), NF4),
        ((*LORA, "--method", "DoRA", "--config", "quantize/nf4"), NF4),
        ((*LORA, Q, "nf4", f"{Q}.block_size", "32", "--method", "HiRA"), {"mode": "nf4", "block_size": 32}),
        ((*LORA, "--config", "quantize/nf4", Q, "null"), None),
        ((*LORA, "--method", "QLoRA"), "nf4"),
        ((*LORA, "--method", "QLoRA", f"{Q}.double_quant", "false"), {"mode": "nf4", "double_quant": False}),
        ((*LORA, "--method", "QLoRA", Q, "null"), None),
        (("--config", "sst2/qlora"), NF4),
        (("--config", "sst2/qlora", "--method", "LoRA"), None),
        (
            ("--config", "sst2/qlora", "--config", "quantize/int8"),
            {"mode": "int8", "threshold": 6.0, "skip_modules": []},
        ),
    ],
)
def test_the_command_line_comes_to(arguments, expected):
    assert quantize_of(*arguments) == expected
