"""How an engine is put to rest and woken, by what its platform offers, and not in the middle of an update."""

import asyncio
from typing import Any

import pytest

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.generator import Generator


class Engine:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        async def ask(**settings: Any) -> None:
            self.asked.append((name, settings))

        return ask


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0))


@pytest.mark.parametrize(
    ("sleeps", "expected"),
    [
        (True, [("sleep", {"level": 1, "mode": "abort"}), ("wake_up", {})]),
        (False, [("pause_generation", {"mode": "abort", "clear_cache": True}), ("resume_generation", {})]),
    ],
)
async def test_an_engine_rests_between_updates(
    model: str, sleeps: bool, expected: list[tuple[str, dict[str, Any]]]
) -> None:
    generator = Generator(
        policy_path=model, reference_path=model, dtype="float32", max_model_len=64, max_new_tokens=8, takes_turns=True
    )
    engine: Any = Engine()
    generator._engine, generator._sleeps = engine, sleeps
    async with generator._weights.updating:
        resting = asyncio.create_task(generator.rest())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not engine.asked, "an update that nobody waits for any more would wake it"
    await resting
    await generator.resume()
    assert engine.asked == expected
