"""Errors that are the user's to mend: one sentence with the value, the rule and the fix, shown without a traceback."""

_LONGEST = 1200


class UserError(ValueError):
    """Something outside the program must change: a configuration value, a file, the data, the machine."""

    def __str__(self) -> str:
        """One line that any terminal prints, whatever value it quotes: of a long one the beginning and the end."""
        line = " ".join(super().__str__().splitlines()).encode(errors="backslashreplace").decode()
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class ConfigError(UserError):
    """A configuration value breaks a rule, alone or together with others."""


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder is missing, incomplete, or not of a kind that can be read."""
