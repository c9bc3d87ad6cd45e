import json
from pathlib import Path

from helpers.reporters import WarningRecorder

from loram_cli.runs.whole import mark_whole
from loram_cli.stages.core.steps import put_steps
from loram_cli.training.loop.checkpoints import kept_path


def test_an_adapter_that_changed_since_it_was_kept_is_left_out(tmp_path: Path):
    reporter = WarningRecorder()
    for step in (2, 4, 6):
        kept = kept_path(tmp_path / "checkpoints", step)
        kept.mkdir(parents=True)
        (kept / "adapter_config.json").write_text(json.dumps({"step": step}))
        (kept / "adapter_model.safetensors").write_bytes(bytes([step]))
        mark_whole(kept)
    (kept_path(tmp_path / "checkpoints", 4) / "adapter_model.safetensors").write_bytes(b"?")
    (kept_path(tmp_path / "checkpoints", 6) / "adapter_config.json").unlink()
    assert put_steps(tmp_path, reporter) == [2]
    assert sorted(path.name for path in (tmp_path / "steps").rglob("*")) == [
        "2", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert reporter.warnings == [
        "the adapter kept of step 4 is damaged (adapter_model.safetensors has changed): left out",
        "the adapter kept of step 6 is damaged (adapter_config.json is missing): left out",
    ]
