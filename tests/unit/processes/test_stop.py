import os
import signal

import pytest

from dmpctl.processes.stop import Stop, interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_a_request(number):
    with Stop() as stop:
        assert stop.got == 0
        os.kill(os.getpid(), number)
        assert stop.got == number


def test_a_second_ctrl_c_ends_at_once():
    with Stop():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.got == signal.SIGTERM


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in NUMBERS]
    with Stop():
        assert [signal.getsignal(number) for number in NUMBERS] != before
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with pytest.raises(RuntimeError), Stop():
        raise RuntimeError
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize(("number", "name", "code"), [(2, "SIGINT", 130), (15, "SIGTERM", 143), (10, "SIGUSR1", 143)])
def test_the_failure_says_where_and_how_to_go_on(number, name, code):
    failure = interrupted(number, "saved at step 7", "go on with: dmpctl patch")
    assert failure.message == f"stopped by {name}, saved at step 7"
    assert (failure.hint, failure.exit_code) == ("go on with: dmpctl patch", code)
    assert failure.requeued().exit_code == (130 if name == "SIGINT" else 75)
