"""What third parties say is kept off the screen, and nothing else."""

import subprocess
import sys

PROGRAM = """
import io
from mpo_megatron.runtime.quiet import quiet_third_parties

class File(io.RawIOBase):
    def close(self):
        raise ValueError("of the file")

class Other:
    def __del__(self):
        raise ValueError("of another object")

quiet_third_parties()
File(), Other()
"""


def test_of_what_is_collected_only_files_are_kept_off_the_screen() -> None:
    """Python shows the errors of files from 3.13 on, so that only there this fails without the filter."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "ValueError: of another object" in done.stderr
    assert "of the file" not in done.stderr
