import logging

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from insightface_kprpe.data import feed
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.feed import BadImages, DeviceFeed, ReadableFaces
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.sampler import EpochSampler


def damage(folder, reader, key):
    """Overwrite the start of a record's JPEG."""
    at = reader._offset(key) + 8 + 24
    with open(folder / "train.rec", "r+b") as file:
        file.seek(at)
        file.write(b"nonsense")


@pytest.fixture
def faces(tmp_path):
    """20 images of 4 people, each of one gray; records 4, 5 and 20 are damaged."""
    gray = [cv2.imencode(".jpg", np.full((112, 112, 3), 10 * i, np.uint8))[1].tobytes() for i in range(20)]
    write_face_records(tmp_path / "train", zip(gray, np.repeat(range(4), 5).tolist(), strict=True))
    faces = open_faces(tmp_path)
    for key in (4, 5, 20):
        damage(tmp_path, faces.source.reader, key)
    return faces


def feed_of(faces, limit, workers=0, batch_size=4):
    loader = DataLoader(ReadableFaces(faces), batch_sampler=EpochSampler(20, batch_size), num_workers=workers)
    return DeviceFeed(loader, torch.device("cpu"), BadImages(faces, limit))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_stands_in_for_a_bad_one(faces, workers, caplog):
    batches = feed_of(faces, limit=0.01, workers=workers)
    with caplog.at_level(logging.WARNING, "insightface_kprpe"):
        images, labels, _, origin = (torch.cat(parts) for parts in zip(*batches, strict=True))
    asked, skipped = origin.unbind(1)
    assert sorted(asked.tolist()) == list(range(20))
    read = (asked + skipped) % 20
    assert dict(zip(asked.tolist(), read.tolist(), strict=True)) == {
        i: {3: 5, 4: 5, 19: 0}.get(i, i) for i in range(20)
    }
    assert torch.equal((images[:, 0, 50, 50].float() / 10).round().long(), read) and torch.equal(labels, read // 5)
    assert (batches.bad.read, batches.bad.bad) == (20, 3)
    assert sorted(message.split()[1] for message in caplog.messages) == ["20", "4", "5"]  # each once
    assert all("6e 6f 6e 73 65 6e 73 65 are not a readable image" in message for message in caplog.messages)


def test_too_many_bad_images_stop_the_run(faces):
    assert len(list(feed_of(faces, limit=0.0003))) == 5  # 3 of 10,000
    with pytest.raises(ValueError, match=r"of \d+ images could not be read, more than max_bad_images=0\.0002"):
        list(feed_of(faces, limit=0.0002))
    with pytest.raises(ValueError, match="could not be read"):
        list(feed_of(faces, limit=0.0))


def test_a_set_that_is_unreadable_throughout_is_noticed_at_once(faces, monkeypatch):
    monkeypatch.setattr(feed, "_TRIES", 2)
    with pytest.raises(RuntimeError, match="2 images in a row, from number 3 on"):
        ReadableFaces(faces)[3]


def test_keys_and_paths_name_the_images(faces, tmp_path):
    assert ReadableFaces(faces).record_key(3) == 4
    (tmp_path / "people" / "anna").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "people" / "anna" / "1.png"), np.zeros((112, 112, 3), np.uint8))
    assert open_faces(tmp_path / "people").record_key(0).endswith("1.png")
    assert open_faces("synthetic", 2, 4).record_key(3) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_copied_ahead_are_those_of_the_cpu(faces):
    device = torch.device("cuda", torch.cuda.current_device())
    sampler = EpochSampler(20, 4)
    loader = DataLoader(ReadableFaces(faces), batch_sampler=sampler, num_workers=1, pin_memory=True)
    expected = list(feed_of(faces, limit=1.0))
    found = list(DeviceFeed(loader, device, BadImages(faces, 1.0)))
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert all(tensor.device == device for tensor in ours[:3]) and ours[3].device.type == "cpu"
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
