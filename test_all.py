"""Tests: python -m pytest test_all.py (offline, CPU, no data needed)."""
import copy
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import analyze
import sample
import train
import unet
from kmeans import KMeans, normalised_mutual_information, purity, seed_centers
from unet import UNet, UserError, load_checkpoint, phi, receptive_field

HERE = Path(__file__).parent
torch.set_num_threads(1)                         # the networks here are tiny: threads only get in their way


def gap(a, b):
    """Maximum absolute difference."""
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def normal(*shape, seed=0):
    """Standard normal numbers of this shape, from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def script(*words, env=None, **options):
    """Start `python …` in the repository's folder, with one thread, without waiting."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **options)


def finish(process, timeout=60):
    """(exit code, standard output, standard error)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# unet.py

def test_parameter_count():
    # App. A.1 prints ~13 m. By hand: convolutions 9·c_in·c_out + c_out, transposed ones
    # 4·c_in·c_out + c_out, norms 2·c.
    encoder = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    middle = [(256, 512), (512, 512), (512, 512)]
    decoder = [(c * 2 if i == 0 else c, 3 if (c, i) == (64, 5) else c)
               for c in (256, 128, 64) for i in range(6)]
    convs = sum(9 * a * b + b for a, b in encoder + middle + decoder)
    ups = sum(4 * 2 * c * c + c for c in (256, 128, 64))
    norms = 2 * (sum(b for _, b in encoder + middle + decoder) - 64 - 3)  # not the first layer, not the last
    count = sum(p.numel() for p in UNet().parameters())
    assert count == convs + ups + norms == 13_130_243


@pytest.mark.parametrize("levels, side", [(1, 18), (2, 40), (3, 84), (4, 172)])
def test_receptive_field_from_gradients(levels, side):
    model = UNet(width=1, channels=1, levels=levels)
    for block in model.blocks.values():  # the joint LayerNorm mixes all places: look at the convolutions
        for i, module in enumerate(block):
            if isinstance(module, nn.GroupNorm):
                block[i] = nn.Identity()
    for p in model.parameters():
        nn.init.constant_(p, 0.3)                # positive: no path is cut by a ReLU and no two cancel
    n = 2 ** levels * (side // 2 ** levels + 3)
    y = torch.rand(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    a = model.double().encode(y)[0]
    a[0, 0, a.shape[2] // 2, a.shape[3] // 2].backward()
    rows, columns = y.grad[0, 0].nonzero(as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side == receptive_field(levels)


def test_layer_structure():
    model = UNet(width=4, channels=3, levels=3)
    assert list(model.blocks) == ["E1", "E2", "E3", "M", "D3", "D2", "D1"]
    channels = dict(E1=(3, 4), E2=(4, 8), E3=(8, 16), M=(16, 32), D3=(32, 16), D2=(16, 8), D1=(8, 4))
    for name, block in model.blocks.items():
        layers = {"E": 2, "M": 3, "D": 6}[name[0]]
        kinds = [type(m).__name__ for m in block]
        expected = ["Conv2d", "GroupNorm", "ReLU"] * layers
        if name == "E1":
            del expected[1]
        if name == "D1":
            del expected[-2:]
        assert kinds == expected
        convs = [m for m in block if isinstance(m, nn.Conv2d)]
        first, rest = channels[name]
        shapes = [(rest, first if i == 0 else rest) for i in range(layers)]
        if name == "D1":
            shapes[-1] = (3, rest)
        assert [tuple(c.weight.shape[:2]) for c in convs] == shapes
        assert all(c.weight.shape[2:] == (3, 3) and c.padding == (1, 1) and c.padding_mode == "zeros"
                   and c.bias is not None for c in convs)


def independent_forward(model, y):
    """The network of App. A.1 from its weights, with torch.layer_norm over (C, H, W): x̂, M's maps."""
    w = model.state_dict()

    def block(name, a, layers, skip_norm=None, bare=None):
        keys = sorted({int(k.split(".")[2]) for k in w if k.startswith(f"blocks.{name}.")})
        for i in range(layers):
            k = keys.pop(0)
            a = F.conv2d(F.pad(a, (1, 1, 1, 1)), w[f"blocks.{name}.{k}.weight"], w[f"blocks.{name}.{k}.bias"])
            if i == bare:
                return a
            if i != skip_norm:
                k = keys.pop(0)
                a = F.layer_norm(a, a.shape[1:])
                scale, shift = w[f"blocks.{name}.{k}.weight"], w[f"blocks.{name}.{k}.bias"]
                a = a * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
            a = a.clamp(min=0)
        return a

    e1 = block("E1", y, 2, skip_norm=0)
    e2 = block("E2", F.interpolate(e1, scale_factor=0.5, mode="area"), 2)
    m = block("M", F.interpolate(e2, scale_factor=0.5, mode="area"), 3)

    def up(name, a):
        out = torch.einsum("nchw,cdij->ndhwij", a, w[f"up.{name}.weight"])
        out = out + w[f"up.{name}.bias"].view(-1, 1, 1, 1, 1)
        return out.permute(0, 1, 2, 4, 3, 5).reshape(len(a), -1, 2 * a.shape[2], 2 * a.shape[3])
    d2 = block("D2", torch.cat([e2, up("D2", m)], 1), 6)
    return block("D1", torch.cat([e1, up("D1", d2)], 1), 6, bare=5), m


@pytest.fixture
def small():
    """A random UNet of width 4 with two levels."""
    torch.manual_seed(0)
    model = UNet(width=4, channels=3, levels=2)
    for p in model.parameters():
        p.data += 0.1 * normal(*p.shape)         # norms that are not the identity
    return model


def test_forward_against_an_independent_one(small):
    y = normal(3, 3, 16, 24)
    with torch.no_grad():
        x_hat, m = independent_forward(small, y)
        assert gap(small.denoise(y), x_hat) < 1e-5
        assert gap(small.encode(y)[0], m) < 1e-5
        assert gap(small.score(y), x_hat - y) < 1e-5


def test_activations_and_nothing_left_behind(small):
    y, seen = normal(2, 3, 16, 16), {}
    average = lambda a: a.mean((2, 3))
    hooks = [b.register_forward_hook(lambda m, i, o, n=n: seen.update({n: (average(i[0]), average(o))}))
             for n, b in small.blocks.items()]
    before = set(vars(small))
    small(y)
    for hook in hooks:
        hook.remove()
    averages = small.activations(y)
    assert list(averages) == ["E1", "E2", "M", "D2", "D1"]
    assert [a.shape[1] for a, _ in averages.values()] == [3, 4, 8, 16, 8]  # a decoder's input: both halves
    for name in seen:
        assert gap(averages[name][0], seen[name][0]) < 1e-6 and gap(averages[name][1], seen[name][1]) < 1e-6
    assert set(vars(small)) == before and small.training


def test_phi(small):
    x, g = normal(3, 3, 16, 16), torch.Generator()
    code = phi(small, x, torch.tensor([0.1, 0.2, 0.3]), draws=5, generator=g.manual_seed(1))
    g.manual_seed(1)
    sigma, total = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1), 0
    for _ in range(5):
        y = x + sigma * torch.randn(3, 16, 16, 3, generator=g).permute(0, 3, 1, 2)
        total = total + independent_forward(small, y)[1].mean((2, 3)) / 5
    assert code.shape == (3, 16) and not code.requires_grad and gap(code, total) < 1e-5
    x.requires_grad_()
    phi(small, x, 0.1, generator=g, grad=True).sum().backward()
    assert x.grad.abs().max() > 0
    ran = []
    small.blocks["D1"].register_forward_hook(lambda *_: ran.append(1))
    phi(small, x, 0.1)
    assert not ran                               # first half only


@pytest.mark.parametrize("h, w", [(17, 30), (16, 19), (5, 3), (1, 2)])
def test_denoise_any_size(small, h, w):
    y = normal(1, 3, h, w)
    bottom, right = -h % 4, -w % 4
    padded = np.pad(y.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)),
                    "reflect" if bottom < h and right < w else "edge")
    with torch.no_grad():
        assert gap(small.denoise(y), small(torch.from_numpy(padded))[:, :, :h, :w]) < 1e-6
    with pytest.raises(ValueError, match=rf"{w}×{h} .*multiples of 4"):
        phi(small, y, 0.1)


class Malicious:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def test_load_checkpoint_errors(tmp_path, small):
    good = dict(format=unet.FORMAT, model=dict(width=4, channels=3, levels=2), weights=small.state_dict(),
                size=16, sigma_max=1.0, mean=[0.5] * 3, training={})
    torch.save(good, tmp_path / "good.pt")
    model, checkpoint = load_checkpoint(tmp_path / "good.pt")
    assert checkpoint["size"] == 16 and not model.training
    assert all(gap(a, b) == 0 for a, b in zip(model.state_dict().values(), small.state_dict().values()))
    torch.save(Malicious(), tmp_path / "malicious.pt")
    torch.save(small.state_dict(), tmp_path / "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:3000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_text("")
    torch.save({**good, "model": dict(width=5, channels=3, levels=2)}, tmp_path / "shape.pt")
    torch.save({k: v for k, v in good.items() if k != "mean"}, tmp_path / "lacks.pt")
    for name, words in dict(malicious="not a checkpoint", foreign="not a checkpoint", cut="not a checkpoint",
                            text="not a checkpoint", empty="not a checkpoint", shape="damaged",
                            lacks="damaged", missing="cannot be read").items():
        with pytest.raises(UserError, match=words) as error:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("owned")


# train.py: pictures

def test_odd_pictures(tmp_path):
    red, size = (200, 40, 40), (40, 24)
    folder = tmp_path / "in" / "Class A"
    folder.mkdir(parents=True)
    flat = Image.new("RGB", size, red)
    flat.save(folder / "a.JPEG", quality=95)
    flat.quantize(4).save(folder / "b.png")                                    # palette
    flat.convert("CMYK").save(folder / "c.Jpg", quality=95)
    Image.new("RGBA", size, (*red, 51)).save(folder / "d.PNG")                 # a fifth red over white
    clear = Image.new("P", size, 0)
    clear.putpalette([0, 0, 0] * 256)
    clear.save(folder / "e.gif", transparency=0)                               # all transparent: white
    Image.fromarray(np.full(size[::-1], 51 * 257, np.uint16)).save(folder / "f.png")       # 16-bit gray
    Image.new("L", size, 51).save(folder / "g.bmp")
    Image.new("1", size, 1).save(folder / "h.tiff")
    Image.new("LA", size, (0, 0)).save(folder / "i.png")
    keyed = Image.new("RGB", size, (0, 255, 0))
    keyed.save(folder / "i2.png", transparency=(0, 255, 0))  # green means transparent: white
    white, gray = (255,) * 3, (51,) * 3
    expected = [red, red, red, (244, 212, 212), white, gray, gray, white, white, white]
    upright = np.zeros((24, 24, 3), np.uint8)
    upright[:12] = red                                                         # red above black …
    exif = Image.Exif()
    exif[0x0112] = 6                                                           # … stored turned a quarter
    Image.fromarray(np.rot90(upright).copy()).save(folder / "j.png", exif=exif)
    (folder / "k.jpg").write_bytes((folder / "a.JPEG").read_bytes()[:400])     # truncated
    (folder / "l.png").write_text("no picture")
    (folder / "notes.txt").write_text("ignored")
    (folder / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (7, 9), (0, 0, 255)).save(elsewhere / "m.webp", lossless=True)
    (tmp_path / "in" / "link").symlink_to(elsewhere, target_is_directory=True)

    p = train.load_pictures(str(tmp_path / "in"), size=16)
    assert p.x.shape == (12, 16, 16, 3) and p.x.dtype == np.uint8
    for x, colour, path in zip(p.x, expected, p.paths):
        assert np.abs(x.astype(int) - np.array(colour)).max() <= 3, path
    assert np.abs(p.x[10][:7].astype(int) - red).max() <= 3 and p.x[10][9:].max() <= 3       # upright again
    assert np.abs(p.x[11].astype(int) - (0, 0, 255)).max() == 0
    assert p.classes == ["Class A", "link"] and p.labels.tolist() == [0] * 11 + [1]
    assert len(p.skipped) == 2 and "k.jpg" in p.skipped[0] and "l.png" in p.skipped[1]
    gray = train.load_pictures(str(tmp_path / "in"), size=16, channels=1)
    assert gray.x.shape == (12, 16, 16, 1) and np.abs(gray.x[5].astype(int) - 51).max() <= 1
    one = train.load_picture(folder / "d.PNG", 16)
    assert one.shape == (16, 16, 3) and (one == p.x[3]).all()
    assert train.load_picture(folder / "d.PNG").shape == (24, 40, 3)
    with pytest.raises(UserError, match="l.png"):
        train.load_picture(folder / "l.png")


def test_centre_crop_and_antialiasing(tmp_path):
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, 16:80:2] = 255  # one-pixel stripes in the central square: their average is gray
    stripes[:, :16] = stripes[:, 80:] = (255, 0, 0)                            # outside it
    x = train.to_pixels(Image.fromarray(stripes), 16, 3)
    assert np.abs(x[0, :, 1:-1].astype(int) - 127).max() <= 8                  # no red, no aliasing


def test_patches_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    tiles = {}
    for k in range(12):
        picture = rng.integers(0, 256, (35, 50), np.uint8)                     # 2 × 3 tiles of 16
        if k == 3:
            picture[:16, :16] = tiles["2.png"][16:32, 32:48]  # shares one tile with its neighbour
        tiles[f"{k}.png"] = picture
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    Image.new("L", (10, 40)).save(tmp_path / "tiny.png")
    p = train.load_pictures(str(tmp_path), 16, 1, patches=True)
    assert p.x.shape == (72, 16, 16, 1) and len(p.skipped) == 1 and "no 16×16 tile" in p.skipped[0]
    for path, x in zip(p.paths, p.x):
        name, tile = Path(path).name.split("#")
        i, j = divmod(int(tile), 3)
        assert (tiles[name][16 * i:16 * i + 16, 16 * j:16 * j + 16] == x[..., 0]).all()
    for seed in range(8):
        train_rows, held_out = train.split(p, 0.2, seed)
        files = [{Path(p.paths[i]).name.split("#")[0] for i in rows} for rows in (train_rows, held_out)]
        assert not files[0] & files[1] and files[1]
        assert len({"2.png", "3.png"} & files[0]) != 1                         # the shared tile ties them


def test_split_depends_on_pictures_and_seed_alone(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    x[10:14] = x[0]                              # exact duplicates
    x[50] = x[49]
    order = np.random.default_rng(1).permutation(60)
    for name, pictures in ("a", x), ("b", x[order]):
        np.save(tmp_path / f"{name}.npy", pictures)
    a, b = (train.load_pictures(str(tmp_path / f"{n}.npy"), 8) for n in "ab")
    assert a.fingerprint == b.fingerprint
    content = lambda p, rows: sorted(p.x[i].tobytes() for i in rows)
    held = set()
    for seed in range(20):
        train_a, held_a = train.split(a, 0.1, seed)
        assert sorted([*train_a, *held_a]) == list(range(60)) and 1 <= len(held_a) <= 6
        assert not set(content(a, train_a)) & set(content(a, held_a))          # no twin on the other side
        assert content(a, held_a) == content(b, train.split(b, 0.1, seed)[1])
        held.add(tuple(sorted(held_a)))
        first, second = (train.training_part(a, train_a, s, None, seed) for s in ("first", "second"))
        assert sorted([*first, *second]) == sorted(train_a) and abs(len(first) - len(second)) <= 6
        assert not set(content(a, first)) & set(content(a, second))
        few, more = (train.training_part(a, train_a, "first", n, seed) for n in (5, 9))
        assert len(few) == 5 and list(more[:5]) == list(few)
    assert len(held) > 10                        # the seed matters
    big = train.Pictures(np.zeros((50_000, 1)), [], None, [], np.arange(50_000), [], "")
    assert len(train.split(big)[1]) == 2000


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.save(tmp_path / "colour.npy", x)
    np.save(tmp_path / "gray.npy", x[..., 0])
    np.save(tmp_path / "gray1.npy", x[..., :1])
    np.savez(tmp_path / "pictures.npz", other=np.zeros(3), images=x)
    p = train.load_pictures(str(tmp_path / "colour.npy"), 8)
    assert isinstance(p.x, np.memmap) and (p.x == x).all()
    for name in "gray", "gray1":
        assert (train.load_pictures(str(tmp_path / f"{name}.npy"), 8, 1).x == x[..., :1]).all()
        assert (train.load_pictures(str(tmp_path / f"{name}.npy"), 8, 3).x == x[..., :1]).all()
    assert (train.load_pictures(str(tmp_path / "pictures.npz"), 8).x == x).all()
    assert train.load_pictures(str(tmp_path / "colour.npy"), 4).x.shape == (20, 4, 4, 3)
    assert train.load_pictures(str(tmp_path / "colour.npy"), 4, patches=True).x.shape == (80, 4, 4, 3)
    imagenet = tmp_path / "imagenet64"           # planar: all red, then all green, then all blue
    imagenet.mkdir()
    planar = rng.integers(0, 256, (10, 3, 64, 64), np.uint8)
    for k in range(2):
        np.savez(imagenet / f"train_data_batch_{k + 1}.npz", data=planar[5 * k:5 * k + 5].reshape(5, -1),
                 labels=np.arange(5) + 1, mean=np.zeros(12288))
    p = train.load_pictures(str(imagenet), 64)
    assert (p.x == planar.transpose(0, 2, 3, 1)).all()
    assert p.classes == ["1", "2", "3", "4", "5"] and p.labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_builtin_pictures():
    x, labels, classes = train.builtin_pictures(300, 32, 3)
    assert x.shape == (300, 32, 32, 3) and len(classes) >= 12 and np.bincount(labels).tolist() == [20] * 15
    assert (train.builtin_pictures(300, 32, 3)[0] == x).all()                  # deterministic
    assert min(np.ptp(p) for p in x) > 40        # nothing is blank
    gray = train.builtin_pictures(30, 32, 1)[0]
    assert gray.shape == (30, 32, 32, 1)


def test_disc_pictures_have_five_degrees_of_freedom():
    x = train.builtin_pictures(40, 32, 1, "disc")[0][..., 0].astype(float)
    for p in x:                                  # a radial profile about its own centre describes it
        ground, weight = p[0, 0], np.abs(p - p[0, 0])
        if weight.max() < 30:
            continue
        i, j = np.indices(p.shape)
        ci, cj = (i * weight).sum() / weight.sum(), (j * weight).sum() / weight.sum()
        r = np.hypot(i - ci, j - cj)
        radius = np.sqrt(weight.sum() / weight.max() / np.pi)
        inner, outer = p[r < radius - 2.5], p[r > radius + 2.5]
        assert np.ptp(inner) <= 5 and np.abs(outer - ground).max() <= 5


def test_calpha_regularity():
    # |f(x + h) − f(x)| grows like h^α inside a region of regularity α < 1, and like h above; leave the 30 %
    # largest differences out, where the contour is crossed.
    for alpha, exponent in (0.5, 0.5), (0.7, 0.7), (0.9, 0.9), (2, 1):
        x = train.calpha_pictures(200, 64, np.random.default_rng(0), alpha)[..., 0].astype(float)
        size = {}
        for h in 8, 16:
            d = (x[:, h:] - x[:, :-h]) ** 2
            size[h] = np.minimum(d, np.quantile(d, 0.7)).mean() ** 0.5
        assert abs(np.log2(size[16] / size[8]) - exponent) < 0.17, alpha
    for bad in "calpha:0", "calpha:x", "calpha:-1", "calpha:nan":
        with pytest.raises(UserError, match="positive"):
            train.load_pictures(bad, 32, 1)


# train.py: training

def test_sigma_distribution():
    sigma = train.draw_sigma(100_000, 0.8, torch.Generator().manual_seed(0)).flatten().sort().values
    cdf = (sigma / 0.8).sqrt()                   # p(σ) ∝ 1/√σ on [0, 0.8]
    assert gap(cdf, (torch.arange(100_000) + 0.5) / 100_000) < 0.006           # Kolmogorov–Smirnov, p < 0.001
    x, y, s = train.noisy_batch(np.full((64, 16, 16, 3), 51, np.uint8), np.arange(64), 7, 0, 0.8, "cpu")
    z = (y - x) / s
    assert gap(x, torch.full_like(x, 0.2)) < 1e-6
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_learning_rate_and_data_order():
    assert [train.learning_rate(t) for t in (0, 0.09, 0.1, 0.55, 0.99, 1)] == [
        1e-3, 1e-3, 5e-4, 1e-3 / 32, 1e-3 / 512, 1e-3 / 512]
    rows = np.arange(100, 110)
    seen = np.concatenate([train.batch_rows(rows, step, 4, 0) for step in range(10)])      # 4 epochs of 10
    for epoch in seen.reshape(4, 10):
        assert sorted(epoch) == list(rows)
    assert list(seen[:10]) != list(seen[10:20])
    assert sorted(train.batch_rows(rows, 0, 25, 0)) == sorted([*rows, *rows, *seen[20:25]])    # batch > data


def test_micro_batches_give_the_same_gradient(small):
    x = torch.rand(7, 3, 16, 16)
    y = x + 0.3 * normal(*x.shape)
    gradients = []
    for micro in 7, 3, 1:
        model = copy.deepcopy(small)
        losses = train.accumulate_gradient(model, x, y, 7, micro)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    direct = (independent_forward(small, y)[0] - x).pow(2).sum((1, 2, 3))
    assert gap(losses, direct) < 1e-3            # Eq. 1: summed over pixels
    assert max(gap(g, gradients[0]) for g in gradients) < 1e-5 * gradients[0].abs().max()


def test_data_dependent_initialisation(small):
    y = normal(16, 3, 16, 16)
    train.initialise(small, y, [0.2, 0.4, 0.6])
    outputs = []
    hooks = [m.register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()))
             for m in small.modules() if isinstance(m, nn.GroupNorm)]
    x_hat = small(y)
    for hook in hooks:
        hook.remove()
    assert gap(x_hat, torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand_as(x_hat)) < 1e-6
    assert len(outputs) == 2 * 2 + 3 + 2 * 6 - 2
    for a in outputs:
        assert gap(a.mean((0, 2, 3)), torch.zeros(a.shape[1])) < 1e-3
        assert gap(a.std((0, 2, 3)), torch.ones(a.shape[1])) < 1e-2


def test_training_reaches_the_wiener_solution():
    # Gaussian pictures: E[x | y] is linear, its error has a closed form; Eq. 1's minimiser must come close.
    n, sigma, g = 8, 0.5, torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(n)
    spectrum = 2 * torch.exp(-40 * (f[:, None] ** 2 + f[None] ** 2))           # λ_k: smooth, periodic
    white = lambda m: torch.randn(m, 1, n, n, generator=g)
    sample = lambda m: torch.fft.ifft2(torch.fft.fft2(white(m)) * spectrum.sqrt()).real
    torch.manual_seed(0)
    model = UNet(width=8, channels=1, levels=1)
    train.initialise(model, sample(64) + sigma * torch.randn(64, 1, n, n, generator=g), [0.0])
    steps, optimizer = 500, torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3 * train.learning_rate(step / steps / 2)
        x = sample(64)
        optimizer.zero_grad()
        train.accumulate_gradient(model, x, x + sigma * torch.randn(x.shape, generator=g), 64, 64)
        optimizer.step()
    x = sample(2000)
    y = x + sigma * torch.randn(x.shape, generator=g)
    wiener = torch.fft.ifft2(torch.fft.fft2(y) * spectrum / (spectrum + sigma ** 2)).real
    with torch.no_grad():
        x_hat = model.denoise(y)
    optimum = (spectrum * sigma ** 2 / (spectrum + sigma ** 2)).mean().item()
    assert abs((wiener - x).square().mean().item() / optimum - 1) < 0.03       # the oracle is right
    assert 0.98 < (x_hat - x).square().mean().item() / optimum < 1.25
    assert (x_hat - wiener).square().mean() < 0.06 * (y - wiener).square().mean()


FLAGS = dict(train.COMMON, size=8, width=2, levels=1, channels=1, batch=6, epochs=None, minutes=None)


def tiny_data(folder, n=40):
    """The path of a .npy of n random gray pictures of 8×8."""
    path = folder / "tiny.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (n, 8, 8), np.uint8))
    return str(path)


def weights(path):
    """The weights in a checkpoint, by name."""
    return load_checkpoint(path)[1]["weights"]


def same(a, b):
    """Whether two sets of weights are equal to the bit."""
    return all(gap(a[k], b[k]) == 0 for k in a)


def test_resume_is_exact(tmp_path, capsys):
    flags = {**FLAGS, "data": tiny_data(tmp_path), "epochs": 4.0}
    whole, halves = str(tmp_path / "whole.pt"), str(tmp_path / "halves.pt")
    assert train.train(flags, whole)
    calls = iter(range(1000))
    assert not train.train(flags, halves, stop=lambda: next(calls) > 15)       # stops in the middle of a step
    middle = load_checkpoint(halves)[1]
    assert 0 < middle["step"] < load_checkpoint(whole)[1]["step"] == 26
    assert train.train(flags, halves, resume=middle)
    assert same(weights(whole), weights(halves))
    a, b = (torch.load(p, weights_only=True)["optimizer"]["state"] for p in (whole, halves))
    assert all(gap(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"]) == 0 for i in a)
    saved = load_checkpoint(whole)[1]
    assert set(saved["training"]["psnr"]) == set(train.SIGMAS)
    assert saved["mean"][0] == pytest.approx(0.5, abs=0.02)
    assert "already complete" not in capsys.readouterr().out
    assert train.train(flags, whole, resume=saved) and "already complete" in capsys.readouterr().out
    pictures, rows, held_out = train.checkpoint_pictures(saved)
    assert len(rows) == 38 and len(held_out) == 2 and pictures.fingerprint == saved["fingerprint"]


def test_killed_process_and_signals(tmp_path):
    data = tiny_data(tmp_path)
    command = ["train.py", "--data", data, "--size", 8, "--width", 2, "--levels", 1, "--channels", 1,
               "--batch", 8, "--epochs", 150, "--device", "cpu"]
    runs = {name: script(*command, "--out", tmp_path / f"{name}.pt", "--save-every", 0.3)
            for name in ("whole", "killed", "stopped")}

    def wait_for_saves(name, lines):
        log, end = tmp_path / f"{name}.jsonl", time.time() + 40
        while not log.exists() or log.read_text().count("\n") < lines:
            assert time.time() < end and runs[name].poll() is None
            time.sleep(0.005)

    wait_for_saves("killed", 2)
    runs["killed"].kill()
    wait_for_saves("stopped", 1)
    runs["stopped"].send_signal(signal.SIGTERM)
    code, out, _ = finish(runs["stopped"])
    assert code == 128 + signal.SIGTERM and "--resume" in out
    finish(runs["killed"])
    assert finish(runs["whole"])[0] == 0
    end = load_checkpoint(tmp_path / "whole.pt")[1]["step"]
    for name in "killed", "stopped":
        assert 0 < load_checkpoint(tmp_path / f"{name}.pt")[1]["step"] < end
        runs[name] = script("train.py", "--out", tmp_path / f"{name}.pt", "--resume", "--device", "cpu")
    for name in "killed", "stopped":
        assert finish(runs[name])[0] == 0
        assert same(weights(tmp_path / "whole.pt"), weights(tmp_path / f"{name}.pt"))
    with Image.open(tmp_path / "whole.png") as sheet:
        assert sheet.width > 500 and np.ptp(np.asarray(sheet)) == 255
    lines = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == end and all(np.isfinite(line["loss"]) for line in lines)


def test_torchrun_gives_the_same_weights(tmp_path):
    data = tiny_data(tmp_path)
    flags = ["--data", data, "--size", 8, "--width", 2, "--levels", 1, "--channels", 1, "--batch", 7,
             "--epochs", 2, "--device", "cpu", "--out"]
    one = script("train.py", *flags, tmp_path / "one.pt")
    two = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", "train.py",
                 *flags, tmp_path / "two.pt")
    for process in one, two:
        code, _, err = finish(process)
        assert code == 0, err
    a, b = weights(tmp_path / "one.pt"), weights(tmp_path / "two.pt")
    assert max(gap(a[k], b[k]) for k in a) < 1e-5


def test_minutes_and_lengthening(tmp_path):
    flags = {**FLAGS, "data": tiny_data(tmp_path), "minutes": 0.02}
    start = time.time()
    assert train.train(flags, str(tmp_path / "a.pt"))
    assert time.time() - start < 10
    saved = load_checkpoint(tmp_path / "a.pt")[1]
    assert saved["elapsed"] >= 1.2 and saved["training"]["lr"] == pytest.approx(1e-3 / 512)
    longer = train.resolve({**dict.fromkeys({**train.COMMON, **train.PAPER}), "minutes": 0.04}, saved, "a.pt")
    assert train.train(longer, str(tmp_path / "a.pt"), resume=saved)
    assert load_checkpoint(tmp_path / "a.pt")[1]["step"] > saved["step"]


def test_defaults_are_the_papers():
    given = dict.fromkeys({**train.COMMON, **train.PAPER})
    flags = train.resolve({**given, "data": "x"})
    assert [flags[k] for k in ("size", "width", "levels", "batch", "epochs", "minutes", "sigma_max")] == [
        64, 64, 3, 1024, 1000, None, 1]
    assert train.resolve({**given, "data": "x", "minutes": 5.0})["epochs"] is None
    builtin = train.resolve(given)
    assert [builtin[k] for k in ("size", "width", "levels", "batch", "minutes")] == [32, 16, 2, 32, 10]
    assert train.resolve({**given, "data": "disc"})["channels"] == 1
    assert [train.resolve({**given, "size": s})["levels"] for s in (16, 40, 80, 160)] == [1, 2, 3, 4]


def test_one_line_errors(tmp_path):
    data, out = tiny_data(tmp_path), tmp_path / "out.pt"
    empty, bad = tmp_path / "empty", tmp_path / "bad"
    empty.mkdir()
    bad.mkdir()
    (bad / "x.png").write_text("no picture")
    np.save(tmp_path / "float.npy", np.zeros((4, 8, 8)))
    np.save(tmp_path / "single.npy", np.zeros((4, 8, 8), np.uint8))
    np.savez(tmp_path / "none.npz", a=np.zeros(3))
    (tmp_path / "cut.npy").write_bytes(Path(data).read_bytes()[:50])
    small_run = {**FLAGS, "data": data, "epochs": 1.0}
    train.train(small_run, str(tmp_path / "done.pt"))
    broken = load_checkpoint(tmp_path / "done.pt")[1]
    broken["weights"]["blocks.M.0.weight"][:] = float("inf")
    torch.save(broken, tmp_path / "broken.pt")
    before = (tmp_path / "broken.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))    # stands for a full disk
    done = (tmp_path / "done.pt").read_bytes()
    tiny = ["--data", data, "--size", 8, "--width", 2]
    cases = {
        "no such file": ["--data", tmp_path / "nowhere", "--out", out],
        "looked for a folder": ["--data", empty, "--out", out],
        "none of its 1 picture files": ["--data", bad, "--size", 8, "--out", out],
        "must be uint8": ["--data", tmp_path / "float.npy", "--size", 8, "--out", out],
        "only one distinct": ["--data", tmp_path / "single.npy", "--size", 8, "--out", out],
        "holds no uint8 array": ["--data", tmp_path / "none.npz", "--size", 8, "--out", out],
        "not a whole .npy": ["--data", tmp_path / "cut.npy", "--size", 8, "--out", out],
        "multiple of 4": [*tiny, "--size", 30, "--out", out],
        "unrecognized arguments: --widht": [*tiny, "--widht", 3, "--out", out],
        "--batch: 0": [*tiny, "--batch", 0, "--out", out],
        "invalid choice": [*tiny, "--channels", 2, "--out", out],
        "positive number": ["--data", "calpha:-1", "--out", out],
        "--resume goes on with it": [*tiny, "--out", tmp_path / "done.pt"],
        "--width 3 contradicts": ["--width", 3, "--resume", "--out", tmp_path / "done.pt"],
        "not the pictures": ["--resume", "--out", tmp_path / "moved.pt"],
        "cannot be read": ["--resume", "--out", tmp_path / "missing.pt"],
        "no such folder": [*tiny, "--out", tmp_path / "no" / "where.pt"],
        "not available": [*tiny, "--device", "cuda:99", "--out", out],
        "not finite at step": ["--resume", "--epochs", 2, "--out", tmp_path / "broken.pt", "--device", "cpu"],
        "last save is intact": ["--resume", "--epochs", 2, "--out", tmp_path / "done.pt", "--device", "cpu"],
    }
    moved = copy.deepcopy(load_checkpoint(tmp_path / "done.pt")[1])
    moved["fingerprint"] = "0"
    torch.save(moved, tmp_path / "moved.pt")
    # one process for all: importing torch takes longer than any of them; the full disk has one of its own
    (tmp_path / "cases.json").write_text(json.dumps([list(map(str, c)) for c in list(cases.values())[:-1]]))
    many = script("-c", "import contextlib, io, json, runpy, sys\n"
                  f"for case in json.load(open({str(tmp_path / 'cases.json')!r})):\n"
                  "    sys.argv, err = ['train.py', *case], io.StringIO()\n"
                  "    try:\n"
                  "        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):\n"
                  "            runpy.run_path('train.py', run_name='__main__')\n"
                  "    except SystemExit as stop:\n"
                  "        print(json.dumps([stop.code, err.getvalue()]))\n")
    disk = script("train.py", *cases["last save is intact"], preexec_fn=limit)
    code, out_text, err = finish(many)
    assert code == 0, err
    results = [json.loads(line) for line in out_text.splitlines()]
    code, _, err = finish(disk)
    results.append([code, err])
    assert len(results) == len(cases)
    for words, (code, err) in zip(cases, results):
        assert code == 2 and words in err and err.count("\n") == 1, (words, code, err)
    assert not out.exists()
    assert (tmp_path / "broken.pt").read_bytes() == before and (tmp_path / "done.pt").read_bytes() == done


def test_help_and_bench(capsys):
    process = script("train.py", "--help")
    train.bench({**FLAGS, "width": 2, "levels": 1, "batch": 4}, None, "cpu", seconds=0.3)
    bench = capsys.readouterr().out
    assert all(float(n) > 0 for n in re.findall(r"([\d.]+) images/s", bench)) and bench.count("images/s") == 4
    code, text, _ = finish(process)
    assert code == 0 and all(words in text for words in ("--minutes", "--resume", "python train.py --data"))


# kmeans.py

def plain_lloyd(x, c, iterations):
    """Every distance, in float64; yields (labels, centres, inertia) after each step."""
    x, c = x.astype(np.float64), c.astype(np.float64)
    for _ in range(iterations):
        labels = ((x[:, None] - c) ** 2).sum(2).argmin(1)
        c = np.stack([x[labels == k].mean(0) if (labels == k).any() else c[k] for k in range(len(c))])
        d2 = ((x[:, None] - c) ** 2).sum(2)
        yield d2.argmin(1), c, d2.min(1).sum()


def blobs(n=600, d=20, K=12, seed=0):
    """Clustered points (n, d), cut off at 0 as φ is."""
    r = np.random.default_rng(seed)
    return np.maximum(r.normal(size=(K, d))[r.integers(K, size=n)] + 0.5 * r.normal(size=(n, d)), 0)


def test_kmeans_all_partitions():
    for seed in range(5):
        x, best = np.random.default_rng(seed).normal(size=(8, 2)), math.inf
        for labels in itertools.product(range(3), repeat=8):
            labels = np.array(labels)
            best = min(best, sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in set(labels)))
        model = KMeans(3, n_init=50, tol=0, seed=seed).fit(x)
        assert abs(model.inertia_ - best) < 1e-9


def test_kmeans_is_plain_lloyd_step_by_step():
    for K, d in ((40, 20), (7, 3)):            # several groups of centres; a single one
        x = blobs(d=d)
        init, before = x[np.random.default_rng(1).permutation(len(x))[:K]], math.inf
        for steps, (labels, centers, inertia) in enumerate(plain_lloyd(x, init, 15), 1):
            for size in (1, 2 ** 14, 2 ** 25):
                if size > 1 or steps == 3:
                    model = KMeans(K, init, max_iter=steps, tol=0, chunk_bytes=size).fit(x)
                    assert (model.labels_ == labels).all() and model.n_iter_ <= steps
                    assert abs(model.cluster_centers_ - centers).max() < 1e-12
                    assert abs(model.inertia_ - inertia) < 1e-9 * inertia
            assert inertia <= before + 1e-9
            before = inertia
    assert (model.predict(x) == model.labels_).all()


def test_kmeans_corners():
    x = np.random.default_rng(0).normal(size=(60, 5))
    x[:, 2] = 4                                # a constant column
    one, every = KMeans(1).fit(x), KMeans(60, n_init=1).fit(x)
    assert abs(one.cluster_centers_ - x.mean(0)).max() < 1e-12 and one.inertia_ == pytest.approx(
        ((x - x.mean(0)) ** 2).sum(), rel=1e-12)
    assert every.inertia_ < 1e-20 and sorted(every.labels_) == list(range(60))
    far = np.concatenate([x[:2], x[:1] + 1e3, x[:1] + 2e3, x[:1] + 3e3])       # three empty clusters at first
    model = KMeans(5, far, tol=0).fit(x)
    assert set(model.labels_) == set(range(5))
    assert (((x[:, None] - model.cluster_centers_) ** 2).sum(2).argmin(1) == model.labels_).all()
    assert model.inertia_ == pytest.approx(((x - model.cluster_centers_[model.labels_]) ** 2).sum(), rel=1e-9)
    two = np.repeat([[0.0, 1], [3, 4]], 10, 0)
    with pytest.warns(UserWarning, match="2 clusters have points, 4 were asked for"):
        assert KMeans(4).fit(two).inertia_ == 0
    half = KMeans(3).fit(torch.from_numpy(x).half())
    assert torch.is_tensor(half.labels_) and half.cluster_centers_.dtype == torch.float32
    exact = KMeans(3).fit(x)
    assert abs(half.inertia_ / exact.inertia_ - 1) < 1e-2
    integers = np.random.default_rng(0).integers(0, 9, (50, 4))
    assert KMeans(4).fit(integers).inertia_ == KMeans(4).fit(integers.astype(np.float64)).inertia_
    a, b = (KMeans(6, seed=3, chunk_bytes=size).fit(x) for size in (1, 2 ** 25))
    assert (a.labels_ == b.labels_).all() and abs(a.inertia_ - b.inertia_) < 1e-12 * a.inertia_
    assert (KMeans(6, seed=3).fit(x).labels_ == b.labels_).all()
    seeds = seed_centers(torch.from_numpy(x), torch.from_numpy((x * x).sum(1)), 10, 4, 0, 2 ** 20)
    assert seeds.shape == (4, 10, 5) and all(len(s.unique(dim=0)) == 10 for s in seeds)


@pytest.mark.parametrize("call, message", [
    (lambda x: KMeans(2).fit(np.where(np.arange(20)[:, None] == 7, np.nan, x)), "NaN or infinite.*row 7"),
    (lambda x: KMeans(21).fit(x), "20 points cannot make 21 clusters"),
    (lambda x: KMeans(2).fit(x[0]), r"shape \(3,\)"), (lambda x: KMeans(0), "n_clusters is 0"),
    (lambda x: KMeans(2).predict(x), "predict before fit"), (lambda x: KMeans(2, init="best"), "k-means"),
    (lambda x: KMeans(2, init=x[:3]).fit(x), r"init has shape \(3, 3\); it must be \(2, 3\)"),
    (lambda x: KMeans(2).fit(x).predict(x[:, :2]), "2 columns, the centres have 3"),
    (lambda x: KMeans(2).fit(x * np.float64(1e200)), "row 0 is so large")])
def test_kmeans_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(20, 3)))


def test_purity_and_mutual_information():
    clusters, classes = np.array([0, 0, 0, 1, 1, 1]), np.array(list("aabbbb"))
    assert purity(clusters, classes) == 5 / 6
    # H(clusters) = log 2; H(classes) = log 3 − 2/3 log 2; joint cells 2/6, 1/6, 3/6
    h, g = math.log(2), math.log(3) - 2 / 3 * math.log(2)
    joint = math.log(3) / 3 + math.log(6) / 6 + math.log(2) / 2
    assert abs(normalised_mutual_information(clusters, classes) - 2 * (h + g - joint) / (h + g)) < 1e-12
    assert normalised_mutual_information(clusters, clusters * 5) == pytest.approx(1, abs=1e-12)


def test_kmeans_command_line(tmp_path):
    x = blobs(90, 6, 3).astype(np.float32)
    paths = np.array([f"{i}.png" for i in range(90)])
    np.savez(tmp_path / "phi.npz", phi=x, paths=paths, labels=np.arange(90) % 3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "other.npz", a=x)

    def kmeans(*words):
        run = script("kmeans.py", *words, "--out", tmp_path / "clusters.npz")
        out, err = run.communicate()
        return run.returncode, out, err

    code, out, _ = kmeans(tmp_path / "phi.npz", "--clusters", 3)
    assert code == 0 and "purity" in out and "inertia" in out
    with np.load(tmp_path / "clusters.npz") as saved:
        assert saved["centers"].shape == (3, 6) and saved["labels"].shape == (90,)
        assert saved["paths"][7] == "7.png"
    for words, message in (([tmp_path / "x.npy"], "exists; --force"),
                           ([tmp_path / "other.npz", "--force"], "no array"),
                           ([tmp_path / "none.npz", "--force"], "none.npz"),
                           (["--clustres", 3], "unrecognized")):
        code, _, err = kmeans(*words)
        assert code == 2 and message in err and err.count("\n") == 1


# sample.py

class GaussianModel:
    """The exact denoiser of N(m, λ), x̂ = m + λ/(λ + σ²)(y − m). σ: set from outside, or by variance of y."""
    lam, m, sigma = 0.04, 0.3, 1.0

    def denoise(self, y):
        measured = ((y - self.m) ** 2).mean((1, 2, 3), keepdim=True)
        v = measured if self.sigma is None else self.lam + self.sigma ** 2
        return self.m + torch.as_tensor(self.lam / v).clamp(max=1) * (y - self.m)

    def score(self, y):
        return self.denoise(y) - y

    def encode(self, y):
        return y, []


def generators(n, seed=0):
    """One generator a sample."""
    return [train.seeded("cpu", seed, i) for i in range(n)]


def test_algorithm_1_moments():
    model, sigmas = GaussianModel(), np.linspace(1, 0.03, 12).tolist()

    def target(sigma):                         # also how the model learns σ; tol switches matching off
        model.sigma = sigma
        return torch.zeros(1, 3)
    x = sample.reconstruct(model, target, torch.full((3,), 0.3), sigmas, (3, 32, 32), generators(40), tol=1e9)
    v = sigmas[0] ** 2
    for sigma, following in zip(sigmas, [*sigmas[1:], 0]):
        v = (model.lam / (model.lam + sigma ** 2)) ** 2 * v + following ** 2
    assert abs(x.mean() - 0.3) < 5 * (v / x.numel()) ** 0.5 and 0.3 < v / model.lam < 0.98
    assert abs(x.var() / v - 1) < 5 * (2 / x.numel()) ** 0.5


def test_unconditional_moments():
    model = GaussianModel()
    model.sigma, ended, levels = None, 0.02, []
    report = lambda t, sigma, y, state: levels.append((t, y.clone()))
    x, steps = sample.sample_unconditional(model, torch.full((3,), 0.3), (3, 64, 64), generators(8), 1.0,
                                           ended, report=report)
    # v = λ + σ² obeys, with σ̂² = σ⁴/v the mean square of s: v ← (1 − h σ²/v)² v + γ²
    v, y_var = 1.0, {t: ((y - 0.3) ** 2).mean().item() for t, y in levels}
    assert len(y_var) > 30
    for t in sorted(y_var):
        assert abs(y_var[t] / v - 1) < 0.05 or v < 1.5 * model.lam
        sigma2, h = v - model.lam, 0.01 * t / (1 + 0.01 * (t - 1))
        v = (1 - h * sigma2 / v) ** 2 * v + ((1 - 0.05 * h) ** 2 - (1 - h) ** 2) * sigma2 ** 2 / v
    assert (steps < 2000).all() and abs(x.var() / model.lam - 1) < 0.1 and abs(x.mean() - 0.3) < 0.01


def test_guidance_step(small):
    x, model = normal(5, 3, 16, 16).double(), copy.deepcopy(small).double().train()
    phi_c = model.encode(normal(1, 3, 16, 16, seed=1).double())[0].mean((2, 3)).detach()
    loss = lambda x: (model.encode(x)[0].mean((2, 3)) - phi_c).square().sum(1)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    moved, state = sample.guidance_step(model, x, phi_c, tol=0, max_iters=1, memory=0)
    for i in range(2):                         # the step is L/‖∇L‖² ∇L: against central differences
        step, L = (moved - x)[i], loss(x[i:i + 1]).item()
        gradient = torch.zeros_like(step)
        for where in [(0, 3, 5), (1, 8, 8), (2, 15, 0), (0, 0, 0)]:
            e = torch.zeros_like(x[:1])
            e[(0, *where)] = 1e-5
            gradient[where] = (loss(x[i:i + 1] + e) - loss(x[i:i + 1] - e)).item() / 2e-5
            # step = −L g/‖g‖², so ‖step‖² = L²/‖g‖² and g = −step · L/‖step‖²
            assert abs(gradient[where] + step[where] * L / step.square().sum()) < 1e-6 * max(1, L)
    moved, state = sample.guidance_step(model, x, phi_c, tol=0.3, max_iters=300)
    assert state["converged"].all() and torch.equal(state["first"], loss(x))
    assert gap(state["last"], loss(moved)) < 1e-12 and (state["last"] <= 0.3 * state["first"]).all()
    assert len(set(state["gradients"].tolist())) > 1
    for i in range(5):                         # each as if it were alone, and not one gradient more
        alone, s = sample.guidance_step(model, x[i:i + 1], phi_c, tol=0.3, max_iters=300)
        assert gap(alone, moved[i:i + 1]) < 1e-9 and s["gradients"][0] == state["gradients"][i]
        n = int(s["gradients"][0])
        assert not sample.guidance_step(model, x[i:i + 1], phi_c, 0.3, n - 1)[1]["converged"].item()
    assert model.training and before == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(FloatingPointError, match="σ = 0.5"):
        sample.reconstruct(small, lambda sigma: torch.full((1, 16), math.nan), torch.zeros(3), [0.5, 0.1],
                           (3, 16, 16), generators(1))


def test_samples_do_not_depend_on_how_many(small):
    phi_c = phi(small, normal(1, 3, 16, 16), 0.1)
    target = lambda sigma: phi_c
    draw = lambda n: sample.reconstruct(small, target, torch.full((3,), 0.5), [0.5, 0.3, 0.1], (3, 16, 16),
                                        generators(n), 0.5, 20)
    assert gap(draw(3)[:2], draw(2)) < 1e-4 and gap(draw(2)[0], draw(2)[1]) > 1e-2
    free = lambda n: sample.sample_unconditional(small, torch.full((3,), 0.5), (3, 16, 16), generators(n),
                                                 max_steps=5)[0]
    assert gap(free(3)[:2], free(2)) < 1e-4


def test_conditional_distance():
    """u given v ~ N(v, λ) and φ = mean of v: the symmetrised KL between v₁ and v₂ is ‖v₁ − v₂‖²/λ."""
    class Model:
        def encode(self, y):
            return y[:, 1:], []

        def denoise(self, y):
            u, v = y[:, :1], y[:, 1:].mean((2, 3), keepdim=True)
            return torch.cat([(lam * u + self.sigma ** 2 * v) / (lam + self.sigma ** 2), 0 * u], 1)
    lam, sigmas, model = 0.09, np.geomspace(0.02, 5, 40), Model()
    x1, x2, values = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16), []
    x2[1] = 0.7
    for model.sigma in sigmas.tolist():        # the model must be told σ: one level at a time
        values.append(sample.conditional_distance(model, x1, x2, [model.sigma, 1.01 * model.sigma], 3, 20,
                                                  torch.Generator().manual_seed(0), 1e-10)[2][0].item())
    exact = 2 * 256 * 0.49 * sigmas / (lam + sigmas ** 2) ** 2
    assert max(abs(np.array(values) / exact - 1)[sigmas < 0.5]) < 0.1
    assert abs(np.trapezoid(values, sigmas) * lam / (256 * 0.49) - 1) < 0.05
    model.sigma = 0.5                          # the trapezoid rule and the standard error, by hand
    value, error, integrand, matched = sample.conditional_distance(model, x1, x2, [0.5, 0.6, 0.8], 3, 2)
    assert abs(value - (integrand[0] * 0.05 + integrand[1] * 0.15 + integrand[2] * 0.1).item()) < 1e-9 * value
    assert 0 < error < value and matched.tolist() == [1, 1, 1]


def test_panel_geometry():
    samples, target = torch.zeros(8, 3, 8, 8), torch.ones(1, 3, 8, 8)
    samples[:, 0] = torch.linspace(0, 1, 8).view(8, 1, 1)
    sheet = np.asarray(sample.panel(samples, target, side=32, gap=4))
    assert sheet.shape == (112, 112, 3)
    assert (sheet[40:72, 40:72] == 255).all() and (sheet[37, 37:75] == [213, 94, 0]).all()
    assert [sheet[4 + 36 * (i // 3), 4 + 36 * (i % 3), 0] for i in (0, 1, 2, 3, 5, 6, 7, 8)] == [
        round(255 * k / 7) for k in range(8)]
    assert sample.panel(samples[:5], None, 32).size == (3 * 36 + 4, 2 * 36 + 4)
    assert sample.panel(samples[[0] * 9], target, 32).size == (5 * 36 + 4,) * 2


def test_sample_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for i, x in enumerate(np.random.default_rng(0).integers(0, 256, (20, 9, 8, 3), np.uint8)):
        Image.fromarray(x).save(tmp_path / "data" / f"{i}.png")
    run = script("train.py", "--data", tmp_path / "data", "--size", 8, "--width", 2, "--levels", 1,
                 "--batch", 8, "--epochs", 2, "--device", "cpu", "--out", tmp_path / "c.pt")
    assert finish(run)[0] == 0
    picture = tmp_path / "data" / "0.png"
    odd = np.random.default_rng(0).integers(0, 255, (37, 23, 3), np.uint8)
    Image.fromarray(odd).save(tmp_path / "odd.png")
    np.savez(tmp_path / "clusters.npz", labels=np.array([0, 1]), paths=np.array([str(picture)] * 2))
    (tmp_path / "text.png").write_text("no picture")

    def run_sample(*words, out="s.png"):
        words = [tmp_path / "c.pt", *words, "--device", "cpu", "--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        return sample.main()

    few = ["--steps", 3, "--samples", 2, "--match-iters", 3, "--draws", 2]
    assert run_sample(picture, *few, "--save-each", tmp_path / "each", "--save-trajectory") == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert len(record["levels"]) == 3 and len(record["panels"][0]["phi_distance_relative"]) == 2
    assert {"first", "last", "gradients", "sigma_before", "sigma_after",
            "not_converged"} <= set(record["levels"][0])
    assert len(list((tmp_path / "each").iterdir())) == 2 and (tmp_path / "s-trajectory.png").exists()
    first = (tmp_path / "s.png").read_bytes()
    assert run_sample(picture, *few, "--force") == 0 and (tmp_path / "s.png").read_bytes() == first
    for k, words in enumerate((["--average", picture, tmp_path / "odd.png"], ["--mix", picture, picture],
                               ["--cluster", f"{tmp_path}/clusters.npz:1"])):
        assert run_sample(*words, *few, out=f"{k}.png") == 0
    monkeypatch.setattr(sample, "sample_unconditional",
                        lambda *a, f=sample.sample_unconditional, **k: f(*a, **k, max_steps=3))
    assert run_sample("--unconditional", 3, out="u.png") == 0
    assert run_sample(picture, "--adaptive", *few, out="a.png") == 0
    assert run_sample("--denoise", tmp_path / "odd.png", "--noise", 0.1, out="d.png") == 0
    assert Image.open(tmp_path / "d.png").size == (3 * 23 + 24, 37)
    (tmp_path / "bad.pt").write_bytes(b"x")
    for words, message in (([picture], "exists: --force"), ([tmp_path / "text.png", "--force"], "text.png"),
                           ([picture, "--force", "--sigma-min", 2], "must be below"),
                           (["--cluster", "none.npz:3", "--force"], "none.npz"),
                           (["--cluster", f"{tmp_path}/clusters.npz:9", "--force"], "no such cluster")):
        with pytest.raises(UserError, match=message):
            run_sample(*words)
    for words in ([], [picture, "--unconditional", 3], ["--unconditional", 3, "--adaptive"],
                  [picture, "--noise", 0.1], [picture, "--stpes", 3]):
        with pytest.raises(SystemExit) as end:
            run_sample(*words)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    code, _, err = finish(script("sample.py", tmp_path / "bad.pt", picture, "--out", tmp_path / "b.png"))
    assert code == 2 and "bad.pt" in err and err.count("\n") == 1


# analyze.py

def study_of(model=None, x=None, n=8, **options):
    """A Study of n black 8×8 pictures, or of x."""
    x = np.zeros((n, 8, 8, 1), np.uint8) if x is None else x
    checkpoint = dict(size=8, sigma_max=1.0, mean=[0.5], model=dict(width=2, channels=1, levels=1),
                      flags=dict(init="plain"))
    return analyze.Study(model, checkpoint, x, np.arange(len(x)), **options)


def test_measures_by_hand():
    v = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    assert gap(analyze.participation_ratio(v), [1 / 4, 1, 16 / 40]) < 1e-6
    assert analyze.participation_ratio(torch.zeros(3)).isnan()
    # 0 0 0 0 5: mean 1, second moment 4, third 12, fourth 52
    one = np.array([0.0, 0, 0, 0, 5])
    assert abs(analyze.kurtosis(torch.tensor(one)).item() - 52 / 16) < 1e-9
    assert abs(analyze.bimodality(one) - (12 ** 2 / 4 ** 3 + 1) / (52 / 16)) < 1e-9
    assert abs(analyze.bimodality(np.array([0.0, 1, 0, 1])) - 1) < 1e-9
    assert abs(analyze.bimodality(np.linspace(0, 1, 10_001)) - 5 / 9) < 1e-3
    assert analyze.otsu(np.array([0.9, 0.1, 0.2, 0.8])) == 0.5
    assert analyze.ranks(np.array([5, 1, 5, 7])).tolist() == [2.5, 1, 2.5, 4]
    assert abs(analyze.rank_correlation(np.array([1.0, 2, 3, 4]), np.array([1, 10, 5, 100.0])) - 0.8) < 1e-9
    assert abs(analyze.adjusted_rand_index([0, 0, 1, 2], [5, 5, 3, 3]) - 4 / 7) < 1e-9
    assert analyze.adjusted_rand_index([0, 1, 1], [7, 2, 2]) == 1
    assert analyze.mean_se([1, 2, 3]) == (2, 1 / math.sqrt(3))


def test_separation_of_two_gaussians():
    shift, scale = torch.tensor([3.0, 4, 0]), torch.tensor([1.0, 2, 9])
    a, b = normal(200_000, 3), normal(200_000, 3, seed=1) * scale + shift
    distance, sd = analyze.separation(a, b)
    line = shift / 5                           # variances along it: 1 and 0.6²·1 + 0.8²·4
    assert abs(distance - 5) < 0.03 and abs(sd - math.sqrt((1 + (line * scale).square().sum()) / 2)) < 0.01
    with pytest.raises(analyze.Skip):
        analyze.pair_separations(a[:6], np.array([0, 0, 0, 0, 0, 1]), np.random.default_rng(0))


def test_classes_too_small_to_compare_leave_the_clusters(tmp_path):
    n = 60
    study = study_of(n=n, labels=np.arange(n) // 2, clusters=2)
    study.phi = {0.3: normal(n, 4).abs()}
    out = analyze.clusters(study, tmp_path)
    assert set(out["separation"]) == {"clusters", "Gaussian control"}
    assert 0 <= out["from_classes"]["stayed"] <= 1


def test_gaussian_control_has_the_same_moments():
    code = normal(20_000, 3) @ normal(3, 3, seed=1).exp() + 2
    twin = analyze.gaussian_like(code, 0)
    assert gap(twin.mean(0), code.mean(0)) < 0.05 * code.std()
    assert gap(torch.cov(twin.T), torch.cov(code.T)) < 0.05 * code.var()


def test_tsne():
    x = torch.cat([normal(20, 5, seed=k) + 20 * k for k in range(3)])
    y = analyze.tsne(x, iterations=400)
    distance = torch.cdist(y, y).view(3, 20, 3, 20)
    within = max(distance[k, :, k].max() for k in range(3))
    between = min(distance[k, :, j].min() for k in range(3) for j in range(3) if j != k)
    assert between > within
    turn = torch.linalg.qr(normal(5, 5, seed=9).double())[0]
    turned = analyze.tsne(x.double() @ turn, iterations=20)            # later, rounding errors grow
    assert gap(turned, analyze.tsne(x, iterations=20)) < 1e-3 * turned.abs().max()


def test_sparsity_of_a_hand_set_network(tmp_path):
    model = UNet(width=2, channels=1, levels=2)
    for p in model.parameters():
        nn.init.zeros_(p)                      # every layer then puts out ReLU(its bias), whatever goes in
    model.blocks["E1"][-2].bias.data = torch.tensor([1.0, 0])
    model.blocks["E2"][-2].bias.data = torch.tensor([1.0, 1, 1, 1])
    model.blocks["M"][-2].bias.data = torch.tensor([0, 0, 7.0, 0, 0, 0, 0, 0])
    model.up["D2"].bias.data = torch.tensor([2.0, 2, 2, 2])
    model.blocks["D2"][-2].bias.data = torch.tensor([3.0, 1, 0, 0])
    study = study_of(model, draws=2)
    study.phi = {0.3: torch.tensor([[0, 0, 7.0, 0, 0, 0, 0, 0]] * 8)}
    out = analyze.sparsity(study, tmp_path)
    for block, before, after in (("E2", 1 / 2, 1), ("M", 1, 1 / 8), ("D2", 12 ** 2 / 8 / 20, 16 / 40)):
        assert gap(out["pr_input"][block], [before] * 8) < 1e-6
        assert gap(out["pr_output"][block], [after] * 8) < 1e-6
        assert gap(out["change"][block][0], after - before) < 1e-6
    assert gap(out["phi_pr_mean"], 1 / 8) < 1e-6


def test_stability_in_closed_form(tmp_path):
    class Model:                               # of black pictures, mean(y²) is σ²: ā_M is (1, σ²)
        blocks, width, levels = ("E1", "M", "D1"), 1, 1

        def activations(self, y):
            power = y.square().mean((1, 2, 3))
            return {"E1": (1 + power[:, None],) * 2, "D1": (power[:, None],) * 2,
                    "M": (torch.stack([power, power], 1), torch.stack([torch.ones_like(power), power], 1))}
    out = analyze.stability(study_of(Model(), np.zeros((4, 32, 32, 1), np.uint8), draws=60), tmp_path)
    cosine = [(1 + 0.25 * s * s) / math.sqrt(1.0625 * (1 + s ** 4)) for s in out["sigma_2"]]
    assert max(abs(out["mean"]["M"] - cosine)) < 0.005 and gap(out["mean"]["E1"], [1] * 13) < 1e-6
    assert 0 in out["sigma_2"] and 3 in out["sigma_2"] and out["next_best"] == "E1"


def test_selectivity_of_a_hand_made_phi(tmp_path):
    n = 20
    code = torch.zeros(n, 5)
    code[3, 0], code[[4, 5], 1] = 9, torch.tensor([1.0, 2])        # PR 1/20, 9/(20·5); channel 2 is silent
    code[:, 3], code[:, 4] = 1, 2 - torch.arange(n) / 100
    study = study_of(x=np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), np.uint8))
    study.phi = {0.3: code}
    out = analyze.selectivity(study, tmp_path)
    assert gap(out["pr"][[0, 1, 3]], [1 / 20, 9 / 100, 1]) < 1e-6
    assert out["silent"] == 1 and out["specialised"] == 2 and out["common"] == 2
    assert out["shown"][:2] == [0, 1] and set(out["shown"][2:]) == {3, 4}
    assert out["top"][1][:2].tolist() == [5, 4] and out["top"][4].tolist() == list(range(9))
    report = analyze.judge(dict(selectivity=out))
    assert [row["verdict"] for row in report] == ["holds"]             # two groups, far apart
    kept = analyze.judge({}, report)           # --only keeps the verdicts of earlier calls
    assert kept == report


def test_nearest_and_pca():
    code = torch.tensor([[1.0, 0], [10, 1], [0, 1], [1, 5]])
    assert analyze.nearest(code, [0, 2], 2).tolist() == [[1, 3], [3, 1]]       # by angle, not by length
    for shape in (40, 6), (6, 40):             # both Gram matrices, against the singular value decomposition
        v = normal(*shape)
        u, s, _ = torch.linalg.svd(v - v.mean(0), full_matrices=False)
        assert gap(analyze.principal_components(v, 3).abs(), (u * s)[:, :3].abs()) < 1e-4


def test_streamed_phi_and_map_statistics():
    torch.manual_seed(0)
    model = UNet(width=2, channels=1, levels=1)
    x = np.random.default_rng(0).integers(0, 256, (analyze.BATCH + 6, 8, 8, 1), np.uint8)
    study = study_of(model, x, draws=3)
    code = analyze.compute_phi(model, x, study.rows, [0.3, 0.0], 3, 0, "cpu")
    assert code.shape == (2, len(x), 4)
    for a in 0, analyze.BATCH:
        batch = train.to_batch(x[a:a + analyze.BATCH], "cpu")
        generator = train.seeded("cpu", 0, 5, 300_000, a)
        assert gap(code[0, a:a + analyze.BATCH], phi(model, batch, 0.3, 3, generator)) < 1e-6
        assert gap(code[1, a:a + analyze.BATCH], model.activations(batch)["M"][1].detach()) < 1e-6
    maps = []                                  # all of them at once, with the same noise
    for a in 0, analyze.BATCH:
        batch, generator = study.pictures(study.rows[a:a + analyze.BATCH]), study.generator(20, a)
        noisy = [batch + 0.3 * torch.randn(batch.shape, generator=generator) for _ in range(3)]
        maps.append(torch.stack([model.encode(y)[0].detach() for y in noisy]).mean(0))
    maps = torch.cat(maps).double().flatten(2)                                 # (n, d, hw)
    spatial, dimension = analyze.map_statistics(study, study.rows)
    for c in range(4):
        size, pr = maps[:, c].mean(1), analyze.participation_ratio(maps[:, c]).nan_to_num()
        eigenvalues = torch.linalg.eigvalsh(torch.cov(maps[:, c].T, correction=0))
        assert abs(spatial[c] - (size * pr).sum() / size.sum()) < 1e-9
        assert abs(dimension[c] - eigenvalues.sum() ** 2 / eigenvalues.square().sum()) < 1e-6


def test_gratings_frequency_and_orientation():
    bank = analyze.gratings(16, 3, [2, 3], [0, math.pi / 2], phases=2)
    assert bank.shape == (2, 2, 2, 3, 16, 16) and 0 <= bank.min() and bank.max() <= 1
    for f, cycles in enumerate((2, 3)):
        for orientation, place in enumerate(((0, cycles), (cycles, 0))):
            spectrum = torch.fft.fft2(bank[f, orientation, 0, 0] - 0.5).abs()[:9, :9]
            assert divmod(int(spectrum.argmax()), 9) == place


def test_phi_cache(tmp_path):
    path, calls, key = str(tmp_path / "phi.npz"), [], dict(checkpoint="a", sigmas=[0.3, 0.1])

    def cached(key):
        return analyze.cached_phi(path, key, ["p", "q"], np.array([0, -1]),
                                  lambda: calls.append(1) or normal(2, 2, 3, seed=len(calls)))
    first, again = cached(key), cached(key)
    assert len(calls) == 1 and all(gap(first[s], again[s]) == 0 for s in (0.3, 0.1))
    assert gap(cached({**key, "checkpoint": "b"})[0.3], first[0.3]) > 0 and len(calls) == 2
    with np.load(path) as file:                # what kmeans.py reads
        assert file["phi"].shape == (2, 3) and file["paths"].tolist() == ["p", "q"]
        assert file["labels"].tolist() == [0, -1] and file["sigma"].tolist() == [0.3, 0.1]
        assert file["checkpoint"] == "b"
    Path(path).write_bytes(b"mine")
    with pytest.raises(UserError, match="not written by analyze.py"):
        cached(key)
    assert Path(path).read_bytes() == b"mine"


def test_axes():
    assert analyze.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert analyze.ticks(0.05, 3, log=True) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    plot = analyze.Axes((400, 300), (0, 1), (0, 1), "x", "y")
    plot.line([0, 1], [0, 1], "#ff0000", "line")
    pixels = np.asarray(plot.image())
    red = np.argwhere((pixels == [255, 0, 0]).all(-1))
    red = red[red[:, 0] > 60]                  # not the legend
    assert len(red) > 200 and np.corrcoef(red.T)[0, 1] < -0.99         # from bottom left to top right


def finite_numbers(value):
    """All numbers of a nested structure are finite; a null must not be there."""
    if isinstance(value, dict):
        return all(finite_numbers(v) for v in value.values())
    if isinstance(value, list):
        return all(finite_numbers(v) for v in value)
    return isinstance(value, str) or value is not None and math.isfinite(value)


def test_analyze_command_line(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(150):                       # three classes of 50: noise of different contrast
        folder = tmp_path / "data" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.normal(128, 20 + 30 * (i % 3), (8, 8, 3)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    assert finish(script("train.py", "--data", tmp_path / "data", "--size", 8, "--width", 4, "--levels", 1,
                         "--val", 0.5, "--batch", 8, "--epochs", 3, "--device", "cpu", "--out",
                         tmp_path / "c.pt"))[0] == 0
    words = [tmp_path / "c.pt", "--draws", 2, "--device", "cpu", "--out"]
    run = script("analyze.py", *words, tmp_path / "f", "--steps", 3, "--pairs", 4, "--clusters", 4)
    pair = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "analyze.py", *words,
                  tmp_path / "two", "--only", "selectivity", "--data", tmp_path / "data")

    def here(*words):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words)])
        return analyze.main()
    code, out, err = finish(run)
    assert code == 0, err
    names = {path.stem for path in (tmp_path / "f").glob("*.png")}
    assert names == {*analyze.ANALYSES, "cluster-members", "scores", "unconditional"}
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "f" / f"{name}.png").convert("L"))
        assert pixels.std() > 5 and pixels.shape[1] > 700, name
    record = json.loads((tmp_path / "f" / "results.json").read_text())
    assert set(record["analyses"]) == set(analyze.ANALYSES) and set(record["seconds"]) > set(analyze.ANALYSES)
    assert not any("skipped" in numbers for numbers in record["analyses"].values())
    silent = np.array([v is None for v in record["analyses"]["selectivity"]["pr"]])
    assert silent.sum() == record["analyses"]["selectivity"].pop("silent") < len(silent) / 2
    for name in "pr", "kurtosis", "spatial_pr", "pca_dimension", "stability_centred":  # null if silent
        for analysis in record["analyses"]["channels"], record["analyses"]["selectivity"]:
            assert finite_numbers([v for v, s in zip(analysis.pop(name, []), silent) if not s])
    del record["settings"]                     # flags that were not given are null
    assert finite_numbers(record) and len(record["claims"]) == len(analyze.CLAIMS)
    assert all(row["verdict"] in ("holds", "fails", "not comparable") for row in record["claims"])
    assert "holds" in out and "results.json" in out

    code, _, err = finish(pair)                # two batches, one for each process
    assert code == 0, err
    model, checkpoint = load_checkpoint(tmp_path / "c.pt")
    x = train.checkpoint_pictures(checkpoint)[0].x
    alone = analyze.compute_phi(model, x, np.arange(150), [0.3], 2, 0, "cpu")
    with np.load(tmp_path / "two" / "phi.npz") as two:
        assert gap(two["phi"], alone[0]) < 1e-6 and len(set(two["labels"])) == 3

    # no classes, more clusters than pictures, no training pictures
    assert here(*words, tmp_path / "bare", "--data", tmp_path / "data/a", "--only", "neighbours", "clusters",
                "denoising", "--clusters", 60) == 0
    assert "50 pictures cannot make 60 clusters; give a smaller --clusters" in capsys.readouterr().out
    table = json.loads((tmp_path / "bare" / "results.json").read_text())["claims"]
    verdicts = {row["claim"]: row for row in table}
    assert verdicts["phi-neighbours agree in class more than pixel-neighbours"]["here"] == "no class labels"
    assert verdicts["training and held-out PSNR agree"]["verdict"] == "not comparable"
    for words, message in ((["missing.pt"], "missing.pt"),
                           ([tmp_path / "c.pt", "--data", "nowhere"], "nowhere"),
                           ([tmp_path / "c.pt", "--pictures", "no.png"], "no.png")):
        with pytest.raises(UserError, match=message):
            here(*words, "--device", "cpu", "--out", tmp_path / "e")
    code, _, err = finish(script("analyze.py", tmp_path / "none.pt"))
    assert code == 2 and "none.pt" in err and err.count("\n") == 1
