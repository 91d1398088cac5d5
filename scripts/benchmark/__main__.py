"""`python scripts/benchmark`: Python runs this file when it is given the folder."""

import sys
from pathlib import Path

# Not this folder: its modules belong to the package.
sys.path[0] = str(Path(__file__).parent.parent)

try:
    from benchmark.command import main
except ModuleNotFoundError as missing:
    if missing.name not in ("matplotlib", "rich"):
        raise
    print("The benchmark needs rich and matplotlib: pip install rich matplotlib", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
