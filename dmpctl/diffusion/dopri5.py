"""Dormand and Prince's pair of orders 5 and 4 (1980), each image with steps of its own, so that it depends on no other one.

Steps are controlled as in Hairer, Nørsett and Wanner, Solving ODEs I, II.4, and in scipy's RK45.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dmpctl.errors import NumericalError

ATOL, RTOL = 1e-6, 1e-3  # of published SiT
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the solution of order 5
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # its difference from that of order 4
Slope = Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], time [B] in 0..1 -> dx/dtime


def solve(slope: Slope, x: Tensor, most: int) -> Iterator[Tensor]:
    """The states after each step from time 0 to 1; NumericalError where an image needs more than `most` steps."""
    time, k = x.new_zeros(len(x), dtype=torch.float64), [slope(x, x.new_zeros(len(x)))]
    size, failed = _first_size(slope, x, k[0]), torch.zeros_like(time, dtype=torch.bool)
    for _ in range(most):
        size = torch.minimum(size, 1 - time)
        for node, weights in zip(NODES[1:], STAGES, strict=True):
            new = x + _wide(size) * sum(w * part for w, part in zip(weights, k, strict=True) if w)
            k.append(slope(new, (time + node * size).float()))
        off = _wide(size) * sum(w * part for w, part in zip(ERROR, k, strict=True) if w)
        error = _rms(off / (ATOL + RTOL * torch.maximum(x.abs(), new.abs())))
        good, better = error < 1, 0.9 * error.clamp(min=1e-12) ** -0.2
        x, k = torch.where(_wide(good), new, x), [torch.where(_wide(good), k[-1], k[0])]
        time = torch.where(good, time + size, time)
        size = size * torch.where(good, better.clamp(max=10), better.nan_to_num(0.2).clamp(min=0.2))
        size = torch.where(failed & good & (better > 1), size / better.clamp(1, 10), size)  # no growth right after a failure
        failed = ~good
        yield x
        if bool((time >= 1 - 1e-12).all()):
            return
    raise NumericalError(f"dopri5 is not at its end after {most} steps", "allow more: --steps 1000, or take --sampler heun")


def _first_size(slope: Slope, x: Tensor, begin: Tensor) -> Tensor:
    scale = ATOL + RTOL * x.abs()
    far, steep = _rms(x / scale), _rms(begin / scale)
    guess = torch.where((far < 1e-5) | (steep < 1e-5), 1e-6, 0.01 * far / steep).clamp(max=1)
    bend = _rms((slope(x + _wide(guess) * begin, guess.float()) - begin) / scale) / guess
    largest = torch.maximum(steep, bend)
    size = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** 0.2)
    return torch.minimum(100 * guess, size).clamp(max=1)


def _rms(x: Tensor) -> Tensor:
    """Root of the mean square of each image, float64 [B]."""
    return x.double().square().flatten(1).mean(1).sqrt()


def _wide(each: Tensor) -> Tensor:
    """A number or truth of each image [B] as [B, 1, 1, 1]; numbers in float32."""
    return (each.float() if each.is_floating_point() else each).view(-1, 1, 1, 1)
