"""``python -m insightface_kprpe.arcface_torch``, for torchrun."""

from .launcher import main

if __name__ == "__main__":
    main()
