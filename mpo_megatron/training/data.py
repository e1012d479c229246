"""What of the data a run trains on, as its configuration says: read, tokenised, and selected. Imports no Megatron."""

from pathlib import Path

from mpo_megatron import objectives
from mpo_megatron.config import Config
from mpo_megatron.conversion.hf_folder import model_folder
from mpo_megatron.data import GroupDataset, Selection, TokenizeOptions, build_dataset
from mpo_megatron.errors import ConfigError
from mpo_megatron.pretrained import load_tokenizer


def selection_of(config: Config, entry: objectives.Entry) -> Selection:
    """Which responses are trained on, and which are preferred.

    Raises:
        ConfigError: groups are to be kept that say nothing to the objective, or values do not go together.
    """
    data = config.model.data
    if data.require_preferred is False and entry.needs_partition:
        raise ConfigError(
            f"model.data.require_preferred=false: a group without a preferred response says nothing to the objective "
            f"{entry.name}; remove it"
        )
    return Selection(
        partition=config.model.mpo.partition,
        keep_first=data.keep_first,
        keep_best=data.keep_best,
        keep_worst=data.keep_worst,
        score_noise=data.score_noise,
        score_noise_seed=data.score_noise_seed,
        needs_preferred=entry.needs_partition if data.require_preferred is None else data.require_preferred,
    )


def validation_selection(config: Config, training: Selection) -> Selection:
    """Which responses validation is on: those of training, or all of them by the data's own scores."""
    if config.model.data.validate_on == "selected":
        return training
    return Selection(needs_preferred=training.needs_preferred)


def tokenize_options(config: Config) -> TokenizeOptions:
    """How the run's groups are tokenised."""
    data = config.model.data
    return TokenizeOptions(
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        truncation=data.truncation,
        apply_chat_template=data.apply_chat_template,
        system_prompt=data.system_prompt,
    )


def open_data(config: Config, selection: Selection, path: str) -> GroupDataset:
    """The tokenised groups of a data source, made or opened."""
    data = config.model.data
    tokenizer = load_tokenizer(model_folder(config.model.restore_from_path))
    return build_dataset(
        path,
        tokenizer,
        tokenize_options(config),
        cache_dir=Path(data.cache_dir).expanduser() / "data",
        selection=selection,
        faults=data.faults,
    )
