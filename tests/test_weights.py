import pickle

import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.state_dict import read_state_dict


def net(**kwargs):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_features": 8, "patch_size": 28}
    return ik.VisionTransformer(**sizes, position="kprpe", **kwargs)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net.", "module.", "_orig_mod.module."])
def test_published_prefixes_are_stripped(prefix):
    source, target = net(), net()
    ik.load_weights(target, {prefix + key: value for key, value in source.state_dict().items()})
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(tmp_path, suffix):
    source, target = net(), net()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    ik.load_weights(target, path)
    assert torch.equal(source.pos_embed, target.pos_embed)


def test_mask_token_may_be_missing_or_left_over():
    with_token, without = net(mask_ratio=0.5), net()
    ik.load_weights(without, with_token.state_dict())
    token = with_token.mask_token.clone()
    ik.load_weights(with_token, without.state_dict())
    assert torch.equal(with_token.mask_token, token)


def test_mismatches_are_listed_and_change_nothing():
    target = net()
    before = target.pos_embed.clone()
    state = net().state_dict()
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 9, 32)
    with pytest.raises(ValueError) as error:
        ik.load_weights(target, state)
    for part in ("missing norm.bias", "unexpected extra", "pos_embed is (1, 9, 32), the network has (1, 16, 32)"):
        assert part in str(error.value)
    assert torch.equal(target.pos_embed, before)


def test_unsafe_and_damaged_files_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil()))
    for content in (path.read_bytes(), b"# a page", b"", b"\x08\x07\x12\x07pytorch"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as weights.*another kind of file") as error:
            read_state_dict(path)
        assert "weights_only" not in str(error.value)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(tmp_path / "tensor.pt")
    with pytest.raises(FileNotFoundError, match="not found"):
        read_state_dict(tmp_path / "absent.pt")
