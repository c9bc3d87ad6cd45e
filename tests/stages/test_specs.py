"""Every number of every spec has a range, and is refused outside of it when the spec is built."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from loram_cli.errors import UsageError
from loram_cli.schema import (
    Bytes,
    Params,
    Setting,
    alternatives,
    flag_of,
    hints_of,
    settings_of,
    spec_from_mapping,
)
from loram_cli.stages.fit.run import check_device
from loram_cli.stages.specs import SPECS

NUMBERS = (int, float, Bytes, Params)


def numbers() -> Iterator[tuple[str, str, Setting, type]]:
    for stage, spec in SPECS.items():
        hints = hints_of(spec)
        for field, told in settings_of(spec):
            for kind in alternatives(hints[field.name]):
                inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
                if inner in NUMBERS:
                    yield stage, field.name, told, inner


ALL = [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in numbers()]


def outside(told: Setting, kind: type) -> list[float]:
    """One value just beyond each end of the range, and what is no number where there may be one."""
    step = 1 if issubclass(kind, int) else 1e-6
    lower = told.at_least if told.above is None else told.above
    assert lower is not None, "a number without a lower end"
    found: list[float] = [lower - step if told.above is None else lower]
    if told.at_most is not None or told.below is not None:
        found.append(told.below if told.at_most is None else told.at_most + step)
    found = [kind(value) for value in found]
    return found if issubclass(kind, int) else [*found, float("nan"), float("inf"), -float("inf")]


def built(stage: str, **changes: Any) -> Any:
    """A spec with what it must be given, and changes."""
    spec = SPECS[stage]
    hints = hints_of(spec)
    needed = {
        field.name: Path("somewhere") if hints[field.name] is Path else "somewhere"
        for field in dataclasses.fields(spec)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    # What the default strategy asks for.
    needed |= {"calibration": "somewhere"} if stage == "prune" else {}
    return spec(**{**needed, **changes})


@pytest.mark.parametrize("stage", SPECS)
def test_a_spec_can_be_built_of_what_must_be_given(stage):
    assert built(stage) == built(stage)


@pytest.mark.parametrize(("stage", "name", "told", "kind"), ALL)
def test_a_number_outside_its_range_is_refused_by_its_flag(stage, name, told, kind):
    flags = {flag_of(field.name, said) for field, said in settings_of(SPECS[stage])}
    is_tuple = any(get_origin(k) is tuple for k in alternatives(hints_of(SPECS[stage])[name]))
    for value in outside(told, kind):
        with pytest.raises(UsageError) as caught:
            built(stage, **{name: (value,) if is_tuple else value})
        words = caught.value.message.split()
        assert flag_of(name, told) in words
        assert {word for word in words if word.startswith("--")} <= flags


@pytest.mark.parametrize(("stage", "name", "told", "kind"), ALL)
@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-.inf", "one"])
def test_what_is_no_number_is_refused_in_recipes_too(stage, name, told, kind, text):
    with pytest.raises(UsageError):
        spec_from_mapping(SPECS[stage], {"source": "x", name: text}, "recipe r.yaml")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("train", {"warmup_steps": -1}, "--warmup-steps cannot be negative"),
        ("train", {"learning_rate": float("nan")}, "--learning-rate nan is not a finite number"),
        ("align", {"learning_rate": float("inf")}, "--learning-rate inf is not a finite number"),
        ("align", {"eval_rows": -5}, "--eval-rows cannot be negative"),
        ("train", {"seed": 2**32}, "--seed 4.29497e+09 is outside"),
        ("align", {"block_length": 1}, "--block-length must be at least 2"),
        ("train", {"batch": 6, "micro_batch": 4}, "--batch 6 is no multiple of --micro-batch 4"),
        ("train", {"objective": "dpo", "train_on": "last"}, "--train-on last does not go with"),
    ],
)
def test_messages(stage, changes, message):
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        built(stage, **changes)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu:0", "gpu", "cuda:99"])
@pytest.mark.parametrize("stage", ["align", "train"])
def test_a_device_that_cannot_train_is_refused(stage, device):
    assert check_device(built(stage, device="cpu")) == "cpu"
    with pytest.raises(UsageError, match=device):
        check_device(built(stage, device=device))
