"""Exports beside a run: they say how they ended, and a failed one does not stop anything."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.conversion.convert import import_hf
from mpo_megatron.training.exports import BackgroundExports
from tests.helpers.models import make_llama


def test_each_says_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_hf(make_llama(tmp_path / "source"), tmp_path / "checkpoint")
    exports = BackgroundExports()
    exports.wait()
    exports.start(tmp_path / "absent", tmp_path / "a", None)
    exports.start(tmp_path / "checkpoint", tmp_path / "b", torch.float16)
    exports.wait()
    printed = capsys.readouterr().out
    assert f"exported    {tmp_path / 'b'} (Hugging Face folder)\n" in printed
    assert (
        f"warning: the export of {tmp_path / 'absent'} failed ({tmp_path / 'absent'} is not a complete"
        in printed
    )
    assert (
        f"tools/convert_checkpoint.py export --checkpoint {tmp_path / 'absent'} --output {tmp_path / 'a'}"
        in printed
    )
    exported = load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float16}
    assert not (tmp_path / "a").exists()
