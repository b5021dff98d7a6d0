"""`plan`: the memory of a training step by part, from one step on fake tensors."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.quantize import make_quantizer, quantize_base
from lit_peft.methods.base import Method
from lit_peft.methods.checks import check_choice
from lit_peft.planning.fakes import fake_batch, fake_mode, faked, on_meta, stored
from lit_peft.planning.gpus import workspaces as _workspaces
from lit_peft.planning.live import LiveBytes, allocated
from lit_peft.planning.on_gpu import as_on_gpu
from lit_peft.planning.optimizer import MakeOptimizer, OptimizerBytes, optimizer_bytes

_OWN_STEP = (
    "In Python, lit_peft.planning.plan(model, method, batch, step=…) takes another step, (model, batch) -> loss."
)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
"""What a step can be planned in."""
Step = Callable[[Any, Any], Tensor]
"""Module and batch -> loss."""


@dataclass(frozen=True)
class Plan:
    """Bytes that a training step takes on a GPU.

    Attributes:
        name: What is trained, how.
        base: Frozen weights and buffers as they are stored; of quantised ones their codes.
        constants: Scales and tables of quantised weights.
        adapters: What trains.
        gradients: Of all that trains.
        optimizer: The optimizer's state on the GPU.
        activations: The most that lives at any moment beside all these: what autograd keeps, and what operators take.
        workspaces: What libraries keep for themselves, through torch's allocator.
        peak: The most at any moment, what `torch.cuda.max_memory_allocated` will say; not more than `total`, since
            gradients and activations are not at their most at the same time.
        host: State of a paged optimizer, which leaves the GPU where that is full, and is not in `peak`.
        notes: What the figures leave out.
    """

    name: str
    base: int
    constants: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspaces: int
    peak: int
    host: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def static(self) -> int:
        """What lives from the start to the end of a run: weights and optimizer."""
        return self.base + self.constants + self.adapters + self.optimizer

    @property
    def total(self) -> int:
        """All parts, as if each were at its most at once."""
        return self.static + self.gradients + self.activations + self.workspaces

    def parts(self) -> dict[str, int]:
        """Part -> bytes, for a table."""
        names = ("base", "constants", "adapters", "gradients", "optimizer", "activations", "workspaces")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": self.total, "notes": list(self.notes)}


def plan(
    model: nn.Module,
    method: Method | None,
    batch: Any,
    *,
    optimizer: MakeOptimizer | None = None,
    precision: str = "32-true",
    step: Step | None = None,
    keeps_gradients: bool = True,
    accumulates: bool = False,
    prepare: Callable[[Any], object] | None = None,
    name: str | None = None,
    workspaces: int | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The memory of a training step of a model with a method, without its weights and without a GPU.

    Weights, constants, gradients and the optimizer's state are counted exactly, activations by one step on fake tensors
    as a GPU would run it: fused attention, its autocast, its kernels. Nothing about the architecture is assumed.

    Args:
        model: A module on any device, best the meta device; it stays as it is.
        method: What is attached to a copy of it, beside what is attached already; null: nothing more is.
        batch: What a step is given, tensors on any device: of a module that returns a loss its arguments by name, of a
            LightningModule what `training_step` takes.
        optimizer: Called with what trains; null: AdamW.
        precision: Lightning's, one of `PRECISIONS`.
        step: Module and batch -> loss; null: `training_step(batch, 0)`, or `module(**batch)`'s loss.
        keeps_gradients: Whether gradients of the step before live through a forward pass: so in Lightning, which sets
            them to None before the backward pass, and not in a loop that does so at its end.
        accumulates: Whether gradients of several batches are accumulated, and live through backward passes too.
        prepare: Called with the copy before its step, to switch on checkpointing for instance.
        name: What the plan is called; null: the method's.
        workspaces: Bytes that cuBLAS keeps for itself; null: as on an H100.
        notes: Kept with the plan.

    Raises:
        ValueError: When nothing would train, the method does not fit the model, the step depends on values, or the
            precision is another.
    """
    check_choice("precision", precision, PRECISIONS)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    true = torch.bfloat16 if precision == "bf16-true" else None
    module = on_meta(model)
    method = copy.deepcopy(method)
    if true is not None:
        module.to(true)
    if method is not None:
        _attach(module, method, true)
    if prepare is not None:
        prepare(module)

    fake, live = fake_mode(), LiveBytes()
    module = faked(module, fake)
    with fake:
        inputs = fake_batch(batch, true)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("plan: nothing of this model requires a gradient, so that no step could be made.")
    constants = live.hold(t for _, *parts in stored(module).values() for t in parts)
    adapters = live.hold([*trained, *_additions(module)])
    base = live.hold([*module.parameters(), *module.buffers()])
    live.restart()
    live.follow_gradients(trained)

    with fake, as_on_gpu(), live, _explained(type(module).__name__), torch.enable_grad():
        live.hold(t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor))
        with nullcontext() if half is None else torch.autocast("cpu", half):
            loss = (step or _step)(module, inputs)
        forward, live.peak = live.peak, live.now
        loss.backward()
        del loss
    backward, rest = live.peak, live.peak_rest
    gradients = sum(allocated(p.grad.untyped_storage().nbytes()) for p in trained if p.grad is not None)
    del inputs
    weights = base + constants + adapters
    state = optimizer_bytes(trained, optimizer, live, fake) if gradients else OptimizerBytes()

    own = _workspaces(None) if workspaces is None else workspaces
    peak = max(
        forward + state.state + (gradients if keeps_gradients or accumulates else 0),
        (weights + gradients + rest if accumulates else backward) + state.state,
        weights + gradients + state.state + state.scratch,
    )
    return Plan(
        name or (type(method).__name__ if method is not None else type(model).__name__),
        base,
        constants,
        adapters,
        gradients,
        state.state,
        rest,
        own,
        peak + own,
        state.host,
        notes,
    )


def _attach(module: nn.Module, method: Method, dtype: torch.dtype | None) -> None:
    """Attaches a method to a module on the meta device, its base quantised before as it would be."""
    quantize = method.base_storage()
    if quantize is not None:
        quantize_base(module, make_quantizer(quantize), method.keeps_float(module), torch.device("meta"))
    method.attach(module, dtype)


def _additions(module: nn.Module) -> Iterator[Tensor]:
    """All tensors of adapters, those that are frozen too."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if ".peft." in f".{name}":
            yield tensor


def _step(module: Any, batch: Any) -> Tensor:
    if hasattr(module, "training_step"):
        output = module.training_step(batch, 0)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            raise ValueError(f"plan: training_step of {type(module).__name__} returns no loss. {_OWN_STEP}")
        return loss
    output = module(**batch)
    return output if isinstance(output, Tensor) else output.loss


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Tells what a step raises that depends on values, or on a trainer."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        yield
    except RuntimeError as error:
        if "is not attached to a `Trainer`" in str(error):
            raise ValueError(
                f"plan: training_step of {kind} asks for its trainer, and there is none. {_OWN_STEP}"
            ) from error
        if not isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            raise
        raise ValueError(
            f"plan: a step of {kind} depends on the values of its batch ({error.func}), which fake tensors have not: "
            "its activations cannot be told before the run."
        ) from error
