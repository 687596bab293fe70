"""Cgroups of whatever version this host has; `tests/vm` runs the same file on pure v2."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from wherry.linux import cgroups, syscalls
from wherry.linux.cgroups import Cgroup, Mode
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
MIB = 1 << 20
DENY_ALL = [{"allow": False, "access": "rwm"}]


# the processes of the test that runs
started: list[int] = []


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    parent = f"/wherry-test-cgroups-{os.getpid()}"
    made = cgroups.plan(f"{parent}/{time.monotonic_ns()}", "unused")
    made.create()
    try:
        yield made
    finally:
        made.kill()
        # these alone: other children of the test run (daemons, registries) live on
        while started:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(started.pop(), 0)
        made.delete()
        for directory in set(made.paths.values()):
            os.rmdir(os.path.dirname(directory))


def start(cgroup: Cgroup, work: Callable[[], object]) -> int:
    """A process that is in the cgroup before it does anything, and exits with what `work` returns."""
    fd = cgroup.clone_fd()
    pid = syscalls.fork(cgroup=fd)
    if pid:
        started.append(pid)
        if fd >= 0:
            os.close(fd)
        return pid
    code = 99
    try:
        if fd < 0:
            cgroup.join()
        code = int(work() or 0)  # type: ignore[call-overload]
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def own_file(cgroup: Cgroup, v1: str, v2: str) -> str:
    """The text of a file: on v1 CONTROLLER/FILE."""
    controller, _, name = v1.partition("/")
    path = f"{cgroup.paths[controller]}/{name}" if cgroup.version == 1 else f"{cgroup.paths['']}/{v2}"
    with open(path) as file:
        return file.read().strip()


def sleep() -> None:
    time.sleep(100)


def test_a_process_is_born_into_it(cgroup: Cgroup) -> None:
    pid = start(cgroup, sleep)
    deadline = time.monotonic() + 5
    while pid not in cgroup.pids() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cgroup.pids() == [pid]
    for directory in cgroup.paths.values():
        with open(f"{directory}/cgroup.procs") as file:
            assert file.read().split() == [str(pid)]


def test_add_moves_a_process(cgroup: Cgroup) -> None:
    pid = os.fork()
    if not pid:
        sleep()
    cgroup.add(pid)
    assert cgroup.pids() == [pid]


def test_limits_are_what_the_kernel_has(cgroup: Cgroup) -> None:
    cgroup.apply(
        {
            "memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0", "mems": "0"},
            "pids": {"limit": 33},
        }
    )
    assert own_file(cgroup, "memory/memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert own_file(cgroup, "memory/memory.soft_limit_in_bytes", "memory.low") == str(32 * MIB)
    assert own_file(cgroup, "pids/pids.max", "pids.max") == "33"
    assert own_file(cgroup, "cpuset/cpuset.cpus", "cpuset.cpus") == "0"
    if cgroup.version == 1:
        assert own_file(cgroup, "memory/memory.memsw.limit_in_bytes", "") == str(96 * MIB)
        assert own_file(cgroup, "cpu/cpu.cfs_quota_us", "") == "50000"
        assert own_file(cgroup, "cpu/cpu.shares", "") == "1024"
    else:
        assert own_file(cgroup, "", "memory.swap.max") == str(32 * MIB)
        assert own_file(cgroup, "", "cpu.max") == "50000 100000"
        assert own_file(cgroup, "", "cpu.weight") == "100"


def test_update_changes_only_what_is_named(cgroup: Cgroup) -> None:
    cgroup.apply({"memory": {"limit": 64 * MIB, "swap": 64 * MIB}, "pids": {"limit": 10}})
    cgroup.apply({"memory": {"limit": 128 * MIB, "swap": 256 * MIB}})
    assert own_file(cgroup, "memory/memory.limit_in_bytes", "memory.max") == str(128 * MIB)
    assert own_file(cgroup, "pids/pids.max", "pids.max") == "10"
    cgroup.apply({"memory": {"limit": 32 * MIB, "swap": 32 * MIB}})
    assert own_file(cgroup, "memory/memory.limit_in_bytes", "memory.max") == str(32 * MIB)
    cgroup.apply({"memory": {"limit": -1}, "pids": {"limit": -1}})
    assert own_file(cgroup, "pids/pids.max", "pids.max") == "max"


def test_pids_limit_holds(cgroup: Cgroup) -> None:
    cgroup.apply({"pids": {"limit": 1}})

    def fork_on() -> int:
        try:
            os.fork()
        except OSError as error:
            return error.errno or 1
        return 0

    assert ended(start(cgroup, fork_on)) == errno.EAGAIN


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"memory": {"limit": "64m"}}, r"linux\.resources\.memory\.limit: '64m' is not a whole number"),
        ({"memory": []}, r"linux\.resources\.memory is not an object"),
        ({"devices": [{"allow": True, "type": "x"}]}, r"devices\[0\]: invalid device type 'x'"),
        ({"devices": [{"allow": True, "type": "c", "access": "rx"}]}, r"devices\[0\]: invalid device access 'rx'"),
    ],
)
def test_wrong_resources_are_named(cgroup: Cgroup, resources: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cgroup.apply(resources)


def test_a_refused_value_names_file_and_value(cgroup: Cgroup) -> None:
    with pytest.raises(OSError, match=r"write '77-99'.*cpuset\.cpus"):
        cgroup.apply({"cpu": {"cpus": "77-99"}})


def try_open(path: str, flags: int) -> int:
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        return error.errno or 1
    return 0


def test_devices_are_denied_and_allowed(cgroup: Cgroup) -> None:
    cgroup.apply({"devices": DENY_ALL})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == errno.EPERM
    for name in ("null", "zero", "full", "random", "urandom"):
        assert ended(start(cgroup, lambda name=name: try_open(f"/dev/{name}", os.O_RDWR))) == 0  # type: ignore[misc]
    # /dev/kmsg is 1:11
    cgroup.apply({"devices": [*DENY_ALL, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}]})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == 0
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDWR))) == errno.EPERM
    cgroup.apply({"devices": DENY_ALL})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == errno.EPERM
    cgroup.apply({"devices": [{"allow": True, "access": "rwm"}]})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDWR))) == 0


def test_no_device_rules_mean_only_the_standard_devices(cgroup: Cgroup) -> None:
    cgroup.apply({"devices": []})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == errno.EPERM
    assert ended(start(cgroup, lambda: try_open("/dev/null", os.O_RDWR))) == 0


def test_a_later_rule_takes_a_part_back(cgroup: Cgroup) -> None:
    rules = [
        {"allow": True, "access": "rwm"},
        {"allow": False, "type": "c", "major": 1, "minor": 11, "access": "w"},
    ]
    cgroup.apply({"devices": rules})
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == 0
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_WRONLY))) == errno.EPERM
    assert ended(start(cgroup, lambda: try_open("/dev/kmsg", os.O_RDWR))) == errno.EPERM


def test_freezing_stops_and_thawing_goes_on(cgroup: Cgroup) -> None:
    reader, writer = os.pipe()

    def beat() -> None:
        while True:
            os.write(writer, b".")
            time.sleep(0.005)

    start(cgroup, beat)
    os.read(reader, 1)
    assert not cgroup.frozen()
    cgroup.freeze()
    assert cgroup.frozen()
    os.set_blocking(reader, False)
    while True:
        try:
            os.read(reader, 4096)
        except BlockingIOError:
            break
    assert not select.select([reader], [], [], 0.1)[0]
    cgroup.thaw()
    assert not cgroup.frozen()
    assert select.select([reader], [], [], 5)[0]
    os.close(reader)
    os.close(writer)


def test_kill_reaches_what_forks(cgroup: Cgroup) -> None:
    def fork_on() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            if not os.fork():
                time.sleep(0.001)

    cgroup.apply({"pids": {"limit": 60}})
    first = start(cgroup, fork_on)
    time.sleep(0.2)
    cgroup.kill()
    deadline = time.monotonic() + 5
    ended(first)
    while cgroup.pids() and time.monotonic() < deadline:  # the rest is init's to reap
        time.sleep(0.01)
    assert cgroup.pids() == []


def test_kill_reaches_the_frozen(cgroup: Cgroup) -> None:
    pid = start(cgroup, sleep)
    while not cgroup.pids():
        time.sleep(0.005)
    cgroup.freeze()
    cgroup.kill()
    assert ended(pid) == -signal.SIGKILL


def test_another_signal_is_passed_on(cgroup: Cgroup) -> None:
    pid = start(cgroup, sleep)
    while not cgroup.pids():
        time.sleep(0.005)
    cgroup.kill(signal.SIGTERM)
    assert ended(pid) == -signal.SIGTERM


def test_delete_takes_what_is_below(cgroup: Cgroup) -> None:
    for directory in set(cgroup.paths.values()):
        os.makedirs(f"{directory}/inner/most")
    cgroup.delete()
    assert not cgroup.exists()
    cgroup.delete()
    assert cgroup.pids() == []
    with pytest.raises(FileNotFoundError):
        cgroup.stats()


def test_delete_says_who_is_left(cgroup: Cgroup) -> None:
    pid = start(cgroup, sleep)
    while not cgroup.pids():
        time.sleep(0.005)
    with pytest.raises(OSError, match=rf"still busy \(processes in it: \[{pid}\]\)"):
        cgroup.delete(timeout=0.05)


def test_the_counters_fill_the_message(cgroup: Cgroup) -> None:
    def work() -> None:
        held = bytearray(8 * MIB)
        end = time.process_time() + 0.05
        while time.process_time() < end:
            held[::4096] = bytes(len(held) // 4096)
        time.sleep(100)

    cgroup.apply({"memory": {"limit": 64 * MIB}, "pids": {"limit": 7}})
    start(cgroup, work)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = cgroup.stats()
        if stats.version == 1:
            v1 = cgroups_v1_pb2.Metrics(**stats.values)
            seen = (v1.pids.current, v1.pids.limit, v1.memory.usage.limit, v1.memory.usage.usage, v1.cpu.usage.total)
            spent = v1.cpu.usage.total // 1000
        else:
            v2 = cgroups_v2_pb2.Metrics(**stats.values)
            seen = (v2.pids.current, v2.pids.limit, v2.memory.usage_limit, v2.memory.usage, v2.cpu.usage_usec)
            spent = v2.cpu.usage_usec
        if spent > 50000 and seen[3] > 8 * MIB:
            break
        time.sleep(0.02)
    assert seen[:3] == (1, 7, 64 * MIB)
    assert seen[3] > 8 * MIB
    assert spent > 50000


def test_oom_is_told(cgroup: Cgroup) -> None:
    cgroup.apply({"memory": {"limit": 32 * MIB, "swap": 32 * MIB}})
    watch = cgroup.watch_oom()
    assert watch is not None
    assert cgroup.oom_kills() == 0
    assert ended(start(cgroup, lambda: len(bytearray(64 * MIB)) * 0 or (bytearray(b"x" * 64 * MIB) and 0))) == -9
    assert select.select([watch], [], [], 5)[0]
    assert watch.read()
    assert cgroup.oom_kills() == 1
    assert not watch.read()
    watch.close()
    watch.close()
    assert watch.fileno() == -1


def test_restore_finds_the_same(cgroup: Cgroup) -> None:
    pid = start(cgroup, sleep)
    while not cgroup.pids():
        time.sleep(0.005)
    again = cgroups.restore(cgroup.paths)
    assert (again.version, again.paths) == (cgroup.version, cgroup.paths)
    assert again.pids() == [pid]
    again.apply({"devices": DENY_ALL, "pids": {"limit": 5}})
    assert ended(start(again, lambda: try_open("/dev/kmsg", os.O_RDONLY))) == errno.EPERM


@pytest.mark.skipif(cgroups.host().mode != Mode.V2, reason="v2 only")
class TestUnified:
    """What only v2 has."""

    def test_files_are_set_by_name(self, cgroup: Cgroup) -> None:
        cgroup.apply({"unified": {"memory.high": str(48 * MIB), "pids.max": "9"}})
        assert own_file(cgroup, "", "memory.high") == str(48 * MIB)
        assert own_file(cgroup, "", "pids.max") == "9"

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("../pids.max", r'"\.\./pids\.max" must be a file name \(no slashes\)'),
            ("nodot", r'"nodot" must be in the form CONTROLLER\.PARAMETER'),
            ("nothere.max", r'"nothere\.max" can\'t be set: controller "nothere" not available'),
            ("memory.nothere", r'"memory\.nothere" can\'t be set: (Permission denied|No such file)'),
        ],
    )
    def test_wrong_names_are_refused(self, cgroup: Cgroup, key: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            cgroup.apply({"unified": {key: "1"}})

    def test_exec_follows_init_into_a_managed_subtree(self, cgroup: Cgroup) -> None:
        inner = f"{cgroup.paths['']}/inner"
        os.mkdir(inner)
        init = start(cgroup, sleep)
        with open(f"{inner}/cgroup.procs", "w") as file:
            file.write(str(init))
        with open(f"{cgroup.paths['']}/cgroup.subtree_control", "w") as file:
            file.write("+memory")
        pid = os.fork()
        if not pid:
            sleep()
        with pytest.raises(OSError, match="busy"):
            cgroup.add(pid)
        cgroup.add(pid, init)
        assert sorted(cgroup.pids()) == sorted([init, pid])
        assert cgroup.pids(recursive=False) == []

    def test_relative_paths_go_beside_the_caller(self) -> None:
        own = cgroups.layout.own_cgroups()[""]
        made = cgroups.plan("pod/x", "x")
        assert made.paths[""] == os.path.normpath(f"/sys/fs/cgroup/{os.path.dirname(own)}/pod/x")
        assert cgroups.plan("", "some-id").paths[""].endswith("/some-id")


@pytest.mark.skipif(cgroups.host().mode == Mode.V2, reason="v1 and hybrid only")
class TestLegacy:
    """What only v1 has."""

    def test_relative_paths_go_below_the_caller(self) -> None:
        own = cgroups.layout.own_cgroups()
        made = cgroups.plan("pod/x", "x")
        assert made.paths["memory"] == os.path.normpath(f"/sys/fs/cgroup/memory/{own['memory']}/pod/x")

    def test_unified_is_refused(self, cgroup: Cgroup) -> None:
        with pytest.raises(ValueError, match=r"unified needs cgroup v2"):
            cgroup.apply({"unified": {"memory.high": "1"}})

    def test_a_share_that_the_kernel_clips_is_refused(self, cgroup: Cgroup) -> None:
        with pytest.raises(ValueError, match="the maximum allowed cpu-shares is 262144"):
            cgroup.apply({"cpu": {"shares": 1 << 20}})

    def test_swappiness_has_a_range(self, cgroup: Cgroup) -> None:
        with pytest.raises(ValueError, match=r"invalid memory swappiness value: 101 \(valid range is 0-100\)"):
            cgroup.apply({"memory": {"swappiness": 101}})
