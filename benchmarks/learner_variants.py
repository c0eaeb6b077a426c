"""The learners that `benchmarks.learner` compares, each in a process of its own that takes a step when told to.

All train the same weights on the same tokens, with AdamW (fused), the same learning rate, clipping and dtype. Log π_ref
of each sequence is given to both DPO learners with the batch, so neither runs a reference.
"""

import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner_compiled import compile_layers, load_compiler
from benchmarks.workers import Commands, forget_peak, peak_mib, resident_mib
from pilaf_ray.data.made_pairs import made_pair

Row = dict[str, Any]
"""A pair: token ids ``prompt``, ``a`` (preferred) and ``b``, and log π_ref ``reference_a`` and ``reference_b``."""
Step = Callable[[], float | None]
"""One step; returns the loss before it, where there is one."""


class Turns:
    """Answers each command with the seconds of a step, its loss and the memory up to then."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._before_model = 0.0

    def libraries_are_loaded(self) -> None:
        """The model comes next."""
        self._before_model = resident_mib()

    def model_is_ready(self) -> None:
        """What loading has taken at its peak does not count."""
        forget_peak()

    def wait(self) -> bool:
        """Whether another step is wanted; returns when it is."""
        return next(self._commands, None) is not None

    def done(self, seconds: float, loss: float | None, **more: Any) -> None:
        self._commands.answer(
            {
                "seconds": seconds,
                "loss": loss,
                "peak_mib": peak_mib(),
                "before_model_mib": self._before_model,
                "threads": torch.get_num_threads(),
                **more,
            }
        )

    def take(self, step: Step) -> None:
        """Take steps for as long as they are wanted."""
        self.model_is_ready()
        while self.wait():
            started = time.perf_counter()
            loss = step()
            self.done(time.perf_counter() - started, loss)


def pilaf_ray(turns: Turns, batch: Sequence[Row], arguments: dict[str, Any]) -> None:
    """The policy learner of a run: rank 0 of 1, through DeepSpeed; ``compiled``: with layers that are."""
    compiled = arguments.pop("compiled", False)
    if compiled:
        load_compiler()
    import deepspeed  # noqa: F401 - the learner imports it when the model is loaded
    import transformers  # noqa: F401

    from pilaf_ray.engines.learner import PolicyLearner
    from pilaf_ray.engines.rendezvous import free_address
    from pilaf_ray.engines.zero_options import OffloadSettings

    turns.libraries_are_loaded()
    address, port = free_address()
    learner = PolicyLearner(
        rank=0,
        master_addr=address,
        master_port=port,
        dump_folder=Path(arguments.pop("dump_folder")),
        betas=tuple(arguments.pop("betas")),
        offload=OffloadSettings(**arguments.pop("offload")),
        **arguments,
    )
    if compiled:
        compile_layers(learner._engine.network)
    items = [
        made_pair(
            index,
            row["prompt"],
            row["a"],
            row["b"],
            probability=1.0,
            reference=(row["reference_a"], row["reference_b"]),
        )
        for index, row in enumerate(batch)
    ]
    steps = count(1)
    turns.take(lambda: learner.train_step(next(steps), items).loss)


def trl(turns: Turns, batch: Sequence[Row], arguments: dict[str, Any]) -> None:
    """TRL's DPOTrainer: its own training loop, which is made to wait between its steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    turns.libraries_are_loaded()

    class GivenTokens(DPOTrainer):  # type: ignore[misc]  # trl ships no types
        """Takes tokens and log π_ref as they are: TRL would tokenise texts, and run the reference beforehand."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            seen.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    seen: list[float] = []
    rows = [
        {
            "prompt_ids": row["prompt"],
            "chosen_ids": row["a"],
            "rejected_ids": row["b"],
            "ref_chosen_logps": row["reference_a"],
            "ref_rejected_logps": row["reference_b"],
        }
        for row in batch
    ]
    trainer = GivenTokens(
        AutoModelForCausalLM.from_pretrained(arguments["model_path"], dtype=torch.float32),
        args=_trl_settings(arguments, pairs=len(batch)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments["model_path"]),
        callbacks=[_on_demand(turns, seen)],
    )
    trainer.train()


def _on_demand(turns: Turns, losses: list[float]) -> Any:
    """A callback that lets TRL take one step a command; ``losses`` gets those of a step's forwards."""
    from transformers import TrainerCallback

    class OnDemand(TrainerCallback):  # type: ignore[misc]
        """Waits before each step, answers after it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.model_is_ready()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not turns.wait():
                raise SystemExit
            losses.clear()
            self._started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done(time.perf_counter() - self._started, sum(losses) / len(losses))

    return OnDemand()


def _trl_settings(arguments: dict[str, Any], *, pairs: int) -> Any:
    """TRL's configuration of the learner that ``arguments`` describe, for a batch of ``pairs``."""
    from trl import DPOConfig

    at_once = arguments["pairs_per_forward"] or pairs
    return DPOConfig(
        output_dir="/tmp/trl-dpo",
        max_steps=10**9,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=-(-pairs // at_once),
        precompute_ref_log_probs=True,
        loss_type=["sigmoid"],
        beta=arguments["beta"],
        learning_rate=arguments["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=arguments["betas"][0],
        adam_beta2=arguments["betas"][1],
        weight_decay=arguments["weight_decay"],
        max_grad_norm=arguments["max_grad_norm"],
        max_length=None,
        # Weights in float32 and products in bfloat16, as DeepSpeed has them.
        bf16=arguments["precision"] == "bfloat16",
        gradient_checkpointing=arguments["gradient_checkpointing"],
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def forward_backward(turns: Turns, batch: Sequence[Row], arguments: dict[str, Any]) -> None:
    """The bare Hugging Face model: logits of all rows at once, cross-entropy, gradients; no optimizer."""
    from transformers import AutoModelForCausalLM

    turns.libraries_are_loaded()
    dtype = getattr(torch, arguments["precision"])
    network: Any = AutoModelForCausalLM.from_pretrained(arguments["model_path"], dtype=dtype).train()
    sequences = [row["prompt"] + row[side] for side in ("a", "b") for row in batch]
    width = max(map(len, sequences))
    input_ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
    attention_mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences])
    labels = input_ids.masked_fill(attention_mask == 0, -100)

    def step() -> None:
        network(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss.backward()
        network.zero_grad()

    turns.take(step)


def matrix_products(turns: Turns, _: Sequence[Row], arguments: dict[str, Any]) -> None:
    """Nothing but products of a micro-batch with matrices of the model's shapes: what the core can do."""
    dtype = getattr(torch, arguments["precision"])
    rates: dict[str, float] = {}
    turns.model_is_ready()
    while turns.wait():
        started = time.perf_counter()
        for rows, width, out in arguments["shapes"]:
            left, right = torch.randn(rows, width, dtype=dtype), torch.randn(width, out, dtype=dtype)
            result = torch.mm(left, right)
            done, begun = 0, time.perf_counter()
            while done < 3 or time.perf_counter() - begun < arguments["shape_seconds"]:
                torch.mm(left, right, out=result)
                done += 1
            seconds = time.perf_counter() - begun
            rates[f"{rows}x{width}x{out}"] = 2 * rows * width * out * done / seconds
        turns.done(time.perf_counter() - started, None, flops_per_second=rates)


VARIANTS: dict[str, Callable[[Turns, Sequence[Row], dict[str, Any]], None]] = {
    function.__name__: function for function in (pilaf_ray, trl, forward_backward, matrix_products)
}


def main() -> None:
    """Serve the variant that the first line names."""
    commands = Commands()
    arguments = commands.arguments
    torch.set_num_threads(arguments["threads"])
    VARIANTS[arguments["variant"]](Turns(commands), arguments["batch"], arguments["settings"])


if __name__ == "__main__":
    main()
