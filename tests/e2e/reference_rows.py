"""How many tokens the reference has computed in a running engine, counted at its first attention layer."""

import os
from typing import Any

from pilaf_ray.engines.generator import Generator
from pilaf_ray.engines.reference_shelf import REFERENCE

ALLOW = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Environment in which an engine takes functions of ours."""


async def reference_rows(generator: Generator) -> int:
    """Rows since the first call; the engine must have been started with :data:`ALLOW`."""
    assert ALLOW.items() <= os.environ.items()
    (rows,) = await generator._live_engine.collective_rpc(_rows)
    return int(rows)


def _rows(worker: Any) -> int:
    """Runs in the engine: the layer has the name of the reference whether or not it shares its base."""
    from vllm.model_executor.layers.attention import Attention

    layer = next(
        module
        for module in worker.get_model().modules()
        if isinstance(module, Attention) and module.layer_name.startswith(f"{REFERENCE}.")
    )
    if not hasattr(layer, "rows_seen"):
        layer.rows_seen = 0
        layer.register_forward_pre_hook(_count)
    return layer.rows_seen


def _count(layer: Any, inputs: tuple[Any, ...]) -> None:
    layer.rows_seen += len(inputs[0])
