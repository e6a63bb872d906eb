import pytest
import torch
from torch import nn

from isd_ray.errors import UserError
from isd_ray.models.heads import mlp


def test_isd_predictor_has_no_bias_before_its_norm():
    head = mlp([8, 8, 8], bias=False)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].bias is None
    assert head[3].bias is not None


def test_isd_plus_heads_are_the_published_sizes_and_carry_biases():
    projector, predictor = mlp([512, 1024, 128]), mlp([128, 1024, 128])
    assert [tuple(p.shape) for p in projector.parameters()] == [
        (1024, 512),
        (1024,),
        (1024,),
        (1024,),
        (128, 1024),
        (128,),
    ]
    assert predictor(torch.randn(2, 128)).shape == (2, 128)


def test_moco_head_has_no_norm_and_one_layer_has_nothing_between():
    assert [type(layer) for layer in mlp([8, 8, 4], norm="none")] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in mlp([8, 4])] == [nn.Linear]


def test_last_norm_without_affine_standardises_the_output():
    head = mlp([8, 8, 8, 4], last_bias=False, last_norm="bn_no_affine")
    output = head(torch.randn(64, 8))
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in head) == 3
    assert not list(head[-1].parameters())
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.std(0, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)


def test_mistakes():
    with pytest.raises(UserError, match="unknown norm 'batch'"):
        mlp([8, 8, 8], norm="batch")
    with pytest.raises(UserError, match="input and an output size"):
        mlp([8])
