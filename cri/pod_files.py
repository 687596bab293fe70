"""A pod's folder: hostname, hosts, resolv.conf and the memory that its containers share.

STATE/cri/pods/ID/hostname, hosts, resolv.conf      for containers to be bound over the image's
STATE/cri/pods/ID/shm                               /dev/shm of all its containers, a tmpfs of 64 MiB
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Final

from wherry.core.errors import InvalidArgument
from wherry.cri.pod_spec import on_host
from wherry.linux import mounts
from wherry.linux import syscalls as sc
from wherry.proto import cri_pb2 as cri

_SHM: Final = "mode=1777,size=67108864"


def make(folder: str, config: cri.PodSandboxConfig) -> None:
    """Write the files and mount the memory. All of it is root's: who has other users has it by idmapped mounts."""
    os.makedirs(folder, 0o711, exist_ok=True)
    hostname = os.uname().nodename if on_host(config) else config.hostname or os.uname().nodename
    _write(f"{folder}/hostname", f"{hostname}\n")
    _write(f"{folder}/hosts", _read("/etc/hosts"))
    _write(f"{folder}/resolv.conf", resolv_conf(config.dns_config))
    if config.linux.security_context.namespace_options.ipc == cri.NODE:
        if not os.path.isdir("/dev/shm"):
            raise InvalidArgument("the host has no /dev/shm for a pod with the host's IPC: invalid argument")
        return
    os.makedirs(f"{folder}/shm", 0o700, exist_ok=True)
    if not mounts.is_mountpoint(f"{folder}/shm"):
        sc.mount("shm", f"{folder}/shm", "tmpfs", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC, _SHM)


def free(folder: str) -> None:
    """Give the shared memory back."""
    with contextlib.suppress(OSError):
        mounts.unmount_all(f"{folder}/shm", sc.MNT_DETACH)


def remove(folder: str) -> None:
    """Remove everything; fine where there is nothing."""
    free(folder)
    shutil.rmtree(folder, ignore_errors=True)


def resolv_conf(dns: cri.DNSConfig) -> str:
    """The file's text for what the kubelet says, the host's file where it says nothing."""
    lines: list[str] = []
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "\n".join(lines) + "\n" if lines else _read("/etc/resolv.conf")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
