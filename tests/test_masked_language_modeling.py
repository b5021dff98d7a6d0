"""Masked language modelling: what is drawn, what stands in its place, and what is scored."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from data_helpers import SPECIAL
from language_models import batch, trainer
from torch.utils.data import DataLoader

from lit_peft import LoRA
from lit_peft.callbacks import ReproducibleSteps
from lit_peft.core.weightless import without_weights
from lit_peft.faults import TrainingFault
from lit_peft.planning.plan import plan
from lit_peft.tasks import MaskedLanguageModeling
from lit_peft.tasks.loading import load_model
from lit_peft.tasks.masking import Masking, fixed_noise

WORDS = 205  # with the special tokens
MASK = SPECIAL.index("[MASK]")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small BERT with its masked head, beside its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=WORDS + 3, max_position_embeddings=64, **small))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


def texts(*lengths, seed=0):
    """[CLS] words [SEP], padded, of these numbers of words."""
    made = batch(*(n + 2 for n in lengths), seed=seed, vocabulary=WORDS, first=len(SPECIAL))
    for row, n in enumerate(lengths):
        for place, token in ((0, "[CLS]"), (n + 1, "[SEP]")):
            made["input_ids"][row, place] = SPECIAL.index(token)
            made["labels"][row, place] = -100
    return made


def task(folder, **options):
    made = MaskedLanguageModeling(folder, **options)
    made.configure_model()
    return made


def test_shares_of_what_is_drawn_are_those_of_bert(folder):
    made, given = task(folder), texts(*[400] * 50)
    given["labels"][:, 100:200] = -100  # left alone, though they are words
    inputs, targets = made.inputs_and_targets(given, True)
    ids, seen, drawn = given["input_ids"], inputs["input_ids"], targets != -100
    assert drawn.sum(1).tolist() == [45] * 50  # 15 % of 300
    assert torch.equal(targets[drawn], ids[drawn]) and torch.equal(seen[~drawn], ids[~drawn])
    assert not (drawn & (given["labels"] == -100)).any() and not (ids[drawn] < len(SPECIAL)).any()
    masked, kept = seen[drawn] == MASK, seen[drawn] == ids[drawn]
    others = seen[drawn][~masked & ~kept]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert len(others) > 150 and others.min() >= len(SPECIAL) and others.max() < WORDS
    assert len(others.unique()) > 90  # all over the vocabulary
    again, _ = made.inputs_and_targets(given, True)
    assert not torch.equal(again["input_ids"], seen)
    assert inputs.keys() == {"input_ids", "attention_mask"}


def test_unknown_words_and_special_tokens_with_a_label_are_left_alone(folder):
    given = texts(4)
    given["labels"] = given["input_ids"].clone()
    given["input_ids"][0, 2] = given["labels"][0, 2] = SPECIAL.index("[UNK]")
    _, targets = task(folder, mask_fraction=1.0).inputs_and_targets(given, True)
    assert (targets != -100).nonzero()[:, 1].tolist() == [1, 3, 4]


def test_a_short_text_has_one_token_drawn_and_an_empty_one_none(folder):
    _, targets = task(folder).inputs_and_targets(texts(2, 0, 9), True)
    assert (targets != -100).sum(1).tolist() == [1, 0, 1]


def test_of_equal_draws_the_first_tokens_are_masked():
    masking = Masking(0.5, 1, torch.tensor([0, 1]), torch.arange(2, 99))
    noise = torch.stack([torch.zeros(1, 300), *torch.rand(2, 1, 300)])
    ids = torch.full((1, 300), 7)
    assert masking.apply(ids, ids, noise)[1].tolist() == [[7] * 150 + [-100] * 150]


def test_evaluation_draws_the_same_of_a_text_in_any_batch(folder):
    made, given = task(folder), texts(30, 12, 20)
    inputs, targets = made.inputs_and_targets(given, False)
    for row, n in enumerate((30, 12, 20)):
        alone = {key: value[row : row + 1, : n + 2] for key, value in given.items()}
        found, aims = made.inputs_and_targets(alone, False)
        assert torch.equal(found["input_ids"][0], inputs["input_ids"][row, : n + 2])
        assert torch.equal(aims[0], targets[row, : n + 2])
    other, _ = task(folder, mask_seed=1).inputs_and_targets(given, False)
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    same = given["input_ids"][:1].expand(2, -1)
    noise = fixed_noise(same, torch.ones_like(same, dtype=torch.bool), 0)
    assert torch.equal(noise[:, 0], noise[:, 1]) and noise.std() > 0.2


def test_scores_are_those_of_the_tokens_that_were_drawn(folder):
    made, batches = task(folder), [texts(30, 12), texts(5, 40, seed=1)]
    (scores,) = trainer().test(made, DataLoader(batches, batch_size=None), verbose=False)
    nll, right, count = 0.0, 0, 0
    for given in batches:
        inputs, targets = made.inputs_and_targets(given, False)
        logits = made.model.eval()(**inputs).logits
        nll += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        count += int((targets != -100).sum())
    assert set(scores) == {f"test/{name}" for name in ("nll", "masked_perplexity", "acc", "ece")}
    assert scores["test/nll"] == pytest.approx(nll / count, rel=1e-5)
    assert scores["test/masked_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert scores["test/acc"] == pytest.approx(right / count)


def test_pseudo_perplexity_masks_each_token_alone(folder):
    given = texts(40, 3)
    given["labels"][0, 5] = -100
    made = task(folder, pseudo_perplexity=True)
    (scores,) = trainer().test(made, DataLoader([given], batch_size=None), verbose=False)
    losses = []
    made.eval()
    with torch.no_grad():
        for ids, mask, labels in zip(*(given[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            for place in (labels != -100).nonzero().flatten().tolist():
                seen = ids.clone()
                seen[place] = MASK
                logits = made.model(seen[None], attention_mask=mask[None]).logits
                losses.append(-logits[0, place].log_softmax(-1)[ids[place]].item())
    assert len(losses) == 42
    assert scores["test/pseudo_perplexity"] == pytest.approx(math.exp(sum(losses) / 42), rel=1e-4)


def test_steps_draw_from_the_seed_and_the_step(folder):
    losses = []
    for noise, callbacks in ((0, [ReproducibleSteps()]), (100, [ReproducibleSteps()]), (100, [])):
        torch.manual_seed(noise)
        run = trainer(LoRA(r=2), *callbacks)
        run.fit(MaskedLanguageModeling(folder), DataLoader([texts(30, 20)], batch_size=None))
        losses.append(run.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_a_loaded_task_masks_anew_when_it_trains(folder, tmp_path):
    run = trainer(LoRA(r=2))
    run.fit(MaskedLanguageModeling(folder, mask_fraction=0.3), DataLoader([texts(9)], batch_size=None))
    run.save_checkpoint(tmp_path / "run.ckpt")
    made = MaskedLanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt")
    assert made.mask_fraction == 0.3 and not made.training
    given = texts(200)
    drawn = [made.inputs_and_targets(given, True)[0]["input_ids"] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_an_untrained_head_is_new_and_a_tied_matrix_is_not(folder, tmp_path):
    made = tf.BertForMaskedLM.from_pretrained(folder)
    made.bert.save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    bare = task(str(tmp_path))
    head = "cls.predictions"
    new = [f"{head}.bias", *(f"{head}.transform.{x}.{y}" for x in ("LayerNorm", "dense") for y in ("bias", "weight"))]
    assert bare.train_also == [f"model.{name}" for name in new]
    assert bare.model.get_output_embeddings().weight is bare.model.get_input_embeddings().weight
    with without_weights():
        _, planned = load_model("AutoModelForMaskedLM", str(tmp_path), torch.float32)
    assert planned == new
    assert load_model("AutoModelForMaskedLM", folder, torch.float32)[1] == []
    LoRA(r=2).attach(bare)
    assert {n for n, p in bare.named_parameters() if p.requires_grad and ".peft." not in n} == set(bare.train_also)


def test_a_step_is_planned_without_values(folder):
    made = MaskedLanguageModeling(folder)
    with without_weights():
        made.configure_model()
    assert plan(made, LoRA(r=2), made.sample(4, 32)).activations > 0


def test_a_tokenizer_without_a_mask_token_is_refused(folder, tmp_path):
    tf.BertModel(tf.BertConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    plain = tf.AutoTokenizer.from_pretrained(folder)
    plain.mask_token = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no mask token.*CausalLanguageModeling"):
        task(str(tmp_path))
    with pytest.raises(ValueError, match=r"model.mask_fraction"):
        MaskedLanguageModeling(folder, mask_fraction=1.5)


def test_a_vocabulary_larger_than_the_model_gives_no_replacement_that_it_lacks(folder):
    masking = Masking.of(tf.AutoTokenizer.from_pretrained(folder), 50, 0.15, torch.device("cpu"))
    assert masking.ordinary.tolist() == list(range(len(SPECIAL), 50))


def test_mask_tokens_of_texts_are_filled(folder):
    made = task(folder).eval()
    given = texts(6, 3)
    given["input_ids"][0, 2] = given["input_ids"][0, 5] = given["input_ids"][1, 1] = MASK
    expected = made.model(given["input_ids"], given["attention_mask"]).logits.softmax(-1).max(-1)
    left = {key: torch.stack([given[key][0], given[key][1].roll(3)]) for key in ("input_ids", "attention_mask")}
    rows = [row for rows in trainer().predict(made, DataLoader([left], batch_size=None)) for row in rows]
    for row, (n, places) in enumerate(((6, [2, 5]), (3, [1]))):
        assert rows[row]["probabilities"] == pytest.approx(expected.values[row, places].tolist(), rel=1e-4)
        filled = given["input_ids"][row].clone()
        filled[places] = expected.indices[row, places]
        assert rows[row]["tokens"] == [
            made.tokenizer.decode([token]) for token in expected.indices[row, places].tolist()
        ]
        assert rows[row]["text"] == made.tokenizer.decode(filled[: n + 2].tolist(), skip_special_tokens=True)


def test_texts_without_a_mask_token_are_told(folder):
    made = task(folder).eval()
    given = {key: texts(6)[key] for key in ("input_ids", "attention_mask")}
    with pytest.warns(UserWarning, match=r"Texts without \[MASK\].* have nothing to fill"):
        ((row,),) = trainer().predict(made, DataLoader([given], batch_size=None))
    assert row["tokens"] == row["probabilities"] == []


def test_packed_texts_are_refused(folder):
    """No encoder of transformers looks where positions begin anew; nothing would hide padding, either."""
    packed = texts(3, 5)
    packed["position_ids"] = torch.arange(7).expand(2, 7)
    task(folder).inputs_and_targets(packed, False)  # with a mask they are positions, no more
    del packed["attention_mask"]
    for training in (True, False):
        with pytest.raises(TrainingFault, match=r"BertForMaskedLM reads .* set data.pack to false"):
            task(folder).inputs_and_targets(packed, training)
