"""What the configuration says for the CRI: the tables of containerd's CRI plugin, as dataclasses.

    version 2   [plugins."io.containerd.grpc.v1.cri"]          all of it
    version 3   [plugins."io.containerd.cri.v1.runtime"]       pods and containers
                [plugins."io.containerd.cri.v1.images"]        images
                [plugins."io.containerd.grpc.v1.cri"]          the streaming server

All of these may stand in one file; `merge` makes one `Settings` of them. The daemon's configuration reads the tables
(`wherry.daemon.config`), where the types are checked and unknown keys are reported.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry.core.errors import InvalidArgument

# what a key that is read and changes nothing carries; set to another value than its default, it is warned of
NO_EFFECT: Mapping[str, Any] = types.MappingProxyType({"no effect": True})
DEFAULT_HANDLER = "runc"
UNTRUSTED = "untrusted"


@dataclass(frozen=True)
class Handler:
    """`[containerd.runtimes.NAME]`: a runtime handler, what Kubernetes' RuntimeClass names.

    `runtime_type` is a runtime's name as in `[runtimes]`, `runtime_path` a shim that is used in its place. `options`
    are that runtime's, by containerd's names. `base_runtime_spec` is a file with the OCI specification that a
    container's begins with. `snapshotter` "": the node's. `pod_annotations`, `container_annotations` are globs.
    """

    runtime_type: str = "io.containerd.runc.v2"
    runtime_path: str = ""
    runtime_engine: str = field(default="", metadata=NO_EFFECT)
    runtime_root: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pod_annotations: Sequence[str] = ()
    container_annotations: Sequence[str] = ()
    privileged_without_host_devices: bool = False
    privileged_without_host_devices_all_devices_allowed: bool = False
    base_runtime_spec: str = ""
    cni_conf_dir: str = ""
    cni_max_conf_num: int = 0
    snapshotter: str = ""
    sandboxer: str = field(default="", metadata=NO_EFFECT)
    sandbox_mode: str = field(default="", metadata=NO_EFFECT)
    io_type: str = field(default="", metadata=NO_EFFECT)
    cgroup_writable: bool = False


@dataclass(frozen=True)
class Engine:
    """`[containerd]`: runtime handlers by name. `no_pivot` is for hosts on a ramdisk."""

    default_runtime_name: str = DEFAULT_HANDLER
    runtimes: Mapping[str, Handler] = field(default_factory=dict)
    snapshotter: str = "overlayfs"
    no_pivot: bool = False
    disable_snapshot_annotations: bool = field(default=True, metadata=NO_EFFECT)
    discard_unpacked_layers: bool = field(default=False, metadata=NO_EFFECT)
    ignore_blockio_not_enabled_errors: bool = field(default=False, metadata=NO_EFFECT)
    ignore_rdt_not_enabled_errors: bool = field(default=False, metadata=NO_EFFECT)
    default_runtime: Handler = Handler(runtime_type="")
    untrusted_workload_runtime: Handler = Handler(runtime_type="")


@dataclass(frozen=True)
class Networks:
    """`[cni]`: `bin_dirs` wins over `bin_dir`. `max_conf_num` networks of the folder are joined, 0: all of them.

    `conf_template` is a file with Go's template syntax, of which a configuration is made when the kubelet tells the
    pods' CIDR. `ip_pref`: which of a pod's addresses is the first: "ipv4", "ipv6", "cni" (the order of the plugins).
    """

    bin_dir: str = "/opt/cni/bin"
    bin_dirs: Sequence[str] = ()
    conf_dir: str = "/etc/cni/net.d"
    max_conf_num: int = 1
    conf_template: str = ""
    ip_pref: str = "ipv4"
    setup_serially: bool = False
    use_internal_loopback: bool = field(default=False, metadata=NO_EFFECT)


@dataclass(frozen=True)
class Registry:
    """`[registry]`: `config_path` is a folder as docker's `certs.d`. The rest is containerd's older way."""

    config_path: str = ""
    auths: Mapping[str, Any] = field(default_factory=dict, metadata=NO_EFFECT)
    configs: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict)
    mirrors: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyPair:
    """`[x509_key_pair_streaming]`: files in PEM."""

    tls_cert_file: str = ""
    tls_key_file: str = ""


@dataclass(frozen=True)
class RuntimePlatform:
    """`[runtime_platforms.NAME]` of version 3: what a handler's images are pulled for and unpacked to."""

    platform: str = ""
    snapshotter: str = ""


@dataclass(frozen=True)
class Settings:
    """One node's settings. `sandbox_image` "": pods have no pause container. Durations as Go writes them ("4h0m0s")."""

    # pods and containers
    containerd: Engine = Engine()
    cni: Networks = Networks()
    sandbox_image: str = ""
    systemd_cgroup: bool = False
    enable_selinux: bool = False
    selinux_category_range: int = 1024
    max_container_log_line_size: int = 16 << 10
    disable_cgroup: bool = False
    disable_apparmor: bool = False
    restrict_oom_score_adj: bool = False
    disable_proc_mount: bool = False
    unset_seccomp_profile: str = ""
    tolerate_missing_hugetlb_controller: bool = True
    disable_hugetlb_controller: bool = True
    device_ownership_from_security_context: bool = False
    ignore_image_defined_volumes: bool = False
    netns_mounts_under_state_dir: bool = field(default=False, metadata=NO_EFFECT)
    enable_unprivileged_ports: bool = False
    enable_unprivileged_icmp: bool = False
    enable_cdi: bool = True
    cdi_spec_dirs: Sequence[str] = ("/etc/cdi", "/var/run/cdi")
    drain_exec_sync_io_timeout: str = "0s"
    ignore_deprecation_warnings: Sequence[str] = field(default=(), metadata=NO_EFFECT)
    # the streaming server
    disable_tcp_service: bool = field(default=True, metadata=NO_EFFECT)  # the CRI isn't served by TCP
    stream_server_address: str = "127.0.0.1"
    stream_server_port: str = "0"
    stream_idle_timeout: str = "4h0m0s"
    enable_tls_streaming: bool = False
    x509_key_pair_streaming: KeyPair = KeyPair()
    # images
    registry: Registry = Registry()
    max_concurrent_downloads: int = 3
    image_pull_progress_timeout: str = "5m0s"
    image_pull_with_sync_fs: bool = False
    stats_collect_period: int = 10
    pinned_images: Mapping[str, str] = field(default_factory=dict)
    runtime_platforms: Mapping[str, RuntimePlatform] = field(default_factory=dict)
    image_decryption: Mapping[str, Any] = field(default_factory=dict)  # containerd sets it, and needs plugins for it
    # of version 3's table of images, where they stand at the top
    snapshotter: str = ""
    disable_snapshot_annotations: bool = field(default=True, metadata=NO_EFFECT)
    discard_unpacked_layers: bool = field(default=False, metadata=NO_EFFECT)
    use_local_image_pull: bool = field(default=False, metadata=NO_EFFECT)

    @property
    def pause_image(self) -> str:
        """The image of the pods' own container; "" for pods without one."""
        return self.sandbox_image or self.pinned_images.get("sandbox", "")

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The runtime handlers by name; there is always the default one."""
        found = dict(self.containerd.runtimes)
        if self.containerd.default_runtime.runtime_type:
            found.setdefault("default", self.containerd.default_runtime)
        if self.containerd.untrusted_workload_runtime.runtime_type:
            found.setdefault(UNTRUSTED, self.containerd.untrusted_workload_runtime)
        found.setdefault(DEFAULT_HANDLER, Handler())
        return found

    @property
    def default_handler(self) -> str:
        """The handler of pods that name none."""
        if self.containerd.default_runtime.runtime_type and not self.containerd.runtimes:
            return "default"
        return self.containerd.default_runtime_name or DEFAULT_HANDLER

    @property
    def default_snapshotter(self) -> str:
        """The snapshotter of images and containers where a handler names none."""
        return self.snapshotter or self.containerd.snapshotter

    def snapshotter_of(self, handler: str) -> str:
        """The snapshotter of a handler's containers."""
        named = self.handlers.get(handler or self.default_handler)
        platform = self.runtime_platforms.get(handler)
        own = (named.snapshotter if named else "") or (platform.snapshotter if platform else "")
        return own or self.default_snapshotter

    @property
    def cni_bin_dirs(self) -> Sequence[str]:
        """Where CNI's plugins are."""
        return self.cni.bin_dirs or (self.cni.bin_dir,)


def check(settings: Settings, where: str) -> None:
    """What the types don't say. Raises InvalidArgument, whose text begins with `where`."""
    engine = settings.containerd
    if settings.default_handler not in settings.handlers:
        raise InvalidArgument(f"{where}containerd.default_runtime_name: no runtime {engine.default_runtime_name!r}")
    if settings.cni.ip_pref not in ("", "ipv4", "ipv6", "cni"):
        raise InvalidArgument(f'{where}cni.ip_pref: expected "ipv4", "ipv6" or "cni"')
    if settings.selinux_category_range < 2:
        raise InvalidArgument(f"{where}selinux_category_range: expected a number from 2 on")
    if settings.cni.max_conf_num < 0:
        raise InvalidArgument(f"{where}cni.max_conf_num: expected a number from 0 on")


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """One table of those of the plugins; what a later one says wins."""
    merged: dict[str, Any] = {}
    for table in tables:
        _into(merged, table)
    return merged


def _into(merged: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        mine = merged.get(key)
        if isinstance(mine, dict) and isinstance(value, Mapping):
            _into(mine, value)
        else:
            merged[key] = copy.deepcopy(value)
