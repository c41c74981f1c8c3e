"""The worker threads: every task once, failures reported, nothing left behind."""

import threading

import pytest

from orcd_batch.backend.numpy_threads import Workers


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7])
def test_every_task_runs_exactly_once(num_threads: int, num_tasks: int) -> None:
    workers = Workers(num_threads)
    ran: list[int] = []
    for _ in range(3):
        workers.run([lambda i=i: ran.append(i) for i in range(num_tasks)])  # type: ignore[misc]
    workers.close()
    assert sorted(ran) == sorted(list(range(num_tasks)) * 3)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_any_thread_is_raised_after_all_have_ended(failing: int) -> None:
    workers = Workers(2)
    other_ended = threading.Event()

    def task(index: int) -> None:
        if index == failing:
            raise ValueError("broken")
        other_ended.set()

    with pytest.raises(ValueError, match="broken"):
        workers.run([lambda: task(0), lambda: task(1)])
    assert other_ended.is_set()
    workers.run([lambda: None, lambda: None])
    workers.close()


def test_closed_workers_still_run_on_the_calling_thread() -> None:
    workers = Workers(2)
    workers.close()
    seen: list[str] = []
    workers.run([lambda: seen.append(threading.current_thread().name)] * 2)
    assert seen == [threading.current_thread().name] * 2
