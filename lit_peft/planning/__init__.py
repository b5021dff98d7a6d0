"""What memory a training step takes, told before it is run: without a GPU, and without the weights."""

from lit_peft.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
