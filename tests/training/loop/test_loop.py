import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers.factors import assert_same, trained
from helpers.slow import slow

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter
from loram_cli.runs.whole import mark_whole
from loram_cli.training.data.tokens import TokenRow, pack_tokens
from loram_cli.training.loop.checkpoints import (
    Found,
    checkpoint_path,
    newest_checkpoint,
)
from loram_cli.training.loop.loop import fit_causal_text, fit_lora, save_causal_lm
from loram_cli.training.loop.options import FitOptions, resolve_precision, weights_dtype

pytestmark = pytest.mark.integration

OPTIONS = FitOptions(
    learning_rate=5e-3, steps=6, batch=8, micro_batch=4, warmup_steps=1, checkpoint_steps=2, seed=7
)


def test_lora_training_lowers_both_losses_and_leaves_the_base(with_lora, rows, reporter, tmp_path):
    model = with_lora(dropout=0.0)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    options = replace(OPTIONS, steps=12, eval_steps=5, checkpoint_steps=50)
    result = fit_lora(model, rows[:12], rows[12:], options, tmp_path, reporter)
    train = [row for row in result.history if row.split == "train"]
    evaluation = [row for row in result.history if row.split == "eval"]
    assert [row.step for row in train] == list(range(1, 13))
    assert [row.step for row in evaluation] == [0, 5, 10, 12]
    assert train[-1].loss < train[0].loss - 0.05
    before, after = result.eval_losses()
    assert after < before - 0.05
    assert train[0].learning_rate == pytest.approx(0.0)
    assert max(row.learning_rate for row in train) == pytest.approx(5e-3)
    assert train[-1].learning_rate < 5e-4
    assert result.final_loss == train[-1].loss
    assert (reporter.total, reporter.advanced) == (12, 12)
    assert reporter.details[-1].startswith(f"loss {train[-1].loss:.3f}, ")
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert result.trainable_params == sum(p.numel() for p in trained(model).values())
    assert not model.training


def test_nothing_is_printed(with_lora, rows, tmp_path, capfd):
    fit_lora(with_lora(), rows, rows[:4], OPTIONS, tmp_path, NullReporter())
    assert capfd.readouterr() == ("", "")


def test_losses_are_means_over_the_batches_tokens_whatever_the_micro_batch(
    with_lora, load, rows, tmp_path
):
    histories, weights = [], []
    for micro_batch in (8, 2):
        model = with_lora(dropout=0.0)
        options = replace(OPTIONS, micro_batch=micro_batch)
        result = fit_lora(
            model, rows, rows[:5], options, tmp_path / str(micro_batch), NullReporter()
        )
        histories.append([row.loss for row in result.history])
        weights.append(trained(model))
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-3)
    # The first evaluation against a direct sum over tokens.
    total, count = 0.0, 0
    model = load()
    with torch.no_grad():
        for row in rows[:5]:
            ids = torch.from_numpy(row.input_ids).long()
            log = model(ids[None]).logits[0].log_softmax(-1)
            for i in range(row.answer_start, len(ids)):
                total, count = total - float(log[i - 1, ids[i]]), count + 1
    assert histories[0][0] == pytest.approx(total / count, rel=1e-5)


def test_same_seed_same_weights_and_another_seed_others(with_lora, rows, tmp_path):
    def run(name, seed):
        model = with_lora()
        fit_lora(model, rows, [], replace(OPTIONS, seed=seed), tmp_path / name, NullReporter())
        return trained(model)

    first = run("a", 1)
    assert_same(first, run("b", 1))
    other = run("c", 2)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.fixture
def terminated():
    """SIGTERM as the command line has it."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("kind", "ends_with", "stop_at"),
    [
        (signal.SIGINT, KeyboardInterrupt, 3),
        slow(signal.SIGTERM, SystemExit, 4),
        # The last of six: nothing is left to train, and still it was asked to stop.
        slow(signal.SIGINT, KeyboardInterrupt, 6),
        (signal.SIGTERM, SystemExit, 6),
    ],
)
def test_interrupt_leaves_a_checkpoint_and_resume_equals_an_undisturbed_run(
    with_lora, rows, reporter, tmp_path, terminated, kind, ends_with, stop_at
):
    whole = with_lora()
    options = replace(OPTIONS, eval_steps=3)
    expected = fit_lora(whole, rows, rows[:4], options, tmp_path / "whole", NullReporter())

    def interrupt(done):
        if done == stop_at:
            os.kill(os.getpid(), kind)

    reporter.on_advance = interrupt
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ends_with):
        fit_lora(with_lora(), rows, rows[:4], options, tmp_path / "cut", reporter)
    assert f"stopped at step {stop_at} of 6" in reporter.notes[-1]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    reporter.on_advance = lambda done: None
    reporter.advanced = 0
    model = with_lora()
    result = fit_lora(model, rows, rows[:4], options, tmp_path / "cut", reporter)
    assert result.resumed_from == stop_at
    assert result.history == expected.history
    assert reporter.advanced == 6
    assert_same(trained(model), trained(whole))


def test_half_written_checkpoint_is_passed_over(with_lora, rows, tmp_path):
    whole = with_lora()
    fit_lora(whole, rows, [], OPTIONS, tmp_path, NullReporter())
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-4", "checkpoint-6", "run.json"]
    (folder / "checkpoint-6" / "whole").unlink()
    (folder / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"cut")
    model = with_lora()
    result = fit_lora(model, rows, [], OPTIONS, tmp_path, NullReporter())
    assert result.resumed_from == 4
    assert_same(trained(model), trained(whole))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "whole"]
)
@pytest.mark.parametrize("how", ["removed", "flipped", "cut", "added"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, how):
    same = {"data": "x"}
    assert newest_checkpoint(tmp_path, same) == Found()
    for step in (4, 6):
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir()
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
            (folder / file).write_bytes(f"{file} {step}".encode())
        mark_whole(folder)
    assert newest_checkpoint(tmp_path, same) == Found(checkpoint_path(tmp_path, 6), 6)
    file = checkpoint_path(tmp_path, 6) / name
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "added":
        file.with_name("added.bin").write_bytes(b"")
    else:
        file.write_bytes(content[:-1] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    found = newest_checkpoint(tmp_path, same)
    assert (found.path, found.step) == (checkpoint_path(tmp_path, 4), 4)
    assert not checkpoint_path(tmp_path, 6).exists()
    # Without its mark it was cut short by a kill, and there is nothing to say.
    lines = found.warnings(shared=False)
    assert len(lines) == (0 if (name, how) == ("whole", "removed") else 1)
    assert all("checkpoint-6: damaged, " in line and "the one before" in line for line in lines)


def test_only_damaged_checkpoints_start_over_with_a_line(with_lora, rows, reporter, tmp_path):
    whole = with_lora()
    fit_lora(whole, rows, [], OPTIONS, tmp_path, NullReporter())
    for folder in (tmp_path / "checkpoints").glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    model = with_lora()
    result = fit_lora(model, rows, [], OPTIONS, tmp_path, reporter)
    assert result.resumed_from is None
    assert [line.partition(": damaged")[2] for line in reporter.warnings] == [
        ", optimizer.pt is missing: starting over"
    ] * 2
    assert_same(trained(model), trained(whole))


def test_finished_run_is_taken_from_its_checkpoint(with_lora, rows, reporter, tmp_path):
    whole = with_lora()
    first = fit_lora(whole, rows, rows[:4], OPTIONS, tmp_path, NullReporter())
    model = with_lora()
    again = fit_lora(model, rows, rows[:4], OPTIONS, tmp_path, reporter)
    assert (again.resumed_from, again.steps) == (6, 6)
    assert again.history == first.history
    assert reporter.advanced == 6
    assert_same(trained(model), trained(whole))


def test_checkpoints_of_other_settings_or_data_are_not_used(with_lora, rows, reporter, tmp_path):
    fit_lora(with_lora(), rows, [], OPTIONS, tmp_path, reporter)
    for options, data, what in [
        (replace(OPTIONS, learning_rate=1e-3), rows, "settings"),
        (OPTIONS, rows[1:], "settings and data"),
    ]:
        result = fit_lora(with_lora(), data, [], options, tmp_path, reporter)
        assert result.resumed_from is None
        assert reporter.warnings.pop() == f"the checkpoints here are of other {what}: starting over"
    assert not reporter.warnings
    options = replace(OPTIONS, checkpoint_steps=3)
    assert fit_lora(with_lora(), rows[1:], [], options, tmp_path, NullReporter()).resumed_from == 6


def test_lora_checkpoints_hold_no_embedding(with_lora, rows, tmp_path):
    from safetensors.torch import load_file

    fit_lora(with_lora(), rows, [], OPTIONS, tmp_path, NullReporter())
    names = load_file(tmp_path / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in names)


def test_unreadable_run_file_starts_afresh(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "run.json").write_text("{cut")
    (tmp_path / "kept.txt").write_text("not a checkpoint")
    assert newest_checkpoint(tmp_path, {"data": "x"}) == Found()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.txt", "run.json"]


def test_alignment_moves_what_is_not_frozen(load, tokenizer, tmp_path):
    model = load()
    model.get_output_embeddings().requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    blocks = pack_tokens(["one two three four " * 40], tokenizer, 32)
    result = fit_causal_text(model, blocks[4:], blocks[:4], OPTIONS, tmp_path, NullReporter())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys() - {"lm_head.weight"}
    start, end = result.eval_losses()
    assert end < start - 0.1


def test_alignment_resumes_to_the_same_weights(load, tokenizer, reporter, tmp_path):
    blocks = pack_tokens(["one two three four " * 40], tokenizer, 32)
    whole, cut = load(), load()
    fit_causal_text(whole, blocks, [], OPTIONS, tmp_path / "a", NullReporter())
    reporter.on_advance = lambda done: done == 3 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_causal_text(cut, blocks, [], OPTIONS, tmp_path / "b", reporter)
    resumed = load()
    fit_causal_text(resumed, blocks, [], OPTIONS, tmp_path / "b", NullReporter())
    assert_same(trained(resumed), trained(whole))


def test_aligned_model_saves_and_loads_as_it_is(load, tokenizer, tmp_path, capfd):
    model = load()
    blocks = pack_tokens(["one two three four " * 40], tokenizer, 32)
    options = replace(OPTIONS, precision="bf16", gradient_checkpointing=True)
    result = fit_causal_text(model, blocks, [], options, tmp_path / "work", NullReporter())
    assert result.precision == "bf16"
    assert model.config.use_cache
    assert not model.is_gradient_checkpointing
    save_causal_lm(model, tmp_path / "out", dtype=torch.bfloat16)
    loaded = load(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert capfd.readouterr() == ("", "")


def test_gradient_checkpointing_changes_no_weight(with_lora, rows, tmp_path):
    plain, checkpointed = with_lora(), with_lora()
    fit_lora(plain, rows, [], OPTIONS, tmp_path / "a", NullReporter())
    options = replace(OPTIONS, gradient_checkpointing=True)
    fit_lora(checkpointed, rows, [], options, tmp_path / "b", NullReporter())
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(trained(checkpointed)[name], parameter)


def test_bf16_weights_train_with_fp32_factors(load, with_lora, rows, tmp_path):
    model = with_lora(load(dtype=torch.bfloat16))
    options = replace(OPTIONS, precision="bf16")
    result = fit_lora(model, rows, rows[:4], options, tmp_path, NullReporter())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert result.eval_losses()[1] < result.eval_losses()[0]


def test_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    with_lora, rows, reporter, tmp_path
):
    model = with_lora()

    def poison(done):
        if done == 3:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(float("nan"))

    reporter.on_advance = poison
    with pytest.raises(LoramError, match="the loss is nan at step 4") as caught:
        fit_lora(model, rows, [], OPTIONS, tmp_path, reporter)
    assert "learning rate" in caught.value.hint
    assert [p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_token_outside_the_vocabulary(with_lora, rows, tmp_path):
    import numpy as np

    row = TokenRow(np.array([0, 99_999], np.int32))
    with pytest.raises(LoramError, match="token 99999, but the model has only 259 embeddings"):
        fit_lora(with_lora(), [*rows, row], [], OPTIONS, tmp_path, NullReporter())


def test_sequences_beyond_the_positions_and_long_warmup_are_told(
    with_lora, tokenizer, reporter, tmp_path
):
    blocks = pack_tokens(["x" * 900], tokenizer, 300)
    options = replace(OPTIONS, steps=1, warmup_steps=100)
    fit_lora(with_lora(), blocks, [], options, tmp_path, reporter)
    assert any("exceed the model's 256 positions" in line for line in reporter.warnings)
    assert any("warm-up cut from 100 to 0" in line for line in reporter.warnings)


@pytest.mark.parametrize(("has_units", "large"), [(True, "bf16"), (False, "fp32")])
def test_precision(monkeypatch, has_units, large):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_units})
    assert resolve_precision("auto", "cpu") == "fp32"
    assert resolve_precision("auto", "cpu", 2_000_000) == "fp32"
    assert resolve_precision("auto", "cpu", 135_000_000) == large
    assert resolve_precision("fp32", "cpu", 135_000_000) == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert weights_dtype("bf16", "cpu") == torch.bfloat16
    assert weights_dtype("fp32", "cuda") == torch.float32


KILLED = """
import sys, torch, numpy as np
from pathlib import Path
from loram_cli.modeling.load import load_causal_lm
from loram_cli.reporting import NullReporter
from loram_cli.training.loop.loop import fit_causal_text
from loram_cli.training.loop.options import FitOptions
from loram_cli.runs.whole import mark_whole
from loram_cli.training.data.tokens import TokenRow

torch.set_num_threads(1)
model = load_causal_lm(Path(sys.argv[1]), dtype=torch.float32, device="cpu")
rng = np.random.default_rng(0)
rows = [TokenRow(rng.integers(3, 259, 32, dtype=np.int32)) for _ in range(16)]
options = FitOptions(learning_rate=1e-3, steps=int(sys.argv[3]), batch=4, micro_batch=4,
                     warmup_steps=0, checkpoint_steps=1)
result = fit_causal_text(model, rows, [], options, Path(sys.argv[2]), NullReporter())
print(result.resumed_from, [row.loss for row in result.history])
print(sum(float(p.detach().double().sum()) for p in model.parameters()))
"""


@pytest.mark.slow
def test_kill_at_any_moment_costs_no_more_than_the_step(narrow_dir, tmp_path):
    """Kills while a checkpoint is written at every step, again and again, until it ends."""

    def start(work):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(narrow_dir), str(work), "60"],
            stdout=subprocess.PIPE,
            text=True,
        )

    expected, _ = start(tmp_path / "whole").communicate()
    kills = 0
    for attempt in range(20):
        process = start(tmp_path / "killed")
        folder = tmp_path / "killed" / "checkpoints"
        seen = set(folder.glob("checkpoint-*")) if folder.exists() else set()
        while process.poll() is None and not (
            folder.exists() and len(set(folder.glob("checkpoint-*")) - seen) > 1
        ):
            time.sleep(0.002)
        time.sleep(0.01 * (attempt % 7))
        if attempt < 5 and process.poll() is None:
            process.kill()
            kills += 1
            process.communicate()
            continue
        found, _ = process.communicate()
        break
    assert kills >= 3
    assert found.splitlines()[0].split(" ", 1)[1] == expected.splitlines()[0].split(" ", 1)[1]
    assert found.splitlines()[1] == expected.splitlines()[1]
