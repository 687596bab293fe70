"""Peers: programs of other projects that the tests drive, from Debian's packages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

# program -> Debian package that brings it
PACKAGES = {
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "crun": "crun",
    "podman": "podman",
    "docker": "docker.io",
    "dockerd": "docker.io",
    "docker-registry": "docker-registry",
    "skopeo": "skopeo",
    "buildah": "buildah",
    "umoci": "umoci",
    "busybox": "busybox-static",
    "hyperfine": "hyperfine",
    "redis-server": "redis-server",
    "redis-cli": "redis-server",
    "pasta": "passt",
    "slirp4netns": "slirp4netns",
    "fuse-overlayfs": "fuse-overlayfs",
    "cni-bridge": "containernetworking-plugins",
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "newuidmap": "uidmap",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "dbus-daemon": "dbus-daemon",
    "criu": "criu",
    "tini": "tini",
    "node": "nodejs",
    "npm": "npm",
    "openssl": "openssl",
    "kubectl": "kubernetes-client",
}
REQUIRED = os.environ.get("WHERRY_REQUIRE_PEERS") == "1"


def need(program: str) -> str:
    """The path of a peer; without it the test skips with its package's name, or fails where peers are required."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin")
    if path is None:
        missing(f"{program} is missing: apt-get install {PACKAGES.get(program, program)}")
    return str(Path(path))


def missing(reason: str) -> NoReturn:
    """Skip for a missing peer, or fail where `WHERRY_REQUIRE_PEERS=1` says that peers are there."""
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)
