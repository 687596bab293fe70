"""Networks of containers: the built-in bridge with its addresses, rules, names and published ports, and CNI.

- `model`, `store`, `pools`: what is recorded, and which subnets and addresses are given out.
- `worker` (a process): what is done in the kernel: namespaces, links and addresses by pyroute2 (`links`), rules by
  nftables (`nft`, their text from `rules`). `worker_client` starts it and speaks with it.
- `keeper` (a process that outlives the daemon): names (`dns`), the sockets that hold published ports, and relays for
  what the kernel's NAT doesn't reach. `keeper_client` speaks with it.
- `files`: /etc/hosts, /etc/resolv.conf, /etc/hostname of a container.
- `cni`: runs conflists with plugins as the CNI specification says; a library of its own.

The daemon decides and records (`wherry.daemon.network`); nothing here knows of containers or of the API.
"""
