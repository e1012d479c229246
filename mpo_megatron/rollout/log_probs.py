"""Log-probabilities of responses by a Hugging Face chat model, each prompt read once for all of its responses.

Shapes: `P` prompts of a batch, `S` responses, `T` tokens of the longest prompt, `N` tokens of the longest response, `V`
vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mpo_megatron.pretrained import load_model
from mpo_megatron.rollout.devices import dtype_of, place
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.sampling import chat_tokenizer, check_length, encode
from mpo_megatron.rollout.work import Worker

# Responses that go through the model together.
_ROWS = 16


def start_log_probs(folder: str, dtype: str, device: str | None, processes: int, number: int) -> Worker:
    """The worker of process `number`; see `devices.place`."""
    return LogProbs(folder, dtype=dtype, device=place(device, processes, number))


class LogProbs:
    """The log-probability of each response y to a prompt x, by teacher forcing.

        log pi(y|x) = sum over t of log softmax(logits(x, y_1 .. y_{t-1}))[y_t]

    The tokens of y are those of its text, and the end-of-turn token if the response ended by itself ("stop"). They are
    as a rule the sampled ones; a tokenizer may cut the same text otherwise. The sum is that of the model's own
    distribution, at temperature 1 and without top-p.
    """

    def __init__(self, folder: str, *, dtype: str, device: str) -> None:
        """Reads model and tokenizer.

        Raises UserError for an unknown dtype, and for a tokenizer without a chat template.
        """
        self._device = device
        self._tokenizer = chat_tokenizer(folder)
        self._model = load_model(AutoModelForCausalLM, folder, dtype=dtype_of(dtype), device=device)

    def __call__(self, groups: list[Record]) -> tuple[list[dict[str, Any]], int]:
        """{"log_probs": [...], "tokens": [...]} of each group's responses, and the number of tokens of all.

        Raises UserError for a group that the template refuses, or that is longer than the model's positions.
        """
        prompts = [encode(self._tokenizer, group) for group in groups]
        responses = [[response_ids(self._tokenizer, one) for one in group["responses"]] for group in groups]
        for group, prompt, answers in zip(groups, prompts, responses, strict=True):
            longest = len(prompt) + max(map(len, answers))
            asked = f"group {group['id']!r}: its prompt and the longest response"
            check_length(self._model.config, longest, asked, "shorten them")
        with torch.inference_mode():
            found = log_probs(self._model, self._tokenizer, prompts, responses, self._device)
        values = iter(found.tolist())
        made = [
            {"log_probs": [next(values) for _ in group], "tokens": [len(ids) for ids in group]}
            for group in responses
        ]
        return made, sum(sum(one["tokens"]) for one in made)


def response_ids(tokenizer: PreTrainedTokenizerBase, response: Record) -> list[int]:
    """The tokens of a response, with the end-of-turn token if it ended by itself."""
    ids = tokenizer(response["text"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if response["finish_reason"] == "stop" else ids


def log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    responses: list[list[list[int]]],
    device: str,
) -> Tensor:
    """[S] log-probabilities of all responses, in order, in the model's dtype or float32. One without a token has 0."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)  # on the left
    mask = batch["attention_mask"]
    read = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    rows = [(owner, ids) for owner, group in enumerate(responses) for ids in group]
    # Those of like length together: what is padded is computed, too.
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][1]))
    found: list[Tensor] = [torch.zeros(())] * len(rows)
    for first in range(0, len(order), _ROWS):
        chosen = order[first : first + _ROWS]
        values = _of_rows(model, read, mask, [rows[row] for row in chosen])
        for row, value in zip(chosen, values, strict=True):
            found[row] = value
    return torch.stack(found)


def _of_rows(model: PreTrainedModel, read: Any, mask: Tensor, rows: list[tuple[int, list[int]]]) -> Tensor:
    """[s] log-probabilities of some responses, each with the number of its prompt.

    Args:
        read: the model's output for the prompts, with `mask` [P, T].
    """
    device = mask.device
    owners = torch.tensor([owner for owner, _ in rows], device=device)
    lengths = torch.tensor([len(ids) for _, ids in rows], device=device)
    longest = max(1, int(lengths.max()))
    # Past the end of a response anything will do: it is not looked at.
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in rows], device=device)  # [s, N]
    logps = [_of_tokens(read.logits[owners, -1:], ids[:, :1])]
    if longest > 1:
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_select_indices(owners)
        output = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([mask[owners], mask.new_ones(len(rows), longest - 1)], dim=1),
            position_ids=mask.sum(1)[owners, None] + torch.arange(longest - 1, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        logps.append(_of_tokens(output.logits, ids[:, 1:]))
    inside = torch.arange(longest, device=device) < lengths[:, None]
    return torch.cat(logps, dim=1).masked_fill(~inside, 0.0).sum(1)


def _of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """[s, n] log-probabilities of `ids` [s, n] under `logits` [s, n, V]."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.gather(2, ids[..., None]).squeeze(2) - logits.logsumexp(2)
