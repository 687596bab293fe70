"""The attacks of `test_attacks.py`, first on a naive version, where they work, then on ours, where they don't."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of, mounts_below
from wherry.linux import syscalls as sc
from wherry.runtime.root import Root


def in_own_mounts(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a mount namespace of its own, with what the naive versions need."""
    prelude = "import errno, os, sys; from wherry.linux import syscalls as sc; from wherry.runtime.root import Root\n"
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", prelude + script, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, stdin=subprocess.DEVNULL)


# -- the interpreter --------------------------------------------------------------------------------------------------

_ENTERING = """
import os, sys
if sys.argv[1] == "sealed":
    from wherry.runtime import sealed
    sealed.ensure_sealed()
print("in", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("how", "written"), [("naive", True), ("sealed", False)])
def test_the_interpreter_is_overwritten_once_it_has_ended(tmp_path: Path, how: str, written: bool) -> None:
    """CVE-2019-5736 in full, on a copy of the interpreter: a handle taken while it runs is opened again to write when
    nothing runs it any more. (The path of the handle is the file's own; only its filesystem differs.)"""
    copy = tmp_path / "python"
    shutil.copy(os.path.realpath(sys.executable), copy)
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix, "PYTHONPATH": ":".join(sys.path)}
    library = Path(sys.executable).resolve().parents[1] / "lib"
    environment["LD_LIBRARY_PATH"] = str(library)
    process = subprocess.Popen(
        [str(copy), "-c", _ENTERING, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"in\n"
        handle = os.open(f"/proc/{process.pid}/exe", os.O_RDONLY)
        with pytest.raises(OSError, match="Text file busy" if how == "naive" else "Read-only") as refused:
            os.open(f"/proc/self/fd/{handle}", os.O_WRONLY)
        assert refused.value.errno == (errno.ETXTBSY if how == "naive" else errno.EROFS)
        process.kill()
    if written:
        fd = os.open(f"/proc/self/fd/{handle}", os.O_WRONLY)
        os.write(fd, b"#!/evil\n")
        os.close(fd)
    else:
        with pytest.raises(OSError, match="Read-only"):
            os.open(f"/proc/self/fd/{handle}", os.O_WRONLY)
    os.close(handle)
    assert (copy.read_bytes()[:7] == b"#!/evil") == written


# -- descriptors ------------------------------------------------------------------------------------------------------


def test_a_leaked_descriptor_leads_out_of_a_naive_root(rootfs: str, tmp_path: Path) -> None:
    """CVE-2024-21626: what the runtime has open is a way to the host for who names it as a working directory. Ours
    closes all of it before anything of the configuration is used (`test_a_working_directory_behind_a_descriptor`)."""
    (tmp_path / "host").touch()
    script = """
fd = os.open(sys.argv[2], os.O_PATH | os.O_DIRECTORY)
os.chroot(sys.argv[1])
os.chdir(f"/dev/fd/{fd}" if os.path.exists("/dev/fd") else "/")
os.fchdir(fd)
print(sorted(os.listdir(".")))
"""
    assert "host" in in_own_mounts(script, rootfs, str(tmp_path)).stdout


# -- symlinks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["naive", "ours"])
def test_a_mount_by_a_joined_path_leaves_the_root(tmp_path: Path, how: str) -> None:
    """CVE-2021-30465, the moment at which the link is there: a path that is put together and mounted on goes through
    it; a descriptor that the kernel has resolved within the root doesn't."""
    root, host = tmp_path / "root", tmp_path / "host"
    root.mkdir()
    (host / "deep").mkdir(parents=True)
    (root / "target").symlink_to(str(host))
    script = """
root, host, how = sys.argv[1:]
if how == "naive":
    sc.mount("tmpfs", f"{root}/target/deep", "tmpfs")
else:
    inside = Root(root)
    inside.mount("tmpfs", "tmpfs", inside.make_directory("/target/deep"), 0, "")
print([line.split()[4] for line in open("/proc/self/mountinfo") if " - tmpfs tmpfs" in line and root[:-5] in line])
"""
    done = in_own_mounts(script, str(root), str(host), how)
    assert done.returncode == 0, done.stderr
    outside = f"{host}/deep" if how == "naive" else f"{root}{host}/deep"
    assert done.stdout.strip() == f"['{outside}']"
    assert mounts_below(tmp_path) == []


@pytest.mark.parametrize("how", ["naive", "ours"])
def test_masking_with_the_images_null_shows_the_host(tmp_path: Path, how: str) -> None:
    """CVE-2025-31133: a runtime that binds ROOT/dev/null over a masked path binds what the image's link points to."""
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    (root / "masked").write_text("masked")
    (tmp_path / "victim").write_text("the host's")
    (root / "dev" / "null").symlink_to(tmp_path / "victim")
    script = """
root, how = sys.argv[1:]
if how == "naive":
    sc.mount(f"{root}/dev/null", f"{root}/masked", "", sc.MS_BIND)
else:
    from wherry.runtime import devices
    from wherry.runtime.root import attach, clone_tree
    attach(clone_tree(devices.host_null(), "", recursive=False), Root(root).open("/masked"))
print(open(f"{root}/masked").read())
"""
    done = in_own_mounts(script, str(root), how)
    assert done.stdout.strip() == ("the host's" if how == "naive" else ""), done.stderr


# -- /proc ------------------------------------------------------------------------------------------------------------


def test_a_faked_proc_swallows_a_label(tmp_path: Path) -> None:
    """CVE-2019-16884, CVE-2019-19921: whoever writes the label through the container's /proc writes into a file of the
    image, and the process stays unconfined without anybody noticing. Ours refuses any mount over /proc that isn't one
    (test_filesystem: nothing_is_mounted_inside_proc), and opens the file before the root is left."""
    (tmp_path / "proc" / "self" / "attr").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "attr" / "exec").touch()
    script = """
os.chroot(sys.argv[1])
with open("/proc/self/attr/exec", "w") as file:
    file.write("exec confined")
print("written")
"""
    assert in_own_mounts(script, str(tmp_path)).stdout == "written\n"
    assert (tmp_path / "proc" / "self" / "attr" / "exec").read_text() == "exec confined"


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_proc_is_not_faked(ours: Runtime, own_bundle: Bundle, kind: str) -> None:
    fake = Path(own_bundle.rootfs, "fake")
    fake.mkdir()

    def change(spec: Spec) -> None:
        mount = {"destination": "/proc", "type": kind, "source": str(fake) if kind == "bind" else "tmpfs"}
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/proc"] + [mount]

    result = ours("run", "--bundle", str(own_bundle.write(change, args=["true"])), ours.new_id())
    assert result.returncode == 1
    assert "cannot be mounted because it is not of type proc" in result.stderr


# -- capabilities -----------------------------------------------------------------------------------------------------


def test_inheritable_capabilities_come_back(runtime: Runtime, own_bundle: Bundle) -> None:
    """CVE-2022-24769: with them set, an ordinary user gains what a file offers as inheritable; without them it doesn't.
    The naive version is a configuration that asks for them."""
    busybox = Path(own_bundle.rootfs, "bin", "busybox")
    # VFS_CAP_REVISION_2 with the effective bit; permitted none; inheritable CAP_NET_RAW (13)
    value = b"".join(word.to_bytes(4, "little") for word in (0x02000001, 0, 1 << 13, 0, 0))
    try:
        os.setxattr(busybox, "security.capability", value)
    except OSError as error:
        pytest.skip(f"no file capabilities here: {error.strerror}")

    def change(spec: Spec, inheritable: list[str]) -> None:
        bounding = ["CAP_NET_RAW"]
        spec["process"]["capabilities"] = {"bounding": bounding, "inheritable": inheritable, "permitted": inheritable}
        spec["process"]["user"] = {"uid": 1000, "gid": 1000}
        spec["process"]["noNewPrivileges"] = False

    found = []
    for inheritable in (["CAP_NET_RAW"], []):

        def given(spec: Spec, inheritable: list[str] = inheritable) -> None:
            change(spec, inheritable)

        folder = own_bundle.write(given, args=["grep", "CapPrm", "/proc/self/status"])
        found.append(int(runtime.ok("run", "--bundle", str(folder), runtime.new_id()).split()[1], 16))
    assert found == [1 << 13, 0]


# -- a process that joins ---------------------------------------------------------------------------------------------

_NAIVE = "from wherry.linux import process; real = process.set_dumpable; process.set_dumpable = lambda on: real(True); "
_LOOKING = """
    while [ ! -e /tmp/stop ]; do
        for p in /proc/[0-9]*; do
            n=${p#/proc/}
            [ "$n" = 1 ] || [ "$n" = self ] && continue
            name=$(cat $p/comm 2>/dev/null) || continue
            case "$name" in
            python*|wherry*)
                # the same program before and well after the look: who has executed another one may be looked into
                ls $p/fd >/dev/null 2>&1 && sleep 0.2 && [ "$(cat $p/comm 2>/dev/null)" = "$name" ] && : >/tmp/seen;;
            esac
        done
    done
"""


@pytest.mark.parametrize(("how", "seen"), [("naive", True), ("ours", False)])
def test_who_joins_is_not_looked_into(ours: Runtime, open_bundle: Bundle, how: str, seen: bool) -> None:
    """CVE-2016-9962, in a user namespace, whose root has all rights over those in it: before the program runs, who
    enters is the runtime. Left dumpable its descriptors can be listed (and taken); ours can't be looked into."""
    both = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    root = Path(open_bundle.rootfs)
    (root / "tmp").chmod(0o777)

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"].update(uidMappings=both, gidMappings=both)

    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(open_bundle.write(change, args=["sh", "-c", _LOOKING])), name)
    # a step that waits, in the middle of entering: or one would have to be lucky
    slow = "import time; from wherry.runtime import identity; become = identity.become; "
    slow += "identity.become = lambda *a, **k: (time.sleep(1.5), become(*a, **k)); "
    script = f"{_NAIVE if how == 'naive' else ''}{slow}from wherry.runtime import command; command.main()"
    words = [sys.executable, "-c", script, *ours.words[3:], "exec", name, "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=30)
    assert done.returncode == 0, done.stderr
    (root / "tmp" / "stop").touch()
    assert (root / "tmp" / "seen").exists() == seen


# -- devices ----------------------------------------------------------------------------------------------------------


def _device() -> int:
    """The number of a device of this host that everybody could open, and that no container is given."""
    for path in ("/dev/fuse", "/dev/loop-control", "/dev/net/tun"):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        return os.stat(path).st_rdev
    pytest.skip("no device to try it with")


@pytest.mark.parametrize(("how", "opened"), [("naive", True), ("ours", False)])
def test_a_device_node_behind_a_bind_mount(
    runtime: Runtime, bundle: Bundle, tmp_path: Path, how: str, opened: bool
) -> None:
    """A node that lies on a filesystem of the host, or that the container makes there itself (it has CAP_MKNOD), isn't
    opened: the cgroup's rules decide, not who made the node. The naive configuration allows every device."""
    shared = tmp_path / "shared"
    shared.mkdir()
    device = _device()
    os.mknod(shared / "given", 0o666 | stat.S_IFCHR, device)

    def change(spec: Spec) -> None:
        spec["process"]["capabilities"] = {key: ["CAP_MKNOD"] for key in ("bounding", "effective", "permitted")}
        spec["linux"]["resources"] = {"devices": [{"allow": how == "naive", "access": "rwm"}]}
        if how == "ours":
            spec["linux"]["resources"]["devices"].append({"allow": True, "type": "c", "access": "m"})
        spec["mounts"].append(
            {"destination": "/tmp", "type": "bind", "source": str(shared), "options": ["rbind", "rw"]}
        )

    script = f"mknod /tmp/made c {os.major(device)} {os.minor(device)}; "
    script += "for n in given made; do (exec 3</tmp/$n) 2>/dev/null && echo $n; done; true"
    folder = bundle.write(change, args=["sh", "-c", script])
    assert runtime.ok("run", "--bundle", str(folder), runtime.new_id()).split() == (["given", "made"] if opened else [])


# -- cgroups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "reached"), [("naive", True), ("ours", False)])
def test_the_release_agent_is_out_of_reach(runtime: Runtime, bundle: Bundle, how: str, reached: bool) -> None:
    """CVE-2022-0492: v1 runs `release_agent` of a hierarchy's root on the host when a cgroup empties. A container that
    sees the hierarchy's root can write it (naive: a bind mount of it); in its own cgroup namespace there is no such
    file, and the mount is read-only. v2 has no release agents."""
    if not os.path.exists("/sys/fs/cgroup/pids/release_agent"):
        pytest.skip("v1 only: v2 has no release agents")

    def change(spec: Spec) -> None:
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/sys/fs/cgroup"]
        mount = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}
        if how == "naive":
            mount = {"destination": "/tmp", "type": "bind", "source": "/sys/fs/cgroup/pids", "options": ["bind", "rw"]}
        spec["mounts"].append(mount)

    place = "/tmp" if how == "naive" else "/sys/fs/cgroup/*"
    # looked at, not written: what would run is the host's
    script = f"for f in {place}/release_agent {place}/notify_on_release; do [ -w $f ] && echo $f; done; true"
    script += "; (echo 1 >/sys/fs/cgroup/pids/notify_on_release) 2>/dev/null && echo wrote; true"
    name = runtime.new_id()
    found = runtime.ok("run", "--bundle", str(bundle.write(change, args=["sh", "-c", script])), name).split()
    assert ("/tmp/release_agent" in found) == reached
    if how == "ours":
        assert "wrote" not in found
        assert not [line for line in found if "release_agent" in line]
    assert cgroups_of(name) == []


# -- a root that its owner has changed --------------------------------------------------------------------------------

_PIVOT = """
mkdir -p /tmp/new/old /tmp/new/bin /tmp/new/proc && mount -t tmpfs tmpfs /tmp/new && cd /tmp/new &&
mkdir old bin proc dev && : >dev/null && cp /bin/busybox bin/ &&
for n in sh ls cat sleep pwd; do ln -s busybox bin/$n; done &&
mount -t proc proc proc && : >marker && pivot_root . old && cd / && umount -l /old && exec /bin/sleep 100
"""


def test_exec_into_a_root_that_was_pivoted(runtime: Runtime, own_bundle: Bundle) -> None:
    """The container's owner has pivoted to another root. Who enters is in that one (a runtime that went by the bundle's
    path would run the old root's program, with the host's view of it), and nothing above is the host's."""

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        for key in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][key] += ["CAP_SYS_ADMIN"]
        spec["linux"]["rootfsPropagation"] = "private"

    (Path(own_bundle.rootfs) / "only-before").touch()
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(own_bundle.write(change, args=["sh", "-c", _PIVOT])), name)
    deadline = time.monotonic() + 20
    while json.loads(runtime.ok("state", name))["status"] == "running":
        entered = runtime("exec", "--cwd", "/", name, "/bin/ls", "/", "/..", "/../..")
        assert time.monotonic() < deadline or entered.returncode == 0, entered.stderr
        if "marker" in entered.stdout or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert set(entered.stdout.split()) == {"bin", "dev", "marker", "old", "proc", "/:", "/..:", "/../..:"}
    assert runtime("exec", "--cwd", "/", name, "grep", "x", "/etc/passwd").returncode != 0


def test_the_naive_root_is_where_the_tools_say(tmp_path: Path) -> None:
    """`Root` resolves within itself whatever is above it; a plain open follows `..` out of a folder."""
    (tmp_path / "root").mkdir()
    (tmp_path / "host").write_text("host")
    assert (tmp_path / "root" / ".." / "host").read_text() == "host"
    root = Root(str(tmp_path / "root"))
    with pytest.raises(FileNotFoundError):
        root.open("../host", os.O_RDONLY)
    os.close(root.fd)
    assert sc.RESOLVE_IN_ROOT
