"""Builds what the VM boots: Debian's cloud kernel, an initramfs that finds the disk, and a root with systemd.

Everything comes from Debian's packages by the machine's own apt sources and from pip, and is kept in a cache folder by
a digest of what went in (package versions, Python requirements, the text of this file): the first build takes about a
minute, later runs find it. Nothing of the host is changed; root is needed, because files of the image belong to root.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "apparmor base-files base-passwd bash busybox-static coreutils criu crun dbus dbus-user-session docker-registry "
    "e2fsprogs findutils grep gzip iproute2 iptables kmod libc-bin libseccomp2 libstdc++6 linux-image-cloud-amd64 "
    "mount nftables passt procps python3 runc sed slirp4netns systemd systemd-sysv tar udev uidmap util-linux"
)
#: Pulled in by dependencies of scripts that never run here.
_LEFT_OUT = ("perl", "libperl", "usrmerge", "debconf", "initramfs-tools", "klibc", "libklibc", "adduser", "gcc-12-base")
_TEST_REQUIREMENTS = ("pytest>=8.2", "pytest-asyncio>=1.0", "pytest-timeout>=2.3")
#: An image that other inputs replaced goes at the first build after this time.
_KEPT_SECONDS = 3600
#: Python of Debian bookworm, whatever runs this file.
PYTHON = "3.11"
SITE = f"opt/wherry/lib/python{PYTHON}/site-packages"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console")
_MODULE_FOLDERS = (
    "arch",
    "block",
    "crypto",
    "lib",
    "fs/overlayfs",
    "fs/fuse",
    "fs/quota",
    "drivers/virtio",
    "drivers/block",
    "net",
)
_MODULE_FILES = (
    "drivers/char/virtio_console.ko",
    "drivers/net/dummy.ko",
    "drivers/net/tun.ko",
    "drivers/net/veth.ko",
    "drivers/char/hw_random",
)
_IPTABLES = ("", "-save", "-restore")
#: Units that only cost time in a machine that lives for a minute.
_MASKED = (
    "systemd-timesyncd.service systemd-udev-trigger.service systemd-udev-settle.service systemd-hwdb- "
    "update.service systemd-journal-catalog-update.service systemd-update-done.service systemd-update- "
    "utmp.service ldconfig.service systemd-firstboot.service systemd-random-seed.service systemd-pstore.service "
    "getty@tty1.service e2scrub_reap.service systemd-journal-flush.service dev-hugepages.mount sys-kernel- "
    "debug.mount sys-kernel-tracing.mount proc-sys-fs-binfmt_misc.automount serial-getty@ttyS0.service "
    "systemd-user-sessions.service "
)
#: An ordinary user with granted ids; user@1000.service is started by the tests that want it.
USER = "barrow"
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules); do /bin/busybox insmod /$m; done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root || exec /bin/busybox sh
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""
_AGENT_UNIT = """[Unit]
Description=Runs what the test harness asks for
DefaultDependencies=no
After=basic.target dbus.socket

[Service]
ExecStart=/usr/bin/python3 /opt/agent.py
StandardOutput=journal+console
KillMode=process
"""


@dataclass(frozen=True)
class Image:
    """Files for qemu; `root` is an ext4 disk that is opened with `snapshot=on`."""

    kernel: Path
    initrd: Path
    root: Path


def cache() -> Path:
    """Where downloads and images are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "wherry-vm" if base else Path("/tmp/wherry-vm")


def build() -> Image:
    """The image for the present inputs, built if it isn't there. Raises RuntimeError with a failing tool's output."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once share one build
        return _build()


def _build() -> Image:
    packages = _resolve()
    sources = [Path(__file__).with_name(name).read_text() for name in ("image.py", "agent.py")]
    inputs = "\n".join([*packages, *_requirements(), *sources])
    folder = cache() / hashlib.sha256(inputs.encode()).hexdigest()[:16]
    image = Image(folder / "vmlinuz", folder / "initrd", folder / "root.ext4")
    if not (folder / "ready").exists():
        for old in cache().glob("*/ready"):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(old.parent)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        root = folder / "root"
        _unpack(_download(), root)
        _users(root)
        _units(root)
        version = _kernel(root, image)
        _python(root)
        _initrd(root, version, image)
        _disk(root, image)
        shutil.rmtree(root)
        (folder / "ready").touch()
    return image


def _run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def _apt(archives: str, *arguments: str) -> str:
    """apt-get that believes nothing is installed, and downloads into our own folder `archives`."""
    folder = cache() / "apt"
    (folder / archives / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    command = [
        *("apt-get", "--yes", "--no-install-recommends", "-o", f"Dir::State::status={folder}/status"),
        *("-o", f"Dir::Cache::archives={folder}/{archives}/"),
        *("-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"),
        *arguments,
        *PACKAGES.split(),
    ]
    return _run(*command)


def _resolve() -> list[str]:
    """File names of all packages with their dependencies, versions in them."""
    try:
        uris = _apt("none", "--print-uris", "install")  # what is in the folder already wouldn't be listed
    except RuntimeError:
        _run("apt-get", "update")  # a fresh container has no package lists
        uris = _apt("none", "--print-uris", "install")
    return sorted(line.split()[1] for line in uris.splitlines() if line.startswith("'"))


def _download() -> list[Path]:
    names = _resolve()
    _apt("archives", "--download-only", "install")
    return [cache() / "apt" / "archives" / name for name in names if not name.startswith(_LEFT_OUT)]


def _unpack(packages: list[Path], root: Path) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as deb:
            _run(
                *("tar", "-x", "--keep-directory-symlink", "-C", root),
                *(f"--exclude=./usr/share/{name}" for name in ("doc", "man", "locale", "info", "i18n")),
                stdin=deb.stdout,
            )
            if deb.wait():
                raise RuntimeError(f"dpkg-deb fails on {package}")


def _users(root: Path) -> None:
    """What the packages' scripts would have done."""
    for name in ("opt", "root", "proc", "sys", "dev", "run", "tmp", "var/tmp", "mnt", "var/log"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    (root / "usr/lib/sysusers.d/dbus.conf").write_text('u messagebus - "System Message Bus"\n')
    (root / "etc/machine-id").write_text("5f0d3c9e8a6b4f1e9d2c7b8a90e1f234\n")
    (root / "etc/hostname").write_text("wherry-vm\n")
    (root / "etc/fstab").touch()
    for name in ("subuid", "subgid"):
        (root / "etc" / name).write_text(f"{USER}:100000:65536\n")
    for name, line in (("passwd", f"{USER}:x:1000:1000::/home/{USER}:/bin/bash\n"), ("group", f"{USER}:x:1000:\n")):
        with open(root / "etc" / name, "a") as file:
            file.write(line)
    (root / "home" / USER).mkdir(parents=True)
    os.chown(root / "home" / USER, 1000, 1000)
    # what pam-auth-update would write, without passwords: a user's manager is started in a session
    kinds = ("account", "auth", "password", "session")
    (root / "etc/pam.d/other").write_text("".join(f"{kind} required pam_permit.so\n" for kind in kinds))
    for kind in ("account", "session-noninteractive"):
        (root / f"etc/pam.d/common-{kind}").write_text(f"{kind.partition('-')[0]} required pam_permit.so\n")
    # links that come from scripts of packages or from the alternatives
    links = [("bin/python3", f"python{PYTHON}"), ("bin/sh", "bash")]
    links += [(f"sbin/ip{v}tables{what}", f"ip{v}tables-nft{what}") for v in ("", "6") for what in _IPTABLES]
    for link, target in links:
        if not (root / "usr" / link).exists():
            (root / "usr" / link).symlink_to(target)
    for command in (["systemd-sysusers"], ["ldconfig"]):
        _run("chroot", root, *command)


def _units(root: Path) -> None:
    system = root / "etc/systemd/system"
    for unit in _MASKED.split():
        (system / unit).unlink(missing_ok=True)
        (system / unit).symlink_to("/dev/null")
    (system / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    # started by the bus where somebody asks for it
    (root / "lib/systemd/system/multi-user.target.wants/systemd-logind.service").unlink()
    (system / "wherry-agent.service").write_text(_AGENT_UNIT)
    (system / "multi-user.target.wants").mkdir(exist_ok=True)
    (system / "multi-user.target.wants/wherry-agent.service").symlink_to("../wherry-agent.service")
    shutil.copy(Path(__file__).with_name("agent.py"), root / "opt/agent.py")


def _kernel(root: Path, image: Image) -> str:
    """Takes the kernel out of the root and thins its modules; returns its version."""
    modules = next((root / "lib/modules").iterdir())
    shutil.move(next((root / "boot").glob("vmlinuz-*")), image.kernel)
    shutil.rmtree(root / "boot")
    kept = modules.with_name("kept")
    for name in (*_MODULE_FOLDERS, *_MODULE_FILES):
        source, target = modules / "kernel" / name, kept / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy(source, target)
    shutil.rmtree(modules / "kernel")
    kept.rename(modules / "kernel")
    _run("chroot", root, "depmod", modules.name)
    return modules.name


def _requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *_TEST_REQUIREMENTS]


def _python(root: Path) -> None:
    """A virtual environment at /opt/wherry, filled by the pip that runs this."""
    platforms = (f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014"))
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"),
        *(f"--python-version={PYTHON}", *platforms, f"--target={root / SITE}", *_requirements()),
    )
    venv = root / "opt/wherry"
    (venv / "bin").mkdir()
    (venv / "bin/python").symlink_to("/usr/bin/python3")
    (venv / "bin/python3").symlink_to("python")
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    compiled = (f"/{SITE}", "/opt/agent.py", f"/usr/lib/python{PYTHON}")
    _run(*("chroot", root, "/opt/wherry/bin/python", "-m", "compileall", "-q", "-o0", "-o2"), *compiled)


def _initrd(root: Path, version: str, image: Image) -> None:
    modules = root / "lib/modules" / version
    needs = dict(line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines())
    wanted: list[str] = []
    for name in _MODULES:
        path = next(path for path in needs if path.endswith(f"/{name}.ko"))
        wanted += [one for one in (*reversed(needs[path].split()), path) if one not in wanted]
    archive = _Cpio()
    for folder in ("bin", "proc", "dev", "root"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, _INIT.encode())
    archive.add("modules", stat.S_IFREG | 0o644, "\n".join(Path(one).name for one in wanted).encode())
    for one in wanted:
        archive.add(Path(one).name, stat.S_IFREG | 0o644, (modules / one).read_bytes())
    image.initrd.write_bytes(gzip.compress(archive.finish(), 1))


class _Cpio:
    """The archive format of an initramfs ("newc", Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        self._pad()
        self._out.write(data)
        self._pad()

    def _pad(self) -> None:
        self._out.write(b"\0" * (-self._out.tell() % 4))

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()


def _disk(root: Path, image: Image) -> None:
    used = int(_run("du", "-s", "--block-size=1M", root).split()[0])
    with open(image.root, "wb") as disk:
        disk.truncate((used + 700) << 20)
    # no journal: the machine's disk is thrown away
    _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", root, image.root)


if __name__ == "__main__":
    print(build())
