"""Sampling several responses to each prompt with a Hugging Face chat model.

Shapes: `P` prompts of a batch, `S` = P x samples rows, `T` tokens of the longest prompt, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mpo_megatron.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def sample_responses(
    model_path: str,
    prompts: Sequence[str],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str,
) -> list[list[dict[str, str]]]:
    """Samples `samples` responses to each prompt, as one user turn in the model's chat template.

    Returns, in the order of `prompts`, lists of {"text", "finish_reason"}: "stop" if the model ended its turn, "length"
    if `max_new_tokens` cut it off. The text is what the tokenizer decodes without special tokens, not stripped.
    `batch_size` counts sequences, prompts x samples; batches hold prompts of like length, so that little is padded.
    The same arguments give the same responses on the same machine; another batch size gives others.

    Raises UserError for settings that cannot sample, and for a tokenizer that has no chat template.
    """
    _check_settings(samples, temperature, top_p, max_new_tokens, batch_size, dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left", trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {model_path} has no chat template; use an instruct model's folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPES[dtype], trust_remote_code=False)
    model = model.to(device).eval()
    stop_ids = _stop_ids(model.generation_config.eos_token_id, tokenizer)

    inputs = [_encode(tokenizer, prompt) for prompt in prompts]
    # The longest first: a batch that does not fit in memory fails at once, not at the end.
    order = sorted(range(len(prompts)), key=lambda index: -len(inputs[index]))
    prompts_per_batch = batch_size // samples
    responses: list[list[dict[str, str]]] = [[] for _ in prompts]
    with torch.random.fork_rng(), torch.inference_mode(), tqdm(total=len(prompts), unit="prompt") as progress:
        torch.manual_seed(seed)
        for start in range(0, len(order), prompts_per_batch):
            chosen = order[start : start + prompts_per_batch]
            batch = tokenizer.pad({"input_ids": [inputs[index] for index in chosen]}, return_tensors="pt").to(
                device
            )
            token_rows = _sample_batch(
                model,
                batch["input_ids"],
                batch["attention_mask"],
                samples=samples,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                stop_ids=torch.tensor(stop_ids, device=device),
            )
            for row, ids in enumerate(token_rows):
                responses[chosen[row // samples]].append(_response(tokenizer, ids, stop_ids))
            progress.update(len(chosen))
    return responses


def _sample_batch(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop_ids: torch.Tensor,
) -> list[list[int]]:
    """Token ids of the S rows in order, each through its end token if it came to one.

    `input_ids` and `attention_mask` are [P, T], padded on the left. transformers' generate would run each prompt
    `samples` times and keep finished rows until the last one ends, which costs more than twice the time on a CPU.
    """
    first_positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=first_positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    logits = output.logits[:, -1].repeat_interleave(samples, dim=0)  # [S, V]
    mask = attention_mask.repeat_interleave(samples, dim=0)  # [S, T + new]
    positions = attention_mask.sum(1).repeat_interleave(samples)  # [S]
    # The row of the answer that each cache row makes.
    rows = torch.arange(len(positions), device=positions.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    sampled: list[list[int]] = [[] for _ in rows]
    for _ in range(max_new_tokens):
        tokens = draw_tokens(logits, temperature, top_p)
        for row, token in zip(rows[running].tolist(), tokens[running].tolist(), strict=True):
            sampled[row].append(token)
        running &= ~torch.isin(tokens, stop_ids)
        if not running.any():
            break
        # Dropping rows copies the cache, so only once an eighth of them is done.
        if running.sum() <= 0.875 * len(running):
            kept = running.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            tokens, mask, positions, rows, running = (
                x[kept] for x in (tokens, mask, positions, rows, running)
            )
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1
    return sampled


def draw_tokens(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token id for each row of `logits` [S, V], from the likeliest tokens that hold `top_p` of the probability."""
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        # The head of the distribution is enough nearly always, and far cheaper to sort than the whole vocabulary.
        head = min(2048, probabilities.shape[-1])
        ordered, ids = probabilities.topk(head, dim=-1)
        if head < probabilities.shape[-1] and (ordered.sum(-1) < top_p).any():
            ordered, ids = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        picked = torch.multinomial(ordered * (before < top_p), 1)
        return ids.gather(1, picked).squeeze(1)
    return torch.multinomial(probabilities, 1).squeeze(1)


def _check_settings(
    samples: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int, dtype: str
) -> None:
    if samples < 1 or max_new_tokens < 1:
        raise UserError(
            f"samples={samples} and max_new_tokens={max_new_tokens} must be at least 1; raise them"
        )
    if temperature <= 0:
        raise UserError(f"temperature={temperature} must be above 0: samples would all be the same; try 1.0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1; 1.0 samples from all tokens")
    if batch_size < samples:
        raise UserError(
            f"batch_size={batch_size} counts sequences and must hold a prompt's {samples} samples; raise it"
        )
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def _stop_ids(from_model: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-turn tokens: what the generation config names and the tokenizer's own."""
    named = from_model if isinstance(from_model, list) else [from_model]
    stop_ids = sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})
    if not stop_ids:
        raise UserError(
            "neither the generation config nor the tokenizer names an end-of-turn token; add eos_token"
        )
    return stop_ids


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template holds the special tokens


def _response(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: list[int]) -> dict[str, str]:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"text": text, "finish_reason": "stop" if ids[-1] in stop_ids else "length"}
