"""Closing several things although some of them fail."""

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


def close_all(*closings: Callable[[], object]) -> None:
    """Calls every one in order, whatever the ones before did, then raises the first failure.

    After a fault on the GPU every call into CUDA fails: the first says why, the rest are logged.
    """
    first: BaseException | None = None
    for close in closings:
        try:
            close()
        except BaseException as error:
            if first is None:
                first = error
            else:
                log.debug("closing failed as well: %s", error)
    if first is not None:
        raise first
