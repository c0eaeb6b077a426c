"""Our learner with decoder layers that torch.compile has seen: a row of `benchmarks.learner`, and nothing of a run.

The products of linear layers stay as they are: their backward pass adds to ``.grad`` (engines/direct_gradients.py), a
side effect that Dynamo refuses in an autograd function. So each layer falls into pieces between its products, and what
is compiled are those: norms, rotary positions, what surrounds attention, activations and residual sums. Embeddings and
the head (engines/head_logprobs.py) are outside of the layers.
"""

from typing import Any

import torch
from torch import nn


def load_compiler() -> None:
    """Import what compiling needs, so that its libraries count as libraries."""
    import torch._dynamo
    import torch._inductor.compile_fx

    # Beyond the limit a layer would run as it is, and the row would tell nothing.
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compile_layers(network: nn.Module) -> int:
    """Compile each decoder layer of ``network``, for micro-batches of any size, when it is called; returns how many.

    Raises:
        SystemExit: there is none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from pilaf_ray.engines.direct_gradients import DirectLinear

    # Dynamo would find out by itself, for every layer anew.
    unseen: Any = torch.compiler.disable(DirectLinear.forward)
    DirectLinear.forward = unseen  # type: ignore[method-assign]
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SystemExit("--compiled: the model has no layers that transformers marks as such")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
