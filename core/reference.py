"""Names of images: Docker's (`busybox`, familiar) and containerd's (`host/path:tag@digest`, complete)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument
from wherry.core.names import quote

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"
# the whole repository name, in characters (the distribution project's reference grammar)
MAX_NAME = 255

_HOST = re.compile(
    r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*"
    r"|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
)
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX64 = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A complete name: `host` with port, `path` of the repository, `tag` ("" without), `digest` (None without)."""

    host: str
    path: str
    tag: str = ""
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """`host/path`."""
        return f"{self.host}/{self.path}"

    @property
    def object(self) -> str:
        """What a registry is asked for: the digest where there is one, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def familiar(self) -> str:
        """The short form that people type: without `docker.io/library/`."""
        text = str(self)
        if self.host == DEFAULT_HOST:
            text = text.removeprefix(f"{DEFAULT_HOST}/").removeprefix("library/")
        return text


def parse_familiar(text: str) -> Reference:
    """Read what a person types, as Docker does: host and `library/` are filled in, `latest` where no tag or digest is.

    Raises InvalidArgument.
    """
    if _HEX64.fullmatch(text):
        raise InvalidArgument(
            f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings: invalid argument"
        )
    first, slash, rest = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        host, remainder = first, rest
    else:
        host, remainder = DEFAULT_HOST, text
    if host == "index.docker.io":
        host = DEFAULT_HOST
    path, tag, digest = _split(text, remainder)
    if host == DEFAULT_HOST and "/" not in path:
        path = f"library/{path}"
    return _checked(text, Reference(host, path, tag or ("" if digest else DEFAULT_TAG), digest))


def parse(text: str) -> Reference:
    """Read containerd's complete form; nothing is filled in, the host must be there. Raises InvalidArgument."""
    host, slash, remainder = text.partition("/")
    if not slash or not host:
        raise InvalidArgument(f"invalid reference {quote(text)}: hostname required: invalid argument")
    path, tag, digest = _split(text, remainder)
    return _checked(text, Reference(host, path, tag, digest))


def _split(text: str, remainder: str) -> tuple[str, str, Digest | None]:
    remainder, at, digest = remainder.partition("@")
    path, colon, tag = remainder.partition(":")
    if (colon and not tag) or (at and not digest):
        raise InvalidArgument(f"invalid reference {quote(text)}: invalid reference format: invalid argument")
    return path, tag, Digest.parse(digest) if at else None


def _checked(text: str, reference: Reference) -> Reference:
    if not _HOST.fullmatch(reference.host) or not _PATH.fullmatch(reference.path):
        hint = ""
        if reference.path.lower() != reference.path and _PATH.fullmatch(reference.path.lower()):
            hint = ": repository name must be lowercase"
        raise InvalidArgument(
            f"invalid reference {quote(text[:300])}: invalid reference format{hint}: invalid argument"
        )
    if reference.tag and not _TAG.fullmatch(reference.tag):
        raise InvalidArgument(f"invalid reference {quote(text[:300])}: invalid tag format: invalid argument")
    if len(reference.name) > MAX_NAME:
        raise InvalidArgument(
            f"invalid reference: repository name must not be more than {MAX_NAME} characters: invalid argument"
        )
    return reference
