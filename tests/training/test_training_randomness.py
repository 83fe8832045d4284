"""Order and draws as functions of (seed, process, iteration)."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from training_runs import make_dataset, make_model, make_objective

from stagepatch.training import TrainingConfig
from stagepatch.training.loop import _draw
from stagepatch.training.randomness import GLOBAL, NOISE, ORDER, BatchOrder, generator_for, seed_for


def flat(order):
    return [index for batch in order for index in batch]


@pytest.mark.parametrize(("items", "batch_size"), [(12, 4), (10, 4), (7, 5), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation(items, batch_size):
    indices = flat(BatchOrder([range(items)], batch_size, 0, 5 * items, seed=1))
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
    whole = list(BatchOrder([range(17)], 5, 0, 20, seed=3))
    assert list(BatchOrder([range(17)], 5, start, 20, seed=3)) == whole[start:]
    assert list(BatchOrder([range(17)], 6, start, 20, 3, 1, 2)) == list(BatchOrder(17, 6, 0, 20, 3, 1, 2))[start:]


def test_order_depends_on_the_seed_and_can_be_walked_twice():
    order = BatchOrder(50, 10, 0, 5, seed=4)
    assert list(order) == list(order)
    assert list(order) != list(BatchOrder(50, 10, 0, 5, seed=5))


def test_seeds_of_different_places_differ():
    uses = [(ORDER, seed, epoch) for seed in range(20) for epoch in range(20)]
    uses += [(NOISE, seed, iteration) for seed in range(20) for iteration in range(20)]
    uses += [
        (GLOBAL, seed, process, iteration) for seed in range(20) for process in range(4) for iteration in range(20)
    ]
    assert len({seed_for(*use) for use in uses}) == len(uses)
    assert all(0 <= seed_for(*use) < 2**63 for use in uses)


def test_seeds_are_those_they_always_were():
    # Published patches can be made again only with them.
    assert seed_for(NOISE, 0, 0) == 5_064_105_440_874_769_477
    assert generator_for(torch.device("cpu"), NOISE, 0, 1).initial_seed() == seed_for(NOISE, 0, 1)


def draw(iteration=0, process=0, processes=1, flip=True, **choices):
    config = TrainingConfig(**{"batch_size": 12, "label_dropout": 0.4, **choices})
    share = config.batch_size // processes
    dataset = make_dataset(12)
    own = slice(process * share, (process + 1) * share)
    batch = {"image": dataset.images[own], "label": dataset.labels[own]}
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=process)
    return _draw(batch, config, make_objective(), make_model(), iteration, flip, accelerator)


@pytest.mark.parametrize("processes", [2, 3])
def test_draws_of_a_process_are_its_rows_of_the_whole_draw(processes):
    whole = draw()
    shares = [draw(process=process, processes=processes) for process in range(processes)]
    for index, values in enumerate(whole):
        assert torch.equal(torch.cat([share[index] for share in shares]), values)


def test_draws_of_iterations_and_seeds_differ_and_repeat():
    first, again, later, other = draw(), draw(), draw(iteration=1), draw(seed=1)
    for index in range(4):
        assert torch.equal(first[index], again[index])
        assert not torch.equal(first[index], later[index])
        assert not torch.equal(first[index], other[index])


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


# Groups

GROUPS = [[0, 3, 4, 7, 9], [1, 2], [5, 6, 8, 10, 11, 12, 13]]


def test_batches_out_of_groups_never_mix_them_and_show_every_item_in_an_epoch():
    per_epoch = 2 + 1 + 3
    for epoch in range(3):
        batches = list(BatchOrder(GROUPS, 3, epoch * per_epoch, (epoch + 1) * per_epoch, seed=4))
        assert all(len(batch) == 3 for batch in batches)
        assert all(any(set(batch) <= set(group) for group in GROUPS) for batch in batches)
        assert set(flat(batches)) == set(range(14))


def test_batches_out_of_groups_are_the_same_wherever_a_run_starts_and_however_many_share_it():
    whole = list(BatchOrder(GROUPS, 4, 0, 20, seed=5))
    assert list(BatchOrder(GROUPS, 4, 7, 20, seed=5)) == whole[7:]
    shares = [list(BatchOrder(GROUPS, 4, 0, 20, 5, process, 2)) for process in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    assert list(BatchOrder(GROUPS, 4, 0, 20, seed=6)) != whole
