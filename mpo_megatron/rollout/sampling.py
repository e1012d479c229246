"""Sampling several responses to each prompt with a Hugging Face chat model.

Shapes: `P` prompts of a batch, `S` = P x samples rows, `T` tokens of the longest prompt, `N` tokens of a response at
most, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mpo_megatron.data.chat import render
from mpo_megatron.errors import UserError
from mpo_megatron.pretrained import load_model, load_tokenizer, positions_of
from mpo_megatron.rollout.devices import dtype_of
from mpo_megatron.rollout.generation import Sampling, temperature_of, uniforms
from mpo_megatron.rollout.records import Record, turns


class HuggingFaceSampler:
    """A model in transformers: each prompt is read once, and its samples share what was computed of it.

    Sample k of a prompt is drawn with random numbers of its own, made of the seed, the prompt's id and k. It does not
    depend on the other prompts of a batch, on their order, or on the processes, but for the rounding of sums: a product
    of another shape may add up in another order, which moves logits by some 1e-6 in float32 (1e-2 in bfloat16), and now
    and then a token with them.
    """

    def __init__(self, model_path: str, sampling: Sampling, *, dtype: str, device: str) -> None:
        """Reads model and tokenizer.

        Raises UserError for an unknown dtype, and for a tokenizer that has no chat template or no end-of-turn token.
        """
        self._sampling = sampling
        self._device = device
        self._tokenizer = chat_tokenizer(model_path)
        self._model = load_model(AutoModelForCausalLM, model_path, dtype=dtype_of(dtype), device=device)
        self._stop_ids = stop_ids(self._model.generation_config.eos_token_id, self._tokenizer)

    def __call__(self, records: list[Record]) -> tuple[list[list[dict[str, str]]], int]:
        """Samples responses to each record's "prompt", in the model's chat template.

        Raises UserError for a prompt that the template refuses, or that leaves no positions for the longest answer.

        Returns lists of {"text", "finish_reason"} in the order of `records`, and the number of tokens sampled. The
        finish reason is "stop" if the model ended its turn, "length" if `max_new_tokens` cut it off; the text is what
        the tokenizer decodes without special tokens, not stripped.
        """
        samples, length = self._sampling.samples, self._sampling.max_new_tokens
        inputs = prompts_of(self._tokenizer, self._model.config, records, length)
        batch = self._tokenizer.pad({"input_ids": inputs}, return_tensors="pt").to(self._device)
        draws = [
            uniforms(self._sampling.seed, record["id"], sample, length)
            for record in records
            for sample in range(samples)
        ]
        temperatures = [temperature_of(record, self._sampling) for record in records for _ in range(samples)]
        with torch.inference_mode():
            rows = sample_rows(
                self._model,
                batch["input_ids"],
                batch["attention_mask"],
                torch.from_numpy(np.stack(draws)).to(self._device),
                torch.tensor(temperatures, device=self._device),
                sampling=self._sampling,
                stop_ids=torch.tensor(self._stop_ids, device=self._device),
            )
        responses = [response(self._tokenizer, ids, self._stop_ids) for ids in rows]
        groups = [responses[first : first + samples] for first in range(0, len(responses), samples)]
        return groups, sum(map(len, rows))


def sample_rows(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    draws: Tensor,
    temperatures: Tensor,
    *,
    sampling: Sampling,
    stop_ids: Tensor,
) -> list[list[int]]:
    """Token ids of the S rows in order, each through its end token if it came to one.

    `input_ids` and `attention_mask` are [P, T], padded on the left, `draws` [S, N] in [0, 1), `temperatures` [S].
    transformers' generate would run each prompt `samples` times and keep finished rows until the last one ends, which
    costs more than twice the time on a CPU.
    """
    samples = sampling.samples
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
    for step in range(sampling.max_new_tokens):
        tokens = draw_tokens(logits, temperatures[rows], sampling.top_p, draws[rows, step])
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


def draw_tokens(logits: Tensor, temperatures: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """One token id for each row of `logits` [S, V], from the likeliest tokens that hold `top_p` of the probability.

    It is the token at which the running sum of probabilities passes the row's number in `draws` [S], float64 in [0, 1);
    in rows whose number in `temperatures` [S] is 0, the likeliest.
    """
    greedy = temperatures == 0
    tokens = _drawn(logits.float() / temperatures.masked_fill(greedy, 1)[:, None], top_p, draws)
    return torch.where(greedy, logits.argmax(-1), tokens) if greedy.any() else tokens


def _drawn(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        # The head of the distribution is enough nearly always, and far cheaper to sort than the whole vocabulary.
        head = min(2048, probabilities.shape[-1])
        ordered, ids = probabilities.topk(head, dim=-1)
        if head < probabilities.shape[-1]:
            # Row by row, so that no row depends on another.
            short = (ordered.sum(-1) < top_p).nonzero().squeeze(1)
            if len(short):
                tokens = torch.empty_like(ids[:, 0])
                whole, their_ids = probabilities[short].sort(dim=-1, descending=True)
                tokens[short] = _draw_head(whole, their_ids, top_p, draws[short])
                enough = (ordered.sum(-1) >= top_p).nonzero().squeeze(1)
                tokens[enough] = _draw_head(ordered[enough], ids[enough], top_p, draws[enough])
                return tokens
        return _draw_head(ordered, ids, top_p, draws)
    return _inverse(probabilities, draws)


def _draw_head(ordered: Tensor, ids: Tensor, top_p: float, draws: Tensor) -> Tensor:
    before = ordered.cumsum(-1) - ordered
    picked = _inverse(ordered * (before < top_p), draws)
    return ids.gather(1, picked[:, None]).squeeze(1)


def _inverse(weights: Tensor, draws: Tensor) -> Tensor:
    """[S] where the running sum of a row of `weights` [S, V] first exceeds its number in `draws` x the row's sum."""
    sums = weights.double().cumsum(-1)
    total = sums[:, -1]
    # A product that rounds to the whole sum would be exceeded nowhere.
    targets = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, targets[:, None], right=True).squeeze(1)


def chat_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding on the left.

    Raises UserError if it has no chat template, or does not name the token that ends a turn.
    """
    tokenizer = load_tokenizer(model_path, padding_side="left")
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {model_path} has no chat template; use an instruct model's folder")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {model_path} names no end-of-turn token; add eos_token to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, config: Any, records: Sequence[Record], max_new_tokens: int
) -> list[list[int]]:
    """`encode` of each record.

    Raises UserError as that does, and for a prompt that leaves no positions for the longest answer.
    """
    found = [encode(tokenizer, record) for record in records]
    for record, ids in zip(records, found, strict=True):
        asked = (
            f"record {record['id']!r}: its prompt of {len(ids)} and the {max_new_tokens} of --max-new-tokens"
        )
        check_length(config, len(ids) + max_new_tokens, asked, "lower that")
    return found


def check_length(config: Any, tokens: int, asked: str, mend: str) -> None:
    """Raises UserError for a sequence beyond a model's positions, where what it computes means nothing."""
    positions = positions_of(config)
    if positions is not None and tokens > positions:
        raise UserError(
            f"{asked} are {tokens} tokens, and the model takes {positions}; {mend}, or leave it out"
        )


def stop_ids(from_model: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-turn tokens: what the generation config names and the tokenizer's own."""
    named = from_model if isinstance(from_model, list) else [from_model]
    return sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[int]:
    """The ids of a record's prompt and of the beginning of its answer; raises UserError if the template refuses it."""
    text = render(tokenizer, turns(record), f"record {record['id']!r}")
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template holds the special tokens


def response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> dict[str, Any]:
    """{"text", "finish_reason"} of sampled ids, which end with one of `ends` or were cut."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"text": text, "finish_reason": "stop" if ids[-1] in ends else "length"}
