"""Attacks that must fail: on the interpreter, through descriptors, symlinks, working directories, faked files."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, mounts_below

SEAL = """
import ctypes, os, sys
if {sealed}:
    from wherry.runtime import sealed
    sealed.ensure_sealed()
fd = os.open("/proc/self/exe", os.O_RDONLY)
try:
    # the busy text of a running program can't be opened to write; a replaced one could, so the flag is what counts
    os.open("/proc/self/exe", os.O_WRONLY)
    print("writable")
except OSError as error:
    import errno
    print(errno.errorcode[error.errno])
print(os.readlink("/proc/self/exe") == os.path.realpath(sys.executable), sys.prefix, sys.argv[1:])
"""


@pytest.mark.parametrize(("sealed", "answer"), [(False, "ETXTBSY"), (True, "EROFS")])
def test_the_interpreter_can_not_be_opened_to_write(sealed: bool, answer: str) -> None:
    """Unsealed only the running program protects it (ETXTBSY, which ends with the program): that is the attack's way
    in. Sealed it is the filesystem that refuses."""
    script = SEAL.format(sealed=sealed)
    result = subprocess.run([sys.executable, "-c", script, "a", "b c"], capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert first == answer
    assert second == f"{not sealed} {sys.prefix} ['a', 'b c']"


@pytest.mark.parametrize("fallback", ["overlay", "memory"])
def test_sealing_by_a_second_start(fallback: str) -> None:
    """Where the pages can't be exchanged (an interpreter without a shared libpython), and where there is no overlay."""
    script = f"""
import os, sys
from wherry.runtime import sealed
def refuse(*_):
    raise OSError(1, "no")
sealed._seal_in_place = refuse
if {fallback == "memory"}:
    sealed.overlay_executable = refuse
sealed.ensure_sealed()
print(sealed.is_sealed(), sys.prefix, sys.argv[1:], os.environ.get("_WHERRY_SEALED"))
"""
    result = subprocess.run([sys.executable, "-c", script, "x"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"True {sys.prefix} ['x'] None"


def _digest() -> tuple[int, int, int]:
    info = os.stat(os.path.realpath(sys.executable))
    return info.st_size, info.st_mtime_ns, info.st_ino


@pytest.mark.parametrize("how", ["symlink", "interpreter"])
def test_executing_proc_self_exe(ours: Runtime, own_bundle: Bundle, how: str) -> None:
    """CVE-2019-5736: the container's program is `/proc/self/exe`, that is, the runtime itself. It may start (it finds
    no library, or no module), but what it is was not the host's file to write to."""
    path = Path(own_bundle.rootfs) / "bin" / "evil"
    if how == "symlink":
        path.symlink_to("/proc/self/exe")
    else:
        path.write_text("#!/proc/self/exe\n")
        path.chmod(0o755)
    before = _digest()
    result = ours("run", "--bundle", str(own_bundle.write(args=["/bin/evil"])), ours.new_id())
    assert result.returncode != 0
    assert _digest() == before


def test_what_a_container_sees_of_an_exec_that_enters(ours: Runtime, own_bundle: Bundle) -> None:
    """A process inside looks at /proc/*/exe all the time while `exec`s come in, and tries to open each to write. It
    never gets a file of the host's: the process that enters can't be looked into, and it is sealed."""
    root = Path(own_bundle.rootfs)
    script = """
        while [ ! -e /tmp/stop ]; do
            for p in /proc/[0-9]*; do
                link=$(readlink $p/exe 2>/dev/null) || continue
                [ "$link" = /bin/busybox ] && continue
                (: >>$p/exe) 2>/dev/null && echo "$link" >>/tmp/open
            done
        done
    """

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        for key in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][key] += ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]

    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(own_bundle.write(change, args=["sh", "-c", script])), name)
    before = _digest()
    for _ in range(10):
        ours.ok("exec", name, "true")
    (root / "tmp" / "stop").touch()
    assert not (root / "tmp" / "open").exists(), (root / "tmp" / "open").read_text()
    assert _digest() == before


def test_symlinks_of_the_image_do_not_lead_out(runtime: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    """Targets of mounts, masked paths and device nodes behind absolute and climbing symlinks end inside the root."""
    root = Path(own_bundle.rootfs)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("host")
    (root / "abs").symlink_to(str(outside))
    (root / "climb").symlink_to("../../../../../../../.." + str(outside))

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["mounts"] += [
            {"destination": "/abs/sub", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/climb/other", "type": "tmpfs", "source": "tmpfs"},
        ]
        spec["linux"]["maskedPaths"] = ["/abs/file"]

    folder = own_bundle.write(change, args=["sh", "-c", "cut -d' ' -f5 /proc/self/mountinfo"])
    targets = runtime.ok("run", "--bundle", str(folder), runtime.new_id()).split()
    assert f"{outside}/sub" in targets  # inside: the same path, below the container's root
    assert f"{outside}/other" in targets
    assert mounts_below(tmp_path) == []
    assert sorted(os.listdir(outside)) == ["file"]
    assert (outside / "file").read_text() == "host"


@pytest.mark.parametrize("fstype", ["proc", "sysfs"])
def test_a_symlink_instead_of_proc_is_refused(runtime: Runtime, own_bundle: Bundle, fstype: str) -> None:
    """A mount of /proc on another place would leave writes of labels and sysctls to a faked /proc (CVE-2019-19921)."""
    name = {"proc": "proc", "sysfs": "sys"}[fstype]
    (Path(own_bundle.rootfs) / name).rmdir()
    (Path(own_bundle.rootfs) / name).symlink_to("tmp")
    result = runtime("run", "--bundle", str(own_bundle.write(args=["true"])), runtime.new_id())
    assert result.returncode == 1
    assert "must be mounted on ordinary directory" in result.stderr


def test_a_symlink_swapped_while_mounting(ours: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    """A volume that another container shares: its `target` is a folder and a symlink to the host by turns while
    containers mount on it (CVE-2021-30465). Nothing is ever mounted on, or made in, the host's folder."""
    shared = tmp_path / "shared"
    host = tmp_path / "host"
    host.mkdir()
    (shared / "target").mkdir(parents=True)
    (shared / "link").symlink_to(str(host))
    stop = threading.Event()

    def swap() -> None:
        libc = ctypes.CDLL(None)
        names = [os.fsencode(shared / name) for name in ("target", "link")]
        while not stop.is_set():
            assert libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # RENAME_EXCHANGE

    def change(spec: Spec) -> None:
        spec["mounts"] += [
            {"destination": "/tmp", "type": "bind", "source": str(shared), "options": ["rbind"]},
            {"destination": "/tmp/target/deep", "type": "tmpfs", "source": "tmpfs"},
        ]

    folder = own_bundle.write(change, args=["true"])
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(15):
            ours("run", "--bundle", str(folder), ours.new_id())  # may fail when it meets the gap; must not escape
    finally:
        stop.set()
        swapper.join()
    assert list(host.iterdir()) == []
    assert mounts_below(tmp_path) == []


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7, 8, 9, 10])
def test_a_working_directory_behind_a_descriptor(ours: Runtime, own_bundle: Bundle, number: int) -> None:
    """CVE-2024-21626: with cwd /proc/self/fd/N the program would begin in a folder of the host that the runtime had
    open. Here the descriptor isn't there, or the folder it names lies inside."""

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["process"]["cwd"] = f"/proc/self/fd/{number}"

    folder = own_bundle.write(change, args=["sh", "-c", "cd ..; cd ..; cd ..; cd ..; cd ..; ls"])
    result = ours("run", "--bundle", str(folder), ours.new_id())
    if result.returncode == 0:
        assert set(result.stdout.split()) == set(os.listdir(own_bundle.rootfs))
    else:
        assert "cwd" in result.stderr


def test_exec_with_a_working_directory_behind_a_descriptor(ours: Runtime, own_bundle: Bundle) -> None:
    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(own_bundle.write(args=["sleep", "100"])), name)
    for number in range(3, 16):
        result = ours("exec", "--cwd", f"/proc/self/fd/{number}", name, "ls", "/proc/self/cwd/..")
        assert result.returncode == 255, result.stdout


def test_a_faked_console_is_not_opened(ours: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    """/dev/console, /dev/ptmx and /dev/pts of the image are links to the host: they are replaced, or refused."""
    victim = tmp_path / "victim"
    victim.write_text("host")
    dev = Path(own_bundle.rootfs) / "dev"
    (dev / "pts").mkdir()
    (dev / "console").symlink_to(str(victim))
    (dev / "pts" / "ptmx").symlink_to(str(victim))

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["process"]["terminal"] = True
        spec["mounts"] = [m for m in spec["mounts"] if not m["destination"].startswith("/dev")]
        spec["mounts"].append({"destination": "/dev", "type": "bind", "source": str(dev), "options": ["rbind"]})

    result = ours("run", "--bundle", str(own_bundle.write(change, args=["true"])), ours.new_id())
    assert result.returncode == 1
    assert "/dev/ptmx" in result.stderr
    assert victim.read_text() == "host"


def test_a_faked_null_masks_nothing_of_the_hosts(ours: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2025-31133: masking binds /dev/null, and the image's /dev/null is a link. Ours is the host's own device."""
    victim = tmp_path / "victim"
    victim.write_text("host")
    root = Path(own_bundle.rootfs)
    (root / "secret").write_text("secret")
    (root / "dev" / "null").symlink_to(str(victim))

    def change(spec: Spec) -> None:
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/dev"]
        spec["mounts"] = [m for m in spec["mounts"] if not m["destination"].startswith("/dev/")]
        spec["linux"]["maskedPaths"] = ["/secret"]

    output = ours.ok("run", "--bundle", str(own_bundle.write(change, args=["cat", "/secret"])), ours.new_id())
    assert output == ""
    assert victim.read_text() == "host"


def test_no_inheritable_capabilities_are_left(runtime: Runtime, bundle: Bundle) -> None:
    """CVE-2022-24769: what isn't asked for as inheritable isn't."""
    output = runtime.ok(
        "run", "--bundle", str(bundle.write(args=["grep", "CapInh", "/proc/self/status"])), runtime.new_id()
    )
    assert int(output.split()[1], 16) == 0


def test_the_process_cannot_be_traced_before_it_drops_its_rights(ours: Runtime, own_bundle: Bundle) -> None:
    """CVE-2016-9962: a process that enters isn't dumpable, so what it holds is closed to those who wait inside. The
    container here has every capability but CAP_SYS_PTRACE; its root may not even read the newcomer's descriptors."""
    script = """
        while [ ! -e /tmp/stop ]; do
            for p in /proc/[0-9]*; do
                [ "$(cat $p/comm 2>/dev/null)" = sh ] && continue
                ls $p/fd >/tmp/out 2>/dev/null && grep -q '[3-9]' /tmp/out && echo "$p $(cat /tmp/out)" >>/tmp/seen
            done
        done
    """

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False

    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(own_bundle.write(change, args=["sh", "-c", script])), name)
    for _ in range(5):
        ours.ok("exec", name, "true")
    (Path(own_bundle.rootfs) / "tmp" / "stop").touch()
    seen = Path(own_bundle.rootfs) / "tmp" / "seen"
    lines = seen.read_text().splitlines() if seen.exists() else []
    assert not [line for line in lines if "python" in line]
