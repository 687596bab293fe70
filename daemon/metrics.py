"""Figures for Prometheus: `GET /v1/metrics` on an address that `[metrics]` of the configuration names; off by default.

The names are containerd's where it has the same figure (`grpc_server_handled_total`,
`container_memory_usage_usage_bytes` …), so that its dashboards show wherryd as well; what only Wherry has begins with
`wherry_`. The format is Prometheus' text format, version 0.0.4.
"""

from __future__ import annotations

import collections
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import structlog

from wherry.core import typeurl
from wherry.core.errors import Code, InvalidArgument, Unavailable, WherryError
from wherry.daemon.version import VERSION
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2
from wherry.proto import tasks_pb2 as tasks
from wherry.proto.service import GRPC_NAMESPACE, Context, Method
from wherry.proto.task_types_pb2 import Status

if TYPE_CHECKING:
    from aiohttp import web
    from google.protobuf.any_pb2 import Any as Packed

    from wherry.daemon.containers import ContainerStore
    from wherry.daemon.namespaces import NamespaceStore
    from wherry.daemon.observed import Ended
    from wherry.daemon.tasks import TaskService

log = structlog.get_logger(__name__)

PATH = "/v1/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# seconds; the buckets of gRPC's own Prometheus libraries
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# containerd's names of status codes in labels
CODES = {
    value: "".join(word.capitalize() for word in name.split("_"))
    for name, value in vars(Code).items()
    if isinstance(value, int)
} | {Code.OK: "OK"}
# a sample of all containers may not take longer than Prometheus waits
SECONDS = 5.0

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """One figure: name, kind (`counter`, `gauge`, `histogram`), what it is; samples are suffix, labels, value."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[str, Labels, float]]


def text(families: Iterable[Family]) -> str:
    """Prometheus' text format."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {family.help}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for suffix, labels, value in family.samples:
            inside = ",".join(f'{name}="{_escaped(content)}"' for name, content in labels)
            number = repr(int(value)) if float(value).is_integer() else repr(float(value))
            lines.append(f"{family.name}{suffix}{f'{{{inside}}}' if inside else ''} {number}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class CallCounter:
    """How many calls there were, how they ended, and with `histogram` how long they took. An `Observer`."""

    def __init__(self, *, histogram: bool) -> None:
        self._histogram = histogram
        self._started: dict[Method, int] = {}
        self._handled: dict[tuple[Method, int], int] = {}
        self._times: dict[Method, list[float]] = {}

    def began(self, method: Method, context: Context) -> Ended:
        """Counts a call and takes its time."""
        del context
        self._started[method] = self._started.get(method, 0) + 1
        begin = time.perf_counter() if self._histogram else 0.0

        def ended(code: int) -> None:
            key = (method, code)
            self._handled[key] = self._handled.get(key, 0) + 1
            if self._histogram:
                taken = time.perf_counter() - begin
                # a bucket each, then all, then their sum
                times = self._times.setdefault(method, [0.0] * (len(BUCKETS) + 2))
                for index, bound in enumerate(BUCKETS):
                    times[index] += taken <= bound
                times[-2] += 1
                times[-1] += taken

        return ended

    def families(self) -> list[Family]:
        """The figures so far."""
        started = [("", _method(method), float(count)) for method, count in self._started.items()]
        handled = [
            ("", (("grpc_code", CODES.get(code, str(code))), *_method(method)), float(count))
            for (method, code), count in self._handled.items()
        ]
        found = [
            Family("grpc_server_started_total", "counter", "Total number of RPCs started on the server.", started),
            Family("grpc_server_handled_total", "counter", "Total number of RPCs completed on the server.", handled),
        ]
        if self._histogram:
            samples: list[tuple[str, Labels, float]] = []
            for method, times in self._times.items():
                labels = _method(method)
                for bound, count in zip((*map(str, BUCKETS), "+Inf"), times, strict=False):
                    samples.append(("_bucket", (*labels, ("le", bound)), count))
                samples += [("_sum", labels, times[-1]), ("_count", labels, times[-2])]
            help_ = "Response latency in seconds of RPCs handled by the server."
            found.append(Family("grpc_server_handling_seconds", "histogram", help_, samples))
        return found


def _method(method: Method) -> Labels:
    kind = {
        (False, False): "unary",
        (True, False): "client_stream",
        (False, True): "server_stream",
        (True, True): "bidi_stream",
    }[method.client_streaming, method.server_streaming]
    return (("grpc_method", method.name), ("grpc_service", method.service), ("grpc_type", kind))


def _first(sample: cgroups_v1_pb2.Metrics) -> dict[str, float]:
    """Figures of cgroup v1 under containerd's names."""
    return {
        "container_memory_usage_usage_bytes": sample.memory.usage.usage,
        "container_memory_usage_limit_bytes": sample.memory.usage.limit,
        "container_memory_usage_max_bytes": sample.memory.usage.max,
        "container_memory_usage_failcnt_total": sample.memory.usage.failcnt,
        "container_memory_cache_bytes": sample.memory.cache,
        "container_memory_rss_bytes": sample.memory.rss,
        "container_memory_oom_total": sample.memory_oom_control.oom_kill,
        "container_cpu_total_nanoseconds": sample.cpu.usage.total,
        "container_cpu_user_nanoseconds": sample.cpu.usage.user,
        "container_cpu_kernel_nanoseconds": sample.cpu.usage.kernel,
        "container_cpu_throttled_periods_total": sample.cpu.throttling.throttled_periods,
        "container_cpu_throttled_time_nanoseconds": sample.cpu.throttling.throttled_time,
        "container_pids_current": sample.pids.current,
        "container_pids_limit": sample.pids.limit,
    }


def _second(sample: cgroups_v2_pb2.Metrics) -> dict[str, float]:
    """Figures of cgroup v2 under containerd's names."""
    return {
        "container_memory_usage_bytes": sample.memory.usage,
        "container_memory_usage_limit_bytes": sample.memory.usage_limit,
        "container_memory_swap_usage_bytes": sample.memory.swap_usage,
        "container_memory_file_bytes": sample.memory.file,
        "container_memory_anon_bytes": sample.memory.anon,
        "container_memory_oom_kills_total": sample.memory_events.oom_kill,
        "container_cpu_usage_usec_microseconds": sample.cpu.usage_usec,
        "container_cpu_user_usec_microseconds": sample.cpu.user_usec,
        "container_cpu_system_usec_microseconds": sample.cpu.system_usec,
        "container_cpu_nr_throttled_total": sample.cpu.nr_throttled,
        "container_cpu_throttled_usec_microseconds": sample.cpu.throttled_usec,
        "container_pids_current": sample.pids.current,
        "container_pids_limit": sample.pids.limit,
    }


class Source:
    """Where the figures of containers come from."""

    def __init__(self, tasks_: TaskService, containers: ContainerStore, namespaces: NamespaceStore) -> None:
        self._tasks = tasks_
        self._containers = containers
        self._namespaces = namespaces

    async def families(self) -> list[Family]:
        """A sample of every container that runs, and how many there are of each status."""
        figures: dict[str, list[tuple[str, Labels, float]]] = {}
        records: list[tuple[str, Labels, float]] = []
        states: list[tuple[str, Labels, float]] = []
        for namespace in [found.name for found in await self._namespaces.list()]:
            context = Context({GRPC_NAMESPACE: namespace}, time.monotonic() + SECONDS)
            known = await self._containers.list(namespace)
            records.append(("", (("namespace", namespace),), len(known)))
            listed = await self._tasks.list(tasks.ListTasksRequest(), context)
            counts = collections.Counter(Status.Name(task.status).lower() for task in listed.tasks)
            states += [("", (("namespace", namespace), ("status", key)), n) for key, n in sorted(counts.items())]
            runtimes = {container.id: container.runtime.name for container in known}
            for metric in (await self._tasks.metrics(tasks.MetricsRequest(), context)).metrics:
                runtime = runtimes.get(metric.id, "")
                labels = (("container_id", metric.id), ("namespace", namespace), ("runtime", runtime))
                for name, value in _figures(metric.data).items():
                    figures.setdefault(name, []).append(("", labels, value))
        return [
            Family("wherry_containers", "gauge", "Containers in the metadata.", records),
            Family("wherry_tasks", "gauge", "Tasks by status.", states),
            *(_of_containers(name, samples) for name, samples in sorted(figures.items())),
        ]


def _of_containers(name: str, samples: Sequence[tuple[str, Labels, float]]) -> Family:
    kind = "counter" if name.endswith("_total") else "gauge"
    return Family(name, kind, f"{name.removeprefix('container_').replace('_', ' ')} of a container", samples)


def _figures(data: Packed) -> Mapping[str, float]:
    if typeurl.is_a(data, cgroups_v1_pb2.Metrics):
        return _first(typeurl.unpack_as(data, cgroups_v1_pb2.Metrics))
    if typeurl.is_a(data, cgroups_v2_pb2.Metrics):
        return _second(typeurl.unpack_as(data, cgroups_v2_pb2.Metrics))
    return {}


def own_process() -> list[Family]:
    """This daemon as a process, under the names that Prometheus' libraries use."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = file.read().split()
    size = resource.getpagesize()
    descriptors = len(os.listdir("/proc/self/fd"))
    return [
        Family("wherry_build_info", "gauge", "The version that runs.", [("", (("version", VERSION),), 1)]),
        _one(
            "process_cpu_seconds_total",
            "counter",
            "User and system CPU time in seconds.",
            used.ru_utime + used.ru_stime,
        ),
        _one("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", int(pages[1]) * size),
        _one("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", int(pages[0]) * size),
        _one("process_open_fds", "gauge", "Number of open file descriptors.", descriptors),
        _one("process_start_time_seconds", "gauge", "Start time since the epoch in seconds.", _STARTED),
    ]


_STARTED = time.time()


def _one(name: str, kind: str, help_: str, value: float) -> Family:
    return Family(name, kind, help_, [("", (), value)])


async def serve(address: str, families: Callable[[], AsyncIterator[list[Family]]]) -> web.AppRunner:
    """Serve figures over HTTP on `HOST:PORT`; `cleanup` of what is returned ends it.

    Raises InvalidArgument for an address that is none, Unavailable for one that can't be had.
    """
    from aiohttp import web  # noqa: PLC0415 - a tenth of a second, for who wants figures

    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise InvalidArgument(f"metrics address {address!r}: expected HOST:PORT")

    async def answer(request: web.Request) -> web.Response:
        del request
        found: list[Family] = []
        try:
            async for part in families():
                found += part
        except WherryError as error:
            log.warning("figures are missing", error=error.message)
        return web.Response(body=text(found).encode(), headers={"Content-Type": CONTENT_TYPE})

    application = web.Application()
    application.router.add_get(PATH, answer)
    application.router.add_get("/metrics", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]") or None, int(port)).start()
    except OSError as error:
        await runner.cleanup()
        raise Unavailable(f"metrics address {address}: {error.strerror or error}") from error
    return runner
