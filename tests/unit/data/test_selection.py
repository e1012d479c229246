"""Selections by hand, and the data set that they make of a cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpo_megatron.data import GroupDataset, Selection, TokenizeOptions, build_dataset
from mpo_megatron.data.selection import noise
from mpo_megatron.errors import ConfigError
from tests.helpers.tokenizers import CHATML, make_tokenizer

SCORES = {"a": [5.0, 1.0, 3.0, 4.0, 2.0], "b": [7.0, 2.0], "c": [1.0, 1.0, 1.0], "d": [0.0, 6.0, 6.0, 1.0]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [
        {
            "id": name,
            "prompt": f"Name {name}.",
            "responses": [{"text": "red " * (k + 1), "score": s} for k, s in enumerate(scores)],
        }
        for name, scores in SCORES.items()
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def build(data: Path, **settings: object) -> GroupDataset:
    options = TokenizeOptions(max_prompt_length=40, max_length=80)
    selection = Selection(**settings)  # type: ignore[arg-type]
    tokenizer = make_tokenizer(CHATML)
    return build_dataset(data, tokenizer, options, cache_dir=data.parent / "cache", selection=selection)


def found(dataset: GroupDataset) -> dict[str, tuple[list[float], list[bool]]]:
    """Scores and preferences by group; checks that lengths and tokens are those of the same responses."""
    groups = {}
    for i in range(len(dataset)):
        group = dataset.group(i)
        first, stop = dataset.response_offsets[i : i + 2]
        assert dataset.response_lengths[first:stop].tolist() == [len(ids) for ids in group.response_ids]
        assert dataset.prompt_lengths[i] == len(group.prompt_ids)
        groups[group.id] = (group.scores.tolist(), group.preferred.tolist())
    assert dataset.response_offsets[-1] == len(dataset.response_lengths) == dataset.report.responses
    return groups


def test_best_and_worst_are_kept_in_the_order_of_the_data(data: Path) -> None:
    selected = build(data, keep_best=2, keep_worst=2)
    assert found(selected) == {
        "a": ([5.0, 1.0, 4.0, 2.0], [True, False, True, False]),  # 3 is left out; mean 3
        "b": ([7.0, 2.0], [True, False]),
        "d": ([0.0, 6.0, 6.0, 1.0], [False, True, True, False]),
    }
    whole = build(data)
    longest = whole.group(0).response_ids
    assert [ids.tolist() for ids in selected.group(0).response_ids] == [
        longest[k].tolist() for k in (0, 1, 3, 4)
    ]
    report = selected.report
    assert (report.groups_kept, report.skipped_no_preference, report.responses_dropped) == (3, 1, 1)
    assert "1 of their responses left out by keep_first, keep_best and keep_worst" in str(report)


def test_the_first_responses(data: Path) -> None:
    """The best and worst are taken of the first; the noise is that of the same responses among all."""
    assert found(build(data, keep_first=3)) == {
        "a": ([5.0, 1.0, 3.0], [True, False, False]),
        "b": ([7.0, 2.0], [True, False]),
        "d": ([0.0, 6.0, 6.0], [False, True, True]),
    }
    assert found(build(data, keep_first=3, keep_best=1, keep_worst=1))["a"] == ([5.0, 1.0], [True, False])
    few = found(build(data, keep_first=3, score_noise=0.5, needs_preferred=False))
    every = found(build(data, score_noise=0.5, needs_preferred=False))
    assert {name: scores for name, (scores, _) in few.items()} == {
        name: scores[:3] for name, (scores, _) in every.items()
    }


def test_sets_that_were_selected(data: Path) -> None:
    assert found(build(data, keep_best=1, keep_worst=2, partition="selected")) == {
        "a": ([5.0, 1.0, 2.0], [True, False, False]),
        "b": ([7.0, 2.0], [True, False]),
        "d": ([0.0, 6.0, 1.0], [False, True, False]),  # of the two sixes the first
    }


def test_groups_without_a_preferred_response(data: Path) -> None:
    assert found(build(data, needs_preferred=False))["c"] == ([1.0] * 3, [False] * 3)
    assert "c" not in found(build(data))


def test_noise_depends_on_seed_and_id_alone(data: Path) -> None:
    noisy = found(build(data, score_noise=0.5, score_noise_seed=3, needs_preferred=False))
    for name, scores in SCORES.items():
        assert noisy[name][0] == (np.array(scores) + noise(0.5, 3, name, len(scores))).tolist()
    assert noisy["c"][1].count(True) in (1, 2), "equal scores differ by their noise"
    lines = data.read_text().splitlines()
    data.write_text("".join(line + "\n" for line in reversed(lines)))
    assert found(build(data, score_noise=0.5, score_noise_seed=3, needs_preferred=False)) == noisy
    other = found(build(data, score_noise=0.5, score_noise_seed=4, needs_preferred=False))
    assert all(other[name][0] != noisy[name][0] for name in noisy)


def test_noise_has_the_given_deviation() -> None:
    drawn = np.concatenate([noise(2.0, 0, f"g{i}", 4) for i in range(5000)])
    assert abs(drawn.mean()) < 0.05  # 3.5 standard errors
    assert abs(drawn.std() - 2.0) < 0.035
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "meen"}, "partition='meen' is not known; choose one of: best, mean, median, selected"),
        ({"keep_first": 1}, "keep_first=1 must be 2 or more"),
        ({"keep_best": 2}, "keep_best=2 and keep_worst=None go together"),
        ({"keep_best": 2, "keep_worst": 0}, "must be 1 or more"),
        ({"partition": "selected"}, "set keep_best and keep_worst"),
        ({"score_noise": -1.0}, "score_noise=-1.0 must be 0 or more"),
        ({"score_noise": float("nan")}, "score_noise=nan must be 0 or more"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        Selection(**settings)
    assert "\n" not in str(caught.value)
