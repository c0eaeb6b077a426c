"""How a run is handed to a scheduler."""

from pydantic import Field

from pilaf_ray.config.base import Section


class SlurmConfig(Section):
    """For ``submit --to slurm``."""

    partition: str | None = None
    """Partition; the cluster's default when left out."""
    account: str | None = None
    """Account that pays."""
    time: str = "24:00:00"
    """Limit of one attempt."""
    grace_seconds: int = Field(default=180, ge=10)
    """How long before the limit or a preemption the run is told to save."""
    setup: str = ""
    """Shell lines before Ray starts on each node, e.g. module load or an activation."""


class KubernetesConfig(Section):
    """For ``submit --to kuberay``."""

    namespace: str = "default"
    """Namespace."""
    image: str = "pilaf-ray:gpu"
    """Container image, from launch/Dockerfile.gpu."""
    queue: str | None = None
    """Kueue queue, for gang scheduling."""
    volume_claim: str = "pilaf-runs"
    """Shared volume that holds runs, models and prompts."""
    mount_path: str = "/shared"
    """Where the volume is mounted; run.folder, models and prompts must lie there."""
    secret: str | None = None
    """Secret whose keys become environment variables."""
    retries: int = Field(default=3, ge=0)
    """New clusters after a failure; each resumes the run."""


class SkyConfig(Section):
    """For ``submit --to skypilot``."""

    accelerators: str | None = None
    """GPUs of a node, e.g. H100:8."""
    cloud: str | None = None
    """Cloud; any when left out."""
    bucket: str | None = None
    """Object store, e.g. s3://bucket, mounted at run.folder; needed where checkpoint.mirror is not set."""
    use_spot: bool = False
    """Preemptible machines; a managed job resumes after each preemption."""


class SubmissionSection(Section):
    """How ``pilaf-ray submit`` hands the run over."""

    secrets: list[str] = Field(default_factory=list)
    """Names of environment variables that the job needs, e.g. WANDB_API_KEY; values are never written."""
    slurm: SlurmConfig = SlurmConfig()
    """Slurm."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """KubeRay."""
    sky: SkyConfig = SkyConfig()
    """SkyPilot."""
