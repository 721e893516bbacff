"""Every verb, at each place where it takes a path, with what is no such file: one sentence that names it."""

from __future__ import annotations

import os
import signal
import sys

import cv2
import numpy as np
import pytest
import tiny_packs as tiny

from insightface_kprpe import cli
from insightface_kprpe.data.synthetic import draw_face

KINDS = ("absent", "empty folder", "empty file", "circle", "below a file", "Latin-1", "UTF-16", "zip", "pipe")
SMALL = "num_image=64 num_classes=4 batch_size=8 val_targets=()"
# Verb and place: the command line, PATH being the hostile one.
PLACES = {
    "train": "train PATH",
    "train, data": "train quickstart rec=PATH output=NEW",
    "train, set": "train quickstart val_targets=('PATH.bin',) output=NEW",
    "train, init_from": f"train quickstart {SMALL} init_from=PATH output=NEW",
    "train-dfa": "train-dfa PATH",
    "train-dfa, data": "train-dfa dfa_small data=PATH output=NEW",
    "report": "report PATH",
    "landmarks": "landmarks PATH --weights PATH",
    "landmarks, weights": "landmarks FACES --weights PATH",
    "rec pack": "rec pack PATH NEW --num-workers 0",
    "rec repack": "rec repack PATH NEW --num-workers 0",
    "rec inspect": "rec inspect PATH --num-workers 0",
    "visualize augmentation": "visualize augmentation PATH",
    "visualize kprpe": "visualize kprpe PATH",
    "visualize alignment": "visualize alignment PATH --predicted PATH",
    "export": "export PATH NEW.onnx",
    "convert": "convert PATH NEW.safetensors",
    "pack, recognition": "pack PATH --detector DETECTOR --root NEW",
    "pack, detector": "pack MODEL --detector PATH --root NEW",
    "pack, aligner": "pack MODEL --detector DETECTOR --aligner PATH --root NEW",
    "pack, set": "pack MODEL --detector DETECTOR --evaluate PATH --root NEW",
    "pack inspect": "pack inspect PATH --root NEW",
    "pack verify": "pack verify PATH --root NEW",
    "pack remove": "pack remove PATH --root NEW",
    "evaluate bin": "evaluate bin PATH --model MODEL",
    "evaluate bin, model": "evaluate bin synthetic --model PATH",
    "evaluate ijb": "evaluate ijb PATH --model MODEL",
    "evaluate ijbs": "evaluate ijbs PATH --model MODEL",
    "evaluate tinyface": "evaluate tinyface PATH --model MODEL",
    "evaluate landmarks": "evaluate landmarks PATH a=PATH",
    "embed": "embed PATH --model MODEL --out NEW.npz --num-workers 0",
    "recognize": "recognize PEOPLE PATH --pack PACK --root ROOT",
    "recognize, gallery": "recognize PATH PHOTO --pack PACK --root ROOT",
    "recognize, pack": "recognize PEOPLE PHOTO --pack PATH --root ROOT",
    "gallery add": "gallery add NEW.npz PATH --pack PACK --root ROOT",
    "gallery add, index": "gallery add PATH PEOPLE --pack PACK --root ROOT",
    "gallery list": "gallery list PATH",
    "gallery remove": "gallery remove PATH Ann",
}
# What is nothing wrong: an output that does not exist yet, and a folder that may be empty.
RIGHT = {("gallery add, index", "absent"), ("gallery add, index", "circle"), ("pack inspect", "empty folder")}


def make(path, kind):
    contents = {
        "empty file": b"", "Latin-1": "Zoë 1 2 3\n".encode("latin-1"), "UTF-16": "Zoë 1 2\n".encode("utf-16"),
        "zip": b"PK\x05\x06" + bytes(18),
    }  # fmt: skip
    if kind == "empty folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.parent.joinpath("afile").touch()
        return path.parent / "afile" / path.name
    elif kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """What the other arguments name."""
    folder = tmp_path_factory.mktemp("sound")
    pack = tiny.write_pack(folder / "root")
    for path, image in (("people/Ann/0.png", draw_face(0, 0)[0]), ("faces/a/0.png", draw_face(1, 0)[0])):
        (folder / path).parent.mkdir(parents=True)
        cv2.imwrite(str(folder / path), np.ascontiguousarray(image[..., ::-1]))
    words = {"FACES": "faces", "PEOPLE": "people", "PHOTO": "people/Ann/0.png", "ROOT": "root"}
    return {word: str(folder / path) for word, path in words.items()} | {
        "MODEL": str(pack / "keypoints" / "recognition.onnx"), "DETECTOR": str(pack / "detection.onnx"), "PACK": "tiny",
    }  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_no_such_file_is_one_sentence(place, sound, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSIGHTFACE_KPRPE_DEBUG", "")
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        (folder / "hostile").mkdir()
        path = make(folder / "hostile" / "odd", kind)
        words = PLACES[place]
        for word, value in {**sound, "NEW": str(folder / "new"), "PATH": str(path)}.items():
            words = words.replace(word, value)
        if "odd.bin" in words and path.exists():
            path.rename(path.with_name("odd.bin"))
        monkeypatch.setattr(sys, "argv", ["insightface-kprpe", *words.split()])
        signal.alarm(120)  # for what would never end; nothing is measured
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.alarm(0)
        said = str(stop.value.code)
        if (place, kind) in RIGHT and stop.value.code in (0, None):
            continue
        where = f"{place}, {kind}: {said}"
        assert said.startswith("error: ") and "\n" not in said and "(unexpected" not in said, where
        assert "odd" in said, where
