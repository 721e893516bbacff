import logging

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.data.crops import open_crops
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.record_format import RecordError
from insightface_kprpe.data.record_inspection import inspect_records
from insightface_kprpe.data.record_tools import repack
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.recordio import RecordHeader, RecordReader, RecordWriter
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS

COUNT, EACH = 40, 4


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (112, 112)))[1].tobytes()


PICTURES = [picture(i) for i in range(COUNT)]


@pytest.fixture
def folder(tmp_path):
    write_face_records(tmp_path / "train", [(PICTURES[i], i // EACH) for i in range(COUNT)])
    write_landmark_csv(tmp_path / "ldmk_5points.csv", np.tile(CANONICAL_KEYPOINTS, (COUNT, 1, 1)))
    return tmp_path


def rewrite(folder, change):
    """The same records, each as ``change(key, header, payload)`` gives it."""
    reader = RecordReader(folder)
    records = [(key, *change(key, *reader[key])) for key in reader]
    with RecordWriter(folder / "train") as writer:
        for record in records:
            writer.write(*record)


def index_lines(folder):
    return [tuple(map(int, line.split("\t"))) for line in (folder / "train.idx").read_text().splitlines()]


def write_index(folder, lines):
    (folder / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in lines))


def contradictions(folder):
    return inspect_records(folder, check=1)["contradictions"]


def test_what_is_right_passes(folder):
    assert open_faces(folder).num_classes == COUNT // EACH and contradictions(folder) == []


def test_what_mxnet_wrote_passes(shared):
    paths = sorted((shared / "golden" / "mxnet_recordio").glob("*.rec"))
    assert paths and not any(contradictions(path) for path in paths)


def test_a_record_0_that_ends_too_early(folder):
    end = COUNT // 2
    rewrite(folder, lambda key, header, data: (header, data) if key else (RecordHeader(np.array([end, end + 5])), b""))
    with pytest.raises(RecordError, match=rf"record 0 .* announces {end - 1} images, but record {end} holds one more"):
        open_faces(folder)


SHIFTS = {
    "all keys": lambda lines: [(key + 1, offset) for key, offset in lines],
    "offsets": lambda lines: list(zip([key for key, _ in lines], [offset for _, offset in lines[1:]], strict=False)),
    "images": lambda lines: [
        lines[0],
        *((key, lines[key % COUNT + 1][1]) for key, _ in lines[1 : COUNT + 1]),
        *lines[COUNT + 1 :],
    ],
    "from the middle": lambda lines: [*lines[:20], *((key, lines[key + 1][1]) for key, _ in lines[20:COUNT])],
}


@pytest.mark.parametrize("layout", ["InsightFace", "im2rec"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shifted_index(folder, shift, layout):
    if layout == "im2rec":
        with RecordWriter(folder / "train") as writer:
            for i in range(COUNT + 1):
                writer.write(i, RecordHeader(i // EACH, i), PICTURES[i % COUNT])
    write_index(folder, SHIFTS[shift](index_lines(folder)))
    for opening in (open_faces, open_crops, lambda path: repack(path, path / "out")):
        with pytest.raises(RecordError, match=r"train\.rec: record"):
            opening(folder)


def test_ids_that_are_no_keys_say_nothing(folder):
    for number in (0, 7):
        rewrite(folder, lambda key, header, data: (header._replace(id=number), data))  # noqa: B023 - called at once
        assert len(open_faces(folder)) == COUNT and contradictions(folder) == []
    rewrite(folder, lambda key, header, data: (header._replace(id=max(0, key - 1)), data))  # images from 0
    assert len(open_faces(folder)) == COUNT and contradictions(folder) == []


def test_merged_files_keep_their_ids(folder):
    with RecordWriter(folder / "train") as writer:
        for i in range(2 * COUNT):
            writer.write(i, RecordHeader(i // EACH, i % COUNT), PICTURES[i % COUNT])
    (folder / "ldmk_5points.csv").unlink()
    assert len(open_faces(folder)) == 2 * COUNT and contradictions(folder) == []


def test_a_label_beyond_the_people(folder, tmp_path):
    rewrite(folder, lambda key, header, data: (header._replace(label=4_000_000) if key == 7 else header, data))
    with pytest.raises(RecordError, match=r"record 7 has label 4000000, but record 0 says that there are 10 people"):
        open_faces(folder)
    beyond, differ = contradictions(folder)
    assert beyond.startswith("record 7 has label 4000000") and differ.startswith("identity record 42 has images 5 to 8")
    assert repack(folder, tmp_path / "out").identities == 11
    assert open_faces(tmp_path / "out").num_classes == 11


def test_people_without_images_are_told(folder, caplog):
    with RecordWriter(folder / "train") as writer:
        for i in range(COUNT):
            writer.write(i, RecordHeader(4_000_000 if i == 3 else i // EACH, i), PICTURES[i])
    with caplog.at_level(logging.WARNING):
        open_faces(folder)
    assert "labels go up to 4000000, but only 11 people have images" in caplog.text


def test_a_label_that_contradicts_the_identity_records(folder):
    rewrite(folder, lambda key, header, data: (header._replace(label=9) if key == 7 else header, data))
    assert contradictions(folder) == ["identity record 42 has images 5 to 8, whose labels differ"]


def test_identity_records_with_gaps_and_another_property(folder):
    rewrite(
        folder,
        lambda key, header, data: (RecordHeader(np.array([6, 9]), key) if key == COUNT + 2 else header, data),
    )
    (folder / "property").write_text("11,112,112")
    assert contradictions(folder) == [
        "identity record 42 starts at image 6, the previous one ended at 5",
        "the property file says 11 people, record 0 10",
    ]
    (folder / "property").write_bytes(b"\xff\xfe1")
    assert "the property file is damaged: " in contradictions(folder)[-1]


def test_many_contradictions_are_counted(folder):
    rewrite(folder, lambda key, header, data: (header if header.flag else header._replace(label=99), data))
    messages = contradictions(folder)
    assert len(messages) == 6 and messages[-1] == "... and 35 more of this kind"


def test_repack_begins_with_the_first_image_that_can_be_read(folder, tmp_path, caplog):
    rewrite(folder, lambda key, header, data: (header, data[:200] if key < 3 else data))
    assert repack(folder, tmp_path / "out").images == COUNT - 2
    assert "record 1 at byte" in caplog.text and "record 2 at byte" in caplog.text
    rewrite(folder, lambda key, header, data: (header, data[:200]))
    with pytest.raises(RecordError, match=r"train\.rec has no readable image; the first error: .* record 40 at byte"):
        repack(folder, tmp_path / "none")


def test_inspect_tells_and_fails(folder):
    rewrite(folder, lambda key, header, data: (header._replace(label=9) if key == 7 else header, data))
    write_landmark_csv(folder / "ldmk_5points.csv", np.zeros((COUNT, 5, 2)))
    result = CliRunner().invoke(cli.app, ["rec", "inspect", str(folder), "--num-workers", "0"])
    assert result.exit_code == 1
    assert "contradiction        identity record 42 has images 5 to 8, whose labels differ\n" in result.output
    assert "landmarks            40 rows, 40 of them not landmarks of a face\n" in result.output
