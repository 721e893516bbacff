import subprocess
import sys

import pytest

import insightface_kprpe as ik


def test_every_public_name_is_there():
    assert set(ik.__all__) <= set(dir(ik))
    for name in ik.__all__:
        assert getattr(ik, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ik.nonsense


@pytest.mark.slow
def test_import_needs_no_host_and_touches_no_device():
    script = (
        "import sys\n"
        "for name in ('insightface', 'tensorboard', 'matplotlib', 'onnx', 'onnxruntime', 'cv2', 'wandb'):\n"
        "    sys.modules[name] = None  # importing it now raises ImportError\n"
        "import insightface_kprpe.backbones, timm, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "net = timm.create_model('insightface_vit_n_kprpe', num_features=8)\n"
        "net(torch.zeros(2, 3, 112, 112), torch.full((2, 5, 2), 0.5))\n"
        "import torchvision.transforms.v2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
