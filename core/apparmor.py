"""AppArmor's profile for containers of which nobody said another one (`wherry run --security-opt apparmor=…`).

The daemon loads it when it starts on a host that has AppArmor (`daemon/apparmor.py`); who makes a container names it
where it is loaded. It takes away what no container should do, whatever rights it has been given: mounting, and writing
to what the kernel shows of the whole host in /proc and /sys. apparmor.d(5).
"""

from __future__ import annotations

from typing import Final

NAME: Final = "wherry-default"
ENABLED: Final = "/sys/module/apparmor/parameters/enabled"
PROFILES: Final = "/sys/kernel/security/apparmor/profiles"

PROFILE: Final = f"""\
profile {NAME} flags=(attach_disconnected,mediate_deleted) {{
  # what its capabilities, mounts, cgroup and seccomp leave it
  capability,
  file,
  network,
  umount,

  # signals and traces among containers of this profile; the host may send what it likes
  signal (receive) peer=unconfined,
  signal (send, receive) peer={NAME},
  ptrace (trace, read, tracedby, readby) peer={NAME},

  deny mount,

  # the kernel's own settings; those of its namespaces (IPC, network) stay
  deny /proc/* w,
  deny /proc/sys/[^fkn]** w,
  deny /proc/sys/fs/[^m]** w,
  deny /proc/sys/kernel/[^ms]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,

  # the host's devices; control groups stay
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"""


def enabled() -> bool:
    """Whether the kernel has AppArmor, and it is on."""
    try:
        with open(ENABLED, encoding="ascii") as file:
            return file.read(1) == "Y"
    except OSError:
        return False


def loaded(name: str = NAME) -> bool:
    """Whether a profile can be used; False where this process may not look (an ordinary user's)."""
    if not enabled():
        return False
    try:
        with open(PROFILES, encoding="utf-8") as file:
            return any(line.rpartition(" (")[0] == name for line in file)
    except OSError:
        return False
