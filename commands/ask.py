"""How `plaudit adapters` and `plaudit rollouts` ask for an operation: of a gateway, or of the registry's database where none runs.

With `--url` or `operator.url` it is that gateway and no other. Without, it is the one that runs on the data folder; where none runs, where
it does not answer, or to read without a key, the operation is done here, and one line on standard error says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import typer
from pydantic import ValidationError
from pydantic_core import from_json, to_jsonable_python
from yarl import URL

from commands.settings import Settings, opened, operator, settings_from
from commands.terminal import remark
from deploy import address
from deploy.operations import PREFIX, READ, Desk, Operation
from feedback.errors import GatewayUnavailable, InvalidInput, NotAuthenticated, PlauditError
from feedback.keys import Scope

UrlOption = Annotated[str, typer.Option("--url", help="A gateway to ask; default operator.url, else the one that runs here.")]
NOT_OURS = "which is none of its replies; is it Plaudit's, and of this version?"


class Ask:
    """Does operations; what they give is JSON, whichever way it came."""

    def __init__(self, settings: Settings, path: Path | None, url: str, secret: str, stack: ExitStack) -> None:
        self._settings, self._path, self._secret, self._stack = settings, path, secret, stack
        self._named = url or settings.operator.url
        self._desk: Desk | None = None
        self._url = self._named or address.announced(settings.feedback.data_dir)
        if self._named and (wrong := address.problem(self._named)):
            raise InvalidInput(f"--url: '{self._named[:200]}' {wrong}", field="url")

    def __call__(self, operation: Operation, **fields: Any) -> Any:
        if empty := [name for name in operation.parts if not fields[name]]:
            raise InvalidInput(f"{empty[0]}: is empty, it must be an id", field=empty[0])
        if self._desk is None and self._url is None:
            self._go_on_here(f"no gateway runs on {self._settings.feedback.data_dir}")
        elif self._desk is None and not self._named and not self._secret and operation.scope == READ:
            self._go_on_here("no API key was given")
        if self._desk is None:
            try:
                return asyncio.run(self._remote(operation, fields))
            except GatewayUnavailable as error:
                if self._named:
                    raise
                self._go_on_here(error.message)
        return self._local(operation, fields)

    def _go_on_here(self, why: str) -> None:
        remark(f"plaudit: {why}; the registry's database is asked itself")
        _, self._stores, registry = self._stack.enter_context(opened(self._path, "operator"))
        self._desk = Desk(registry, self._stores.engine, self._settings.rollout)

    def _local(self, operation: Operation, fields: dict[str, Any]) -> Any:
        """Whoever can open the registry's database may read it without a key."""
        assert self._desk is not None
        key = None if operation.scope == READ and not self._secret else operator(self._stores, self._secret, operation.scope)
        try:
            asked = operation.asks(**fields)
        except ValidationError as exc:
            from serving.openai_api import refusal  # as in `_read`

            raise refusal(exc) from exc
        return to_jsonable_python(operation.run(self._desk, key, asked))

    async def _remote(self, operation: Operation, fields: dict[str, Any]) -> Any:
        """Raises what the gateway refused with, as if it had been refused here; GatewayUnavailable where it does not answer."""
        if not self._secret:
            raise needs_key(operation.scope)
        url, timeout_s = self._url, self._settings.operator.timeout_s
        assert url is not None
        # Twice, because servers undo it once before they look for slashes.
        path = operation.path.format(**{name: quote(quote(fields[name], safe=""), safe="") for name in operation.parts})
        rest = {name: value for name, value in fields.items() if name not in operation.parts}
        said: dict[str, Any] = {"params": rest} if operation.method == "GET" else {"json": rest}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as http,
                http.request(
                    operation.method,
                    URL(f"{url.rstrip('/')}{PREFIX}{path}", encoded=True),
                    headers={"Authorization": f"Bearer {self._secret}"},
                    allow_redirects=False,  # the key would go along
                    **said,
                ) as reply,
            ):
                status, body = reply.status, await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            why = f"nothing within {timeout_s:g} s" if isinstance(exc, TimeoutError) else str(exc)
            raise GatewayUnavailable(f"the gateway at {url} does not answer: {why}", field="operator.url") from exc
        return _read(url, status, body)


def _read(url: str, status: int, body: bytes) -> Any:
    from serving.errors import PROBLEM, error_of  # here, because it brings FastAPI, which most commands need not wait for

    try:
        found = from_json(body)
    except ValueError as exc:
        raise PlauditError(f"operator.url: {url} answered {status} and {body[:60]!r}, {NOT_OURS}", field="operator.url") from exc
    if status == 200:
        return found
    if isinstance(found, dict) and str(found.get("type", "")).startswith(PROBLEM):
        raise error_of(found)
    raise PlauditError(f"operator.url: {url} answered {status}, {NOT_OURS}", field="operator.url")


def needs_key(scope: Scope) -> NotAuthenticated:
    """What is said where a command came without one."""
    return NotAuthenticated(f"an API key with the scope '{scope}' is needed: give it with --key or in PLAUDIT_KEY")


@contextmanager
def asking(path: Path | None, url: str, secret: str) -> Iterator[Ask]:
    """Opens nothing that the operations do not need: a gateway far away is asked without a data folder."""
    with ExitStack() as stack:
        yield Ask(settings_from(path), path, url, secret, stack)
