"""All six kinds of hooks: where they run, what they get, what their failure does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of

HOST_SIDE = ("prestart", "createRuntime", "poststart", "poststop")
STATUS = {
    "prestart": "creating",
    "createRuntime": "creating",
    "createContainer": "creating",
    "poststart": "running",
    "poststop": "stopped",
}


def hook(script: str, **more: object) -> dict[str, object]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin", "MARK=given"], **more}


def test_each_hook_gets_the_state_in_order(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    order = tmp_path / "order"
    kinds = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")

    def change(spec: Spec) -> None:
        spec["annotations"] = {"some.key": "value"}
        spec["hooks"] = {
            kind: [hook(f"cat >{tmp_path}/{kind}; echo {kind} $MARK >>{order}"), hook(f"echo again >>{order}")]
            for kind in kinds
        }

    name = runtime.new_id()
    folder = bundle.write(change, args=["true"])
    runtime.ok("run", "--bundle", str(folder), name)
    assert order.read_text().splitlines() == [line for kind in kinds for line in (f"{kind} given", "again")]
    for kind in kinds:
        state = json.loads((tmp_path / kind).read_text())
        assert state["id"] == name
        assert state["bundle"] == str(folder)
        assert state["annotations"] == {"some.key": "value"}
        assert state["status"] == STATUS[kind] or (runtime.name == "runc" and kind == "poststart")  # 1.1: created
        assert bool(state.get("pid")) == (kind != "poststop")


def test_start_container_runs_in_the_container(runtime: Runtime, own_bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["hooks"] = {"startContainer": [hook("cat >/tmp/state; readlink /proc/self/ns/pid >/tmp/ns")]}

    folder = own_bundle.write(change, args=["readlink", "/proc/self/ns/pid"])
    inside = runtime.ok("run", "--bundle", str(folder), runtime.new_id())
    assert (Path(own_bundle.rootfs) / "tmp/ns").read_text() == inside
    assert json.loads((Path(own_bundle.rootfs) / "tmp/state").read_text())["status"] == "created"


@pytest.mark.parametrize("kind", ["prestart", "createRuntime", "createContainer"])
@pytest.mark.parametrize(
    ("failing", "message"),
    [(hook("echo broken >&2; exit 3"), "exit status 3"), ({"path": "/no/such/hook"}, "no such file or directory")],
)
def test_a_failing_hook_undoes_the_container(
    runtime: Runtime, bundle: Bundle, kind: str, failing: dict[str, object], message: str
) -> None:
    def change(spec: Spec) -> None:
        spec["hooks"] = {kind: [failing]}

    name = runtime.new_id()
    result = runtime("run", "--bundle", str(bundle.write(change, args=["true"])), name)
    assert result.returncode == 1
    assert f"error running {kind} hook #0" in result.stderr or "error running hook #0" in result.stderr
    assert message in result.stderr
    assert runtime("state", name).returncode == 1
    assert cgroups_of(name) == []


def test_a_hook_past_its_timeout(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["hooks"] = {"prestart": [hook("sleep 3", timeout=1)]}

    result = runtime("run", "--bundle", str(bundle.write(change, args=["true"])), runtime.new_id())
    assert result.returncode == 1
    assert "hook ran past specified timeout of 1.0s" in result.stderr
