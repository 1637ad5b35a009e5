"""Images per second of one worker, lately."""

from __future__ import annotations

from collections import deque

WINDOW = 60.0  # seconds that are looked back on, and more where a batch takes longer
_APART = 0.25  # seconds between two marks: a worker that is quick does not fill the memory
_WARM = 5.0  # seconds of batches after which the way to the first one is forgotten
_SETTLING = 2.0  # seconds after a pause in which what was finished meanwhile comes in
_UNUSUAL = 10  # times the usual distance of two marks


class Speed:
    """A sliding window over a worker's batches; times are those of the caller's clock.

    The rate goes from the end of a batch to the end of another one, so that it does not swing with
    the time since the last. It sinks when a batch is overdue.

    Args:
        start: when the worker was ready.
    """

    def __init__(self, start: float) -> None:
        self._marks = deque([(start, 0)])  # of the images that were finished by then
        self._images = 0
        self._warm = False
        self._before = 0.0  # the rate before a pause
        self._settled = start

    @property
    def last(self) -> float:
        """When anything was finished, or the start."""
        return self._marks[-1][0]

    def add(self, now: float, images: int) -> None:
        """So many more are finished."""
        marks = self._marks
        self._images += images
        mark = max(now, self.last), self._images
        if now < self._settled or (len(marks) > 1 and now - marks[-2][0] < _APART):
            marks[-1] = mark
            return
        marks.append(mark)
        if not self._warm and len(marks) > 2 and now - marks[1][0] >= _WARM:
            marks.popleft()
            self._warm = True
        while len(marks) > 2 and now - marks[1][0] >= WINDOW:
            marks.popleft()

    def pause(self, begin: float, end: float) -> None:
        """Nothing was heard of anybody: both sides stood still, or one of them.

        The time does not count, nor does what was finished in it. Whoever hears of nothing but
        batches has a pause between any two of them: these are as long as usual and are no pauses.
        """
        marks = self._marks
        usual = (self.last - marks[0][0]) / max(1, len(marks) - 1)
        if len(marks) > 2 and end - begin > _UNUSUAL * usual:
            self._before = self.value(begin)
            marks.clear()
            marks.append((end, self._images))
            self._settled = end + _SETTLING

    def value(self, now: float) -> float:
        """Images per second; 0 where nothing is known."""
        (first, none), (last, all_) = self._marks[0], self._marks[-1]
        if last <= first:
            return self._before if now - last < WINDOW else 0.0
        images, latest = all_ - none, all_ - self._marks[-2][1]
        # what it could be at most, were the next batch finished right now
        return min(images / (last - first), (images + latest) / (max(now, last) - first))
