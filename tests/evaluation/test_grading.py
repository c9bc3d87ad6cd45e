"""The reward of a completion is the score that the evaluation gives it."""

import pytest

from loram_cli.evaluation.grading import strict_grader


@pytest.fixture(scope="module")
def grade():
    return strict_grader()


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 40 + 2 = 42\n#### 1,042", True),
        (" #### 1042", True),
        ("#### 1042.", True),
        (" The answer is 1042.", False),
        ("#### 42", False),
        ("####1042", False),
        ("", False),
        ("#### 7\n#### 1042", False),
        ("well\nQuestion: another\nAnswer: #### 1042", False),
        ("#### 1042\nQuestion: another\nAnswer: #### 3", True),
    ],
)
def test_only_the_marked_number_counts(grade, completion, right):
    assert grade(completion, "40 and so on\n#### 1042") is right


def test_it_agrees_with_the_evaluation_on_every_answer(grade, tmp_path):
    """The same answers through lm-eval's own task."""
    from loram_cli.evaluation.lmeval import build_tasks
    from loram_cli.evaluation.requests import TaskRequest

    answers = ["#### 3", "3", "#### 3,0", "x #### 4", "#### 3\n\nQuestion: b #### 9"]
    documents = tmp_path / "gsm8k.jsonl"
    documents.write_text('{"question": "q", "answer": "so\\n#### 3"}\n' * 2)
    request = TaskRequest("gsm8k", documents, num_fewshot=0)
    (task,) = build_tasks(request, None, 256, 0)["tasks"].values()
    document = {"question": "q", "answer": "so\n#### 3"}
    strict = next(f for f in task._filters if f.name == "strict-match")
    stops = task.config.generation_kwargs["until"]
    for answer in answers:
        response = answer
        for stop in stops:
            response = response.split(stop)[0]
        found = [[response]]
        for step in strict.filters:
            found = list(step().apply(found, [document]))
        scored = task.process_results(document, found)["exact_match"]
        assert grade(answer, document["answer"]) == bool(scored), answer
