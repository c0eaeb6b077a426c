"""Paths of a configuration, seen from other machines: every setting that names one is found, and none is made up."""

from pathlib import Path
from typing import Any

import pytest
from submission_example import EXAMPLE, example

from pilaf_ray.config.loader import load_config
from pilaf_ray.config.paths import named_paths
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError
from pilaf_ray.submission.job import make_job

FUNCTION = "evaluation.oracle={type: function, target: 'm:f'}"
MIXTURE = "oracle={type: mixture, machine: {type: reward_model, path: PLACE}, people: {gold: {path: PLACE}}}"
PPO = "algorithm={type: ppo, batch_prompts: 8, value: {path: PLACE}}"
# Where a path can stand, and what makes the section that holds it.
PLACES: dict[str, tuple[str, ...]] = {
    "run.folder": ("run.folder=PLACE",),
    "model.policy": ("model.policy=PLACE",),
    "model.reference": ("model.reference=PLACE",),
    "model.init_from": ("model.init_from=PLACE",),
    "prompts.train.path": ("prompts.train.path=PLACE",),
    "prompts.evaluation.path": ("prompts.evaluation.path=PLACE",),
    "oracle.path": ("oracle.path=PLACE",),
    "oracle.gold.path": ("oracle={type: human, gold: {path: PLACE}}", FUNCTION),
    "oracle.guidelines": ("oracle={type: human, guidelines: PLACE.md}", FUNCTION),
    "oracle.machine.path": (MIXTURE, FUNCTION),
    "oracle.people.gold.path": (MIXTURE, FUNCTION),
    "evaluation.oracle.path": ("evaluation.oracle={type: reward_model, path: PLACE}",),
    "reward_model.path": ("reward_model={path: PLACE}",),
    "algorithm.value.path": (PPO, "reward_model={}"),
    "checkpoint.mirror": ("checkpoint.mirror='file://PLACE'",),
    "store.url": ("store.url='sqlite:////PLACE'",),
}


def value_of(config: RunConfig, key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    assert isinstance(value, str)
    return value


@pytest.mark.parametrize("key", PLACES)
def test_every_relative_path_becomes_whole(key: str, tmp_path: Path) -> None:
    """Whether it exists, as a folder here, or must be a path by its form."""
    (tmp_path / "some" / "place").mkdir(parents=True)
    config = load_config(EXAMPLE, [override.replace("PLACE", "some/place") for override in PLACES[key]])
    placed = make_job(config, working_dir=tmp_path, target="slurm").config
    if key == "store.url":
        # A relative one is refused before.
        assert value_of(placed, key) == "sqlite:////some/place"
        return
    scheme = "file://" if key == "checkpoint.mirror" else ""
    ending = ".md" if key == "oracle.guidelines" else ""
    assert value_of(placed, key) == f"{scheme}{tmp_path}/some/place{ending}"


@pytest.mark.parametrize("key", PLACES)
def test_every_path_off_the_volume_is_refused_by_kuberay(key: str) -> None:
    """Also one whose first letters are those of the volume."""
    # sqlite:///, as file://, is followed by a whole path.
    overrides = [o.replace("//PLACE", "//sharedX/place").replace("PLACE", "/sharedX/place") for o in PLACES[key]]
    if key == "checkpoint.mirror":
        overrides = ["checkpoint.mirror='file:///sharedX/place'"]
    with pytest.raises(ConfigError, match=rf"{key} = /sharedX/place.* not on the shared volume: a pod sees nothing"):
        example(*overrides, target="kuberay")
    on_it = [override.replace("/sharedX/", "/shared/x/") for override in overrides]
    assert value_of(example(*on_it, target="kuberay").config, key).endswith(
        "/shared/x/place.md" if key == "oracle.guidelines" else "/shared/x/place"
    )


@pytest.mark.parametrize(
    "override",
    [
        "model.policy=owner/model",
        "model.policy='s3://bucket/models/policy'",
        "model.reference='gs://bucket/reference'",
        "oracle.path='s3://bucket/models/of/oracles/gold'",
        "reward_model.path='memory://model'",
        "prompts.train.path='builtin:reviews/train'",
        "prompts.train.path='s3://bucket/prompts/*.parquet'",
        "prompts.train.path=owner/prompts",
        "checkpoint.mirror='s3://bucket/runs'",
        "store.url='postgresql+psycopg://host/name'",
    ],
)
def test_names_of_hubs_and_addresses_stay(override: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    placed = make_job(load_config(EXAMPLE, [override]), working_dir=tmp_path, target="slurm").config
    assert value_of(placed, key) == value.strip("'")


def test_files_of_prompts_are_known_by_their_form(tmp_path: Path) -> None:
    config = load_config(EXAMPLE, ["prompts.train.path='data/*.jsonl'", "prompts.evaluation.path=../held-out.csv"])
    placed = make_job(config, working_dir=tmp_path / "tree", target="slurm").config
    assert placed.prompts.train.path == f"{tmp_path}/tree/data/*.jsonl"
    assert placed.prompts.evaluation.path == f"{tmp_path}/held-out.csv"


def test_text_that_is_no_file_is_no_path() -> None:
    words = ["oracle={type: human, guidelines: 'Prefer the shorter answer.'}", FUNCTION]
    assert "oracle.guidelines" not in {named.key for named in named_paths(load_config(EXAMPLE, words))}


def test_every_setting_called_path_is_known() -> None:
    """A new one must be added to ``config/paths.py``, or be said to be each node's own."""
    names = ("path", "folder", "nvme_path", "init_from", "mirror", "guidelines")
    sections = RunConfig.model_json_schema()["$defs"].items()
    found = {f"{title}.{key}" for title, section in sections for key in section.get("properties", {}) if key in names}
    assert found == {
        "CheckpointSection.mirror",
        "GoldConfig.path",
        "HumanOracleConfig.guidelines",
        "ModelSection.init_from",
        "OffloadSection.nvme_path",
        "PromptSourceConfig.path",
        "RewardModelOracleConfig.path",
        "RewardModelSection.path",
        "RunSection.folder",
        "ValueModelConfig.path",
    }
