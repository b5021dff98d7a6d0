"""What methods are tried on: one small layer of every type, and a tiny model of every architecture, all random."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.quantize import make_quantizer

OUT, IN = 32, 64  # what bitsandbytes' 4-bit blocks divide


# ------------------------------------------------------------------------------------------------ layers


def _quantised(**quantize: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(IN, OUT)
        make_quantizer(quantize).quantize(layer, torch.device("cpu"))
        return layer

    return make


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "conv1d": _conv1d,
    "embedding": lambda: nn.Embedding(IN, OUT),
    "conv2d": lambda: nn.Conv2d(8, OUT, (2, 4), padding=1),
    "grouped_conv2d": lambda: nn.Conv2d(16, OUT, (2, 2), groups=2),
    # In float32, so that what is compared differs by rounding alone: both sides see the same dequantised weight.
    "nf4": _quantised(mode="nf4", compute_dtype="float32"),
    "int8": _quantised(mode="int8"),
    **({"int8_torchao": _quantised(mode="int8_torchao")} if find_spec("torchao") else {}),
}
"""Layer type -> a layer of it; the weight of the linear ones is [32, 64]."""


class Holder(nn.Module):
    """A module with one layer, named `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def holder(kind: str) -> Holder:
    """A seeded `Holder` of a layer type."""
    torch.manual_seed(0)
    return Holder(LAYERS[kind]())


def layer_input(kind: str) -> Tensor:
    """Input for a layer type: token ids, images, or vectors [2, 5, 64]."""
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, IN, (2, 5), generator=generator)
    shape = {"conv2d": (2, 8, 5, 6), "grouped_conv2d": (2, 16, 5, 6)}.get(kind, (2, 5, IN))
    return torch.randn(shape, generator=generator)


# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        name: What it is called here.
        make: Builds it with random weights.
        targets: Names of layers to adapt, for models in which no role is known; null: the method's own default.
        head: Pattern of its last layer.
        inputs: The inputs of a forward pass, by name.
    """

    name: str
    make: Callable[[], nn.Module]
    head: str
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode with seeded weights; biases and norms are not at their usual 0 and 1."""
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def run(self, module: nn.Module, **changes: Tensor) -> Tensor:
        """Its output, the logits, for the inputs."""
        output = module(**self.inputs() | changes)
        return getattr(output, "logits", output)

    @torch.no_grad()
    def evaluate(self, module: nn.Module, **changes: Tensor) -> Tensor:
        """The same without gradients: whether one is asked for decides which kernel attention takes."""
        return self.run(module, **changes)


class MLP(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ConvNet(nn.Module):
    """Two convolutions with a batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


def _noise(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(shape, generator=torch.Generator().manual_seed(3))}


def _tokens(**more: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Two short sequences, the second padded."""
    ids = torch.tensor([[3, 7, 11, 23, 5, 9], [8, 2, 31, 4, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return lambda: {"input_ids": ids.clone(), "attention_mask": mask.clone(), **more}


def _transformer(kind: str, task: str, **shape: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(vocab_size=50, **shape)
        return getattr(transformers, f"{kind}{task}")(config)

    return make


_BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLASSIFIER = "ForSequenceClassification"

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("mlp", MLP, "head", _noise(6, 16), ("first", "second")),
        Model("conv_net", ConvNet, "head", _noise(4, 3, 8, 8), ("first", "second")),
        Model(
            "distilbert",
            _transformer(
                "DistilBert", _CLASSIFIER, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=16
            ),
            "classifier",
            _tokens(),
        ),
        Model("bert", _transformer("Bert", _CLASSIFIER, max_position_embeddings=16, **_BERT), "classifier", _tokens()),
        Model(
            "roberta",
            _transformer("Roberta", _CLASSIFIER, max_position_embeddings=18, **_BERT),
            "classifier.out_proj",
            _tokens(),
        ),
        Model(
            "gpt2",
            _transformer("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=16),
            "ln_f",
            _tokens(),
        ),
        Model(
            "llama",
            _transformer("Llama", "ForCausalLM", num_key_value_heads=1, max_position_embeddings=16, **_BERT),
            "lm_head",
            _tokens(),
        ),
        Model(
            "t5",
            _transformer(
                "T5",
                "ForConditionalGeneration",
                **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            ),
            "decoder.final_layer_norm",
            _tokens(decoder_input_ids=torch.tensor([[0, 4, 9], [0, 6, 2]])),
        ),
    )
}
"""Name -> model: two plain ones, and the shapes of six architectures of transformers."""
