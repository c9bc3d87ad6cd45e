"""A small real language model, where the machine has or can get it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"


def shared_folder() -> Path:
    """The folder of models and data beside the repository; SHARED_FOLDER names another."""
    folder = Path(os.environ.get("SHARED_FOLDER", SHARED))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; name the folder in SHARED_FOLDER")
    return folder


def smollm2(work: Path) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct as a Hugging Face directory and as a GGUF file (Q4_1).

    ``SMOLLM2_FOLDER`` names a directory that was made before, with its GGUF file beside it.
    """
    made = Path(os.environ.get("SMOLLM2_FOLDER", work / "smollm2"))
    gguf = made.with_name(made.name + ".gguf")
    if not (made.is_dir() and gguf.is_file()):
        script = shared_folder() / "models" / "make_smollm2.py"
        command = [sys.executable, str(script), str(made), "--keep-gguf"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot make SmolLM2: {done.stderr.strip()[-200:]}")
    return made, gguf


def gsm8k(split: str, count: int) -> list[dict]:
    """The first problems of GSM8K: question and answer."""
    lines = (shared_folder() / "data" / f"gsm8k_{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]
