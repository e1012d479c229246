"""What the claims of speed and memory rest on: one module a benchmark, run by tools/benchmark.py.

Each has `add_arguments(parser)` and `run(arguments) -> Report`.
"""
