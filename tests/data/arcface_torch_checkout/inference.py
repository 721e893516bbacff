import argparse

import cv2
import numpy as np
import torch
from backbones import get_model

parser = argparse.ArgumentParser()
for option in ("--network", "--weight", "--img"):
    parser.add_argument(option, type=str)
args = parser.parse_args()

net = get_model(args.network, fp16=False)
net.load_state_dict(torch.load(args.weight))
net.eval()
face = np.transpose(cv2.cvtColor(cv2.imread(args.img), cv2.COLOR_BGR2RGB), (2, 0, 1))
with torch.no_grad():
    print(net(torch.from_numpy(face).unsqueeze(0).float().div_(255).sub_(0.5).div_(0.5)).numpy().shape)
