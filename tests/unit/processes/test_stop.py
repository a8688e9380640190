import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dmpctl.errors import Interrupted
from dmpctl.processes import stop as stopping
from dmpctl.processes.stop import SIGNALS, Stop, ending_by_signals, heard, interrupted
from tests.helpers import environment


@pytest.fixture(autouse=True)
def _all_are_heard():
    """Whatever started the tests has some ignored, perhaps."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS if number != signal.SIGINT}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def forever(number: int) -> None:
    """A computation that only something from outside ends."""
    os.kill(os.getpid(), number)
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
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
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(RuntimeError), Stop():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_long_computation_ends_in_its_middle(number, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)
    alarm = signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM)

    def work() -> None:
        with Stop(lambda: "after 3 of 8", "type it again") as stop, stop.soon():
            forever(number)

    with pytest.raises(Interrupted, match=f"stopped by {number.name}, after 3 of 8") as caught:
        work()
    assert (caught.value.hint, caught.value.exit_code) == ("type it again", 130 if number == signal.SIGINT else 143)
    assert signal.getsignal(signal.SIGALRM) == alarm[1]
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(alarm[0])  # the test's own time limit


def test_what_ends_by_itself_is_kept_and_the_context_says_so():
    kept = []

    def work() -> None:
        with Stop(lambda: f"{len(kept)} are kept") as stop:
            with stop.soon():
                os.kill(os.getpid(), signal.SIGHUP)
            kept.append(1)
            with stop.soon():
                kept.append(2)

    with pytest.raises(Interrupted, match=r"stopped by SIGHUP, 2 are kept"):
        work()


def test_a_signal_reaches_all_contexts_and_the_inner_one_ends_first(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)
    said = []

    def work() -> None:
        with Stop(lambda: "2 cells") as outer, outer.soon():
            os.kill(os.getpid(), signal.SIGTERM)
            with Stop() as inner:
                assert inner.got == signal.SIGTERM  # it came before
                time.sleep(0.2)  # what is inside of it is finished
                said.append("saved")
                with inner.soon():
                    forever(signal.SIGTERM)

    with pytest.raises(Interrupted, match="2 cells"):
        work()
    assert said == ["saved"]


def test_a_computation_beside_a_generator_that_waits_in_a_context_of_its_own_ends(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)

    def batches():
        with Stop(lambda: "batches"):
            yield from range(3)

    def work() -> None:
        with Stop(lambda: "features") as stop:
            for _ in batches():
                with stop.soon():
                    forever(signal.SIGTERM)

    with pytest.raises(Interrupted, match="features"):
        work()


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_outside_of_it_signals_end_the_work_wherever_it_is(number):
    with pytest.raises(Interrupted, match=f"stopped by {number.name}"), ending_by_signals():
        forever(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    assert number not in heard()
    with ending_by_signals(), Stop(lambda: "never") as stop, stop.soon():
        os.kill(os.getpid(), number)
    assert stop.got == 0
    assert signal.getsignal(number) is signal.SIG_IGN


def test_in_another_thread_it_changes_nothing():
    found = []
    thread = threading.Thread(target=lambda: found.append(Stop().__enter__().got))
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize(
    ("number", "name", "code"), [(2, "SIGINT", 130), (15, "SIGTERM", 143), (10, "SIGUSR1", 143), (1, "SIGHUP", 143)]
)
def test_the_failure_says_where_and_how_to_go_on(number, name, code):
    failure = interrupted(number, "saved at step 7", "go on with: dmpctl patch")
    assert failure.message == f"stopped by {name}, saved at step 7"
    assert (failure.hint, failure.exit_code) == ("go on with: dmpctl patch", code)
    assert failure.requeued().exit_code == (130 if name == "SIGINT" else 75)


def test_nohup_is_heard_by_nobody():
    words = "from dmpctl.processes.stop import heard; import sys; sys.stdout.write(' '.join(n.name for n in heard()))"
    command = ["nohup", sys.executable, "-c", words]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert "SIGHUP" not in found.stdout
    assert "SIGTERM" in found.stdout
