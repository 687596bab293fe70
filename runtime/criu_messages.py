"""The messages of criu's service, `criu swrk`: as much of protobuf as they take, and the fields that we set or read.

criu speaks protobuf 2 over a socket, one message a packet (criu.org/RPC; names and numbers are its `rpc.proto`'s). The
runtime has no dependencies, and forty fields don't ask for one: a message is a dict, its schema a table.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Table = dict[str, tuple[int, Any]]

#: Kinds of fields; the third one is a nested message's table. A list in a message is a repeated field.
NUMBER, TEXT = "number", "text"

EMPTY, DUMP, RESTORE, CHECK, PRE_DUMP, PAGE_SERVER, NOTIFY = range(7)
FEATURE_CHECK, VERSION = 9, 10
TYPE_NAMES = {
    EMPTY: "EMPTY",
    DUMP: "DUMP",
    RESTORE: "RESTORE",
    PRE_DUMP: "PRE_DUMP",
    NOTIFY: "NOTIFY",
    FEATURE_CHECK: "FEATURE_CHECK",
    VERSION: "VERSION",
}
#: `manage_cgroups_mode`
CGROUP_MODES = {"ignore": 0, "none": 1, "props": 2, "soft": 3, "full": 4, "strict": 5}

_PAGE_SERVER: Table = {"address": (1, TEXT), "port": (2, NUMBER)}
_FEATURES: Table = {"mem_track": (1, NUMBER), "lazy_pages": (2, NUMBER)}
_OPTIONS: Table = {
    "images_dir_fd": (1, NUMBER),
    "pid": (2, NUMBER),
    "leave_running": (3, NUMBER),
    "ext_unix_sk": (4, NUMBER),
    "tcp_established": (5, NUMBER),
    "evasive_devices": (6, NUMBER),
    "shell_job": (7, NUMBER),
    "file_locks": (8, NUMBER),
    "log_level": (9, NUMBER),
    "log_file": (10, TEXT),
    "ps": (11, _PAGE_SERVER),
    "notify_scripts": (12, NUMBER),
    "root": (13, TEXT),
    "parent_img": (14, TEXT),
    "track_mem": (15, NUMBER),
    "auto_dedup": (16, NUMBER),
    "work_dir_fd": (17, NUMBER),
    "ext_mnt": (23, {"key": (1, TEXT), "val": (2, TEXT)}),
    "manage_cgroups": (24, NUMBER),
    "cg_root": (25, {"ctrl": (1, TEXT), "path": (2, TEXT)}),
    "rst_sibling": (26, NUMBER),
    "inherit_fd": (27, {"key": (1, TEXT), "fd": (2, NUMBER)}),
    "manage_cgroups_mode": (34, NUMBER),
    "external": (37, TEXT),
    "empty_ns": (38, NUMBER),
    "join_ns": (39, {"ns": (1, TEXT), "ns_file": (2, TEXT)}),
    "freeze_cgroup": (44, TEXT),
    "lazy_pages": (48, NUMBER),
    "status_fd": (49, NUMBER),
    "orphan_pts_master": (50, NUMBER),
    "config_file": (51, TEXT),
    "lsm_profile": (53, TEXT),
    "lsm_mount_context": (63, TEXT),
}
REQUEST: Table = {
    "type": (1, NUMBER),
    "opts": (2, _OPTIONS),
    "notify_success": (3, NUMBER),
    "keep_open": (4, NUMBER),
    "features": (5, _FEATURES),
}
RESPONSE: Table = {
    "type": (1, NUMBER),
    "success": (2, NUMBER),
    "restore": (4, {"pid": (1, NUMBER)}),
    "notify": (5, {"script": (1, TEXT), "pid": (2, NUMBER)}),
    "cr_errno": (7, NUMBER),
    "features": (8, _FEATURES),
    "cr_errmsg": (9, TEXT),
    "version": (10, {"major_number": (1, NUMBER), "minor_number": (2, NUMBER), "sublevel": (4, NUMBER)}),
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MASK = (1 << 64) - 1


def encode(message: dict[str, Any], table: Table) -> bytes:
    """Protobuf of a message; fields that are None are left out. KeyError for a field that the table doesn't have."""
    out = bytearray()
    for name, value in message.items():
        if value is None:
            continue
        number, kind = table[name]
        for item in value if isinstance(value, list) else [value]:
            if kind == NUMBER:
                out += _varint(number << 3 | _VARINT) + _varint(int(item) & _MASK)  # negative ones take ten bytes
                continue
            data = item.encode("utf-8", "surrogateescape") if kind == TEXT else encode(item, kind)
            out += _varint(number << 3 | _BYTES) + _varint(len(data)) + data
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes, table: Table) -> dict[str, Any]:
    """The fields that the table knows; of a repeated one the last. ValueError for what is no protobuf."""
    names = {number: (name, kind) for name, (number, kind) in table.items()}
    found: dict[str, Any] = {}
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        value, position = _read_value(data, position, key & 7)
        name, kind = names.get(key >> 3, ("", NUMBER))
        if not name or isinstance(value, int) != (kind == NUMBER):
            continue  # a newer criu's, which means nothing to us
        if isinstance(value, int):
            found[name] = value - (1 << 64) if value >> 63 else value
        else:
            found[name] = value.decode("utf-8", "replace") if kind == TEXT else decode(value, kind)
    return found


def _read_value(data: bytes, position: int, wire_type: int) -> tuple[int | bytes, int]:
    if wire_type == _VARINT:
        return _read_varint(data, position)
    if wire_type == _BYTES:
        length, position = _read_varint(data, position)
    elif wire_type in (_FIXED64, _FIXED32):
        length = 8 if wire_type == _FIXED64 else 4
    else:
        raise ValueError(f"wire type {wire_type} in a message of criu's")
    if position + length > len(data):
        raise ValueError("a message of criu's ends within a field")
    return data[position : position + length], position + length


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value & _MASK, position
    raise ValueError("a message of criu's ends within a number")
