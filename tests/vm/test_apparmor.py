"""The default AppArmor profile in a kernel that has AppArmor: loaded by the daemon, kept by containers."""

from __future__ import annotations

from tests.vm.machine import Machine

IMAGE = "docker.io/library/busybox:test"
_RIGHTS = "--cap-add SYS_ADMIN --security-opt seccomp=unconfined"
# root may open the file for writing, whatever its mode; what is written it doesn't take
_TRY = (
    "cat /proc/1/attr/current /proc/self/attr/current; (: >>/proc/uptime) && echo opened;"
    "mount -t tmpfs none /tmp && echo mounted"
)


def test_containers_and_what_enters_them_are_confined(daemon: Machine) -> None:
    loaded = daemon.check("grep ^wherry-default /sys/kernel/security/apparmor/profiles")
    assert loaded == "wherry-default (enforce)"
    daemon.check(f"wherry run -d --name confined {_RIGHTS} {IMAGE} sleep 1000")
    try:
        said = daemon.run(f"wherry exec confined sh -c '{_TRY}'").out
    finally:
        daemon.check("wherry rm -f confined")
    assert said.splitlines()[:2] == [loaded, loaded]
    assert said.lower().count("permission denied") == 2, said
    assert "opened" not in said
    assert "mounted" not in said


def test_without_it_the_same_is_allowed(daemon: Machine) -> None:
    done = daemon.run(f"wherry run --rm {_RIGHTS} --security-opt apparmor=unconfined {IMAGE} sh -c '{_TRY}'")
    assert done.out.split() == ["unconfined", "unconfined", "opened", "mounted"]


def test_a_profile_that_is_not_loaded(daemon: Machine) -> None:
    done = daemon.run(f"wherry run --rm --security-opt apparmor=wherry-nosuch {IMAGE} true")
    assert done.code == 125
    assert "unable to apply apparmor profile wherry-nosuch: no such file or directory" in done.out
