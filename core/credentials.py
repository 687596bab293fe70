"""Who the user is to a registry: what `docker login` (and podman, skopeo) left in `config.json`, and its helpers.

Read where the user is, in the client; the daemon asks for it over the transfer's stream.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wherry.core.errors import InvalidArgument, PermissionDenied
from wherry.core.reference import DEFAULT_HOST

# the keys of Docker's own registry in config.json, and the host that it is served from
_DOCKER_KEYS = ("https://index.docker.io/v1/", DEFAULT_HOST, "index.docker.io")
_DOCKER_HOSTS = (DEFAULT_HOST, "registry-1.docker.io", "index.docker.io")
# seconds for a credential helper's answer: it may ask a person
HELPER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Credential:
    """A user with a password, a refresh token (OAuth2), or a whole `Authorization` header; "" where not given."""

    username: str = ""
    secret: str = ""
    refresh_token: str = ""
    header: str = ""


# asked with a registry's host (`docker.io`, `r.example:5000`); None is anonymous
Lookup = Callable[[str], Credential | None]


def from_docker_config(path: str = "") -> Lookup:
    """Credentials of a `config.json` (`$DOCKER_CONFIG` or `~/.docker` by default); a missing file is anonymous.

    Raises, when asked, InvalidArgument for a file that can't be read, PermissionDenied where a helper fails.
    """
    if not path:
        path = os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")

    def find(host: str) -> Credential | None:
        config = _load(path)
        keys = _DOCKER_KEYS if host in _DOCKER_HOSTS else (host, f"https://{host}")
        helpers, auths = _table(path, config, "credHelpers"), _table(path, config, "auths")
        helper = next((helpers[key] for key in keys if key in helpers), None) or config.get("credsStore")
        if helper:
            found = _ask_helper(str(helper), keys[0])
            if found is not None:
                return found
        entry = next((auths[key] for key in keys if key in auths), None)
        if entry is None:
            # written by older ones: a URL whose host counts
            entry = next((value for key, value in auths.items() if _host(key) == host), None)
        return _entry(path, host, entry) if isinstance(entry, dict) else None

    return find


def _host(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _table(path: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise InvalidArgument(f"{path}: {key} is no object: invalid argument")
    return table


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


def _ask_helper(name: str, server: str) -> Credential | None:
    """Run `docker-credential-NAME get` (docker-credential-helpers: the server on stdin, JSON on stdout)."""
    import subprocess  # noqa: PLC0415 - most users have no helper, and this takes a while to load

    if "/" in name:
        raise InvalidArgument(f"credential helper {name!r}: not a name: invalid argument")
    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PermissionDenied(f"{program}: no answer in {HELPER_SECONDS:.0f} s: permission denied") from None
    except OSError as error:
        raise PermissionDenied(f"{program}: {error.strerror}: permission denied") from error
    if done.returncode:
        text = (done.stdout + done.stderr).decode(errors="replace").strip()
        if "credentials not found" in text:
            return None
        raise PermissionDenied(f"{program}: {text}: permission denied")
    try:
        answer = json.loads(done.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise PermissionDenied(f"{program}: not an answer of a credential helper: permission denied") from error
    return Credential(refresh_token=secret) if username == "<token>" else Credential(username, secret)
