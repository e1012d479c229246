"""How many layers each pipeline stage holds: the rule, and what to set where it is broken. Plain arithmetic.

Every stage holds as many layers as the others, but for the first and the last, which may be given a number of their
own; each stage's layers are cut into `vpp` equal chunks (virtual pipeline stages). Megatron-core has the same rule.
"""

import math

from mpo_megatron.errors import ConfigError

FIRST = "model.num_layers_in_first_pipeline_stage"
LAST = "model.num_layers_in_last_pipeline_stage"


def stage_layers(num_layers: int, pp: int, first: int | None = None, last: int | None = None) -> list[int]:
    """The layers of each of `pp` stages; `first` and `last` are those of the first and the last, None: as the others.

    Empty where there is no such cut.
    """
    others = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if others == 0:
        each = 0
    elif others < 0 or rest < others or rest % others:
        return []
    else:
        each = rest // others
    stages = [each] * pp
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    return stages if sum(stages) == num_layers else []


def check_stages(
    num_layers: int, pp: int, vpp: int = 1, first: int | None = None, last: int | None = None
) -> None:
    """Check that the layers can be cut into `pp` stages, and each stage's into `vpp` chunks.

    Raises:
        ConfigError: they cannot; the message has a cut that works.
    """
    stages = stage_layers(num_layers, pp, first, last)
    if not stages:
        ends = _nearest_to_even(num_layers, pp, vpp) or _nearest_to_even(num_layers, pp, 1)
        raise ConfigError(_what_is_wrong(num_layers, pp, first, last) + _fix(ends, num_layers, pp))
    common = math.gcd(*stages)
    if common % vpp:
        sizes = " or ".join(str(size) for size in sorted(set(stages)))
        ends = _nearest_to_even(num_layers, pp, vpp)
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size={vpp} does not divide the {sizes} layers of a pipeline "
            f"stage; use {_one_of(common)}" + (f", or {_set(*ends)}" if ends else "")
        )


def _what_is_wrong(num_layers: int, pp: int, first: int | None, last: int | None) -> str:
    given = [f"{name}={layers}" for name, layers in ((FIRST, first), (LAST, last)) if layers is not None]
    if not given:
        return f"model.pipeline_model_parallel_size={pp} does not divide the model's {num_layers} layers; "
    others = pp - len(given)
    rest = num_layers - (first or 0) - (last or 0)
    verb = "leave" if len(given) > 1 else "leaves"
    if others:
        stages = f"{others} other pipeline stages" if others > 1 else "other pipeline stage"
        return (
            f"{' and '.join(given)} {verb} {max(rest, 0)} of the model's {num_layers} layers for the {stages}, which "
            f"must hold {'equally many and ' * (others > 1)}at least one; "
        )
    return (
        f"{' and '.join(given)} are all stages of model.pipeline_model_parallel_size={pp} and must add up to the "
        f"model's {num_layers} layers; "
    )


def _fix(ends: tuple[int, int] | None, num_layers: int, pp: int) -> str:
    if ends is None:
        return f"there are fewer layers than stages, so set model.pipeline_model_parallel_size to {num_layers} or less"
    if num_layers % pp:
        return f"{_set(*ends)}, or set model.pipeline_model_parallel_size to {_one_of(num_layers)}"
    return f"{_set(*ends)}, or remove both for {num_layers // pp} layers on each stage"


def _set(first: int, last: int) -> str:
    return f"set {FIRST}={first} and {LAST}={last}"


def _one_of(number: int) -> str:
    divisors = [str(n) for n in range(1, number + 1) if not number % n]
    return f"one of {', '.join(divisors)}" if len(divisors) > 1 else divisors[0]


def _nearest_to_even(num_layers: int, pp: int, vpp: int) -> tuple[int, int] | None:
    """Layers of the first and the last stage such that the largest stage is as small as can be; None: there are none.

    Of several cuts the one with the fewest layers at the ends, which have the embedding and the head besides.
    """
    if num_layers % vpp or pp == 1:
        return None
    chunks = num_layers // vpp  # a stage holds a multiple of vpp layers, so count in those
    cuts = []
    for middle in range(1, chunks) if pp > 2 else [0]:
        ends = chunks - (pp - 2) * middle
        last, first = ends // 2, ends - ends // 2
        if last >= 1:
            cuts.append((max(first, middle), ends, first, last))
    if not cuts:
        return None
    *_, first, last = min(cuts)
    return first * vpp, last * vpp
