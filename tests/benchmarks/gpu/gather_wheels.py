"""Gather the wheels that a GPU machine without network lacks, in parts that can be carried there.

python tests/benchmarks/gpu/gather_wheels.py DIR            # here, where PyPI is reachable
python DIR/install_wheels.py                                # there, with the same DIR

The machine: Python 3.12 on x86_64 with torch, transformers, peft and what they need. What bench-gpu
and the product need beside that is worked out by pip against what is there (:data:`PRESENT`), downloaded for cp312, and packed into parts of at most 54 MB: whole wheels where
they fit, and slices of one wheel where it does not (bitsandbytes is larger than a part). Each part
can travel by itself; ``install_wheels.py`` joins those that are in its folder, checks every wheel's
SHA-256, and installs without an index what the machine does not have already.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PART_BYTES = 54 * 10**6
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64",
             "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "manylinux_2_5_x86_64", "manylinux1_x86_64")  # fmt: skip
WANTED = ("bitsandbytes>=0.49", "datasets>=4.7", "trl>=1.16,<1.17", "lm-eval>=0.4.13")
# What that machine has, with all that these need; its own pip told the versions. None of it is
# carried, and what is carried has to go with it.
PRESENT = ("accelerate==1.15.0", "huggingface-hub==1.33.0", "numpy==2.5.2", "safetensors==0.8.0",
           "tokenizers==0.23.2", "torch==2.11.0", "transformers==5.17.0", "peft", "typer>=0.20",
           "pandas", "pyarrow", "scikit-learn", "fsspec[http]", "xxhash", "sacrebleu", "matplotlib",
           "requests", "rich>=14", "pyyaml>=6", "pytest>=8.4", "pytest-timeout")  # fmt: skip
# Their only release is source: wheels of them are built here, and fit every Python.
SOURCE_ONLY = ("rouge-score", "word2number", "sqlitedict")
# lm-eval and rouge-score name them; scoring what we score needs neither, and nltk is large.
NOT_NEEDED = ("nltk",)
INSTALLER = "install_wheels.py"
MANIFEST = "wheels.json"


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a wheel, in a part.

    Attributes:
        wheel: File name.
        start: Of the run in the wheel, in bytes.
        num_bytes: Of the run.
    """

    wheel: str
    start: int
    num_bytes: int


def main() -> int:
    """Gather, pack, and say what goes where."""
    parser = argparse.ArgumentParser(description="Gather wheels for a GPU machine, in parts.")
    parser.add_argument("out", type=Path, help="folder for the parts and the installer")
    flags = parser.parse_args()
    if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
        sys.stderr.write(f"error: run this with Python {PYTHON}, for which needs are worked out\n")
        return 2
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        download(wheels)
        files = sorted(wheels.glob("*.whl"), key=lambda file: -file.stat().st_size)
        parts = plan_parts([(file.name, file.stat().st_size) for file in files], PART_BYTES)
        write_parts(parts, wheels, flags.out)
    shutil.copyfile(Path(__file__).with_name(INSTALLER), flags.out / INSTALLER)
    for number, pieces in enumerate(parts, 1):
        told = ", ".join(f"{p.wheel}[{p.start}:{p.start + p.num_bytes}]" for p in pieces[:3])
        more = f" and {len(pieces) - 3} more" if len(pieces) > 3 else ""
        size = sum(piece.num_bytes for piece in pieces) / 10**6
        print(f"part {number} of {len(parts)}: {size:.1f} MB: {told}{more}")
    return 0


def download(folder: Path) -> None:
    """Download every wheel that the machine lacks.

    Args:
        folder: Where they go.
    """
    present = {_name(line) for line in _resolved(PRESENT)}
    needed = [
        line
        for line in _resolved((*PRESENT, *WANTED))
        if _name(line) not in {*present, *NOT_NEEDED}
    ]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", PYTHON, "--implementation", "cp", "--abi", "cp312", "--abi", "abi3"]
    pip += ["--abi", "none", *(word for name in PLATFORMS for word in ("--platform", name))]
    binary = [line for line in needed if _name(line) not in SOURCE_ONLY]
    subprocess.run([*pip, "--dest", str(folder), *binary], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, str(folder), *SOURCE_ONLY], check=True)


def plan_parts(wheels: Iterable[tuple[str, int]], part_bytes: int) -> list[list[Piece]]:
    """Which bytes of which wheel travel in which part.

    Args:
        wheels: Names and sizes in bytes, largest first.
        part_bytes: Of a part at most.
    """
    parts: list[list[Piece]] = []
    room: list[int] = []
    for name, size in wheels:
        start = 0
        while size - start > part_bytes:
            parts.append([Piece(name, start, part_bytes)])
            room.append(0)
            start += part_bytes
        rest = size - start
        place = next((i for i, free in enumerate(room) if free >= rest), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(part_bytes)
        parts[place].append(Piece(name, start, rest))
        room[place] -= rest
    return parts


def write_parts(parts: list[list[Piece]], wheels: Path, out: Path) -> None:
    """Write the parts, and what is in them.

    Args:
        parts: From :func:`plan_parts`.
        wheels: Folder of the wheels.
        out: Where the parts go.
    """
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in wheels.glob("*.whl")
    }
    listed = []
    for number, pieces in enumerate(parts, 1):
        name = f"wheels-{number}-of-{len(parts)}.bin"
        with (out / name).open("wb") as part:
            for piece in pieces:
                with (wheels / piece.wheel).open("rb") as wheel:
                    wheel.seek(piece.start)
                    part.write(wheel.read(piece.num_bytes))
        listed.append([name, [[p.wheel, p.start, p.num_bytes] for p in pieces]])
    (out / MANIFEST).write_text(json.dumps({"sha256": digests, "parts": listed}, indent=1))


def _resolved(wanted: Iterable[str]) -> list[str]:
    """``name==version`` of all that is wanted and needed by it, in this Python's own terms."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report)]
        subprocess.run([*command, *wanted], check=True)
        found = json.loads(report.read_text())["install"]
    return [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in found]


def _name(requirement: str) -> str:
    name = re.split(r"[\[=<>~! ]", requirement, maxsplit=1)[0]
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    sys.exit(main())
