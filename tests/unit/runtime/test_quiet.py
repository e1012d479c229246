"""What third parties say is kept off the screen, and nothing else."""

import os
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


def test_a_toolkit_without_a_gpu_is_no_news() -> None:
    """The CUDA toolkit is on the machine, as in a container, and the GPU is not."""
    # What a build with CUDA does as it is imported; the tests may have one without.
    importing = "from torch.utils import cpp_extension; cpp_extension._find_cuda_home()"
    environment = {**os.environ, "CUDA_HOME": "/toolkit", "CUDA_VISIBLE_DEVICES": ""}
    loud, quiet = (
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stderr
        for program in (
            importing,
            f"from mpo_megatron.runtime.quiet import quiet_third_parties\nquiet_third_parties()\n{importing}",
        )
    )
    assert "No CUDA runtime is found" in loud
    assert quiet == ""
