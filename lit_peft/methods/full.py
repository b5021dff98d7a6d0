"""Full fine-tuning: the yardstick that the other methods are held against."""

from lit_peft.methods.base import Method


class FullFineTuning(Method):
    """Trains every parameter of the base. Its checkpoints hold the whole model, and no copy of the base is kept.

    Args:
        **common: See `Method`.
    """

    learning_rate = 5e-5  # BERT's own range (Devlin et al. 2019, appendix A.3); 1e-3 destroys the pretraining
    keep_originals = False

    def trains(self, name: str) -> bool:
        return True

    def lacks_gradient(self, name: str) -> bool:
        return True  # a model may hold parameters that its loss does not use, a pooler for instance
