"""The options of what a container is, the same for `run` and `create`, and the recipe that they make."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wherry.cli import network_flags
from wherry.cli.arguments import byte_size, duration, pairs, signal_number
from wherry.client import limits, mounting, security
from wherry.client.launch import RUNTIME
from wherry.client.recipe import Recipe
from wherry.core import container_logs
from wherry.core.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from google.protobuf.message import Message

Parser = argparse._ActionsContainer
OCI_RUNTIMES = ("runc", "crun", "youki", "runsc", "kata-runtime")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options, in groups as a person looks for them."""
    parser.add_argument("image", metavar="IMAGE", help="the image; short names are docker.io's")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARG...]", help="in place of the image's")
    _container(parser.add_argument_group("the container"))
    _process(parser.add_argument_group("the process"))
    _files(parser.add_argument_group("files"))
    network_flags.configure(parser)
    group = parser.add_argument_group("limits")
    limit_options(group)
    _text(group, "--cgroup-parent", metavar="PATH", help="the cgroup above its own")
    _isolation(parser.add_argument_group("isolation"))
    _health(parser.add_argument_group("health"))
    _engine(parser.add_argument_group("image and runtime"))


def _many(group: Parser, *names: str, metavar: str, help: str) -> None:  # noqa: A002 - argparse's word
    group.add_argument(*names, action="append", default=[], metavar=metavar, help=help)


def _text(group: Parser, *names: str, metavar: str, help: str) -> None:  # noqa: A002
    group.add_argument(*names, default="", metavar=metavar, help=help)


def _flag(group: Parser, *names: str, help: str) -> None:  # noqa: A002
    group.add_argument(*names, action="store_true", help=help)


def _container(group: Parser) -> None:
    _text(group, "--name", metavar="NAME", help="its name (made up when left out)")
    _many(group, "-l", "--label", metavar="KEY=VALUE", help="a label")
    _many(group, "--label-file", metavar="FILE", help="labels, one a line")
    _many(group, "--annotation", metavar="KEY=VALUE", help="an OCI annotation, for the runtime")
    _flag(group, "--rm", help="remove it, with its nameless volumes, when it has ended")
    _text(group, "--restart", metavar="POLICY", help="no, on-failure[:N], always, unless-stopped")
    _text(group, "--cidfile", metavar="FILE", help="write its id there")
    _flag(group, "--init", help="a small init as its first process: it reaps and passes signals on")
    _text(group, "--stop-signal", metavar="SIGNAL", help="what 'stop' sends (the image's, or TERM)")
    group.add_argument("--stop-timeout", type=float, metavar="SECONDS", help="until 'stop' sends KILL (10)")


def _process(group: Parser) -> None:
    _flag(group, "-i", "--interactive", help="keep its input open, and pass ours on")
    _flag(group, "-t", "--tty", help="give it a terminal")
    _many(group, "-e", "--env", metavar="NAME[=VALUE]", help="set a variable; a name alone takes our value")
    _many(group, "--env-file", metavar="FILE", help="set variables, one a line")
    _text(group, "-w", "--workdir", metavar="DIR", help="working directory")
    group.add_argument("-u", "--user", metavar="USER[:GROUP]", help="names of the image, or numbers")
    _many(group, "--group-add", metavar="GROUP", help="a further group")
    group.add_argument("--entrypoint", metavar="COMMAND", help='in place of the image\'s ("" for none)')
    _many(group, "--ulimit", metavar="NAME=SOFT[:HARD]", help="a limit of setrlimit(2) (nofile=1024:4096)")
    group.add_argument("--oom-score-adj", type=int, metavar="N", help="who goes first without memory (-1000 to 1000)")


def _files(group: Parser) -> None:
    _many(
        group,
        "-v",
        "--volume",
        metavar="[SOURCE:]TARGET[:OPTIONS]",
        help="a folder or a volume (/srv:/data:ro, db:/var/lib/db)",
    )
    _many(group, "--mount", metavar="SPEC", help="type=bind|volume|tmpfs,src=/a,dst=/b,readonly")
    _many(group, "--tmpfs", metavar="TARGET[:OPTIONS]", help="a file system in memory (/tmp:size=64m)")
    _many(group, "--volumes-from", metavar="CONTAINER[:ro]", help="the mounts of another container")
    _flag(group, "--read-only", help="the root file system can't be written")
    group.add_argument("--shm-size", type=byte_size, default=0, metavar="SIZE", help="size of /dev/shm (64m)")
    _flag(group, "--rootfs", help="IMAGE is a folder of the host to use as the root")


def limit_options(group: argparse._ActionsContainer) -> None:
    """The limits, for `run`, `create` and `update`."""
    for names, metavar, text in (
        (("-m", "--memory"), "SIZE", "memory (256m, 2g)"),
        (("--memory-reservation",), "SIZE", "memory that it keeps when there is little"),
    ):
        group.add_argument(*names, type=byte_size, default=0, metavar=metavar, help=text)
    group.add_argument(
        "--memory-swap", type=_swap, default=0, metavar="SIZE", help="memory and swap together; -1: no limit"
    )
    group.add_argument("--memory-swappiness", type=int, default=-1, metavar="N", help="0 to 100")
    _flag(group, "--oom-kill-disable", help="wait for memory instead of being killed (cgroup v1)")
    group.add_argument("--cpus", type=float, default=0.0, metavar="N", help="CPU time in whole CPUs (1.5)")
    group.add_argument("-c", "--cpu-shares", type=int, default=0, metavar="N", help="weight against others (1024)")
    group.add_argument("--cpu-quota", type=int, default=0, metavar="US", help="CPU time in each period")
    group.add_argument("--cpu-period", type=int, default=0, metavar="US", help="length of a period")
    _text(group, "--cpuset-cpus", metavar="LIST", help="CPUs to run on (0-2,4)")
    _text(group, "--cpuset-mems", metavar="LIST", help="memory nodes to use")
    group.add_argument("--pids-limit", type=int, default=0, metavar="N", help="most processes at once; -1: no limit")
    group.add_argument(
        "--blkio-weight", type=int, default=0, metavar="N", help="weight of its input and output, 10 to 1000"
    )
    for kind in ("read-bps", "write-bps", "read-iops", "write-iops"):
        _many(group, f"--device-{kind}", metavar="DEVICE:RATE", help=f"most it may {kind.replace('-', ' in ')}")


def _isolation(group: Parser) -> None:
    _flag(group, "--privileged", help="all capabilities and devices of the host")
    _many(group, "--cap-add", metavar="CAP", help="add a capability (or ALL)")
    _many(group, "--cap-drop", metavar="CAP", help="take a capability away (or ALL)")
    _many(
        group,
        "--security-opt",
        metavar="OPTION",
        help="seccomp=FILE|unconfined, apparmor=, label=, no-new-privileges, systempaths=unconfined",
    )
    _many(
        group,
        "--device",
        metavar="DEVICE[:TARGET[:rwm]]",
        help="a device of the host, or by CDI: vendor.com/class=name",
    )
    _many(group, "--device-cgroup-rule", metavar="RULE", help="what else it may open ('c 42:* rmw')")
    _many(group, "--gpus", metavar="GPUS", help="all, a number, or device=0,1 (by CDI)")
    _many(group, "--sysctl", metavar="NAME=VALUE", help="a setting of its kernel namespaces")
    for kind, about in (("ipc", "shared memory and semaphores"), ("pid", "processes"), ("uts", "host name"),
                        ("cgroupns", "cgroups")):  # fmt: skip
        _text(group, f"--{kind}", metavar="MODE", help=f"its {about}: host, private or container:NAME")
    _text(group, "--userns", metavar="MODE", help="its users: host, auto[:size=N] (ids of its own) or container:NAME")
    _many(group, "--uidmap", metavar="CONTAINER:HOST:SIZE", help="its users, by a mapping (0:100000:65536)")
    _many(group, "--gidmap", metavar="CONTAINER:HOST:SIZE", help="its groups (as the users, when left out)")


def _health(group: Parser) -> None:
    _text(group, "--health-cmd", metavar="COMMAND", help="a command that says whether it is well (exit code 0)")
    for name, text in (
        ("interval", "between two checks (30s)"),
        ("timeout", "that a check may take (30s)"),
        ("start-period", "in which failures don't count (0s)"),
        ("start-interval", "between checks in that time (5s)"),
    ):
        group.add_argument(f"--health-{name}", type=duration, metavar="DURATION", help=text)
    group.add_argument("--health-retries", type=int, metavar="N", help="failures in a row that count (3)")
    _flag(group, "--no-healthcheck", help="not the image's check either")


def _engine(group: Parser) -> None:
    group.add_argument(
        "--pull", default="missing", choices=("missing", "always", "never"), help="when to pull the image (missing)"
    )
    _flag(group, "-q", "--quiet", help="no progress of the pull")
    _text(group, "--platform", metavar="OS/ARCH", help="the platform of the image")
    _text(group, "--runtime", metavar="NAME", help=f"a runtime of the daemon, or an OCI runtime's path ({RUNTIME})")
    group.add_argument(
        "--snapshotter",
        default=os.environ.get("CONTAINERD_SNAPSHOTTER", ""),
        metavar="NAME",
        help="CONTAINERD_SNAPSHOTTER",
    )
    _text(group, "--log-driver", metavar="NAME", help="json-file (the default), none, or a URI")
    _many(group, "--log-opt", metavar="KEY=VALUE", help="max-size=10m, max-file=3")
    group.add_argument("--volume-driver", default="local", choices=("local",), help=argparse.SUPPRESS)
    group.add_argument("--isolation", default="default", choices=("default", ""), help=argparse.SUPPRESS)
    group.add_argument("--disable-content-trust", action="store_true", help=argparse.SUPPRESS)
    for flag, instead in _NOT_THERE.items():
        group.add_argument(flag, action=_NotThere, metavar=instead, help=argparse.SUPPRESS)


# what docker's users may ask for, and what they are told to do instead
_NOT_THERE = {
    "--link": "containers on a network of your own find each other by name: 'wherry network create', then --net NAME",
    "--storage-opt": "what a container writes can't be limited; Sandbox of the Python library does it (disk=…)",
    "--kernel-memory": "the kernel has no such limit any more: --memory counts it",
    "--cpu-rt-runtime": "real-time scheduling isn't given to containers: --cpu-shares weighs them",
    "--cpu-rt-period": "real-time scheduling isn't given to containers: --cpu-shares weighs them",
}


class _NotThere(argparse.Action):
    """An option that is known from elsewhere: its metavar says what to do instead."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]} isn't there: {self.metavar}")


def _swap(text: str) -> int:
    return -1 if text == "-1" else byte_size(text)


def recipe(args: argparse.Namespace, **more: Any) -> Recipe:
    """What the options ask for; raises InvalidArgument, NotFound."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.stop_signal:
        try:
            signal_number(args.stop_signal)
        except argparse.ArgumentTypeError as error:
            raise InvalidArgument(f"--stop-signal: {error}") from None
    platform = None
    if args.platform:
        from wherry.core.platforms import parse

        platform = parse(args.platform)
    labels = [line for path in args.label_file for line in lines_of(path)] + args.label
    runtime, options = runtime_of(args.runtime)
    return Recipe(
        image="" if args.rootfs else args.image,
        rootfs=args.image if args.rootfs else "",
        command=command,
        name=args.name,
        entrypoint=None if args.entrypoint is None else [args.entrypoint] if args.entrypoint else [],
        env=environment(args),
        cwd=args.workdir,
        user=args.user,
        groups=args.group_add,
        tty=args.tty,
        stdin_open=args.interactive,
        hostname=args.hostname,
        domainname=args.domainname,
        labels={item.partition("=")[0]: item.partition("=")[2] for item in labels},
        annotations=limits.pairs(args.annotation, "annotation"),
        mounts=wishes(args),
        mounts_from=args.volumes_from,
        limits=limits_of(args),
        ulimits=args.ulimit,
        oom_score_adj=args.oom_score_adj,
        shm_size=args.shm_size,
        sysctls=limits.pairs(args.sysctl, "sysctl"),
        namespaces={
            kind: getattr(args, kind) for kind in ("ipc", "pid", "uts", "userns", "cgroupns") if getattr(args, kind)
        },
        uidmap=args.uidmap,
        gidmap=args.gidmap,
        cgroup_parent=args.cgroup_parent,
        privileged=args.privileged,
        read_only=args.read_only,
        cap_add=args.cap_add,
        cap_drop=args.cap_drop,
        security=security.parse_options(args.security_opt),
        devices=args.device,
        device_rules=args.device_cgroup_rule,
        gpus=args.gpus,
        init=args.init,
        restart=args.restart,
        health=health_of(args),
        stop_signal=args.stop_signal,
        stop_timeout=args.stop_timeout,
        network=network_flags.network_options(args, args.name),
        platform=platform,
        snapshotter=args.snapshotter,
        runtime=runtime,
        runtime_options=options,
        **more,
    )


def wishes(args: argparse.Namespace) -> list[mounting.Wish]:
    """The mounts of -v, --mount and --tmpfs."""
    return [
        *map(mounting.parse_volume, args.volume),
        *map(mounting.parse_mount, args.mount),
        *map(mounting.parse_tmpfs, args.tmpfs),
    ]


def limits_of(args: argparse.Namespace) -> limits.Limits:
    """The limits, for `run`, `create` and `update`."""
    return limits.Limits(
        memory=args.memory,
        memory_swap=args.memory_swap,
        memory_reservation=args.memory_reservation,
        memory_swappiness=args.memory_swappiness,
        oom_kill_disable=args.oom_kill_disable,
        cpus=args.cpus,
        cpu_shares=args.cpu_shares,
        cpu_quota=args.cpu_quota,
        cpu_period=args.cpu_period,
        cpuset_cpus=args.cpuset_cpus,
        cpuset_mems=args.cpuset_mems,
        pids=args.pids_limit,
        blkio_weight=args.blkio_weight,
        read_bps=args.device_read_bps,
        write_bps=args.device_write_bps,
        read_iops=args.device_read_iops,
        write_iops=args.device_write_iops,
    )


def environment(args: argparse.Namespace) -> list[str]:
    """Variables: files first; a name without a value takes ours, and is left out where we have none."""
    items = [line for path in args.env_file for line in lines_of(path)]
    for item in items:
        if any(char.isspace() for char in item.partition("=")[0]):
            raise InvalidArgument(f"--env-file: the name of a variable has no spaces: {item!r}")
    items += args.env
    return [
        item if "=" in item else f"{item}={os.environ[item]}" for item in items if "=" in item or item in os.environ
    ]


def lines_of(path: str) -> list[str]:
    """The lines of a file of variables or labels, without comments."""
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.rstrip("\n").lstrip() for line in file]
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} isn't UTF-8") from None
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    return [line for line in found if line.strip() and not line.lstrip().startswith("#")]


def health_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The health check as an image's configuration has it (times in nanoseconds); None where nothing is said of it."""
    given = {
        "Interval": args.health_interval,
        "Timeout": args.health_timeout,
        "StartPeriod": args.health_start_period,
        "StartInterval": args.health_start_interval,
    }
    times = {name: int(seconds * 1e9) for name, seconds in given.items() if seconds is not None}
    if args.health_retries is not None:
        times["Retries"] = args.health_retries
    if args.no_healthcheck:
        if args.health_cmd or times:
            raise InvalidArgument("--no-healthcheck can't be used together with --health-* options")
        return {"Test": ["NONE"]}
    if not args.health_cmd:
        if times:
            raise InvalidArgument("--health-* options need --health-cmd")
        return None
    return {"Test": ["CMD-SHELL", args.health_cmd], **times}


def runtime_of(name: str) -> tuple[str, Message | None]:
    """The daemon's runtime and its options: an OCI runtime by its path or usual name runs under our shim."""
    if not name or (not name.startswith("/") and name not in OCI_RUNTIMES):
        return name or RUNTIME, None
    from wherry.client.runtimes import runc_options

    return RUNTIME, runc_options(binary=name)


def log_uri(args: argparse.Namespace, default: str) -> str:
    """Where the output of a container that nobody follows goes."""
    driver = args.log_driver
    options = pairs(args.log_opt)
    if options and driver not in {"", "json-file", "local"}:
        raise InvalidArgument(f"log options are for the driver json-file, {driver} has none")
    if driver == "none":
        return ""
    if "://" in driver:
        return str(driver)
    if driver not in {"", "json-file", "local"}:
        raise InvalidArgument(
            f"unknown log driver {driver!r}: there are json-file, none, and file:// and binary:// URIs"
        )
    if not options:
        return default
    container_logs.check(options)
    return f"{default}?{'&'.join(f'{key}={value}' for key, value in options.items())}"


def words(items: Sequence[str]) -> str:
    """For messages."""
    return ", ".join(items)
