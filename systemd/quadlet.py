"""Containers, volumes and networks as units: `*.container`, `*.volume` and `*.network` files become services.

The files are those of podman's quadlet (podman-systemd.unit(5)), so that one can be moved here as it is. systemd calls
generators at boot and at each `daemon-reload` (systemd.generator(7)); this one reads the files from the folders that
podman reads, and others beside them, and writes a service for each:

    web.container    web.service           `wherry run` with what [Container] asks for, in the foreground: systemd sees
                                           its output and its exit code, and Restart= is systemd's
    data.volume      data-volume.service   the volume is there before whoever uses it starts
    back.network     back-network.service  likewise

A key that means nothing here is an error that names it: a container that silently lacks what was asked for is worse
than none.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from wherry.systemd.unitfile import UnitError, UnitFile, quote

# where it is installed; a user's commands bring their daemon with them
_DAEMON = "wherryd.service"
KINDS = ("container", "volume", "network")
# names that podman gives where the file gives none
PREFIX = "systemd-"
# keys of [Container] and the option of `wherry run` that takes each value
OPTIONS: Mapping[str, str] = {
    "AddCapability": "--cap-add",
    "AddDevice": "--device",
    "AddHost": "--add-host",
    "Annotation": "--annotation",
    "DNS": "--dns",
    "DNSOption": "--dns-option",
    "DNSSearch": "--dns-search",
    "DropCapability": "--cap-drop",
    "Entrypoint": "--entrypoint",
    "Environment": "--env",
    "EnvironmentFile": "--env-file",
    "GroupAdd": "--group-add",
    "HealthCmd": "--health-cmd",
    "HealthInterval": "--health-interval",
    "HealthRetries": "--health-retries",
    "HealthStartPeriod": "--health-start-period",
    "HealthTimeout": "--health-timeout",
    "HostName": "--hostname",
    "IP": "--ip",
    "IP6": "--ip6",
    "Label": "--label",
    "LogDriver": "--log-driver",
    "LogOpt": "--log-opt",
    "Memory": "--memory",
    "NetworkAlias": "--network-alias",
    "PidsLimit": "--pids-limit",
    "PublishPort": "--publish",
    "Pull": "--pull",
    "ShmSize": "--shm-size",
    "StopSignal": "--stop-signal",
    "StopTimeout": "--stop-timeout",
    "Sysctl": "--sysctl",
    "Tmpfs": "--tmpfs",
    "Ulimit": "--ulimit",
    "UserNS": "--userns",
    "WorkingDir": "--workdir",
}
# several values in one line, separated as words
_WORDS = {"AddCapability", "Annotation", "DropCapability", "Environment", "Label", "Sysctl"}
FLAGS: Mapping[str, str] = {"ReadOnly": "--read-only", "RunInit": "--init"}
# read otherwise, below
_OTHERS = {
    "ContainerName", "Exec", "GlobalArgs", "Group", "Image", "Mount", "Network", "NoNewPrivileges", "PodmanArgs",
    "SeccompProfile", "AppArmor", "SecurityLabelDisable", "ServiceName", "User", "Volume",
    "WherryArgs",
}  # fmt: skip
# what podman does with it changes nothing here, or is Wherry's default
_IDLE = {"AutoUpdate", "Notify", "Timezone", "ReloadCmd", "ReloadSignal", "StartWithPod", "VolatileTmp"}
_VOLUME_KEYS = {"VolumeName", "Label", "Driver", "Options", "Device", "Type", "ServiceName", "PodmanArgs", "GlobalArgs"}
_NETWORK_OPTIONS: Mapping[str, str] = {
    "Driver": "--driver",
    "Gateway": "--gateway",
    "IPRange": "--ip-range",
    "Label": "--label",
    "Options": "--opt",
    "Subnet": "--subnet",
}
_NETWORK_KEYS = {
    *_NETWORK_OPTIONS, "NetworkName", "Internal", "IPv6", "ServiceName", "PodmanArgs", "GlobalArgs",
}  # fmt: skip


def folders(*, user: bool, environment: Mapping[str, str]) -> list[str]:
    """Where the files are, the first one wins: Wherry's own folder before podman's, both in the order of podman's."""
    if named := environment.get("QUADLET_UNIT_DIRS"):
        return named.split(":")
    if user:
        config = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        uid = str(os.getuid())
        return [
            *(os.path.join(config, name, "systemd") for name in ("wherry", "containers")),
            *(f"/etc/{name}/systemd/users/{uid}" for name in ("wherry", "containers")),
            *(f"/etc/{name}/systemd/users" for name in ("wherry", "containers")),
        ]
    return [f"{base}/{name}/systemd" for base in ("/etc", "/usr/share") for name in ("wherry", "containers")]


def find(places: Iterable[str]) -> dict[str, str]:
    """The files by their name; of two with one name the first."""
    found: dict[str, str] = {}
    for place in places:
        for folder, _, names in sorted(os.walk(place)):
            for name in sorted(names):
                if name.rpartition(".")[2] in KINDS:
                    found.setdefault(name, os.path.join(folder, name))
    return found


def load(path: str) -> UnitFile:
    """A file with its drop-ins (`web.container.d/*.conf`). Raises UnitError, OSError."""
    text = _read(path)
    drop_ins = f"{path}.d"
    if os.path.isdir(drop_ins):
        for name in sorted(os.listdir(drop_ins)):
            if name.endswith(".conf"):
                text += "\n" + _read(os.path.join(drop_ins, name))
    return UnitFile.parse(text)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def service_name(name: str, unit: UnitFile) -> str:
    """`web.container` is `web.service`, `data.volume` is `data-volume.service`; `ServiceName=` says otherwise."""
    stem, _, kind = name.rpartition(".")
    own = unit.last(kind.capitalize(), "ServiceName")
    return f"{own or (stem if kind == 'container' else f'{stem}-{kind}')}.service"


def resource_name(name: str, unit: UnitFile) -> str:
    """What the container, volume or network is called."""
    stem, _, kind = name.rpartition(".")
    own = unit.last(kind.capitalize(), f"{kind.capitalize()}Name")
    return own or PREFIX + stem


def convert(name: str, source: str, units: Mapping[str, UnitFile], wherry: str) -> UnitFile:
    """The service for the file `name` of `units`, all files of this run. Raises UnitError.

    `wherry` is the command's path, `source` the file's.
    """
    kind = name.rpartition(".")[2]
    unit = units[name]
    section = kind.capitalize()
    if section not in unit.sections:
        raise UnitError(f"no section [{section}]")
    service = UnitFile()
    service.sections = {key: list(values) for key, values in unit.sections.items()}
    service.rename(section, f"X-{section}")
    service.put_first("Unit", "SourcePath", source)
    service.sections = {"Unit": service.sections.pop("Unit"), **service.sections}
    {"container": _container, "volume": _volume, "network": _network}[kind](name, unit, units, service, [wherry])
    return service


def _known(unit: UnitFile, section: str, known: Iterable[str]) -> None:
    strange = [key for key in unit.keys(section) if key not in set(known)]
    if strange:
        raise UnitError(f"[{section}] {', '.join(strange)}: not supported")


def _container(
    name: str, unit: UnitFile, units: Mapping[str, UnitFile], service: UnitFile, wherry: Sequence[str]
) -> None:
    section = "Container"
    _known(unit, section, [*OPTIONS, *FLAGS, *_OTHERS, *_IDLE])
    image = unit.last(section, "Image")
    if not image:
        raise UnitError("[Container] Image= is missing")
    container = resource_name(name, unit)
    words = [*wherry, *unit.words(section, "GlobalArgs"), "run", "--name", container, "--rm", "--log-driver", "none"]
    for key, option in OPTIONS.items():
        values = unit.words(section, key) if key in _WORDS else unit.all(section, key)
        words += [word for value in values for word in (option, value)]
    words += [option for key, option in FLAGS.items() if unit.flag(section, key)]
    words += _user(unit) + _security(unit) + _mounts(unit, units, service) + _networks(unit, units, service)
    words += [
        *unit.words(section, "PodmanArgs"),
        *unit.words(section, "WherryArgs"),
        image,
        *unit.words(section, "Exec"),
    ]
    remove = " ".join(map(quote, [*wherry, "rm", "--force", "--volumes", container]))
    for key, value in (
        ("Type", "exec"),
        ("KillMode", "mixed"),
        ("SyslogIdentifier", "%N"),
        # what an interrupted run left; a container of that name that isn't there is no error
        ("ExecStartPre", f"-{remove}"),
        ("ExecStart", " ".join(map(quote, words))),
        # an init without a handler doesn't hear the SIGTERM that is passed on: this kills it after its own time limit
        ("ExecStop", "-" + " ".join(map(quote, [*wherry, "stop", container]))),
        ("ExecStopPost", f"-{remove}"),
    ):
        _default(service, unit, key, value)
    for needed in ("network-online.target", _DAEMON):
        service.add("Unit", "Wants", needed)
        service.add("Unit", "After", needed)


def _default(service: UnitFile, unit: UnitFile, key: str, value: str) -> None:
    """What the file itself says of [Service] wins, save the commands."""
    if key.startswith("Exec") or not unit.all("Service", key):
        service.add("Service", key, value)


def _user(unit: UnitFile) -> list[str]:
    user, group = unit.last("Container", "User"), unit.last("Container", "Group")
    if group and not user:
        raise UnitError("[Container] Group= needs User=")
    return ["--user", f"{user}:{group}" if group else user] if user else []


def _security(unit: UnitFile) -> list[str]:
    options = []
    if unit.flag("Container", "NoNewPrivileges"):
        options.append("no-new-privileges")
    if profile := unit.last("Container", "SeccompProfile"):
        options.append(f"seccomp={profile}")
    if profile := unit.last("Container", "AppArmor"):
        options.append(f"apparmor={profile}")
    if unit.flag("Container", "SecurityLabelDisable"):
        options.append("label=disable")
    return [word for option in options for word in ("--security-opt", option)]


def _mounts(unit: UnitFile, units: Mapping[str, UnitFile], service: UnitFile) -> list[str]:
    words = []
    for value in unit.all("Container", "Volume"):
        source, colon, rest = value.partition(":")
        words += ["--volume", _resource(source, "volume", units, service) + colon + rest if colon else value]
    for value in unit.all("Container", "Mount"):
        parts = []
        for part in value.split(","):
            key, equals, content = part.partition("=")
            if key in {"source", "src"}:
                content = _resource(content, "volume", units, service)
            parts.append(key + equals + content)
        words += ["--mount", ",".join(parts)]
    return words


def _networks(unit: UnitFile, units: Mapping[str, UnitFile], service: UnitFile) -> list[str]:
    words = []
    for value in unit.all("Container", "Network"):
        network, colon, rest = value.partition(":")
        words += ["--network", _resource(network, "network", units, service) + colon + rest]
    return words


def _resource(name: str, kind: str, units: Mapping[str, UnitFile], service: UnitFile) -> str:
    """A volume or network; one that a file describes gets its name from there, and is there first."""
    if not name.endswith(f".{kind}"):
        # a path relative to the file (./data) is systemd's business: %h and others are left as they are
        return name
    if name not in units:
        raise UnitError(f"{name}: there is no such file")
    needed = service_name(name, units[name])
    for key in ("Requires", "After"):
        service.add("Unit", key, needed)
    return resource_name(name, units[name])


def _volume(name: str, unit: UnitFile, units: Mapping[str, UnitFile], service: UnitFile, wherry: Sequence[str]) -> None:
    del units
    _known(unit, "Volume", _VOLUME_KEYS)
    volume = resource_name(name, unit)
    words = [*wherry, *unit.words("Volume", "GlobalArgs"), "volume", "create"]
    for value in unit.words("Volume", "Label"):
        words += ["--label", value]
    if driver := unit.last("Volume", "Driver"):
        words += ["--driver", driver]
    for key, option in (("Type", "type"), ("Device", "device"), ("Options", "o")):
        if value := unit.last("Volume", key):
            words += ["--opt", f"{option}={value}"]
    _once(service, unit, [*words, *unit.words("Volume", "PodmanArgs"), volume], [*wherry, "volume", "inspect", volume])


def _network(
    name: str, unit: UnitFile, units: Mapping[str, UnitFile], service: UnitFile, wherry: Sequence[str]
) -> None:
    del units
    _known(unit, "Network", _NETWORK_KEYS)
    network = resource_name(name, unit)
    words = [*wherry, *unit.words("Network", "GlobalArgs"), "network", "create"]
    for key, option in _NETWORK_OPTIONS.items():
        for value in unit.words("Network", key) if key == "Label" else unit.all("Network", key):
            words += [option, value]
    if unit.flag("Network", "Internal"):
        words.append("--internal")
    if unit.flag("Network", "IPv6"):
        words.append("--ipv6")
    words += [*unit.words("Network", "PodmanArgs"), network]
    _once(service, unit, words, [*wherry, "network", "inspect", network])


def _once(service: UnitFile, unit: UnitFile, create: Sequence[str], inspect: Sequence[str]) -> None:
    """A service that makes something that stays; where it is there already, nothing is done."""
    service.add("Unit", "Wants", _DAEMON)
    service.add("Unit", "After", _DAEMON)
    for key, value in (
        ("Type", "oneshot"),
        ("RemainAfterExit", "yes"),
        ("SyslogIdentifier", "%N"),
        ("ExecStart", f"/bin/sh -c '{_shell(inspect)} >/dev/null 2>&1 || exec {_shell(create)}'"),
    ):
        _default(service, unit, key, value)


def _shell(words: Sequence[str]) -> str:
    """A command inside of single quotes of a unit; what can't stand there is refused."""
    text = " ".join(shlex.quote(word) for word in words)
    if "'" in text:
        raise UnitError(f"{text}: quotes can't be used here")
    return text.replace("$", "$$")


def install_links(service: UnitFile, name: str, target: str) -> Iterable[tuple[str, str]]:
    """Links for [Install] (a generator's units can't be enabled): pairs of link and what it points to."""
    for key, suffix in (("WantedBy", "wants"), ("RequiredBy", "requires"), ("UpheldBy", "upholds")):
        for wanted in service.words("Install", key):
            yield os.path.join(target, f"{wanted}.{suffix}", name), f"../{name}"
    for alias in service.words("Install", "Alias"):
        yield os.path.join(target, alias), name


def generate(
    target: str, places: Iterable[str], wherry: str, report: Callable[[str], None], *, dry_run: bool = False
) -> int:
    """Write the services into `target`; the number of files that were wrong. With `dry_run` they are printed."""
    found, failures = find(places), 0
    units: dict[str, UnitFile] = {}
    for name, path in found.items():
        try:
            units[name] = load(path)
        except (UnitError, OSError) as error:
            failures += 1
            report(f"{path}: {error}")
    for name, unit in units.items():
        try:
            service = convert(name, found[name], units, wherry)
        except UnitError as error:
            failures += 1
            report(f"{found[name]}: {error}")
            continue
        out = service_name(name, unit)
        if dry_run:
            sys.stdout.write(f"---{out}---\n{service.text()}\n")
            continue
        _write(target, out, service)
    return failures


def _write(target: str, name: str, service: UnitFile) -> None:
    with open(os.path.join(target, name), "w", encoding="utf-8") as file:
        file.write(f"# made by wherry's generator; do not edit\n{service.text()}")
    for link, points_to in install_links(service, name, target):
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            os.symlink(points_to, link)


def main(argv: Sequence[str]) -> int:
    """As systemd calls it: with three folders for units of different rank, of which we use the first.

    `--dryrun` prints the services, `--user` reads a user's files.
    """
    words = [word for word in argv if not word.startswith("-")]
    dry_run = bool({"--dryrun", "-dryrun", "--dry-run"} & set(argv))
    user = bool({"--user", "-user"} & set(argv)) or os.path.basename(sys.argv[0]) == "wherry-user-generator"
    if not words and not dry_run:
        sys.stderr.write("usage: wherry-system-generator [--user] [--dryrun] NORMAL [EARLY LATE]\n")
        return 2
    wherry = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "wherry")

    def report(text: str) -> None:
        # a generator's messages go to the kernel's log where they are written; there is no journal yet
        sys.stderr.write(f"wherry generator: {text}\n")

    places = folders(user=user, environment=os.environ)
    failures = generate(words[0] if words else "", places, wherry, report, dry_run=dry_run)
    return 1 if failures and dry_run else 0
