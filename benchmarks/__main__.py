"""``python -m benchmarks [options]``: every benchmark in turn, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    *("kd_loss", "linear_kd_loss", "relations", "cam", "unicam", "distance", "road", "step"),
    *("monitor", "explain", "concepts"),
)

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, "Options are those of the scripts: python -m benchmarks.kd_loss --help")
        sys.exit(0)
    codes = [
        subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]])
        for name in NAMES
    ]
    sys.exit(max(codes))
