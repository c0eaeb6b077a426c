"""How much memory each role will take, from the shapes of the models and the settings.

One estimate a replica, in named parts, so that a number that surprises can be traced. On
CPUs every part lies in host memory. The constants of this module are measured;
``python -m benchmarks.memory`` compares estimates with the peaks of a real run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pilaf_ray.engines.zero_options import NO_OFFLOAD, OffloadSettings
from pilaf_ray.errors import ModelError

MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RUNTIME_MIB = {"generator": 1560, "learner": 650, "reference": 590, "oracle": 170, "oracle model": 590}
"""Python, Ray, PyTorch and the role's engine: the peaks of configs/tiny.yaml on CPUs, KV cache taken off."""
KEPT_SHARE = 0.9
"""CPU learner: what its heap holds beyond what is in use at the fullest moment, per byte of activations, logits and
gradients: holes, and what a backward pass needs for a moment. Set by one run of configs/quickstart.yaml, not derived.
After a step holes are given back (engines/heap.py), so they do not add up."""
LARGEST_BUCKET = 500_000_000
"""Elements of gradients that DeepSpeed reduces at once: its own choice, where there are as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder that memory depends on.

    Example: ``ModelShape(parameters=134_515_008, layers=30, hidden=576, intermediate=1536,
    vocabulary=49_152, heads=9, kv_heads=3, head_size=64, tied=True)``
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False
    stored: int = 2
    """Bytes of an element in the model's files."""

    def kv_bytes_a_token(self, element: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * element


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes of one replica, by part, on its device and in host memory."""

    role: str
    device: tuple[tuple[str, float], ...]
    host: tuple[tuple[str, float], ...]
    first_only: tuple[str, ...] = ()
    """Parts in host memory that only the first replica has."""

    @property
    def device_bytes(self) -> float:
        """Sum on one device."""
        return sum(size for _, size in self.device)

    @property
    def host_bytes(self) -> float:
        """Sum in host memory; of the first replica, where they differ."""
        return sum(size for _, size in self.host)

    def host_bytes_of(self, replica: int) -> float:
        """Sum in host memory of one replica."""
        return sum(size for name, size in self.host if replica == 0 or name not in self.first_only)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerSettings:
    """What of the learner's settings costs memory."""

    precision: str
    zero_stage: int
    ranks: int
    micro_batch_tokens: int
    logprob_chunk_tokens: int
    gradient_checkpointing: bool
    transport: str
    on_gpu: bool
    adapter_parameters: int | None = None
    """Of low-rank adapters, which are all that is trained and sent; None trains every weight."""
    quantised: bool = False
    """Linear layers below the adapters are held in 4 bits."""
    sequence_parallel: int = 1
    """Ranks that share the tokens of a micro-batch."""
    hybrid_ranks: int = 1
    """Ranks that keep all weights among themselves from the forward to the backward."""
    offload: OffloadSettings = NO_OFFLOAD


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSettings:
    """What of the generator's settings costs memory."""

    dtype: str
    kv_cache_gib: float
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int
    on_gpu: bool
    adapter_parameters: int | None = None
    """What an update brings; None brings every weight."""
    shares_base: bool = False
    """One set of weights serves policy and reference."""


def shape_of(config: object, *, head: bool = True) -> ModelShape:
    """The shape of a transformers configuration; the model is built without weights to count them."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    text = config.get_text_config()  # type: ignore[attr-defined]
    factory = AutoModelForCausalLM if head else AutoModel
    with torch.device("meta"):
        model = factory.from_config(text)
    heads = text.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tied=head and bool(getattr(text, "tie_word_embeddings", False)),
        stored=torch.finfo(getattr(config, "dtype", None) or torch.float32).bits // 8,
    )


def read_shape(path: str, *, head: bool = True) -> ModelShape:
    """The shape of a model folder or hub id; raises ModelError in one line."""
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(path), head=head)
    # A model of a kind that we do not know may lack a size, or need a package to be built.
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{path}: no model configuration to estimate memory from: {str(error).splitlines()[0]}"
        ) from error


def layer_activations(shape: ModelShape, element: int) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass.

    Two norms (input, normalised value and what the next layers read), queries, keys and values repeated for each head,
    the attention's output as it comes and in rows, and three tensors of the gated MLP with their product.
    """
    attention = 5 * shape.heads * shape.head_size
    return element * (6 * shape.hidden + attention + 4 * shape.intermediate)


def learner_memory(shape: ModelShape, settings: LearnerSettings) -> MemoryEstimate:
    """One learner rank. With GPUs the model is still loaded, sent out and saved through host memory."""
    return _training("learner", shape, settings, loaded=shape, share=1.0, sends=True)


def scalar_head_memory(
    role: str, shape: ModelShape, settings: LearnerSettings, *, trained: float, loaded: ModelShape
) -> MemoryEstimate:
    """One rank of a reward or value model of which the share ``trained`` of the layers, the last ones, is trained.

    What a layer below them takes is its weights. The output layer over the vocabulary is gone, the embeddings are not.

    Args:
        loaded: the whole model that it is cut from.
    """
    share = 1.0 if trained == 1.0 else trained * (1 - shape.vocabulary * shape.hidden / shape.parameters)
    return _training(role, shape, settings, loaded=loaded, share=share, sends=False)


def _training(
    role: str, shape: ModelShape, settings: LearnerSettings, *, loaded: ModelShape, share: float, sends: bool
) -> MemoryEstimate:
    """A rank that trains ``share`` of the weights, and keeps activations of as much."""
    n, element = shape.parameters, BYTES[settings.precision]
    stage, adapters = settings.zero_stage, settings.adapter_parameters
    trained, held = (n * share, n) if adapters is None else (adapters, n + adapters)
    own = trained / settings.ranks
    layer = layer_activations(shape, element)
    kept = shape.hidden * element * shape.layers + layer if settings.gradient_checkpointing else layer * shape.layers
    weights = element * held - (_saved_by_4_bits(shape, element) if settings.quantised else 0)
    states: dict[str, float] = {
        "weights": weights / settings.ranks if stage == 3 else weights,
        "weights for the backward": element * held / settings.hybrid_ranks if settings.hybrid_ranks > 1 else 0,
        # Without a stage every rank keeps all of them.
        "master weights": 4 * (own if stage else trained) if stage or element < 4 else 0,
        "optimizer": 8 * (own if stage else trained),
    }
    gradients: dict[str, float] = {
        "gradients": element * (own if stage == 3 else trained),
        "reduced gradients": 4 * own if stage else 0,
        "communication": element * min(LARGEST_BUCKET, trained) if stage or settings.ranks > 1 else 0,
    }
    tokens = settings.micro_batch_tokens / settings.sequence_parallel
    forward = {
        "activations": tokens * kept * share,
        "logits": 4 * min(settings.logprob_chunk_tokens, tokens) * shape.vocabulary,
    }
    sent, packs = (element * trained if sends else 0), settings.transport == "gloo"
    runtime, first_only = {"runtime": RUNTIME_MIB["learner"] * MIB}, ("weights to send", "checkpoint")
    if settings.on_gpu:
        device, moved = _part_from_device({**states, **gradients, **forward}, settings.offload)
        copies = {**moved, "loading": 4 * n, "weights to send": sent * (2 if packs else 1), "checkpoint": element * n}
        return MemoryEstimate(role=role, device=_parts(device), host=_parts(copies | runtime), first_only=first_only)
    (states, _), (gradients, _) = (
        _part_from_device(parts, settings.offload, places=("nvme",)) for parts in (states, gradients)
    )
    # The newest version stays in memory until the next one is whole; where it is shared, so does the one before.
    kept = sent * {"gloo": 1, "shared_memory": 2}.get(settings.transport, 0)
    lasting: dict[str, float] = {**states, "weights to send": kept}
    passing = {"gradients": gradients["gradients"], **forward}
    host = _largest(
        _loading(loaded, 4),
        # A micro-batch goes forward beside the gradients of those before; its own come while activations go.
        {**lasting, **passing, "allocator": KEPT_SHARE * sum(passing.values())},
        lasting | gradients,
        {**states, "weights to send": sent + (kept if packs else sent)},
        {**lasting, "checkpoint": element * n},
    )
    return MemoryEstimate(role=role, device=(), host=_parts(host | runtime), first_only=first_only)


def _part_from_device(
    parts: dict[str, float], offload: OffloadSettings, *, places: tuple[str, ...] = ("cpu", "nvme")
) -> tuple[dict[str, float], dict[str, float]]:
    """What stays, and what moves to the host; what goes to a disk is in neither. Only ``places`` count as elsewhere."""
    state: tuple[str, ...] = ("reduced gradients", "master weights", "optimizer")
    leaving: dict[str, str | None] = {**dict.fromkeys(state, offload.optimizer), "weights": offload.parameters}
    stays = {name: size for name, size in parts.items() if leaving.get(name) not in places}
    moved = {name: size for name, size in parts.items() if leaving.get(name) == "cpu" and name not in stays}
    return stays, moved


def _saved_by_4_bits(shape: ModelShape, element: int) -> float:
    """Bytes less than at ``element`` each: half a byte a weight, and a scale in fp32 for each 64."""
    outside = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return (element - 0.5 - 4 / 64) * (shape.parameters - outside)


def _loading(shape: ModelShape, element: int) -> dict[str, float]:
    """While weights are copied out of their files, those count as resident, too."""
    return {"weights": element * shape.parameters, "their files": shape.stored * shape.parameters}


def _largest(*phases: dict[str, float]) -> dict[str, float]:
    """What is there at the moment when most is."""
    return max(phases, key=lambda phase: sum(phase.values()))


def generator_memory(shape: ModelShape, settings: GeneratorSettings) -> MemoryEstimate:
    """One generator replica (on GPUs: one of its devices): policy and reference in one engine."""
    element = BYTES[settings.dtype]
    workers = settings.tensor_parallel_size if settings.on_gpu else 1
    n = shape.parameters
    networks = 1 if settings.shares_base else 2
    weights = networks * element * n / workers
    received = n / workers if settings.adapter_parameters is None else settings.adapter_parameters
    work = {
        "weights": weights,
        "KV cache": settings.kv_cache_gib * GIB,
        "activations": settings.max_num_batched_tokens * element * (4 * shape.hidden + 3 * shape.intermediate),
        "logits": settings.max_num_seqs * shape.vocabulary * (4 * 4 + 2 * 8),
        "weights received": element * received,
    }
    if not settings.on_gpu:
        # vLLM packs linear layers for its CPU kernels after all are loaded, and tied output heads beside them.
        work["packing"] = weights + (networks * element * shape.vocabulary * shape.hidden if shape.tied else 0)
    return _estimate("generator", work, {"runtime": RUNTIME_MIB["generator"] * MIB}, on_gpu=settings.on_gpu)


def scorer_memory(role: str, shape: ModelShape, *, dtype: str, tokens: int, chunk: int, on_gpu: bool) -> MemoryEstimate:
    """A model that only looks at ``tokens`` at once: the reference, or a reward model (``chunk`` 0)."""
    element = BYTES[dtype]
    work: dict[str, float] = {
        "weights": element * shape.parameters,
        "activations": tokens * element * (6 * shape.hidden + 3 * shape.intermediate),
        "logits": 4 * min(chunk, tokens) * shape.vocabulary,
    }
    if not on_gpu:
        work = _largest(_loading(shape, element), work)
    name = role if role in RUNTIME_MIB and chunk else "oracle model"
    return _estimate(role, work, {"runtime": RUNTIME_MIB[name] * MIB}, on_gpu=on_gpu)


def function_memory() -> MemoryEstimate:
    """An oracle that is a plain function, without what the function itself loads."""
    return _estimate("oracle", {}, {"runtime": RUNTIME_MIB["oracle"] * MIB}, on_gpu=False)


def _estimate(role: str, work: Mapping[str, float], host: Mapping[str, float], *, on_gpu: bool) -> MemoryEstimate:
    if on_gpu:
        return MemoryEstimate(role=role, device=_parts(work), host=_parts(host))
    return MemoryEstimate(role=role, device=(), host=_parts({**work, **host}))


def _parts(sizes: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((name, size) for name, size in sizes.items() if size)
