"""linux.intelRdt. No machine within reach has it: what a host without it says is asked of the commands; and what would
be written where it is, is looked at in a folder that has resctrl's files (the kernel's answers can't be shown)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of
from wherry.runtime import rdt
from wherry.runtime.errors import ContainerError
from wherry.runtime.plan import Plan
from wherry.runtime.state import State


@pytest.mark.skipif(bool(rdt.mounted()), reason="this host has resctrl")
@pytest.mark.parametrize(("key", "schema", "what"), [("l3Cache", "L3:0=f", "CAT"), ("memBw", "MB:0=20", "MBA")])
def test_a_host_without_it(runtime: Runtime, bundle: Bundle, key: str, schema: str, what: str) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["intelRdt"] = {f"{key}Schema": schema}

    name = runtime.new_id()
    refused = runtime("run", "--bundle", str(bundle.write(change, args=["true"])), name)
    assert refused.returncode == 1
    assert f"intelRdt.{key}Schema is specified in config, but Intel RDT/{what} is not enabled" in refused.stderr
    assert not (runtime.root / name).exists()
    assert cgroups_of(name) == []


@pytest.mark.skipif(bool(rdt.mounted()), reason="this host has resctrl")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--l3-cache-schema", "L3:0=f"), "Intel RDT/CAT: l3 cache schema is not enabled"),
        (("--mem-bw-schema", "MB:0=20"), "Intel RDT/MBA: memory bandwidth schema is not enabled"),
    ],
)
def test_update_on_a_host_without_it(runtime: Runtime, bundle: Bundle, flags: tuple[str, str], says: str) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    refused = runtime("update", *flags, name)
    assert refused.returncode == 1
    assert says in refused.stderr


@pytest.fixture
def resctrl(tmp_path: Path) -> Path:
    root = tmp_path / "resctrl"
    for folder in ("info/L3", "info/MB", "shared/mon_groups"):
        (root / folder).mkdir(parents=True)
    (root / "schemata").write_text("    L3:0=fff;1=fff\n    MB:0=100;1=100\n")
    (root / "shared" / "schemata").write_text("    L3:0=00f;1=fff\n    MB:0= 20;1=100\n")
    return root


def plan_for(folder: Path, config: dict[str, object]) -> Plan:
    state = State(str(folder / "state"), "one")
    state.make()
    spec = {"linux": {"intelRdt": config}, "process": {}}
    return Plan(state, spec, {})


def test_a_class_of_its_own(resctrl: Path, tmp_path: Path) -> None:
    plan = plan_for(tmp_path, {"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20", "schemata": ["L3:1=ff"]})
    rdt.make(plan, str(resctrl))
    assert (resctrl / "one" / "schemata").read_text() == "L3:0=f\nMB:0=20\nL3:1=ff\n"
    rdt.join(plan.rdt, 4711)
    assert (resctrl / "one" / "tasks").read_text() == "4711"
    assert rdt.statistics(plan.state.rdt_class, str(resctrl))["l3_cache_schema_root"] == "L3:0=fff;1=fff"
    rdt.update(plan.state.rdt_class, "L3:0=3", "", str(resctrl))
    assert (resctrl / "one" / "schemata").read_text() == "L3:0=3\n"
    assert plan.state.rdt == [str(resctrl / "one")]
    for file in (resctrl / "one").iterdir():
        file.unlink()  # the kernel's files go with their directory
    rdt.remove(plan.state.rdt)
    assert not (resctrl / "one").exists()


def test_a_shared_class_stays_as_it_is(resctrl: Path, tmp_path: Path) -> None:
    config = {
        "closID": "shared",
        "l3CacheSchema": "L3: 1=FFF;0=f",
        "memBwSchema": "MB:0=20;1=100",
        "enableMonitoring": True,
    }
    plan = plan_for(tmp_path, config)
    rdt.make(plan, str(resctrl))
    assert plan.rdt == [str(resctrl / "shared"), str(resctrl / "shared" / "mon_groups" / "one")]
    rdt.remove(plan.state.rdt)
    assert (resctrl / "shared").is_dir()
    assert not (resctrl / "shared" / "mon_groups" / "one").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"closID": "shared", "l3CacheSchema": "L3:0=ff;1=fff"}, "the class 'shared' has other shares"),
        ({"closID": "missing"}, "there is no class 'missing'"),
        ({"closID": "shared", "l3CacheSchema": "L3:x"}, "no schema: 'L3:x'"),
    ],
)
def test_what_does_not_fit_is_refused(resctrl: Path, tmp_path: Path, config: dict[str, object], says: str) -> None:
    with pytest.raises(ContainerError, match=says):
        rdt.make(plan_for(tmp_path, config), str(resctrl))
