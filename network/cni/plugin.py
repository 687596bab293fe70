"""A plugin is a program: one run for each command, the configuration on its input, an answer on its output."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from wherry.core.errors import DeadlineExceeded, Internal, NotFound, WherryError
from wherry.core.names import quote

# what plugins need of ours: they run iptables, nft and ip
_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# bytes of a plugin's error output that are passed on
_STDERR = 2000
TRY_AGAIN = 11
"""The code of an error that may not be one later (spec, section 5: errors)."""


class PluginError(Internal):
    """What a plugin said was wrong: `plugin` is its type, `number` its code, `details` what else it had to say."""

    def __init__(self, plugin: str, command: str, number: int, text: str, details: str = "") -> None:
        more = f" ({details})" if details else ""
        super().__init__(f"CNI plugin {plugin}, {command}: {text}{more}")
        self.plugin, self.number, self.details = plugin, number, details


def find(kind: str, folders: Sequence[str]) -> str:
    """The program of a plugin's type. Raises NotFound."""
    for folder in folders:
        path = os.path.join(folder, kind)
        if "/" not in kind and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise NotFound(f"CNI plugin {quote(kind)} in {', '.join(folders)}: not found")


async def execute(
    kind: str,
    folders: Sequence[str],
    command: str,
    config: Mapping[str, Any],
    *,
    variables: Mapping[str, str],
    seconds: float,
    within: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a plugin's command, by the command `within`; its answer, {} where it gives none.

    Raises NotFound for a plugin that isn't there, PluginError, DeadlineExceeded after `seconds`.
    """
    path = find(kind, folders)
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment.setdefault("PATH", _PATH)
    environment |= {"CNI_COMMAND": command, "CNI_PATH": ":".join(folders), **variables}
    try:
        # a session of its own: what a plugin leaves running ends with it
        process = await asyncio.create_subprocess_exec(
            *within,
            path,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise Internal(f"CNI plugin {path} can't be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate(json.dumps(config).encode())
    except TimeoutError:
        raise DeadlineExceeded(f"CNI plugin {kind}, {command}: no answer after {seconds:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    return _answer(kind, command, process.returncode or 0, output, errors)


def _answer(kind: str, command: str, code: int, output: bytes, errors: bytes) -> dict[str, Any]:
    try:
        value = json.loads(output) if output.strip() else {}
    except ValueError:
        value = None
    if code:
        raise _failed(kind, command, code, value, errors or output)
    if not isinstance(value, dict):
        raise PluginError(
            kind, command, 0, f"its answer is no JSON object: {output[:_STDERR].decode(errors='replace')}"
        )
    return value


def _failed(kind: str, command: str, code: int, value: Any, said: bytes) -> WherryError:
    if isinstance(value, dict) and "code" in value:
        with contextlib.suppress(TypeError, ValueError):
            number = int(value["code"])
            return PluginError(kind, command, number, str(value.get("msg") or ""), str(value.get("details") or ""))
    text = said[-_STDERR:].decode(errors="replace").strip()
    return PluginError(kind, command, 0, f"ended with {code}: {text or 'no reason given'}")
