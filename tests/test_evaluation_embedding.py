import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from distributed import run_on_ranks

from insightface_kprpe.backbones import VisionTransformer, get_model
from insightface_kprpe.data.image_codec import encode_jpeg
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.synthetic import verification_pairs
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.evaluation.metrics import kfold_accuracy
from insightface_kprpe.evaluation.verification import verify
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, mirror_keypoints
from insightface_kprpe.inference import stores as embedding_store
from insightface_kprpe.inference.embedding import EmbedOptions, embed_faces, embed_images
from insightface_kprpe.inference.images import WholeFiles
from insightface_kprpe.inference.models import TorchEmbedder, open_model

TINY = {
    "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_features": 8, "patch_size": 28,
    "position": "kprpe", "mask_ratio": 0.5,
}  # fmt: skip


@pytest.fixture
def net():
    torch.manual_seed(0)
    return VisionTransformer(**TINY)


@pytest.fixture
def crops():
    return np.random.default_rng(0).integers(0, 255, (7, 112, 112, 3), dtype=np.uint8)


def test_batches_and_flip_add_up(net, crops):
    keypoints = np.random.default_rng(1).random((7, 5, 2)).astype(np.float32)
    embed = TorchEmbedder(net.train())
    got = embed_images(embed, crops, keypoints, batch_size=3)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    points = torch.from_numpy(keypoints)
    with torch.no_grad():
        expected = net.eval()(images, points) + net(images.flip(-1), mirror_keypoints(points))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    assert embed_images(embed, crops, keypoints, flip=False).shape == (7, 8)


def test_the_network_is_left_in_its_mode(net, crops):
    TorchEmbedder(net.train())(torch.zeros(1, 3, 112, 112), torch.zeros(1, 5, 2))
    assert net.training
    with pytest.raises(ValueError, match=r"keypoints must be \(7, 5, 2\)"):
        embed_images(TorchEmbedder(net), crops, np.zeros((3, 5, 2)))


@pytest.fixture
def bin_set(tmp_path):
    images, is_same, keypoints = verification_pairs(5, 20, aligned=False)
    write_verification_bin(tmp_path / "drawn.bin", [encode_jpeg(image) for image in images], is_same)
    return tmp_path, images, is_same, keypoints


def test_bin_sets_with_and_without_landmarks(bin_set, net):
    folder, images, is_same, keypoints = bin_set
    pairs = open_verification("drawn", folder)
    assert pairs.name == "drawn" and (pairs.is_same == is_same).all()
    assert np.abs(pairs.images[3].astype(int) - images[3]).mean() < 5
    np.testing.assert_allclose(pairs.keypoints[4], CANONICAL_KEYPOINTS)
    write_landmark_csv(folder / "drawn_ldmk_5points.csv", keypoints)
    pairs = open_verification(str(folder / "drawn.bin"))
    np.testing.assert_allclose(pairs.keypoints, keypoints, atol=1e-4)
    embeddings = embed_images(TorchEmbedder(net), pairs.images, pairs.keypoints, flip=True)
    expected = kfold_accuracy(embeddings[::2], embeddings[1::2], is_same)
    assert verify(TorchEmbedder(net), pairs)[:3] == expected[:3]


def test_a_perfect_embedder_reaches_100_percent(bin_set):
    """Embeddings that say who is who: the pairs alternate same, different."""
    folder, *_ = bin_set
    pairs = open_verification("drawn", folder)
    number = iter(range(1000))

    def embed(images, keypoints):
        rows = []
        for _ in range(len(images)):
            i = next(number)
            rows.append(np.eye(80)[i if (i // 2) % 2 else i - i % 2])
        return torch.tensor(np.array(rows))

    assert verify(embed, pairs, flip=False).accuracy == 1


def test_unknown_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*lfw\.bin"):
        open_verification("lfw", tmp_path)
    assert open_verification("synthetic_unaligned").keypoints.shape == (1200, 5, 2)


class Interrupted(Exception):
    pass


class Failing(TorchEmbedder):
    """Raises at a call, and counts how many crops it was shown before."""

    def __init__(self, net, calls=10**9):
        super().__init__(net, "tiny")
        self.calls, self.seen = calls, 0

    def __call__(self, images, keypoints):
        if len(images) > 1:  # a single one asks for the length of embeddings
            if self.calls == 0:
                raise Interrupted
            self.calls, self.seen = self.calls - 1, self.seen + len(images)
        return super().__call__(images, keypoints)


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(embedding_store, "BLOCK", 6)
    return np.random.default_rng(0).integers(0, 255, (20, 112, 112, 3), dtype=np.uint8)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, net, many):
    options = EmbedOptions(batch_size=3, flip=False)
    expected = embed_faces(TorchEmbedder(net), many, None, options)
    cached = replace(options, cache=tmp_path)
    with pytest.raises(Interrupted):
        embed_faces(Failing(net, 3), many, None, cached, source="a")  # in the second block
    resumed = Failing(net)
    found = embed_faces(resumed, many, None, cached, source="a")
    assert resumed.seen == 14  # all but the first block
    assert isinstance(found.embeddings, np.memmap)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    again = Failing(net, 0)
    assert (embed_faces(again, many, None, cached, source="a").embeddings == found.embeddings).all()
    assert sorted(path.name for path in (tmp_path / "tiny-images").glob("[!.]*")) == [
        "done", "embeddings.npy", "index.json", "keypoints.npy", "norms.npy", "readable.npy", "scores.npy",
    ]  # fmt: skip


KILLED = """
import os, sys
import numpy as np, torch
from insightface_kprpe.inference import stores as embedding_store
from insightface_kprpe.inference.embedding import EmbedOptions, embed_faces
from insightface_kprpe.inference.models import open_model

embedding_store.BLOCK = 6
embed, calls = open_model(sys.argv[1], "vit_n"), []

class Images(list):
    def __getitem__(self, index):
        if index == 15:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)

images = Images(np.random.default_rng(0).integers(0, 255, (20, 112, 112, 3), dtype=np.uint8))
embed_faces(embed, images, None, EmbedOptions(4, cache=sys.argv[2]), source="a")
"""


@pytest.mark.slow
def test_a_killed_run_loses_no_block(tmp_path, many):
    weights = tmp_path / "n.pt"
    torch.save(get_model("vit_n", num_features=8).state_dict(), weights)
    killed = subprocess.run([sys.executable, "-c", KILLED, weights, tmp_path / "cache"], check=False)
    assert killed.returncode == -9
    done = sorted(path.name for path in (tmp_path / "cache" / "n-images" / "done").iterdir())
    assert done == ["000000000", "000000006"]
    embed = open_model(weights, "vit_n")
    found = embed_faces(embed, many, None, EmbedOptions(4, cache=tmp_path / "cache"), source="a")
    expected = embed_faces(embed, many, None, EmbedOptions(4))
    np.testing.assert_allclose(found.embeddings, expected.embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "key"),
    [("model", "model"), ("source", "images"), ("flip", "flip"), ("keypoints", "keypoints"), ("count", "images")],
)
def test_a_cache_of_something_else_is_refused(tmp_path, net, many, change, key):
    options = EmbedOptions(flip=False, cache=tmp_path)
    embed_faces(TorchEmbedder(net, "tiny"), many, None, options, source="a")
    with torch.no_grad():
        net.pos_embed += change == "model"
    keypoints = np.zeros((20, 5, 2), np.float32) if change == "keypoints" else None
    options = replace(options, flip=change == "flip")
    images, source = many[: 19 if change == "count" else 20], "b" if change == "source" else "a"
    with pytest.raises(ValueError, match=f"tiny-images holds results for another {key}: .*remove it"):
        embed_faces(TorchEmbedder(net, "tiny"), images, keypoints, options, source=source)


def test_a_damaged_index_and_anonymous_models_are_refused(tmp_path, net, many):
    options = EmbedOptions(cache=tmp_path)
    with pytest.raises(ValueError, match="must come from open_model"):
        embed_faces(lambda images, keypoints: images.flatten(1), many, None, options, source="a")
    (tmp_path / "tiny-images").mkdir()
    for damaged in ("{", "[1]", "[" * 100_000, "\xff"):
        (tmp_path / "tiny-images" / "index.json").write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            embed_faces(TorchEmbedder(net, "tiny"), many, None, options, source="a")


def write_crops(folder, crops):
    paths = [folder / f"{number}.png" for number in range(len(crops))]
    for path, crop in zip(paths, crops, strict=True):
        cv2.imwrite(str(path), crop)
    return paths


@pytest.fixture
def cached(tmp_path, net, many):
    """Files of crops, embedded into a cache; what embeds them again and counts how many."""
    (tmp_path / "crops").mkdir()
    paths = write_crops(tmp_path / "crops", many)
    options = EmbedOptions(batch_size=3, flip=False, missing="skip", cache=tmp_path / "cache")

    def again(paths=paths):
        embed = Failing(net)
        found = embed_faces(embed, WholeFiles(paths), None, options, source="a", files=paths)
        return found, embed.seen

    assert again()[1] == 20 and again()[1] == 0
    return tmp_path, paths, again


def test_images_that_have_changed_are_embedded_anew(cached, net, many, caplog):
    folder, paths, again = cached
    paths[7].write_bytes(paths[0].read_bytes())  # another face under the same name
    found, seen = again()
    assert seen == 6  # one block
    np.testing.assert_allclose(found.embeddings[7], found.embeddings[0], atol=1e-5)
    assert "1 files have changed, recomputing them: " in caplog.text and "7.png" in caplog.text
    paths[19].unlink()  # vanished, then back
    assert not again()[0].readable[19]
    cv2.imwrite(str(paths[19]), many[19])
    assert again()[0].readable.all()


def test_images_that_moved_or_were_touched_are_not(cached):
    folder, paths, again = cached
    os.utime(paths[3])
    assert again()[1] == 0
    shutil.copytree(folder / "crops", folder / "elsewhere")
    moved = [folder / "elsewhere" / path.name for path in paths]
    assert again(moved)[1] == 0
    assert again([moved[0], moved[2], moved[1], *moved[3:]])[1] == 6  # in another order


@pytest.mark.parametrize("name", ["embeddings", "keypoints"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "gone", "other shape"])
def test_a_damaged_column_is_made_anew(cached, caplog, name, damage):
    folder, _, again = cached
    whole = np.array(again()[0].embeddings)
    file = folder / "cache" / "tiny-images" / f"{name}.npy"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "other shape":
        np.save(file, np.zeros(3))
    else:
        file.write_bytes(content[:-50] if damage == "cut" else content[:20] + b"(((\x00'" + content[25:])
    found, seen = again()
    assert seen == 20 and f"{name}.npy damaged" in caplog.text
    np.testing.assert_allclose(found.embeddings, whole, atol=1e-5)


def test_a_cache_without_its_markers_is_filled_again(cached):
    folder, _, again = cached
    shutil.rmtree(folder / "cache" / "tiny-images" / "done")
    assert again()[1] == 20 and again()[1] == 0


def test_contents_of_another_kind_are_read_again(cached):
    folder, _, again = cached
    np.savez(
        folder / "cache" / "tiny-images" / "contents.npz", stamps=np.full((20, 2), "x"), digests=np.zeros((20, 16))
    )
    assert again()[1] == 20


def test_a_cache_that_somebody_removes_meanwhile_is_named(cached):
    folder, paths, _ = cached
    store = embedding_store.FolderStore(folder / "other", {"a": ((), np.float32)}, 3, {})
    shutil.rmtree(folder / "other")
    with pytest.raises(FileNotFoundError, match="its files are gone; does another process work on the same.*other"):
        store.write(range(3), (np.zeros(3),))


def test_damaged_contents_are_read_again(cached):
    folder, _, again = cached
    (folder / "cache" / "tiny-images" / "contents.npz").write_bytes(b"PK no zip")
    assert again()[1] == 20  # what the embeddings are of is not known any more


def test_a_full_disk_says_what_is_needed(tmp_path, net, many, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = EmbedOptions(flip=False, cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"no space left for 0\.00 GB of results; free some space.*tiny-images"):
            embed_faces(TorchEmbedder(net, "tiny"), many, None, options, source="a")
    assert embed_faces(TorchEmbedder(net, "tiny"), many, None, options, source="a").readable.all()


def test_skipping_is_not_offered_where_all_images_are_missing(net, many):
    options = EmbedOptions(batch_size=3, flip=False)
    with pytest.raises(ValueError, match="image 0: file not found; no image could be read so far"):
        embed_faces(TorchEmbedder(net), [None] * 20, None, options)
    with pytest.raises(ValueError, match="image 7: file not found; or choose to skip such images"):
        embed_faces(TorchEmbedder(net), [*many[:7], None, *many[8:]], None, options)


def test_missing_images_are_skipped_or_named(tmp_path, net, many):
    """In memory and in a cache, also where the cache was filled by a run that skipped them."""
    images = [None if i == 4 else image for i, image in enumerate(many)]
    skip = EmbedOptions(batch_size=3, flip=False, missing="skip")
    whole = embed_faces(TorchEmbedder(net, "tiny"), many, None, skip)
    for options in (skip, replace(skip, cache=tmp_path)):
        found = embed_faces(TorchEmbedder(net, "tiny"), images, None, options, source="a")
        assert list(np.flatnonzero(~found.readable)) == [4]
        assert not found.embeddings[4].any() and found.norms[4] == 0
        np.testing.assert_allclose(np.delete(found.embeddings, 4, 0), np.delete(whole.embeddings, 4, 0), atol=1e-5)
        with pytest.raises(ValueError, match=r"image 4: file not found|first: number 4"):
            embed_faces(TorchEmbedder(net, "tiny"), images, None, replace(options, missing="fail"), source="a")
    with pytest.raises(ValueError, match="20 of 20 images could not be read"):
        embed_faces(TorchEmbedder(net, "tiny"), [None] * 20, None, skip)


def embed_on_rank(rank, images, state, folder):
    embedding_store.BLOCK = 6
    net = VisionTransformer(**TINY)
    net.load_state_dict(state)
    options = EmbedOptions(batch_size=4, cache=Path(folder) if folder else None, all_ranks=True)
    found = embed_faces(TorchEmbedder(net, "tiny"), images, None, options, source="a")
    return torch.from_numpy(np.array(found.embeddings))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_two_ranks_give_what_one_gives(tmp_path, net, many, cached):
    expected = embed_faces(TorchEmbedder(net), many, None, EmbedOptions(4)).embeddings
    for found in run_on_ranks(embed_on_rank, 2, many, net.state_dict(), str(tmp_path) if cached else ""):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_reader_processes(net, many):
    found = embed_faces(TorchEmbedder(net), many, None, EmbedOptions(7, num_workers=2))
    np.testing.assert_allclose(found.embeddings, embed_faces(TorchEmbedder(net), many).embeddings, atol=1e-5)
