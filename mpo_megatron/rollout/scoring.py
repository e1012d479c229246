"""Scorers: from the groups of a batch to their scores, one list for each group."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mpo_megatron.data.schema import LARGEST_SCORE
from mpo_megatron.errors import UserError
from mpo_megatron.rollout.records import Record, prompt_text
from mpo_megatron.rollout.rewards import verified_score
from mpo_megatron.rollout.work import Worker


def start_constraints(number: int) -> Worker:
    """The scorer by verifiable constraints (`rewards.verified_score`), rounded to three decimals."""
    return lambda groups: ([_by_constraints(group) for group in groups], 0)


def start_reward_model(
    kind: str, folder: str, device: str | None, processes: int, settings: dict[str, Any], number: int
) -> Worker:
    """The scorer by a model in `folder`, "reward-model" or "pair-ranker"; `settings` are those of its class."""
    from mpo_megatron.rollout.devices import place

    where = place(device, processes, number)
    if kind == "pair-ranker":
        from mpo_megatron.rollout.pair_ranker import PairRanker

        return PairRanker(folder, device=where, **settings)
    from mpo_megatron.rollout.reward_models import RewardModel

    return RewardModel(folder, device=where, **settings)


def start_function(path: str, number: int) -> Worker:
    """The scorer by a function of the user's, as `load_function` finds it.

    It is called with a group (a record with "prompt" and "responses") and returns a number for each response.
    """
    function, _ = load_function(path)

    def scores(group: Record) -> list[float]:
        where = f"--function {path}, group {group['id']!r}"
        try:
            returned = list(function(group))
        except Exception as error:
            raise UserError(
                f"{where}: it raised {type(error).__name__}: {error}; what is done is kept"
            ) from error
        if len(returned) != len(group["responses"]):
            raise UserError(
                f"{where}: it returned {len(returned)} scores for {len(group['responses'])} responses"
            )
        for number, score in enumerate(returned, start=1):
            if not _is_number(score):
                raise UserError(
                    f"{where}: the score of response {number} is {score!r}, which is no finite number of float32"
                )
        return [float(score) for score in returned]

    return lambda groups: ([scores(group) for group in groups], 0)


def load_function(path: str) -> tuple[Callable[[Record], Any], ModuleType]:
    """The function at a dotted path such as "rewards.length.score", and its module.

    Modules of the working directory are found, too. Raises UserError if there is none.
    """
    name, attribute = _module_and_name(path)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _no_module(path, error) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"--function {path}: {module.__file__} has no function {attribute!r}")
    return function, module


def source_digest(path: str) -> str:
    """A short digest of the file that has the function at a dotted path, which is not run for it.

    Raises UserError if there is no such module.
    """
    name, _ = _module_and_name(path)
    try:
        found = importlib.util.find_spec(name)
    except ImportError as error:
        raise _no_module(path, error) from None
    if found is None:
        raise _no_module(path, f"No module named {name!r}")
    source = Path(found.origin) if found.has_location and found.origin else None
    return hashlib.sha256(source.read_bytes() if source is not None else b"").hexdigest()[:16]


def _module_and_name(path: str) -> tuple[str, str]:
    """The two parts of a dotted path; modules of the working directory can be imported from here on."""
    name, _, attribute = path.rpartition(".")
    if not name:
        raise UserError(
            f"--function {path!r} must be a module and a function in it, such as my_rewards.score"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return name, attribute


def _no_module(path: str, problem: object) -> UserError:
    return UserError(
        f"--function {path}: {problem}; its module must be in the working directory or on PYTHONPATH"
    )


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, bool)) and abs(float(value)) <= LARGEST_SCORE
    except (TypeError, ValueError, OverflowError):
        return False


def with_scores(group: Record, scores: Sequence[Any]) -> Record:
    """The group with a "score" in every response."""
    responses = [
        response | {"score": score} for response, score in zip(group["responses"], scores, strict=True)
    ]
    return group | {"responses": responses}


def _by_constraints(group: Record) -> list[float]:
    return [
        round(
            verified_score(
                response["text"],
                group["constraints"],
                prompt=prompt_text(group),
                finished=response["finish_reason"] == "stop",
                topic_words=group.get("topic_words", ()),
            ),
            3,
        )
        for response in group["responses"]
    ]
