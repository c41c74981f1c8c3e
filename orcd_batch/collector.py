"""Python's collector of cyclic garbage, where many rows are held for a moment, not in cycles."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# More objects than a step's sequences or the rows between input and workers, which would be looked
# through in vain.
_THRESHOLD = 100_000


def relax_collector() -> Callable[[], None]:
    """Looks at nothing again that is there now, and seldom at what follows.

    Returns what undoes it.
    """
    previous = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_THRESHOLD, *previous[1:])

    def restore() -> None:
        gc.set_threshold(*previous)
        gc.unfreeze()

    return restore


@contextmanager
def relaxed_collector() -> Iterator[None]:
    """`relax_collector` for as long as the context is open."""
    restore = relax_collector()
    try:
        yield
    finally:
        restore()
