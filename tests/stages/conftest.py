"""One training started on one process or on several."""

import json
import os
import subprocess
import sys

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
FIT = (
    "--batch", "8", "--micro-batch", "2", "--warmup-steps", "1", "--eval-steps", "2",
    "--save-steps", "2", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="session")
def runs(base, text_file, tmp_path_factory):
    """Run directories with a narrow pruned model, and with one whose weights are zeroed."""
    from loram_cli.cli.app import run_command

    folder = tmp_path_factory.mktemp("runs")
    for name, words in {
        "narrow": ["--strategy", "rand", "--keep-first", "1", "--keep-last", "1"],
        "sparse": ["--strategy", "unst", "--calibration", text_file, "--calibration-samples", "20"],
    }.items():
        words = ["prune", "--model", base, "--ratio", "0.5", "--run", folder / name, *words]
        assert run_command([*map(str, words)]) == 0
    return folder


@pytest.fixture
def preferences(instructions, tmp_path):
    """Each answer, against the same one spelt backwards."""
    pairs = []
    for line in instructions.read_text().splitlines():
        prompt, answer = json.loads(line).values()
        pairs.append({"prompt": prompt, "chosen": answer, "rejected": answer[::-1]})
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture
def launch(runs, instructions, preferences, text_file, tmp_path):
    """Start a command; the way says which one, and the kind with how many processes."""

    def start(
        way,
        kind,
        out,
        *more,
        steps=4,
        program=("-m", "loram_cli"),
        env=(),
        processes=2,
        launcher=None,
    ):
        command, _, what = way.partition(" ")
        run = runs / ("sparse" if what == "sparse" else "narrow")
        words = [command, "--in", run / "pruned", "--out", tmp_path / out, "--steps", steps, *FIT]
        if what == "dpo":
            words += ["--objective", "dpo", "--data", preferences, "--learning-rate", "3e-3"]
        elif command == "train":
            words += ["--data", instructions, "--dropout", "0", "--learning-rate", "3e-3"]
        else:
            words += ["--data", text_file, "--block-length", "32", "--learning-rate", "1e-3"]
            words += ["--method", "pretrain"]
        words += ["--quantize", "nf4"] if what == "nf4" else ["--gradient-checkpointing"]
        words += ["--fsdp"] if kind == "fsdp" else []
        if launcher is None:
            launcher = () if kind == "one" else (*TORCHRUN, str(processes))
        return subprocess.Popen(
            [sys.executable, *launcher, *program, *map(str, (*words, *more))],
            env={
                **os.environ, "LORAM_RUN": str(run), "OMP_NUM_THREADS": "1", **dict(env)
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start
