"""The `python` that starts in a moment."""

import os
import socket
import time
from pathlib import Path

import pytest

from tests.helpers.warm import WarmPython


@pytest.mark.parametrize("sent", ["nothing", "streams", "half a request"])
def test_a_command_that_is_killed_while_it_asks_stops_no_other(
    warm_python: WarmPython, tmp_path: Path, sent: str
) -> None:
    with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
        connection.connect(str(warm_python.python.parents[1] / "socket"))
        if sent != "nothing":
            socket.send_fds(connection, [b"+"], [nothing.fileno()] * 3)
        if sent == "half a request":
            connection.sendall(b'{"arguments": [')
    program = tmp_path / "program.py"
    program.write_text("print('here')")
    fork = warm_python.start([str(program)], {}, tmp_path / "log")
    end = time.monotonic() + 30
    while fork.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert (fork.poll(), (tmp_path / "log").read_text()) == (0, "here\n")
