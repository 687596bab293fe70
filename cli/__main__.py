"""`python -m wherry.cli` is the command `wherry`."""

from wherry.cli import startup

startup.prepare()

from wherry.cli.command import main  # noqa: E402 - how it is imported was just prepared

main()
