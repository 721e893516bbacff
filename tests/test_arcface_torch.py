"""Scripts of a checkout run with this package's parts; tests/data/arcface_torch_checkout stands in for the real one."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from easydict import EasyDict as edict
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.arcface_torch import compatibility, launcher, mxnet_stand_in
from insightface_kprpe.arcface_torch.plug_in import Parts, plug_in
from insightface_kprpe.data.record_format import PART, RecordHeader, encode_record
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.synthetic import SyntheticFaces
from insightface_kprpe.data.verification_bin import write_verification_bin

CHECKOUT = Path(__file__).parent / "data" / "arcface_torch_checkout"
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}
# One port for each run: torch picks a free one for 0.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def launch(*arguments, cwd, before=("-m",), environment=None):
    command = [sys.executable, *before, "insightface_kprpe.arcface_torch", *map(str, arguments)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=environment)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Twelve faces of three people, a set of pairs, an aligner, and a config, in a folder to work in."""
    folder = tmp_path_factory.mktemp("work")
    faces = [(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes(), label) for image, label, _ in SyntheticFaces(3, 4)]
    write_face_records(folder / "faces" / "train", faces)
    small = cv2.imencode(".png", np.full((56, 56, 3), 99, np.uint8))[1].tobytes()
    write_verification_bin(
        folder / "faces" / "pairs.bin", [faces[0][0], faces[1][0], faces[0][0], small], [True, False]
    )
    (folder / "face.png").write_bytes(faces[0][0])
    torch.save(ik.DFA().state_dict(), folder / "dfa.pt")
    values = {
        "network": "vit_n_kprpe_dfa",
        "network_kwargs": {"dfa_weights": "dfa.pt", **TINY},
        "loss": "adaface",
        "rec": "faces",
        "num_classes": 3,
        "num_workers": 1,
        "val_targets": ["pairs"],
        "output": "run",
    }
    lines = ["from easydict import EasyDict as edict", "config = edict()"]
    lines += [f"config.{key} = {value!r}" for key, value in values.items()]
    (folder / "elsewhere.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def root():
    return launcher.find_checkout(CHECKOUT)


# --- whole scripts ---------------------------------------------------------------------------------------------------


def test_training_with_adaface_and_a_self_aligned_network(work):
    done = launch("--root", CHECKOUT, "--cpu", "train_v2.py", "elsewhere.py", cwd=work, environment=ONE_RANK)
    assert done.returncode == 0, done.stderr
    losses = [line for line in done.stdout.splitlines() if line.startswith("epoch 0 loss")]
    assert len(losses) == 3 and all(line.endswith("on cpu") for line in losses)
    assert "pairs: (4, 16) bool 1" in done.stdout
    assert "margin AdaFace classes ['class_centers', 'margin_loss.batch_mean', 'margin_loss.batch_std']" in done.stdout
    net = ik.get_model("vit_n_kprpe_dfa", num_features=16, dfa_weights=work / "dfa.pt", **TINY)
    ik.load_weights(net, work / "run" / "model.pt")


@pytest.mark.slow
def test_training_on_two_ranks_under_torchrun(work):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    done = launch("--root", CHECKOUT, "--cpu", "train_v2.py", "elsewhere.py", cwd=work, before=torchrun)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"epoch 0 loss (\d+\.\d{4})", done.stdout)  # two ranks may write into one line
    # Every rank says the same mean over both: PartialFC has gathered the embeddings.
    assert len(losses) == 6 and len(set(losses)) == 3


@pytest.mark.slow
def test_the_checkouts_own_parts_stay(work):
    done = launch("--root", CHECKOUT, "--cpu", "train_v2.py", "own.py", cwd=work, environment=ONE_RANK)
    assert done.returncode == 1 and "own.py, which does not exist" in done.stderr
    text = (work / "elsewhere.py").read_text().replace("vit_n_kprpe_dfa", "tiny").replace("'adaface'", "'margin'")
    (work / "own.py").write_text(text)
    done = launch("--root", CHECKOUT, "--cpu", "train_v2.py", "own.py", cwd=work, environment=ONE_RANK)
    assert "margin CombinedMarginLoss classes ['weight']" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(work):
    """What training leaves behind, of two networks."""
    for name in ("vit_n", "vit_n_kprpe_dfa"):
        (work / name).mkdir()
        torch.save(ik.get_model(name, num_features=512).state_dict(), work / name / "model.pt")
    return work


@pytest.mark.slow
def test_scripts_that_use_a_trained_network(runs):
    onnx_folder, weights, face = runs / "vit_n", runs / "vit_n_kprpe_dfa" / "model.pt", runs / "face.png"
    network = ("--network", "vit_n_kprpe_dfa")
    common = ("--root", CHECKOUT, "--cpu")
    options = ("--output", onnx_folder / "model.onnx", "--network", "vit_n")
    done = launch(*common, "torch2onnx.py", onnx_folder, *options, cwd=runs)
    assert done.returncode == 0, done.stderr
    assert onnx.load(onnx_folder / "model.onnx").graph.input[0].name == "data"
    done = launch(*common, "onnx_ijbc.py", "--model-root", onnx_folder, cwd=runs)
    assert done.stdout.strip() == "(6, 512) ['CPUExecutionProvider']", done.stderr
    done = launch(*common, "inference.py", "--weight", weights, "--img", face, *network, cwd=runs)
    assert done.stdout.strip() == "(1, 512)" and "random weights" not in done.stderr, done.stderr
    done = launch(*common, "eval_ijbc.py", "--model-prefix", weights, "--image-path", face, *network, cwd=runs)
    assert done.stdout.strip() == "(2, 512) [1, 2] 1.5", done.stderr
    done = launch(*common, "eval/verification.py", cwd=runs)
    assert "nothing to do" in done.stdout, done.stderr


@pytest.mark.slow
def test_explain_lists_and_runs_nothing(capfd):
    cuda = torch.Tensor.cuda
    call = CliRunner().invoke(cli.app, ["arcface-torch", "--root", str(CHECKOUT), "--cpu", "--explain"])
    listed = capfd.readouterr().out
    assert call.exit_code == 0
    for target in ("backbones.get_model", "partial_fc_v2.PartialFC_V2", "numpy.int", "mxnet", "torch.Tensor.cuda"):
        assert f"  {target}" in listed
    assert torch.Tensor.cuda is cuda and "mxnet" not in sys.modules  # not in this process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "nowhere", "train_v2.py"], "root must be InsightFace's recognition/arcface_torch"),
        (
            ["--root", str(CHECKOUT), "train_v3.py"],
            "script must be one of those in .*got train_v3.py; it has .*train_v2.py",
        ),
        (["--root", str(CHECKOUT)], "2"),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(SystemExit, match=message):
        launcher.main(arguments)


def test_whole_repository_as_root(tmp_path):
    folder = tmp_path / "recognition" / "arcface_torch"
    (folder / "backbones").mkdir(parents=True)
    (folder / "backbones" / "__init__.py").touch()
    assert launcher.find_checkout(tmp_path) == folder.resolve()


# --- parts -----------------------------------------------------------------------------------------------------------


def test_modules_are_plugged_into_when_they_are_imported(tmp_path, monkeypatch):
    for name in ("backbones", "losses", "partial_fc_v2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for name in ("AdamW", "SGD"):  # put back afterwards
        monkeypatch.setattr(torch.optim, name, getattr(torch.optim, name))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "losses.py").write_text("old_name = 1")
    (tmp_path / "partial_fc_v2.py").write_text((CHECKOUT / "partial_fc_v2.py").read_text())
    for change in plug_in(tmp_path):
        assert change.apply(tmp_path, False)
    partial_fc_v2 = importlib.import_module("partial_fc_v2")
    assert isinstance(partial_fc_v2.PartialFC_V2(ik.AdaFace(), 8, 5), ik.PartialFC)
    # The original class, which calls super() by its own name, is as it was.
    with pytest.raises(AssertionError):
        partial_fc_v2.PartialFC_V2("another margin", 8, 5)
    with pytest.raises(ImportError, match="losses.py has no CombinedMarginLoss"):
        importlib.import_module("losses")


def own_model(name, **kwargs):
    if name == "own":
        return "the checkout's"
    raise ValueError()


def test_get_model_knows_both(root, work):
    parts = Parts(root)
    assert parts.get_model(own_model, "own") == "the checkout's"
    net = parts.get_model(own_model, "vit_n_irpe", dropout=0.0, fp16=False, num_features=8, **TINY)
    assert net.eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 8)
    with pytest.raises(ValueError, match="got vit_n_kprpe_dfb; did you mean vit_n_kprpe_dfa"):
        parts.get_model(own_model, "vit_n_kprpe_dfb")
    with pytest.raises(ValueError, match="vit_n_kprpe needs keypoints.*use vit_n_kprpe_dfa"):
        parts.get_model(own_model, "vit_n_kprpe")


def test_training_needs_a_trained_aligner(root, work, caplog):
    parts = Parts(root)
    parts.config = {"network_kwargs": TINY}
    with pytest.raises(ValueError, match="config.network_kwargs"):
        parts.get_model(own_model, "vit_n_kprpe_dfa")
    weights = torch.load(work / "dfa.pt", weights_only=True)
    parts.config = {"network_kwargs": {"dfa_weights": str(work / "dfa.pt"), **TINY}}
    net = parts.get_model(own_model, "vit_n_kprpe_dfa", num_features=8)
    assert all(torch.equal(value, weights[key]) for key, value in net.dfa.state_dict().items())
    Parts(root).get_model(own_model, "vit_n_kprpe_dfa", **TINY)  # weights follow
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_margin_is_adaface_where_asked_for(root):
    parts = Parts(root)
    loss = parts.margin_loss(None, 64, "adaface", 0.3, 0.2, 0)
    assert isinstance(loss, ik.AdaFace) and (loss.m, loss.h, loss.t_alpha, loss.scale) == (0.3, 0.2, 0.01, 64)
    parts.config = {"loss": "adaface", "adaface_m": 0.5, "adaface_t_alpha": 0.1}
    loss = parts.margin_loss(None, 32, 1.0, 0.5, 0.0, 0)
    assert isinstance(loss, ik.AdaFace) and (loss.m, loss.h, loss.t_alpha, loss.scale) == (0.5, 0.333, 0.1, 32)
    parts.config = {}
    assert parts.margin_loss(lambda *args: args, 64, 1.0, 0.5, 0.0, 0.1) == (64, 1.0, 0.5, 0.0, 0.1)


def test_partial_fc_sees_norms(root):
    parts, original = Parts(root), lambda *args: args
    partial_fc = parts.partial_fc(original, ik.AdaFace(), 8, 5, 1, False)
    embeddings, labels = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 4])
    loss = partial_fc(embeddings, labels)
    centers = torch.nn.functional.normalize(partial_fc.class_centers)
    cosines = torch.nn.functional.normalize(embeddings) @ centers.T
    logits = ik.AdaFace()(cosines, labels, embeddings.norm(dim=1))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    assert parts.partial_fc(original, "margin", 8, 5, 0.1) == ("margin", 8, 5, 0.1, False)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_position_tables_learn_at_a_rate_of_their_own(root, name):
    original = getattr(torch.optim, name)
    parts = Parts(root)
    optimizer_class = parts.optimizer(original)
    net = parts.get_model(own_model, "vit_n_irpe", num_features=8, **TINY)
    other = torch.nn.Linear(2, 2)
    groups = [{"params": net.parameters()}, {"params": other.parameters()}]
    plain = optimizer_class(groups, lr=0.1, weight_decay=0.5)
    assert [group["lr"] for group in plain.param_groups] == [0.1, 0.1]

    parts.config = {"position_lr_scale": 30}
    groups = [{"params": net.parameters()}, {"params": other.parameters()}]
    split = optimizer_class(groups, lr=0.1, weight_decay=0.5)
    assert isinstance(split, original)
    assert [(group["lr"], group["weight_decay"]) for group in split.param_groups] == [(0.1, 0.5), (0.1, 0.5), (3, 0)]
    held = [[id(p) for p in group["params"]] for group in split.param_groups]
    tables = {id(net.get_parameter(table)) for table in net.position_tables()}
    assert set(held[2]) == tables and len(held[0]) == len(list(net.parameters())) - len(tables)
    (before,) = {float(p.sum()) for p in split.param_groups[2]["params"]}
    sum(p.sum() for p in net.parameters()).backward()
    split.step()
    moved = split.param_groups[2]["params"][0].abs().max().item()
    assert before == 0 and moved == pytest.approx(3, rel=1e-4)


def test_config_in_the_checkout_and_elsewhere(root, tmp_path, monkeypatch, caplog):
    base = edict(output=None, num_classes=0, lr=0.1)
    monkeypatch.setitem(sys.modules, "configs", edict())
    monkeypatch.setitem(sys.modules, "configs.base", edict(config=base))
    monkeypatch.chdir(tmp_path)
    parts = Parts(root)
    assert parts.get_config(lambda file: {"read": file}, "configs/inside.py") == {"read": "configs/inside.py"}
    (tmp_path / "mine.py").write_text("config = {'num_classes': 7}")
    config = parts.get_config(None, "mine.py")
    assert (config.num_classes, config.lr, config.output) == (7, 0.1, os.path.join("work_dirs", "mine"))
    assert parts.config is config
    for text, message in (("{'loss': 'AdaFace'}", "loss must be"), ("{'rec': 'nowhere'}", "rec must be a folder")):
        (tmp_path / "wrong.py").write_text(f"config = {text}")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            parts.get_config(None, "wrong.py")
    (tmp_path / "typo.py").write_text("config = {'netwrok_kwargs': {}}")
    parts.get_config(None, "typo.py")
    assert "nothing reads netwrok_kwargs; did you mean network_kwargs?" in caplog.text
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="must define `config"):
        parts.get_config(None, "empty.py")


# --- what the scripts find missing -----------------------------------------------------------------------------------


def test_numpy_aliases_resolve_inside_the_checkout_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "__getattr__", np.__getattr__)
    text = (
        "import numpy as np\nfrom numpy import object\nvalues = np.arange(3).astype(np.float), np.int, np.bool, object"
    )
    for name in ("inside", "outside", "inside/venv/site-packages"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "script.py").write_text(text)
    (alias,) = (change for change in compatibility.COMPATIBILITY if change.target.startswith("numpy"))
    assert alias.apply(tmp_path / "inside", False)
    values, integer, boolean, object_ = runpy.run_path(str(tmp_path / "inside" / "script.py"))["values"]
    assert values.dtype == np.float64 and integer is int and np.dtype(boolean) == bool and object_ is object
    for elsewhere in ("outside", "inside/venv/site-packages"):
        with pytest.raises((AttributeError, ImportError)):
            runpy.run_path(str(tmp_path / elsewhere / "script.py"))
    with pytest.raises(AttributeError):
        np.float  # noqa: B018, NPY001


def test_onnxruntime_takes_cuda_where_it_has_it(monkeypatch):
    class Session:
        def __init__(self, path, sess_options=None, providers=None):
            self.providers = providers

    offered = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(compatibility.onnxruntime, "get_available_providers", lambda: offered)
    (change,) = (c for c in compatibility.COMPATIBILITY if c.target.startswith("onnxruntime"))
    for cpu, expected in ((False, offered[1:]), (True, offered[2:])):
        monkeypatch.setattr(compatibility.onnxruntime, "InferenceSession", Session)
        change.apply(Path(), cpu)
        assert compatibility.onnxruntime.InferenceSession("model.onnx", providers=None).providers == expected
        assert compatibility.onnxruntime.InferenceSession("model.onnx", providers=["Other"]).providers == ["Other"]


def test_input_of_an_onnx_file_is_renamed(tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [1]) for name in ("images", "sum")]
    nodes = [helper.make_node("Add", ["images", "images"], ["sum"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), tmp_path / "m.onnx")
    compatibility._name_input(str(tmp_path / "m.onnx"), "data")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].name == "data" and list(model.graph.node[0].input) == ["data", "data"]


@pytest.fixture
def mx(monkeypatch):
    for name, module in mxnet_stand_in.build().items():
        monkeypatch.setitem(sys.modules, name, module)
    import mxnet

    return mxnet


def test_stand_in_reads_records_as_they_are_stored(mx, work, tmp_path):
    reader = mx.recordio.MXIndexedRecordIO(str(work / "faces/train.idx"), str(work / "faces/train.rec"), "r")
    header, payload = mx.recordio.unpack(reader.read_idx(0))
    assert (header.flag, payload) == (2, b"") and header.label.tolist() == [13, 16] and reader.keys == list(range(16))
    header, payload = mx.recordio.unpack(reader.read_idx(np.int64(12)))
    assert (header.flag, header.label, header.id) == (0, 2.0, 12)
    stored = encode_record(RecordHeader(header.label, header.id, header.id2), payload)
    assert stored[PART.size :].startswith(reader.read_idx(12))
    image = mx.image.imdecode(payload)
    np.testing.assert_array_equal(image.asnumpy(), SyntheticFaces(3, 4)[11][0])
    assert type(image.asnumpy()) is np.ndarray


def test_stand_in_reads_what_mxnet_wrote(mx, shared):
    rec = shared / "data" / "faces" / "rec"
    reader = mx.recordio.MXIndexedRecordIO(str(rec / "train.idx"), str(rec / "train.rec"), "r")
    labels = [mx.recordio.unpack(reader.read_idx(key))[0].label for key in range(1, 200)]
    assert labels == ik.RecordReader(rec).labels()[:199].tolist()
    with open(rec / "train.rec", "rb") as file:
        assert reader.read_idx(0) in file.read(100)


def test_stand_in_moves_pixels_as_mxnet_does(mx):
    from mxnet import ndarray as nd

    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    moved = nd.transpose(image, axes=(2, 0, 1))
    np.testing.assert_array_equal(moved.asnumpy(), image.transpose(2, 0, 1))
    flipped = mx.ndarray.flip(data=moved, axis=2)
    np.testing.assert_array_equal(torch.from_numpy(flipped.asnumpy()).numpy(), image.transpose(2, 0, 1)[:, :, ::-1])
    assert mx.image.resize_short(image, 2).shape == (2, 3, 3)
    assert mx.image.resize_short(image.transpose(1, 0, 2).copy(), 8).shape == (12, 8, 3)


def test_stand_in_says_what_it_lacks(mx, work):
    with pytest.raises(AttributeError, match=r"mxnet\.mod is not one of the few calls"):
        mx.mod.Module()
    with pytest.raises(ValueError, match='flag must be "r"'):
        mx.recordio.MXIndexedRecordIO("train.idx", "train.rec", "w")
    with pytest.raises(ValueError, match="the index of"):
        mx.recordio.MXIndexedRecordIO("other.idx", str(work / "faces" / "train.rec"), "r")
