"""Labels with a meaning of their own, as containerd names them, and the limit on a label's size."""

from __future__ import annotations

from collections.abc import Mapping

from wherry.core.errors import InvalidArgument

# key and value of one label together, in bytes (containerd's pkg/labels)
MAX_LABEL = 4096

GC_ROOT = "containerd.io/gc.root"
GC_EXPIRE = "containerd.io/gc.expire"
GC_FLAT = "containerd.io/gc.flat"
GC_REF = "containerd.io/gc.ref."
GC_REF_CONTENT = "containerd.io/gc.ref.content"
GC_REF_IMAGE = "containerd.io/gc.ref.image"
GC_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot"
# on a layer's content: the digest of the layer uncompressed
UNCOMPRESSED = "containerd.io/uncompressed"
# + host: the repositories on that host that hold this content, with commas between them
DISTRIBUTION_SOURCE = "containerd.io/distribution.source"
# on a snapshot that is being unpacked: the name that it is to be committed under
SNAPSHOT_REF = "containerd.io/snapshot.ref"
UNPACK = "containerd.io/snapshot/"
NAMESPACE_DEFAULT_RUNTIME = "containerd.io/defaults/runtime"
NAMESPACE_DEFAULT_SNAPSHOTTER = "containerd.io/defaults/snapshotter"
# on a namespace: leases and content of others are shared with it
NAMESPACE_SHAREABLE = "containerd.io/namespace.shareable"

# what containerd's restart monitor reads: the policy (`no`, `always`, `unless-stopped`, `on-failure[:N]`), what the
# container is meant to be (`running`, `stopped`), how often it was started again, whether a person stopped it, its log
RESTART_POLICY = "containerd.io/restart.policy"
RESTART_STATUS = "containerd.io/restart.status"
RESTART_COUNT = "containerd.io/restart.count"
RESTART_EXPLICITLY_STOPPED = "containerd.io/restart.explicitly-stopped"
RESTART_LOG_URI = "containerd.io/restart.loguri"
# of a container that an image made: the signal that ends it
STOP_SIGNAL = "io.containerd.image.config.stop-signal"

# ours, on containers that people made with `wherry run` or `create`
OWN = "wherry/"
CONTAINER_NAME = "wherry/name"
# "true": the daemon removes the container when it has ended
AUTO_REMOVE = "wherry/auto-remove"
# JSON, a list of mounts as `inspect` shows them (`Type`, `Name`, `Source`, `Destination`, `Mode`, `RW`, `Anonymous`)
MOUNTS = "wherry/mounts"
# JSON: what `inspect` shows of how it was asked for and the specification doesn't say
CONFIG = "wherry/config"
# JSON: `Test`, `Interval`, `Timeout`, `StartPeriod`, `StartInterval` (nanoseconds), `Retries`; and how it went
HEALTH_CHECK = "wherry/health-check"
HEALTH = "wherry/health"
# JSON: `code`, `started`, `finished` (seconds since the epoch), `oom`, `error` of the last run
LAST_RUN = "wherry/last-run"
LOG_URI = "wherry/log-uri"
# "true": its input stays open while nobody is attached
STDIN_OPEN = "wherry/stdin-open"
# seconds between the stop signal and SIGKILL
STOP_TIMEOUT = "wherry/stop-timeout"


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidArgument for a label over the limit (text of containerd's `labels.Validate`)."""
    for key, value in labels.items():
        size = len(key.encode()) + len(value.encode())
        if size > MAX_LABEL:
            raise InvalidArgument(
                f"label key and value length ({size} bytes) greater than maximum size ({MAX_LABEL} bytes), "
                f"key: {key[:64]}: invalid argument"
            )


def internal(label: str) -> bool:
    """Whether this engine keeps its own things in a label of a container; people asked for the others."""
    return label.startswith((OWN, "containerd.io/", "io.containerd."))
