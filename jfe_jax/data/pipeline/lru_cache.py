"""A cache bounded in bytes that forgets what was used least recently."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Safe to use from several threads. Picklable: a copy in another process starts empty.

    Args:
      capacity: bytes; 0 keeps nothing.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Value | None:
        """The value of `key`, or None."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of `key`; `make` makes it if it is not there, `size` says how many bytes it takes."""
        found = self.find(key)
        if found is not None:
            return found
        # Made outside the lock: other threads go on, and at worst the same value is made twice.
        value = make()
        cost = size(value)
        if cost <= self.capacity:
            with self._lock:
                if key not in self._values:
                    self._values[key] = value, cost
                    self._used += cost
                while self._used > self.capacity:
                    self._used -= self._values.popitem(last=False)[1][1]
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["capacity"])
