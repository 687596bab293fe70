"""`google.protobuf.Any` as containerd packs it: the bare full name as type URL, and JSON for what is no protobuf.

containerd's typeurl package writes `containerd.events.TaskExit`, not `type.googleapis.com/containerd.events.TaskExit`;
readers accept both.
"""

from __future__ import annotations

from typing import Any as Anything

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from wherry.core import quickjson
from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.hints import TypeVar
from wherry.core.names import quote

# the OCI runtime specification as JSON in an Any
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
LINUX_RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

T = TypeVar("T", bound=Message)


def name(url: str) -> str:
    """The full name of a type URL, without the prefix that others write."""
    return url.rpartition("/")[2]


def pack(message: Message) -> Any:
    """Pack a message; an Any comes back as it is."""
    if isinstance(message, Any):
        return message
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def is_a(packed: Any, kind: type[Message]) -> bool:
    """Whether the Any holds a message of this kind."""
    return name(packed.type_url) == kind.DESCRIPTOR.full_name


def unpack(packed: Any) -> Message:
    """Unpack a message whose module was imported.

    Raises NotFound for an unknown type, InvalidArgument for bytes that are no message of it.
    """
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name(packed.type_url))
    except KeyError:
        raise NotFound(f"type with url {packed.type_url}: not found") from None
    return _parse(packed, message_factory.GetMessageClass(descriptor))


def unpack_as(packed: Any, kind: type[T]) -> T:
    """Unpack a message of this kind. Raises InvalidArgument where it is another or is damaged."""
    if not is_a(packed, kind):
        raise InvalidArgument(
            f"can't unmarshal type {quote(packed.type_url)} to output {quote(kind.DESCRIPTOR.full_name)}: "
            "invalid argument"
        )
    return _parse(packed, kind)


def _parse(packed: Any, kind: type[T]) -> T:
    try:
        return kind.FromString(packed.value)
    except DecodeError as error:
        raise InvalidArgument(f"value of {packed.type_url}: {error}: invalid argument") from error


def pack_json(url: str, value: object) -> Any:
    """Pack a value as JSON under a type URL such as `SPEC`."""
    return Any(type_url=url, value=quickjson.dumps(value).encode())


def unpack_json(packed: Any, url: str | None = None) -> Anything:
    """Decode the JSON of an Any; with `url`, only of that type. Raises InvalidArgument."""
    if url is not None and packed.type_url != url:
        raise InvalidArgument(f"can't unmarshal type {quote(packed.type_url)} to output {quote(url)}: invalid argument")
    try:
        return quickjson.loads(packed.value)
    except ValueError as error:
        raise InvalidArgument(f"value of {packed.type_url} is not JSON: {error}: invalid argument") from error
