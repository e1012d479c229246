"""Scores of a ranker that compares two responses at a time, as PairRM does (Jiang et al., 2023, arXiv:2306.02561).

The ranker reads prompt, response i and response j together and returns f(i, j): how much better i is, in logits. What
it says depends on the order, so that both are asked for: d(i, j) = (f(i, j) - f(j, i)) / 2. The scores of a group of n
are those whose differences come nearest to all d(i, j) in the least squares, with the sum 0:

    s_i = 1/n sum over j of d(i, j)

That takes n (n - 1) passes a group. It is one of `llm-blender/PairRM-hf`: DeBERTa-v2 with a head over the hidden states
of three marks, which transformers does not have; its parameters have the names of that folder.
"""

import itertools
import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel

from mpo_megatron.errors import UserError
from mpo_megatron.pretrained import load_config, load_model, load_tokenizer
from mpo_megatron.rollout.devices import dtype_of
from mpo_megatron.rollout.records import Record, prompt_text
from mpo_megatron.rollout.reward_models import batches_by_length, padded
from mpo_megatron.rollout.work import Failure

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"


class DebertaV2PairRM(DebertaV2PreTrainedModel):
    """`config` is a DeBERTa-v2's, with n_tasks, drop_out and the ids of the three marks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """The `logits` [B] by which the first candidate of sequences [B, T] is better.

        Each holds each mark exactly once. The mean over tasks of head(source, first) - head(source, second).
        """
        hidden = self.pretrained_model(input_ids, attention_mask=attention_mask).last_hidden_state

        def at(mark: int) -> Tensor:
            return hidden[(input_ids == mark).nonzero(as_tuple=True)]

        source = at(self.config.source_prefix_id)
        first, second = (
            self.head_layer(torch.cat([source, at(mark)], dim=-1))
            for mark in (self.config.cand1_prefix_id, self.config.cand2_prefix_id)
        )
        return SimpleNamespace(logits=(first - second).mean(-1))


class PairRanker:
    """A `DebertaV2PairRM` whose comparisons become scores."""

    def __init__(
        self, folder: str, *, dtype: str, device: str, batch_tokens: int, max_length: int | None = None
    ) -> None:
        """Reads model and tokenizer.

        Args:
            batch_tokens: tokens of a batch at most, padding included.
            max_length: longest sequence of prompt and two responses; None: PairRM's own 2048.

        Raises UserError for an unknown dtype and a folder of another kind.
        """
        config = load_config(folder)
        missing = [name for name in ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "n_tasks", "drop_out")
                   if not hasattr(config, name)]  # fmt: skip
        if config.model_type != "deberta-v2" or missing:
            raise UserError(
                f"{folder} is no PairRM (DeBERTa-v2 with {missing[0] if missing else 'its marks'} in config.json); "
                "give a folder such as llm-blender/PairRM-hf's"
            )
        self._tokenizer = load_tokenizer(folder)
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        self._tokens_in_text = re.compile("|".join(map(re.escape, {SOURCE, FIRST, SECOND, *added})))
        self._model = load_model(DebertaV2PairRM, folder, dtype=dtype_of(dtype), device=device)
        self._device = device
        self._batch_tokens = batch_tokens
        self._max_length = max_length or 2048

    def __call__(self, groups: list[Record]) -> tuple[list[list[float] | Failure], int]:
        """The scores of each group's responses, or why it has none, and the tokens read."""
        pairs: list[tuple[int, int, int]] = []
        sequences: list[list[int]] = []
        failures: dict[int, Failure] = {}
        for number, group in enumerate(groups):
            source, firsts, seconds = self._parts(group)
            longest = len(source) + sum(sorted(map(len, firsts))[-2:])
            if longest > self._max_length:
                failures[number] = Failure(
                    f"prompt and two responses have {longest} tokens, above the limit of {self._max_length}"
                )
                continue
            for i, j in itertools.permutations(range(len(firsts)), 2):
                pairs.append((number, i, j))
                sequences.append(source + firsts[i] + seconds[j])
        lengths = [len(sequence) for sequence in sequences]
        sums = [torch.zeros(len(group["responses"]), dtype=torch.float64) for group in groups]
        for chosen in batches_by_length(range(len(sequences)), lengths, self._batch_tokens):
            for where, logit in zip(chosen, self._compare([sequences[c] for c in chosen]), strict=True):
                number, i, j = pairs[where]
                sums[number][i] += logit / 2
                sums[number][j] -= logit / 2
        values: list[list[float] | Failure] = [
            failures.get(number) or (total / len(total)).tolist() for number, total in enumerate(sums)
        ]
        return values, sum(lengths)

    def _parts(self, group: Record) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Ids of the prompt, of the responses in the first place, and of those in the second."""
        texts = [response["text"] for response in group["responses"]]
        source = self._marked(SOURCE, prompt_text(group))
        firsts, seconds = ([self._marked(mark, text) for text in texts] for mark in (FIRST, SECOND))
        return source, firsts, seconds

    def _marked(self, mark: str, text: str) -> list[int]:
        """Ids of a part. A second mark, or a separator in the text, would be read in place of the part's own."""
        return list(self._tokenizer(mark + self._tokens_in_text.sub(" ", text))["input_ids"])

    def _compare(self, sequences: list[list[int]]) -> list[float]:
        encoded = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
        batch = padded(encoded, self._tokenizer.pad_token_id or 0, self._device)
        with torch.inference_mode():
            return self._model(**batch).logits.double().tolist()
