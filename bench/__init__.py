"""Wherry beside containerd and runc: the same work, the same image, the same run; what counts is the ratio."""
