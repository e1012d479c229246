"""Each warning where it should be, once, and none on a run that goes well, whatever its noise."""

import numpy as np
import pytest

from mpo_megatron.training.watch import Watch

Run = list[dict[str, float]]


def run(loss: list[float], above: list[float], below: list[float]) -> Run:
    names = ("loss", "reward_margin", "preferred_reward", "dispreferred_reward")
    return [
        dict(zip(names, (a, b - c, b, c), strict=True)) for a, b, c in zip(loss, above, below, strict=True)
    ]


def well(steps: int, seed: int, noise: float) -> Run:
    """Loss falls and margin rises to a level, both with noise."""
    random = np.random.default_rng(seed)
    progress = 1 - np.exp(-np.arange(steps) / 40)
    draw = [noise * random.standard_normal(steps) for _ in range(3)]
    above, below = 0.3 * progress + draw[0], -0.7 * progress + draw[1]
    return run(list(0.69 - 0.3 * progress + draw[2]), list(above), list(below))


def warnings(lines: Run, window: int = 20) -> list[tuple[int, str]]:
    watch = Watch(window)
    return [(step, said) for step, line in enumerate(lines, start=1) for said in watch.add(line)]


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_is_not_warned_of(noise: float, seed: int) -> None:
    assert warnings(well(400, seed, noise)) == []


def test_a_spike_is_said_once() -> None:
    lines = well(200, 0, 0.02)
    for step in (100, 101, 150):
        lines[step - 1]["loss"] = 3.0
    found = warnings(lines)
    assert [step for step, _ in found] == [100, 150]
    assert found[0][1].startswith("the loss is 3, and 0.4")


def test_a_loss_that_hardly_moves_has_no_spikes() -> None:
    lines = run([0.5 + 1e-6 * (step % 7 == 0) for step in range(200)], [0.0] * 200, [0.0] * 200)
    assert warnings(lines) == []


@pytest.mark.parametrize("loss", [float("inf"), 1e30])
def test_losses_of_any_size(loss: float) -> None:
    lines = well(60, 0, 0.02)
    lines[40]["loss"] = loss
    assert [step for step, _ in warnings(lines)] == [41]


def test_a_collapse_is_said_once_for_each_time() -> None:
    lines = well(150, 1, 0.02)
    lost = [{**line, "reward_margin": 0.05} for line in lines[90:]]
    found = warnings([*lines, *lost, *lines[100:], *lost])
    assert [150 < step <= 170 or 260 < step <= 281 for step, _ in found] == [True, True]
    assert all(said.startswith("the reward margin has fallen to ") for _, said in found)


def test_a_margin_that_was_noise_cannot_collapse() -> None:
    random = np.random.default_rng(3)
    above, below = 0.1 * random.standard_normal((2, 400))
    assert warnings(run([0.69] * 400, list(above), list(below))) == []


def test_both_rewards_falling_is_said_once() -> None:
    """As DPO's often do: the margin rises all the while."""
    random = np.random.default_rng(4)
    steps = np.arange(200)
    above = -0.01 * steps + 0.02 * random.standard_normal(200)
    below = -0.03 * steps + 0.02 * random.standard_normal(200)
    found = warnings(run([0.6] * 200, list(above), list(below)))
    assert [step for step, _ in found] == [40]
    assert "fall together, to -0.2" in found[0][1]
    # Only the dispreferred ones: as it should be.
    assert warnings(run([0.6] * 200, list(-above), list(below))) == []
    # From high above their start: the preferred ones are still more likely than there.
    assert warnings(run([0.6] * 200, list(above + 9), list(below + 9))) == []


def test_no_window_no_warnings() -> None:
    lines = well(100, 0, 0.02)
    lines[80]["loss"] = 1e9
    assert warnings(lines, window=0) == []
    assert warnings(lines, window=1) != []
