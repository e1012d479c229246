"""The harness itself: results, failures, hangs and deaths of ranks, and that it goes on afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankError, RankPool, RankProcesses

pytestmark = pytest.mark.distributed

_setups: list[int] = []
_teardowns: list[int] = []


def note_setup() -> None:
    _setups.append(os.getpid())


def note_teardown() -> None:
    _teardowns.append(os.getpid())


def summed_rank(scale: float, *, offset: float = 0.0) -> tuple[int, int, torch.Tensor]:
    value = torch.full((2,), scale * (dist.get_rank() + 1))
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value + offset


def environment() -> dict[str, str | None]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "PYTEST_CURRENT_TEST")
    return {name: os.environ.get(name) for name in names} | {"threads": str(torch.get_num_threads())}


def spoil_state() -> float:
    """Leaves behind what the next case must not see."""
    first = torch.rand(()).item()
    torch.set_default_dtype(torch.float64)
    dist.new_group([0])
    return first


def default_dtype() -> torch.dtype:
    return torch.get_default_dtype()


class GroupInCycle:
    """As a model with an optimizer: freed by garbage collection alone, in two rounds."""

    def __init__(self) -> None:
        self.itself = self
        self.group = dist.new_group()

    def __del__(self) -> None:
        again: list[object] = [self.group]
        again.append(again)


def leave_group_behind() -> None:
    GroupInCycle()


_held: list[object] = []


def hold_groups(count: int) -> int:
    """Groups that nothing can free."""
    _held.extend(dist.new_group() for _ in range(count))
    return os.getpid()


def threads() -> int:
    return psutil.Process().num_threads()


def hooks() -> tuple[int, int]:
    return len(_setups), len(_teardowns)


def fail_on(rank: int) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == rank:
        raise KeyError("the reason")
    dist.barrier()


def own_process_group() -> int:
    """As code under test that starts torch.distributed by itself, from the environment."""
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return int(total)


def wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    while True:
        time.sleep(0.05)


def die(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def unpicklable() -> object:
    return lambda: None


def start_sleeper(path: str) -> None:
    """Starts a process and then hangs."""
    process = subprocess.Popen(["sleep", "600"])
    Path(path).write_text(f"{os.getpid()} {process.pid}")
    wait_for_ever()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    processes = RankProcesses(setup=f"{__name__}:note_setup", teardown=f"{__name__}:note_teardown")
    yield RankPool(2, processes)
    processes.close()


def still_runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie that its new parent has yet to collect."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_returns_each_ranks_result(pool: RankPool) -> None:
    results = pool.run(summed_rank, 2.0, offset=0.5)
    assert [result[:2] for result in results] == [(0, 2), (1, 2)]
    for _, _, value in results:
        torch.testing.assert_close(value, torch.full((2,), 6.5))


def test_ranks_see_the_environment_of_torchrun_and_nothing_of_pytest(pool: RankPool) -> None:
    for rank, seen in enumerate(pool.run(environment)):
        assert seen == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PYTEST_CURRENT_TEST": None,
            "threads": "1",
        }


def test_other_world_sizes_share_the_processes(pool: RankPool) -> None:
    pids = pool.run(os.getpid)
    assert RankPool(1, pool.processes).run(os.getpid) == pids[:1]
    three = RankPool(3, pool.processes)
    assert three.run(os.getpid)[:2] == pids
    assert [result[2][0].item() for result in three.run(summed_rank, 1.0)] == [6.0] * 3


def test_a_case_does_not_see_the_one_before(pool: RankPool) -> None:
    assert pool.run(spoil_state) == pool.run(spoil_state)
    assert pool.run(default_dtype) == [torch.float32] * 2


def test_a_case_leaves_no_threads_behind(pool: RankPool) -> None:
    pool.run(leave_group_behind)
    before = pool.run(threads)
    for _ in range(3):
        pool.run(leave_group_behind)
    assert pool.run(threads) == before


def test_ranks_that_keep_many_threads_are_replaced(pool: RankPool) -> None:
    first = pool.run(hold_groups, 1)
    assert pool.run(hold_groups, 60) == first
    assert not set(first) & set(pool.run(hold_groups, 1))
    assert max(pool.run(threads)) < 50


def test_a_case_can_start_its_own_process_group(pool: RankPool) -> None:
    assert pool.run(own_process_group) == [2, 2]
    assert pool.run(own_process_group) == [2, 2]


def test_hooks_run_once_a_process_and_once_a_case(pool: RankPool) -> None:
    (setups, before), _ = pool.run(hooks)
    assert setups == 1
    assert pool.run(hooks)[0] == (1, before + 1)


def test_failure_shows_the_traceback_and_the_others_stacks_and_the_pool_goes_on(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(fail_on, 1)
    message = str(caught.value)
    assert "fail_on failed on rank 1 (of 2)" in message
    assert "KeyError: 'the reason'" in message
    assert 'raise KeyError("the reason")' in message
    assert "rank 0, still running, stack" in message
    assert "in barrier" in message
    assert "rank 0 was here" in message
    assert len(pool.run(summed_rank, 1.0)) == 2


def test_hang_ends_in_time_with_stacks_and_the_pool_goes_on(pool: RankPool) -> None:
    pool.run(environment)  # so that the time below is that of the case alone
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(wait_for_ever, timeout=2)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert "wait_for_ever did not end within 2 s on rank 0, 1 (of 2)" in message
    assert "rank 0, still running, stack" in message
    assert "rank 1, still running, stack" in message
    assert message.count("in wait_for_ever") == 2
    assert len(pool.run(summed_rank, 1.0)) == 2


@pytest.mark.parametrize(("how", "shown"), [("exit", "exit code 3"), ("signal", "SIGSEGV")])
def test_death_of_a_rank_is_reported(pool: RankPool, how: str, shown: str) -> None:
    with pytest.raises(RankError, match=shown):
        pool.run(die, how)
    assert len(pool.run(summed_rank, 1.0)) == 2


def test_result_that_cannot_be_sent_is_an_error(pool: RankPool) -> None:
    with pytest.raises(RankError, match="unpicklable"):
        pool.run(unpicklable)


def test_case_that_ranks_cannot_import_is_refused(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="top of its module"):
        pool.run(lambda: None)


def test_failing_setup_says_so() -> None:
    processes = RankProcesses(setup=f"{__name__}:no_such_function")
    with pytest.raises(RankError, match=r"the start of the ranks failed on rank 0[\s\S]*no_such_function"):
        RankPool(1, processes).run(environment)
    processes.close()


def test_nothing_is_left_when_the_tests_process_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = textwrap.dedent(
        f"""
        from tests.distributed.test_rank_pool import start_sleeper
        from tests.helpers.ranks import RankPool, RankProcesses
        RankPool(1, RankProcesses()).run(start_sleeper, {str(pids)!r})
        """
    )
    root = Path(__file__).parents[2]
    tests_process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(root)}
    )
    try:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, seconds=120)
    finally:
        tests_process.kill()
        tests_process.wait()
    rank, sleeper = (int(pid) for pid in pids.read_text().split())
    wait_until(lambda: not still_runs(rank) and not still_runs(sleeper), seconds=20)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.1)


def test_fixture_runs_megatrons_groups_on_cpu_ranks(ranks: Callable[[int], RankPool]) -> None:
    for _ in range(2):  # the groups of a case are gone when the next starts
        assert ranks(2).run(megatron_tensor_parallel) == [(2, 0, 3.0), (2, 1, 3.0)]


def megatron_tensor_parallel() -> tuple[int, int, float]:
    from megatron.core import parallel_state, tensor_parallel

    assert not parallel_state.is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    rank = parallel_state.get_tensor_model_parallel_rank()
    total = tensor_parallel.reduce_from_tensor_model_parallel_region(torch.full((1,), rank + 1.0))
    return parallel_state.get_tensor_model_parallel_world_size(), rank, total.item()
