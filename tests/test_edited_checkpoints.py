"""Checkpoints whose record or tensors were edited: told by file and entry, in a trainer and outside of one."""

import copy
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from mutations import edited
from test_cli import SMALL, fit
from toys import Module, loader, net_lora, saved, trainer
from toys import fit as fit_toy

import lit_peft
from lit_peft.cli import main
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.testing.states import assert_same, snapshot

A, HEAD = "net.first.peft.default.lora_A", "net.head.weight"


def method() -> lit_peft.LoRA:
    return net_lora(train_also=["head"])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("run"), Module(), method())


def without(part: dict, key: str) -> None:
    del part[key]


def put(part: dict, key: str, value: object) -> None:
    part[key] = value


ENTRY = "its entry 'lit_peft'"
SPEC = {"class_path": "lit_peft.methods.LoRA", "init_args": {"r": 2}}
# What is done to the record, and what is said in a trainer and outside of one.
RECORDS = {
    "no record": (lambda c: without(c, "lit_peft"), "was not written by a lit-peft method: it has no 'lit_peft' entry"),
    "a list": (lambda c: put(c, "lit_peft", []), f"{ENTRY} has no format_version: []"),
    "no version": (lambda c: without(c["lit_peft"], "format_version"), f"{ENTRY} has no format_version"),
    "a newer version": (
        lambda c: put(c["lit_peft"], "format_version", 99),
        "has format version 99; this release reads",
    ),
    "no methods": (lambda c: without(c["lit_peft"], "methods"), f"{ENTRY} lacks 'methods'. Use another checkpoint of"),
    "none of the methods": (lambda c: put(c["lit_peft"], "methods", {}), "'methods' in its entry 'lit_peft' must be a"),
    "an odd name": (lambda c: put(c["lit_peft"], "methods", {"a.b": SPEC}), 'for each name, not {"a.b": {"class_path"'),
    "a method that is a text": (lambda c: put(c["lit_peft"]["methods"], "default", "LoRA"), 'not {"default": "LoRA"}'),
    "a tensor for a rank": (
        lambda c: put(c["lit_peft"]["methods"]["default"]["init_args"], "r", torch.ones(2)),
        "'methods' in its entry 'lit_peft' must be a class_path and init_args for each name",
    ),
    "no fingerprint": (lambda c: without(c["lit_peft"], "fingerprint"), f"{ENTRY} lacks 'fingerprint'"),
    "digests that are none": (lambda c: put(c["lit_peft"], "fingerprint", {"a": 1}), 'each parameter, not {"a": 1}'),
    "moved": (lambda c: put(c["lit_peft"], "moved", None), "'moved' in its entry 'lit_peft' must be a list of names"),
    "prepared": (lambda c: put(c["lit_peft"], "prepared", 3), "must be a list of names, not 3"),
    "weights": (lambda c: put(c["lit_peft"], "weights", {"default": "1"}), "'weights' in its entry 'lit_peft' must be"),
    "optimizers": (lambda c: put(c["lit_peft"], "optimizers", [3]), "must be the settings of each group, not [3]"),
    "tensors in a list": (lambda c: put(c, "state_dict", [1]), "state_dict is a list, expected a dict of tensors"),
    "a number": (lambda c: put(c["state_dict"], A, 3), f"state_dict holds a int as '{A}', not a tensor"),
    "nan": (lambda c: c["state_dict"][A].fill_(torch.nan), f"{A} holds nan or inf: its training diverged, or the"),
    "inf in the head": (lambda c: c["state_dict"][HEAD].fill_(torch.inf), f"{HEAD} holds nan or inf"),
    "integers": (
        lambda c: put(c["state_dict"], A, c["state_dict"][A].int()),
        "is of torch.int32, and torch.float32 in",
    ),
    "a shape": (lambda c: put(c["state_dict"], A, torch.ones(2, 5)), "has shape [2, 5], and [2, 4] in the module"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_an_edited_checkpoint_is_told_by_file_and_entry(case, path, tmp_path):
    edit, message = RECORDS[case]
    edit(content := torch.load(path))
    torch.save(content, file := tmp_path / "edited.ckpt")
    module = Module()
    with pytest.raises(CheckpointMismatch) as error:
        lit_peft.load(module, file)
    assert message in str(error.value) and file.name in str(error.value)
    check_untouched(module)
    for run in (
        lambda: trainer(method()).test(Module(), loader(), file),
        lambda: fit_toy(Module(), method(), ckpt_path=file),
    ):
        with pytest.raises(CheckpointMismatch) as error:
            run()
        assert message in str(error.value) and str(file) in str(error.value)


def check_untouched(module: Module) -> None:
    assert registry(module) is None and type(module) is Module
    assert_same(snapshot(module), snapshot(Module()))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("content", [3, [1], None, "text"])
def test_a_file_that_holds_no_dict_is_told(content, tmp_path):
    torch.save(content, file := tmp_path / "odd.ckpt")
    for run in (lambda: lit_peft.load(Module(), file), lambda: trainer(method()).test(Module(), loader(), file)):
        with pytest.raises(
            CheckpointMismatch, match=rf"odd\.ckpt holds a {type(content).__name__}; a checkpoint holds a"
        ):
            run()


def test_an_archive_without_a_pickle_that_can_be_read_is_told(path, tmp_path):
    import zipfile

    for number, pickled in enumerate((b"", b"\x80", b"\x80\x02}q\x00X", b"\x80\x02h\x05.", b"garbage")):
        file = tmp_path / f"{number}.ckpt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
        with pytest.raises(CheckpointMismatch, match=rf"{number}\.ckpt .*, or is no checkpoint"):
            lit_peft.load(Module(), file)


def test_objects_of_other_classes_are_named_and_not_made(path, tmp_path):
    content = torch.load(path) | {"more": Path("x")}
    torch.save(content, file := tmp_path / "odd.ckpt")
    for run in (lambda: lit_peft.load(Module(), file), lambda: trainer(method()).test(Module(), loader(), file)):
        with pytest.raises(
            CheckpointMismatch, match=r"odd\.ckpt holds more than tensors .*pathlib.*could run anything"
        ):
            run()


JUNK = (torch.ones(7), torch.tensor(1), torch.nan * torch.ones(3), (1, 2), 3j, b"x", {1: 2}, {(1, 2): 3}, torch.float32)


def mutated(content: dict, rng: random.Random) -> dict:
    """Edits of the record, and of tensors."""
    content = copy.copy(content)
    for _ in range(rng.choice((1, 1, 2))):
        entry = rng.choice(("lit_peft", "lit_peft", "lit_peft", "state_dict"))
        if entry == "lit_peft" and rng.random() < 0.8:
            content[entry] = edited(content[entry], rng)
            continue
        part = content[entry] = copy.copy(content[entry])
        key = rng.choice([*part] if isinstance(part, dict) and part else [0])
        if not isinstance(part, dict):
            continue
        how = rng.choice(("junk", "out", "other", "more"))
        if how == "junk":
            part[key] = rng.choice(JUNK)
        elif how == "out":
            part.pop(key, None)
        elif how == "other" and isinstance(part[key], torch.Tensor):
            t = part[key]
            part[key] = rng.choice(
                (t.int(), t.half(), t.T, t[:1], t.bool(), t.to_sparse(), t * torch.inf, t.double() + 3j)
            )
        else:
            part[rng.choice(("x", 3, None, f"{key}x", "net.first.peft.other.lora_A"))] = rng.choice(JUNK)
    return content


def test_any_edit_ends_in_a_sentence_or_a_module(path, tmp_path):
    whole, results = torch.load(path), Counter()
    for number in range(250):
        file = tmp_path / "edited.ckpt"
        torch.save(mutated(whole, random.Random(number)), file)
        module = Module()
        try:
            lit_peft.load(module, file)
        except ValueError as error:
            assert file.name in str(error) and len(str(error).splitlines()) == 1, number
            check_untouched(module)
            results["refused"] += 1
        else:
            assert all(p.isfinite().all() for p in module.parameters()), number
            results["loaded"] += 1
    print(dict(results))
    assert results["refused"] > 100 and results["loaded"] > 5


def test_any_edit_is_refused_by_a_trainer_or_does_no_harm(path, tmp_path):
    whole, results = torch.load(path), Counter()
    fit_toy(right := Module(), method(), max_steps=1)
    for number in range(250):
        content = mutated(whole, random.Random(1_000 + number))
        before = snapshot(right)
        try:
            right.on_load_checkpoint(content)
        except ValueError as error:
            assert len(str(error).splitlines()) <= 3, number
            assert_same(snapshot(right), before)
            results["refused"] += 1
        else:
            found = content["state_dict"]  # half precision is no other checkpoint
            assert all(torch.allclose(found[k].float(), v, atol=1e-3) for k, v in whole["state_dict"].items()), number
            results["taken"] += 1
    print(dict(results))
    assert results["refused"] > 100 and results["taken"] > 5


def test_a_resume_on_the_command_line_tells_it(tmp_path, capsys):
    run = fit(tmp_path, "--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_steps", "2")
    last = run / "checkpoints" / "last.ckpt"
    whole = torch.load(last, weights_only=True)
    for case in ("no methods", "digests that are none", "optimizers", "tensors in a list", "a list"):
        edit, message = RECORDS[case]
        edit(content := copy.deepcopy(whole))
        torch.save(content, last)
        for words in (["fit", "--run", str(run)], ["test", "--run", str(run), "--ckpt_path", str(last)]):
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main(words)
            said = capsys.readouterr().err
            said = said[said.index("lit-peft: ") :]
            assert end.value.code == 2 and "Traceback" not in said and len(said.strip().splitlines()) <= 3
            assert message in said and str(last) in said
