"""Where does building a pack spend its time, and what does the form without keypoints cost, exported again or derived?

    python benchmarks/pack.py [--network vit_s_kprpe] [--precision fp32] [--second-export] [--out pack.json]

A network with random weights and a random DFA become a pack; CPU seconds of this process by step, as the builder names
them. With ``--second-export`` the form without keypoints is also exported by torch, as it would be without the derived
one, and compared with torch in the same batches. One run, no warm-up: a pack is built once. The detector is an
untrained RetinaFace, exported before.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import torch

from insightface_kprpe.backbones import get_model
from insightface_kprpe.deployment import model_pack
from insightface_kprpe.deployment.detector_export import export_detector
from insightface_kprpe.deployment.image_only import write_image_only
from insightface_kprpe.deployment.onnx_export import export_onnx
from insightface_kprpe.dfa import DFA, RetinaFaceNet
from insightface_kprpe.files import write_atomically


class Steps(logging.Handler):
    """CPU seconds between the builder's lines; those that begin with a space end a step."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}
        self.title, self.started = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(" "):
            self.seconds[self.title] = round(time.process_time() - self.started, 1)
            print(f"{self.seconds[self.title]:7.1f} s  {self.title}", flush=True)
        else:
            self.title, self.started = message, time.process_time()


def cpu_seconds(work, *args, **kwargs) -> float:
    """CPU seconds that a call takes."""
    started = time.process_time()
    work(*args, **kwargs)
    return round(time.process_time() - started, 1)


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_s_kprpe")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--second-export", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = get_model(options.network).eval()
    torch.nn.init.normal_(net.keypoint_linear.weight, std=0.1)
    steps = Steps()
    logging.getLogger(model_pack.__name__).addHandler(steps)
    logging.getLogger(model_pack.__name__).setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        torch.save(DFA().state_dict(), scratch / "dfa.pt")
        export_detector(RetinaFaceNet(aggregator=False, image_size=64), scratch / "detector.onnx")
        parts = {"recognition": net, "detector": scratch / "detector.onnx", "aligner": scratch / "dfa.pt"}
        whole = cpu_seconds(model_pack.build, **parts, root=scratch, precision=options.precision)
        result = {"network": options.network, "precision": options.precision, "steps": steps.seconds, "whole": whole}
        print(f"{whole:7.1f} s  the whole pack ({options.network}, {options.precision})")
        if options.second_export:
            two = scratch / "models" / "kprpe" / "keypoints" / "recognition.onnx"
            result["derived"] = cpu_seconds(write_image_only, two, scratch / "derived.onnx")
            result["exported anew"] = cpu_seconds(export_onnx, net, scratch / "anew.onnx", image_only=True)
            print(f"{result['derived']:7.1f} s  the form without keypoints, derived")
            print(f"{result['exported anew']:7.1f} s  the same, exported anew")
    if options.out:
        write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
