from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_megatron.errors import UserError
from mpo_megatron.rollout.generation import Sampling, prompt_batches, uniforms
from mpo_megatron.rollout.sampling import HuggingFaceSampler, chat_tokenizer, draw_tokens, encode
from tests.helpers.models import make_llama
from tests.helpers.tokenizers import LLAMA2, make_tokenizer

PROMPTS = [
    "Name three colours of the rainbow in one sentence.",
    "Red?",
    "You are a lazy dog. Jump over the fox.",
]
SETTINGS: dict[str, Any] = {
    "samples": 3,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 12,
    "seed": 5,
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


def records(prompts=PROMPTS) -> list[dict]:
    return [{"id": f"p{number}", "prompt": prompt} for number, prompt in enumerate(prompts)]


def sample(model: Path, prompts=PROMPTS, *, batch_size=None, order=None, **changes) -> list[list[dict]]:
    """Responses in the order of the prompts; `order` is the one that they are given in, `batch_size` in prompts."""
    sampler = HuggingFaceSampler(
        str(model), Sampling(**{**SETTINGS, **changes}), dtype="float32", device="cpu"
    )
    asked = records(prompts)
    order = order or range(len(asked))
    size = batch_size or len(asked)
    found = {}
    for first in range(0, len(asked), size):
        batch = [asked[number] for number in order[first : first + size]]
        groups, tokens = sampler(batch)
        assert tokens >= sum(map(len, groups))
        found.update({record["id"]: group for record, group in zip(batch, groups, strict=True)})
    return [found[record["id"]] for record in asked]


def test_responses_come_in_the_order_of_the_prompts_and_depend_on_the_seed_alone(model):
    first = sample(model)
    assert [len(responses) for responses in first] == [3, 3, 3]
    assert sample(model) == first
    assert sample(model, seed=6) != first
    assert len({response["text"] for responses in first for response in responses}) > 3


def test_a_sample_depends_on_no_other(model):
    prompts = [*PROMPTS, "dog", "one\ntwo", "brown fox " * 5, "Answer in thirty words."]
    first = sample(model, prompts)
    assert sample(model, prompts, batch_size=1) == first
    assert sample(model, prompts, batch_size=3, order=[6, 2, 0, 5, 1, 3, 4]) == first
    more = sample(model, prompts, samples=5)
    assert [group[:3] for group in more] == first
    assert len({response["text"] for response in more[0]}) == 5


def test_random_numbers_are_those_of_seed_prompt_and_sample():
    numbers = uniforms(3, "a", 1, 8)
    assert numbers.shape == (8,)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (uniforms(3, "a", 1, 5) == numbers[:5]).all()
    for other in ((4, "a", 1), (3, "b", 1), (3, "a", 2), (31, "a", 1)):
        assert not (uniforms(*other, 8) == numbers).any()
    assert abs(uniforms(0, "x", 0, 100_000).mean() - 0.5) < 0.01


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
    sampled = sample(model, prompts, temperature=1e-4, samples=2, max_new_tokens=24)
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert len({len(text) for text, _ in expected}) > 2  # rows end at different steps
    for responses, (text, reason) in zip(sampled, expected, strict=True):
        assert responses == [{"text": text, "finish_reason": reason}] * 2


def test_a_prompts_own_temperature_counts(model):
    sampler = HuggingFaceSampler(
        str(model), Sampling(**{**SETTINGS, "samples": 1}), dtype="float32", device="cpu"
    )
    asked = records()
    asked[1]["temperature"] = 0
    groups, _ = sampler(asked)
    assert [groups[0], groups[2]] == [group[:1] for group in sample(model)[::2]]
    text, reason = greedy(model, PROMPTS[1], SETTINGS["max_new_tokens"])
    assert groups[1] == [{"text": text, "finish_reason": reason}]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another?"},
]


def test_a_prompt_may_be_a_conversation(model):
    assert sample(model, [[{"role": "user", "content": prompt}] for prompt in PROMPTS]) == sample(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TURNS)
    ids = encode(tokenizer, {"id": "a", "prompt": TURNS})
    assert ids == tokenizer(said + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    last_turn_alone = sample(model, [TURNS[-1:]])
    assert sample(model, [TURNS]) != last_turn_alone


def test_a_conversation_that_the_template_refuses_is_named():
    with pytest.raises(UserError, match=r"^record 'a': .* refuses messages of system, user, assistant, user"):
        encode(make_tokenizer(LLAMA2), {"id": "a", "prompt": TURNS})


def draws(rows: int) -> torch.Tensor:
    return torch.from_numpy(uniforms(0, "", 0, rows))


def drawn(logits: torch.Tensor, temperature: float, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    return draw_tokens(logits, torch.full((len(logits),), temperature), top_p, numbers)


def test_draw_tokens_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    shares = torch.bincount(drawn(logits, 1.0, 1.0, draws(20_000)), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    # Tokens that hold 0.7 of the probability: the first two (0.5 does not reach it), renormalised.
    shares = torch.bincount(drawn(logits, 1.0, 0.7, draws(20_000)), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02)
    # At temperature 1/2 probabilities are squared.
    shares = torch.bincount(drawn(logits, 0.5, 1.0, draws(20_000)), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.02)


def test_a_token_is_where_the_running_sum_passes_the_number():
    logits = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0]).log().expand(6, 6)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert drawn(logits, 1.0, 1.0, numbers).tolist() == [1, 1, 2, 2, 4, 4]


def test_top_p_that_needs_more_than_the_head_of_a_large_vocabulary():
    # Probabilities fall slowly, by a factor e over all 10000 tokens: 90% of them lie in the first 8414.
    slow = torch.linspace(0, -1, 10_000).expand(400, -1)
    alone = drawn(slow, 1.0, 0.9, draws(400))
    assert 2048 < alone.max() <= 8416
    # A row beside it that needs the head alone gets the same token as by itself.
    fast = torch.linspace(0, -1000, 10_000).expand(400, -1)
    both = drawn(torch.cat([fast, slow]), 1.0, 0.9, draws(400).repeat(2))
    assert torch.equal(both, torch.cat([drawn(fast, 1.0, 0.9, draws(400)), alone]))


def test_each_row_has_its_temperature():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(20_000, 3)
    temperatures = torch.tensor([0.0, 0.5]).repeat(10_000)
    for top_p in (1.0, 0.95):
        tokens = draw_tokens(logits, temperatures, top_p, draws(20_000))
        assert (tokens[::2] == 1).all()
        shares = torch.bincount(tokens[1::2], minlength=3) / 10_000
        assert torch.allclose(shares, torch.tensor([0.04, 0.25, 0.09]) / 0.38, atol=0.02)


def test_batches_hold_whole_prompts_of_like_length_longest_first():
    asked = [{"id": str(length), "prompt": "x" * length} for length in (3, 9, 1, 7, 5)]
    batches = prompt_batches(asked, samples=3, batch_size=8)
    assert [[record["id"] for record in batch] for batch in batches] == [["9", "7"], ["5", "3"], ["1"]]
    with pytest.raises(ValueError, match=r"batch_size=2 .* 3 samples"):
        prompt_batches(asked, samples=3, batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be a number from 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_settings_that_cannot_sample_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{**SETTINGS, **changes})


def test_an_unknown_dtype_is_refused(model):
    with pytest.raises(ValueError, match="'int8' is unknown"):
        HuggingFaceSampler(str(model), Sampling(**SETTINGS), dtype="int8", device="cpu")


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    make_llama(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        sample(tmp_path)


def test_a_tokenizer_without_an_end_of_turn_is_refused(tmp_path):
    make_llama(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"names no end-of-turn token; add eos_token to its tokenizer_config\.json"
    ):
        sample(tmp_path)


def test_what_the_model_has_no_positions_for_is_refused(model):
    """It has 256; the longest answer may need the last of them."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 10
    (ids,) = [encode(chat_tokenizer(str(model)), record) for record in records([prompt])]
    sample(model, [prompt], samples=1, max_new_tokens=256 - len(ids))
    message = f"record 'p0': its prompt of {len(ids)} and the 256 of --max-new-tokens are {len(ids) + 256} tokens, and "
    with pytest.raises(UserError, match=f"{message}the model takes 256; lower that, or leave it out"):
        sample(model, [prompt], samples=1, max_new_tokens=256)
