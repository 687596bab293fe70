"""Requests to registries: connections, authorization, redirects, and what a status means."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from wherry.core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    WherryError,
)
from wherry.registry.auth import Authorizer
from wherry.registry.credentials import Credentials, anonymous
from wherry.registry.hosts import Host, is_local, netloc_of
from wherry.registry.retry import Hopeless, NoConnection, TooBusy, retried, seconds_of
from wherry.registry.tls import context_for

MAX_REDIRECTS = 10
# seconds without a byte after which a peer counts as gone
IDLE_SECONDS = 60.0
# seconds until the head of an answer must have come, where nothing but the request was sent
HEAD_SECONDS = 120.0
# seconds for a TLS handshake where plain HTTP is right, too: some servers wait for the end of a line in it
PROBE_SECONDS = 3.0
# how many times as long a registry may take over what it was sent
STORING = 5
# bytes of an error's body or a token's answer that are read
MAX_ANSWER = 1 << 20
# bytes that aiohttp reads ahead for each body
READ_AHEAD = 1 << 18
USER_AGENT = "wherry/0.1"

Body = bytes | AsyncIterator[bytes] | None


class Transport:
    """All connections of one pull or push. Close it in the end.

    `headers` go to the registries that are named, and never further by a redirect.
    """

    def __init__(
        self,
        credentials: Credentials = anonymous,
        headers: Mapping[str, str] | None = None,
        dump: Callable[[str], None] | None = None,
    ) -> None:
        """`dump` is told each request and the head of each answer, without what is secret in them."""
        self._dump = dump
        self._credentials = credentials
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._authorizers: dict[tuple[str, str], Authorizer] = {}
        self._contexts: dict[tuple[Host, bool], ssl.SSLContext | bool] = {}
        # hosts that turned out to speak no TLS, where either was possible
        self._plain: set[str] = set()

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

        `url` is absolute or the path behind the host's root; `name` is the registry's, for credentials. `scope` is what
        a token must be good for, several with spaces between them. `body` makes the body, again for every attempt. A
        status outside of `expect` raises as `status_error`; connection troubles raise Unavailable, DeadlineExceeded.
        """
        host = self._settled(host)
        authorizer = self._authorizer(name, host)
        attempts = 0
        authorization = await authorizer.header(scope)
        response: aiohttp.ClientResponse | None = None
        target = url
        try:
            while True:
                attempts += 1
                target = url if "://" in url else host.root + url
                try:
                    response = await self._follow(
                        method, host, target, headers or {}, authorization=authorization, body=body
                    )
                except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
                    if not host.plain_ok or host.scheme == "http" or not _speaks_no_tls(error):
                        raise
                    self._plain.add(host.netloc)
                    host = self._settled(host)
                    continue
                if response.status != 401 or attempts > 3 or 401 in expect:
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

    def _settled(self, host: Host) -> Host:
        return replace(host, scheme="http") if host.plain_ok and host.netloc in self._plain else host

    async def _follow(
        self,
        method: str,
        host: Host,
        url: str,
        headers: Mapping[str, str],
        *,
        authorization: str | None,
        body: Callable[[], Body] | None,
    ) -> aiohttp.ClientResponse:
        """Send, and follow redirects; what is private goes only to the host that was meant.

        Private are the authorization, the configured headers and the client's certificate. A body is sent again.
        """
        seen = 0
        while True:
            parts = urlsplit(url)
            at_home = bool(host.netloc) and (parts.scheme, parts.netloc) == (host.scheme, host.netloc)
            sent = dict(headers)
            if at_home:
                sent = {**self._headers, **sent, **host.headers}
                if authorization is not None:
                    sent["Authorization"] = authorization
            if self._dump is not None:
                self._dump(head_text(f"{method} {url}", sent))
            response = await self._send(method, host, url, sent, body, at_home=at_home)
            if self._dump is not None:
                self._dump(head_text(f"{response.status} {response.reason}", response.headers))
            if response.status not in {301, 302, 303, 307, 308} or "Location" not in response.headers:
                return response
            location = joined(url, response.headers["Location"])
            response.release()
            seen += 1
            if seen > MAX_REDIRECTS:
                raise Hopeless(f"{method} {url}: redirected more than {MAX_REDIRECTS} times")
            if urlsplit(location).scheme not in {"http", "https"} or not urlsplit(location).netloc:
                raise Hopeless(f"{method} {url}: redirected to {location[:200]!r}, which is no web address")
            if parts.scheme == "https" and urlsplit(location).scheme == "http":
                raise Hopeless(f"{method} {url}: redirected from https to http, which isn't followed")
            if response.status == 303 and method != "HEAD":
                method, body = "GET", None
            url = location

    async def _send(
        self,
        method: str,
        host: Host,
        url: str,
        headers: Mapping[str, str],
        body: Callable[[], Body] | None,
        *,
        at_home: bool,
    ) -> aiohttp.ClientResponse:
        try:
            address = URL(url, encoded=True)
            # asked for here, where a port that is none shows
            _ = address.host, address.port
        except ValueError as error:
            raise Hopeless(f"{method} {url[:200]}: {error}") from error
        made = body() if body is not None else None
        flow = None if made is None or isinstance(made, bytes) else _Flow(made)
        probing = host.plain_ok and host.scheme == "https"
        dial = min(host.dial_seconds, PROBE_SECONDS) if probing else host.dial_seconds
        # what was uploaded may have to be put together before the answer comes
        patience = 1 if body is None else STORING
        sending = self._open().request(
            method,
            address,
            headers=headers,
            data=made if flow is None else flow.chunks(),
            allow_redirects=False,
            ssl=self._context(host, at_home=at_home),
            proxy=host.proxy or None,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=dial, sock_read=IDLE_SECONDS * patience, connect=None
            ),
        )
        if flow is not None:
            return await flow.watch(asyncio.ensure_future(sending))
        # an answer to a mere question may not trickle in for ever
        async with asyncio.timeout(HEAD_SECONDS * patience):
            return await sending

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"User-Agent": USER_AGENT},
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
                return await retried(lambda: self._token(host, realm, fields, headers, post=post))

            # a mirror is its own registry: the user's password for the upstream isn't its business
            own = name if host.netloc == netloc_of(name) else host.netloc
            # and whoever a foreign layer's URL names gets no credentials at all
            self._authorizers[key] = Authorizer(own, self._credentials if host.netloc else anonymous, fetch)
        return self._authorizers[key]

    async def _token(
        self, host: Host, realm: str, fields: Mapping[str, Any], headers: Mapping[str, str], *, post: bool
    ) -> Any:
        """Ask an authorization server. It is no registry: nobody is sent on from there with a password in the hand."""
        parts = urlsplit(realm)
        secret = post or "Authorization" in headers
        if secret and parts.scheme == "http" and host.scheme == "https" and not is_local(parts.netloc):
            raise Unauthenticated(
                f"{host.netloc}: its authorization server {parts.netloc} has no TLS, and is told no password"
            )
        pairs = [
            (key, item) for key, value in fields.items() for item in (value if isinstance(value, list) else [value])
        ]
        method = "POST" if post else "GET"
        try:
            async with self._open().request(
                method,
                realm,
                params=None if post else pairs,
                data=pairs if post else None,
                headers=headers,
                allow_redirects=not secret,
                ssl=self._context(host, at_home=parts.netloc == host.netloc),
                proxy=host.proxy or None,
                timeout=aiohttp.ClientTimeout(total=IDLE_SECONDS, sock_connect=host.dial_seconds),
            ) as response:
                if response.status in {400, 401, 403}:
                    raise Unauthenticated(
                        f"failed to authorize: failed to fetch token: unexpected status from {response.method} request "
                        f"to {realm}: {response.status} {response.reason}{await _detail(response)}"
                    )
                if response.status != 200:
                    raise await status_error(response, response.method)
                data = await read_all(response, MAX_ANSWER)
        except (aiohttp.ClientError, OSError) as error:
            raise _connection_error(method, realm, error) from error
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unauthenticated(f"failed to authorize: the answer of {realm} is not JSON") from error

    def _context(self, host: Host, *, at_home: bool) -> ssl.SSLContext | bool:
        if (host, at_home) not in self._contexts:
            self._contexts[host, at_home] = context_for(host, at_home=at_home)
        return self._contexts[host, at_home]


def head_text(first: str, headers: Mapping[str, str]) -> str:
    """A request's or an answer's head for people; who the user is stays out of it."""
    secret = {"authorization", "proxy-authorization", "set-cookie"}
    lines = [f"{key}: {'(hidden)' if key.lower() in secret else value}" for key, value in headers.items()]
    return "\n".join([first, *lines, "", ""])


def joined(url: str, location: str) -> str:
    """Where a `Location` or `Link` leads, as a URL. Raises Hopeless for what is none."""
    try:
        found = urljoin(url, location)
        urlsplit(found)
        return str(URL(found, encoded=True)) if "://" in found else found
    except ValueError as error:
        raise Hopeless(f"{url}: leads to {location[:200]!r}, which is no web address") from error


def _speaks_no_tls(error: Exception) -> bool:
    """Whether a connection failed because the peer took the handshake for something else."""
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = isinstance(error.os_error, ConnectionRefusedError)
        return not refused and not isinstance(error, aiohttp.ClientConnectorCertificateError)
    # the same class is raised while an answer is read
    return str(error).startswith("Connection timeout")


class _Flow:
    """A body on its way: it takes the time that it takes, but the peer must take it in."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body
        # since when (monotonic) the peer has a chunk to take; None while the source is waited for, and at the end
        self._since: float | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, watched."""
        async for chunk in self._body:
            self._since = time.monotonic()
            yield chunk
            self._since = None

    async def watch(self, sending: asyncio.Future[aiohttp.ClientResponse]) -> aiohttp.ClientResponse:
        """The answer. Raises TimeoutError where the peer takes nothing in for `IDLE_SECONDS`."""
        try:
            while True:
                done, _ = await asyncio.wait({sending}, timeout=IDLE_SECONDS / 4)
                if done:
                    return sending.result()
                if self._since is not None and time.monotonic() - self._since >= IDLE_SECONDS:
                    raise TimeoutError
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)


async def read_all(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """A small body whole, within `HEAD_SECONDS`. Raises ResourceExhausted above `limit` bytes."""
    data = bytearray()
    async with asyncio.timeout(HEAD_SECONDS):
        while piece := await response.content.read(limit + 1 - len(data)):
            data += piece
            if len(data) > limit:
                raise ResourceExhausted(f"{response.url}: the answer is larger than {limit} bytes: resource exhausted")
    return bytes(data)


async def _detail(response: aiohttp.ClientResponse) -> str:
    """What a registry says about an error (the specification's error body), to put behind a message."""
    with contextlib.suppress(aiohttp.ClientError, OSError, WherryError, ValueError, RecursionError):
        data = json.loads(await read_all(response, MAX_ANSWER))
        errors = data.get("errors") if isinstance(data, dict) else None
        if isinstance(errors, list):
            texts = [f"{e.get('code', '')}: {e.get('message', '')}" for e in errors if isinstance(e, dict)]
            return ": " + "; ".join(texts)[:500] if texts else ""
    return ""


async def status_error(response: aiohttp.ClientResponse, method: str) -> WherryError:
    """The error for a status that wasn't expected, with the registry's own words."""
    text = f"unexpected status from {method} request to {response.url}: {response.status} {response.reason}"
    text += await _detail(response)
    if response.status in {429, 503}:
        return TooBusy(text, seconds_of(response.headers.get("Retry-After", "")))
    kinds: dict[int, type[WherryError]] = {
        400: InvalidArgument,
        401: Unauthenticated,
        403: PermissionDenied,
        404: NotFound,
        408: Unavailable,
        416: OutOfRange,
    }
    kind = kinds.get(response.status, Unavailable if response.status >= 500 else WherryError)
    return kind(f"{text}: not found" if kind is NotFound else text)


def _connection_error(method: str, url: str, error: Exception) -> WherryError:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return DeadlineExceeded(f"{method} {url}: no answer in time")
    said = str(error)[:500] or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        # without the library's own objects in it
        said = re.sub(r" ssl:(?:<[^>]*>|\w+)", "", said)
    text = f"failed to do request: {method} {url}: {said}"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return Hopeless(text)
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return Hopeless(text)
    return (NoConnection if isinstance(error, aiohttp.ClientConnectorError) else Unavailable)(text)
