"""Plaudit's command line: starts and supervises processes, and speaks to the rooms. `plaudit --help` lists the commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deploy.config import EngineSettings, GateSettings, PolicySettings, RolloutSettings
from deploy.manifest import base_config
from deploy.registry import Registry
from examples import NAMES, load
from feedback import config
from feedback.errors import ConfigError, Conflict, InvalidInput, PlauditError
from feedback.keys import SCOPES, ApiKey
from feedback.stores import Stores, open_stores
from serving.config import ComparisonSettings, GatewaySettings, RecordSettings, ServerSettings
from trainer.config import CycleSettings, PPOSettings, RewardModelSettings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
adapters_app = typer.Typer(no_args_is_help=True, help="Which adapter may answer whom.")
feedback_app = typer.Typer(no_args_is_help=True, help="What people said.")
keys_app = typer.Typer(no_args_is_help=True, help="Who may do what.")
for group, commands in (("adapters", adapters_app), ("feedback", feedback_app), ("keys", keys_app)):
    app.add_typer(commands, name=group)
# Names, paths and messages are printed as they are: what looks like markup in them is not ours, and a pipe must not break a line.
console, errors = (Console(stderr=stderr, highlight=False, markup=False, emoji=False) for stderr in (False, True))
say = partial(console.print, soft_wrap=True)
complain = partial(errors.print, soft_wrap=True, style="red")


class Settings(config.Settings):
    """Every section of `plaudit.toml`."""

    policy: PolicySettings = PolicySettings()
    engine: EngineSettings = EngineSettings()
    server: ServerSettings = ServerSettings()
    record: RecordSettings = RecordSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    rollout: RolloutSettings = RolloutSettings()
    gates: GateSettings = GateSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    ppo: PPOSettings = PPOSettings()
    cycle: CycleSettings = CycleSettings()


ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", help="Settings; default plaudit.toml where it exists.")]
KeyOption = Annotated[str, typer.Option("--key", envvar="PLAUDIT_KEY", help="An API key with the scope that is needed.")]


def settings_from(path: Path | None) -> Settings:
    """The named file, else plaudit.toml where it exists, else defaults. A shipped policy brings how it is asked; what is set wins."""
    default = Path("plaudit.toml")
    settings = config.load(Settings, path or (default if default.exists() else None))
    if settings.policy.base not in NAMES:
        return settings
    shipped = load(settings.policy.base)
    brought = {name: getattr(shipped, name) for name in ("system_prompt", "temperature", "max_tokens", "max_model_len")}
    unset = {name: value for name, value in brought.items() if name not in settings.policy.model_fields_set}
    return settings.model_copy(update={"policy": settings.policy.model_copy(update=unset)})


class Steps:
    """Progress of long steps: a bar with the time left in a terminal, one line a step in a pipe."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<32}"), BarColumn(40), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console)
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> Steps:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def __call__(self, what: str, share: float) -> None:
        """`share` of this step is done, in [0, 1]."""
        if console.is_terminal:
            task = self._tasks.setdefault(what, None) or self._bars.add_task(what, total=1.0)
            self._tasks[what] = task
            self._bars.update(task, completed=share)
            return
        began = self._started.setdefault(what, time.monotonic())
        if share >= 1 and what not in self._tasks:
            self._tasks[what] = True
            say(f"{what}: {time.monotonic() - began:.0f} s")


@contextmanager
def opened(path: Path | None, process: str) -> Iterator[tuple[Settings, Stores, Registry]]:
    """Settings, stores and registry of one command."""
    settings = settings_from(path)
    stores = open_stores(settings, process)
    try:
        stores.ingest()
        yield settings, stores, Registry(stores.engine, settings.feedback.tenant)
    finally:
        stores.close()


def policy_folder(settings: Settings) -> Path:
    """Where the base model lies; a shipped policy is made ready first. Raises InvalidInput where it is no model."""
    base = settings.policy.base
    if base in NAMES:
        # In a process of its own: converting needs torch, and the gateway stays small.
        code = "import sys, examples, pathlib; print(examples.load(sys.argv[1]).policy_dir(pathlib.Path(sys.argv[2])))"
        made = subprocess.run(
            [sys.executable, "-c", code, base, str(settings.feedback.data_dir)], capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            raise InvalidInput(f"policy.base: '{base}' could not be made ready: {made.stderr.strip()[-300:]}", field="policy.base")
        base = made.stdout.strip().splitlines()[-1]
    elif not Path(base).exists() and base.count("/") == 1 and not base.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            base = snapshot_download(base)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
            raise InvalidInput(
                f"policy.base is '{base}', which is no folder here and could not be fetched: {exc}", field="policy.base"
            ) from exc
    base_config(Path(base))
    return Path(base)


@app.command()
def up(config_path: ConfigPath = None) -> None:
    """Gateway, controller, archive and replica agent in one process, the model server beside it; until Ctrl-C."""
    from serving.service import Service

    with opened(config_path, "gateway") as (settings, stores, registry):
        if stores.log.partition != "gateway":
            raise Conflict(
                f"feedback.data_dir {settings.feedback.data_dir}: another `plaudit up` runs on it; stop that one or choose another folder"
            )
        _first_key(stores, settings)
        gateway = GatewaySettings(
            server=settings.server,
            record=settings.record,
            comparison=settings.comparison,
            policy=settings.policy,
            feedback=settings.feedback,
        )
        service = Service(stores, registry, gateway, settings.engine, settings.rollout, settings.gates)
        service.prepare(policy_folder(settings))
        with Steps() as steps:
            status = asyncio.run(
                service.run(lambda what, share: steps(f"model server: {what}" if what != "ready" else what, share), _ready)
            )
    raise typer.Exit(status)


def _ready(url: str) -> None:
    say(f"Plaudit answers at {url} (chat page, POST {url}/v1/chat/completions)")


def _first_key(stores: Stores, settings: Settings) -> None:
    if stores.api_keys.count() == 0 and settings.feedback.auth:
        key, secret = stores.api_keys.create("admin", SCOPES, person=True)
        say(f"First start: the admin's key {key.id} is shown this once:\n  {secret}")


@app.command()
def train(
    config_path: ConfigPath = None, shuffle_labels: Annotated[bool, typer.Option(help="The control: ratings are shuffled.")] = False
) -> None:
    """One cycle: snapshot, reward model, PPO, evaluation, candidate. Goes on where a killed one stopped."""
    with opened(config_path, "trainer") as (settings, stores, registry):
        say(_train(settings, stores, registry, shuffle_labels))


@app.command()
def trainer(config_path: ConfigPath = None, poll_s: Annotated[float, typer.Option(help="How often to look.")] = 5.0) -> None:
    """Runs a cycle whenever enough new ratings are there; until Ctrl-C."""
    from trainer.schedule import should_train

    with opened(config_path, "trainer") as (settings, stores, registry):
        while True:
            stores.ingest()
            if should_train(stores.archive, settings.cycle, settings.feedback.data_dir):
                say(_train(settings, stores, registry, False))
            time.sleep(poll_s)


def _train(settings: Settings, stores: Stores, registry: Registry, shuffle: bool) -> str:
    from trainer.start import giving_way, learn

    cycle = settings.cycle.model_copy(update={"shuffle_labels": shuffle or settings.cycle.shuffle_labels})
    with giving_way(settings.cycle.niceness), Steps() as steps:
        result = learn(stores, registry, policy_folder(settings), settings.policy, (settings.reward_model, settings.ppo, cycle), steps)
    return f"candidate {result.adapter_id} ({result.folder})"


@app.command()
def demo(
    policy: Annotated[str, typer.Option(help="smollm2 or concierge")] = "smollm2",
    stay: Annotated[bool | None, typer.Option(help="Keep serving at the end; default: in a terminal.")] = None,
) -> None:
    """Turn the whole ring once with simulated raters: chat, ratings, training, canary, approval, report."""
    from examples.ring import Ring

    with Steps() as steps:
        ring = Ring(policy, Path("data"), steps, say)
        closed = asyncio.run(ring.turn())
    if closed and (sys.stdin.isatty() if stay is None else stay):
        say("Ctrl-C stops it.")
        ring.wait()
    ring.stop()
    raise typer.Exit(0 if closed else 1)


@app.command()
def report(
    adapter: str, config_path: ConfigPath = None, out: Annotated[Path | None, typer.Option(help="Default: data/reports.")] = None
) -> None:
    """Write the report of an adapter, one self-contained HTML file, and print its gist."""
    from trainer.report import report_of

    with opened(config_path, "report") as (settings, _, registry):
        record = registry.adapter(adapter)
        target = out or settings.feedback.data_dir / "reports" / f"{record.id}.html"
        say(report_of(record, registry, settings.feedback.data_dir, target))
        say(f"report: {target}")


@feedback_app.command("import")
def import_pairs(
    file: Path, source: Annotated[str, typer.Option(help="Where the pairs come from.")], config_path: ConfigPath = None
) -> None:
    """Read preference pairs (chosen/rejected; .jsonl, .jsonl.gz). Good lines are kept, a second import adds nothing."""
    from feedback.importer import import_file

    with opened(config_path, "import") as (settings, stores, _):
        result = import_file(file, source, stores.log, stores.subjects, settings.feedback.tenant)
        stores.ingest()
    for line, field, message in result.errors:
        complain(f"line {line}: {field}: {message}")
    say(f"{result.added} pairs added, {result.skipped} were there already, {len(result.errors)} lines refused")
    if result.errors:
        raise typer.Exit(1)


@feedback_app.command("stats")
def stats(config_path: ConfigPath = None) -> None:
    """How many events of each kind, and how many opinions are held."""
    with opened(config_path, "stats") as (_, stores, _registry):
        console.print_json(json.dumps(stores.archive.counts()))


@adapters_app.command("list")
def list_adapters(config_path: ConfigPath = None) -> None:
    """All adapters and where they stand."""
    with opened(config_path, "operator") as (_, _stores, registry):
        table = Table("adapter", "kind", "state", "registered by", "why")
        for each in registry.adapters():
            table.add_row(each.id[:16], each.kind, each.state, each.registered_by, each.reason)
        console.print(table)


@adapters_app.command("show")
def show_adapter(adapter: str, config_path: ConfigPath = None) -> None:
    """Manifest, attestations and rollouts of one adapter, as JSON."""
    with opened(config_path, "operator") as (_, _stores, registry):
        record = registry.adapter(adapter)
        found = {
            "adapter": record.model_dump(mode="json"),
            "manifest": record.manifest.model_dump(mode="json"),
            "attestations": [each.model_dump(mode="json") for each in registry.attestations(record.id)],
            "rollouts": [each.model_dump(mode="json") for each in registry.rollouts(record.id)],
        }
        console.print_json(json.dumps(found))


@adapters_app.command("promote")
def promote(adapter: str, key: KeyOption, config_path: ConfigPath = None) -> None:
    """Approve the canary that waits for it. Needs another person's key than the one that registered it."""
    from deploy.rollout import approve

    with opened(config_path, "operator") as (settings, stores, registry):
        done = approve(registry, settings.rollout, adapter, stores.api_keys.check(key))
        say(f"{done.adapter[:16]} is stable: {done.reason}")


@adapters_app.command("rollback")
def rollback(key: KeyOption, reason: Annotated[str, typer.Option(help="Goes into the audit.")], config_path: ConfigPath = None) -> None:
    """`previous` answers again."""
    with opened(config_path, "operator") as (_, stores, registry):
        say(f"{registry.rollback(_promoter(stores, key).owner, reason)[:16]} is stable again")


@adapters_app.command("stop")
def stop_rollout(key: KeyOption, reason: Annotated[str, typer.Option(help="Goes into the audit.")], config_path: ConfigPath = None) -> None:
    """End the running rollout; stable answers everybody."""
    from deploy.rollout import stop

    with opened(config_path, "operator") as (_, stores, registry):
        say(stop(registry, reason, stores.api_keys.check(key)).reason)


def _promoter(stores: Stores, secret: str) -> ApiKey:
    key = stores.api_keys.check(secret)
    key.require("adapters:promote")
    return key


@keys_app.command("create")
def create_key(
    owner: Annotated[str, typer.Option(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="Comma-separated: " + ",".join(SCOPES))],
    person: Annotated[bool, typer.Option(help="The owner is a person; approvals need such a key.")] = False,
    config_path: ConfigPath = None,
) -> None:
    """Make an API key. Its secret is shown once."""
    with opened(config_path, "operator") as (_, stores, _registry):
        wanted: Any = tuple(scope.strip() for scope in scopes.split(",") if scope.strip())
        key, secret = stores.api_keys.create(owner, wanted, person=person)
        say(f"key {key.id} of '{owner}': {secret}")


@app.command("settings")
def show_settings(config_path: ConfigPath = None) -> None:
    """The effective settings as JSON, secrets masked."""
    console.print_json(settings_from(config_path).model_dump_json())


def main(run: Callable[[], None] = app) -> None:
    """The entry point: one line for every error that we raise on purpose, no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would break into our own progress
    try:
        run()
    except PlauditError as error:
        complain(f"plaudit: {error.message}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
