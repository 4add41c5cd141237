"""Settings of the event log, and how every room's settings are loaded.

One TOML file; each key can be overridden by the environment as `PLAUDIT__SECTION__KEY`; an unknown key is an error. A room describes
its own section as a `Section`; the process that needs several composes them by inheriting from `Settings`.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from feedback.errors import ConfigError

ENV_PREFIX = "PLAUDIT__"


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key is an error, and so is a number that is none or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class FeedbackSettings(Section):
    """`[feedback]`: where events lie and how long they count."""

    data_dir: Path = Path("data")
    """Folder of everything that Plaudit stores on this machine."""
    tenant: str = Field(default="default", min_length=1, max_length=64)
    """Written into every event; one deployment serves one tenant."""
    token_expiry_s: int = Field(default=7 * 24 * 3600, ge=60, le=30 * 24 * 3600)
    """How long a feedback token may be used; no longer than unrated interactions are kept."""
    unrated_expiry_days: int = Field(default=30, ge=1)
    """Interactions that nobody rated are deleted from the archive after so many days."""
    erased_file: Path | None = None
    """Where each erasure is also listed, to be kept apart from backups; without it `erased.jsonl` in the data folder."""
    ack: Literal["local", "broker"] = "local"
    """What a 2xx for feedback promises: fsynced on this machine, or also received by Kafka."""
    ack_timeout_s: float = Field(default=5.0, gt=0)
    """With `ack = "broker"`: how long to wait for Kafka before saying 503."""
    auth: bool = True
    """Ask for an API key; without it everybody who reaches the port may chat and rate."""

    @model_validator(mode="after")
    def tokens_expire_first(self) -> FeedbackSettings:
        """A rating of an answer that was deleted would be acknowledged and never count."""
        if self.token_expiry_s > self.unrated_expiry_days * 24 * 3600:
            raise ValueError(
                f"token_expiry_s is {self.token_expiry_s}, more than the {self.unrated_expiry_days} days of unrated_expiry_days"
            )
        return self


class KafkaSettings(Section):
    """`[kafka]`: the broker that carries events past this machine."""

    bootstrap: str | None = None
    """`host:port[,host:port]`; without it no Kafka is used."""
    topic: str = Field(default="plaudit.events", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """All events go to this topic, keyed by interaction."""
    partitions: int = Field(default=6, ge=1, le=1000)
    """Of the topic, where Plaudit makes it; as many archive readers can share the work."""
    replication: int = Field(default=1, ge=1, le=16)
    """Copies of the topic, where Plaudit makes it: 1 is for one broker, 3 for production."""
    retention_days: int = Field(default=60, ge=30, le=36_500)
    """Of the topic, where Plaudit makes it; longer than the interval of backups."""
    group: str = Field(default="plaudit-archive", min_length=1, max_length=200)
    """Consumer group of the archive's readers; one for each archive."""
    session_timeout_s: float = Field(default=10.0, ge=1)
    """A reader that is silent for so long loses its partitions to the others."""
    max_poll_interval_s: float = Field(default=60.0, ge=1)
    """A reader that stores one batch for longer than this loses its partitions to the others."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the broker is spoken to."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """Needed by the SASL protocols."""
    sasl_username: str | None = None
    """Needed by the SASL protocols."""
    sasl_password: SecretStr | None = None
    """Needed by the SASL protocols."""
    ssl_cafile: Path | None = None
    """CA certificates of the broker, PEM; without it the system's."""
    ssl_certfile: Path | None = None
    """Certificate that this client shows, PEM."""
    ssl_keyfile: Path | None = None
    """Key of that certificate, PEM."""
    ssl_key_password: SecretStr | None = None
    """Of the key file, where it is encrypted."""
    ssl_check_hostname: bool = True
    """Whether the broker's certificate must name its host."""
    batch_events: int = Field(default=500, ge=1, le=10_000)
    """How many events may be in flight between the relay and the broker."""
    delivery_timeout_s: float = Field(default=30.0, gt=0)
    """After so long an event counts as not sent and is tried again."""

    @model_validator(mode="after")
    def complete(self) -> KafkaSettings:
        """What belongs together is set together, so that a half-set login fails at the start and not at the broker."""
        login = {"sasl_mechanism": self.sasl_mechanism, "sasl_username": self.sasl_username, "sasl_password": self.sasl_password}
        missing = [name for name, value in login.items() if value is None]
        if self.security_protocol.startswith("SASL") and missing:
            raise ValueError(f"security_protocol is {self.security_protocol}, which needs {' and '.join(missing)} too")
        if not self.security_protocol.startswith("SASL") and len(missing) < len(login):
            raise ValueError(f"security_protocol is {self.security_protocol}, which uses no sasl_ setting; set SASL_SSL or remove them")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile belong together; set both or none")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name} is {path}, which is no file")
        return self


class LimitSettings(Section):
    """`[limits]`: how much one caller may ask for; 0 is no limit. Over a limit the answer is 429, with Retry-After."""

    chat_per_minute: int = Field(default=600, ge=0)
    """Chat requests a minute of one API key; everybody who comes without a key counts as one."""
    streams_per_key: int = Field(default=8, ge=0)
    """Replies of one API key that one gateway process writes at once."""
    streams_per_user: int = Field(default=2, ge=0)
    """Replies of one person that one gateway process writes at once; a comparison is one."""
    feedback_per_minute: int = Field(default=30, ge=0)
    """Changes a minute that one person makes; repeating what stands already is none."""
    feedback_per_day: int = Field(default=300, ge=0)
    """Changes a day that one person makes."""
    changes: int = Field(default=10, ge=0)
    """How often one person may change their word on one answer within 30 days; also erasures and withdrawals they ask for in a day."""


class RegistrySettings(Section):
    """`[registry]`: the database of adapters, routes, API keys and subjects' keys."""

    url: SecretStr | None = None
    """SQLAlchemy URL, which may hold a password; without it `registry.sqlite` in the data folder."""

    def resolved(self, data_dir: Path) -> str:
        """The URL to connect to."""
        return self.url.get_secret_value() if self.url else f"sqlite:///{(data_dir / 'registry.sqlite').absolute()}"


class Settings(BaseSettings):
    """What `open_stores` needs. Inherit to add a room's sections."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    feedback: FeedbackSettings = FeedbackSettings()
    kafka: KafkaSettings = KafkaSettings()
    registry: RegistrySettings = RegistrySettings()
    limits: LimitSettings = LimitSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what `load` read from the file; no .env and no secrets folder are looked for."""
        return env_settings, init_settings


S = TypeVar("S", bound=Settings)


def load(settings_class: type[S], path: Path | None = None) -> S:
    """Settings from a TOML file (none: defaults) and the environment. Raises ConfigError naming the key, the value and the limit."""
    values = _read(path) if path else {}
    known = settings_class.model_fields
    for name in os.environ:
        section = name.upper().removeprefix(ENV_PREFIX).split("__")[0].lower()
        if name.upper().startswith(ENV_PREFIX) and section not in known:
            raise ConfigError(f"{name} sets section '{section}', which does not exist; sections are {', '.join(known)}", field=section)
    try:
        return settings_class(**values)  # type: ignore[arg-type]  # pydantic checks what the file holds
    except SettingsError as exc:
        raise _not_json(exc) from exc
    except ValidationError as exc:
        where, message = _first_problem(exc)
        raise ConfigError(f"setting {where}: {message}", field=where) from None


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"the settings file {path} cannot be read: {exc.strerror}", field="config") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the settings file {path} is not TOML: {exc}", field="config") from exc


def _not_json(exc: SettingsError) -> ConfigError:
    """The environment can give lists and whole sections as JSON only."""
    given = exc.__cause__.doc if isinstance(exc.__cause__, json.JSONDecodeError) else None
    names = [name for name, value in os.environ.items() if name.upper().startswith(ENV_PREFIX) and value == given]
    return ConfigError(f"{' or '.join(names)} must be JSON, because it sets a list or a section: {exc.__cause__}", field="environment")


def _first_problem(exc: ValidationError) -> tuple[str, str]:
    first = exc.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return where, "is not known; look for a misspelling"
    if first["type"] == "value_error":
        return where, first["msg"].removeprefix("Value error, ")
    secret = "password" in where or "secret" in where or where == "registry.url" or where.startswith("webhooks")
    return where, f"{first['msg']}, got {'***' if secret else repr(first['input'])}"
