"""Every random choice of a pair, derived from what the pair is.

Nothing depends on worker order or on how often something was retried.
"""

import hashlib
import math

_WORD = 2.0**64


def pair_identity(run_seed: int, epoch: int, prompt_id: str, draw: int) -> str:
    """Identity of a pair: 32 hexadecimal digits, a function of its arguments only."""
    text = f"{run_seed}/{epoch}/{draw}/{prompt_id}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _word(pair_id: str, purpose: str) -> int:
    digest = hashlib.blake2b(f"{pair_id}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def derive_seed(pair_id: str, purpose: str) -> int:
    """A seed in [0, 2^63) for one ``purpose``; engines take signed 64-bit seeds."""
    return _word(pair_id, purpose) >> 1


def derive_uniform(pair_id: str, purpose: str) -> float:
    """A number in [0, 1) for one ``purpose``."""
    # 53 bits, so that the largest word does not round up to 1.
    return (_word(pair_id, purpose) >> 11) / (_WORD / 2**11)


def is_held_out(pair_id: str, share: float) -> bool:
    """Whether a pair belongs to the ``share`` that the reward model never trains on, in every run and attempt."""
    return derive_uniform(pair_id, "reward held out") < share


def bootstrap_weights(pair_id: str, heads: int) -> tuple[float, ...]:
    """How often each of several heads sees a pair: Poisson with mean 1, as a bootstrap of endlessly many pairs draws.

    The same at every use of the pair, in every run and attempt. A single head sees every pair once.
    """
    if heads == 1:
        return (1.0,)
    return tuple(_poisson(derive_uniform(pair_id, f"head {head}")) for head in range(heads))


def _poisson(uniform: float) -> float:
    """The Poisson variable of mean 1 whose distribution function first exceeds ``uniform``."""
    count, probability = 0, math.exp(-1.0)
    total = probability
    # Far in the tail the sum stops growing before it exceeds the largest uniform.
    while uniform >= total and probability > 0.0:
        count += 1
        probability /= count
        total += probability
    return float(count)
