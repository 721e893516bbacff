import io

import cv2
import numpy as np
import pytest
import tiny_packs as tiny
from PIL import Image
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app import aligned_folder
from insightface_kprpe.app.aligned_folder import align_to_folder, align_to_records, crop_names
from insightface_kprpe.app.alignment import AlignOptions, choose_faces
from insightface_kprpe.app.detection import Detected, detector_file, find_faces, open_detector
from insightface_kprpe.data.crops import open_crops
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.face_list import ListedFace, format_faces, parse_faces, read_faces
from insightface_kprpe.data.image_codec import decode_image, encode_jpeg
from insightface_kprpe.data.landmark_csv import read_landmark_csv
from insightface_kprpe.data.photos import open_photos
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, align_face

pytestmark = pytest.mark.usefixtures("unregistered")


@pytest.fixture
def detector(tmp_path):
    return tiny.write_detector(tmp_path / "detector.onnx")


def write(path, *cells, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), tiny.draw_picture(list(cells), seed=seed))
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    write(folder / "Bob" / "1.png", (5, 5))
    write(folder / "Ann" / "2.png", (7, 5), (20, 20), seed=1)
    write(folder / "Ann" / "10.png", (14, 20), seed=2)
    write(folder / "Cid" / "none.png", seed=3)
    return folder


def contents(folder):
    """Of what a user sees in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def test_a_folder_of_people(photos, detector, tmp_path):
    done = align_to_folder(photos, tmp_path / "out", detector)
    assert (done.photos, done.crops, done.without, done.nobody) == (4, 3, {"Cid/none.png": "no face found"}, ["Cid"])
    crops = open_crops(tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in crops.paths] == ["Ann/10.jpg", "Ann/2.jpg", "Bob/1.jpg"]
    keypoints, scores = read_landmark_csv(crops.landmark_file, crops.count)
    listed = {face.crop: face for face in done.faces if face.crop}
    for number, path in enumerate(crops.paths):
        face = listed[path.relative_to(tmp_path / "out").as_posix()]
        photo = cv2.imread(str(photos / face.photo))
        crop, expected = align_face(photo, face.landmarks_px)
        np.testing.assert_array_equal(crops.read(number), decode_image(encode_jpeg(crop[..., ::-1])))
        np.testing.assert_allclose(keypoints[number], expected, atol=1e-4)
        np.testing.assert_allclose(scores[number], face.score, atol=1e-5)
    left = [face for face in done.faces if face.left_out and face.photo == "Ann/2.png" and face.score > 0.5]
    assert [face.left_out for face in left] == ["not the largest face"]
    assert left[0].box.tolist() == pytest.approx([144, 144, 176, 176], abs=20)


def test_the_list_reads_back(photos, detector, tmp_path):
    done = align_to_folder(photos, tmp_path / "out", detector)
    text = (tmp_path / "out" / "faces.csv").read_text()
    assert format_faces(parse_faces(text, "x")) == text == format_faces(done.faces)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["photo,score", *lines[1:]], "line 1: columns must be"),
        (lambda lines: [*lines[:2], lines[2].rsplit(",", 1)[0]], "line 3: must have"),
        (lambda lines: [*lines[:2], lines[2].replace(",0,", ",maybe,", 1)], "line 3"),
        (lambda lines: [lines[0], lines[1].replace(".", ".x", 3)], "line 2"),
        (lambda lines: [], "line 1"),
        (lambda lines: [*lines[:2], lines[2].replace(",a.jpg,", ",../a.jpg,")], "line 3: a crop must lie below"),
        (lambda lines: [*lines[:2], lines[2].replace(",0.500000,", ",1.5,")], "line 3: a face must have a score"),
    ],
)
def test_damaged_lists_name_the_line(change, message):
    face = ListedFace("a.jpg", (1, 2), "a.jpg", "", False, 0.5, np.ones(4), np.ones((5, 2)), np.ones((5, 2)))
    lines = format_faces([face, face]).splitlines()
    with pytest.raises(ValueError, match=f"faces.csv: {message}"):
        parse_faces("\n".join(change(lines)), "faces.csv")


def detected(boxes, scores, scale=1.0):
    boxes = np.float32(boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    points = boxes[:, None, :2] + ARCFACE_TEMPLATE_112 / 112 * sides[:, None] * scale
    return Detected(boxes, np.float32(scores), points, np.zeros(len(boxes), bool))


def test_which_faces_count():
    found = detected(
        [[0, 0, 50, 50], [40, 40, 60, 60], [60, 0, 100, 40], [0, 60, 9, 90], [70, 70, 99, 99]],
        [0.9, 0.8, 0.7, 0.9, 0.4],
    )
    small = {"min_size": 10}
    size = (100, 100)
    reasons = {3: "smaller than 10 pixels", 4: "score below 0.5"}
    other = dict.fromkeys((1, 2), "not the largest face")
    assert choose_faces(found, size, AlignOptions(**small)) == ([0], reasons | other)
    chosen, left = choose_faces(found, size, AlignOptions(faces="central", **small))
    assert chosen == [1] and left[0] == "not the most central face"
    assert choose_faces(found, size, AlignOptions(faces="all", **small)) == ([0, 2, 1], reasons)
    chosen, left = choose_faces(found, size, AlignOptions(faces="all", max_faces=2, **small))
    assert chosen == [0, 2] and left[1] == "not of the 2 largest"
    coinciding = detected([[0, 0, 50, 50]], [0.9], scale=0)
    assert choose_faces(coinciding, size, AlignOptions()) == ([], {0: "its landmarks are no face's"})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mode": "tight"}, "mode"),
        ({"faces": "both"}, "faces"),
        ({"max_faces": 2}, "max_faces"),
        ({"det_thresh": 0.0}, "det_thresh"),
        ({"det_thresh": float("nan")}, "det_thresh"),
        ({"min_size": float("inf")}, "min_size"),
        ({"quality": 0}, "quality"),
    ],
)
def test_options_are_checked(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        AlignOptions(**options)


@pytest.mark.parametrize("mode", ["box", "whole"])
def test_other_modes_leave_faces_as_they_are(mode, photos, detector, tmp_path):
    align_to_folder(photos, tmp_path / "out", detector, AlignOptions(mode=mode))
    for face in read_faces(tmp_path / "out" / "faces.csv"):
        if face.crop:
            photo, crop = cv2.imread(str(photos / face.photo)), cv2.imread(str(tmp_path / "out" / face.crop))
            left, top, right, _ = face.box if mode == "box" else (0, 0, *photo.shape[1::-1])
            np.testing.assert_allclose(face.keypoints, (face.landmarks_px - [left, top]) / (right - left), atol=1e-3)
            expected = photo[int(top) : int(top + right - left), int(left) : int(right)]
            expected = cv2.resize(expected, (112, 112), interpolation=cv2.INTER_AREA)
            assert np.abs(expected.mean((0, 1)) - crop.mean((0, 1))).max() < 4


def test_faces_of_a_list_are_cut_again(photos, detector, tmp_path):
    options = AlignOptions(mode="box", faces="all")
    align_to_folder(photos, tmp_path / "first", detector)
    again = align_to_folder(photos, tmp_path / "again", tmp_path / "first" / "faces.csv", options)
    fresh = align_to_folder(photos, tmp_path / "fresh", detector, options)
    assert again.without == fresh.without and [f.crop for f in again.faces] == [f.crop for f in fresh.faces]
    for one, other in zip(again.faces, fresh.faces, strict=True):
        np.testing.assert_allclose(one.keypoints, other.keypoints, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="list of faces not found"):
        align_to_folder(photos, tmp_path / "x", tmp_path / "no" / "faces.csv")


def test_a_killed_run_goes_on(photos, detector, tmp_path, monkeypatch):
    whole = align_to_folder(photos, tmp_path / "whole", detector)
    write_crops, seen = aligned_folder._write_crops, []

    def die(out, cut):
        if len(seen) == 2:
            (out / "Cid").mkdir()
            (out / "Bob").mkdir()
            (out / "Bob" / "1.jpg").write_bytes(b"half a file")
            raise KeyboardInterrupt
        seen.append(cut.faces[0].photo)
        write_crops(out, cut)

    monkeypatch.setattr(aligned_folder, "_write_crops", die)
    with pytest.raises(KeyboardInterrupt):
        align_to_folder(photos, tmp_path / "out", detector)
    journal = tmp_path / "out" / aligned_folder._JOURNAL
    journal.write_bytes(journal.read_bytes() + b"Bob/1.png,12,3")  # as a kill may leave it
    monkeypatch.setattr(aligned_folder, "_write_crops", lambda out, cut: (seen.append(0), write_crops(out, cut)))
    done = align_to_folder(photos, tmp_path / "out", detector)
    assert seen == ["Ann/10.png", "Ann/2.png", 0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and done.without == whole.without
    assert align_to_folder(photos, tmp_path / "out", detector).crops == 3 and len(seen) == 4


def test_new_changed_and_gone_photos(photos, detector, tmp_path):
    out = tmp_path / "out"
    align_to_folder(photos, out, detector)
    write(photos / "Bob" / "1.png", (22, 22), seed=9)
    write(photos / "Ann" / "1.png", (9, 9), seed=5)
    (photos / "Ann" / "2.png").unlink()
    done = align_to_folder(photos, out, detector)
    assert done.gone == ["Ann/2.png"] and not (out / "Ann" / "2.jpg").exists()
    align_to_folder(photos, tmp_path / "fresh", detector)
    assert contents(out) == contents(tmp_path / "fresh")
    (out / "Ann" / "1.jpg").unlink()
    align_to_folder(photos, out, detector)
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_is_there_is_not_mixed_up(photos, detector, tmp_path):
    out = tmp_path / "out"
    align_to_folder(photos, out, detector)
    with pytest.raises(ValueError, match="made in another way .mode was 'aligned' and is 'box'"):
        align_to_folder(photos, out, detector, AlignOptions(mode="box"))
    write(out / "Ann" / "x.png")
    with pytest.raises(ValueError, match="pictures that were not cut here, such as .*x.png"):
        align_to_folder(photos, out, detector)
    for inside in (photos, photos / "out", tmp_path):
        with pytest.raises(ValueError, match="out must lie apart from the source"):
            align_to_folder(photos, inside, detector)
    write(tmp_path / "full" / "a.png")
    with pytest.raises(ValueError, match="out must be a new folder"):
        align_to_folder(photos, tmp_path / "full", detector)
    (tmp_path / "full" / aligned_folder._SETTINGS).write_text("{}")
    with aligned_folder._alone(tmp_path / "full"), pytest.raises(ValueError, match="another process is writing"):
        align_to_folder(photos, tmp_path / "full", detector)


def test_processes_change_nothing(photos, detector, tmp_path):
    align_to_folder(photos, tmp_path / "one", detector)
    align_to_folder(photos, tmp_path / "two", detector, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def saved(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def test_pictures_of_every_kind(detector, tmp_path):
    picture = tiny.draw_picture([(5, 9)])
    image = Image.fromarray(picture[..., ::-1])
    gray = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    folder = tmp_path / "photos"
    folder.mkdir()
    files = {
        "plain.png": saved(image, "PNG"),
        "turned.jpg": saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG", quality=95),
        "gray.png": saved(gray, "PNG"),
        "deep.png": cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes(),
        "deep.tif": cv2.imencode(".tif", picture.astype(np.uint16) * 257)[1].tobytes(),
        "moving.gif": saved(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)]),
        "clear.png": saved(image.convert("RGBA"), "PNG"),
        "palette.png": saved(image.convert("P"), "PNG"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "cut.jpg").write_bytes(files["cmyk.jpg"][:3000])
    (folder / "text.jpg").write_text("no picture")
    done = align_to_folder(folder, tmp_path / "out", detector)
    rows = {face.photo: face for face in done.faces if face.crop or face.photo in done.without}
    for name in files:
        if name in rows or name != "moving.gif":  # which not every OpenCV reads
            assert rows[name].crop, rows[name].left_out
            np.testing.assert_allclose(rows[name].box, rows["plain.png"].box, atol=0.6, err_msg=name)
            crop, plain = (cv2.imread(str(tmp_path / "out" / rows[n].crop)) for n in (name, "plain.png"))
            assert np.abs(crop.astype(int) - plain).mean() < (40 if "gray" in name else 12), name
    assert rows["cut.jpg"].left_out.startswith("unreadable: ") and "truncated" in rows["cut.jpg"].left_out
    assert set(done.without) == {"cut.jpg", "text.jpg"}
    assert rows["deep.png"].crop == "deep.png.jpg"  # beside deep.tif


def test_names_of_crops_are_apart():
    assert crop_names(["a/b.jpg", "a/b.png", "a/B.gif", "c.x.jpg"]) == ["a/b.jpg", "a/b.png", "a/B.gif", "c.x"]


class Shy:
    """Sees a face only where there is a border, 300 pixels to the right of its corner."""

    def __init__(self, score=0.9, without_border=0.0):
        self.score, self.without_border = score, without_border

    def detect(self, img):
        score = self.score if not img[0].any() else self.without_border
        found = int(score > 0)
        box = np.float32([[60, 60, 100, 110, score]])[:found]
        return box, np.float32(ARCFACE_TEMPLATE_112 / 3 + 60)[None][:found]


def test_tight_crops_are_seen_with_a_border():
    image = np.full((80, 60, 3), 200, np.uint8)
    found = find_faces(Shy(), image, 0.5)
    assert found.with_border.tolist() == [True] and found.boxes.tolist() == [[20, 20, 60, 70]]
    np.testing.assert_allclose(found.landmarks_px[0], ARCFACE_TEMPLATE_112 / 3 + 20, atol=1e-4)
    both = find_faces(Shy(without_border=0.6), image, 0.5)  # the one that was found first is not in the middle
    assert both.scores.tolist() == pytest.approx([0.9, 0.6]) and both.with_border.tolist() == [True, False]
    middle = find_faces(Shy(without_border=0.6), np.full((160, 160, 3), 200, np.uint8), 0.5)
    assert middle.with_border.tolist() == [False]
    assert find_faces(Shy(0.4), image, 0.5).scores.tolist() == pytest.approx([0.4])
    assert not len(find_faces(Shy(), image[:0], 0.5).scores)
    sizes = []

    def see_in_wide_borders(img):
        sizes.append(img.shape[:2])
        box = np.float32([[75, 75, 90, 95, 0.9]])[: len(sizes) == 3]
        return box, np.float32(ARCFACE_TEMPLATE_112)[None][: len(box)]

    shy = Shy()
    shy.detect = see_in_wide_borders
    assert find_faces(shy, image, 0.5).boxes.tolist() == [[5, 5, 20, 25]]
    assert sizes == [(80, 60), (160, 140), (220, 200)]


def test_records_have_labels_and_landmarks(photos, detector, tmp_path):
    done = align_to_records(photos, tmp_path / "rec", detector)
    faces = open_faces(tmp_path / "rec")
    assert faces.labels.tolist() == [0, 0, 1] and faces.source.has_landmarks and done.nobody == ["Cid"]
    assert len(read_faces(tmp_path / "rec" / "faces.csv")) == len(done.faces)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.onnx", "photos", "rec"]
    with pytest.raises(ValueError, match="out must be a new folder"):
        align_to_records(photos, tmp_path / "rec", detector)
    with pytest.raises(ValueError, match="sub-folder of photos for each person"):
        align_to_records(photos / "Ann", tmp_path / "flat", detector)


def test_frames_of_a_video(detector, tmp_path):
    path = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (256, 256))
    if not writer.isOpened():
        pytest.skip("the installed OpenCV writes no video")
    for number in range(7):
        writer.write(tiny.draw_picture([(4 + 3 * number, 9)], seed=number))
    writer.release()
    done = align_to_folder(path, tmp_path / "out", detector, every=3)
    cut = [face for face in done.faces if face.crop]
    assert [face.crop for face in cut] == ["frame_000000.jpg", "frame_000003.jpg", "frame_000006.jpg"]
    lefts = [face.box[0] for face in cut]
    assert np.diff(lefts).tolist() == [72, 72]
    align_to_folder(path, tmp_path / "two", detector, every=3, num_workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "out")
    frames = open_photos(path)
    assert len(frames) == 7
    last, first = frames[6], frames[0]
    np.testing.assert_array_equal(frames[6], last)
    assert np.abs(first.astype(int) - last).max() > 50
    with pytest.raises(ValueError, match="every must be 1 or more"):
        open_photos(path, 0)
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match="is it a video"):
        open_photos(path)


def test_a_dfa_looks_at_crops_of_one_face(photos, tmp_path):
    dfa = tiny.write_aligner(tmp_path / "dfa.onnx")
    done = align_to_folder(photos, tmp_path / "out", dfa, num_workers=1)
    assert done.crops == 4 and not done.without


def test_detectors_are_found_and_checked(photos, tmp_path):
    tiny.write_pack(tmp_path / "root")
    assert detector_file("tiny", tmp_path / "root", tmp_path / "x").name == "detection.onnx"
    recognition = tmp_path / "root" / "models" / "tiny" / "recognition.onnx"
    with pytest.raises(ValueError, match="finds faces and their landmarks"):
        align_to_folder(photos, tmp_path / "out", recognition)
    assert len(open_detector(tiny.write_detector(tmp_path / "d.onnx"), 0.5).detect(tiny.draw_picture([(5, 5)]))[0])


def run(*arguments):
    return CliRunner().invoke(cli.app, ["align", *map(str, arguments)])


def test_the_verb(photos, detector, tmp_path, caplog):
    out = tmp_path / "out"
    (photos / "pairs.txt").write_text("1\nAnn\t1\t2\nAnn\t1\tBob\t1\n")
    result = run(photos, "--out", out, "--detector", detector, "--overlay", 4, "--num-workers", 0, "--faces", "all")
    assert result.exit_code == 0, result.output
    assert f"{out}: 4 crops of 4 photos; 1 without a crop" in result.output
    assert "Cid/none.png: no crop, no face found" in result.output and "no crop of 1 people: Cid" in result.output
    sheet = cv2.imread(str(out / "ldmk_5points.png"))
    assert sheet.shape[1] == 4 * 144 and sheet.any()
    assert (out / "pairs.txt").read_text().startswith("1\n")
    assert len(open_crops(out).paths) == 4 and not caplog.records  # the sheet is none of them
    photo = photos / "Bob" / "1.png"
    assert run(photo, "--out", tmp_path / "one", "--detector", detector).exit_code == 0
    assert (tmp_path / "one" / "1.jpg").is_file()


def test_the_verb_refuses(photos, detector, tmp_path):
    for arguments, words in (
        (("https://example.org/a.jpg", "--out", tmp_path / "a"), "is a URL"),
        ((tmp_path / "nowhere", "--out", tmp_path / "a"), "not found"),
        ((photos / "Cid", "--out", tmp_path / "b"), "no face was cut out"),
        ((photos, "--out", tmp_path / "c", "--to", "zip"), "to must be folder or rec"),
    ):
        result = run(*arguments, "--detector", detector, "--num-workers", 0)
        assert result.exit_code == 1 and words in str(result.exception), result.output
