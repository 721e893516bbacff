import pytest
import torch

from insightface_kprpe.dfa.anchors import (
    decode_boxes,
    decode_points,
    encode_boxes,
    encode_points,
    make_anchors,
    overlap,
)


def test_anchors_are_the_reference_ones(golden):
    torch.testing.assert_close(make_anchors(160), torch.tensor(golden("dfa.npz")["anchors"]))


def test_anchors_cover_inputs_that_no_stride_divides():
    # strided convolutions give 13, 7 and 4 cells per side
    assert make_anchors(100).shape == (2 * (13**2 + 7**2 + 4**2), 4)


def test_encoding_is_undone_by_decoding():
    anchors = make_anchors(160)
    corner = torch.rand(3, len(anchors), 2)
    boxes = torch.cat([corner, corner + 0.05 + torch.rand(3, len(anchors), 2)], -1)
    points = torch.randn(3, len(anchors), 10)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_points(encode_points(points, anchors), anchors), points, atol=1e-5, rtol=1e-5)


def test_overlap_of_known_boxes():
    anchors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    found = overlap(torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.5, 0.3, 0.9, 0.7]]), anchors)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [1 / 3, 0.0]]))


def test_anchor_sizes_must_match_the_strides():
    with pytest.raises(ValueError, match="zip"):
        make_anchors(160, ((64, 80), (96, 112)))
