"""create, start, state, kill, delete, run, list, ps, pause, resume, update."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.peers import need
from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of


def wait_for(runtime: Runtime, name: str, status: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while runtime.state(name)["status"] != status:
        assert time.monotonic() < deadline, runtime.state(name)
        time.sleep(0.02)


def test_a_container_goes_through_its_states(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    folder = bundle.write(args=["sleep", "100"])
    runtime.detached("create", "--bundle", str(folder), "--pid-file", str(folder / "pid"), name)
    state = runtime.state(name)
    assert state["status"] == "created"
    assert state["pid"] == int((folder / "pid").read_text())
    assert state["bundle"] == str(folder)
    assert state["id"] == name
    assert state["ociVersion"]

    refused = runtime("create", "--bundle", str(folder), name)
    assert refused.returncode == 1
    assert "container with given ID already exists" in refused.stderr

    runtime.ok("start", name)
    assert runtime.state(name)["status"] == "running"
    again = runtime("start", name)
    assert again.returncode == 1
    assert "cannot start an already running container" in again.stderr

    deletion = runtime("delete", name)
    assert deletion.returncode == 1
    assert f"cannot delete container {name} that is not stopped: running" in deletion.stderr

    assert name in runtime.ok("list", "-q").split()
    listed = json.loads(runtime.ok("list", "--format", "json"))
    assert [(item["id"], item["status"]) for item in listed] == [(name, "running")]
    assert json.loads(runtime.ok("ps", "--format", "json", name)) == [state["pid"]]

    runtime.ok("kill", name, "KILL")
    wait_for(runtime, name, "stopped")
    assert runtime.state(name)["pid"] == 0
    dead = runtime("kill", name)
    assert dead.returncode == 1
    assert "container not running" in dead.stderr
    stopped = runtime("start", name)
    assert "cannot start a container that has stopped" in stopped.stderr
    runtime.ok("delete", name)

    gone = runtime("state", name)
    assert gone.returncode == 1
    assert "does not exist" in gone.stderr
    assert cgroups_of(name) == []
    assert not (runtime.root / name).exists()


def test_a_created_container_is_deleted_without_force(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("create", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    pid = runtime.state(name)["pid"]
    runtime.ok("delete", name)
    assert not _runs(pid)
    assert cgroups_of(name) == []


def test_force_deletes_a_running_one_and_a_missing_one(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    runtime.ok("delete", "--force", name)
    assert runtime("state", name).returncode == 1
    runtime.ok("delete", "--force", name)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("sh -c 'kill -9 $$'; exit $?", 137)]
)
def test_run_passes_output_and_exit_code_on(runtime: Runtime, bundle: Bundle, script: str, code: int) -> None:
    name = runtime.new_id()
    result = runtime("run", "--bundle", str(bundle.write(args=["sh", "-c", f"echo out; echo err >&2; {script}"])), name)
    assert (result.stdout, result.returncode) == ("out\n", code)
    assert result.stderr.startswith("err\n")
    assert runtime("state", name).returncode == 1
    assert cgroups_of(name) == []


def test_run_reads_stdin(runtime: Runtime, bundle: Bundle) -> None:
    result = subprocess.run(
        [*runtime.words, "run", "--bundle", str(bundle.write(args=["tr", "a-z", "A-Z"])), runtime.new_id()],
        input="shout",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout == "SHOUT"


def test_run_forwards_signals(runtime: Runtime, bundle: Bundle) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [*runtime.words, "run", "--bundle", str(bundle.write(args=["sh", "-c", script])), runtime.new_id()],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "caught\n"
        assert process.wait(30) == 3


def test_kill_all_reaches_every_process(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()

    def no_pid_namespace(spec: Spec) -> None:
        spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "pid"]
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/proc"]
        spec["mounts"].append({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]})
        spec["linux"]["maskedPaths"] = spec["linux"]["readonlyPaths"] = []

    folder = bundle.write(no_pid_namespace, args=["sh", "-c", "sleep 101 & sleep 102 & wait"])
    runtime.detached("run", "--detach", "--bundle", str(folder), name)
    deadline = time.monotonic() + 10
    while len(pids := json.loads(runtime.ok("ps", "-f", "json", name))) < 3:
        assert time.monotonic() < deadline
    runtime.ok("kill", "--all", name, "KILL")
    wait_for(runtime, name, "stopped")
    for pid in pids:
        while _runs(pid):
            assert time.monotonic() < deadline
    runtime.ok("delete", name)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_pause_and_resume(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    runtime.ok("pause", name)
    assert runtime.state(name)["status"] == "paused"
    refused = runtime("exec", name, "true")
    assert refused.returncode == 255
    assert "cannot exec in a paused container" in refused.stderr
    runtime.ok("resume", name)
    assert runtime.state(name)["status"] == "running"
    runtime.ok("exec", name, "true")


def test_update_changes_limits(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    runtime.ok("update", "--pids-limit", "42", "--memory", "33554432", name)
    values = {Path(f"{folder}/{f}").read_text().strip() for folder in cgroups_of(name) for f in _limits(folder)}
    assert values == {"42", "33554432"}


def _limits(folder: str) -> list[str]:
    return [f for f in ("pids.max", "memory.limit_in_bytes", "memory.max") if os.path.exists(f"{folder}/{f}")]


def test_events_print_statistics(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    event = json.loads(runtime.ok("events", "--stats", name))
    assert (event["type"], event["id"]) == ("stats", name)
    assert event["data"]["pids"]["current"] == 1
    assert event["data"]["cpu"]["usage"]["total"] > 0


def test_statistics_have_runcs_shape(ours: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """Each key that runc prints for a container is there, with a value of its kind."""
    reference = Runtime("runc", [need("runc")], tmp_path / "runc")

    def keys(value: object, path: str = "") -> set[str]:
        if isinstance(value, dict):
            return set().union(*(keys(item, f"{path}.{key}") for key, item in value.items())) if value else {path}
        return {f"{path}[]"} if isinstance(value, list) else {path}

    def limited(spec: Spec) -> None:
        spec["linux"]["resources"].update(memory={"limit": 1 << 26}, pids={"limit": 9}, cpu={"quota": 50000})

    shapes = []
    folder = bundle.write(limited, args=["sleep", "100"])
    for one in (ours, reference):
        name = one.new_id()
        one.detached("run", "--detach", "--bundle", str(folder), name)
        data = json.loads(one.ok("events", "--stats", name))["data"]
        assert data["memory"]["usage"]["limit"] == 1 << 26
        assert data["pids"] == {"current": 1, "limit": 9}
        shapes.append({key for key in keys(data) if "throttling" not in key and "hugetlb" not in key})
        one.clean()
    assert shapes[1] - shapes[0] == set()


@pytest.mark.parametrize("moment", ["created", "running"])
def test_a_killed_command_leaves_nothing_that_delete_cannot_remove(ours: Runtime, bundle: Bundle, moment: str) -> None:
    """SIGKILL for `run` at a random point: afterwards the container is deletable, and then all of it is gone."""
    folder = bundle.write(args=["sleep", "100"])
    for delay in (0.02, 0.04, 0.05, 0.06, 0.08) if moment == "created" else (0.15,):
        name = ours.new_id()
        process = subprocess.Popen(
            [*ours.words, "run", "--bundle", str(folder), name], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.kill()
        process.wait()
        ours.ok("delete", "--force", name)
        assert cgroups_of(name) == []
        assert not (ours.root / name).exists()


def test_start_by_another_process_and_a_kill_in_between(ours: Runtime, bundle: Bundle) -> None:
    """The fifo works for whoever opens it, as often as it is opened."""
    name = ours.new_id()
    ours.detached("create", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    for _ in range(3):
        assert ours.state(name)["status"] == "created"  # each look opens and closes the fifo
    fifo = os.open(ours.root / name / "exec.fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.close(fifo)  # a `start` that dies before it wrote
    assert ours.state(name)["status"] == "created"
    ours.ok("start", name)
    assert ours.state(name)["status"] == "running"


def test_a_force_delete_ends_a_start_that_waits_for_a_hook(ours: Runtime, own_bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        script = "touch /tmp/reached; sleep 60"
        spec["hooks"] = {"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}]}

    name = ours.new_id()
    ours.detached("create", "--bundle", str(own_bundle.write(change, args=["true"])), name)
    starting = subprocess.Popen([*ours.words, "start", name], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not os.path.exists(f"{own_bundle.rootfs}/tmp/reached"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ours.ok("delete", "--force", name)
    starting.wait(10)
    assert cgroups_of(name) == []


def test_a_delete_waits_for_a_create(ours: Runtime, bundle: Bundle) -> None:
    """Both at once: whatever comes first, in the end there is nothing, and no process that nobody knows of."""

    def change(spec: Spec) -> None:
        spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "0.3"]}]}

    name = ours.new_id()
    words = [*ours.words, "create", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as it:
        deadline = time.monotonic() + 10
        while not (ours.root / name / "state.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert ours.state(name)["status"] in ("creating", "created")  # on a slow machine the hook is over by now
        ours.ok("delete", "--force", name)
        it.wait(10)
    assert cgroups_of(name) == []
    assert not (ours.root / name).exists()
