"""Results taken up again outside of the run: checkpoints and folders on modules, and as callbacks of a trainer."""

import importlib

import lightning.pytorch as pl
import pytest
import torch
from models import hf_peft_classifier
from test_cli import SMALL, fit
from torch import nn
from toys import LORA_KEYS, Module, adapters, loader, net_lora, saved, trainer
from toys import fit as fit_toy

import lit_peft
from lit_peft.core.checkpoint import CheckpointMismatch, adapter_keys
from lit_peft.core.registry import registry
from lit_peft.demo import ENCODER
from lit_peft.methods import BitFit, FullFineTuning
from lit_peft.tasks import TextClassification

TEXTS = ["a great movie", "a dull and empty film"]


@pytest.fixture(scope="module", params=["LoRA", "FullFineTuning"])
def run(request, tmp_path_factory):
    """The folder of a short run."""
    root = tmp_path_factory.mktemp(request.param)
    options = ["--base_test", "false", "--method", request.param, "--data.label_column", "label"]
    return fit(root, "--config", "quickstart", *SMALL, *options, "--trainer.max_epochs", "1")


def probabilities(model: TextClassification) -> torch.Tensor:
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(ENCODER)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()({key: batch[key] for key in ("input_ids", "attention_mask")}).softmax(-1)


def test_a_task_is_rebuilt_from_its_checkpoint(run, tmp_path):
    path = run / "checkpoints" / "best.ckpt"
    model = TextClassification.load_from_checkpoint(path)
    content = torch.load(path, weights_only=True)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in content["state_dict"].items())
    assert set(registry(model).adapters) == {"default"} and not model.training
    assert model.label_names == ["negative", "positive"]
    again = TextClassification.load_from_checkpoint(str(path), learning_rate=0.5, map_location="cpu", strict=False)
    assert again.learning_rate == 0.5
    assert torch.equal(probabilities(again), probabilities(model))
    # And it goes on in trainers, with its method among the callbacks or without.
    data = lit_peft.data.TextClassificationDataModule(path="demo", limit_test=32, limit_train=32, limit_val=32)
    scores = trainer().test(model, data, verbose=False)
    assert scores == trainer().test(again, data, ckpt_path=path, verbose=False)
    more = trainer(max_steps=1)
    more.fit(model, data)
    more.save_checkpoint(tmp_path / "more.ckpt")
    usual = TextClassification.load_from_checkpoint(path, learning_rate=None)
    more = trainer(max_steps=1)
    more.fit(usual, data)  # at the rate of the method that made the checkpoint
    assert more.optimizers[0].param_groups[0]["initial_lr"] == (1e-3 if "LoRA" in str(run) else 5e-5)
    assert torch.load(tmp_path / "more.ckpt")["state_dict"].keys() == content["state_dict"].keys()


def test_a_wrong_base_or_argument_is_refused(run, tmp_path):
    from transformers import AutoModel

    path = run / "checkpoints" / "best.ckpt"
    with pytest.raises(TypeError, match="has no argument 'bakbone'; it has backbone, label_names"):
        TextClassification.load_from_checkpoint(path, bakbone="demo")
    other = AutoModel.from_pretrained(ENCODER)
    other.transformer.layer[0].ffn.lin1.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    if "FullFineTuning" in str(run):  # brings the whole model: no base is left to be wrong
        TextClassification.load_from_checkpoint(path, backbone=str(tmp_path / "other"))
        return
    with pytest.raises(CheckpointMismatch, match=r"best\.ckpt belongs to another base model: .*lin1\.weight holds"):
        TextClassification.load_from_checkpoint(path, backbone=str(tmp_path / "other"))


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("tree", ["lightning.pytorch", "pytorch_lightning"])
def test_a_foreign_class_is_told_to_load(strict, tree, tmp_path):
    from lit_peft.training.seam import guard_load_from_checkpoint

    library = importlib.import_module(tree)
    guard_load_from_checkpoint(importlib.import_module(f"{tree}.core.saving"))

    class Net(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    path = saved(tmp_path, Module(), net_lora())
    with pytest.raises(CheckpointMismatch, match=r"what LoRA trained, and not the base: build Net .*lit_peft\.load"):
        Net.load_from_checkpoint(path, strict=strict)
    torch.save({"state_dict": Net().state_dict(), "pytorch-lightning_version": pl.__version__}, tmp_path / "own.ckpt")
    assert isinstance(Net.load_from_checkpoint(tmp_path / "own.ckpt"), Net)


@pytest.mark.parametrize("built", ["init", "configure_model"])
def test_a_checkpoint_loads_into_a_module(built, tmp_path):
    trained = Module(built)
    path = saved(tmp_path, trained, net_lora(train_also=["head"]))
    module = Module(built)
    adapter = lit_peft.load(module, path)
    assert adapter.name == "default" and adapter.prepared
    assert adapters(module).keys() == adapters(trained).keys()
    assert all(torch.equal(value, adapters(trained)[key]) for key, value in adapters(module).items())
    x = loader().dataset[:][0]
    assert torch.equal(module(x), trained(x))
    # It trains on where the method comes with the trainer, and keeps to adapters where none does.
    fit_toy(module, net_lora(train_also=["head"]))
    alone = Module(built)
    lit_peft.load(alone, path)
    assert set(torch.load(saved(tmp_path, alone))["state_dict"]) == adapter_keys(trained)


def test_several_checkpoints_on_one_module(tmp_path):
    paths, outputs = [], []
    x = loader().dataset[:][0]
    for i, method in enumerate((net_lora(), net_lora(r=3))):
        (tmp_path / str(i)).mkdir()
        module = Module()
        paths.append(saved(tmp_path / str(i), module, method))
        outputs.append(module(x))
    module = Module()
    lit_peft.load(module, paths[0], "first")
    lit_peft.load(module, paths[1], "second")
    for name, output in zip(("first", "second"), outputs, strict=True):
        lit_peft.set_active(module, name)
        assert torch.equal(module(x), output)
    lit_peft.detach(module, "first")
    lit_peft.detach(module)
    assert torch.equal(module(x), Module()(x))


def test_a_checkpoint_of_several_adapters_keeps_their_names(tmp_path):
    trained = Module()
    path = saved(tmp_path, trained, net_lora(), BitFit(name="biases"))
    module = Module()
    assert lit_peft.load(module, path).name == "default"
    assert set(registry(module).adapters) == {"default", "biases"}
    assert all(torch.equal(value, adapters(trained)[key]) for key, value in adapters(module).items())


def damage(path, how):
    content = torch.load(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
        return
    if how == "foreign":
        del content["lit_peft"]
    if how == "newer":
        content["lit_peft"]["format_version"] = 99
    if how == "lacking":
        del content["state_dict"]["net.first.peft.default.lora_A"]
    if how == "holding":
        content["state_dict"]["net.stray"] = torch.zeros(1)
    if how == "misshapen":
        content["state_dict"]["net.first.peft.default.lora_A"] = torch.zeros(2, 9)
    if how == "unknown":
        content["lit_peft"]["methods"]["default"]["class_path"] = "elsewhere.Method"
    torch.save(content, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"run\.ckpt is no checkpoint, or is cut off \(500 bytes\)"),
        ("foreign", r"run\.ckpt was not written by a lit-peft method"),
        ("newer", "has format version 99; this release reads up to 1"),
        ("lacking", r"run\.ckpt lacks net\.first\.peft\.default\.lora_A\."),
        ("holding", r"run\.ckpt holds net\.stray, which has no place in this Module"),
        ("misshapen", r"net\.first\.peft\.default\.lora_A has shape \[2, 9\], and \[2, 4\] in the module"),
        ("unknown", r"made with elsewhere\.Method, which is not here: import elsewhere first"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_module_is_as_it_was(how, message, tmp_path):
    path = saved(tmp_path, Module(), net_lora())
    damage(path, how)
    module = Module()
    with pytest.raises(CheckpointMismatch, match=message):
        lit_peft.load(module, path)
    assert registry(module) is None and type(module) is Module
    assert module.state_dict().keys() == Module().state_dict().keys()
    if how in ("truncated", "foreign", "lacking"):
        with pytest.raises(CheckpointMismatch):
            trainer(net_lora()).test(Module(), loader(), path, verbose=False)


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*lost\.ckpt"):
        lit_peft.load(Module(), tmp_path / "lost.ckpt")


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_never_loses_adapters(strict):
    module = Module()
    fit_toy(module, net_lora())
    whole = module.state_dict()
    module.load_state_dict({key: whole[key] for key in LORA_KEYS}, strict=strict)
    lost = {key: value for key, value in whole.items() if not key.endswith("first.peft.default.lora_A")}
    with pytest.raises(CheckpointMismatch, match=r"lacks net\.first\.peft\.default\.lora_A; 1 tensors"):
        module.load_state_dict(lost, strict=strict)
    with pytest.raises(CheckpointMismatch, match=r"holds, without a place for it, net\.head\.peft\.default\.lora_A"):
        module.load_state_dict({**whole, "net.head.peft.default.lora_A": torch.zeros(2, 8)}, strict=strict)
    incomplete = {key: value for key, value in whole.items() if key != "net.head.bias"}
    if strict:
        with pytest.raises(RuntimeError, match=r"Missing key.*net\.head\.bias"):
            module.load_state_dict(incomplete)


def test_attach_is_the_methods_own():
    module = nn.Sequential(nn.Linear(4, 4))
    assert lit_peft.attach(module, lit_peft.LoRA(r=2, target_modules="0")) is registry(module).adapters["default"]


# ------------------------------------------------------------------------------------------------ AdapterFolder


def test_a_folder_as_a_callback(run):
    if "FullFineTuning" in str(run):
        pytest.skip("full fine-tuning leaves no adapter")
    model = TextClassification(label_names=["negative", "positive"])
    callback = lit_peft.AdapterFolder(str(run / "adapter"))
    data = lit_peft.data.TextClassificationDataModule(path="demo", limit_test=32)
    expected = trainer().predict(TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt"), data)
    assert trainer(callback).predict(model, data) == expected
    assert trainer(callback).predict(model, data) == expected  # the same module again
    assert callback.spec()["class_path"] == "lit_peft.methods.LoRA"
    with pytest.raises(ValueError, match=r"does not train: .*give the trainer that method"):
        trainer(callback).fit(TextClassification(), data)


def test_a_folder_of_hf_peft_as_a_callback(tmp_path):
    theirs = hf_peft_classifier(tmp_path)
    data = lit_peft.data.TextClassificationDataModule(path="demo", limit_test=32)
    model = TextClassification(label_names=["negative", "positive"])
    rows = [row for batch in trainer(lit_peft.AdapterFolder(str(tmp_path))).predict(model, data) for row in batch]
    batches = list(data.predict_dataloader())
    with torch.no_grad():
        logits = [theirs.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    expected = torch.cat(logits).softmax(-1)[:, 1]
    assert torch.allclose(torch.tensor([row["probabilities"]["positive"] for row in rows]), expected, atol=1e-6)


def test_full_fine_tuning_and_its_checkpoint(tmp_path):
    trained = Module()
    path = saved(tmp_path, trained, FullFineTuning())
    module = Module(seed=1)  # nothing of the base is left
    lit_peft.load(module, path)
    assert torch.equal(module(loader().dataset[:][0]), trained(loader().dataset[:][0]))


def test_classes_of_other_names_are_told(tmp_path):
    trained = TextClassification(label_names=["negative", "positive"])
    trained.configure_model()
    net_lora(target_modules=["query"]).attach(trained)
    lit_peft.save(trained, tmp_path)
    other = TextClassification(label_names=["ham", "spam"])
    with pytest.warns(
        UserWarning, match="trained on the classes negative, positive; TextClassification names them ham"
    ):
        lit_peft.load(other, tmp_path)
