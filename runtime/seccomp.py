"""`linux.seccomp` of the OCI runtime specification: compiled once, kept by the profile's digest, loaded into a process.

The interface:

    program = compile_filter(profile)             # bytes of a classic BPF program; reads the cache first
    flags = filter_flags(profile)                 # SECCOMP_FILTER_FLAG_*
    load_filter(program, flags)                   # in the container's process, last thing before exec
"""

from __future__ import annotations
