"""Answers of a run's models, as text and as the commands give them."""

import json

import pytest
import torch

from loram_cli import api
from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.decode import Decoder, Generation
from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.generate import GenerateSpec, trained_layout
from loram_cli.training.adapters import load_adapter

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
    assert trained_layout((base, finished_run / "recovered")) == "question"
    assert trained_layout((finished_run / "pruned", finished_run / "adapter")) == "question"
    assert trained_layout((base,)) is None


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
    small = spec_of(rows=rows, prompts=prompts, weights_memory_bytes=160_000)
    assert api.generate(small) == whole
    quantized = {"rows": rows, "quantize": "nf4"}
    in_parts = api.generate(spec_of(**quantized, weights_memory_bytes=130_000))
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
        ({"temperature": -1.0}, "--temperature -1"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"weights_memory_bytes": 0}, "--weights-memory"),
    ],
)
def test_what_cannot_be_asked(spec_of, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(**changes)


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
