import pytest

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.units import parse_bytes, parse_params, whole_number


@pytest.mark.parametrize("text", ["", "-1", "1x", " 1", "\u00b2", "\u0661", "9" * 5000])
def test_only_plain_digits_are_a_number(text):
    assert whole_number(text) is None
    # As in the name of a tensor that is nobody's.
    family = family_for({"model_type": "llama"}, "")
    assert family.split_layer(f"model.layers.{text}.mlp.up_proj.weight")[0] == ""
    assert whole_number("007") == 7


@pytest.mark.parametrize("text", ["", "B", "6X", "nan", "1." + "0" * 5000 + "B", "9" * 5000])
def test_what_is_no_count_or_amount_is_refused(text):
    with pytest.raises(UsageError, match="is not a count of parameters"):
        parse_params(text)
    with pytest.raises(UsageError, match="is not an amount of memory"):
        parse_bytes(text)
    assert parse_params("1.5e9") == parse_params("1.5B")
