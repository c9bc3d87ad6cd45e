import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import make_adapter, make_model
from safetensors.torch import load_file, save_file

from loram_cli.arch.registry import families
from loram_cli.cli.app import run_command
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.tools import vllm_rules
from loram_cli.tools.vllm_rules import check_adapter, check_model, least_max_rank

FAMILIES = {family.family: family for family in families()}


# Its fixture makes a model with transformers.
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model(folder / "model")
    return model, make_adapter(model, folder / "adapter")


@pytest.fixture
def adapter(made, tmp_path):
    """A copy of the adapter, and a way to change its config and its tensors' names."""
    model, source = made
    (tmp_path / "mine").mkdir()
    config = json.loads((source / CONFIG_NAME).read_text())
    config["target_modules"] = ["q_proj"]
    tensors = load_file(source / WEIGHTS_NAME)

    def write(rename=lambda name: name, base=model, **changes):
        folder = tmp_path / "mine"
        (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
        save_file({rename(k): v for k, v in tensors.items()}, folder / WEIGHTS_NAME)
        return check_adapter(folder, base)

    return write


def as_family(made, tmp_path, name: str) -> Path:
    """The same directory, its config of another model type."""
    folder = tmp_path / name
    folder.mkdir()
    config = json.loads((made[0] / "config.json").read_text())
    config["model_type"] = FAMILIES[name].model_types[0]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_plain_adapter_of_llama_passes_and_its_command_is_told(adapter, made):
    found = adapter()
    assert found.problems == []
    assert found.notes[-1].startswith(f"vLLM: vllm serve {made[0]} --enable-lora --lora-modules ")
    assert "max-lora-rank" not in found.notes[-1]


@pytest.mark.parametrize(
    ("rank", "least"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (513, None)]
)
def test_a_rank_needs_the_next_allowed_maximum(rank, least):
    assert least_max_rank({"r": rank}) == least
    assert least_max_rank({"r": 1, "rank_pattern": {"q_proj": rank}}) == least


def test_a_rank_above_the_default_needs_a_flag(adapter):
    assert "--max-lora-rank 64" in adapter(r=48).notes[-1]
    assert "rank 600, and vLLM holds 512 at most" in adapter(r=600).problems[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
        ({"r": 0}, "a rank is no whole number above 0"),
        ({"rank_pattern": [8]}, "a rank is no whole number above 0"),
        ({"rank_pattern": {"q_proj": "8"}}, "a rank is no whole number above 0"),
        ({"lora_bias": True}, "lora_bias is set"),
    ],
)
def test_what_its_loader_refuses_is_named(adapter, changes, said):
    found = adapter(**changes)
    assert any(said in problem for problem in found.problems), found.problems
    assert not any("vllm serve" in note for note in found.notes)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_what_its_loader_takes_is_not(adapter, changes):
    assert adapter(**changes).problems == []


def test_a_missing_setting_is_named(adapter, tmp_path):
    adapter()
    file = tmp_path / "mine" / CONFIG_NAME
    config = json.loads(file.read_text())
    del config["target_modules"]
    file.write_text(json.dumps(config))
    [problem] = check_adapter(tmp_path / "mine", None).problems
    assert "target_modules missing" in problem


def test_a_tensor_that_is_no_factor_is_named(adapter):
    found = adapter(lambda name: name.replace("lora_A.weight", "lora_magnitude_vector"))
    assert "lora_magnitude_vector is no LoRA factor" in found.problems[0]


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mistral", "olmo2"])
def test_factors_of_a_head_that_vllm_does_not_take_are_named(adapter, made, tmp_path, name):
    [problem] = adapter(base=as_family(made, tmp_path, name)).problems
    assert "2 factors of lm_head, which vLLM" in problem
    assert "--targets q_proj,k_proj" in problem
    assert "recover --merge" in problem


def test_a_fused_module_that_vllm_knows_in_parts_only_is_named(made, tmp_path):
    base = as_family(made, tmp_path, "glm4")
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(
        json.dumps({"r": 2, "lora_alpha": 2, "target_modules": ["gate_up_proj"]})
    )
    name = "base_model.model.model.layers.0.mlp.gate_up_proj"
    factors = {
        f"{name}.lora_A.weight": torch.zeros(2, 4),
        f"{name}.lora_B.weight": torch.ones(4, 2),
    }
    save_file(factors, folder / WEIGHTS_NAME)
    [problem] = check_adapter(folder, base).problems
    assert "2 factors of gate_up_proj" in problem
    assert "gate_up_proj" not in problem.partition("--targets ")[2]


def test_factors_of_an_embedding_are_taken_where_vllm_wraps_it(adapter, made, tmp_path):
    def embedding(name):
        module = name.rpartition(".lora_")[0]
        factor = "A" if "lora_A" in name else "B"
        return f"{module}.embed_tokens.lora_embedding_{factor}"

    assert adapter(embedding).problems == []
    [problem] = adapter(embedding, as_family(made, tmp_path, "mistral")).problems
    assert "factors of embed_tokens" in problem


@pytest.mark.parametrize("name", ["falcon", "stablelm"])
def test_a_class_without_lora_is_named(adapter, made, tmp_path, name):
    [problem] = adapter(base=as_family(made, tmp_path, name)).problems
    assert f"takes no LoRA for {FAMILIES[name].architecture}" in problem


def test_a_vocabulary_too_large_for_a_head_is_named(adapter, made, tmp_path):
    base = as_family(made, tmp_path, "qwen3")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 262144}))
    assert "a vocabulary of 262144" in adapter(base=base).problems[0]


def test_without_the_base_names_are_read_and_not_compared(adapter):
    found = adapter(base=None)
    assert found.problems == []
    assert "module names not checked" in found.notes[0]
    assert "vllm serve BASE" in found.notes[1]


def test_a_model_of_one_width_passes_and_a_pruned_one_does_not(made, tmp_path):
    assert check_model(made[0]).notes == [f"vLLM: vllm serve {made[0]}"]
    pruned = as_family(made, tmp_path, "llama")
    config = json.loads((pruned / "config.json").read_text())
    config["per_layer_config"] = {"1": {"intermediate_size": 64}}
    (pruned / "config.json").write_text(json.dumps(config))
    assert "the layers differ in width" in check_model(pruned).problems[0]
    assert "an adapter of the pruned" in check_adapter(made[1], pruned).problems[-1]


def test_verify_tells_it_of_a_run(finished_run, capsys):
    words = ["verify", str(finished_run), "--for", "vllm", "--json"]
    assert run_command(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [note for note in told["notes"] if "--lora-modules recovered=" in note]
    assert [note for note in told["notes"] if note.endswith(str(finished_run / "merged"))]
    assert run_command(["verify", str(finished_run / "adapter"), "--for", "vllm"]) == 1
    assert "an adapter of the pruned" in capsys.readouterr().out


def test_every_family_says_how_vllm_loads_it():
    # Nobody has looked at mixtures of experts and these yet, and verify says so.
    not_looked_at = {
        "biogpt", "gpt_bigcode", "gpt_neo", "gptj", "lfm2", "opt", "persimmon", "xglm", "youtu",
    }  # fmt: skip
    unknown = {family.family for family in families() if family.vllm is None}
    mixtures = {f.family for f in families() if any(".experts." in t.name for t in f.layer_tensors)}
    assert unknown == mixtures | not_looked_at
    for family in families():
        if family.vllm is None:
            continue
        assert {*family.vllm.refused} <= {*family.lora_targets}
        assert {*family.vllm.embeddings} <= {"embed_tokens", family.lm_head_target}


# From here on against vLLM's own source, which is read and not imported: that takes a GPU.
@pytest.fixture(scope="module")
def source() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is absent; put its unpacked wheel on PYTHONPATH")
    return Path(spec.submodule_search_locations[0])


def class_facts(folder: Path, module: str, name: str) -> dict:
    """A model class's own and inherited settings, and whether it takes adapters."""
    tree = ast.parse((folder / f"{module}.py").read_text())
    [found] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    facts: dict = {}
    for base in found.bases:
        if not isinstance(base, ast.Name):
            continue
        if base.id == "SupportsLoRA":
            facts["lora"] = True
        local = any(isinstance(n, ast.ClassDef) and n.name == base.id for n in tree.body)
        origin = next(
            (
                n.module
                for n in tree.body
                if isinstance(n, ast.ImportFrom) and base.id in {a.name for a in n.names}
            ),
            None,
        )
        if local or (base.id.endswith("ForCausalLM") and origin):
            parent = module if local else str(origin).rpartition(".")[-1]
            facts = {**class_facts(folder, parent, base.id), **facts}
    for node in found.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in (
            "packed_modules_mapping",
            "embedding_modules",
        ):
            facts[target.id] = ast.literal_eval(node.value)
    return facts


def registered(folder: Path) -> dict[str, tuple[str, str]]:
    table: dict[str, tuple[str, str]] = {}
    for node in ast.parse((folder / "registry.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    table.setdefault(key.value, ast.literal_eval(value))
    return table


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_facts_are_those_of_the_installed_vllm(source, name):
    folder = source / "model_executor" / "models"
    family = FAMILIES[name]
    module, cls = registered(folder).get(family.architecture, ("transformers", ""))
    assert (family.vllm.backend == "transformers") == (module == "transformers")
    if module == "transformers":
        return
    facts = class_facts(folder, module, cls)
    assert family.vllm.lora == facts.get("lora", False)
    assert {*family.vllm.embeddings} == {
        *facts.get("embedding_modules", {})
    } or not family.vllm.lora
    packed = facts.get("packed_modules_mapping", {})
    parts = {part for parts in packed.values() for part in parts}
    refused = {t for t in family.lora_targets if t in packed and t not in parts}
    assert {*family.vllm.refused} == refused or not family.vllm.lora


def test_the_limits_are_those_of_the_installed_vllm(source):
    text = (source / "config" / "lora.py").read_text()
    ranks = text.partition("MaxLoRARanks = Literal")[2].partition("\n")[0]
    assert tuple(json.loads(ranks)) == vllm_rules.MAX_RANKS
    assert f"max_lora_rank: MaxLoRARanks = {vllm_rules.DEFAULT_MAX_RANK}" in text
    head = (source / "lora" / "layers" / "logits_processor.py").read_text()
    assert f"vocab_size > {vllm_rules.LARGEST_VOCABULARY}" in head
