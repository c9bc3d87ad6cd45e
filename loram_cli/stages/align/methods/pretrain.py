"""Method ``pretrain``: continued pre-training of all parameters (paper, section 3.3)."""

import math
from typing import TYPE_CHECKING, Any

from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.memory.sharing import GATHERED_LAYERS, gathered_bytes
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import process_count
from loram_cli.stages.align.methods.method import Alignment, Method, Needs
from loram_cli.stages.align.settings import AlignSettings
from loram_cli.stages.core.results import MethodResult

if TYPE_CHECKING:
    from loram_cli.training.loop.distill import Teaching

_FP32_BYTES = 4


def pretrain(work: Alignment, reporter: Reporter) -> MethodResult:
    """Continue pre-training of all parameters."""
    return fit(work, None, "Alignment of the pruned model", reporter)


def frozen_params(spec: AlignSettings, model: Model) -> int:
    """Parameters that stay frozen: those of an untied head, unless it is trained too."""
    head = model.index.tensors.get(f"{model.family.lm_head}.weight")
    return 0 if head is None or spec.train_lm_head else math.prod(head.shape)


def fit_needs(spec: AlignSettings, model: Model, base: Model | None) -> Needs:
    """fp32 weights, gradients and AdamW's two moments; checkpoints hold all but the gradients."""
    params, frozen = model.num_params, frozen_params(spec, model)
    # The next checkpoint is written before the one before last is removed.
    disk = 3 * _FP32_BYTES * (3 * params - 2 * frozen)
    memory = _FP32_BYTES * (4 * params - 3 * frozen)
    if spec.fsdp:
        layer, after = gathered_bytes(
            model.family, model.config, lambda name, params: _FP32_BYTES * params
        )
        memory = -(-memory // process_count()) + (GATHERED_LAYERS + 1) * layer + 2 * after
    return Needs(disk, memory)


def fit(
    work: Alignment, teaching: "Teaching | None", title: str, reporter: Reporter
) -> MethodResult:
    """Train all parameters, and write the model in the type that it was stored in."""
    import shutil

    import torch

    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.modeling.sharding import SharedModel, write_whole
    from loram_cli.runs.processes import is_main_process
    from loram_cli.stages.align.methods.low_bit import with_trained_codes, write_low_bit
    from loram_cli.stages.fit.run import finish_fit, fit_options
    from loram_cli.training.loop.loop import fit_causal_text, save_causal_lm

    spec, source = work.spec, work.source
    if source.low_bit is not None and process_count() > 1:
        raise UsageError(
            f"{source.directory}: codes of few bits are fitted in one process",
            "align without a launcher",
        )
    # Master weights in fp32: steps of 5e-5 vanish in bfloat16's eight bits.
    how: dict[str, Any] = {
        "dtype": torch.float32,
        "device": work.device,
        "attention": spec.attention,
    }
    if spec.fsdp:
        shared = SharedModel(source, **how)
        shared.load(shared.model, reporter)
        model = shared.model
    else:
        model = load_causal_lm(source, **how)
    codes = with_trained_codes(model, source, work.device) if source.low_bit else {}
    masked = list(source.linear_names) if work.sparse else []
    fitted = fit_causal_text(
        model.train(),
        work.train_rows,
        work.eval_rows,
        fit_options(spec),
        work.out,
        reporter,
        train_lm_head=spec.train_lm_head,
        masked=masked,
        teaching=teaching,
    )
    losses = finish_fit(fitted, work.out, title)
    zeros = _count_zeros(model, masked, source) if work.sparse else None
    stored = source.dtype.to_torch()
    if codes:
        write_low_bit(model, codes, source, work.out)
    elif spec.fsdp:
        write_whole(model, work.out, stored)
    elif is_main_process():
        save_causal_lm(model, work.out, dtype=stored)
    if is_main_process():
        shutil.copyfile(source.directory / "config.json", work.out / "config.json")
        copy_companions(source.directory, work.out)
    return MethodResult(
        method=work.method,
        steps=spec.steps,
        tokens=spec.steps * spec.batch * spec.block_length,
        trained_params=fitted.trainable_params,
        zeros=zeros,
        **losses,
    )


def _count_zeros(model: Any, masked: list[str], source: Model) -> int:
    """Zeros in the masked weights, after a check that each of the pruned model's is still one."""
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.modeling.sharding import whole
    from loram_cli.training.loop.masks import check_zeros

    parameters = dict(model.named_parameters())
    with TensorReader(source.index) as reader:
        return sum(check_zeros(n, reader.read(n), whole(parameters[n].detach())) for n in masked)


METHOD = Method(act=pretrain, needs=fit_needs, several_processes=True)
