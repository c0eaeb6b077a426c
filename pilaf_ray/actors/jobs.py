"""Ray's own job queue."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

from ray.job_submission import JobDetails
from ray.job_submission import JobStatus as RayJobStatus
from ray.util.state import list_nodes
from tenacity import RetryCallState, retry, retry_if_result, stop_after_delay, wait_fixed

from pilaf_ray.actors.job_server import JobServerClient, asking_job_server, dashboard_url
from pilaf_ray.errors import ClusterError
from pilaf_ray.placement import GIB, NodeCapacity, PlacementPlan
from pilaf_ray.resource_plan import plan_on
from pilaf_ray.submission.job import Job
from pilaf_ray.submission.schedulers import JobStatus

# What a working tree holds that no job needs; Ray refuses packages above 512 MiB.
EXCLUDES = [".git", ".venv", ".cache", "runs", "**/__pycache__", "**/*.db", "**/*.safetensors", "**/checkpoints"]
CONFIG_VARIABLE = "PILAF_RUN_CONFIG"
"""Carries the resolved configuration; no secret stands in one."""


def _last_answer(attempts: RetryCallState) -> Any:
    """What the last attempt returned."""
    return attempts.outcome.result() if attempts.outcome else None


class RayJobs:
    """A cluster's job server, at the address of its dashboard.

    Raises:
        ClusterError: in one line, nothing answers there, or no job server, or it refuses; or the job is unknown.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = dashboard_url(address)
        # In Ray's clients this variable, and RAY_ADDRESS after it, wins over the address that they are given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self._address
        # Ray explains a refused connection by a page of text.
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.CRITICAL)
        with self._asking():
            self._client = JobServerClient(self._address)

    def plan(self, job: Job) -> PlacementPlan:
        """Where the roles of ``job`` would go on the cluster's nodes, as if nothing else ran there."""
        return plan_on(job.config, self._nodes())

    def submit(self, job: Job) -> str:
        """Queue ``job`` after its plan fits the cluster; its working folder travels with it."""
        self.plan(job).require()
        taken = {info.submission_id for info in self._all()}
        number = next(n for n in range(1, len(taken) + 2) if f"{job.name}-{n}" not in taken)
        with self._asking():
            return self._client.submit_job(
                # In the job's own copy of the working folder; the shell gives way to the driver, which is told to stop.
                entrypoint=f'printf %s "${CONFIG_VARIABLE}" >{job.config_path} && exec {job.entrypoint}',
                submission_id=f"{job.name}-{number}",
                # Values of secrets would be shown on the dashboard: they come from the environment of the nodes.
                runtime_env={
                    "working_dir": str(job.working_dir),
                    "excludes": EXCLUDES,
                    # The head may see no file system of this machine's. Ray would put variables of its own for a $.
                    "env_vars": {CONFIG_VARIABLE: job.config.model_dump_json().replace("$", "\\u0024")},
                },
                metadata={"pilaf_run": job.config.run.name},
            )

    # A head's job server answers some seconds before the head itself is listed.
    @retry(
        retry=retry_if_result(lambda nodes: not nodes),
        stop=stop_after_delay(30),
        wait=wait_fixed(1),
        retry_error_callback=_last_answer,
    )
    def _nodes(self) -> tuple[NodeCapacity, ...]:
        """Whole nodes: what is free at this moment is for the job itself to see."""
        with self._asking():
            states: Any = list_nodes(address=self._address, detail=True, timeout=20)
        return tuple(
            NodeCapacity(
                name=f"{state.node_name}/{state.node_id[:8]}",
                cpus=state.resources_total.get("CPU", 0.0),
                gpus=state.resources_total.get("GPU", 0.0),
                memory_gib=state.resources_total.get("memory", 0.0) / GIB,
                labels=tuple(sorted((state.labels or {}).items())),
            )
            for state in states
            if state.state == "ALIVE"
        )

    def jobs(self) -> list[JobStatus]:
        """Jobs of this project, oldest first."""
        ours = [info for info in self._all() if "pilaf_run" in (info.metadata or {})]
        ours.sort(key=lambda info: info.start_time or 0)
        return [
            JobStatus(job_id=info.submission_id or "", name=info.metadata["pilaf_run"], state=str(info.status.value))
            for info in ours
        ]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        """The driver's output; raises ClusterError if a followed job fails."""
        self._known(job_id)
        if not follow:
            with self._asking():
                text = self._client.get_job_logs(job_id)
            write(text.rstrip("\n"))
            return
        asyncio.run(self._follow(job_id, write))
        with self._asking():
            info = self._client.get_job_info(job_id)
        if info.status == RayJobStatus.FAILED:
            last = next((line for line in reversed((info.message or "").splitlines()) if line.strip()), "")
            raise ClusterError(f"job {job_id} failed: {last}")

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> None:
        texts = self._client.tail_job_logs(job_id)
        while (text := await self._next(texts)) is not None:
            # Not within the question: a pipe of this terminal that breaks says nothing of the server.
            write(text.rstrip("\n"))

    async def _next(self, texts: AsyncIterator[str]) -> str | None:
        with self._asking():
            return await anext(texts, None)

    def stop(self, job_id: str) -> None:
        """SIGTERM to the driver; it has RAY_JOB_STOP_WAIT_TIME_S of the head's environment to save."""
        self._known(job_id)
        with self._asking():
            self._client.stop_job(job_id)

    def _known(self, job_id: str) -> None:
        known = [info.submission_id for info in self._all()]
        if job_id not in known:
            raise ClusterError(f"there is no job '{job_id}' at {self._address}; it has {known or 'none'}")

    def _all(self) -> list[JobDetails]:
        with self._asking():
            return self._client.list_jobs()

    def _asking(self) -> AbstractContextManager[None]:
        return asking_job_server(self._address)
