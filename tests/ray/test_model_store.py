"""Roles whose model is at a URL: one fetch a node, the numbers of the folder, and the URL in what is written."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("deepspeed")

from pilaf_ray import build
from pilaf_ray.actors.cluster import ray_cluster
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.actors.learner_group import LearnerGroup
from pilaf_ray.config.loader import load_config
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.model_store import FOLDER_VARIABLE
from pilaf_ray.errors import ModelError
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.types import GenerationRequest

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALL = RoleResources(num_cpus=0.0, num_gpus=0.0, threads=1)
PROMPT, ANSWER = (5, 6, 7), (8, 9, 10, 11)


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The node's copies, empty; the cluster's processes know where."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        with ray_cluster(address=None, num_cpus=2):
            yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("bucket") / "policy", seed=0)


async def sampled_and_scored(launcher: RoleLauncher, config: RunConfig, *, references: int) -> list[Any]:
    """Tokens and log-probabilities that a generator and each reference give."""
    inputs = build.build_inputs(config)
    generators, scorers = await asyncio.gather(
        launcher.generators(build.generator_arguments(config, inputs), replicas=1, resources=SMALL),
        launcher.reference(build.reference_arguments(config, inputs), replicas=references, resources=SMALL),
    )
    try:
        requests = [
            GenerationRequest(request_id=f"pair-{c}", prompt_token_ids=PROMPT, coefficient=c, seed=3)
            for c in (0.0, 0.5)
        ]
        responses = await asyncio.gather(*(generators.generate(request) for request in requests))
        scores = await asyncio.gather(*(scorers.score_responses([(PROMPT, ANSWER)]) for _ in range(2)))
    finally:
        await generators.stop()
        await scorers.close()
    return [[(each.token_ids, each.logprobs) for each in responses], scores]


async def learner(launcher: RoleLauncher, config: RunConfig, folder: RunFolder, *, ranks: int) -> LearnerGroup:
    arguments = {**build.learner_arguments(config, build.build_inputs(config), folder), "world_size": ranks}
    publisher = {"transport": "filesystem", "folder": str(folder.path / "weights")}
    return await launcher.learner(arguments, publisher, ranks=ranks, resources=SMALL)


def fetches(logs: Path) -> list[str]:
    """Who fetched a whole model."""
    return [log.stem for log in sorted(logs.glob("*.log")) if "model_store: fetching" in log.read_text()]


async def test_roles_of_a_node_fetch_a_url_once_and_give_the_folders_numbers(
    model: Path, store: Path, tmp_path: Path
) -> None:
    url = f"file://{model}"
    logs, folder = tmp_path / "logs", RunFolder(path=tmp_path / "run", attempt=1)
    overrides = ["model.lora={rank: 2, alpha: 4}", "generation.kv_cache_gib=0.05"]
    config = load_config(TINY, [f"model.policy={url}", *overrides])
    launcher = RoleLauncher(logs=str(logs), call_seconds=300.0)
    (found, group) = await asyncio.gather(
        sampled_and_scored(launcher, config, references=2), learner(launcher, config, folder, ranks=2)
    )
    assert len(fetches(logs)) == 1, "of a generator, two references and two ranks"
    assert len(list(store.glob("*/*/model.safetensors"))) == 1
    await group.save(tmp_path / "saved")
    await group.close()
    adapter = json.loads((tmp_path / "saved" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == url
    written = [path for path in (tmp_path / "saved").rglob("*.json") if str(store) in path.read_text()]
    assert not written
    plain = load_config(TINY, [f"model.policy={model}", *overrides])
    others = RoleLauncher(logs=str(tmp_path / "plain"), call_seconds=300.0)
    assert found == await sampled_and_scored(others, plain, references=1)
    assert fetches(tmp_path / "plain") == []


async def test_a_url_without_a_model_is_said_by_the_role(tmp_path: Path) -> None:
    launcher = RoleLauncher(logs=str(tmp_path / "logs"), call_seconds=60.0)
    arguments: Mapping[str, Any] = {"model_path": f"file://{tmp_path}", "world_size": 1}
    with pytest.raises(ModelError, match=r"no config\.json there|there is nothing"):
        await launcher.learner(dict(arguments), {}, ranks=1, resources=SMALL)
