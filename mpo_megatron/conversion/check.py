"""What a Hugging Face folder's weights must be before one of their values is used."""

from collections.abc import Iterable

from mpo_megatron.conversion.hf_folder import WeightReader
from mpo_megatron.conversion.names import EMBEDDING, OUTPUT, Entry
from mpo_megatron.errors import CheckpointError
from mpo_megatron.model.architecture import Architecture

# Rows of the embedding that are compared at a time.
_ROWS = 4096


def check_weights(
    reader: WeightReader,
    entries: Iterable[Entry],
    architecture: Architecture,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Check by the files' headers that each entry's tensors are there, of the shapes of config.json, not quantised.

    And by its values, where a model's embeddings are tied, that its files hold no other output layer: transformers
    would use that one, whatever config.json says. A copy of the embedding, which older files hold, is as good as none.

    Args:
        entries: the part of the table to check.
        share: (i, n): compare the i-th of n parts of the output layer's values, counted from 0.

    Raises:
        CheckpointError: something of it is not so.
    """
    (output,) = OUTPUT.hugging_face
    for entry in entries:
        reader.check(entry.shapes(architecture))
        if entry == EMBEDDING and architecture.tied_embeddings and output in reader.names():
            reader.check(OUTPUT.shapes(architecture))
            part, parts = share
            size = architecture.vocab_size
            _check_same(reader, size * part // parts, size * (part + 1) // parts)


def _check_same(reader: WeightReader, first: int, last: int) -> None:
    """Compare rows of the embedding with those of the output layer."""
    names = [*EMBEDDING.hugging_face, *OUTPUT.hugging_face]
    for start in range(first, last, _ROWS):
        tied, own = (tensor[start : min(start + _ROWS, last)] for tensor in reader.slices(names))
        if (tied != own).any():
            raise CheckpointError(
                f"{reader.folder}: config.json ties the output layer to the embedding, but {names[1]} has values of "
                "its own; set tie_word_embeddings to false in config.json to train the model with both"
            )
