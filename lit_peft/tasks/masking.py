"""Which tokens a masked language model is to predict, and what it sees in their place."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_peft.labels import IGNORED


@dataclass(frozen=True)
class Masking:
    """The masking of BERT: of the tokens that are drawn, 80 % are masked, 10 % replaced, 10 % kept.

    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3.1.

    Attributes:
        fraction: Share of a row's tokens that are drawn, rounded, and at least one.
        mask: Id of the mask token.
        special: Ids of tokens that are never drawn and never a replacement, [s].
        ordinary: Ids of all other tokens, [v].
    """

    fraction: float
    mask: int
    special: Tensor
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int, fraction: float, device: torch.device) -> "Masking":
        """That of a tokenizer, for a model with embeddings of so many tokens."""
        special = set(tokenizer.all_special_ids)
        ordinary = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
        ids = (torch.tensor(own, device=device) for own in (sorted(special), ordinary))
        return cls(fraction, tokenizer.mask_token_id, *ids)

    def scored(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Which tokens may be drawn, bool [b, w]: those with a label, special ones excepted."""
        return (labels != IGNORED) & ~torch.isin(ids, self.special)

    def apply(self, ids: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Masks a batch.

        Args:
            ids: The tokens, int64 [b, w].
            labels: The same, or -100 where a token must be left alone.
            noise: Uniform in [0, 1), [3, b, w]: which tokens, what becomes of them, what replaces them.

        Returns:
            The ids that the model sees, and the targets: the tokens that were drawn, -100 elsewhere.
        """
        scored = self.scored(ids, labels)
        count = scored.sum(1, keepdim=True)
        # The k smallest of a row, of equal ones the first: 500 draws of float32 are not all different in 1 row of 130.
        order = noise[0].masked_fill(~scored, 2.0).argsort(dim=1, stable=True).argsort(1)
        drawn = scored & (order < (count * self.fraction).round().clamp(min=1))
        masked, replaced = drawn & (noise[1] < 0.8), drawn & (noise[1] >= 0.8) & (noise[1] < 0.9)
        other = self.ordinary[(noise[2] * len(self.ordinary)).long().clamp(max=len(self.ordinary) - 1)]
        seen = torch.where(masked, self.mask, torch.where(replaced, other, ids))
        return seen, ids.masked_fill(~drawn, IGNORED)


def fixed_noise(ids: Tensor, scored: Tensor, seed: int) -> Tensor:
    """Noise that follows from each row alone, [3, b, w]: whatever the batch, its padding or the rank.

    Args:
        ids: The tokens, [b, w].
        scored: Which of them may be drawn; the others have no noise, and no influence.
        seed: Of the whole evaluation.
    """
    noise = torch.ones(3, *ids.shape)
    for row, (own, known) in enumerate(zip(ids.cpu(), scored.cpu(), strict=True)):
        digest = hashlib.blake2b(
            own[known].numpy().tobytes(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)
        )
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        noise[:, row, known] = torch.rand(3, int(known.sum()), generator=generator)
    return noise.to(ids.device)
