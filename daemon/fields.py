"""Field masks on updates, labels and times, for the messages that the stores keep."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from wherry.core.errors import InvalidArgument
from wherry.core.labels import check_labels


def now() -> Timestamp:
    """This moment, with nanoseconds."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp


def timestamp(nanoseconds: int) -> Timestamp:
    """Nanoseconds since the epoch as the wire has them."""
    stamp = Timestamp()
    stamp.FromNanoseconds(nanoseconds)
    return stamp


def take(target: Message, source: Message, field: str) -> None:
    """Make `target.field` what `source.field` is, also where that is unset."""
    target.ClearField(field)
    descriptor = source.DESCRIPTOR.fields_by_name[field]
    value: Any = getattr(source, field)
    if descriptor.message_type is None:
        setattr(target, field, value)
    elif descriptor.message_type.GetOptions().map_entry:
        take_map(getattr(target, field), value)
    elif source.HasField(field):
        getattr(target, field).CopyFrom(value)


def take_map(target: Any, source: Any) -> None:
    """Make a map field equal to another."""
    target.clear()
    target.MergeFrom(source)


def take_key(target: Any, source: Any, key: str) -> None:
    """Make one key of a map field what it is in another: absent there means removed here."""
    if key in source:
        value = source[key]
        if isinstance(value, Message):
            target[key].CopyFrom(value)
        else:
            target[key] = value
    elif key in target:
        del target[key]


def apply_mask(
    target: Message,
    source: Message,
    paths: Sequence[str],
    *,
    fields: Mapping[str, str],
    maps: Collection[str],
    what: str,
) -> None:
    """Bring the fields that `paths` names from `source` into `target`.

    `fields` maps a path to the message's field (containerd says `snapshotkey` for `snapshot_key`), `maps` are the ones
    of which single keys may be named: `labels.KEY`, where everything after the dot is the key. `what` ends the message
    of the InvalidArgument for a path that isn't known: `cannot update "x" field on WHAT`.
    """
    for path in paths:
        head, dot, key = path.partition(".")
        if dot and head in maps:
            take_key(getattr(target, head), getattr(source, head), key)
        elif path in fields:
            take(target, source, fields[path])
        else:
            raise InvalidArgument(f'cannot update "{path}" field on {what}: invalid argument')


def settle_labels(labels: MutableMapping[str, str], what: str) -> None:
    """Check labels that are about to be stored, and take out the empty ones: an empty value means no label.

    Raises InvalidArgument for one that is too long; `what` names the field (`image.Labels`).
    """
    try:
        check_labels(labels)
    except InvalidArgument as error:
        raise InvalidArgument(f"{what}: {error.message}") from None
    for key in [key for key, value in labels.items() if not value]:
        del labels[key]
