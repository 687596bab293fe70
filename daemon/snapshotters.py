"""The snapshotters of a daemon: those that are built in, and other people's behind sockets (`[proxy_plugins]`)."""

from __future__ import annotations

import os

import structlog

from wherry.core import places, platforms
from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.daemon.config import Config, Overlayfs
from wherry.daemon.config import Snapshotter as Options
from wherry.daemon.metadata import Metadata
from wherry.daemon.plugins import Plugins
from wherry.linux import fuse
from wherry.snapshotter import remap
from wherry.snapshotter.interface import Snapshotter
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter
from wherry.snapshotter.proxy import ProxySnapshotter

log = structlog.get_logger(__name__)
KIND = "io.containerd.snapshotter.v1"
BUILT_IN = frozenset(("native", "overlayfs"))


def load_local(plugins: Plugins, config: Config) -> dict[str, Snapshotter]:
    """The built-in ones that work here; why another doesn't is kept with its plugin."""
    found: dict[str, Snapshotter] = {}
    here = [platforms.host()]

    def root(name: str, options: Options) -> str:
        return options.root_path or os.path.join(config.root, "snapshotter", name)

    if plugins.enabled(KIND, "native"):
        folder = root("native", config.native)
        capabilities = [remap.CAPABILITY] if remap.supported() else []
        with plugins.load(
            KIND, "native", platforms=here, exports={"root": folder}, capabilities=capabilities, optional=True
        ):
            found["native"] = NativeSnapshotter(folder)
    if plugins.enabled(KIND, "overlayfs"):
        options = config.overlayfs
        folder = root("overlayfs", options)
        capabilities = [remap.CAPABILITY] if remap.supported() and not options.slow_chown else []
        with plugins.load(
            KIND, "overlayfs", platforms=here, exports={"root": folder}, capabilities=capabilities, optional=True
        ):
            found["overlayfs"] = _users(folder, options) if places.is_users() else _overlay(folder, options)
    return found


def _overlay(folder: str, options: Overlayfs, mount_type: str = "overlay") -> OverlaySnapshotter:
    return OverlaySnapshotter(
        folder,
        upperdir_label=options.upperdir_label,
        mount_options=options.mount_options,
        sync_remove=options.sync_remove,
        slow_chown=options.slow_chown,
        mount_type=mount_type,
    )


def _users(folder: str, options: Overlayfs) -> Snapshotter:
    """An ordinary user's, which is what everything asks for by default: by the best of what the host lets it do.

    Tried out; WHERRY_OVERLAY says it for certain. Where copies were kept, copies stay: the others wouldn't find them.
    Raises FailedPrecondition where what is asked for doesn't work.
    """
    asked = os.environ.get("WHERRY_OVERLAY", "")
    if asked not in {"", "kernel", "fuse", "copies"}:
        raise InvalidArgument(f"WHERRY_OVERLAY={asked}: there are kernel, fuse and copies")
    copies = f"{folder}-copies"
    if not asked and os.path.isdir(copies):
        asked = "copies"
    for name, mount_type in (("kernel", "overlay"), ("fuse", fuse.OVERLAY)):
        if asked in {"", name}:
            try:
                return _overlay(folder, options, mount_type)
            except FailedPrecondition as error:
                if asked:
                    raise
                log.warning("overlayfs: another way is taken", without=name, reason=error.message)
    return NativeSnapshotter(copies)


async def load_proxies(plugins: Plugins, config: Config, metadata: Metadata) -> dict[str, Snapshotter]:
    """Those behind sockets; nobody is asked yet, so one that isn't there keeps nothing from starting."""
    found: dict[str, Snapshotter] = {}
    for name, options in config.proxy_plugins.items():
        # a built-in one's name is free where that one is disabled
        if options.type != "snapshot" or not (plugins.enabled(KIND, name) or name in BUILT_IN):
            continue
        rows = await metadata.rows("SELECT DISTINCT namespace FROM snapshots WHERE snapshotter = ?", (name,))
        with plugins.load(
            KIND,
            name,
            platforms=[platforms.parse(options.platform) if options.platform else platforms.host()],
            exports={**options.exports, "address": options.address},
            capabilities=options.capabilities,
            optional=True,
        ):
            if name in BUILT_IN and plugins.enabled(KIND, name):
                raise InvalidArgument(f'proxy_plugins."{name}": there is a built-in snapshotter of that name')
            found[name] = ProxySnapshotter(options.address, name, namespaces=[row[0] for row in rows])
    return found
