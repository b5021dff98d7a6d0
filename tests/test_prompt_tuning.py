"""Prompt tuning and P-tuning: against HF PEFT, behind every head, in generation, saved and taken up again."""

import copy
import json
import pickle

import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers as tf
from models import TINY, inputs, logits, tiny
from torch import nn
from torch.utils.data import DataLoader
from toys import adapters, trainer

import lit_peft
from lit_peft.core.active import set_active
from lit_peft.core.attach import detach
from lit_peft.core.registry import registry
from lit_peft.methods import LoRA, PromptTuning, PTuning
from lit_peft.methods.base import Method
from lit_peft.testing.conformance import assert_same, perturb, snapshot

CAUSAL = ["gpt2", "llama"]
METHODS = {"prompt": lambda **k: PromptTuning(3, **k), "p": lambda **k: PTuning(3, hidden_size=5, **k)}
both = pytest.mark.parametrize("kind", METHODS)


# --------------------------------------------------------------------------- helpers, for prefix tuning too


def frozen(name: str) -> nn.Module:
    """The tiny model; frozen, since kernels round otherwise where a mask wants a gradient (T5's positions)."""
    return tiny(name).requires_grad_(False)


def prompted(kind: str, name: str, **arguments) -> nn.Module:
    model = frozen(name)
    METHODS[kind](**arguments).attach(model)
    return model


def check_comes_and_goes(model: nn.Module, name: str, method: Method) -> None:
    """It changes the outputs and trains all of itself, copies and pickles, and is gone when it is off or detached."""
    base, keys = logits(model, name), set(model.state_dict())
    method.attach(model)
    assert {key for key in model.state_dict() if ".peft." not in key} == keys
    y = logits(model, name)
    assert y.shape == base.shape and (y - base).abs().max() > 1e-5
    y.square().sum().backward()
    for parameter_name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, parameter_name
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, name), y)
        perturb(twin)
        assert torch.equal(logits(model, name), y)
    set_active(model, None)
    assert torch.equal(logits(model, name), base)
    detach(model)
    assert torch.equal(logits(model, name), base)
    assert registry(model) is None


def one_step(model: nn.Module, theirs: nn.Module, name: str) -> None:
    """The same step of SGD on both, by the loss of each next token of the text.

    HF PEFT's own adds that of the first token behind the virtual ones, whose logits only it returns.
    """
    batch = inputs(name)
    labels = batch["input_ids"][:, 1:].flatten()
    for module in (model, theirs):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
        nn.functional.cross_entropy(module(**batch).logits[:, -6:-1].flatten(0, 1), labels).backward()
        optimizer.step()


def padded(name: str) -> dict[str, torch.Tensor]:
    """The inputs with two columns of padding behind, for models whose logits do not have the text's length."""
    batch = inputs(name)
    if name in CAUSAL:
        return batch
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pad = {"input_ids": nn.functional.pad(ids, (0, 2), value=1), "attention_mask": nn.functional.pad(mask, (0, 2))}
    return batch | pad


def generated(model: nn.Module, name: str, *, side: str = "none", rows: slice = slice(None), **options) -> list:
    batch = {"input_ids": torch.tensor([[3, 7, 11, 23], [8, 2, 31, 4]]), "attention_mask": torch.ones(2, 4).long()}
    if side == "left":
        batch = {k: nn.functional.pad(v, (2, 0)) for k, v in batch.items()}
    if name == "t5":
        batch["attention_mask"][1, 3] = 0
    ids = {key: value[rows] for key, value in batch.items()}
    out = model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    return out[:, -4:].tolist()


def words(folder):
    """A tokenizer whose word w<i> is token i."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(50)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "words")
    return folder / "words"


class Language(pl.LightningModule):
    """A tiny causal model in training."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.lr = tiny(name), 0.01

    def training_step(self, ids, _):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def fit(self, method, ckpt_path=None, lr=0.01, **arguments) -> pl.Trainer:
        self.lr = lr
        run = trainer(method, **{"max_epochs": -1} | arguments)
        ids = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
        run.fit(self, DataLoader(ids, batch_size=2), ckpt_path=ckpt_path, weights_only=False)
        return run


# ------------------------------------------------------------------------------------------------- oracles


def hf_peft(kind: str, model: nn.Module, task: str = "CAUSAL_LM") -> nn.Module:
    sizes = {"num_virtual_tokens": 3, "token_dim": 16, "num_attention_heads": 2, "num_layers": 2}
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type=task, **sizes)
    else:
        config = peft.PromptEncoderConfig(task_type=task, encoder_hidden_size=5, **sizes)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def take(prompt: nn.Module, encoder: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gives our addition HF PEFT's values; the pairs of tensors that must stay equal."""
    own = prompt.prompt_embeddings if hasattr(prompt, "prompt_embeddings") else prompt.embedding
    pairs = [(own, encoder.embedding.weight)]
    if hasattr(prompt, "layers"):
        for layer, other in zip(prompt.layers, encoder.mlp_head[::2], strict=True):
            pairs += [(layer.weight, other.weight), (layer.bias, other.bias)]
    for own, other in pairs:
        own.data = other.detach().clone()
    return pairs


def addition(model: nn.Module) -> nn.Module:
    return next(m.peft["default"] for m in model.modules() if hasattr(m, "peft"))


@both
@pytest.mark.parametrize("name", CAUSAL)
def test_equals_hf_peft_on_decoders(kind, name):
    theirs = hf_peft(kind, frozen(name))
    model = prompted(kind, name)
    pairs = take(addition(model), theirs.prompt_encoder.default)
    batch = inputs(name)
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits[:, 3:], rtol=1e-5, atol=1e-5)
    one_step(model, theirs, name)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert generated(model, name) == generated(theirs, name)


@both
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_equals_hf_peft_on_encoders(kind, name):
    """Where positions make no difference: HF PEFT moves the text's on, which ours keeps."""
    body = frozen(name).base_model
    body.embeddings.position_embeddings.weight.zero_()
    theirs = hf_peft(kind, body, "FEATURE_EXTRACTION")
    METHODS[kind]().attach(body)
    pairs = take(addition(body), theirs.prompt_encoder.default)
    batch = inputs(name)
    states, others = (m(**batch).last_hidden_state for m in (body, theirs))
    torch.testing.assert_close(states, others[:, 3:], rtol=1e-5, atol=1e-5)
    for module, x in ((body, states), (theirs, others[:, 3:])):
        x.square()[..., 0].sum().backward()
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@both
def test_equals_hf_peft_on_t5(kind):
    model = frozen("t5")
    theirs = hf_peft(kind, model, "SEQ_2_SEQ_LM")
    METHODS[kind]().attach(model)
    own, encoder = addition(model), theirs.prompt_encoder.default
    encoder.embedding.weight.data[3:] = 0  # tokens of a second stack, which nothing reads
    encoder.embedding = nn.Embedding.from_pretrained(encoder.embedding.weight[:3])
    take(own, encoder)
    theirs.prompt_tokens["default"] = torch.arange(3)
    torch.testing.assert_close(logits(model, "t5"), logits(theirs, "t5"), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_heads_read_the_first_token_of_the_text(name):
    model = prompted("prompt", name)
    found = logits(model, name)
    detach(copied := copy.deepcopy(model))
    text = copied.get_input_embeddings()(inputs(name)["input_ids"])
    embeds = torch.cat([addition(model).prompt().expand(2, -1, -1), text], 1)
    mask = nn.functional.pad(inputs(name)["attention_mask"], (3, 0), value=1)
    # RoBERTa's positions begin behind that of padding, which two tokens of the second text have.
    of_text = [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 1, 1]] if name == "roberta" else [[0, 1, 2, 3, 4, 5]] * 2
    positions = torch.tensor([row[:3] + row for row in of_text])
    states = copied.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    states = states[:, 3:]
    if name == "bert":
        expected = model.classifier(model.bert.pooler(states))
    elif name == "roberta":
        expected = model.classifier(states)
    else:
        expected = model.classifier(model.pre_classifier(states[:, 0]).relu())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_outputs_have_the_length_of_the_text_in_every_form():
    model, batch = prompted("prompt", "bert"), inputs("bert")
    out = model.bert(**batch, output_hidden_states=True, token_type_ids=torch.zeros(2, 6).long())
    assert {h.shape[1] for h in out.hidden_states} == {out.last_hidden_state.shape[1]} == {6}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    states, pooled = model.bert(**batch, return_dict=False)
    assert torch.equal(states, out.last_hidden_state) and torch.equal(pooled, out.pooler_output)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    again = model.bert(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)
    positions = model.bert(**batch, position_ids=torch.arange(6)[None])
    torch.testing.assert_close(positions.last_hidden_state, out.last_hidden_state)


def test_types_of_the_text_stay_with_it():
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    model = prompted("prompt", "bert")
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1] += 1
    other = model.bert(**inputs("bert"), token_type_ids=types).last_hidden_state
    embeds = model.get_input_embeddings()(inputs("bert")["input_ids"])
    table = model.bert.embeddings.token_type_embeddings.weight
    embeds = embeds + table[types] - table[0]
    same = model.bert(inputs_embeds=embeds, attention_mask=inputs("bert")["attention_mask"]).last_hidden_state
    torch.testing.assert_close(other, same, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ architectures


@both
@pytest.mark.parametrize("name", TINY)
def test_every_architecture(kind, name):
    check_comes_and_goes(frozen(name), name, METHODS[kind]())


@both
@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generation_with_a_cache(kind, name):
    model = prompted(kind, name)
    assert generated(model, name) == generated(model, name, use_cache=False)
    if name in CAUSAL:
        assert generated(model, name, rows=slice(1))[0] == generated(model, name, side="left")[0]


@both
@pytest.mark.parametrize("name", ["distilbert", "llama", "t5"])
def test_gradient_checkpointing(kind, name):
    gradients = []
    for checkpointing in (False, True):
        model = prompted(kind, name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout) and name != "t5"
            for dropout in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, dropout, None), float):
                    setattr(module, dropout, 0.0)
        logits(model, name).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("p", "bert"), ("prompt", "llama")])
def test_compiles_without_a_break(kind, name):
    torch._dynamo.reset()
    model = prompted(kind, name)
    expected = logits(model, name)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(kind, autocast):
    model = tiny("llama") if autocast else tiny("llama").bfloat16()
    METHODS[kind]().attach(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = logits(model, "llama")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_two_prompts_stand_one_before_the_other_and_lora_goes_on_below():
    model, whole = frozen("t5"), prompted("prompt", "t5")
    PromptTuning(1, name="one").attach(model)
    PromptTuning(2, name="two").attach(model)
    parts = [model.encoder.peft[name].prompt_embeddings for name in ("one", "two")]
    addition(whole).prompt_embeddings.data = torch.cat(parts).detach()
    expected = logits(model, "t5")
    torch.testing.assert_close(logits(whole, "t5"), expected, rtol=1e-4, atol=1e-4)
    LoRA(r=2, dropout=0.0, name="lora").attach(model)
    torch.testing.assert_close(logits(model, "t5"), expected)


# ------------------------------------------------------------------------------------------- initial values


def test_starts_from_the_vocabulary():
    model = prompted("prompt", "gpt2")
    distances = torch.cdist(addition(model).prompt_embeddings, model.get_input_embeddings().weight)
    assert distances.min(1).values.max() < 1e-3 and len(set(distances.argmin(1).tolist())) > 1
    torch.manual_seed(0)
    twin = frozen("gpt2")
    torch.manual_seed(0)
    PromptTuning(3).attach(twin)
    once = addition(twin).prompt_embeddings
    twin = frozen("gpt2")
    torch.manual_seed(0)
    PromptTuning(3).attach(twin)
    assert torch.equal(once, addition(twin).prompt_embeddings)


def test_starts_from_random_values():
    model = frozen("gpt2")
    PromptTuning(200, init="random").attach(model)
    values = addition(model).prompt_embeddings
    assert values.abs().max() <= 0.5 and values.std().item() == pytest.approx(12**-0.5, rel=0.05)


def test_starts_from_a_text_in_a_fit_and_goes_on_in_a_resumed_one(tmp_path):
    module = Language("gpt2")
    arguments = {"init": "text", "init_text": "word4 word9", "tokenizer": str(words(tmp_path))}
    run = module.fit(PromptTuning(3, **arguments), max_steps=1, lr=0.0)
    rows = module.model.transformer.wte.weight[torch.tensor([4, 9, 4])]
    assert torch.equal(addition(module.model).prompt_embeddings, rows)
    perturb(module)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = Language("gpt2")
    again.fit(PromptTuning(3, **arguments), max_steps=2, lr=0.0, ckpt_path=tmp_path / "one.ckpt")
    assert_same(adapters(again), adapters(module))


def test_a_text_needs_a_tokenizer(tmp_path):
    method = PromptTuning(3, init="text", init_text="word4")
    method.attach(model := frozen("gpt2"))
    with pytest.raises(ValueError, match=r"^tokenizer: the model does not say where"):
        method.prepare(model, ())
    model.backbone = str(words(tmp_path))  # as our tasks say
    method.prepare(model, ())
    assert torch.equal(addition(model).prompt_embeddings, model.transformer.wte.weight[[4, 4, 4]])
    method.init_text = "  "
    with pytest.raises(ValueError, match="has no token"):
        method.prepare(model, ())


# ----------------------------------------------------------------------------------------------- refusals


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 2)),
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
        ),
    ],
)
def test_models_without_a_text_are_refused(kind, make):
    with pytest.raises(ValueError, match=r"puts virtual tokens before the embeddings of a text, .*: use LoRA"):
        METHODS[kind]().attach(make())


@pytest.mark.parametrize("name", ["distilbert", "bert", "roberta"])
def test_an_encoder_has_as_much_room_as_before(name):
    model = prompted("prompt", name)
    fits = torch.full((1, 16), 3)
    model(input_ids=fits, attention_mask=torch.ones_like(fits))
    with pytest.raises(ValueError, match=r"3 virtual tokens and 17 of the text exceed the 16 positions .* at 16"):
        model(input_ids=torch.full((1, 17), 3))


def test_texts_that_leave_no_room():
    model = prompted("prompt", "gpt2")
    fits = torch.full((1, 13), 3)  # 16 positions
    model(input_ids=fits, attention_mask=torch.ones_like(fits))
    with pytest.raises(
        ValueError, match=r"3 virtual tokens and 14 of the text exceed the 16 positions .* at 13 tokens"
    ):
        model(input_ids=torch.full((1, 14), 3))


def test_a_mask_of_another_form():
    model = prompted("prompt", "llama")
    with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, length\]"):
        model(input_ids=torch.ones(1, 4).long(), attention_mask=torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(0), "^num_virtual_tokens must be at least 1, not 0"),
        (lambda: PTuning(3, hidden_size=0), "^hidden_size must be at least 1, not 0"),
        (lambda: PromptTuning(init="vocab"), "^init must be vocabulary, text or random, not 'vocab'"),
        (lambda: PromptTuning(init="text"), "^init text and init_text go together"),
        (lambda: PromptTuning(init_text="a"), "^init text and init_text go together"),
    ],
)
def test_impossible_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_and_why_nothing_merges():
    for kind, count in (("prompt", 3 * 16), ("p", 3 * 16 + 16 * 5 + 5 * 5 + 5 * 16 + 5 + 5 + 16)):
        model = prompted(kind, "bert")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert "adds a computation" in addition(model).not_mergeable


# ------------------------------------------------------------------------------------------ save and load


@both
@pytest.mark.parametrize("name", ["distilbert", "gpt2", "t5"])
def test_a_folder_keeps_all_and_opens_in_hf_peft(kind, name, tmp_path):
    model = prompted(kind, name)
    perturb(model)
    lit_peft.save(model, tmp_path)
    twin = frozen(name)
    adapter = lit_peft.load(twin, tmp_path)
    assert_same(adapters(twin), adapters(model))
    assert torch.equal(logits(twin, name), logits(model, name))
    assert adapter.spec["class_path"].endswith(type(METHODS[kind]()).__name__)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_virtual_tokens"] == 3
    if name == "distilbert":  # HF PEFT would compute something else, so that it must not open it
        with pytest.raises(KeyError, match="LIT_PEFT_"):
            peft.PeftModel.from_pretrained(frozen(name), tmp_path)
    else:
        theirs = peft.PeftModel.from_pretrained(frozen(name), tmp_path).eval()
        skip = 0 if name == "t5" else 3
        torch.testing.assert_close(logits(theirs, name)[:, skip:], logits(model, name), rtol=1e-5, atol=1e-5)


@both
def test_a_decoder_that_classifies_reads_its_last_token_and_comes_back_from_a_folder(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        return tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=1)
        ).eval()

    model, batch = make(), inputs("gpt2")
    METHODS[kind](train_also=["score"]).attach(model)
    alone = model(input_ids=batch["input_ids"][1:, :4]).logits  # the second text without its padding
    torch.testing.assert_close(model(**batch).logits[1:], alone, rtol=1e-5, atol=1e-6)
    perturb(model)
    lit_peft.save(model, tmp_path)
    twin = make()
    lit_peft.load(twin, tmp_path)
    assert torch.equal(logits(twin, "gpt2"), logits(model, "gpt2"))


@both
def test_a_folder_of_hf_peft(kind, tmp_path):
    theirs = hf_peft(kind, frozen("llama"))
    theirs.save_pretrained(tmp_path)
    model = frozen("llama")
    lit_peft.load(model, tmp_path)
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama")[:, 3:], rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("name", ["distilbert", "bert", "roberta"])
def test_a_folder_of_hf_peft_for_an_encoder_is_read_as_hf_peft_reads_it(kind, name, tmp_path):
    """Its head reads the first virtual token, and the text begins at position n; see docs/interop.md for more."""
    theirs = hf_peft(kind, frozen(name), "SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    model, ours = frozen(name), frozen(name)
    adapter = lit_peft.load(model, tmp_path)
    torch.testing.assert_close(logits(model, name), logits(theirs, name), rtol=1e-5, atol=1e-5)
    assert adapter.spec["init_args"]["as_hf_peft"] is True
    type(METHODS[kind]())(**adapter.spec["init_args"] | {"as_hf_peft": False}).attach(ours)
    addition(ours).prompt_embeddings.data = addition(model).prompt_embeddings.detach()
    assert (logits(ours, name) - logits(theirs, name)).abs().max() > 1e-3


@both
def test_positions_that_a_caller_gives_move_on_too(kind):
    model = prompted(kind, "roberta", as_hf_peft=True)
    batch = inputs("roberta") | {"attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["input_ids"][1, 4:] = 5  # without padding, behind which RoBERTa counts otherwise
    given = model(**batch, position_ids=torch.arange(2, 8).expand(2, -1)).logits
    torch.testing.assert_close(given, model(**batch).logits)


@both
def test_a_fit_resumes_exactly(kind, tmp_path):
    whole, half, resumed = Language("gpt2"), Language("gpt2"), Language("gpt2")
    whole.fit(METHODS[kind](), max_epochs=2)
    half.fit(METHODS[kind](), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed.fit(METHODS[kind](), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))
    assert adapters(half)["model.transformer.peft.default." + next(iter(addition(half).state_dict()))].any()
