"""A thousand damaged adapter folders: none is accepted with changed behaviour, none ends in a traceback."""

import json
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from models import logits
from mutations import ANY, OURS, SEALABLE, Files, mutated, seal
from test_interop import perturb
from test_vector_methods import loud
from torch import nn

import lit_peft
from lit_peft.cli import main
from lit_peft.core.attach import detach
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.testing.states import assert_same, snapshot

ATTENTION, HEAD = ["q_lin", "v_lin"], ["pre_classifier", "classifier"]
PATTERNS = {"rank_pattern": {"*.0.*q_lin": 2}, "alpha_pattern": {"*.1.*v_lin": 5}}


def attached(name: str, method: lit_peft.Method) -> nn.Module:
    model = loud(name)
    method.attach(model)
    perturb(model)
    return model


def deltas(model: nn.Module) -> list:
    return [module.peft["default"] for module in model.modules() if hasattr(module, "peft")]


def masked() -> nn.Module:
    """An AdaLoRA of which ranks are gone, in the last layer all."""
    model = attached("distilbert", lit_peft.AdaLoRA(init_r=4, target_r=2, target_modules=ATTENTION))
    for i, delta in enumerate(deltas(model)):
        delta.kept[: i + 1] = False
        delta.mask()
    return model


def pruned() -> nn.Module:
    """A SparseLoRA with masked entries, and ranks that are gone."""
    model = attached("distilbert", lit_peft.SparseLoRA("magnitude", r=4, target_modules=ATTENTION))
    with torch.no_grad():
        for i, delta in enumerate(deltas(model)):
            delta.lora_A[:i], delta.lora_A[:, ::3] = 0, 0
            for parameter, mask in zip(delta.sparse(), delta.masks(), strict=True):
                mask.copy_(parameter != 0)
    return model


M = lit_peft
FAMILIES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "LoRA": (
        "distilbert",
        lambda: attached("distilbert", M.LoRA(r=4, alpha=6, target_modules=ATTENTION, train_also=HEAD, **PATTERNS)),
    ),
    "DoRA": ("distilbert", lambda: attached("distilbert", M.DoRA(r=2, target_modules=ATTENTION))),
    "HiRA": ("distilbert", lambda: attached("distilbert", M.HiRA(r=2, target_modules=ATTENTION))),
    "SparseLoRA": ("distilbert", pruned),
    "AdaLoRA": ("distilbert", masked),
    "VeRA": ("distilbert", lambda: attached("distilbert", M.VeRA(r=8, target_modules=ATTENTION))),
    "IA3": (
        "distilbert",
        lambda: attached("distilbert", M.IA3(target_modules=["v_lin", "lin2"], feedforward_modules=["lin2"])),
    ),
    "BottleneckAdapter": ("distilbert", lambda: attached("distilbert", M.BottleneckAdapter(reduction_factor=4))),
    "PrefixTuning": ("gpt2", lambda: attached("gpt2", M.PrefixTuning(num_virtual_tokens=3))),
    "PromptTuning": ("gpt2", lambda: attached("gpt2", M.PromptTuning(num_virtual_tokens=3))),
    "PTuning": ("gpt2", lambda: attached("gpt2", M.PTuning(num_virtual_tokens=3, hidden_size=5))),
    "BitFit": ("distilbert", lambda: attached("distilbert", M.BitFit())),
    "LinearProbe": ("distilbert", lambda: attached("distilbert", M.LinearProbe(train_also=HEAD))),
}


@dataclass
class Whole:
    """A folder that is whole, and what it does to its base."""

    name: str
    files: Files
    base: nn.Module
    adapted: dict[str, torch.Tensor]
    outputs: torch.Tensor
    spec: dict
    trains: set[str]


def whole(name: str, folder: Path) -> Whole:
    model = loud(name)
    adapter = lit_peft.load(model, folder)
    outputs = logits(model, name)
    assert (outputs - logits(loud(name), name)).abs().max() > 1e-3  # a change could be heard
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    return Whole(name, Files.read(folder), loud(name), snapshot(model), outputs, adapter.spec, trains)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[str, Whole]:
    found = {}
    for family, (name, make) in FAMILIES.items():
        found[family] = whole(name, lit_peft.save(make(), tmp_path_factory.mktemp(family)))
    return found


def outcome(whole: Whole, files: Files, folder: Path) -> str:
    """What loading makes of a folder: refused, with the module as it was; or the same or changed behaviour."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files.write(folder)
    model, before = whole.base, snapshot(whole.base)
    try:
        adapter = lit_peft.load(model, folder)
    except (CheckpointMismatch, FileNotFoundError) as error:
        said = str(error)
        assert str(folder) in said
        assert 1 <= len(said.splitlines()) <= 3 and len(said) < 1_500
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError) and "allocate" not in str(cause)
            cause = cause.__cause__
        result = "refused"
    else:
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        found = snapshot(model)
        same = found.keys() == whole.adapted.keys() and all(torch.equal(found[k], v) for k, v in whole.adapted.items())
        same = same and torch.equal(logits(model, whole.name), whole.outputs)
        result = "same" if same and adapter.spec == whole.spec and trains == whole.trains else "changed"
        if any(not p.isfinite().all() for p in model.parameters() if p.requires_grad):
            result = "not finite"
        detach(model)
    assert registry(model) is None and type(model) is type(loud(whole.name))
    assert_same(snapshot(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return result


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A gigabyte beyond what the process has: what a file asks for must not be had unseen."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_folder_is_refused_or_the_same(family, wholes, tmp_path, little_memory):
    results: Counter[str] = Counter()
    config = json.dumps(json.loads(wholes[family].files.config) | {"inference_mode": False, "revision": "x"}).encode()
    assert outcome(wholes[family], replace(wholes[family].files, config=config), tmp_path / "folder") == "same"
    for number in range(77):  # 1,001 with all families
        done, files = mutated(wholes[family].files, random.Random(f"{family} {number}"), OURS)
        result = outcome(wholes[family], files, tmp_path / "folder")
        assert result in ("refused", "same"), f"{family} {number}: {done}"
        results[result] += 1
    print(f"{family}: {dict(results)}")
    assert results["refused"] > 50


def test_the_command_line_tells_damage_without_a_traceback(wholes, tmp_path, capsys):
    for number in range(12):
        done, files = mutated(wholes["LoRA"].files, random.Random(f"LoRA {number}"), OURS)
        if outcome(wholes["LoRA"], files, folder := tmp_path / str(number)) == "same":
            continue
        with pytest.raises(SystemExit) as end:
            main(["predict", "--adapter", str(folder), "--text", "hi", "--trainer.accelerator", "cpu"])
        said = capsys.readouterr().err
        assert end.value.code == 2, done
        assert str(folder) in said and "Traceback" not in said and len(said.splitlines()) <= 3, done


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_may_say_anything_under_a_digest_that_matches(family, wholes, tmp_path, little_memory):
    results: Counter[str] = Counter()
    for number in range(40):
        _, files = mutated(wholes[family].files, random.Random(f"{family} {number}"), SEALABLE)
        results[outcome(wholes[family], seal(files), tmp_path / "folder")] += 1
    print(f"{family}: {dict(results)}")
    assert results["refused"] > 20 and results["not finite"] == 0


# ------------------------------------------------------------------------------------------- of HF PEFT's own

THEIRS: dict[str, tuple[str, peft.PeftConfig]] = {
    "LoRA": (
        "distilbert",
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=ATTENTION,
            modules_to_save=list(HEAD),
            task_type="SEQ_CLS",
            bias="lora_only",
            rank_pattern={"layer.0.attention.q_lin": 2},
            alpha_pattern={r"layer\.1\..*v_lin": 5},
        ),
    ),
    "DoRA": ("distilbert", peft.LoraConfig(r=2, use_dora=True, target_modules=ATTENTION)),
    "HiRA": ("distilbert", peft.HiraConfig(r=2, target_modules=ATTENTION)),
    "AdaLoRA": ("distilbert", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=ATTENTION)),
    "VeRA": ("distilbert", peft.VeraConfig(r=8, target_modules=ATTENTION)),
    "IA3": ("distilbert", peft.IA3Config(target_modules=["v_lin", "lin2"], feedforward_modules=["lin2"])),
    "PrefixTuning": ("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "PromptTuning": ("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "PTuning": ("gpt2", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=5)),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Whole]:
    found = {}
    for family, (name, config) in THEIRS.items():
        model = peft.get_peft_model(loud(name), config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.5 * torch.randn(parameter.shape))
        model.save_pretrained(folder := tmp_path_factory.mktemp(family))
        found[family] = whole(name, folder)
    return found


REFUSED = ("tensors: rename", "tensors: add", "tensors: shrink", "values: not_finite", "header: lie")
"""What no folder can hold. One that lacks a layer is what HF PEFT makes of it, too: the layer is as in the base."""


@pytest.mark.parametrize("family", THEIRS)
def test_a_damaged_folder_of_hf_peft_leaves_no_traceback(family, theirs, tmp_path, little_memory):
    results: Counter[str] = Counter()
    for number in range(40):
        done, files = mutated(theirs[family].files, random.Random(f"{family} {number}"), ANY)
        result = outcome(theirs[family], files, tmp_path / "folder")
        assert result != "not finite", f"{family} {number}: {done}"
        assert result in ("refused", "same") or done not in REFUSED, f"{family} {number}: {done}"
        results[result] += 1
    print(f"{family}: {dict(results)}")
    assert results["refused"] > 10


@pytest.mark.parametrize(("family", "entry"), [("VeRA", "r"), ("PromptTuning", "num_virtual_tokens")])
def test_a_size_that_no_tensor_has_takes_no_memory(family, entry, theirs, tmp_path, little_memory):
    files = theirs[family].files
    config = json.dumps(json.loads(files.config) | {entry: 10**9}).encode()
    assert outcome(theirs[family], replace(files, config=config), tmp_path / "folder") == "refused"
