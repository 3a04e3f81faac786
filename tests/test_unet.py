from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.measure import block_reduce
from torch import Tensor, nn

from cellseg.nn.losses import DiceBCELoss
from cellseg.nn.unet import ConvModule, UNet

AWKWARD_SIZES = [(1, 1), (1, 500), (17, 33), (15, 12), (100, 160), (16, 16)]


def small_unet(depth: int = 4, base_channels: int = 4, out_channels: int = 1) -> UNet:
    torch.manual_seed(0)
    return UNet(3, out_channels, base_channels, depth)


def pad_to_multiple(image: Tensor, step: int) -> Tensor:
    height, width = image.shape[-2:]
    pads = [(0, 0), (0, 0), (0, -height % step), (0, -width % step)]
    return torch.from_numpy(np.pad(image.numpy(), pads, mode="edge"))


@pytest.mark.parametrize(("base_channels", "expected"), [(64, 31_043_521), (16, 1_944_049)])
def test_the_number_of_parameters_is_that_of_the_drawn_network(
    base_channels: int, expected: int
) -> None:
    with torch.device("meta"):
        net = UNet(3, 1, base_channels)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_modules_are_conv_relu_batch_norm_twice(depth: int) -> None:
    modules = [m for m in small_unet(depth).modules() if isinstance(m, ConvModule)]
    assert len(modules) == 2 * depth + 1
    for module in modules:
        assert [type(layer) for layer in module] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2
        for layer in module:
            if isinstance(layer, nn.Conv2d):
                assert [layer.kernel_size, layer.stride, layer.padding] == [(3, 3), (1, 1), (1, 1)]
                assert layer.bias is not None


def test_channels_double_on_the_way_down_and_halve_on_the_way_up() -> None:
    net = UNet(in_channels=2, out_channels=5, base_channels=4)
    shapes = [
        (layer.in_channels, layer.out_channels)
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    down = [(2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
    bottom = [(32, 64), (64, 64)]
    # Twice as many come in as on the way down: the other half is the skip connection.
    up = [(64, 32), (32, 32), (32, 16), (16, 16), (16, 8), (8, 8), (8, 4), (4, 4)]
    assert shapes == [*down, *bottom, *up, (4, 5)]
    ups = [layer for layer in net.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in ups] == [
        (64, 32),
        (32, 16),
        (16, 8),
        (8, 4),
    ]
    assert {(layer.kernel_size, layer.stride) for layer in ups} == {((2, 2), (2, 2))}


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_output_has_the_size_of_the_input(size: tuple[int, int]) -> None:
    with torch.inference_mode():
        logits = small_unet(out_channels=2).eval()(torch.rand(2, 3, *size))
    assert logits.shape == (2, 2, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_padding_repeats_the_right_and_bottom_border(size: tuple[int, int]) -> None:
    net = small_unet().eval()
    image = torch.rand(1, 3, *size)
    with torch.inference_mode():
        by_hand = net(pad_to_multiple(image, 16))[..., : size[0], : size[1]]
        torch.testing.assert_close(net(image), by_hand)


@pytest.mark.parametrize(
    ("depth", "size", "padded"),
    [
        (4, (1, 1), (16, 16)),
        (4, (16, 48), (16, 48)),
        (4, (17, 33), (32, 48)),
        (1, (17, 34), (18, 34)),
    ],
)
def test_padding_goes_no_further_than_pooling_needs(
    depth: int, size: tuple[int, int], padded: tuple[int, int]
) -> None:
    net = small_unet(depth).eval()
    seen = []
    net.contracting[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.inference_mode():
        net(torch.rand(1, 3, *size))
    assert seen == [(1, 3, *padded)]


@pytest.mark.parametrize("size", [(17, 33), (15, 12), (1, 40), (32, 48)])
@pytest.mark.parametrize("level", range(5))
def test_every_level_sees_its_pixels_where_they_are(level: int, size: tuple[int, int]) -> None:
    # Weights that hand channel 0 down to one level and straight up again leave nothing but
    # that level's max pooling, blown up again: nothing may shift, mix or swap.
    net = small_unet().eval()
    pass_channel_0(net, level)
    image = torch.rand(1, 3, *size)
    with torch.inference_mode():
        logits = net(image)[0, 0].numpy()
    padded = pad_to_multiple(image, 16)[0, 0].numpy()
    blocks = block_reduce(padded, 2**level, np.max)
    expected = blocks.repeat(2**level, axis=0).repeat(2**level, axis=1)[: size[0], : size[1]]
    # Batch normalisation divides by sqrt(1 + 1e-5) up to 18 times.
    np.testing.assert_allclose(logits, expected, rtol=1e-3)


def pass_channel_0(net: UNet, level: int) -> None:
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.zero_()
        for convs in net.contracting:
            convs[0].weight[0, 0, 1, 1] = 1
            convs[3].weight[0, 0, 1, 1] = 1
        for up in net.up:
            up.weight[0, 0] = 1
        for place, convs in enumerate(reversed(net.expanding)):
            # The skip connection comes first, what comes from below second.
            source = convs[0].in_channels // 2 if place < level else 0
            convs[0].weight[0, source, 1, 1] = 1
            convs[3].weight[0, 0, 1, 1] = 1
        net.head.weight[0, 0] = 1


def test_moving_the_image_by_16_px_moves_the_output() -> None:
    net = small_unet(base_channels=2).eval()
    scene = torch.rand(1, 3, 336, 336)
    with torch.inference_mode():
        here = net(scene[..., :320, :320])
        there = net(scene[..., 16:, 16:])
    margin = 112  # what the border reaches in four levels
    here = here[..., margin + 16 : 320 - margin, margin + 16 : 320 - margin]
    there = there[..., margin : 304 - margin, margin : 304 - margin]
    assert here.std() > 0.01
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["in_channels", "out_channels", "base_channels", "depth"])
def test_arguments_below_1_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        UNet(**{name: value})


def test_convolutions_start_as_he_et_al_ask() -> None:
    for layer in small_unet(base_channels=8).modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        weight = layer.weight.detach()
        std = (2 / (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1])) ** 0.5
        # Five standard errors of an estimated standard deviation.
        assert float(weight.std()) == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5)
        assert layer.bias is not None
        assert not layer.bias.any()
        if weight.numel() > 1000:
            assert weight.abs().max() > 2 * std  # a Gaussian, not a uniform distribution


def test_up_convolutions_neither_lose_nor_blow_up_the_signal() -> None:
    for layer in small_unet(base_channels=8).modules():
        if isinstance(layer, nn.ConvTranspose2d):
            variance = layer(torch.randn(8, layer.in_channels, 16, 16)).var().item()
            assert 0.75 < variance < 2.5  # 1 keeps a linear layer's, 2 that of one with a ReLU


def test_channels_last_gives_the_same_logits() -> None:
    net = small_unet().eval()
    image = torch.rand(2, 3, 33, 47)
    with torch.inference_mode():
        expected = net(image)
        net.to(memory_format=torch.channels_last)
        logits = net(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_autocast_is_finite_and_close_to_float32(
    training: bool, dtype: torch.dtype
) -> None:
    net = small_unet().train(training)
    image = torch.rand(2, 3, 48, 64)
    target = (torch.rand(2, 1, 48, 64) > 0.7).float()
    expected = net(image).detach()
    with torch.autocast("cpu", dtype=dtype):
        logits = net(image)
        loss = DiceBCELoss()(logits, target)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert (logits - expected).abs().mean() < 16 * eps * expected.std()
    assert loss.item() == pytest.approx(DiceBCELoss()(expected, target).item(), rel=4 * eps)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
# torch 2.13 uses a deprecated function of its own where it loads its compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_network_gives_the_same_logits() -> None:
    image = torch.rand(1, 3, 17, 33)
    try:
        torch.compile(torch.sin)(image)
    except Exception as error:  # each platform fails in a way of its own
        pytest.skip(f"torch.compile finds no working compiler: {error}")
    net = small_unet(depth=1).eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(net)(image), net(image))


def test_gradients_reach_every_parameter() -> None:
    net = small_unet()
    net(torch.rand(2, 3, 32, 48)).square().mean().backward()
    unreached = [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert unreached == []


def test_gradients_are_those_of_finite_differences() -> None:
    # In eval: batch statistics of a channel that is almost dead bend the loss too sharply.
    net = small_unet().double().eval()
    image, target = torch.rand(2, 3, 30, 40).double(), torch.rand(2, 1, 30, 40).double()
    directions = [torch.randn_like(p) for p in net.parameters()]

    def loss_at(offset: float) -> Tensor:
        pairs = zip(net.named_parameters(), directions, strict=True)
        moved = {name: p + offset * direction for (name, p), direction in pairs}
        return (torch.func.functional_call(net, moved, (image,)) - target).square().mean()

    slope = (loss_at(1e-8) - loss_at(-1e-8)).item() / 2e-8
    loss_at(0).backward()
    pairs = zip(net.parameters(), directions, strict=True)
    along = sum((p.grad * direction).sum().item() for p, direction in pairs if p.grad is not None)
    assert along == pytest.approx(slope, rel=1e-4)


def test_images_of_a_batch_do_not_influence_each_other_in_eval() -> None:
    net = small_unet().eval()
    images = torch.rand(4, 3, 20, 30)
    with torch.inference_mode():
        batch = net(images)
        alone = torch.cat([net(image[None]) for image in images])
        torch.testing.assert_close(batch, alone)
        torch.testing.assert_close(net(images[[2, 0, 3, 1]]), batch[[2, 0, 3, 1]])
