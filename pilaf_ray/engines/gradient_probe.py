"""∇log π of single responses, on a part of the parameters and in a random projection."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pilaf_ray.data.collate import collate
from pilaf_ray.engines.core_share import CoreShare
from pilaf_ray.engines.scoring import ScoringModel, load_network
from pilaf_ray.errors import ConfigError
from pilaf_ray.threads import Threads


@dataclass(frozen=True, kw_only=True)
class ResponseGradient:
    """What one response says."""

    policy_logprob: float
    reference_logprob: float
    projected: NDArray[np.float64]
    """∇log π(y) after the projection, shape (projections,)."""


class GradientProbe:
    """Gradients of a policy's log-probabilities, response by response, in fp32.

    The projection is a count sketch: every parameter is added, with a random sign, to one of ``projections``
    numbers. Inner products of projected gradients are unbiased for those of the gradients, with a standard
    deviation of about ‖g‖·‖g'‖/√projections (Charikar, Chen, Farach-Colton 2002).

    Args:
        parameters: regular expression that names of parameters must contain; the last block's when left out.

    Raises:
        ConfigError: no parameter matches.
    """

    def __init__(
        self,
        *,
        policy_path: str,
        reference_path: str,
        parameters: str | None,
        projections: int,
        threads: Threads,
        chunk_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        self._cores = CoreShare(threads)
        policy, reference = (load_network(path, dtype=torch.float32) for path in (policy_path, reference_path))
        self.pattern = parameters or last_block(policy)
        self._parameters = []
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(re.search(self.pattern, name) is not None)
            if parameter.requires_grad:
                self._parameters.append(parameter)
        if not self._parameters:
            raise ConfigError(f"--parameters: no parameter of {policy_path} matches '{self.pattern}'")
        self.count = sum(parameter.numel() for parameter in self._parameters)
        self._policy = ScoringModel(policy, chunk_tokens=chunk_tokens).eval()
        self._reference = ScoringModel(reference, chunk_tokens=chunk_tokens).eval()
        generator = torch.Generator().manual_seed(seed)
        self._projections = projections
        self._places = torch.randint(0, projections, (self.count,), generator=generator)
        self._signs = torch.randint(0, 2, (self.count,), generator=generator).mul_(2).sub_(1).float()

    def measure(self, prompt: Sequence[int], response: Sequence[int]) -> ResponseGradient:
        """log π, log π_ref and ∇log π of one response."""
        self._cores.adapt()
        batch = collate([(tuple(prompt), tuple(response))])
        with torch.no_grad():
            reference = float(self._reference(batch).sum())
        policy = self._policy(batch).sum()
        gradients = torch.autograd.grad(policy, self._parameters, allow_unused=True)
        return ResponseGradient(
            policy_logprob=float(policy.detach()),
            reference_logprob=reference,
            projected=self._project(gradients).numpy().astype(np.float64),
        )

    def _project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        rows = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        return torch.zeros(self._projections).index_add_(0, self._places, torch.cat(rows) * self._signs)


def last_block(network: nn.Module) -> str:
    """A regular expression for the parameters of the last transformer block: the highest number in their names."""
    config: Any = network.config
    found = re.compile(rf"\.{config.num_hidden_layers - 1}\.")
    names = [name for name, _ in network.named_parameters() if found.search(name)]
    if not names:
        raise ConfigError("--parameters: name them, this model's blocks are not numbered")
    place = found.search(names[0])
    assert place is not None
    return "^" + re.escape(names[0][: place.end()])
