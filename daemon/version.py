"""Which Wherry this is, and the service that says so."""

from __future__ import annotations

from google.protobuf import empty_pb2

from wherry.proto import version_pb2 as pb
from wherry.proto.service import Context

# as in pyproject.toml (a test compares): reading the installed metadata takes longer than all else at start
VERSION = "0.1.0"
REVISION = ""
PACKAGE = "wherry"


class VersionService:
    """`containerd.services.version.v1.Version`."""

    SERVICE = "containerd.services.version.v1.Version"

    async def version(self, request: empty_pb2.Empty, context: Context) -> pb.VersionResponse:
        """The daemon's version."""
        return pb.VersionResponse(version=VERSION, revision=REVISION)
