import importlib
import logging
import warnings

import pytest

from loram_cli.quiet import no_progress_bars, quiet_libraries, quiet_lm_eval, quiet_trl


@pytest.mark.parametrize(
    ("silence", "name"), [(quiet_libraries, "peft"), (quiet_lm_eval, "lm_eval")]
)
def test_loggers_are_silent_inside_and_as_before_outside(silence, name, caplog):
    logger = logging.getLogger(name)
    with silence():
        logger.error("inside")
    logger.error("outside")
    assert [record.message for record in caplog.records] == ["outside"]


@pytest.mark.parametrize("drawn", [True, False])
def test_bars_are_drawn_afterwards_as_before(drawn, request):
    import datasets
    from transformers.utils import logging as theirs

    before = theirs.is_progress_bar_enabled()
    request.addfinalizer(theirs.enable_progress_bar if before else theirs.disable_progress_bar)
    (theirs.enable_progress_bar if drawn else theirs.disable_progress_bar)()
    with no_progress_bars(), no_progress_bars("datasets"):
        assert not theirs.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()
        with no_progress_bars():
            pass
        assert not theirs.is_progress_bar_enabled()
    assert theirs.is_progress_bar_enabled() is drawn
    assert not datasets.are_progress_bars_disabled()


def test_lm_eval_draws_no_bar_and_warns_of_nothing(capsys):
    module = importlib.import_module("lm_eval.api.task")
    before = module.tqdm
    with quiet_lm_eval():
        assert list(module.tqdm(range(3), desc="never shown")) == [0, 1, 2]
        warnings.warn("never shown", UserWarning, stacklevel=1)
    assert module.tqdm is before
    assert capsys.readouterr().err == ""


def test_only_renamed_arguments_of_trl_are_ignored():
    with quiet_trl():
        warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="another"):
            warnings.warn("another thing is deprecated", FutureWarning, stacklevel=1)
