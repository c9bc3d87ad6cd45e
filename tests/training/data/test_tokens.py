import copy

import numpy as np
import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter
from loram_cli.training.data.documents import Example
from loram_cli.training.data.tokens import PadCollator, TokenRow, pack_tokens, tokenize_examples


def test_packing_loses_nothing_but_the_last_incomplete_block(tokenizer):
    texts = [f"document {i} " * (i % 7) + "." for i in range(600)]
    whole = [t for text in texts for t in [*tokenizer(text)["input_ids"], 1]]
    blocks = pack_tokens(iter(texts), tokenizer, 100)
    assert {len(block.input_ids) for block in blocks} == {100}
    assert np.concatenate([b.input_ids for b in blocks]).tolist() == whole[: len(blocks) * 100]
    assert len(whole) - len(blocks) * 100 < 100


def test_packing_adds_no_second_eos(tokenizer):
    from tokenizers import processors

    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert pack_tokens(["ab"], adding, 4)[0].input_ids.tolist() == adding("ab")["input_ids"]


def test_too_little_text_for_a_block(tokenizer):
    with pytest.raises(LoramError, match="4 tokens, less than one block of 8"):
        pack_tokens(["ab"], tokenizer, 8)


def test_row_is_bos_prompt_completion_eos_with_loss_on_the_answer(tokenizer):
    (row,) = tokenize_examples([Example("ab", " cd")], tokenizer, 64, NullReporter())
    assert tokenizer.decode(row.input_ids) == "<s>ab cd</s>"
    assert tokenizer.decode(row.input_ids[row.answer_start :]) == " cd</s>"
    (row,) = tokenize_examples(
        [Example("ab", " cd")], tokenizer, 64, NullReporter(), loss_on_prompt=True
    )
    assert row.answer_start == 0


def test_tokens_that_span_prompt_and_answer_belong_to_the_answer():
    class Merging:
        eos_token_id = 9

        def __call__(self, texts, add_special_tokens):
            known = {"ab": [0, 1, 2], "abc": [0, 1, 3]}
            return {"input_ids": [known[text] for text in texts]}

    (row,) = tokenize_examples([Example("ab", "c")], Merging(), 64, NullReporter())
    assert (row.input_ids.tolist(), row.answer_start) == ([0, 1, 3, 9], 2)


def test_chat_text_gets_no_second_bos_or_eos(tokenizer):
    examples = [Example("<s>[user]Hi</s>", "Yo</s>\n", special_tokens=False), Example("a", "b")]
    chat, plain = tokenize_examples(examples, tokenizer, 64, NullReporter())
    assert tokenizer.decode(chat.input_ids) == "<s>[user]Hi</s>Yo</s>\n"
    assert tokenizer.decode(plain.input_ids) == "<s>ab</s>"


def test_long_examples_are_cut_and_those_without_answer_dropped(tokenizer, reporter):
    examples = [Example("a", "b" * 20), Example("a" * 20, "b"), Example("a", "b")]
    rows = tokenize_examples(examples, tokenizer, 10, reporter)
    assert [len(row.input_ids) for row in rows] == [10, 4]
    assert "2 of 3 examples are longer than 10 tokens" in reporter.warnings[0]
    assert "1 of them dropped" in reporter.warnings[0]
    with pytest.raises(LoramError, match="no example keeps an answer within 10 tokens"):
        tokenize_examples(examples[1:2], tokenizer, 10, reporter)


def test_batch_pads_on_the_right_and_masks_prompt_and_padding():
    batch = PadCollator(pad_token_id=7)(
        [TokenRow(np.array([1, 2, 3], np.int32), 1), TokenRow(np.array([4, 5], np.int32))]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, 5, -100]]
    assert batch["input_ids"].dtype == torch.int64
    assert PadCollator(0, 8)([TokenRow(np.zeros(3, np.int32))])["input_ids"].shape == (1, 8)


def test_padding_without_mask_changes_no_logit(load):
    model = load()
    ids = torch.arange(3, 13)[None]
    padded = torch.nn.functional.pad(ids, (0, 6), value=2)
    with torch.no_grad():
        torch.testing.assert_close(model(padded).logits[:, :10], model(ids).logits)
