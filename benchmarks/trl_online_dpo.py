"""The peer's side of `benchmarks.end_to_end` and `time_to_reward`: TRL's OnlineDPOTrainer on a pilaf_ray config.

Same model, prompts, oracle, lengths, batch, dtype and number of threads; vanilla pairs from Hugging
Face generation. Run in a process of its own; prints one JSON line at the end. With ``evaluation.every_steps``
one response to each held-out prompt is sampled and scored at the start and every so many steps, off the clock.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from pilaf_ray.build import build_inputs
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.oracle import FunctionOracleConfig
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.types import Prompt

Messages = list[dict[str, str]]
Score = Callable[[Sequence[str], Sequence[str]], list[float]]


def main(config_path: str, *overrides: str) -> None:
    """Train ``run.max_steps`` steps and print the seconds of each."""
    config = load_config(Path(config_path), list(overrides))
    inputs = build_inputs(config)
    score = scorer(config.oracle)
    tokenizer = AutoTokenizer.from_pretrained(config.model.policy)
    held_out = HeldOut(inputs.evaluation.prompts, score, tokenizer, max_new_tokens=config.generation.max_new_tokens)
    clock = Clock(held_out, every=config.evaluation.every_steps)

    def reward(prompts: list[Messages], completions: list[Messages], **_: Any) -> list[float]:
        questions, answers = ([turns[-1]["content"] for turns in side] for side in (prompts, completions))
        return score(questions, answers)

    # As messages, so that TRL renders them with the same chat template and system message.
    system = [{"role": "system", "content": config.prompts.system_prompt}] if config.prompts.system_prompt else []
    prompts = [{"prompt": [*system, {"role": "user", "content": prompt.text}]} for prompt in inputs.train.prompts]
    trainer = OnlineDPOTrainer(
        # In bfloat16 as ours: weights and moments in fp32, products in bfloat16; the reference has no masters.
        model=AutoModelForCausalLM.from_pretrained(config.model.policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(
            config.model.reference_path, dtype=getattr(torch, inputs.reference_dtype)
        ),
        reward_funcs=reward,
        args=settings(config, reduced=inputs.precision == "bfloat16"),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    found = {"step_seconds": clock.seconds, "threads": torch.get_num_threads(), "evaluations": clock.evaluations}
    print(json.dumps(found))


def settings(config: RunConfig, *, reduced: bool) -> OnlineDPOConfig:
    """TRL's names for what ``config`` says; ``reduced``: products in bfloat16."""
    return OnlineDPOConfig(
        output_dir="/tmp/trl-online-dpo",
        max_steps=config.run.max_steps,
        per_device_train_batch_size=config.learner.batch_pairs,
        learning_rate=config.learner.learning_rate,
        lr_scheduler_type=config.learner.lr_schedule,
        warmup_steps=config.learner.warmup_steps,
        weight_decay=config.learner.weight_decay,
        adam_beta1=config.learner.adam_betas[0],
        adam_beta2=config.learner.adam_betas[1],
        max_grad_norm=config.learner.max_grad_norm,
        beta=[config.algorithm.beta],
        max_new_tokens=config.generation.max_new_tokens,
        max_length=config.model.max_length,
        temperature=config.generation.temperature,
        bf16=reduced,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=config.run.seed,
    )


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """The seconds of each step, and what is measured every so many steps off the clock."""

    def __init__(self, held_out: "HeldOut", *, every: int) -> None:
        self._held_out, self._every = held_out, every
        self._began = 0.0
        self.seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        """The first policy is measured."""
        self._look(model)

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        """A step is done."""
        self.seconds.append(time.perf_counter() - self._began)
        self._look(model)

    def _look(self, model: Any) -> None:
        step = len(self.seconds)
        if self._every and step % self._every == 0:
            found = {"step": step, "seconds": sum(self.seconds), "reward": self._held_out.reward(model)}
            self.evaluations.append(found)
        self._began = time.perf_counter()


def scorer(oracle: object) -> Score:
    """The function that ``oracle`` scores texts with, on its scale; TRL prefers the larger of two scores."""
    if not isinstance(oracle, FunctionOracleConfig) or oracle.kind != "score":
        raise SystemExit("oracle: the comparison needs a function that scores single responses")
    module, name = oracle.target.split(":")
    function = getattr(import_module(module), name)

    def scaled(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [oracle.scale * value for value in function(prompts, responses)]

    return scaled


class HeldOut:
    """The mean score of one response to each of some prompts, sampled at temperature 1 with the same draws each time.

    Args:
        prompts: with their token ids, as pilaf_ray renders them.
        score: of prompts' and responses' texts.
        tokenizer: of the model.
    """

    def __init__(self, prompts: Sequence[Prompt], score: Score, tokenizer: Any, *, max_new_tokens: int) -> None:
        self._prompts, self._score, self._tokenizer = prompts, score, tokenizer
        self._max_new_tokens = max_new_tokens

    @torch.no_grad()
    def reward(self, model: Any, *, batch: int = 16) -> float:
        """Of the model as it is now; its mode and torch's generator are left as they were."""
        was_training, state = model.training, torch.get_rng_state()
        model.eval()
        torch.manual_seed(0)
        texts: list[str] = []
        for start in range(0, len(self._prompts), batch):
            texts += self._sample(model, self._prompts[start : start + batch])
        torch.set_rng_state(state)
        model.train(was_training)
        return statistics.fmean(self._score([prompt.text for prompt in self._prompts], texts))

    def _sample(self, model: Any, prompts: Sequence[Prompt]) -> list[str]:
        width = max(len(prompt.token_ids) for prompt in prompts)
        padded = [[0] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts]
        mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
        found = model.generate(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=self._max_new_tokens,
        )  # fmt: skip
        return self._tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
