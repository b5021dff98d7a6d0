"""`Method`: a way of fine-tuning, as a Lightning callback. Subclass it to write a new one."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_peft.core.addition import Addition
from lit_peft.core.attach import ADAPTER_DTYPES, attach, check_attachable, detach
from lit_peft.core.checkpoint import differing
from lit_peft.core.quantize import Quantize, choose_layers, make_quantizer, parse, quantize_base
from lit_peft.core.registry import Adapter, registry
from lit_peft.core.targets import Site, find_parameters, find_sites
from lit_peft.faults import TrainingFault
from lit_peft.methods.checks import check_choice
from lit_peft.methods.registry import class_path
from lit_peft.training import optimizers, seam
from lit_peft.training.gradients import GradientWatch
from lit_peft.training.pruning import Pruned, discount_checkpoints, restart_patience
from lit_peft.training.rates import check_layer_decay, check_patterns, check_rates, find_scales, finds_rate

AdapterDtype = Literal["auto", "float32", "bfloat16"]


class Method(pl.Callback):
    """Base of every method: says what is added to the model and which base parameters train.

    As a callback it attaches itself when the trainer configures the model, after the model is built and before
    it is sharded and the optimizer is made; without a trainer, `attach(module)` does the same. Every constructor
    argument is kept under its own name (as in scikit-learn), so that checkpoints can record it.

    Args:
        train_also: Patterns of base parameters or modules that train beside the adapters and are saved with them,
            a new head for example; never targeted, never quantised. Or {pattern: scale of the learning rate}: the
            first pattern that matches a parameter counts. A LightningModule's own `train_also` (our tasks': whatever
            `from_pretrained` reported as newly initialised) is added, at scale 1 where no pattern says otherwise.
        adapter_dtype: Dtype of everything that trains. "auto": float32, whatever the base is stored in, except
            under `precision: bf16-true`, which asks for bfloat16 throughout. The forward pass computes in the
            activations' dtype either way.
        name: Name of the adapter on the module; two methods on one module need two names.
        update_norm_stats: Whether frozen normalisation layers update their running statistics in training, as they
            do in a plain fine-tuning; the checkpoint then holds them. Otherwise they stay those of the base.
        layer_decay: Factor d, 0 < d <= 1, of the rate of pretrained base parameters from each block to the one below:
            block k of n trains at `lr * d ** (n - 1 - k)`, embeddings at `lr * d ** n`, what stands above the blocks
            and a head that the module itself names at `lr`; times the scale. Adapter tensors do not decay. Blocks
            are counted over the whole module, stack after stack. Howard and Ruder 2018 (ULMFiT), section 3.2,
            with 1 / 2.6; Clark et al. 2020 (ELECTRA), appendix B, with .8 for small and base models.
        quantize: How the frozen base is stored: nf4, fp4, int8 or a mode that another package brings; or its options
            too, {mode: nf4, double_quant: false}; null: as it is. Heads, what trains, weights that are used twice and
            the adapters themselves are left alone. See `lit_peft.core.quantize`.
    """

    learning_rate: ClassVar[float] = 1e-3
    """The rate that a task uses when none is given."""
    optimizer: ClassVar[str] = "torch.optim.AdamW"
    """Path of the optimizer's class that a task uses when none is given."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may differ between a checkpoint and the method it is loaded into. Rates may always, the scales
    of `train_also` and `layer_decay`, except in a fit that resumes: they are the optimizer's, which is restored."""
    keep_originals: ClassVar[bool] = True
    """Whether base parameters that train are copied first, so that `detach` can give them back."""
    _reached: bool | None = None  # whether the goal of `pruned` was, when last looked at

    def __init__(
        self,
        train_also: str | Sequence[str] | Mapping[str, float] = (),
        adapter_dtype: AdapterDtype = "auto",
        name: str = "default",
        update_norm_stats: bool = False,
        layer_decay: float = 1.0,
        quantize: Quantize = None,
    ) -> None:
        check_choice("adapter_dtype", adapter_dtype, ("auto", *ADAPTER_DTYPES))
        self.train_also = check_patterns(train_also)
        self.adapter_dtype = adapter_dtype
        self.name = name
        self.update_norm_stats = update_norm_stats
        self.layer_decay = check_layer_decay(layer_decay)
        self.quantize = parse(quantize)
        self.left_alone: dict[str, str] = {}
        """Path -> why, of each layer that `quantize` has not taken; filled as the method is attached."""

    # ------------------------------------------------------------------------------------------ the contract

    def sites(self, module: nn.Module, avoid: Iterable[str]) -> list[Site]:
        """Places where something is added; none by default.

        Args:
            module: The module to adapt.
            avoid: Paths that `train_also` covers and that must not be targeted.
        """
        return []

    def companions(self, module: nn.Module, sites: list[Site]) -> list[Site]:
        """Further places that additions at `sites` need beside them, where an input is read for example."""
        return []

    def plan(self, sites: list[Site]) -> None:
        """Sees all sites once, before the first `build`: shared tensors, budgets, ranks by name."""

    def build(self, site: Site) -> Addition | None:
        """Allocates the addition of one site, or None to leave it out. Values come later, in `Addition.init`."""
        return None

    def trains(self, name: str) -> bool:
        """Whether the base parameter of this name stays trainable.

        A task that loads its base in fewer bits asks before anything else, to leave weights that train alone.
        """
        return False

    def prepare(self, module: nn.Module, batches: Iterable[Any]) -> None:
        """Initialises from data at the start of the first fit, unless it resumes; values only, never shapes."""

    def before_optimizer_step(self, module: nn.Module) -> None:
        """Runs once an optimizer step, not a micro-batch, with unscaled gradients in place."""

    def after_optimizer_step(self, module: nn.Module) -> None:
        """Runs once an optimizer step, after the parameters moved."""

    def penalty(self, module: nn.Module) -> Tensor | None:
        """A scalar that is added to the training loss, or None."""
        return None

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """Splits the adapter's tensors into optimizer groups: dicts with `params`, a list of names, and `lr`.

        Rates are multiples of `lr`. See `lit_peft.param_groups`, which adds the base parameters that train.
        """
        return [{"params": [name for name, _ in named], "lr": lr}]

    def positions_taken(self, causal: bool) -> int:
        """How many of a model's positions a text must leave to it, of a causal model or of one that is not."""
        return 0

    def notes(self, module: nn.Module) -> list[str]:
        """Lines for below the table of what trains: what it does not tell, a schedule for instance."""
        return []

    def pruned(self, module: nn.Module) -> Pruned | None:
        """How much of the adapter is left, where a method takes parts of it away; None of any other.

        Called on every rank. A run reports it; early stopping waits until its goal is reached, and from the first
        validation after that the best checkpoint is chosen among those that have reached it.
        """
        return None

    def lacks_gradient(self, name: str) -> bool:
        """Whether a trainable parameter may go without a (non-zero) gradient in the first steps."""
        return False

    def log_step(self, module: nn.Module, key: str, value: Tensor) -> None:
        """Logs a figure of a training step, `train/l1`, as the module that the trainer fits would; else nothing."""
        trainer = getattr(module, "_trainer", None)
        if trainer is not None and trainer.training:
            module.log(key if self.name == "default" else f"{key}/{self.name}", value)  # type: ignore[operator]

    # -------------------------------------------------------------------------------------------- attaching

    @torch.inference_mode(False)
    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        """Attaches this method to any module, in place; no trainer needed.

        Args:
            module: The module; a bare `nn.Module` or a LightningModule whose layers exist.
            dtype: Dtype of what trains; by default what `adapter_dtype` says, float32 for "auto".

        Returns:
            The registry's record: sites, base parameters that train.

        Raises:
            ValueError: When targets match nothing, the name is taken, or nothing would train. What the core refuses
                after that finds the base quantised already, and it stays so.
        """
        check_attachable(module, self.name)
        patterns = [*self.train_also, *getattr(module, "train_also", ())]
        also = find_parameters(module, patterns)
        sites = self.sites(module, also.roots)
        sites = [*sites, *self.companions(module, sites)]
        with torch.device("cpu"), seam.default_dtype(torch.float32):  # whatever context Lightning is in
            self.plan(sites)
            additions = [(site, addition) for site in sites if (addition := self.build(site)) is not None]
        base = {name for name, _ in module.named_parameters() if ".peft." not in f".{name}" and self.trains(name)}
        self._quantize(module)
        return attach(
            module,
            self.name,
            additions,
            base | also.names,
            head=also.names,
            scales=find_scales(module, self.train_also),
            spec=self.spec(),
            dtype=dtype or ADAPTER_DTYPES.get(self.adapter_dtype, torch.float32),
            keep_originals=self.keep_originals,
            update_norm_stats=self.update_norm_stats,
        )

    def base_storage(self) -> dict[str, Any] | None:
        """How the base is to be stored, all options by name; asked before it is loaded. None: as it comes."""
        return self.quantize

    def keeps_float(self, module: nn.Module) -> set[str]:
        """Paths of what trains in the base of a module, and is left alone where the base is quantised."""
        patterns = [*self.train_also, *getattr(module, "train_also", ())]
        names = (name.rpartition(".") for name, _ in module.named_parameters() if ".peft." not in f".{name}")
        weights = (path for path, dot, kind in names if kind == "weight" and self.trains(f"{path}{dot}{kind}"))
        return {*find_parameters(module, patterns).roots, *weights}

    def _quantize(self, module: nn.Module) -> None:
        if self.quantize is not None:
            avoid = self.keeps_float(module)
            trainer, quantizer = getattr(module, "_trainer", None), make_quantizer(self.quantize)
            device = None if trainer is None else trainer.strategy.root_device
            quantizer.check_device(device or next(module.parameters()).device)
            self.left_alone = {path: why for path, why in choose_layers(module, quantizer, avoid).items() if why}
            quantize_base(module, quantizer, avoid, device)

    def names_on(self, module: nn.Module) -> list[str]:
        """Names of the adapters that are this method's on a module; none where it is not attached yet."""
        state = registry(module)
        return [self.name] if state is not None and self.name in state.adapters else []

    def is_same(self, adapter: Adapter) -> bool:
        """Whether an adapter of this method's name is what this method would attach."""
        old, new = adapter.spec, self.spec()
        return old["class_path"] == new["class_path"] and not any(
            differing(old["init_args"], new["init_args"], self.may_change, rates=False)
        )

    def additions(self, module: nn.Module) -> dict[str, Any]:
        """Path -> addition of this method, on a module that it is attached to."""
        state = registry(module)
        assert state is not None
        sites = state.adapters[self.name].sites
        return {path: module.get_submodule(path).peft[self.name] for path in sites}  # type: ignore[index]

    def detach(self, module: nn.Module) -> None:
        """Takes this method off again, see `lit_peft.core.attach.detach`."""
        detach(module, self.name)

    @classmethod
    def parameters(cls) -> dict[str, inspect.Parameter]:
        """The constructor's parameters by name, those that it passes on to its base classes included."""
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if issubclass(base, Method):
                for p in list(inspect.signature(base.__init__).parameters.values())[1:]:
                    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                        found.setdefault(p.name, p)
        return found

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments, read back from the attributes of the same names."""
        return {name: getattr(self, name) for name in self.parameters()}

    def spec(self) -> dict[str, Any]:
        """What a checkpoint records of this method: `class_path` and `init_args`."""
        return {"class_path": class_path(type(self)), "init_args": self.arguments()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments().items())})"

    # ------------------------------------------------------------------------- Lightning's hooks, see training/seam.py

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; by name, since a module may carry a method twice."""
        return f"{type(self).__qualname__}.{self.name}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        seam.install(trainer, pl_module)
        if stage == "fit":
            seam.check_hyperparameters(trainer, pl_module)
            self._reached = None

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self._reached} if _overrides(self, "pruned") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reached = state_dict["reached"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for hook in ("penalty", "after_optimizer_step"):
            if _overrides(self, hook) and not pl_module.automatic_optimization:
                raise ValueError(
                    f"{type(self).__name__} acts through `{hook}`, which manual optimization leaves out; "
                    f"set automatic_optimization = True in {type(pl_module).__name__}."
                )
        optimizers.check_optimizers(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if finds_rate(trainer):
            check_rates(trainer, pl_module)  # it has given all groups one rate, unless the module made them anew
        optimizers.begin(trainer, pl_module)
        self._watch = GradientWatch(self)
        self._shapes = {id(optimizer): optimizers.shape_of(optimizer) for optimizer in trainer.optimizers}
        adapter = registry(pl_module).adapters[self.name]  # type: ignore[union-attr]
        if not adapter.prepared and _overrides(self, "prepare"):
            self.prepare(pl_module, trainer.train_dataloader or ())
        adapter.prepared = True
        if self._reached is None:  # not restored from a checkpoint
            self._reached = self._has_reached(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        state = registry(pl_module)
        if state is None or all(adapter.name != self.name for adapter in state.training()):
            raise TrainingFault(
                f"Adapter {self.name!r} has ceased to train in the middle of its fit: something has switched, loaded "
                "or detached. To look at another one for a while, `with lit_peft.running(module, names):`."
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return  # the module skipped this batch
        if self._shapes.get(id(optimizer)) != (shape := optimizers.shape_of(optimizer)):  # a hook has added some
            optimizers.check_trained(pl_module, optimizer)
            self._shapes[id(optimizer)] = shape
        self._watch.step(pl_module, optimizer)
        self.before_optimizer_step(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._choose_anew(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            self._choose_anew(trainer, pl_module)
        elif not self._has_reached(pl_module):  # early stopping may look at epochs in which nothing is validated
            restart_patience(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch.finish()
        self._warn_unless_reached(pl_module, "Training ended")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            self._warn_unless_reached(pl_module, "The checkpoint that is tested was written")

    def _has_reached(self, module: nn.Module) -> bool:
        pruned = self.pruned(module)
        return pruned is None or pruned.reached

    def _choose_anew(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Keeps the scores of an adapter above its goal from deciding; runs before any callback sees the next one."""
        before, self._reached = self._reached, self._has_reached(module)
        if not (before and self._reached):
            restart_patience(trainer)
        if self._reached and not before and discount_checkpoints(trainer):
            done = f"{type(self).__name__} is at its goal, {self.pruned(module)}"
            rank_zero_info(f"{done}: from here on the best checkpoint is chosen anew.")

    def _warn_unless_reached(self, module: nn.Module, what: str) -> None:
        pruned = self.pruned(module)
        if pruned is not None and not pruned.reached:
            rank_zero_warn(f"{what} before {type(self).__name__} was at its goal: {pruned}, not {pruned.goal:,}.")


class TargetedMethod(Method):
    """A method that adds something at chosen layers.

    Args:
        target_modules: Where: roles (query key value output ffn_up ffn_gate ffn_down), groups (attention, ffn,
            all-linear), layer names, globs, `re:` expressions; null for the method's own default.
        exclude_modules: What to leave out of it, in the same language.
        layers: Transformer blocks to keep, as indices or a range "2-5"; null for all.
        **common: See `Method`.
    """

    default_targets: ClassVar[tuple[str, ...]] = ("attention",)
    layers_only: ClassVar[bool] = True
    """Whether sites are layers with a weight matrix; False for additions around any module."""

    def __init__(
        self,
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] = (),
        layers: str | Sequence[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.target_modules = _words(self.default_targets if target_modules is None else target_modules)
        self.exclude_modules = _words(exclude_modules)
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)

    def sites(self, module: nn.Module, avoid: Iterable[str]) -> list[Site]:
        return find_sites(
            module,
            self.target_modules,
            exclude=self.exclude_modules,
            blocks=self.layers,
            avoid=avoid,
            layers_only=self.layers_only,
        )


def _words(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)
