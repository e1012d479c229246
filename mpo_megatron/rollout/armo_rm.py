"""ArmoRM: many objectives, and a gate that weights them by the prompt (Wang et al., 2024, arXiv:2406.12845).

Its Hugging Face folder (RLHFlow/ArmoRM-Llama3-8B-v0.1) defines the model in Python of its own, which does not load in
transformers 5. This is the same model with the same parameter names:

    r = R h(last token)                     [B, M] one reward for each of M objectives
    g = s softmax(gate(h(prompt)) / t)      [B, M], h(prompt) at the token that ends the user's turn
    score = sum over objectives of g * (r A), with A the matrix that takes the objectives' verbosity out
"""

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, LlamaPreTrainedModel

from mpo_megatron.errors import UserError

# The end of the user's turn and the head of the answer, by whose first token the gate reads the prompt.
HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class ArmoRM(LlamaPreTrainedModel):
    """`config` is a Llama's, with num_objectives (M), gating_temperature (t), gating_hidden_dim and gating_n_hidden."""

    ARCHITECTURE = "LlamaForRewardModelWithGating"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(objectives, objectives), requires_grad=False)
        self.gating = _Gate(config, objectives)
        self._header: list[int] = []
        self.post_init()

    def find_header(self, tokenizer: Any) -> None:
        """Learn the tokens of `HEADER`; raises UserError if the tokenizer does not know them."""
        self._header = tokenizer.encode(HEADER, add_special_tokens=False)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
        )
        if _last(tokenizer(text, add_special_tokens=False)["input_ids"], self._header) is None:
            raise UserError(
                f"the chat template does not write {HEADER!r}, where ArmoRM's gate reads the prompt"
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> SimpleNamespace:
        """The `logits` [B, 1] (the score), `rewards` and `gates` [B, M] of sequences [B, T] padded on the right."""
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        rewards = self.regression_layer(hidden[rows, attention_mask.sum(1) - 1])
        # `find_header` has seen the template write it.
        places = [_last(ids, self._header) or 0 for ids in input_ids.tolist()]
        gates = self.gating(hidden[rows, torch.tensor(places, device=input_ids.device)])
        score = (gates * (rewards @ self.reward_transform_matrix)).sum(1, keepdim=True)
        return SimpleNamespace(logits=score, rewards=rewards, gates=gates)


class _Gate(nn.Module):
    def __init__(self, config: Any, objectives: int) -> None:
        super().__init__()
        self.temperature = getattr(config, "gating_temperature", 10)
        width, depth = getattr(config, "gating_hidden_dim", 1024), getattr(config, "gating_n_hidden", 3)
        sizes = [config.hidden_size, *[width] * depth, objectives]
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return self.logit_scale * (self.layers[-1](hidden) / self.temperature).softmax(-1)


def _last(ids: list[int], pattern: list[int]) -> int | None:
    """Where `pattern` begins the last time."""
    for place in range(len(ids) - len(pattern), -1, -1):
        if ids[place : place + len(pattern)] == pattern:
            return place
    return None
