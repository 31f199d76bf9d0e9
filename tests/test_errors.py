import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vim.command_line import Parser
from vim.errors import UserError, closest, describe, one_line, printable, run


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


@pytest.mark.parametrize(
    "error, line", [(UserError("no data"), "error: no data\n"), (OSError(2, "gone", "a"), "error: a: gone\n")]
)
def test_a_tool_ends_with_a_line(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert (end.value.code, capsys.readouterr().err) == (2, line)


def test_the_closest_names():
    assert closest("vim_tinny", ["deit_small", "vim_tiny"]) == "(the closest: vim_tiny)"
    assert closest("q", ["vim"]) == "(the closest: none)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "the following arguments are required: out; see a.py --help"),
        (["a", "b", "--numbr", "3"], "unrecognized arguments: --numbr 3 (the closest: --number); see a.py --help"),
        (["a", "b", "c"], "unrecognized arguments: c; see a.py --help"),
        (["a", "b", "--number", "x"], "argument --number: expected a whole number, got 'x'; see a.py --help"),
        (["", "b"], "argument model: expected a path, got ''; see a.py --help"),
        (["a", "b\0c"], "argument out: expected a path, got 'b\\x00c'; see a.py --help"),
    ],
)
def test_a_wrong_command_line(words, message):
    parser = Parser(prog="a.py")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int)
    assert parser.parse_args(["a", "b", "--number", "3"]).number == 3
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    assert str(caught.value) == message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_tool_with_a_line(number, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        with pytest.raises(SystemExit) as end:
            run(lambda: os.kill(os.getpid(), number))
        assert end.value.code == 128 + number
        line = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        assert capsys.readouterr().err == f"{line}\n"
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_an_output_that_nobody_reads():
    code = "from vim.errors import run\nrun(lambda: print('a' * 200_000))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(300)) == (b"", 128 + signal.SIGPIPE)
