"""``python -m redrafter.cli``: the same as the ``redrafter`` command."""

import sys

from redrafter.cli import main

if __name__ == "__main__":
    sys.exit(main())
