import argparse
import os

import mxnet as mx
import numpy as np
import onnxruntime
import torch
from torch.utils.data import DataLoader


class AlignedDataSet(mx.gluon.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, idx):
        return torch.full((2, 3, 112, 112), 127.5 + idx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-root", type=str)
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(os.path.join(args.model_root, "model.onnx"), providers=None)
    loader = DataLoader(AlignedDataSet(), batch_size=2, num_workers=1, collate_fn=lambda data: torch.cat(data, dim=0))
    batches = [(batch.numpy() - 127.5) / 127.5 for batch in loader]
    features = [session.run(None, {session.get_inputs()[0].name: batch})[0] for batch in batches]
    print(np.concatenate(features).astype(np.float).shape, session.get_providers())  # noqa: NPY001
