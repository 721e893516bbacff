import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from insightface_kprpe.cli import app
from insightface_kprpe.data.image_codec import decode_image
from insightface_kprpe.data.landmark_csv import read_landmark_csv, write_landmark_csv
from insightface_kprpe.data.record_inspection import inspect_records, jpeg_quality
from insightface_kprpe.data.record_tools import pack_folder, repack
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.recordio import RecordHeader, RecordReader, RecordWriter


def picture(seed, suffix=".jpg", size=112, quality=90):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, cv2.resize(coarse, (size, size)), options)[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    """anna: 2 JPEG of 112; bert: a PNG and one of 150 pixels; cleo: a broken one; dora: 1 JPEG. With landmarks."""
    files = {
        "anna/0.jpg": picture(0),
        "anna/1.jpg": picture(1),
        "bert/2.png": picture(2, ".png"),
        "bert/3.jpg": picture(3, size=150),
        "cleo/4.jpg": picture(4)[:500],
        "dora/5.jpg": picture(5),
    }
    for name, content in files.items():
        (tmp_path / "people" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "people" / name).write_bytes(content)
    keypoints = np.random.default_rng(0).random((6, 5, 2)).round(5)
    write_landmark_csv(tmp_path / "people" / "ldmk_5points.csv", keypoints, np.linspace(0.5, 1, 6))
    return tmp_path / "people"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_packed_with_its_landmarks(folder, tmp_path, workers, caplog):
    packed = pack_folder(folder, tmp_path / "out", num_workers=workers)
    assert packed == (5, 3, 1, True, 3)
    assert "cleo" in caplog.text and "truncated" in caplog.text
    reader = RecordReader(tmp_path / "out")
    assert reader.labels().tolist() == [0, 0, 1, 1, 2]
    for key, name in ((1, "anna/0.jpg"), (2, "anna/1.jpg"), (5, "dora/5.jpg")):
        assert reader[key][1] == (folder / name).read_bytes()
    exact = decode_image(picture(2, ".png")).astype(int)
    assert np.abs(reader.read_image(3)[1] - exact).mean() < 2  # as JPEG; swapped channels would be far off
    assert jpeg_quality(reader[3][1]) == 95 and reader.read_image(4)[1].shape == (112, 112, 3)
    assert (tmp_path / "out" / "property").read_text() == "3,112,112"
    before, scores = read_landmark_csv(folder / "ldmk_5points.csv", 6)
    after, kept = read_landmark_csv(tmp_path / "out" / "ldmk_5points.csv", 5)
    np.testing.assert_allclose(after, before[[0, 1, 2, 3, 5]], atol=1e-6)
    np.testing.assert_allclose(kept, scores[[0, 1, 2, 3, 5]], atol=1e-6)


def test_packing_refuses_what_would_be_lost_and_leaves_nothing_half_done(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(ValueError, match="new folder"):
        pack_folder(folder, tmp_path / "full")
    with pytest.raises(ValueError, match="quality must be in 1 to 100, got 0"):
        pack_folder(folder, tmp_path / "out", quality=0)
    with pytest.raises(ValueError, match="without images"):
        pack_folder(tmp_path / "full", tmp_path / "out")
    write_landmark_csv(folder / "ldmk_5points.csv", np.zeros((4, 5, 2)))
    with pytest.raises(ValueError, match="6 images"):
        pack_folder(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "people"]


def test_a_shuffled_file_without_index_becomes_insightfaces_layout(tmp_path):
    labels = [7, 3, -1, 7, 3, 9, 3]
    with RecordWriter(tmp_path / "loose" / "set") as writer:
        for i, label in enumerate(labels):
            writer.write(i, RecordHeader(label, i), picture(i) if i != 4 else b"broken")
    (tmp_path / "loose" / "set.idx").unlink()
    keypoints = np.random.default_rng(0).random((7, 5, 2)).round(5)
    write_landmark_csv(tmp_path / "loose" / "ldmk_5points.csv", keypoints)
    packed = repack(tmp_path / "loose" / "set.rec", tmp_path / "out")
    assert packed == (5, 3, 2, True, 5)
    reader = RecordReader(tmp_path / "out")
    order = [1, 6, 0, 3, 5]
    assert reader.labels().tolist() == [0, 0, 1, 1, 2]
    assert [reader[key][1] for key in range(1, 6)] == [picture(i) for i in order]
    np.testing.assert_allclose(
        read_landmark_csv(tmp_path / "out" / "ldmk_5points.csv", 5)[0], keypoints[order], atol=1e-6
    )


def test_repacking_what_is_right_already_changes_no_byte(tmp_path):
    write_face_records(tmp_path / "a" / "train", [(picture(i), i // 3) for i in range(12)])
    repack(tmp_path / "a", tmp_path / "b", num_workers=1)
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_set_is_shuffled_and_sorted_again(tmp_path):
    write_face_records(tmp_path / "a" / "train", [(picture(i), i // 4) for i in range(12)])
    keypoints = np.random.default_rng(0).random((12, 5, 2)).round(5)
    write_landmark_csv(tmp_path / "a" / "ldmk_5points.csv", keypoints)
    assert repack(tmp_path / "a", tmp_path / "b", shuffle=1) == (12, 3, 0, True, 12)
    reader = RecordReader(tmp_path / "b")
    payloads = [reader[key][1] for key in reader.image_keys]
    order = [payloads.index(picture(i)) for i in range(12)]
    labels = reader.labels()
    assert list(reader) == list(range(12)) and (np.diff(labels) < 0).any()
    assert len({int(labels[i]) for i in order[:4]}) == 1
    np.testing.assert_allclose(
        read_landmark_csv(tmp_path / "b" / "ldmk_5points.csv", 12)[0][order], keypoints, atol=1e-6
    )
    assert (tmp_path / "b" / "property").read_text() == "3,112,112"
    repack(tmp_path / "b", tmp_path / "c")
    assert sorted(RecordReader(tmp_path / "c")[key][1] for key in range(1, 13)) == sorted(payloads)


def test_im2recs_file_is_repacked(shared, tmp_path):
    source = shared / "golden" / "mxnet_recordio" / "plain.rec"
    packed = repack(source, tmp_path / "out")
    assert (packed.images, packed.identities, packed.left_out, packed.landmarks) == (6, 3, 0, False)
    before, after = RecordReader(source), RecordReader(tmp_path / "out")
    order = np.argsort(before.labels(), kind="stable")
    assert [after[key][1] for key in range(1, 7)] == [before[int(before.image_keys[i])][1] for i in order]


def test_inspection_says_what_is_there_and_finds_the_damaged(tmp_path):
    sizes = [112] * 11 + [96]
    write_face_records(tmp_path / "train", [(picture(i, size=size), i // 4) for i, size in enumerate(sizes)])
    facts = inspect_records(tmp_path, check=None)
    assert (facts["images"], facts["identities"], facts["decoded"], facts["bad"]) == (12, 3, 12, [])
    assert facts["formats"] == {"112x112 JPEG of quality about 90": 11, "96x96 JPEG of quality about 90": 1}
    assert facts["images per identity"] == "4 to 4, median 4" and facts["landmarks"].startswith("none")
    at = RecordReader(tmp_path)._offset(6) + 32
    with open(tmp_path / "train.rec", "r+b") as file:
        file.seek(at)
        file.write(bytes(4))
    write_landmark_csv(tmp_path / "ldmk_5points.csv", np.zeros((11, 5, 2)))
    facts = inspect_records(tmp_path, num_workers=1)
    assert len(facts["bad"]) == 1 and "record 6" in facts["bad"][0]
    assert "rows for 12 images, got 11" in facts["landmarks"]
    assert len(inspect_records(tmp_path, check=2)["bad"]) == 0  # the first and the last


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
def test_jpeg_quality_is_read_from_the_file(quality):
    assert jpeg_quality(picture(0, quality=quality)) == quality
    assert jpeg_quality(picture(0, ".png")) == 0


def test_command_line(folder, tmp_path):
    run = CliRunner().invoke
    result = run(app, ["rec", "pack", str(folder), str(tmp_path / "out"), "--num-workers", "0", "--quality", "80"])
    assert result.exit_code == 0, result.output
    assert "5 images of 3 people (3 JPEG files unchanged, 2 encoded with quality 80)" in result.output
    assert "1 images left out" in result.output and "ldmk_5points.csv written" in result.output
    result = run(app, ["rec", "inspect", str(tmp_path / "out"), "--all", "--num-workers", "0"])
    assert result.exit_code == 0 and "2 112x112 JPEG of quality about 80; decoded to RGB" in result.output
    with open(tmp_path / "out" / "train.rec", "r+b") as file:
        file.seek(RecordReader(tmp_path / "out")._offset(2) + 32)
        file.write(bytes(4))
    result = run(app, ["rec", "inspect", str(tmp_path / "out"), "--num-workers", "0"])
    assert result.exit_code == 1 and "record 2" in result.output
    result = run(app, ["rec", "repack", str(tmp_path / "out"), str(tmp_path / "again"), "--num-workers", "0"])
    assert result.exit_code == 0 and "4 images of 3 people (all unchanged)" in result.output
    sheet = tmp_path / "sheet.png"
    result = run(app, ["visualize", "augmentation", str(tmp_path / "again"), "--out", str(sheet), "--count", "3"])
    assert result.exit_code == 0, result.output
    assert cv2.imread(str(sheet)).shape == (3 * 144, 10 * 144, 3)


def test_the_same_command_after_a_kill_finds_its_work_done(folder, tmp_path, caplog):
    """A kill after the last rename leaves the whole set; whoever starts again gets what was made."""
    packed = pack_folder(folder, tmp_path / "out")
    content = (tmp_path / "out" / "train.rec").stat().st_mtime_ns
    assert pack_folder(folder, tmp_path / "out") == packed and "already exists" in caplog.text
    again = repack(tmp_path / "out", tmp_path / "again", shuffle=1)
    assert repack(tmp_path / "out", tmp_path / "again", shuffle=1) == again
    assert (tmp_path / "out" / "train.rec").stat().st_mtime_ns == content
    for other in (
        lambda: pack_folder(folder, tmp_path / "out", quality=90),
        lambda: repack(tmp_path / "out", tmp_path / "again", shuffle=2),
        lambda: (folder / "anna" / "0.jpg").write_bytes(picture(9)) and pack_folder(folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="OUT must be a new folder"):
            other()


def test_people_of_whom_nothing_could_be_read_are_named(folder, tmp_path, caplog):
    pack_folder(folder, tmp_path / "out")
    assert "no image of 1 people could be read: cleo" in caplog.text


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="processes are looked up in /proc")
def test_workers_do_not_outlive_a_killed_command(folder, tmp_path):
    """Their results, which nobody takes any more, are larger than a pipe."""
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    for i in range(512):
        (folder / "dora" / f"n{i}.png").write_bytes(cv2.imencode(".png", noise)[1].tobytes())
    (folder / "ldmk_5points.csv").unlink()
    command = f"""
import time
import insightface_kprpe.data.record_tools as tools
def stuck(prefix, samples, size):
    next(iter(samples))
    print("started", flush=True)
    time.sleep(600)
tools._write.__defaults__ = (stuck,)
tools.pack_folder({str(folder)!r}, {str(tmp_path / "out")!r}, num_workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    workers = [child for child in _children(process.pid) if os.path.exists(f"/proc/{child}")]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    for _ in range(300):
        alive = [pid for pid in workers if _runs(pid)]
        if not alive:
            return
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    pytest.fail(f"{len(alive)} workers are left")


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
