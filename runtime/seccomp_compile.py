"""From a profile (`linux.seccomp` of the OCI runtime specification) to a BPF program, by libseccomp.

The rules where the specification is silent are runc's: unknown calls are skipped; a rule that says what the default
says is skipped; conditions on different arguments must all hold, while two on the same argument are two rules; and
calls newer than everything that the profile knows answer ENOSYS, so that libraries fall back to what it does know.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from wherry.linux import libseccomp
from wherry.linux.libseccomp import Action, Arch, Compare, Condition, Filter

_ACTIONS = {
    **{f"SCMP_ACT_{action.name}": int(action) for action in Action},
    "SCMP_ACT_KILL": int(Action.KILL_THREAD),
}
_WITH_VALUE = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_ARGUMENTS = 6
_MAX_VALUE = 2**64 - 1
_X32_BIT = 0x40000000

# classic BPF (linux/filter.h) on struct seccomp_data: the call's number at 0, the architecture at 4
_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_GE, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH = 0, 4


def compile_profile(profile: Mapping[str, Any]) -> bytes:
    """The program. Raises ValueError with the place in the profile that is wrong; OSError from libseccomp."""
    default = action_of(profile, "defaultAction", "defaultErrnoRet", "linux.seccomp")
    if default == Action.NOTIFY:
        msg = "SCMP_ACT_NOTIFY cannot be used as default action"
        raise ValueError(msg)
    architectures = [_architecture(name) for name in profile.get("architectures") or ()]
    rules = list(_rules(profile))
    with Filter(default) as made:
        for architecture in architectures:
            made.add_architecture(architecture)
        made.optimize()
        for where, name, action, conditions in rules:
            if action == default:
                continue
            try:
                _add(made, name, action, conditions)
            except OSError as error:
                error.add_note(f"{where}: {name}")
                raise
        program = made.export()
    if default & 0xFFFF0000 == Action.ERRNO and default & 0xFFFF != errno.ENOSYS:
        names = {name for _, name, _, _ in rules}
        return _newer_calls({libseccomp.native(), *architectures}, names) + program
    return program


def action_of(holder: Mapping[str, Any], key: str, errno_key: str, where: str) -> int:
    """An action with its value (EPERM unless the profile says otherwise)."""
    name = holder.get(key)
    action = _ACTIONS.get(name) if isinstance(name, str) else None
    if action is None or not isinstance(name, str):
        msg = f"{where}.{key}: invalid seccomp action {name!r}"
        raise ValueError(msg)
    value = holder.get(errno_key)
    if name not in _WITH_VALUE:
        if value is not None:
            msg = f"{where}.{errno_key}: only ERRNO and TRACE take a value, not {name}"
            raise ValueError(msg)
        return action
    if value is None:
        value = errno.EPERM
    if not isinstance(value, int) or not 0 <= value <= 0xFFFF:
        msg = f"{where}.{errno_key}: invalid value {value!r}"
        raise ValueError(msg)
    return action | value


def _architecture(name: object) -> int:
    member = str(name).removeprefix("SCMP_ARCH_")
    if member == "NATIVE":
        return libseccomp.native()
    if member not in Arch.__members__:
        msg = f"linux.seccomp.architectures: unknown architecture {name!r}"
        raise ValueError(msg)
    return int(Arch[member])


def _rules(profile: Mapping[str, Any]) -> Iterator[tuple[str, str, int, list[Condition]]]:
    """Each (place, call, action, conditions) of the profile."""
    for index, rule in enumerate(profile.get("syscalls") or ()):
        where = f"linux.seccomp.syscalls[{index}]"
        if not isinstance(rule, Mapping):
            msg = f"{where} is not an object"
            raise ValueError(msg)
        action = action_of(rule, "action", "errnoRet", where)
        conditions = [_condition(where, argument) for argument in rule.get("args") or ()]
        names = rule.get("names")
        if not isinstance(names, list) or not names:
            msg = f"{where}.names: no system calls named"
            raise ValueError(msg)
        for name in names:
            if action == Action.NOTIFY and name == "write":
                msg = "SCMP_ACT_NOTIFY cannot be used for the write syscall"
                raise ValueError(msg)
            yield where, str(name), action, conditions


def _condition(where: str, argument: Mapping[str, Any]) -> Condition:
    index, value, second = (argument.get(key, 0) for key in ("index", "value", "valueTwo"))
    name = str(argument.get("op")).removeprefix("SCMP_CMP_")
    if not isinstance(index, int) or not 0 <= index < _ARGUMENTS:
        msg = f"{where}.args: invalid argument index {index!r}"
        raise ValueError(msg)
    if not all(isinstance(number, int) and 0 <= number <= _MAX_VALUE for number in (value, second)):
        msg = f"{where}.args: invalid value {value!r}, {second!r}"
        raise ValueError(msg)
    if name not in Compare.__members__:
        msg = f"{where}.args: unknown operator {argument.get('op')!r}"
        raise ValueError(msg)
    # MASKED_EQ: `value` is the mask, `valueTwo` what must be left
    return Condition(index, Compare[name], value, second if name == "MASKED_EQ" else 0)


def _add(made: Filter, name: str, action: int, conditions: list[Condition]) -> None:
    number = libseccomp.resolve(name, libseccomp.native())
    if number is None:
        return
    indexes = [condition.arg for condition in conditions]
    alternatives = [conditions] if len(set(indexes)) == len(indexes) else [[condition] for condition in conditions]
    for alternative in alternatives:
        made.add_rule(action, number, alternative)


def _newer_calls(architectures: set[int], names: set[str]) -> bytes:
    """A prologue that answers ENOSYS to calls above the highest that the profile names, for each architecture.

    x32 shares x86-64's architecture value and has bit 30 set in the numbers; those go on to the filter.
    """
    blocks: list[bytes] = []
    for architecture in sorted(architectures - {Arch.X32}):
        numbers = (libseccomp.resolve(name, architecture) for name in names)
        highest = max((number for number in numbers if number is not None and number >= 0), default=-1)
        if highest < 0:
            continue
        tests = [_instruction(_LOAD, _OFFSET_NUMBER)]
        if architecture == Arch.X86_64:
            tests.append(_instruction(_JUMP_GE, _X32_BIT, true=2))
        tests.append(_instruction(_JUMP_GT, highest, false=1))
        tests.append(_instruction(_RETURN, Action.ERRNO | errno.ENOSYS))
        blocks.append(_instruction(_JUMP_EQ, architecture, false=len(tests)) + b"".join(tests))
    # a block leaves the number in the accumulator, so the architecture is loaded before each; libseccomp's part loads
    # what it needs by itself
    load = _instruction(_LOAD, _OFFSET_ARCH)
    return b"".join(load + block for block in blocks)


def _instruction(code: int, value: int, *, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)
