"""Root filesystems for tests, built from the host's own static busybox (Debian's package `busybox-static`)."""

from __future__ import annotations

import os
import shutil
import subprocess

FOLDERS = ("bin", "dev", "etc", "home", "proc", "root", "sbin", "sys", "tmp", "usr/bin", "usr/sbin", "var")


def build_busybox_rootfs(path: str | os.PathLike[str]) -> str:
    """A rootfs at `path` with busybox, a symlink for each of its applets, and users root, nobody and wherry (1000).

    Returns the path as a string. The caller says `need("busybox")` first.
    """
    root = os.fspath(path)
    for folder in FOLDERS:
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    os.chmod(root, 0o755)  # a temporary folder has 0700, and users besides root live in here
    os.chmod(os.path.join(root, "tmp"), 0o1777)
    busybox = shutil.which("busybox") or "/bin/busybox"
    shutil.copy(busybox, os.path.join(root, "bin/busybox"))
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            os.symlink("busybox", os.path.join(root, "bin", applet))
    for name, text in (
        (
            "passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nwherry:x:1000:1000::/home:/bin/sh\n",
        ),
        ("group", "root:x:0:\nnogroup:x:65534:\nwherry:x:1000:\nextra:x:2000:wherry\n"),
        ("resolv.conf", ""),
        ("hosts", "127.0.0.1 localhost\n"),
    ):
        with open(os.path.join(root, "etc", name), "w", encoding="utf-8") as file:
            file.write(text)
    return root
