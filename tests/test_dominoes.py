import numpy as np
import pytest
import torch
from torch import nn

from samlib.datasets import DataError
from samlib.datasets import dominoes as module
from samlib.datasets.dominoes import CLASSES, TILES, load_dominoes
from samlib.features import probe_features
from samlib.layers import plain
from samlib.models.dominoes import convolutional, fully_connected

SMALL = {"images_per_class": 20, "test_images_per_class": 10}


def small(**settings):
    return load_dominoes(**{"policy": "standin", **SMALL, **settings})


@pytest.fixture
def pictures(monkeypatch):
    """Noise in place of both data sets, as if it were real: (CIFAR-10, MNIST), 60 and 30 pictures of each class."""
    random = np.random.default_rng(0)

    def noise(per_class, shape):
        labels = random.permutation(np.repeat(np.arange(10), per_class))
        return random.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels

    cifar, mnist = ((*noise(60, shape), *noise(30, shape)) for shape in ((3, 32, 32), (1, 28, 28)))
    for source, made in ((module.CIFAR10, cifar), (module.MNIST, mnist)):
        monkeypatch.setattr(source, "locate", lambda: [])
        monkeypatch.setattr(source, "read", lambda _, made=made: made)
    return cifar, mnist


@pytest.fixture
def unscaled(monkeypatch):
    """Images as whole numbers, so that pictures can be recognised."""
    monkeypatch.setattr(module, "_standardised", lambda parts: [torch.as_tensor(part) for part in parts])


def parts(dominoes):
    """Images, objects' labels and digits' labels (where there are any) of each part."""
    probes = dominoes.probes
    return {
        "train": (dominoes.train_inputs, dominoes.train_targets.argmax(1), None),
        "test": (dominoes.test_inputs, dominoes.test_targets, None),
        "probe train": (probes.train.inputs, probes.train.labels["object"], probes.train.labels["digit"]),
        "probe test": (probes.test.inputs, probes.test.labels["object"], probes.test.labels["digit"]),
    }


def recognised(dominoes, pictures):
    """For each part, the numbers of the digits and of the objects among all training and test pictures."""

    def numbers(images, data):
        table = {picture.tobytes(): i for i, picture in enumerate(np.concatenate([data[0], data[2]]))}
        return [table[image.tobytes()] for image in images]

    cifar, mnist = pictures
    found = {}
    for name, (x, _, _) in parts(dominoes).items():
        images = x.numpy().astype(np.uint8)
        digits = np.ascontiguousarray(images[:, :1, 2:30, 2:30])
        assert (images[:, :1, :32] == images[:, 1:, :32]).all()  # grey
        assert images[:, :, :32].sum() == 3 * digits.sum(dtype=int)  # a black frame
        found[name] = numbers(digits, mnist), numbers(np.ascontiguousarray(images[:, :, 32:]), cifar)
    return found


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize("agreement", [1.0, 0.5])
def test_each_picture_is_used_once_and_probes_share_no_digit_with_training(pictures, agreement):
    dominoes = load_dominoes(policy="real", tile=32, agreement=agreement, **SMALL)
    found = recognised(dominoes, pictures)
    digits, objects = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    used = [number for numbers in digits.values() for number in numbers]
    assert len(set(used)) == len(used) == 2 * 200 + 2 * 100
    assert objects["train"] == objects["probe train"]
    seen = objects["train"] + objects["test"] + objects["probe test"]
    assert len(set(seen)) == len(seen) == 400
    for name, numbers in (*digits.items(), *objects.items()):
        assert all((number >= 600) == ("test" in name) for number in numbers)


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize("agreement", [1.0, 0.8, 0.0])
def test_labels_are_those_of_the_pictures_and_digits_agree_as_often_as_asked(pictures, agreement):
    dominoes = load_dominoes(policy="real", tile=32, agreement=agreement, **SMALL)
    of_objects, of_digits = (np.concatenate([data[1], data[3]]) for data in pictures)
    found = recognised(dominoes, pictures)
    for name, (_, objects, digits) in parts(dominoes).items():
        shown = of_digits[found[name][0]]
        assert (of_objects[found[name][1]] == objects.numpy()).all()
        table = np.zeros((10, 10), dtype=int)
        np.add.at(table, (objects.numpy(), shown), 1)
        per_class = len(objects) // 10
        assert (table.sum(1) == per_class).all()
        if digits is None:
            assert (table.diagonal() == round(agreement * per_class)).all()
            others = table[~np.eye(10, dtype=bool)]
            assert others.max() - others.min() <= 1
        else:
            assert (shown == digits.numpy()).all()
            assert (table == per_class // 10).all()  # a digit says nothing about its object


@pytest.mark.usefixtures("unscaled")
def test_some_classes_are_numbered_in_the_order_given(pictures):
    dominoes = load_dominoes(["truck", "cat"], policy="real", tile=32, **SMALL)
    found = recognised(dominoes, pictures)
    of_objects, of_digits = (np.concatenate([data[1], data[3]]) for data in pictures)
    for name, (_, objects, digits) in parts(dominoes).items():
        assert (of_objects[found[name][1]] == np.array([9, 3])[objects]).all()
        assert set(of_digits[found[name][0]]) == {0, 1}
        assert digits is None or (of_digits[found[name][0]] == digits.numpy()).all()
    assert dominoes.train_targets.shape == (40, 2)


@pytest.mark.parametrize("tile", TILES)
def test_tiles_are_averages_and_channels_are_standardised(pictures, monkeypatch, tile):
    dominoes = load_dominoes(policy="real", tile=tile, seed=3, **SMALL)
    monkeypatch.setattr(module, "_standardised", lambda parts: [torch.as_tensor(part) for part in parts])
    whole = load_dominoes(policy="real", tile=32, seed=3, **SMALL)
    averaged = {
        name: nn.functional.avg_pool2d(x.double(), 32 // tile).numpy() for name, (x, _, _) in parts(whole).items()
    }
    assert averaged["train"].shape == (200, 3, 2 * tile, tile)
    mean = [averaged["train"][:, c].mean() for c in range(3)]
    std = [averaged["train"][:, c].std() for c in range(3)]
    for name, (x, _, _) in parts(dominoes).items():
        assert x.dtype == torch.float32
        for c in range(3):
            np.testing.assert_allclose(x[:, c], (averaged[name][:, c] - mean[c]) / std[c], atol=1e-6)


def test_the_seed_chooses_pictures_pairs_and_order():
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.probes.test.inputs, again.probes.test.inputs)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(first.train_targets, other.train_targets)
    state = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fingerprint_is_that_of_everything_used(pictures):
    changed = [
        {"images_per_class": 21},
        {"test_images_per_class": 11},
        {"agreement": 0.9},
        {"tile": 8},
        {"classes": CLASSES[:9]},
        {"classes": CLASSES[::-1]},
    ]
    prints = [load_dominoes(**{"policy": "real", **SMALL, **c}).fingerprint for c in [{}, *changed]]
    assert len(set(prints)) == len(prints)
    cifar, mnist = pictures
    for data in (cifar[0], cifar[2], mnist[0], mnist[2]):
        data[:] = 255 - data
        prints.append(load_dominoes(policy="real", **SMALL).fingerprint)
    assert len(set(prints)) == len(prints)


def test_order_says_nothing_about_the_class():
    for _, objects, _ in parts(small()).values():
        assert len(objects[: len(objects) // 2].unique()) == 10


def test_the_stand_in_touches_neither_network_nor_files(monkeypatch):
    def forbidden(*_):
        raise AssertionError("touched")

    for source in (module.CIFAR10, module.MNIST):
        monkeypatch.setattr(source, "locate", forbidden)
    dominoes = small()
    assert dominoes.standin
    assert dominoes.name.startswith("digits_on_cifar stand-in: generated")


def test_the_labels_of_the_stand_in_describe_its_pictures():
    def spectra(x):  # of digit and grating, whatever their place or phase
        return torch.fft.fft2(x.mean(1).unflatten(1, (2, 16))).abs()

    probes = probe_features(spectra, small(images_per_class=100, test_images_per_class=50).probes)
    assert probes["digit"].error < 0.1
    assert probes["object"].error < 0.1


def test_without_data_auto_falls_back_as_a_whole_and_real_says_what_is_missing(monkeypatch):
    def missing():
        raise DataError("cannot load mnist: no such file")

    monkeypatch.setattr(module.MNIST, "locate", missing)
    monkeypatch.setattr(module.CIFAR10, "locate", lambda: [])
    monkeypatch.setattr(module.CIFAR10, "read", lambda _: ())
    with pytest.raises(DataError, match="cannot load mnist"):
        load_dominoes(policy="real")
    with pytest.warns(
        UserWarning, match=r"(?s)cannot load mnist.*stand-in for digits_on_cifar.*do not count"
    ) as caught:
        dominoes = load_dominoes(policy="auto", **SMALL)
    assert caught[0].filename == __file__
    assert dominoes.standin
    assert dominoes.fingerprint == small().fingerprint


@pytest.mark.usefixtures("pictures")
def test_more_than_there_is_is_refused():
    with pytest.raises(DataError, match="asked for 61 pictures of airplane, but there are 60; ask for fewer"):
        load_dominoes(policy="auto", images_per_class=61)
    with pytest.raises(DataError, match="asked for 32 pictures of digit 0, but there are 30"):
        load_dominoes(["cat", "dog"], policy="auto", images_per_class=10, test_images_per_class=16, agreement=1)
    # Digits run out as well, when training and probes together need more.
    with pytest.raises(DataError, match="asked for 62 pictures of digit 0, but there are 60"):
        load_dominoes(["cat", "dog"], policy="auto", images_per_class=31, test_images_per_class=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["cat", "wolf"]}, r"classes must be at least two .* of airplane, .*, got \['cat', 'wolf'\]"),
        ({"classes": ["cat"]}, "classes must be at least two"),
        ({"classes": ["cat", "cat"]}, "classes must be at least two different"),
        ({"classes": "cat"}, "classes must be at least two"),
        ({"images_per_class": 0}, "images_per_class must be at least 1, got 0"),
        ({"test_images_per_class": -1}, "test_images_per_class must be at least 1, got -1"),
        ({"agreement": 1.5}, r"agreement must be a share between 0 and 1, got 1\.5"),
        ({"agreement": float("nan")}, "agreement must be a share between 0 and 1, got nan"),
        ({"tile": 12}, "tile must be one of 4, 8, 16, 32, got 12"),
        ({"policy": "fake"}, "data must be 'auto', 'real' or 'standin', got 'fake'"),
    ],
)
def test_bad_requests_are_named_before_anything_is_read(monkeypatch, settings, message):
    monkeypatch.setattr(module, "_pictures", None)
    with pytest.raises(ValueError, match=message):
        load_dominoes(**settings)


@pytest.mark.data
@pytest.mark.usefixtures("real_data", "unscaled")
def test_real_data():
    dominoes = load_dominoes(policy="real")
    assert not dominoes.standin
    assert dominoes.train_inputs.shape == (4000, 3, 32, 16)
    tops = [{digit.tobytes() for digit in x.numpy()[:, 0, :16]} for x, _, _ in parts(dominoes).values()]
    assert len(set.union(*tops)) == 16_000
    # The same choice on every machine and with every version of NumPy.
    assert dominoes.fingerprint[:16] == "ed5dcdc2a56a4665"


# --- Networks


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("build", [convolutional, fully_connected])
def test_logits_are_the_last_layer_of_the_features(build, batch_norm):
    torch.manual_seed(0)
    model = build((3, 16, 8), classes=4, batch_norm=batch_norm).eval()
    x = torch.randn(5, 3, 16, 8)
    assert model.features(x).shape == (5, 64)
    assert torch.equal(model(x), model.features(x) @ model.last.weight.T + model.last.bias)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"body", "last"}
    norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert norms == (0 if not batch_norm else 3 if build is convolutional else 2)
    logits = model(x)
    torch.testing.assert_close(plain(model)(x), logits)


def test_the_convolutional_network_is_the_one_described():
    torch.manual_seed(0)
    model = convolutional().double().eval()
    x = torch.randn(4, 3, 32, 16, dtype=torch.float64)
    y = x
    for i in range(0, 12, 4):
        y = nn.functional.conv2d(y, model.body[i].weight, padding=1)
        y = nn.functional.max_pool2d((y / (1 + 1e-5) ** 0.5).relu(), 2)  # BatchNorm as it starts
    torch.testing.assert_close(model.features(x), y.mean((2, 3)))
    assert sum(p.numel() for p in model.parameters()) == 9 * (3 * 16 + 16 * 32 + 32 * 64) + 2 * 112 + 650


def test_an_image_too_small_to_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"3 blocks halve an image 3 times, which 8×4 pixels do not allow; .* least 8"):
        convolutional((3, 8, 4))
