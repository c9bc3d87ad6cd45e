import pytest

from loram_cli.evaluation.code_tasks import score_code
from loram_cli.evaluation.decode import Generation
from loram_cli.evaluation.engine import Engine
from loram_cli.evaluation.humaneval import CodeSettings
from loram_cli.evaluation.intervals import normal_interval, wilson_interval
from loram_cli.evaluation.requests import TaskRequest
from loram_cli.evaluation.sandbox import SandboxResult
from loram_cli.evaluation.scores import read_samples
from loram_cli.reporting import NullReporter


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Published values: Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(successes, trials, low, high):
    found = wilson_interval(successes, trials)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_normal_interval_stays_in_its_range():
    assert normal_interval(0.5, 0.1) == pytest.approx((0.304, 0.696), abs=1e-3)
    assert normal_interval(0.01, 0.1, lowest=0.0, highest=1.0)[0] == 0.0
    assert normal_interval(0.5, None) is None


class Problem:
    def __init__(self, number):
        self.doc = {"task_id": f"x/{number}", "prompt": f"p{number}", "canonical_solution": "s"}
        self.args = (self.doc["prompt"], {})


class Task:
    class config:
        num_fewshot = 0
        generation_kwargs = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}  # noqa: RUF012

    instances = (Problem(0), Problem(1))


class Recording:
    def __init__(self):
        self.jobs: list[Generation] = []

    def generate(self, jobs):
        self.jobs += jobs
        yield [(place, f"{job.prompt}@{job.temperature}") for place, job in enumerate(jobs)]


def test_the_best_temperature_is_reported_for_each_k(monkeypatch, tokenizer):
    """Right completions: of p0 one greedily; at 0.4 five of ten of p0 and one of ten of p1."""
    from loram_cli.evaluation import code_tasks

    def verdicts(problems, outputs, reporter):
        seen = {}
        results = []
        for output in outputs:
            seen[output] = seen.get(output, 0) + 1
            right = {"p0@0.0": 1, "p0@0.4": 5, "p1@0.4": 1}.get(output, 0)
            status = "passed" if seen[output] <= right else "failed"
            results.append(SandboxResult(status, "", "namespace", "landlock"))
        return results

    monkeypatch.setattr(code_tasks, "check_completions", verdicts)
    backend = Recording()
    engine = Engine(lambda: backend, tokenizer, 64)
    settings = CodeSettings(10, (0.0, 0.4))
    scores, rows = score_code(engine, TaskRequest("humaneval"), Task(), settings, 1, NullReporter())
    one, ten = scores
    assert (one.metric, ten.metric) == ("pass@1", "pass@10")
    # Greedy: (1 + 0) / 2. At 0.4: (5/10 + 1/10) / 2 = 0.3 for k = 1, and 1 for k = 10.
    assert (one.value, ten.value) == (0.5, 1.0)
    assert one.detail.startswith("best of temperatures 0: 50.0%, 0.4: 30.0%; 10 samples")
    assert ten.detail.startswith("best of temperatures 0: 50.0%, 0.4: 100.0%")
    assert len(rows) == len(backend.jobs) == 2 + 20
    assert {(j.temperature, j.top_p) for j in backend.jobs} == {(0.0, 1.0), (0.4, 0.95)}
    assert len({(j.prompt, j.seed) for j in backend.jobs if j.temperature}) == 20


def test_few_samples_tell_pass_at_one_alone():
    assert CodeSettings(9).tries == (1,)
    assert CodeSettings(10).tries == (1, 10)


@pytest.mark.parametrize(
    ("target", "shown"), [("1", "y"), (0, "x"), ("7" * 5000, "7" * 5000), ("²", "²"), ("z", "z")]
)
def test_a_target_is_an_index_only_where_it_names_an_option(target, shown):
    sample = {
        "doc_id": 0,
        "filter": "none",
        "metrics": ["acc"],
        "acc": 1.0,
        "arguments": [("a", " x"), ("a", " y")],
        "resps": [[(-1.0, False)], [(-2.0, False)]],
        "filtered_resps": [(-1.0, False)],
        "target": target,
    }
    [row] = read_samples(TaskRequest("t"), {"samples": {"t": [sample]}})
    assert (row["output"], row["target"]) == ("x", shown)
