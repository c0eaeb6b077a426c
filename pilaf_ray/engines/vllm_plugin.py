"""Registers this package's models and weight transports with vLLM.

vLLM calls :func:`register` in every one of its processes through the entry point
group ``vllm.general_plugins``. Names are given as strings, so that nothing heavy is
imported before vLLM itself wants it.
"""

ARCHITECTURE = "PilafInterpolatedForCausalLM"
ADAPTED_ARCHITECTURE = "PilafAdaptedForCausalLM"
TRANSPORTS = {"filesystem": "pilaf_filesystem", "gloo": "pilaf_gloo", "nccl": "pilaf_nccl"}
"""Setting ``weight_transport`` → name of the engine in vLLM's registry."""


def register() -> None:
    """Make the interpolated models and the weight transports known; harmless when repeated."""
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
    classes = {
        "filesystem": "FilesystemTransferEngine",
        "gloo": "PeerTransferEngine",
        "nccl": "PeerTransferEngine",
    }
    for transport, name in TRANSPORTS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "pilaf_ray.engines.weight_transfer", classes[transport])
