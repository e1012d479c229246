"""The cache of reference log-probs where it cannot be written."""

from pathlib import Path

import pytest
import torch

from mpo_megatron.training import reference


def test_a_run_goes_on_without_its_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    reference.write(tmp_path / "file" / "reference" / "key.npy", torch.zeros(3))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"warning: {tmp_path}/file/reference/key.npy cannot be written (Not a directory), so the"
    )
    reference.write(tmp_path / "reference" / "key.npy", torch.zeros(3))
    assert [path.name for path in (tmp_path / "reference").iterdir()] == ["key.npy"]
