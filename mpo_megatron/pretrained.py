"""What transformers makes of a model's folder: the whole of it, or one sentence; never by running the folder's code.

For weights that a folder lacks, or has in another shape, transformers takes random numbers, and says so in a table that
scrolls by: a reward model without its head would go on and score. Here that is an error.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.errors import CheckpointError, ConfigError, UserError

_LONGEST = 300


def load_config(folder: str | Path, shown: str | Path | None = None) -> Any:
    """The configuration of a folder, or of a file by any name.

    Args:
        shown: what the error names instead; a folder's config.json if left out.

    Raises:
        ConfigError: transformers cannot make one of it.
    """
    from transformers import AutoConfig

    file = Path(folder, "config.json") if shown is None else shown
    with _in_a_sentence(ConfigError, f"{file} cannot be read", "copy or download the model again"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: str | Path, **options: Any) -> Any:
    """The tokenizer of a folder.

    Args:
        options: of its class, such as padding_side.

    Raises:
        ConfigError: transformers cannot make one of its files.
    """
    from transformers import AutoTokenizer

    mend = "tokenizer.json, tokenizer_config.json and config.json must be there, and whole"
    with _in_a_sentence(ConfigError, f"no tokenizer can be loaded from {folder}", mend):
        # Left out, transformers would ask on a terminal whether to run a folder's own code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def load_model(kind: Any, folder: str | Path, *, dtype: Any, device: Any) -> Any:
    """The model of a folder on a device, ready to be called and not to be trained.

    Args:
        kind: a class of transformers with `from_pretrained`, such as AutoModelForCausalLM.
        dtype: torch's.

    Raises:
        CheckpointError: transformers cannot make one, or the folder lacks weights, or has them in other shapes.
    """
    mend = "copy or download the model again"
    with _in_a_sentence(CheckpointError, f"no model can be loaded from {folder}", mend):
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_and_more(missing)}, which {type(model).__name__} has; {mend}, or give one of this kind"
        )
    if found["mismatched_keys"]:
        names, stored, wanted = zip(*sorted(found["mismatched_keys"]), strict=True)
        shapes = f"in the shape {list(stored[0])}, where config.json says {list(wanted[0])}"
        raise CheckpointError(f"{folder} has {_and_more(names)} {shapes}; {mend}")
    return model.to(device).eval()


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model was trained for, by its configuration; None if that does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


@contextlib.contextmanager
def _in_a_sentence(kind: type[UserError], problem: str, mend: str) -> Iterator[None]:
    """Whatever transformers, tokenizers and safetensors raise, as one error: they have no common kind."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        cause = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise kind(f"{problem} ({cause[:_LONGEST]}); {mend}") from error


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
