"""Quantisers of frozen bases by the packages that they use; `lit_peft.core.quantize` finds them, by entry point."""
