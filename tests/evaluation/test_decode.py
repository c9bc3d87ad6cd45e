import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.evaluation.batching import GrowingBatch
from loram_cli.evaluation.decode import Decoder, Generation, _filtered, stream_seed
from loram_cli.evaluation.scoring import TokenSpan, score_spans

pytestmark = pytest.mark.integration

PROMPTS = ["a", "Question: how many?\nAnswer:", "xyz " * 9]


def ids_of(tokenizer, prompts=PROMPTS):
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def stock(model, tokenizer, prompt, tokens):
    """Hugging Face's own greedy generation of one row."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_that_of_generate(model, tokenizer):
    lengths = [3, 30, 17]
    jobs = [Generation(p, (), n) for p, n in zip(PROMPTS, lengths, strict=True)]
    texts = Decoder(model, tokenizer).generate(ids_of(tokenizer), jobs)
    assert texts == [stock(model, tokenizer, p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert len(set(texts)) == 3


def test_real_weights_say_what_generate_says(stories):
    model, tokenizer = stories
    prompts = ["Once upon a time", "The little dog was very", "Tom and Lily"]
    jobs = [Generation(p, (), 40) for p in prompts]
    texts = Decoder(model, tokenizer).generate(ids_of(tokenizer, prompts), jobs)
    for text, prompt in zip(texts, prompts, strict=True):
        assert text.split() == stock(model, tokenizer, prompt, 40).split()


class Script(torch.nn.Module):
    """Says a fixed text in each row, whatever it is given; rows are told by their first id."""

    def __init__(self, model, tokenizer, texts):
        super().__init__()
        self.model, self.texts = (
            model,
            [tokenizer.encode(t, add_special_tokens=False) for t in texts],
        )
        self.config, self.device = model.config, model.device
        self.widths = []

    def forward(self, input_ids, attention_mask, past_key_values, **kwargs):
        out = self.model(input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                         **kwargs)  # fmt: skip
        if past_key_values.get_seq_length() == input_ids.shape[1]:
            self.rows = list(range(len(input_ids)))
            self.step = 0
        elif len(input_ids) < len(self.rows):
            said = [self.texts[r][self.step - 1] for r in self.rows]
            kept = [i for i, token in enumerate(said) if token in input_ids[:, 0].tolist()]
            self.rows = [self.rows[i] for i in kept][: len(input_ids)]
        self.widths.append(len(input_ids))
        for i, row in enumerate(self.rows):
            out.logits[i, -1, self.texts[row][min(self.step, len(self.texts[row]) - 1)]] = 1e4
        self.step += 1
        return out


def test_rows_end_at_their_own_stop_and_leave_the_batch(model, tokenizer):
    script = Script(model, tokenizer, ["ab\n\ncd", "ABCENDxyz", "0123456789", "9876543210"])
    jobs = [
        Generation("p", ("\n\n", "END"), 10),
        Generation("ENDp", ("END",), 10),  # what stands in the prompt is no stop
        Generation("p", (), 10),
        Generation("p", ("5",), 10),
    ]
    texts = Decoder(script, tokenizer).generate(ids_of(tokenizer, [j.prompt for j in jobs]), jobs)
    assert texts == ["ab", "ABC", "0123456789", "987" + "6"]
    assert script.widths[0] == 4
    assert script.widths[-1] == 1
    assert sum(script.widths) < 40  # four rows of ten steps each, had ended rows stayed


def test_end_of_text_ends_a_row(model, tokenizer, monkeypatch):
    steps = []
    forward = type(model).forward

    def always_end(self, *args, **kwargs):
        steps.append(1)
        out = forward(self, *args, **kwargs)
        out.logits[..., 1] = 1e4
        return out

    monkeypatch.setattr(type(model), "forward", always_end)
    jobs = [Generation(p, (), 50) for p in PROMPTS]
    assert Decoder(model, tokenizer).generate(ids_of(tokenizer), jobs) == ["", "", ""]
    assert len(steps) == 1


def test_samples_do_not_depend_on_their_batch(model, tokenizer):
    def job(prompt, occurrence):
        return Generation(prompt, (), 12, 0.8, 0.95, 0, stream_seed(1, prompt, occurrence))

    jobs = [job(prompt, n) for prompt in PROMPTS for n in range(2)]
    decoder = Decoder(model, tokenizer)
    together = decoder.generate(ids_of(tokenizer, [j.prompt for j in jobs]), jobs)
    alone = [decoder.generate(ids_of(tokenizer, [j.prompt]), [j])[0] for j in jobs]
    assert together == alone
    assert len(set(together)) == len(jobs)


def test_draws_follow_the_softmax(model, tokenizer):
    decoder = Decoder(model, tokenizer)
    prompt = ids_of(tokenizer, ["a"])[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1].float()
    draws = 3000
    jobs = [Generation("a", (), 1, 0.1, 1.0, 0, seed) for seed in range(draws)]
    rows = [type("R", (), {"generator": decoder._stream(j), "place": 0, "job": j}) for j in jobs]
    chosen = decoder._choose(logits.expand(draws, -1), rows)
    expected = (logits / 0.1).softmax(-1)
    found = torch.bincount(chosen, minlength=len(logits)) / draws
    likely = expected > 0.02
    assert likely.sum() > 2
    assert (found - expected)[likely].abs().max() < 0.04


def test_top_p_and_top_k_keep_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def kept(**options):
        return torch.isfinite(_filtered(logits, Generation("", (), 1, 1.0, **options)))

    assert kept(top_p=0.95).tolist() == [True, True, True, False]
    assert kept(top_p=0.5).tolist() == [True, False, False, False]
    assert kept(top_p=1.0, top_k=2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("width", [1, 5])
def test_layers_of_uneven_width_decode(tiny_config, tokenizer, width):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    narrow = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20}
    config = transformers.LlamaConfig(
        **tiny_config, per_layer_config={1: narrow}, allow_global_per_layer_attribute_access=True
    )
    torch.manual_seed(0)
    uneven = transformers.LlamaForCausalLM(config)
    uneven.model.layers[1] = LlamaDecoderLayer(config.per_layer_config[1], 1)
    prompts = PROMPTS[:width]
    jobs = [Generation(p, (), 4 + 3 * i) for i, p in enumerate(prompts)]
    texts = Decoder(uneven.eval(), tokenizer).generate(ids_of(tokenizer, prompts), jobs)
    assert texts == [stock(uneven, tokenizer, j.prompt, j.max_new_tokens) for j in jobs]


def test_logits_that_are_no_numbers_are_no_answer(tiny_config, tokenizer):
    import transformers

    broken = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_config)).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(LoramError, match="gives NaN where logits are expected"):
        Decoder(broken, tokenizer).generate([[3, 4]], [Generation("Hi", (), 2)])
    with pytest.raises(LoramError, match="gives NaN where logits are expected"):
        list(
            score_spans(broken, [TokenSpan((3, 4, 5), 1)], GrowingBatch(1, torch.device("cpu"), 1))
        )
