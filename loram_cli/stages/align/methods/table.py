"""The table of alignment methods: each one is a file and a line here."""

from loram_cli.stages.align.methods import distill, pretrain, reconstruct
from loram_cli.stages.align.methods.method import Method

METHODS: dict[str, Method] = {
    "reconstruct": reconstruct.METHOD,
    "distill": distill.METHOD,
    "pretrain": pretrain.METHOD,
}
