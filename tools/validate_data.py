"""Say what the data of a run hold before any GPU is used: faults, lengths, scores, preferences and duplicates.

    python tools/validate_data.py model.data.train=groups.jsonl [model.restore_from_path=FOLDER] [key=value ...]
    python tools/validate_data.py --config conf/mpo_gpt.yaml [--picture PNG] [--report JSONL] [key=value ...]

Keys are those of the main job, and data are read, tokenised and selected as it would. Without a model lengths are in
characters. The exit status is 1 if a run would stop at these data. The last line printed is JSON with the figures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpo_megatron import objectives
from mpo_megatron.config import KEPT_FAULTS, Config, check_overrides, parse
from mpo_megatron.config.groups import compose_config
from mpo_megatron.conversion.hf_folder import model_folder
from mpo_megatron.data.faults import FAULTS, LONG_PROMPT
from mpo_megatron.data.schema import RecordError
from mpo_megatron.data.summary import QUANTILES, FaultCount, Summary, summarise
from mpo_megatron.data.tokenize import GroupTokenizer
from mpo_megatron.data.within import Estimate
from mpo_megatron.errors import UserError
from mpo_megatron.pretrained import load_tokenizer
from mpo_megatron.training.data import selection_of, tokenize_options, validation_selection

NO_MODEL = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 where a run would stop."""
    args = arguments(argv)
    figures: dict[str, Any] = {}
    try:
        config = read_config(args)
        data = config.model.data
        splits = {"train": data.train} | ({"validation": data.validation} if data.validation else {})
        tokenizer = read_tokenizer(config)
        unit = "characters" if tokenizer is None else "tokens"
        selection = selection_of(config, objectives.get(config.model.mpo.objective))
        selections = {"train": selection, "validation": validation_selection(config, selection)}
        summaries: dict[str, Summary] = {}
        with ExitStack() as stack:
            report = stack.enter_context(args.report.open("w", encoding="utf-8")) if args.report else None
            for name, path in splits.items():
                faults = Reported(frozenset(kept_faults(config)), report, name)
                summaries[name] = summarise(path, selections[name], tokenizer, faults)
                figures[name] = show(name, path, config, faults, summaries[name], unit)
                needed = (
                    summaries[name].preferred > 0 if selection.needs_preferred else summaries[name].sizes > 0
                )
                figures[name]["stops"] |= not needed.any()
            if "validation" in summaries:
                figures["validation"]["duplicates"] |= show_leak(summaries)
        if args.picture:
            draw(summaries, unit, args.picture)
            print(f"picture     {args.picture}")
        if args.report:
            print(f"report      {args.report}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return int(any(of["stops"] for of in figures.values()))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a YAML of the main job")
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw lengths, scores, their spacing and preferences"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSONL", help="write every fault with its place and reason"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the main job")
    return parser.parse_intermixed_args(argv)


def read_config(args: argparse.Namespace) -> Config:
    """The YAML with its overrides, or the defaults with them.

    Raises:
        ConfigError: as the main job has it.
    """
    overrides = list(args.overrides)
    if args.config is not None:
        return compose_config(args.config, overrides)
    check_overrides(overrides)
    raw = OmegaConf.from_dotlist(overrides)
    if OmegaConf.select(raw, "model.restore_from_path") is None:
        OmegaConf.update(raw, "model.restore_from_path", NO_MODEL)
    return parse(raw)


def read_tokenizer(config: Config) -> GroupTokenizer | None:
    """What the run would tokenise with; a prompt that is too long ends nothing here."""
    path = config.model.restore_from_path
    if path == NO_MODEL:
        return None
    options = tokenize_options(config)
    if options.truncation == "error":
        options = replace(options, truncation="skip")
    return GroupTokenizer(load_tokenizer(model_folder(path)), options)


def kept_faults(config: Config) -> list[str]:
    return [name for name in KEPT_FAULTS if policy_of(config, name) == "keep"]


def policy_of(config: Config, fault: str) -> str:
    data = config.model.data
    return data.truncation if fault == LONG_PROMPT else getattr(data.faults, fault)


class Reported(FaultCount):
    """Faults, each written as a line of JSON, too."""

    def __init__(self, kept: frozenset[str], report: TextIO | None, split: str) -> None:
        super().__init__(kept)
        self._report, self._split = report, split

    def __call__(self, error: RecordError) -> bool:
        if self._report is not None:
            line = {"split": self._split, "where": error.where, "fault": error.fault, "why": error.problem}
            self._report.write(json.dumps(line, ensure_ascii=False) + "\n")
        return super().__call__(error)


def show(
    split: str, path: str, config: Config, faults: FaultCount, summary: Summary, unit: str
) -> dict[str, Any]:
    """Print one data source. Returns its figures for the line of JSON."""
    console = Console(file=sys.stdout, highlight=False)
    groups, without = len(summary.sizes), int((summary.preferred == 0).sum())
    stops = any(faults.counts[name] and policy_of(config, name) == "error" for name in FAULTS)
    lines = [
        f"{groups:,} groups with {len(summary.scores):,} responses",
        *([f"{without:,} groups have no preferred response"] if without else []),
        *([f"{summary.cut_responses:,} responses are cut at max_length"] if summary.cut_responses else []),
    ]
    console.print(f"{split}: {escape(str(path))}: {'; '.join(lines)}", soft_wrap=True)
    if groups:
        table = Table("", *QUANTILES, "mean", title=f"lengths in {unit}", title_justify="left")
        for name, of in summary.table().items():
            table.add_row(name, *(f"{of[column]:.4g}" for column in (*QUANTILES, "mean")))
        console.print(table)
    within = show_within(summary, unit, console)
    for name in FAULTS:
        if faults.counts[name]:
            policy = policy_of(config, name)
            ends = "a run stops there" if policy == "error" else f"the run's policy: {policy}"
            console.print(f"fault {name}: {faults.counts[name]:,} records ({ends}), such as")
            for error in faults.examples[name]:
                console.print(f"  {escape(str(error))}", soft_wrap=True)
    return {
        "groups": groups,
        "responses": len(summary.scores),
        "without_preferred": without,
        "cut_responses": summary.cut_responses,
        "unit": unit,
        "faults": dict(faults.counts),
        "stops": stops,
        "distributions": summary.table(),
        **within,
    }


def show_within(summary: Summary, unit: str, console: Console) -> dict[str, Any]:
    """Print how scores are spaced, how lengths go with them, and what is there twice. Returns it for the JSON."""
    spacing, lengths = summary.spacing(), summary.lengths_by_score()
    if spacing:
        title = "mean gap between neighbouring scores, of n responses of a group"
        table = Table("n", "groups", "mean", "deviation over groups", title=title, title_justify="left")
        for of in spacing:
            table.add_row(str(of.n), f"{of.groups:,}", f"{of.mean:.4g}", f"{of.deviation:.4g}")
        console.print(table)
    if lengths is not None:
        found = [
            f"preferred {lengths.preferred:.4g}, dispreferred {lengths.dispreferred:.4g} {unit}, difference "
            f"{with_error(lengths.difference)}"
        ]
        if lengths.correlation is not None:
            found.append(f"correlation with the score within groups {with_error(lengths.correlation)}")
        console.print(f"mean lengths: {'; '.join(found)}", soft_wrap=True)
    repeated, groups = int(summary.repeated.sum()), int((summary.repeated > 0).sum())
    console.print(
        f"duplicates: {repeated:,} responses repeat another of their group (in {groups:,} groups); "
        f"{summary.repeated_prompts:,} groups have the prompt of an earlier one",
        soft_wrap=True,
    )
    return {
        "spacing": [asdict(of) for of in spacing],
        "lengths_by_score": None if lengths is None else asdict(lengths),
        "duplicates": {"responses": repeated, "groups": groups, "prompts": summary.repeated_prompts},
    }


def with_error(of: Estimate) -> str:
    return f"{of.value:+.3g}" + ("" if of.error is None else f" ± {of.error:.2g}")


def show_leak(summaries: dict[str, Summary]) -> dict[str, int]:
    """Print how many prompts of the validation data are trained on. Returns it for the JSON."""
    count = summaries["validation"].prompts_shared_with(summaries["train"])
    if count:
        print(f"validation: {count:,} groups have a prompt of the training data, and so are not held out")
    return {"prompts_of_train": count}


def draw(summaries: dict[str, Summary], unit: str, path: Path) -> None:
    """A PNG: lengths, scores, gaps of neighbours, preferred and dispreferred counts, spacing, and length by place."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(summaries), 6, figsize=(24, 3.6 * len(summaries)), squeeze=False, layout="constrained"
    )
    for row, (split, summary) in zip(axes, summaries.items(), strict=True):
        lengths, scores, gaps, counts, spacing, places = row
        ends = np.linspace(0, max([1, *summary.prompt_lengths, *summary.response_lengths]), 51)
        for values, label in ((summary.response_lengths, "responses"), (summary.prompt_lengths, "prompts")):
            lengths.hist(values, bins=ends, histtype="stepfilled", alpha=0.6, label=label)
        scores.hist(summary.scores, bins=50)
        gaps.hist(summary.gaps, bins=50)
        most = int(max([0, *summary.preferred, *summary.dispreferred]))
        for values, label, shift in (
            (summary.preferred, "preferred", -0.2),
            (summary.dispreferred, "dispreferred", 0.2),
        ):
            counts.bar(
                np.arange(most + 1) + shift, np.bincount(values, minlength=most + 1), width=0.4, label=label
            )
        of_n = summary.spacing()
        spacing.errorbar(
            [of.n for of in of_n], [of.mean for of in of_n], yerr=[of.deviation for of in of_n],
            fmt="o-", capsize=3,
        )  # fmt: skip
        longer, errors = summary.length_by_place()
        places.axhline(0, color="0.7", zorder=0)
        places.errorbar(np.arange(1, len(longer) + 1), longer, yerr=errors, fmt="o", capsize=3)
        spacing.set_ylabel("mean gap, and deviation over groups")
        places.set_ylabel(f"{unit} more than the group's mean")
        for axis, title in (
            (lengths, unit),
            (scores, "score"),
            (gaps, "gap between neighbouring scores of a group"),
            (counts, "responses of a group"),
            (spacing, "n: responses drawn of a group"),
            (places, "place by score, 1 is the best"),
        ):
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)
        lengths.set_yscale("log")
        gaps.set_yscale("log")
        spacing.set_ylim(bottom=0)
        for axis in (spacing, places):
            axis.xaxis.get_major_locator().set_params(integer=True)
        lengths.set_ylabel(split)
        lengths.legend()
        counts.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
