"""The response head in bf16 against float64 from the same numbers, on a response of 2,048 tokens."""

from typing import Any

from tests.distributed.test_head import LongResponse, long_response_case
from tests.gpu.conftest import Place


def test_head_is_precise(place: Place, measured: Any) -> None:
    size = LongResponse(vocab=128_256, width=1024) if place.is_gpu else LongResponse()
    (found,) = place.ranks(1).run(long_response_case, False, size, place.accelerator, 1024, timeout=280)
    measured("log-prob in nats", found["log-prob"], at_most=1e-3)
    # They are bf16 themselves: 8 bits.
    for name in ("d hidden", "d weight"):
        measured(name, found[name], at_most=2**-8)
