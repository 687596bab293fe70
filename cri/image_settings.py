"""How a node's images are pulled and kept: what the CRI's settings (`wherry.cri.settings`) say of it, made usable."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wherry.core.credentials import Credential
from wherry.core.durations import parse_duration
from wherry.core.errors import InvalidArgument
from wherry.core.reference import parse_familiar
from wherry.cri.image_mirrors import config_path
from wherry.cri.settings import Settings

# seconds without a byte after which a pull is given up, and between two looks at a layer's size (containerd's defaults)
PROGRESS_SECONDS = 300.0
COLLECT_SECONDS = 10.0
DEFAULT_SNAPSHOTTER = "overlayfs"


@dataclass(frozen=True)
class ImageSettings:
    """How images are pulled and kept.

    `snapshotters` are those of runtime handlers that have one of their own. `auths` are the configuration's own
    credentials by the registry's host, for requests that bring none. `pinned` are names that a node never lets go of.
    `progress_seconds` 0: a pull may stall for ever. `roots`: where snapshotters keep their files, by name.
    """

    snapshotter: str = DEFAULT_SNAPSHOTTER
    snapshotters: Mapping[str, str] = field(default_factory=dict)
    config_path: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    auths: Mapping[str, Credential] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    progress_seconds: float = PROGRESS_SECONDS
    collect_seconds: float = COLLECT_SECONDS
    roots: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, roots: Mapping[str, str] | None = None, *, folder: str = "") -> ImageSettings:
        """From the node's settings; `folder` is for what has to be written of them.

        Raises InvalidArgument, with the key, for what can't be understood.
        """
        own = {name: handler.snapshotter for name, handler in settings.handlers.items() if handler.snapshotter}
        own |= {name: item.snapshotter for name, item in settings.runtime_platforms.items() if item.snapshotter}
        try:
            seconds = parse_duration(settings.image_pull_progress_timeout or "0")
        except InvalidArgument as error:
            raise InvalidArgument(f"image_pull_progress_timeout: {error.message}") from error
        return cls(
            snapshotter=settings.default_snapshotter or DEFAULT_SNAPSHOTTER,
            snapshotters=own,
            config_path=config_path(settings.registry, folder),
            headers=_headers(settings.registry.headers),
            auths=_auths(settings.registry.configs),
            pinned=pinned_names(settings.pinned_images, settings.sandbox_image),
            progress_seconds=max(seconds, 0.0),
            collect_seconds=settings.stats_collect_period or COLLECT_SECONDS,
            roots=dict(roots or {}),
        )

    def snapshotter_of(self, handler: str) -> str:
        """The snapshotter for a runtime handler."""
        return self.snapshotters.get(handler) or self.snapshotter


def pinned_names(names: Mapping[str, str], sandbox_image: str = "") -> frozenset[str]:
    """Complete names of the images that are to stay; a name that is none raises InvalidArgument."""
    found = set()
    for use, name in {**names, **({"sandbox_image": sandbox_image} if sandbox_image else {})}.items():
        try:
            found.add(complete(name))
        except InvalidArgument as error:
            raise InvalidArgument(f"pinned_images.{use}: {error.message}") from error
    return frozenset(found)


def complete(name: str) -> str:
    """The name that an image is kept by: host and tag filled in; of tag and digest together the digest counts.

    (distribution's `ParseDockerRef`.) Raises InvalidArgument.
    """
    parsed = parse_familiar(name)
    return f"{parsed.name}@{parsed.digest}" if parsed.digest else str(parsed)


def _headers(table: Mapping[str, Any]) -> dict[str, str]:
    """`[registry.headers]`: sent with each request; an array is one line of several values."""
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in table.items()
    }


def _auths(configs: Mapping[str, Any]) -> dict[str, Credential]:
    """`[registry.configs.HOST.auth]`: `username` and `password`, `auth` (base64), or `identitytoken`."""
    found = {}
    for host, table in configs.items():
        auth = table.get("auth") if isinstance(table, Mapping) else None
        if not auth:
            continue
        where = f'registry.configs."{host}".auth'
        if not isinstance(auth, Mapping):
            raise InvalidArgument(f"{where}: expected a table")
        if auth.get("username"):
            found[host] = Credential(str(auth["username"]), str(auth.get("password", "")))
        elif auth.get("identitytoken"):
            found[host] = Credential(refresh_token=str(auth["identitytoken"]))
        elif auth.get("auth"):
            found[host] = decoded(str(auth["auth"]), where)
    return found


def decoded(text: str, where: str = "invalid auth config") -> Credential:
    """`auth` of Docker's config.json: base64 of NAME:PASSWORD, perhaps with zero bytes behind it."""
    try:
        username, colon, secret = base64.b64decode(text.strip(), validate=True).decode().rstrip("\0").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        # the text is a secret: it isn't shown
        raise InvalidArgument(f"{where}: auth is not base64 of NAME:PASSWORD: invalid argument") from None
    if not colon:
        raise InvalidArgument(f"{where}: auth has no colon in it: invalid argument")
    return Credential(username, secret)
