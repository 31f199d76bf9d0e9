import os
import subprocess
import sys

from vim.errors import UserError, describe, one_line, printable


def test_a_message_is_one_line_of_bounded_length():
    assert one_line(" a\n  b \n") == "a b"
    assert one_line(500 * "x") == 500 * "x"
    assert one_line(501 * "x") == 500 * "x" + "..."
    assert str(UserError("Traceback:\n vim.errors.UserError: no such file")) == "no such file"


def test_what_cannot_be_printed_is_escaped():
    """Bytes that are no UTF-8, a terminal's commands, and marks that turn the direction of writing; not é or 猫."""
    name = os.fsdecode(b"caf\xe9") + "\x1b[31m\r\x85\u202e\u2028é 猫"
    escaped = "caf\\udce9\\x1b[31m\\r\\x85\\u202e\\u2028é 猫"
    assert printable(name) == escaped
    assert str(UserError(f"no {name[:9]}.")) == f"no {escaped[:17]}."


def test_an_exception_in_words():
    assert describe(KeyError("a")) == "KeyError: 'a'"
    assert describe(ValueError("of a")) == "of a"
    assert describe(ValueError()) == "ValueError"


def test_a_tool_ends_with_a_line():
    for error, line in (("UserError('no data')", "error: no data\n"), ("OSError(2, 'gone', 'a')", "error: a: gone\n")):
        code = f"from vim.errors import UserError, run\ndef main():\n    raise {error}\nrun(main)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (2, line)
