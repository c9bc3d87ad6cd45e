"""Rows of the memory report: one model at one precision, and what training on it takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from loram_cli.arch.spec import Family
from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.errors import UsageError
from loram_cli.memory import account, training
from loram_cli.memory.picture import Bar
from loram_cli.memory.setup import TrainingSetup
from loram_cli.pruning.plan import layer_widths, pruned_config

BASE_NAME = "base"
Precision = Literal["bf16", "nf4", "2 bits", "3 bits", "4 bits"]
_PRECISIONS: tuple[Literal["bf16", "nf4"], ...] = ("bf16", "nf4")
_LOW_BITS: dict[int, Precision] = {2: "2 bits", 3: "3 bits", 4: "4 bits"}


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One model at one precision.

    Attributes:
        name: ``base``, ``stru 0.65``, or the pruned directory's name.
        precision: Of the frozen weights.
        ratio: The pruning ratio asked for; None for the base and for a directory.
        params: Parameters; for ``semi`` and ``unst`` those that are not zero.
        stored_params: Parameters in memory; zeros of ``semi`` and ``unst`` take their place too.
        removed_share: Share of all the base's parameters that ``params`` lacks.
        paper_params: ``params`` as Tables 4 to 6 count them: under NF4 a quarter.
        paper_reduction: The base's parameters over ``paper_params``.
        paper_weight_bytes: ``paper_params`` at 2 bytes.
        weight_bytes: What the weights take in memory.
        weight_reduction: The base's bf16 bytes over ``weight_bytes``.
        lora_params: Trainable parameters.
        adapter_bytes: LoRA factors in fp32.
        gradient_bytes: Their gradients.
        optimizer_bytes: AdamW's moments.
        training_state_bytes: The last three together.
        training_bytes_without_activations: Weights and training state: a lower bound.
        activation_bytes: What the decoder layers keep and have in flight at the peak.
        logits_bytes: The head's and the cross-entropy's share of the same moment.
        context_bytes: The CUDA context.
        training_bytes: All of it: the predicted peak on the device.
        smallest_card_gib: The smallest of the common cards that holds it, or None.
        largest_micro_batch: The largest that fits the memory asked about; None where it was not
            asked, 0 where not even one sequence fits.
    """

    name: str
    precision: Precision
    ratio: float | None
    params: int
    stored_params: int
    removed_share: float
    paper_params: int
    paper_reduction: float
    paper_weight_bytes: int
    weight_bytes: int
    weight_reduction: float
    lora_params: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    training_state_bytes: int
    training_bytes_without_activations: int
    activation_bytes: int
    logits_bytes: int
    context_bytes: int
    training_bytes: int
    smallest_card_gib: int | None
    largest_micro_batch: int | None = None

    @property
    def method(self) -> str:
        """What training on this model is called: LoRA or QLoRA on a base, else LoRAM or QLoRAM."""
        if self.precision not in _PRECISIONS:
            return f"{self.precision}, LoRAM"
        return ("Q" if self.precision == "nf4" else "") + ("LoRA" if self.is_base else "LoRAM")

    def bar(self) -> Bar:
        """The training memory as a bar, part by part."""
        return Bar(
            f"{self.name} {self.method}",
            (
                ("weights", self.weight_bytes),
                ("state", self.training_state_bytes),
                ("activations", self.activation_bytes),
                ("loss", self.logits_bytes),
                ("CUDA", self.context_bytes),
            ),
        )

    @property
    def is_base(self) -> bool:
        """Whether this is the base itself."""
        return self.name == BASE_NAME


@dataclass(frozen=True)
class ModelRow:
    """A model to put on rows: its config, and what its weights hold that the config does not say.

    Attributes:
        name: Of the row.
        config: Its ``config.json``.
        ratio: The pruning ratio asked for.
        sparsity: Share of zeros in the decoder linears.
        zeros: Zeros as counted.
        head_params: Of a head that is stored beside a tied embedding.
    """

    name: str
    config: dict[str, Any]
    ratio: float | None = None
    sparsity: float = 0.0
    zeros: int = 0
    head_params: int = 0


@dataclass(frozen=True, kw_only=True)
class FitAnswer:
    """What fits a given memory at the report's settings.

    Attributes:
        precision: Of the frozen weights.
        ratio: The smallest ratio, in steps of a hundredth; 0 where the base itself fits, None where
            not even the largest does.
        training_bytes: The predicted peak at that ratio.
        remaining_params: Parameters of that model.
    """

    precision: Literal["bf16", "nf4"]
    ratio: float | None
    training_bytes: int | None = None
    remaining_params: int | None = None


def model_rows(
    family: Family,
    base: ModelRow,
    model: ModelRow,
    setup: TrainingSetup,
    fit_bytes: int | None,
) -> Iterator[MemoryRow]:
    """A model's rows: in bf16, then in NF4; one of few bits has a row, as it is."""
    low_bit = LowBit.of_config(model.config, model.name)
    precisions: tuple[Precision, ...] = (_LOW_BITS[low_bit.bits],) if low_bit else _PRECISIONS
    base_params = account.count_params(family, base.config).total + base.head_params
    stored_params = account.count_params(family, model.config).total + model.head_params
    params = account.count_nonzero_params(family, model.config, model.sparsity).total
    params += model.head_params - model.zeros
    for precision in precisions:
        paper_params = account.paper_nf4_params(params) if precision == "nf4" else params
        mine = replace(setup, quantize="nf4" if precision == "nf4" else None)
        memory = training.training_memory(family, model.config, mine)
        head_bytes = model.head_params * mine.compute_bytes
        memory = replace(memory, weights=memory.weights + head_bytes)
        largest = None
        if fit_bytes is not None:
            left_bytes = fit_bytes - math.ceil(head_bytes / training.USABLE_SHARE)
            largest = training.largest_micro_batch(family, model.config, mine, left_bytes) or 0
        yield MemoryRow(
            name=model.name,
            precision=precision,
            ratio=model.ratio,
            params=params,
            stored_params=stored_params,
            removed_share=account.removed_share(base_params, params),
            paper_params=paper_params,
            paper_reduction=account.reduction(base_params, paper_params),
            paper_weight_bytes=paper_params * account.BF16_BYTES,
            weight_bytes=memory.weights,
            weight_reduction=base_params * account.BF16_BYTES / memory.weights,
            lora_params=account.count_lora_params(family, model.config, setup.rank, setup.targets),
            adapter_bytes=memory.adapter,
            gradient_bytes=memory.gradients,
            optimizer_bytes=memory.optimizer,
            training_state_bytes=memory.state,
            training_bytes_without_activations=memory.weights + memory.state,
            activation_bytes=memory.activations,
            logits_bytes=memory.logits,
            context_bytes=memory.context,
            training_bytes=memory.total,
            smallest_card_gib=memory.smallest_card_gib,
            largest_micro_batch=largest,
        )


def fit_answers(
    family: Family,
    config: dict[str, Any],
    setup: TrainingSetup,
    keeps: tuple[int, int],
    multiple_of: int,
    fit_bytes: int,
) -> Iterator[FitAnswer]:
    """The smallest ratio that fits, in bf16 and in NF4."""
    geometry = family.geometry(config)
    for precision in _PRECISIONS:
        mine = replace(setup, quantize="nf4" if precision == "nf4" else None)
        answer = FitAnswer(precision=precision, ratio=None)
        for hundredths in range(100):
            try:
                widths = layer_widths(geometry, hundredths / 100, *keeps, multiple_of)
            except UsageError:
                break  # nothing would be left of a layer
            tried = pruned_config(config, geometry, widths) if hundredths else config
            memory = training.training_memory(family, tried, mine)
            if memory.fits(fit_bytes):
                answer = FitAnswer(
                    precision=precision,
                    ratio=hundredths / 100,
                    training_bytes=memory.total,
                    remaining_params=account.count_params(family, tried).total,
                )
                break
        yield answer
