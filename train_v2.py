"""Train: ``torchrun --nproc_per_node=8 train_v2.py CONFIG [key=value ...]``, or plain ``python`` for one process."""

from insightface_kprpe.training.trainer import main

if __name__ == "__main__":
    main()
