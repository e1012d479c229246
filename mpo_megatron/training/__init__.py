"""The job: rows to loss through Megatron's schedules, optimizer, metrics, checkpoints.

Only entry points import this package.
"""
