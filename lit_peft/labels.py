"""Labels of tokens, as data modules give them and tasks read them."""

IGNORED = -100
"""Label of what is not scored; what `torch.nn.functional.cross_entropy` passes over."""
