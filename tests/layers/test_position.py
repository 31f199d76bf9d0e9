import pytest
import torch
import torch.nn.functional as F

from vim.layers import NUM_CLASS_TOKENS, insert_class_tokens, resize_position_table, split_class_tokens


@pytest.mark.parametrize("class_token", NUM_CLASS_TOKENS)
@pytest.mark.parametrize("num_patches", [6, 9])
def test_insert_and_split(class_token, num_patches):
    patches, tokens = torch.randn(2, num_patches, 3), torch.randn(2, NUM_CLASS_TOKENS[class_token], 3)
    sequence = insert_class_tokens(patches, tokens, class_token)
    assert sequence.shape[1] == num_patches + tokens.shape[1]
    back, class_tokens = split_class_tokens(sequence, class_token)
    assert torch.equal(back, patches) and torch.equal(class_tokens, tokens)


def test_the_middle_is_before_patch_98_of_196():
    sequence = insert_class_tokens(torch.zeros(1, 196, 1), torch.ones(1, 1, 1), "middle")
    assert sequence.flatten().nonzero().item() == 98
    assert insert_class_tokens(torch.zeros(1, 729, 1), torch.ones(1, 1, 1), "middle").argmax().item() == 364


@pytest.mark.parametrize("class_token", NUM_CLASS_TOKENS)
def test_resize_keeps_class_tokens_and_resizes_the_grid(class_token):
    grid, tokens = torch.randn(1, 14 * 14, 8), torch.randn(1, NUM_CLASS_TOKENS[class_token], 8)
    table = insert_class_tokens(grid, tokens, class_token)
    assert resize_position_table(table, (14, 14), (14, 14), class_token) is table
    larger = resize_position_table(table, (14, 14), (27, 20), class_token)
    patches, class_tokens = split_class_tokens(larger, class_token)
    assert torch.equal(class_tokens, tokens)
    picture = grid.reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    want = F.interpolate(picture, size=(27, 20), mode="bicubic", align_corners=False)
    torch.testing.assert_close(patches.transpose(1, 2).reshape(1, 8, 27, 20), want)
    back = resize_position_table(larger, (27, 20), (14, 14), class_token)
    assert torch.equal(split_class_tokens(back, class_token)[1], tokens)


def test_resize_keeps_a_constant_table_constant_in_low_precision():
    table = torch.full((1, 17, 4), 0.5, dtype=torch.bfloat16)
    resized = resize_position_table(table, (4, 4), (7, 5), "middle")
    assert resized.shape == (1, 36, 4) and resized.dtype == torch.bfloat16
    assert (resized == 0.5).all()
