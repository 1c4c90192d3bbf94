"""Zero-shot, against loops, open_clip, brute force and the shipped model.

Tolerances: float32 vectors agree with the loop and with open_clip to
1e-5; the interval with a search over all candidates to 1e-5.
"""

import hashlib
import json
import math
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CLIP as OpenCLIP

import miniclip
from miniclip.data import UNSEEN_STYLE, data_dir
from miniclip.model import CLIP, CLIPConfig, load, preprocess
from miniclip.tokenizer import Tokenizer, train_bpe
from miniclip.zeroshot import (
    TEST_SETS,
    emoji_exam,
    emoji_names,
    four_test_sets,
    image_vectors,
    main,
    score,
    table,
    wilson_interval,
    zeroshot_classifier,
)

NAMES = ["red apple", "green apple", "fox", "owl", "ox cart", "ring"]
TEMPLATES = ["{}", "a drawing of {}.", "this {} is red"]


@pytest.fixture(scope="module")
def model():
    """A small CLIP with a tokenizer, weights far from their start."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(train_bpe(NAMES, 20))
    sizes = 32, 32, 2, 128, 8, 32, tokenizer.vocab_size, 64, 2, 2
    model = CLIP(CLIPConfig(*sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (7, 3, 40, 40), generator=g).byte()


# ------------------------------------------------- zeroshot_classifier


@torch.no_grad()
def classifier_by_loops(model, names, templates):
    """Equation of the chapter, one text at a time, in Python numbers."""
    rows = []
    for name in names:
        mean = [0.0] * model.config.embed_dim
        for template in templates:
            text = template.replace("{}", name)
            ids = model.tokenizer(text, model.context_length)
            w = model.encode_text(ids)[0].tolist()
            length = math.sqrt(sum(x * x for x in w))
            mean = [m + x / length for m, x in zip(mean, w)]
        length = math.sqrt(sum(m * m for m in mean))
        rows.append([m / length for m in mean])
    return torch.tensor(rows)


@pytest.mark.parametrize("templates", [["{}"], TEMPLATES[1:], TEMPLATES])
def test_classifier_equals_the_loops(model, templates):
    ours = zeroshot_classifier(model, NAMES, templates)
    expected = classifier_by_loops(model, NAMES, templates)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert not ours.requires_grad


def test_the_bare_name_is_the_default(model):
    ours = zeroshot_classifier(model, NAMES)
    expected = zeroshot_classifier(model, NAMES, ["{}"])
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)


@pytest.mark.parametrize("templates", [["{}"], TEMPLATES])
def test_classifier_equals_open_clip(model, templates):
    c = model.config
    theirs = OpenCLIP(
        c.embed_dim,
        dict(image_size=32, patch_size=8, width=128, layers=2),
        dict(
            context_length=c.context_length,
            vocab_size=c.vocab_size,
            width=64,
            heads=2,
            layers=2,
        ),
        quick_gelu=True,
    ).eval()
    theirs.load_state_dict(model.state_dict())
    expected = open_clip.build_zero_shot_classifier(
        theirs,
        lambda texts: model.tokenizer(texts, c.context_length),
        NAMES,
        templates,
        num_classes_per_batch=4,
    )  # (E, N)
    ours = zeroshot_classifier(model, NAMES, templates)
    torch.testing.assert_close(ours, expected.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 4, 6, 100])
def test_classifier_in_batches(model, batch):
    ours = zeroshot_classifier(model, NAMES, TEMPLATES, batch)
    expected = zeroshot_classifier(model, NAMES, TEMPLATES)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_each_template_counts_the_same(model):
    """Not the mean of the features: a long one would count more."""
    ids = model.tokenizer([t.format("fox") for t in TEMPLATES], 32)
    with torch.no_grad():
        features = model.encode_text(ids)
    naive = F.normalize(features.mean(dim=0), dim=-1)
    ours = zeroshot_classifier(model, ["fox"], TEMPLATES)[0]
    assert (ours - naive).abs().max() > 1e-4
    assert ours.norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "names, complaint",
    [
        ([], "expected a list of names"),
        ("fox", "expected a list of names"),
        (["fox", "  "], "blank"),
        (["fox", "owl", "owl", "ring", "fox"], r"\['fox', 'owl'\]"),
        (["Fox", "owl", "fox "], r"\['Fox', 'fox '\]"),
        (["fox" * 50], "truncate"),
    ],
)
def test_names_that_are_refused(model, names, complaint):
    with pytest.raises(ValueError, match=complaint):
        zeroshot_classifier(model, names)


@pytest.mark.parametrize(
    "templates, complaint",
    [
        ([], "expected a list such as"),
        ("a {}", "expected a list such as"),
        (["{}", "a drawing"], "'a drawing' has no place"),
        (["a {style} {}"], "no place"),
        (["{} and {}"], "no place"),
        (["{"], "no place"),
    ],
)
def test_templates_that_are_refused(model, templates, complaint):
    with pytest.raises(ValueError, match=complaint):
        zeroshot_classifier(model, NAMES, templates)


def test_a_name_with_braces_is_a_name(model):
    assert zeroshot_classifier(model, ["{x}", "{}"]).shape[0] == 2


def test_model_without_tokenizer():
    sizes = 32, 32, 2, 128, 8, 32, 600, 64, 2, 2
    with pytest.raises(ValueError, match="no tokenizer"):
        zeroshot_classifier(CLIP(CLIPConfig(*sizes)), NAMES)


# ------------------------------------------------------- image_vectors


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_image_vectors_one_by_one(model, images, batch):
    ready = preprocess(32)
    ours = image_vectors(model, ready, images, batch)
    with torch.no_grad():
        one = [model.encode_image(ready(x)[None])[0] for x in images]
    expected = torch.stack([x / x.square().sum().sqrt() for x in one])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert not ours.requires_grad


def test_classifier_is_what_the_model_says(model, images):
    """logit_scale times our two halves is logits_per_image."""
    ready = preprocess(32)
    with torch.no_grad():
        ids = model.tokenizer(NAMES, model.context_length)
        expected, _ = model(ready(images), ids)
        u = image_vectors(model, ready, images)
        ours = (
            model.logit_scale.exp()
            * u
            @ zeroshot_classifier(model, NAMES).T
        )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_image_vectors_refuses(model, images):
    ready = preprocess(32)
    for wrong in images[0], images[:0]:
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            image_vectors(model, ready, wrong)
    model.train()
    try:
        with pytest.raises(ValueError, match="model.eval"):
            image_vectors(model, ready, images)
    finally:
        model.eval()


# ----------------------------------------------------- wilson_interval


@pytest.mark.parametrize(
    "right, total, low, high",
    [  # R: prop.test(k, n, correct=FALSE)$conf.int, z = 1.959964
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (5, 10, 0.2365931, 0.7634069),
        (10, 100, 0.05522914, 0.1743657),
    ],
)
def test_wilson_known_values(right, total, low, high):
    found = wilson_interval(right, total, z=1.959964)
    assert found == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 3000).flatmap(
    lambda n: st.tuples(st.integers(0, n), st.just(n))
))  # fmt: skip
def test_wilson_limits_are_just_not_surprising(pair):
    """At a limit p the answer lies z deviations of p away, exactly."""
    right, total = pair
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1
    for p in low, high:
        away = abs(right / total - p)
        deviation = math.sqrt(p * (1 - p) / total)
        assert away == pytest.approx(1.96 * deviation, abs=1e-7)
    assert low < high


def test_wilson_limits_by_trying():
    p = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for right in range(0, 48):
        away = (right / 47 - p).abs()
        fits = p[away <= 1.96 * (p * (1 - p) / 47).sqrt()]
        tried = fits.min().item(), fits.max().item()
        assert wilson_interval(right, 47) == pytest.approx(tried, abs=1e-5)


def test_wilson_is_symmetric_and_shrinks():
    low, high = wilson_interval(3, 20)
    assert wilson_interval(17, 20) == pytest.approx((1 - high, 1 - low))
    wide, narrow = wilson_interval(30, 100), wilson_interval(300, 1000)
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]
    assert wilson_interval(3, 20, z=2.576)[1] > high


def test_wilson_keeps_its_promise():
    """About 95 of 100 exams have the truth in their interval."""
    g = torch.Generator().manual_seed(0)
    for p in 0.05, 0.4, 0.9:
        exams = torch.rand(4000, 94, generator=g) < p
        ends = [wilson_interval(int(k), 94) for k in exams.sum(dim=1)]
        caught = sum(low <= p <= high for low, high in ends) / 4000
        assert 0.93 < caught < 0.975


@pytest.mark.parametrize("right, total", [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(right, total):
    with pytest.raises(ValueError, match="0 <= right <= total"):
        wilson_interval(right, total)


# --------------------------------------------------------------- score


def test_score_by_hand():
    similarity = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 6],  # right: 0, the first
            [9.0, 8, 7, 6, 5, 4, 3],  # right: 4, the fifth
            [9.0, 8, 7, 6, 5, 4, 3],  # right: 5, the sixth
            [1.0, 2, 3, 4, 5, 6, 7],  # right: 6, the first
        ]
    )
    found = score(similarity, torch.tensor([0, 4, 5, 6]))
    low, high = wilson_interval(2, 4)
    low5, high5 = wilson_interval(3, 4)
    assert found == {
        "pictures": 4,
        "names": 7,
        "chance": 1 / 7,
        "top1": 0.5,
        "low": low,
        "high": high,
        "top5": 0.75,
        "low5": low5,
        "high5": high5,
    }


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_score_by_sorting(B, N, seed):
    g = torch.Generator().manual_seed(seed)
    similarity = torch.randn(B, N, generator=g)
    labels = torch.randint(N, (B,), generator=g)
    found = score(similarity, labels)
    for key, k in ("top1", 1), ("top5", 5):
        right = 0
        for row, label in zip(similarity.tolist(), labels.tolist()):
            order = sorted(range(N), key=lambda j: -row[j])
            right += label in order[:k]
        assert found[key] == right / B
    assert found["top1"] <= found["top5"]


def test_ties_are_lost():
    found = score(torch.zeros(6, 6), torch.arange(6))
    assert found["top1"] == found["top5"] == 0
    one_tie = torch.tensor([[2.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    assert score(one_tie, torch.tensor([0]))["top1"] == 0
    assert score(one_tie, torch.tensor([0]))["top5"] == 1
    for_fifth = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 1.0]])
    assert score(for_fifth, torch.tensor([4]))["top5"] == 0


def test_five_names_make_top5_easy():
    found = score(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))
    assert found["top5"] == 1 and found["chance"] == 0.25


@pytest.mark.parametrize(
    "similarity, labels, complaint",
    [
        (torch.zeros(3), torch.zeros(3).long(), "expected"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "expected"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "expected"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "from 0 to 2"),
        (torch.zeros(2, 3), torch.zeros(2), "whole numbers"),
        (torch.full((2, 3), math.nan), torch.zeros(2).long(), "finite"),
    ],
)
def test_score_refuses(similarity, labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        score(similarity, labels)


# ------------------------------------------------------ four_test_sets


def test_emoji_names():
    splits = emoji_names()
    assert len(splits) == 1651 and list(splits) == sorted(splits)
    count = [list(splits.values()).count(s) for s in ("test", "val")]
    assert count == [94, 47]
    assert "red apple" in splits and "flag: Korea" not in splits


class Oracle(CLIP):
    """Knows the name of each vector: encode_text gives name number i."""

    def __init__(self, names):
        super().__init__(CLIPConfig(8, 8, 1, 64, 8, 8, 600, 64, 1, 1))
        self.eval()
        g = torch.Generator().manual_seed(0)
        self.of = {n: torch.randn(64, generator=g) for n in names}
        self.tokenizer = self.remember

    def remember(self, texts, context_length):
        self.texts = texts
        return torch.arange(len(texts))

    def encode_text(self, ids):
        return torch.stack([self.of[self.texts[i]] for i in ids.tolist()])


PICTURES = [  # style, concept: two known, a held-out, one to choose on
    ("noto", "fox"),
    (UNSEEN_STYLE, "fox"),
    (UNSEEN_STYLE, "owl"),
    ("noto", "pizza"),
    (UNSEEN_STYLE, "pizza"),
    (UNSEEN_STYLE, "comet"),
]


def exam_of(oracle, looks_like):
    """The six pictures, each with the vector of what it looks like."""
    splits = emoji_names()
    records = [
        {"style": style, "split": splits[name], "concept": name}
        for style, name in PICTURES
    ]
    assert [r["split"] for r in records[2:]] == [
        "train",
        "test",
        "test",
        "val",
    ]
    u = torch.stack([oracle.of[name] for name in looks_like])
    return SimpleNamespace(records=records), F.normalize(u, dim=-1)


def test_four_test_sets_take_the_right_pictures_and_names():
    oracle = Oracle(emoji_names())
    exam = exam_of(oracle, [name for _, name in PICTURES])
    rows = four_test_sets(oracle, None, exam)
    about = [(r["concepts"], r["style"], r["among"]) for r in rows]
    assert about == list(TEST_SETS)
    assert [r["pictures"] for r in rows] == [1, 2, 1, 1, 1, 1, 4]
    assert [r["names"] for r in rows] == [
        94 if among == "held-out" else 1651 for _, _, among in about
    ]
    assert all(r["top1"] == 1 for r in rows)


def test_known_names_are_rivals_only_among_all_names():
    oracle = Oracle(emoji_names())
    fox, pizza = oracle.of["fox"], oracle.of["pizza"]
    oracle.of["pizza"] = 0.8 * fox + 0.2 * pizza  # much like a fox
    looks_like = ["fox", "fox", "owl", "pizza", "fox", "comet"]
    rows = four_test_sets(oracle, None, exam_of(oracle, looks_like))
    right = {(r["concepts"], r["style"], r["among"]): r for r in rows}
    assert right["held-out", "unseen", "held-out"]["top1"] == 1
    assert right["held-out", "unseen", "all"]["top1"] == 0
    assert right["held-out", "unseen", "all"]["top5"] == 1


def test_table():
    r = score(torch.eye(20), torch.arange(20))
    about = {"concepts": "seen", "style": "unseen", "among": "all"}
    head, line = table([{**about, **r}]).splitlines()
    assert line.split()[:5] == ["seen", "unseen", "20", "20", "5.00%"]
    assert "100.0%" in line and "(84%-100%)" in line


# --------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the command writes about the model that ships."""
    out = tmp_path_factory.mktemp("results") / "new" / "zeroshot.json"
    main(["emoji", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), out


def test_result_says_how_to_get_it_again(result):
    found, out = result
    weights = data_dir() / "checkpoints" / "emoji" / "model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found["command"] == (
        f"python -m miniclip.zeroshot emoji --out {out}"
    )
    assert found["sha256"] == sha256
    assert found["miniclip"] == miniclip.__version__
    assert found["torch"] == torch.__version__


def test_pictures_and_names_of_the_four_sets(result):
    rows = result[0]["rows"]
    assert [(r["pictures"], r["names"]) for r in rows] == [
        (6774, 1651),
        (1509, 1651),
        (470, 94),
        (470, 1651),
        (94, 94),
        (94, 1651),
        (1650, 1651),
    ]


FLOORS = {  # top-1: a few points below what the model does
    ("seen", "seen", "all"): 0.93,
    ("seen", "unseen", "all"): 0.59,
    ("held-out", "seen", "held-out"): 0.24,
    ("held-out", "seen", "all"): 0.05,
    ("held-out", "unseen", "held-out"): 0.18,
    ("held-out", "unseen", "all"): 0.02,
    ("any", "unseen", "all"): 0.54,
}


def test_the_shipped_model_is_as_good_as_it_was(result):
    for r in result[0]["rows"]:
        floor = FLOORS[r["concepts"], r["style"], r["among"]]
        assert r["low"] <= r["top1"] <= r["high"]
        assert r["top1"] >= floor, r
        assert r["low"] > r["chance"], r


def test_exam_of_one_style():
    model, ready = load("emoji")
    data, u = emoji_exam(model, ready, [UNSEEN_STYLE])
    assert len(data) == len(u) == 1650
    assert {r["style"] for r in data.records} == {UNSEEN_STYLE}
    assert {r["concept"] for r in data.records} <= emoji_names().keys()


def test_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["no-such-model"])
    assert "no-such-model" in capsys.readouterr().err
