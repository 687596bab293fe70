"""Mounts as people ask for them (`-v`, `--mount`, `--tmpfs`), and what becomes of them in the specification."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wherry.client.finding import is_name
from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.tuples import NamedTuple

PROPAGATIONS = frozenset({"private", "rprivate", "shared", "rshared", "slave", "rslave"})
# options of -v that change nothing here: SELinux labels, and caches of docker on the Mac
_IGNORED = frozenset({"z", "Z", "consistent", "cached", "delegated"})
_FLAGS = frozenset(
    {"noexec", "exec", "nosuid", "suid", "nodev", "dev", "noatime", "relatime", "strictatime", "nodiratime", "sync",
     "async", "bind", "rbind", "remount", "nosymfollow", "idmap"}
)  # fmt: skip
# what docker gives to a tmpfs
TMPFS = ("nosuid", "nodev", "noexec")


class Wish(NamedTuple):
    """One mount. `type` is `bind`, `volume`, `tmpfs`, or another file system's (then `options` are mount(8)'s).

    `source` of a volume is its name, "" for one that nobody named. `make`: a missing folder of a bind is made.
    `copy_up`: a fresh volume gets what the image has at that place.
    """

    type: str
    target: str
    source: str = ""
    read_only: bool = False
    propagation: str = "rprivate"
    options: Sequence[str] = ()
    recursive: bool = True
    make: bool = False
    copy_up: bool = True
    labels: Sequence[str] = ()
    subpath: str = ""


def parse_volume(text: str) -> Wish:
    """`-v [SOURCE:]TARGET[:OPTIONS]`: a path is a bind, a name a volume, a target alone a nameless volume.

    Raises InvalidArgument.
    """
    source, target, options = _split_volume(text)
    target = _target(target, text)
    wish = Wish("volume", target, source)
    if source.startswith(("/", "./", "../", "~/")) or source in {".", ".."}:
        wish = wish._replace(type="bind", source=os.path.abspath(os.path.expanduser(source)), make=True)
    elif source and not is_name(source):
        raise InvalidArgument(
            f"volume {text!r}: {source!r} is neither an absolute path nor a volume's name (letters, digits, _ . -)"
        )
    return _with_options(wish, options, text)


def _split_volume(text: str) -> tuple[str, str, list[str]]:
    parts = text.split(":")
    if len(parts) > 3 or not all(parts[:2]):
        raise InvalidArgument(f"invalid volume {text!r}: expected [SOURCE:]TARGET[:OPTIONS], as in /srv:/data:ro")
    if len(parts) == 1:
        return "", parts[0], []
    if len(parts) == 2 and not parts[1].startswith("/"):
        # TARGET:OPTIONS
        return "", parts[0], parts[1].split(",")
    return parts[0], parts[1], parts[2].split(",") if len(parts) == 3 else []


def _with_options(wish: Wish, options: Iterable[str], text: str) -> Wish:
    extra: list[str] = []
    for option in filter(None, options):
        if option in {"ro", "rw"}:
            wish = wish._replace(read_only=option == "ro")
        elif option == "rro":
            wish = wish._replace(read_only=True)
            extra.append("rro")
        elif option == "nocopy":
            wish = wish._replace(copy_up=False)
        elif option in PROPAGATIONS:
            wish = wish._replace(propagation=option)
        elif option in _FLAGS:
            extra.append(option)
        elif option not in _IGNORED:
            raise InvalidArgument(f"volume {text!r}: unknown option {option!r}")
    if wish.type == "volume" and wish.propagation not in {"rprivate", "private"}:
        raise InvalidArgument(f"volume {text!r}: propagation is for binds")
    return wish._replace(options=tuple(extra))


def parse_tmpfs(text: str) -> Wish:
    """`--tmpfs TARGET[:OPTIONS]`, with mount(8)'s options (`size=64m,mode=1777`)."""
    target, _, options = text.partition(":")
    wish = Wish("tmpfs", _target(target, text))
    given = [option for option in options.split(",") if option]
    return wish._replace(options=tuple(given), read_only="ro" in given)


def parse_mount(text: str) -> Wish:
    """`--mount type=bind,src=/a,dst=/b,readonly`: docker's keys, ctr's `options=rbind:ro`; raises InvalidArgument."""
    import csv  # quotes are for values with commas

    wish = Wish("volume", "")
    for part in next(csv.reader([text]), []):
        key, equals, value = part.partition("=")
        wish = _mount_key(wish, key.strip().lower(), value if equals else None, text)
    if not wish.target:
        raise InvalidArgument(f"mount {text!r} needs a target (dst=/…)")
    if wish.type == "bind":
        if not wish.source:
            raise InvalidArgument(f"mount {text!r} needs a source (src=/…)")
        wish = wish._replace(source=os.path.abspath(os.path.expanduser(wish.source)))
    elif wish.type == "tmpfs" and wish.source:
        wish = wish._replace(source="")
    return wish


def _mount_key(wish: Wish, key: str, value: str | None, text: str) -> Wish:
    if key in {"readonly", "ro", "rw"}:
        yes = value is None or value.lower() in {"1", "true"}
        return wish._replace(read_only=yes != (key == "rw"))
    if key in {"volume-nocopy", "bind-nonrecursive"} and value is None:
        value = "true"
    if value is None:
        raise InvalidArgument(f"invalid mount {text!r}: expected KEY=VALUE, got {key!r}")
    if key in _PLAIN:
        changes: dict[str, Any] = {_PLAIN[key]: value}
        return wish._replace(**changes)
    if key in {"target", "dst", "destination"}:
        return wish._replace(target=_target(value, text))
    if key == "bind-propagation" and value not in PROPAGATIONS:
        raise InvalidArgument(f"mount {text!r}: unknown propagation {value!r}: {', '.join(sorted(PROPAGATIONS))}")
    make = _MOUNT_KEYS.get(key)
    if make is None:
        raise InvalidArgument(f"mount {text!r}: unknown key {key!r}")
    return wish._replace(**make(wish, value))


_PLAIN = {"type": "type", "source": "source", "src": "source", "volume-subpath": "subpath"}


def _true(value: str) -> bool:
    return value.lower() in {"1", "true"}


def _mount_options(wish: Wish, value: str) -> dict[str, Any]:
    # ctr's: mount(8)'s own, between colons
    given = tuple(option for option in value.split(":") if option)
    return {"options": given, "read_only": "ro" in given}


_MOUNT_KEYS: dict[str, Callable[[Wish, str], dict[str, Any]]] = {
    "bind-propagation": lambda wish, value: {"propagation": value},
    "bind-nonrecursive": lambda wish, value: {"recursive": not _true(value)},
    "bind-recursive": lambda wish, value: {"recursive": value != "disabled"},
    "bind-create-src": lambda wish, value: {"make": _true(value)},
    "volume-nocopy": lambda wish, value: {"copy_up": not _true(value)},
    "volume-label": lambda wish, value: {"labels": (*wish.labels, value)},
    "tmpfs-size": lambda wish, value: {"options": (*wish.options, f"size={value}")},
    "tmpfs-mode": lambda wish, value: {"options": (*wish.options, f"mode={value}")},
    "options": _mount_options,
    # nothing here: caches of docker on the Mac, and a driver where there is one
    "consistency": lambda wish, value: {},
    "bind-consistency": lambda wish, value: {},
    "volume-driver": lambda wish, value: {},
}


def _target(path: str, text: str) -> str:
    if not path.startswith("/"):
        raise InvalidArgument(
            f"invalid mount {text!r}: the place in the container must be an absolute path, not {path!r}"
        )
    clean = posixpath.normpath(path)
    if clean == "/":
        raise InvalidArgument(f"invalid mount {text!r}: the container's root can't be mounted over")
    # two leading slashes have a meaning of their own for POSIX, none here
    return "/" + clean.lstrip("/")


def merge(wishes: Iterable[Wish]) -> list[Wish]:
    """One for each target, the later one wins; those above others come first. Raises InvalidArgument for a doubled one.

    As docker has it, two that a person gave for one place are an error.
    """
    found: dict[str, Wish] = {}
    for wish in wishes:
        if wish.target in found:
            raise InvalidArgument(f"two mounts for {wish.target}: there can be one")
        found[wish.target] = wish
    return sorted(found.values(), key=lambda wish: wish.target.count("/"))


def check_source(wish: Wish) -> None:
    """A bind's source is there, or is made where the wish says so. Raises NotFound, InvalidArgument."""
    if wish.type != "bind" or os.path.lexists(wish.source):
        return
    if not wish.make:
        raise NotFound(f"bind source {wish.source} doesn't exist: make it, or use -v, which makes it")
    try:
        os.makedirs(wish.source, mode=0o755, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"can't make the folder {wish.source} to mount: {error.strerror}") from error


def to_spec(wish: Wish, source: str) -> dict[str, Any]:
    """The mount of the specification; `source` is where a volume lies."""
    options = list(wish.options)
    if wish.type == "tmpfs":
        asked = {option.partition("=")[0] for option in options}
        defaults = [option for option in TMPFS if option.removeprefix("no") not in asked and option not in asked]
        mode = [] if "mode" in asked else ["mode=1777"]
        options = [option for option in options if option not in {"dev", "suid", "exec", "rw"}]
        return {
            "destination": wish.target,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": [*defaults, *mode, *options],
        }
    if wish.type not in {"bind", "volume"}:
        return {"destination": wish.target, "type": wish.type, "source": source, "options": options}
    if not {"bind", "rbind"} & set(options):
        options.insert(0, "rbind" if wish.recursive else "bind")
    if wish.read_only and "ro" not in options:
        options.append("ro")
    if not PROPAGATIONS & set(options):
        options.append(wish.propagation)
    return {"destination": wish.target, "type": "bind", "source": source, "options": options}


def shown(wish: Wish, source: str, name: str) -> dict[str, Any]:
    """The mount as `inspect` shows it and the record keeps it; `name` is a volume's."""
    mode = ",".join(wish.options) if wish.type != "tmpfs" else ""
    entry: dict[str, Any] = {"Type": wish.type}
    if wish.type == "volume":
        entry |= {"Name": name, "Driver": "local"}
        if not wish.source:
            entry["Anonymous"] = True
    return {
        **entry,
        "Source": source,
        "Destination": wish.target,
        "Mode": mode,
        "RW": not wish.read_only,
        "Propagation": wish.propagation if wish.type == "bind" else "",
    }


def put(mounts: list[dict[str, Any]], added: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A specification's mounts with others added: those for the same place are replaced, and nothing of a place that
    was replaced is mounted below it but what was added."""
    new = list(added)
    taken = {mount["destination"] for mount in new}
    return [mount for mount in mounts if mount["destination"] not in taken] + new
