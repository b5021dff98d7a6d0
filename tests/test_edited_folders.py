"""Adapter folders that were edited by hand or damaged: refused by name, and the module is as it was."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import logits, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Module, Net, net_lora, saved

import lit_peft
from lit_peft.cli import main
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.files import write_folder
from lit_peft.core.folder_files import read_files
from lit_peft.core.records import CONFIG, RECORD, TENSORS, sealed
from lit_peft.core.registry import registry
from lit_peft.methods import IA3, BitFit, BottleneckAdapter, LoRA, SparseLoRA
from lit_peft.testing.states import assert_same, perturb, snapshot

A = "base_model.model.first.lora_A.weight"
TARGETS = ["first", "second"]
METHODS = {
    "LoRA": LoRA(r=2, alpha=6, dropout=0.0, target_modules=TARGETS, alpha_pattern={"first": 5}, train_also="head"),
    "IA3": IA3(target_modules=TARGETS, feedforward_modules="second"),
    "BitFit": BitFit(),
    "BottleneckAdapter": BottleneckAdapter(target_modules=TARGETS, reduction_factor=2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """The folder of each method on a `Net`, and the outputs of the net with it."""
    made = {}
    for name, method in METHODS.items():
        module = Net()
        method.attach(module)
        perturb(module)
        made[name] = lit_peft.save(module, tmp_path_factory.mktemp(name)), module(torch.eye(4))
    return made


def config(folder: Path, **entries) -> None:
    """Changes entries of adapter_config.json; None takes one out."""
    file = folder / CONFIG
    changed = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def text(folder: Path, record: str) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt", RECORD: record})


def record_of(folder: Path) -> dict:
    return json.loads(read_files(folder)[2][RECORD])


def record(folder: Path, seal: bool = True, **entries) -> None:
    """The same for our record; with its digest, as one who writes such folders would, or with the old one."""
    changed = {key: value for key, value in (record_of(folder) | entries).items() if value is not None}
    text(folder, sealed(changed) if seal else json.dumps(changed))


def argument(folder: Path, seal: bool = True, **arguments) -> None:
    """Changes arguments of the method in our record."""
    ((name, spec),) = record_of(folder)["methods"].items()
    record(folder, seal, methods={name: spec | {"init_args": spec["init_args"] | arguments}})


def tensor(folder: Path, key: str, value: torch.Tensor | None, seal: bool = True) -> None:
    (kept := dict(load_file(folder / TENSORS)))[key] = value
    kept = {k: v for k, v in kept.items() if v is not None}
    if seal:
        write_folder(folder, json.loads((folder / CONFIG).read_text()), kept, record_of(folder))
    else:
        save_file(kept, folder / TENSORS, read_files(folder)[2])


def flip(folder: Path, offset: int) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[offset] ^= 1
    (folder / TENSORS).write_bytes(content)


def cut(folder: Path, size: int) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:size])


# What is done to the folder of a LoRA, and what is said; every message begins with the folder.
EDITS = {
    "no fingerprint": (record, {"fingerprint": None}, rf"{TENSORS}: the record in its header lacks 'fingerprint'"),
    "a list": (text, {"record": "[]"}, rf"{TENSORS}: the record in its header has no format_version: \[\]"),
    "half": (text, {"record": "{"}, rf"{TENSORS} is damaged: the record in its header is no JSON: Expecting"),
    "no names": (record, {"base": 3}, "'base' in the record in its header must be a list of names, not 3"),
    "two methods": (
        record,
        {"methods": {}},
        "'methods' in .* must be one name with a class_path and init_args",
    ),
    "no backbone": (record, {"model": {"backbone": 4}}, "'model' in .* must be a backbone and label_names"),
    "alpha there": (argument, {"alpha": 800}, "lora_alpha is 6, and the record means 800"),
    "alpha of nothing": (argument, {"alpha": "x"}, "a LoRA that cannot be: alpha must be a number, not 'x'"),
    "unknown argument": (argument, {"beta": 1}, "a LoRA that cannot be: .* unexpected keyword argument 'beta'"),
    "r there": (argument, {"r": 3}, "contradicts .*: r is 2, and the record means 3"),
    "no parameter": (record, {"base": ["head.odd"]}, r"holds no head\.odd, which its adapter trains"),
    "alpha here": (config, {"lora_alpha": 800}, f"{CONFIG} contradicts the record in {TENSORS}: lora_alpha is 800, "),
    "pattern here": (
        config,
        {"alpha_pattern": {"^first": 7}},
        'alpha_pattern is {"^first": 7}, and the record',
    ),
    "r here": (config, {"r": "four"}, 'r is "four", and the record means 2'),
    "type": (config, {"peft_type": "LORAA"}, 'peft_type is "LORAA", and the record means "LORA"'),
    "no type": (config, {"peft_type": None}, 'peft_type is missing, and the record means "LORA"'),
    "targets": (config, {"target_modules": ["foo"]}, r'target_modules is \["foo"\], and the record means \["first", '),
    "transposed": (config, {"fan_in_fan_out": True}, "fan_in_fan_out is true, and the record means false"),
    "more": (config, {"use_dora": True}, "adapter_config.json asks for use_dora=True, which LoRA does not have"),
    "no pattern": (config, {"rank_pattern": [1]}, rf"{CONFIG}: rank_pattern must be an object, not \[1\]"),
    "nan": (
        tensor,
        {"key": A, "value": torch.full((2, 4), torch.nan)},
        r"first\.lora_A\.weight holds nan or inf",
    ),
    "inf": (
        tensor,
        {"key": A, "value": torch.full((2, 4), -torch.inf)},
        r"first\.lora_A\.weight holds nan or inf",
    ),
    "a tensor too few": (tensor, {"key": A, "value": None}, r"lacks first\.lora_A\.weight"),
    "a tensor too many": (tensor, {"key": A + "x", "value": torch.ones(2)}, r"holds first\.lora_A\.weightx, which"),
    "a tensor of the head": (tensor, {"key": "base_model.model.head.bias", "value": None}, r"holds no head\.bias"),
    "a shape": (tensor, {"key": A, "value": torch.ones(2, 5)}, r"lora_A\.weight has shape \[2, 5\] .* \[2, 4\] in the"),
    "a dtype": (tensor, {"key": A, "value": torch.ones(2, 4, dtype=torch.int32)}, r"torch\.int32 in the folder and"),
    "no digests": (record, {"digests": None}, "lacks 'digests'. Copy it anew from where it is whole, or save the"),
    "alpha there alone": (argument, {"alpha": 800, "seal": False}, "the record in its header is not as it was written"),
    "label names": (
        record,
        {"model": {"backbone": "other"}, "seal": False},
        "the record in its header is not as it was written",
    ),
    "a bit": (flip, {"offset": -1}, rf"{TENSORS}: base_model\.\S+ is not as it was saved, its digest does not match: "),
    "a value": (tensor, {"key": A, "value": torch.ones(2, 4), "seal": False}, f"{A} is not as it was saved"),
    "a tensor gone": (tensor, {"key": A, "value": None, "seal": False}, f"lacks {A}, which it was saved with"),
    "one more": (tensor, {"key": "x", "value": torch.ones(1), "seal": False}, 'holds "x", which it was saved without'),
    "a dtype alone": (
        tensor,
        {"key": A, "value": torch.ones(2, 4, dtype=torch.bfloat16), "seal": False},
        f"{A} is not as it was saved",
    ),
    "cut off": (cut, {"size": 900}, f"{TENSORS} is damaged"),
    "empty": (cut, {"size": 0}, f"{TENSORS} is damaged"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_folder_is_refused_by_name(case, whole, tmp_path):
    edit, arguments, message = EDITS[case]
    folder = shutil.copytree(whole["LoRA"][0], tmp_path / "edited")
    edit(folder, **arguments)
    module = Net()
    with pytest.raises(CheckpointMismatch, match=re.sub(r"([{^])", r"\\\1", message)) as error:
        lit_peft.load(module, folder)
    assert str(error.value).startswith(str(folder)) and len(str(error.value).splitlines()) == 1
    assert registry(module) is None
    assert_same(snapshot(module), snapshot(Net()))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": "four"}, "a LoRA that cannot be: r must be a number, not 'four'"),
        ({"lora_alpha": float("nan")}, "a LoRA that cannot be: alpha must be a number above 0, not nan"),
        ({"r": 3_000}, "a LoRA that cannot be: r = 3000 exceeds the smaller side of first, 8 x 4"),
        ({"rank_pattern": {"(": 2}}, "a LoRA that cannot be: "),
        ({"task_type": []}, "task_type must be a text, not []"),
        ({"peft_type": "LORAA"}, "peft_type 'LORAA' has no method here; known: "),
    ],
)
def test_an_edited_folder_of_hf_peft_is_refused_by_name(entries, message, whole, tmp_path):
    folder = shutil.copytree(whole["LoRA"][0], tmp_path / "edited")
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    lit_peft.load(Net(), folder)
    config(folder, **entries)
    module = Net()
    with pytest.raises(CheckpointMismatch) as error:
        lit_peft.load(module, folder)
    assert message in str(error.value) and str(folder) in str(error.value)
    assert registry(module) is None


@pytest.mark.parametrize("form", ["ours", "HF PEFT's"])
@pytest.mark.parametrize("of", ["lora_A", "head.weight"])
def test_what_is_not_finite_is_refused_in_folders_of_either(form, of, tmp_path):
    LoRA(r=2, target_modules=["first"], train_also=["head"]).attach(module := Net())
    folder = lit_peft.save(module, tmp_path / "folder")
    (key,) = [key for key in load_file(folder / TENSORS) if of in key]
    tensor(folder, key, torch.full_like(load_file(folder / TENSORS)[key], torch.nan))
    if form == "HF PEFT's":
        save_file(load_file(folder / TENSORS), folder / TENSORS)
    with pytest.raises(CheckpointMismatch, match=rf"{of}\S* holds nan or inf"):
        lit_peft.load(Net(), folder)


def test_what_changes_nothing_may_be_edited(whole, tmp_path):
    folder = shutil.copytree(whole["LoRA"][0], tmp_path / "edited")
    targets = ["second", "first"]
    config(folder, peft_version="0.99", inference_mode=False, base_model_name_or_path="/moved", target_modules=targets)
    module = Net()
    lit_peft.load(module, folder)
    assert torch.equal(module(torch.eye(4)), whole["LoRA"][1])


# ----------------------------------------------------------------------------------------------- any edit at all

JUNK = st.sampled_from([None, True, False, 0, -1, 3, 800, 0.5, float("nan"), "", "x", "four", [], ["x"], {}, {"x": 1}])


def edited(value, draw):
    """A JSON value in which one part, at any depth, is replaced, taken out or joined by another."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JUNK)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    changed = value.copy()
    how = draw(st.sampled_from(["into", "into", "out", "more"]))
    if how == "into":
        changed[key] = edited(value[key], draw)
    elif how == "out":
        del changed[key]
    elif isinstance(value, dict):
        changed["more"] = draw(JUNK)
    else:
        changed.append(draw(JUNK))
    return changed


def check_refused_or_the_same(folder: Path, expected: torch.Tensor) -> None:
    module = Net()
    try:
        lit_peft.load(module, folder)
    except CheckpointMismatch as error:
        assert str(folder) in str(error)
        assert registry(module) is None
        assert_same(snapshot(module), snapshot(Net()))
    else:
        assert torch.equal(module(torch.eye(4)), expected)


# Of a method that HF PEFT lacks our record alone has the arguments: what it says there is so.
@pytest.mark.parametrize("method", ["LoRA", "IA3", "BitFit"])
@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data())
def test_any_edit_of_the_two_halves_is_refused_or_changes_nothing_even_if_it_is_sealed(
    method, data, whole, tmp_path_factory
):
    origin, expected = whole[method]
    folder = shutil.copytree(origin, tmp_path_factory.mktemp("any") / "edited")
    for half in data.draw(st.lists(st.sampled_from([CONFIG, RECORD]), min_size=1, max_size=2, unique=True)):
        if half == CONFIG:
            file = folder / CONFIG
            file.write_text(json.dumps(edited(json.loads(file.read_text()), data.draw)))
        else:
            changed = edited(record_of(origin), data.draw)
            text(folder, sealed(changed) if isinstance(changed, dict) else json.dumps(changed))
    check_refused_or_the_same(folder, expected)


# --------------------------------------------------------------------------------------- masks, and checkpoints


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, r"The record lacks the mask first\.mask_A"),
        ({"first.mask_A": "", "first.mask_B": "", "odd": ""}, "The record holds the mask odd"),
        ({"first.mask_A": "?", "first.mask_B": ""}, "A mask is no base64"),
        ({"first.mask_A": "", "first.mask_B": ""}, r"A mask of 0 bytes is none of \[2, 4\]"),
    ],
)
def test_masks_are_all_there(masks, message, tmp_path):
    module = Net()
    SparseLoRA("magnitude", r=2, target_modules="first").attach(module)
    folder = lit_peft.save(module, tmp_path)
    lit_peft.load(Net(), folder)
    record(folder, masks=masks)
    with pytest.raises(CheckpointMismatch, match=message):
        lit_peft.load(Net(), folder)


def test_a_file_is_a_checkpoint_whatever_its_suffix(tmp_path):
    path = saved(tmp_path, Module(), net_lora())
    for name in ("run.pt", "run"):
        lit_peft.load(Module(), shutil.copy(path, tmp_path / name))
    lit_peft.load(Module(), shutil.copytree(lit_peft.save(attached(), tmp_path / "adapter"), tmp_path / "adapter.ckpt"))
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(CheckpointMismatch, match=r"notes\.txt is no checkpoint, or is cut off \(4 bytes\)"):
        lit_peft.load(Module(), tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="lost is no adapter folder"):
        lit_peft.load(Module(), tmp_path / "lost")


def attached() -> Module:
    module = Module()
    net_lora().attach(module)
    return module


@pytest.mark.parametrize("case", ["no fingerprint", "a list", "half", "nan", "alpha here"])
def test_the_command_line_says_so_without_a_traceback(case, whole, tmp_path, capsys):
    edit, arguments, _ = EDITS[case]
    folder = shutil.copytree(whole["LoRA"][0], tmp_path / "edited")
    edit(folder, **arguments)
    with pytest.raises(SystemExit) as end:
        main(["predict", "--adapter", str(folder), "--text", "hi", "--trainer.accelerator", "cpu"])
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert str(folder) in said and "Traceback" not in said


def test_what_hf_peft_writes_of_a_config_of_ours_opens(tmp_path):
    import peft

    model = tiny("distilbert")
    LoRA(r=2, target_modules=["q_lin"], train_also=["classifier"]).attach(model)
    perturb(model)
    folder = lit_peft.save(model, tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(folder))
    theirs.base_model_name_or_path = "my/base"
    theirs.save_pretrained(str(folder))
    assert "init_lora_weights" in json.loads((folder / CONFIG).read_text())
    twin = tiny("distilbert")
    lit_peft.load(twin, folder)
    assert torch.equal(logits(twin, "distilbert"), logits(model, "distilbert"))


def test_of_several_models_the_one_that_was_adapted_is_found(tmp_path):
    two = nn.ModuleDict({"student": tiny("distilbert"), "teacher": tiny("distilbert", seed=1)})
    LoRA(r=2, target_modules=["student.*.q_lin"]).attach(two)
    perturb(two)
    folder = lit_peft.save(two, tmp_path)
    again = nn.ModuleDict({"teacher": tiny("distilbert", seed=1), "student": tiny("distilbert")})
    lit_peft.load(again, folder)
    assert torch.equal(logits(again["student"], "distilbert"), logits(two["student"], "distilbert"))
    with pytest.raises(ValueError, match="holds several models"):
        lit_peft.load(nn.ModuleDict({name: tiny("distilbert") for name in "ab"}), folder)
