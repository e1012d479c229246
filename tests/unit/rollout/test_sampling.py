from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_megatron.rollout.sampling import draw_tokens, sample_responses
from tests.helpers.models import make_llama
from tests.helpers.tokenizers import make_tokenizer

PROMPTS = [
    "Name three colours of the rainbow in one sentence.",
    "Red?",
    "You are a lazy dog. Jump over the fox.",
]
SETTINGS = {
    "samples": 3,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 12,
    "batch_size": 6,
    "seed": 5,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that is likely to end its turn at any place."""
    folder = make_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        head = llama.lm_head.weight
        head.mul_(0.3)
        head[len(tokenizer) :] = 0
        head[tokenizer.eos_token_id] *= 8
    llama.generation_config.eos_token_id = [tokenizer.eos_token_id]
    llama.save_pretrained(folder)
    return folder


def sample(model: Path, prompts=PROMPTS, **changes):
    return sample_responses(str(model), prompts, **{**SETTINGS, **changes})


def test_responses_come_in_the_order_of_the_prompts_and_depend_on_the_seed_alone(model):
    first = sample(model)
    assert [len(responses) for responses in first] == [3, 3, 3]
    assert sample(model) == first
    assert sample(model, seed=6) != first
    assert len({response["text"] for responses in first for response in responses}) > 3


def test_sampling_leaves_the_callers_random_state_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    sample(model)
    assert torch.equal(torch.rand(4), expected)


def test_finish_reasons(model):
    responses = [r for group in sample(model, PROMPTS * 8, max_new_tokens=6) for r in group]
    reasons = [response["finish_reason"] for response in responses]
    assert set(reasons) == {"stop", "length"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert all(token not in r["text"] for r in responses for token in tokenizer.all_special_tokens)


def greedy(model: Path, prompt: str, new_tokens: int) -> tuple[str, str]:
    """The likeliest answer by transformers' generate, one prompt at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    llama = AutoModelForCausalLM.from_pretrained(model).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = llama.generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id
    )[0, inputs["input_ids"].shape[1] :].tolist()
    stopped = tokenizer.eos_token_id in output
    return tokenizer.decode(output, skip_special_tokens=True), "stop" if stopped else "length"


def test_batches_with_padding_and_dropped_rows_match_generate_one_by_one(model):
    # At almost zero temperature all samples are the likeliest answer, which padding must not change.
    prompts = [
        *PROMPTS,
        "Green and blue are lazy.",
        "brown fox " * 5,
        "one\ntwo",
        "dog",
        "Answer in thirty words.",
    ]
    sampled = sample(model, prompts, temperature=1e-4, samples=2, batch_size=16, max_new_tokens=24)
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert len({len(text) for text, _ in expected}) > 2  # rows end at different steps
    for responses, (text, reason) in zip(sampled, expected, strict=True):
        assert responses == [{"text": text, "finish_reason": reason}] * 2


def test_draw_tokens_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    shares = torch.bincount(draw_tokens(logits, 1.0, 1.0), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    # Tokens that hold 0.7 of the probability: the first two (0.5 does not reach it), renormalised.
    shares = torch.bincount(draw_tokens(logits, 1.0, 0.7), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02)
    # At temperature 1/2 probabilities are squared.
    shares = torch.bincount(draw_tokens(logits, 0.5, 1.0), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.02)


def test_top_p_that_needs_more_than_the_head_of_a_large_vocabulary():
    torch.manual_seed(0)
    # Probabilities fall slowly, by a factor e over all 10000 tokens: 90% of them lie in the first 8414.
    drawn = draw_tokens(torch.linspace(0, -1, 10_000).expand(400, -1), 1.0, 0.9)
    assert 2048 < drawn.max() <= 8416


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 2}, "batch_size=2 .* 3 samples"),
        ({"dtype": "int8"}, "'int8' is unknown"),
    ],
)
def test_settings_that_cannot_sample_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **changes)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    make_llama(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no chat template"):
        sample(tmp_path)
