"""Metrics of tasks as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from wherry.core import typeurl
from wherry.core.errors import InvalidArgument, NotFound
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2, runc_options_pb2  # noqa: F401 - declare what samples are made of

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed


def decode(packed: Packed) -> dict[str, Any]:
    """A sample as a dictionary with the wire's names; counters are numbers, whatever their width.

    Raises InvalidArgument for a sample of a type that nobody here knows.
    """
    try:
        message = typeurl.unpack(packed)
    except NotFound as error:
        raise InvalidArgument(f"metrics of unknown type {packed.type_url}") from error
    plain: dict[str, Any] = _numbers(MessageToDict(message, preserving_proto_field_name=True))
    return plain


def _numbers(value: Any) -> Any:
    # protobuf's JSON writes 64-bit numbers as strings
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names (`memory.usage.usage`)."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def process_details(packed: Packed) -> str:
    """The id of the exec that a process belongs to; "" where the runtime says something else."""
    if not typeurl.is_a(packed, runc_options_pb2.ProcessDetails):
        return ""
    return typeurl.unpack_as(packed, runc_options_pb2.ProcessDetails).exec_id
