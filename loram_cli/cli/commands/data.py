"""``loram data``."""

from loram_cli.cli.options import BaseOptions, Values, layered, reporter_for, settle
from loram_cli.schema import hints_of
from loram_cli.tools.data_spec import DataSpec

NAME = "data"
EPILOG = "Example: loram data instructions.jsonl --model ./Llama-2-13b-hf -n 5"
SPEC, OPTIONS = DataSpec, BaseOptions


def command(values: Values, options: BaseOptions) -> None:
    """Show what training would learn from a data set: rows, lengths, what is left out and why.

    Nothing is trained, and no weights are read: only the tokenizer decides. Settings of 'train'
    that change what is learnt hold here as well, from wherever they are set.
    """
    from loram_cli.cli.draw.console import print_json
    from loram_cli.cli.draw.data import show_preview
    from loram_cli.config.defaults import model_dir, stage_defaults
    from loram_cli.schema import plain
    from loram_cli.tools import data

    reporter = reporter_for(options.json_output)
    place = settle(options, reporter)
    of_train = layered("train", {})
    asked = {**of_train, **values}
    of_train = {**stage_defaults(place, "train", asked), **of_train}
    shared = {k: v for k, v in of_train.items() if k in hints_of(DataSpec) and k != "data"}
    spec = DataSpec(**{**shared, **values})
    preview = data.run(spec, model_dir(place.model, tokenizer_only=True))
    if options.json_output:
        print_json(plain(preview))
        return
    show_preview(preview, spec)
