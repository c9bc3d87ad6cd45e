"""The chain on weights and text that nobody here made: stories260k, GSM8K, WikiText-2."""

from pathlib import Path

import pytest

from loram_cli.reporting import NullReporter
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.evaluate import stage as evaluate
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train

SILENT = NullReporter()


def perplexities(result: StageResult) -> dict[str, float]:
    rows = result.manifest.results["rows"]
    return {label: row["scores"][0]["value"] for label, row in rows.items()}


@pytest.mark.slow
def test_an_adapter_trained_on_the_small_model_helps_the_whole_one(shared: Path, tmp_path: Path):
    base = shared / "models" / "stories260k"
    pruned, adapter, recovered = (tmp_path / n for n in ("pruned", "adapter", "recovered"))
    # Five layers: the default of the first four and last two whole would leave none.
    settings = {"ratio": 0.5, "keep_first": 1, "keep_last": 1}
    text = str(shared / "data" / "wikitext2_valid.txt")
    prune.run(prune.PruneSpec(model=base, out=pruned, calibration=text, **settings), SILENT)
    training = {
        "data": str(shared / "data" / "gsm8k_train.jsonl"), "max_length": 256, "steps": 40,
        "learning_rate": 2e-3, "warmup_steps": 5, "batch": 8, "micro_batch": 8, "eval_steps": 40,
    }  # fmt: skip
    train.run(train.TrainSpec(source=pruned, out=adapter, **training), SILENT)
    recover.run(recover.RecoverSpec(adapter=adapter, model=base, out=recovered), SILENT)
    spec = evaluate.EvalSpec(
        model=base,
        out=tmp_path / "eval",
        rows={"base": (base,), "pruned": (pruned,), "loram": (base, recovered)},
        tasks=("perplexity",),
        task_data={"perplexity": shared / "data" / "gsm8k_test.jsonl"},
        limit=100,
    )
    found = perplexities(evaluate.run(spec, SILENT))
    # Measured: some 1130, 1990 and 70; what matters is that what was learnt small counts whole.
    assert found["loram"] < found["base"] / 4
    assert found["base"] < found["pruned"]
