"""Gradients without autograd: central differences of a float64 function along random directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

STEP = 1e-6


def slope(function: Callable[[Mapping], float], at: Mapping, directions: Mapping) -> float:
    """Derivative of ``function(inputs)`` where the named inputs move along their directions, all at once."""
    moved = [
        function({**at, **{name: at[name] + sign * STEP * move for name, move in directions.items()}})
        for sign in (1, -1)
    ]
    return (moved[0] - moved[1]) / (2 * STEP)


def assert_gradients(function: Callable[[Mapping], float], at: Mapping, gradients: Mapping, tolerance: float) -> None:
    """Every gradient, one by one, is the slope of the function along a random direction of its input's size.

    Args:
        function: inputs by name -> a number.
        at: inputs by name, float64 arrays.
        gradients: by the same names, as autograd found them.
        tolerance: largest error, relative to the length of the gradient.
    """
    rng = np.random.default_rng(0)
    for name, gradient in gradients.items():
        size = np.sqrt(np.mean(at[name] ** 2))
        direction = size * rng.normal(size=gradient.shape)
        expected, found = slope(function, at, {name: direction}), float((gradient * direction).sum())
        allowed = tolerance * size * np.linalg.norm(gradient) + 1e-9
        assert abs(found - expected) <= allowed, f"{name}: {found}, expected {expected} +- {allowed}"
