"""Ranks that meet before they start: one kind of device, no error on any of them, and all there."""

import datetime
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.runtime import meeting
from mpo_megatron.runtime.meeting import meet, starting_together


def told(brought: Sequence[str | UserError], absent: int = 0) -> list[str]:
    """What each rank with one of these devices or errors is told, in threads that share a store."""
    store, said = dist.HashStore(), [""] * len(brought)
    latest = datetime.timedelta(seconds=1 if absent else 60)

    def rank(number: int) -> None:
        mine = brought[number]
        try:
            meet(
                mine if isinstance(mine, UserError) else torch.device(mine),
                store, number, len(brought) + absent, latest,
            )  # fmt: skip
        except UserError as error:
            said[number] = str(error)

    with ThreadPoolExecutor(len(brought)) as threads:
        list(threads.map(rank, range(len(brought))))
    return said


def test_ranks_with_one_kind_of_device_go_on() -> None:
    assert told(["cpu"] * 3) == told(["cuda:0", "cuda:1", "cuda:0"]) == [""] * 3


def test_ranks_with_and_without_a_gpu_are_told_which() -> None:
    said = told(["cuda:0", "cpu", "cuda:1"])
    assert len(set(said)) == 1
    assert re.match(
        r"1 of 3 ranks find no GPU \(rank 1 on \S+\) and the others do; mend these nodes", said[0]
    )
    many = told(["cuda:0"] + ["cpu"] * 6)
    assert " and 2 more) and the others do" in many[0]


def test_an_error_of_one_rank_is_raised_on_all_with_its_place() -> None:
    said = told(["cpu", ConfigError("there is no model"), "cpu"])
    assert len(set(said)) == 1
    assert re.fullmatch(r"there is no model \(on 1 of 3 ranks: rank 1 on \S+\)", said[0])


def test_an_error_of_all_ranks_is_of_no_place() -> None:
    assert told([ConfigError("unknown key"), ConfigError("unknown key")]) == ["unknown key"] * 2


def test_ranks_that_do_not_come_are_named() -> None:
    for said in told(["cpu", "cpu"], absent=6):
        assert said.startswith(
            "6 of 8 ranks have not come within 0.0166667 minutes (rank 2, 3, 4, 5 and 2 more)"
        )


def test_alone_an_error_is_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(meeting, "rendezvous", None)
    with pytest.raises(KeyError, match="bug"), starting_together():
        raise KeyError("bug")
    with pytest.raises(ConfigError, match="mend it"), starting_together():
        raise ConfigError("mend it")
