from loram_cli.schema import unknown_name


def test_the_nearest_name_is_suggested():
    assert "did you mean 'taylor'?" in str(unknown_name("value", "tailor", ["l2", "taylor"], "x"))


def test_a_long_list_of_names_is_cut():
    text = str(unknown_name("task", "?", [f"name-{i}" for i in range(5000)], "--tasks"))
    assert "and 4984 more" in text
    assert len(text.splitlines()) == 2
    assert len(text) < 400
