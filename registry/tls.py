"""TLS as a host's configuration wants it."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from wherry.core.errors import InvalidArgument

if TYPE_CHECKING:
    from wherry.registry.hosts import Host


def context_for(host: Host, *, at_home: bool = True) -> ssl.SSLContext | bool:
    """The TLS settings for requests to a host, or with `at_home` False for where it redirects to; True: the system's.

    Authorities count for both (a registry and its storage have the same owner), and so does `skip_verify`; the client's
    certificate is shown to the host alone. Raises InvalidArgument for certificates that can't be read.
    """
    client = host.client if at_home else ()
    if not (host.ca or client or host.skip_verify):
        return True
    if host.skip_verify:
        # without the system's authorities, which take 20 ms to load and wouldn't be asked
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context()
    path = ""
    try:
        for path in host.ca:
            context.load_verify_locations(path)
        for path, key in client:
            context.load_cert_chain(path, key or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(f"certificate {path} of {host.netloc}: {error}: invalid argument") from error
    return context
