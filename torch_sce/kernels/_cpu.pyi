"""The extension that cpu.c is compiled to."""

def count_labels(y: int, counted: int, n: int, classes: int, /) -> int: ...
def prefer_huge_pages(address: int, bytes: int) -> None: ...
def run(
    backward: bool,
    threads: int,
    plan: bytes,
    addresses: tuple[int, ...],
    g_step: int,
    clip: tuple[float, float] | None,
    smoothing: float,
    divisor: float,
    /,
) -> int: ...
def set_threads(torch_parallel_for: int, gomp_parallel: int, /) -> None: ...
