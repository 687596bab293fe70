"""Platforms: what an image was built for, what a host runs, and which of an index's manifests fits best.

The rules (specifiers `os[(version+feature)]/arch/variant`, names that mean the same, what runs what) are those of the
containerd project's `platforms` package, so that the same specifier picks the same image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote
from wherry.core.tuples import NamedTuple

# compiled when they are used: commands do without
_COMPONENT = r"[A-Za-z0-9_.-]+"
_OS = r"([A-Za-z0-9_-]+)(?:\(([A-Za-z0-9_.%-]*)((?:\+[A-Za-z0-9_.%-]+)*)\))?"
_SYSTEM_NAMES = """
    aix android darwin dragonfly freebsd hurd illumos ios js linux nacl netbsd openbsd plan9 solaris windows zos
"""
_ARCHITECTURE_NAMES = """
    386 amd64 amd64p32 arm armbe arm64 arm64be ppc64 ppc64le loong64 mips mipsle mips64 mips64le mips64p32 mips64p32le
    ppc riscv riscv64 s390 s390x sparc sparc64 wasm
"""
_SYSTEMS = frozenset(_SYSTEM_NAMES.split())
_ARCHITECTURES = frozenset(_ARCHITECTURE_NAMES.split())


class Platform(NamedTuple):
    """A platform in the spelling of GOOS and GOARCH; "" where a part isn't given."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: object, where: str = "platform") -> Platform:
        """Read OCI's JSON object; also an image configuration has these keys at its top. Raises InvalidArgument."""
        if not isinstance(value, dict):
            raise InvalidArgument(f"{where}: not an object: invalid argument")
        features = value.get("os.features") or ()
        return cls(
            os=str(value.get("os") or ""),
            architecture=str(value.get("architecture") or ""),
            variant=str(value.get("variant") or ""),
            os_version=str(value.get("os.version") or ""),
            os_features=tuple(str(item) for item in features) if isinstance(features, list) else (),
        )

    def to_json(self) -> dict[str, Any]:
        """OCI's JSON object."""
        out: dict[str, Any] = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            out["os.version"] = self.os_version
        if self.os_features:
            out["os.features"] = list(self.os_features)
        if self.variant:
            out["variant"] = self.variant
        return out

    def __str__(self) -> str:
        if not self.os:
            return "unknown"
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def normalize(platform: Platform) -> Platform:
    """The same platform under its usual names (`x86_64` is `amd64`, `aarch64` is `arm64` without a variant)."""
    architecture, variant = _normalize_architecture(platform.architecture, platform.variant)
    return platform._replace(
        os=_normalize_os(platform.os),
        architecture=architecture,
        variant=variant,
        os_features=tuple(sorted(set(platform.os_features))),
    )


def parse(specifier: str) -> Platform:
    """Read a specifier; what it leaves out is taken from the host. Raises InvalidArgument."""
    if "*" in specifier:
        raise InvalidArgument(f"{quote(specifier)}: wildcards not yet supported: invalid argument")
    # loaded late: the command line reads platforms, and must start fast
    from urllib.parse import unquote  # noqa: PLC0415

    parts = specifier.split("/", 3)
    match = re.fullmatch(_OS, parts[0])
    if match is None:
        raise InvalidArgument(
            f"{quote(parts[0])} is an invalid OS component of {quote(specifier)}: "
            f'OSAndVersion specifier component must match "^{_OS}$": invalid argument'
        )
    for part in parts[1:]:
        if not re.fullmatch(_COMPONENT, part):
            raise InvalidArgument(
                f"{quote(part)} is an invalid component of {quote(specifier)}: "
                f'platform specifier component must match "^{_COMPONENT}$": invalid argument'
            )
    features = match[3] or ""
    base = Platform(
        os=_normalize_os(match[1]),
        os_version=unquote(match[2] or ""),
        os_features=tuple(unquote(item) for item in features[1:].split("+")) if features else (),
    )
    if len(parts) == 1:
        return _complete(specifier, base)
    if len(parts) > 3:
        raise InvalidArgument(f"{quote(specifier)}: cannot parse platform specifier: invalid argument")
    architecture, variant = _normalize_architecture(parts[1], parts[2] if len(parts) == 3 else "")
    if architecture == "arm" and variant == "v7" and len(parts) == 2:
        variant = ""
    if architecture == "arm64" and not variant and len(parts) == 3:
        variant = "v8"
    return base._replace(architecture=architecture, variant=variant)


def _complete(specifier: str, base: Platform) -> Platform:
    """A specifier of one word: an operating system, or else an architecture."""
    if base.os in _SYSTEMS:
        here = host()
        return base._replace(architecture=here.architecture, variant="" if here.variant == "v7" else here.variant)
    architecture, variant = _normalize_architecture(specifier, "")
    if architecture not in _ARCHITECTURES:
        raise InvalidArgument(f"{quote(specifier)}: unknown operating system or architecture: invalid argument")
    return Platform(os="linux", architecture=architecture, variant="" if variant == "v7" else variant)


@cache
def host() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    variants = {"armv5l": "v5", "armv6l": "v6", "armv7l": "v7", "armv8l": "v8"}
    if machine in variants:
        return Platform("linux", "arm", variants[machine])
    architecture, variant = _normalize_architecture(machine, "")
    return Platform("linux", architecture, variant)


def runs_on(platform: Platform) -> list[Platform]:
    """What a machine of this platform can run, best first (`amd64` also 386, `arm64` also 32-bit arm)."""
    platform = normalize(platform)
    fitting = [platform]
    architecture, variant = platform.architecture, platform.variant
    if architecture == "amd64":
        number = _number(variant)
        fitting += [platform._replace(variant=f"v{n}" if n > 1 else "") for n in range(number - 1, 0, -1)]
        fitting.append(platform._replace(architecture="386", variant=""))
    elif architecture == "arm":
        fitting += [platform._replace(variant=f"v{n}") for n in range(_number(variant or "v7") - 1, 4, -1)]
    elif architecture == "arm64":
        fitting += _arm64(platform, variant or "v8")
        fitting += [platform._replace(architecture="arm", variant=f"v{n}") for n in range(8, 4, -1)]
    return fitting


def _arm64(platform: Platform, variant: str) -> list[Platform]:
    major, _, minor = variant.partition(".")
    high, low = _number(major), int(minor) if minor.isdigit() else 0
    names = []
    if high == 9:
        names += [f"v9.{n}" if n else "v9" for n in range(low - 1, -1, -1)]
        # v9.0 comes from v8.5
        low += 5
        names.append(f"v8.{low}")
    if high in {8, 9}:
        names += [f"v8.{n}" if n else "" for n in range(low - 1, -1, -1)]
    return [platform._replace(variant=name) for name in names]


def matches(wanted: Platform, have: Platform) -> bool:
    """Whether `have` is the very platform `wanted` (after normalizing); its features must all be wanted."""
    first, second = normalize(wanted), normalize(have)
    if (first.os, first.architecture, first.variant) != (second.os, second.architecture, second.variant):
        return False
    return set(second.os_features) <= set(first.os_features)


def ranker(platforms: Sequence[Platform], *, strict: bool = False) -> Callable[[Platform], int | None]:
    """A function that gives a platform its rank among what is wanted: 0 is best, None is unfit.

    With `strict` only the platforms themselves fit, else also what they can run. No platforms: everything has rank 0.
    """
    wanted = [normalize(p) for p in platforms] if strict else [fit for p in platforms for fit in runs_on(p)]

    def rank(platform: Platform) -> int | None:
        if not wanted:
            return 0
        return next((index for index, want in enumerate(wanted) if matches(want, platform)), None)

    return rank


def best(wanted: Platform, offered: Iterable[Platform | None]) -> int | None:
    """The position of the best fit among the platforms offered (first where equal), None where nothing fits."""
    rank = ranker([wanted])
    ranked = [(rank(item), index) for index, item in enumerate(offered) if item is not None]
    fitting = [(value, index) for value, index in ranked if value is not None]
    return min(fitting)[1] if fitting else None


def _number(variant: str) -> int:
    digits = variant.removeprefix("v")
    return int(digits) if digits.isdigit() else 0


def _normalize_os(name: str) -> str:
    name = name.lower() or "linux"
    return "darwin" if name == "macos" else name


_SAME = {
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}


def _normalize_architecture(architecture: str, variant: str) -> tuple[str, str]:
    architecture, variant = architecture.lower(), variant.lower()
    if architecture in _SAME:
        return _SAME[architecture]
    if architecture in {"x86_64", "x86-64", "amd64"}:
        return "amd64", "" if variant == "v1" else variant
    if architecture in {"aarch64", "arm64"}:
        return "arm64", "" if variant in {"8", "v8", "v8.0"} else {"9": "v9", "9.0": "v9", "v9.0": "v9"}.get(
            variant, variant
        )
    if architecture == "arm":
        return "arm", f"v{variant}" if variant in {"5", "6", "7", "8"} else variant or "v7"
    return architecture, variant
