"""Ray's own job queue."""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from ray.job_submission import JobStatus as RayJobStatus
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from tenacity import RetryCallState, retry, retry_if_result, stop_after_delay, wait_fixed

from pilaf_ray.errors import ClusterError
from pilaf_ray.placement import GIB, NodeCapacity
from pilaf_ray.resource_plan import plan_on
from pilaf_ray.submission.job import Job
from pilaf_ray.submission.schedulers import JobStatus

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
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
        ClusterError: nothing answers there, or the job is unknown.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        # Ray explains a refused connection by a page of text.
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.CRITICAL)
        try:
            self._client = JobSubmissionClient(self._address)
        except (ConnectionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ClusterError(
                f"no Ray job server answers at {self._address} ({reason}): start the head with "
                "`ray start --head --include-dashboard=true`, or name its dashboard with --address"
            ) from error

    def submit(self, job: Job) -> str:
        """Queue ``job`` after its plan fits the cluster; its working folder travels with it."""
        plan_on(job.config, self._nodes()).require()
        taken = {info.submission_id for info in self._client.list_jobs()}
        number = next(n for n in range(1, len(taken) + 2) if f"{job.name}-{n}" not in taken)
        try:
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
        except (RuntimeError, ValueError) as error:
            raise ClusterError(f"Ray refused the job: {str(error).splitlines()[0]}") from error

    # A head's job server answers some seconds before the head itself is listed.
    @retry(
        retry=retry_if_result(lambda nodes: not nodes),
        stop=stop_after_delay(30),
        wait=wait_fixed(1),
        retry_error_callback=_last_answer,
    )
    def _nodes(self) -> tuple[NodeCapacity, ...]:
        """Whole nodes: what is free at this moment is for the job itself to see."""
        try:
            states: Any = list_nodes(address=self._address, detail=True, timeout=20)
        except RayStateApiException as error:
            reason = str(error).splitlines()[0]
            raise ClusterError(f"{self._address} does not tell its nodes: {reason}") from error
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
        ours = [info for info in self._client.list_jobs() if "pilaf_run" in (info.metadata or {})]
        ours.sort(key=lambda info: info.start_time or 0)
        return [
            JobStatus(job_id=info.submission_id or "", name=info.metadata["pilaf_run"], state=str(info.status.value))
            for info in ours
        ]

    def logs(self, job_id: str, *, follow: bool, write: Callable[[str], None]) -> None:
        """The driver's output; raises ClusterError if a followed job fails."""
        self._known(job_id)
        if not follow:
            write(self._client.get_job_logs(job_id).rstrip("\n"))
            return
        asyncio.run(self._follow(job_id, write))
        info = self._client.get_job_info(job_id)
        if info.status == RayJobStatus.FAILED:
            last = next((line for line in reversed((info.message or "").splitlines()) if line.strip()), "")
            raise ClusterError(f"job {job_id} failed: {last}")

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(job_id):
            write(text.rstrip("\n"))

    def stop(self, job_id: str) -> None:
        """SIGTERM to the driver; it has RAY_JOB_STOP_WAIT_TIME_S of the head's environment to save."""
        self._known(job_id)
        self._client.stop_job(job_id)

    def _known(self, job_id: str) -> None:
        known = [info.submission_id for info in self._client.list_jobs()]
        if job_id not in known:
            raise ClusterError(f"there is no job '{job_id}' at {self._address}; it has {known or 'none'}")
