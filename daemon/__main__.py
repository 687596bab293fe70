"""`python -m wherry.daemon` is `wherryd`."""

import sys

from wherry.daemon.command import main

if __name__ == "__main__":
    sys.exit(main())
