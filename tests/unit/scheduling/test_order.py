"""An epoch visits every group once, in an order that the seed and the epoch alone decide."""

import numpy as np

from mpo_megatron.scheduling.order import in_order, step_groups, steps_per_epoch


def test_an_epoch_visits_every_group_once_in_an_order_of_its_own() -> None:
    per_epoch = steps_per_epoch(21, 8)
    assert per_epoch == 3
    epochs = [np.concatenate([step_groups(e * 3 + s, 21, 8, seed=5) for s in range(3)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    assert [len(step_groups(s, 21, 8, seed=5)) for s in range(3)] == [8, 8, 5]


def test_the_order_is_a_function_of_seed_and_step() -> None:
    assert list(step_groups(4, 21, 8, seed=5)) == list(step_groups(4, 21, 8, seed=5))
    assert list(step_groups(0, 21, 8, seed=5)) != list(step_groups(0, 21, 8, seed=6))


def test_validation_goes_front_to_back() -> None:
    assert [list(part) for part in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(in_order(0, 2)) == []
