"""Holding a compiled model against the eager one."""

import torch
from torch import nn

from lit_peft.testing.states import perturb
from lit_peft.testing.subjects import Model


def assert_compiles(model: Model, module: nn.Module, backend: str) -> None:
    """Compiles a model that a method is attached to as one graph; outputs and gradients must be eager's.

    Args:
        model: Runs it.
        module: It.
        backend: Of torch.compile.
    """
    perturb(module)
    expected = model.run(module)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    torch._dynamo.reset()
    module.compile(fullgraph=True, backend=backend)
    compiled = model.run(module)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    compiled.square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
