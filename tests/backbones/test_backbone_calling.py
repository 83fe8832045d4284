import pytest
import torch

from stagepatch.backbones import learns_sigma, null_label, num_classes, predict, sample_shape
from stagepatch.backbones.calling import condition_arguments
from stagepatch.errors import UserError


def test_class_conditional_model_gets_its_labels(tiny_dit, batch):
    model = tiny_dit()
    sample, timesteps, labels = batch
    assert num_classes(model)
    assert list(condition_arguments(model, labels)) == ["class_labels"]
    assert torch.equal(predict(model, *batch), model(sample, timesteps, class_labels=labels).sample)
    assert not torch.equal(predict(model, *batch), predict(model, sample, timesteps, labels.flip(0)))


def test_unconditional_model_ignores_the_labels(tiny_dit, batch):
    model = tiny_dit(conditioning="none")
    sample, timesteps, labels = batch
    assert not num_classes(model)
    assert condition_arguments(model, labels) == {}
    assert torch.equal(predict(model, *batch), model(sample, timesteps).sample)
    assert torch.equal(predict(model, *batch), predict(model, sample, timesteps, labels.flip(0)))


def test_text_model_is_not_called_without_its_text(tiny_dit, batch):
    model = tiny_dit(conditioning="text", pooled_projection_dim=6)
    assert not num_classes(model)
    with pytest.raises(UserError, match="pooled_projections"):
        predict(model, *batch)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_learned_variance_doubles_the_channels(tiny_dit, batch, learn_sigma):
    model = tiny_dit(learn_sigma=learn_sigma)
    assert learns_sigma(model) == learn_sigma
    assert predict(model, *batch).shape == (4, 1 + learn_sigma, 8, 8)


def test_null_label_and_sample_shape_are_the_models(tiny_dit):
    model = tiny_dit(num_classes=7, in_channels=3, sample_size=16)
    assert null_label(model) == 7
    assert sample_shape(model) == (3, 16, 16)
