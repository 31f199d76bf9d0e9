import pytest
import torch
from torch import nn

from vim.layers import MambaMixerLayer, ResidualMixer


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def run(layers, x):
    tokens, channels = [x], [x]
    for layer in layers:
        y, z = layer(tokens, channels)
        tokens, channels = [*tokens, y], [*channels, z]
    return channels[-1]


@pytest.mark.parametrize("l", [1, 2, 9])
def test_a_layer_has_4l_plus_1_scalars_and_a_stack_l_times_2l_plus_3(l):
    layers = [MambaMixerLayer(Times(1), Times(1), i) for i in range(1, l + 1)]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert counts == [4 * i + 1 for i in range(1, l + 1)]
    assert sum(counts) == l * (2 * l + 3)


def test_at_the_start_it_is_a_plain_stack():
    x = torch.randn(2, 3)
    averaged, plain = (
        [MambaMixerLayer(Times(2), Times(3), i, averaging=averaging) for i in (1, 2, 3)] for averaging in (True, False)
    )
    assert not [*plain[2].parameters()]
    torch.testing.assert_close(run(averaged, x), 216 * x)
    torch.testing.assert_close(run(plain, x), 216 * x)


def test_the_weighted_sums_of_the_paper():
    first, second = (MambaMixerLayer(Times(2), Times(3), i).double() for i in (1, 2))
    with torch.no_grad():
        for i, parameter in enumerate((*first.parameters(), *second.parameters())):
            parameter.copy_(torch.arange(1.0, len(parameter) + 1) + i)
    # first: alpha 1, beta 2, theta 3 4, gamma 4; second: alpha 5 6, beta 6 7, theta 7 8 9, gamma 8 9
    y1 = 2 * (1 + 2)
    z1 = 3 * (3 + 4 * y1 + 4)
    y2 = 2 * (5 + 6 * y1 + 6 + 7 * z1)
    z2 = 3 * (7 + 8 * y1 + 9 * y2 + 8 + 9 * z1)
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(run([first, second], x), z2 * x)


def test_every_scalar_gets_its_gradient():
    layers = [MambaMixerLayer(Times(2), Times(3), i).double() for i in (1, 2)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    assert torch.autograd.gradcheck(lambda *_: run(layers, x), (x, *parameters))


def test_the_residual_stays_float32_in_low_precision():
    for dtype in (torch.bfloat16, torch.float16):
        block = ResidualMixer(8, nn.Linear(8, 8)).to(dtype)
        assert block(torch.randn(2, 8)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ResidualMixer(8, nn.Linear(8, 8))(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("earlier", [1, 3])
def test_another_number_of_earlier_outputs_is_refused(earlier):
    with pytest.raises(AssertionError, match="the outputs of the l - 1 layers before"):
        MambaMixerLayer(Times(1), Times(1), 2)([torch.ones(2)] * earlier, [torch.ones(2)] * earlier)
