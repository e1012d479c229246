"""Errors that are the user's to mend: one sentence with the value, the rule and the fix, shown without a traceback."""


class UserError(ValueError):
    """Something outside the program must change: a configuration value, a file, the data, the machine."""


class ConfigError(UserError):
    """A configuration value breaks a rule, alone or together with others."""


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder is missing, incomplete, or not of a kind that can be read."""
