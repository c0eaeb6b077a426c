"""A small policy for the study, taught by the packaged model: ``python -m benchmarks.study_policy FOLDER``.

The packaged model answers prompts of the training split; a Llama of 1.7 million parameters with a vocabulary of its own
learns those answers. A run of it takes a minute and a half where one of the packaged model takes five, so that there
can be more labels and more seeds. Answers are kept in ``FOLDER/answers.json`` and sampled once.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilaf_ray import build
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.tiny_models import END, make_tiny_tokenizer
from pilaf_ray.engines.generator import Generator
from pilaf_ray.sampling.identity import derive_seed
from pilaf_ray.types import FinishReason, GenerationRequest, Prompt, SampledResponse

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs/study-small.yaml"
"""How runs show the policy its prompts."""
VOCABULARY = 2048
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 3}
AT_ONCE = 64
"""Prompts whose answers are sampled together."""
NOT_LEARNED = -100
"""Label of a token that the loss leaves out."""


def taught_prompts(config: RunConfig) -> Sequence[Prompt]:
    """Of the training split, as ``config``'s policy tokenises them."""
    return build.build_inputs(config).evaluation.prompts


def load(config: Path, prompts: int, *words: str) -> RunConfig:
    """The study's configuration, with training prompts in the place of held-out ones."""
    path = "prompts.evaluation.path=builtin:reviews/train"
    return load_config(config, [path, f"evaluation.prompts={prompts}", *words])


async def sample_answers(config: RunConfig, answers: int) -> list[tuple[str, str]]:
    """(prompt id, text) of ``answers`` responses to each prompt; those that ended carry the end of sequence."""
    inputs = build.build_inputs(config)
    generator = Generator(**build.generator_arguments(config, inputs))

    async def one(prompt: Prompt, draw: int) -> tuple[str, str]:
        name = f"{prompt.prompt_id}-{draw}"
        response: SampledResponse = await generator.generate(
            GenerationRequest(
                request_id=name, prompt_token_ids=prompt.token_ids, coefficient=0.0, seed=derive_seed(name, "answer")
            )
        )
        return prompt.prompt_id, response.text + (END if response.finish_reason is FinishReason.STOP else "")

    found: list[tuple[str, str]] = []
    await generator.start()
    try:
        prompts = inputs.evaluation.prompts
        for start in range(0, len(prompts), AT_ONCE):
            # Round by round, so that a prompt's later answers find its cache.
            some = [(prompt, draw) for draw in range(answers) for prompt in prompts[start : start + AT_ONCE]]
            found += await asyncio.gather(*(one(*item) for item in some))
            typer.echo(f"{len(found)} answers")
    finally:
        await generator.stop()
    return found


def new_policy(folder: Path, texts: Sequence[str], *, seed: int) -> None:
    """Write a network with random weights, and a tokenizer made of ``texts``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer: Any = make_tiny_tokenizer(vocab=VOCABULARY, corpus=texts)
    torch.manual_seed(seed)
    config: Any = LlamaConfig(
        **SHAPE,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(
    folder: Path, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, epochs: int, rate: float, batch: int = 16
) -> "LlamaForCausalLM":
    """Fit the network in ``folder`` to (prompt, response) tokens, on the response's tokens alone; returns it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(pairs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.05)
    for epoch in range(epochs):
        order, losses, started = torch.randperm(len(pairs)).tolist(), [], time.monotonic()
        for start in range(0, len(pairs), batch):
            some = [pairs[index] for index in order[start : start + batch]]
            tokens = pad_sequence([torch.tensor([*p, *r]) for p, r in some], batch_first=True)
            labels = pad_sequence(
                [torch.tensor([*[NOT_LEARNED] * len(p), *r]) for p, r in some],
                batch_first=True,
                padding_value=NOT_LEARNED,
            )
            loss = network(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        typer.echo(f"epoch {epoch + 1}: {mean:.3f} nats a token, {time.monotonic() - started:.0f} s")
    return network


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model goes.")] = ROOT / ".cache/models/reviews-2m",
    config: Annotated[Path, typer.Option(help="Names the teacher and the prompts.")] = ROOT / "configs/study.yaml",
    prompts: Annotated[int, typer.Option(min=1, help="Of the training split.")] = 640,
    answers: Annotated[int, typer.Option(min=1, help="To each prompt.")] = 8,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order.")] = 0,
) -> None:
    """Make the policy."""
    kept = folder / "answers.json"
    if not kept.is_file():
        sampled = asyncio.run(
            sample_answers(load(config, prompts, f"generation.cpu_threads={os.cpu_count()}"), answers)
        )
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(sampled))
    said: list[tuple[str, str]] = [(name, text) for name, text in json.loads(kept.read_text())]
    texts = {prompt.prompt_id: prompt.text for prompt in taught_prompts(load(config, prompts))}
    new_policy(folder, [*texts.values(), *(text.removesuffix(END) for _, text in said)], seed=seed)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    small = load(SMALL, prompts, f"model.policy={folder}")
    rendered = {prompt.prompt_id: prompt.token_ids for prompt in taught_prompts(small)}
    pairs = [(rendered[name], tokenizer(text)["input_ids"]) for name, text in said if name in rendered]
    teach(folder, pairs, epochs=epochs, rate=rate).save_pretrained(folder)
    typer.echo(f"taught {len(pairs)} answers: {folder}")


if __name__ == "__main__":
    typer.run(main)
