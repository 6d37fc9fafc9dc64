"""An iterator read ahead gives the same, raises the same, and ends when nobody wants it."""

import threading

import pytest

from jfe_jax.utils.background_iterator import prefetch


def counting(stop, made, closed, error=None):
    try:
        for number in range(stop):
            made.append(number)
            yield number
        if error:
            raise error
    finally:
        closed.set()


def test_it_gives_all_in_order_and_is_ahead():
    made, closed = [], threading.Event()
    elements = prefetch(counting(9, made, closed), 3)
    assert next(elements) == 0
    assert list(elements) == list(range(1, 9)) and closed.is_set()


def test_an_error_comes_when_its_turn_comes():
    elements = prefetch(counting(2, [], threading.Event(), KeyError("lost")), 5)
    assert [next(elements), next(elements)] == [0, 1]
    with pytest.raises(KeyError, match="lost"):
        next(elements)


def test_it_stops_reading_once_it_is_closed():
    made, closed = [], threading.Event()
    elements = prefetch(counting(10**9, made, closed), 2)
    next(elements)
    elements.close()
    assert closed.is_set() and len(made) < 10
