"""Verify: a directory and all that it descends from, against what was recorded."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.config_values import short
from loram_cli.checkpoint.index import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_digest
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.rundir import OUTPUTS, STATE_NAME
from loram_cli.stages.core.data_digests import data_digest
from loram_cli.stages.core.lineage import PARTS, TEMPLATE, differences
from loram_cli.stages.core.plan import recorded_key
from loram_cli.stages.specs import SPECS
from loram_cli.tools import checks, vllm_rules
from loram_cli.tools.inspect import is_adapter, is_checkpoint
from loram_cli.tools.specs import VerifyReport, VerifySpec


def run(spec: VerifySpec, reporter: Reporter) -> VerifyReport:
    """Check files, weights and ancestry; nothing is written.

    Raises:
        LoramError: The directory is absent, or nothing in it can be verified.
    """
    if not spec.directory.is_dir():
        raise LoramError(f"{spec.directory}: no such directory")
    walk = _Walk(spec, reporter)
    for directory in _roots(spec.directory):
        walk.visit(directory)
    if spec.engine == "vllm":
        walk.check_for_vllm(spec.directory)
    return VerifyReport(tuple(walk.seen.values()), tuple(walk.problems), tuple(walk.notes))


def _roots(directory: Path) -> list[Path]:
    if (directory / MANIFEST_NAME).is_file() or _holds_weights(directory):
        return [directory]
    outputs = sorted(path.parent for path in directory.glob(f"*/{MANIFEST_NAME}"))
    if (directory / STATE_NAME).is_file() and not outputs:
        raise LoramError(f"{directory}: no stage of this run is finished yet")
    if not outputs:
        raise LoramError(
            f"{directory}: neither an output of loram, nor a model, nor an adapter",
            f"{MANIFEST_NAME}, config.json and adapter_config.json are all absent",
        )
    order = {name: i for i, name in enumerate(OUTPUTS.values())}
    return sorted(outputs, key=lambda path: order.get(path.name, len(order)))


def _holds_weights(directory: Path) -> bool:
    return is_checkpoint(directory) or is_adapter(directory)


class _Walk:
    """From a directory to its inputs, each one checked once."""

    def __init__(self, spec: VerifySpec, reporter: Reporter) -> None:
        self._spec, self._reporter = spec, reporter
        self.seen: dict[Path, Path] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._compared: set[Path] = set()

    def visit(self, directory: Path) -> None:
        if directory.resolve() in self.seen:
            return
        self.seen[directory.resolve()] = directory
        self._reporter.note(f"checking {directory}")
        manifest = self._manifest(directory)
        keep = manifest.keep if manifest else {}
        if manifest is not None:
            self.problems += checks.check_files(directory, manifest)
            if not manifest.outputs:
                self.notes.append(f"{directory}: made before digests of outputs were recorded")
            spec = SPECS.get(manifest.stage)
            if spec is None:
                self.problems.append(
                    f"{directory / MANIFEST_NAME}: made by '{short(manifest.stage)}', a stage that "
                    "this version does not have"
                )
            elif manifest.key != recorded_key(manifest.stage, spec, manifest.spec, manifest.inputs):
                self.problems.append(
                    f"{directory / MANIFEST_NAME}: its key does not follow from spec and inputs"
                )
        if is_checkpoint(directory):
            self.problems += checks.check_checkpoint(
                directory, keep, self._reporter, values=self._spec.values
            )
        if is_adapter(directory):
            model = self._model_of(directory, manifest)
            stage = manifest.stage if manifest else None
            self.problems += checks.check_adapter(directory, keep, stage, model)
        if manifest is not None and self._spec.ancestry:
            for label, record in manifest.inputs.items():
                self._input(directory, manifest, label, record)

    def check_for_vllm(self, directory: Path) -> None:
        """What vLLM would say of a directory, or of a run's outputs that are made for it."""
        asked = _roots(directory)
        if directory not in asked:
            known = [(path, self._stage(path)) for path in asked]
            asked = [path for path, stage in known if stage in ("recover", "merge")]
            if not asked:
                self.problems.append(f"{directory}: nothing for vLLM yet; run 'loram recover'")
        for path in asked:
            if is_adapter(path):
                found = vllm_rules.check_adapter(path, self._model_of(path, self._manifest(path)))
            else:
                found = vllm_rules.check_model(path)
            self.problems += found.problems
            self.notes += found.notes

    def _stage(self, directory: Path) -> str | None:
        with contextlib.suppress(LoramError):
            return Manifest.read(directory).stage
        return None

    def _manifest(self, directory: Path) -> Manifest | None:
        if not (directory / MANIFEST_NAME).is_file():
            return None
        try:
            return Manifest.read(directory)
        except LoramError as error:
            self.problems.append(error.message)
            return None

    def _model_of(self, directory: Path, manifest: Manifest | None) -> Path | None:
        """The model that an adapter fits: recorded by us, or named as PEFT does."""
        if manifest is None:
            try:
                named = str(read_json(directory / CONFIG_NAME).get("base_model_name_or_path"))
            except LoramError as error:
                self.problems.append(error.message)
                return None
        else:
            record = manifest.inputs.get("source" if manifest.stage == "train" else "base", {})
            named = str(record.get("path"))
        model = locate(named, directory)
        if model is None or not is_checkpoint(model):
            self.notes.append(f"{directory}: shapes not compared, {named} is not here")
            return None
        return model

    def _input(
        self, directory: Path, manifest: Manifest, label: str, record: Mapping[str, Any]
    ) -> None:
        if "content" in record:
            self._data(directory, label, record)
            return
        for i, named in enumerate(str(record.get("path")).split(" + ")):
            path = locate(named, directory)
            if path is None:
                self.notes.append(f"{directory}: input {named} is gone and was not checked")
                continue
            about = f"{directory}: {label} {path}"
            self.problems += _input_problems(about, path, record, is_first=i == 0)
            if label in ("source", "adapter", "pruned") and (path / MANIFEST_NAME).is_file():
                with contextlib.suppress(LoramError):  # visiting it tells
                    self.problems += checks.check_neighbour(manifest, about, Manifest.read(path))
            if label == "base" and self._spec.full:
                self._whole_base(manifest, path)
            if path.is_dir():
                self.visit(path)

    def _data(self, directory: Path, label: str, record: Mapping[str, Any]) -> None:
        data = str(record.get("path"))
        try:
            digest = data_digest(data)
        except LoramError:
            digest = None
        if digest is None:
            self.notes.append(f"{directory}: {label} {data} is gone and was not checked")
        elif digest != record["content"]:
            self.problems.append(f"{directory}: {label} {data} has changed since")

    def _whole_base(self, manifest: Manifest, path: Path) -> None:
        if path in self._compared:
            return
        self._compared.add(path)
        if not manifest.base.get("files") and not checks.hub_digests(path):
            self.notes.append(
                f"{path}: compared by samples only: above 1 GiB its bytes are not recorded"
            )
        self._reporter.note(f"reading all of {path}")
        self.problems += checks.check_whole_base(manifest.base, path)


def _input_problems(
    about: str, path: Path, record: Mapping[str, Any], *, is_first: bool
) -> Iterator[str]:
    try:
        if path.is_file():
            if record.get("bytes") not in (None, file_digest(path)):
                yield f"{about} has changed since"
            return
        if "key" in record and Manifest.read(path).key != record["key"]:
            yield f"{about} was made anew since, with other settings or inputs"
        # An adapter as input has its file's digest under 'weights', or 'adapter' in evaluations.
        if is_adapter(path):
            recorded = record.get("adapter") or record.get("weights")
            if recorded not in (None, file_digest(path / WEIGHTS_NAME)):
                yield f"{about} is another adapter than the one that was used"
        elif is_first and is_checkpoint(path):
            identity = Model.open(path).identity.to_mapping()
            known = {part: said for part, said in (PARTS | TEMPLATE).items() if record.get(part)}
            for said in differences(record, identity, known):
                yield f"{about} has changed since: {said} differ from what was used"
    except LoramError as error:
        yield error.message


def locate(named: str, directory: Path) -> Path | None:
    """An input by the path recorded, or beside the output if the run directory was moved."""
    for path in (Path(named), directory.parent / Path(named).name):
        if path.exists() and path.resolve() != directory.resolve():
            return path
    return None
