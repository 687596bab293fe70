"""`python -m wherry.cli` is the command `wherry`."""

from wherry.cli.command import main

main()
