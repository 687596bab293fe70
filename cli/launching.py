"""The options of what a container is made from: the same for `run` and `containers create`."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from wherry.cli.arguments import byte_size, pairs
from wherry.client.launch import RUNTIME, Launch
from wherry.client.spec import SpecOptions, mount
from wherry.core.errors import InvalidArgument

if TYPE_CHECKING:
    from google.protobuf.message import Message


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options, in groups as a person looks for them."""
    parser.add_argument("image", metavar="IMAGE|ROOTFS", help="the image, or with --rootfs a folder of the host")
    parser.add_argument("id", nargs="?", metavar="ID", help="the container's id (made up when left out)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARG...]", help="in place of the image's")
    _process(parser.add_argument_group("the process"))
    _resources(parser.add_argument_group("resources"))
    _isolation(parser.add_argument_group("isolation"))
    _record(parser.add_argument_group("the container"))


def _process(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable")
    group.add_argument("--env-file", action="append", default=[], metavar="FILE", help="set variables, one a line")
    group.add_argument("-w", "--cwd", default="", metavar="DIR", help="working directory")
    group.add_argument("-u", "--user", metavar="USER[:GROUP]", help="names of the image, or numbers")
    group.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    group.add_argument("--hostname", default="", metavar="NAME", help="host name")


def _resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m", "--memory", "--memory-limit", dest="memory", type=byte_size, default=0, metavar="SIZE",
        help="memory limit (256m, 2g)",
    )  # fmt: skip
    group.add_argument("--cpus", type=float, default=0.0, metavar="N", help="CPU time in whole CPUs (1.5)")
    group.add_argument("--cpu-shares", type=int, default=1024, metavar="N", help="weight against others (1024)")
    group.add_argument("--cpu-quota", type=int, default=-1, metavar="US", help="CPU time in each period")
    group.add_argument("--cpu-period", type=int, default=0, metavar="US", help="length of a period")
    group.add_argument("--cpuset-cpus", default="", metavar="LIST", help="CPUs to run on (0-2,4)")
    group.add_argument("--cpuset-mems", default="", metavar="LIST", help="memory nodes to use")
    group.add_argument("--pids-limit", type=int, default=0, metavar="N", help="most processes at once")
    group.add_argument("--cgroup", metavar="PATH", help='cgroup path ("" for none)')
    group.add_argument("--rdt-class", default="", metavar="NAME", help="class of the RDT's cache control")


def _isolation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--net-host", action="store_true", help="the host's network")
    group.add_argument("--privileged", action="store_true", help="all capabilities and devices of the host")
    group.add_argument("--read-only", action="store_true", help="root file system can't be written")
    group.add_argument(
        "--mount", action="append", default=[], metavar="SPEC", help="type=bind,src=/a,dst=/b,options=rbind:ro"
    )
    group.add_argument("--device", action="append", default=[], metavar="PATH", help="a device, or a folder of them")
    group.add_argument("--cap-add", action="append", default=[], metavar="CAP", help="add a capability")
    group.add_argument("--cap-drop", action="append", default=[], metavar="CAP", help="take a capability away (or ALL)")
    group.add_argument("--seccomp", action="store_true", help="use the default seccomp profile")
    group.add_argument("--seccomp-profile", default="", metavar="FILE", help="a profile of yours (with --seccomp)")
    group.add_argument("--apparmor-profile", default="", metavar="NAME", help="an AppArmor profile that is loaded")
    group.add_argument("--allow-new-privs", action="store_true", help="setuid programs work")
    group.add_argument("--with-ns", action="append", default=[], metavar="TYPE:PATH", help="join a namespace")
    group.add_argument("--no-pivot", action="store_true", help="no pivot_root (for a root on a ramdisk)")
    group.add_argument(
        "--rootfs-propagation", default="", choices=("private", "shared", "slave", "unbindable", "rprivate", "rshared",
        "rslave", "runbindable"), metavar="MODE", help="propagation of the root's mounts",
    )  # fmt: skip


def _record(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the container")
    group.add_argument("--annotation", action="append", default=[], metavar="KEY=VALUE", help="an OCI annotation")
    group.add_argument("--rootfs", action="store_true", help="IMAGE is a folder of the host to use as the root")
    group.add_argument("-c", "--config", metavar="FILE", help="a whole OCI specification (then: --config FILE ID)")
    group.add_argument("--platform", metavar="OS/ARCH", help="the platform of the image")
    group.add_argument(
        "--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", ""), metavar="NAME",
        help="snapshotter (CONTAINERD_SNAPSHOTTER)",
    )  # fmt: skip
    group.add_argument(
        "--snapshotter-label", action="append", default=[], metavar="KEY=VALUE", help="a label of the snapshot"
    )
    group.add_argument("--runtime", default=RUNTIME, metavar="NAME", help=f"runtime ({RUNTIME})")
    group.add_argument("--runtime-config-path", default="", metavar="FILE", help="the runtime's configuration")
    group.add_argument("--runc-binary", default="", metavar="PATH", help="an OCI runtime to use (runc, crun)")
    group.add_argument("--runc-root", default="", metavar="DIR", help="its state folder")
    group.add_argument("--runc-systemd-cgroup", action="store_true", help="cgroups by systemd")


def launch(args: argparse.Namespace) -> Launch:
    """What the options ask for; raises InvalidArgument."""
    document, container, image = None, args.id, args.image
    if args.config:
        # as ctr has it: the specification takes the image's place, and only the id follows
        document, container, image = _document(args.config), args.id or args.image, ""
    if args.seccomp_profile and not args.seccomp:
        raise InvalidArgument("--seccomp-profile needs --seccomp")
    rootfs = image if args.rootfs else ""
    platform = None
    if args.platform:
        from wherry.core.platforms import parse

        platform = parse(args.platform)
    return Launch(
        id=container or f"w{os.urandom(6).hex()}",
        image="" if args.rootfs else image,
        spec=_spec_options(args, rootfs),
        document=document,
        user=args.user,
        labels=pairs(args.label),
        snapshotter=args.snapshotter,
        snapshot_labels=pairs(args.snapshotter_label),
        runtime=args.runtime,
        runtime_options=_runtime_options(args),
        platform=platform,
    )


def _spec_options(args: argparse.Namespace, rootfs: str) -> SpecOptions:
    env = [line for path in args.env_file for line in _env_file(path)] + args.env
    same = [
        "cwd",
        "hostname",
        "tty",
        "read_only",
        "privileged",
        "net_host",
        "allow_new_privs",
        "cap_add",
        "cap_drop",
        "seccomp",
        "seccomp_profile",
        "apparmor_profile",
        "cpus",
        "cpu_shares",
        "cpu_quota",
        "cpu_period",
        "cpuset_cpus",
        "cpuset_mems",
        "memory",
        "rootfs_propagation",
        "rdt_class",
        "cgroup",
    ]
    values: dict[str, Any] = {name: getattr(args, name) for name in same}
    return SpecOptions(
        args=args.command[1:] if args.command[:1] == ["--"] else args.command,
        env=env,
        mounts=[mount(text) for text in args.mount],
        namespaces=[_namespace(text) for text in args.with_ns],
        annotations=pairs(args.annotation),
        devices=args.device,
        pids=args.pids_limit,
        rootfs=rootfs,
        **values,
    )


def _namespace(text: str) -> tuple[str, str]:
    kind, colon, path = text.partition(":")
    names = {"net": "network", "mnt": "mount"}
    if not colon or not path:
        raise InvalidArgument(f"--with-ns needs TYPE:PATH, got {text!r}")
    return names.get(kind, kind), path


def _env_file(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} isn't UTF-8") from None
    kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    # a name alone takes the value that it has here, as docker does
    return [line if "=" in line else f"{line}={os.environ[line]}" for line in kept if "=" in line or line in os.environ]


def _document(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            document = json.load(file)
        except ValueError as error:
            raise InvalidArgument(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"{path} is no OCI specification")
    return document


def _runtime_options(args: argparse.Namespace) -> Message | None:
    if args.runtime_config_path:
        from wherry.client.runtimes import config_options

        return config_options(args.runtime_config_path)
    from wherry.client.runtimes import runc_options

    return runc_options(
        binary=args.runc_binary, root=args.runc_root, systemd_cgroup=args.runc_systemd_cgroup, no_pivot=args.no_pivot
    )
