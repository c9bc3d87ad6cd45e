"""Random checkpoints that rows read, written beforehand while other rows run.

python -m gpu.checkpoints FOLDER NAME...
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .process import ROOT
from .rows import CHECKPOINTS, TINY

_FREE_BYTES = 4 * 2**30
_SHARD_BYTES = 5 * 10**9


def main() -> None:
    """Write them one after another; each has its name only when it is whole."""
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            write(name, folder)
        except Exception as error:
            (folder / f"{name}.failed").write_text(f"{type(error).__name__}: {error}")


def write(name: str, folder: Path) -> None:
    """Write one, with the demo's tokenizer.

    Args:
        name: Of :data:`.rows.CHECKPOINTS`, or ``tiny``.
        folder: Where it goes.
    """
    from loram_cli.arch.registry import family_for
    from loram_cli.memory.account import count_params
    from loram_cli.tools.specs import BenchModel

    preset, layers = CHECKPOINTS.get(name, (name, None))
    config = BenchModel.parse(preset).config() | {"dtype": "bfloat16"}
    config.setdefault("architectures", ["LlamaForCausalLM"])
    if layers:
        config["num_hidden_layers"] = layers
    needed = 2 * count_params(family_for(config, name), config).total + _FREE_BYTES
    while (free := shutil.disk_usage(folder).free) < needed and name != TINY:
        # A checkpoint that no row needs any more is deleted.
        waits = f"needs {needed / 2**30:.0f} GiB of disk, and {free / 2**30:.0f} are free"
        (folder / f"{name}.waits").write_text(waits)
        time.sleep(1)
    part = folder / f"{name}.part"
    config_file = folder / f"{name}.json"
    config_file.write_text(json.dumps(config))
    generate = ROOT / "tests" / "benchmarks" / "generate.py"
    words = [sys.executable, str(generate), "checkpoint", str(config_file), str(part)]
    subprocess.run([*words, str(_SHARD_BYTES)], check=True, capture_output=True, text=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "loram_cli" / "demo" / "base" / file, part / file)
    part.rename(folder / name)


def await_checkpoint(name: str, folder: Path, seconds: float) -> str | None:
    """Wait for one that is being written.

    Args:
        name: Of the checkpoint.
        folder: Where it will be.
        seconds: To wait at most.

    Returns:
        Why there is none, or None.
    """
    end = time.monotonic() + seconds
    failed = folder / f"{name}.failed"
    while not (folder / name).is_dir():
        if failed.is_file():
            return f"its checkpoint could not be written: {failed.read_text()}"
        if time.monotonic() > end:
            waits = folder / f"{name}.waits"
            why = f" ({waits.read_text()})" if waits.is_file() else ""
            return f"its checkpoint was not written within {seconds:.0f} s more{why}"
        time.sleep(0.2)
    return None


if __name__ == "__main__":
    main()
