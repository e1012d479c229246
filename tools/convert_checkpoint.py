"""Hugging Face folders to Megatron distributed checkpoints and back.

    python tools/convert_checkpoint.py import  --hf DIR --output DIR          Hugging Face to torch_dist
    python tools/convert_checkpoint.py export  --checkpoint DIR --output DIR  torch_dist to Hugging Face
    python tools/convert_checkpoint.py verify  --hf DIR --checkpoint DIR      do both say the same of some text?
    python tools/convert_checkpoint.py inspect DIR                            what is it?

`export` takes what `import` makes and the checkpoints of a training run at any layout (checkpoints/step_NNNNNNN).
Both stream: they need neither a GPU nor the memory that the model takes. `model.restore_from_path` of the main job
takes a Hugging Face folder as well as what `import` makes; an import saves nothing but the conversion at every start.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_megatron.errors import UserError
from mpo_megatron.runtime.quiet import quiet_third_parties

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 for an error and for a `verify` that finds a difference."""
    quiet_third_parties()  # the commands' own imports follow
    parsed = parse_arguments(arguments)
    try:
        return COMMANDS[parsed.command](parsed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("import", help="Hugging Face folder to Megatron checkpoint")
    command.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoint to make")

    command = commands.add_parser("export", help="Megatron checkpoint to Hugging Face folder")
    command.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are)")
    command.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="of a safetensors file (5)"
    )

    command = commands.add_parser("verify", help="compare log-probabilities of both")
    command.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    command.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron checkpoint")
    command.add_argument("--text", type=Path, metavar="FILE", help="compare on this text (built-in ones)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (float32)"
    )
    command.add_argument(
        "--tolerance", type=float, metavar="NATS",
        help="largest difference of a token's log-probability (0.001; in bfloat16 0.5)",
    )  # fmt: skip

    command = commands.add_parser("inspect", help="print what a folder holds")
    command.add_argument(
        "folder", type=Path, metavar="DIR", help="Megatron checkpoint or Hugging Face folder"
    )
    command.add_argument("--tensors", action="store_true", help="print name, type and shape of every tensor")
    return parser.parse_args(arguments)


def import_(parsed: argparse.Namespace) -> int:
    from mpo_megatron.conversion.convert import import_hf

    _must_be_new(parsed.output)
    import_hf(parsed.hf, parsed.output, progress=True)
    print(f"{parsed.output}: Megatron checkpoint of {parsed.hf}, for model.restore_from_path")
    return 0


def export(parsed: argparse.Namespace) -> int:
    import torch

    from mpo_megatron.conversion.convert import export_checkpoint

    _must_be_new(parsed.output)
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    export_checkpoint(
        parsed.checkpoint,
        parsed.output,
        dtype=dtype,
        max_shard_bytes=int(parsed.max_shard_gb * 1e9),
        progress=True,
    )
    print(f"{parsed.output}: Hugging Face folder of {parsed.checkpoint}")
    return 0


def verify(parsed: argparse.Namespace) -> int:
    import torch

    from mpo_megatron.conversion.verify import TEXTS, compare
    from mpo_megatron.runtime.device import choose_device
    from mpo_megatron.runtime.parallel import initialize, shutdown

    texts: Sequence[str] = TEXTS
    if parsed.text is not None:
        try:
            texts = [parsed.text.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {parsed.text} cannot be read ({error})") from error
    tolerance = parsed.tolerance
    if tolerance is None:
        tolerance = 1e-3 if parsed.dtype == "float32" else 0.5
    layout = initialize(choose_device("auto"))
    try:
        found = compare(parsed.hf, parsed.checkpoint, texts, layout, dtype=getattr(torch, parsed.dtype))
    finally:
        shutdown()
    same = found.largest <= tolerance
    print(
        f"{found.tokens} tokens in {parsed.dtype}: log-probabilities differ by at most {found.largest:.2g} nats, "
        f"by {found.mean:.2g} in the mean: {'the same model' if same else 'NOT the same model'} "
        f"(tolerance {tolerance:g})"
    )
    return 0 if same else 1


def inspect(parsed: argparse.Namespace) -> int:
    from mpo_megatron.conversion.describe import describe

    for line in describe(parsed.folder, tensors=parsed.tensors):
        print(line)
    return 0


def _must_be_new(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} is there already; remove it or give another")


COMMANDS = {"import": import_, "export": export, "verify": verify, "inspect": inspect}

if __name__ == "__main__":
    sys.exit(main())
