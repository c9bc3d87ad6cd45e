"""Answers of a run's models, as text and as the commands give them."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli import api
from loram_cli.checkpoint.model import Model
from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.decode import Decoder, Generation, end_tokens
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.schema import spec_from_mapping
from loram_cli.stages.core.lineage import trained_layout
from loram_cli.stages.evaluate.generate import GenerateSpec
from loram_cli.stages.evaluate.rows import open_row
from loram_cli.training.adapters import load_adapter
from loram_cli.training.data.documents import source_layout

PROMPT = "What is 2 plus 1?"


@pytest.fixture
def spec_of(base, finished_run):
    def build(**changes):
        rows = {"recovered": (base, finished_run / "recovered")}
        settings = {"model": base, "rows": rows, "prompts": (PROMPT,), "max_new_tokens": 8}
        return GenerateSpec(**{**settings, "device": "cpu", **changes})

    return build


def test_an_adapter_remembers_how_to_ask_it(base, finished_run):
    assert Manifest.read(finished_run / "adapter").results["layout"] == "question"
    for name in ("adapter", "recovered", "merged"):
        assert trained_layout(finished_run / name) == "question"
    assert trained_layout(base) is None
    assert trained_layout(finished_run / "pruned") is None


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"question": "a", "answer": "b"}, "question"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"prompt": "a", "completion": "b"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "messages"),
        ({"text": "a"}, "text"),
        ({"body": "a"}, None),
    ],
)
def test_data_tells_how_its_pupils_are_asked(record, layout, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    assert source_layout(str(file)) == layout


def test_data_may_be_gone_when_training_ends(finished_run, instructions, tmp_path, monkeypatch):
    from loram_cli.stages.train import stage as train

    data = tmp_path / "data.jsonl"
    shutil.copyfile(instructions, data)
    finish = train.finish_fit

    def finish_without_data(*words):
        data.unlink()
        return finish(*words)

    monkeypatch.setattr(train, "finish_fit", finish_without_data)
    spec = api.TrainSpec(
        source=finished_run / "pruned", out=tmp_path / "adapter", data=str(data), steps=1,
        batch=2, micro_batch=2, max_length=64, warmup_steps=0,
    )  # fmt: skip
    assert api.train(spec).manifest.results["layout"] == "question"


@pytest.mark.parametrize("way", [{}, {"weights_memory": 160_000}, {"quantize": "nf4"}])
def test_every_end_token_of_the_generation_config_ends_an_answer(base, spec_of, tmp_path, way):
    """Published chat models name some of them there alone."""
    chatty = shutil.copytree(base, tmp_path / "chatty")
    (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 77]}))
    spec = spec_of(rows={"base": (chatty,)}, **way)
    with open_row(spec, "base", Model.open(chatty), NullReporter()) as model:
        assert end_tokens(model, load_tokenizer(base)) == {0, 77}


def test_a_row_is_gone_when_the_next_one_is_opened(base, finished_run, spec_of, monkeypatch):
    import weakref

    from loram_cli.stages.evaluate import generate

    opened, alive = [], []
    real = generate.open_row

    @contextmanager
    def watched(spec, label, opening, reporter):
        alive.append([model() is not None for model in opened])
        with real(spec, label, opening, reporter) as model:
            opened.append(weakref.ref(model))
            yield model

    monkeypatch.setattr(generate, "open_row", watched)
    rows = {"base": (base,), "recovered": (base, finished_run / "recovered"), "more": (base,)}
    for memory in (None, 160_000):
        opened.clear()
        alive.clear()
        api.generate(spec_of(rows=rows, weights_memory=memory))
        assert alive == [[], [False], [False, False]]


def test_the_answer_is_that_of_base_and_adapter(base, finished_run, spec_of):
    [answer] = api.generate(spec_of())
    assert answer.rendered == f"Question: {PROMPT}\nAnswer:"
    model = load_causal_lm(base, dtype=torch.float32, device="cpu")
    model = load_adapter(model, finished_run / "recovered")
    tokenizer = load_tokenizer(base)
    ids = tokenizer(answer.rendered)["input_ids"]
    [text] = Decoder(model, tokenizer).generate([ids], [Generation(answer.rendered, (), 8)])
    assert answer.text == text.strip()


def test_memory_changes_no_answer_and_every_row_is_asked_alike(base, finished_run, spec_of):
    rows = {"base": (base,), "recovered": (base, finished_run / "recovered")}
    prompts = (PROMPT, "Why?")
    whole = api.generate(spec_of(rows=rows, prompts=prompts))
    assert [(a.row, a.prompt) for a in whole] == [
        (row, prompt) for row in rows for prompt in prompts
    ]
    # The base's own manifest tells of no layout; the adapter's does.
    assert all(a.rendered == f"Question: {a.prompt}\nAnswer:" for a in whole)
    small = spec_of(rows=rows, prompts=prompts, weights_memory=160_000)
    assert api.generate(small) == whole
    quantized = {"rows": rows, "quantize": "nf4"}
    in_parts = api.generate(spec_of(**quantized, weights_memory=130_000))
    assert api.generate(spec_of(**quantized)) == in_parts


@pytest.mark.parametrize(
    ("layout", "rendered"),
    [
        ("prompt", PROMPT),
        ("messages", f"User: {PROMPT}\nAssistant:"),
        (
            "instruction",
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{PROMPT}\n\n### Response:\n",
        ),
    ],
)
def test_a_layout_is_chosen(spec_of, layout, rendered):
    assert api.generate(spec_of(layout=layout, max_new_tokens=1))[0].rendered == rendered


def test_drawn_answers_follow_the_seed_and_differ_by_prompt(spec_of):
    drawn = [
        api.generate(spec_of(prompts=(PROMPT, PROMPT), temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    texts = [[answer.text for answer in answers] for answers in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": {}}, "no model to ask"),
        ({"prompts": ()}, "prompt is empty"),
        ({"prompts": ("a", " ")}, "prompt is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, r"--temperature cannot be negative \(-1\)"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"top_p": 0.5}, "--top-p is for drawn tokens"),
        ({"prompts": ("\udcff",)}, "not UTF-8"),
        ({"weights_memory": 0}, "--weights-memory"),
    ],
)
def test_what_cannot_be_asked(spec_of, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(**changes)


def test_an_amount_is_read_where_the_spec_is_made(base):
    values = {"model": base, "rows": {"base": (base,)}, "prompts": ("a",)}
    with pytest.raises(UsageError, match="weights_memory: 'many'"):
        spec_from_mapping(GenerateSpec, {**values, "weights_memory": "many"}, "generate")


def test_a_prompt_that_fills_the_context_is_refused(spec_of):
    with pytest.raises(LoramError, match=r"of \d+ tokens leaves no room in recovered's context"):
        api.generate(spec_of(prompts=("word " * 60,)))
    # Near its end there is less to write than was asked for.
    [answer] = api.generate(spec_of(prompts=("x" * 230,), max_new_tokens=500))
    assert len(answer.text.encode()) < 60


def test_the_command_prints_the_text_alone(base, finished_run, capsys, monkeypatch):
    words = ["generate", "--run", str(finished_run), "--device", "cpu", "--max-new-tokens", "6"]
    assert run_command([*words, "--json", PROMPT]) == 0
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    assert answer["row"] == "recovered"
    assert run_command([*words, PROMPT]) == 0
    told = capsys.readouterr()
    assert told.out.rstrip("\n") == answer["text"].rstrip("\n")
    assert "asking recovered" in told.err and "layout question" in told.err
    # Several answers are told apart, and a row of one's own is asked alone.
    assert run_command([*words, "--rows", "base,recovered", PROMPT]) == 0
    out = capsys.readouterr().out
    assert "base ─" in out and "recovered ─" in out
    assert run_command([*words, "--row", f"mine={base}", "--json", PROMPT]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["row"] == "mine"
    assert run_command([*words, "--rows", "none", PROMPT]) == 2
    assert "unknown row 'none'" in capsys.readouterr().err


def test_what_is_piped_in_is_the_prompt(finished_run, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
    words = ["generate", "--run", str(finished_run), "--device", "cpu", "--max-new-tokens", "2"]
    assert run_command([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["prompt"] == PROMPT
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run_command(words) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_settings_reach_it_and_answers_are_printed_as_they_are(
    finished_run, capsys, monkeypatch, tmp_path
):
    from loram_cli.stages.evaluate import generate

    asked = []

    def answering(spec, reporter):
        asked.append(spec)
        return [generate.Answer(row="a", prompt="b", rendered="c", text="':smile:' # :apple: [b]")]

    monkeypatch.setattr(generate, "run", answering)
    for name, value in {"SEED": "7", "DEVICE": "cpu", "GENERATE_WEIGHTS_MEMORY": "3MiB"}.items():
        monkeypatch.setenv(f"LORAM_{name}", value)
    assert run_command(["generate", "--run", str(finished_run), "b"]) == 0
    assert capsys.readouterr().out == "':smile:' # :apple: [b]\n"
    assert (asked[0].seed, asked[0].device, asked[0].weights_memory) == (7, "cpu", 3 * 2**20)


def test_an_adapter_of_another_model_is_refused_in_a_line(finished_run, capsys):
    row = f"mixed={finished_run / 'pruned'}+{finished_run / 'recovered'}"
    for more in ([], ["--quantize", "nf4"]):
        assert run_command(["generate", "--row", row, "--device", "cpu", *more, "b"]) == 1
        assert "its factors have other shapes than" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_an_adapter_that_changed_since_it_was_recovered_is_refused(
    base, finished_run, tmp_path, capsys, command, name
):
    adapter = shutil.copytree(finished_run / "recovered", tmp_path / "mine")
    data = bytearray((adapter / name).read_bytes())
    # In the last factor, or a blank at the end of the text: each alone would be used as it is.
    data[-1] = data[-1] ^ 1 if name.endswith("safetensors") else ord(" ")
    (adapter / name).write_bytes(data)
    more = ["b"] if command == "generate" else ["--tasks", "gsm8k", "--out", str(tmp_path / "out")]
    row = f"mine={base}+{adapter}"
    assert run_command([command, "--row", row, "--device", "cpu", *more]) == 1
    told = "".join(capsys.readouterr().err.split())
    assert f"{name}:ismissing,ornotthefilethat'recover'wrote" in told


WAYS = ([], ["--weights-memory", "160KB"], ["--quantize", "nf4"])
FIRST = "model.layers.0.mlp.down_proj"


def changed_adapter(source, target, rename=None, **config):
    """A copy with other names of factors (None leaves one out) or other settings."""
    shutil.copytree(source, target)
    (target / "loram.json").unlink()
    file = target / "adapter_model.safetensors"
    factors = {(rename or str)(name): factor for name, factor in load_file(file).items()}
    factors.pop(None, None)
    save_file(factors, file, metadata={"format": "pt"})
    settings = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return target


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (
            lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
            "has no module model.language_model.layers.0.",
        ),
        (
            lambda name: name.replace("model.model.layers", "model.layers"),
            "has no module layers.0.",
        ),
        (lambda name: name.replace("down_proj", "down"), "has no module model.layers.0.mlp.down"),
        (
            lambda name: None if FIRST in name else name,
            f"no factors for a module that adapter_config.json targets: {FIRST}.lora_A",
        ),
    ],
)
def test_factors_and_modules_are_one_to_one(
    base, finished_run, tmp_path, capsys, way, rename, said
):
    adapter = changed_adapter(finished_run / "recovered", tmp_path / "mine", rename)
    words = ["generate", "--row", f"mine={base}+{adapter}", "--device", "cpu", *way, "b"]
    assert run_command(words) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "mine" in told and "pass the adapter that was made for this model" in told


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "many"},
        {"r": 3},
        {"use_dora": True},
        {"target_modules": ["nowhere"]},
        {"target_modules": 5},
        {"lora_dropout": "much"},
        {"lora_dropout": 7},
        {"layers_pattern": [1]},
        {"task_type": ["x"]},
    ],
)
def test_an_adapters_settings_are_blamed_by_file(base, finished_run, tmp_path, capsys, config):
    adapter = changed_adapter(finished_run / "recovered", tmp_path / "mine", **config)
    words = ["generate", "--row", f"mine={base}+{adapter}", "--device", "cpu", "b"]
    assert run_command(words) == 1
    told = "".join(capsys.readouterr().err.split())
    assert "internal:" not in told
    assert str(adapter) in told


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", "{"),
        ("generation_config.json", '{"max_length": "x", "eos_token_id": {}}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nope"}}'),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
    ],
)
def test_damaged_files_beside_the_weights_are_named(base, tmp_path, capsys, way, name, text):
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / name).write_text(text)
    words = ["generate", "--row", f"mine={broken}", "--device", "cpu", *way, "b"]
    assert run_command(words) == 1
    told = "".join(capsys.readouterr().err.split())
    assert "internal:" not in told
    assert str(broken) in told
