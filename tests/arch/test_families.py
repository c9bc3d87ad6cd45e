import importlib
from pathlib import Path

import pytest
import torch
from tiny import save_tokenizer

from loram_cli.arch.registry import families, family_for
from loram_cli.arch.spec import Family, Geometry
from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.errors import LoramError
from loram_cli.modeling.narrow import load_causal_lm
from loram_cli.reporting import NullReporter
from loram_cli.stages import prune

SMALL = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("family", families(), ids=lambda f: f.family)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_equal_what_transformers_makes(family: Family, tied: bool, tmp_path: Path):
    transformers = importlib.import_module("transformers")
    model_class = getattr(transformers, family.architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SMALL, tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    config = read_config(tmp_path / "base")
    index = CheckpointIndex.open(tmp_path / "base")
    assert {n: e.shape for n, e in index.tensors.items()} == family.tensor_shapes(config)
    spec = prune.PruneSpec(
        model=tmp_path / "base", out=tmp_path / "pruned", strategy="rand", ratio=0.5,
        keep_first=1, keep_last=1,
    )  # fmt: skip
    prune.run(spec, NullReporter())
    narrow = load_causal_lm(tmp_path / "pruned")
    with torch.no_grad():
        assert narrow(torch.arange(2, 12)[None]).logits.isfinite().all()
    widths = Geometry.from_config(read_config(tmp_path / "pruned")).layers
    assert [w.num_key_value_heads for w in widths] == [2, 1, 2]


def test_unknown_model_type_lists_the_known():
    with pytest.raises(LoramError, match=r"'gpt2' is not a known family \(known: llama"):
        family_for({"model_type": "gpt2"}, "somewhere")
