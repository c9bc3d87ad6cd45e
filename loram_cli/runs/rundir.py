"""The run directory: where each stage's output lies, and which base it is all about."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from loram_cli.errors import LoramError, UsageError
from loram_cli.reading import read_json
from loram_cli.runs.manifest import MANIFEST_NAME

STATE_NAME = "run.json"
DEMO_MODEL = "demo"
OUTPUTS = {
    "prune": "pruned",
    "align": "aligned",
    "train": "adapter",
    "recover": "recovered",
    "merge": "merged",
    "polish": "polished",
    "eval": "eval",
}


def demo_base() -> Path:
    """The demo base's directory, which ships with the package."""
    return Path(str(resources.files("loram_cli.demo") / "base"))


@dataclass(frozen=True)
class RunDirectory:
    """Holds the stages' outputs under fixed names, and remembers the base model."""

    path: Path

    def output(self, stage: str) -> Path:
        """Where the stage's output goes."""
        return self.path / OUTPUTS[stage]

    def is_done(self, stage: str) -> bool:
        """Whether the stage's output is there and whole."""
        return (self.output(stage) / MANIFEST_NAME).is_file()

    def require(self, stage: str) -> Path:
        """The stage's output, which must be there.

        Raises:
            LoramError: It is not; says which command writes it.
        """
        if not self.is_done(stage):
            command = "recover --merge" if stage == "merge" else stage
            raise LoramError(
                f"{self.output(stage)}: nothing finished there yet", f"run 'loram {command}' first"
            )
        return self.output(stage)

    def remembered_model(self) -> str | None:
        """The base model of this run, or None before the first command.

        Raises:
            LoramError: The state file is not readable.
        """
        file = self.path / STATE_NAME
        try:
            return str(read_json(file)["model"]) if file.exists() else None
        except OSError as error:
            raise LoramError(f"{file}: cannot be read ({error.strerror})") from error
        except (LoramError, KeyError, TypeError) as error:
            raise LoramError(
                f"{file}: names no model ({error})", "delete it and pass --model"
            ) from error

    def settle_model(self, requested: str | None, *, remember: bool = True) -> str:
        """The base model to use: what is asked for, else remembered, else the demo base.

        Raises:
            UsageError: Another model is asked for than the one this run is about.
        """
        if requested is not None and not requested.strip():
            raise UsageError("--model is empty", "pass a directory, a hub id or demo")
        remembered = self.remembered_model()
        if requested is not None and requested != DEMO_MODEL and Path(requested).is_dir():
            requested = str(Path(requested).resolve())
        if remembered is not None and requested is not None and requested != remembered:
            if any(self.is_done(stage) for stage in OUTPUTS):
                raise UsageError(
                    f"{self.path}: this run is about {remembered}, not {requested}",
                    "pass another --run for another model",
                )
            remembered = None
        model = requested or remembered or DEMO_MODEL
        if remembered is None and remember:
            self._remember(model)
        return model

    def _remember(self, model: str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{STATE_NAME}.tmp"
            temporary.unlink(missing_ok=True)  # never written through somebody's link
            temporary.write_text(json.dumps({"schema_version": 1, "model": model}) + "\n", "utf-8")
            temporary.rename(self.path / STATE_NAME)
        except OSError as error:
            raise LoramError(f"{self.path}: cannot write here ({error.strerror})") from error
