from wd_probe.errors import first_line


def test_what_an_error_says_is_printable():
    assert first_line(ValueError("a\0b\x1b[31m\nc")) == r"a\x00b\x1b[31m"
    assert first_line(ValueError("é")) == "é"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 160
