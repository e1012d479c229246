"""Sampling with vLLM's offline engine, on GPUs.

vLLM batches as memory allows, and finds the prompt of a request's samples in its prefix cache. Sample k of a prompt has
the seed that the prompt's id and the run's seed make, plus k (as vLLM seeds the samples of a request), and thus depends
on no other, but for rounding, as in `sampling`.
"""

import hashlib
import os
from typing import Any

from mpo_megatron.errors import UserError
from mpo_megatron.pretrained import load_config
from mpo_megatron.rollout.generation import Sampling, temperature_of
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.sampling import chat_tokenizer, prompts_of, response, stop_ids


class VllmSampler:
    """As `sampling.HuggingFaceSampler`, on `gpus` GPUs: those of process `number`."""

    def __init__(self, model_path: str, sampling: Sampling, *, dtype: str, gpus: int, number: int) -> None:
        """Starts the engine.

        Raises UserError where vLLM or the GPUs are missing, and for a tokenizer that has no chat template.
        """
        _see_only(gpus, number)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"--backend vllm: vLLM does not load ({error}); install it with pip install 'mpo-megatron[vllm]' on a "
                "machine with GPUs, or take --backend hf"
            ) from error
        from transformers import GenerationConfig

        self._sampling = sampling
        self._params = SamplingParams
        self._config = load_config(model_path)
        self._tokenizer = chat_tokenizer(model_path)
        try:
            named = GenerationConfig.from_pretrained(model_path).eos_token_id
        except OSError:
            named = None
        self._stop_ids = stop_ids(named, self._tokenizer)
        self._engine = LLM(
            model=model_path,
            dtype=dtype,
            seed=sampling.seed,
            tensor_parallel_size=gpus,
            enable_prefix_caching=True,
            trust_remote_code=False,
        )

    def __call__(self, records: list[Record]) -> tuple[list[list[dict[str, str]]], int]:
        """Samples responses to each record's "prompt"; see `sampling.HuggingFaceSampler`."""
        prompts = prompts_of(self._tokenizer, self._config, records, self._sampling.max_new_tokens)
        outputs = self._engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [self._parameters(record) for record in records],
            use_tqdm=False,
        )
        rows = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
        groups = [[response(self._tokenizer, ids, self._stop_ids) for ids in group] for group in rows]
        return groups, sum(len(ids) for group in rows for ids in group)

    def _parameters(self, record: Record) -> Any:
        return self._params(
            n=self._sampling.samples,
            temperature=temperature_of(record, self._sampling),
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_new_tokens,
            seed=seed_of(self._sampling.seed, record["id"]),
            stop_token_ids=self._stop_ids,
            detokenize=False,
        )


def seed_of(seed: int, prompt_id: str) -> int:
    """The seed of a prompt's first sample, in [0, 2^62); those of its others follow it."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 2


def _see_only(gpus: int, number: int) -> None:
    """Hide other processes' GPUs. It must come before the first use of CUDA."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if not names:
        raise UserError("--backend vllm needs a GPU, and torch finds none here; take --backend hf")
    mine = names[number * gpus : (number + 1) * gpus]
    if len(mine) < gpus:
        raise UserError(
            f"--backend vllm: process {number + 1} needs {gpus} GPUs and {len(mine)} of {len(names)} are left for it; "
            "give fewer --processes or --gpus-per-process, or take --backend hf"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
