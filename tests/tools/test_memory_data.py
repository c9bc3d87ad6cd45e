"""``memory-report --data``: a pass counts the real tokens of the longest examples."""

import pytest

from loram_cli.errors import UsageError
from loram_cli.reporting import NullReporter
from loram_cli.tools.memory_report import run
from loram_cli.tools.specs import MemoryReportSpec


@pytest.mark.integration
def test_a_pass_counts_the_tokens_of_the_data(base, instructions):
    def report(**changes):
        spec = MemoryReportSpec(model=base, ratios=(0.5,), keep_first=1, keep_last=1, **changes)
        return run(spec, NullReporter())

    by_length = report(length=64)
    auto, off = (report(length=64, data=str(instructions), packing=p) for p in ("auto", "off"))
    tokens = [r.to_mapping()["setup"]["tokens_per_pass"] for r in (by_length, off, auto)]
    assert tokens[0] == 4 * 64 >= tokens[1] >= tokens[2] > 0
    assert tokens[2] < tokens[0]
    held = [r.rows[0].activation_bytes for r in (by_length, off, auto)]
    assert held[0] >= held[1] >= held[2]
    assert f"{tokens[2]:,} tokens a pass at most" in auto.settings
    assert "longest" not in auto.to_mapping()["setup"]


def test_a_preset_has_no_tokenizer_to_count_with():
    with pytest.raises(UsageError, match="--data needs a tokenizer"):
        MemoryReportSpec(preset="llama2-7b", data="demo:train")
