"""Who pulls: the credentials that a kubelet sends with a pull (`AuthConfig`), or those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from wherry.core.credentials import Credential, Lookup
from wherry.core.errors import InvalidArgument
from wherry.core.reference import DEFAULT_HOST
from wherry.cri.image_settings import decoded
from wherry.proto import cri_pb2 as pb

# by all of these names Docker's registry is known; a lookup is asked for the first
_DOCKER_HOSTS = frozenset({DEFAULT_HOST, "index.docker.io", "registry-1.docker.io"})


def lookup(auth: pb.AuthConfig | None, registry: str, configured: Mapping[str, Credential]) -> Lookup | None:
    """Who to be for a host, None where nobody said anything.

    What came with the request is for the host that it names (`server_address`), or else for the image's registry, and
    for no mirror in front of it. Raises InvalidArgument for an `auth` that can't be read.
    """
    given = credential_of(auth) if auth is not None else None
    meant = _host(auth.server_address) if auth is not None and auth.server_address else registry
    if given is None and not configured:
        return None

    def find(host: str) -> Credential | None:
        if given is not None and _same(host, meant):
            return given
        return configured.get(host)

    return find


def credential_of(auth: pb.AuthConfig) -> Credential | None:
    """What the fields say, in containerd's order; None where they are empty (anonymous)."""
    if auth.username:
        return Credential(auth.username, auth.password)
    if auth.identity_token:
        return Credential(refresh_token=auth.identity_token)
    if auth.auth:
        return decoded(auth.auth)
    if auth.registry_token:
        return Credential(header=f"Bearer {_one_line(auth.registry_token)}")
    return None


def _one_line(token: str) -> str:
    if not token.isascii() or not token.isprintable():
        raise InvalidArgument("invalid auth config: registry_token can't be sent as a header: invalid argument")
    return token


def _host(address: str) -> str:
    """The host of `https://index.docker.io/v1/`, or of a bare `registry.example:5000`."""
    return address.partition("://")[2].partition("/")[0] if "://" in address else address.partition("/")[0]


def _same(host: str, meant: str) -> bool:
    return host == meant or (host in _DOCKER_HOSTS and meant in _DOCKER_HOSTS)
