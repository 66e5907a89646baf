"""``python -m fastxkd``."""

import sys

from fastxkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
