"""Requests to registries: connections, authorization, redirects, and what a status means."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from wherry.core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WherryError,
)
from wherry.registry.auth import Authorizer
from wherry.registry.credentials import Credentials, anonymous
from wherry.registry.hosts import Host, netloc_of

MAX_REDIRECTS = 10
# seconds without a byte after which a peer counts as gone
IDLE_SECONDS = 60.0
# bytes of an error's body or a token's answer that are read
MAX_ANSWER = 1 << 20
# bytes that aiohttp reads ahead for each body
READ_AHEAD = 1 << 18
USER_AGENT = "wherry/0.1"

Body = bytes | AsyncIterator[bytes] | None


class TooBusy(ResourceExhausted):
    """The registry wants to be asked again after some seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Transport:
    """All connections of one pull or push. Close it in the end."""

    def __init__(self, credentials: Credentials = anonymous, headers: Mapping[str, str] | None = None) -> None:
        self._credentials = credentials
        self._headers = {"User-Agent": USER_AGENT, **(headers or {})}
        self._session: aiohttp.ClientSession | None = None
        self._authorizers: dict[tuple[str, str], Authorizer] = {}
        self._contexts: dict[Host, ssl.SSLContext | bool] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        host: Host,
        url: str,
        *,
        name: str,
        scope: str = "",
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Body] | None = None,
        expect: frozenset[int],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Do one request; the response is open inside of the `with`.

        `url` is absolute or the path behind the host's root; `name` is the registry's, for credentials. `body` makes
        the body, again for every attempt. A status outside of `expect` raises as `status_error`; connection troubles
        raise Unavailable, DeadlineExceeded.
        """
        target = url if "://" in url else host.root + url
        authorizer = self._authorizer(name, host)
        # what goes to the registry stays with it: neither configured headers nor authorization follow a redirect
        private = {**host.headers}
        attempts = 0
        authorization = await authorizer.header(scope)
        response: aiohttp.ClientResponse | None = None
        try:
            while True:
                attempts += 1
                response = await self._follow(
                    method, host, target, {**(headers or {}), **private}, authorization=authorization, body=body
                )
                if response.status != 401 or attempts > 2 or 401 in expect:
                    break
                challenges = response.headers.getall("WWW-Authenticate", [])
                detail = await _detail(response)
                response.release()
                try:
                    authorization = await authorizer.challenged(challenges, scope, authorization)
                except Unauthenticated as error:
                    raise Unauthenticated(f"{error.message}{detail}") from error
            if response.status not in expect:
                raise await status_error(response, method)
            yield response
        except (aiohttp.ClientError, OSError) as error:
            raise _connection_error(method, target, error) from error
        finally:
            if response is not None:
                response.release()

    async def _follow(
        self,
        method: str,
        host: Host,
        url: str,
        headers: dict[str, str],
        *,
        authorization: str | None,
        body: Callable[[], Body] | None,
    ) -> aiohttp.ClientResponse:
        """Send, and follow redirects; what is private goes only to the host that was meant."""
        seen = 0
        while True:
            parts = urlsplit(url)
            at_home = (parts.scheme, parts.netloc) == (host.scheme, host.netloc)
            sent = dict(headers) if at_home else {k: v for k, v in headers.items() if k not in host.headers}
            if at_home and authorization is not None:
                sent["Authorization"] = authorization
            response = await self._open().request(
                method,
                URL(url, encoded=True),
                headers=sent,
                data=body() if body is not None else None,
                allow_redirects=False,
                ssl=self._context(host) if at_home else True,
                proxy=(host.proxy or None) if at_home else None,
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=host.dial_seconds, sock_read=IDLE_SECONDS, connect=None
                ),
            )
            if response.status not in {301, 302, 303, 307, 308} or "Location" not in response.headers:
                return response
            location = urljoin(url, response.headers["Location"])
            response.release()
            seen += 1
            if seen > MAX_REDIRECTS or urlsplit(location).scheme not in {"http", "https"}:
                raise Unavailable(f"{method} {url}: redirected too often or to no web address")
            if parts.scheme == "https" and urlsplit(location).scheme == "http":
                raise Unavailable(f"{method} {url}: redirected from https to http, which isn't followed")
            url = location

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # blobs are what they are: their compression is theirs
                auto_decompress=False,
                skip_auto_headers=("Accept-Encoding",),
                read_bufsize=READ_AHEAD,
                trust_env=True,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _authorizer(self, name: str, host: Host) -> Authorizer:
        key = (name, host.netloc)
        if key not in self._authorizers:

            async def fetch(realm: str, fields: Mapping[str, Any], headers: Mapping[str, str], post: bool) -> Any:
                return await self._token(host, realm, fields, headers, post=post)

            # a mirror is its own registry: the user's password for the upstream isn't its business
            own = name if host.netloc == netloc_of(name) else host.netloc
            # and whoever a foreign layer's URL names gets no credentials at all
            self._authorizers[key] = Authorizer(own, self._credentials if host.netloc else anonymous, fetch)
        return self._authorizers[key]

    async def _token(
        self, host: Host, realm: str, fields: Mapping[str, Any], headers: Mapping[str, str], *, post: bool
    ) -> Any:
        """Ask an authorization server."""
        pairs = [
            (key, item) for key, value in fields.items() for item in (value if isinstance(value, list) else [value])
        ]
        same = urlsplit(realm).netloc == host.netloc
        try:
            async with self._open().request(
                "POST" if post else "GET",
                realm,
                params=None if post else pairs,
                data=pairs if post else None,
                headers=headers,
                allow_redirects=True,
                ssl=self._context(host) if same or host.skip_verify else True,
                timeout=aiohttp.ClientTimeout(total=IDLE_SECONDS, sock_connect=host.dial_seconds),
            ) as response:
                if response.status in {400, 401, 403}:
                    raise Unauthenticated(
                        f"failed to authorize: failed to fetch token: unexpected status from {response.method} request "
                        f"to {realm}: {response.status} {response.reason}{await _detail(response)}"
                    )
                if response.status != 200:
                    raise await status_error(response, response.method)
                data = await response.content.read(MAX_ANSWER)
        except (aiohttp.ClientError, OSError) as error:
            raise _connection_error("GET", realm, error) from error
        try:
            return json.loads(data)
        except ValueError as error:
            raise Unauthenticated(f"failed to authorize: the answer of {realm} is not JSON") from error

    def _context(self, host: Host) -> ssl.SSLContext | bool:
        """The TLS settings of a host: True is the system's."""
        if host not in self._contexts:
            self._contexts[host] = _make_context(host)
        return self._contexts[host]


def _make_context(host: Host) -> ssl.SSLContext | bool:
    if host.scheme != "https":
        return True
    if not (host.ca or host.client or host.skip_verify):
        return True
    context = ssl.create_default_context()
    try:
        for path in host.ca:
            context.load_verify_locations(path)
        for certificate, key in host.client:
            context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"certificates of {host.netloc}: {error}: invalid argument") from error
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _detail(response: aiohttp.ClientResponse) -> str:
    """What a registry says about an error (the specification's error body), to put behind a message."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, UnicodeDecodeError):
        data = json.loads(await response.content.read(MAX_ANSWER))
        errors = data.get("errors") if isinstance(data, dict) else None
        if isinstance(errors, list):
            texts = [f"{e.get('code', '')}: {e.get('message', '')}" for e in errors if isinstance(e, dict)]
            return ": " + "; ".join(texts)[:500] if texts else ""
    return ""


async def status_error(response: aiohttp.ClientResponse, method: str) -> WherryError:
    """The error for a status that wasn't expected, with the registry's own words."""
    text = f"unexpected status from {method} request to {response.url}: {response.status} {response.reason}"
    text += await _detail(response)
    kinds: dict[int, type[WherryError]] = {
        400: InvalidArgument,
        401: Unauthenticated,
        403: PermissionDenied,
        404: NotFound,
        429: ResourceExhausted,
    }
    retry_after = response.headers.get("Retry-After", "")
    if response.status in {429, 503} and retry_after.isdigit():
        return TooBusy(text, float(retry_after))
    kind = kinds.get(response.status, Unavailable if response.status >= 500 else WherryError)
    return kind(f"{text}: not found" if kind is NotFound else text)


def _connection_error(method: str, url: str, error: Exception) -> WherryError:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return DeadlineExceeded(f"{method} {url}: no answer in time")
    return Unavailable(f"failed to do request: {method} {url}: {error or type(error).__name__}")
