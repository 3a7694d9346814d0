"""How a command ends: with a sentence what the user can mend, with a traceback what we must."""

import sys

import pytest

from alexnet_jax.utils import errors


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a command that does something; returns its exit code and what it printed on stderr."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command sets

    def run(act):
        with pytest.raises(SystemExit) as ended:
            errors.exits_cleanly(act)()
        return ended.value.code, capsys.readouterr().err

    return run


def raises(error):
    raise error


def test_bad_input_and_ctrl_c_are_told_in_a_line(ends):
    assert ends(lambda: raises(errors.UserError("no such file"))) == (2, "error: no such file\n")
    assert ends(lambda: raises(KeyboardInterrupt)) == (130, "interrupted\n")


def test_a_fault_of_the_program_keeps_its_traceback(ends):
    code, told = ends(lambda: raises(RuntimeError("what now")))
    assert code == 1
    assert told.startswith("Traceback (most recent call last):")
    assert told.endswith("RuntimeError: what now\n")


def test_what_a_command_returns_is_its_exit_code(ends):
    assert ends(lambda: 75) == (75, "")
    assert ends(lambda: None) == (None, "")  # which is 0 to the system


class Late:
    """Fails when nobody is there any more to catch it."""

    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)


@pytest.mark.parametrize("text", ["Event loop is closed", "something else"])
def test_of_faults_that_nobody_can_catch_those_after_a_failed_write_alone_are_silent(text, ends):
    _, told = ends(lambda: Late(text) and None)
    assert ("RuntimeError" in told) == (text == "something else")
