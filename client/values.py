"""Values that several nouns of the client share, and their way from and to messages.

Times are `float` seconds since the epoch, 0.0 where a message has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from wherry.core.tuples import NamedTuple
from wherry.proto import types_pb2

if TYPE_CHECKING:
    from wherry.core.descriptor import Descriptor
    from wherry.core.platforms import Platform


class Mount(NamedTuple):
    """A mount as a snapshotter describes it: what mount(2) needs but the place (`target` is below that place)."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""

    @classmethod
    def parse(cls, message: types_pb2.Mount) -> Mount:
        """From the wire."""
        return cls(message.type, message.source, tuple(message.options), message.target)

    def message(self) -> types_pb2.Mount:
        """For the wire."""
        return types_pb2.Mount(type=self.type, source=self.source, options=self.options, target=self.target)


def descriptor_from(message: types_pb2.Descriptor) -> Descriptor:
    """A descriptor from the wire. Raises InvalidArgument where its digest is none."""
    # listings of containers do without
    from wherry.core.descriptor import Descriptor
    from wherry.core.digest import Digest

    return Descriptor(message.media_type, Digest.parse(message.digest), message.size, dict(message.annotations))


def descriptor_message(descriptor: Descriptor) -> types_pb2.Descriptor:
    """A descriptor for the wire."""
    return types_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=dict(descriptor.annotations),
    )


def platform_message(platform: Platform) -> types_pb2.Platform:
    """A platform for the wire."""
    return types_pb2.Platform(
        os=platform.os,
        architecture=platform.architecture,
        variant=platform.variant,
        os_version=platform.os_version,
        os_features=platform.os_features,
    )


def seconds(timestamp: Timestamp) -> float:
    """A timestamp as seconds since the epoch; 0.0 where it is empty, also in Go's way (the year 1)."""
    return 0.0 if timestamp.seconds < 0 else timestamp.seconds + timestamp.nanos / 1e9


def mask(paths: Iterable[str]) -> FieldMask:
    """A field mask of these paths; an empty one means every field that may change."""
    return FieldMask(paths=list(paths))


def label_mask(labels: Iterable[str]) -> FieldMask:
    """The mask for single labels: those named change, the others stay."""
    return mask(f"labels.{name}" for name in labels)
