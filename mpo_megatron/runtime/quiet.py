"""Keep other libraries' start-up chatter off the screen, so that the first lines of a run are the run's own."""

import io
import logging
import os
import sys
import warnings


def quiet_third_parties() -> None:
    """Filter warnings and notices of third parties; to be called before they are imported.

    Warnings of this package and errors of any are shown as ever.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a notice after each fork
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"mpo_megatron(\..*)?")
    # Calls of torch go through it, and torch's warnings about them name it.
    warnings.filterwarnings("ignore", module=r"mpo_megatron\.runtime\.cpu")
    # On a full disk what matters says that it cannot be written, and not a traceback of every log.
    logging.raiseExceptions = False
    sys.unraisablehook = _of_no_file
    for name in (
        "megatron",
        "nemo_logging",
        "nv_one_logger",
        "lightning",
        "lightning.pytorch",
        "torch.distributed",
        "torch.utils.cpp_extension",  # of a CUDA toolkit without a GPU, from each rank; the run says what it takes
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def _of_no_file(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show an exception that nobody can catch, unless it is of a file that is closed as it is collected.

    Python >= 3.13 shows these. Torch leaves some such files behind when a disk is full, after the error that says so.
    """
    if not isinstance(unraisable.object, io.IOBase):
        sys.__unraisablehook__(unraisable)
