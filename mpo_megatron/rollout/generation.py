"""What is asked of a sampler, the random numbers of each sample, and the batches that prompts are sampled in."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpo_megatron.errors import UserError
from mpo_megatron.finite import is_finite
from mpo_megatron.rollout.records import Record, prompt_text
from mpo_megatron.rollout.work import Worker


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; raises UserError for values that cannot sample."""

    samples: int  # of each prompt
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"samples={self.samples} and max_new_tokens={self.max_new_tokens} must be at least 1; raise them"
            )
        if not is_finite(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be a number from 0; try 1.0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1; 1.0 samples from all tokens")


def temperature_of(record: Record, sampling: Sampling) -> float:
    """The record's own "temperature", or that of the run; at 0 the likeliest token is taken.

    Raises UserError for 0 and several samples.
    """
    temperature: float = record.get("temperature", sampling.temperature)
    if temperature == 0 and sampling.samples > 1:
        raise UserError(
            f"record {record['id']!r} has temperature 0, at which its {sampling.samples} samples would be the same; "
            "take 1 sample, or a higher temperature"
        )
    return temperature


def uniforms(seed: int, prompt_id: str, sample: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1) for the tokens of a sample; the same first numbers for any `count`."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).random(count)


def prompt_batches(records: Sequence[Record], samples: int, batch_size: int) -> list[list[Record]]:
    """The prompts in batches of at most `batch_size` sequences (prompts x samples), those of like length together.

    The longest first: a batch that does not fit in memory fails at once, not at the end.
    Raises UserError if a batch does not hold a prompt's samples.
    """
    if batch_size < samples:
        raise UserError(
            f"batch_size={batch_size} counts sequences and must hold a prompt's {samples} samples; raise it"
        )
    ordered = sorted(records, key=lambda record: -len(prompt_text(record)))
    size = batch_size // samples
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def start_sampler(
    model_path: str, sampling: Sampling, dtype: str, device: str | None, processes: int, number: int
) -> Worker:
    """The sampler of process `number` in transformers; see `devices.place`."""
    # Imported here so that the tool answers --help and wrong paths at once.
    from mpo_megatron.rollout.devices import place
    from mpo_megatron.rollout.sampling import HuggingFaceSampler

    return HuggingFaceSampler(model_path, sampling, dtype=dtype, device=place(device, processes, number))


def start_vllm(model_path: str, sampling: Sampling, dtype: str, gpus: int, number: int) -> Worker:
    """The sampler of process `number` in vLLM, on `gpus` GPUs of its own."""
    from mpo_megatron.rollout.vllm_sampling import VllmSampler

    return VllmSampler(model_path, sampling, dtype=dtype, gpus=gpus, number=number)
