"""Names that clients choose: identifiers (of containers, snapshots, leases, namespaces) and their check.

The rule is containerd's (`pkg/identifiers`): groups of letters and digits, joined by single dots, dashes or
underscores, at most 76 bytes. Such a name is safe as one component of a path.
"""

from __future__ import annotations

import re

from wherry.core.errors import FailedPrecondition, InvalidArgument

MAX_IDENTIFIER = 76
_PATTERN = r"^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$"
# fullmatch: Python's `$` would also match before a last newline. (Compiled when it is used: commands do without.)
_IDENTIFIER = r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def quote(text: str) -> str:
    """The text in double quotes with escapes, as Go's `%q` prints it and clients expect it in messages."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    parts = []
    for char in text:
        if char in _ESCAPES:
            parts.append(_ESCAPES[char])
        elif char.isprintable():
            parts.append(char)
        elif ord(char) < 0x80:
            parts.append(f"\\x{ord(char):02x}")
        else:
            parts.append(f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}")
    return f'"{"".join(parts)}"'


def check_identifier(kind: str, value: str) -> str:
    """Return the value when it is an identifier; `kind` (`container.ID`, `snapshot key`; may be empty) leads the error.

    Raises InvalidArgument with containerd's text.
    """
    lead = f"{kind}: " if kind else ""
    if not value:
        raise InvalidArgument(f"{lead}identifier must not be empty: invalid argument")
    if len(value) > MAX_IDENTIFIER:
        raise InvalidArgument(
            f"{lead}identifier {quote(value)} greater than maximum length ({MAX_IDENTIFIER} characters): "
            "invalid argument"
        )
    if not re.fullmatch(_IDENTIFIER, value):
        raise InvalidArgument(f"{lead}identifier {quote(value)} must match {_PATTERN}: invalid argument")
    return value


def require_namespace(value: str | None) -> str:
    """Return the namespace (tenant) that a call carries.

    Raises FailedPrecondition where the call carries none, InvalidArgument where it isn't an identifier (texts and
    kinds of containerd's `namespaces.NamespaceRequired`).
    """
    if not value:
        raise FailedPrecondition("namespace is required: failed precondition")
    return check_identifier("namespace validation", value)
