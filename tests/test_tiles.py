from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cellseg import tiles
from cellseg.adapt import rescale, resize_maps
from cellseg.data.synthetic import generate
from cellseg.instances import Decoding, decode, encode
from cellseg.nn.unet import UNet
from cellseg.tiles import Piece, stitch, with_halo

Labels = NDArray[np.uint32]


@pytest.fixture(params=[(640, 640), (500, 333), (130, 700), (70, 70)])
def maps(request: pytest.FixtureRequest) -> NDArray[np.float32]:
    """Maps (2, H, W) as a network would predict them, of crowded nuclei."""
    height, width = request.param
    labels = generate(1, seed=4, size=700)[1][:height, :width]
    noise = np.random.default_rng(0).normal(0, 0.05, (2, height, width))
    blurred = gaussian_filter(encode(labels).astype(np.float32), (0, 1.2, 1.2)) + noise
    return gaussian_filter(blurred.astype(np.float32), (0, 0.7, 0.7)).clip(0, 1)


def stitched(
    maps: NDArray[np.float32], decoding: Decoding, margin: int = 64
) -> tuple[Labels, list[Piece]]:
    pieces: list[Piece] = []

    def take(piece: Piece) -> None:
        pieces.append(replace(piece, probs=piece.probs.copy()))

    strips = stitch(
        maps.shape[1:],
        lambda rows, columns: maps[:, rows, columns],
        decoding,
        margin,
        take,
    )
    labels, probs = zip(*((a.copy(), b.copy()) for a, b in strips), strict=True)
    np.testing.assert_array_equal(np.concatenate(probs), maps[0])
    return np.concatenate(labels), pieces


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 96)


@pytest.mark.parametrize(
    "more", [{}, {"exclude_border": True}, {"min_confidence": 0.9}], ids=lambda more: "".join(more)
)
def test_stitched_nuclei_are_those_of_the_whole(
    maps: NDArray[np.float32], more: dict[str, Any]
) -> None:
    decoding = Decoding(min_area=20, **more)
    whole, (labels, _) = decode(maps, decoding), stitched(maps, decoding)
    # Equal but for the order of the numbers.
    pairs = np.unique(np.stack([whole.ravel(), labels.ravel()]), axis=1)
    assert labels.max() == whole.max()
    assert pairs.shape[1] == whole.max() + 1


def test_pieces_tell_of_each_nucleus_once_and_whole(maps: NDArray[np.float32]) -> None:
    labels, pieces = stitched(maps, Decoding(min_area=20))
    seen = np.zeros_like(labels)
    for piece in pieces:
        window = seen[piece.rows, piece.columns]
        own = (piece.labels > 0) & (piece.labels <= piece.count)
        assert (window[own] == 0).all()
        window[own] = piece.labels[own] + piece.first - 1
        final = labels[piece.rows, piece.columns]
        # A nucleus of a neighbour keeps the ring of one's own from it, also one yet to be taken.
        assert ((final > 0) <= (piece.labels > 0)).mean() > 0.999
        np.testing.assert_array_equal(piece.probs, maps[0, piece.rows, piece.columns])
    np.testing.assert_array_equal(seen, labels)
    assert sum(piece.count for piece in pieces) == labels.max()


def test_a_nucleus_beyond_the_margin_is_cut_but_mostly_found() -> None:
    maps = np.zeros((2, 300, 300), np.float32)
    maps[0, 20:280, 20:280] = 1
    labels, _ = stitched(maps, Decoding(), margin=32)
    assert not labels[maps[0] == 0].any()
    assert (labels > 0).sum() > 0.9 * maps[0].sum()
    assert labels.max() > 1


def test_foreground_alone_is_stitched_too(maps: NDArray[np.float32]) -> None:
    spots = np.stack([maps[0] * (maps[1] < 0.3)])  # apart, so that none reaches far
    decoding = Decoding(min_area=5)
    labels, _ = stitched(spots, decoding)
    whole = decode(spots, decoding)
    np.testing.assert_array_equal(labels > 0, whole > 0)


@pytest.mark.parametrize("scale", [1 / 3, 1 / 2, 2, 3])
def test_windows_have_the_maps_of_the_whole_at_any_scale(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 128)
    torch.manual_seed(0)
    net = UNet(out_channels=1, base_channels=2, depth=2).double().eval()
    image = torch.randn(1, 3, 96, 480, dtype=torch.float64)

    def maps(rows: slice, columns: slice) -> NDArray[Any]:
        window = image[..., rows, columns]
        with torch.inference_mode():
            return resize_maps(net(rescale(window, scale))[0].numpy(), window.shape[-2:])

    everywhere = slice(0, 96), slice(0, 480)
    windows = with_halo(maps, (96, 480), scale, 2)(*everywhere)
    np.testing.assert_allclose(windows, maps(*everywhere), rtol=1e-6, atol=1e-9)


def test_small_nuclei_are_dropped(maps: NDArray[np.float32]) -> None:
    labels, _ = stitched(maps, replace(Decoding(), min_area=60))
    assert labels.max() > 0
    assert np.bincount(labels.ravel())[1:].min() >= 60


@pytest.mark.parametrize("depth", [2, 4, 5])
def test_fault_12_windows_have_the_maps_of_the_whole_at_any_depth(depth: int) -> None:
    torch.manual_seed(0)
    net = UNet(out_channels=1, base_channels=2, depth=depth).double().eval()
    image = torch.randn(1, 3, 96, 640, dtype=torch.float64)

    def maps(rows: slice, columns: slice) -> NDArray[Any]:
        with torch.inference_mode():
            return net(image[..., rows, columns])[0].numpy()

    everywhere = slice(0, 96), slice(0, 640)
    windows = with_halo(maps, (96, 640), 1, depth)(*everywhere)
    np.testing.assert_allclose(windows, maps(*everywhere), rtol=1e-9)
