import math

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.evaluation.perplexity import answer_perplexity, text_perplexity
from loram_cli.training.data.documents import Example

EXAMPLES = [
    Example("Question: How many?\nAnswer:", " 12"),
    Example("Q:", " a much longer answer of several words\n#### 7"),
    Example("Question: " + "x" * 60 + "\nAnswer:", " no"),
    Example("", "no prompt at all"),
]
CONTEXT = 1024


def plain_nlls(model, ids, start):
    """One record at a time: minus log-probability of each token from ``start`` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    return [-log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids))]


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_answers_equal_a_plain_computation(model, tokenizer, engine_of, batch_size):
    records = []
    for example in EXAMPLES:
        ids = tokenizer(example.prompt + example.completion)["input_ids"] + [1]
        records.append(plain_nlls(model, ids, len([0, *example.prompt.encode()])))
    expected = [nll for record in records for nll in record]
    engine = engine_of(model, tokenizer, batch_size)
    result = answer_perplexity(engine, tokenizer, EXAMPLES, CONTEXT)
    assert result.tokens == len(expected) == sum(len(e.completion) + 1 for e in EXAMPLES)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.records, result.truncated) == (4, 0)
    # The jackknife over records, to first order.
    left_out = [
        sum(sum(r) for j, r in enumerate(records) if j != i)
        / sum(len(r) for j, r in enumerate(records) if j != i)
        for i in range(4)
    ]
    centre = sum(left_out) / 4
    jackknife = math.sqrt(3 / 4 * sum((x - centre) ** 2 for x in left_out))
    assert result.nll_stderr == pytest.approx(jackknife, rel=0.5)
    low, high = result.interval
    assert low < result.perplexity < high


def test_tokens_are_those_of_training(model, tokenizer, engine_of):
    from loram_cli.reporting import NullReporter
    from loram_cli.training.data.tokens import tokenize_examples

    rows = tokenize_examples(EXAMPLES, tokenizer, CONTEXT, NullReporter())
    expected = [
        nll for row in rows for nll in plain_nlls(model, row.input_ids.tolist(), row.answer_start)
    ]
    result = answer_perplexity(engine_of(model, tokenizer), tokenizer, EXAMPLES, CONTEXT)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_long_records_keep_their_answer_and_bos(model, tokenizer, engine_of):
    engine = engine_of(model, tokenizer)
    result = answer_perplexity(engine, tokenizer, [Example("p" * 50 + ":", " answer")], 20)
    kept = [0, *tokenizer("p" * 50 + ": answer")["input_ids"][-18:], 1]
    assert result.nll == pytest.approx(sum(plain_nlls(model, kept, 12)) / 8, rel=1e-5)
    assert (result.tokens, result.truncated, result.interval) == (8, 1, None)
    longer = answer_perplexity(engine, tokenizer, [Example("p", "a" * 100)], 20)
    assert (longer.tokens, longer.truncated) == (19, 1)


def test_text_equals_a_plain_sliding_window(model, tokenizer, engine_of):
    texts = ["The quick brown fox jumps over the lazy dog, again and again.", "short", "x" * 31]
    window, stride = 16, 6
    expected = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        expected += plain_nlls(model, ids[:window], 1)
        scored = min(window, len(ids))
        while scored < len(ids):
            # The window moves by the stride; its new tokens see what it holds before them.
            begin = next(b for b in range(0, len(ids), stride) if b + window > scored)
            end = min(begin + window, len(ids))
            expected += plain_nlls(model, ids[begin:end], scored - begin)
            scored = end
    engine = engine_of(model, tokenizer, 4)
    result = text_perplexity(engine, tokenizer, texts, CONTEXT, window=window, stride=stride)
    assert result.tokens == len(expected) == sum(len(text) for text in texts)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_nothing_to_score_is_an_error(model, tokenizer, engine_of):
    engine = engine_of(model, tokenizer)
    with pytest.raises(LoramError, match="no token to score"):
        text_perplexity(engine, tokenizer, [""], CONTEXT)
    with pytest.raises(LoramError, match="stride"):
        text_perplexity(engine, tokenizer, ["abc"], CONTEXT, window=4, stride=4)


def test_trained_model_prefers_stories(stories, engine_of):
    model, tokenizer = stories
    engine = engine_of(model, tokenizer)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    tale = text_perplexity(engine, tokenizer, [story], 512)
    noise = text_perplexity(engine, tokenizer, ["zqx jvk wpf 9311 ((( qqz kkj vvx" * 3], 512)
    assert tale.perplexity < 10 < noise.perplexity
