"""Every random choice of a pair, derived from what the pair is.

Nothing depends on worker order or on how often something was retried.
"""

import hashlib

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
