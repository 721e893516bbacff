import argparse

import cv2
import numpy as np
import torch
from backbones import get_model
from scipy import interpolate

parser = argparse.ArgumentParser()
parser.add_argument("--model-prefix", type=str)
parser.add_argument("--image-path", type=str)
parser.add_argument("--network", type=str)
args = parser.parse_args()


class Embedding:
    def __init__(self, prefix):
        weight = torch.load(prefix)
        resnet = get_model(args.network, dropout=0, fp16=False).cuda()
        resnet.load_state_dict(weight)
        self.model = torch.nn.DataParallel(resnet)
        self.model.eval()

    @torch.no_grad()
    def forward_db(self, batch_data):
        imgs = torch.Tensor(batch_data).cuda()
        imgs.div_(255).sub_(0.5).div_(0.5)
        return self.model(imgs).cpu().numpy()


image = cv2.cvtColor(cv2.imread(args.image_path), cv2.COLOR_BGR2RGB).transpose(2, 0, 1)
embeddings = Embedding(args.model_prefix).forward_db(np.stack([image, image[:, :, ::-1]]))
templates = np.array(["1", "2"], dtype=object).astype(np.int)  # noqa: NPY001
threshold = interpolate.interp1d([0.0, 0.0, 1.0], [0.0, 1.0, 2.0], kind="slinear")(0.5)
print(embeddings.shape, templates.tolist(), float(threshold))
