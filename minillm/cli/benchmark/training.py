"""The family ``train``: one training step of a decoder, at four sizes."""

from minillm.cli.benchmark import floor, ours, torch_peer
from minillm.cli.benchmark.cases import CASES
from minillm.cli.benchmark.families import Family

SIDES = {"ours": ours.make_step, "torch": torch_peer.make_step, "floor": floor.make_step}
FAMILY = Family("train", "a training step of a decoder", CASES, SIDES)
