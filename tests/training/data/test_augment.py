import random

import numpy as np
import pytest
import torch
from timm.data.auto_augment import AugmentOp

from wd_probe import InputError
from wd_probe.training.data.augment import AutoAugment, allow_no_bits

IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)


def drawn(policy, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return AutoAugment(policy, 16)(IMAGES)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"])
def test_images_are_augmented_one_by_one_by_the_global_random_state(policy):
    found = drawn(policy, 0)
    assert (found.dtype, found.shape) == (IMAGES.dtype, IMAGES.shape)
    assert not torch.equal(found, IMAGES)
    assert torch.equal(found, drawn(policy, 0))
    assert not torch.equal(found, drawn(policy, 1))


def test_what_no_image_is_moved_by_stays_as_it_is():
    assert torch.equal(AutoAugment("rand-m9-p0", 16)(IMAGES), IMAGES)


def test_no_bits_are_a_black_picture():
    op = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    allow_no_bits([op])
    augment = AutoAugment("rand-m9", 16)
    augment._transform = op
    assert augment(IMAGES).count_nonzero() == 0
    op.magnitude = 5
    assert torch.equal(augment(IMAGES), IMAGES & 0b11000000)


def test_a_policy_that_there_is_not():
    with pytest.raises(InputError, match="--aa 'foo' is none of timm's: Unknown AA policy foo"):
        AutoAugment("foo", 16)
