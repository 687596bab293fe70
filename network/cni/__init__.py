"""Networks by CNI 1.0 and 1.1: configurations, plugins, results. https://www.cni.dev/docs/spec/

    cni = Cni("/etc/cni/net.d", ["/opt/cni/bin"], cache_dir="/var/lib/cni")
    network = cni.load("podman")
    result = await cni.add(network, Attachment("container", netns="/run/netns/x", capabilities={"portMappings": […]}))
    await cni.delete(network.name, Attachment("container"))

`Cni` is an asyncio library: each call has a time limit, and one that is cancelled or whose time is over leaves no
plugin running. Nothing here knows of containers, of the daemon or of the built-in networks.
"""

from wherry.network.cni.cache import Attachment
from wherry.network.cni.config import NetworkList, load, load_all
from wherry.network.cni.plugin import PluginError
from wherry.network.cni.result import Result
from wherry.network.cni.runner import Cni

__all__ = ["Attachment", "Cni", "NetworkList", "PluginError", "Result", "load", "load_all"]
