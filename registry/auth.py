"""Authorization at a registry: challenges (RFC 7235), basic, and the token flow of the distribution specification."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from wherry.core.errors import InvalidArgument, Unauthenticated
from wherry.registry.credentials import Credential, Credentials

# seconds that a token counts as valid where the server doesn't say (the specification's default) ...
TOKEN_SECONDS = 60
# ... and how long before its end it is renewed
TOKEN_MARGIN = 10
CLIENT_ID = "wherry"

# fetches a token: (realm, query or form, headers, whether it is a POST) -> decoded JSON
FetchToken = Callable[[str, Mapping[str, str | list[str]], Mapping[str, str], bool], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a `WWW-Authenticate` header offers; scheme and names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?:\s+|$)(?!=)")
_PARAMETER = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]+))")


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """The challenges of all `WWW-Authenticate` headers of an answer; what can't be read is left out."""
    found = []
    for header in headers:
        at = 0
        while (match := _SCHEME.match(header, at)) is not None:
            at = match.end()
            parameters: dict[str, str] = {}
            while (pair := _PARAMETER.match(header, at)) is not None:
                value = re.sub(r"\\(.)", r"\1", pair[2]) if pair[2] is not None else pair[3]
                parameters[pair[1].lower()] = value
                at = pair.end()
            found.append(Challenge(match[1].lower(), parameters))
    return found


def _basic(credential: Credential) -> str:
    return "Basic " + base64.b64encode(f"{credential.username}:{credential.secret}".encode()).decode()


class Authorizer:
    """Finds the `Authorization` header for requests to one host, and keeps tokens by their scope.

    `name` is the registry as references have it; credentials are asked for once.
    """

    def __init__(self, name: str, credentials: Credentials, fetch_token: FetchToken) -> None:
        self._name = name
        self._credentials = credentials
        self._fetch_token = fetch_token
        self._credential: Credential | None = None
        self._asked = False
        self._challenge: Challenge | None = None
        self._challenges: list[str] = []
        # scope -> header, end of validity (monotonic seconds)
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = asyncio.Lock()

    async def header(self, scope: str) -> str | None:
        """The header for a request of this scope (`repository:library/x:pull`, several with spaces between them).

        None before any challenge.
        """
        if self._challenge is None:
            return None
        async with self._lock:
            return await self._header(scope)

    async def challenged(self, headers: list[str], scope: str, used: str | None) -> str:
        """The header to try after a 401; `used` is the one that was refused.

        Raises Unauthenticated when there is nothing (else) to offer.
        """
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(headers)}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            raise Unauthenticated(f"{self._name}: no supported authentication is offered: {', '.join(headers)[:200]}")
        async with self._lock:
            self._challenge, self._challenges = challenge, headers
            if used is not None and self._tokens.get(scope, ("", 0.0))[0] == used:
                del self._tokens[scope]
            header = await self._header(scope)
        if header is None or (header == used and challenge.scheme == "basic"):
            raise Unauthenticated(f"{self._name}: authorization failed: no basic auth credentials")
        return header

    async def _credential_of_user(self) -> Credential | None:
        if not self._asked:
            self._credential = await self._credentials(self._name, self._challenges)
            self._asked = True
        return self._credential

    async def _header(self, scope: str) -> str | None:
        credential = await self._credential_of_user()
        if credential is not None and credential.header:
            return credential.header
        challenge = self._challenge
        if challenge is None or challenge.scheme == "basic":
            return _basic(credential) if credential is not None and credential.username else None
        kept = self._tokens.get(scope)
        if kept is not None and kept[1] > time.monotonic():
            return kept[0]
        token, seconds = await self._token(challenge, scope, credential)
        header = f"Bearer {token}"
        self._tokens[scope] = (header, time.monotonic() + max(seconds - TOKEN_MARGIN, 1))
        return header

    async def _token(self, challenge: Challenge, scope: str, credential: Credential | None) -> tuple[str, float]:
        realm = challenge.parameters.get("realm", "")
        if urlsplit(realm).scheme not in {"http", "https"}:
            raise InvalidArgument(f"{self._name}: no valid realm in the authentication challenge: {realm[:200]!r}")
        scopes = scope.split() or challenge.parameters.get("scope", "").split()
        fields: dict[str, str | list[str]] = {"scope": scopes}
        if service := challenge.parameters.get("service"):
            fields["service"] = service
        if credential is not None and credential.refresh_token:
            form = {**fields, "scope": " ".join(scopes), "client_id": CLIENT_ID}
            form |= {"grant_type": "refresh_token", "refresh_token": credential.refresh_token}
            return _read_token(self._name, await self._fetch_token(realm, form, {}, True))
        headers = {}
        if credential is not None and credential.username:
            headers["Authorization"] = _basic(credential)
            fields["account"] = credential.username
        return _read_token(self._name, await self._fetch_token(realm, fields, headers, False))


def _read_token(name: str, answer: Any) -> tuple[str, float]:
    if not isinstance(answer, dict):
        raise Unauthenticated(f"{name}: the authorization server's answer is no object")
    token = answer.get("token") or answer.get("access_token")
    if not isinstance(token, str) or not token.isascii() or "\n" in token:
        raise Unauthenticated(f"{name}: authorization server did not include a token in the response")
    seconds = answer.get("expires_in")
    return token, float(seconds) if isinstance(seconds, int | float) and seconds > 0 else TOKEN_SECONDS
