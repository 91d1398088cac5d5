"""The extension that cpu.c is compiled to."""

from .cpu import Plan

def prefer_huge_pages(address: int, bytes: int) -> None: ...
def run(
    backward: bool,
    threads: int,
    plan: Plan,
    addresses: tuple[int, ...],
    g_step: int,
    clip: tuple[float, float] | None,
    smoothing: float,
    /,
) -> int: ...
def set_threads(torch_parallel_for: int, gomp_parallel: int, /) -> None: ...
