"""Balanced features: the toy problems, solved into tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..features import gini
from ..toys.balance import (
    at_loss,
    diagonal_flow,
    diagonal_steps,
    linear_steps,
    logistic_weights,
    phantom_weights,
    two_groups,
)

__all__ = ["RHOS", "TOYS", "diagonal", "ginis", "groups", "parts"]

EXAMPLE, START, LOSS = (1.0, 0.5), (0.1, 0.1), 0.1
RHOS = (0.0, 0.05, 0.1, 0.12)
_RATE, _STEPS = 0.01, 4000


def _share(theta: np.ndarray) -> np.ndarray:
    """The share of the margin that the second, hard feature carries."""
    carried = theta * np.array(EXAMPLE)
    return carried[..., 1] / carried.sum(-1)


def diagonal() -> pd.DataFrame:
    """The diagonal net's path by flow and by steps: margin, loss, and the hard feature's share of the margin."""
    frames = []
    for rho in RHOS:
        paths = {
            "flow": diagonal_flow(EXAMPLE, START, rho, np.linspace(0, 6, 6001))[::20],
            "steps": diagonal_steps(EXAMPLE, START, rho, _RATE, _STEPS)[::40],
        }
        for kind, theta in paths.items():
            margin = theta @ np.array(EXAMPLE)
            kept = margin < 4
            columns = {"margin": margin, "loss": np.logaddexp(0, -margin), "share": _share(theta)}
            frames.append(pd.DataFrame(columns)[kept].assign(rho=rho, kind=kind))
    return pd.concat(frames, ignore_index=True)


def parts() -> pd.DataFrame:
    """The hard feature's share at equal loss, by flow and by steps, of SAM and of its parts."""
    rows = []
    for rho in RHOS:
        flow = diagonal_flow(EXAMPLE, START, rho, np.linspace(0, 6, 6001))
        rows.append({"rho": rho, "kind": "flow", "part": "sam", "share": _share(at_loss(flow, EXAMPLE, LOSS))})
        for part in ("plain", "weights", "jacobian", "sam"):
            steps = diagonal_steps(EXAMPLE, START, rho, _RATE, _STEPS, part)
            rows.append({"rho": rho, "kind": "steps", "part": part, "share": _share(at_loss(steps, EXAMPLE, LOSS))})
        if rho:
            one = diagonal_steps(EXAMPLE, START, rho, _RATE, _STEPS, perturbed=("a",))
            rows.append(
                {"rho": rho, "kind": "steps", "part": "one layer", "share": _share(at_loss(one, EXAMPLE, LOSS))}
            )
    return pd.DataFrame(rows).assign(loss=LOSS)


def groups() -> pd.DataFrame:
    """The linear counterexample: by loss the ratio θ_hard/θ_easy, and the Gini of the weights at w and perturbed."""
    z, rows = two_groups(), []
    gram = z @ z.T
    for rho in (0.0, 1.0):
        path = linear_steps(z, rho, 0.05, 4000)
        for loss in [*np.geomspace(0.6, 0.08, 25).tolist(), LOSS]:
            theta = at_loss(path, z, loss)
            margins = z @ theta
            rows.append(
                {
                    "rho": rho,
                    "loss": loss,
                    "ratio": theta[1] / theta[0],
                    "gini": gini(logistic_weights(margins)),
                    "perturbed_gini": gini(phantom_weights(margins, gram, rho or 1.0)),
                }
            )
    return pd.DataFrame(rows).sort_values(["rho", "loss"], ascending=[True, False], ignore_index=True)


def ginis() -> pd.DataFrame:
    """The Gini of two examples' weights at the perturbed point of a linear model, by ρ: margins 1 and 3.

    The examples share the gradient's direction, or are orthogonal.
    """
    kinds = {"shared direction": np.ones((2, 2)), "orthogonal": np.eye(2)}
    rhos = np.linspace(0, 2, 41)
    return pd.DataFrame(
        {"kind": kind, "rho": rho, "gini": gini(phantom_weights([1.0, 3.0], gram, rho))}
        for kind, gram in kinds.items()
        for rho in rhos
    )


TOYS = {"diagonal": diagonal, "parts": parts, "groups": groups, "ginis": ginis}
