from itertools import combinations

import pytest

from loram_cli.evaluation.humaneval import check_completions, pass_at_k
from loram_cli.evaluation.requests import resolve_tasks
from loram_cli.training.data.records import read_records

BROKEN = "    return 'wrong on purpose'\n"


def read(path):
    return [dict(record.fields) for record in read_records(str(path))]


def bundled(task):
    (request,) = resolve_tasks([task], {}, prefer_bundled=True)
    assert request.bundled
    return read(request.data_file)


def test_bundled_problems_accept_their_solution_and_nothing_broken():
    problems = bundled("humaneval")
    assert len({problem["task_id"] for problem in problems}) == len(problems) == 12
    solved = check_completions(problems, [p["canonical_solution"] for p in problems])
    assert [result.status for result in solved] == ["passed"] * len(problems)
    for completion in (BROKEN, "    pass\n", "    raise SystemExit(0)\n", "", "    return (\n"):
        results = check_completions(problems, [completion] * len(problems))
        assert [result.status for result in results] == ["failed"] * len(problems), completion


def test_examples_in_bundled_prompts_are_true():
    import doctest

    runner = doctest.DocTestRunner(verbose=False)
    for problem in bundled("humaneval"):
        namespace = {}
        exec(problem["prompt"] + problem["canonical_solution"], namespace)
        for test in doctest.DocTestFinder().find(
            namespace[problem["entry_point"]], globs=namespace
        ):
            assert test.examples
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_bundled_word_problems_are_worked_out_right():
    problems = bundled("gsm8k")
    assert len({problem["question"] for problem in problems}) == len(problems) == 24
    for problem in problems:
        work, _, final = problem["answer"].rpartition("\n#### ")
        for step in work.split("<<")[1:]:
            expression, _, value = step.partition(">>")[0].partition("=")
            assert eval(expression) == int(value), problem
        assert int(value) == int(final), problem


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, correct):
    marks = [index < correct for index in range(samples)]
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in combinations(marks, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_refuses_more_tries_than_samples():
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(3, 1, 4)


@pytest.mark.slow
def test_all_164_published_solutions_pass_and_broken_ones_fail(shared_file):
    problems = read(shared_file("data/HumanEval.jsonl.gz"))
    assert len(problems) == 164
    solved = check_completions(problems, [p["canonical_solution"] for p in problems])
    assert [r for r in solved if r.status != "passed"] == []
    broken = check_completions(problems, [BROKEN] * len(problems))
    assert [result.status for result in broken].count("passed") == 0
