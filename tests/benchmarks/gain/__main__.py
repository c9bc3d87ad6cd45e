"""``python tests/benchmarks/gain``: see :mod:`.command`."""

import sys
from pathlib import Path

# The bench as a package, and the product where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gain.command import main

if __name__ == "__main__":
    sys.exit(main())
