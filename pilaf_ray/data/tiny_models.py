"""Tiny random models with a real tokenizer, for tests, examples and smoke runs.

A folder made here is an ordinary Hugging Face model folder: vLLM, DeepSpeed and
transformers load it as they load any other. The weights are random but drawn wide
(``initializer_range``), so that next-token distributions are peaked and two
models of different seeds disagree visibly.

Run ``python -m pilaf_ray.data.tiny_models FOLDER`` to write ``FOLDER/policy``;
add ``--reference-seed N`` for ``FOLDER/reference`` with other weights, and ``--reward-seed N`` for
``FOLDER/reward``, a reward model with yet others.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilaf_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
BYTES_AND_SPECIALS = 256 + 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog near the old river bank.",
    "Rice is rinsed, fried in butter with onion, and simmered in broth until tender.",
    "Which film would you watch again tomorrow evening, and what makes it good?",
    "Write a short, friendly answer about the weather in the mountains today.",
    "She was happy with the result, but the second attempt was even better than that.",
    "There are three reasons for this: the time, the cost, and the people who work there.",
    "Once upon a time there was a small village where everyone knew the miller's cat.",
    "user assistant system question answer please explain name describe summarise list",
)


def make_tiny_llama(folder: Path | str, *, seed: int, tie: bool = True, vocab: int = 512) -> Path:
    """Write a random Llama (hidden 64, 2 layers, about 0.1 M parameters) to ``folder``.

    Args:
        folder: created if missing; files of the same names are overwritten.
        seed: of the weights; the tokenizer does not depend on it.
        tie: whether the output head shares the input embedding.
        vocab: number of tokens, at least 259 (256 bytes and 3 specials).

    Returns:
        The folder, as a path.

    Raises:
        ConfigError: ``vocab`` is too small for a byte-level tokenizer.
    """
    from transformers import LlamaConfig

    tokenizer = make_tiny_tokenizer(vocab=vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=tie,
    )
    return _save(Path(folder), config=config, tokenizer=tokenizer, seed=seed)


def make_tiny_qwen2(folder: Path | str, *, seed: int, tie: bool = False, vocab: int = 512) -> Path:
    """Write a random Qwen2 (biases in attention) to ``folder``; see :func:`make_tiny_llama`."""
    from transformers import Qwen2Config

    tokenizer = make_tiny_tokenizer(vocab=vocab)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=tie,
    )
    return _save(Path(folder), config=config, tokenizer=tokenizer, seed=seed)


def make_tiny_gpt2(folder: Path | str, *, seed: int, vocab: int = 512) -> Path:
    """Write a random GPT-2 (learned positions, layer norms, tied head); see :func:`make_tiny_llama`."""
    from transformers import GPT2Config

    tokenizer = make_tiny_tokenizer(vocab=vocab)
    config = GPT2Config(
        vocab_size=vocab, n_embd=64, n_inner=128, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.2
    )
    return _save(Path(folder), config=config, tokenizer=tokenizer, seed=seed)


def make_tiny_reward_model(base: Path | str, folder: Path | str, *, seed: int = 0) -> Path:
    """Write the model in ``base`` with a random scalar head, as an ordinary reward model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    factory: Any = AutoModelForSequenceClassification  # untyped upstream
    network = factory.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(network.score.weight, std=0.1)
    network.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_tiny_tokenizer(*, vocab: int = 512, corpus: Iterable[str] = CORPUS) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE of exactly ``vocab`` tokens on ``corpus``, a few lines of English when left out.

    Deterministic. Specials: ``<|pad|>`` (pad), ``<|im_start|>``, ``<|im_end|>`` (eos).

    Raises:
        ConfigError: ``vocab`` is outside what the corpus can give.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < BYTES_AND_SPECIALS:
        raise ConfigError(f"vocab={vocab} is too small: a byte-level tokenizer needs {BYTES_AND_SPECIALS}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    if backend.get_vocab_size() != vocab:
        raise ConfigError(f"vocab={vocab} is too large: the corpus gives {backend.get_vocab_size()} tokens")
    make: Any = PreTrainedTokenizerFast  # untyped upstream
    tokenizer: PreTrainedTokenizerFast = make(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _save(folder: Path, *, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerFast", seed: int) -> Path:
    """Draw the weights in fp32 and write model, generation defaults and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory: Any = AutoModelForCausalLM  # untyped upstream
        model = factory.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Biases start at zero; a loader that loses them must not go unnoticed.
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=config.initializer_range)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("wrote a tiny %s to %s", config.model_type, folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``FOLDER [--seed N] [--reference-seed N] [--reward-seed N] [--vocab N]``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="FOLDER/policy is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy's weights")
    parser.add_argument("--reference-seed", type=int, help="also write FOLDER/reference with this seed")
    parser.add_argument("--reward-seed", type=int, help="also write FOLDER/reward, a reward model, with this seed")
    parser.add_argument("--vocab", type=int, default=512, help="number of tokens")
    parsed = parser.parse_args(arguments)
    make_tiny_llama(parsed.folder / "policy", seed=parsed.seed, vocab=parsed.vocab)
    if parsed.reference_seed is not None:
        make_tiny_llama(parsed.folder / "reference", seed=parsed.reference_seed, vocab=parsed.vocab)
    if parsed.reward_seed is not None:
        with tempfile.TemporaryDirectory() as base:
            make_tiny_llama(base, seed=parsed.reward_seed, vocab=parsed.vocab)
            make_tiny_reward_model(base, parsed.folder / "reward", seed=parsed.reward_seed)


if __name__ == "__main__":
    main()
