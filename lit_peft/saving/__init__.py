"""Adapter folders, ours and HF PEFT's, and checkpoints outside of a trainer."""
