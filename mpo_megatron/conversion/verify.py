"""Is a Megatron checkpoint the model of a Hugging Face folder? Both say how probable each token of some text is.

Megatron's side is the model that trains, on the path that trains: packed row, shared-prompt attention, response head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.conversion.hf_folder import is_checkpoint, model_folder
from mpo_megatron.conversion.load import load_hf_weights
from mpo_megatron.conversion.restore import load_megatron_weights
from mpo_megatron.data import TokenizedGroup
from mpo_megatron.errors import ConfigError
from mpo_megatron.model.architecture import read_architecture
from mpo_megatron.model.provider import ModelOptions, build_model, unwrap
from mpo_megatron.pretrained import load_model, load_tokenizer
from mpo_megatron.ragged.segments import Segments
from mpo_megatron.ragged.transfer import to_device
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.pack import PackedRow, pack_row

# Plain prose, code, numbers, and a script that byte-level tokenizers cut into many tokens.
TEXTS = (
    "A group is one prompt with several scored responses. The loss contrasts the preferred ones with the others, and "
    "its gradient must be the same however the model is cut over the ranks.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "In 1969, 384,400 km from Earth, the crew spent 21 h 36 min on the surface; 3.14159 * 2**10 = 3216.99.",
    "Мы проверяем, что обе модели дают один и тот же ответ. 我们检查两个模型是否给出相同的答案。",
)


@dataclass(frozen=True)
class Comparison:
    """How far two models' log-probabilities of the same tokens lie apart, in nats.

    Attributes:
        theirs: [tokens] float64, of the Hugging Face model.
        ours: [tokens] float64, of the Megatron model.
    """

    theirs: Tensor
    ours: Tensor

    @property
    def tokens(self) -> int:
        return self.theirs.numel()

    @property
    def largest(self) -> float:
        return float((self.theirs - self.ours).abs().max())

    @property
    def mean(self) -> float:
        return float((self.theirs - self.ours).abs().mean())


def compare(
    hf: str | Path,
    checkpoint: str | Path,
    texts: Sequence[str],
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = 1024,
) -> Comparison:
    """Compare the models on each text, from its second token on. One is in memory at a time.

    Args:
        hf: Hugging Face folder.
        checkpoint: Megatron checkpoint (or another Hugging Face folder).
        texts: tokenised with the Hugging Face folder's tokenizer.
        layout: of one rank.
        dtype: that both compute in.
        max_tokens: a longer text is cut.

    Raises:
        UserError: a folder is not as it must be, or no text has two tokens.
    """
    for folder in (hf, checkpoint):
        read_architecture(model_folder(folder))
    tokenizer = load_tokenizer(hf)
    ids = [np.asarray(tokenizer(text)["input_ids"][:max_tokens]) for text in texts]
    ids = [tokens for tokens in ids if len(tokens) > 1]
    if not ids:
        raise ConfigError("there is nothing to compare: no text has two tokens")
    ours = _megatron(checkpoint, ids, layout, dtype)
    return Comparison(_transformers(hf, ids, layout.device, dtype), ours)


def _transformers(
    hf: str | Path, ids: Sequence[np.ndarray], device: torch.device, dtype: torch.dtype
) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = load_model(AutoModelForCausalLM, hf, dtype=dtype, device=device)
    found = []
    with torch.no_grad():
        for tokens in ids:
            sequence = torch.as_tensor(tokens, device=device)[None]
            logps = model(sequence).logits[0, :-1].double().log_softmax(-1)
            found.append(logps.gather(1, sequence[0, 1:, None]).squeeze(1).cpu())
    return torch.cat(found)


def _megatron(
    folder: str | Path, ids: Sequence[np.ndarray], layout: ParallelLayout, dtype: torch.dtype
) -> Tensor:
    architecture = read_architecture(model_folder(folder))
    (chunk,) = build_model(architecture, layout, ModelOptions(dtype=dtype))
    model = unwrap(chunk)
    if is_checkpoint(folder):
        load_megatron_weights([model], layout, folder)
    else:
        load_hf_weights([model], architecture, layout, folder)
    model.eval()
    with torch.no_grad():
        return torch.cat(
            [chunk(_each_token(tokens, layout.device)).flatten().double().cpu() for tokens in ids]
        )


def _each_token(tokens: np.ndarray, device: torch.device) -> PackedRow:
    """A row that holds one text, in which every token after the first counts as a response of its own to the head."""
    group = TokenizedGroup("text", tokens[:1], [tokens[1:]], np.zeros(1), np.ones(1, dtype=bool))
    length = -(-len(tokens) // 8) * 8
    row = pack_row([group], [[0]], row_tokens=length, shared_prompt=True, device=device)
    each = np.arange(len(tokens) - 1)
    return replace(row, by_response=to_device(Segments.of(each, len(each)), device))
