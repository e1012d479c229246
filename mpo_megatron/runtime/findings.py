"""What a finding about a machine says."""

from dataclasses import dataclass

STOP, SLOWER, NOTE = "stop", "slower", "note"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        level: `stop` (no run, or not on the GPU that is here), `slower`, or `note`.
        problem: what is not there or not right.
        instead: what a run uses, or "" where there is none.
        cost: of that.
        fix: what mends it.
    """

    level: str
    problem: str
    instead: str
    cost: str
    fix: str

    def __str__(self) -> str:
        return "; ".join(part for part in (self.problem, self.instead, self.cost, self.fix) if part)
