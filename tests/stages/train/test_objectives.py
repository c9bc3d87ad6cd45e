"""train --objective dpo and grpo as commands and specs: defaults, refusals, and the whole way."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.reporters import Interrupter, Interruption
from safetensors.torch import load_file

from loram_cli.cli.app import run_command
from loram_cli.config import defaults as resolve
from loram_cli.config.recipe import load_recipe
from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.rundir import RunDirectory
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.tools.verify import VerifySpec
from loram_cli.tools.verify import run as verify

SILENT = NullReporter()
FIT = {"steps": 3, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0}
SMALL = {**FIT, "max_length": 64, "eval_examples": 4, "eval_steps": 2, "save_steps": 1}
DRAWN = {"generations": 2, "max_completion_length": 8}


@pytest.fixture(scope="session")
def preferences(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i} plus 1?", "chosen": f" {i + 1}", "rejected": f" {i + 2}!"}
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def spec_of(run: Path, data: Path, out: str, **changes: object) -> train.TrainSpec:
    settings = {**SMALL, "objective": "dpo", **changes}
    return train.TrainSpec(source=run / "aligned", out=run / out, data=str(data), **settings)


def words_of(values: dict[str, object]) -> list[str]:
    return [w for k, v in values.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.slow
def test_dpo_and_grpo_follow_sft_in_a_run_and_are_recovered(
    run_copy: Path, preferences: Path, instructions: Path, base: Path
):
    shutil.rmtree(run_copy / "recovered")
    shutil.rmtree(run_copy / "merged")
    common = ["--run", str(run_copy), *words_of(SMALL)]
    dpo = ["train", "--objective", "dpo", "--data", str(preferences), *common]
    assert run_command(dpo) == 0
    manifest = Manifest.read(run_copy / "adapter-dpo")
    sft = Manifest.read(run_copy / "adapter")
    assert manifest.inputs["adapter"]["key"] == sft.key
    assert manifest.spec["beta"] == 0.1
    assert manifest.spec["dropout"] == 0.0
    assert manifest.results["objective"] == "dpo"
    assert {"eval_reward_accuracy_after", "eval_reward_margin_after"} <= set(manifest.results)
    assert load_file(run_copy / "adapter-dpo" / "adapter_model.safetensors").keys() == (
        load_file(run_copy / "adapter" / "adapter_model.safetensors").keys()
    )
    grpo = ["train", "--objective", "grpo", "--data", str(instructions), *common]
    grpo += ["--from-adapter", str(run_copy / "adapter-dpo"), *words_of(DRAWN)]
    assert run_command(grpo) == 0
    assert "eval_reward_after" in Manifest.read(run_copy / "adapter-grpo").results
    # The last of the chain is what is recovered, and it holds what came before it.
    assert run_command(["recover", "--run", str(run_copy)]) == 0
    record = Manifest.read(run_copy / "recovered").inputs["adapter"]
    assert record["key"] == Manifest.read(run_copy / "adapter-grpo").key
    report = verify(VerifySpec(directory=run_copy / "recovered"), SILENT)
    assert not report.problems
    assert {run_copy / "adapter", run_copy / "adapter-dpo"} <= set(report.directories)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(stock, run_copy / "recovered")


REWARDS = """
def short(completions, **fields):
    return [-len(text) / 8 for text in completions]

def level(completions, level, **fields):
    return [float(number) for number in level]
"""
CHAIN = """
model: {base}
prune: {{strategy: rand, ratio: 0.5, keep_first: 1, keep_last: 1}}
train: {{data: {sft}, max_length: 64, {fit}}}
then:
  - {{objective: dpo, data: {pairs}, {fit}}}
  - {{objective: grpo, data: {prompts}, reward: ["{file}:short", "{file}:level"],
      reward_weights: [1.0, 0.5], allow_code_execution: true, generations: 2,
      max_completion_length: 8, {fit}}}
recover: {{}}
"""


@pytest.mark.slow
def test_one_recipe_does_sft_then_dpo_then_grpo_with_rewards_of_ones_own(
    base, instructions, preferences, tmp_path, capsys
):
    (tmp_path / "rewards.py").write_text(REWARDS)
    prompts = [{"prompt": f"Count to {i}", "level": i % 3} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    fit = "steps: 2, batch: 4, micro_batch: 2, warmup_steps: 0, learning_rate: 0.01"
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(
        CHAIN.format(
            base=base, sft=instructions, pairs=preferences, fit=fit,
            prompts=tmp_path / "prompts.jsonl", file=tmp_path / "rewards.py",
        )
    )  # fmt: skip
    run = tmp_path / "run"
    words = ["run", str(recipe), "--run", str(run), "--json"]
    assert run_command([*words, "--dry-run"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [Path(plan["writes"]).name for plan in plans] == [
        "pruned", "adapter", "adapter-dpo", "adapter-grpo", "recovered"
    ]  # fmt: skip
    assert run_command(words) == 0
    capsys.readouterr()
    names = ("adapter", "adapter-dpo", "adapter-grpo")
    made = {name: Manifest.read(run / name) for name in names}
    for before, after in itertools.pairwise(names):
        assert made[after].inputs["adapter"]["key"] == made[before].key
        # What concerns the model holds for all of them.
        assert made[after].spec["max_length"] == 64
    assert Manifest.read(run / "recovered").inputs["adapter"]["key"] == made["adapter-grpo"].key
    assert {f"reward {tmp_path}/rewards.py:{f}" for f in ("short", "level")} <= set(
        made["adapter-grpo"].inputs
    )
    results = made["adapter-grpo"].results
    of_each = results["rewards"]
    total = of_each["final_train_reward_short"] + 0.5 * of_each["final_train_reward_level"]
    assert results["final_train_reward"] == pytest.approx(total, abs=1e-3)
    # The same again is there already, from the first stage to the last.
    assert run_command(words) == 0
    assert not any(result["fresh"] for result in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {}\nthen: [{objective: sft}]", "unknown objective 'sft'"),
        ("train: {}\nthen: [{objective: dpo}, {objective: dpo}]", "two trainings of the same"),
        ("then: [{objective: dpo}]", "continues 'train', which is missing"),
        ("train: {}\nthen: [{objective: dpo, stepz: 1}]", "unknown key 'stepz'"),
        ("train: {}\nfull_lora: true\nthen: [{objective: dpo}]", "full_lora repeats 'train' alone"),
    ],
)
def test_chains_that_cannot_be(tmp_path, text, said):
    file = tmp_path / "chain.yaml"
    file.write_text(f"model: demo\n{text}\n")
    with pytest.raises(UsageError, match=said):
        load_recipe(file)


def test_two_ends_of_training_are_not_guessed_between(
    run_copy: Path, preferences: Path, instructions: Path
):
    for name in ("dpo", "grpo"):
        shutil.copytree(run_copy / "adapter", run_copy / f"adapter-{name}")
        mine = Manifest.read(run_copy / f"adapter-{name}")
        inputs = {**mine.inputs, "adapter": {"path": "x", "key": mine.key}}
        replace(mine, key=name, inputs=inputs).write(run_copy / f"adapter-{name}")
    with pytest.raises(UsageError, match="adapter-dpo and adapter-grpo, and neither resumes"):
        resolve.trained(RunDirectory(run_copy))
    shutil.rmtree(run_copy / "adapter-grpo")
    assert resolve.trained(RunDirectory(run_copy)) == run_copy / "adapter-dpo"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_killed_run_goes_on_to_the_same_adapter(
    run_copy: Path, preferences: Path, instructions: Path, objective: str
):
    data = preferences if objective == "dpo" else instructions
    more = {} if objective == "dpo" else {**DRAWN, "beta": 0.05}
    changes = {"objective": objective, "from_adapter": run_copy / "adapter", **more}

    cut = spec_of(run_copy, data, "cut", **changes)
    with pytest.raises(Interruption):
        train.run(cut, Interrupter(3))
    assert not (run_copy / "cut").exists()
    train.run(cut, SILENT)
    train.run(spec_of(run_copy, data, "whole", **changes), SILENT)
    a, b = (load_file(run_copy / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    for name, tensor in a.items():
        assert torch.equal(b[name], tensor), name
    assert (run_copy / "cut" / "loss.csv").read_text() == (
        (run_copy / "whole" / "loss.csv").read_text()
    )
    places = {"adapter": run_copy / "cut", "out": run_copy / "full"}
    recover.run(
        recover.RecoverSpec(model=Path(Manifest.read(cut.out).base["path"]), **places), SILENT
    )


def test_sft_goes_on_from_an_adapter_too(run_copy: Path, instructions: Path):
    changes = {"objective": "sft", "from_adapter": run_copy / "adapter"}
    spec = spec_of(run_copy, instructions, "more", **changes)
    before = Manifest.read(run_copy / "adapter").results["eval_loss_before"]
    result = train.run(spec, SILENT).manifest
    assert result.spec["dropout"] == 0.05
    assert result.results["eval_loss_before"] < before
    # The same again is the same output, and another start is not.
    assert not train.run(spec, SILENT).fresh


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "pruned"}, "was trained on another model: weights differ"),
        ({"from_adapter": "recovered"}, "was trained on another model"),
        ({"rank": 4}, "--rank 4 is not that of .* \\(8\\)"),
        ({"alpha": 3}, "--alpha 3 is not that of .* \\(16\\)"),
        ({"targets": ("q_proj",)}, "--targets are not those of"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    finished_run, preferences, tmp_path, changes, said
):
    places = {"source": "aligned", "from_adapter": "adapter"}
    places |= {k: v for k, v in changes.items() if k in places}
    paths = {name: finished_run / value for name, value in places.items()}
    others = {k: v for k, v in changes.items() if k not in places}
    spec = train.TrainSpec(
        out=tmp_path / "out", data=str(preferences), objective="dpo", **SMALL, **paths, **others
    )
    with pytest.raises((LoramError, UsageError), match=said):
        train.plan(spec, SILENT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "sft", "beta": 0.1}, "--beta does not go with --objective sft"),
        ({"generations": 4}, "--generations does not go with --objective dpo"),
        ({"temperature": 1.0}, "--temperature does not go with --objective dpo"),
        ({"beta": 0.0}, "--beta must be above 0"),
        ({"dropout": 0.1}, "--dropout does not go with --objective dpo"),
        ({"objective": "sft", "dropout": 1.0}, "--dropout 1 is outside"),
        ({"loss_on": "all"}, "--loss-on all does not go with"),
        ({"objective": "orpo", "beta": 0.0}, "without the odds ratio it is supervised"),
        ({"objective": "kto", "micro_batch": 1}, "kto needs a --micro-batch of at least 2"),
        ({"reward": ("exact",)}, "--reward does not go with --objective dpo"),
        ({"objective": "grpo", "generations": 2, "reward": ("a.py:f",)}, "--allow-code-execution"),
        (
            {"objective": "grpo", "generations": 2, "reward_weights": (1.0, 2.0)},
            "2 --reward-weights for 1 rewards",
        ),
        ({"objective": "grpo", "beta": -1.0}, "--beta cannot be negative"),
        ({"objective": "grpo", "generations": 1}, "--generations must be at least 2"),
        ({"objective": "grpo", "generations": 3}, "--batch 4 is no multiple of --generations 3"),
        ({"objective": "grpo", "generations": 2, "temperature": 0.0}, "--temperature must be"),
        (
            {"objective": "grpo", "generations": 2, "max_completion_length": 64},
            "leaves no room for a prompt in --max-length 64",
        ),
    ],
)
def test_settings_that_cannot_be(preferences, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(tmp_path, preferences, "x", **changes)


def test_too_few_questions_for_a_step(finished_run, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text('{"question": "a", "answer": "#### 1"}\n')
    spec = train.TrainSpec(
        source=finished_run / "aligned", out=tmp_path / "x", data=str(file), objective="grpo",
        **SMALL, **DRAWN,
    )  # fmt: skip
    with pytest.raises(UsageError, match="1 questions, and a step takes 2"):
        train.run(spec, SILENT)


def test_dry_run_counts_the_reference_and_the_completions(
    finished_run, preferences, instructions, tmp_path
):
    def plan(count=True, **changes):
        data = instructions if changes.get("objective") != "dpo" else preferences
        spec = train.TrainSpec(
            source=finished_run / "aligned", out=tmp_path / "x", data=str(data),
            **{**SMALL, "dropout": 0.0, **changes},
        )  # fmt: skip
        return train.plan(spec, SILENT, count=count)

    start = {"from_adapter": finished_run / "adapter"}
    sft, dpo, after = plan(objective="sft"), plan(objective="dpo"), plan(objective="dpo", **start)
    factors = 4 * sft.figures["lora_params"]
    # A pair is two sequences, and a reference a copy of the factors but no second model.
    by_length = [plan(objective=name, count=False).memory_bytes for name in ("sft", "dpo")]
    assert by_length[0] < by_length[1] < 2 * by_length[0]
    # Counted with the data at hand, a pass has fewer tokens than the longest examples would have.
    assert sft.memory_bytes < by_length[0]
    assert dpo.memory_bytes < by_length[1]
    assert after.memory_bytes == dpo.memory_bytes + factors
    assert (dpo.figures["examples"], dpo.figures["eval_examples"]) == (56, 4)
    few, many = (plan(objective="grpo", batch=n, **DRAWN) for n in (4, 100))
    assert few.figures["epochs"] == round(3 * 4 / 2 / 56, 2)
    assert many.memory_bytes > few.memory_bytes
    assert str(finished_run / "adapter") in after.reads


def test_the_demo_needs_no_flags(tmp_path):
    demo = resolve.Place(RunDirectory(tmp_path / "run"), "demo")
    for name in ("dpo", "orpo", "kto"):
        values = resolve.stage_defaults(demo, "train", {"objective": name})
        assert values["data"] == "demo:preferences"
    assert resolve.stage_defaults(demo, "train", {})["data"] == "demo:train"
    assert resolve.stage_defaults(demo, "train", {"objective": "grpo"})["data"] == "demo:train"
    for name in ("sft", "dpo", "orpo", "kto", "grpo"):
        values = resolve.stage_defaults(demo, "train", {"objective": name})
        train.TrainSpec(source=tmp_path, out=tmp_path / "x", objective=name, **values)


def test_mistakes_in_data_name_the_line_and_give_no_traceback(finished_run, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    words = ["train", "--in", finished_run / "aligned", "--out", tmp_path / "x", "--data", file]
    assert run_command([*map(str, words), "--objective", "dpo"]) == 1
    said = capsys.readouterr().err
    assert "bad.jsonl, line 2: field 'chosen' of a preference is missing" in said
    assert "Traceback" not in said
