"""Captions of tags: what is drawn of them, and that all of it is encoded."""

from itertools import permutations

import pytest
import torch
from scipy import stats

from stagepatch.checkpoints import load_captioner
from stagepatch.core import UserError
from stagepatch.data import CachedLatents, DataConfig, TagsConfig, make_cache
from stagepatch.data.tags import tag_variants
from tests.data.reading import load, picture
from tests.tiny_pipelines import PIPELINES

CAPTION = "cat, red house,blue tree , dog,"


def test_a_caption_stays_as_it_is_unless_asked_for():
    assert tag_variants(CAPTION, TagsConfig()) == [CAPTION]
    assert tag_variants("", TagsConfig(variants=3)) == ["", "", ""]
    assert tag_variants("one tag", TagsConfig(variants=2)) == ["one tag"] * 2


def test_all_orders_are_alike_probable_and_the_first_tags_stay():
    config = TagsConfig(variants=3001, keep_tokens=1)
    first, *variants = tag_variants(CAPTION, config)
    assert first == CAPTION
    orders = [", ".join(["cat", *order]) for order in permutations(["red house", "blue tree", "dog"])]
    assert set(variants) == set(orders)
    assert stats.chisquare([variants.count(order) for order in orders]).pvalue > 1e-3
    assert tag_variants(CAPTION, config)[1:] == variants  # nothing but the caption decides
    assert tag_variants(CAPTION + "x", config)[1:] != variants
    assert tag_variants(CAPTION, TagsConfig(variants=5))[1:3] == tag_variants(CAPTION, TagsConfig(variants=3))[1:]


def test_each_tag_is_left_out_alone():
    config = TagsConfig(variants=3001, shuffle=False, dropout=0.3, keep_tokens=1)
    variants = [caption.split(", ") for caption in tag_variants(CAPTION, config)[1:]]
    assert all(tags[0] == "cat" for tags in variants)
    assert all(tags == [tag for tag in ("cat", "red house", "blue tree", "dog") if tag in tags] for tags in variants)
    counts = [[0, 0], [0, 0]]
    for tags in variants:
        counts["dog" in tags]["red house" in tags] += 1
    expected = [3000 * (a * b) for a in (0.3, 0.7) for b in (0.3, 0.7)]
    assert stats.chisquare([*counts[0], *counts[1]], expected).pvalue > 1e-3
    assert tag_variants("a, b", TagsConfig(variants=2, dropout=1.0))[1] == ""


@pytest.mark.parametrize("choice", [{"variants": 0}, {"keep_tokens": -1}, {"dropout": 1.5}])
def test_choices_that_make_no_sense_are_refused(tmp_path, choice):
    picture(1).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{next(iter(choice))}={next(iter(choice.values()))}"):
        load(tmp_path, tags=TagsConfig(**choice))


def test_the_cache_has_each_variant_as_its_encoder_makes_it(tmp_path):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "sd")
    folder = tmp_path / "images"
    folder.mkdir()
    for number, lines in enumerate([CAPTION, "photo\ndog, cat"]):
        picture(100 * number, (32, 32)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(lines)
    config = DataConfig(str(folder), image_size=32, tags=TagsConfig(variants=3, keep_tokens=1, dropout=0.2))
    make_cache(tmp_path / "cache", str(tmp_path / "sd"), config, 4)
    cached = CachedLatents(tmp_path / "cache")
    assert cached.caption_counts.tolist() == [3, 6]
    expected = [tag_variants(CAPTION, config.tags), [*["photo"] * 3, *tag_variants("dog, cat", config.tags)]]
    encode = load_captioner(tmp_path / "sd")
    for index, captions in enumerate(expected):
        with torch.no_grad():
            own = encode(captions)["encoder_hidden_states"]
        stored = [cached[index, place]["condition"]["encoder_hidden_states"] for place in range(len(captions))]
        torch.testing.assert_close(torch.stack(stored), own, rtol=1e-3, atol=1e-3)
    for tags in (TagsConfig(variants=4, keep_tokens=1, dropout=0.2), TagsConfig()):
        with pytest.raises(UserError, match=r"since are tags \(\{.*'variants': 3\} then"):
            make_cache(tmp_path / "cache", str(tmp_path / "sd"), DataConfig(str(folder), image_size=32, tags=tags), 4)
