import errno
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.training.config import dump_config, load_config

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}


@pytest.fixture
def run(tmp_path):
    """What training leaves behind."""
    config = load_config("quickstart", ["embedding_size=16", f"network_kwargs={TINY}"])
    dump_config(config, tmp_path / "run" / "config.json")
    net = ik.get_model(config.network, num_features=16, **TINY)
    torch.nn.init.normal_(net.keypoint_linear.weight)
    torch.save(net.state_dict(), tmp_path / "run" / "model.pt")
    return tmp_path / "run"


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


VERBS = ["quickstart", "train", "export", "pack", "models", "embed", "evaluate bin", "evaluate ijb", "evaluate ijbs"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    result = call(*verb.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.output


HEAVY = ("torch", "timm", "torchvision", "onnxruntime", "cv2", "insightface", "matplotlib")
ASK_FOR_HELP = """
import sys
from insightface_kprpe import cli
sys.argv = ["insightface-kprpe", *sys.argv[1:]]
try:
    cli.app()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [("import sys, insightface_kprpe", []), (ASK_FOR_HELP, ["--help"]), (ASK_FOR_HELP, ["evaluate", "bin", "--help"])],
)
def test_import_and_help_load_nothing_heavy(code, arguments):
    code += f"\nprint([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_models_lists_names():
    assert "vit_b_kprpe" in call("models", "vit_b*").output.split()


def test_export_then_evaluate(run, tmp_path):
    result = call("export", run, tmp_path / "net.onnx", "--licence", "MIT")
    assert "images + keypoints -> embedding" in result.output and (tmp_path / "net.onnx").is_file()
    result = call("evaluate", "bin", "synthetic", "--model", run, "--no-flip")
    assert result.output.startswith("synthetic\n") and "accuracy" in result.output and "flip: off" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "no/such/run", "out.onnx"],
        ["evaluate", "bin", "absent.bin", "--model", "no/such/run"],
        ["train", "no_such_config.py"],
    ],
)
def test_mistakes_are_one_sentence_without_traceback(arguments, tmp_path):
    command = [sys.executable, "-m", "insightface_kprpe.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def fail(error):
    def raising():
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("size must be 1,\n  got 2"), "size must be 1, got 2"),
        (OSError(errno.ENOSPC, "No space left on device", "out.npz"), "no space left to write out.npz; free some"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error (given: {folder})"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "some/folder"), "some/folder: Is a directory"),
        (OSError(errno.EXDEV, "Invalid link", "a/b", None, "c"), "a/b -> c: Invalid link"),
        (EOFError(), "a file ends too early (no more data) (given: {folder})"),
        (EOFError("Ran out of input"), "a file ends too early (Ran out of input) (given: {folder})"),
        (RuntimeError("no wheels"), "no wheels (given: {folder})"),
        (RuntimeError(), "RuntimeError (given: {folder})"),
        (MemoryError(), "not enough memory (given: {folder})"),
        (
            KeyError("files"),
            "KeyError: 'files' (unexpected; INSIGHTFACE_KPRPE_DEBUG=1 or --debug before the verb shows",
        ),
    ],
)
def test_every_error_is_a_sentence(error, sentence, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))

    @cli.app.command("fail")
    def failing(folder: str) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["insightface-kprpe", "fail", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert str(exit_.value.code).startswith(f"error: {sentence.format(folder=tmp_path)}")
    assert "\n" not in exit_.value.code


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback(how, monkeypatch):
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli.app.command("fail")(fail(EOFError("cut")))
    if how == "variable":
        os.environ["INSIGHTFACE_KPRPE_DEBUG"] = "1"
    monkeypatch.setattr(sys, "argv", ["insightface-kprpe", *(["--debug"] if how == "option" else []), "fail"])
    with pytest.raises(ValueError, match="a file ends too early") as raised:
        cli.main()
    assert isinstance(raised.value.__cause__, EOFError)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["nonsense"], 2), (["rec", "pack"], 2)])
def test_mistakes_in_the_command_itself_keep_their_status(arguments, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["insightface-kprpe", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == status
