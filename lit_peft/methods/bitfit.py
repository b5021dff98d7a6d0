"""BitFit: the biases that a model has, and nothing else."""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_peft.core.registry import Adapter
from lit_peft.core.targets import Site, make_site, roles_of
from lit_peft.methods.base import Method

ALL = "all"


class BitFit(Method):
    """Trains biases of the base, `b' = b + db`, and the head.

    Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", section 3. About .1 % of a BERT's parameters, no cost in inference.

    Args:
        biases: Which biases: all, the paper's; or those of layers, as roles (query key value output ffn_up ffn_gate
            ffn_down), groups (attention, ffn, all-linear), names, globs or `re:` expressions. [query, ffn_up] is the
            smaller choice that the paper finds nearly as good (section 3), less than half of BERT's biases.
        **common: See `Method`.
    """

    def __init__(self, biases: str | Sequence[str] = ALL, **common: Any) -> None:
        super().__init__(**common)
        self.biases = biases if isinstance(biases, str) else list(biases)
        self._chosen: set[str] = set()  # names of them, once the module is known
        if not self.biases:
            raise ValueError("biases is empty: name at least one role, group, name or pattern, or all.")

    def trains(self, name: str) -> bool:
        return name in self._chosen

    def lacks_gradient(self, name: str) -> bool:
        # A key's bias adds the same to all scores of a query, which softmax cancels: its gradient is zero.
        return roles_of(name.rpartition(".")[0]) == ("key",)

    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        if "trains" not in vars(self):  # a folder that is loaded names its biases itself
            self._chosen = self._find(module)
        return super().attach(module, dtype)

    def _find(self, module: nn.Module) -> set[str]:
        """Names of the biases that `biases` means."""
        names = [name for name, _ in module.named_parameters() if ".peft." not in f".{name}" and _is_bias(name)]
        if not names:
            raise ValueError(
                f"BitFit has nothing to train: {type(module).__name__} has no biases. Use LoRA, or LinearProbe for the "
                "head alone."
            )
        patterns = [self.biases] if isinstance(self.biases, str) else self.biases
        if ALL in patterns:
            return set(names)
        layers = {path: make_site(path, layer) for path, layer in module.named_modules() if ".peft." not in f".{path}."}
        chosen: set[str] = set()
        for pattern in patterns:
            hits = {name for name in names if layers[name.rpartition(".")[0]].answers_to(pattern)}
            if not hits:
                raise ValueError(_matches_none(module, pattern, layers, names))
            _report_fused(pattern, [layers[name.rpartition(".")[0]] for name in sorted(hits)])
            chosen |= hits
        return chosen


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2].split("_")  # in_proj_bias and an LSTM's bias_ih_l0 too


def _matches_none(module: nn.Module, pattern: str, layers: dict[str, Site], names: list[str]) -> str:
    """Says whether a pattern means layers without a bias, or nothing at all."""
    without = next((path for path, site in layers.items() if site.answers_to(pattern)), None)
    if without is not None:
        return (
            f"biases: {pattern!r} means {without or type(module).__name__} and its like, which have no bias themselves."
        )
    owners = [layers[name.rpartition(".")[0]] for name in names]
    words = {role for site in owners for role in site.roles} | {s.path.rpartition(".")[2] for s in owners if s.path}
    close = difflib.get_close_matches(pattern, sorted(words), n=3, cutoff=0.5) or sorted(words)[:12]
    return f"biases: {pattern!r} matches no layer of {type(module).__name__}. Nearest with a bias: {', '.join(close)}."


def _report_fused(pattern: str, sites: list[Site]) -> None:
    fused = next((site for site in sites if pattern in site.roles and len(site.roles) > 1), None)
    if fused is not None:
        warnings.warn(
            f"biases: {pattern!r} is one with {', '.join(fused.roles)} in {fused.path}, whose bias trains whole.",
            stacklevel=5,
        )
