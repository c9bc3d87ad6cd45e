from pathlib import Path

import pytest
import yaml

from loram_cli.checkpoint.sources import hub_id
from loram_cli.stages.core.card import model_card
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.recover.spec import RecoverSpec
from loram_cli.stages.train.spec import TrainSpec

CACHED = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-2-13b-hf/snapshots/abc"
RESULTS = {"small_params": 1000, "training": {"wall_seconds": 1.0}, "modules": 3}


def front_matter(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_every_model_output_has_a_card_with_front_matter(finished_run: Path):
    for name, library in (
        ("pruned", "transformers"),
        ("aligned", "transformers"),
        ("adapter", "peft"),
        ("recovered", "peft"),
        ("merged", "transformers"),
    ):
        card = (finished_run / name / "README.md").read_text()
        matter = front_matter(card)
        assert matter["library_name"] == library
        assert "loram" in matter["tags"]
        assert "base_model" not in matter, "a local path is no model of the hub"
        assert str(finished_run) not in card
    assert not (finished_run / "eval" / "README.md").exists()


def test_a_base_from_the_hub_is_named_as_there():
    spec = RecoverSpec(
        adapter=Path("/secret/adapter"), model=Path(CACHED), out=Path("/secret/recovered")
    )
    card = model_card("recover", spec, {"path": CACHED}, RESULTS)
    matter = front_matter(card)
    assert matter["base_model"] == "meta-llama/Llama-2-13b-hf"
    assert matter["base_model_relation"] == "adapter"
    assert "/secret" not in card
    assert "/home/me" not in card
    assert 'from_pretrained("meta-llama/Llama-2-13b-hf")' in card


def test_data_is_named_by_its_file_alone():
    data = "/home/me/private/train.jsonl"
    spec = TrainSpec(source=Path("/home/me/pruned"), out=Path("/home/me/adapter"), data=data)
    card = model_card("train", spec, {"path": "/models/base"}, {})
    assert "| rank | 8 |" in card
    assert "| data | train.jsonl |" in card
    assert "/home/me" not in card


def test_hub_ids_are_told_from_cache_paths_alone():
    assert hub_id(Path(CACHED)) == "meta-llama/Llama-2-13b-hf"
    assert hub_id(Path("/x/models--gpt2/snapshots/1")) == "gpt2"
    assert hub_id(Path("/models/base")) is None


@pytest.mark.parametrize("key", ["per_layer_config", "loram_low_bit", "low_rank"])
def test_what_only_our_loader_reads_is_not_said_to_load_everywhere(key: str):
    spec = PruneSpec(model=Path("/models/base"), out=Path("pruned"), strategy="rand")
    ours = model_card("prune", spec, {"path": "/models/base"}, {}, config={key: {}})
    assert f"(`{key}` in `config.json`)" in ours and "load_causal_lm" in ours
    assert "AutoModelForCausalLM" not in ours and "any other trainer" not in ours.lower()
    plain = model_card("prune", spec, {"path": "/models/base"}, {}, config={})
    assert "AutoModelForCausalLM" in plain and "Any other trainer" in plain
