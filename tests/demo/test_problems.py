import re
from pathlib import Path

import pytest

from loram_cli.demo.problems import corpus, load_demo, problems


def test_same_seed_same_text():
    assert corpus(20, 3) == corpus(20, 3) != corpus(20, 4)
    assert problems("test", 20) == problems("test", 20)


def test_answers_are_right():
    for record in problems("train", 300):
        steps = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", record["answer"])
        assert steps
        value = None
        for left, op, right, result in steps:
            assert value is None or int(left) == value
            a, b = int(left), int(right)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
            assert value == int(result) > 0
        assert record["answer"].endswith(f"#### {value}")


def test_splits_share_no_question():
    questions = [{r["question"] for r in problems(s, 200)} for s in ("train", "validation", "test")]
    assert (
        not questions[0] & questions[1] | questions[0] & questions[2] | questions[1] & questions[2]
    )
    text = "\n".join(corpus(3000, 0))
    assert not any(question in text for question in questions[2])


def test_unknown_name():
    with pytest.raises(ValueError, match="demo:nothing does not exist"):
        load_demo("nothing")


def test_base_is_small_and_loads_with_stock_libraries():
    from importlib import resources

    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(str(resources.files("loram_cli.demo") / "base"))
    assert sum(p.stat().st_size for p in directory.iterdir()) <= 5_000_000
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.num_hidden_layers >= 8
    text = "Anna has 12 apples.\nÜnïcode: def f(x):\n\treturn x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    question = "Question: Anna has 31 apples. Anna sells 8 of them at school. How many apples are "
    prompt = tokenizer(question + "left for Anna?\nAnswer:", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    # In prose: the other way of writing is what fine-tuning is for.
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith(" First 31 - 8 = 23 ")
    assert answer.endswith(" The answer is 23.")
