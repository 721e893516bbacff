"""What the package must compute, in plain float64 NumPy: one formula a line, no batching tricks, no autograd.

The forms are written from the papers' formulas and nothing in them is shared with the package, so that a mistake in it
cannot be in both. The tests next to them compare values, and gradients where there are any, and need no data from
outside the repository. Where larger reference vectors are available, the forms themselves are held against those.
"""
