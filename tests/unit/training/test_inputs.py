"""What the next step takes is made while this one runs: nothing but time may show it."""

from contextlib import closing
from threading import Event, current_thread

import pytest

from dmpctl.files import sha256_of
from dmpctl.training.inputs import InputMaker, one_ahead
from tests.helpers import patch_run

WAIT = 30  # sec, where a test would hang otherwise


def test_items_come_in_order_and_all_of_them():
    for count in (0, 1, 2, 7):
        assert list(one_ahead(n for n in range(count))) == list(range(count))


def test_the_next_item_is_made_while_this_one_is_used():
    second = Event()

    def items():
        yield "first"
        second.set()
        yield "second"

    with closing(one_ahead(items())) as made:
        assert next(made) == "first"
        assert second.wait(WAIT)
        assert next(made) == "second"


def test_the_first_item_is_made_by_the_thread_that_asks_and_no_item_twice_at_once():
    with closing(one_ahead(iter_threads())) as made:
        threads = [next(made) for _ in range(4)]
    assert threads[0] is current_thread()
    assert len(set(threads[1:])) == 1
    assert threads[1] is not threads[0]


def iter_threads():
    while True:
        yield current_thread()


@pytest.mark.parametrize("good", [0, 1, 3])
def test_what_fails_is_raised_in_its_turn(good):
    def items():
        yield from range(good)
        raise ValueError("a broken file")

    made, found = one_ahead(items()), []
    with pytest.raises(ValueError, match="a broken file"):
        found.extend(made)
    assert found == list(range(good))


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_closing_ends_the_thread_and_what_it_read(taken):
    ended = Event()

    def items():
        try:
            while True:
                yield current_thread()
        finally:
            ended.set()

    with closing(one_ahead(items())) as made:
        threads = [next(made) for _ in range(taken)]
    assert ended.is_set() == (taken > 0)  # what was never begun has nothing to end
    assert not [thread for thread in threads if thread is not current_thread() and thread.is_alive()]


@pytest.mark.parametrize("given", [{}, {"num_workers": 2}, {"timestep_sampling": "importance"}])
def test_a_patch_is_the_same_with_inputs_that_are_made_ahead(tmp_path, monkeypatch, given):
    """As where a GPU computes."""
    patch_run(tmp_path / "one", **given)
    made = []

    def ahead(items):
        made.append(items)
        return one_ahead(items)

    made_now = InputMaker.from_step
    monkeypatch.setattr(InputMaker, "from_step", lambda self, start: ahead(made_now(self, start)))
    patch_run(tmp_path / "two", **given)
    assert len(made) == 1
    assert sha256_of(tmp_path / "one" / "patch.safetensors") == sha256_of(tmp_path / "two" / "patch.safetensors")
