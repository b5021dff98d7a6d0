"""LoRA against HF PEFT's, value by value, and adapter folders that go both ways.

HF PEFT is the oracle: weights are copied into it by hand, not through our own folders, so that a mistake cannot
cancel out; the folders are then held against the same oracle.
"""

import copy
import json
import warnings
from dataclasses import replace
from typing import ClassVar

import lightning.pytorch as pl
import peft
import pytest
import torch
from models import inputs, logits, tiny
from safetensors.torch import load_file, save_file
from test_contract import Prefix
from torch import nn

from lit_peft.core.active import set_active
from lit_peft.core.addition import Call
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.files import write_folder
from lit_peft.core.folder_files import open_files
from lit_peft.core.registry import registry
from lit_peft.methods import BitFit, FullFineTuning, HiRA, LinearProbe, LoRA
from lit_peft.saving.folder import load, save

HEAD = {
    "distilbert": ["pre_classifier", "classifier"],
    "bert": ["bert.pooler", "classifier"],
    "gpt2": [],
    "llama": [],
}
TASK = {"distilbert": "SEQ_CLS", "bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
PATTERNS = {
    "ours": {"rank_pattern": {"*.0.*query": 2}, "alpha_pattern": {"*.1.*value": 5}},
    "theirs": {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {r"layer\.1\..*value": 5}},
}

# name: (model, our arguments, HF PEFT's beside r = 4 and alpha = 6)
CASES = {
    "linear": ("distilbert", {"target_modules": ["q_lin", "v_lin"]}, {}),
    "biases of the layers": ("distilbert", {"target_modules": "lin1", "bias": "lora_only"}, {"bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}, {"bias": "all"}),
    "patterns": ("bert", {"target_modules": ["query", "value"], **PATTERNS["ours"]}, PATTERNS["theirs"]),
    "rank-stabilised patterns": (
        "bert",
        {"target_modules": ["query", "value"], "use_rslora": True, **PATTERNS["ours"]},
        {"use_rslora": True, **PATTERNS["theirs"]},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}, {"bias": "lora_only"}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, {"use_rslora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}, {}),
}


def pair(case: str, tmp_path=None) -> tuple[str, nn.Module, peft.PeftModel]:
    """The same adapter twice, attached by us and by HF PEFT, with the same values copied by hand."""
    name, ours, theirs = CASES[case]
    model = tiny(name)
    targets = ours["target_modules"]
    config = peft.LoraConfig(
        task_type=TASK[name],
        r=4,
        lora_alpha=6,
        target_modules=[targets] if isinstance(targets, str) else targets,
        modules_to_save=list(HEAD[name]) or None,  # HF PEFT appends to the list it is given
        **theirs,
    )
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    LoRA(r=4, alpha=6, dropout=0.0, train_also=HEAD[name], **ours).attach(model)
    perturb(model)
    with torch.no_grad():
        for mine, its in twins(model, reference):
            its.copy_(mine)
    return name, model, reference


def perturb(model: nn.Module) -> None:
    """Moves all that trains, additions further, since random models hardly hear a change of their queries."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = 0.7 if ".peft." in name else 0.1
                parameter.add_(step * torch.randn(parameter.shape, generator=generator))


def twins(model: nn.Module, reference: peft.PeftModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each trainable parameter of ours with HF PEFT's; both have no other."""
    theirs = {n.removeprefix("base_model.model."): p for n, p in reference.named_parameters() if p.requires_grad}
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, _, tensor = name.partition(".peft.default.")
        owner, _, leaf = name.rpartition(".")
        candidates = [
            f"{layer}.{tensor}.default.weight",
            f"{layer}.{tensor.replace('lora_', 'lora_embedding_')}.default",
            f"{owner}.base_layer.{leaf}",
            f"{owner}.modules_to_save.default.{leaf}",
            f"{owner.rpartition('.')[0]}.modules_to_save.default.{owner.rpartition('.')[2]}.{leaf}",
            name,
        ]
        (match,) = [c for c in candidates if c in theirs]
        found.append((parameter, theirs.pop(match)))
    assert not theirs, f"HF PEFT trains more: {list(theirs)}"
    return found


def check_equal(name: str, model: nn.Module, reference: nn.Module) -> None:
    torch.testing.assert_close(logits(model, name), logits(reference, name), rtol=1e-5, atol=1e-5)


def backward(name: str, model: nn.Module) -> None:
    logits(model, name).square().mean().backward()


def opened_by_peft(name: str, folder) -> peft.PeftModel:
    """What HF PEFT makes of a folder on the same base; any warning of its is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(tiny(name), str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
class TestLoRAEqualsHFPeft:
    def test_outputs_and_gradients(self, case):
        name, model, reference = pair(case)
        assert (logits(model, name) - logits(tiny(name), name)).abs().max() > 1e-2
        check_equal(name, model, reference)
        backward(name, model)
        backward(name, reference)
        gradients = [(mine.grad, its.grad) for mine, its in twins(model, reference)]
        assert sum(mine is not None and mine.abs().max() > 1e-5 for mine, _ in gradients) > 0.6 * len(gradients)
        for mine, its in gradients:
            assert (mine is None) == (its is None)
            if mine is not None:
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)

    def test_merged_weights(self, case):
        _, model, reference = pair(case)
        merged = reference.merge_and_unload()
        for path in registry(model).adapters["default"].sites:
            layer = model.get_submodule(path)
            stored = merged.get_submodule(path).weight
            expected = stored.T if type(layer).__name__ in ("Conv1D", "Embedding") else stored
            torch.testing.assert_close(Call(layer, layer.peft.chain()).matrix(), expected, rtol=1e-5, atol=1e-6)

    def test_ours_opens_in_hf_peft_and_here(self, case, tmp_path):
        name, model, reference = pair(case)
        save(model, tmp_path)
        opened = opened_by_peft(name, tmp_path)
        check_equal(name, opened, reference)
        opened.save_pretrained(tmp_path / "again")
        theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "again", tmp_path))
        assert set(ours) <= set(theirs)
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
        twin = tiny(name)
        adapter = load(twin, tmp_path)
        assert torch.equal(logits(twin, name), logits(model, name))
        assert adapter == replace(registry(model).adapters["default"], prepared=True, source=adapter.source)
        assert {n for n, p in twin.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }

    def test_theirs_opens_here(self, case, tmp_path):
        name, model, reference = pair(case)
        reference.save_pretrained(tmp_path)
        twin = tiny(name)
        load(twin, tmp_path, "theirs")
        check_equal(name, twin, reference)
        assert {n.replace(".theirs.", ".default.") for n, p in twin.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        save(twin, tmp_path / "again", "theirs")
        check_equal(name, opened_by_peft(name, tmp_path / "again"), reference)


def scale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            module.scaling *= 1.01


def swap(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A.shape == module.lora_B.T.shape:
            module.lora_A.data, module.lora_B.data = module.lora_B.data.T.clone(), module.lora_A.data.T.clone()


def change_alpha(path) -> None:
    forget_record(path)  # which would contradict it
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 6.06}))


def swap_tensors(path) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [k for k in tensors if ".lora_A." in k]:
        twin = key.replace(".lora_A.", ".lora_B.")
        tensors[key], tensors[twin] = tensors[twin].T.contiguous(), tensors[key].T.contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(("fault", "case"), [(swap, "linear"), *((scale, case) for case in CASES)])
def test_the_comparison_sees_a_fault_in_the_layer(fault, case):
    name, model, reference = pair(case)
    fault(model)
    with pytest.raises(AssertionError, match="not close"):
        check_equal(name, model, reference)


@pytest.mark.parametrize("fault", [change_alpha, swap_tensors])
def test_the_comparison_sees_a_fault_in_the_folder(fault, tmp_path):
    name, model, reference = pair("linear")
    save(model, tmp_path)
    fault(tmp_path)
    twin = tiny(name)
    load(twin, tmp_path)
    for opened in (twin, opened_by_peft(name, tmp_path)):
        with pytest.raises(AssertionError, match="not close"):
            check_equal(name, opened, reference)


# ------------------------------------------------------------------------------- what trains beside adapters


def check_both_ways(name: str, model: nn.Module, folder, base=None) -> None:
    """Saved, the adapter gives the same logits in HF PEFT, merged there too, and bit for bit here."""
    base = base or tiny(name)
    expected = logits(model, name)
    assert (expected - logits(base, name)).abs().max() > 1e-3
    save(model, folder)
    twin = copy.deepcopy(base)
    load(twin, folder)
    assert torch.equal(logits(twin, name), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(logits(opened, name), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(opened.merge_and_unload(), name), expected, rtol=1e-5, atol=1e-6)


WITHOUT_LORA = {
    "biases": ("distilbert", BitFit()),
    "biases and a head": ("bert", BitFit(train_also=["classifier"])),
    "biases of a decoder": ("gpt2", BitFit()),
    "head": ("distilbert", LinearProbe(train_also=HEAD["distilbert"])),
    "half a head": ("distilbert", LinearProbe(train_also=["pre_classifier"])),
    "head that is the embedding": ("gpt2", LinearProbe(train_also=["lm_head"])),
    "untrained head": ("distilbert", LoRA(r=4, alpha=64, target_modules="ffn")),
    "head of several layers": ("roberta", LoRA(r=2, train_also=["classifier"])),
    "encoder and decoder": ("t5", LoRA(r=2, target_modules=["attention", "wo"])),
    "adapted head": ("distilbert", LoRA(r=2, target_modules="all-linear")),
    "whole blocks": ("llama", LinearProbe(train_also=["model.layers"])),
    "trained norm": ("llama", LoRA(r=4, train_also=["model.norm"])),
    "some biases": ("bert", LoRA(r=4, train_also=["0.output.dense.bias"])),
}


@pytest.mark.parametrize("case", WITHOUT_LORA)
def test_what_trains_in_the_base_goes_both_ways(case, tmp_path):
    name, method = WITHOUT_LORA[case]
    model = tiny(name)
    copy.deepcopy(method).attach(model)
    perturb(model)
    check_both_ways(name, model, tmp_path)


def test_a_new_head_and_pooler_need_not_be_in_the_base(tmp_path):
    model = tiny("bert")
    LoRA(r=4, train_also=HEAD["bert"]).attach(model)
    perturb(model)
    base = tiny("bert")
    for head in (base.bert.pooler.dense, base.classifier):
        nn.init.normal_(head.weight)
    check_both_ways("bert", model, tmp_path, base)


def test_convolutions(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (1, 2))).eval()

    x = torch.randn(2, 3, 9, 9)
    model = net()
    LoRA(r=2, alpha=6, target_modules=["0", "2"]).attach(model)
    perturb(model)
    save(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert (model(x) - net()(x)).abs().max() > 1e-2
    torch.testing.assert_close(opened(x), model(x), rtol=1e-5, atol=1e-6)
    opened.save_pretrained(tmp_path / "theirs")
    twin = net()
    load(twin, tmp_path / "theirs")
    assert torch.equal(twin(x), model(x))


def test_running_statistics_go_with_the_biases_beside_them(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 5))

    x = torch.randn(8, 3, 9, 9) + 3
    model, twin = net(), net().eval()
    BitFit().attach(model)
    model.train()(x)
    perturb(model.eval())
    save(model, tmp_path)
    load(twin, tmp_path)
    opened = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    for module in (twin, opened):
        assert torch.equal(module(x), model(x))


def test_a_path_that_ends_with_another_keeps_its_rank(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"lin": nn.Linear(8, 8), "a": nn.ModuleDict({"lin": nn.Linear(8, 8)})})

    model, twin = net(), net()
    LoRA(r=4, target_modules="lin", rank_pattern={"re:lin": 2, "re:a.lin": 3}, alpha_pattern={"re:lin": 5}).attach(
        model
    )
    save(model, tmp_path)
    forget_record(tmp_path)
    load(twin, tmp_path)
    opened = peft.PeftModel.from_pretrained(net(), str(tmp_path)).base_model.model
    for path in ("lin", "a.lin"):
        ours, theirs = (m.get_submodule(path).peft["default"] for m in (model, twin))
        assert (ours.lora_A.shape, ours.alpha) == (theirs.lora_A.shape, theirs.alpha)
        layer = opened.get_submodule(path)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (len(ours.lora_A), ours.alpha)


# ----------------------------------------------------------------------------------------- LightningModules


class Encoder(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.encoder = tiny(name)


class Task(pl.LightningModule):
    """Holds its model two attributes deep."""

    def __init__(self, name: str = "distilbert"):
        super().__init__()
        self.net = Encoder(name)
        self.extra = nn.Linear(2, 2)


class OtherTask(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny("distilbert")

    def training_step(self, batch, index):
        return logits(self.model, "distilbert").square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_folder_belongs_to_the_model_not_to_the_module_around_it(tmp_path):
    task = Task()
    method = LoRA(r=4, target_modules="*.transformer.layer.1.*.[qv]_lin", rank_pattern={"net.*.q_lin": 2})
    method.attach(task)
    perturb(task)
    expected = logits(task.net.encoder, "distilbert")
    save(task, tmp_path)
    keys = {key.partition(".layer.")[0] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys >= {"base_model.model.distilbert.transformer", "base_model.model.classifier.weight"}
    torch.testing.assert_close(logits(opened_by_peft("distilbert", tmp_path), "distilbert"), expected)
    bare, same, other = tiny("distilbert"), Task(), OtherTask()
    for module, model in ((bare, bare), (same, same.net.encoder), (other, other.model)):
        assert torch.equal(logits(model, "distilbert"), logits(tiny("distilbert"), "distilbert"))
        adapter = load(module, tmp_path)
        assert torch.equal(logits(model, "distilbert"), expected)
        assert adapter.spec == registry(task).adapters["default"].spec
        save(module, tmp_path / "again")
        twin = tiny("distilbert")
        load(twin, tmp_path / "again")
        assert torch.equal(logits(twin, "distilbert"), expected)


def test_a_loaded_adapter_trains_on(tmp_path):
    _, _, reference = pair("linear")
    reference.save_pretrained(tmp_path)
    task = OtherTask()
    adapter = load(task, tmp_path)
    before = {name: parameter.clone() for name, parameter in task.named_parameters()}
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[LoRA(**adapter.spec["init_args"])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, [0])
    moved = {name for name, parameter in task.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == registry(task).trainable_names()


def test_one_of_two_adapters_is_saved(tmp_path):
    model = tiny("distilbert")
    LoRA(r=4, target_modules="q_lin", name="one").attach(model)
    perturb(model)
    expected = logits(model, "distilbert")
    LoRA(r=2, target_modules="v_lin", name="two").attach(model)
    save(model, tmp_path, "one")
    twin = tiny("distilbert")
    load(twin, tmp_path, "first")
    assert torch.equal(logits(twin, "distilbert"), expected)
    load(twin, tmp_path, "second")  # onto a module that carries an adapter already
    assert set(registry(twin).adapters) == {"first", "second"}


def test_a_head_that_another_adapter_trains_is_left_alone(tmp_path):
    model = tiny("distilbert")
    LoRA(r=4).attach(model)
    save(model, tmp_path)  # holds the frozen head, which HF PEFT wants for a sequence classifier
    twin = tiny("distilbert")
    LinearProbe(train_also=HEAD["distilbert"], name="head").attach(twin)
    perturb(twin)
    expected = twin.classifier.weight.clone()
    load(twin, tmp_path)
    assert torch.equal(twin.classifier.weight, model.classifier.weight)
    set_active(twin, ["default", "head"])
    assert torch.equal(twin.classifier.weight, expected)


def test_the_same_adapter_gives_the_same_config(tmp_path):
    texts = []
    for folder in ("one", "two"):
        model = tiny("bert")
        LoRA(r=4, train_also=["classifier"]).attach(model)
        save(model, tmp_path / folder)
        texts.append((tmp_path / folder / "adapter_config.json").read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("name", "targets", "written"),
    [
        ("roberta", ["query", "attention.output.dense", "ffn"], ["dense", "query"]),  # the head's dense is trained
        ("bert", "attention.output.dense", [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)]),
    ],
)
def test_targets_are_short_names_where_these_are_enough(name, targets, written, tmp_path):
    model = tiny(name)
    LoRA(r=4, target_modules=targets, train_also=["classifier"]).attach(model)
    save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == written


# ------------------------------------------------------------------------------------------------ refusals


UNSAVABLE = {
    "everything trains": (lambda: tiny("bert"), FullFineTuning(), "trains every parameter"),
    "a lone weight": (
        lambda: tiny("bert"),
        LoRA(r=4, train_also=["0.attention.output.LayerNorm.weight"]),
        r"LayerNorm\.weight trains alone",
    ),
    "outside the model": (Task, LoRA(r=2, target_modules=["q_lin", "extra"]), "extra .*lies outside"),
    "an ending that means more": (
        lambda: tiny("distilbert"),
        LoRA(r=2, target_modules="all-linear", train_also=["classifier"]),
        "pre_classifier is adapted, but",
    ),
    "a dilated convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 2, dilation=2)),
        LoRA(r=1, target_modules="0"),
        "no groups, dilation",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_hf_peft_cannot_hold_is_refused(case, tmp_path):
    make, method, message = UNSAVABLE[case]
    model = make()
    copy.deepcopy(method).attach(model)
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_names_the_adapters_that_there_are(tmp_path):
    model = tiny("bert")
    with pytest.raises(ValueError, match="no adapter 'default'; it has none"):
        save(model, tmp_path)
    LoRA(r=2, name="mine").attach(model)
    with pytest.raises(ValueError, match=r"no adapter 'default'; it has \['mine'\]"):
        save(model, tmp_path)


def edit(**entries):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def rewrite(change):
    """Changes the tensors of a folder, which then has no record of ours."""

    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(change(tensors) or tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return apply


def forget_record(folder):
    rewrite(lambda tensors: None)(folder)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without(part):
    def change(tensors):
        return {key: value for key, value in tensors.items() if part not in key}

    return rewrite(change)


def in_record(**entries):
    """Changes our record as one who writes such folders would, with its digests."""

    def change(folder):
        config, _, record = open_files(folder)
        write_folder(folder, config, load_file(folder / "adapter_model.safetensors"), record | entries)

    return change


def other_values():
    model = tiny("distilbert")
    with torch.no_grad():
        model.distilbert.transformer.layer[1].ffn.lin1.weight.add_(0.01)
    return model


def both(first, second):
    return lambda folder: (first(folder), second(folder))


PLUGIN = {"default": {"class_path": "os.system", "init_args": {}}}
DISTILBERT = lambda: tiny("distilbert")  # noqa: E731
FOREIGN = forget_record
UNLOADABLE = {
    "truncated": (truncate, DISTILBERT, "is damaged"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), DISTILBERT, "is damaged"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), DISTILBERT, "holds list"),
    "missing": (lambda f: (f / "adapter_config.json").unlink(), DISTILBERT, "no adapter folder: it has no adapter_c"),
    "a pickle": (pickle_only, DISTILBERT, "adapter_model.bin is a pickle"),
    "a newer format": (in_record(format_version=99), DISTILBERT, "format version 99; this release reads up to 1"),
    "a tensor missing": (
        in_record(base=["distilbert.embeddings.LayerNorm.weight"], head=[]),
        DISTILBERT,
        "holds no distilbert.embeddings.LayerNorm.weight, which its adapter trains",
    ),
    "not a method": (in_record(methods=PLUGIN), DISTILBERT, "made with os.system, which is not here"),
    "other values": (lambda f: None, other_values, "another base model: .*lin1.weight holds other values"),
    "another model": (lambda f: None, lambda: tiny("bert"), "another base model: the base has no distilbert"),
    "theirs, another model": (
        FOREIGN,
        lambda: tiny("bert"),
        r"holds distilbert\.\S+, for which BertFor\w+ has no layer",
    ),
    "no peft_type": (both(FOREIGN, lambda f: (f / "adapter_config.json").write_text("{}")), DISTILBERT, "no peft_type"),
    "another method": (
        both(FOREIGN, edit(peft_type="LOHA")),
        DISTILBERT,
        "'LOHA' has no method here; known: ADALORA, HIRA, IA3",
    ),
    "DoRA": (both(FOREIGN, edit(use_dora=True)), DISTILBERT, r"lacks .*lora_magnitude_vector"),
    "replicated": (both(FOREIGN, edit(layer_replication=[[0, 1]])), DISTILBERT, r"layer_replication=\[\[0, 1\]\]"),
    "tokens": (both(FOREIGN, edit(trainable_token_indices=[1])), DISTILBERT, r"trainable_token_indices=\[1\]"),
    "aLoRA": (both(FOREIGN, edit(alora_invocation_tokens=[1])), DISTILBERT, r"alora_invocation_tokens=\[1\]"),
    "PiSSA": (both(FOREIGN, edit(init_lora_weights="pissa")), DISTILBERT, "'pissa' has changed the base too"),
    "another rank": (both(FOREIGN, edit(r=3)), DISTILBERT, r"lora_A.weight has shape \[4, 16\] .* and \[3, 16\]"),
    "a tensor too few": (without("layer.1.attention.q_lin.lora_B"), DISTILBERT, "lacks .*q_lin.lora_B.weight"),
    "a tensor too many": (
        rewrite(lambda t: t | {"base_model.model.distilbert.transformer.layer.0.ffn.lin1.odd": torch.ones(2)}),
        DISTILBERT,
        "lacks .*lin1.lora_A.weight",
    ),
    "a base tensor that differs": (
        rewrite(lambda t: t | {"base_model.model.distilbert.embeddings.word_embeddings.weight": torch.ones(50, 16)}),
        DISTILBERT,
        "word_embeddings.weight, which it does not train, holds other values",
    ),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_changes(case, tmp_path):
    damage, make, message = UNLOADABLE[case]
    trained = tiny("distilbert")
    LoRA(r=4, target_modules="q_lin", train_also=HEAD["distilbert"]).attach(trained)
    perturb(trained)
    save(trained, tmp_path)
    damage(tmp_path)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((CheckpointMismatch, FileNotFoundError), match=message):
        load(model, tmp_path)
    assert registry(model) is None
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_a_head_that_the_module_trains_must_be_in_the_folder(tmp_path):
    model = tiny("distilbert")
    LoRA(r=4).attach(model)
    save(model, tmp_path)
    task = Task()
    task.train_also = ["extra"]
    with pytest.raises(CheckpointMismatch, match=r"holds no extra\.bias, which this module's train_also names"):
        load(task, tmp_path)
    assert registry(task) is None


def test_load_refuses_a_taken_name_and_an_unclear_model(tmp_path):
    model = tiny("distilbert")
    LoRA(r=4).attach(model)
    save(model, tmp_path)
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        load(model, tmp_path)
    two = nn.ModuleDict({"teacher": tiny("distilbert"), "student": tiny("distilbert")})
    with pytest.raises(ValueError, match=r"several models \(teacher, student\)"):
        load(two, tmp_path)


def test_of_two_models_the_adapted_one_is_saved(tmp_path):
    two = nn.ModuleDict({"teacher": tiny("distilbert"), "student": tiny("distilbert")})
    LoRA(r=4, target_modules="re:student.*v_lin").attach(two)
    perturb(two)
    save(two, tmp_path)
    twin = tiny("distilbert")
    load(twin, tmp_path)
    assert torch.equal(logits(twin, "distilbert"), logits(two["student"], "distilbert"))


# ----------------------------------------------------------------------------------- a method of one's own


class PrefixByPeft(Prefix):
    """A prompt method: all its tensors side by side in one, and no layer named."""

    hf_peft: ClassVar = {"peft_type": "PREFIX_TUNING"}

    def to_hf_peft(self, sites):
        n, width = sites[0][1].key.shape
        entries = {"num_virtual_tokens": n, "token_dim": width, "num_layers": len(sites)}
        entries |= {"num_attention_heads": sites[0][0].layer.num_heads, "num_transformer_submodules": 1}
        return entries, {"prompt_embeddings": [t for _, prefix in sites for t in (prefix.key, prefix.value)]}


def test_a_method_of_ones_own_takes_part(tmp_path):
    model = tiny("llama")
    HiRA(r=2, target_modules=["q_proj", "up_proj"], train_also=["lm_head"]).attach(model)
    perturb(model)
    check_both_ways("llama", model, tmp_path)


def test_a_prompt_method_takes_part(tmp_path):
    model = tiny("gpt2")
    PrefixByPeft(target_modules="attn", train_also=["transformer.ln_f"]).attach(model)
    perturb(model)
    save(model, tmp_path)
    twin = tiny("gpt2")
    load(twin, tmp_path)
    assert torch.equal(logits(twin, "gpt2"), logits(model, "gpt2"))
    opened = opened_by_peft("gpt2", tmp_path)
    n = model.transformer.h[0].attn.peft["default"].key.shape[0]
    ours = model(**inputs("gpt2"), position_ids=torch.arange(n, n + 6).expand(2, -1)).logits
    torch.testing.assert_close(ours, logits(opened, "gpt2"), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sharded


def test_a_sharded_adapter_is_saved_whole(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = tiny("distilbert")
    LoRA(r=4, train_also=["classifier"]).attach(model)
    perturb(model)
    expected = logits(model, "distilbert")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert hasattr(model.classifier.weight, "full_tensor")
        save(model, tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    twin = tiny("distilbert")
    load(twin, tmp_path)
    assert torch.equal(logits(twin, "distilbert"), expected)
