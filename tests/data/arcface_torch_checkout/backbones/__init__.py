import torch


def get_model(name, **kwargs):
    """One network of its own, and no other."""
    if name == "tiny":
        size = kwargs.get("num_features", 512)
        return torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, size), torch.nn.BatchNorm1d(size)
        )
    raise ValueError()
