"""The default seccomp profile: what a container may ask of the kernel when nobody said otherwise.

It allows what the engines of the field (Docker, containerd, podman) allow by default, so that an image that runs there
runs here: a call is allowed unless it reaches beyond the container, and those that a capability guards are allowed with
that capability. Everything else answers EPERM. io_uring isn't allowed: its operations bypass the filter, and the field
took it out in 2023.

The tables name calls by what they do; a name that an architecture or libseccomp doesn't know is skipped there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

_ENOSYS, _EPERM = 38, 1
_AF_VSOCK = 40
#: The flags of clone(2) that make namespaces: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_CLONE_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
#: personality(2): Linux, Linux with 32-bit uname (PER_LINUX32), each also with UNAME26, and the query.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)


def _words(*lines: str) -> list[str]:
    return [word for line in lines for word in line.split()]


def _variants(suffix: str, *lines: str) -> list[str]:
    """Each name as it is, and with the suffix that 32-bit architectures gave to its wider successor."""
    return [name for word in _words(*lines) for name in (word, word + suffix)]


_FILES = [
    *_words(
        "access faccessat faccessat2 chdir fchdir chmod fchmod fchmodat fchmodat2 close close_range",
        "copy_file_range creat dup dup2 dup3 fadvise64 fadvise64_64 fallocate fchownat fdatasync flock fsync",
        "futimesat getcwd getdents getdents64 ioctl link linkat lseek _llseek mkdir mkdirat mknod mknodat",
        "name_to_handle_at newfstatat fstatat64 open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64",
        "pwritev pwritev2 read readahead readlink readlinkat readv rename renameat renameat2 rmdir splice statx",
        "symlink symlinkat sync sync_file_range syncfs tee umask unlink unlinkat utime utimensat utimensat_time64",
        "utimes vmsplice write writev cachestat",
    ),
    *_variants("64", "fcntl fstat fstatfs ftruncate lstat sendfile stat statfs truncate"),
    *_variants("32", "chown fchown lchown"),
    *(prefix + verb for prefix in ("", "f", "l") for verb in _words("getxattr listxattr removexattr setxattr")),
    *_words("getxattrat listxattrat removexattrat setxattrat"),
    *_words("fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch"),
    *_words("io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit"),
    *_words("landlock_add_rule landlock_create_ruleset landlock_restrict_self"),
]
_WAITING = _words(
    "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old",
    "eventfd eventfd2 poll ppoll ppoll_time64 pselect6 pselect6_time64 select _newselect signalfd signalfd4",
)
_MEMORY = _words(
    "brk madvise membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap",
    "mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages",
    "map_shadow_stack",
)
_PROCESSES = [
    *_words(
        "capget capset execve execveat exit exit_group fork vfork getcpu getpgid getpgrp getpid getppid",
        "getpriority getsid gettid get_robust_list set_robust_list get_thread_area set_thread_area",
        "set_tid_address getrlimit ugetrlimit getrusage ioprio_get ioprio_set kill pidfd_open pidfd_send_signal",
        "prctl prlimit64 process_vm_readv process_vm_writev ptrace restart_syscall rseq seccomp setpgid",
        "setpriority setrlimit setsid sysinfo times tgkill tkill uname wait4 waitid waitpid",
    ),
    *_variants("32", "getegid geteuid getgid getgroups getresgid getresuid getuid"),
    *_variants("32", "setfsgid setfsuid setgid setgroups setregid setresgid setresuid setreuid setuid"),
    *_words("futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue"),
    *_words(
        "sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min",
        "sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr",
        "sched_setparam sched_setscheduler sched_yield",
    ),
    *_words(
        "pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend",
        "rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn",
    ),
]
_TIME = [
    *_words(
        "adjtimex alarm getitimer setitimer gettimeofday nanosleep time timer_create timer_delete",
        "timer_getoverrun",
    ),
    *_variants("64", "clock_adjtime clock_gettime timer_gettime timer_settime timerfd_gettime timerfd_settime"),
    *_variants("_time64", "clock_getres clock_nanosleep"),
    *_words("timerfd_create"),
]
_COMMUNICATION = [
    *_words(
        "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg",
        "recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    ),
    *_words(
        "ipc msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt",
        "shmget",
    ),
    *_words("mq_getsetattr mq_notify mq_open mq_unlink"),
    *_variants("_time64", "mq_timedreceive mq_timedsend"),
    *_words("getrandom"),
]
_ALWAYS = sorted({*_FILES, *_WAITING, *_MEMORY, *_PROCESSES, *_TIME, *_COMMUNICATION})

_BY_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": _words("open_by_handle_at"),
    "CAP_SYS_ADMIN": _words(
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount",
        "mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns",
        "statmount syslog umount umount2 unshare",
    ),
    "CAP_SYS_BOOT": _words("reboot"),
    "CAP_SYS_CHROOT": _words("chroot"),
    "CAP_SYS_MODULE": _words("delete_module finit_module init_module"),
    "CAP_SYS_PACCT": _words("acct"),
    "CAP_SYS_PTRACE": _words("kcmp pidfd_getfd process_madvise"),
    "CAP_SYS_RAWIO": _words("ioperm iopl"),
    "CAP_SYS_TIME": _words("clock_settime clock_settime64 settimeofday stime"),
    "CAP_SYS_TTY_CONFIG": _words("vhangup"),
    "CAP_SYS_NICE": _words("get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    "CAP_SYSLOG": _words("syslog"),
    "CAP_BPF": _words("bpf"),
    "CAP_PERFMON": _words("perf_event_open"),
}

_ARM = _words("arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2")
#: Machine (uname -m) → the architectures of the profile, the native one first, and calls that only it has.
_MACHINES: dict[str, tuple[list[str], list[str]]] = {
    "x86_64": (["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], _words("arch_prctl modify_ldt uretprobe")),
    "aarch64": (["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"], _ARM),
    "armv7l": (["SCMP_ARCH_ARM"], _ARM),
    "riscv64": (["SCMP_ARCH_RISCV64"], _words("riscv_flush_icache riscv_hwprobe")),
    "ppc64le": (["SCMP_ARCH_PPC64LE"], _words("swapcontext sync_file_range2")),
    "s390x": (
        ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
        _words("s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
    ),
}


def default_profile(capabilities: Collection[str], machine: str | None = None) -> dict[str, Any]:
    """The default profile as `linux.seccomp` of the OCI runtime specification.

    `capabilities`: the container's bounding set ("CAP_SYS_ADMIN", …). `machine`: as `uname -m` says, by default this
    host's. A fresh value each time; the caller may change it.
    """
    machine = machine or os.uname().machine
    architectures, own = _MACHINES.get(machine, ([], []))
    guarded = sorted({name for capability in capabilities for name in _BY_CAPABILITY.get(capability, ())})
    rules = [_allow([*_ALWAYS, *own])]
    if guarded:
        rules.append(_allow(guarded))
    rules.append(_allow(["socket"], 0, "SCMP_CMP_NE", _AF_VSOCK))
    rules += [_allow(["personality"], 0, "SCMP_CMP_EQ", value) for value in _PERSONALITIES]
    if "CAP_SYS_ADMIN" not in capabilities:
        # new namespaces need the capability; s390 has the flags in the second argument (clone(2))
        flags = 1 if machine == "s390x" else 0
        rules.append(_allow(["clone"], flags, "SCMP_CMP_MASKED_EQ", _CLONE_NAMESPACES, 0))
        # its flags are in memory, where no filter looks: say that it doesn't exist, and libc takes clone
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": list(architectures),
        "syscalls": rules,
    }


def _allow(names: Iterable[str], index: int = 0, op: str = "", value: int = 0, second: int = 0) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": list(names), "action": "SCMP_ACT_ALLOW"}
    if op:
        argument: dict[str, Any] = {"index": index, "value": value, "op": op}
        if op == "SCMP_CMP_MASKED_EQ":
            argument["valueTwo"] = second
        rule["args"] = [argument]
    return rule
