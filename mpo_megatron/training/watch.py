"""What may be wrong with a run whose numbers are all finite: loss spikes, margin collapse, both rewards falling.

Pure arithmetic on the metrics of the steps, on rank 0. W: the window, in steps.
"""

import statistics
from collections import deque
from collections.abc import Mapping

# Of the loss over its median: so many times its usual distance from it (1.4826 times the median distance estimates the
# standard deviation of a normal distribution), and at least this part of it.
SPIKE_DEVIATIONS = 8.0
SPIKE_PART = 0.1
# Of the margin's highest mean over a window: what is left of it at a collapse.
COLLAPSED_TO = 0.5
# Standard errors by which two means have to differ.
CLEAR = 3.0


class Watch:
    """Warns of a run's training metrics, once for each time that something begins.

    Args:
        window: W; 0: no warnings.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._losses: deque[float] = deque(maxlen=max(window, 1))
        # Of two windows, the earlier and the later.
        self._history: dict[str, deque[float]] = {
            name: deque(maxlen=2 * max(window, 1))
            for name in ("reward_margin", "preferred_reward", "dispreferred_reward")
        }
        self._best_margin = 0.0
        self._going_on: set[str] = set()

    def add(self, values: Mapping[str, float]) -> list[str]:
        """A step's metrics. Returns what is to be said, each in one sentence."""
        if not self._window:
            return []
        said = [self._spike(values["loss"])]
        for name, history in self._history.items():
            history.append(values[name])
        said += [self._collapse(), self._joint_fall()]
        return [sentence for sentence in said if sentence]

    def _spike(self, loss: float) -> str:
        """Of the loss against those of the W steps before."""
        sentence = ""
        if len(self._losses) == self._window:
            usual = statistics.median(self._losses)
            distance = 1.4826 * statistics.median(abs(value - usual) for value in self._losses)
            is_spike = loss - usual > max(SPIKE_DEVIATIONS * distance, SPIKE_PART * abs(usual))
            sentence = self._begins(
                "spike",
                is_spike,
                f"the loss is {loss:.4g}, and {usual:.4g} in the median of {self._window} steps: look at the groups of "
                "this step, or lower model.optim.lr",
            )
        self._losses.append(loss)
        return sentence

    def _collapse(self) -> str:
        """Of the margin's mean over W steps against the highest before that is clear of noise."""
        margins = list(self._history["reward_margin"])[-self._window :]
        if len(margins) < self._window:
            return ""
        mean = statistics.fmean(margins)
        if mean > CLEAR * _error(margins):
            self._best_margin = max(self._best_margin, mean)
        is_lost = mean < COLLAPSED_TO * self._best_margin
        return self._begins(
            "collapse",
            # A window with margins of before and after says little of its mean.
            is_lost and ("collapse" in self._going_on or self._best_margin - mean > CLEAR * _error(margins)),
            f"the reward margin has fallen to {mean:.3g} over {self._window} steps, from {self._best_margin:.3g}: the "
            "run forgets what it had learnt; lower model.optim.lr, or take an earlier checkpoint",
        )

    def _joint_fall(self) -> str:
        """Of both rewards over W steps, against the W before, where that of the preferred is below its start's 0."""
        changes, ends = [], []
        for name in ("preferred_reward", "dispreferred_reward"):
            values = list(self._history[name])
            if len(values) < 2 * self._window:
                return ""
            before, after = values[: self._window], values[self._window :]
            error = (_error(before) ** 2 + _error(after) ** 2) ** 0.5
            changes.append(statistics.fmean(after) - statistics.fmean(before) < -CLEAR * error)
            ends.append(statistics.fmean(after))
        return self._begins(
            "fall",
            all(changes) and ends[0] < 0,
            f"the rewards of preferred and dispreferred responses fall together, to {ends[0]:.3g} and {ends[1]:.3g} "
            f"over {self._window} steps: the model makes both less likely; add model.mpo.sft_weight, or lower "
            "model.optim.lr",
        )

    def _begins(self, name: str, holds: bool, sentence: str) -> str:
        """The sentence where something holds that did not at the step before."""
        begins = holds and name not in self._going_on
        (self._going_on.add if holds else self._going_on.discard)(name)
        return sentence if begins else ""


def _error(values: list[float]) -> float:
    """Standard error of their mean; 0 of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
