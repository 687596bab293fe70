"""No container gets a writable handle on the host's interpreter (CVE-2019-5736, `#!/proc/self/exe`)."""

from __future__ import annotations


def ensure_sealed() -> None:
    """Make /proc/self/exe of this process, and of all that it forks, something that nobody can write to.

    Called once, early, single-threaded: by the command line before it makes a container, by the fork server at its
    start. sys.executable, sys.argv and the environment stay as they are. Falls back to executing this same process
    again from a sealed copy (so call it before anything that must not happen twice).
    """
