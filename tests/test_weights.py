import argparse
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.state_dict import find_weights, read_state_dict


def net(**kwargs):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_features": 8, "patch_size": 28}
    return ik.VisionTransformer(**sizes, position="kprpe", **kwargs)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net.", "module.", "_orig_mod.module."])
def test_published_prefixes_are_stripped(prefix):
    source, target = net(), net()
    ik.load_weights(target, {prefix + key: value for key, value in source.state_dict().items()})
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"head.weight": torch.ones(9)}},
        lambda state: {
            "state_dict": {f"model.{k}": v for k, v in state.items()} | {"head.kernel": torch.ones(8, 9)},
            "optimizer_states": [{"state": {}}], "epoch": 3,
        },
        lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda state: {"net": {f"module.{k}": v for k, v in state.items()}, "centers": torch.ones(9, 8)},
        lambda state: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()},
        lambda state: {"epoch": 1, "weights": {"student": state}, "mean": torch.zeros(3)},
    ],
    ids=["backbone and head", "Lightning", "model_state_dict", "net, module", "compiled layers", "two levels"],
)  # fmt: skip
def test_the_network_is_found_among_other_tensors(tmp_path, wrap, caplog):
    source, target = net(), net()
    torch.save(wrap(source.state_dict()), tmp_path / "model.pt")
    ik.load_weights(target, tmp_path / "model.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    assert torch.equal(find_weights(read_state_dict(tmp_path / "model.pt")).tensors["pos_embed"], source.pos_embed)
    if "head.weight" in str(read_state_dict(tmp_path / "model.pt").keys()):
        assert "the network's tensors are under 'backbone.'; left out: head.weight" in caplog.text


class AttributeDict(dict):
    """What Lightning stores hyperparameters in."""


class Callback:
    """Whose class, in old Lightning, is a key."""


class Executed:
    """What would run if it were loaded as pickles are."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_other_objects_beside_the_weights_are_left_out_unseen(tmp_path):
    source, target = net(), net()
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    others = {
        "hyper_parameters": AttributeDict(lr=0.1, options=argparse.Namespace(path=Path("data"))),
        "callbacks": {Callback: {"best": torch.ones(())}, "other": Executed()},
    }
    torch.save({"state_dict": state} | others, tmp_path / "last.ckpt")
    ik.load_weights(target, tmp_path / "last.ckpt")
    assert torch.equal(source.pos_embed, target.pos_embed)


def test_what_is_missing_is_said_under_the_prefix_that_was_seen():
    state = {f"backbone.{key}": value for key, value in net().state_dict().items() if key != "norm.bias"}
    with pytest.raises(ValueError, match=r"under 'backbone\.' does not fit .*: missing norm\.bias$"):
        ik.load_weights(net(), state | {"head.weight": torch.zeros(1)})
    two = {f"{prefix}.{key}": value for prefix in ("student", "ema") for key, value in net().state_dict().items()}
    with pytest.raises(
        ValueError, match=r"state dict: the weights hold 2 such networks, under 'ema\.' and 'student\.'"
    ):
        ik.load_weights(net(), two)


def test_counters_of_batch_normalization_may_be_missing():
    state = {key: value for key, value in net().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(net().state_dict())
    ik.load_weights(net(), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    state, target = net().state_dict(), net()
    state["blocks.0.mlp.fc1.weight"][0, 0] = value
    before = target.pos_embed.clone()
    with pytest.raises(ValueError, match=r"not finite .*in blocks\.0\.mlp\.fc1\.weight; .*an earlier checkpoint"):
        ik.load_weights(target, state)
    assert torch.equal(target.pos_embed, before)


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


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**11), torch.zeros(2, 2).to_sparse(), torch.zeros(3, device="meta")]
)
def test_tensors_that_are_not_in_the_file_are_refused(tmp_path, tensor):
    torch.save({"weight": torch.zeros(2), "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: odd must be a plain tensor whose values are in the file"):
        read_state_dict(tmp_path / "a.pt")


def test_compressed_files_are_not_unpacked(tmp_path):
    """torch reads them: a file of some kilobytes can hold gigabytes of zeros."""
    torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as b,
    ):
        for name in whole.namelist():
            b.writestr(name, whole.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"b\.pt could not be read as weights \(parts of it are compressed"):
        read_state_dict(tmp_path / "b.pt")


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
    torch.save(Executed(), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(tmp_path / "tensor.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(tmp_path / "tensor.pt")
    with pytest.raises(FileNotFoundError, match="not found"):
        read_state_dict(tmp_path / "absent.pt")
