"""The configuration: containerd's TOML schema (versions 2 and 3) as frozen dataclasses.

A file sets what differs from the defaults; the command line's flags win over it. What has a wrong type is an error that
names the file and the key; what nobody here knows is kept out and reported as a warning with its path, so that a file
written for containerd loads. `imports` are globs, relative to the file; what they set wins over the file.

Beside containerd's tables there are ours:

    [events]
      keep_for = "168h"                           # for how long subscribers may go on where they stopped; "0": for ever
      keep_count = 100000                         # and over how many events at most; 0: any number

    [network]
      pools = ["10.210.0.0/16/22"]                # subnets for networks that name none: /22 ones out of this one
      subnet = ""                                 # of the built-in network; empty: out of the pools
      bridge = ""                                 # its interface; empty: wherry0 (another state folder: wherry-…)
      ipv6 = false                                # whether it has IPv6
      cni_conf_dir = "/etc/cni/net.d"             # conflists: networks by CNI
      cni_bin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]

    [runtimes."io.containerd.runc.v2"]       # the name that a container gives as its runtime
      shim = "/usr/bin/containerd-shim-runc-v2"   # absolute path or a name on PATH; empty: Wherry's own shim
      binary = "/usr/sbin/runc"                   # OCI runtime for it, where the container names none
      root = "/run/runc"                          # that runtime's --root
      systemd_cgroup = false
      runtime_type = ""                           # instead of `shim`: the runtime's name that says which shim it is
      config_path = ""                            # for shims that read a file (gVisor, Kata)
      pod_annotations = []                        # globs of the pod's annotations that its containers get
      container_annotations = []                  # globs of a container's annotations that its spec gets
      [runtimes."io.containerd.runc.v2".options]  # all options, by containerd's names (BinaryName, ConfigPath, …)
"""

from __future__ import annotations

import dataclasses
import glob
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wherry.core import platforms
from wherry.core.errors import InvalidArgument, NotFound
from wherry.daemon.durations import parse_duration

if TYPE_CHECKING:
    from wherry.cri.settings import Settings

DEFAULT_PATH = "/etc/wherry/config.toml"
DEFAULT_ADDRESS = "/run/wherry/wherryd.sock"
DEFAULT_ROOT = "/var/lib/wherry"
DEFAULT_STATE = "/run/wherry"
NEWEST_VERSION = 3
LEVELS = ("trace", "debug", "info", "warn", "error", "fatal", "panic")
_MESSAGE_SIZE = 16 << 20  # bytes; containerd's default

# tables and keys of containerd's schema that Wherry has no use for: taken, with a warning where they ask for something
_IDLE = frozenset({"plugin_dir", "temp", "cgroup", "stream_processors"})
# what a key that is read and changes nothing carries: set to another value than containerd's default, it is warned of
_NO_EFFECT = types.MappingProxyType({"no effect": True})
# the deadlines that are heeded (daemon/link.py), and containerd's defaults of those that are not
TIMEOUTS = (
    *(f"io.containerd.timeout.{name}" for name in ("shim.load", "shim.cleanup", "shim.shutdown", "task.state")),
    *(f"io.wherry.timeout.task.{name}" for name in ("call", "create")),
)
_IDLE_TIMEOUTS = {"io.containerd.timeout.bolt.open": "0s", "io.containerd.timeout.metrics.shimstats": "2s"}
# plugins whose tables are read here, by URI; the other plugins' tables are reported as unknown
_PLUGIN_FIELDS: Mapping[str, str] = {
    "io.containerd.gc.v1.scheduler": "gc",
    "io.containerd.snapshotter.v1.overlayfs": "overlayfs",
    "io.containerd.snapshotter.v1.native": "native",
    "io.containerd.runtime.v2.task": "runtime",
    "io.containerd.transfer.v1.local": "transfer",
    "io.containerd.metadata.v1.bolt": "metadata",
    "io.containerd.service.v1.diff-service": "diff",
    "io.containerd.differ.v1.walking": "walking",
    # of the CRI, which has dataclasses of its own (wherry.cri.settings): loaded only where there is something to read
    "io.containerd.grpc.v1.cri": "cri",
    "io.containerd.cri.v1.runtime": "cri_runtime",
    "io.containerd.cri.v1.images": "cri_images",
}
_PLUGIN_URIS: Mapping[str, str] = {name: uri for uri, name in _PLUGIN_FIELDS.items()}


@dataclass(frozen=True)
class Grpc:
    """`[grpc]`: the socket that clients use; sizes in bytes of one message. TCP is not served."""

    address: str = DEFAULT_ADDRESS
    uid: int = 0
    gid: int = 0
    max_recv_message_size: int = _MESSAGE_SIZE
    max_send_message_size: int = _MESSAGE_SIZE
    tcp_address: str = field(default="", metadata=_NO_EFFECT)
    tcp_tls_ca: str = field(default="", metadata=_NO_EFFECT)
    tcp_tls_cert: str = field(default="", metadata=_NO_EFFECT)
    tcp_tls_key: str = field(default="", metadata=_NO_EFFECT)
    tcp_tls_common_name: str = field(default="", metadata=_NO_EFFECT)


@dataclass(frozen=True)
class Ttrpc:
    """`[ttrpc]`: the socket of shims and of the command line; empty: the gRPC address + ".ttrpc"."""

    address: str = ""
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Debug:
    """`[debug]`: `level` is one of LEVELS, `format` "text" or "json", empty: text on a terminal, JSON elsewhere."""

    address: str = field(default="", metadata=_NO_EFFECT)
    uid: int = field(default=0, metadata=_NO_EFFECT)
    gid: int = field(default=0, metadata=_NO_EFFECT)
    level: str = ""
    format: str = ""


@dataclass(frozen=True)
class Metrics:
    """`[metrics]`: `address` is `HOST:PORT` for Prometheus, empty: nothing is served (see daemon/metrics.py)."""

    address: str = ""
    grpc_histogram: bool = False


@dataclass(frozen=True)
class Gc:
    """`io.containerd.gc.v1.scheduler`: delays are durations such as "100ms"."""

    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    schedule_delay: str = "0s"
    startup_delay: str = "100ms"


@dataclass(frozen=True)
class Snapshotter:
    """`io.containerd.snapshotter.v1.*`: `root_path` empty: in the daemon's root."""

    root_path: str = ""


@dataclass(frozen=True)
class Overlayfs(Snapshotter):
    """`io.containerd.snapshotter.v1.overlayfs`: `mount_options` are added to each mount; `sync_remove`: a snapshot's
    files are gone when its removal is answered; `slow_chown`: no idmapped mounts, clients change owners themselves."""

    upperdir_label: bool = False
    sync_remove: bool = False
    slow_chown: bool = False
    mount_options: Sequence[str] = ()


@dataclass(frozen=True)
class Runtime:
    """`io.containerd.runtime.v2.task`: containers are of the host's platform, whatever `platforms` says."""

    platforms: Sequence[str] = field(default=(), metadata=_NO_EFFECT)
    sched_core: bool = field(default=False, metadata=_NO_EFFECT)


@dataclass(frozen=True)
class Transfer:
    """`io.containerd.transfer.v1.local`: `config_path` is a folder as docker's and containerd's `certs.d`.

    `concurrent_layer_fetch_buffer`, from 512 (bytes) on, has larger layers fetched in pieces of that size, four at
    once; below, layers that come slowly are.
    """

    max_concurrent_downloads: int = 3
    max_concurrent_uploaded_layers: int = 3
    config_path: str = ""
    check_platform_supported: bool = field(default=False, metadata=_NO_EFFECT)
    concurrent_layer_fetch_buffer: int = 0
    max_concurrent_unpacks: int = field(default=1, metadata=_NO_EFFECT)
    unpack_config: Sequence[Mapping[str, Any]] = field(default=(), metadata=_NO_EFFECT)


@dataclass(frozen=True)
class MetadataPolicy:
    """`io.containerd.metadata.v1.bolt`: `content_sharing_policy` "shared" or "isolated" (see daemon/content.py)."""

    content_sharing_policy: str = "shared"


@dataclass(frozen=True)
class Diff:
    """`io.containerd.service.v1.diff-service`: `sync_fs` syncs each layer, whether its request asks for it or not."""

    default: Sequence[str] = field(default=("walking",), metadata=_NO_EFFECT)
    sync_fs: bool = False


@dataclass(frozen=True)
class Walking:
    """`io.containerd.differ.v1.walking`: `sync_fs` as of the diff service."""

    sync_fs: bool = False


@dataclass(frozen=True)
class ProxyPlugin:
    """`[proxy_plugins.NAME]`: somebody else's service on a socket; `type` is snapshot, content, sandbox or diff."""

    type: str = ""
    address: str = ""
    platform: str = ""
    exports: Mapping[str, str] = field(default_factory=dict)
    capabilities: Sequence[str] = ()


@dataclass(frozen=True)
class Limits:
    """`[limits]`, a table of ours: what an image may be; 0: no limit.

    `layer_bytes` and `layer_entries` are those of one layer's archive, uncompressed; `image_layers` are as many as the
    kernel lays over each other (fs/overlayfs, OVL_MAX_STACK). `image_parts` are all manifests, configurations and
    layers of an image for all platforms together, `document_bytes` is the size of a manifest or a configuration.
    """

    layer_bytes: int = 100 << 30
    layer_entries: int = 5_000_000
    image_layers: int = 500
    image_parts: int = 20_000
    document_bytes: int = 8 << 20


@dataclass(frozen=True)
class RuntimeHandler:
    """`[runtimes.NAME]`: see the module's text."""

    shim: str = ""
    binary: str = ""
    root: str = ""
    systemd_cgroup: bool = False
    runtime_type: str = ""
    config_path: str = ""
    pod_annotations: Sequence[str] = ()
    container_annotations: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Events:
    """`[events]`: how long (a duration) and how many events are kept; "0" and 0: no such limit."""

    keep_for: str = "168h"
    keep_count: int = 100_000


@dataclass(frozen=True)
class NetworkOptions:
    """`[network]`, a table of ours: the built-in networks, and where CNI's are.

    `pools` are POOL/LENGTH: networks that name no subnet get one of that prefix length out of the first with room.
    `subnet`, `bridge` (the interface's name) and `ipv6` are the built-in network's; they hold when it is made.
    """

    pools: Sequence[str] = ("10.210.0.0/16/22", "172.30.0.0/15/22", "192.168.192.0/18/24")
    subnet: str = ""
    bridge: str = ""
    ipv6: bool = False
    cni_conf_dir: str = "/etc/cni/net.d"
    cni_bin_dirs: Sequence[str] = ("/opt/cni/bin", "/usr/lib/cni")


@dataclass(frozen=True)
class Config:
    """All of it. `warnings` says what in the files was not understood; `files` which files were read."""

    version: int = NEWEST_VERSION
    root: str = DEFAULT_ROOT
    state: str = DEFAULT_STATE
    imports: Sequence[str] = ()
    disabled_plugins: Sequence[str] = ()
    required_plugins: Sequence[str] = ()
    oom_score: int = 0  # the daemon's oom_score_adj where it isn't 0; shims have one more
    grpc: Grpc = Grpc()
    ttrpc: Ttrpc = Ttrpc()
    debug: Debug = Debug()
    metrics: Metrics = Metrics()
    timeouts: Mapping[str, str] = field(default_factory=dict)
    proxy_plugins: Mapping[str, ProxyPlugin] = field(default_factory=dict)
    limits: Limits = Limits()
    runtimes: Mapping[str, RuntimeHandler] = field(default_factory=dict)
    events: Events = Events()
    network: NetworkOptions = NetworkOptions()
    gc: Gc = field(default=Gc(), metadata={"plugin": True})
    overlayfs: Overlayfs = field(default=Overlayfs(), metadata={"plugin": True})
    native: Snapshotter = field(default=Snapshotter(), metadata={"plugin": True})
    runtime: Runtime = field(default=Runtime(), metadata={"plugin": True})
    transfer: Transfer = field(default=Transfer(), metadata={"plugin": True})
    metadata: MetadataPolicy = field(default=MetadataPolicy(), metadata={"plugin": True})
    diff: Diff = field(default=Diff(), metadata={"plugin": True})
    walking: Walking = field(default=Walking(), metadata={"plugin": True})
    cri: Mapping[str, Any] = field(default_factory=dict, metadata={"plugin": True})
    cri_runtime: Mapping[str, Any] = field(default_factory=dict, metadata={"plugin": True})
    cri_images: Mapping[str, Any] = field(default_factory=dict, metadata={"plugin": True})
    warnings: Sequence[str] = field(default=(), metadata={"internal": True})
    files: Sequence[str] = field(default=(), metadata={"internal": True})

    @property
    def ttrpc_address(self) -> str:
        """Where ttrpc is served."""
        return self.ttrpc.address or f"{self.grpc.address}.ttrpc"

    def timeout(self, name: str, default: float) -> float:
        """A timeout of the table `[timeouts]` in seconds, by its full name (`io.containerd.timeout.task.state`)."""
        text = self.timeouts.get(name)
        return default if text is None else parse_duration(text)

    def cri_settings(self) -> Settings:
        """What the CRI's tables say, of both versions of the schema."""
        return _Reader().cri(self, self.files[0] if self.files else "")

    def transfers(self) -> Transfer:
        """The transfer service's options; what only the CRI's tables say of pulls holds for all of them."""
        for table in (self.cri, self.cri_images):
            number = table.get("max_concurrent_downloads")
            if isinstance(number, int) and self.transfer.max_concurrent_downloads == Transfer.max_concurrent_downloads:
                return dataclasses.replace(self.transfer, max_concurrent_downloads=number)
        return self.transfer

    @property
    def syncs_layers(self) -> bool:
        """Whether each layer's files are synced, whoever asks for it."""
        pulls = any(table.get("image_pull_with_sync_fs") is True for table in (self.cri, self.cri_images))
        return self.diff.sync_fs or self.walking.sync_fs or pulls

    def as_tables(self) -> dict[str, Any]:
        """The configuration as the tables of a file."""
        tables: dict[str, Any] = {}
        plugins: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            if "internal" in item.metadata:
                continue
            if item.name in ("cri_runtime", "cri_images"):
                continue  # in one table with the other
            value = _as_plain(self.cri_settings() if item.name == "cri" else getattr(self, item.name))
            if "plugin" in item.metadata:
                plugins[_PLUGIN_URIS[item.name]] = value
            else:
                tables[item.name] = value
        return {**tables, "plugins": plugins}


def load(path: str | None) -> Config:
    """Read the configuration file; None: the default one, if it is there.

    Raises NotFound for a file that isn't there, InvalidArgument (with file and key) for what can't be understood.
    """
    if path is None:
        if not os.path.exists(DEFAULT_PATH):
            return Config()
        path = DEFAULT_PATH
    reader = _Reader()
    tables = reader.read(path)
    return reader.config(path, tables)


class _Reader:
    """Reads files and collects warnings. A value's path is kept for the messages."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.files: list[str] = []

    def read(self, path: str) -> dict[str, Any]:
        """The tables of a file with what it imports merged over them."""
        path = os.path.abspath(path)
        if path in self.files:
            return {}  # an import that comes back to where it started
        self.files.append(path)
        try:
            with open(path, "rb") as file:
                tables = tomllib.load(file)
        except FileNotFoundError:
            raise NotFound(f"config file {path}: not found") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"config file {path}: not TOML: {error}") from error
        except OSError as error:
            raise InvalidArgument(f"config file {path}: {error.strerror}") from error
        imports = tables.get("imports", [])
        if not isinstance(imports, list) or not all(isinstance(item, str) for item in imports):
            raise InvalidArgument(f"config file {path}: imports: expected an array of strings")
        for pattern in imports:
            for found in sorted(glob.glob(os.path.join(os.path.dirname(path), pattern))):
                _merge(tables, self.read(found))
        return tables

    def config(self, path: str, tables: dict[str, Any]) -> Config:
        """The dataclasses for the merged tables."""
        version = tables.get("version", 1)
        if not isinstance(version, int) or not 0 <= version <= NEWEST_VERSION:  # dockerd writes 0
            raise InvalidArgument(f"config file {path}: version: expected 2 or {NEWEST_VERSION}, got {version!r}")
        plugins = tables.pop("plugins", {})
        if not isinstance(plugins, dict):
            raise InvalidArgument(f"config file {path}: plugins: expected a table")
        for key in sorted(_IDLE & tables.keys()):
            self._idle(path, key, tables.pop(key))
        for uri, table in plugins.items():
            name = _PLUGIN_FIELDS.get(uri)
            if name is None:
                self.warnings.append(f'{path}: plugins."{uri}": no such plugin here, its settings have no effect')
            else:
                tables[f"\0{name}"] = table  # apart from a top-level table that happens to have the name
        config: Config = self._build(Config, tables, path, "")
        _check(config, path)
        if config.cri or config.cri_runtime or config.cri_images:
            self.cri(config, path)
        for name, proxy in config.proxy_plugins.items():
            if proxy.type != "snapshot":
                self._without_effect(path, f'proxy_plugins."{name}"')
        for name, text in config.timeouts.items():
            if name not in TIMEOUTS and text != _IDLE_TIMEOUTS.get(name):
                self._without_effect(path, f'timeouts."{name}"')
        return dataclasses.replace(config, version=version, warnings=tuple(self.warnings), files=tuple(self.files))

    def cri(self, config: Config, path: str) -> Settings:
        """The CRI's settings, checked as the rest is."""
        from wherry.cri import settings  # noqa: PLC0415 -- see _PLUGIN_FIELDS

        tables = settings.merge(config.cri_images, config.cri_runtime, config.cri)
        at = next((_PLUGIN_URIS[name] for name in ("cri_runtime", "cri_images", "cri") if getattr(config, name)), "")
        made: Settings = self._build(settings.Settings, tables, path, f'plugins."{at}".')
        settings.check(made, f"config file {path}: ")
        return made

    def _build(self, kind: type[Any], table: object, path: str, at: str) -> Any:
        """A dataclass from a table; unknown keys become warnings."""
        if not isinstance(table, dict):
            raise InvalidArgument(f"config file {path}: {at}: expected a table, got {table!r}")
        hints = typing.get_type_hints(kind)
        known: dict[str, Any] = {}
        for item in dataclasses.fields(kind):
            key = f"\0{item.name}" if "plugin" in item.metadata else item.name
            if key in table and "internal" not in item.metadata:
                place = f'plugins."{_PLUGIN_URIS[item.name]}"' if "plugin" in item.metadata else f"{at}{item.name}"
                known[item.name] = self._value(hints[item.name], table[key], path, place)
                del table[key]
                if "no effect" in item.metadata and known[item.name] not in _defaults(item):
                    self._without_effect(path, place)
        for key in table:
            self.warnings.append(f"{path}: {at}{key}: unknown key, it has no effect")
        return kind(**known)

    def _without_effect(self, path: str, at: str) -> None:
        self.warnings.append(f"{path}: {at}: it has no effect here")

    def _idle(self, path: str, at: str, value: object) -> None:
        """Warn of every key below that asks for something; decryption is in containerd's own default, and in vain."""
        if isinstance(value, dict):
            for key, item in value.items():
                if at != "stream_processors" or not key.startswith("io.containerd.ocicrypt."):
                    self._idle(path, f"{at}.{key}", item)
        elif value:
            self._without_effect(path, at)

    def _value(self, kind: Any, value: object, path: str, at: str) -> Any:
        """A value of the declared type, or InvalidArgument that says which was expected."""
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            return self._build(typing.cast(type[Any], kind), value, path, f"{at}.")
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(value, dict):
                raise InvalidArgument(f"config file {path}: {at}: expected a table, got {value!r}")
            return {key: self._value(inner[1], item, path, f'{at}."{key}"') for key, item in value.items()}
        if origin is not None and issubclass(origin, Sequence):
            if not isinstance(value, list):
                raise InvalidArgument(f"config file {path}: {at}: expected an array, got {value!r}")
            return tuple(self._value(inner[0], item, path, f"{at}[{index}]") for index, item in enumerate(value))
        if kind is Any:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidArgument(f"config file {path}: {at}: expected {_KINDS[kind]}, got {value!r}")
        return value


def _defaults(item: dataclasses.Field[Any]) -> Sequence[object]:
    """The values of a field without effect that ask for nothing."""
    default = item.default if item.default is not dataclasses.MISSING else {}
    # what containerd writes there by itself
    return (default, (str(platforms.host()),)) if item.name == "platforms" else (default,)


_KINDS: Mapping[type, str] = types.MappingProxyType(
    {str: "a string", int: "an integer", bool: "true or false", float: "a number"}
)


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Set what the other has; tables are merged, the lists of plugins appended, as containerd merges imports."""
    for key, value in other.items():
        mine = into.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value)
        elif isinstance(mine, list) and isinstance(value, list) and key in ("disabled_plugins", "required_plugins"):
            into[key] = [*mine, *(item for item in value if item not in mine)]
        elif key != "imports":
            into[key] = value


def _check(config: Config, path: str) -> None:
    """What the types don't say."""
    if config.debug.level and config.debug.level not in LEVELS:
        raise InvalidArgument(f"config file {path}: debug.level: expected one of {', '.join(LEVELS)}")
    if not -1000 <= config.oom_score <= 1000:
        raise InvalidArgument(f"config file {path}: oom_score: expected a number from -1000 to 1000")
    if config.debug.format not in ("", "text", "json"):
        raise InvalidArgument(f'config file {path}: debug.format: expected "text" or "json"')
    if config.metadata.content_sharing_policy not in ("shared", "isolated"):
        at = f'plugins."{_PLUGIN_URIS["metadata"]}".content_sharing_policy'
        raise InvalidArgument(f'config file {path}: {at}: expected "shared" or "isolated"')
    _check_proxies(config, path)
    for name, number in dataclasses.asdict(config.limits).items():
        if number < 0:
            raise InvalidArgument(f"config file {path}: limits.{name}: expected a number from 0 on")
    durations = {f'timeouts."{name}"': text for name, text in config.timeouts.items()}
    scheduler = f'plugins."{_PLUGIN_URIS["gc"]}"'
    durations[f"{scheduler}.schedule_delay"] = config.gc.schedule_delay
    durations[f"{scheduler}.startup_delay"] = config.gc.startup_delay
    durations["events.keep_for"] = config.events.keep_for
    if config.events.keep_count < 0:
        raise InvalidArgument(f"config file {path}: events.keep_count: expected a number of events, 0 for any")
    for at, text in durations.items():
        try:
            parse_duration(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"config file {path}: {at}: {error.message}") from error


def _check_proxies(config: Config, path: str) -> None:
    for name, proxy in config.proxy_plugins.items():
        at = f'config file {path}: proxy_plugins."{name}"'
        if proxy.type not in ("snapshot", "content", "sandbox", "diff"):
            raise InvalidArgument(f'{at}.type: expected "snapshot", "content", "sandbox" or "diff"')
        if not proxy.address.removeprefix("unix://").startswith("/"):
            raise InvalidArgument(f"{at}.address: expected the absolute path of a socket")
        if proxy.platform:
            try:
                platforms.parse(proxy.platform)
            except InvalidArgument as error:
                raise InvalidArgument(f"{at}.platform: {error.message}") from error


def _as_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, sequences as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _as_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    return value
