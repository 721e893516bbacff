"""Runs the unmodified scripts of an arcface_torch checkout with this package's parts plugged in.

``insightface-kprpe arcface-torch SCRIPT ...``, or ``torchrun -m insightface_kprpe.arcface_torch SCRIPT ...``: the
script runs in a process that was prepared for it. The checkout is not changed, and no other process is affected.
"""
