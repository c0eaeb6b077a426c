"""The peer's side of `benchmarks.end_to_end`: TRL's OnlineDPOTrainer on a pilaf_ray config.

Same model, prompts, oracle, lengths, batch, dtype and number of threads; vanilla pairs from Hugging
Face generation. Run by `benchmarks.end_to_end` in a process of its own; prints one JSON line at the end.
"""

import json
import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pilaf_ray.build import build_inputs
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.oracle import FunctionOracleConfig

Messages = list[dict[str, str]]


def main(config_path: str, *overrides: str) -> None:
    """Train ``run.max_steps`` steps and print the seconds of each."""
    config = load_config(Path(config_path), list(overrides))
    inputs = build_inputs(config)
    if not isinstance(config.oracle, FunctionOracleConfig):
        raise SystemExit("oracle.type: the comparison needs a function that scores texts")
    module, name = config.oracle.target.split(":")
    score = getattr(import_module(module), name)

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def reward(prompts: list[Messages], completions: list[Messages], **_: Any) -> list[float]:
        questions, answers = ([turns[-1]["content"] for turns in side] for side in (prompts, completions))
        values: list[float] = score(questions, answers)
        return values

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    dtype = getattr(torch, inputs.dtype)
    policy = AutoModelForCausalLM.from_pretrained(config.model.policy, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(config.model.reference_path, dtype=dtype)
    # As messages, so that TRL renders them with the same chat template and system message.
    system = [{"role": "system", "content": config.prompts.system_prompt}] if config.prompts.system_prompt else []
    prompts = [{"prompt": [*system, {"role": "user", "content": prompt.text}]} for prompt in inputs.train.prompts]
    arguments = OnlineDPOConfig(
        output_dir="/tmp/trl-online-dpo",
        max_steps=config.run.max_steps,
        per_device_train_batch_size=config.learner.batch_pairs,
        learning_rate=config.learner.learning_rate,
        beta=[config.algorithm.beta],
        max_new_tokens=config.generation.max_new_tokens,
        max_length=config.model.max_length,
        temperature=config.generation.temperature,
        bf16=dtype is torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=config.run.seed,
    )
    trainer = OnlineDPOTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(config.model.policy),
        callbacks=[Clock()],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = [after - before for before, after in pairwise([started, *ends])]
    print(json.dumps({"step_seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
