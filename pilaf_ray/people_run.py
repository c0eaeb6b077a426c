"""A run's console and the people behind it, from its configuration."""

from typing import Any

from rich.console import Console

from pilaf_ray import build
from pilaf_ray.actors.handles import OraclePool, StoreHandle
from pilaf_ray.actors.launch import RoleLauncher, RoleResources
from pilaf_ray.actors.people import DeskHandle, PeoplePool, start_console
from pilaf_ray.config.oracle import (
    FunctionOracleConfig,
    HumanOracleConfig,
    JudgeOracleConfig,
    MachineOracleConfig,
    MixtureOracleConfig,
    RewardModelOracleConfig,
)
from pilaf_ray.config.schema import RunConfig
from pilaf_ray.console.access import AccessBook, AccessRole
from pilaf_ray.oracle.human import HumanOracle, HumanRules
from pilaf_ray.oracle.mixture import LabelSource, MixtureOracle, MixtureRules
from pilaf_ray.pipeline.disagreement import HeadDisagreement
from pilaf_ray.pipeline.ports import RewardScorer
from pilaf_ray.run_folder import RunFolder
from pilaf_ray.store.inbox import NAME as INBOX
from pilaf_ray.store.records import HUMAN


def human_rules(settings: HumanOracleConfig) -> HumanRules:
    """When votes make a label, from the configuration."""
    return HumanRules(
        votes_per_pair=settings.votes_per_pair,
        aggregation=settings.aggregation,
        undo_seconds=settings.undo_seconds,
        skips_to_abstain=settings.skips_to_abstain,
        answer_seconds=settings.answer_seconds,
    )


async def start_machine(launcher: RoleLauncher, settings: MachineOracleConfig, folder: RunFolder) -> OraclePool:
    """What labels without people, beside what scores."""
    arguments = build.oracle_arguments(settings, gpus=0, memory=folder.path / "judge.jsonl")
    light = RoleResources(num_cpus=0, num_gpus=0, threads=1)
    return await launcher.oracle(settings.type, arguments, replicas=1, resources=light, name="labels")


async def ask_people(
    config: RunConfig,
    folder: RunFolder,
    launcher: RoleLauncher,
    store: StoreHandle,
    scorer: OraclePool,
    reward: RewardScorer | None,
) -> OraclePool | PeoplePool:
    """The oracle as the pipeline sees it: ``scorer`` itself, or people, a judge or both with ``scorer`` beside them.

    Args:
        reward: r̂, whose heads may say which pairs go to people.
    """
    settings = config.oracle
    if isinstance(settings, FunctionOracleConfig | RewardModelOracleConfig):
        return scorer
    if isinstance(settings, JudgeOracleConfig):
        return PeoplePool(await start_machine(launcher, settings, folder), scorer)
    people = settings.people if isinstance(settings, MixtureOracleConfig) else settings
    await store.open_desk(people.lease_seconds, folder.path / INBOX)
    desk = DeskHandle(store.desk)
    labels: LabelSource = HumanOracle(desk, human_rules(people))
    if isinstance(settings, MixtureOracleConfig):
        spent = await desk.spent()
        labels = MixtureOracle(
            people=labels,
            machine=await start_machine(launcher, settings.machine, folder),
            rules=MixtureRules(
                share=settings.share,
                margin=settings.margin,
                disagreement=settings.disagreement,
                disagreement_window=settings.disagreement_window,
                people_budget=settings.people_budget,
                machine_budget=settings.machine_budget,
            ),
            disagreement=HeadDisagreement(reward) if reward is not None and settings.disagreement is not None else None,
            people_spent=spent.get(HUMAN, 0),
            machine_spent=sum(count for source, count in spent.items() if source != HUMAN),
        )
    return PeoplePool(labels, scorer)


async def serve_console(config: RunConfig, folder: RunFolder, store: StoreHandle, terminal: Console) -> Any:
    """Serve the console where the configuration says so; its actor, which Ray ends when nobody holds it."""
    if not config.serves_console:
        return None
    settings = config.console
    people = config.oracle.asks_people
    actor = await start_console(
        logs=folder.logs,
        run=folder.path,
        host=settings.host,
        port=settings.port,
        allowed_hosts=settings.allowed_hosts,
        store=store.name if people else None,
        call_seconds=config.pipeline.call_seconds,
    )
    address = f"http://{settings.host}:{settings.port}"
    terminal.print(f"console: {address}", markup=False)
    book = AccessBook(folder.path / "access.json")
    if people and not any(grant.role is AccessRole.LEAD and grant.revoked is None for grant in book.grants()):
        secret = book.issue("lead", AccessRole.LEAD)
        terminal.print(
            f"lead of the annotators, shown this once: {address}/enter#{secret}", markup=False, soft_wrap=True
        )
    return actor
