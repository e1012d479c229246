"""Log-probabilities of responses against those of one prompt and response at a time, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.log_probs import LogProbs, log_probs, response_ids
from mpo_megatron.rollout.sampling import chat_tokenizer, encode
from tests.helpers.models import compute_in_float64, make_llama
from tools import logprobs

GROUPS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "Name a colour.",
        "responses": [
            {"text": "Red, green and blue.", "finish_reason": "stop"},
            {"text": "The quick brown fox jumps over the lazy", "finish_reason": "length"},
            {"text": "", "finish_reason": "stop"},
        ],
    },
    {
        "id": "b",
        "prompt": "You are a helpful assistant. Answer in at most thirty words: what is a rainbow?",
        "responses": [{"text": "A rainbow.", "finish_reason": "stop"}, {"text": "", "finish_reason": "length"}],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("rows", [2, 16])
def test_batched_with_shared_prompts_they_are_those_of_one_at_a_time(
    rows: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo_megatron.rollout.log_probs._ROWS", rows)
    tokenizer = chat_tokenizer(str(model))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    compute_in_float64(loaded)
    expected, prompts, responses = [], [], []
    for group in GROUPS:
        prompts.append(encode(tokenizer, group))
        responses.append([response_ids(tokenizer, response) for response in group["responses"]])
        for response in responses[-1]:
            ids = torch.tensor([prompts[-1] + response])
            logps = loaded(ids).logits[0].log_softmax(-1)
            first = len(prompts[-1])
            expected.append(logps[first - 1 : -1].gather(1, ids[0, first:, None]).sum())
    with torch.inference_mode():
        found = log_probs(loaded, tokenizer, prompts, responses, "cpu")
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    assert found[-1] == 0
    assert (found[:-1] < 0).all()
    # The end-of-turn token counts where the model has ended its turn.
    assert responses[0][2] == [tokenizer.eos_token_id]
    assert responses[1][1] == []


def test_one_token_each(model: Path) -> None:
    worker = LogProbs(str(model), dtype="float64", device="cpu")
    (alone,), tokens = worker([{**GROUPS[0], "responses": GROUPS[0]["responses"][2:]}])
    (all_three,), _ = worker([GROUPS[0]])
    assert tokens == 1
    assert alone["log_probs"][0] == pytest.approx(all_three["log_probs"][2], abs=1e-5)
    assert all_three["tokens"][2] == 1


def test_the_command_writes_them_by_group_and_goes_on(model: Path, tmp_path: Path) -> None:
    groups, output = tmp_path / "groups.jsonl", tmp_path / "log_probs.jsonl"
    groups.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    logprobs.main(
        ["--model", str(model), "--input", str(groups), "--output", str(output), "--batch-size", "3"]
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    first = [
        "--model",
        str(model),
        "--input",
        str(groups),
        "--output",
        str(tmp_path / "first"),
        "--limit",
        "1",
    ]
    logprobs.main(first)
    (line,) = (tmp_path / "first").read_text().splitlines()
    assert json.loads(line)["log_probs"] == pytest.approx(lines[0]["log_probs"], abs=1e-4)
    with pytest.raises(SystemExit, match=r"--limit 0 leaves no group"):
        logprobs.main([*first[:-1], "0"])
    worker = LogProbs(str(model), dtype="float32", device="cpu")
    values, _ = worker(GROUPS)
    assert [line["id"] for line in lines] == ["a", "b"]
    for line, value in zip(lines, values, strict=True):
        assert line["tokens"] == value["tokens"]
        assert line["log_probs"] == pytest.approx(value["log_probs"], abs=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".parts")] == []
    with pytest.raises(SystemExit, match=r"^logprobs\.py: --model .*no has no config\.json"):
        logprobs.main(["--model", str(tmp_path / "no"), "--input", str(groups), "--output", str(output)])


def test_a_tokenizer_without_a_template_is_one_sentence(model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        LogProbs(str(tmp_path / "model"), dtype="float32", device="cpu")


def test_a_group_beyond_the_models_positions_is_refused(model: Path) -> None:
    answer = {"text": "A rainbow. " * 200, "finish_reason": "stop"}
    long = GROUPS[1] | {"responses": [*GROUPS[1]["responses"], answer]}
    message = r"group 'b': its prompt and the longest response are \d+ tokens, and the model takes 256; shorten them"
    with pytest.raises(UserError, match=message):
        LogProbs(str(model), dtype="float32", device="cpu")([GROUPS[0], long])
