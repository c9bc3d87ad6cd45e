"""DPO, ORPO, KTO and GRPO on a tiny narrow model: what is learnt, from which reference, and resuming."""

import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.factors import assert_same, trained
from helpers.slow import slow

from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, continue_lora, lora_config, save_adapter
from loram_cli.training.curves import draw_curve, read_curve_csv, write_curve_csv
from loram_cli.training.data.judged import Judged, tokenize_judged
from loram_cli.training.data.layouts import Example
from loram_cli.training.data.preferences import Preference, tokenize_pairs
from loram_cli.training.data.questions import Question
from loram_cli.training.loop.options import (
    FitOptions,
    JudgedOptions,
    PreferenceOptions,
    RewardOptions,
)
from loram_cli.training.trl_jobs import (
    fit_judged,
    fit_preferences,
    fit_rewards,
)

pytestmark = pytest.mark.integration

OPTIONS = FitOptions(
    learning_rate=5e-3, steps=6, batch=8, micro_batch=4, warmup_steps=1, checkpoint_steps=2, seed=7
)
DPO = PreferenceOptions(beta=0.1, keeps_reference=False)
KTO = JudgedOptions(beta=0.1, keeps_reference=False)
GRPO = RewardOptions(
    beta=0.0, keeps_reference=False, generations=4, max_completion_length=6, temperature=1.0
)
QUESTIONS = [Question(f"{i}?", f"#### {i}") for i in range(12)]


@pytest.fixture
def pairs(tokenizer):
    made = [
        Preference(Example(f"{a}+{b} is", f" {a + b}"), Example(f"{a}+{b} is", f" {a - b}?"))
        for a in range(4)
        for b in range(2, 6)
    ]
    return tokenize_pairs(made, tokenizer, 64, NullReporter())


@pytest.fixture
def judged(tokenizer):
    """A good and a bad answer to each sum, one after the other."""
    made = [
        Judged(Example(f"{a}+{b} is", f" {a + b}" if good else f" {a - b}?"), good)
        for a in range(4)
        for b in range(2, 6)
        for good in (True, False)
    ]
    return tokenize_judged(made, tokenizer, 64, NullReporter())


@pytest.fixture
def warm_adapter(with_lora, tmp_path):
    """An adapter that has learnt something, on every linear and the head."""
    model = with_lora(dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(5))
    save_adapter(model, tmp_path / "warm")
    return tmp_path / "warm"


def evens(completion, answer):
    """A reward that a random model can earn: at least one of the commoner bytes."""
    return sum(map(ord, completion)) % 2 == 0


def log_prob(model, row, ids):
    whole = torch.tensor([[*row.prompt_ids, *ids]])
    with torch.no_grad():
        scores = model(input_ids=whole).logits[0].log_softmax(-1)
    start = len(row.prompt_ids)
    return sum(float(scores[i - 1, whole[0, i]]) for i in range(start, whole.shape[1]))


def test_dpo_learns_the_preferences_and_the_head(with_lora, tokenizer, pairs, reporter, tmp_path):
    model = with_lora(dropout=0.0)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    options = replace(OPTIONS, steps=10, eval_steps=5)
    result = fit_preferences(
        model, tokenizer, pairs[:12], pairs[12:], DPO, options, tmp_path, reporter
    )
    first, last = result.history[0], result.history[-1]
    assert (first.split, first.step, last.split, last.step) == ("eval", 0, "eval", 10)
    # Before the first step policy and reference are one: log 2, and no margin.
    assert first.loss == pytest.approx(0.6931, abs=1e-4)
    assert first.figures["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last.loss < 0.6
    assert last.figures["reward_accuracy"] == 1.0
    assert last.figures["reward_margin"] > 0.1
    assert list(model.peft_config) == ["default"]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    head = [p for n, p in trained(model).items() if "lm_head.lora_B" in n]
    assert head
    assert head[0].abs().sum() > 0
    assert "preference accuracy" in reporter.details[-1]
    assert not model.training
    # The margin that was told, by whole logits: the adapter switched off is the reference.
    margins = []
    for row in pairs[12:]:
        with model.disable_adapter():
            before = log_prob(model, row, row.chosen_ids) - log_prob(model, row, row.rejected_ids)
        after = log_prob(model, row, row.chosen_ids) - log_prob(model, row, row.rejected_ids)
        margins.append(DPO.beta * (after - before))
    assert last.figures["reward_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)


def test_dpo_after_an_adapter_has_that_adapter_as_reference(
    load, warm_adapter, tokenizer, pairs, tmp_path
):
    how = replace(DPO, keeps_reference=True)
    options = replace(OPTIONS, steps=4, eval_steps=4)
    model = continue_lora(load(), warm_adapter, dropout=0.0).train()
    start = trained(model)
    result = fit_preferences(
        model, tokenizer, pairs[:12], pairs[12:], how, options, tmp_path, NullReporter()
    )
    assert result.history[0].loss == pytest.approx(0.6931, abs=1e-4)
    assert list(model.peft_config) == ["default"]
    assert any(not torch.equal(start[n], p) for n, p in trained(model).items())
    reference = continue_lora(load(), warm_adapter, dropout=0.0).eval()
    margins = [
        log_prob(model, row, row.chosen_ids)
        - log_prob(reference, row, row.chosen_ids)
        - log_prob(model, row, row.rejected_ids)
        + log_prob(reference, row, row.rejected_ids)
        for row in pairs[12:]
    ]
    told = result.history[-1].figures["reward_margin"]
    assert told == pytest.approx(DPO.beta * sum(margins) / len(margins), rel=1e-3)


def test_going_on_takes_over_the_factors_in_fp32(load, warm_adapter, with_lora):
    from safetensors.torch import load_file

    model = continue_lora(load(dtype=torch.bfloat16), warm_adapter, dropout=0.0)
    saved = load_file(warm_adapter / "adapter_model.safetensors")
    found = trained(model)
    assert len(found) == len(saved)
    for name, tensor in saved.items():
        mine = found[name.replace(".weight", ".default.weight")]
        assert mine.dtype == torch.float32
        assert torch.equal(mine, tensor)
    assert model.peft_config["default"].lora_dropout == 0.0


def test_orpo_learns_by_its_own_loss_and_has_no_reference(
    load, warm_adapter, tokenizer, pairs, tmp_path
):
    how = replace(DPO, keeps_reference=True)
    options = replace(OPTIONS, steps=8, eval_steps=8)
    model = continue_lora(load(), warm_adapter, dropout=0.0).train()
    data = (tokenizer, pairs[:12], pairs[12:], how, options, tmp_path, NullReporter())
    result = fit_preferences(model, *data, loss="orpo")
    assert list(model.peft_config) == ["default"]
    losses, margins = [], []
    for row in pairs[12:]:
        good, bad = (
            log_prob(model, row, ids) / len(ids) for ids in (row.chosen_ids, row.rejected_ids)
        )
        odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (good, bad)]
        losses.append(-good + how.beta * math.log1p(math.exp(odds[1] - odds[0])))
        margins.append(how.beta * (good - bad))
    first, last = result.history[0], result.history[-1]
    assert last.loss == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert last.figures["reward_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert last.loss < first.loss - 0.1
    assert last.figures["reward_margin"] > first.figures["reward_margin"]


def test_kto_moves_good_and_bad_answers_apart(with_lora, tokenizer, judged, tmp_path):
    model = with_lora(dropout=0.0)
    options = replace(OPTIONS, steps=12, eval_steps=12)
    data = (tokenizer, judged[:24], judged[24:], KTO, options, tmp_path, NullReporter())
    result = fit_judged(model, *data)
    first, last = result.history[0], result.history[-1]
    # Before the first step policy and reference are one: no divergence, and 1 - sigmoid(0).
    assert first.loss == pytest.approx(0.5, abs=1e-4)
    assert first.figures["kl"] == pytest.approx(0, abs=1e-4)
    assert last.loss < 0.49
    margins = []
    for row in judged[24:]:
        pair = SimpleNamespace(prompt_ids=row.prompt_ids)
        with model.disable_adapter():
            before = log_prob(model, pair, row.completion_ids)
        gained = KTO.beta * (log_prob(model, pair, row.completion_ids) - before)
        margins.append(gained if row.good else -gained)
    assert last.figures["reward_margin"] == pytest.approx(2 * sum(margins) / len(margins), rel=1e-3)
    assert last.figures["reward_margin"] > 0.05


@pytest.mark.parametrize(
    ("keeps", "objective"),
    [
        (False, "dpo"),
        (True, "grpo"),
        *(slow(*both) for both in ((True, "dpo"), (False, "grpo"))),
        *(slow(keeps, name) for keeps in (False, True) for name in ("orpo", "kto")),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    load, with_lora, warm_adapter, tokenizer, pairs, judged, reporter, tmp_path, objective, keeps
):
    options = replace(OPTIONS, eval_steps=3)

    def fit(work, reporter):
        model = with_lora(dropout=0.0)
        if keeps:
            model = continue_lora(load(), warm_adapter, dropout=0.0).train()
        if objective in ("dpo", "orpo"):
            how = replace(DPO, keeps_reference=keeps)
            data = (tokenizer, pairs[:12], pairs[12:], how)
            return model, fit_preferences(model, *data, options, work, reporter, loss=objective)
        if objective == "kto":
            data = (tokenizer, judged[:24], judged[24:], replace(KTO, keeps_reference=keeps))
            return model, fit_judged(model, *data, options, work, reporter)
        how = replace(GRPO, keeps_reference=keeps, beta=0.05 if keeps else 0.0)
        data = (tokenizer, QUESTIONS[:8], QUESTIONS[8:], evens, how)
        return model, fit_rewards(model, *data, options, work, reporter)

    whole, expected = fit(tmp_path / "whole", NullReporter())
    reporter.on_advance = lambda done: done == 4 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", reporter)
    model, result = fit(tmp_path / "cut", NullReporter())
    assert result.resumed_from == 4
    assert result.history == expected.history
    assert_same(trained(model), trained(whole))
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-6"
    assert not (checkpoint / "ref").exists()
    # All steps are done: the same again comes from the checkpoint alone.
    model, result = fit(tmp_path / "cut", NullReporter())
    assert result.resumed_from == 6
    assert_same(trained(model), trained(whole))


def test_grpo_raises_the_reward(with_lora, tokenizer, reporter, tmp_path):
    model = with_lora(dropout=0.0)
    options = replace(OPTIONS, steps=25, batch=32, micro_batch=32, learning_rate=2e-2)

    def reward(completion, answer):
        return any(c in completion for c in "abcdefghijklmnopqrstuvwxyz")

    result = fit_rewards(model, tokenizer, QUESTIONS, [], reward, GRPO, options, tmp_path, reporter)
    rewards = [row.figures["reward"] for row in result.history]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert result.final_figures()["reward"] > rewards[0]
    assert "reward " in reporter.details[-1]
    assert not reporter.warnings


def test_a_reward_that_is_never_earned_is_told_once(with_lora, tokenizer, reporter, tmp_path):
    model = with_lora(dropout=0.0)
    before = trained(model)
    options = replace(OPTIONS, steps=12, batch=4)
    data = (tokenizer, QUESTIONS, [], lambda completion, answer: False)
    fit_rewards(model, *data, GRPO, options, tmp_path, reporter)
    (line,) = reporter.warnings
    assert "first 10 steps" in line
    assert "--objective sft" in line
    assert_same(before, trained(model))


def test_nothing_is_printed_or_sent(with_lora, tokenizer, pairs, tmp_path, capfd, monkeypatch):
    import trl.trainer.base_trainer

    def refuse(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)
    options = replace(OPTIONS, steps=1)
    fit_preferences(
        with_lora(), tokenizer, pairs, pairs[:4], DPO, options, tmp_path / "a", NullReporter()
    )
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == [
        "checkpoint-1",
        "run.json",
    ]
    data = (tokenizer, QUESTIONS, QUESTIONS[:2], evens)
    fit_rewards(with_lora(), *data, GRPO, options, tmp_path / "b", NullReporter())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_gradient_checkpointing_and_bf16_weights(
    load, with_lora, warm_adapter, tokenizer, pairs, tmp_path, objective
):
    def fit(name, options, dtype):
        model = continue_lora(load(dtype=dtype), warm_adapter, dropout=0.0).train()
        work = tmp_path / name
        if objective == "dpo":
            how = replace(DPO, keeps_reference=True)
            data = (tokenizer, pairs[:12], pairs[12:], how)
            return model, fit_preferences(model, *data, options, work, NullReporter())
        how = replace(GRPO, keeps_reference=True, beta=0.1)
        data = (tokenizer, QUESTIONS, QUESTIONS[:4], evens, how)
        return model, fit_rewards(model, *data, options, work, NullReporter())

    options = replace(OPTIONS, steps=2)
    plain, expected = fit("plain", options, torch.float32)
    checkpointed, result = fit(
        "checkpointed", replace(options, gradient_checkpointing=True), torch.float32
    )
    for mine, theirs in zip(result.history, expected.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert mine.figures == pytest.approx(dict(theirs.figures), abs=1e-4)
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(trained(checkpointed)[name], parameter, rtol=1e-4, atol=1e-5)
    half = replace(options, precision="bf16", gradient_checkpointing=True)
    model, result = fit("half", half, torch.bfloat16)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert result.history[0].loss == pytest.approx(expected.history[0].loss, abs=0.02)


def test_nf4_trains_factors_in_fp32(narrow_dir, tokenizer, pairs, tmp_path):
    from helpers.nf4 import nf4_model

    lora = lora_config(["q_proj", "lm_head"], dropout=0.0)
    model = nf4_model(narrow_dir, lambda base: attach_lora(base, lora, seed=1)).train()
    before = trained(model)
    options = replace(OPTIONS, steps=2)
    fit_preferences(model, tokenizer, pairs, [], DPO, options, tmp_path, NullReporter())
    after = trained(model)
    assert {p.dtype for p in after.values()} == {torch.float32}
    # TRL rounds the factors to bf16 when it is built; an untouched one still has all its digits.
    rounded = {n: p.to(torch.bfloat16).float() for n, p in before.items()}
    assert any(not torch.equal(rounded[n], before[n]) for n in before)
    moved = {n: (after[n] - before[n]).abs().max() for n in before if "lora_A" in n}
    assert all(float(change) < 1e-2 for change in moved.values())


def test_curve_file_and_picture_hold_the_figures(with_lora, tokenizer, pairs, tmp_path):
    options = replace(OPTIONS, steps=2)
    result = fit_preferences(
        with_lora(), tokenizer, pairs, pairs[:4], DPO, options, tmp_path, NullReporter()
    )
    write_curve_csv(result.history, tmp_path / "loss.csv")
    header, *lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert header == "step,split,loss,learning_rate,reward_accuracy,reward_margin"
    assert len(lines) == 4
    read = read_curve_csv(tmp_path / "loss.csv")
    for mine, kept in zip(read, result.history, strict=True):
        assert mine.figures == pytest.approx(dict(kept.figures), abs=1e-6)
    draw_curve(read, tmp_path / "a.png", "DPO")
    draw_curve([replace(row, figures={}) for row in read], tmp_path / "b.png", "DPO")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
