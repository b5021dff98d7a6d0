"""What is known of the adapters of a module: one `Registry` on the root of the module tree."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

REGISTRY_KEY = "_lit_peft"


@dataclass
class Adapter:
    """What the registry knows of one attached adapter; plain data, so that it copies and pickles."""

    name: str
    spec: dict[str, Any]
    """Class path and arguments of the method, as the checkpoint keeps them."""
    sites: dict[str, list[str]] = field(default_factory=dict)
    """Path of each adapted module -> names of its trainable tensors."""
    base: list[str] = field(default_factory=list)
    """Base parameters that this adapter trains."""
    head: list[str] = field(default_factory=list)
    """Those among them that `train_also` named."""
    scales: dict[str, float] = field(default_factory=dict)
    """Base parameter -> scale of its learning rate, where `train_also` gives one other than 1."""
    update_norm_stats: bool = False
    """Whether running statistics move in training although their layers are frozen."""
    source: str | None = None
    """Folder or file that `lit_peft.load` took it from."""
    prepared: bool = False
    """Whether a fit has begun with it or with its checkpoint, so that `Method.prepare` must not start it again."""


class Running(NamedTuple):
    """Which adapters run, and how; see `Registry.running`."""

    weights: Mapping[str, float]
    """Name -> weight, in order."""
    head: str | None = None
    frozen: frozenset[str] = frozenset()
    shadowed: Mapping[str, frozenset[str]] | None = None
    """Name -> what belongs to it in the base and is not there now, since that of another counts."""


@dataclass
class Registry:
    """All adapters of one module tree, kept on its root."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    """Names of those that run; their base parameters, and the buffers that moved with them, are the module's now."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of the active ones that do not run at 1."""
    head: str | None = None
    """The one of the active ones whose base parameters count, where `set_active` was told."""
    frozen: set[str] = field(default_factory=set)
    """Active ones that do not train: a fit has brought methods, and theirs is not among them."""
    aside: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Adapter -> what belongs to it in the base (parameters that train, buffers that moved) and is not there now; of a
    frozen one all, since what is there may train on."""
    required_grad: set[str] = field(default_factory=set)
    """Base parameters that required a gradient before the first adapter came; `detach` gives it back."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Host copies of base parameters that train and of the base's saved buffers, as they were at first."""
    moved: set[str] = field(default_factory=set)
    """Base buffers that were seen with other values than at first, or came so, since the active ones run."""
    fingerprint: dict[str, str] = field(default_factory=dict)

    def running(self) -> Running:
        """What runs now; `run_again` brings it back."""
        weights = {name: self.weights.get(name, 1.0) for name in self.active}
        shadowed = {name: frozenset(self.aside.get(name, ())) for name in self.active}
        return Running(weights, self.head, frozenset(self.frozen), shadowed)

    def paths(self) -> list[str]:
        """Paths of all adapted modules, in order."""
        return sorted({path for adapter in self.adapters.values() for path in adapter.sites})

    def training(self) -> list[Adapter]:
        """The adapters that train: those that run, but for frozen ones."""
        return [adapter for name, adapter in self.adapters.items() if name in self.active and name not in self.frozen]

    def trainable_names(self) -> set[str]:
        """Names of all parameters that train: the union over the adapters that do."""
        names: set[str] = set()
        for adapter in self.training():
            names.update(adapter.base)
            names.update(
                f"{path}.peft.{adapter.name}.{tensor}".lstrip(".")
                for path, tensors in adapter.sites.items()
                for tensor in tensors
            )
        return names


def registry(module: nn.Module) -> Registry | None:
    """The registry of the adapters attached to `module`, or None where there is none."""
    return module.__dict__.get(REGISTRY_KEY)
