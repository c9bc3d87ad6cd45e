import json

import pytest

from loram_cli.errors import LoramError
from loram_cli.evaluation.samples import load_documents, samples_name


def test_texts_may_hold_any_line_end(tmp_path):
    text = "one\u2028two\u0085three\x0bfour\nfive"
    sample = {"task": "gsm8k", "doc_id": 0, "prompt": text, "target": text, "correct": 1}
    line = json.dumps(sample, ensure_ascii=False)
    (tmp_path / samples_name("base")).write_text(f"{line}\n{line}\n")
    [document] = load_documents(tmp_path)
    assert document.prompt == document.target == text
    assert document.verdict("base")


@pytest.mark.parametrize("line", ["3", "null", '{"task": "gsm8k"}', "[" * 5000])
def test_what_is_no_sample_is_named(tmp_path, line):
    (tmp_path / samples_name("base")).write_text(line + "\n")
    with pytest.raises(LoramError, match=r"samples-base\.jsonl(, line 1)?: (no )?sample"):
        load_documents(tmp_path)
