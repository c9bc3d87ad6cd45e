"""Method ``pretrain``: continued pre-training (paper, section 3.3)."""

from typing import TYPE_CHECKING, Any

from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.memory.account import BF16_BYTES, FP32_BYTES
from loram_cli.memory.sharing import GATHERED_LAYERS, gathered_bytes
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import process_count
from loram_cli.stages.align.methods.method import Alignment, Method, Needs
from loram_cli.stages.align.methods.trained import merged, trained_params, with_trained
from loram_cli.stages.align.settings import AlignSettings
from loram_cli.stages.core.results import MethodResult

if TYPE_CHECKING:
    from loram_cli.training.loop.distill import Teaching


def pretrain(work: Alignment, reporter: Reporter) -> MethodResult:
    """Continue pre-training."""
    return fit(work, None, "Alignment of the pruned model", reporter)


def fit_needs(spec: AlignSettings, model: Model, base: Model | None) -> Needs:
    """fp32 weights, gradients and AdamW's two moments; checkpoints hold all but the gradients."""
    params, trained = model.num_params, trained_params(spec, model)
    # A checkpoint of factors holds nothing else.
    saved = trained if spec.trained == "lora" else params
    # The next checkpoint is written before the one before last is removed.
    disk = 3 * FP32_BYTES * (saved + 2 * trained)
    if spec.trained == "all":
        memory = FP32_BYTES * (params + 3 * trained)
    else:
        in_fp32 = spec.precision == "fp32" or (spec.precision == "auto" and spec.device == "cpu")
        memory = (FP32_BYTES if in_fp32 else BF16_BYTES) * params + 4 * FP32_BYTES * trained
    if spec.fsdp:
        layer, after = gathered_bytes(
            model.family, model.config, lambda name, params: FP32_BYTES * params
        )
        memory = -(-memory // process_count()) + (GATHERED_LAYERS + 1) * layer + 2 * after
    return Needs(disk, memory)


def fit(
    work: Alignment, teaching: "Teaching | None", title: str, reporter: Reporter
) -> MethodResult:
    """Train what ``--trained`` says, and write the model in the type that it was stored in."""
    import shutil

    import torch

    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.modeling.sharding import SharedModel, write_whole
    from loram_cli.runs.processes import is_main_process
    from loram_cli.stages.align.methods.low_bit import with_trained_codes, write_low_bit
    from loram_cli.stages.fit.run import finish_fit, fit_options
    from loram_cli.training.loop.loop import fit_causal_text, save_causal_lm
    from loram_cli.training.loop.options import weights_dtype

    spec, source = work.spec, work.source
    if source.low_bit is not None and process_count() > 1:
        raise UsageError(
            f"{source.directory}: codes of few bits are fitted in one process",
            "align without a launcher",
        )
    # Master weights in fp32: steps of 5e-5 vanish in bfloat16's eight bits.
    dtype = torch.float32 if spec.trained == "all" else weights_dtype(spec.precision, work.device)
    how: dict[str, Any] = {
        "dtype": dtype,
        "device": work.device,
        "attention": spec.attention,
    }
    if spec.fsdp:
        shared = SharedModel(source, **how)
        shared.load(shared.model, reporter)
        model = shared.model
    else:
        model = load_causal_lm(source, **how)
    codes = {}
    if source.low_bit is not None and spec.trained == "all":
        codes = with_trained_codes(model, source, work.device)
    model = with_trained(model, source, spec, reporter)
    masked = list(source.linear_names) if work.sparse else []
    fitted = fit_causal_text(
        model.train(),
        work.train_rows,
        work.eval_rows,
        fit_options(spec),
        work.out,
        reporter,
        masked=masked,
        teaching=teaching,
    )
    losses = finish_fit(fitted, work.out, title)
    model = merged(model, spec)
    zeros = _count_zeros(model, masked, source) if work.sparse else None
    stored = source.dtype.to_torch()
    if source.low_bit is not None:
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
