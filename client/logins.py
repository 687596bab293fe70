"""Logging in to registries: the question whether a name and a password are right, and where they are kept.

They are kept in docker's `config.json` (`$DOCKER_CONFIG`, else `~/.docker`), or by the credential helper that it names:
docker, podman, skopeo and `wherry pull` read the same.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import ssl
import subprocess
from typing import Any
from urllib.parse import urlencode, urlsplit

from wherry.core.credentials import HELPER_SECONDS
from wherry.core.errors import InvalidArgument, PermissionDenied, Unavailable
from wherry.core.reference import DEFAULT_HOST

# seconds for an answer of a registry
TIMEOUT = 30.0
# what docker.io is called in config.json, and where it is served
_DOCKER_KEY = "https://index.docker.io/v1/"
_DOCKER_SERVER = "registry-1.docker.io"
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


def check(host: str, user: str, password: str, *, plain_http: bool = False) -> None:
    """Asks the registry; raises PermissionDenied where it says no, Unavailable where nobody answers."""
    server = _DOCKER_SERVER if host == DEFAULT_HOST else host
    basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    schemes = ["http"] if plain_http else ["https", *(["http"] if _LOOPBACK.fullmatch(host) else [])]
    for scheme in schemes:
        try:
            status, challenge = _ask(f"{scheme}://{server}/v2/", basic)
        except Unavailable:
            if scheme == schemes[-1]:
                raise
            continue
        break
    if status == 401 and challenge.lower().startswith("bearer"):
        status = _token(challenge, user, basic)
    if status in {401, 403}:
        raise PermissionDenied(f"login to {host} failed: wrong name or password")
    if status >= 400:
        raise Unavailable(
            f"login to {host} failed: the registry answers with {status} {http.client.responses.get(status, '')}"
        )


def _token(challenge: str, user: str, basic: str) -> int:
    """The token service's answer to the password (distribution's token specification)."""
    fields = dict(_CHALLENGE.findall(challenge))
    if not fields.get("realm"):
        raise Unavailable("login failed: the registry asks for a token and doesn't say where it comes from")
    query = {"account": user, "client_id": "wherry"}
    if fields.get("service"):
        query["service"] = fields["service"]
    return _ask(f"{fields['realm']}{'&' if '?' in fields['realm'] else '?'}{urlencode(query)}", basic)[0]


def _ask(url: str, authorization: str) -> tuple[int, str]:
    """Status and challenge of a GET; redirects aren't followed, passwords don't travel."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.netloc, timeout=TIMEOUT, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Authorization": authorization, "User-Agent": "wherry"})
        answer = connection.getresponse()
        return answer.status, answer.headers.get("WWW-Authenticate") or ""
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{parts.scheme}://{parts.netloc}: {error}") from error
    finally:
        connection.close()


def config_path() -> str:
    """Docker's `config.json`."""
    return os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")


def store(host: str, user: str, password: str) -> str:
    """Keeps a password, and returns the helper that has it, "" where it is in the file. Raises InvalidArgument."""
    config, key = _load(), _key(host)
    helper = _helper(config, key)
    if helper:
        _run_helper(helper, "store", json.dumps({"ServerURL": key, "Username": user, "Secret": password}))
        config.setdefault("auths", {})[key] = {}
    else:
        auth = base64.b64encode(f"{user}:{password}".encode()).decode()
        config.setdefault("auths", {})[key] = {"auth": auth}
    _write(config)
    return helper


def erase(host: str) -> bool:
    """Forgets a password; False where there was none."""
    config, key = _load(), _key(host)
    helper = _helper(config, key)
    entry = config.get("auths", {}).pop(key, None)
    if helper:
        with contextlib.suppress(PermissionDenied):
            _run_helper(helper, "erase", key)
    if entry is None:
        return False
    _write(config)
    return True


def _key(host: str) -> str:
    return _DOCKER_KEY if host in {DEFAULT_HOST, "index.docker.io"} else host


def _helper(config: dict[str, Any], key: str) -> str:
    return str((config.get("credHelpers") or {}).get(key) or config.get("credsStore") or "")


def _load() -> dict[str, Any]:
    path = config_path()
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path} is no JSON object")
    return config


def _write(config: dict[str, Any]) -> None:
    """Written beside and moved, readable by its owner alone."""
    path = config_path()
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    beside = f"{path}.{os.getpid()}"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(config, file, indent="\t")
    os.replace(beside, path)


def _run_helper(name: str, verb: str, text: str) -> None:
    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            [program, verb], input=text.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PermissionDenied(f"{program}: {error}") from error
    if done.returncode:
        raise PermissionDenied(f"{program}: {(done.stdout + done.stderr).decode(errors='replace').strip()}")
