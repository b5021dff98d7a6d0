"""How each layer type is read and applied: one small `LayerOps` per type, known by its qualified class name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core import quantized, wrapped
from lit_peft.core.dtypes import dequantises_itself
from lit_peft.core.products import add_matmul, as_rows
from lit_peft.core.swap import Swapped

_REGISTRY: dict[str, "LayerOps"] = {}


def register_layer_ops(*qualified_names: str) -> Any:
    """Class decorator that makes a `LayerOps` serve layers of these classes and their subclasses.

    Names, not classes, so that nothing need be imported: third parties register theirs the same way.

        @register_layer_ops("my_package.layers.TernaryLinear")
        class TernaryOps(LinearOps): ...
    """

    def register(cls: type[LayerOps]) -> type[LayerOps]:
        for name in qualified_names:
            _REGISTRY[name] = cls()
        return cls

    return register


def find_layer_ops(layer: nn.Module) -> "LayerOps | None":
    """The `LayerOps` of the layer's class or of its nearest base class, or None for a module that has none."""
    return class_layer_ops(type(layer))


def class_layer_ops(layer_class: type) -> "LayerOps | None":
    """The same for a class."""
    for cls in layer_class.__mro__:
        ops = _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")
        if ops is not None:
            return ops
    return None


def layer_ops(layer: nn.Module) -> "LayerOps":
    """The `LayerOps` of the layer.

    Raises:
        TypeError: For a layer of a type that none is registered for.
    """
    # An adapted class has it at hand: looking names up at every forward would cost as much as a small layer.
    ops: LayerOps | None = getattr(type(layer), "layer_ops", None) or find_layer_ops(layer)
    if ops is None:
        known = ", ".join(sorted(name.rsplit(".", 1)[-1] for name in _REGISTRY))
        raise TypeError(
            f"{type(layer).__module__}.{type(layer).__qualname__} has no weight matrix that lit-peft knows how to "
            f"read (known: {known}); lit_peft.core.layers.register_layer_ops adds a type."
        )
    return ops


class LayerOps:
    """Reads and applies one layer type as a matrix [out, in]. The base class serves dense linear layers.

    Dense weights that come in are cast to the dtype of the activations, so that float32 adapters compute in
    the model's own precision; under autocast the products are cast again by autocast itself.
    """

    is_linear = True
    """Whether the layer multiplies a vector by its matrix, y = Wx + b, as "all-linear" means it."""
    looks_up = False
    """Whether the layer is given ids and returns columns of its matrix."""
    fan_in_fan_out = False
    """Whether a linear layer stores its weight as [in, out]; HF PEFT's name for it."""
    features_last = True
    """Whether the last dimension of an output holds its features."""

    def size(self, layer: Any) -> tuple[int, int]:
        """(out, in), the logical shape, without reading the weight."""
        return layer.weight.shape[0], layer.weight.shape[1]

    def fan_in(self, layer: Any) -> int:
        """How many inputs an output sums over, for initialising a factor [r, in]."""
        return self.size(layer)[1]

    def matrix(self, layer: Any) -> Tensor:
        """The dense weight, [out, in], dequantised where needed."""
        return layer.weight

    def float_matrix(self, layer: Any) -> Tensor:
        """The same in float32, for arithmetic; a quantised one straight from its codes, rounded to no other dtype."""
        return self.matrix(layer).float()

    def bias(self, layer: Any) -> Tensor | None:
        """The bias, [out], or None."""
        return getattr(layer, "bias", None)

    def quantization(self, layer: Any) -> str | None:
        """In what the weight is stored if that is fewer bits than it is computed in, "nf4 in blocks of 64"; else None.

        Layers of one kind and another kind hold other values, whatever they were made from.
        """
        return None

    def codes(self, layer: Any) -> Tensor:
        """The quantised weight as it is stored: what a fingerprint is of."""
        return layer.weight.detach()

    def stored(self, layer: Any) -> list[Tensor]:
        """All tensors that a quantised weight is made of, codes first, then its constants: what memory it takes."""
        return [layer.weight]

    def scales(self, layer: Any) -> Tensor | None:
        """What the codes of a quantised weight are multiplied by, of any shape; None where nothing is.

        A fingerprint holds how large they are. By default, the first of the constants that is in floating point.
        """
        return next((t for t in self.stored(layer)[1:] if t.is_floating_point()), None)

    def store(self, layer: Any, W: Tensor, b: Tensor | None) -> None:
        """Writes a weight [out, in] and a bias [out] into the layer, in its own dtype and layout, in place.

        A quantised layer quantises it anew, which rounds.
        """
        self.store_matrix(layer, W)
        if b is not None:
            layer.bias.data.copy_(b)

    def store_matrix(self, layer: Any, W: Tensor) -> None:
        """`store` of the weight alone: what a layer type overrides whose `matrix` is no view of it."""
        self.matrix(layer).data.copy_(W)

    def keep(self, layer: Any) -> Any:
        """What `put_back` needs to give a layer the weight and the bias that it has now, on the host.

        A layer type with quantised weights keeps their codes and constants: to store a dense one again would round.
        """
        b = self.bias(layer)
        W = self.matrix(layer).detach()
        return W.to("cpu", copy=True), None if b is None else b.detach().to("cpu", copy=True)

    def put_back(self, layer: Any, kept: Any) -> None:
        """Gives a layer what `keep` took down of it, bit for bit, also where `make_dense` has changed it since."""
        self.store(layer, *kept)

    def make_dense(self, layer: Any, W: Tensor) -> None:
        """Makes a quantised layer a dense one, in place, of the class that it was quantised from.

        Args:
            layer: The layer; its bias stays as it is.
            W: Its weight, [out, in], in the dtype that it is to have.
        """
        raise TypeError(f"{type(self).__name__} must define make_dense(layer, W), and keep and put_back with it.")

    def apply(self, layer: Any, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """What the layer would return with weight `W`, [n, in], and bias `b`, [n]: n output features."""
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def separable(self, layer: Any) -> bool:
        """Whether `apply(x, B @ A)` equals `combine(y, apply(x, A), B)`, so that a low rank is worth using."""
        return True

    def combine(self, y: Tensor, h: Tensor, B: Tensor, alpha: float) -> Tensor:
        """`y + alpha * B h` over the feature dimension; `h`: [..., r], `B`: [out, r]. One kernel, a new tensor."""
        if torch.compiler.is_compiling():  # the sum is fused into what follows; scaled later, alpha * dy is written
            return y + F.linear(alpha * h, B.to(h.dtype))
        return torch.addmm(as_rows(y), as_rows(h), B.to(h.dtype).t(), alpha=alpha).view_as(y)

    def add_low_rank(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
        """`y + alpha * B A x`, with `A`: [r, in], `B`: [out, r]; through r features where the layer allows it."""
        if not self.separable(layer):
            return y + self.apply(layer, x, alpha * (B @ A))
        return self.combine(y, self.apply(layer, x, A), B, alpha)

    def factor_weights(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """`A`, [r, in], and `B`, [out, r], as weights of two layers in a row that do what `apply(x, B @ A)` does.

        None where two layers of the plain kind, with this one's size, stride and padding alone, do not.
        """
        return A, B

    def along_features(self, v: Tensor) -> Tensor:
        """`v`, [n], shaped so that it broadcasts over the n features of an output."""
        return v

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The matrix in the dtype that it is multiplied in, [out, in]."""
        return self.matrix(layer).to(dtype)

    def add_product(self, layer: Any, x: Tensor, y: Tensor) -> None:
        """Adds `W x`, `x`: [rows, in], to `y`: [rows, out], in place and outside autograd.

        The product of a linear layer, without its bias; in one kernel.
        """
        add_matmul(y, x, self.dense(layer, x.dtype).t())

    def product_t(self, layer: Any, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """`W^T dy`, [rows, out] -> [rows, in], outside autograd; added in place to `onto`, if that is given."""
        W = self.dense(layer, dy.dtype)
        return torch.mm(dy, W) if onto is None else add_matmul(onto, dy, W)


@register_layer_ops("torch.nn.modules.linear.Linear")
class LinearOps(LayerOps):
    """`nn.Linear`: weight [out, in], dense or a tensor that dequantises itself, as torchao's do."""

    def matrix(self, layer: Any) -> Tensor:
        W = layer.weight
        return W.dequantize() if dequantises_itself(W) else W

    def float_matrix(self, layer: Any) -> Tensor:
        W = layer.weight
        return wrapped.dense(W) if dequantises_itself(W) else super().float_matrix(layer)

    def quantization(self, layer: Any) -> str | None:
        return wrapped.told(layer.weight) if dequantises_itself(layer.weight) else None

    def codes(self, layer: Any) -> Tensor:
        return self.stored(layer)[0].detach()

    def stored(self, layer: Any) -> list[Tensor]:
        return wrapped.parts(layer.weight) if dequantises_itself(layer.weight) else [layer.weight]

    def store_matrix(self, layer: Any, W: Tensor) -> None:
        if dequantises_itself(layer.weight):
            wrapped.store(layer, W)
        else:
            super().store_matrix(layer, W)

    def keep(self, layer: Any) -> Any:
        return wrapped.keep(layer) if dequantises_itself(layer.weight) else super().keep(layer)

    def put_back(self, layer: Any, kept: Any) -> None:
        if isinstance(kept, wrapped.Kept):
            wrapped.put_back(layer, kept)
        else:
            super().put_back(layer, kept)

    def make_dense(self, layer: Any, W: Tensor) -> None:
        if not dequantises_itself(layer.weight):
            super().make_dense(layer, W)
        wrapped.make_dense(layer, W)


@register_layer_ops("transformers.pytorch_utils.Conv1D")
class Conv1DOps(LayerOps):
    """GPT-2's Conv1D: a linear layer whose weight is stored as [in, out]."""

    fan_in_fan_out = True

    def size(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def matrix(self, layer: Any) -> Tensor:
        return layer.weight.t()


class BitsandbytesOps(LayerOps):
    """What bitsandbytes' two kinds of linear layer have in common: how they become dense, and are put back."""

    def keep(self, layer: Any) -> quantized.Kept:
        return quantized.keep(layer)

    def put_back(self, layer: Any, kept: quantized.Kept) -> None:
        quantized.put_back(layer, kept)

    def make_dense(self, layer: Any, W: Tensor) -> None:
        kind = getattr(layer, quantized.SOURCE, nn.Linear)
        transposed = getattr(class_layer_ops(kind), "fan_in_fan_out", False)
        quantized.make_dense(layer, W.t().contiguous() if transposed else W, kind)
        if transposed:
            layer.nf, layer.nx = W.shape


@register_layer_ops("bitsandbytes.nn.modules.Linear4bit")
class Linear4bitOps(BitsandbytesOps):
    """bitsandbytes' 4-bit linear layer; the matrix is dequantised at each use, never kept."""

    def size(self, layer: Any) -> tuple[int, int]:
        # Read from the quantisation state: the packed weight has another shape.
        state = quantized.state_4bit(layer)
        return tuple(state.shape) if state is not None else super().size(layer)

    def matrix(self, layer: Any) -> Tensor:
        return quantized.dense_4bit(layer)

    def float_matrix(self, layer: Any) -> Tensor:
        return quantized.dense_4bit(layer, torch.float32)

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return quantized.dense_4bit(layer, dtype)

    def add_product(self, layer: Any, x: Tensor, y: Tensor) -> None:
        if quantized.multiplies_dense(layer, x) and (layer.compute_dtype or x.dtype) == y.dtype:
            super().add_product(layer, x, y)
        else:
            y += quantized.forward_4bit(layer, x, with_bias=False)

    def product_t(self, layer: Any, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        dtype = layer.compute_dtype or dy.dtype
        if dtype != dy.dtype:
            dx = super().product_t(layer, dy.to(dtype)).to(dy.dtype)
            return dx if onto is None else onto.add_(dx)
        slices = quantized.slices_4bit(layer)
        if len(slices) == 1:
            return super().product_t(layer, dy, onto)
        dx = dy.new_empty(len(dy), self.size(layer)[1]) if onto is None else onto
        for columns in slices:
            add_matmul(dx[:, columns], dy, quantized.dense_4bit(layer, dtype, columns), beta=0 if onto is None else 1)
        return dx

    def quantization(self, layer: Any) -> str | None:
        state = quantized.state_4bit(layer)
        return None if state is None else quantized.told_4bit(state.quant_type, state.blocksize, state.nested)

    def codes(self, layer: Any) -> Tensor:
        return layer.weight.detach().view(torch.uint8)  # whatever they are stored as

    def stored(self, layer: Any) -> list[Tensor]:
        state = quantized.state_4bit(layer)
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [layer.weight, state.absmax, state.code, *nested]

    def scales(self, layer: Any) -> Tensor:
        state = quantized.state_4bit(layer)
        return state.offset if state.nested else state.absmax  # their mean, as it was before they were rounded to 8 bit

    def store_matrix(self, layer: Any, W: Tensor) -> None:
        quantized.store_4bit(layer, W)


@register_layer_ops("bitsandbytes.nn.modules.Linear8bitLt")
class Linear8bitOps(BitsandbytesOps):
    """bitsandbytes' LLM.int8 linear layer with a weight in int8, one scale a row."""

    def matrix(self, layer: Any) -> Tensor:
        return quantized.dense_8bit(layer)

    def dense(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return quantized.dense_8bit(layer, dtype)

    def add_product(self, layer: Any, x: Tensor, y: Tensor) -> None:
        y += quantized.forward_8bit(layer, x, with_bias=False)

    def quantization(self, layer: Any) -> str | None:
        return None if quantized.scales_8bit(layer) is None else "int8 by rows"

    def stored(self, layer: Any) -> list[Tensor]:
        return [layer.weight, quantized.scales_8bit(layer)]

    def store_matrix(self, layer: Any, W: Tensor) -> None:
        quantized.store_8bit(layer, W)


@register_layer_ops("torch.nn.modules.sparse.Embedding")
class EmbeddingOps(LayerOps):
    """`nn.Embedding` as a matrix on one-hot vectors: [out, in] = [dim, vocabulary], the stored weight's transpose."""

    is_linear = False
    looks_up = True

    def size(self, layer: Any) -> tuple[int, int]:
        if layer.max_norm is not None:
            raise TypeError("An embedding with max_norm rewrites its own weight as it runs and cannot be adapted.")
        owner = next(c for c in type(layer).__mro__ if "forward" in vars(c) and not issubclass(c, Swapped))
        if owner is not nn.Embedding and not hasattr(layer, "embed_scale"):
            raise TypeError(f"{owner.__qualname__} looks up something else than the ids it is given; not adapted.")
        return layer.weight.shape[1], layer.weight.shape[0]

    def matrix(self, layer: Any) -> Tensor:
        return layer.weight.t()

    def fan_in(self, layer: Any) -> int:
        return 1  # a look-up reads one column

    def bias(self, layer: Any) -> None:
        return None

    def apply(self, layer: Any, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        rows = F.embedding(x, W.t(), layer.padding_idx, None, 2.0, layer.scale_grad_by_freq)
        # Gemma's and BART's embeddings multiply what they look up.
        return (rows * getattr(layer, "embed_scale", 1.0)).to(layer.weight.dtype)


@register_layer_ops("torch.nn.modules.conv.Conv2d")
class Conv2dOps(LayerOps):
    """`nn.Conv2d` as a matrix on patches: [out, in] = [channels out, channels in / groups x height x width]."""

    is_linear = False
    features_last = False

    def size(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight[0].numel()

    def matrix(self, layer: Any) -> Tensor:
        return layer.weight.flatten(1)

    def apply(self, layer: Any, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        kernel = W.view(W.shape[0], *layer.weight.shape[1:]).to(x.dtype)
        return layer._conv_forward(x, kernel, None if b is None else b.to(x.dtype))

    def separable(self, layer: Any) -> bool:
        return layer.groups == 1  # r channels need not divide into the groups

    def factor_weights(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        if layer.groups > 1 or layer.padding_mode != "zeros" or set(layer.dilation) != {1}:
            return None
        return A.view(-1, *layer.weight.shape[1:]), B[:, :, None, None]

    def along_features(self, v: Tensor) -> Tensor:
        return v[:, None, None]

    def combine(self, y: Tensor, h: Tensor, B: Tensor, alpha: float) -> Tensor:
        return y + alpha * F.conv2d(h, B.to(h.dtype)[:, :, None, None])
