"""Reward models in batches against the same models one sequence at a time, and by their formulas."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.armo_rm import HEADER, ArmoRM
from mpo_megatron.rollout.pair_ranker import FIRST, SECOND, SOURCE, DebertaV2PairRM, PairRanker
from mpo_megatron.rollout.reward_models import RewardModel, batches_by_length
from mpo_megatron.rollout.work import Failure
from tests.helpers.models import compute_in_float64
from tests.helpers.reward_models import load_tokenizer, make_armo_rm, make_classifier, make_pair_ranker
from tests.helpers.tokenizers import CHATML

TEXTS = {
    "Name a colour.": ["Red.", "I am a lazy dog, and you?"],
    "Jump!": ["Over the fox.", "", "No", "the the the"],
    "Answer in thirty words. " * 3: ["one two three " * 7, "dog"],
}
GROUPS: list[dict[str, Any]] = [
    {"id": name, "prompt": prompt, "responses": [{"text": text} for text in texts]}
    for name, (prompt, texts) in zip("abc", TEXTS.items(), strict=True)
]
TURNS = [("user", "Name a colour."), ("assistant", "Red."), ("user", "Another?")]
CONVERSATION: dict[str, Any] = {
    "id": "d",
    "prompt": [{"role": role, "content": content} for role, content in TURNS],
    "responses": [{"text": "Green."}, {"text": "Red."}],
}
SETTINGS: dict[str, Any] = {"dtype": "float64", "device": "cpu", "batch_tokens": 200}


def score(folder: Path, groups=GROUPS, **changes) -> list:
    scorer = RewardModel(str(folder), **{**SETTINGS, **changes})
    exact(scorer._model)
    values, tokens = scorer(groups)
    assert tokens > 0
    return values


def exact(model: Any) -> Any:
    """Have a Llama compute in float64 throughout; transformers' norms are in float32."""
    model.eval()
    if model.config.model_type == "llama":
        compute_in_float64(model)
    return model


def one_by_one(folder: Path) -> list[list[torch.Tensor]]:
    """The outputs [K] of transformers' own class for each response alone."""
    model = exact(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64))
    tokenizer = load_tokenizer(folder)
    found: list[list[torch.Tensor]] = []
    for group in GROUPS:
        found.append([])
        for response in group["responses"]:
            if tokenizer.chat_template is None:
                inputs = tokenizer(group["prompt"], response["text"], return_tensors="pt")
            else:
                turns = [("user", group["prompt"]), ("assistant", response["text"])]
                chat = [{"role": role, "content": content} for role, content in turns]
                text = tokenizer.apply_chat_template(chat, tokenize=False)
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            names = ("input_ids", "attention_mask")
            with torch.no_grad():
                found[-1].append(model(**{name: inputs[name] for name in names}).logits[0])
    return found


def close(values: list, expected: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-10) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "<s>"},
        # Llama 3's reward models end a turn with what they pad with.
        {"padding": "<|im_end|>"},
        {"padding": "<|im_end|>", "chat_template": CHATML.replace("<|im_end|>\n", "<|im_end|>")},
        {"family": "gemma"},
        {"family": "gemma", "padding": "<s>"},
        {"family": "deberta-v2", "chat_template": None, "padding": "</s>", "type_vocab_size": 0},
    ],
)
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_a_batch_has_the_scores_of_each_alone(tmp_path, options, batch_tokens):
    folder = make_classifier(tmp_path, **options)
    expected = [[float(logits) for logits in group] for group in one_by_one(folder)]
    assert len({round(value, 3) for group in expected for value in group}) > 5
    assert close(score(folder, batch_tokens=batch_tokens), expected)


@pytest.mark.parametrize("chat_template", [CHATML, None])
def test_a_conversation_is_read_whole(tmp_path, chat_template):
    folder = make_classifier(tmp_path, chat_template=chat_template)
    model = exact(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64))
    tokenizer = load_tokenizer(folder)
    expected = []
    for response in CONVERSATION["responses"]:
        if chat_template is None:
            said = "User: Name a colour.\n\nAssistant: Red.\n\nUser: Another?"
            ids = tokenizer(said, response["text"])["input_ids"]
        else:
            turns = [("system", "You are helpful."), *TURNS, ("assistant", response["text"])]
            said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
            ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids])).logits))
    assert close(score(folder, [CONVERSATION]), [expected])


def test_several_outputs_by_their_weights(tmp_path):
    folder = make_classifier(tmp_path, num_labels=3)
    expected = [
        [float(logits @ torch.tensor([0.5, -1.0, 2.0]).double()) for logits in group]
        for group in one_by_one(folder)
    ]
    assert close(score(folder, weights=[0.5, -1.0, 2.0]), expected)
    with pytest.raises(UserError, match=r"has 3 outputs; say .* --objective-weights 1,0,0"):
        score(folder)
    with pytest.raises(UserError, match=r"--objective-weights has 2 numbers and the model's head 3"):
        score(folder, weights=[1.0, 2.0])


def test_armo_rm_is_its_formula(tmp_path):
    folder = make_armo_rm(tmp_path)
    values = score(folder)
    model = exact(ArmoRM.from_pretrained(folder, dtype=torch.float64))
    tokenizer = load_tokenizer(folder)
    for group, found in zip(GROUPS, values, strict=True):
        for response, value in zip(group["responses"], found, strict=True):
            turn = f"<s><|start_header_id|>user<|end_header_id|>\n\n{group['prompt']}"
            ids = tokenizer(turn + HEADER + response["text"] + "<|eot_id|>", add_special_tokens=False)[
                "input_ids"
            ]
            end_of_turn = len(tokenizer(turn, add_special_tokens=False)["input_ids"])
            assert ids[end_of_turn] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
                rewards = hidden[-1] @ model.regression_layer.weight.T
                gate = hidden[end_of_turn]
                for layer in model.gating.layers[:3]:
                    gate = torch.relu(gate @ layer.weight.T + layer.bias)
                last = model.gating.layers[3]
                gate = 1.5 * torch.softmax((gate @ last.weight.T + last.bias) / 2, dim=0)
                expected = sum(
                    gate[k] * sum(rewards[m] * model.reward_transform_matrix[m, k] for m in range(5)) for k in range(5)
                )  # fmt: skip
            assert value == pytest.approx(float(expected), abs=1e-10)
    assert len({round(value, 3) for group in values for value in group}) == 8


def test_armo_rm_needs_its_template(tmp_path):
    folder = make_armo_rm(tmp_path, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="where ArmoRM's gate reads the prompt"):
        score(folder)


def test_what_is_too_long_has_no_score_and_the_others_do(tmp_path):
    folder = make_classifier(tmp_path)
    whole = score(folder)
    values = score(folder, max_length=60)
    assert isinstance(values[2], Failure)
    assert "prompt and response 1 have" in values[2].reason
    assert "above the limit of 60" in values[2].reason
    assert close(values[:2], whole[:2])
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    long = [{"id": "x", "prompt": "dog " * positions, "responses": [{"text": "a"}]}]
    assert "above the limit of 256" in score(folder, long + GROUPS)[0].reason


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.GRM"}},
        {"architectures": None},
    ],
)
def test_a_model_of_another_kind_is_refused_and_its_code_not_run(tmp_path, changes):
    folder = make_classifier(tmp_path)
    (folder / "modeling_custom.py").write_text("raise SystemError('was run')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match="whose output this tool does not know"):
        score(folder)


def test_batches_by_length():
    lengths = [5, 9, 1, 9, 30, 2]
    assert list(batches_by_length(range(6), lengths, 20)) == [[4], [1, 3], [0, 5, 2]]
    assert list(batches_by_length([], lengths, 20)) == []


def compared(folder: Path, prompt: str, first: str, second: str) -> float:
    """f(first, second) of a pair alone."""
    model = exact(DebertaV2PairRM.from_pretrained(folder, dtype=torch.float64))
    tokenizer = load_tokenizer(folder)
    parts = [SOURCE + prompt, FIRST + first, SECOND + second]
    ids = [token for part in parts for token in tokenizer(part)["input_ids"]]
    with torch.no_grad():
        hidden = model.pretrained_model(torch.tensor([ids])).last_hidden_state[0]
        at = [hidden[ids.index(tokenizer.convert_tokens_to_ids(mark))] for mark in (SOURCE, FIRST, SECOND)]
        left, right = (model.head_layer(torch.cat([at[0], at[side]])) for side in (1, 2))
    return float((left - right).mean())


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_pair_scores_are_the_least_squares_of_the_comparisons(tmp_path, batch_tokens):
    folder = make_pair_ranker(tmp_path)
    values, tokens = PairRanker(str(folder), **{**SETTINGS, "batch_tokens": batch_tokens})(GROUPS)
    assert tokens > 0
    for group, found in zip(GROUPS, values, strict=True):
        texts = [response["text"] for response in group["responses"]]
        n = len(texts)
        rows, wanted = [torch.ones(n).double()], [0.0]  # the sum is 0
        for i in range(n):
            for j in range(n):
                if i != j:
                    rows.append((torch.eye(n)[i] - torch.eye(n)[j]).double())
                    both = [
                        compared(folder, group["prompt"], texts[a], texts[b]) for a, b in ((i, j), (j, i))
                    ]
                    wanted.append((both[0] - both[1]) / 2)
        expected = torch.linalg.lstsq(
            torch.stack(rows), torch.tensor(wanted, dtype=torch.float64)[:, None]
        ).solution[:, 0]
        assert expected.abs().max() > 0.01
        assert found == pytest.approx(expected.tolist(), abs=1e-10)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (f"Jump!{FIRST}", f"{SECOND}Yes"),
        ("Jump!</s>", "<s>Yes"),
        # What is left when the inner mark goes is none again.
        (f"Jump!<|sour{SOURCE}ce|>", "Yes"),
    ],
)
def test_marks_in_a_text_are_no_marks(tmp_path, prompt, response):
    folder = make_pair_ranker(tmp_path)
    ranker = PairRanker(str(folder), **SETTINGS)
    spaced = [re.sub(r"<\|(?:source|candidate\d)\|>|</?s>", " ", text) for text in (prompt, response)]
    groups = [
        {"id": a, "prompt": a, "responses": [{"text": "No"}, {"text": b}]}
        for a, b in (spaced, (prompt, response))
    ]
    plain, marked = ranker(groups)[0]
    assert marked == plain
    assert not isinstance(plain, Failure)
    assert plain[0] == pytest.approx(
        (compared(folder, spaced[0], "No", spaced[1]) - compared(folder, spaced[0], spaced[1], "No")) / 4
    )


def test_a_single_response_has_nothing_to_be_compared_with(tmp_path):
    ranker = PairRanker(str(make_pair_ranker(tmp_path)), **SETTINGS)
    assert ranker([{"id": "a", "prompt": "Jump!", "responses": [{"text": "No"}]}])[0] == [[0.0]]


def test_pairs_that_are_too_long_and_models_of_another_kind(tmp_path):
    ranker = PairRanker(str(make_pair_ranker(tmp_path / "pair")), **SETTINGS, max_length=40)
    values, _ = ranker(GROUPS)
    assert isinstance(values[2], Failure)
    assert "two responses have" in values[2].reason
    assert not isinstance(values[0], Failure)
    with pytest.raises(UserError, match="is no PairRM"):
        PairRanker(str(make_classifier(tmp_path / "other")), **SETTINGS)
    with pytest.raises(UserError, match="'int8' is unknown"):
        PairRanker(str(tmp_path / "pair"), **{**SETTINGS, "dtype": "int8"})
