"""The picture of a gate's activation."""

import torch

from stagepatch.analysis import plot_gate_activation


def test_gate_activation_has_a_panel_per_block_on_one_scale():
    weights = torch.rand(3, 5, 7)
    figure = plot_gate_activation(weights, torch.arange(0, 500, 100), ["a", "b", "c"])
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["a", "b", "c"]
    image = panels[1].images[0]
    torch.testing.assert_close(torch.tensor(image.get_array().data), weights[1].T)
    assert len({axes.images[0].get_clim() for axes in panels}) == 1
