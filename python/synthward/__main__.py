"""``python -m synthward``: the same as the ``synthward`` command."""

import sys

from synthward.cli import main

if __name__ == "__main__":
    sys.exit(main())
