"""``python -m insightface_kprpe.cli``, for torchrun."""

from . import main

main()
