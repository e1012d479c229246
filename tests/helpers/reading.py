"""What must hold of any file of data: groups or one sentence with the place, never anything else."""

import math
from pathlib import Path

import pytest

from mpo_megatron.data.faults import FAULTS
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.schema import DataError, RecordError, ScoredGroup
from tests.helpers.fuzzing import check_message


def check_group(group: ScoredGroup) -> None:
    assert len(group.responses) >= 2
    assert group.messages[-1].role == "user"
    for text in (*(m.content for m in group.messages), *(r.text for r in group.responses), group.id):
        text.encode()
    for response in group.responses:
        assert response.text.strip()
        assert isinstance(response.score, float)
        assert math.isfinite(response.score)
        assert abs(response.score) <= 3.5e38


def check_file(path: Path) -> None:
    """Skipping all faults gives the groups and stopping at the first gives its sentence, of the same records."""
    faults: list[RecordError] = []

    def skip(error: RecordError) -> bool:
        check_message(error, f"{path}")
        assert error.fault in FAULTS
        faults.append(error)
        return True

    try:
        groups = list(read_groups(path, on_fault=skip))
    except RecordError as error:
        raise AssertionError("a fault of one record was raised past skip") from error
    except DataError as error:  # of the file as a whole
        check_message(error, f"{path}")
        return
    for group in groups:
        check_group(group)
    if [error for error in faults if error.fault != "equal_responses"]:
        with pytest.raises(RecordError) as caught:
            list(read_groups(path))
        check_message(caught.value, f"{path}")
