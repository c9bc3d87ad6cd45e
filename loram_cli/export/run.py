"""One export from its spec: the adapter as a file of its own, or added to a model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_cli.arch.wrappers import wrapper_of
from loram_cli.checkpoint.json_files import read_json
from loram_cli.export.gguf_adapter import export_adapter
from loram_cli.export.gguf_merge import merge, modelfile_path, plan_merge
from loram_cli.export.specs import ExportSpec
from loram_cli.lora.wrapped import read_adapter
from loram_cli.reporting import Reporter


@dataclass(frozen=True)
class Exported:
    """What was written, or would be.

    Attributes:
        path: The GGUF file.
        modelfile: Ollama's Modelfile beside it; None for an adapter without a model.
        modules: Modules of the adapter.
        num_bytes: Of the file; None for an adapter that is not written yet.
        kept_share: How much of the update a merge's rounding left; see :class:`.Merged`. None
            where nothing was merged.
    """

    path: Path
    modelfile: Path | None
    modules: int
    num_bytes: int | None
    kept_share: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """For ``--json``."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def run(spec: ExportSpec, reporter: Reporter, *, dry_run: bool = False) -> Exported:
    """Export an adapter.

    Args:
        spec: What, and where to.
        reporter: Progress.
        dry_run: Check all that can be known beforehand, and write nothing.

    Raises:
        LoramError: See :func:`.export_adapter` and :func:`.plan_merge`.
        UsageError: The same.
    """
    if spec.merge_into is None:
        kind = spec.type or "f32"
        written = export_adapter(
            spec.adapter, spec.model, spec.out, kind=kind, force=spec.force, dry_run=dry_run
        )
        return Exported(spec.out, None, written.modules, written.num_bytes)
    config = spec.model / "config.json"
    wrapper = wrapper_of(read_json(config)) if config.is_file() else None
    adapter = read_adapter(spec.adapter, wrapper)
    planned = plan_merge(adapter, spec.merge_into, spec.out, kind=spec.type, force=spec.force)
    modelfile = modelfile_path(spec.out)
    if dry_run:
        return Exported(spec.out, modelfile, planned.touched, planned.num_bytes)
    done = merge(adapter, planned, spec.out, reporter, force=spec.force)
    size_bytes = spec.out.stat().st_size
    return Exported(spec.out, modelfile, planned.touched, size_bytes, done.kept_share)
