"""What a writer tells the process that forked it."""

import multiprocessing
import os
import queue

import pytest

from mpo_megatron.training.write_results import WriteResults


def in_a_fork(results: WriteResults, said: object) -> None:
    process = multiprocessing.get_context("fork").Process(target=results.put, args=(said,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_all_that_was_put_comes_back_in_order() -> None:
    results = WriteResults()
    large = list(range(300_000))  # more than a pipe holds while nobody reads
    in_a_fork(results, large)
    results.put("from here")
    in_a_fork(results, ValueError("a writer's error"))
    assert results.get_nowait() == large
    assert results.get_nowait() == "from here"
    error = results.get_nowait()
    assert isinstance(error, ValueError)
    assert str(error) == "a writer's error"
    with pytest.raises(queue.Empty):
        results.get_nowait()
    in_a_fork(results, "later")
    assert results.get_nowait() == "later"


def test_a_part_is_nothing() -> None:
    results = WriteResults()
    results.put("whole")
    os.truncate(results._file.fileno(), 8)
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_two_share_nothing() -> None:
    one, other = WriteResults(), WriteResults()
    in_a_fork(one, 1)
    with pytest.raises(queue.Empty):
        other.get_nowait()
    assert one.get_nowait() == 1
