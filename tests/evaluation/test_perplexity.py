import math

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.evaluation.perplexity import answer_perplexity, text_perplexity

PAIRS = [
    ("Question: How many?\nAnswer:", " 12"),
    ("Q:", " a much longer answer of several words\n#### 7"),
    ("Question: " + "x" * 60 + "\nAnswer:", " no"),
    ("", "no prompt at all"),
]


def plain_nlls(model, ids, start):
    """One record at a time: minus log-probability of each token from ``start`` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    return [-log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids))]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_a_plain_computation(model, tokenizer, batch_size):
    expected = []
    for prompt, completion in PAIRS:
        head = [0, *prompt.encode()]
        ids = tokenizer(prompt + completion)["input_ids"] + [1]
        expected += plain_nlls(model, ids, len(head))
    result = answer_perplexity(model, tokenizer, PAIRS, batch_size=batch_size)
    assert result.tokens == len(expected) == sum(len(answer.encode()) + 1 for _, answer in PAIRS)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    spread = torch.tensor(expected).std(correction=0).item()
    assert result.nll_std == pytest.approx(spread, rel=1e-3)
    assert (result.records, result.truncated) == (4, 0)


def test_eos_is_scored_only_on_request(model, tokenizer):
    with_eos = answer_perplexity(model, tokenizer, PAIRS)
    without = answer_perplexity(model, tokenizer, PAIRS, append_eos=False)
    assert with_eos.tokens - without.tokens == len(PAIRS)


def test_long_records_keep_their_answer_and_bos(model, tokenizer):
    pair = ("p" * 50 + ":", " answer")
    result = answer_perplexity(model, tokenizer, [pair], max_length=20)
    kept = [0, *tokenizer("p" * 50 + ": answer")["input_ids"][-18:], 1]
    assert result.nll == pytest.approx(sum(plain_nlls(model, kept, 12)) / 8, rel=1e-5)
    assert (result.tokens, result.truncated) == (8, 1)
    longer = answer_perplexity(model, tokenizer, [("p", "a" * 100)], max_length=20)
    assert (longer.tokens, longer.truncated) == (19, 1)


def test_text_equals_a_plain_sliding_window(model, tokenizer):
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
    result = text_perplexity(model, tokenizer, texts, window=window, stride=stride, batch_size=4)
    assert result.tokens == len(expected) == sum(len(text) for text in texts)
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_mode_is_given_back_and_dropout_is_off(model, tokenizer):
    expected = answer_perplexity(model, tokenizer, PAIRS).nll
    model.train()
    assert answer_perplexity(model, tokenizer, PAIRS).nll == expected
    assert model.training


def test_nothing_to_score_is_an_error(model, tokenizer):
    with pytest.raises(LoramError, match="no token to score"):
        text_perplexity(model, tokenizer, [""])
    with pytest.raises(LoramError, match="stride"):
        text_perplexity(model, tokenizer, ["abc"], window=4, stride=4)


def test_trained_model_prefers_stories(stories):
    model, tokenizer = stories
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    tale = text_perplexity(model, tokenizer, [story])
    noise = text_perplexity(model, tokenizer, ["zqx jvk wpf 9311 ((( qqz kkj vvx" * 3])
    assert tale.perplexity < 10 < noise.perplexity
