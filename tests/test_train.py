"""Training: every part by itself, then whole runs of a few steps.

The pictures are squares that tests can check by eye; the models are as
small as the towers allow. Resumed runs must agree to the last bit.
"""

import hashlib
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import miniclip
from miniclip import train as module
from miniclip.data import data_dir
from miniclip.loss import clip_loss
from miniclip.model import MEAN, STD
from miniclip.train import (
    ConceptBatches,
    Recipe,
    augment,
    doctor,
    learning_rate,
    load_run,
    main,
    make_batch,
    make_optimizer,
    new_model,
    random_caption,
    recolour,
    resolution_at,
    save_run,
    strength_at,
    train,
    train_step,
    vital_signs,
    warp,
)

COLOURS = "red green blue black grey teal pink gold".split()
SMALL = dict(
    embed_dim=16,
    image_resolution=16,
    vision_layers=(1, 1),
    vision_width=8,
    context_length=24,
    transformer_width=16,
    transformer_heads=1,
    transformer_layers=1,
)
RECIPE = Recipe(
    steps=6, concepts=4, warmup=2, resolution=16, last_resolution=16
)


def world(styles=3):
    """A data set: eight coloured squares, each drawn in a few styles."""
    g = torch.Generator().manual_seed(0)
    paint = torch.randint(0, 200, (len(COLOURS), 3), generator=g)
    records, images = [], []
    for style in range(styles):
        for number, colour in enumerate(COLOURS):
            image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
            low, high = 12 + 2 * style, 52 - 2 * style
            image[:, low:high, low:high] = paint[number][:, None, None]
            images.append(image)
            records.append(
                {
                    "key": colour,
                    "style": f"style {style}",
                    "concept": colour,
                    "caption": f"{colour} square",
                    "keywords": [colour, "square", "colour", "shape"],
                }
            )
    return SimpleNamespace(records=records, images=torch.stack(images))


DATA = world()


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return new_model(DATA, 60, **{**SMALL, **changes})


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ({"steps": 0}, "steps is 0, expected a whole number from 1"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"steps": True}, "steps is True"),
        ({"concepts": 1}, "concepts is 1"),
        ({"keywords": 1.1}, "keywords is 1.1, expected a number from 0 to"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"mask": 1}, "mask is 1, expected True or False$"),
        ({"seed": "0"}, "seed is '0'"),
        ({"resolution": 8}, "resolution is 8"),
        ({"last_share": -0.1}, "last_share is -0.1"),
    ],
)
def test_recipe_refuses(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        Recipe(**wrong)


def test_recipe_takes_whole_numbers_for_numbers():
    assert Recipe(strength=1, keywords=0) == Recipe(
        strength=1.0, keywords=0.0
    )


def test_every_field_has_a_text():
    assert all(f.metadata["help"] for f in fields(Recipe))


# ------------------------------------------- learning rate and optimizer


def test_learning_rate_by_hand():
    recipe = Recipe(steps=110, warmup=10, learning_rate=1.0)
    rates = [learning_rate(step, recipe) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_is_open_clips():
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    recipe = Recipe(steps=90, warmup=7, learning_rate=3e-3)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = scheduler.cosine_lr(optimizer, 3e-3, 7, 90)
    for step in range(90):
        assert learning_rate(step, recipe) == pytest.approx(
            theirs(step), abs=1e-15
        )


@pytest.mark.parametrize("warmup", [0, 5, 9])
def test_any_warmup(warmup):
    recipe = Recipe(steps=5, warmup=warmup)
    rates = [learning_rate(step, recipe) for step in range(5)]
    assert all(0 < rate <= recipe.learning_rate for rate in rates)


def test_only_matrices_decay():
    model = small_model()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    recipe = Recipe(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, recipe)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p, before[name] * factor, msg=name)
    assert torch.equal(model.logit_scale, before["logit_scale"])


def test_optimizer_has_every_parameter_once_and_the_papers_numbers():
    model = small_model()
    groups = make_optimizer(model, Recipe()).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert {group["betas"] for group in groups} == {(0.9, 0.98)}
    assert {group["eps"] for group in groups} == {1e-6}
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


# ------------------------------------------------------------ the batches


@pytest.mark.parametrize("by_concept", [False, True])
def test_an_epoch_has_everything_once(by_concept):
    recipe = replace(RECIPE, by_concept=by_concept)
    batches = ConceptBatches(DATA.records, recipe)
    for epoch in 0, 1:
        steps = 2 * epoch, 2 * epoch + 1  # 24 pictures, 12 in a batch
        items = [i for step in steps for g in batches[step] for i in g]
        assert sorted(items) == list(range(24))
    assert batches[0] != batches[2], "each epoch has an order of its own"
    again = ConceptBatches(DATA.records, recipe)
    assert again[3] == batches[3]
    other = ConceptBatches(DATA.records, replace(recipe, seed=1))
    assert other[3] != batches[3]


def test_groups_are_concepts_or_single_pictures():
    whole = ConceptBatches(DATA.records, replace(RECIPE, by_concept=True))
    for group in whole[0]:
        assert len(group) == 3
        assert len({DATA.records[i]["caption"] for i in group}) == 1
    single = ConceptBatches(DATA.records, RECIPE)
    assert [len(group) for group in single[0]] == [1] * 12


def test_batches_are_never_larger_than_the_data():
    batches = ConceptBatches(DATA.records, replace(RECIPE, concepts=999))
    assert len(batches[0]) == len(batches[7]) == 24


def test_batch_is_a_function_of_seed_and_step():
    batches = ConceptBatches(DATA.records, RECIPE)
    torch.manual_seed(1)
    random.seed(1)
    one = make_batch(5, DATA, batches, RECIPE)
    torch.manual_seed(2)
    random.seed(2)
    two = make_batch(5, DATA, batches, RECIPE)
    for a, b in zip(one, two):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    other = make_batch(4, DATA, batches, RECIPE)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("by_concept", [False, True])
def test_pictures_keep_their_captions(by_concept):
    recipe = replace(RECIPE, by_concept=by_concept, keywords=0, strength=0)
    batches = ConceptBatches(DATA.records, recipe)
    batch = make_batch(0, DATA, batches, recipe)
    items = [i for group in batches[0] for i in group]
    assert len(batch.captions) == (4 if by_concept else 12)
    assert batch.owners.max() + 1 == len(batch.captions)
    known = [DATA.records[i]["concept"] for i in items]
    plain = augment(DATA.images[items], 16, 0.0, rng())
    torch.testing.assert_close(batch.images, plain)
    for i, name in enumerate(known):
        assert batch.captions[batch.owners[i]] == f"{name} square"
        for j, other in enumerate(known):
            same = bool(batch.concepts[i] == batch.concepts[j])
            assert same == (name == other)


def test_random_streams_stay_what_they_are():
    """Other draws would make another model of the same recipe."""
    recipe = replace(RECIPE, keywords=0.5)
    batches = ConceptBatches(DATA.records, recipe)
    batch = make_batch(3, DATA, batches, recipe)
    items = [16, 1, 5, 15, 22, 3, 10, 0, 12, 9, 19, 8]
    assert [group[0] for group in batches[3]] == items
    assert batch.captions[:4] == [
        "red square square shape colour red",
        "green square",
        "square teal shape colour",
        "gold square",
    ]
    mean = batch.images[2, 1].mean().item()
    assert mean == pytest.approx(1.12899, abs=1e-4)


# ------------------------------------------------------------ the pictures


@given(st.integers(0, 10**6), st.floats(0, 2), st.sampled_from([16, 32]))
def test_white_stays_white(seed, strength, size):
    images = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8)
    x = augment(images, size, strength, rng(seed))
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    expected = white[:, None, None].expand(3, 3, size, size)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_no_strength_is_only_resizing():
    images = DATA.images[:4].float() / 255
    same = warp(images, 64, 0.0, rng())
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(recolour(same, 0.0, rng()), same)
    small = warp(images, 32, 0.0, rng())
    pooled = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(small, pooled, rtol=0, atol=1e-5)


def test_pictures_change_each_in_its_own_way():
    images = DATA.images[:1].expand(8, 3, 64, 64).float() / 255
    x = recolour(warp(images, 32, 1.0, rng()), 1.0, rng())
    gaps = (x[:, None] - x).abs().amax(dim=(2, 3, 4))
    assert (gaps + torch.eye(8) > 0.05).all()
    assert x.min() >= 0 and x.max() <= 1


def test_nothing_is_mirrored():
    arrow = torch.ones(200, 3, 64, 64)
    arrow[..., 16:48, 16:32] = 0  # ink on the left
    ink = 1 - warp(arrow, 32, 1.0, rng(3))
    x = torch.linspace(-1, 1, 32)
    ink = ink.sum(dim=(1, 2))  # (200, 32)
    centre = (ink * x).sum(dim=1) / ink.sum(dim=1)
    assert (centre < 0.06).all() and centre.mean() < -0.2


def test_strength_and_resolution_over_time():
    recipe = Recipe(steps=100, strength=0.8, last_share=0.25)
    assert strength_at(0, recipe) == 0
    assert strength_at(25, recipe) == pytest.approx(0.4)
    assert strength_at(50, recipe) == strength_at(99, recipe) == 0.8
    sizes = [resolution_at(step, recipe) for step in range(100)]
    assert sizes == [32] * 75 + [48] * 25
    assert resolution_at(99, replace(recipe, last_share=0)) == 32


def test_random_caption():
    record = {"caption": "red apple", "keywords": list("abcdefgh")}
    draw = random.Random(0)
    assert random_caption(record, 0.0, draw) == "red apple"
    drawn = [random_caption(record, 1.0, draw).split() for _ in range(200)]
    named = [words[2:] for words in drawn if words[:2] == ["red", "apple"]]
    bare = [words for words in drawn if words[0] != "red"]
    assert len(named) + len(bare) == 200 and 70 < len(bare) < 130
    for words in named + bare:
        assert len(set(words)) == len(words) and set(words) <= set(
            "abcdefgh"
        )
    assert {len(words) for words in named + bare} == {2, 3, 4, 5}
    none = {"caption": "red apple", "keywords": []}
    assert random_caption(none, 1.0, draw) == "red apple"


# ---------------------------------------------------------------- one step


def a_batch(step=0, **changes):
    recipe = replace(RECIPE, **changes)
    batches = ConceptBatches(DATA.records, recipe)
    return make_batch(step, DATA, batches, recipe)


@pytest.mark.parametrize("mask", [True, False])
def test_step_reports_the_loss_before_the_step(mask):
    model, batch = small_model().train(), a_batch(by_concept=True)
    ids = model.tokenizer(batch.captions, 24)
    rivals = batch.concepts if mask else None
    expected = clip_loss(
        model.encode_image(batch.images),
        model.encode_text(ids)[batch.owners],
        1 / 0.07,
        rivals,
    )
    model = small_model().train()
    optimizer = make_optimizer(model, RECIPE)
    signs = train_step(model, optimizer, batch, mask)
    assert signs["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_encoded_once_or_for_each_picture_is_the_same():
    model = small_model().double().train()
    batch = a_batch(by_concept=True)
    found = []
    for once in True, False:
        captions = batch.captions
        if not once:
            captions = [captions[k] for k in batch.owners]
        v = model.encode_text(model.tokenizer(captions, 24))
        v = v[batch.owners] if once else v
        u = model.encode_image(batch.images)
        loss = clip_loss(u, v, model.logit_scale.exp(), batch.concepts)
        params = list(model.parameters())
        found.append([loss, *torch.autograd.grad(loss, params)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("start, end", [(math.log(100), 100), (0.0, 1)])
def test_scale_is_clamped_after_the_step(start, end):
    model = small_model()
    model.logit_scale.data.fill_(start)
    sign = 1 if start else -1  # push beyond the limit
    optimizer = make_optimizer(model, replace(RECIPE, learning_rate=0.1))

    def push(image_features, text_features, scale, concepts):
        others = image_features.sum() + text_features.sum()
        return 0 * others - sign * scale.log()

    signs = train_step(model, optimizer, a_batch(), loss_fn=push)
    assert signs["scale"] == pytest.approx(end, rel=1e-6)
    assert 0 <= model.logit_scale.item() <= math.log(100) + 1e-6


def test_gradient_is_clipped():
    model = small_model()
    optimizer = make_optimizer(model, RECIPE)
    train_step(
        model, optimizer, a_batch(), loss_fn=lambda *a: 1e3 * clip_loss(*a)
    )
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert norms.norm().item() == pytest.approx(1.0, rel=1e-3)


def test_bad_picture_is_named_and_no_weight_changes():
    model, batch = small_model(), a_batch()
    weights = [p.detach().clone() for p in model.parameters()]
    batch.images[[3, 5], 0, 0, 0] = torch.tensor([math.nan, math.inf])
    optimizer = make_optimizer(model, RECIPE)
    with pytest.raises(FloatingPointError, match=r"pictures \[3, 5\]"):
        train_step(model, optimizer, batch)
    assert all(map(torch.equal, weights, model.parameters()))


def test_infinite_gradient_is_noticed():
    model = small_model()
    weights = [p.detach().clone() for p in model.parameters()]

    def spike(u, v, s, concepts):
        return clip_loss(u, v, s) + (0 * u.sum()).abs().sqrt()

    optimizer = make_optimizer(model, RECIPE)
    with pytest.raises(FloatingPointError, match="learning rate"):
        train_step(model, optimizer, a_batch(), loss_fn=spike)
    assert all(map(torch.equal, weights, model.parameters()))


def test_vital_signs_by_hand():
    eye = torch.eye(4)
    owners = torch.tensor([0, 1, 1, 2])
    text = eye[owners]  # picture 2 finds the twin of its caption: right
    image = torch.stack([eye[0], eye[1], 5 * eye[1], eye[3]])
    signs = vital_signs(
        torch.tensor(0.5), image, text, torch.tensor(math.log(7)), owners
    )
    # the last picture is as near to all captions, argmax takes caption 0
    assert signs["accuracy"] == 0.75
    assert signs["loss"] == 0.5 and signs["ln_B"] == math.log(4)
    assert signs["scale"] == pytest.approx(7)
    # mean feature (1, 2, 0, 1) / 4
    assert signs["spread"] == pytest.approx(1 - 6 / 16)


def test_learns_a_batch_by_heart():
    model = small_model()
    batch = a_batch(by_concept=True, concepts=8, strength=0, keywords=0)
    optimizer = make_optimizer(model, replace(RECIPE, learning_rate=0.01))
    history = [train_step(model, optimizer, batch) for _ in range(60)]
    assert history[-1]["loss"] < 0.2 < 1.5 < history[0]["loss"]
    assert history[-1]["accuracy"] == 1


# -------------------------------------------------------------- the doctor

HEALTHY = dict(
    loss=2.0, ln_B=5.0, scale=14.0, accuracy=0.5, spread=0.6, waiting=0.1
)


def history(n=60, **signs):
    return [{**HEALTHY, **signs} for _ in range(n)]


@pytest.mark.parametrize(
    "signs, trouble",
    [
        ({"loss": 4.95}, "knows nothing"),
        ({"loss": 5.3}, "knows nothing"),
        ({"loss": 5.6}, "worse than guessing"),
        ({"loss": 5.0, "spread": 0.01}, "collapse"),
        ({"loss": 9.0, "spread": 0.01}, "worse than guessing"),
        ({"loss": math.nan}, "not a number"),
        ({"loss": math.inf}, "not a number"),
        ({"scale": 100.0}, "scale at its limit"),
        ({"accuracy": 0.995}, "too easy"),
        ({"waiting": 0.7}, "waiting"),
    ],
)
def test_doctor_finds(signs, trouble):
    found = doctor(history(**signs))
    assert list(found) == [trouble]
    assert len(found[trouble]) > 40


def test_doctor_is_silent_about_the_healthy():
    assert doctor(history()) == {}
    assert doctor([]) == {}
    assert doctor(history(3, spread=0.01)) == {}, "below ln B: no collapse"


def test_doctor_sees_the_scale_fall():
    rows = history()
    for i, row in enumerate(rows):
        row["scale"] = 14 - i / 10
    found = doctor(rows)
    assert list(found) == ["scale falls"]
    assert "58%" in found["scale falls"]


def test_doctor_looks_at_the_end_and_at_the_mean():
    sick = history(50, loss=5.0)
    assert doctor(sick + history(50)) == {}
    assert "knows nothing" in doctor(history(50) + sick)
    assert doctor(history(90) + history(10, loss=5.0)) == {}
    assert doctor(history(90) + history(10, loss=5.0), window=10)


def test_doctor_names_the_worst_first():
    found = doctor(history(loss=5.0, waiting=0.9, scale=100.0))
    assert list(found)[0] == "knows nothing" and len(found) == 3


def test_doctor_reads_histories_without_times():
    rows = history()
    for row in rows:
        del row["waiting"]
    assert doctor(rows) == {}


# ----------------------------------------------------------- saved runs


class PowerCut(Exception):
    pass


def cut_after(n):
    def watch(done):
        if done == n:
            raise PowerCut

    return watch


@pytest.mark.parametrize("by_concept", [False, True])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_interrupted_run_ends_with_the_same_bits(tmp_path, at, by_concept):
    recipe = replace(RECIPE, by_concept=by_concept)
    whole, path = small_model(), tmp_path / "deep" / "run.safetensors"
    expected = train(whole, DATA, recipe, quiet=True)
    with pytest.raises(PowerCut):
        train(
            small_model(),
            DATA,
            recipe,
            path,
            save_every=2,
            watch=cut_after(at),
            quiet=True,
        )
    assert path.exists() == (at > 1)
    resumed = small_model(seed=0 if at == 1 else 1)
    found = train(resumed, DATA, recipe, path, quiet=True)
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected):
        for key in "loss", "scale", "accuracy", "spread":
            assert a[key] == b[key]
    assert same_weights(whole, resumed)


def test_finished_run_is_not_trained_again(tmp_path):
    path, model = tmp_path / "run.safetensors", small_model()
    train(model, DATA, RECIPE, path, quiet=True)
    other = small_model(seed=1)
    calls = []
    train(other, DATA, RECIPE, path, watch=calls.append, quiet=True)
    assert same_weights(model, other) and calls == []


def saved(tmp_path):
    path, model = tmp_path / "run.safetensors", small_model()
    train(model, DATA, RECIPE, path, quiet=True)
    return path


def test_file_holds_tensors_and_json(tmp_path):
    path = saved(tmp_path)
    with safe_open(path, "pt") as file:
        notes, names = file.metadata(), list(file.keys())
    assert json.loads(notes["recipe"]) == asdict(RECIPE)
    assert len(json.loads(notes["history"])) == 6
    assert {name.split(".")[0] for name in names} == {"model", "optimizer"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before, model = path.read_bytes(), small_model(seed=1)

    def full_disk(tensors, file, notes):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError):
        save_run(path, model, make_optimizer(model, RECIPE), RECIPE, [])
    assert path.read_bytes() == before


def test_load_run_refuses_another_run(tmp_path):
    path, model = saved(tmp_path), small_model(seed=1)
    optimizer = make_optimizer(model, RECIPE)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    recipe = replace(RECIPE, learning_rate=0.5, seed=9)
    says = "learning_rate 0.002 and not 0.5, seed 0 and not 9; delete it"
    with pytest.raises(ValueError, match=says):
        load_run(path, model, optimizer, recipe)
    with pytest.raises(ValueError, match="other data"):
        load_run(path, model, optimizer, RECIPE, "another fingerprint")
    wide = small_model(vision_width=16)
    with pytest.raises(ValueError, match="model of another size"):
        load_run(path, wide, make_optimizer(wide, RECIPE), RECIPE)
    with pytest.raises(ValueError, match="other data"):
        train(model, world(styles=2), RECIPE, path, quiet=True)
    assert all(
        torch.equal(before[k], t) for k, t in model.state_dict().items()
    )


@pytest.mark.parametrize("content", [b"", b"not a run at all", None])
def test_load_run_refuses_a_damaged_file(tmp_path, content):
    path = saved(tmp_path)
    path.write_bytes(
        path.read_bytes()[:5000] if content is None else content
    )
    with pytest.raises(ValueError, match="run.safetensors is damaged"):
        train(small_model(), DATA, RECIPE, path, quiet=True)


def test_load_run_refuses_a_file_that_holds_no_run(tmp_path):
    model = small_model()
    miniclip.save(model, tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        train(
            model, DATA, RECIPE, tmp_path / "model.safetensors", quiet=True
        )


# ---------------------------------------------------------------- the loop


def test_train_calls_watch_and_leaves_the_model_ready():
    model, calls = small_model(), []

    def watch(done):
        calls.append(done)
        model.eval()  # as a look at the exam does

    found = train(model, DATA, RECIPE, watch=watch, quiet=True)
    assert calls == [1, 2, 3, 4, 5, 6] and not model.training
    plain = small_model()
    again = train(plain, DATA, RECIPE, quiet=True)
    assert not plain.training
    assert [r["loss"] for r in again] == [r["loss"] for r in found]
    assert all(0 <= r["waiting"] <= 1 and r["seconds"] > 0 for r in found)


def test_train_follows_the_schedule(monkeypatch):
    rates = []

    def spy(model, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return train_step(model, optimizer, *rest)

    monkeypatch.setattr(module, "train_step", spy)
    train(small_model(), DATA, RECIPE, quiet=True)
    expected = [learning_rate(step, RECIPE) for step in range(6)]
    assert rates == [[rate, rate] for rate in expected]


def test_train_refuses_what_would_go_wrong_late():
    with pytest.raises(ValueError, match="image_resolution=16"):
        train(small_model(image_resolution=32), DATA, RECIPE, quiet=True)
    with pytest.raises(
        ValueError, match="'red square' have up to .* reads 6"
    ):
        train(small_model(context_length=6), DATA, RECIPE, quiet=True)


def test_quiet_is_quiet_and_the_doctor_is_not(capsys):
    recipe = replace(RECIPE, steps=100, concepts=2, warmup=0)

    def blind(u, v, s, concepts):  # learns nothing, and is told so
        return 0 * (u.sum() + v.sum() + s) + math.log(len(u))

    train(small_model(), DATA, recipe, loss_fn=blind, quiet=True)
    assert capsys.readouterr() == ("", "")
    train(small_model(), DATA, recipe, loss_fn=blind)
    out = capsys.readouterr().out
    assert out.count("knows nothing: ") == 1, "said once, not repeated"
    assert "step 50, knows nothing" in out


def test_going_on_is_said(tmp_path, capsys):
    path = tmp_path / "run.safetensors"
    with pytest.raises(PowerCut):
        train(small_model(), DATA, RECIPE, path, 4, watch=cut_after(5))
    capsys.readouterr()
    train(small_model(), DATA, RECIPE, path, 4)
    assert "going on from step 4" in capsys.readouterr().out


# -------------------------------------------------------- the command line


def test_new_model_reads_all_captions_and_is_reproducible():
    model, again = small_model(), small_model()
    assert same_weights(model, again)
    assert model.tokenizer.merges == again.tokenizer.merges
    assert model.config.vocab_size == model.tokenizer.vocab_size
    text = "teal square shape"
    assert (
        model.tokenizer.decode(model.tokenizer.encode(text)).strip() == text
    )
    with pytest.raises(TypeError, match="wdth"):
        small_model(wdth=3)


def options(out, *more):
    tiny = "--styles noto --steps 2 --concepts 3 --width 8 --warmup 1"
    sizes = "--resolution 16 --last-resolution 16 --no-mask"
    return ["--out", str(out), *f"{tiny} {sizes}".split(), *more]


def test_main_trains_a_model_that_loads(tmp_path, capsys):
    out = tmp_path / "new" / "tiny"
    main(options(out))
    said = capsys.readouterr().out
    assert "run.safetensors" in said and "same command" in said
    model, preprocess = miniclip.load(out)
    assert model.config.vision_width == 8
    assert model.config.image_resolution == 16
    account = json.loads((out / "training.json").read_text())
    assert account["recipe"]["mask"] is False and account["seconds"] >= 0
    assert account["last"]["loss"] > 0 and len(account["history"]) == 2
    assert not (out / "run.safetensors").exists()


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (
            ["--keywords", "50"],
            "keywords is 50.0, expected a number from 0",
        ),
        (
            ["--steps", "many"],
            "argument --steps: invalid int value: 'many'",
        ),
        (["--styles", "twemoji"], "invalid choice: 'twemoji'"),
        (["--width", "0"], "vision_width is 0"),
        (["--mask", "yes"], "unrecognized arguments: yes"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_main_refuses(tmp_path, capsys, wrong, complaint):
    with pytest.raises(SystemExit) as error:
        main(options(tmp_path / "x", *wrong))
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_main_needs_a_folder_it_can_write(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        main(options(tmp_path / "file"))
    assert "file" in capsys.readouterr().err


def test_command_shows_every_field():
    done = subprocess.run(
        [sys.executable, "-m", "miniclip.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(done.stdout.split())
    for f in fields(Recipe):
        assert f"--{f.name.replace('_', '-')}" in text
        assert f.metadata["help"] in text
    assert "--no-by-concept" in text and "--no-mask" in text


def test_nothing_starts_in_a_notebook():
    code = Path(module.__file__).read_text(encoding="utf-8")
    space = {"__name__": "__main__", "__spec__": None}
    exec(compile(code, module.__file__, "exec"), space)
    assert callable(space["main"])


def test_the_shipped_model_is_what_the_command_trains():
    notes = json.loads((data_dir() / "results/training.json").read_text())
    assert Recipe(**notes["recipe"]) == Recipe()
    weights = data_dir() / "checkpoints" / "emoji" / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found == notes["sha256"]
