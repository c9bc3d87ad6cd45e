"""Method ``distill``: the full model's next-token distribution is learnt."""

from loram_cli.checkpoint.model import Model
from loram_cli.reporting import Reporter
from loram_cli.stages.align.methods.method import Alignment, Method, Needs
from loram_cli.stages.align.methods.pretrain import fit, fit_needs
from loram_cli.stages.align.settings import AlignSettings
from loram_cli.stages.core.results import MethodResult


def distill(work: Alignment, reporter: Reporter) -> MethodResult:
    """Train towards the full model's next-token distribution."""
    import torch

    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.training.loop.distill import Teaching
    from loram_cli.training.loop.options import resolve_precision

    bf16 = resolve_precision(work.spec.precision, work.device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = load_causal_lm(work.full_model, dtype=dtype, device=work.device)
    teaching = Teaching(teacher.requires_grad_(False), work.spec.distill_temperature)
    return fit(work, teaching, "Distillation into the pruned model", reporter)


def _needs(spec: AlignSettings, model: Model, base: Model | None) -> Needs:
    """Those of a fit, and the teacher."""
    alone = fit_needs(spec, model, base)
    teacher_bytes = 4 * base.num_params if base is not None else 0
    return Needs(alone.disk_bytes, alone.memory_bytes + teacher_bytes)


METHOD = Method(act=distill, needs=_needs, uses_base=True)
