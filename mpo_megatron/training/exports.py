"""Hugging Face folders of a run's checkpoints, made by processes of their own while training goes on.

Each reads the checkpoint that is already on disk, a tensor at a time: no rank waits for it and no memory of the model's
size is taken. One that outlives the run ends by itself.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mpo_megatron.training.report import say


@dataclass(frozen=True)
class _Export:
    checkpoint: Path
    output: Path
    process: subprocess.Popen[str]


class BackgroundExports:
    """The exports of a run, on the rank that starts them.

    Attributes:
        begun: the checkpoints of all, also of those that have ended.
    """

    def __init__(self) -> None:
        self.begun: set[Path] = set()
        self._running: list[_Export] = []

    def start(self, checkpoint: Path, output: Path, dtype: torch.dtype | None) -> None:
        """Begin to export a complete checkpoint; says how the earlier ones have ended, if they have.

        Args:
            dtype: of the weights; None: as they are.
        """
        self._tell([export for export in self._running if export.process.poll() is not None])
        command = [sys.executable, "-m", "mpo_megatron.conversion.convert", str(checkpoint), str(output)]
        command += [str(dtype).removeprefix("torch.")] if dtype else []
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.begun.add(checkpoint)
        self._running.append(_Export(checkpoint, output, process))

    def reading(self) -> list[Path]:
        """The checkpoints that are being read."""
        return [export.checkpoint for export in self._running if export.process.poll() is None]

    def wait(self) -> None:
        """Until all have ended; says how."""
        self._tell(list(self._running))

    def _tell(self, exports: list[_Export]) -> None:
        for export in exports:
            _, errors = export.process.communicate()
            self._running.remove(export)
            if export.process.returncode == 0:
                say(f"exported    {export.output} (Hugging Face folder)")
                continue
            reason = (errors.strip().splitlines() or [f"status {export.process.returncode}"])[-1]
            say(
                f"warning: the export of {export.checkpoint} failed ({reason.removeprefix('error: ')}); to repeat it: "
                f"python tools/convert_checkpoint.py export --checkpoint {export.checkpoint} --output {export.output}"
            )
