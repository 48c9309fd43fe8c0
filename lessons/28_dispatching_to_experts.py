# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 28 · Dispatching to experts
#
# Lesson 10 built a mixture of experts: a router, a choice of $k$ experts a token, a weighted sum. What a GPU has to do between
# the choice and the sum is bookkeeping, and it is there that such layers lose their time, and their tokens. In this lesson the
# bookkeeping becomes kernels: a sort that counts, matrix products over groups of unequal size, and a sum that nobody races for.
#
# $$\mathbf X_e[j]=\mathbf X[\pi_e(j)],\qquad \mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e),\qquad
# \mathbf Z_n=\sum_{e\in\mathcal T_k(n)}g_{ne}\,\mathbf Y_e[\eta_e(n)].$$
#
# Equations: `moe-dispatch`, `moe-expert`, `moe-combine`, `moe-output`, `topk-renormalise`, `moe-pad`, `moe-capacity`, `moe-drop`,
# `moe-aux-loss`.
#
# After it you can
# - sort assignments by expert with a histogram and a running sum, in parallel and stably,
# - say how many rows of a grouped product are computed for nobody, before measuring it,
# - choose the order of programs by what they share in the cache,
# - find an offset that is off by one from the smallest case that shows it,
# - get the gates' gradient without the experts' outputs, and every sum without atomics.

# %%
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # run kernels on the CPU; this must come before triton is imported

import inspect

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl
from matplotlib.patches import Rectangle

from kernels import compare
from kernels.experts import kernel_combine, kernel_packing, launch, op, reference, traffic
from kernels.subject import Subject
from minillm.autograd import Tensor, gradcheck
from minillm.functional import experts as written
from minillm.functional.capacity import capacity
from minillm.plotting import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, use_style

use_style()
rng = np.random.default_rng(0)
COLOURS = np.array([BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY])

# %% [markdown]
# ## 1. From a choice to lists
#
# Twelve tokens, five experts, two choices each. Assignment $a=nk+s$ is the $s$-th choice of token $n$. The experts want lists:
# all of expert 0's tokens first, then expert 1's, ... Two things make this a sort and not a search: **how many** each expert has
# (a histogram), and **where its list begins** (the sum of the histogram before it).

# %%
N, E, k = 12, 5, 2
logits = rng.normal(size=(N, E)).astype(np.float32) + np.array([0.9, 0.1, 0.4, -0.4, -3.0], np.float32)
gates, experts, loads, aux, _ = op.route(torch.from_numpy(logits), None, k)
order, places, offsets = op.pack(experts, E)
print("choices:", experts.tolist())
print("loads  :", loads.tolist(), " offsets:", offsets.tolist(), f" auxiliary loss {aux.item():.3f}")


def boxes(axis, numbers, owners, y, label):
    """A row of boxes coloured by expert."""
    for x, (number, owner) in enumerate(zip(numbers, owners)):
        axis.add_patch(Rectangle((x, y), 0.9, 0.8, color=COLOURS[owner]))
        axis.text(x + 0.45, y + 0.4, str(number), ha="center", va="center", color="white", fontsize=9)
    axis.text(-0.4, y + 0.4, label, ha="right", va="center")


figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 2.6])
axes[0].barh(range(E), loads, color=COLOURS[:E])
for e in range(E):
    axes[0].text(int(loads[e]) + 0.2, e, f"from row {int(offsets[e])}", va="center", fontsize=9)
axes[0].set(yticks=range(E), ylabel="expert", xlabel="tokens", title="Histogram and offsets", xlim=(0, 14))
axes[0].invert_yaxis()
flat = experts.flatten().numpy()
boxes(axes[1], np.arange(N * k) // k, flat, 3, "token")
boxes(axes[1], order.numpy() // k, flat[order.numpy()], 0, "row of")
for a, place in enumerate(places.flatten().tolist()):
    axes[1].plot([a + 0.45, place + 0.45], [2.95, 0.85], color=COLOURS[flat[a]], linewidth=1.1, alpha=0.8)
for e in range(1, E):
    axes[1].plot([int(offsets[e]) - 0.05] * 2, [-0.35, 0.8], color="black", linewidth=1)
axes[1].set(xlim=(-0.2, N * k), ylim=(-0.5, 4.2), title="The permutation: lines of one colour never cross")
axes[1].axis("off")
plt.show()

# %% [markdown]
# That lines of one colour do not cross is **stability**: within an expert, tokens keep their order. It makes "first come, first
# served" mean something, and two runs the same. `order` and `places` are inverse maps, and no token is lost:

# %%
a = torch.arange(N * k)
assert torch.equal(order[places.flatten().long()].long(), a), "order after places is the identity"
assert torch.equal(places.flatten()[order.long()].long(), a), "and the other way round"
print("sum of loads:", int(loads.sum()), "= N k =", N * k)

# %% [markdown]
# ## 2. A sort that only counts
#
# A thread per assignment cannot know how many of the same kind came before it. A *program* can, for its own chunk: it makes a
# table of zeros and ones, assignments by experts, and takes the running sum down each column. The chunks need one number per
# expert from one another: how many came in the chunks before. So there are three launches: count, add up, place.

# %%
print(inspect.getsource(kernel_packing._place_kernel.fn))

# %%
chunk = 8
hot = np.eye(E, dtype=int)[flat].reshape(-1, chunk, E)  # (chunks, chunk, E)
counts = hot.sum(1)  # (chunks, E)
before = np.cumsum(counts, 0) - counts
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1.5, 1, 1.5])
ranks = hot * (np.cumsum(hot, 1) + before[:, None])
for axis, table, title in ((axes[0], hot.reshape(-1, E).T, "1 one-hot, in chunks of 8"), (axes[2], ranks.reshape(-1, E).T, "3 running sum, from where\nthe chunks before ended")):
    axis.imshow(table > 0, cmap="Greys", vmax=2, aspect="auto", interpolation="nearest")
    for e, a in zip(*np.nonzero(table)):
        axis.text(a, e, table[e, a], ha="center", va="center", fontsize=7)
    for edge in range(chunk, N * k, chunk):
        axis.axvline(edge - 0.5, color=VERMILION, linewidth=1.5)
    axis.set(xlabel="assignment", ylabel="expert", title=title, yticks=range(E))
    axis.grid(visible=False)
axes[1].imshow(before.T, cmap="Blues", aspect="auto", vmax=12, interpolation="nearest")
for c in range(len(before)):
    for e in range(E):
        axes[1].text(c, e, f"{counts[c, e]}\n({before[c, e]})", ha="center", va="center", fontsize=9)
axes[1].set(xlabel="chunk", title="2 count (sum before)", yticks=range(E), xticks=range(len(before)))
axes[1].grid(visible=False)
plt.show()
assert np.array_equal(ranks.max(-1).reshape(-1) - 1 + offsets.numpy()[flat], places.flatten().numpy())

# %% [markdown]
# ### Exercise 1: places without sorting
#
# Return the place of every assignment and the offsets, using `cumsum` and no sort. `experts` is an integer array (N, k).


# %%
def my_places(experts, E):
    """places (N, k) and offsets (E + 1,)."""
    ### BEGIN SOLUTION
    hot = np.eye(E, dtype=int)[experts.reshape(-1)]  # (N k, E)
    offsets = np.concatenate([[0], np.cumsum(hot.sum(0))])
    rank = ((np.cumsum(hot, 0) - 1) * hot).sum(1)
    return (offsets[experts.reshape(-1)] + rank).reshape(experts.shape), offsets
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: places without sorting
for n_tokens, n_experts, n_chosen in ((12, 5, 2), (1, 1, 1), (40, 7, 7), (30, 9, 1)):
    chosen = np.argsort(rng.normal(size=(n_tokens, n_experts)), -1)[:, :n_chosen]
    _, wanted, starts = reference.pack(chosen, n_experts, None)
    found, mine = my_places(chosen, n_experts)
    assert np.array_equal(mine, starts), "the offsets are the sums of the loads before"
    assert np.array_equal(found, wanted), "a place is the expert's offset plus the rank within the expert"
print("right")

# %% [markdown]
# ## 3. Off by one
#
# The most natural mistake in such code is an inclusive sum where an exclusive one was meant: every list begins where its expert
# *ends*. Here it is in a kernel that is right in everything else. It takes the whole list in one program, which is a fine first
# version. The line that adds the offset is handed in, so that you can write it in a moment.


# %%
@triton.jit
def pack_kernel(EXPERTS, ORDER, PLACES, OFFSETS, n, n_experts, capacity, PLACE: tl.constexpr, A: tl.constexpr, E: tl.constexpr):
    a, cols = tl.arange(0, A), tl.arange(0, E)
    expert = tl.load(EXPERTS + a, mask=a < n, other=-1)
    hot = ((expert[:, None] == cols[None, :]) & (cols < n_experts)[None, :]).to(tl.int32)  # (A, E)
    load = tl.minimum(tl.sum(hot, axis=0), capacity)
    place, rank = PLACE(hot, load)
    served = (tl.sum(hot, axis=1) == 1) & (rank < capacity)
    tl.store(PLACES + a, tl.where(served, place, -1), mask=a < n)
    tl.store(ORDER + place, a.to(tl.int32), mask=served & (place < n))
    tl.store(OFFSETS + 1 + cols, tl.cumsum(load, axis=0), mask=cols < n_experts)
    tl.store(OFFSETS, 0)


@triton.jit
def inclusive(hot, load):
    rank = tl.sum(hot * (tl.cumsum(hot, axis=0) - 1), axis=1)
    end = tl.cumsum(load, axis=0)  # one expert too far
    return rank + tl.sum(hot * end[None, :], axis=1), rank


def pack_around(place):
    """The kernel around a function, with the signature of the reference."""

    def pack(experts, n_experts, capacity):
        n, width = experts.numel(), max(16, triton.next_power_of_2(n_experts))
        order = torch.full((n,), -1, dtype=torch.int32)
        places, offsets = torch.empty(experts.shape, dtype=torch.int32), torch.empty(n_experts + 1, dtype=torch.int32)
        limit = max(n, 1) if capacity is None else capacity
        pack_kernel[(1,)](experts.to(torch.int32).contiguous(), order, places, offsets, n, n_experts, limit, PLACE=place, A=max(16, triton.next_power_of_2(n)), E=width)
        return order, places, offsets

    return pack


def outcome_of(place, examples=20, properties=("reference",)):
    """What `compare` finds about the packing around a function."""
    subject = Subject({"pack": pack_around(place)}, "cpu", "interpreter", ours=False, differentiable=False)
    return subject, compare.compare("experts", subject, examples=examples, number=0, properties=list(properties), dtypes=["float32"])


buggy, outcomes = outcome_of(inclusive, properties=("reference", "conservation"))
for outcome in outcomes:
    print(f"{outcome.property:13} {'holds' if outcome.passed else 'fails'}")
smallest = outcomes[0].problem
print("smallest case:", smallest)

# %% [markdown]
# The smallest case that `compare` finds is one token and one expert: already there the only row is written behind the end of
# the buffer. A case with a few experts shows the mechanism. Every list has moved by its own expert's load: the order within it is
# right, the first rows are nobody's, two lists claim the same row, and the last list falls off the end.

# %%
shown = np.array([[0], [2], [1], [0], [2], [1], [0], [2]])
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1, 3])
for axis, chosen, n_experts, title in ((axes[0], smallest.constants["experts"], smallest.parameters["n_experts"], "smallest failing case"), (axes[1], shown, 3, "eight tokens, three experts")):
    wrong = [t.numpy() for t in buggy.functions["pack"](torch.from_numpy(chosen), n_experts, None)]
    right = reference.pack(chosen, n_experts, None)
    rows, owner = chosen.size, chosen.reshape(-1)
    for y, found, label in ((2, right[1].reshape(-1), "right"), (0, wrong[1].reshape(-1), "off by one")):
        for place in np.unique(found):
            here = np.flatnonzero(found == place)
            for part, a in enumerate(here):
                width = 0.9 / len(here)
                axis.add_patch(Rectangle((place + part * width, y), width, 0.8, color=COLOURS[owner[a]], alpha=1.0 if place < rows else 0.45))
                axis.text(place + (part + 0.5) * width, y + 0.4, f"{a}", ha="center", va="center", color="white", fontsize=10)
        for x in range(rows):
            axis.add_patch(Rectangle((x, y), 0.9, 0.8, fill=False, edgecolor="black", linewidth=1))
        axis.text(-0.3, y + 0.4, label, ha="right", va="center")
    axis.axvline(rows - 0.05, color=VERMILION, linestyle="--")
    axis.text(rows + 0.05, 3.1, "end of the buffer", color=VERMILION, fontsize=9)
    axis.set(xlim=(-2.2 if rows == 1 else -1.6, max(int(wrong[1].max()) + 1.2, rows + 2.5)), ylim=(-0.4, 3.5), title=title)
    axis.axis("off")
plt.show()

# %% [markdown]
# ### Exercise 2: write the kernel's line; `compare` tells
#
# `hot` is the table of zeros and ones (A, E), `load` the number of rows each expert gets. Return the place of every assignment
# and its rank within its expert, both (A,). In a file of your own it is
# `python -m kernels compare experts --impl my_file.py:pack`.


# %%
@triton.jit
def my_place(hot, load):
    """Place and rank of every assignment."""
    ### BEGIN SOLUTION
    rank = tl.sum(hot * (tl.cumsum(hot, axis=0) - 1), axis=1)
    offset = tl.cumsum(load, axis=0) - load
    return rank + tl.sum(hot * offset[None, :], axis=1), rank
    ### END SOLUTION


# %% tags=["check"]
# Exercise 2: write it
_, outcomes = outcome_of(my_place, properties=("reference", "conservation", "stable"))
assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
print("right: ties of load, empty experts, capacities and padding tokens that were drawn")

# %% [markdown]
# ## 4. Products of unequal size
#
# A program of the grouped product has a tile of rows **of one expert** and a tile of columns. An expert with 17 rows and tiles of
# 16 needs two tiles, and the second is nearly empty: its 15 other rows are computed for nobody. Padding every expert to the
# largest load (`moe-pad`), as one batched product needs it, is worse. Here for two hundred assignments whose popularity falls
# like one over rank:

# %%
popularity = 1 / np.arange(1, 7)
loads_shown = rng.multinomial(200, popularity / popularity.sum())
block = 16
listed = launch.tiles(torch.from_numpy(np.concatenate([[0], np.cumsum(loads_shown)]).astype(np.int32)), 200, block).numpy()
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[2, 1])
for tile, (expert, first, end) in enumerate(listed.T):
    if first < end:
        used = min(end - first, block)
        for column in range(3):
            axes[0].add_patch(Rectangle((tile, column), 0.92, 0.92, facecolor="white", edgecolor="grey", hatch="////", linewidth=0.5))
            axes[0].add_patch(Rectangle((tile, column), 0.92 * used / block, 0.92, color=COLOURS[expert]))
        axes[0].text(tile + 0.46, 3.1, used, ha="center", fontsize=9)
used_tiles = traffic.tiles_of(loads_shown.tolist(), block)
axes[0].set(xlim=(0, used_tiles), ylim=(0, 3.5), yticks=[0.5, 1.5, 2.5], yticklabels=["0", "1", "2"], ylabel="tile of columns", xlabel=f"tile of {block} rows (numbers: rows in use)", title="Every program of a grouped product; hatched: for nobody")
axes[0].grid(visible=False)
waste = {"grouped,\ntiles of 16": traffic.padding_waste(loads_shown.tolist(), block), "grouped,\ntiles of 64": traffic.padding_waste(loads_shown.tolist(), 64), "batched,\nall padded": 1 - 200 / (6 * loads_shown.max())}
axes[1].bar(list(waste), list(waste.values()), color=[GREEN, BLUE, VERMILION])
axes[1].set(ylabel="share of rows for nobody", title="Waste", ylim=(0, 0.8))
plt.show()
print("loads:", loads_shown.tolist(), " waste:", {name.replace("\n", " "): f"{share:.2f}" for name, share in waste.items()})

# %% [markdown]
# **How much waste is to be expected?** If a load's remainder were equally likely to be anything, an expert would lose half a tile
# on average: $\mathrm{waste}\approx\frac{Em/2}{A+Em/2}$ with $m$ rows a tile. Say before running: for 128 experts and 8192
# tokens with 8 choices, is that a few per cent or a few dozen? And is a skewed routing, with many small experts, worse, and
# by how much? The formula knows no skew.

# %%
E_big, A_big = 128, 8192 * 8
popular = {"even": np.ones(E_big), "one over rank": 1 / np.arange(1, E_big + 1)}
heights = [16, 32, 64, 128, 256]
figure, axis = plt.subplots(figsize=(7.4, 3.4))
for (name, weights), colour in zip(popular.items(), (BLUE, VERMILION)):
    drawn = [rng.multinomial(A_big, weights / weights.sum()).tolist() for _ in range(40)]
    measured = [np.mean([traffic.padding_waste(d, m) for d in drawn]) for m in heights]
    axis.plot(heights, measured, "o-", color=colour, label=name)
    print(f"{name:14}", " ".join(f"{m}: {share:.3f}" for m, share in zip(heights, measured)))
predicted = [E_big * m / 2 / (A_big + E_big * m / 2) for m in heights]
axis.plot(heights, predicted, "k--", label="half a tile an expert")
axis.set(xscale="log", xticks=heights, xticklabels=heights, xlabel="rows of a tile", ylabel="share of rows for nobody", title="Padding: 65,536 assignments, 128 experts")
axis.minorticks_off()
axis.legend()
plt.show()
print(f"{'predicted':14}", " ".join(f"{m}: {share:.3f}" for m, share in zip(heights, predicted)))

# %% [markdown]
# The rule holds for both: a remainder does not care how popular its expert is, as long as loads are longer than a tile. (Where
# they are not, an expert without tokens wastes nothing, so skew even helps a little.) It is the *number of experts* that costs,
# and the height of a tile: at 128 rows already a tenth. So the kernels take tiles of 128 rows where an expert has 256 or more
# on average and 64 below (`config.py`), and nothing pads to a capacity.
#
# ### In which order?
#
# 132 programs run at a time, and what they load comes through one shared cache. Two programs of one row tile share rows of X, two
# of one column tile *and one expert* share a piece of W. Which order of programs shares most? Count the distinct bytes that a wave
# of 132 programs loads, in tiles 128 rows high and 256 columns wide, for eight of 128 small experts (2048 rows and 1536 columns
# each) and for eight large ones (8192 rows, 28,672 columns).

# %%
def order_of(group, rows, cols):
    """(row tile, column tile) of every program, `group` row tiles at a time over all columns."""
    found = []
    for start in range(0, rows, group):
        found += [(row, col) for col in range(cols) for row in range(start, min(start + group, rows))]
    return found


def megabytes_a_wave(programs, rows_an_expert, d_model):
    """Distinct bytes of X and of the weights, in 16-bit numbers, that 132 programs load."""
    waves = [programs[i : i + 132] for i in range(0, len(programs), 132)]
    loaded = [128 * len({r for r, _ in w}) + 256 * len({(r // rows_an_expert, c) for r, c in w}) for w in waves]
    return 2 * d_model * np.mean(loaded) / 1e6


figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharey="row")
for row_of_axes, (name, rows_an_expert, cols, d_model) in zip(axes, (("128 small experts", 16, 6, 2048), ("8 large experts", 64, 112, 4096))):
    rows = 8 * rows_an_expert
    for axis, group in zip(row_of_axes, (1, 8, rows)):
        programs = order_of(group, rows, cols)
        megabytes = megabytes_a_wave(programs, rows_an_expert, d_model)
        picture = np.full((cols, rows), np.nan)
        for number, (row, col) in enumerate(programs):
            picture[col, row] = number // 132 % 10
        axis.imshow(picture, aspect="auto", cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
        axis.set(xlabel=f"row tile ({rows_an_expert} an expert)", title=f"{name}, {group} at a time:\n{megabytes:.0f} MB a wave")
        axis.grid(visible=False)
        print(f"{name}, {group:3} row tiles at a time: {megabytes:.1f} MB a wave of 132 programs")
    row_of_axes[0].set_ylabel("tile of columns")
plt.show()

# %% [markdown]
# Column by column over all experts is worst for small experts: then neighbours share neither rows nor an expert. One row tile at
# a time is fine for them, because a wave covers whole experts either way, and bad for large ones, whose row of columns is as long
# as a wave: nobody shares a piece of W. Eight at a time is good in both, and is what the kernels take (`config.py`).
#
# ## 5. Capacity: who is turned away
#
# With a limit of $C=\lceil c\,kN/E\rceil$ tokens an expert, the late ones add nothing (`moe-drop`). In the kernel that is one
# comparison, because the rank within the expert is at hand: `rank < capacity`. Which share is dropped depends on how uneven the
# router is. Before looking: at $c=1$, does an *even but random* router drop nothing?

# %%
factors = np.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0])
figure, axes = plt.subplots(1, 2, figsize=(11, 3.5))
tokens, n_experts = 512, 16
for (name, skew), colour in zip({"random, even": 0.0, "one over rank": 1.0}.items(), (BLUE, VERMILION)):
    scores = rng.gumbel(size=(tokens, n_experts)) - skew * np.log(np.arange(1, n_experts + 1))
    chosen = np.argsort(-scores, -1)[:, :2]
    rates = []
    for factor in factors:
        _, where, _ = op.pack(torch.from_numpy(chosen), n_experts, capacity(float(factor), tokens, n_experts, 2))
        rates.append(float((where < 0).float().mean()))
    axes[0].plot(factors, rates, "o-", color=colour, label=name)
    print(f"{name:14}", " ".join(f"{factor:g}: {rate:.3f}" for factor, rate in zip(factors, rates)))
    if skew:
        _, where, _ = op.pack(torch.from_numpy(chosen), n_experts, capacity(1.0, tokens, n_experts, 2))
        lost = (where.numpy() < 0).any(-1).reshape(16, -1).mean(-1)
        axes[1].bar(np.arange(16) * 32 + 16, lost, width=28, color=VERMILION)
axes[0].set(xlabel="capacity factor", ylabel="share of assignments dropped", title="What a capacity drops")
axes[0].legend()
axes[1].set(xlabel="position of the token in the batch", ylabel="share that lost an expert", title="First come, first served (factor 1, skewed)", ylim=(0, 1))
plt.show()

# %% [markdown]
# Even a random router drops at $c=1$: loads scatter around their mean, and what is above it is lost. And the loss falls on the
# *late* tokens: what a token gets depends on who came before it in the batch. Without a capacity it depends on the token alone,
# a property that `compare` checks bit by bit (`token-alone`).
#
# ### Exercise 3: who is served
#
# Return booleans (N, k): true where the assignment is among the first `C` of its expert, in the order of the tokens.


# %%
def my_served(experts, E, C):
    """Who gets a place."""
    ### BEGIN SOLUTION
    places, offsets = my_places(experts, E)
    return places - offsets[experts] < C
    ### END SOLUTION


# %% tags=["check"]
# Exercise 3: who is served
for C in (1, 3, 8, 100):
    chosen = np.argsort(rng.normal(size=(50, 6)), -1)[:, :2]
    wanted = reference.pack(chosen, 6, C)[1] >= 0
    assert np.array_equal(my_served(chosen, 6, C), wanted), f"another choice with C = {C}"
print("right")

# %% [markdown]
# ## 6. Collecting, and the gradient
#
# The obvious way to combine is for every row to *add* itself to its token, and since the $k$ rows of a token lie in different
# programs that takes atomic additions, in the order in which programs happen to finish. Addition of floats depends on the order.
# How often? Eight terms, added in float32 in a random order, twice:

# %%
terms = rng.normal(size=(8, 20_000)).astype(np.float32)


def added(order):
    total = np.zeros(terms.shape[1], np.float32)
    for term in terms[order]:
        total += term
    return total


fixed = added(np.arange(8))
different = np.mean([np.mean(added(rng.permutation(8)) != fixed) for _ in range(20)])
print(f"elements whose last bits depend on the order: about {round(100 * different, -1):.0f} %")

# %% [markdown]
# So our kernel turns it round. A token knows where its rows lie (`places`), reads them, and sums in the order of its choices.
# Nobody writes where somebody else writes; no atomics, the same bits every time.

# %%
print(inspect.getsource(kernel_combine._combine_kernel.fn))

# %% [markdown]
# Going back, $\bar Y_j=g_j\bar Z_{\pi(j)}$ and the gate's gradient is $\bar g_j=\langle\bar Z_{\pi(j)},Y_j\rangle$. It seems that
# $Y$, as large as $k$ copies of the layer's input, has to be kept. It need not be. With $Y_j=A_jW^\top$,
#
# $$\bar g_j=\langle\bar Z_{\pi(j)},A_jW^\top\rangle=\langle\bar Z_{\pi(j)}W,\ A_j\rangle=\langle U_j,A_j\rangle,$$
#
# and $U_j=\bar Z_{\pi(j)}W$ is needed anyway, for $\bar A_j=g_jU_j$.
#
# ### Exercise 4: the gates' gradient
#
# From `dz` (N, d), one expert's `w` (d, f), activations `a` (J, f) of its rows and their tokens `pi` (J,), return
# $\bar g$ (J,) without computing $Y$.


# %%
def my_gate_gradient(dz, w, a, pi):
    """One number for every row."""
    ### BEGIN SOLUTION
    return ((dz[pi] @ w) * a).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
# Exercise 4: the gates' gradient
dz, w, a, pi = rng.normal(size=(9, 4)), rng.normal(size=(4, 6)), rng.normal(size=(5, 6)), np.array([0, 2, 3, 7, 8])
assert np.allclose(my_gate_gradient(dz, w, a, pi), (dz[pi] * (a @ w.T)).sum(-1)), "it has to be the scalar product of dz and Y"
print("right")

# %% [markdown]
# The whole layer, three ways: the equation as written, its derivation checked against finite differences, and the kernels
# against the equation. An expert without a token has a gradient of exactly zero, not of something small.

# %%
N, E, k, d, f = 10, 4, 2, 6, 5
chosen = np.argsort(-(rng.normal(size=(N, E)) + np.array([1, 0, 0, -50])), -1)[:, :k]  # nobody wants the last one
values = {"x": rng.normal(size=(N, d)), "gates": rng.uniform(0.1, 1, size=(N, k)), "w_in": rng.normal(size=(E, 2 * f, d)), "w_down": rng.normal(size=(E, d, f))}
routed = reference.chosen(np.zeros((N, E), bool), chosen)
check = gradcheck(lambda x, w_in, w_down: written.mixture_of_experts(x, Tensor(routed / k), routed, w_in, w_down).sum(), [values["x"], values["w_in"], values["w_down"]])
print("finite differences agree:", check.passed)
tensors = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in values.values()]
y = op.mixture_of_experts(*tensors, torch.from_numpy(chosen))
gradients = torch.autograd.grad(y.sum(), tensors)
exact = [Tensor(v, requires_grad=True) for v in values.values()]
truth = reference.mixture_of_experts(*exact, chosen, None)
truth.sum().backward()
for name, ours, tensor in zip(values, gradients, exact):
    print(f"gradient of {name:6}: kernel and equation within 1e-4: {np.abs(ours.numpy() - tensor.grad.numpy()).max() < 1e-4}")
print("gradient of the idle expert's weights:", float(gradients[2][3].abs().max()), float(gradients[3][3].abs().max()))

# %% [markdown]
# ## 7. What it costs
#
# Without a GPU there is no time, but there are bytes and operations. For 32,768 tokens, 128 experts, 8 choices, width 2048
# and $d_{\rm ff}=768$ in 16 bits, on a machine that copies 4.3 TB/s and multiplies at 788 TFLOP/s, the least times are:

# %%
N, k, E, d, f, C, M = 32_768, 8, 128, 2048, 768, 4.3e12, 788e12
least = {
    "route": traffic.route_bytes(N, k, E, 2) / C, "pack": traffic.pack_bytes(N, k, E) / C,
    "up (value, gate)": traffic.product_flops(N * k, d, 2 * f) / M, "down": traffic.product_flops(N * k, f, d) / M,
    "write and read Y": 2 * N * k * d * 2 / C,
    "combine, the rest": (traffic.combine_bytes(N, k, d, 2) - N * k * d * 2) / C,
}
gathered = 2 * N * k * d * 2 / C  # a packed copy of X, written and read, that the fused gather avoids
figure, axis = plt.subplots(figsize=(8.4, 2.9))
left = 0.0
for (name, seconds), colour in zip(least.items(), (SKY, ORANGE, BLUE, GREEN, VERMILION, PURPLE)):
    axis.barh(0, 1e3 * seconds, left=1e3 * left, color=colour, label=f"{name}: {1e3 * seconds:.2f} ms")
    left += seconds
axis.barh(1, 1e3 * gathered, color="grey", label=f"avoided: a packed copy of X: {1e3 * gathered:.2f} ms")
axis.set(yticks=[0, 1], yticklabels=["the layer", "avoided"], xlabel="least time in ms (not measured: bytes and operations at the ceilings)", xlim=(0, 7))
axis.legend(loc="center right", fontsize=9)
plt.show()
print(f"beside the products: {1 - (least['up (value, gate)'] + least['down']) / left:.0%} of the least time; kept for the backward: {traffic.kept_bytes(N, k, f, 2) / 1e6:.0f} MB")

# %% [markdown]
# The bookkeeping proper, routing and packing, is nothing. What costs beside the products is $Y$: written once, read once. That
# is the price of a sum without atomics, and a reason to look at the weights' order of magnitude before optimising the sort.
#
# What the compiler makes of these kernels on four architectures is shown by `python -m kernels compile experts` (lesson 29
# reads such a table), and `python -m kernels bench experts` times them beside `torch._grouped_mm`, a loop over experts and
# Liger where there is a GPU.
