"""Which part holds each input row, and whether the row is done."""

import numpy as np
from numpy.typing import NDArray

_ABSENT, _DONE, _RETRY = 0, 1, 2


class PartIndex:
    """Five bytes a row: the newest part with the row (-1: none yet), and its state.

    A row whose samples met an infrastructure error is in a part, but not done.
    """

    def __init__(self) -> None:
        self._state = bytearray()
        self._part = np.empty(0, dtype=np.int32)
        self.num_done = 0

    def is_done(self, row: int) -> bool:
        return row < len(self._state) and self._state[row] == _DONE

    @property
    def num_retry(self) -> int:
        """Rows whose newest result is an infrastructure error."""
        return self._state.count(_RETRY)

    def mark(self, row: int, retry: bool) -> None:
        """The row is finished; `retry`: with an infrastructure error, so that a resume runs it."""
        self._grow(row + 1)
        self.num_done += (not retry) - (self._state[row] == _DONE)
        self._state[row] = _RETRY if retry else _DONE

    def mark_all(self, rows: NDArray[np.int64], retries: NDArray[np.int64]) -> int:
        """As `mark` for many rows, each once; `retries` are among them.

        Returns how many of them were done already.
        """
        if not len(rows):
            return 0
        self._grow(int(rows.max()) + 1)
        state = np.frombuffer(self._state, dtype=np.uint8)
        num_done = int(np.count_nonzero(state[rows] == _DONE))
        state[rows] = _DONE
        state[retries] = _RETRY
        self.num_done += len(rows) - num_done - len(retries)
        return num_done

    def place(self, rows: NDArray[np.int64], part: int) -> None:
        """The rows are in this part, which is newer than any they were in before."""
        if len(rows):
            self._grow(int(rows.max()) + 1)
            self._part[rows] = part

    def parts_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The part of each row, -1 where a row is in none."""
        found = np.full(len(rows), -1, dtype=np.int32)
        inside = rows < len(self._part)
        found[inside] = self._part[rows[inside]]
        return found

    def _grow(self, num_rows: int) -> None:
        if num_rows > len(self._state):
            size = max(num_rows, 2 * len(self._state), 1024)
            self._state.extend(bytes(size - len(self._state)))
            more = np.full(size - len(self._part), -1, dtype=np.int32)
            self._part = np.concatenate([self._part, more])
