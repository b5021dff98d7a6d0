"""Continuing prompts with a causal language model, its adapters active, token by token from a cache."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_peft.faults import TrainingFault
from lit_peft.methods.positions import argument_names, position_room, position_table, positions_taken, text_room


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: How many are made at most; an end-of-text token ends a text before.
        temperature: 0 for the likeliest token at each step (greedy); else tokens are drawn from softmax(logits / it).
        top_p: Tokens are drawn from the smallest set that has this share of the probability. Holtzman et al. 2020,
            "The Curious Case of Neural Text Degeneration", section 3.1.
    """

    max_new_tokens: int
    temperature: float
    top_p: float

    def config(self, pad: int, ends: list[int]) -> Any:
        """The same as transformers takes it, with the ids of padding and of the tokens that end a text."""
        from transformers import GenerationConfig

        sampled = {"temperature": self.temperature or 1.0, "top_p": self.top_p if self.temperature else 1.0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            top_k=0 if self.temperature else 50,  # transformers' default, which it warns of anything but
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad,
            eos_token_id=ends or None,
            **sampled,
        )


def continuations(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, decoding: Decoding, *seed: int
) -> list[dict[str, str]]:
    """What a model makes of some prompts: `prompt` and `generation` of each, the one behind the other.

    Args:
        model: A causal model of transformers in evaluation mode.
        tokenizer: Its tokenizer.
        ids: The prompts, int64 [b, w], padded on the left.
        mask: 1 where they are, 0 where there is padding, [b, w].
        decoding: How tokens are chosen.
        *seed: Numbers that the draws follow from; torch's generators are as they were afterwards.

    Raises:
        ValueError: When prompts are padded on the right or empty; a TrainingFault when they are longer than the model
            has room for.
    """
    width = ids.shape[1]
    if not width or not mask[:, -1].all():
        raise ValueError("Prompts have at least one token each, and are padded on the left for generation.")
    room = text_room(model.base_model)
    if room is not None and width + decoding.max_new_tokens > room:
        raise TrainingFault(
            f"max_new_tokens: {decoding.max_new_tokens} after a prompt of {width} tokens exceed the {room} positions "
            f"of {type(model).__name__}"
            + (" behind its virtual tokens: " if room != position_room(model.base_model) else ": ")
            + (f"set it to {room - width} at most, or " if room > width else "")
            + "shorten the prompts, with data.block_size for instance."
        )
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    ends = sorted({*_as_list(model.generation_config.eos_token_id), *_as_list(tokenizer.eos_token_id)})
    devices = [] if ids.device.type == "cpu" else [ids.device]
    with torch.random.fork_rng(devices, device_type=ids.device.type if devices else "cuda"):
        # A digest of 32 bits: torch's generator of a CPU takes no more.
        torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=4).digest(), "little"))
        config, prompts = decoding.config(pad, ends), [row[own.bool()] for row, own in zip(ids, mask, strict=True)]
        if not mask.all() and _is_moved_by_padding(model):
            new = [_generate(model, row[None], torch.ones_like(row[None]), config)[0] for row in prompts]
        else:
            new = [*_generate(model, ids, mask, config)]
    return [_texts(tokenizer, row, made) for row, made in zip(prompts, new, strict=True)]


def _is_moved_by_padding(model: Any) -> bool:
    """Whether a text is elsewhere behind padding, as the model takes no positions: in the table of BART's decoder, and
    seen from virtual tokens, which stand before the padding, in MPT's biases.
    """
    base = model.base_model
    return not _takes_positions(model) and (position_table(base) is not None or positions_taken(base) > 0)


def _takes_positions(model: Any) -> bool:
    return "position_ids" in argument_names(model)


def _generate(model: Any, ids: Tensor, mask: Tensor, config: Any) -> Tensor:
    """What `model.generate` adds by a configuration alone; transformers would fill it from the model's, and penalise.

    It is helped where it would count otherwise than a forward pass does.
    """
    inputs: dict[str, Any] = {"attention_mask": mask}
    padding = getattr(position_table(model.base_model), "padding_idx", None)
    if padding is not None and _takes_positions(model):  # RoBERTa counts from behind it, transformers from 0
        inputs["position_ids"] = mask.cumsum(1) * mask + padding
    layers = getattr(model.config, "decoder_layers", None)
    if layers is not None and layers > model.config.num_hidden_layers:  # of the encoder that it was taken from
        from transformers import DynamicCache

        inputs["past_key_values"] = DynamicCache()
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        return model.generate(ids, **inputs, generation_config=config)[:, ids.shape[1] :]
    finally:
        model.generation_config = own


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _texts(tokenizer: Any, prompt: Tensor, new: Tensor) -> dict[str, str]:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, after, whole = (tokenizer.decode(t.tolist(), **options) for t in (prompt, new, torch.cat([prompt, new])))
    # Alone, some tokenizers drop the space before a first word.
    return {"prompt": before, "generation": whole[len(before) :] if whole.startswith(before) else after}
