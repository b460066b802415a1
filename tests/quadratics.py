"""Random quadratics whose directions lie just below and just above an edge, and what an update rule makes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BELOW = torch.tensor([0.05, 0.3, 0.8, 0.999], dtype=torch.float64)  # shares of the edge that must be stable
ABOVE = torch.tensor([1.001], dtype=torch.float64)  # farther above, a direction soon outgrows the slope
SIZE = 1 + len(BELOW) + len(ABOVE)
STEPS, WINDOW = 120, 40  # a window rather than a step: two roots near −1 beat


class Quadratic:
    """½ wᵀ H w + sᵀ w in random coordinates, H s = 0: along s the gradient stays what it is, and with it its norm.

    Args:
        eigenvalues: of D^½ (H + δ) D^½, shape (SIZE,). The first belongs to s: 0, if there is to be a slope.
        slope: ‖s‖.
        scale: the diagonal of D, shape (SIZE,).
        shift: δ.
    """

    def __init__(
        self, eigenvalues: Tensor, slope: float = 0.0, scale: Tensor | None = None, shift: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.basis = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)).Q
        self.root = torch.ones(SIZE, dtype=torch.float64) if scale is None else scale.sqrt()
        self.hessian = (self.basis * eigenvalues) @ self.basis.T / self.root / self.root[:, None]
        self.hessian -= shift * torch.eye(SIZE, dtype=torch.float64)
        self.slope = slope * self.basis[:, 0]
        # So small that ‖g‖ is the slope's.
        signs = torch.randint(2, (SIZE,), generator=generator) * 2 - 1
        self.start = self.root * (self.basis @ (1e-9 * signs.double()))

    def gradient(self, params: Tensor) -> Tensor:
        return self.hessian @ params + self.slope

    def grows(self, step: Callable[[], object], params: Callable[[], Tensor], steps: int = STEPS) -> Tensor:
        """Which directions grow in the long run, shape (SIZE − 1,), when ``step`` is called again and again."""
        path = []
        for _ in range(steps):
            step()
            path.append(self.basis[:, 1:].T @ (params() / self.root))
        early, late = (torch.stack(part).abs().amax(0) for part in (path[WINDOW : 2 * WINDOW], path[-WINDOW:]))
        return late > early.clamp(min=5e-11)  # what has died out is rounding


def around(edge: float) -> Tensor:
    """Eigenvalues below and above an edge, and one 0."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), edge * torch.cat([BELOW, ABOVE])])


def expected() -> Tensor:
    return torch.tensor([False] * len(BELOW) + [True] * len(ABOVE))


def holder(*sizes: int) -> list[torch.nn.Parameter]:
    """Parameters of the given sizes, of float64."""
    return [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]


def flat(params: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([p.detach() for p in params])


def fill(params: list[torch.nn.Parameter], values: Tensor, gradients: bool = False) -> None:
    for p, part in zip(params, values.split([p.numel() for p in params]), strict=True):
        if gradients:
            p.grad = part.clone()
        else:
            p.data.copy_(part)


def stepping(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], gradient: Callable[[Tensor], Tensor]
) -> Callable[[], object]:
    """A function that steps an optimizer down a gradient."""

    def closure() -> float:
        fill(params, gradient(flat(params)), gradients=True)
        return 0.0

    return lambda: optimizer.step(closure)
