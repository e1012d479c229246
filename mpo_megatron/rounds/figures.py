"""The figures of each round, from what its stages have written.

Averages are over prompts: of each the mean over its samples first, and a standard error is that of the prompts' means.
Differences between rounds are taken prompt by prompt: the samples of all rounds are drawn with the same random numbers.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo_megatron.comparison.results import of_metrics
from mpo_megatron.means import Mean, mean_and_error
from mpo_megatron.rollout.records import Record, read_groups
from mpo_megatron.rounds import state
from mpo_megatron.rounds.stages import Round

# Of a response, its length in tokens.
Tokens = Callable[[Record], int]


@dataclass(frozen=True)
class Line:
    """What a round came to; round 0 is the first policy.

    Attributes:
        score: of the held-out samples.
        change: of the score since the round before.
        total: of the score since round 0.
        better, worse: prompts whose mean score rose, and fell, since the round before.
        changed: part of the held-out samples that are other texts than those of the round before.
        tokens: of a held-out sample.
        finished: part of the held-out samples that the limit did not cut.
        kl_start: divergence from the policy that the round started from; see `divergence`.
        kl_first: the same from the first policy.
        margin_before, margin_after, accuracy_after: of the training, on the held-out samples of its starting policy.
        steps: of the training.
        train_prompts, train_score: of what was sampled to train on.
        seconds: of the round's stages together.
    """

    number: int
    score: Mean
    tokens: Mean
    finished: Mean
    seconds: float
    change: Mean | None = None
    total: Mean | None = None
    better: int | None = None
    worse: int | None = None
    changed: float | None = None
    kl_start: Mean | None = None
    kl_first: Mean | None = None
    margin_before: float | None = None
    margin_after: float | None = None
    accuracy_after: float | None = None
    steps: int | None = None
    train_prompts: int | None = None
    train_score: Mean | None = None


def lines(rounds: Sequence[Round], tokens: Tokens) -> list[Line]:
    """A line for each round from 0 on whose stages are all done, up to the first that is not.

    Args:
        tokens: see `Tokens`.
    """
    found: list[Line] = []
    groups: list[dict[str, Record]] = []
    for one in rounds:
        records = [state.read(stage) for stage in one.stages.values()]
        if not all(record is not None and record.made is not None for record in records):
            break
        seconds = sum(record.seconds for record in records if record is not None)
        groups.append(_by_id(one.path("held-out-score")))
        found.append(_line(one, groups, tokens, seconds))
    return found


def _line(one: Round, groups: Sequence[Mapping[str, Record]], tokens: Tokens, seconds: float) -> Line:
    now = groups[-1]
    samples = {name: group["responses"] for name, group in now.items()}
    measured = Line(
        number=one.number,
        score=over_prompts(_scores(now)),
        tokens=over_prompts({name: [float(tokens(r)) for r in own] for name, own in samples.items()}),
        finished=over_prompts(
            {name: [float(r["finish_reason"] == "stop") for r in own] for name, own in samples.items()}
        ),
        seconds=seconds,
    )
    if one.number == 0:
        return measured
    before = groups[-2]
    differences = difference(_scores(before), _scores(now))
    log_probs = {path.stem: _by_id(path) for path in one.stages["log-probs"].outputs}
    training = of_metrics(one.stages["train"].folder / "experiment" / "metrics.jsonl")
    trained_on = _by_id(one.path("score"))
    return Line(
        **{key: getattr(measured, key) for key in ("number", "score", "tokens", "finished", "seconds")},
        change=over_prompts(differences),
        total=over_prompts(difference(_scores(groups[0]), _scores(now))),
        better=sum(change > 0 for (change,) in differences.values()),
        worse=sum(change < 0 for (change,) in differences.values()),
        changed=_changed(before, now),
        kl_start=divergence(log_probs["policy"], log_probs["start"]),
        kl_first=divergence(log_probs["policy"], log_probs.get("first", log_probs["start"])),
        margin_before=training["reward_margin_before"],
        margin_after=training["reward_margin_after"],
        accuracy_after=training["accuracy_after"],
        steps=int(training["steps"]),
        train_prompts=len(trained_on),
        train_score=over_prompts(_scores(trained_on)),
    )


def divergence(policy: Mapping[str, Record], reference: Mapping[str, Record]) -> Mean:
    """Estimate of KL(policy, reference) in nats a response: the mean of log pi(y|x) - log pi_ref(y|x) over samples y of
    the policy.

    It is without bias if they were drawn at temperature 1 and top-p 1. Under top-p it is the mean log-ratio of the
    likelier samples that are left, of the same untruncated models.
    """
    return over_prompts(
        {
            name: [
                ours - theirs
                for ours, theirs in zip(one["log_probs"], reference[name]["log_probs"], strict=True)
            ]
            for name, one in policy.items()
        }
    )


def difference(before: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Of each prompt that both have, the change of its mean."""
    return {
        name: [statistics.fmean(now[name]) - statistics.fmean(before[name])] for name in now if name in before
    }


def over_prompts(values: Mapping[str, list[float]]) -> Mean:
    """Mean of the prompts' means, and its standard error; None of a single prompt."""
    return mean_and_error([statistics.fmean(own) for own in values.values()])


def _changed(before: Mapping[str, Record], now: Mapping[str, Record]) -> float:
    return statistics.fmean(
        new["text"] != old["text"]
        for name in now
        if name in before
        for new, old in zip(now[name]["responses"], before[name]["responses"], strict=True)
    )


def _scores(groups: Mapping[str, Record]) -> dict[str, list[float]]:
    return {
        name: [float(response["score"]) for response in group["responses"]] for name, group in groups.items()
    }


def _by_id(path: Path) -> dict[str, Record]:
    if path.name == "groups.jsonl":
        return {group["id"]: group for group in read_groups(path, constraints=False)}
    with path.open(encoding="utf-8") as file:
        return {record["id"]: record for record in map(json.loads, file)}


@dataclass(frozen=True)
class Example:
    """A held-out prompt with a sample of each round, the same one in all: text and score."""

    prompt: str
    samples: list[tuple[str, float]]


def examples(rounds: Sequence[Round], count: int) -> list[Example]:
    """`count` prompts: those whose mean score rose most since round 0, fell most, and changed as the median does.

    Args:
        rounds: those that are done.
    """
    groups = [_by_id(one.path("held-out-score")) for one in rounds]
    changes = difference(_scores(groups[0]), _scores(groups[-1]))
    # Of equal changes the first in the file.
    ordered = sorted(changes, key=lambda name: -changes[name][0])
    part, middle = max(1, count // 3), len(ordered) // 2
    chosen = [*ordered[:part], *ordered[middle : middle + count - 2 * part], *ordered[-part:]]
    return [
        Example(
            groups[0][name]["prompt"],
            [(own[name]["responses"][0]["text"], own[name]["responses"][0]["score"]) for own in groups],
        )
        for name in dict.fromkeys(chosen)
        if all(name in own for own in groups)
    ]
