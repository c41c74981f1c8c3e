"""The logs of jobs that run side by side in one process."""

import logging

from orcd_batch.job_logs import JobLogs, lines_about

log = logging.getLogger(__name__)


def test_a_job_s_log_is_closed_behind_its_group_and_opened_again_for_a_later_line(tmp_path):
    """A sweep of a thousand jobs must not need a thousand open files."""
    directories = [tmp_path / name for name in "ab"]
    handlers = {d: [logging.FileHandler(f"{d}.log", delay=True)] for d in directories}
    with JobLogs(handlers, logging.INFO):
        with lines_about(*directories):
            log.info("loaded")
            with lines_about(directories[0]):
                log.info("row 3 is bad")
            assert [h.stream is None for (h,) in handlers.values()] == [False, False]
        assert [h.stream is None for (h,) in handlers.values()] == [True, True]
        with lines_about(directories[1]):
            log.error("failed")
        assert [h.stream is None for (h,) in handlers.values()] == [True, True]
    assert (tmp_path / "a.log").read_text() == "loaded\nrow 3 is bad\n"
    assert (tmp_path / "b.log").read_text() == "loaded\nfailed\n"
