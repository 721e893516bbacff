import argparse
import os

import numpy as np
import onnx
import torch
from backbones import get_model

parser = argparse.ArgumentParser()
parser.add_argument("input", type=str)
parser.add_argument("--output", type=str)
parser.add_argument("--network", type=str)
args = parser.parse_args()

net = get_model(args.network, dropout=0.0, fp16=False, num_features=512)
net.load_state_dict(torch.load(os.path.join(args.input, "model.pt")), strict=True)
net.eval()
pixels = np.full((1, 3, 112, 112), 255, np.int32).astype(np.float)  # noqa: NPY001
img = torch.from_numpy(pixels / 127.5 - 1).float()
torch.onnx.export(
    net, img, args.output, input_names=["data"], keep_initializers_as_inputs=False, verbose=False, opset_version=11
)
model = onnx.load(args.output)
model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "None"
onnx.save(model, args.output)
