"""How far models of few bits are from the demo base: KL of the next token, as docs/lowbit.md has it.

Run it from the repository's root: ``python tests/benchmarks/lowbit.py [WORK_DIR]``.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from loram_cli.checkpoint.low_bit import GROUP_SIZE
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.modeling.skeleton import SkeletonModel, fill_whole
from loram_cli.reporting import NullReporter
from loram_cli.runs.rundir import demo_base
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.training.data.documents import load_text
from loram_cli.training.data.tokens import pack_tokens

_WINDOWS, _LENGTH, _GROUP = 32, 192, 48


def main(work: Path) -> None:
    """Make each model in a directory, and print its distance."""
    base, silent = demo_base(), NullReporter()
    rows = pack_tokens(load_text("demo:corpus"), load_tokenizer(base), _LENGTH)[:_WINDOWS]
    ids = torch.stack([torch.from_numpy(row.input_ids).long() for row in rows])

    def chances(directory: Path, nf4: bool = False) -> torch.Tensor:
        if nf4:
            skeleton = SkeletonModel(directory, dtype=torch.float32, device="cpu", nf4=True)
            fill_whole(skeleton, silent)
            model = skeleton.model.eval()
        else:
            model = load_causal_lm(directory, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)

    wanted = chances(base)

    def tell(name: str, found: torch.Tensor) -> None:
        distance = (wanted.exp() * (wanted - found)).sum(-1).mean()
        sys.stdout.write(f"{name:24} {float(distance):.4f}\n")

    tell("nf4", chances(base, nf4=True))
    for bits in (3, 2):
        for importance, codes in (("nearest", "grid"), ("gptq", "grid"), ("gptq", "trellis")):
            out = work / f"{importance}-{codes}-{bits}"
            spec = prune.PruneSpec(
                model=base, out=out, strategy="lowbit", bits=bits, importance=importance,
                codes=codes, group_size=_GROUP if codes == "grid" else GROUP_SIZE,
                calibration="demo:calibration", device="cpu",
            )  # fmt: skip
            prune.run(spec, silent)
            tell(f"{bits} bits, {importance}, {codes}", chances(out))
    distilled = align.AlignSpec(
        source=work / "gptq-grid-2", out=work / "distilled", data="demo:corpus", method=("distill",),
        steps=6, batch=8, micro_batch=8, warmup_steps=1, block_length=_LENGTH, eval_rows=4,
        learning_rate=1e-3, device="cpu",
    )  # fmt: skip
    align.run(distilled, silent)
    tell("2 bits, gptq, distill", chances(work / "distilled"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", help="keep the models here")
    asked = parser.parse_args()
    if asked.work is not None:
        main(asked.work)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
