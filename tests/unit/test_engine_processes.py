"""An engine that dies or is stopped while it cannot be asked is noticed all the same."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from pilaf_ray.engines.engine_processes import EngineProcesses
from pilaf_ray.errors import RoleLostError


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    with (
        subprocess.Popen(["VLLM::EngineCore", "600"], executable="/bin/sleep") as process,
        subprocess.Popen(["helper", "600"], executable="/bin/sleep") as other,
    ):
        yield process
        for started in (process, other):
            started.kill()


async def test_an_engine_that_runs_answers_and_one_that_is_gone_is_lost(engine: "subprocess.Popen[bytes]") -> None:
    processes = EngineProcesses()
    await asyncio.wait_for(processes.alive(), 5)
    engine.kill()
    with pytest.raises(RoleLostError, match=f"process {engine.pid} has died while it took new weights"):
        while True:
            await processes.alive()
            await asyncio.sleep(0)


async def test_a_stopped_engine_does_not_answer_until_it_goes_on(engine: "subprocess.Popen[bytes]") -> None:
    processes = EngineProcesses()
    engine.send_signal(signal.SIGSTOP)
    while psutil.Process(engine.pid).status() != psutil.STATUS_STOPPED:
        await asyncio.sleep(0)
    asked = asyncio.ensure_future(processes.alive())
    done, _ = await asyncio.wait([asked], timeout=0.5)
    assert not done
    engine.send_signal(signal.SIGCONT)
    await asyncio.wait_for(asked, 5)
