"""`wherry completion SHELL`: scripts for bash, zsh and fish, and the command that answers them.

The scripts know nothing: they send what was typed to `wherry __complete`, which goes by the same tables as the commands
themselves, and asks the daemon for names. It answers a line for each word that fits (`WORD<tab>DESCRIPTION`), or
`:files` where the shell is to complete paths.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.table import Command, find, parser_for
from wherry.core.errors import WherryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wherry.cli.session import Session

FILES = ":files"
# seconds that a daemon may take: who waits for a completion types on
PATIENCE = 2.0

BASH = r"""# bash completion for wherry; put it into /etc/bash_completion.d, or: source <(wherry completion bash)
_wherry() {
    local line words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    # bash takes words apart at colons and equals signs
    local current="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    while IFS= read -r line; do
        if [ "$line" = ":files" ]; then
            compopt -o default; COMPREPLY=(); return
        fi
        line="${line%%$'\t'*}"
        [[ "$line" == *= ]] && compopt -o nospace
        COMPREPLY+=("$line")
    done < <(wherry __complete "${words[@]}" 2>/dev/null)
    [ "$current" = ":" ] && current=""
    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$current"
}
complete -F _wherry wherry
"""
ZSH = r"""#compdef wherry
# zsh completion for wherry; put it as _wherry into a folder of $fpath, or: source <(wherry completion zsh)
_wherry() {
    local line; local -a found
    for line in "${(@f)$(wherry __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        if [[ "$line" == ":files" ]]; then
            _files; return
        fi
        [[ -n "$line" ]] && found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    _describe 'wherry' found
}
if [ "$funcstack[1]" = "_wherry" ]; then _wherry "$@"; else compdef _wherry wherry; fi
"""
FISH = r"""# fish completion for wherry; put it as wherry.fish into ~/.config/fish/completions, or:
# wherry completion fish | source
function __wherry_complete
    set -l words (commandline -opc)[2..-1] (commandline -ct)
    set -l found (wherry __complete $words 2>/dev/null)
    if test "$found" = ":files"
        __fish_complete_path (commandline -ct)
    else
        string join \n -- $found
    end
end
complete -c wherry -f -a '(__wherry_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
# what stands for one of its kind in the help of commands
_KINDS = {
    "CONTAINER": "containers",
    "IMAGE": "images",
    "IMAGE|ROOTFS": "images",
    "REPOSITORY[:TAG]": "images",
    "VOLUME": "volumes",
    "NETWORK": "networks",
    "NAMESPACE": "namespaces",
}
_PATHS = ("FILE", "DIR", "PATH", "SOURCE", "TARGET", "[SOURCE:]TARGET[:OPTIONS]", "SPEC", "ROOTFS")


async def completion(session: Session, args: argparse.Namespace) -> None:
    """Prints a script."""
    sys.stdout.write(SCRIPTS[args.shell])


async def complete(session: Session, args: argparse.Namespace) -> None:
    """Prints what fits to the last of the words."""
    session.connect_timeout = PATIENCE
    *before, current = args.words or [""]
    for line in await answers(session, before, current):
        print(line)


async def answers(session: Session, before: Sequence[str], current: str) -> list[str]:
    """The lines for what was typed before the word that is being typed, and that word's beginning."""
    from wherry.cli.command import _VALUES, GROUPS

    words = list(before)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in _VALUES and not words:
            return [FILES] if option in {"-a", "--address", "--root", "--state"} else []
        if option in _VALUES:
            value = words.pop(0)
            if _VALUES[option] in {"address", "namespace"}:
                setattr(session, _VALUES[option], value)
    if not words:
        verbs = [f"{group.names[0]}\t{group.help}" for group in GROUPS if not group.hidden]
        return _fitting([*verbs, *(f"{option}\t" for option in _VALUES if current.startswith("-"))], current)
    return await _of_command(session, words, current)


async def _of_command(session: Session, words: list[str], current: str) -> list[str]:
    from wherry.cli.catalog import commands_of
    from wherry.cli.command import GROUPS

    name, rest = words[0], words[1:]
    group = next((group for group in GROUPS if name in group.names), None)
    if group is None:
        return []
    commands = commands_of(group)
    if group.single:
        return await _of_parser(session, commands[0], rest, current)
    if not rest:
        return _fitting([f"{item.names[0]}\t{item.help.splitlines()[0]}" for item in commands], current)
    command = find(commands, rest[0])
    return [] if command is None else await _of_parser(session, command, rest[1:], current)


async def _of_parser(session: Session, command: Command, words: list[str], current: str) -> list[str]:
    parser = parser_for(command, "wherry")
    options = {name: action for action in parser._actions for name in action.option_strings}
    positionals = [action for action in parser._actions if not action.option_strings]
    given = 0
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-") or word == "-":
            given += 1
            if positionals and positionals[min(given, len(positionals)) - 1].nargs == argparse.REMAINDER:
                # the rest belongs to the container
                return [FILES]
        elif (action := options.get(word)) is not None and action.nargs != 0:
            if index == len(words):
                return await _values(session, action, current)
            index += 1
    if current.startswith("-"):
        return _fitting([f"{name}\t{(action.help or '').splitlines()[0]}" for name, action in options.items()], current)
    if not positionals:
        return []
    action = positionals[min(given, len(positionals) - 1)]
    if given >= len(positionals) and action.nargs not in {"*", "+", argparse.REMAINDER}:
        return []
    return await _values(session, action, current)


async def _values(session: Session, action: argparse.Action, current: str) -> list[str]:
    if action.choices:
        return _fitting([f"{choice}\t" for choice in action.choices], current)
    meta = action.metavar if isinstance(action.metavar, str) else ""
    if meta in _KINDS:
        return _fitting([f"{name}\t" for name in await names(session, _KINDS[meta])], current)
    return [FILES] if meta in _PATHS or action.nargs == argparse.REMAINDER else []


async def names(session: Session, kind: str) -> list[str]:
    """What the daemon has of a kind; nothing where it doesn't answer."""
    from wherry.client.finding import name_of, short_image

    try:
        client = session.client
        if kind == "containers":
            return sorted(name_of(item) for item in await client.containers.list())
        if kind == "images":
            return sorted(short_image(item.name) for item in await client.images.list())
        if kind == "volumes":
            return sorted(item.name for item in await client.volumes.list())
        if kind == "networks":
            return sorted(item.name for item in await client.networks.list())
        return sorted(item.name for item in await client.namespaces.list())
    except WherryError:
        return []


def _fitting(lines: Sequence[str], current: str) -> list[str]:
    return [line for line in lines if line.startswith(current)]


def _shell(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), metavar="SHELL", help="bash, zsh or fish")


def _words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD")


COMMANDS = [
    Command(("completion",), "print a script that completes this command", completion, _shell,
            "source <(wherry completion bash)"),
    Command(("__complete",), "answer a shell's completion", complete, _words),
]  # fmt: skip
