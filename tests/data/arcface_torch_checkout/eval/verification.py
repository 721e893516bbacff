import pickle

import mxnet as mx
import numpy as np
import torch
from mxnet import ndarray as nd


def load_bin(path, image_size):
    with open(path, "rb") as file:
        images, answers = pickle.load(file)
    plain, mirrored = [], []
    for data in images:
        image = mx.image.imdecode(data)
        if image.shape[:2] != tuple(image_size):
            image = mx.image.resize_short(image, image_size[0])
        image = nd.transpose(image, axes=(2, 0, 1))
        plain.append(torch.from_numpy(image.asnumpy()).float())
        mirrored.append(torch.from_numpy(mx.ndarray.flip(data=image, axis=2).asnumpy()).float())
    return [torch.stack(plain), torch.stack(mirrored)], answers


@torch.no_grad()
def test(data_set, backbone):
    data_list, issame_list = data_set
    embeddings = sum(backbone(((data / 255) - 0.5) / 0.5).cpu().numpy() for data in data_list)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, np.asarray(issame_list, dtype=np.bool)


if __name__ == "__main__":
    print("verification: nothing to do")
