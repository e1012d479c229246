"""Sampling n responses to each prompt in one batch against one sequence at a time, on the same model.

Both go through the sampler of tools/generate.py, with the key-value cache; beside them is transformers' own `generate`,
one sequence at a time. No sequence ends early, so that each side has the same lengths.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mpo_megatron.benchmarks.measure import CPU, add_accelerator, clock, compare, measured_on
from mpo_megatron.benchmarks.models import small_config
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.errors import UserError
from mpo_megatron.rollout.generation import Sampling, uniforms
from mpo_megatron.rollout.sampling import sample_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    add_accelerator(parser)
    parser.add_argument("--model", help="Hugging Face folder; left out: a random Llama of 85M parameters")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt (8)")
    parser.add_argument("--prompts", type=int, help="in the batch (8, or 4 with --quick)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (64)")
    parser.add_argument("--response", type=int, help="tokens of a response (64, or 16 with --quick)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)


def run(arguments: argparse.Namespace) -> Report:
    """Sample all sides in turns."""
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    count = arguments.prompts or (4 if quick else 8)
    length = arguments.response or (16 if quick else 64)
    gpu = torch.cuda.is_available() if arguments.accelerator == "auto" else arguments.accelerator == "gpu"
    device = torch.device("cuda") if gpu else CPU
    model = _model(arguments.model, quick, arguments.prompt + length).to(device).eval()
    random = np.random.default_rng(0)
    prompts = torch.from_numpy(random.integers(0, model.config.vocab_size, (count, arguments.prompt)))
    prompts = prompts.to(device)

    def sampled(rows: Tensor, samples: int) -> None:
        sampling = Sampling(samples, arguments.temperature, arguments.top_p, length, 0)
        draws = np.stack([uniforms(0, str(row), 0, length) for row in range(len(rows) * samples)])
        with torch.inference_mode():
            found = sample_rows(
                model,
                rows,
                torch.ones_like(rows),
                torch.from_numpy(draws).to(device),
                torch.full((len(draws),), sampling.temperature, device=device),
                sampling=sampling,
                stop_ids=torch.tensor([], dtype=torch.long, device=device),
            )
        assert [len(row) for row in found] == [length] * len(rows) * samples

    def one_at_a_time() -> None:
        # One sequence of each prompt is enough: n of them take n times as long.
        for prompt in prompts:
            sampled(prompt[None], 1)

    def by_transformers() -> None:
        for prompt in prompts:
            _generate(model, prompt[None], length, arguments.temperature, arguments.top_p)

    sides: dict[str, Callable[[], object]] = {
        "batched": lambda: sampled(prompts, arguments.samples),
        "one at a time": one_at_a_time,
        "transformers": by_transformers,
    }
    seconds = compare(sides, repeats=min(arguments.repeats, 2) if quick else arguments.repeats, device=device)
    tokens = {"batched": count * arguments.samples * length}
    rates = {
        name: tokens.get(name, count * length) / statistics.median(times) for name, times in seconds.items()
    }
    gains = {name: rates["batched"] / rates[name] for name in ("one at a time", "transformers")}
    return Report(
        benchmark="generate",
        columns=["", f"tokens / {clock(device)}", "gain of batched"],
        rows=[
            [
                f"{count} prompts x {arguments.samples} samples in a batch",
                f"{rates['batched']:.1f}",
                "",
            ],
            ["one sequence at a time", f"{rates['one at a time']:.1f}", f"{gains['one at a time']:.1f} x"],
            ["transformers' generate, one at a time", f"{rates['transformers']:.1f}", f"{gains['transformers']:.1f} x"],
        ],
        figures={
            "tokens_per_second": rates["batched"],
            "tokens_per_second_one": rates["one at a time"],
            "tokens_per_second_transformers": rates["transformers"],
            "gain": gains["one at a time"],
            "gain_transformers": gains["transformers"],
        },
        settings={
            "model": arguments.model or "random",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "prompts": count,
            "samples": arguments.samples,
            "prompt": arguments.prompt,
            "response": length,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "threads": arguments.threads,
            "device": measured_on(device),
            "dtype": "float32",
        },
        notes=["medians; no sequence ends early"],
    )  # fmt: skip


def _model(folder: str | None, quick: bool, positions: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if folder is None:
        sizes = (
            {"hidden": 256, "layers": 4, "vocab": 8192}
            if quick
            else {"hidden": 512, "layers": 12, "vocab": 49152}
        )
        return AutoModelForCausalLM.from_config(small_config(**sizes, max_positions=positions))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.max_position_embeddings < positions:
        raise UserError(
            f"--prompt and --response need {positions} positions and {folder} has {config.max_position_embeddings}"
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def _generate(model: PreTrainedModel, prompt: Tensor, length: int, temperature: float, top_p: float) -> None:
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=length,
        min_new_tokens=length, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    assert found.shape[1] == prompt.shape[1] + length
