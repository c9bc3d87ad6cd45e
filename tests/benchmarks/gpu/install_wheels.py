"""Join the parts of gather_wheels.py and install the wheels that this machine lacks, offline.

python install_wheels.py [--target DIR] [--join-only DIR]

Needs nothing but Python and pip. Parts are taken from the script's own folder, and from every
folder below it; each may have come by itself. A wheel that is not whole yet is named and left out.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MANIFEST = "wheels.json"


def main() -> int:
    """Join, check, install; 1 where a wheel is missing or damaged."""
    parser = argparse.ArgumentParser(description="Install carried wheels without an index.")
    parser.add_argument("--target", type=Path, help="a folder to install into (pip --target)")
    parser.add_argument("--join-only", type=Path, help="only write the whole wheels there")
    parser.add_argument("--all", action="store_true", help="also what is installed here already")
    flags = parser.parse_args()
    here = Path(__file__).resolve().parent
    if flags.join_only:
        flags.join_only.mkdir(parents=True, exist_ok=True)
        return _report(*join(here, flags.join_only))
    with tempfile.TemporaryDirectory() as folder:
        wheels, missing = join(here, Path(folder))
        lacking = [w for w in wheels if flags.all or not _is_here(w)]
        if lacking:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            pip += ["--no-compile", *(["--target", str(flags.target)] if flags.target else [])]
            subprocess.run([*pip, *map(str, lacking)], check=True)
        print("installed: " + (", ".join(wheel.name for wheel in lacking) or "nothing was lacking"))
        return _report(wheels, missing)


def join(here: Path, out: Path) -> tuple[list[Path], list[str]]:
    """Put the wheels together from the parts that are here.

    Args:
        here: Folder of the parts, or of folders of them.
        out: Where the wheels go.

    Returns:
        Whole wheels, and why others are not.
    """
    manifest = json.loads(next(here.rglob(MANIFEST)).read_text())
    written: dict[str, int] = {}
    for name, pieces in manifest["parts"]:
        part = next(here.rglob(name), None)
        if part is None:
            continue
        with part.open("rb") as source:
            for wheel, start, num_bytes in pieces:
                target = out / wheel
                with target.open("r+b" if target.exists() else "wb") as file:
                    file.seek(start)
                    file.write(source.read(num_bytes))
                written[wheel] = written.get(wheel, 0) + num_bytes
    whole, missing = [], []
    for wheel, digest in sorted(manifest["sha256"].items()):
        if wheel not in written:
            missing.append(f"{wheel}: none of it is here")
        elif hashlib.sha256((out / wheel).read_bytes()).hexdigest() != digest:
            missing.append(f"{wheel}: a part is absent or damaged")
        else:
            whole.append(out / wheel)
    return whole, missing


def _is_here(wheel: Path) -> bool:
    name = wheel.name.split("-")[0]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _report(wheels: list[Path], missing: list[str]) -> int:
    print(f"{len(wheels)} wheels whole" + "".join(f"\nmissing: {line}" for line in missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
