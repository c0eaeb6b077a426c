"""The mixing formula and the Z identity, by enumeration."""

import itertools

import torch

from pilaf_ray.sampling.interpolation import log_z, mix_logits, mixed_logprobs


def test_mixing_is_the_formula_and_ignores_forbidden_entries() -> None:
    policy = torch.tensor([1.0, 2.0, -torch.inf, 0.5])
    reference = torch.tensor([0.0, 4.0, -torch.inf, -torch.inf])
    mixed = mix_logits(policy, reference, 0.5)
    assert mixed.tolist() == [1.5, 1.0, -torch.inf, -torch.inf]
    assert torch.equal(mix_logits(policy, reference, -1.0)[:2], reference[:2])
    assert not mixed_logprobs(policy, reference, 0.5).isnan().any()


def test_z_identity_by_enumeration() -> None:
    """Σ_y q±(y)·∏Z_t = E_π[exp(±r)] over all responses of length 3 on a vocabulary of 3."""
    generator = torch.Generator().manual_seed(0)
    beta, vocab, length = 0.5, 3, 3
    tables = {
        prefix: torch.randn(2, vocab, generator=generator)
        for n in range(length)
        for prefix in itertools.product(range(vocab), repeat=n)
    }
    for sign in (1.0, -1.0):
        left = right = 0.0
        for response in itertools.product(range(vocab), repeat=length):
            q = z = pi = ratio = 0.0
            for t, token in enumerate(response):
                policy, reference = tables[response[:t]]
                q += float(mixed_logprobs(policy, reference, sign * beta)[token])
                z += float(log_z(policy, reference, sign * beta))
                pi += float(policy.log_softmax(-1)[token])
                ratio += float(policy.log_softmax(-1)[token] - reference.log_softmax(-1)[token])
            left += torch.tensor(q + z).exp().item()
            right += torch.tensor(pi + sign * beta * ratio).exp().item()
        assert abs(left - right) < 1e-5
