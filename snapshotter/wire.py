"""Snapshots as the snapshots service has them on the wire, and back."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from wherry.linux.mounts import Mount
from wherry.proto import snapshots_pb2 as pb
from wherry.proto import types_pb2
from wherry.snapshotter.interface import Info, Kind

SERVICE = "containerd.services.snapshots.v1.Snapshots"


def mounts_to_proto(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    """Mounts as the wire has them."""
    return [
        types_pb2.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in mounts
    ]


def mounts_from_proto(mounts: Iterable[types_pb2.Mount]) -> list[Mount]:
    """Mounts as values."""
    return [Mount(mount.type, mount.source, mount.target, tuple(mount.options)) for mount in mounts]


def info_to_proto(info: Info) -> pb.Info:
    """An info as the wire has it."""
    message = pb.Info(name=info.name, parent=info.parent, kind=pb.Kind.Name(int(info.kind)), labels=info.labels)
    for field, nanoseconds in ((message.created_at, info.created), (message.updated_at, info.updated)):
        if nanoseconds:
            field.CopyFrom(_timestamp(nanoseconds))
    return message


def info_from_proto(message: pb.Info) -> Info:
    """An info as a value; a kind that nobody knows is UNKNOWN."""
    kind = Kind(message.kind) if message.kind in Kind._value2member_map_ else Kind.UNKNOWN
    created, updated = message.created_at.ToNanoseconds(), message.updated_at.ToNanoseconds()
    return Info(kind, message.name, message.parent, dict(message.labels), created, updated)


def _timestamp(nanoseconds: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp
