"""What training would learn from a data set, read by the model's tokenizer."""

from pathlib import Path

from loram_cli.modeling.load import load_tokenizer
from loram_cli.tools.specs import DataSpec
from loram_cli.training.data.preview import Preview, preview
from loram_cli.training.data.template_names import with_template


def run(spec: DataSpec, model: Path) -> Preview:
    """Read, render and tokenize the data as supervised training does.

    Args:
        spec: Which data, and how.
        model: The directory of the model, for its tokenizer.

    Raises:
        LoramError: The data or the tokenizer cannot be read; names file and line.
    """
    return preview(
        spec.data,
        with_template(load_tokenizer(model), spec.chat_template),
        max_length=spec.max_length,
        train_on=spec.train_on,
        loss_on_prompt=spec.loss_on == "all",
        rows=spec.rows,
        limit=spec.limit,
        seed=spec.seed,
        exhausted=spec.exhausted,
    )
