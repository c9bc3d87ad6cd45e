import copy
import threading
from dataclasses import replace

import pytest
import torch
from helpers.reporters import WarningRecorder

from loram_cli.errors import LoramError
from loram_cli.evaluation.decode import Generation
from loram_cli.reporting import NullReporter
from loram_cli.serving.engine import (
    AnswerTimeoutError,
    EngineBusyError,
    EngineClosedError,
    PromptTooLongError,
    ServingEngine,
    _try_template,
)
from loram_cli.stages.evaluate import generate
from loram_cli.stages.evaluate.spec import GenerateSpec

pytestmark = pytest.mark.integration
PROMPT = "What is 2 plus 1?"


def said(engine, row, text=PROMPT, on_text=None):
    ids = engine.rows[row].chat_ids([{"role": "user", "content": text}])
    [done] = engine.answer(row, [ids], [Generation(text, (), 8)], on_text)
    return done


def test_rows_of_one_base_share_its_weights_and_answer_as_generate_does(rows, spec_of):
    assert rows["base"].loaded is rows["recovered"].loaded
    engine = ServingEngine(rows)
    spec = spec_of(GenerateSpec, prompts=(PROMPT,))
    expected = {a.row: a.text for a in generate.run(spec, NullReporter())}
    # One after the other and back: neither row's adapter is left acting for the other.
    for row in ("recovered", "base", "recovered"):
        assert said(engine, row).text.strip() == expected[row]


def test_the_adapter_acts_for_its_own_row_alone(rows):
    from loram_cli.training.adapters import with_adapter

    ids = torch.tensor([rows["base"].text_ids(PROMPT)])
    logits = {}
    with torch.no_grad():
        for name, row in rows.items():
            with with_adapter(row.loaded, row.adapter):
                logits[name] = row.loaded(ids).logits
    assert not torch.equal(logits["base"], logits["recovered"])


def test_text_so_far_grows_to_the_answer(rows):
    heard = []
    done = said(ServingEngine(rows), "base", on_text=lambda place, text: heard.append(text))
    assert heard[-1] == done.text
    assert len(heard) >= done.tokens
    assert done.cut == (done.tokens == 8)


def test_a_prompt_beyond_the_context_is_refused(rows):
    with pytest.raises(PromptTooLongError, match="leaves no room in base's context"):
        rows["base"].text_ids("word " * rows["base"].context_tokens)
    with pytest.raises(LoramError, match="the last message is not the user's"):
        rows["base"].chat_ids([{"role": "assistant", "content": "a"}])


def test_more_requests_than_may_wait_are_refused(rows):
    engine = ServingEngine(rows, queue=0)
    inside, go_on = threading.Event(), threading.Event()

    def wait(place, text):
        inside.set()
        go_on.wait(30)

    first = threading.Thread(target=said, args=(engine, "base", PROMPT, wait))
    first.start()
    assert inside.wait(30)
    try:
        with pytest.raises(EngineBusyError, match="too many requests"):
            said(engine, "recovered")
    finally:
        go_on.set()
        first.join()
    assert said(engine, "recovered").tokens


def test_an_answer_ends_with_its_time_and_with_the_engine(rows):
    engine = ServingEngine(rows, seconds=1e-9)
    with pytest.raises(AnswerTimeoutError, match="no answer within"):
        said(engine, "base")
    engine = ServingEngine(rows)
    with pytest.raises(EngineClosedError):
        said(engine, "base", on_text=lambda place, text: engine._closing.set())
    # What is held for an answer is given back.
    with pytest.raises(EngineClosedError):
        said(engine, "base")


def test_the_layout_without_turns_gets_earlier_ones_as_examples(rows):
    row = rows["recovered"]
    assert row.layout == "question"
    turns = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2?"},
    ]
    text = row.tokenizer.decode(row.chat_ids(turns), skip_special_tokens=True)
    assert text == "Count.\n\nQuestion: 1?\nAnswer: 2\n\nQuestion: 2?\nAnswer:"


def test_a_template_that_fails_is_told_before_anybody_asks(rows):
    tokenizer = copy.copy(rows["base"].tokenizer)
    tokenizer.chat_template = "{{ 1 // 0 }}"
    told = WarningRecorder()
    for layout in ("messages", "prompt"):
        _try_template(replace(rows["base"], tokenizer=tokenizer, layout=layout), told)
    [line] = told.warnings
    assert line.startswith("row base: ") and "zero" in line
