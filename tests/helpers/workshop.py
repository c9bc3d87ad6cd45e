"""An undisturbed run of every stage, and a way to disturb the same commands."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from loram_cli.runs.rundir import OUTPUTS

STAGES = list(OUTPUTS)
ZYGOTE = Path(__file__).with_name("zygote.py")
TIMES = ("wall_seconds", "peak_memory_bytes", "peak_memory_increase_bytes", "digest", "results")


class Zygote:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ZYGOTE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **request: object) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks commands has died"
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@dataclass
class Workshop:
    """A run directory whose stages can be done again, disturbed or not.

    Attributes:
        folder: Holds the reference outputs and the log.
        run: The run directory.
        commands: Words per stage.
        events: File operations of each stage when nothing disturbs it.
        seconds: Its duration.
    """

    folder: Path
    run: Path
    zygote: Zygote
    commands: dict[str, list[str]]
    events: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def out(self, stage: str) -> Path:
        return self.run / OUTPUTS[stage]

    def reference(self, stage: str) -> Path:
        return self.folder / "reference" / OUTPUTS[stage]

    def loram(self, *words: str, fault: dict | None = None, log: str = "log") -> dict:
        return self.zygote.ask(
            words=[str(word) for word in words], cwd=str(self.folder),
            log=str(self.folder / log), watch=str(self.run), fault=fault,
        )  # fmt: skip

    def recipe(self) -> dict:
        """The commands of prune, train and recover as a recipe."""
        sections = {}
        for stage in ("prune", "train", "recover"):
            words = self.commands[stage][3:]
            pairs = zip(words[::2], words[1::2], strict=True)
            sections[stage] = {f[2:].replace("-", "_"): _plain(v) for f, v in pairs}
        model = sections["prune"].pop("model")
        return {"model": model, **sections}

    def stage(self, stage: str, **options: object) -> dict:
        return self.loram(*self.commands[stage], **options)

    def ensure(self, stage: str) -> None:
        """Build the reference of a stage, and of those before it, once."""
        if not self.reference("prune").exists():
            # The very first command also makes the run directory, which is not to be counted.
            assert self.stage("prune")["code"] == 0, self.log
            shutil.rmtree(self.out("prune"))
        if stage == "eval" and not self.reference("eval").exists():
            self.zygote.ask(**{"import": ["loram_cli.evaluation"]})
        for name in STAGES[: STAGES.index(stage) + 1]:
            if self.reference(name).exists():
                continue
            self.clear(name)
            done = self.stage(name)
            assert done["code"] == 0, self.log
            self.events[name], self.seconds[name] = done["events"], done["seconds"]
            shutil.copytree(self.out(name), self.reference(name))

    def clear(self, stage: str) -> None:
        """Back to where the stage's command has not been given yet; other stages stay done."""
        for path in self.run.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, directory in OUTPUTS.items():
            shutil.rmtree(self.run / directory, ignore_errors=True)
            if name != stage and self.reference(name).exists():
                shutil.copytree(self.reference(name), self.run / directory)

    def assert_same(self, stage: str) -> None:
        """The output equals the undisturbed one, byte by byte; its record, but for times."""
        out, reference = self.out(stage), self.reference(stage)
        names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        wanted = {p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file()}
        assert names == wanted
        for name in sorted(names - {"loram.json"}):
            if stage == "eval" and name == "results.json":
                assert scores(out / name) == scores(reference / name)
                continue
            assert (out / name).read_bytes() == (reference / name).read_bytes(), name
        mine, theirs = (json.loads((d / "loram.json").read_text()) for d in (out, reference))
        for record in (mine, theirs):
            record["outputs"].pop("results.json", None)
        assert {k: v for k, v in mine.items() if k not in TIMES} == {
            k: v for k, v in theirs.items() if k not in TIMES
        }

    def assert_nothing_beside(self) -> None:
        made = {OUTPUTS[stage] for stage in STAGES if self.reference(stage).exists()}
        # Evaluations keep what models answered, for the next one to use again.
        found = {p.name for p in self.run.iterdir()} - {".eval.responses"}
        assert found == {*made, "run.json"}


def _plain(word: str) -> object:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def scores(file: Path) -> dict:
    return {label: row["scores"] for label, row in json.loads(file.read_text())["rows"].items()}


def make_workshop(
    folder: Path, run_path: Path, zygote: Zygote, base: Path, text_file: Path, instructions: Path
) -> Workshop:
    run, data = ["--run", str(run_path)], str(instructions)
    fit = ["--batch", "2", "--micro-batch", "2", "--save-steps", "2", "--eval-steps", "3"]
    keep = ["--keep-first", "1", "--keep-last", "1", "--ratio", "0.5", "--strategy", "rand"]
    score = ["--tasks", "perplexity", "--task-data", f"perplexity={data}", "--limit", "4"]
    commands = {
        "prune": ["prune", *run, "--model", str(base), *keep],
        "align": ["align", *run, "--data", str(text_file), "--steps", "3", "--block-length", "32",
                  *fit],
        "train": ["train", *run, "--data", data, "--steps", "5", "--max-length", "64",
                  "--learning-rate", "1e-2", *fit],
        "recover": ["recover", *run],
        "merge": ["recover", *run, "--merge"],
        "polish": ["polish", *run, "--steps", "4"],
        "eval": ["eval", *run, *score],
    }  # fmt: skip
    return Workshop(folder, run_path, zygote, commands)
