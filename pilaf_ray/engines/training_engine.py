"""What every learner does with a network: micro-batches, one optimiser step, checkpoints, whole weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.data.collate import SequenceBatch
from pilaf_ray.engines.direct_gradients import add_gradients_directly
from pilaf_ray.engines.heap import give_back
from pilaf_ray.engines.learner_setup import make_engine
from pilaf_ray.engines.loss_scale import FLOAT16, LossScale, OptimizerStep, scaling_kept
from pilaf_ray.engines.other_ranks import TAG, loading_universal, rng_file, saved_ranks, universal_form
from pilaf_ray.engines.parked_states import ParkedStates
from pilaf_ray.engines.scoring import write_hf_folder
from pilaf_ray.engines.shared_prompt import shares_prompts
from pilaf_ray.errors import CheckpointError
from pilaf_ray.observability.progress import PROGRESS

# DeepSpeed divides by the number of accumulation steps; any number above 1 selects its accumulating code
# path, and the boundary is set by hand because the number of micro-batches differs from step to step.
_ACCUMULATION = 2


class TrainingEngine(ABC):
    """One rank of a network in training; every method is called on all ranks together.

    Args:
        model: what is called; its attribute ``network`` is the Hugging Face model.
        precision: ``float32``, ``bfloat16`` or ``float16``, also of the weights that are handed out and saved.
        max_grad_norm: what the norm of a step's gradient is cut to.
        sequence_parallel: so many neighbouring ranks take the same micro-batches, and each a part of their rows.
        settings: of :func:`pilaf_ray.engines.learner_setup.make_engine`.
    """

    keeps_frozen = True
    """Whether checkpoints hold weights that are not trained; without them those of the model's folder stay."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        world_size: int,
        zero_stage: int,
        precision: str,
        max_grad_norm: float,
        sequence_parallel: int = 1,
        **settings: Any,
    ) -> None:
        self.rank, self.world_size, self._zero_stage = rank, world_size, zero_stage
        self._together = sequence_parallel
        self._dtype: torch.dtype = getattr(torch, precision)
        # Without ZeRO and masters DeepSpeed leaves ``.grad`` to PyTorch; everywhere else it takes gradients from hooks.
        self._plain = zero_stage == 0 and precision == "float32"
        self._max_grad_norm = max_grad_norm
        if self._plain:
            add_gradients_directly(model)
        self._engine, self._schedule = make_engine(
            model,
            zero_stage=zero_stage,
            precision=precision,
            accumulation=_ACCUMULATION,
            # The norm is needed here in any case, and DeepSpeed would look at all gradients again.
            max_grad_norm=0.0 if self._plain else max_grad_norm,
            **settings,
        )
        # On one rank without ZeRO it would copy all gradients to a buffer of their size, and back.
        self._engine.enable_backward_allreduce = zero_stage > 0 or world_size > 1
        self._scale = LossScale(self._engine, zero_stage=zero_stage) if precision == FLOAT16 else None
        self._engine.eval()
        self._parked = ParkedStates(self._engine)

    def __call__(self, *arguments: Any) -> Tensor:
        """The model's forward; without gradients unless :meth:`train` was called."""
        assert not self._parked.is_away, "it is another role's turn"
        output: Tensor = self._engine(*arguments)
        PROGRESS.advance()
        return output

    @abstractmethod
    def per_token(self, batch: SequenceBatch) -> Tensor:
        """One number a response token of ``batch``, in the order of the batch."""

    def shares_prompts(self) -> bool:
        """Whether responses may stand behind one copy of their prompt."""
        return shares_prompts(self.network, self.per_token, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        device: torch.device = self._engine.device
        return device

    @property
    def network(self) -> Any:
        """The Hugging Face model."""
        return self._engine.module.network

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._engine.get_lr()[0])

    def rest(self) -> int:
        """Leave the device, between two calls of others; returns the bytes that it has got back."""
        return self._parked.rest()

    def resume(self) -> None:
        """Come back, the same to the last bit."""
        self._parked.resume()

    def train(self) -> None:
        """Prepare for a step."""
        self._engine.train()

    def eval(self) -> None:
        """Prepare for forwards only."""
        self._engine.eval()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's share of the loss of the whole batch; ``last`` before :meth:`step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._scale is not None:
            loss = self._scale.scaled(loss)
        self._engine.backward(loss * (self.world_size * _ACCUMULATION))
        PROGRESS.advance()

    def step(self) -> OptimizerStep:
        """Update the weights, or in float16 skip the step and lower the loss scale.

        With a norm that is not finite no weight has changed under ZeRO, and without it none
        when the caller refuses: call :meth:`all_finite` and raise.
        """
        taken = self._scaled_step() if self._scale is not None else OptimizerStep(norm=self._step())
        PROGRESS.advance()
        if self.device.type == "cpu":
            give_back()
        return taken

    def _scaled_step(self) -> OptimizerStep:
        assert self._scale is not None, "only float16 is scaled"
        taken = self._scale.step()
        if not taken.skipped and self.all_finite(taken.norm):
            self._schedule.step()
        return taken

    def _step(self) -> Tensor:
        if self._zero_stage == 0:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self.all_finite(norm):
                if self._plain and norm > self._max_grad_norm:
                    torch.nn.utils.clip_grads_with_norm_(self._engine.module.parameters(), self._max_grad_norm, norm)
                self._engine.step()
                self._schedule.step()
            return norm
        self._engine.step()
        # The ZeRO optimizers skip an update with a gradient that is not finite, and go on in silence.
        norm = torch.as_tensor(self._engine.get_global_grad_norm())
        if self.all_finite(norm):
            self._schedule.step()
        return norm

    def all_finite(self, values: Tensor) -> bool:
        """Whether all values are finite on all ranks."""
        bad = (~torch.isfinite(values)).any().to(self.device, torch.float32)
        if self.world_size > 1:
            torch.distributed.all_reduce(bad)
        return bad.item() == 0

    def share(self, groups: list[list[int]]) -> list[list[int]]:
        """This rank's micro-batches of all; every rank gets the same number of them, some empty."""
        parts, part = self.world_size // self._together, self.rank // self._together
        if len(groups) < parts:
            order = [index for group in groups for index in group]
            groups = [order[number::parts] for number in range(parts)]
        rounds = -(-len(groups) // parts)
        mine = groups[part::parts]
        return mine + [[] for _ in range(rounds - len(mine))]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks, each micro-batch once; the names are the same on all."""
        names = sorted(values)
        numbers = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, self.summed(numbers).tolist(), strict=True))

    def gather(self, places: Sequence[int], values: Sequence[float], *, count: int) -> list[float]:
        """One list of ``count`` numbers from those that each rank has of it."""
        numbers = torch.zeros(count, dtype=torch.float64, device=self.device)
        numbers[torch.tensor(places, dtype=torch.long, device=self.device)] = torch.tensor(
            values, dtype=torch.float64, device=self.device
        )
        gathered: list[float] = self.summed(numbers).tolist()
        return gathered

    def summed(self, numbers: Tensor) -> Tensor:
        """``numbers`` summed over the ranks in place; ranks that take the same micro-batches count as one."""
        if self.world_size > 1:
            torch.distributed.all_reduce(numbers)
        return numbers.div_(self._together)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors in the engine's precision, on the CPU.

        Under ZeRO-3 each parameter is gathered on its own, so at most one is whole at a
        time; all ranks must walk the iterator together. A tensor may be the parameter itself:
        it is to be copied before the next is asked for. A tied output head appears once, as
        the input embedding.
        """
        for name, parameter in self.network.named_parameters():
            with self._whole(parameter):
                yield name, parameter.detach().to("cpu", self._dtype)

    def _whole(self, *parameters: nn.Parameter) -> Any:
        """A block in which ``parameters`` are not divided among ranks."""
        import deepspeed

        PROGRESS.advance()
        return deepspeed.zero.GatheredParameters(list(parameters), enabled=hasattr(parameters[0], "ds_id"))

    def save(self, folder: Path, *, state: Mapping[str, Any] | None = None) -> None:
        """DeepSpeed's native checkpoint with ``state``, the RNG state, and a Hugging Face folder ``hf/``."""
        try:
            self._save(folder, dict(state or {}))
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its own.
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{folder}: rank {self.rank} cannot write its checkpoint ({reason}); is the disk full? "
                "Earlier checkpoints are intact: make room and continue with --resume"
            ) from error

    def _save(self, folder: Path, state: dict[str, Any]) -> None:
        state["schedule"] = self._schedule.state_dict()
        self._engine.save_checkpoint(
            str(folder),
            tag=TAG,
            save_latest=False,
            client_state=state,
            exclude_frozen_parameters=not self.keeps_frozen,
        )
        torch.save(torch.get_rng_state(), rng_file(folder, self.rank))
        weights = self._kept(self.named_weights())
        if self.rank == 0:
            write_hf_folder(self.network, weights, folder / "hf")

    def _kept(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies on rank 0; the other ranks walk along and keep nothing, for the whole of a large model is too much."""
        kept = {}
        for name, tensor in tensors:
            if self.rank == 0:
                kept[name] = tensor.clone()
        return kept

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what :meth:`save` wrote, with whatever number of ranks; returns its ``state``.

        Raises:
            CheckpointError: another number of ranks wrote it, and it cannot be converted.
        """
        ranks, strict = saved_ranks(folder), self.keeps_frozen
        with scaling_kept(self._engine.optimizer):
            if ranks == self.world_size or self._zero_stage == 0:
                # Without ZeRO every rank holds the whole state.
                _, state = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=strict)
            else:
                form = universal_form(folder, rank=self.rank, world_size=self.world_size)
                with form as (universal, tag), loading_universal(self._engine):
                    _, state = self._engine.load_checkpoint(str(universal), tag=tag, load_module_strict=strict)
        self._schedule.load_state_dict(state.pop("schedule"))
        for group, rate in zip(self._engine.optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            # The universal form knows one learning rate for all groups.
            group["lr"] = rate
        torch.set_rng_state(torch.load(rng_file(folder, self.rank % ranks), weights_only=True))
        restored: dict[str, Any] = state
        return restored
