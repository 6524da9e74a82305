"""Prompt files, their checks, and the order of prompts."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.data import GroupSampler, PromptSet, assert_disjoint, load_prompts
from crd_fast.errors import ConfigError, DataError
from crd_fast.rewards import QUOTED_TEXT, registry

COW = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
DOG = {
    "tag": "position",
    "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cow",
}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


# ---- loading


def test_geneval_jsonl(tmp_path):
    loaded = load_prompts(write(tmp_path / "m.jsonl", COW, "", DOG))
    assert loaded.prompts == (COW["prompt"], DOG["prompt"])
    assert loaded.metadata == (COW, DOG)
    assert loaded.lines == (1, 3)
    assert loaded.name == str(tmp_path / "m.jsonl")
    loaded.require({"include"})


def test_jsonl_with_any_metadata(tmp_path):
    loaded = load_prompts(write(tmp_path / "m.jsonl", {"prompt": "a cow", "style": "oil", "n": 3}))
    assert loaded.metadata == ({"prompt": "a cow", "style": "oil", "n": 3},)
    loaded.require({"style", "n"})


def test_jsonl_keeps_unicode_line_separators(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n', "utf-8")
    assert load_prompts(path).prompts == ("one\u2028two",)


def test_ocr_txt_keeps_repeats(tmp_path):
    loaded = load_prompts(write(tmp_path / "t.txt", 'a sign "42"', "a sign \u201c17\u201d", 'a sign "42"'))
    assert loaded.prompts == ('a sign "42"', "a sign \u201c17\u201d", 'a sign "42"')
    loaded.require({QUOTED_TEXT})


def test_plain_txt_drops_repeats_and_blank_lines(tmp_path):
    loaded = load_prompts(write(tmp_path / "t.txt", "\ufeffa cow", "  a dog ", "", "a cow", 'a "quoted" cat'))
    assert loaded.prompts == ("a cow", "a dog", 'a "quoted" cat')
    assert loaded.lines == (1, 2, 5)
    assert loaded.metadata == ({}, {}, {})


def test_windows_line_ends(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"a cow\r\na dog\r\n")
    assert load_prompts(path).prompts == ("a cow", "a dog")


@pytest.mark.parametrize("name", ["train_metadata.jsonl", "train.jsonl", "train.txt"])
def test_split_of_a_folder(tmp_path, name):
    write(tmp_path / name, COW if name.endswith("jsonl") else COW["prompt"])
    write(tmp_path / "test.txt", "something else")
    assert load_prompts(tmp_path, "train").prompts == (COW["prompt"],)


def test_folder_needs_exactly_one_file_for_the_split(tmp_path):
    with pytest.raises(DataError, match="none of them.*'train'"):
        load_prompts(tmp_path, "train")
    write(tmp_path / "train.txt", "a")
    write(tmp_path / "train.jsonl", COW)
    with pytest.raises(DataError, match="train.jsonl and train.txt"):
        load_prompts(tmp_path, "train")


def test_split_goes_with_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="give the file of one split in it"):
        load_prompts(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        load_prompts(write(tmp_path / "t.txt", "a"), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"m\.jsonl:2: not JSON .*\{not json"),
        ("[1, 2]", r"m\.jsonl:2: expected an object.*\[1, 2\]"),
        ('{"tag": "x"}', r"m\.jsonl:2: 'prompt' is None.*tag"),
        ('{"prompt": " "}', r"m\.jsonl:2: 'prompt' is ' '"),
        ('{"prompt": 3}', r"m\.jsonl:2: 'prompt' is 3"),
        ('{"prompt": "p", "include": [{"class": "cow"}]}', r"m\.jsonl:2: include\[0\]\.count is None"),
        ('{"prompt": "p", "include": [{"class": "cow", "cuont": 1}]}', r"m\.jsonl:2: .*did you mean 'count'"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path / "m.jsonl", COW, line))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="has no prompts"):
        load_prompts(write(tmp_path / "empty.txt", "", "  "))
    with pytest.raises(DataError, match=r"expected a \.jsonl or \.txt"):
        load_prompts(write(tmp_path / "p.csv", "a"))
    (tmp_path / "latin.txt").write_bytes("a cow\na caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


# ---- requirements


def test_missing_key_is_named_with_its_line(tmp_path):
    loaded = load_prompts(write(tmp_path / "m.jsonl", COW, {"prompt": "a cat"}))
    with pytest.raises(DataError, match=r"m\.jsonl:2: prompt 'a cat' has metadata keys \['prompt'\].*'include'"):
        loaded.require({"include"})


def test_empty_include_does_not_serve_geneval(tmp_path):
    loaded = load_prompts(write(tmp_path / "m.jsonl", COW, {"prompt": 'a sign "42"', "include": []}))
    with pytest.raises(DataError, match=r"m\.jsonl:2: 'include' is \[\]"):
        loaded.require({"include"})


def test_missing_quotes_are_named_with_their_line(tmp_path):
    loaded = load_prompts(write(tmp_path / "t.txt", 'a sign "42"', "", "a sign 17"))
    with pytest.raises(DataError, match=r"t\.txt:3: prompt 'a sign 17' has 0 double quotes"):
        loaded.require({QUOTED_TEXT})


@pytest.mark.parametrize(("detector", "label"), [("shapes", "cow"), ("mask2former", "triangle")])
def test_a_reward_is_asked_about_every_prompt_when_they_are_loaded(tmp_path, detector, label):
    known = {"shapes": "circle", "mask2former": "dog"}[detector]
    rows = [{"prompt": f"a {name}", "include": [{"class": name, "count": 1}]} for name in (known, label)]
    reward = registry.build("geneval", registry.options_type("geneval")(detector=detector))
    load_prompts(write(tmp_path / "known.jsonl", rows[0])).require_for(reward)
    loaded = load_prompts(write(tmp_path / "m.jsonl", *rows))
    loaded.require(reward.requires)
    with pytest.raises(DataError, match=rf"m\.jsonl:2: reward 'geneval': include\[0\].class is '{label}', which the"):
        loaded.require_for(reward)


def test_a_reward_that_checks_nothing_of_its_own_is_served_by_its_keys(tmp_path):
    loaded = load_prompts(write(tmp_path / "t.txt", "a sign 17"))
    loaded.require_for(registry.build("jpeg_compressibility", registry.options_type("jpeg_compressibility")()))
    with pytest.raises(DataError, match=r"t\.txt:1: prompt 'a sign 17' has 0 double quotes"):
        loaded.require_for(registry.build("ocr", registry.options_type("ocr")(workers=0)))


def test_prompts_made_in_memory_are_named_by_index():
    made = PromptSet(("a cow", "a dog"), (COW, {}), "shapes")
    with pytest.raises(DataError, match="shapes, prompt 1: "):
        made.require({"include"})
    assert len(made) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (), "s"), "'s' is empty"),
        ((("a",), (), "s"), "1 prompts and 0 metadata"),
        ((("a", " "), ({}, {}), "s"), "s, prompt 1: prompt is ' '"),
        ((("a",), ({},), "s", (1, 2)), "2 lines for 1 prompts"),
    ],
)
def test_inconsistent_sets_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        PromptSet(*arguments)


def plain(name, *prompts):
    return PromptSet(prompts, ({},) * len(prompts), name)


def test_disjoint_sets_pass():
    assert_disjoint(plain("train", "a", "b"), plain("test", "c"))


def test_overlap_is_listed():
    train = plain("train", *"abcdefgh")
    with pytest.raises(DataError) as caught:
        assert_disjoint(train, plain("test", *"bcdefgh"))
    message = str(caught.value)
    assert message.startswith("7 prompts of train are also in test: 'b'; 'c'; 'd'; 'e'; 'f'; ...")
    assert "'g'" not in message


def test_overlap_ignores_case_and_spacing():
    with pytest.raises(DataError, match="1 prompts of train"):
        assert_disjoint(plain("train", "A  red cow"), plain("test", "a red Cow "))


# ---- order

sizes = st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))


@given(sizes)
def test_all_prompts_come_before_any_repeats(size):
    count, groups, seed = size
    sampler = GroupSampler(count, groups, 2, seed)
    stream = torch.cat([sampler.prompts(epoch) for epoch in range(-(-3 * count // groups))]).tolist()
    for start in range(0, 3 * count, count):
        assert sorted(stream[start : start + count]) == list(range(count))


@given(sizes, st.integers(0, 50))
def test_an_epoch_is_a_pure_function(size, epoch):
    count, groups, seed = size
    used = GroupSampler(count, groups, 2, seed)
    for earlier in range(3):
        used.prompts(earlier)
    assert torch.equal(used.prompts(epoch), GroupSampler(count, groups, 2, seed).prompts(epoch))


def test_prompts_are_seen_evenly():
    sampler = GroupSampler(prompt_count=10, groups=4, group_size=3, seed=1)
    counts = Counter(torch.cat([sampler.samples(epoch) for epoch in range(25)]).tolist())
    assert counts == dict.fromkeys(range(10), 30)


def test_seed_and_round_change_the_order():
    first, second = GroupSampler(50, 50, 2, seed=0), GroupSampler(50, 50, 2, seed=1)
    assert not torch.equal(first.prompts(0), second.prompts(0))
    assert not torch.equal(first.prompts(0), first.prompts(1))


def test_samples_form_complete_groups():
    sampler = GroupSampler(prompt_count=10, groups=3, group_size=4)
    prompts = sampler.prompts(2)
    samples, ids = sampler.samples(2), sampler.group_ids()
    assert samples.dtype == ids.dtype == torch.int64
    assert samples.tolist() == [int(p) for p in prompts for _ in range(4)]
    assert ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_more_groups_than_prompts_repeat_only_across_rounds():
    picked = GroupSampler(prompt_count=4, groups=10, group_size=2).prompts(0).tolist()
    assert sorted(picked[:4]) == sorted(picked[4:8]) == [0, 1, 2, 3]
    assert len(set(picked[8:])) == 2


@pytest.mark.parametrize("arguments", [(0, 1, 2, 0), (4, 0, 2, 0), (4, 2, 1, 0), (4, 2, 0, 0), (4, 2, 2, -1)])
def test_wrong_sampler_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        GroupSampler(*arguments)


def test_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="-1"):
        GroupSampler(4, 2, 2).prompts(-1)
