"""One workshop for all tests of faults."""

import pytest
from helpers.workshop import Workshop, Zygote, make_workshop


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def workshop(zygote, base, text_file, instructions, tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("faults")
    return make_workshop(folder, folder / "run", zygote, base, text_file, instructions)
