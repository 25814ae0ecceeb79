"""`python -m qlae` is the `qlae` command."""

import sys

from qlae.cli import main

if __name__ == "__main__":
    sys.exit(main())
