"""Saving, resuming and loading on a quantised base; bases that transformers has loaded in 4 or 8 bit."""

import re
import warnings
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import transformers as tf
from models import logits, tiny
from test_merge_quantized import FEW
from test_tasks import data
from test_tasks import trainer as task_trainer
from torch import nn
from toys import LORA_KEYS, Module, fit, loader, lora, net_lora, saved, trainer

import lit_peft
from lit_peft import IA3, AdaLoRA, BitFit, DoRA, HiRA, LoRA, VeRA
from lit_peft.callbacks import ReproducibleSteps
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import make_quantizer, parse, quantize_base, recognise, stored_as
from lit_peft.core.registry import registry
from lit_peft.demo import ENCODER
from lit_peft.saving.adapter_folder import AdapterFolder
from lit_peft.saving.folder_record import open_folder
from lit_peft.tasks import TextClassification
from lit_peft.tasks.loading import BaseStorage, load_classifier
from lit_peft.testing.states import assert_same, perturb, snapshot

NF4 = {"mode": "nf4", "compute_dtype": "float32"}
OTHERS = {
    "fp4": NF4 | {"mode": "fp4"},
    "blocks of 128": NF4 | {"block_size": 128},
    "scales as they are": NF4 | {"double_quant": False},
    "8 bit": {"mode": "int8"},
    "as it is": None,
}

TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
STORED = [
    pytest.param(quantize, id=name) for name, quantize in {"nf4": NF4, **OTHERS}.items() if quantize is not None
] + [pytest.param({"mode": "int8_torchao"}, id="torchao", marks=TORCHAO)]


def base(quantize=None, seed=0) -> Module:
    """A module that comes quantised."""
    module = Module(seed=seed)
    if quantize is not None:
        quantize_base(module, make_quantizer(quantize))
    return module


def codes(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    layers = {path: module.get_submodule(path) for path in stored_as(module)}
    return {path: layer_ops(layer).stored(layer) for path, layer in layers.items()}


def assert_same_codes(one: nn.Module, other: nn.Module, constants: bool = True) -> None:
    first, second = codes(one), codes(other)
    assert stored_as(one) == stored_as(other) and first
    for path, tensors in first.items():
        pairs = list(zip(tensors, second[path], strict=True))
        assert all(torch.equal(a, b) for a, b in (pairs if constants else pairs[:1])), path


# --------------------------------------------------------------------------------------------- a trainer's file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint and the folder of the same adapter, trained on NF4, and the module."""
    folder, module = tmp_path_factory.mktemp("run"), Module()
    path = saved(folder, module, net_lora(quantize=NF4))
    return path, lit_peft.save(module, folder / "adapter"), module


def test_a_checkpoint_holds_no_codes_and_no_constants(run):
    path, folder, _ = run
    content = torch.load(path, weights_only=True)
    assert set(content["state_dict"]) == LORA_KEYS
    assert not any("absmax" in str(key) for key in content)
    assert sum(t.nbytes for t in content["state_dict"].values()) == 4 * 2 * (4 + 8 + 8 + 8)
    digests = content["lit_peft"]["fingerprint"]
    assert digests["net.first.weight"].startswith("8x4:nf4 in blocks of 64, double:")
    assert len(open_folder(folder)[1]) == 4


def test_a_resumed_fit_ends_where_a_whole_one_does(tmp_path):
    whole, first, second = Module(), Module(), Module()
    fit(whole, net_lora(quantize="nf4"), max_epochs=2)
    path = saved(tmp_path, first, net_lora(quantize="nf4"))
    fit(second, net_lora(quantize="nf4"), ckpt_path=path, max_epochs=2)
    assert_same(snapshot(second), snapshot(whole))


APART = {
    "fp4": "quantize='nf4'), not 'fp4'.",
    "blocks of 128": "quantize.block_size=64), not 128.",
    "scales as they are": "quantize.double_quant=True), not False.",
    "8 bit": "quantize='nf4'), not 'int8'.",
    "as it is": "quantize='nf4'), not None.",
    "two": "quantize.block_size=64, quantize.double_quant=True), not quantize.block_size=128, "
    "quantize.double_quant=False.",
}
"""What is told of another `quantize`: the options that differ, and no other."""


@pytest.mark.parametrize("name", APART)
def test_a_resume_with_another_quantize_is_refused(run, name):
    quantize = {**OTHERS, "two": NF4 | {"block_size": 128, "double_quant": False}}[name]
    with pytest.raises(CheckpointMismatch, match=re.escape(f"was made with LoRA({APART[name]}") + "$"):
        fit(Module(), net_lora(quantize=quantize), ckpt_path=run[0], max_epochs=2)


@pytest.mark.parametrize("quantize", OTHERS.values(), ids=list(OTHERS))
def test_a_resume_on_a_base_that_comes_otherwise_is_refused(tmp_path, quantize):
    path = saved(tmp_path, base(NF4), net_lora())
    fit(base(NF4), net_lora(), ckpt_path=path, max_epochs=2)
    now = "not quantised" if quantize is None else rf"quantised \({make_quantizer(quantize).stored_as}\)"
    message = rf"net\.first\.weight is {now}.*quantised \(nf4 in blocks of 64, double\).*2 more of 8 differ"
    with pytest.raises(CheckpointMismatch, match=message):
        fit(base(quantize), net_lora(), ckpt_path=path, max_epochs=2)


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("which", [0, 1], ids=["checkpoint", "folder"])
class TestLoading:
    def test_onto_a_float_base_it_is_quantised_as_in_training(self, run, which):
        module = Module()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lit_peft.load(module, run[which])
        assert_same_codes(module, run[2])
        x = torch.randn(3, 4)
        assert torch.equal(module(x), run[2](x))

    def test_a_base_that_comes_so_is_recognised(self, run, which):
        module = base(NF4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lit_peft.load(module, run[which])
        x = torch.randn(3, 4)
        assert torch.equal(module(x), run[2](x))

    def test_a_base_may_be_left_as_it_is_with_one_warning(self, run, which):
        module = Module()
        with pytest.warns(UserWarning, match=r"net\.first\.weight and 2 more are not quantised here, and q") as caught:
            lit_peft.load(module, run[which], quantize=None)
        assert len([w for w in caught if "quantis" in str(w.message)]) == 1
        assert not stored_as(module)
        x = torch.randn(3, 4)
        difference = (module(x) - run[2](x)).abs().max()
        assert 0 < difference < 0.2

    def test_a_base_that_comes_otherwise_is_refused_or_taken_as_it_is(self, run, which):
        module = base(OTHERS["fp4"])
        with pytest.raises(CheckpointMismatch, match=r"fp4 .*not nf4 .*Take it as it is, quantize=None, or load"):
            lit_peft.load(module, run[which])
        assert registry(module) is None
        with pytest.warns(UserWarning, match=r"are quantised \(fp4 .* here, and quantised \(nf4 .* in training"):
            lit_peft.load(module, run[which], quantize=None)

    @pytest.mark.parametrize("quantize", [NF4, None], ids=["quantised", "float"])
    def test_another_base_is_refused(self, run, which, quantize):
        with pytest.raises(CheckpointMismatch, match=r"belongs to another base model: net\.first\.\w+ holds other v"):
            lit_peft.load(base(quantize, seed=1), run[which])

    @pytest.mark.parametrize("comes", ["quantised", "float"])
    def test_so_is_one_that_differs_in_a_quantised_weight_alone(self, run, which, comes):
        """Before it is quantised there is nothing to compare it with."""
        module = Module()
        with torch.no_grad():
            module.net.first.weight.neg_()
        if comes == "quantised":
            quantize_base(module, make_quantizer(NF4))
        with pytest.raises(CheckpointMismatch, match=r"another base model: net\.first\.weight holds other values\."):
            lit_peft.load(module, run[which])
        assert registry(module) is None

    @pytest.mark.parametrize("quantize", ["as trained", None, OTHERS["fp4"]], ids=["as trained", "none", "fp4"])
    def test_as_a_callback(self, run, which, quantize):
        module, expected = Module(), Module()
        callback = AdapterFolder(str(run[which]), **{} if quantize == "as trained" else {"quantize": quantize})
        rows = torch.cat(trainer(callback).predict(module, loader()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lit_peft.load(expected, run[which], **{} if quantize == "as trained" else {"quantize": quantize})
        assert torch.equal(rows, torch.cat([expected(x) for x, _ in loader()]))
        assert set(stored_as(module).values()) == set(stored_as(expected).values())


@pytest.mark.filterwarnings("ignore:.* quantised")
@pytest.mark.parametrize("method", [LoRA, partial(HiRA, r=4), DoRA, IA3, VeRA, AdaLoRA])
@pytest.mark.parametrize("here", ["nf4", "int8", None])
@pytest.mark.parametrize("trained_on", ["nf4", "int8", None])
def test_layers_that_store_weights_transposed_may_be_quantised_here_and_not_in_training(
    tmp_path, trained_on, here, method
):
    """GPT-2's, whose quantised layers store them as others do: `fan_in_fan_out` says nothing of the adapter."""
    model = tiny("gpt2")
    method(quantize=trained_on).attach(model)
    perturb(model)
    folder = lit_peft.save(model, tmp_path)
    other = tiny("gpt2")
    lit_peft.load(other, folder, quantize=here)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    loaded = {key: p for key, p in other.named_parameters() if p.requires_grad}
    assert trained.keys() == loaded.keys() and all(torch.equal(p, loaded[key]) for key, p in trained.items())
    if here == trained_on:
        assert torch.equal(logits(other, "gpt2"), logits(model, "gpt2"))


@pytest.mark.parametrize("quantize", STORED)
def test_a_base_that_was_quantised_from_bfloat16_is_the_same(tmp_path, quantize):
    """As one that is not quantised: there are other codes, but few, and scales that are rounded."""

    def model(dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(12))).to(dtype)

    trained = model()
    LoRA(r=2, target_modules=["0"], quantize=quantize).attach(trained)
    folder = lit_peft.save(trained, tmp_path)
    other = model(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lit_peft.load(other, folder)
    assert any((a != b).any() for path, (a, *_) in codes(trained).items() for b in codes(other)[path][:1])
    wrong = model(seed=1)
    wrong[11] = model()[11]
    with pytest.raises(CheckpointMismatch, match=r"0\.weight holds other values, and 10 more of 12 differ"):
        lit_peft.load(wrong, folder)


def scaled(by: float, quantize, seed=0) -> Module:
    """A module whose weights that come quantised are all multiplied by one number."""
    module = Module(seed=seed)
    with torch.no_grad():
        for layer in (module.net.first, module.net.second, module.net.unused):
            layer.weight.mul_(by)
    quantize_base(module, make_quantizer(quantize))
    return module


@pytest.mark.parametrize("quantize", STORED)
def test_a_base_with_the_same_codes_and_other_scales_is_refused(tmp_path, quantize):
    trained = base(quantize)
    path = saved(tmp_path, trained, net_lora())
    folder = lit_peft.save(trained, tmp_path / "adapter")
    first = r"another base model: net\.first\.weight holds other values, and 2 more of 8 differ\."
    for by in (0.5, 1.1, 2):
        other = scaled(by, quantize)
        if by != 1.1:
            assert_same_codes(trained, other, constants=False)
        for source in (path, folder):
            with pytest.raises(CheckpointMismatch, match=first):
                lit_peft.load(other, source)
            assert registry(other) is None
        with pytest.raises(CheckpointMismatch, match=first):
            fit(other, net_lora(), ckpt_path=path, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (path, folder):
            lit_peft.load(scaled(1, quantize), source)
    fit(scaled(1, quantize), net_lora(), ckpt_path=path, max_epochs=2)


def test_a_base_is_the_one_of_a_checkpoint_that_knows_no_scales(tmp_path):
    """As earlier releases wrote them."""
    path = saved(tmp_path, base(NF4), net_lora())
    content = torch.load(path, weights_only=True)
    digests = content["lit_peft"]["fingerprint"]
    assert sum("*" in digest for digest in digests.values()) == 3
    content["lit_peft"]["fingerprint"] = {name: digest.partition("*")[0] for name, digest in digests.items()}
    torch.save(content, path)
    for by in (1, 2):
        lit_peft.load(scaled(by, NF4), path)


def test_a_scale_that_is_no_number_is_another_one(tmp_path):
    path = saved(tmp_path, base(NF4), net_lora())
    content = torch.load(path, weights_only=True)
    digests = content["lit_peft"]["fingerprint"]
    digests["net.first.weight"] = digests["net.first.weight"].partition("*")[0] + "*large"
    torch.save(content, path)
    with pytest.raises(CheckpointMismatch, match=r"another base model: net\.first\.weight holds other values\."):
        lit_peft.load(base(NF4), path)


def test_an_adapter_that_was_trained_in_float_predicts_on_a_quantised_base(tmp_path):
    trained = Module()
    fit(trained, net_lora())
    folder = lit_peft.save(trained, tmp_path)
    module = base(NF4)
    with pytest.warns(
        UserWarning, match=r"net\.first\.weight and 2 more are quantised .* here, and not quantised in t"
    ):
        lit_peft.load(module, folder)
    x = torch.randn(3, 4)
    assert 0 < (module(x) - trained(x)).abs().max() < 0.2


# ------------------------------------------------------------------------------------------ models of transformers

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
CONFIGS = {
    "BERT": lambda: tf.BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES),
    "GPT-2": lambda: tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=16, pad_token_id=0),
    "Llama": lambda: tf.LlamaConfig(vocab_size=64, max_position_embeddings=16, pad_token_id=0, **SIZES),
    "T5": lambda: tf.T5Config(
        vocab_size=64,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
}
BACKBONES = ["demo", *CONFIGS]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Name -> folder of a classifier without its head."""
    folders = {"demo": ENCODER}
    for name, make in CONFIGS.items():
        folder = folders[name] = str(tmp_path_factory.mktemp("model"))
        torch.manual_seed(0)
        tf.AutoModelForSequenceClassification.from_config(make()).save_pretrained(folder)
    return folders


TRANSFORMERS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
OURS = {"nf4": NF4, "fp4": OTHERS["fp4"] | {"double_quant": False}, "int8": {"mode": "int8"}}


def loaded(folder, mode=None, **options):
    config = {} if mode is None else {"quantization_config": tf.BitsAndBytesConfig(**TRANSFORMERS[mode], **options)}
    torch.manual_seed(0)  # of a new head
    return tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **config)


def tokens(**more):
    return {
        "input_ids": torch.tensor([[3, 7, 11, 1], [8, 2, 31, 1]]),
        "attention_mask": torch.ones(2, 4).long(),
        **more,
    }


@pytest.mark.parametrize("mode", TRANSFORMERS)
@pytest.mark.parametrize("name", BACKBONES)
def test_quantising_in_place_gives_what_transformers_loads(backbones, name, mode):
    module = loaded(backbones[name])
    chosen = quantize_base(module, make_quantizer(OURS[mode]))
    left_alone = [path for path, layer in module.named_modules() if type(layer) is nn.Linear]
    theirs = loaded(backbones[name], mode, llm_int8_skip_modules=left_alone)
    lora(target_modules=chosen).attach(theirs)
    assert_same_codes(module, theirs)
    perturbed = [theirs(**tokens()).logits, module(**tokens()).logits]
    torch.testing.assert_close(*perturbed, rtol=1e-5, atol=1e-6)
    biases = {name: p for name, p in loaded(backbones[name]).named_parameters() if name.endswith("bias")}
    assert all(torch.equal(module.get_parameter(key), value) for key, value in biases.items())


@pytest.mark.parametrize("mode", TRANSFORMERS)
def test_a_model_that_transformers_loaded_trains_saves_and_resumes(backbones, mode, tmp_path):
    class Task(Module):
        def build(self, where):
            if where == self.built:
                self.net = loaded(backbones["GPT-2"], mode)

        def training_step(self, batch, index):
            return self.net(**tokens(labels=torch.tensor([0, 1]))).loss * (1 + batch[0].sum().abs().detach())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    method = lambda **more: lora(train_also=["*.score"], **more)  # noqa: E731
    whole, again = Task(), Task()
    before = {path: [t.clone() for t in tensors] for path, tensors in codes(whole).items()}
    path = saved(tmp_path, whole, method())
    content = torch.load(path, weights_only=True)["state_dict"]
    assert all(".peft." in key or ".score." in key for key in content)
    assert {path: len(t) for path, t in codes(whole).items()}.keys() == before.keys() and len(before) == 8
    for key, tensors in codes(whole).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[key], strict=True))
    fit(again, method(), ckpt_path=path, max_epochs=1)
    assert_same(snapshot(again), snapshot(whole))
    fit(Task(), method(quantize=OURS[mode]))  # which says what it is
    other = "fp4" if mode == "int8" else "int8"
    with pytest.raises(ValueError, match=rf"is quantised already, {mode}.*, not {other}"):
        fit(Task(), method(quantize=OURS[other]))


# ---------------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("quantize", [NF4, OURS["fp4"], {"mode": "int8"}, NF4 | {"block_size": 128}], ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_task_loads_what_quantising_in_place_gives(backbones, name, quantize):
    """Straight from the file, or, for what transformers has no word for, afterwards."""
    names, methods = ["a", "b"], [LoRA(r=2, quantize=quantize)]
    storage = BaseStorage(parse(quantize), methods, "model", torch.device("cpu"))
    models = []
    for given in (storage, None):
        torch.manual_seed(0)
        model, fresh = load_classifier(backbones[name], names, torch.float32, given)
        assert bool(stored_as(model)) == (given is not None and quantize.get("block_size", 64) == 64)
        holder = nn.ModuleDict({"model": model})
        LoRA(r=2, dropout=0.0, quantize=quantize, train_also=[f"model.{key}" for key in fresh]).attach(holder)
        models.append(holder)
    assert_same_codes(*models)
    logits = [model["model"].eval()(**tokens()).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


class TwoScores(tf.PreTrainedModel):
    """A model whose head, which is left alone, has a name that a layer of its body ends with; so has another layer."""

    config_class, base_model_prefix = tf.PretrainedConfig, "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("pre_score", "last", "not_last")})
        self.score = nn.Linear(64, 64)
        self.post_init()

    def get_input_embeddings(self):
        return None


@pytest.mark.parametrize("skip", [[], ["last"]])
@pytest.mark.parametrize("mode", FEW)
def test_names_that_end_with_others_are_told_apart(mode, skip, tmp_path):
    """transformers goes by endings and expressions: "score" would leave pre_score alone too."""
    torch.manual_seed(0)
    plain = TwoScores(tf.PretrainedConfig())
    plain.save_pretrained(tmp_path)
    quantize = {"mode": mode, "skip_modules": skip}
    with torch.device("meta"):
        skeleton = TwoScores(tf.PretrainedConfig())
    given = BaseStorage(quantize, [], "model", torch.device("cpu")).arguments(skeleton)
    loaded = TwoScores.from_pretrained(tmp_path, **given)
    recognise(loaded)
    chosen = quantize_base(plain, make_quantizer(quantize))
    assert len(chosen) == 3 - len(skip) and "score" not in chosen
    assert_same_codes(loaded, plain)


@pytest.mark.parametrize("quantize", [NF4, {"mode": "int8"}], ids=str)
def test_a_layer_that_the_checkpoint_lacks_is_a_plain_one_that_trains(tmp_path, quantize):
    """A pooler lies in the body, and a masked language model has none."""
    tf.BertForMaskedLM(CONFIGS["BERT"]()).save_pretrained(tmp_path)
    method = LoRA(r=2, quantize=quantize)
    storage = BaseStorage(parse(quantize), [method], "model", torch.device("cpu"))
    model, fresh = load_classifier(str(tmp_path), ["a", "b"], torch.float32, storage)
    assert "bert.pooler.dense.weight" in fresh and type(model.bert.pooler.dense) is nn.Linear
    model.train_also = fresh
    method.attach(model)
    assert len(stored_as(model)) == 12
    model(**tokens()).logits.sum().backward()
    assert model.bert.pooler.dense.weight.grad.any()
    assert not any("bitsandbytes" in str(hook) for hook in model.bert.pooler.dense._load_state_dict_pre_hooks.values())
    assert model.bert.pooler.dense.state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("mode", TRANSFORMERS)
def test_so_it_is_where_transformers_loads_it_outside_of_a_task(tmp_path, mode):
    tf.BertForMaskedLM(CONFIGS["BERT"]()).save_pretrained(tmp_path)
    model = loaded(tmp_path, mode)
    lora(train_also=["classifier"]).attach(model)
    assert type(model.bert.pooler.dense) is nn.Linear and len(stored_as(model)) == 12
    model(**tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("task"), TextClassification(backbone="demo")
    method = LoRA(r=4, dropout=0.0, quantize="nf4")
    fitted = task_trainer(method, max_epochs=1)
    fitted.fit(task, data())
    fitted.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", lit_peft.save(task, folder / "adapter"), task


def test_a_task_saves_its_adapter_alone(task_run):
    path, _, task = task_run
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".peft." in key or "classifier." in key for key in state)
    assert len(stored_as(task)) == 24 and not any("classifier" in key for key in stored_as(task))
    assert path.stat().st_size < 500_000


def test_a_task_resumes_exactly(tmp_path):
    def fitted(epochs, path=None):
        torch.manual_seed(0)
        task = TextClassification(backbone="demo", schedule="constant", warmup=0.0)
        run = task_trainer(
            LoRA(r=4, dropout=0.0, quantize="nf4"), BitFit(name="biases"), ReproducibleSteps(), max_epochs=epochs
        )
        run.fit(task, data(), ckpt_path=path)
        return run, task

    run, _ = fitted(1)
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert_same(snapshot(fitted(2, tmp_path / "run.ckpt")[1]), snapshot(fitted(2)[1]))


@pytest.mark.parametrize(
    "way", ["load_from_checkpoint", "load", "ckpt_path", "AdapterFolder", "AdapterFolder of a file"]
)
def test_a_task_predicts_what_it_did(task_run, way):
    path, folder, task = task_run
    expected = task_trainer().predict(task, data())
    if way == "load_from_checkpoint":
        again, run, given = TextClassification.load_from_checkpoint(path), task_trainer(), None
    elif way == "load":
        again, run, given = TextClassification(backbone="demo", label_names=task.label_names), task_trainer(), None
        lit_peft.load(again, folder)
    else:
        again, given = TextClassification(backbone="demo", label_names=task.label_names), None
        callback = LoRA(r=4, dropout=0.0, quantize="nf4")
        if way == "ckpt_path":
            given = path
        else:
            callback = AdapterFolder(str(folder if way == "AdapterFolder" else path))
        run = task_trainer(callback)
    assert run.predict(again, data(), ckpt_path=given) == expected
    assert_same_codes(again, task)
