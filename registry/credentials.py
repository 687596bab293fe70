"""Who the user is to a registry, as the transfer is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from wherry.core.credentials import Credential

__all__ = ["Credential", "Credentials", "anonymous", "fixed"]

# asked once for each host (as it is named in the reference, `docker.io`), with the `WWW-Authenticate` headers of its
# refusal; None is anonymous
Credentials = Callable[[str, Sequence[str]], Awaitable[Credential | None]]


async def anonymous(host: str, challenges: Sequence[str]) -> Credential | None:
    """Nobody."""
    return None


def fixed(username: str, secret: str) -> Credentials:
    """The same for every host; without a user name the secret is a refresh token (as `ctr --user` has it)."""
    credential = Credential(username, secret) if username else Credential(refresh_token=secret)

    async def give(host: str, challenges: Sequence[str]) -> Credential | None:
        return credential

    return give
