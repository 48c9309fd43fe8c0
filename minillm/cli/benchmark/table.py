"""The families that `minillm bench` knows. A new one: a module with ``FAMILY``, and its line here."""

from minillm.cli.benchmark import attention, decoding, experts, smollm2, threads, training

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (training, attention, decoding, experts, smollm2, threads)}
