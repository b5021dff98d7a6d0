"""Blocks of tokens and prompts leave positions for virtual tokens, before and after these are attached."""

import pytest
from language_models import batch, trainer

import lit_peft
from lit_peft import LoRA, PrefixTuning, PromptTuning, PTuning
from lit_peft.data import LanguageModelingDataModule
from lit_peft.planning.run import plan_run
from lit_peft.tasks import CausalLanguageModeling, MaskedLanguageModeling

POSITIONS = 128  # of both bundled models
METHODS = [PromptTuning, PrefixTuning, PTuning]
SOME = {"limit_train": 4, "limit_val": 2, "limit_test": 2, "batch_size": 2, "eval_batch_size": 2}

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.mark.parametrize("method", METHODS)
def test_blocks_leave_room_for_virtual_tokens(method, tmp_path):
    data, task = LanguageModelingDataModule(**SOME), CausalLanguageModeling(max_new_tokens=8)
    run = trainer(method(5))
    run.fit(task, data)
    assert max(data._encoded("train")["length"][:]) == POSITIONS - 5
    assert len({length for _, _, length in data._tokenised}) == 1  # nothing was made twice
    assert "at most 123 tokens to train" in data.describe()[0]
    lit_peft.save(task, tmp_path)
    loaded = CausalLanguageModeling(max_new_tokens=8)
    lit_peft.load(loaded, tmp_path)  # no method among the callbacks
    again = LanguageModelingDataModule(**SOME)
    trainer().test(loaded, again, verbose=False)
    assert max(again._encoded("test")["length"][:]) <= again._longest == POSITIONS - 5
    trainer(LoRA(r=2)).fit(CausalLanguageModeling(), again)
    assert max(again._encoded("train")["length"][:]) == POSITIONS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_size", [None, POSITIONS])
def test_prompts_leave_room_for_virtual_tokens(method, block_size):
    data, task = LanguageModelingDataModule(block_size=block_size), CausalLanguageModeling(max_new_tokens=8)
    data.use_texts(["a dull film " * 100])
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer than 115 tokens"):
        ((made,),) = trainer(method(5)).predict(task, data)
    assert made["prompt"].endswith("dull film ") and made["generation"]


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_is_set_is_refused_before_training_with_the_largest_that_fits(method, tmp_path):
    told = (
        r"data.block_size is 124, expected at most 123: of the 128 positions of the model virtual tokens take 5\. "
        "Set it to that, or to null for as many"
    )
    task = CausalLanguageModeling()
    with pytest.raises(ValueError, match=told):
        trainer(method(5)).fit(task, LanguageModelingDataModule(block_size=POSITIONS - 4, **SOME))
    assert task.model is None  # it was not even loaded
    data = LanguageModelingDataModule(block_size=POSITIONS - 5, **SOME)
    trainer(method(5)).fit(task, data)
    assert max(data._encoded("train")["length"][:]) == POSITIONS - 5
    lit_peft.save(task, tmp_path)
    loaded = CausalLanguageModeling()
    lit_peft.load(loaded, tmp_path)  # no method among the callbacks
    with pytest.raises(ValueError, match=told):
        trainer().test(loaded, LanguageModelingDataModule(block_size=POSITIONS - 4, **SOME))


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_an_encoder_keep_their_positions(method):
    for as_hf_peft, longest in ((False, POSITIONS), (True, POSITIONS - 5)):
        data = LanguageModelingDataModule(**SOME)
        trainer(method(5, as_hf_peft=as_hf_peft)).fit(MaskedLanguageModeling(), data)
        assert data._longest == longest
    whole = LanguageModelingDataModule(block_size=POSITIONS, **SOME)
    trainer(method(5), fast_dev_run=True).fit(MaskedLanguageModeling(), whole)
    with pytest.raises(ValueError, match=r"data\.block_size is 128, expected at most 123"):
        trainer(method(5, as_hf_peft=True)).fit(MaskedLanguageModeling(), whole)


def test_more_virtual_tokens_than_positions_are_told():
    told = "num_virtual_tokens: 128 leave none of the 128 positions of the model to a text"
    for block_size in (None, 8):
        data = LanguageModelingDataModule(block_size=block_size, **SOME)
        with pytest.raises(ValueError, match=told):
            trainer(PromptTuning(POSITIONS)).fit(CausalLanguageModeling(), data)
    task = CausalLanguageModeling()
    task.configure_model()
    PromptTuning(POSITIONS).attach(task)
    told = "128 virtual tokens and 2 of the text exceed the 128 positions .*: set num_virtual_tokens to fewer"
    with pytest.raises(ValueError, match=told):
        task(batch(2))


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_of_such_blocks(method):
    _, about = plan_run(trainer(method(5)), CausalLanguageModeling(), LanguageModelingDataModule(), None, others=False)
    assert about["batch"] == [8, POSITIONS - 5]
