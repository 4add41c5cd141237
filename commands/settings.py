"""All settings together, and what a command opens from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from deploy.config import (
    DeploySettings,
    EngineSettings,
    ErasureSettings,
    GateSettings,
    OperatorSettings,
    PolicySettings,
    RolloutSettings,
    WebhookSettings,
)
from deploy.manifest import base_config
from deploy.registry import Registry
from deploy.schema import upgrade
from deploy.store import AdapterStore
from examples import NAMES, load
from feedback import audit, config
from feedback.errors import InvalidInput, NotAuthenticated
from feedback.keys import ApiKey, Scope
from feedback.stores import Stores, open_stores
from serving.config import ComparisonSettings, RecordSettings, ServerSettings
from trainer.config import CycleSettings, HardwareSettings, PPOSettings, RewardModelSettings, RolloutsSettings


class Settings(config.Settings):
    """Every section of `plaudit.toml`."""

    policy: PolicySettings = PolicySettings()
    deploy: DeploySettings = DeploySettings()
    operator: OperatorSettings = OperatorSettings()
    webhooks: WebhookSettings = WebhookSettings()
    engine: EngineSettings = EngineSettings()
    server: ServerSettings = ServerSettings()
    record: RecordSettings = RecordSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    rollout: RolloutSettings = RolloutSettings()
    gates: GateSettings = GateSettings()
    erasure: ErasureSettings = ErasureSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    ppo: PPOSettings = PPOSettings()
    cycle: CycleSettings = CycleSettings()
    rollouts: RolloutsSettings = RolloutsSettings()
    hardware: HardwareSettings = HardwareSettings()


ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", help="Settings; default plaudit.toml where it exists.")]
KeyOption = Annotated[str, typer.Option("--key", envvar="PLAUDIT_KEY", help="An API key with the scope that is needed.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Goes into the audit.", callback=audit.reason)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


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


@contextmanager
def opened(path: Path | None, process: str) -> Iterator[tuple[Settings, Stores, Registry]]:
    """Settings, stores and registry of one command."""
    settings = settings_from(path)
    data_dir = settings.feedback.data_dir
    store = AdapterStore(settings.deploy.resolved(data_dir), data_dir / "adapters")
    stores = open_stores(settings, process, upgrade)
    try:
        stores.ingest()
        yield settings, stores, Registry(stores.engine, settings.feedback.tenant, store)
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


def operator(stores: Stores, secret: str, scope: Scope) -> ApiKey:
    """Whose key this is. Raises NotAuthenticated, or NotAllowed where it lacks the scope."""
    if stores.api_keys.count() == 0:
        raise NotAuthenticated("there is no API key yet: start `plaudit up` once in this folder; its first start prints the admin's key")
    if not secret:
        raise NotAuthenticated(f"an API key with the scope '{scope}' is needed: give it with --key or in PLAUDIT_KEY")
    key = stores.api_keys.check(secret)
    key.require(scope)
    return key
