"""Number partitioning: weights in, lists of their positions out. Pure, deterministic, knows nothing of groups or ranks.

A **bin** is a list of items, an item a position in the list of weights; a bin's load is the sum of its items' weights.
Every function breaks ties by position, and its time grows about as n log n with the number n of items.
"""

import bisect
import heapq
import itertools
from collections.abc import Sequence

Bins = list[list[int]]

# How many of the lightest bins are tried as partners of the heaviest. Bounds the work where there are thousands.
PARTNERS = 32
# How many items of a hand `trade` looks at: it compares all pairs, and needs few to find a good one.
CANDIDATES = 256
# How many pairs it compares altogether: about a second's work, a hundred times what a step of 128 groups takes.
TRADE_EFFORT = 2_000_000


def first_fit_decreasing(weights: Sequence[int], capacity: int) -> Bins:
    """Heaviest first, each item into the first bin with room; no weight may be above the capacity."""
    leaves = 1
    while leaves < len(weights):
        leaves *= 2
    # A tree over as many bins as there are items: a node holds the largest room below it, so that the first bin with
    # room is found in log n steps.
    room = [capacity] * (2 * leaves)
    bins: Bins = []
    for item in _heaviest_first(weights):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < weights[item]:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= weights[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def fit(weights: Sequence[int], num_bins: int, capacity: int, goal: float) -> Bins | None:
    """`num_bins` bins of nearly equal load, none above the capacity; None where no such bins are found.

    Bins are found wherever first-fit-decreasing needs no more than `num_bins`, and often where it needs more. Evening
    out ends as soon as no load is above `goal`.
    """
    # Longest processing time, then evened out, rather than multiway Karmarkar-Karp: on 64 steps of 128 groups from
    # `benchmarks/plan.py` in 24 rows the fullest row is 1.058 (longest processing time) or 1.036 (Karmarkar-Karp) of
    # the mean before evening out and 1.002 after it from either. Karmarkar-Karp's time grows as items times bins,
    # which rules it out for a single plan of 64k groups in 11k rows.
    bins: Bins = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for item in _heaviest_first(weights):
        load, lightest = heap[0]
        bins[lightest].append(item)
        heapq.heapreplace(heap, (load + weights[item], lightest))
    even_out(bins, weights, goal)
    if _heaviest(bins, weights) <= capacity:
        return bins
    bins = first_fit_decreasing(weights, capacity)
    if len(bins) > num_bins:
        return None
    bins += [[] for _ in range(num_bins - len(bins))]
    even_out(bins, weights, goal)
    return bins


def even_out(
    bins: Bins,
    weights: Sequence[float],
    goal: float,
    *,
    base: Sequence[float] | None = None,
    keep_counts: bool = False,
) -> None:
    """Exchange items between the heaviest and a light bin, in place, until no load is above `goal` or none helps.

    Args:
        base: what each bin weighs besides its items; nothing if not given.
        keep_counts: exchange item for item only, so that each bin keeps its number of items.
    """
    loads = list(base) if base is not None else [0.0] * len(bins)
    for b, items in enumerate(bins):
        loads[b] += sum(weights[item] for item in items)
    order = sorted((load, b) for b, load in enumerate(loads))
    # Every exchange makes the heavier of two bins lighter, so this ends; the bound is for floats that hardly differ.
    for _ in range(4 * len(weights) + len(bins)):
        load, heavy = order[-1]
        if load <= goal:
            return
        best = None
        for light_load, light in order[: min(PARTNERS, len(order) - 1)]:
            gap = load - light_load
            found = _exchange(bins[heavy], bins[light], weights, gap, keep_counts)
            if found is None:
                continue
            difference, out, back = found
            result = max(load - difference, light_load + difference)
            if result < load and (best is None or result < best[0]):
                best = (result, difference, light, out, back)
            if result <= goal:
                break
        if best is None:
            return
        _, difference, light, out, back = best
        bins[heavy].remove(out)
        bins[light].append(out)
        if back is not None:
            bins[light].remove(back)
            bins[heavy].append(back)
        for b, change in ((heavy, -difference), (light, difference)):
            del order[bisect.bisect_left(order, (loads[b], b))]
            loads[b] += change
            bisect.insort(order, (loads[b], b))


def _exchange(
    heavy: Sequence[int], light: Sequence[int], weights: Sequence[float], gap: float, keep_counts: bool
) -> tuple[float, int, int | None] | None:
    """What to take out of the heavy bin and what to give back, so that the weight moved is nearest half the gap.

    Returns:
        (weight moved, item out, item back or None), or None if nothing makes the heavier of the two lighter.
    """
    offers: list[tuple[float, int | None]] = [] if keep_counts else [(0, None)]
    offers += sorted((weights[item], item) for item in light)
    offered = [weight for weight, _ in offers]
    best: tuple[float, int, int | None] | None = None
    for weight, out in {weights[item]: item for item in heavy}.items():
        nearest = bisect.bisect_left(offered, weight - gap / 2)
        for back_weight, back in offers[max(0, nearest - 1) : nearest + 1]:
            difference = weight - back_weight
            if 0 < difference < gap and (best is None or abs(gap - 2 * difference) < abs(gap - 2 * best[0])):
                best = (difference, out, back)
    return best


def deal(
    weights: Sequence[float], cards: Sequence[int], lengths: Sequence[int], base: Sequence[float]
) -> Bins:
    """Give each of `cards` (items) to a hand, so that hands get equally long: heaviest first, to the lightest shortest.

    Args:
        lengths: how many cards each hand holds before; they are not in what is returned.
        base: what it weighs before.
    """
    hands: Bins = [[] for _ in lengths]
    heap = [(length, load, h) for h, (length, load) in enumerate(zip(lengths, base, strict=True))]
    heapq.heapify(heap)
    for card in sorted(cards, key=lambda card: (-weights[card], card)):
        length, load, h = heap[0]
        hands[h].append(card)
        heapq.heapreplace(heap, (length + 1, load + weights[card], h))
    return hands


def trade(
    hands: Bins,
    bins: Bins,
    costs: Sequence[float],
    sizes: Sequence[int],
    capacity: int,
    goal: float,
    *,
    base: Sequence[float],
) -> None:
    """Swap items between bins of the costliest hand and of a cheap one, in place, until no hand costs above `goal`.

    Ends also where no swap helps, and after `TRADE_EFFORT` comparisons.

    Args:
        hands: each a list of bins, given by their positions in `bins`.
        costs: what an item adds to its hand.
        sizes: what it takes of its bin's capacity.
        base: what each hand costs besides its bins.
    """
    used = [sum(sizes[item] for item in items) for items in bins]
    loads = [base[h] + sum(costs[item] for b in hand for item in bins[b]) for h, hand in enumerate(hands)]
    effort = 0
    while effort < TRADE_EFFORT:
        *others, dear = sorted(range(len(hands)), key=lambda h: (loads[h], h))
        if loads[dear] <= goal:
            return
        best = None
        offers = _candidates(hands[dear], bins)
        for cheap in others:
            wanted = _candidates(hands[cheap], bins)
            best = _best_swap(offers, wanted, costs, sizes, used, capacity, loads[dear] - loads[cheap])
            effort += len(offers) * len(wanted) + 1
            if best is not None or effort >= TRADE_EFFORT:
                break
        if best is None:
            return
        (b, out), (c, back) = best
        bins[b][bins[b].index(out)] = back
        bins[c][bins[c].index(back)] = out
        used[b] += sizes[back] - sizes[out]
        used[c] += sizes[out] - sizes[back]
        loads[dear] += costs[back] - costs[out]
        loads[cheap] += costs[out] - costs[back]


def _candidates(hand: Sequence[int], bins: Bins) -> list[tuple[int, int]]:
    """(bin, item) for the first `CANDIDATES` items of a hand."""
    items = ((b, item) for b in hand for item in bins[b])
    return list(itertools.islice(items, CANDIDATES))


def _best_swap(
    offers: Sequence[tuple[int, int]],
    wanted: Sequence[tuple[int, int]],
    costs: Sequence[float],
    sizes: Sequence[int],
    used: Sequence[int],
    capacity: int,
    gap: float,
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The (bin, item) of an offer and of a wanted one whose costs differ by nearest half the gap and that fit."""
    best, least = None, gap
    for b, out in offers:
        for c, back in wanted:
            miss = abs(gap - 2 * (costs[out] - costs[back]))
            extra = sizes[out] - sizes[back]
            if miss < least and used[b] - extra <= capacity and used[c] + extra <= capacity:
                best, least = ((b, out), (c, back)), miss
    return best


def _heaviest_first(weights: Sequence[float]) -> list[int]:
    return sorted(range(len(weights)), key=lambda item: (-weights[item], item))


def _heaviest(bins: Bins, weights: Sequence[int]) -> int:
    return max((sum(weights[item] for item in items) for items in bins), default=0)
