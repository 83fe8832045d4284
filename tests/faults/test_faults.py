"""What goes wrong around a run: it stops in words, nothing is lost, and the same command goes on."""

import os

import pytest
import torch

from stagepatch.core import UserError
from stagepatch.data import ImageDataset
from stagepatch.methods import DMP
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig, generate
from stagepatch.training.log import RunLog
from tests.runs import assert_same, iteration_of, make_dataset, make_model, make_objective, patch_of, run

NO_ROOM = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
CHOICES = {"steps": 4, "checkpoint_every": 100, "log_every": 1, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What a run learns that nothing befell."""
    directory = tmp_path_factory.mktemp("good")
    run(directory, **CHOICES)
    return patch_of(directory)


class RoomFor:
    """A model's forward that has room for so many samples, from a call on."""

    def __init__(self, model, most, calls=0):
        self.most, self.calls = most, calls
        model.register_forward_pre_hook(self)

    def __call__(self, module, arguments):
        self.calls -= 1
        if len(arguments[0]) > self.most and self.calls < 0:
            raise RuntimeError(NO_ROOM)


def backward_without_room(model, most):
    """Memory runs out in the backward pass alone."""

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.view_as(value)

        @staticmethod
        def backward(context, gradient):
            if len(gradient) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return gradient

    model.register_forward_hook(lambda module, arguments, output: (Full.apply(output[0]), *output[1:]))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_says_what_fits_and_loses_no_step(tmp_path, good, where):
    model = make_model()
    if where == "forward":
        RoomFor(model, 2, calls=2)
    else:
        backward_without_room(model, 2)
    with pytest.raises(
        UserError, match=r"with 8 images at a time; 2 fit: give --training.gradient_accumulation_s\w+=4"
    ):
        run(tmp_path, model=model, **CHOICES)
    if where == "forward":
        assert iteration_of(tmp_path) == 2  # none was due
    run(tmp_path, model=model, gradient_accumulation_steps=4, **CHOICES)  # as it says
    assert_same(patch_of(tmp_path), good, 1e-3)  # in other pieces
    run(tmp_path / "whole", **CHOICES)
    assert_same(patch_of(tmp_path / "whole"), good)


def test_no_room_for_one_image(tmp_path):
    model = make_model()
    RoomFor(model, 0)
    with pytest.raises(UserError, match=r"and with one alone: give --training\.gradient_checkpointing"):
        run(tmp_path, model=model)
    with pytest.raises(UserError, match="Out of memory with one image at a time"):
        generate(model, make_objective().scheduler, SamplingConfig(num_images=3, num_inference_steps=2))


def test_sampling_goes_on_in_smaller_batches(caplog):
    scheduler, config = make_objective().scheduler, SamplingConfig(num_images=10, batch_size=8, num_inference_steps=2)
    expected = generate(make_model(), scheduler, config)
    model, batches = make_model(), []
    RoomFor(model, 3)
    images = generate(model, scheduler, config, on_batch=batches.append)
    torch.testing.assert_close(images, expected)
    assert batches == [2, 2, 2, 2, 2]
    assert "Out of memory with 4 images at a time: going on with 2." in caplog.text


class Dying(ImageDataset):
    """Images, of which one kills the process that reads it."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 7:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)


def test_a_killed_loading_process_costs_no_step(tmp_path, good):
    whole = make_dataset()
    with pytest.raises(UserError, match=r"A process that loads the data has ended .* fewer data\.num_workers"):
        run(tmp_path, dataset=Dying(whole.images, whole.labels), num_workers=1, **CHOICES)
    run(tmp_path, **CHOICES)
    assert_same(patch_of(tmp_path), good)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(
        UserError, match=r"The model's own 'blocks\.1\.mlp\.fc1\.weight' holds numbers that are not fin"
    ):
        run(tmp_path, model=model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_trained_weight_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, value):
    # Its step's loss and gradient were finite.
    method, advance = DMP(PatchConfig()), RunLog.advance

    def spoil(log):
        advance(log)
        if log.done == 4:
            next(method.patch.parameters()).data.view(-1)[0] = value

    monkeypatch.setattr(RunLog, "advance", spoil)
    with pytest.raises(UserError, match="The trained weight is nan near iteration 4; the last good checkpoint"):
        run(tmp_path, method=method, **CHOICES | {"checkpoint_every": 2})
    assert iteration_of(tmp_path) == 2
