"""Keys of the configuration against the objectives' signatures: one sentence for each that is wrong."""

import re
from typing import Any

import pytest
import torch

from mpo_megatron.errors import ConfigError
from mpo_megatron.objectives import bind, get, names, settle
from tests.helpers.objectives import SETTINGS, random_batch, run


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_needed_is_enough(name: str) -> None:
    entry = get(name)
    required = {key: SETTINGS[name][key] for key, p in entry.hyper_parameters.items() if p.required}
    settled = settle(entry, required)
    assert settled.keys() == entry.hyper_parameters.keys()
    batch = random_batch()
    torch.testing.assert_close(bind(entry, settled)(batch).losses, entry(batch, **required).losses)


def test_values_come_as_their_kind() -> None:
    settled = settle(get("ipo"), {"beta": 1, "length_normalised": False})
    assert settled == {"beta": 1.0, "pairs": "best_worst", "length_normalised": False}
    assert isinstance(settled["beta"], float)
    assert settle(get("mpo"), {"beta": 0.1, "alpha": None}) == {"beta": 0.1}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("wmpo", {"bta": 1}, "unknown key model.mpo.bta; did you mean model.mpo.beta?"),
        ("wmpo", {"partitoin": 1}, "unknown key model.mpo.partitoin; did you mean model.mpo.partition?"),
        ("mpo", {"zzz": 1}, "unknown key model.mpo.zzz; mpo takes beta"),
        ("sft", {"zzz": 1}, "unknown key model.mpo.zzz; sft takes no hyper-parameters"),
        (
            "mpo",
            {"beta": 0.1, "alpha": 0.1},
            "the objective mpo does not use model.mpo.alpha=0.1: it takes beta (as its authors: beta 0.01); add "
            "model.mpo.alpha=null to the command, or change the YAML",
        ),
        (
            "simpo",
            {"beta": 0.1, "alpha": 0.1},
            "the objective simpo does not use model.mpo.alpha=0.1 and needs model.mpo.gamma: it takes beta, gamma, "
            "pairs, label_smoothing (as its authors: beta 2 to 10, gamma 0.3 to 3); add model.mpo.alpha=null "
            "model.mpo.gamma=... to the command, or change the YAML",
        ),
        ("dpo", {"beta": 0.1, "pairs": "all"}, "the objective dpo does not use model.mpo.pairs=all"),
        ("wmpo", {"beta": None, "alpha": 0.1}, "the objective wmpo needs model.mpo.beta"),
        ("mpo", {"beta": 0}, "model.mpo.beta=0 must be above 0"),
        ("mpo", {"beta": float("nan")}, "model.mpo.beta=nan must be above 0"),
        ("mpo", {"beta": True}, "model.mpo.beta=true must be a number"),
        ("mpo", {"beta": "high"}, "model.mpo.beta=high must be a number"),
        ("mpo", {"beta": [1]}, "model.mpo.beta=[1] must be a number"),
        ("wmpo", {"beta": 1, "alpha": -1}, "model.mpo.alpha=-1 must be 0 or more"),
        (
            "wmpo",
            {"beta": 1, "alpha": 1, "weighting": "none"},
            "=none is not known; choose one of absolute, signed",
        ),
        ("dpo", {"beta": 1, "label_smoothing": 0.6}, "=0.6 must be 0 or more and at most 0.5"),
        ("ordered_bins", {"beta": 1, "k": 2.5}, "model.mpo.k=2.5 must be a whole number"),
        ("ordered_bins", {"beta": 1, "k": 1}, "model.mpo.k=1 must be 2 or more"),
        ("ipo", {"beta": 1, "length_normalised": 1}, "model.mpo.length_normalised=1 must be true or false"),
        ("grpo_offline", {"dual_clip": 1}, "model.mpo.dual_clip=1 must be above 1"),
    ],
)
def test_each_wrong_key_is_one_sentence(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        settle(get(name), given, other_keys=["partition", "objective"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", names())
def test_an_sft_term_goes_with_every_objective(name: str) -> None:
    batch = random_batch()
    plain = run(name, batch)
    found = bind(get(name), SETTINGS[name], sft_weight=0.5)(batch)
    best = [batch.scores[batch.groups.segment == group].argmax() for group in range(batch.num_groups)]
    chosen = batch.groups.offsets[:-1] + torch.stack(best)
    wanted = -0.5 * batch.policy_logps[chosen] / batch.lengths[chosen]
    torch.testing.assert_close(found.losses - plain.losses, wanted)
    torch.testing.assert_close(found.rewards, plain.rewards, equal_nan=True)
