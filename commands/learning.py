"""`plaudit train` and `plaudit trainer`: from ratings to a candidate."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from commands.settings import ConfigPath, Settings, opened, policy_folder, settings_from
from commands.terminal import Steps, complain, say
from deploy import lineage
from deploy.manifest import base_config
from deploy.registry import Registry
from feedback.errors import ConfigError, TrainingRefused
from feedback.stores import Stores
from trainer import memory
from trainer.config import HardwareSettings, refuse_rank, refuse_serving
from trainer.schedule import LearningSettings

app = typer.Typer()


@app.command()
def train(
    config_path: ConfigPath = None,
    shuffle_labels: Annotated[bool, typer.Option(help="The control: ratings are shuffled.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, how long, and what it would refuse.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say how much memory it would take, on one GPU and on several.")] = False,
) -> None:
    """One cycle: snapshot, reward model, PPO, evaluation, candidate. Goes on where a killed one stopped."""
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun started several: the first one has the stores, the others help it
        if plan or dry_run:
            return None  # which it says alone
        from trainer.start import follow

        return follow()
    if plan:
        return _plan(settings_from(config_path))
    with opened(config_path, "trainer") as (settings, stores, registry):
        if dry_run:
            _rehearse(settings, stores, registry, shuffle_labels)
        else:
            from trainer.start import dismiss

            say(_train(settings, stores, registry, shuffle_labels))
            dismiss()


@app.command()
def trainer(config_path: ConfigPath = None, poll_s: Annotated[float, typer.Option(help="How often to look.")] = 5.0) -> None:
    """Runs a cycle whenever enough new ratings are there; until Ctrl-C. What is refused is tried again with as many more."""
    _one_process("trainer")
    from trainer import metrics
    from trainer.schedule import ratings_now, should_train, trained
    from trainer.stages import NOT_FINITE

    with opened(config_path, "trainer") as (settings, stores, registry):
        metrics.serve(settings.cycle.metrics_host, settings.cycle.metrics_port)
        while True:
            stores.ingest()
            lineage.finish(stores, registry, settings.erasure)
            if should_train(stores.archive, settings.cycle, settings.feedback.data_dir):
                ratings = ratings_now(stores.archive)
                try:
                    say(_train(settings, stores, registry, False))
                except TrainingRefused as exc:
                    if exc.field in NOT_FINITE:  # no matter of ratings, and the checkpoint is there
                        raise
                    complain(f"refused: {exc.message}; tried again after {settings.cycle.min_new_ratings} new ratings")
                    trained(ratings, settings.feedback.data_dir)
            time.sleep(poll_s)


@app.command()
def scorer(
    config_path: ConfigPath = None,
    poll_s: Annotated[float, typer.Option(help="How often to look.")] = 5.0,
    once: Annotated[bool, typer.Option(help="End when nothing new is there.")] = False,
) -> None:
    """Scores what a rollout's arms answer people, with the canary's reward model; until Ctrl-C."""
    from trainer.processor import giving_way, use_threads
    from trainer.scorer import InteractionScorer

    with opened(config_path, "scorer") as (settings, stores, registry), giving_way(settings.cycle.niceness):
        policy = policy_folder(settings)
        use_threads(policy, settings.cycle.threads)
        scores = InteractionScorer(stores, registry, policy, settings.policy, settings.hardware)
        while True:
            if found := scores.once():
                say(", ".join(f"{count} {what}" for what, count in sorted(found.items())))
            if once:
                return
            time.sleep(poll_s)


def _one_process(command: str) -> None:
    """Raises ConfigError under a launcher of several: all of them but the first would wait for a cycle that may never come."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        told = f"WORLD_SIZE is {processes}: `plaudit {command}` is one process; start `plaudit train` under torchrun, it runs one cycle"
        raise ConfigError(told, field="WORLD_SIZE")


def _learning(settings: Settings, shuffle: bool) -> LearningSettings:
    refuse_serving(settings.rollouts, settings.engine)
    refuse_rank(settings.ppo, settings.engine)
    cycle = settings.cycle.model_copy(update={"shuffle_labels": shuffle or settings.cycle.shuffle_labels})
    rollouts, hardware = settings.rollouts, settings.hardware
    return LearningSettings(settings.reward_model, settings.ppo, cycle, rollouts=rollouts, hardware=hardware)


def _rehearse(settings: Settings, stores: Stores, registry: Registry, shuffle: bool) -> None:
    from trainer.processor import giving_way
    from trainer.rehearsal import rehearse

    with giving_way(settings.cycle.niceness):
        found = rehearse(stores, registry, policy_folder(settings), settings.policy, _learning(settings, shuffle))
    for line in found.lines:
        say(line)
    for reason in found.refused:
        complain(f"would be refused: {reason}")
    if found.refused:
        raise typer.Exit(1)


def _plan(settings: Settings) -> None:
    number, chosen = _bytes_a_number(settings.hardware)
    local = not settings.rollouts.urls
    places = [memory.Where(settings.policy.max_model_len, number=number, local=local)]
    places += [memory.Where(settings.policy.max_model_len, number, n, sharded, local) for n in (2, 8) for sharded in (False, True)]
    config = base_config(policy_folder(settings))
    names = ["one", *(f"{place.processes}{' sharded' if place.sharded else ''}" for place in places[1:])]
    columns = [memory.plan(config, settings.ppo, place) for place in places]
    say(f"GiB of each process, backbone in {'float32' if number == 4 else 'bfloat16'} ({chosen}); see docs/training.md")
    say(f"{'processes':>52}" + "".join(f"{name:>12}" for name in names))
    for rows in zip(*columns, strict=True):
        say(f"{rows[0].what:>52}" + "".join(f"{row.size_bytes / 2**30:12.2f}" for row in rows))


def _bytes_a_number(hardware: HardwareSettings) -> tuple[int, str]:
    """Of the backbone, and who says so. What is set may be another machine's; only `auto` for both is this one's."""
    if hardware.dtype != "auto":
        return (4 if hardware.dtype == "float32" else 2), "hardware.dtype"
    if hardware.device != "auto":
        return (4 if hardware.device == "cpu" else 2), "hardware.device"
    from trainer.policy import place

    where, dtype = place("auto", "auto")
    return dtype.itemsize, f"what this machine's {'GPU' if where.type == 'cuda' else 'CPU'} would use; hardware.dtype plans for another"


def _train(settings: Settings, stores: Stores, registry: Registry, shuffle: bool) -> str:
    from trainer import distributed
    from trainer.processor import giving_way
    from trainer.start import learn

    distributed.start()
    lineage.finish(stores, registry, settings.erasure)
    with giving_way(settings.cycle.niceness), Steps() as steps:
        result = learn(stores, registry, policy_folder(settings), settings.policy, _learning(settings, shuffle), steps)
    return f"candidate {result.adapter_id} ({result.folder})"
