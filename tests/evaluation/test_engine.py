import json

import pytest

from loram_cli.errors import LoramError
from loram_cli.evaluation.decode import Generation
from loram_cli.evaluation.engine import Engine, generation
from loram_cli.evaluation.responses import ResponseCache
from loram_cli.evaluation.scoring import TokenSpan


class Request:
    task_name = None

    def __init__(self, *args):
        self.args = args


class Counting:
    """Answers with the prompt's length; dies after so many answers."""

    def __init__(self, dies_after=None):
        self.asked, self.left = [], dies_after

    def generate(self, jobs):
        for place, job in enumerate(jobs):
            if self.left is not None and len(self.asked) == self.left:
                raise KeyboardInterrupt
            self.asked.append(job.prompt)
            yield [(place, f"{len(job.prompt)}-{job.seed % 97}")]


def jobs(count):
    return [Generation("x" * n, ("\n",), 5) for n in range(1, count + 1)]


def test_after_a_kill_only_what_is_missing_is_asked(tmp_path, tokenizer):
    path = tmp_path / "answers.jsonl"
    first, kept = Counting(dies_after=3), ResponseCache(path)
    with pytest.raises(KeyboardInterrupt):
        Engine(lambda: first, tokenizer, 64, kept).generate(jobs(5))
    kept.close()
    # Torn in the middle of a line, as a kill may leave it.
    path.write_bytes(path.read_bytes() + b'{"abc": "half')
    second, kept = Counting(), ResponseCache(path)
    answers = Engine(lambda: second, tokenizer, 64, kept).generate(jobs(5))
    kept.close()
    assert (first.asked, second.asked) == (["x", "xx", "xxx"], ["xxxx", "xxxxx"])
    assert answers == [f"{n}-0" for n in range(1, 6)]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5

    def never():
        raise AssertionError("the model was loaded")

    assert Engine(never, tokenizer, 64, ResponseCache(path)).generate(jobs(5)) == answers


@pytest.mark.parametrize(
    "change",
    [{"prompt": "y"}, {"stops": ("END",)}, {"max_new_tokens": 6}, {"temperature": 0.5}],
)
def test_another_question_is_asked_anew(tokenizer, change):
    backend = Counting()
    engine = Engine(lambda: backend, tokenizer, 64)
    plain = {"prompt": "x", "stops": ("\n",), "max_new_tokens": 5}
    engine.generate([Generation(**plain), Generation(**plain)])
    assert len(backend.asked) == 1
    engine.generate([Generation(**{**plain, **change})])
    assert len(backend.asked) == 2


def test_repeated_samples_are_drawn_anew_and_greedy_ones_are_not(tokenizer):
    backend = Counting()
    engine = Engine(lambda: backend, tokenizer, 64)
    sampled = Request("p", {"do_sample": True, "temperature": 0.2, "until": ["\n"]})
    assert len(set(engine.generate_until([sampled] * 4))) == 4
    greedy = Request("p", {"do_sample": False, "until": ["\n"]})
    assert len(set(engine.generate_until([greedy] * 4))) == 1
    assert len(backend.asked) == 5


def test_lm_evals_arguments_are_read_as_it_reads_them():
    assert generation("p", {"until": "x", "max_new_tokens": 7}, 1, 0) == Generation("p", ("x",), 7)
    job = generation("p", {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 4}, 1, 0)
    assert (job.temperature, job.top_p, job.top_k, job.max_new_tokens) == (0.7, 0.9, 4, 256)
    assert generation("p", {"do_sample": True}, 1, 0).temperature == 1.0
    assert generation("p", {"do_sample": False, "temperature": 0.7}, 1, 0).temperature == 0.0


def test_a_broken_file_of_answers_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(LoramError, match=r"answers\.jsonl: not a file of kept answers"):
        ResponseCache(path)


def test_log_likelihoods_are_lm_evals(model, tokenizer, engine_of):
    """Against lm-eval's own Hugging Face class, on contexts empty, long, and ending in a space."""
    from lm_eval.models.huggingface import HFLM

    pairs = [("", "abc"), ("Question: a?", " yes"), ("Question: a? ", "no"), ("z" * 2000, " end")]
    requests = [Request(*pair) for pair in pairs]
    engine = engine_of(model, tokenizer, 3)
    padded = engine._open_backend()._encoder.tokenizer
    theirs = HFLM(pretrained=model, tokenizer=padded, batch_size=2, max_length=1024)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = engine.loglikelihood(requests)
    assert [answer[0] for answer in found] == pytest.approx([e[0] for e in expected], rel=1e-4)
    assert [answer[1] for answer in found] == [e[1] for e in expected]
    texts = [Request("some text"), Request("w" * 2500)]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert engine.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-4)


def test_spans_are_scored_once(model, tokenizer, engine_of, tmp_path):
    spans = [TokenSpan((0, 5, 6, 7), 2), TokenSpan((0, 9), 1)]
    kept = ResponseCache(tmp_path / "a")
    scores = engine_of(model, tokenizer, cache=kept).score(spans)
    kept.close()
    assert [s.tokens for s in scores] == [2, 1]
    kept = ResponseCache(tmp_path / "a")
    assert Engine(lambda: pytest.fail("asked"), tokenizer, 64, kept).score(spans) == scores
