r"""The two halves of byte-pair encoding: learning the merges, and applying them."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from minillm.checks import message

Pair = tuple[int, int]
GAP = -1  # between words, so that no pair spans two of them; also the place of a symbol that was merged away


def learn_merges(words: Mapping[tuple[int, ...], int], n_merges: int, first_id: int, min_count: int = 2) -> list[Pair]:
    r"""Merge the most frequent adjacent pair again and again.

    Equation: `tokenizer-bpe` $(a,b)=\arg\max_{(a,b)}\mathrm{count}(ab)$, ties to the smallest $(a,b)$
    Source: lecture06 (LLaMA table); Sennrich, Haddow and Birch 2016.

    ``words`` maps each distinct word, as symbols, to how often it occurs. Counts are of adjacent places, so "aaa"
    holds (a, a) twice although only one of the two can be merged. Fewer merges come back when no pair occurs
    ``min_count`` times. All words lie in one linked list of places, and every replacement removes a place, so that
    the whole takes time in proportion to the text and not to the text times the number of merges.
    """
    symbols, weights = [GAP], [0]
    for word, count in words.items():
        symbols += [*word, GAP]
        weights += [count] * (len(word) + 1)
    left = list(range(-1, len(symbols) - 1))
    right = list(range(1, len(symbols) + 1))

    counts: dict[Pair, int] = defaultdict(int)
    places: dict[Pair, list[int]] = defaultdict(list)  # of the pair's left symbol, ascending, some out of date
    for place, pair in enumerate(pairwise(symbols)):
        if GAP not in pair:
            counts[pair] += weights[place]
            places[pair].append(place)

    # an entry whose count is no longer true is skipped when it surfaces; the true one is in the heap as well
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        negative_count, pair = heapq.heappop(heap)
        if counts.get(pair) != -negative_count:
            continue
        if -negative_count < min_count:
            break
        changed = _merge_everywhere(pair, first_id + len(merges), symbols, weights, left, right, counts, places)
        merges.append(pair)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
            else:
                del counts[other], places[other]
    return merges


def _merge_everywhere(pair, new, symbols, weights, left, right, counts, places) -> set[Pair]:
    """Replace the pair by the symbol ``new`` from left to right; return the pairs whose counts changed."""
    a, b = pair
    changed = {pair}
    for place in places[pair]:
        follower = right[place]
        if symbols[place] != a or follower >= len(symbols) or symbols[follower] != b:
            continue  # out of date: one of the two went into another merge
        weight, before, after = weights[place], left[place], right[follower]
        x, y = symbols[before], symbols[after]
        counts[pair] -= weight
        if x != GAP:
            counts[x, a] -= weight
            counts[x, new] += weight
            places[x, new].append(before)
            changed |= {(x, a), (x, new)}
        if y != GAP:
            counts[b, y] -= weight
            counts[new, y] += weight
            places[new, y].append(place)
            changed |= {(b, y), (new, y)}
        symbols[place], symbols[follower] = new, GAP
        right[place], left[after] = after, place
    return changed


def apply_merges(symbols: Sequence[int], ranks: Mapping[Pair, int], made: Sequence[int]) -> list[int]:
    r"""Apply the merges to one word in the order in which they were learned, each from left to right.

    Equation: `tokenizer-bpe` $ab\to c$ for merge 0, then merge 1, ...
    Source: lecture06 (LLaMA table); Sennrich, Haddow and Birch 2016.

    ``made`` holds the symbol that the merge of each rank makes. A merge only makes pairs that later merges can take,
    so taking the lowest rank present, leftmost first, is the same as going through the merges one by one, without
    visiting those that do not occur.
    """
    symbols = list(symbols)
    n = len(symbols)
    left, right = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, place = heapq.heappop(heap)
        follower = right[place]
        if symbols[place] == GAP or follower >= n or ranks.get((symbols[place], symbols[follower])) != rank:
            continue  # out of date
        after = right[follower]
        symbols[place], symbols[follower] = made[rank], GAP
        right[place] = after
        if after < n:
            left[after] = place
            _offer(heap, ranks, symbols, place, after)
        if left[place] >= 0:
            _offer(heap, ranks, symbols, left[place], place)
    return [symbol for symbol in symbols if symbol != GAP]


def _offer(heap, ranks, symbols, place, follower) -> None:
    rank = ranks.get((symbols[place], symbols[follower]))
    if rank is not None:
        heapq.heappush(heap, (rank, place))


def ranked(
    merges: Sequence[tuple[str, str]], id_of: Mapping[str, int], where: str, *, last: bool = False
) -> tuple[dict[Pair, int], list[int]]:
    """The rank of each pair of ids, and the id that each rank makes; of repeated pairs the first or the last counts.

    Raises: ValueError for a merge that is not of two tokens into a third.
    """
    ranks: dict[Pair, int] = {}
    made = []
    for rank, (first, second) in enumerate(merges):
        try:
            pair, new = (id_of[first], id_of[second]), id_of[first + second]
        except (KeyError, TypeError) as error:
            wanted = "of two tokens of the vocabulary into a third"
            raise ValueError(message(where, f"merge {rank}", wanted, f"{first!r} and {second!r}")) from error
        if last or pair not in ranks:
            ranks[pair] = rank
        made.append(new)
    return ranks, made


def ranked_by_score(scores: Mapping[str, float], id_of: Mapping[str, int]) -> tuple[dict[Pair, int], list[int]]:
    """The same where tokens have scores: of the pairs that make a token, the best token is made, the leftmost first."""
    ranks: dict[Pair, int] = {}
    made = []
    for text in sorted(scores, key=lambda text: (-scores[text], id_of[text])):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                ranks[id_of[text[:cut]], id_of[text[cut:]]] = len(made)
        made.append(id_of[text])
    return ranks, made
