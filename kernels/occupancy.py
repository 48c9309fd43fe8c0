"""How many programs fit on one multiprocessor at a time: arithmetic on registers, threads and shared memory.

While one program waits for memory another can compute, if there is another. What limits it is the scarcest of
three: the register file, the threads that are kept track of, the shared memory.
"""

from dataclasses import dataclass

REGISTER_LIMIT = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}  # that one thread can name


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor (a compute unit, in AMD's words) has, and in what portions it is handed out."""

    registers: int
    register_portion: int  # registers of a thread are rounded up to a multiple of this
    threads: int
    programs: int
    shared: int
    shared_reserved: int  # taken by the system for each program
    warp: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65_536, 8, 2_048, 32, 167_936, 1_024, 32),
    "sm_90": Multiprocessor(65_536, 8, 2_048, 32, 233_472, 1_024, 32),
    "sm_100": Multiprocessor(65_536, 8, 2_048, 32, 233_472, 1_024, 32),
    "gfx942": Multiprocessor(4 * 512 * 64, 8, 2_048, 32, 65_536, 0, 64),
}


def occupancy(registers: int, threads: int, shared: int, target: str) -> int:
    """Programs that fit on one multiprocessor of the target; 0 where not even one does."""
    machine = MULTIPROCESSORS[target]
    if registers > REGISTER_LIMIT[target]:
        return 0
    rounded = -(-max(registers, 1) // machine.register_portion) * machine.register_portion
    warps = -(-threads // machine.warp)
    return min(
        machine.registers // (rounded * machine.warp) // warps,
        machine.threads // (warps * machine.warp),
        machine.shared // (shared + machine.shared_reserved) if shared + machine.shared_reserved else machine.programs,
        machine.programs,
    )
