"""Who the user is to a registry: what `docker login` (and podman, skopeo) left in `config.json`, and its helpers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from wherry.core.errors import InvalidArgument, PermissionDenied
from wherry.core.reference import DEFAULT_HOST

# the key of Docker's own registry in config.json
_DOCKER_KEY = "https://index.docker.io/v1/"
# seconds for a credential helper's answer
HELPER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Credential:
    """A user with a password, a refresh token (OAuth2), or a whole `Authorization` header; "" where not given."""

    username: str = ""
    secret: str = ""
    refresh_token: str = ""
    header: str = ""


# asked once for each host (as it is named in the reference, `docker.io`); None is anonymous
Credentials = Callable[[str], Awaitable[Credential | None]]


async def anonymous(host: str) -> Credential | None:
    """Nobody."""
    return None


def fixed(username: str, secret: str) -> Credentials:
    """The same for every host; without a user name the secret is a refresh token (as `ctr --user` has it)."""
    credential = Credential(username, secret) if username else Credential(refresh_token=secret)

    async def give(host: str) -> Credential | None:
        return credential

    return give


def from_docker_config(path: str = "") -> Credentials:
    """Credentials of a `config.json` (`$DOCKER_CONFIG` or `~/.docker` by default); a missing file is anonymous.

    Raises, when asked, InvalidArgument for a file that can't be read, PermissionDenied where a helper fails.
    """
    if not path:
        path = os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")

    async def find(host: str) -> Credential | None:
        config = _load(path)
        keys = [_DOCKER_KEY, host, "index.docker.io"] if host == DEFAULT_HOST else [host, f"https://{host}"]
        helpers = config.get("credHelpers") or {}
        helper = next((helpers[key] for key in keys if key in helpers), None) or config.get("credsStore")
        if helper:
            found = await _ask_helper(str(helper), keys[0])
            if found is not None:
                return found
        auths = config.get("auths") or {}
        entry = next((auths[key] for key in keys if key in auths), None)
        return _entry(path, host, entry) if isinstance(entry, dict) else None

    return find


def _load(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}: invalid argument") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path}: not a JSON object: invalid argument")
    return config


def _entry(path: str, host: str, entry: dict[str, Any]) -> Credential | None:
    if entry.get("identitytoken"):
        return Credential(refresh_token=str(entry["identitytoken"]))
    if entry.get("auth"):
        try:
            username, _, secret = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{path}: auth of {host}: {error}: invalid argument") from error
        return Credential(username, secret.rstrip("\0"))
    if entry.get("username"):
        return Credential(str(entry["username"]), str(entry.get("password") or ""))
    return None


async def _ask_helper(name: str, server: str) -> Credential | None:
    """Run `docker-credential-NAME get` (docker-credential-helpers: the server on stdin, JSON on stdout)."""
    if "/" in name:
        raise InvalidArgument(f"credential helper {name!r}: not a name: invalid argument")
    program = f"docker-credential-{name}"
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise PermissionDenied(f"{program}: {error.strerror}: permission denied") from error
    try:
        out, err = await asyncio.wait_for(process.communicate(server.encode()), HELPER_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise PermissionDenied(f"{program}: no answer in {HELPER_SECONDS:.0f} s: permission denied") from None
    if process.returncode:
        text = (out + err).decode(errors="replace").strip()
        if "credentials not found" in text:
            return None
        raise PermissionDenied(f"{program}: {text}: permission denied")
    try:
        answer = json.loads(out)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise PermissionDenied(f"{program}: not an answer of a credential helper: permission denied") from error
    return Credential(refresh_token=secret) if username == "<token>" else Credential(username, secret)
