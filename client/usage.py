"""What a container uses, in the same few figures whatever version its cgroup has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherry.core import typeurl
from wherry.core.tuples import NamedTuple
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed

# what cgroup v1 calls no limit: the highest multiple of the page size that fits
_UNLIMITED = 1 << 62


class Usage(NamedTuple):
    """A sample: `memory` and `memory_limit` in bytes (the limit 0 where there is none), `cpu` in seconds so far.

    `oom_kills` counts processes that the kernel killed over the memory limit.
    """

    memory: int
    memory_limit: int
    cpu: float
    processes: int
    oom_kills: int


def usage(sample: Packed) -> Usage:
    """The figures of a sample of `tasks.metrics`. Raises InvalidArgument for one of another kind."""
    if sample.type_url.endswith("cgroups.v1.Metrics"):
        first = typeurl.unpack_as(sample, cgroups_v1_pb2.Metrics)
        memory = first.memory.usage
        return Usage(
            memory.usage,
            0 if memory.limit >= _UNLIMITED else memory.limit,
            first.cpu.usage.total / 1e9,
            first.pids.current,
            first.memory_oom_control.oom_kill,
        )
    second = typeurl.unpack_as(sample, cgroups_v2_pb2.Metrics)
    limit = second.memory.usage_limit
    return Usage(
        second.memory.usage,
        0 if limit >= _UNLIMITED else limit,
        second.cpu.usage_usec / 1e6,
        second.pids.current,
        second.memory_events.oom_kill,
    )
