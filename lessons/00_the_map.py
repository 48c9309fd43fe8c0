# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 00 · The map, and how to use this course
#
# This course builds a language model and its training from the chain rule up: tensors and gradients, a transformer,
# pretraining, and learning from a reward. Nothing is borrowed for the parts that the course is about. Everything
# borrowed elsewhere (files, plots, progress bars) comes from a well-kept library.
#
# It runs on a laptop, without a network and without a GPU.
#
# ## An equation stands up to three times
#
# | form | where | what it is for |
# |---|---|---|
# | **as written** | `minillm/functional/` | the formula, composed of primitives; its gradient comes from the engine |
# | **as derived** | `minillm/fused/` | one operation with a gradient worked out by hand; fast in NumPy |
# | **as fast** | `kernels/` | a GPU kernel in Triton, forward and backward |
#
# The three are held against each other, in value and in gradient, on thousands of random inputs. Here are two of them
# for one equation, `rmsnorm`. First the formula, then a version that is several times faster and shows its derivation:

# %%
import inspect

import matplotlib.pyplot as plt
import numpy as np

import minillm.functional.norms as written
import minillm.fused.norms as derived
from minillm.autograd import Tensor, grad
from minillm.plotting import BLUE, GREEN, ORANGE, SKY, use_style

use_style()
print(inspect.getsource(written.rms_norm).split('"""')[2].strip())

# %%
print(inspect.getdoc(derived.rms_norm).split("Equation:")[0].strip())

# %% [markdown]
# Do they agree? Not to the last bit, since they add in another order; but to rounding, and so do their gradients.

# %%
rng = np.random.default_rng(0)
x, g = (Tensor(rng.normal(size=s), requires_grad=True) for s in ((4, 64), (64,)))
cotangent = rng.normal(size=(4, 64))
values, gradients = [], []
for form in (written.rms_norm, derived.rms_norm):
    y = form(x, g)
    values.append(y.data)
    gradients.append(np.concatenate([d.data.ravel() for d in grad(y, [x, g], cotangent)]))
print("largest difference in value below 1e-14:   ", np.abs(values[0] - values[1]).max() < 1e-14)
print("largest difference in gradient below 1e-13:", np.abs(gradients[0] - gradients[1]).max() < 1e-13)

# %% [markdown]
# ## The folders are the table of contents
#
# A module imports only from floors below its own, so the folders can be read from bottom to top like a book.

# %%
floors = [
    ("autograd · data", "tensors, gradients, text", BLUE),
    ("functional · optim", "the equations as written; optimisers", BLUE),
    ("fused", "the equations as derived", BLUE),
    ("nn", "layers with parameters and caches", GREEN),
    ("models", "whole transformers", GREEN),
    ("decoding", "from logits to text", GREEN),
    ("training", "steps, loops, checkpoints", ORANGE),
    ("alignment", "learning from a reward", ORANGE),
    ("cli", "the minillm command", SKY),
]
figure, axes = plt.subplots(figsize=(8, 4.2))
for i, (name, what, colour) in enumerate(floors):
    axes.barh(i, 1, height=0.86, color=colour)
    text = "black" if colour in (SKY, ORANGE) else "white"
    axes.text(0.02, i, f"{i + 1}   {name}", va="center", color=text, fontsize=12, fontweight="bold")
    axes.text(0.98, i, what, va="center", ha="right", color=text, fontsize=11)
axes.set(xlim=(0, 1), title="minillm: each floor stands on those below")
axes.axis("off")
plt.show()

# %% [markdown]
# ## Finding your way
#
# Every equation has an id, such as `rmsnorm`. The index knows where it is derived, coded, tested and taught:
#
# ```
# minillm equations              what there is, section by section
# minillm equations rmsnorm      one equation: formula, source, code, kernel, tests, lessons
# minillm gradcheck rms_norm     its gradient against finite differences, now
# python -m kernels compare norm the kernel, ours or yours, against the reference
# ```
#
# ## How a lesson works
#
# Read, run, and stop at the exercises. An exercise is a cell to be completed; the cell below it checks your answer and
# says what is wrong. Students' copies without solutions are made by `minillm lessons student`, and
# `minillm lessons grade FILE` says which checks pass.
#
# ### Exercise 1: a first answer
#
# A uniform guess over $V$ words has a perplexity, $\exp(\text{mean negative log-likelihood})$, of how much?


# %%
def perplexity_of_a_uniform_guess(V):
    """The perplexity of a model that gives each of V words the same probability."""
    ### BEGIN SOLUTION
    return np.exp(-np.log(1 / V))
    ### END SOLUTION


# %% tags=["check"]
# Exercise 1: a first answer
for V in (2, 10, 50_000):
    assert abs(perplexity_of_a_uniform_guess(V) / V - 1) < 1e-9, f"for V = {V}, think of a die with V faces"
print("right")

# %% [markdown]
# ## The lessons
#
# | | | you need |
# |---|---|---|
# | 00 | this map | |
# | 01 | autograd from scratch | the chain rule |
# | 02 | one training step, every equation of it | 01 |
# | 03 | RMSNorm three times: written, derived, fast | 01 |
# | 22 | GRPO in its first form: a reward instead of targets | 02 |
#
# The numbers between are being written; the numbering is that of the whole course.
#
# ## What to distrust
#
# Formulas in lecture notes and blog posts slip: a sign, an index, a factor. Where this course's sources do, the corrected
# form is implemented, the docstring says so under *Differs*, and a test shows the difference in numbers. Hold our code to
# the same standard: change a sign in `minillm/fused/`, run `minillm gradcheck`, and see that it is found.
