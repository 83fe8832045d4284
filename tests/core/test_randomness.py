"""Order and draws as functions of (seed, process, iteration)."""

from itertools import chain, product
from types import SimpleNamespace

import pytest
import torch

from stagepatch.core.randomness import GLOBAL, NOISE, ORDER, BatchOrder, generator_for, seed_for
from stagepatch.training import TrainingConfig
from stagepatch.training.draws import Conditions
from stagepatch.training.draws import draw as draw_batch
from tests.runs import make_dataset, make_model, make_objective

CPU = torch.device("cpu")


@pytest.mark.parametrize(("items", "batch_size"), [(12, 4), (10, 4), (7, 5), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation(items, batch_size):
    indices = list(chain(*BatchOrder([range(items)], batch_size, 0, 5 * items, seed=1)))
    epochs = [indices[first : first + items] for first in range(0, len(indices) - items + 1, items)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(items)) for epoch in epochs)
    if items > 9:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_batches_are_full_and_counted():
    order = BatchOrder([range(10)], 4, 3, 9, seed=1)
    assert len(order) == len(list(order)) == 6
    assert {len(batch) for batch in order} == {4}


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_shares_of_the_processes_make_up_the_batch(processes):
    whole = list(BatchOrder([range(20)], 6, 0, 15, seed=2))
    shares = [list(BatchOrder([range(20)], 6, 0, 15, 2, process, processes)) for process in range(processes)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_order_from_an_iteration_on_is_the_rest_of_the_whole(start):
    for batch_size, *share in ((5, 0, 1), (6, 1, 2)):
        whole = list(BatchOrder([range(17)], batch_size, 0, 20, 3, *share))
        assert list(BatchOrder([range(17)], batch_size, start, 20, 3, *share)) == whole[start:]


def test_order_depends_on_the_seed_and_can_be_walked_twice():
    order = BatchOrder([range(50)], 10, 0, 5, seed=4)
    assert list(order) == list(order)
    assert list(order) != list(BatchOrder([range(50)], 10, 0, 5, seed=5))


def test_seeds_of_different_places_differ():
    uses = [(purpose, *numbers) for purpose in (ORDER, NOISE) for numbers in product(range(20), range(20))]
    uses += [(GLOBAL, *numbers) for numbers in product(range(20), range(4), range(20))]
    assert len({seed_for(*use) for use in uses}) == len(uses)
    assert all(0 <= seed_for(*use) < 2**63 for use in uses)


def test_seeds_are_those_they_always_were():
    # Published patches can be made again only with them.
    assert seed_for(NOISE, 0, 0) == 5_064_105_440_874_769_477
    assert generator_for(CPU, NOISE, 0, 1).initial_seed() == seed_for(NOISE, 0, 1)


def draw(iteration=0, process=0, processes=1, flip=True, **choices):
    config = TrainingConfig(**{"batch_size": 12, "label_dropout": 0.4, **choices})
    share = config.batch_size // processes
    dataset = make_dataset(12)
    own = slice(process * share, (process + 1) * share)
    batch = {"image": dataset.images[own], "label": dataset.labels[own]}
    conditions = Conditions(make_model(), dataset)
    draws = draw_batch(batch, config, make_objective(), conditions, iteration, flip, CPU, process)
    return draws.x_start, draws.noise, draws.timesteps, draws.condition["class_labels"]


@pytest.mark.parametrize("processes", [2, 3])
def test_draws_of_a_process_are_its_rows_of_the_whole_draw(processes):
    whole = draw()
    shares = [draw(process=process, processes=processes) for process in range(processes)]
    for index, values in enumerate(whole):
        assert torch.equal(torch.cat([share[index] for share in shares]), values)


def test_draws_of_iterations_and_seeds_differ_and_repeat():
    for first, again, later, other in zip(draw(), draw(), draw(iteration=1), draw(seed=1), strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, later)
        assert not torch.equal(first, other)


def test_draw_leaves_the_global_generator_to_process_and_iteration():
    states = []
    for process, iteration in ((0, 0), (1, 0), (0, 1), (0, 0)):
        draw(iteration=iteration, process=process, processes=2)
        states.append(torch.rand(1).item())
    assert len(set(states[:3])) == 3
    assert states[3] == states[0]


def test_timesteps_cover_the_schedule_evenly():
    timesteps = torch.cat([draw(iteration=i, batch_size=12)[2] for i in range(400)])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), 10, 0, 1000)
    assert (counts - 480).abs().max() < 110  # five standard deviations


def draw_latents(flip=False, dropout=0.0, iteration=0):
    size = 4000
    latents = {"image": 2.0, "std": 0.5, "image_flipped": -2.0, "std_flipped": 0.0}
    batch = {name: torch.full((size, 1, 8, 8), value) for name, value in latents.items()}
    batch["label"] = torch.zeros(size, dtype=torch.long)
    batch["condition"] = {"text": torch.ones(size, 3, 5), "mask": torch.ones(size, 3, dtype=torch.bool)}
    null = {"text": torch.zeros(3, 5), "mask": torch.zeros(3, dtype=torch.bool)}
    conditions = Conditions(make_model(), SimpleNamespace(null_condition=null))
    config = TrainingConfig(batch_size=size, label_dropout=dropout)
    return draw_batch(batch, config, make_objective(), conditions, iteration, flip, CPU)


def test_latents_are_drawn_from_their_posterior_anew_each_time():
    first, later = draw_latents(), draw_latents(iteration=1)
    assert abs(first.x_start.mean() - 2.0) < 0.01
    assert abs(first.x_start.std() - 0.5) < 0.01
    assert not torch.equal(first.x_start, later.x_start)
    assert torch.equal(first.x_start, draw_latents().x_start)
    # Its noise is not the diffusion's.
    assert abs(torch.corrcoef(torch.stack([first.x_start.flatten(), first.noise.flatten()]))[0, 1]) < 0.01


def test_mirrored_latents_are_those_of_the_mirrored_image():
    x_start = draw_latents(flip=True).x_start
    mirrored = (x_start == -2.0).flatten(1).all(dim=1)
    assert 0.45 < mirrored.float().mean() < 0.55
    assert (x_start[~mirrored] > 0).float().mean() > 0.99


def test_captions_are_dropped_whole_and_as_often_as_asked():
    condition = draw_latents(dropout=0.25).condition
    dropped = ~condition["mask"][:, 0]
    assert 0.22 < dropped.float().mean() < 0.28
    for name in ("text", "mask"):
        assert (condition[name][dropped] == 0).all()
        assert (condition[name][~dropped] == 1).all()


GROUPS = [[0, 3, 4, 7, 9], [1, 2], [5, 6, 8, 10, 11, 12, 13]]


def test_batches_out_of_groups_never_mix_them_and_show_every_item_in_an_epoch():
    per_epoch = 2 + 1 + 3
    for epoch in range(3):
        batches = list(BatchOrder(GROUPS, 3, epoch * per_epoch, (epoch + 1) * per_epoch, seed=4))
        assert all(len(batch) == 3 for batch in batches)
        assert all(any(set(batch) <= set(group) for group in GROUPS) for batch in batches)
        assert set(chain(*batches)) == set(range(14))


def test_batches_out_of_groups_are_the_same_wherever_a_run_starts_and_however_many_share_it():
    whole = list(BatchOrder(GROUPS, 4, 0, 20, seed=5))
    assert list(BatchOrder(GROUPS, 4, 7, 20, seed=5)) == whole[7:]
    shares = [list(BatchOrder(GROUPS, 4, 0, 20, 5, process, 2)) for process in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    assert list(BatchOrder(GROUPS, 4, 0, 20, seed=6)) != whole
