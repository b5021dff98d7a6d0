"""How long the rows of a language model may be, and its prompts."""

from lit_peft.data.blocks import Marks
from lit_peft.data.held_out import HeldOutDataModule


class WithinPositions(HeldOutDataModule):
    """Rows that fit into the positions that a model has, beside virtual tokens and, of prompts, what is to follow.

    A block that was set is refused where virtual tokens leave less; one that was not is as long as they leave.
    """

    block_size: int | None

    def setup(self, stage: str | None = None) -> None:
        if stage != "predict":  # prompts are cut to what there is room for
            self._check_positions()
        super().setup(stage)
        if stage is not None:  # else the tokenizer may not be there yet, nor be asked for
            self._tell_limit("block_size", self.block_size, "rows")

    def _check_positions(self) -> None:
        """Raises ValueError when virtual tokens leave less of the model's positions than a block that was set takes."""
        positions, room = super()._positions, self._text_room
        if self.block_size is not None and positions and room and self._longest > room:
            raise ValueError(
                f"data.block_size is {self.block_size:,}, expected at most {room:,}: of the {positions:,} positions of "
                f"the model virtual tokens take {positions - room:,}. Set it to that, or to null for as many."
            )

    @property
    def _positions(self) -> int | None:
        # A block that is set is not cut by a method, but refused.
        return self._text_room if self.block_size is None else super()._positions

    @property
    def _text_room(self) -> int | None:
        """What virtual tokens leave of the model's positions, where it says so."""
        model = self.trainer.lightning_module if self.trainer else None
        return getattr(model, "text_room", None) or super()._positions

    @property
    def _prompt_room(self) -> int:
        """Most tokens of a prompt: the model has positions for what is to follow it, too."""
        model = self.trainer.lightning_module if self.trainer else None
        new = getattr(getattr(model, "decoding", None), "max_new_tokens", 0)
        room = (self._text_room or self._longest + new) - new
        return min(self._longest, room) if room > self._marks.size else self._longest

    @property
    def _marks(self) -> Marks:
        return Marks.of(self.tokenizer)
