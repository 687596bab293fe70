"""CRI: a Kubernetes node on top of containerd's API. `wherry.cri.node` is where to begin."""
