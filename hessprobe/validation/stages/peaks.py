"""What the machine can do at most: TFLOP/s of matrix products and GB/s of copies, for the table that plans large runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hessprobe.validation.figures import Figure, measured
from hessprobe.validation.modes import BFLOAT16, matmuls, precisions
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import median_seconds

SIDE = {False: 8192, True: 512}  # of the matrices
BYTES = {False: 2**31, True: 2**26}  # of a copy
ROUNDS = 7


def peaks(bench: Bench) -> Iterator[Figure]:
    """Yields matrix products in every precision, then copies on the device and from and to the host."""
    device, n = bench.device, SIDE[bench.small]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device)
    for precision in precisions(device):
        x = a.bfloat16() if precision == BFLOAT16 else a
        with matmuls(precision):
            seconds = median_seconds({"product": lambda x=x: x @ x}, ROUNDS, device)["product"]
        yield measured(
            f"matrix product of {n:,} x {n:,} in {precision}", 2 * n**3 / seconds / 1e12, "TFLOP/s"
        )
    size = BYTES[bench.small]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies: dict[str, tuple[Callable[[], object], float]] = {
        "on the device (read and written)": (lambda: target.copy_(source), 2)
    }
    if device.type == "cuda":
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
        part = source[: size // 4]
        copies["to the host, pinned"] = (lambda: host.copy_(part), 0.25)
        copies["from the host, pinned"] = (lambda: part.copy_(host), 0.25)
    for name, (call, times) in copies.items():
        seconds = median_seconds({"copy": call}, ROUNDS, device)["copy"]
        yield measured(f"copy {name}", times * size / seconds / 1e9, "GB/s")
