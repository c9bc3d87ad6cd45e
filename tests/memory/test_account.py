import pytest
from helpers.family_models import PLAIN_FAMILIES

from loram_cli.arch.registry import family_for
from loram_cli.arch.targets import lora_targets
from loram_cli.errors import UsageError
from loram_cli.memory.account import (
    count_lora_params,
    count_nonzero_params,
    count_params,
    nf4_tensor_bytes,
    nf4_weight_bytes,
    paper_nf4_params,
    reduction,
    removed_share,
)
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import training_memory
from loram_cli.units import GIB

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
NARROW = {
    "1": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 7,
    }
}


@pytest.fixture
def llama():
    config = {"model_type": "llama", **TINY}
    return family_for(config, "test"), config


@pytest.fixture(scope="module")
def llama13b():
    config = load_preset("llama2-13b")
    return family_for(config, "llama2-13b"), config


def test_parts_of_a_tiny_model_counted_by_hand(llama):
    count = count_params(*llama)
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32
    assert count.decoder_linear == 3 * layer
    assert count.embedding == count.lm_head == 96 * 32
    assert count.norms == 7 * 32
    assert count.biases == 0
    assert count.total == 3 * layer + 2 * 96 * 32 + 7 * 32


def test_narrow_layer_counted_by_hand(llama):
    family, config = llama
    whole = count_params(family, config)
    pruned = count_params(family, {**config, "per_layer_config": NARROW})
    gone = 2 * 16 * 32 + 2 * 8 * 32 + 3 * 41 * 32
    assert pruned.decoder_linear == whole.decoder_linear - gone
    assert pruned.total == whole.total - gone


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PLAIN_FAMILIES, ids=lambda family: family.family)
def test_every_family_counts_as_transformers_does(family, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**TINY, "model_type": family.model_types[0], "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    count = count_params(family, config)
    # With what lies in the file beside the parameters, such as an activation's constants.
    stored = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
    assert count.total == sum(weight.numel() for weight in (*model.parameters(), *stored))
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    linears.discard(family.lm_head)
    biases = [
        weight.numel()
        for name, weight in model.named_parameters()
        if name.endswith(".bias") and name.removesuffix(".bias") in linears
    ]
    assert count.biases == sum(biases)


def test_semi_of_13b_is_the_true_figure_and_the_printed_one_is_the_7b(llama13b):
    base = count_params(*llama13b).total
    ours = count_nonzero_params(*llama13b, 0.5).total
    assert ours == 6671979520
    assert f"{reduction(base, ours):.2f}" == "1.95"
    # What Table 4 prints in this row (6738415616, 1.93x, 12.55 GiB) is another model's count.
    seven = load_preset("llama2-7b")
    printed = count_params(family_for(seven, "llama2-7b"), seven).total
    assert printed == 6738415616
    assert f"{reduction(base, printed):.2f}" == "1.93"
    assert f"{printed * 2 / GIB:.2f}" == "12.55"


def test_unst_of_13b(llama13b):
    base = count_params(*llama13b).total
    ours = count_nonzero_params(*llama13b, 0.55).total
    assert ours == 6037591040
    assert f"{reduction(base, ours):.2f}" == "2.16"
    assert f"{ours * 2 / GIB:.2f}" == "11.25"
    # The paper counted the non-zeros of its checkpoint, which depend on the weights: SparseGPT
    # zeroes by a threshold per block of columns. Its count has 37872 more than the ratio asks for;
    # we know of no rounding that gives it, so it is compared within 1e-5 and not to the digit.
    assert ours == pytest.approx(6037628912, rel=1e-5)


def test_sparsity_touches_decoder_linears_alone(llama13b):
    whole, sparse = count_params(*llama13b), count_nonzero_params(*llama13b, 0.5)
    assert sparse.decoder_linear * 2 == whole.decoder_linear
    assert (sparse.embedding, sparse.lm_head, sparse.norms) == (
        whole.embedding,
        whole.lm_head,
        whole.norms,
    )
    assert count_nonzero_params(*llama13b, 0.0) == whole


def test_sparsity_is_the_decimal_that_was_written(llama):
    family, config = llama
    # 10 x 10 projections; the product 0.29 * 100 is 28.999999999999996 in binary floating point.
    square = {
        **config,
        "hidden_size": 10,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "intermediate_size": 10,
    }
    assert count_nonzero_params(family, square, 0.29).decoder_linear == 3 * 7 * 71


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_outside_its_range_is_refused(llama13b, sparsity):
    with pytest.raises(UsageError, match="outside"):
        count_nonzero_params(*llama13b, sparsity)


def test_removed_share_is_of_all_parameters():
    assert removed_share(200, 50) == 0.75
    assert removed_share(200, 200) == 0


@pytest.mark.parametrize("shape", [(64, 64), (96, 172), (512, 640), (33, 65), (1, 3)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    # Two at once, so that a table shared between tensors would be counted once and be noticed.
    storage_bytes = {}
    quantized = [
        functional.quantize_4bit(
            torch.ones(shape, dtype=torch.bfloat16),
            blocksize=64,
            compress_statistics=True,
            quant_type="nf4",
        )
        for _ in range(2)
    ]
    for packed, state in quantized:
        nested = state.state2
        for held in (packed, state.absmax, state.code, nested.absmax, nested.code, state.offset):
            storage_bytes[held.data_ptr()] = held.numel() * held.element_size()
    assert 2 * nf4_tensor_bytes(shape[0] * shape[1]) == sum(storage_bytes.values())


def test_nf4_leaves_embedding_head_and_norms_in_bf16(llama):
    family, config = llama
    count = count_params(family, config)
    linears_bytes = sum(
        nf4_tensor_bytes(rows * columns)
        for rows, columns in 3
        * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    )
    rest_bytes = 2 * (count.embedding + count.lm_head + count.norms)
    assert nf4_weight_bytes(family, config) == linears_bytes + rest_bytes


def test_true_nf4_is_more_than_the_paper_counts():
    config = load_preset("llama3.1-70b")
    family = family_for(config, "llama3.1-70b")
    paper_bytes = 2 * paper_nf4_params(count_params(family, config).total)
    assert paper_bytes < nf4_weight_bytes(family, config) < 1.2 * paper_bytes


def test_paper_nf4_count_rounds_up():
    assert [paper_nf4_params(params) for params in (4, 5, 8)] == [1, 2, 2]


def test_lora_parameters_counted_by_hand(llama):
    family, config = llama
    attention = (32 + 32) + 2 * (16 + 32) + (32 + 32)
    layer = attention + 3 * (48 + 32)
    assert count_lora_params(family, config, 4) == 4 * (3 * layer + 96 + 32)
    assert count_lora_params(family, config, 4, ("q_proj",)) == 4 * 3 * 64
    assert count_lora_params(family, config, 4, ("lm_head",)) == 4 * (96 + 32)
    pruned = {**config, "per_layer_config": NARROW}
    gone = 2 * 16 + 2 * 8 + 3 * 41
    assert count_lora_params(family, pruned, 4) == 4 * (3 * layer + 96 + 32 - gone)


def test_a_tied_head_is_left_out_as_training_leaves_it_out(llama):
    family, config = llama
    tied = {**config, "tie_word_embeddings": True}
    assert count_lora_params(family, tied, 8) == count_lora_params(family, config, 8) - 8 * (
        96 + 32
    )
    with pytest.raises(UsageError, match="tied to its embedding"):
        count_lora_params(family, tied, 8, ("lm_head",))


def test_unknown_target_names_the_nearest(llama):
    with pytest.raises(UsageError, match="did you mean 'q_proj'"):
        count_lora_params(*llama, 8, ("q_pro",))


def test_rank_must_be_positive(llama):
    with pytest.raises(UsageError, match="rank"):
        count_lora_params(*llama, 0)


# PEFT asks transformers for an attribute that transformers renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_training_state_is_what_peft_and_adamw_hold(llama):
    """Count and bytes of a real PEFT model after one real step, on a bf16 base."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    family, config = llama
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    targets = lora_targets(family, tied_embeddings=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets)))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()

    def num_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    state = training_memory(family, config, TrainingSetup(rank=4))
    moments = [optimizer.state[w][key] for w in trained for key in ("exp_avg", "exp_avg_sq")]
    assert count_lora_params(family, config, 4) == sum(weight.numel() for weight in trained)
    assert state.adapter == num_bytes(trained)
    assert state.gradients == num_bytes(weight.grad for weight in trained)
    assert state.optimizer == num_bytes(moments)
    assert state.state == 16 * count_lora_params(family, config, 4)
