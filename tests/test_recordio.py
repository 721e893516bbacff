"""RecordIO: the same bytes as MXNet, every record checked, nothing half-written."""

import logging
import multiprocessing
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from insightface_kprpe.data import recordio
from insightface_kprpe.data.image_codec import decode_image
from insightface_kprpe.data.recordio import RecordError, RecordHeader, RecordReader, RecordWriter, write_face_records

MAGIC = struct.pack("<I", 0xCED7230A)


def picture(seed: int, suffix: str = ".png") -> tuple[np.ndarray, bytes]:
    """A smooth 112x112 RGB image and its file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (112, 112))
    return image, cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


@pytest.fixture
def face_set(tmp_path):
    """12 faces of 4 people in InsightFace's layout."""
    write_face_records(tmp_path / "train", [(picture(i)[1], i // 3) for i in range(12)])
    return tmp_path


def damage(path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


# Parity with MXNet


def test_reads_what_mxnet_wrote(golden, shared):
    expected = golden("mxnet_recordio/expected.npz")
    reader = RecordReader(shared / "golden" / "mxnet_recordio")
    assert len(reader) == 26
    assert reader.image_keys.tolist() == list(range(1, 21))
    assert reader.labels().dtype == np.int64
    np.testing.assert_array_equal(reader.labels(), expected["labels"])
    for i, key in enumerate(reader.image_keys):
        header, payload = reader[key]
        assert header.id == key
        assert len(payload) == expected["payload_sizes"][i]
        label, image = reader.read_image(key)
        assert label == expected["labels"][i]
        assert np.abs(image.astype(int) - expected["images_rgb"][i]).max() <= 2  # JPEG decoders may round differently
    assert reader[int(expected["split_key"].item())][1] == expected["split_payload"].tobytes()
    np.testing.assert_array_equal(reader[21][0].label, [1, 6])


def test_reads_im2rec_file_without_header(golden, shared):
    expected = golden("mxnet_recordio/expected.npz")
    reader = RecordReader(shared / "golden" / "mxnet_recordio" / "plain.rec")
    assert reader.image_keys.tolist() == list(range(6))
    assert reader.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert np.abs(reader.read_image(0)[1].astype(int) - expected["images_rgb"][0]).max() <= 2


@pytest.mark.parametrize("name", ["train", "plain"])
def test_writes_the_bytes_that_mxnet_writes(name, shared, tmp_path):
    source = shared / "golden" / "mxnet_recordio" / name
    reader = RecordReader(source)
    with RecordWriter(tmp_path / name) as writer:
        for key in reader:
            writer.write(key, *reader[key])
    for suffix in (".rec", ".idx"):
        assert (tmp_path / (name + suffix)).read_bytes() == source.with_suffix(suffix).read_bytes()


def test_face_set_written_anew_is_byte_identical(shared, tmp_path):
    source = shared / "data" / "faces" / "rec"
    reader = RecordReader(source)
    samples = ((reader[key][1], label) for key, label in zip(reader.image_keys, reader.labels(), strict=True))
    assert write_face_records(tmp_path / "train", samples) == 3820
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


# The format


def test_record_bytes(tmp_path):
    with RecordWriter(tmp_path / "a") as writer:
        writer.write(3, RecordHeader(7.0, id=5, id2=6), b"abc" + b"x" + MAGIC + MAGIC + b"y")
        writer.write(9, RecordHeader(np.array([1.0, 2.0])), b"")
    first = struct.pack("<IfQQ", 0, 7.0, 5, 6) + b"abcx"
    split = [MAGIC, struct.pack("<I", 1 << 29 | 28), first]
    split += [MAGIC, struct.pack("<I", 2 << 29 | 0), MAGIC, struct.pack("<I", 3 << 29 | 1), b"y\0\0\0"]
    whole = [MAGIC, struct.pack("<I", 32), struct.pack("<IfQQff", 2, 0.0, 0, 0, 1.0, 2.0)]
    assert (tmp_path / "a.rec").read_bytes() == b"".join(split + whole)
    assert (tmp_path / "a.idx").read_bytes() == b"3\t0\n9\t56\n"


def test_any_payload_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    records = {}
    for key in np.cumsum(rng.integers(1, 5, 300)).tolist():
        pieces = [MAGIC if rng.random() < 0.4 else rng.bytes(rng.integers(9)) for _ in range(rng.integers(12))]
        label = float(key) if rng.random() < 0.5 else rng.standard_normal(rng.integers(1, 4)).astype(np.float32)
        id_ = 0xCED7230A if rng.random() < 0.1 else key  # splits the record inside its header
        records[key] = RecordHeader(label, id_, 2**64 - 1), b"".join(pieces)
    with RecordWriter(tmp_path / "a") as writer:
        for key, (header, payload) in records.items():
            writer.write(key, header, payload)
    reader = RecordReader(tmp_path / "a")
    assert list(reader) == list(records)
    for key, (header, payload) in records.items():
        read_header, read_payload = reader[key]
        assert read_payload == payload
        assert (read_header.id, read_header.id2, read_header.flag) == (header.id, header.id2, header.flag)
        np.testing.assert_array_equal(read_header.label, header.label)
    (tmp_path / "a.idx").unlink()
    scanned = RecordReader(tmp_path / "a")
    assert [scanned[i][1] for i in range(len(scanned))] == [payload for _, payload in records.values()]


def test_face_records_layout(face_set):
    reader = RecordReader(face_set)
    np.testing.assert_array_equal(reader[0][0].label, [13, 17])
    assert reader.image_keys.tolist() == list(range(1, 13))
    assert reader.labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    np.testing.assert_array_equal([reader[key][0].label for key in range(13, 17)], [[1, 4], [4, 7], [7, 10], [10, 13]])
    assert (face_set / "property").read_text() == "4,112,112"
    label, image = reader.read_image(5)
    assert label == 1
    np.testing.assert_array_equal(image, picture(4)[0])


@pytest.mark.parametrize("name", ["train.rec", "train", ""])
def test_ways_to_name_a_file(face_set, name):
    assert len(RecordReader(face_set / name)) == 17


def test_missing_index_is_rebuilt_with_a_notice(face_set, caplog):
    keys = RecordReader(face_set).keys
    (face_set / "train.idx").unlink()
    with caplog.at_level(logging.WARNING):
        reader = RecordReader(face_set)
    assert len(caplog.records) == 1
    np.testing.assert_array_equal(reader.keys, keys)
    assert reader.labels().tolist() == np.repeat(range(4), 3).tolist()


def test_unsorted_index_and_windows_line_ends(face_set):
    lines = (face_set / "train.idx").read_text().splitlines()
    (face_set / "train.idx").write_bytes("\r\n".join(reversed(lines)).encode())
    assert RecordReader(face_set).labels().tolist() == np.repeat(range(4), 3).tolist()


def test_labels_of_arrays_and_split_records(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_LABELS_AT_ONCE", 4)
    with RecordWriter(tmp_path / "train") as writer:
        for key in range(11):
            label = np.array([key, 0.5]) if key % 2 else float(-key)
            writer.write(key, RecordHeader(label), MAGIC if key % 3 else b"payload")
    assert RecordReader(tmp_path).labels().tolist() == [key if key % 2 else -key for key in range(11)]


def test_number_of_images_beyond_float32():
    # 2**24 + 3 is stored as 2**24 + 4; the first record without payload is the first of an identity.
    bound = np.float32(2**24 + 3)
    assert bound == 2**24 + 4
    assert recordio._first_identity(bound, lambda key: key < 2**24 + 3) == 2**24 + 3
    assert recordio._first_identity(np.float32(21), lambda key: True) == 21


# Sharing between threads and processes


def test_threads_share_a_reader(face_set):
    reader = RecordReader(face_set)
    keys = reader.image_keys.tolist() * 20
    with ThreadPoolExecutor(8) as pool:
        payloads = list(pool.map(lambda key: reader[key][1], keys))
    assert payloads == [picture(key - 1)[1] for key in keys]


def test_pickled_reader_opens_the_file_anew(face_set):
    reader = pickle.loads(pickle.dumps(RecordReader(face_set)))
    assert reader.read_image(7)[0] == 2


# A spawned process imports the package (and torch) first.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_a_reader(face_set, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    reader = RecordReader(face_set)
    with multiprocessing.get_context(method).Pool(1) as pool:
        records = pool.map(reader.__getitem__, reader.image_keys.tolist())
    assert [payload for _, payload in records] == [picture(i)[1] for i in range(12)]


# Damage


def test_missing_file_and_key(face_set):
    with pytest.raises(FileNotFoundError, match=r"record file not found: .*nowhere\.rec; give a \.rec"):
        RecordReader(face_set / "nowhere")
    reader = RecordReader(face_set)
    for key in (17, -1):
        with pytest.raises(KeyError, match=f"no record {key}"):
            reader[key]


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"\0\0\0\0", "0x00000000 found where a part must start"),
        (4, struct.pack("<I", 40), "points to byte .* where no record starts"),
        (4, struct.pack("<I", (1 << 29) - 1), "the file ends .* bytes before the record does"),
        (4, struct.pack("<I", 2 << 29 | 40), "part 0 of a record cannot be of kind 2"),
        (4, struct.pack("<I", 7 << 29 | 40), "part 0 of a record cannot be of kind 7"),
        (8, struct.pack("<I", 1 << 20), "too short for 1048576 labels"),
        (32, b"\0\0\0\0", "not a readable image"),
        (12, struct.pack("<f", 1.5), "label 1.5 is not an identity"),
        (12, struct.pack("<f", float("nan")), "label nan is not an identity"),
    ],
)
def test_damaged_record_is_named(face_set, at, content, message):
    offset = int(RecordReader(face_set)._offset(5))
    damage(face_set / "train.rec", offset + at, content)
    reader = RecordReader(face_set)
    with pytest.raises(RecordError, match=rf"train\.rec: record 5 at byte {offset}: .*{message}"):
        reader.read_image(5)
    assert reader.read_image(6)[0] == 1


@pytest.mark.parametrize(
    ("at", "content"), [(0, b"\0\0\0\0"), (4, struct.pack("<I", 20)), (12, struct.pack("<f", float("inf")))]
)
def test_damaged_header_is_found_among_labels(face_set, at, content):
    damage(face_set / "train.rec", int(RecordReader(face_set)._offset(5)) + at, content)
    with pytest.raises(RecordError, match="record 5 at byte"):
        RecordReader(face_set).labels()


def test_broken_sequence_of_parts(tmp_path):
    with RecordWriter(tmp_path / "train") as writer:
        writer.write(1, RecordHeader(0.0), MAGIC + b"tail")
        writer.write(2, RecordHeader(0.0), b"next")
    damage(tmp_path / "train.rec", 32 + 4, struct.pack("<I", 4))  # the last part becomes a record of its own
    with pytest.raises(RecordError, match="record 1 at byte 32: part 1 of a record cannot be of kind 0"):
        RecordReader(tmp_path)[1]


@pytest.mark.parametrize("indexed", [True, False])
def test_truncated_file(face_set, indexed):
    content = (face_set / "train.rec").read_bytes()
    (face_set / "train.rec").write_bytes(content[: len(content) // 2])
    if not indexed:
        (face_set / "train.idx").unlink()
    with pytest.raises(RecordError, match=r"record \d+ at byte \d+") as error:
        RecordReader(face_set)
    assert "train" in str(error.value)


def test_truncation_within_the_last_record(tmp_path):
    with RecordWriter(tmp_path / "train") as writer:
        writer.write(1, RecordHeader(0.0), b"0123456789")
    content = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(content[:-6])
    with pytest.raises(RecordError, match="record 1 at byte 0: the file ends 4 bytes before"):
        RecordReader(tmp_path).labels()
    (tmp_path / "train.rec").write_bytes(b"")
    with pytest.raises(RecordError, match="empty"):
        RecordReader(tmp_path)


def test_labels_of_large_files_are_kept_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_LABELS_KEPT_FROM", 3)
    write_face_records(tmp_path / "train", [(b"x", label) for label in (0, 0, 1)])
    assert RecordReader(tmp_path).labels().tolist() == [0, 0, 1]
    monkeypatch.setattr(recordio, "_labels_at", None)  # not read again
    labels = RecordReader(tmp_path).labels()
    assert labels.tolist() == [0, 0, 1] and labels.dtype == np.int64
    monkeypatch.undo()
    monkeypatch.setattr(recordio, "_LABELS_KEPT_FROM", 3)
    write_face_records(tmp_path / "train", [(b"xx", label) for label in (0, 1, 2)])  # another file
    assert RecordReader(tmp_path).labels().tolist() == [0, 1, 2]
    (tmp_path / "train.labels.npz").write_bytes(b"damaged")
    assert RecordReader(tmp_path).labels().tolist() == [0, 1, 2]


def test_a_head_that_claims_an_impossible_size_is_an_unreadable_image(tmp_path):
    payload = bytearray(picture(1, ".jpg")[1])
    size_at = payload.index(b"\xff\xc0") + 5
    payload[size_at : size_at + 4] = b"\xff\xf0\xff\xf0"
    with pytest.raises(ValueError, match="65520 x 65520 pixels exceed the limit"):
        decode_image(bytes(payload))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_image_never_becomes_pixels(tmp_path, suffix):
    payload = picture(1, suffix)[1]
    with RecordWriter(tmp_path / "train") as writer:
        for key, end in enumerate(range(0, len(payload), 97)):
            writer.write(key, RecordHeader(0.0), payload[:end])
        writer.write(key + 1, RecordHeader(0.0), payload)
    reader = RecordReader(tmp_path)
    for damaged in range(key + 1):
        with pytest.raises(RecordError, match=rf"record {damaged} at byte \d+"):
            reader.read_image(damaged)
    assert reader.read_image(key + 1)[1].shape == (112, 112, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the index is empty"),
        ("0\t0\n1\tx\n", r"line 2: expected key, tab, byte offset; got '1\\tx'"),
        ("0\t0\n1\n", "line 2: expected key"),
        ("0 0\n1 40\n", "line 1: expected key"),
        ("0\t0\t0\n", "line 1: expected key"),
        ("0\t0\n1\t40.0\n", "line 2: expected key"),
        ("0\t0\n5\t99999999\n", r"line 2: record 5 at byte 99999999 cannot be in .*train\.rec"),
        ("0\t0\n5\t41\n", "line 2: record 5 at byte 41 cannot be"),
        ("0\t0\n0\t40\n", r"record 0 is listed twice, at bytes \[0, 40\]"),
        ("0\t0\n1\t99999999999999999999\n", "not an index of records"),
    ],
)
def test_malformed_index(face_set, text, message):
    (face_set / "train.idx").write_text(text)
    with pytest.raises(RecordError, match=message):
        RecordReader(face_set)


def test_a_byte_order_mark_and_other_encodings_of_an_index(face_set):
    text = (face_set / "train.idx").read_text()
    (face_set / "train.idx").write_text(text, encoding="utf-8-sig")
    assert RecordReader(face_set).keys[0] == 0
    (face_set / "train.idx").write_text(text, encoding="utf-16")
    with pytest.raises(RecordError, match=r"train\.idx: the text is UTF-16; save it as UTF-8"):
        RecordReader(face_set)


def test_truncated_index(face_set):
    lines = (face_set / "train.idx").read_text().splitlines(keepends=True)
    (face_set / "train.idx").write_text("".join(lines[:10]))
    with pytest.raises(RecordError, match="record 0 at byte 0: it announces 12 images, the index has 9"):
        RecordReader(face_set)


# Writing


def test_nothing_remains_of_a_failed_writer(face_set):
    before = {path.name: path.read_bytes() for path in face_set.iterdir()}
    with pytest.raises(RuntimeError), RecordWriter(face_set / "train") as writer:
        writer.write(1, RecordHeader(0.0), b"payload")
        raise RuntimeError("power cut")
    assert {path.name: path.read_bytes() for path in face_set.iterdir()} == before


def test_nothing_is_seen_before_close(tmp_path):
    writer = RecordWriter(tmp_path / "train")
    writer.write(1, RecordHeader(0.0), b"payload")
    assert not (tmp_path / "train.rec").exists() and not (tmp_path / "train.idx").exists()
    writer.close()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.idx", "train.rec"]


def test_bad_records_are_refused(tmp_path):
    with RecordWriter(tmp_path / "a") as writer:
        writer.write(4, RecordHeader(0.0), b"")
        for key in (4, 3, -1):
            with pytest.raises(ValueError, match=rf"greater than the one before \(4\), got {key}"):
                writer.write(key, RecordHeader(0.0), b"")
        with pytest.raises(ValueError, match="empty array"):
            writer.write(5, RecordHeader(np.array([])), b"")
    assert RecordReader(tmp_path / "a").keys.tolist() == [4]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one image"),
        ([(b"x", 1)], "sample 0 has 1 after -1"),
        ([(b"x", -1)], "sample 0 has -1 after -1"),
        ([(b"x", 0), (b"x", 2)], "sample 1 has 2 after 0"),
        ([(b"x", 0), (b"x", 1), (b"x", 0)], "sample 2 has 0 after 1"),
        ([(b"x", 0), (b"", 0)], "sample 1 must be a compressed image"),
    ],
)
def test_bad_samples_leave_nothing_behind(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_face_records(tmp_path / "train", samples)
    assert not list(tmp_path.iterdir())
