"""Registers this package's models and its way of taking weights with vLLM.

vLLM calls :func:`register` in every one of its processes through the entry point
group ``vllm.general_plugins``. Names are given as strings, so that nothing heavy is
imported before vLLM itself wants it.
"""

ARCHITECTURE = "PilafInterpolatedForCausalLM"
ADAPTED_ARCHITECTURE = "PilafAdaptedForCausalLM"
WEIGHT_ENGINE = "pilaf_weights"
"""The name, in vLLM's registry, of what replaces the policy's weights."""


def register() -> None:
    """Make the interpolated models and the weight engine known; harmless when repeated."""
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from pilaf_ray.engines.cpu_options import register_kernels

    register_kernels()
    models = {
        ARCHITECTURE: "pilaf_ray.engines.interpolated_model:InterpolatedForCausalLM",
        ADAPTED_ARCHITECTURE: "pilaf_ray.engines.adapted_model:AdaptedForCausalLM",
    }
    for name in models.keys() - set(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(name, models[name])
    if WEIGHT_ENGINE not in WeightTransferEngineFactory._registry:
        module = "pilaf_ray.engines.weight_transfer"
        WeightTransferEngineFactory.register_engine(WEIGHT_ENGINE, module, "PolicyTransferEngine")
