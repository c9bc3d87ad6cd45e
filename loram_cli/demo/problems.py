"""English word problems, generated from a seed.

A problem is a start (a pile, or equal groups) and a few events that change it, so that every
answer is right by construction. The base model reads :func:`corpus`, where most solutions are in
prose, so that prose is what it writes. Fine-tuning uses :func:`problems`: more of the long ones,
and always the GSM8K way of writing a solution. That way is not new to the base: a fine-tuning of
minutes elicits what a model can do, it teaches no sums.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Kate",
    "Liam", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "stamps", "shells", "cards", "pencils", "marbles", "cookies",
    "flowers", "stickers", "eggs", "buttons", "stones", "toys", "tickets",
)  # fmt: skip
HOLDERS = ("boxes", "bags", "baskets", "jars", "shelves", "trays")
PLACES = ("at the market", "in the garden", "at school", "on the beach", "at home", "in the park")
GAINS = (
    "{friend} gives {name} {n} more.",
    "{name} finds {n} more {place}.",
    "Then {name} buys {n} more.",
    "{name} gets another {n} from {friend}.",
)
LOSSES = (
    "{name} gives {n} of them to {friend}.",
    "Then {name} loses {n} {place}.",
    "{name} sells {n} of them {place}.",
    "{friend} takes {n} away.",
)
SHARES = (
    "{name} shares them equally among {n} friends. How many {item} does each friend get?",
    "{name} puts them into {n} equal piles. How many {item} are in each pile?",
)
ENDINGS = (
    "How many {item} does {name} have now?",
    "How many {item} are left for {name}?",
    "How many {item} does {name} have in the end?",
)
MAX_VALUE = 99
_SUM = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
# Share of the corpus's solutions that are written the GSM8K way.
GSM8K_SHARE = 0.2
# Share of questions, by digest, that is held out; what is left trains.
_BUCKETS = 10
_SPLIT_BUCKETS = {"test": {0}, "validation": {1}, "train": set(range(2, _BUCKETS))}


@dataclass(frozen=True)
class Step:
    """One calculation: ``left op right = value``."""

    left: int
    op: str
    right: int
    value: int

    @property
    def annotated(self) -> str:
        """As GSM8K writes it: ``3 + 4 = <<3+4=7>>7``."""
        plain = f"{self.left}{self.op}{self.right}={self.value}"
        return f"{self.left} {self.op} {self.right} = <<{plain}>>{self.value}"

    @property
    def plain(self) -> str:
        """``3 + 4 = 7``."""
        return f"{self.left} {self.op} {self.right} = {self.value}"


@dataclass(frozen=True)
class Problem:
    """A question with the steps that solve it."""

    question: str
    item: str
    steps: tuple[Step, ...]

    @property
    def split(self) -> str:
        """The split that owns this question, by its digest: no text is ever in two."""
        bucket = hashlib.sha256(self.question.encode()).digest()[0] % _BUCKETS
        return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)

    @property
    def value(self) -> int:
        """The final number."""
        return self.steps[-1].value

    @property
    def gsm8k_answer(self) -> str:
        """A line for each step, then ``#### N``."""
        lines = [f"{step.annotated} {self.item}." for step in self.steps]
        return "\n".join([*lines, f"#### {self.value}"])

    @property
    def prose_answer(self) -> str:
        """Sentences, without marks."""
        sentences = " Then ".join(f"{step.plain} {self.item}." for step in self.steps)
        return f"First {sentences} The answer is {self.value}."


def make_problem(rng: random.Random, events: int) -> Problem:
    """Draw one problem."""
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "item": rng.choice(ITEMS)}
    groups = rng.random() < 0.4
    sentences, steps = _start_groups(rng, words) if groups else _start_pile(rng, words)
    value = steps[-1].value if groups else int(sentences[-1].split(" has ")[1].split()[0])
    shared = False
    while len(steps) < events:
        last = len(steps) == events - 1
        divisors = [n for n in range(2, 10) if value % n == 0 and value // n > 1]
        if last and divisors and rng.random() < 0.2:
            right = rng.choice(divisors)
            sentences.append(rng.choice(SHARES).format(n=right, **words))
            step, shared = Step(value, "/", right, value // right), True
        elif value < 5 or (value < MAX_VALUE - 2 and rng.random() < 0.5):
            right = rng.randint(2, min(40, MAX_VALUE - value))
            sentences.append(rng.choice(GAINS).format(n=right, place=rng.choice(PLACES), **words))
            step = Step(value, "+", right, value + right)
        else:
            right = rng.randint(1, value - 1)
            sentences.append(rng.choice(LOSSES).format(n=right, place=rng.choice(PLACES), **words))
            step = Step(value, "-", right, value - right)
        steps.append(step)
        value = step.value
    if not shared:
        sentences.append(rng.choice(ENDINGS).format(**words))
    return Problem(" ".join(sentences), words["item"], tuple(steps))


def corpus(count: int, seed: int) -> list[str]:
    """Documents for pre-training, alignment and calibration.

    Four in five are problems of one to three steps, one in five of them solved the GSM8K way and
    the rest in prose; one document in five is a drill of sums, plain and annotated ones.
    """
    rng = random.Random(f"corpus-{seed}")
    documents: list[str] = []
    while len(documents) < count:
        if rng.random() < 0.2:
            documents.append(_drill(rng))
            continue
        problem = make_problem(rng, events=rng.choice((1, 1, 2, 2, 2, 3)))
        if problem.split == "train":
            gsm8k_style = rng.random() < GSM8K_SHARE
            answer = problem.gsm8k_answer if gsm8k_style else problem.prose_answer
            documents.append(f"Question: {problem.question}\nAnswer: {answer}")
    return documents


def problems(split: str, count: int) -> list[dict[str, str]]:
    """Problems of one to three steps, all solved the GSM8K way.

    Args:
        split: ``train``, ``validation`` or ``test``; no question is in two of them.
        count: How many.

    Returns:
        Records with ``question`` and ``answer``, no question twice.
    """
    return [{"question": p.question, "answer": p.gsm8k_answer} for p in _drawn(split, count)]


def preferences(split: str, count: int) -> list[dict[str, str]]:
    """Problems solved the GSM8K way, rather than in the prose that the base would write.

    Both answers are right: what is preferred is a way of writing.

    Returns:
        Records with ``prompt``, ``chosen`` and ``rejected``.
    """
    return [_pair(p.question, p.gsm8k_answer, p.prose_answer) for p in _drawn(split, count)]


def slips(split: str, count: int) -> list[dict[str, str]]:
    """Problems with their solution, rather than one that a slip in one sum has spoilt.

    The slip is carried on: the steps behind it are right sums of wrong numbers, and the final
    number is wrong. Format and length tell nothing.

    Returns:
        Records with ``prompt``, ``chosen`` and ``rejected``.
    """
    rng = random.Random(f"preferences-{split}")
    solved = [(p.question, p.gsm8k_answer) for p in _drawn(split, count)]
    return [_pair(question, answer, _with_slip(answer, rng)) for question, answer in solved]


_DEMO_DATA: dict[str, Callable[[], list[dict[str, str]]]] = {
    "corpus": lambda: [{"text": text} for text in corpus(6000, seed=1)],
    "calibration": lambda: [{"text": text} for text in corpus(400, seed=2)],
    "train": lambda: problems("train", 4000),
    "validation": lambda: problems("validation", 200),
    "test": lambda: problems("test", 200),
    "preferences": lambda: preferences("train", 4000),
    "preferences-validation": lambda: preferences("validation", 200),
    "preferences-test": lambda: preferences("test", 200),
    "slips": lambda: slips("train", 4000),
    "slips-validation": lambda: slips("validation", 200),
    "slips-test": lambda: slips("test", 200),
}


def load_demo(name: str) -> list[dict[str, str]]:
    """One of the demo's data sets: corpus, calibration, train, preferences and so on.

    Raises:
        ValueError: There is no such data set.
    """
    if name not in _DEMO_DATA:
        raise ValueError(f"demo:{name} does not exist (known: {', '.join(_DEMO_DATA)})")
    return _DEMO_DATA[name]()


def _drawn(split: str, count: int) -> list[Problem]:
    rng = random.Random(f"problems-{split}")
    drawn: dict[str, Problem] = {}
    while len(drawn) < count:
        problem = make_problem(rng, events=rng.choice((1, 2, 2, 3)))
        if problem.split == split:
            drawn[problem.question] = problem
    return list(drawn.values())


def _pair(question: str, chosen: str, rejected: str) -> dict[str, str]:
    prompt = f"Question: {question}\nAnswer:"
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _with_slip(answer: str, rng: random.Random) -> str:
    """The solution with one wrong result, and what follows from it."""
    lines = answer.splitlines()[:-1]
    found = [match for line in lines if (match := _SUM.search(line))]
    while True:
        at, slip = rng.randrange(len(found)), rng.choice((-10, -2, -1, 1, 2, 10))
        steps: list[Step] = []
        for i, match in enumerate(found):
            left = steps[-1].value if i > at else int(match[1])
            op, right, value = match[2], int(match[3]), int(match[4]) + slip
            if i != at:
                sums = {"+": left + right, "-": left - right, "*": left * right}
                value = sums[op] if op in sums else left // right
            steps.append(Step(left, op, right, value))
        # As in every right solution, no number falls below one; and a quotient may hide the slip.
        if min(step.value for step in steps) > 0 and steps[-1].value != int(found[-1][4]):
            break
    item = lines[0].rsplit(" ", 1)[1]
    written = [f"{step.annotated} {item}" for step in steps]
    return "\n".join([*written, f"#### {steps[-1].value}"])


def _start_pile(rng: random.Random, words: dict[str, str]) -> tuple[list[str], list[Step]]:
    start = rng.randint(5, 60)
    return [f"{words['name']} has {start} {words['item']}."], []


def _start_groups(rng: random.Random, words: dict[str, str]) -> tuple[list[str], list[Step]]:
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    holder = rng.choice(HOLDERS)
    sentence = f"{words['name']} has {count} {holder} with {each} {words['item']} in each."
    return [sentence], [Step(count, "*", each, count * each)]


def _drill(rng: random.Random) -> str:
    lines = []
    for _ in range(6):
        op = rng.choice("++--*/")
        if op == "+":
            left = rng.randint(1, MAX_VALUE - 2)
            right = rng.randint(1, MAX_VALUE - left)
            step = Step(left, op, right, left + right)
        elif op == "-":
            left = rng.randint(2, MAX_VALUE)
            right = rng.randint(1, left - 1)
            step = Step(left, op, right, left - right)
        else:
            count, each = rng.randint(2, 9), rng.randint(2, 11)
            product = count * each
            multiply = Step(count, op, each, product)
            step = multiply if op == "*" else Step(product, op, count, each)
        lines.append(f"{rng.choice((step.plain, step.annotated))}.")
    return " ".join(lines)
