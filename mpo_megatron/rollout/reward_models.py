"""Scores of reward models in transformers: one forward pass over prompt and response each, batched by length.

Shapes: `B` sequences of a batch, `T` tokens of its longest, `K` outputs of the head.

Nothing that a model's folder holds is run. A folder that defines its output by Python of its own is refused, but for
ArmoRM, whose definition is in `armo_rm`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from mpo_megatron.data.chat import render
from mpo_megatron.errors import UserError
from mpo_megatron.pretrained import load_config, load_model, load_tokenizer, positions_of
from mpo_megatron.rollout.armo_rm import ArmoRM
from mpo_megatron.rollout.devices import dtype_of
from mpo_megatron.rollout.records import Record, prompt_text, turns
from mpo_megatron.rollout.work import Failure

Encoded = dict[str, list[int]]


class RewardModel:
    """Sequence classification with one output, which is the score, or with K outputs and a weight for each.

    The text is the chat template's of the prompt's turns and the assistant's, or, for a tokenizer without one, the pair
    of prompt and response.
    """

    def __init__(
        self,
        folder: str,
        *,
        dtype: str,
        device: str,
        batch_tokens: int,
        max_length: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Reads model and tokenizer.

        Args:
            batch_tokens: B x T of a batch at most, unless one sequence is longer.
            max_length: longest sequence in tokens; None: the model's positions.
            weights: the score's share of each of K outputs.

        Raises UserError for an unknown dtype, a folder whose output is defined by code in it, and weights that do not
        fit the head.
        """
        config = load_config(folder)
        self._tokenizer = load_tokenizer(folder)
        self._model = _load(folder, config, self._tokenizer, dtype=dtype_of(dtype), device=device)
        self._device = device
        self._batch_tokens = batch_tokens
        self._max_length = max_length or positions_of(config) or 1 << 30
        self._weights = _fitting(weights, 1 if isinstance(self._model, ArmoRM) else config.num_labels)

    def __call__(self, groups: list[Record]) -> tuple[list[list[float] | Failure], int]:
        """The scores of each group's responses, or why it has none, and the tokens read."""
        encoded = [
            self._encode(group, response["text"]) for group in groups for response in group["responses"]
        ]
        lengths = [len(sequence["input_ids"]) for sequence in encoded]
        fitting = [number for number, length in enumerate(lengths) if length <= self._max_length]
        scores: dict[int, float] = {}
        for chosen in batches_by_length(fitting, lengths, self._batch_tokens):
            found = self._scores([encoded[number] for number in chosen])
            scores.update(zip(chosen, found, strict=True))
        values: list[list[float] | Failure] = []
        first = 0
        for group in groups:
            numbers = range(first, first := first + len(group["responses"]))
            if too_long := [number for number in numbers if number not in scores]:
                values.append(
                    Failure(
                        f"prompt and response {too_long[0] - numbers[0] + 1} have {lengths[too_long[0]]} tokens, "
                        f"above the limit of {self._max_length}"
                    )
                )
            else:
                values.append([scores[number] for number in numbers])
        return values, sum(lengths[number] for number in fitting)

    def _encode(self, group: Record, response: str) -> Encoded:
        if self._tokenizer.chat_template is None:
            return dict(self._tokenizer(prompt_text(group), response))
        chat = [*turns(group), {"role": "assistant", "content": response}]
        text = render(self._tokenizer, chat, f"group {group['id']!r}")
        # The template holds the special tokens.
        return dict(self._tokenizer(text, add_special_tokens=False))

    def _scores(self, sequences: list[Encoded]) -> list[float]:
        padding = self._model.config.get_text_config().pad_token_id
        if padding is None:
            # A token that is in none: the models take for a sequence's end what stands before the padding.
            used = {token for sequence in sequences for token in sequence["input_ids"]}
            padding = next(token for token in range(len(used) + 1) if token not in used)
        batch = padded(sequences, padding, self._device)
        config = self._model.config.get_text_config()
        before, config.pad_token_id = config.pad_token_id, padding
        try:
            with torch.inference_mode():
                logits: Tensor = self._model(**batch).logits
        finally:
            config.pad_token_id = before
        return (logits.double() @ self._weights.to(logits.device)).tolist()


def batches_by_length(
    numbers: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """`numbers` in batches of like length, longest first, each of at most `batch_tokens` with its padding or of one."""
    ordered = sorted(numbers, key=lambda number: -lengths[number])
    while ordered:
        size = max(1, batch_tokens // max(1, lengths[ordered[0]]))
        yield ordered[:size]
        ordered = ordered[size:]


def padded(sequences: list[Encoded], padding: int, device: str) -> dict[str, Tensor]:
    """Tensors [B, T], padded on the right: ids with `padding`, everything else with 0."""
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    batch = {}
    for name in sequences[0]:
        fill = padding if name == "input_ids" else 0
        rows = [sequence[name] + [fill] * (longest - len(sequence[name])) for sequence in sequences]
        batch[name] = torch.tensor(rows, device=device)
    return batch


def _load(folder: str, config: Any, tokenizer: Any, *, dtype: torch.dtype, device: str) -> Any:
    architectures = getattr(config, "architectures", None) or [""]
    if architectures[0] == ArmoRM.ARCHITECTURE:
        model = load_model(ArmoRM, folder, dtype=dtype, device=device)
        model.find_header(tokenizer)
        return model
    if getattr(config, "auto_map", None) or not architectures[0].endswith("ForSequenceClassification"):
        raise UserError(
            f"{folder} holds {architectures[0] or 'a model of no known kind'}, whose output this tool does not know "
            "(code in a model's folder is never run); give a sequence-classification model, or call yours in a "
            "function of your own: --scorer function"
        )
    return load_model(AutoModelForSequenceClassification, folder, dtype=dtype, device=device)


def _fitting(weights: Sequence[float] | None, outputs: int) -> Tensor:
    """[K] float64, 1 for a single output."""
    if weights is None and outputs == 1:
        weights = [1.0]
    if weights is None:
        raise UserError(
            f"the model's head has {outputs} outputs; say how much of each the score is: --objective-weights "
            + ",".join(["1"] + ["0"] * (outputs - 1))
        )
    if len(weights) != outputs:
        raise UserError(
            f"--objective-weights has {len(weights)} numbers and the model's head {outputs} outputs; give one for each"
        )
    return torch.tensor(weights, dtype=torch.float64)
