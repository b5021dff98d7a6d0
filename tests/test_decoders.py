"""Causal language modelling of decoders of many kinds: trained, scored as transformers does, and continued."""

import random

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from data_helpers import SPECIAL, save_tokenizer
from language_models import VOCABULARY, save, trainer

from lit_peft import LoRA, PrefixTuning, PromptTuning
from lit_peft.data import LanguageModelingDataModule
from lit_peft.faults import TrainingFault
from lit_peft.tasks import CausalLanguageModeling
from lit_peft.tasks.loading import use_instead

KINDS = ["bart", "bert", "bloom", "falcon", "gemma2", "gpt_neox", "llama", "mamba", "mistral", "mpt", "opt", "phi"]
KINDS += ["qwen2", "roberta"]
METHODS = {
    "lora": lambda kind: LoRA(r=2, dropout=0.0, target_modules=["in_proj"] if kind == "mamba" else ["attention"]),
    "prompt": lambda kind: PromptTuning(4),
    "prefix": lambda kind: PrefixTuning(4),
}
APART = ["bart", "mpt", "opt", "roberta"]
"""Count positions in a way of their own."""
CASES = [("lora", kind) for kind in KINDS] + [("prompt", kind) for kind in APART]
CASES += [("prefix", kind) for kind in APART if kind != "mpt"]  # its attention takes no prefix
PROMPTS = ["w7 w3", "w5 w60 w11 w2 w31 w31 w8"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Where lines of words are, more than the models have positions for, and their tokenizer."""
    path, drawn = tmp_path_factory.mktemp("texts") / "train.txt", random.Random(0)
    lines = [" ".join(f"w{drawn.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(9)) for _ in range(60)]
    path.write_text("\n".join(lines))
    return {"path": str(path), "tokenizer": save_tokenizer(path.parent / "tokenizer", VOCABULARY - len(SPECIAL))}


@torch.no_grad()
def perplexity(model, rows) -> float:
    """Of rows one by one, from all logits."""
    nll, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits.float()
        nll += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return float(torch.tensor(nll / count).exp())


@torch.no_grad()
def by_hand(model, row: list[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, alone and without a cache."""
    ids = torch.tensor([row])
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 0:
            break
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_trains_scores_and_continues(texts, tmp_path, method, kind):
    task = CausalLanguageModeling(save(tmp_path, kind), max_new_tokens=5)
    data = LanguageModelingDataModule(**texts, batch_size=4, limit_train=4, limit_test=5)
    run = trainer(METHODS[method](kind))
    run.fit(task, data)
    scores = run.test(task, data, verbose=False)[0]
    model = task.model.eval()
    assert scores["test/perplexity"] == pytest.approx(perplexity(model, data._encoded("test")), rel=1e-4)
    data.use_texts(PROMPTS)
    (made,) = run.predict(task, data)
    expected = [by_hand(model, row, 5) for row in data._encoded("predict")["input_ids"][:]]
    assert [row["generation"].strip() for row in made] == [
        data.tokenizer.decode(row, skip_special_tokens=True) for row in expected
    ]


def test_xlnet_is_refused_by_name(texts, tmp_path):
    tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=48)
    ).save_pretrained(tmp_path)
    data = LanguageModelingDataModule(**texts, limit_train=2, block_size=16)
    with pytest.raises(
        TrainingFault, match=r"a XLNetLMHeadModel, reads texts to both sides .* LightningModule of your own"
    ):
        trainer(LoRA(target_modules=["layer_1"])).fit(CausalLanguageModeling(str(tmp_path)), data)


def test_a_model_of_no_language_task_is_told_what_takes_it(tmp_path):
    """T5 is neither; XLNet's causal model is none."""
    assert use_instead(tf.XLNetConfig(), "MaskedLanguageModeling").startswith("train it in a LightningModule")
    assert use_instead(tf.GPT2Config(), "MaskedLanguageModeling") == "use CausalLanguageModeling"
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCABULARY, **small)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is of type t5, .* no causal language model: train it in a LightningModule of"
    ):
        CausalLanguageModeling(str(tmp_path)).configure_model()
