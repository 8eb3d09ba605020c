"""Tests: python -m pytest test_all.py (offline, CPU, no data needed).

In the order of the files; the first line of a test says what would be wrong if it failed. Oracles are
independent: closed forms, brute force, finite differences, or the same thing computed plainly.
"""
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import unet
from unet import UNet, UserError, load_checkpoint, phi, receptive_field
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import analyze
import kmeans
import sample
import train
from kmeans import KMeans

HERE = Path(__file__).parent
torch.set_num_threads(1)                       # as in `python` below: sums are rounded by their number


def gap(a, b):
    """Maximum absolute difference."""
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def normal(*shape, seed=0):
    """Standard normal numbers of this shape, from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def python(*words):
    """Run `python …` in the repository's folder: (exit code, standard error)."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


def array(seed, *shape):
    """Random uint8 of this shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, x):
    """Write x (H, W, C) or (H, W) as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """The folder in which all command lines run: 80 pictures of two classes, a checkpoint, and bad files."""
    at = tmp_path_factory.mktemp("shelf")
    for i in range(80):                        # class b: stronger contrast
        noise = np.random.default_rng(i).normal(128, 20 + 60 * (i % 2), (8, 8, 3))
        save(at / "data" / "ab"[i % 2] / f"{i:02d}.png", noise.clip(0, 255).astype(np.uint8))
    flags = dict(train.COMMON, data=str(at / "data"), size=8, width=4, levels=1, batch=8, val=0.4,
                 pictures=16)
    train.train(flags, str(at / "c.pt"))
    good = torch.load(at / "c.pt", weights_only=True)
    torch.manual_seed(1)
    w = good["weights"]
    (at / "sub").mkdir()
    for name, changes in {
            "b": dict(weights=UNet(4, 3, 1).state_dict(), flags={**flags, "seed": 1},
                      training={**good["training"], "pictures_seen": 99}), "sub/c": {},
            "low": dict(sigma_max=0.01, flags={**flags, "sigma_max": 0.01}), "moved": dict(fingerprint="0"),
            "nan": dict(weights={**w, "blocks.M.0.bias": w["blocks.M.0.bias"] * math.nan}),
            "huge": dict(weights={k: v * 1e30 for k, v in w.items()})}.items():
        torch.save({**good, **changes}, at / f"{name}.pt")
    torch.save({k: v for k, v in good.items() if k != "optimizer"}, at / "shipped.pt")
    (at / "cut.pt").write_bytes((at / "c.pt").read_bytes()[:3000])
    for name in "text.png", "exists.png", "exists.json", "foreign/stability.png", "there.npz":
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text("mine")
    for name, x in {"dark.png": np.full((16, 16, 3), 40, np.uint8), "odd.png": array(0, 37, 23, 3),
                    "light.png": np.full((16, 16, 3), 215, np.uint8), "gray.PNG": array(1, 8, 8),
                    "few/0.png": array(2, 8, 8), "few/1.png": array(3, 8, 8)}.items():
        save(at / name, x)
    Image.new("RGBA", (30, 20), (10, 200, 30, 128)).save(at / "alpha.png")
    (at / "half.png").write_bytes((at / "odd.png").read_bytes()[:200])
    x = array(0, 20, 8, 8, 3)
    for name, v in dict(float=x / 255, pickle=np.array([None]), words=np.array([["a"]]), single=x[[0] * 4],
                        tiny=array(0, 40, 8, 8), x=X, nan=X * np.nan).items():
        np.save(at / f"{name}.npy", v, allow_pickle=True)
    paths = np.array([str(at / "data" / "ab"[i % 2] / f"{i:02d}.png") for i in range(4)])
    for name, v in dict(labels=dict(data=x, labels=np.zeros((20, 2), int)), phi=dict(phi=X),
                        pickle=dict(phi=np.array([[None]])), good=dict(data=np.asfortranarray(x)),
                        k=dict(labels=np.array([0, 1, 1, 0]), paths=paths),
                        gone=dict(labels=np.array([0]), paths=np.array(["/no/such.png"]))).items():
        np.savez(at / f"{name}.npz", **v)
    crc, tiny = bytearray((at / "good.npz").read_bytes()), (at / "tiny.npy").read_bytes()
    crc[crc.index(b"data.npy") + 400] ^= 255
    (at / "crc.npz").write_bytes(crc)
    (at / "cut.npy").write_bytes(tiny[:-100])
    (at / "link.npz").symlink_to(at / "phi.npz")
    return at


@pytest.fixture
def cli(shelf, monkeypatch, capsys):
    """cli("train.py --size 8"): (exit code, what the user sees), in this process, in the folder `shelf`."""
    def call(line, folder=shelf):
        words, handlers = shlex.split(line), {n: signal.getsignal(n) for n in (1, 2, 15)}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            unet.run(globals()[words[0].removesuffix(".py")].main)
        for n, handler in handlers.items():    # train.py sets its own
            signal.signal(n, handler)
        out, err = capsys.readouterr()
        return end.value.code or 0, err if end.value.code == 2 else out
    return call


# unet.py

@pytest.mark.parametrize("levels, side", [(1, 18), (2, 40), (3, 84), (4, 172)])
def test_receptive_field_from_gradients(levels, side, monkeypatch):
    # the default number of levels leaves a part of the picture unseen
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, a: a)            # it mixes all places
    model, n = UNet(1, 1, levels).double(), 2 ** levels * (side // 2 ** levels + 3)
    for p in model.parameters():
        p.data.abs_()                          # no path is cut by a ReLU
    y = torch.rand(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    a = model.encode(y)[0]
    a[0, 0, a.shape[2] // 2, a.shape[3] // 2].backward()
    rows, columns = y.grad[0, 0].nonzero(as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side == receptive_field(levels)


def independent_forward(model, y):
    """The network of App. A.1 from its weights, with torch.layer_norm over (C, H, W): x̂, M's maps."""
    w = model.state_dict()

    def block(name, a, layers, skip_norm=None, bare=None):
        keys = iter(sorted({int(k.split(".")[2]) for k in w if k.startswith(f"blocks.{name}.")}))
        of = lambda k: (w[f"blocks.{name}.{k}.weight"], w[f"blocks.{name}.{k}.bias"])
        for i in range(layers):
            a = F.conv2d(F.pad(a, (1, 1, 1, 1)), *of(next(keys)))
            if i == bare:
                return a
            if i != skip_norm:
                scale, shift = (v.view(-1, 1, 1) for v in of(next(keys)))
                a = F.layer_norm(a, a.shape[1:]) * scale + shift
            a = a.clamp(min=0)
        return a

    def up(name, a):
        out = torch.einsum("nchw,cdij->ndhiwj", a, w[f"up.{name}.weight"])
        return out.reshape(len(a), -1, 2 * a.shape[2], 2 * a.shape[3]) + w[f"up.{name}.bias"].view(-1, 1, 1)
    half = lambda a: F.interpolate(a, scale_factor=0.5, mode="area")
    e1 = block("E1", y, 2, skip_norm=0)
    e2 = block("E2", half(e1), 2)
    m = block("M", half(e2), 3)
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
    # another network than that of A.1, or the score has another sign
    y = normal(3, 3, 16, 24)
    assert list(UNet().blocks) == ["E1", "E2", "E3", "M", "D3", "D2", "D1"]
    assert sum(p.numel() for p in UNet().parameters()) == 13_130_243           # A.1 prints ~13 m
    with torch.no_grad():
        x_hat, m = independent_forward(small, y)
        assert max(gap(small.denoise(y), x_hat), gap(small.score(y), x_hat - y)) < 1e-5
        assert gap(small.encode(y)[0], m) < 1e-5


def test_phi(small):
    # φ is of another layer, or its noise is not z·σ
    x, g = normal(3, 3, 16, 16), torch.Generator()
    code = phi(small, x, torch.tensor([0.1, 0.2, 0.3]), draws=5, generator=g.manual_seed(1))
    g.manual_seed(1)
    sigma, total = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1), 0
    for _ in range(5):
        y = x + sigma * torch.randn(3, 16, 16, 3, generator=g).permute(0, 3, 1, 2)
        total = total + independent_forward(small, y)[1].mean((2, 3)) / 5
    assert code.shape == (3, 16) and not code.requires_grad and gap(code, total) < 1e-5


@pytest.mark.parametrize("words, place, value", [
    ("no mean", "mean", None), ("size mismatch", "model width", 5), ("damaged", "model width", 10 ** 9),
    ("damaged", "model", [1, 2]), ("damaged", "weights", 7),
    ("not finite", "weights blocks.M.0.bias", torch.full((8,), math.nan)),
    ("Missing", "weights blocks.M.0.bias", None), ("Unexpected", "weights extra", torch.zeros(2)),
    ("another version", "format", "blind-denoiser-1"), ("not a checkpoint", "format", None)])
def test_damaged_checkpoints(tmp_path, shelf, words, place, value):
    # a file that train.py did not write gives a picture, a traceback, gigabytes, or a hang
    part = checkpoint = torch.load(shelf / "c.pt", weights_only=True)
    *outer, key = place.split()
    for name in outer:
        part = part[name]
    part.pop(key) if value is None else part.update({key: value})
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: .*{words}.*$"):
        load_checkpoint(tmp_path / "a.pt")


def test_load_checkpoint(tmp_path, shelf):
    # a whole file is refused or changed; a flipped byte loads silently; a malicious one is run
    saved, at = torch.load(shelf / "c.pt", weights_only=True), lambda name: tmp_path / f"{name}.pt"
    half = {k: v.half() for k, v in saved["weights"].items()}      # shipped weights
    torch.save({**saved, "weights": half}, at("half"))
    data = at("half").read_bytes()
    model, checkpoint = load_checkpoint(at("half"))
    assert not model.training and checkpoint["sha256"] == hashlib.sha256(data).hexdigest()
    assert all(p.dtype == torch.float32 and gap(p, half[k]) == 0 for k, p in model.named_parameters())
    malicious = type("Malicious", (), dict(__reduce__=lambda self: (os.mkdir, (str(at("owned")),))))
    torch.save(malicious(), at("bad"))
    place = data.index(half["blocks.M.0.weight"].numpy().tobytes()[:40])
    flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]
    bad = dict(cut=data[:3000], empty=b"", flipped=flipped, bad=at("bad").read_bytes())
    for name, content in bad.items():
        at(name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.pt: not a checkpoint written by train.py"):
            load_checkpoint(at(name))
    assert not at("owned").exists()


def test_write_is_whole_or_not_at_all(tmp_path):
    # a reader sees a half-written file; a failure leaves a stray file or destroys the old one
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_bytes(b"older")
    link.symlink_to(path)
    with unet.write(link) as file:
        file.write(b"old")
        file.flush()
        assert path.read_bytes() == b"older"
    for trouble, seen in (KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "Full"), UserError):
        with pytest.raises(seen, match="could not be written .full" if seen is UserError else None):
            with unet.write(path) as file:
                file.write(b"new")
                raise trouble
        assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["a.json", "link.json"]
    assert link.is_symlink()                   # followed, not replaced


@pytest.mark.parametrize("trouble, code, words", [
    (UserError("--x 3: no\udcff"), 2, "--x 3: no\\udcff\n"), (KeyboardInterrupt(), 130, ""),
    (MemoryError("50 GB"), 2, "out of memory; smaller settings need less (50 GB)\n"),
    (OSError(28, "No space left on device", "a.png"), 2, "a.png: No space left on device\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "out of memory; smaller settings need less (CUDA)\n")])
def test_one_way_to_end(trouble, code, words, monkeypatch, capsys):
    # a trouble that the user can mend is a traceback, or a bug is not
    def main(trouble=trouble):
        raise trouble
    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as end:
        unet.run(main)
    assert end.value.code == code and capsys.readouterr().err == (words and f"x.py: {words}")
    with pytest.raises(ZeroDivisionError):
        unet.run(lambda: 1 / 0)


@pytest.mark.parametrize("console", ["full disk", "| head", "none", "ascii"])
def test_standard_output_never_kills_work(console, monkeypatch):
    # `| head`, a full disk under a log, no console, or one that knows no σ end a training
    read, end = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", dict([
        ("full disk", open("/dev/full", "w")), ("| head", open(end, "w", closefd=False)), ("none", None),
        ("ascii", io.TextIOWrapper(io.BytesIO(), "ascii"))])[console])
    done = []
    with pytest.raises(SystemExit) as stop:
        unet.run(lambda: [unet.say("σ and φ") for _ in range(3000)] and done.append(True))
    assert done and stop.value.code == 0


# kmeans.py

def in_chunks(x, rows):
    """Slices of so many rows of x, in place of those that fill a cache."""
    return [slice(a, a + rows) for a in range(0, len(x), rows)]


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


X = blobs(20, 3, 4).round(3)                   # the points of the command lines


def test_kmeans_is_plain_lloyd_step_by_step(monkeypatch):
    # a skipped distance, a chunk's edge or a running sum changes a label, a centre or the inertia
    for K, d in ((40, 20), (7, 3)):
        x = blobs(d=d)
        init = x[np.random.default_rng(1).permutation(len(x))[:K]]
        for steps, (labels, centers, inertia) in enumerate(plain_lloyd(x, init, 9), 1):
            for rows in (20, 10 ** 6, *[1] * (steps == 3)):
                monkeypatch.setattr(kmeans, "chunks", lambda x, width: in_chunks(x, rows))
                model = KMeans(K, init, max_iter=steps, tol=0).fit(x)
                assert (model.labels_ == labels).all() and model.n_iter_ <= steps
                assert abs(model.cluster_centers_ - centers).max() < 1e-12
                assert abs(model.inertia_ - inertia) < 1e-9 * inertia


def test_kmeans_seeding_is_greedy_kmeans_plus_plus(monkeypatch):
    # D² is not D², candidates are not compared, or restarts or chunks mix
    x = blobs(120, 3, 6)
    d2 = ((x[:, None] - x) ** 2).sum(2)
    for K, restarts, rows in ((1, 2, 200), (2, 1, 200), (30, 4, 6), (9, 3, 1)):
        monkeypatch.setattr(kmeans, "chunks", lambda x, width: in_chunks(x, rows))
        generator, L = torch.Generator().manual_seed(5), 2 + int(math.log(K))
        chosen = [[int(i)] for i in torch.randint(120, (restarts,), generator=generator)]
        for _ in range(K - 1):                 # with the same random numbers, one restart after the other
            u = 1 - torch.rand(restarts, L, generator=generator, dtype=torch.float64).numpy()
            for mine, row in zip(chosen, u):
                D2 = d2[mine].min(0)
                candidates = [int(np.argmax(D2.cumsum() >= v * D2.sum())) for v in row]
                mine.append(min(candidates, key=lambda i: np.minimum(D2, d2[i]).sum()))
        assert gap(kmeans.seed_centers(torch.from_numpy(x), K, restarts, 5), x[np.array(chosen)]) == 0


def test_kmeans_keeps_the_best_restart_and_stops_as_promised():
    # a worse restart wins, or tol has another scale
    x = blobs(300, 3, 9) + 0.01 * normal(300, 3).numpy()   # no two points alike
    starts = kmeans.seed_centers(torch.from_numpy(x - x.mean(0)), 9, 6, 3).numpy() + x.mean(0)
    inertias = [KMeans(9, c, tol=0).fit(x).inertia_ for c in starts]
    assert max(inertias) > min(inertias) * 1.001
    assert KMeans(9, n_init=6, tol=0, seed=3).fit(x).inertia_ == pytest.approx(min(inertias), rel=1e-9)
    init = x[np.random.default_rng(0).permutation(300)[:9]]
    steps = [init, *(c for _, c, _ in plain_lloyd(x, init, 12))]
    moves = [((b - a) ** 2).sum() / x.var(0).mean() for a, b in zip(steps, steps[1:])]
    for tol in 0.6, 0.15, 0.04:
        assert KMeans(9, init, tol=tol).fit(x).n_iter_ == 1 + next(i for i, m in enumerate(moves) if m <= tol)


def test_kmeans_far_from_the_origin():
    # float32 takes near points for one where ‖x‖ is large
    places = np.array([[at + 5 * i, at] for at in (-3000.0, 3000) for i in range(50)])
    x = (np.repeat(places, 20, 0) + 0.1 * np.random.default_rng(0).normal(size=(2000, 2))).astype(np.float32)
    exact = ((x.astype(float) - x.reshape(100, 20, 2).astype(float).mean(1).repeat(20, 0)) ** 2).sum()
    assert KMeans(100, n_init=2).fit(x).inertia_ == pytest.approx(exact, rel=1e-9)


def test_kmeans_corners():
    # one cluster, as many as points, empty clusters, duplicates, or other types are not handled
    x = np.random.default_rng(0).normal(size=(60, 5))
    one, every = KMeans(1).fit(x), KMeans(60, n_init=1).fit(x)
    assert gap(one.cluster_centers_, x.mean(0)[None]) < 1e-12 and every.inertia_ < 1e-20
    far = np.concatenate([x[:2], x[:1] + 1e3, x[:1] + 2e3, x[:1] + 3e3])       # three empty clusters at first
    first = KMeans(5, far, tol=0, max_iter=1).fit(x)       # they get the three points farthest from x₀ and x₁
    d2 = ((x[:, None] - x[:2]) ** 2).sum(2).min(1)
    assert gap(first.cluster_centers_[2:], x[np.argsort(-d2)[:3]]) < 1e-12
    for dtype in np.float32, np.float64:       # an empty cluster takes all points at one place
        repeated, starts = np.array([[0, 0, 30, 100, 102]], dtype).T, np.array([[20, 101, 20, 20]]).T
        assert KMeans(4, starts).fit(repeated).inertia_ == 0
    with pytest.warns(UserWarning, match="2 clusters have points, 4 were asked for: fewer distinct"):
        assert KMeans(4).fit(np.repeat([[0.0, 1], [3, 4]], 10, 0)).inertia_ == 0
    half, a, b = KMeans(3).fit(torch.from_numpy(x).half()), KMeans(3).fit(x), KMeans(3).fit(x + 100)
    assert torch.is_tensor(half.labels_) and abs(half.inertia_ / a.inertia_ - 1) < 1e-2
    assert (a.labels_ == b.labels_).all()


def test_kmeans_adjusted_rand_index_counts_pairs():
    # the index is not (agreeing pairs − expected)/(most − expected), pair by pair
    r = np.random.default_rng(0)
    for n in (4, 7, 12) * 10:
        a, b = r.integers(3, size=n), np.array(list("xyzw"))[r.integers(4, size=n)]
        same = np.array([(a[i] == a[j], b[i] == b[j]) for i in range(n) for j in range(i)])
        both, (one, two) = same.all(1).sum(), same.sum(0)
        chance = one * two / len(same)
        if (one + two) / 2 != chance:
            index = (both - chance) / ((one + two) / 2 - chance)
            assert kmeans.adjusted_rand_index(a, b) == pytest.approx(index, abs=1e-12)
    assert all(kmeans.adjusted_rand_index(v, v) == 1 for v in ([7], [1, 1, 1], [1, 2, 3]))


def test_kmeans_separation_of_two_gaussians():
    # distance or spread is not that along the line of the means
    shift, scale = torch.tensor([3.0, 4, 0]), torch.tensor([1.0, 2, 9])
    distance, sd = kmeans.separation(normal(200_000, 3), normal(200_000, 3, seed=1) * scale + shift)
    line = shift / 5                           # variances along it: 1 and 0.6²·1 + 0.8²·4
    assert abs(distance - 5) < 0.03 and abs(sd - math.sqrt((1 + (line * scale).square().sum()) / 2)) < 0.01


def test_kmeans_pairs_of_groups():
    # a pair comes twice, is left out, or joins a group too small or without a label
    place, sizes = 3.0 ** np.arange(7), [5, 6, 4, 9, 5, 5, 2]      # every difference is another
    labels = np.concatenate([np.repeat(np.arange(7), sizes), [-1] * 8])
    code = torch.from_numpy(np.append(place, 0.5))[labels][:, None] + 1e-3 * normal(len(labels), 1)
    every = np.sort([abs(p - q) for p, q in itertools.combinations(place[[0, 1, 3, 4, 5]], 2)])
    draw = lambda seed, *most: kmeans.pair_separations(
        code, labels, np.random.default_rng(seed), *most)[0][:, 0]
    assert gap(np.sort(draw(0)), every) < 0.01
    few = np.array([abs(draw(s, 4)[:, None] - every).argmin(1) for s in range(100)])
    assert all(len(set(f)) == 4 for f in few)
    assert abs(np.bincount(few.ravel()) - 40).max() < 22           # 40 ± 4.9 each: all alike


def test_kmeans_tsne_affinities_and_gradient():
    # a point's neighbourhood has another perplexity, or the descent follows another gradient
    x, y, n = normal(14, 3).double(), normal(14, 2, seed=3).double().requires_grad_(), 14
    conditional, away = torch.zeros(n, n).double(), ~torch.eye(n, dtype=torch.bool)
    for i in range(n):
        d2, low, high = (x[away[i]] - x[i]).square().sum(1), 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            p = torch.softmax(-beta * d2, 0)
            low, high = (beta, high) if torch.special.entr(p).sum().exp() > 4 else (low, beta)
        conditional[i, away[i]] = p
    p = kmeans.affinities(x, 4)
    assert gap(p, (conditional + conditional.T) / (2 * n)) < 1e-9
    q = 1 / (1 + (y[:, None] - y).square().sum(2)[away])
    (p[away] * (p[away] / (q / q.sum())).log()).sum().backward()
    assert gap(y.grad, kmeans.divergence_gradient(p, y.detach())) < 1e-6


def test_kmeans_tsne_keeps_neighbours():
    # neighbours on a curve are torn apart
    t = torch.linspace(0, 6, 80)
    curve = torch.stack([t.cos(), t.sin(), t, t * 0, t.sin() ** 2], 1)
    near = torch.cdist(*2 * [kmeans.tsne(curve, 10.0, 400)]).argsort(1)[:, 1:6]
    assert ((near - torch.arange(80)[:, None]).abs() <= 5).float().mean() > 0.95


def test_kmeans_command_line(tmp_path, cli):
    # clusters.npz or the printed numbers are not those of KMeans and of the known classes
    x, paths = blobs(90, 6, 3).astype(np.float32), [f"{i}.png" for i in range(90)]
    labels = np.arange(90) % 5 - 1.0
    labels[labels == 3] = np.nan               # like −1: unknown
    np.savez(tmp_path / "phi.npz", phi=x, paths=paths, labels=labels)
    line = f"kmeans.py {tmp_path}/phi.npz --K 5 --seed 4 --n-init 3 --max-iter 9 --out {tmp_path}/k.npz"
    code, text = cli(line)
    model = KMeans(5, seed=4, n_init=3, max_iter=9).fit(x)
    with np.load(tmp_path / "k.npz") as saved:
        assert code == 0 and saved["paths"].tolist() == paths
        assert (saved["labels"] == model.labels_).all() and gap(saved["centers"], model.cluster_centers_) == 0
    index = kmeans.adjusted_rand_index(model.labels_[labels >= 0], labels[labels >= 0])
    assert f"inertia {model.inertia_:.6g}" in text and f"Rand index {index:.3f}" in text


# train.py: training

def test_sigma_distribution():
    # σ is drawn otherwise than in A.3, the noise is not σz, or the pictures are not in [0, 1]
    sigma = train.noisy_batch(np.zeros((100_000, 1, 1, 1), np.uint8), np.arange(100_000), 7, 0, 0.8, "cpu")[2]
    cdf = (sigma / 0.8).sqrt().flatten().sort().values                         # p(σ) ∝ 1/√σ on [0, 0.8]
    assert gap(cdf, (torch.arange(100_000) + 0.5) / 100_000) < 0.006           # Kolmogorov–Smirnov, p < 0.001
    x, y, s = train.noisy_batch(np.full((64, 16, 16, 3), 51, np.uint8), np.arange(64), 7, 0, 0.8, "cpu")
    z = (y - x) / s
    assert gap(x, torch.full_like(x, 0.2)) < 1e-6 and abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_learning_rate_and_data_order():
    # the paper's halving is lost, a short run starves, or an epoch leaves pictures out
    rate = train.learning_rate
    assert [rate(t, 1000) for t in (0.005, 0.011, 0.09, 0.1, 0.55, 0.99)] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 5e-4, 1e-3 / 32, 1e-3 / 512], rel=0.01)
    for epochs in None, 3, 999:
        assert [rate(t, epochs) for t in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx(
            [1e-6, 0.95 * 0.501e-3, 0.9e-3, 0.45e-3, 0], rel=1e-9, abs=1e-15)
    rows = np.arange(100, 110)
    seen = np.concatenate([train.batch_rows(rows, step, 4, 0) for step in range(10)])      # 4 epochs of 10
    assert all(sorted(epoch) == list(rows) for epoch in seen.reshape(4, 10))
    assert list(seen[:10]) != list(seen[10:20])


def test_the_start_of_the_network(small):
    # the network starts elsewhere: channels that are on for every picture, open skips, a gray output
    y, outputs = normal(16, 3, 16, 16), []
    train.initialise(small, y, [0.2, 0.4, 0.6])
    for m in small.modules():
        if isinstance(m, (nn.GroupNorm, nn.ConvTranspose2d)):
            m.register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()))
    x_hat = small(y)
    assert gap(x_hat, torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand_as(x_hat)) < 1e-6
    assert len(outputs) == 2 * 2 + 3 + 2 * 6 - 2 + 2
    for a in outputs:
        assert gap(a.mean((0, 2, 3)), 0) < 1e-3 and gap(a.std((0, 2, 3)), 1) < 1e-2
    maps, skips = small.encode(y)
    nn.init.normal_(small.blocks["D1"][-1].weight)
    assert gap(small.decode(maps, skips), small.decode(maps, [0 * s for s in skips])) == 0
    assert gap(small.decode(maps, skips), small.decode(0 * maps, skips)) > 0.01
    closed = lambda fraction: train.Run.skips_closed(
        SimpleNamespace(model=small, fraction=lambda: fraction, epochs=None))
    assert closed(0.05) and not closed(0.15)
    small.blocks["D1"][0].weight.data += 1     # once open, they stay so
    assert not closed(0.05)


def test_training_step_by_hand(small):
    # M dies: filters move with a common sign; or the skips open at once; a step is not Adam's, or depends on
    # how many pictures the memory holds at a time; or Eq. 1 is a mean over pixels
    x = torch.rand(5, 3, 16, 16)
    y = x + 0.3 * normal(*x.shape)
    before, twin = copy.deepcopy(small.state_dict()), copy.deepcopy(small)
    adam = torch.optim.Adam(small.parameters(), 1e-3)
    loss = train.training_step(small, adam, x, y, 5, 2, skips_closed=True)     # micro-batches of 2, 2 and 1
    direct = (twin(y) - x).square().sum() / 5
    direct.backward()
    assert loss == pytest.approx(direct.item(), rel=1e-5)
    for (name, p), g in zip(small.named_parameters(), [p.grad for p in twin.parameters()]):
        if p.ndim == 4 and name.startswith("blocks"):
            g -= g.mean((1, 2, 3), keepdim=True)           # of one filter, over its inputs and places
        if name in ("blocks.D1.0.weight", "blocks.D2.0.weight"):
            g[:, :g.shape[1] // 2] = 0
        m, step = adam.state[p]["exp_avg"], before[name] - p.detach()
        large = g.abs() > 1e-3 * g.abs().max()
        assert gap(10 * m, g) < 1e-4 * g.abs().max(), name
        assert gap(step[large], 1e-3 * g[large].sign()) < 1e-5, name           # Adam's first step


def test_training_reaches_the_wiener_solution():
    # training does not lead to E[x | y], the minimiser of Eq. 1: for Gaussian pictures Wiener's linear filter
    n, sigma, g = 8, 0.5, torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(n)
    spectrum = 2 * torch.exp(-40 * (f[:, None] ** 2 + f[None] ** 2))           # λ_k: smooth, periodic
    filtered = lambda v, gain: torch.fft.ifft2(torch.fft.fft2(v) * gain).real

    def pair(m):
        x, z = torch.randn(2, m, 1, n, n, generator=g)
        x = filtered(x, spectrum.sqrt())
        return x, x + sigma * z
    torch.manual_seed(0)
    model = UNet(width=8, channels=1, levels=1)
    train.initialise(model, pair(64)[1], [0.0])
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5 * train.learning_rate(step / 150)
        train.training_step(model, optimizer, *pair(32), 32, 32, skips_closed=step < 15)
    x, y = pair(1000)
    best = filtered(y, spectrum / (spectrum + sigma ** 2))
    x_hat, error = model.denoise(y).detach(), lambda a, b: (a - b).square().mean()
    assert error(x_hat, best) < 0.08 * error(y, best) and error(best, x) < error(x_hat, x)


def test_psnr_and_use_of_M_in_closed_form():
    # PSNR is another, or a decoder that ignores M passes for one that uses it, or the other way round
    network = lambda heard: SimpleNamespace(   # M's maps and the skip are the noisy picture: one is put out
        encode=lambda y: (y, [y]), decode=lambda maps, skips: [maps, skips[0]][heard])
    x = torch.rand(100, 1, 16, 16)
    for most, sigmas in (1, train.SIGMAS), (0.3, (0.05, 0.1, 0.2, 0.3)), (0.01, [0.01]):
        assert train.evaluate(network(1), x, 7, most) == pytest.approx(
            {s: -20 * math.log10(s) for s in sigmas}, abs=0.15)
    assert train.use_of_M(network(1), x) == dict.fromkeys((0.1, 0.3, 0.5, 1.0), 0)
    found = train.use_of_M(network(0), x)
    assert train.use_of_M(network(0), x, micro_batch=7) == pytest.approx(found, abs=1e-3)
    for sigma, use in found.items():
        swapped = 2 / 12 + sigma ** 2          # two independent uniform pictures, and the noise
        assert use == pytest.approx(10 * math.log10(swapped / sigma ** 2), abs=0.15)


def test_variety_and_class_agreement():
    # a constant φ passes for a code, silent channels are not counted, or neighbours are of the wrong class
    found = train.variety(torch.tensor([[1., 0, 0, 2], [1, 0, 0, 0], [0, 3, 0, 0]]))
    assert found["cosine"] == pytest.approx((1 / 5 ** 0.5) / 3) and found["silent"] == 1
    code = normal(7, 5)
    code[:3, 0] += 50
    code[3:6, 1] += 50
    code[6] = code[0]                          # of no class: no neighbour
    for labels, share in (([0, 0, 0, 1, 1, 1, -1], 1), ([0, 0, 1, 1, 1, 0, -1], 1 / 3), ([-1] * 7, math.nan)):
        assert train.own_class(code, np.array(labels), k=2).mean() == pytest.approx(share, nan_ok=True)


# train.py: the loop

RUN = "train.py --data tiny.npy --size 8 --width 2 --levels 1 --channels 1 --batch 7 --epochs 4 --device cpu"
FLAGS = dict(train.COMMON, size=8, width=2, levels=1, channels=1, batch=7)


def weights(path):
    """The weights in a checkpoint and the roots of Adam's second moments, one vector."""
    saved = torch.load(path, weights_only=True)
    moments = [s["exp_avg_sq"].sqrt() for s in saved["optimizer"]["state"].values()]
    return torch.cat([v.flatten() for v in [*saved["weights"].values(), *moments]])


@pytest.fixture(scope="module")
def whole(shelf):
    """The checkpoint of RUN, never interrupted."""
    train.train({**FLAGS, "data": str(shelf / "tiny.npy"), "epochs": 4.0}, str(shelf / "whole.pt"))
    return shelf / "whole.pt"


KILLED = """import os, sys, train
replace, times = os.replace, iter([4, 3, 2, 1])
def dying(*paths):
    if next(times) == 1:                       # the second save's checkpoint is written, but not in place
        os.kill(os.getpid(), 9)
    replace(*paths)
os.replace, sys.argv = dying, sys.argv[1:]
train.main()"""


def test_resume_after_a_kill_or_a_signal_is_exact(shelf, whole, cli, tmp_path, monkeypatch):
    # a killed or stopped run cannot go on, or ends elsewhere
    words = f"{RUN} --data {shelf}/tiny.npy --save-every 1e-9 --out {tmp_path}/"
    assert python("-c", KILLED, *(words + "killed.pt").split())[0] == -signal.SIGKILL
    assert list(tmp_path.glob("*.tmp")) and load_checkpoint(tmp_path / "killed.pt")[1]["step"] == 1
    rate, times = train.learning_rate, iter([1] * 9)
    with monkeypatch.context() as patch:       # a signal in the tenth step
        patch.setattr(train, "learning_rate", lambda *args: (
            next(times, None) or os.kill(os.getpid(), signal.SIGTERM), rate(*args))[1])
        code, text = cli(words + "stopped.pt")
    assert code == 128 + signal.SIGTERM and "--resume" in text
    for name in "killed", "stopped":
        resume = f"train.py --out {tmp_path}/{name}.pt --resume --device cpu"
        assert "complete after 22 steps" in cli(resume)[1] and "already complete" in cli(resume)[1]
        assert gap(weights(whole), weights(tmp_path / f"{name}.pt")) == 0
        curve = [json.loads(v)["step"] for v in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert curve == sorted(set(curve)) and curve[0] == 1 and curve[-1] == 22
    assert np.ptp(np.asarray(Image.open(tmp_path / "stopped.png"))) == 255


LEAVING = """import sys, weakref, train
leave, sys.argv = train.dist.destroy_process_group, sys.argv[1:]
def leaving():
    group = weakref.ref(train.dist.group.WORLD)
    leave()
    assert group() is None                     # else its threads may abort the process as it ends
train.dist.destroy_process_group = leaving
train.run(train.main)"""


def test_torchrun_gives_the_same_weights(shelf, whole, tmp_path):
    # the global batch depends on the number of processes, or a process that is done may crash
    code, err = python("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python",
                       sys.executable, "-c", LEAVING,
                       *f"{RUN} --data {shelf}/tiny.npy --out {tmp_path}/two.pt".split())
    assert code == 0, err
    assert gap(weights(whole), weights(tmp_path / "two.pt")) < 1e-5


def test_checkpoint_holds_what_it_says(shelf, tmp_path):
    # what users read is measured on training pictures, or of another network
    flags, out = {**FLAGS, "data": str(shelf / "tiny.npy"), "epochs": 3.0, "val": 0.3}, str(tmp_path / "a.pt")
    train.train(flags, out)
    model, saved = load_checkpoint(out)
    pictures, rows, held_out = train.training_data(flags)
    found = saved["training"]
    assert found["pictures_seen"] == 84 and found["training_pictures"] == 28 and found["epoch"] == 3
    held = train.to_batch(pictures.x[np.random.default_rng((0, 4)).permutation(held_out)], "cpu")
    assert found["psnr"] == pytest.approx(train.evaluate(model, held, 7), abs=1e-4)
    assert found["use"] == pytest.approx(train.use_of_M(model, held), abs=1e-4)
    assert saved["mean"] == pytest.approx([pictures.x[rows].mean() / 255], abs=1e-6)
    distances = torch.pdist(phi(model, held, 0.3, 20, train.seeded("cpu", 77, 0)))
    assert found["phi_distance"] == pytest.approx(distances.mean().item(), 1e-4)
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert line["use"]["0.5"] == found["use"][0.5] and line["cosine"] == found["cosine"]
    first = model.blocks["M"][1].weight        # the data-dependent pass was made: 1 is PyTorch's own start
    assert (first - 1).abs().max() > 0.05 and train.skip_weights(model)[0].any()           # skips have opened


def test_minutes_and_lengthening(shelf, tmp_path):
    # --minutes does not end a run, processes end it by clocks of their own, or it cannot be lengthened
    flags, out = {**FLAGS, "data": str(shelf / "tiny.npy"), "minutes": 0.005}, str(tmp_path / "a.pt")
    late = train.Run({**flags, "minutes": 1e-9}, out, torch.device("cpu"), None, None, False)
    assert late.seconds() > late.limit and late.fraction() == 0            # until they have agreed on a clock
    for every in None, 1e-9:                   # nothing to save, though it be time
        assert not train.train(flags, out, stop=lambda: True, save_every=every) and not os.path.exists(out)
    assert train.train(flags, out)
    saved = load_checkpoint(out)[1]
    given = {**dict.fromkeys(train.COMMON | train.PAPER), "minutes": 2 * saved["elapsed"] / 60}
    assert train.train(train.complete_flags(given, saved, out), out, resume=saved)
    again = load_checkpoint(out)[1]
    assert again["step"] > saved["step"] and again["elapsed"] >= 2 * saved["elapsed"] >= 0.6


def test_defaults_are_the_papers():
    # a user who types no flag does not get A.1 to A.3
    given = dict.fromkeys(train.COMMON | train.PAPER)
    flags, builtin = (train.complete_flags({**given, "data": data}) for data in ("x", None))
    keys = "size", "width", "levels", "batch", "epochs", "minutes", "pictures"
    assert [flags[k] for k in keys] == [64, 64, 3, 1024, 1000, None, None]
    assert [builtin[k] for k in keys] == [32, 16, 2, 32, None, None, 150_000]
    assert train.complete_flags({**given, "data": "x", "minutes": 5.0})["epochs"] is None
    assert [train.complete_flags({**given, "size": s})["levels"] for s in (16, 40, 80, 160)] == [1, 2, 3, 4]


def test_full_disk_and_bad_weights(shelf, tmp_path, cli):
    # a full disk destroys the last save, or a diverged run overwrites it
    out, before = tmp_path / "a.pt", (shelf / "c.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out.write_bytes(before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))   # stands for a full disk
    try:
        code, text = cli(f"train.py --resume --pictures 24 --out {out} --device cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and f"{out}: could not be written (file too large)" in text and text.count("\n") == 1
    resume = load_checkpoint(out)[1]
    resume["weights"]["blocks.M.0.bias"][:] = resume["weights"]["blocks.D1.15.weight"][:] = 1e38
    with pytest.raises(UserError, match="step 2: the loss is not finite"):
        train.train({**resume["flags"], "pictures": 80}, str(out), resume=resume)
    assert out.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_bench(cli, monkeypatch):
    # --bench tells a speed that is not pictures over seconds
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))            # a second a call
    monkeypatch.setattr(train, "bench", functools.partial(train.bench, seconds=0))
    code, text = cli("train.py --bench --width 2 --levels 1 --batch 4 --size 8 --device cpu")
    assert code == 0 and re.findall(r"([\d.]+) images/s", text) == ["4.0"] * 3


# train.py: pictures

def test_odd_pictures(tmp_path):
    # a format is read with wrong colours, turned, or not at all; a damaged file ends the run
    red, gray, white, size = (200, 40, 40), (51,) * 3, (255,) * 3, (40, 24)
    folder, flat, clear = tmp_path / "Class A", Image.new("RGB", size, red), Image.new("P", size, 0)
    folder.mkdir()
    clear.putpalette([0, 0, 0] * 256)
    upright, exif = np.zeros((24, 24, 3), np.uint8), Image.Exif()
    upright[:12], exif[0x0112] = red, 6        # red above black, stored turned a quarter
    sixteen_bits = Image.fromarray(np.full(size[::-1], 51 * 257, np.uint16))
    files = {"a.JPEG": (flat, red, dict(quality=95)), "b.png": (flat.quantize(4), red, {}),
             "c.Jpg": (flat.convert("CMYK"), red, dict(quality=95)),
             "d.PNG": (Image.new("RGBA", size, (*red, 51)), (244, 212, 212), {}),        # a fifth over white
             "e.gif": (clear, white, dict(transparency=0)), "f.png": (sixteen_bits, gray, {}),
             "g.bmp": (Image.new("L", size, 51), gray, {}), "h.tiff": (Image.new("1", size, 1), white, {}),
             "j.png": (Image.fromarray(np.rot90(upright).copy()), None, dict(exif=exif))}
    for name, (image, _, options) in files.items():
        image.save(folder / name, **options)
    (folder / "k.jpg").write_bytes((folder / "a.JPEG").read_bytes()[:400])     # truncated
    (folder / "notes.txt").write_text("ignored")
    (folder / "loop").symlink_to(tmp_path, target_is_directory=True)
    save(tmp_path / "B" / "m.webp", np.full((7, 9, 3), (0, 0, 255), np.uint8))
    p = train.load_pictures(str(tmp_path), size=16)
    assert p.x.shape == (10, 16, 16, 3) and p.x.dtype == np.uint8
    assert p.classes == ["B", "Class A"] and p.labels.tolist() == [0] + [1] * 9
    for x, colour, path in zip(p.x, [(0, 0, 255), *(c for _, c, _ in files.values() if c)], p.paths):
        assert np.abs(x.astype(int) - np.array(colour)).max() <= 6, path
    assert np.abs(p.x[9][:7].astype(int) - red).max() <= 3 and p.x[9][9:].max() <= 3         # upright again
    assert len(p.skipped) == 1 and "k.jpg" in p.skipped[0]
    gray = train.load_pictures(str(tmp_path), size=16, channels=1)
    assert gray.x.shape == (10, 16, 16, 1) and np.abs(gray.x[6].astype(int) - 51).max() <= 1


def test_centre_crop_and_antialiasing(tmp_path):
    # what is outside the central square shows, or stripes alias
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, 16:80:2] = 255  # one-pixel stripes in the central square: their average is gray
    stripes[:, :16] = stripes[:, 80:] = (255, 0, 0)                            # outside it
    x = train.to_pixels(Image.fromarray(stripes), 16, 3)
    assert np.abs(x[0, :, 1:-1].astype(int) - 127).max() <= 8                  # no red, no aliasing


def test_patches(tmp_path):
    # a tile is cut elsewhere, or its class is not its picture
    x = array(0, 35, 50)                       # 2 × 3 tiles of 16
    save(tmp_path / "one.png", x)
    save(tmp_path / "small.png", array(1, 40, 10))
    p = train.load_pictures(str(tmp_path), 16, 1, patches=True)
    tiles = [x[16 * i:16 * i + 16, 16 * j:16 * j + 16] for i in range(2) for j in range(3)]
    assert (p.x[..., 0] == tiles).all() and len(p.skipped) == 1 and "no 16×16 tile" in p.skipped[0]
    assert {p.classes[k] for k in p.labels} == {"one"} and len(set(p.groups)) == 1


def test_groups_against_a_graph_search():
    # two tiles of one picture, or two copies of one picture, on both sides of the split
    for seed in range(30):
        rng = np.random.default_rng(seed)
        source, content = rng.integers(0, 12, 30), rng.integers(0, 25, 30)
        blank = content < 4                                # these join nothing
        groups = train.join_groups(source, content.astype(np.uint64) * 977, blank)
        joined = (source[:, None] == source) | (content[:, None] == content) & ~blank | np.eye(30, dtype=bool)
        for _ in range(5):
            joined = joined @ joined
        assert (joined == (groups[:, None] == groups)).all()


def test_split_depends_on_pictures_and_seed_alone(tmp_path):
    # a renamed folder splits otherwise; a copy is held out
    x, held = array(0, 60, 8, 8, 3), set()
    x[10:14], x[50] = x[0], x[49]              # exact duplicates
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[np.random.default_rng(1).permutation(60)])
    a, b = (train.load_pictures(str(tmp_path / f"{n}.npy"), 8) for n in "ab")
    content = lambda p, rows: sorted(p.x[i].tobytes() for i in rows)
    for seed in range(20):
        rows, out = train.split(a, 0.1, seed)
        assert sorted([*rows, *out]) == list(range(60)) and 1 <= len(out) <= 6
        assert not set(content(a, rows)) & set(content(a, out))                # no twin on the other side
        assert content(a, out) == content(b, train.split(b, 0.1, seed)[1])
        held.add(tuple(sorted(out)))
        first, second = (train.training_part(a, rows, s, None, seed) for s in ("first", "second"))
        assert sorted([*first, *second]) == sorted(rows) and abs(len(first) - len(second)) <= 6
        assert not set(content(a, first)) & set(content(a, second))
        few, more = (train.training_part(a, rows, "first", n, seed) for n in (5, 9))
        assert len(few) == 5 and list(more[:5]) == list(few)
    assert a.fingerprint == b.fingerprint and len(held) > 10       # the seed matters
    np.save(tmp_path / "two.npy", x[:2])
    assert len(train.split(train.load_pictures(str(tmp_path / "two.npy"), 8), 0.9)[0]) == 1


def test_arrays(tmp_path):
    # the layout of an array is mistaken for another
    x, load = array(0, 20, 8, 8, 3), lambda name, *words: train.load_pictures(str(tmp_path / name), *words)
    np.save(tmp_path / "colour.npy", x)
    assert isinstance(load("colour.npy", 8).x, np.memmap) and (load("colour.npy", 8).x == x).all()
    assert load("colour.npy", 4).x.shape == (20, 4, 4, 3) and len(load("colour.npy", 4, 3, True).x) == 80
    for gray, channels in itertools.product((x[..., 0], x[..., :1]), (1, 3)):
        np.save(tmp_path / "gray.npy", gray)
        assert (load("gray.npy", 8, channels).x == x[..., :1]).all()
    planar = array(1, 10, 3, 64, 64)           # ImageNet64: all red, then all green, then all blue
    for k in range(2):
        np.savez(tmp_path / f"train_data_batch_{k + 1}.npz", mean=np.zeros(12288), labels=np.arange(5) + 1,
                 data=planar[5 * k:5 * k + 5].reshape(5, -1))
    p = load("", 64)
    assert (p.x == planar.transpose(0, 2, 3, 1)).all() and p.labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_builtin_pictures():
    # the built-in set changes from run to run, holds blank pictures, or a class is rare
    x, labels, classes = train.builtin_pictures(150, 32, 3)
    assert len(x) == 150 and np.bincount(labels).tolist() == [150 // len(classes)] * len(classes)
    assert (train.builtin_pictures(150, 32, 3)[0] == x).all() and min(np.ptp(p) for p in x) > 40


def test_calpha_regularity():
    # |f(x + h) − f(x)| does not grow like h^α inside a region of regularity α < 1, and like h above
    for alpha, exponent in (0.5, 0.5), (0.9, 0.9), (2, 1):
        x, size = train.calpha_pictures(200, 64, np.random.default_rng(0), alpha)[..., 0].astype(float), []
        for h in 8, 16:
            d = (x[:, h:] - x[:, :-h]) ** 2    # the 30 % largest: where the contour is crossed
            size.append(np.minimum(d, np.quantile(d, 0.7)).mean() ** 0.5)
        assert abs(np.log2(size[1] / size[0]) - exponent) < 0.17, alpha


# sample.py

generators = lambda n: [train.seeded("cpu", 0, i) for i in range(n)]           # one a sample


class GaussianModel:
    """The exact denoiser of N(m, λ), x̂ = m + λ/(λ + σ²)(y − m). σ: set from outside, or by variance of y."""
    lam, m, sigma = 0.04, 0.3, 1.0
    encode = lambda self, y: (y, [])
    score = lambda self, y: self.denoise(y) - y

    def denoise(self, y):
        measured = ((y - self.m) ** 2).mean((1, 2, 3), keepdim=True)
        v = measured if self.sigma is None else self.lam + self.sigma ** 2
        return self.m + torch.as_tensor(self.lam / v).clamp(max=1) * (y - self.m)


def test_sample_algorithm_1_moments():
    # Algorithm 1's mean, noise levels or their order are wrong
    model, sigmas, mean = GaussianModel(), np.linspace(1, 0.03, 12).tolist(), torch.full((3,), 0.3)

    def target(sigma):                         # also how the model learns σ; tol switches matching off
        model.sigma = sigma
        return torch.zeros(1, 3)
    x, levels = sample.reconstruct(model, target, mean, sigmas, (3, 32, 32), generators(40), tol=1e9)
    v, told = 1, [*sigmas[:-1], sigmas[-2]]    # the last step has no matching: the model still believes σ_1
    for sigma, after, level in zip(told, [*sigmas[1:], 0], [*levels, None]):
        if level:                              # σ̂ = σ²/(λ + σ²) √v
            expected = sigma ** 2 / (model.lam + sigma ** 2) * v ** 0.5
            assert level["sigma"] == sigma and abs(level["sigma_after"].mean() / expected - 1) < 0.02
        v = (model.lam / (model.lam + sigma ** 2)) ** 2 * v + after ** 2
    assert abs(x.mean() - 0.3) < 5 * (v / x.numel()) ** 0.5
    assert abs(x.var() / v - 1) < 5 * (2 / x.numel()) ** 0.5 and len(levels) == 11


def test_sample_unconditional_moments():
    # the sampler's step sizes, its noise or its end are wrong
    model, mean, v = GaussianModel(), torch.full((3,), 0.3), 1.0
    model.sigma = None
    free = lambda most: sample.sample_unconditional(model, mean, (3, 64, 64), generators(8), 1.0, 0.02,
                                                    max_steps=most)
    for t in range(1, 31):                     # v = λ + σ²: v ← (1 − h σ²/v)² v + γ², σ̂² = σ⁴/v
        sigma2, h = v - model.lam, 0.01 * t / (1 + 0.01 * (t - 1))
        v = (1 - h * sigma2 / v) ** 2 * v + ((1 - 0.05 * h) ** 2 - (1 - h) ** 2) * sigma2 ** 2 / v
        if t in (1, 5, 15, 30):
            y, steps = free(t)
            assert abs(((y - 0.3) ** 2).mean() / v - 1) < 0.03 and (steps == t).all()
    x, steps = free(2000)
    assert (steps < 2000).all() and abs(x.var() / model.lam - 1) < 0.1 and abs(x.mean() - 0.3) < 0.01
    assert sample.noise_level(model.score(x)).max() < 0.02         # ended: all of the score was added


def test_sample_guidance_step(small):
    # Algorithm 2's gradient, step, stop or account is wrong
    x, model = normal(5, 3, 16, 16).double(), small.double()
    phi_c = model.encode(normal(1, 3, 16, 16, seed=1).double())[0].mean((2, 3)).detach()
    loss = lambda x: (model.encode(x)[0].mean((2, 3)) - phi_c).square().sum(1).detach()
    moved = sample.guidance_step(model, x, phi_c, tol=0, max_iters=1, memory=0)[0]
    for i in range(2):                         # the step is L/‖∇L‖² ∇L: against central differences
        step, L = (moved - x)[i], loss(x[i:i + 1]).item()
        for where in [(0, 3, 5), (1, 8, 8), (2, 15, 0), (0, 0, 0)]:
            e = torch.zeros_like(x[:1])
            e[(0, *where)] = 1e-5
            gradient = (loss(x[i:i + 1] + e) - loss(x[i:i + 1] - e)).item() / 2e-5
            assert abs(gradient + step[where] * L / step.square().sum()) < 1e-6 * max(1, L)
    least = torch.stack([sample.guidance_step(model, x, phi_c, 0, n)[1]["least"] for n in range(14)])
    assert (least.diff(dim=0) <= 0).all()      # also where a step raises L
    moved, level = sample.guidance_step(model, x, phi_c, tol=0.05, max_iters=300)
    assert level["converged"].all() and (level["least"] <= 0.05 * level["first"]).all()
    assert max(gap(level["first"], loss(x)), gap(level["least"], loss(moved))) < 1e-12
    for i in range(5):                         # each as if it were alone, and not one gradient more
        alone, s = sample.guidance_step(model, x[i:i + 1], phi_c, tol=0.05, max_iters=300)
        n = int(level["gradients"][i])
        assert gap(alone, moved[i:i + 1]) < 1e-9 and s["gradients"][0] == n
        assert not sample.guidance_step(model, x[i:i + 1], phi_c, 0.05, n - 1)[1]["converged"].item()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sample_memory():
    # the memory does not solve a linear problem, φ(x) = Bx, or steps too far
    B, x = normal(12, 48).double(), normal(4, 3, 4, 4, seed=1).double()
    phi_c = (x + 0.01 * normal(4, 3, 4, 4, seed=2)).flatten(1) @ B.T
    linear = SimpleNamespace(encode=lambda y: ((y.flatten(1) @ B.T)[:, :, None, None], []))
    count = lambda m: sample.guidance_step(linear, x, phi_c, 1e-8, 500, m)[1]["gradients"].max()
    assert count(12) <= 25 < count(0)
    far = sample.guidance_step(linear, x, phi_c + 1000, 0, 1)[0] - x
    assert gap(far.square().mean((1, 2, 3)).sqrt(), torch.full((4,), 0.1)) < 1e-6


def test_sample_does_not_depend_on_how_many(small):
    # sample i of a seed changes with --samples or with the targets beside it
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    draw = lambda n, k=1: sample.around(small, dict(mean=[0.5] * 3), [(v[None], None) for v in x[:k]], n,
                                        [0.5, 0.3, 0.1], tol=0.05, max_iters=40)[0]
    many = draw(4)[0]
    assert all(torch.equal(draw(n)[0], many[:n]) for n in (1, 2)) and torch.equal(draw(2, 2)[0], many[:2])
    assert gap(many[0], many[1]) > 1e-2
    free = lambda n: sample.sample_unconditional(small, torch.full((3,), 0.5), (3, 16, 16), generators(n),
                                                 max_steps=5)[0]
    assert torch.equal(free(3)[:2], free(2)) and torch.equal(free(3)[:1], free(1))


def test_sample_several_targets_keep_their_order():
    # samples stand around another target, or distances and correlations are wrong
    model, x = GaussianModel(), torch.tensor([0.1, 0.9]).view(2, 1, 1, 1) + 0.1 * normal(2, 3, 16, 16)
    model.lam, model.sigma, model.m = 1.0, 0.1, 0.5
    samples, _ = sample.around(model, dict(mean=[0.5] * 3), [(v[None], None) for v in x], 3, [0.5, 0.2, 0.05],
                               tol=1e-6)
    for own, other, y in zip(x, x.flip(0), samples):
        found, wrong = (sample.similarities(model, y, (t[None], None), 2.0) for t in (own, other))
        assert max(found["phi_distance"]) < 0.2 < 1 < min(wrong["phi_distance"])
        assert gap(found["phi_distance_relative"], torch.tensor(found["phi_distance"]) / 2) < 1e-6
        z = torch.stack([phi(model, v[None], 0, 1)[0] for v in (*y, own)])     # linear φ: the noise cancels
        assert gap(found["phi_distance"], (z[:3] - z[3]).norm(dim=1)) < 0.05
        correlation = np.corrcoef(torch.cat([y.flatten(1), own.flatten()[None]]))
        assert gap(found["correlation_with_target"], correlation[:3, 3]) < 1e-5
        assert gap(found["correlation_between_samples"], correlation[[0, 0, 1], [1, 2, 2]]) < 1e-5


def test_sample_conditional_distance():
    # Eq. 4 is not the symmetrised KL divergence: here ‖v₁ − v₂‖²/λ, in closed form
    lam, (x1, x2) = 0.09, torch.zeros(2, 3, 48, 48)
    x2[1] = 0.7

    def denoise(y):                            # u given v ~ N(v, λ); w = 0 in every picture: it tells σ
        u, v = y[:, :1], y[:, 1:2].mean((2, 3), keepdim=True)
        sigma2 = y[:, 2:].square().mean((2, 3), keepdim=True)
        return torch.cat([(lam * u + sigma2 * v) / (lam + sigma2), 0 * u, 0 * u], 1)
    model = SimpleNamespace(denoise=denoise, encode=lambda y: (y[:, 1:2], []))             # φ: the mean of v
    of = lambda sigmas, phi_draws, seed: sample.conditional_distance(
        model, x1, x2, sigmas, 8, phi_draws, torch.Generator().manual_seed(seed), 1e-10)
    sigmas, f = np.geomspace(0.01, 20, 20), 48 * 48 * 0.49
    value, error, integrand, matched = of(sigmas, 4, 0)
    exact = 2 * f * sigmas / (lam + sigmas ** 2) ** 2
    assert max(abs(integrand.numpy() / exact - 1)[sigmas < 0.5]) < 0.1
    assert 0.8 < matched.min() <= matched[-1] == 1
    assert abs(value * lam / f - 1) < 0.05 and 0 < error < 0.05 * value
    some = [of([0.2, 0.4], 100, k) for k in range(6)]      # the error is the spread of the value over seeds
    assert 0.5 < np.mean([s[1] for s in some]) / np.std([s[0] for s in some]) < 2.5


def test_sample_integrate():
    # Eq. 4 is overestimated where it grows as σ⁻³
    s = torch.linspace(math.log(0.2), 0, 5).double().exp()
    for p in (-3, -1, 0, 2):
        exact = -math.log(0.2) if p == -1 else (1 - 0.2 ** (p + 1)) / (p + 1)
        found = sample.integrate(torch.stack([s ** p, 2 * s ** p], 1), s)
        assert found.tolist() == pytest.approx([exact, 2 * exact])
    assert sample.integrate(torch.zeros(5, 1, dtype=torch.float64), s).item() == pytest.approx(0, abs=1e-200)


def test_sample_panel_geometry():
    # samples are missing, out of order, or the target not in the middle
    samples = torch.linspace(0, 1, 8).view(8, 1, 1, 1).expand(8, 3, 8, 8)
    sheet = np.asarray(sample.panel(samples, torch.ones(1, 3, 8, 8), side=32))
    assert [sheet[14 + 40 * (i // 3), 14 + 40 * (i % 3), 0] for i in range(9)] == [
        *(round(255 * k / 7) for k in range(4)), 255, *(round(255 * k / 7) for k in range(4, 8))]


# sample.py: the command line

FAST = "--steps 3 --samples 2 --match-iters 3"
one_picture = lambda path, size=8: train.to_batch(train.load_picture(path, size)[None], "cpu")


@pytest.fixture
def record(cli, tmp_path):
    """record("dark.png --seed 1"): what `python sample.py c.pt …` writes to its .json and what it prints."""
    def call(words):
        code, text = cli(f"sample.py c.pt {words} --device cpu --force --out {tmp_path}/s.png")
        assert code == 0
        return json.loads((tmp_path / "s.json").read_text()), text
    return call


@pytest.mark.parametrize("words, panels, steps", [
    (f"odd.png {FAST}", 1, 0), (f"gray.PNG alpha.png {FAST}", 2, 0), (f"--cluster k.npz:1 {FAST}", 1, 0),
    (FAST, 4, 0), (f"--sigma-max 2 dark.png {FAST}", 1, 0), ("--unconditional 3 --sigma-min 0.5", 1, 3),
    ("dark.png light.png --samples 3 --match-iters 2 --steps 3", 2, 0)])
def test_sample_odd_but_good(record, words, panels, steps, monkeypatch):
    # a picture or a mode that users have is not accepted, or its steps are not told
    free = functools.partial(sample.sample_unconditional, max_steps=3)
    monkeypatch.setattr(sample, "sample_unconditional", free)
    found, text = record(words)
    assert len(found["panels"]) == panels and all(len(s) == steps for s in found.get("steps", [[]]))
    assert ("warning: --sigma-max" in text) == ("--sigma-max 2" in words)


def test_sample_record(shelf, record, tmp_path):
    # numbers in the .json, or the pictures saved singly, are not those of the run
    words = f"{shelf}/dark.png light.png --sigma-min 0.1 {FAST}"
    found = record(f"{words} --save-each {tmp_path}/each")[0]
    assert found["sigmas"] == pytest.approx([1, 0.55, 0.1])
    assert [level["sigma"] for level in found["levels"]] == found["sigmas"][:-1]
    assert [p["target"] for p in found["panels"]] == [f"{shelf}/dark.png", "light.png"]
    model, saved = load_checkpoint(shelf / "c.pt")
    unit, first = saved["training"]["phi_distance"], (tmp_path / "s.png").read_bytes()
    x = [one_picture(shelf / f"{n}.png") for n in ("dark", "light")]
    samples = sample.around(model, saved, [(v, None) for v in x], 2, found["sigmas"], max_iters=3)[0]
    for j, p in enumerate(found["panels"]):
        assert p["phi_distance_relative"] == pytest.approx([d / unit for d in p["phi_distance"]])
        for i in 0, 1:
            kept = one_picture(tmp_path / "each" / f"{j:02d}_{i:03d}.png")
            assert gap(kept[0], samples[j][i].clamp(0, 1)) < 0.6 / 255
    record(words)
    assert (tmp_path / "s.png").read_bytes() == first


def test_sample_mix_weights(shelf, record, monkeypatch):
    # --weights go to the wrong picture or are not normalised; a cluster is not the mean of its members
    model, seen = load_checkpoint(shelf / "c.pt")[0], []
    of = lambda name: phi(model, one_picture(shelf / name), 0)
    monkeypatch.setattr(sample, "reconstruct", lambda model, target, *rest, **options: (
        seen.append(target(0)) or torch.rand(8, 3, 8, 8), []))
    found = record("--mix dark.png light.png --weights 1 3")[0]["panels"][0]
    record("--cluster k.npz:1")
    mix, members = 0.25 * of("dark.png") + 0.75 * of("light.png"), of("data/b/01.png") + of("data/a/02.png")
    assert gap(seen[0], mix) < 1e-6 and gap(seen[1], members / 2) < 1e-6 < 1e-3 < gap(mix, of("dark.png"))
    assert found["weights"] == [0.25, 0.75] and "0.75 φ(light.png)" in found["target"]


def test_sample_denoise_record(shelf, record, monkeypatch):
    # the PSNR or the noise level told to the user is another
    found, text = record("--denoise odd.png --noise 0.1")
    assert found["psnr_noisy"] == pytest.approx(20, abs=0.5) and "warning" not in text
    model, x = load_checkpoint(shelf / "c.pt")[0], one_picture(shelf / "odd.png", None)
    y = x + 0.1 * torch.randn(x.shape, generator=train.seeded("cpu", 0))
    x_hat = model.denoise(y).detach()
    assert found["psnr_denoised"] == pytest.approx(-10 * math.log10((x_hat - x).square().mean()), abs=1e-3)
    assert found["noise_estimated"] == pytest.approx((x_hat - y).square().mean().sqrt().item(), abs=1e-5)
    monkeypatch.setattr(UNet, "denoise", lambda self, y: y + 0.001)
    assert "hardly any noise" in record("--denoise odd.png")[1]


def test_sample_held_out_and_tiles(shelf, cli, tmp_path, monkeypatch):
    # targets are training pictures, or are shrunk where training cut tiles
    saved, seen = torch.load(shelf / "c.pt", weights_only=True), []
    for i in range(12):
        save(tmp_path / "data" / f"{i:02d}.png", array(i, 20, 20, 3))
    flags = {**saved["flags"], "data": str(tmp_path / "data"), "patches": True}
    pictures, rows, held = train.training_data(flags)
    torch.save({**saved, "flags": flags, "fingerprint": pictures.fingerprint}, tmp_path / "c.pt")
    np.savez(tmp_path / "k.npz", labels=np.array([3]), paths=np.array([pictures.paths[rows[0]]]))
    monkeypatch.setattr(sample, "around", lambda m, c, targets, n, *a, **k: (
        seen.extend(targets), ([x.expand(n, -1, -1, -1) for x, _ in targets], []))[1])

    def targets(words):
        assert cli(f"sample.py c.pt {words} --device cpu --force", tmp_path)[0] == 0
        return [p["target"] for p in json.loads((tmp_path / "samples.json").read_text())["panels"]]
    names, held = targets(""), {pictures.paths[i] for i in held}
    assert len(set(names)) == 4 and set(names) <= held
    x = np.asarray(Image.open(tmp_path / "data" / "03.png"))
    for words, tile in ("data/03.png", x[6:14, 6:14]), ("--cluster k.npz:3", pictures.x[rows[0]]):
        targets(words)                         # the central tile; a tile, by its name
        assert gap(seen[-1][0][0].permute(1, 2, 0) * 255, tile.astype(float)) < 1e-3
    save(tmp_path / "data" / "new.png", x[::-1])           # no longer its own data
    assert all(name.startswith("built-in") for name in targets(""))


# analyze.py: measures and verdicts

def study_of(out, codes, labels=None, nulls=(), model=None, x=None, **options):
    """A Study of n random 8×8 pictures, φ `codes` ({σ: (n, d)} or (n, d)), whose M counts as in use."""
    codes = codes if isinstance(codes, dict) else {0.3: codes}
    x = array(5, len(codes[0.3]), 8, 8, 1) if x is None else x
    checkpoint = dict(size=8, sigma_max=1.0, mean=[0.5], model=dict(width=2, channels=1, levels=1),
                      flags=dict(patches=False))
    study = analyze.Study(model, checkpoint, x, labels, codes, untrained_phi=nulls, out=str(out), **options)
    study.alive = dict(why="", untrained=[])
    return study


def verdicts(numbers):
    """The verdicts of an analysis, a letter each: h(olds), f(ails), n(ot comparable)."""
    return "".join(c["verdict"][0] for c in numbers["claims"])


def random_codes(n=120, d=12):
    """Three {σ: φ} without any structure."""
    return [{s: normal(n, d, seed=100 * k + round(10 * s)).abs() for s in (0.3, 0.1)} for k in (1, 2, 3)]


@pytest.fixture
def quick(monkeypatch):
    """A few gradients and steps where Algorithms 1, 2 and Eq. 4 would make hundreds."""
    for name, limit in (("guidance_step", dict(max_iters=3)), ("around", dict(max_iters=3)),
                        ("sample_unconditional", dict(max_steps=5))):
        monkeypatch.setattr(analyze, name, functools.partial(getattr(analyze, name), **limit))
    monkeypatch.setattr(analyze, "tsne", lambda x: x[:, :2])
    real = analyze.conditional_distance
    monkeypatch.setattr(analyze, "conditional_distance", lambda *words, max_iters: real(*words, max_iters=3))


def test_analyze_measures_by_hand():
    # PR, kurtosis, Otsu's threshold, rank correlation, standard errors, or pixels less colour are wrong
    v = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    assert gap(analyze.participation_ratio(v), [1 / 4, 1, 16 / 40]) < 1e-6
    assert analyze.participation_ratio(torch.zeros(3)).isnan()
    v = torch.tensor([0.0, 0, 0, 0, 5])                                # mean 1, second moment 4, fourth 52
    assert abs(analyze.kurtosis(v).item() - 52 / 16) < 1e-6
    assert analyze.otsu(np.array([0.9, 0.1, 0.2, 0.8])) == 0.5
    assert abs(analyze.rank_correlation(np.array([1.0, 2, 2, 4]), np.array([1, 10, 10, 100.0])) - 1) < 1e-9
    assert abs(analyze.rank_correlation(np.array([1.0, 2, 3, 4]), np.array([1, 10, 5, 100.0])) - 0.8) < 1e-9
    assert analyze.mean_se([1, 2, 3]) == pytest.approx((2, 1 / math.sqrt(3)))
    assert analyze.mean_se([1, 2, 3, 1, 2, 3], [7, 5, 6, 7, 5, 6]) == pytest.approx((2, 1 / math.sqrt(3)))
    assert math.isnan(analyze.mean_se([1, 2], [0, 0])[1]) and analyze.beyond((1, math.nan)) is None
    members, pairs = normal(4000, 15, seed=2).numpy(), np.transpose(np.tril_indices(15, -1))
    sums = members[:, pairs].sum(2)            # 4000 draws of 105 pairs, each the sum of its members' values
    errors = [analyze.pairs_error(v, pairs) for v in sums[:200]]
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(sums.mean(1).std(), rel=0.15)
    assert analyze.beyond((-0.3, 0.1), -1) and not analyze.beyond((0.15, 0.1))
    noisy = np.arange(50.0) + 20 * normal(50).numpy()
    rho, sd, low, high = analyze.bootstrap(np.arange(50.0), noisy, np.random.default_rng(0))
    assert 0.3 < low < rho < high and 0.02 < sd < 0.3
    x = torch.rand(2, 3, 4, 4) + torch.tensor([0.0, 5, 9]).view(3, 1, 1)
    flat = analyze.less_colour(x).view(2, 3, 16)
    assert gap(flat.mean(2), 0) < 1e-6 and gap(flat.flatten(1).norm(dim=1), 1) < 1e-5      # of each channel


def test_analyze_dip():
    # the dip is not the distance to the nearest unimodal distribution, or its test does not tell
    r = np.random.default_rng(0)
    for v, by_definition in (          # found by bisection: is there a unimodal distribution within d?
            ([0.13, -0.13, 0.64, 0.1, -0.54, 5.36, 6.3, 5.95], 0.156360424),
            ([-0.7, -1.27, -0.62, 0.04, -2.33, -0.22, -1.25, -0.73, -0.54, -0.32], 0.096296296),
            ([0, 1, 2, 10, 11, 12, 13, 30], 0.15), (range(10), 0.05)):         # uniform: 1/(2n)
        assert analyze.dip(np.array(v, float)) == pytest.approx(by_definition, abs=1e-8)
    null = np.quantile([analyze.dip(r.random(200)) for _ in range(200)], 0.95)
    assert analyze.dip(np.concatenate([r.normal(size=100), r.normal(4, 1, 100)])) > null
    assert all(analyze.dip(v) < null for _ in range(10) for v in (r.gamma(0.3, size=200), r.normal(size=200)))


@pytest.mark.parametrize("verdict, value, error, nulls, options", [
    ("holds", 1, 0.1, [[0, 0.1]], {}), ("holds", 1, 0.1, [], {}), ("holds", 1, 0.1, [[math.nan, 0.1]], {}),
    ("fails", -1, 0.1, [[0, 0.1]], {}), ("fails", 1, 0.1, [[0, 0.1]], dict(sign=-1)),
    ("holds", -1, 0.1, [[0, 0.1]], dict(sign=-1)), ("fails", 1, 0.1, [[0, 0.1]], dict(own=False)),
    ("not comparable", 1, 0.1, [[0, 0.1]], dict(own=None)), ("not comparable", math.nan, 0.1, [[0]], {}),
    ("holds", 1, 0.1, [[0, 0.1]], dict(effect=0.9)), ("fails", 1, 0.1, [[0, 0.1]], dict(effect=1.1)),
    ("fails", 1, 0.6, [[0, 0.1]], {}), ("fails", 1, 0.1, [[0, 0.9]], {}),      # within two errors, or spreads
    ("fails", 1, 0.1, [[0.0] * 20 + [1.01]], {}),          # one replicate is ahead
    ("fails", 1, 0.1, [[0, 0.1], [2, 2.1]], {}),           # every null counts
    ("holds", 0.2, 0.01, [[0.5, 0.51]], dict(sign=0)), ("fails", 0.2, 0.01, [[0.2, 0.21]], dict(sign=0))])
def test_analyze_verdicts(tmp_path, verdict, value, error, nulls, options):
    # a claim holds that nothing supports, or does not hold that everything does
    study = study_of(tmp_path, normal(8, 4).abs())
    nulls = dict(zip("ab", nulls))
    claim = lambda **more: study.claim("", "", "", (value, error), "", nulls, **options, **more)
    assert claim()["verdict"] == verdict
    study.alive = dict(why="use 0.01 dB at σ 0.5")
    assert claim()["verdict"] == "not comparable" and claim(on_phi=False)["verdict"] == verdict


@pytest.mark.parametrize("use, cosine, silent, why", [
    (0.2, 0.9, 0, ""), (0.1, 0.98, 1, ""), (0.09, 0.9, 0, "use"), (math.nan, 0.9, 0, "use"),
    (0.2, 0.981, 0, "cosine"), (0.2, math.nan, 0, "cosine"), (0.2, 0.9, 2, "silent")])
def test_analyze_limits_of_a_living_phi(tmp_path, monkeypatch, use, cosine, silent, why):
    # a dead φ is judged, or a living one not
    study = study_of(tmp_path, normal(30, 12).abs(), labels=np.arange(30) % 2)
    del study.alive
    found = dict(use={0.5: use}, cosine=cosine, silent=silent)
    monkeypatch.setattr(analyze, "aliveness", lambda model, x: found)
    assert (why in study.alive["why"]) and bool(study.alive["why"]) == bool(why)
    assert ("NOT alive" in analyze.alive_line(study.alive)) == bool(why)
    assert 0 < study.alive["agreement"] < 1


def test_analyze_nulls(tmp_path):
    # shuffled φ keeps joint structure or changes marginals; the Gaussian has another mean or covariance
    code = normal(2000, 1).abs() * (1 + normal(2000, 3).abs())     # all channels together large or small
    study = study_of(tmp_path, {0.3: code, 0.1: 2 * code})
    shuffled, gaussian = (list(study.replicates(name)) for name in ("shuffled", "Gaussian"))
    assert len(shuffled) == 3 and len(gaussian) == 10 and gap(shuffled[0][0.3], shuffled[1][0.3]) > 0.1
    for replicate in shuffled:
        assert gap(replicate[0.3].sort(0).values, code.sort(0).values) == 0
        assert abs(torch.corrcoef(replicate[0.3].T)[0, 1]) < 0.1 < torch.corrcoef(code.T)[0, 1]
        assert gap(replicate[0.1], 2 * replicate[0.3]) < 1e-6      # alike at all σ
    for twin in (replicate[0.3] for replicate in gaussian[:2]):
        assert gap(torch.cov(twin.T), torch.cov(code.T)) < 0.15 * code.var()
        assert gap(twin.mean(0), code.mean(0)) < 0.1 and abs(analyze.kurtosis(twin) - 3).max() < 0.5


# analyze.py: each analysis of a planted φ, its numbers and verdicts known

def test_analyze_sparsity_of_a_hand_set_network(tmp_path):
    # PR is of the wrong side of a block, or the change has the wrong sign
    model = UNet(width=2, channels=1, levels=2)
    for p in model.parameters():
        nn.init.zeros_(p)                      # every layer then puts out ReLU(its bias), whatever goes in
    model.blocks["E1"][-2].bias.data = torch.tensor([1.0, 0])
    model.blocks["E2"][-2].bias.data = torch.tensor([1.0, 1, 1, 1])
    model.blocks["M"][-2].bias.data = torch.tensor([0, 0, 7.0, 0, 0, 0, 0, 0])
    model.up["D2"].bias.data = torch.tensor([2.0, 2, 2, 2])
    model.blocks["D2"][-2].bias.data = torch.tensor([3.0, 1, 0, 0])
    study = study_of(tmp_path, torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]] * 8), model=model, draws=2)
    out = analyze.sparsity(study)
    for block, before, after in (("E2", 1 / 2, 1), ("M", 1, 1 / 8), ("D2", 12 ** 2 / 8 / 20, 16 / 40)):
        found = [*out["pr_input"][block], *out["pr_output"][block], out["change"][block][0]]
        assert gap(found, [before] * 8 + [after] * 8 + [after - before]) < 1e-6
    assert gap(out["phi_pr"], [1 / 4] * 8) < 1e-6
    assert verdicts(out) == "hhhf"             # φ's PR is in the range, but so it is with shuffled channels
    study.untrained = [model] * 3              # the same network "before training": nothing was learnt
    del study.averages
    assert verdicts(analyze.sparsity(study)) == "ffff"


def test_analyze_stability(tmp_path):
    # M's lead has the wrong sign, a constant counts as stable, or σ beyond training is used
    def powers(own):                           # ā_M: 1, own · mean y, 0.3 mean y² (σ² + mean x²)
        def activations(y):
            power, mean = y.square().mean((1, 2, 3)), y.mean((1, 2, 3))
            M, other = [torch.ones_like(power), own * mean, 0.3 * power], [1 + power, power ** 4]
            return {b: 2 * (torch.stack(v, 1),) for b, v in (("E1", other), ("M", M), ("D1", [power]))}
        return SimpleNamespace(activations=activations)

    black, gray = np.zeros((40, 32, 32, 1), np.uint8), np.linspace(0, 120, 40).astype(np.uint8)
    gray = np.broadcast_to(gray[:, None, None, None], black.shape)
    of = lambda x, own: study_of(tmp_path, normal(40, 3).abs(), x=x, draws=10, model=powers(own))
    out = analyze.stability(of(black, 0))      # black pictures: ā_M is (1, 0, 0.3 σ²), the same for all
    cosine = [(1 + 0.09 * 0.25 * s * s) / math.sqrt((1 + 0.09 / 16) * (1 + 0.09 * s ** 4))
              for s in out["sigma_2"]]
    assert gap(out["mean"]["M"], cosine) < 0.005 and max(out["sigma_2"]) == 1 and min(out["sigma_2"]) == 0
    assert out["next_best"] == "E1" and out["lead"][0] > 0.01 and "D1" not in out["mean"]
    assert abs(out["apart"][0]) < 0.01 and verdicts(out) == "ff"   # stable, but a constant
    study = of(gray, 30)
    assert verdicts(analyze.stability(study))[0] == "h"
    study.untrained, study.averages = [0], study.averages + study.averages[:1] * 3
    assert verdicts(analyze.stability(study))[0] == "f"            # the untrained network is as stable


def test_analyze_selectivity(tmp_path):
    # pictures that do not excite a channel are shown; threshold or direction of PR is wrong
    code = torch.zeros(20, 5)
    code[3, 0], code[[4, 5], 1] = 9, torch.tensor([1.0, 2])        # PR 1/20, 9/(20·5); channel 2 is silent
    code[:, 3], code[:, 4] = 1, 2 - torch.arange(20) / 100
    out = analyze.selectivity(study_of(tmp_path, code))
    assert gap(out["pr"][[0, 1, 3]], [1 / 20, 9 / 100, 1]) < 1e-6
    assert [out[k] for k in ("silent", "specialised", "common")] == [1, 2, 2]
    assert out["shown"][:2] == [0, 1] and out["excited"] == {0: 1, 1: 2, 3: 20, 4: 20}
    assert [out["top"][c].tolist() for c in (0, 1, 4)] == [[3], [5, 4], list(range(9))]    # no ties at zero


@pytest.mark.parametrize("two, verdict", [(True, "h"), (False, "f")])
def test_analyze_bimodality(tmp_path, two, verdict):
    # one broad group of channels counts as two, or two as one
    r = np.random.default_rng(1)
    pr = np.append(r.normal(0.2, 0.03, 60), r.normal(0.7, 0.03, 60)) if two else r.uniform(0.1, 0.9, 120)
    code = torch.from_numpy((np.arange(200)[:, None] < 200 * pr).astype(np.float32))   # PR of a coin: its p
    study = study_of(tmp_path, code + 1e-3 * normal(200, 120).abs(), nulls=random_codes(200, 120))
    assert verdicts(analyze.selectivity(study)) == verdict


def test_analyze_neighbours(tmp_path):
    # the lead of φ over pixels, or nulls, has the wrong sign; subspaces are found in anything
    labels, code = np.arange(120) % 3, 0.01 * normal(120, 12, seed=9).abs()
    for c in range(3):                         # a union of three subspaces of two dimensions each
        code[c::3, 2 * c:2 * c + 2] += 0.5 + normal(40, 2, seed=c).abs()
    of = lambda nulls, labels=None: analyze.neighbours(study_of(tmp_path, code, labels=labels, nulls=nulls))
    out = of(random_codes(), labels)
    assert out["agreement"]["φ"][0] == 1 and out["chance"] == pytest.approx(39 / 119)
    for space in "pixels", "pixels less their mean colour":
        assert abs(out["agreement"][space][0] - 1 / 3) < 0.12
    assert out["subspace_gap"].max() > 0.9 and out["subspace_gap"].mean() > 0.5 and verdicts(out) == "hhh"
    assert verdicts(of([{0.3: code}] * 3, labels)) == "fff"        # the untrained network does as well
    bare = of(random_codes())
    assert verdicts(bare) == "nnh" and "no class labels" in bare["claims"][0]["rule"]
    code = 3 * normal(5, 12, seed=3).abs()[np.arange(120) % 5] + 0.3 * normal(120, 12, seed=4)
    assert verdicts(of(random_codes())) == "nnf"           # five clusters that spread alike in all directions


def test_analyze_clusters(tmp_path, quick):
    # clusters are judged by the wrong ratio, or a start from classes by the classes
    code = (8 * torch.eye(12)[:6]).repeat(20, 1) + normal(120, 12) + 5
    codes = {0.3: code, 0.1: code + 0.1 * normal(120, 12, seed=7)}
    of = lambda codes, **options: analyze.clusters(study_of(tmp_path, codes, nulls=random_codes(), **options))
    out = of(codes, labels=np.arange(120) // 6 % 6, clusters=6)        # classes across all clusters
    assert sorted(out["sizes"]) == [20] * 6 and out["least"] > 4 and out["seeds"] == out["sigma"][0] == 1
    assert out["ratio"][0] == pytest.approx(8 * 2 ** 0.5, 0.15) and out["classes"][0] < 1
    assert verdicts(out)[:3] == "hhh"
    assert out["start"][0] > 0.3 > out["start_classes"] + 0.2          # away from the classes
    out = of(codes, labels=np.arange(120) % 6, clusters=6)             # classes are clusters
    assert out["start_classes"] == 1 and out["classes"][0] > 4 and verdicts(out) == "hfhh"
    assert verdicts(of({0.3: code}, clusters=6)) == "hnnn"
    with pytest.raises(analyze.Skip, match="120 pictures cannot make 90 clusters"):
        of(codes, clusters=90)


def test_analyze_channels(tmp_path, monkeypatch):
    # a property has the wrong sign, tuning is inverted, or kurtosis is of the same half
    pr, on = lambda code: analyze.participation_ratio(code.double(), 0).numpy(), torch.arange(1, 21)
    order = torch.from_numpy(np.random.default_rng(3).permutation(80))
    code = (order[:, None] < 2 * on).float()                           # channel c is 1 for 2 (c + 1) of 80
    best = np.arange(64).reshape(8, 8) < 2 * on[:, None, None].numpy()
    monkeypatch.setattr(analyze, "map_statistics", lambda *_: (pr(code), -pr(code)))
    monkeypatch.setattr(analyze, "tuning", lambda *_: best.astype(float))
    other = code + torch.linspace(2, 0.05, 20) * normal(80, 20)
    out = analyze.channels(study_of(tmp_path, {0.3: code, 0.1: other}))
    share = code[1::2].double().mean(0).numpy()
    assert gap(out["pr"], pr(code[::2])) < 1e-9 and gap(out["tuning"], 2 * on / 64) < 1e-9
    kurtosis = ((1 - share) ** 3 + share ** 3) / (share * (1 - share))             # of a coin
    assert np.nanmax(abs(out["kurtosis"] - kurtosis)) < 1e-6
    rho = {name: v[0] for name, v in out["rank_correlation"].items()}
    assert rho["spatial_pr"] > 0.95 and rho["pca_dimension"] < -0.95 and rho["stability"] > 0.8
    assert rho["kurtosis"] < -0.8 and verdicts(out) == "hfhfhh"        # a coin is far from Gaussian
    near, contrast = analyze.tails(np.linspace(0, 1, 10), np.array([9.0, 8, 7, 9, 8, 3.5, 2.5, 3.2, 3, 3]))
    assert near == pytest.approx(0.2) and contrast == pytest.approx(5 - 0.2)


def test_analyze_tuning_after_the_gray_field(monkeypatch, tmp_path):
    # a channel that answers to gray as to any grating counts as broadly tuned
    contrast = lambda model, x, *_: 5 + x.flatten(1).std(1)[:, None] * torch.tensor([0.0, 1])
    monkeypatch.setattr(analyze, "phi", contrast)
    found = analyze.tuning(study_of(tmp_path, normal(8, 2).abs()), SimpleNamespace(channels=1))
    assert found.shape == (2, 8, 8) and abs(found[0]).max() < 1e-6 and found[1].min() > 0.2
    bank = analyze.gratings(16, 3, [2, 3], [0, math.pi / 2], phases=2)
    assert bank.shape == (2, 2, 2, 3, 16, 16) and 0 <= bank.min() and bank.max() <= 1
    for (f, cycles), turned in itertools.product(enumerate((2, 3)), (0, 1)):
        spectrum = torch.fft.fft2(bank[f, turned, 0, 0] - 0.5).abs()[:9, :9]
        assert divmod(int(spectrum.argmax()), 9) == ((cycles, 0) if turned else (0, cycles))


@pytest.mark.parametrize("law, expected", [
    (lambda d: 3 * d, "hh"), (lambda d: 1 / d, "ff"), (lambda d: 3 * d ** 4, "hf")])
def test_analyze_embedding(tmp_path, monkeypatch, law, expected):
    # the rank correlation, or B/A, is of other pairs, inverted, or of φ₁ + φ₂
    code = normal(60, 3).abs() * torch.linspace(0.2, 3, 60)[:, None]
    study = study_of(tmp_path, code, nulls=random_codes(60, 3), pairs=30)
    row = {study.pictures([i]).numpy().tobytes(): i for i in range(60)}

    def distance(model, x1, x2, sigmas, draws, *_, **options):
        assert draws >= 8 and min(sigmas) == pytest.approx(0.2) and max(sigmas) == pytest.approx(1)
        i, j = (row[x[None].numpy().tobytes()] for x in (x1, x2))
        d2 = law(float((code[i] - code[j]).square().sum()))
        return d2, 0.1 * d2, torch.ones(5), torch.ones(5)
    monkeypatch.setattr(analyze, "conditional_distance", distance)
    monkeypatch.setattr(analyze, "draw_scores", lambda *_: None)
    out = analyze.embedding(study)
    assert verdicts(out) == expected and out["percentiles"] <= out["B_over_A"] + 1e-9
    assert (out["B_over_A"] < 1.001) == (expected == "hh")


@pytest.mark.parametrize("share, step, expected", [
    (1.0, 1.0, "nh"), (1.03, 1.5, "hh"), (1.2, 1.5, "fh"), (0.8, 1.5, "fh"), (1.03, 1.5, "hf")])
def test_analyze_matching(tmp_path, monkeypatch, share, step, expected):
    # the ratio is inverted or one-sided; samples are compared with other targets than their own
    before, level = np.full((6, 12), 0.5), torch.full((12,), 0.5)
    monkeypatch.setattr(analyze, "match_noisy", lambda study, x, sigmas: np.array(
        [before, share * before, step * before])[:, :len(sigmas)])

    def algorithm_1(study, model, x, *_):
        told = not isinstance(model, SimpleNamespace) and expected[1] == "h"
        noise = [normal(1, *v.shape, seed=k) for k, v in enumerate(x)]
        return [v[None] + 0.3 * z if told else z for v, z in zip(x, noise)], [
            dict(sigma=0.5, sigma_before=level, sigma_after=level)]
    monkeypatch.setattr(analyze, "algorithm_1", algorithm_1)
    networks = dict(model=UNet(2, 1, 1), untrained=[UNet(2, 1, 1)] * 3)
    out = analyze.matching(study_of(tmp_path, normal(12, 4).abs(), **networks))
    assert verdicts(out) == expected
    if expected[1] == "h":
        assert out["layout"].mean() > 0.4 and abs(np.mean(out["layout_untrained"])) < 0.2


@pytest.mark.parametrize("held_out, verdict", [(0.0, "h"), (0.3, "f"), (-0.3, "f"), (None, "n")])
def test_analyze_denoising(tmp_path, monkeypatch, held_out, verdict):
    # training pictures stand for held-out ones, or a large error for agreement
    noise = iter(np.random.default_rng(0).normal(0, 0.01, 100))
    monkeypatch.setattr(analyze, "evaluate", lambda model, x, micro_batch, sigma_max: {
        s: 20 + s + next(noise) + (held_out or 0) * (x.mean().item() > 0.5) for s in (0.1, 0.5)})
    dark, bright = (np.full((16, 8, 8, 1), v, np.uint8) for v in (20, 230))
    sides = dict(training=dark, held_out=bright) if held_out is not None else {}
    out = analyze.denoising(study_of(tmp_path, normal(20, 4).abs(), **sides))
    assert verdicts(out) == verdict and out["claims"][0]["on_phi"] is False
    assert out["input_psnr"] == pytest.approx([20, -20 * math.log10(0.5)])
    if sides:
        assert out["gap"][0][0] == pytest.approx(-held_out, abs=0.02)
        assert out["output_psnr"]["held out"][1][0] == pytest.approx(20.5 + held_out, abs=0.02)


def test_analyze_streamed_phi(tmp_path, monkeypatch):
    # φ depends on the number of processes, or on what was computed before
    torch.manual_seed(0)
    model, n = UNet(width=2, channels=1, levels=1), 2 * analyze.BATCH + 6
    study, parts = study_of(tmp_path, normal(n, 4).abs()), []
    one, two = analyze.compute_phi([model, model], study.x, [[0.3, 0.0], [0.3]], 3, 0, "cpu")
    assert list(one) == [0.3, 0.0] and list(two) == [0.3] and gap(one[0.3], two[0.3]) == 0
    for a in range(0, n, analyze.BATCH):
        batch = train.to_batch(study.x[a:a + analyze.BATCH], "cpu")
        alone = phi(model, batch, 0.3, 3, train.seeded("cpu", 0, 5, 300_000, a))
        assert gap(one[0.3][a:a + analyze.BATCH], alone) < 1e-6
    for rank in 0, 1:                          # as torchrun would, without its processes
        monkeypatch.setattr(analyze, "dist", SimpleNamespace(is_initialized=lambda: True, reduce=lambda *_: 0,
                                                             get_rank=lambda: rank, get_world_size=lambda: 2))
        parts.append(analyze.compute_phi([model], study.x, [[0.3]], 3, 0, "cpu")[0][0.3])
    assert gap(parts[0] + parts[1], one[0.3]) == 0
    assert all((v == 0).all(1).sum() >= analyze.BATCH for v in parts)


def test_analyze_map_statistics(tmp_path):
    # running sums over batches differ from the same of all maps at once
    torch.manual_seed(0)
    model, n = UNet(width=2, channels=1, levels=1), analyze.BATCH + 6
    study, maps = study_of(tmp_path, normal(n, 4).abs(), draws=3), []
    for a in 0, analyze.BATCH:                 # all of them at once, with the same noise
        batch, generator = study.pictures(np.arange(n)[a:a + analyze.BATCH]), study.noise(20, a)
        noisy = [batch + 0.3 * torch.randn(batch.shape, generator=generator) for _ in range(3)]
        maps.append(torch.stack([model.encode(y)[0].detach() for y in noisy]).mean(0))
    spatial, dimension = analyze.map_statistics(study, model, np.arange(n))
    for v, found, d in zip(torch.cat(maps).double().flatten(2).unbind(1), spatial, dimension):     # (n, hw)
        size, pr = v.mean(1), analyze.participation_ratio(v).nan_to_num()
        eigenvalues = torch.linalg.eigvalsh(torch.cov(v.T, correction=0))
        assert abs(found - (size * pr).sum() / size.sum()) < 1e-6
        assert abs(d - eigenvalues.sum() ** 2 / eigenvalues.square().sum()) < 1e-6


# analyze.py: the command line

STUDY = "--draws 2 --steps 3 --pairs 5 --device cpu"


@pytest.fixture
def flags(shelf):
    """Flags of analyze.py, with all pictures."""
    return SimpleNamespace(data=str(shelf / "data"), seed=0, images=60, draws=2, clusters=6, pairs=8, steps=3,
                           pictures=None, sigma=[0.3, 0.1, 0.3])


def test_analyze_pictures_are_held_out(shelf, flags):
    # training pictures are analysed as held-out ones, or the two sides of `denoising` are swapped
    model, checkpoint = load_checkpoint(shelf / "c.pt")
    pictures, rows, held_out = train.training_data(checkpoint["flags"])
    inside = lambda x, i: {v.tobytes() for v in x} <= {v.tobytes() for v in pictures.x[i]}
    for data, n, where in ((None, 32, "held out"), (flags.data, 60, "training and held-out"),
                           (f"{flags.data}/a", 40, "other pictures")):
        flags.data = data
        study, key, paths, found = analyze.prepare(flags, "c.pt", model, checkpoint, "cpu")
        assert (len(study.x), found, key["sigmas"]) == (n, where, [0.3, 0.1])
        if where != "other pictures":
            assert inside(study.training, rows) and inside(study.held_out, held_out)
        if where == "held out":
            assert inside(study.x, held_out)
            assert [pictures.labels[pictures.paths.index(p)] for p in paths] == list(study.labels)


def test_analyze_command_line(cli, tmp_path, monkeypatch, quick):
    # a figure, the page or a number is missing; an untrained network confirms the paper
    line = f"analyze.py c.pt {STUDY} --out {tmp_path} --data data --clusters 4"
    code, text = cli(line)
    assert code == 0 and text.startswith("φ is NOT alive, by use 0.00 dB") and "class agreement" in text
    record, page = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "index.html").read_text()
    figures = {name for f in analyze.ANALYSES.values() for name in f.figures} - {"regularity"}
    assert {p.stem for p in tmp_path.glob("*.png")} == set(record["captions"]) == figures
    assert [name for name, v in record["analyses"].items() if "skipped" in v] == ["regularity"]
    claims = [c for v in record["analyses"].values() for c in v.get("claims", [])]
    assert claims and all(c["verdict"] == "not comparable" for c in claims if c["on_phi"])
    assert all(f"<b>{name}.</b>" in page for name in figures) and page.count("<tr>") == len(claims)
    assert page.count("data:image/png;base64,") == len(figures) and "http" not in page
    with np.load(tmp_path / "phi.npz") as file:
        assert [file[k].shape for k in ("phi", "other_phi", "untrained", "paths")] == [
            (80, 8), (1, 80, 8), (3, 2, 80, 8), (80,)] and set(file["labels"]) == {0, 1}
    assert cli(f"kmeans.py {tmp_path}/phi.npz --K 3 --out {tmp_path}/k.npz")[0] == 0           # its readers
    assert cli(f"sample.py c.pt --cluster {tmp_path}/k.npz:1 {FAST} --out {tmp_path}/s.png")[0] == 0

    # a rerun of one analysis: its claims alone are printed, φ is not computed again, the rest is kept
    monkeypatch.setattr(analyze, "compute_phi", None)
    (tmp_path / "stability.png").write_bytes(b"kept")
    (tmp_path / "matching.png").unlink()       # nor can the page show what is gone
    code, text = cli(f"{line} --only sparsity")
    assert code == 0 and "PR falls" in text and "clusters" not in text
    again = json.loads((tmp_path / "results.json").read_text())["analyses"]
    assert set(again) == set(record["analyses"]) and again["sparsity"] == record["analyses"]["sparsity"]
    assert (tmp_path / "stability.png").read_bytes() == b"kept"
    assert "exists: --force" in cli(f"{line} --seed 1")[1]         # other settings


def test_rank_without_torchrun(cli, tmp_path, monkeypatch):
    # a variable left over from another program gives a traceback, or silences a script
    for rank in "", "1":
        monkeypatch.setenv("RANK", rank)
        for line in "analyze.py c.pt", "train.py --data data":
            code, text = cli(f"{line} --out {tmp_path}/new.pt --device cpu")
            assert code == 2 and "start with torchrun" in text and not list(tmp_path.glob("new*"))
        assert "wrote" in cli(f"kmeans.py x.npy --K 3 --out {tmp_path}/{rank}k.npz --device cpu")[1]


def test_analyze_several_networks_and_corners(cli, tmp_path, quick):
    # mean and spread over networks are of other claims, or replace another summary; a small σ_max, no classes
    # or an analysis that was left out crash it
    read = lambda name: json.loads((tmp_path / name).read_text())
    code, text = cli(f"analyze.py c.pt b.pt {STUDY} --out {tmp_path} --data data/a "
                     "--only sparsity selectivity neighbours")
    assert code == 0 and "2 networks: c, b" in text and (tmp_path / "emergence.png").exists()
    results, row = [read(f"{v}/results.json") for v in "cb"], read("networks.json")["claims"][0]
    values = [v["analyses"]["sparsity"]["claims"][0]["value"] for v in results]
    assert [row["value"], row["error"]] == pytest.approx([np.mean(values), np.std(values, ddof=1)], rel=1e-4)
    assert row["verdict"] == "not comparable in 2"
    results[0]["analyses"]["selectivity"] = dict(skipped="alike")
    assert analyze.draw_emergence(results) is None and analyze.draw_emergence(results[1:] * 2) is None
    assert "networks.json exists: --force" in cli(f"analyze.py b.pt c.pt {STUDY} --out {tmp_path}")[1]
    code, text = cli(f"analyze.py low.pt {STUDY} --out {tmp_path}/low --sigma 0.005 --data data/a "
                     "--pictures data/a/00.png --clusters 39 --only attributes stability clusters denoising")
    found = read("low/results.json")["analyses"]
    assert code == 0 and "40 pictures cannot make 39 clusters" in found["clusters"]["skipped"]
    assert found["denoising"]["sigmas"] == [0.01] and found["stability"]["sigma_2"] == [0, 0.01]
    assert found["attributes"]["pictures"][0]["name"] == "00.png"


def test_analyze_structureless_phi_through_the_whole_pipeline(shelf, flags, monkeypatch, quick, tmp_path):
    # independent random rows with random labels confirm a claim about φ
    model, checkpoint = load_checkpoint(shelf / "c.pt")
    study, r = analyze.prepare(flags, "c.pt", model, checkpoint, "cpu")[0], np.random.default_rng(0)
    study.alive, study.out, study.labels = dict(why="", untrained=[]), str(tmp_path), r.integers(0, 4, 60)
    study.phi = {s: torch.from_numpy(r.gamma(0.4, size=(60, 8))).float() for s in (0.3, 0.1)}
    study.untrained = analyze.untrained_networks(study)
    study.untrained_phi = analyze.compute_phi(study.untrained, study.x, 3 * [[0.3, 0.1]], 2, 0, "cpu")
    on_phi = analyze.ANALYSES.keys() - {"reconstruction", "denoising", "harmonics", "regularity"}
    claims = [c for name in on_phi
              for c in analyze.ANALYSES[name](study).get("claims", [])]
    assert claims and not [c["claim"] for c in claims if c["on_phi"] and c["verdict"] == "holds"]


# All scripts: what cannot run

TINY = "train.py --data tiny.npy --size 8 --width 2 --device cpu --pictures 12"


@pytest.mark.parametrize("row", f"""\
nowhere: no such file | train.py --data nowhere
looked for a folder | train.py --data sub | train.py --data c.pt
only one distinct | train.py --data single.npy --size 8
must be uint8 | train.py --data float.npy
not a whole | train.py --data pickle.npy | train.py --data cut.npy | train.py --data crc.npz
labels must be 20 integers | train.py --data labels.npz --size 8
multiple of 2 | train.py --data good.npz --size 9 --levels 1
unrecognized | {TINY} --widht 3 | kmeans.py x.npy --clustres 3 | sample.py c.pt --stpes 3
invalid integer | {TINY} --batch two | kmeans.py x.npy --K 2.5
invalid choice | {TINY} --channels 2 | analyze.py c.pt --only sparse
not available | {TINY} --device meta | kmeans.py x.npy --device meta | sample.py c.pt --device meta
must end in .p | {TINY} --out x.png | sample.py c.pt --out x.jpg | sample.py c.pt --out=
there is no folder | {TINY} --out no/a.pt | kmeans.py x.npy --out no/c.npz | sample.py c.pt --out no/x.png
--resume goes on with it | {TINY} --out c.pt
exists | {TINY} --out exists.pt | kmeans.py x.npy --out there.npz | sample.py c.pt --out exists.PNG
stability.png exists: --force | analyze.py c.pt --out foreign
weights only | train.py --resume --out shipped.pt
contradicts | train.py --resume --out c.pt --width 3 | train.py --resume --out c.pt --pictures 8
not the pictures | train.py --resume --out moved.pt | train.py --resume --out c.pt --data good.npz
not a checkpoint | train.py --resume --out cut.pt | sample.py cut.pt | analyze.py cut.pt
not finite | sample.py nan.pt | sample.py huge.pt dark.png --steps 2 | analyze.py nan.pt
--batch: 0: must be at least 1 | {TINY} --batch 0
must be above 0 | {TINY} --epochs nan | {TINY} --minutes -1 | kmeans.py x.npy --tol nan
No such file | kmeans.py no.npy
not a whole .npy | kmeans.py cut.npy | kmeans.py text.png | kmeans.py k.npz
allow_pickle=False | kmeans.py pickle.npz
not real numbers | kmeans.py words.npy
x has shape (40, 8, 8) | kmeans.py tiny.npy
NaN or infinite values, first in row 0 | kmeans.py nan.npy
20 points cannot make 100 clusters | kmeans.py x.npy --K 100
not the file of the points | kmeans.py phi.npz --out link.npz --force
is also to be read | sample.py c.pt --out dark.png dark.png --force
--save-each data: is not empty | sample.py c.pt --save-each data dark.png
holds --out or what is to be read | sample.py c.pt --save-each . dark.png --force
whose pictures its .png would join | {TINY} --data data --out data/a.pt | {TINY} --data . --out a.pt
cannot be read | sample.py c.pt none.png | sample.py c.pt text.png | sample.py c.pt --mix dark.png half.png
as many numbers, and not of sum 0 | sample.py c.pt --mix a b --weights 1 -1
or one of | sample.py c.pt dark.png --mix light.png | sample.py c.pt dark.png --unconditional 3
--steps has no meaning with | sample.py c.pt --denoise a --steps 7
not among | sample.py c.pt --cluster gone.npz:0
no such cluster | sample.py c.pt --cluster k.npz:2
must be below | sample.py c.pt dark.png --sigma-min 2
nowhere | analyze.py c.pt --data nowhere
have changed | analyze.py moved.pt
2 pictures are too few | analyze.py c.pt --data few
is a file, must be a folder | analyze.py c.pt --out text.png
networks of one kind | analyze.py c.pt low.pt
different names | analyze.py c.pt sub/c.pt""".split("\n"))
def test_refused_command_lines(cli, shelf, row):
    # a bad flag or file gives a traceback, more than a line, runs all the same, or loses or leaves a file
    message, *lines = row.split(" | ")
    files = lambda: {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
    for line in lines:
        before, (code, text) = files(), cli(line + " --device cpu" * ("--dev" not in line))
        assert code == 2 and message in text and text.count("\n") == 1 and files() == before, (line, text)


# README.md

TEXTS = "\n".join(file.read_text("utf-8") for file in [HERE / "README.md", *HERE.glob("*.py")])


@pytest.mark.parametrize("line", sorted(set(
    re.findall(r"^    (?:python|torchrun \S+) (\w+\.py.*?)(?: +#.*)?$", TEXTS, re.M))))
def test_commands_that_we_print(line, tmp_path, monkeypatch):
    # a command of README.md, or of a script's description, is refused
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    assert globals()[line.split(".py")[0]].arguments()


def test_python_of_the_readme(shelf, tmp_path, monkeypatch):
    # the README's Python does not run, or gives another φ
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").write_bytes((shelf / "c.pt").read_bytes())
    Image.open(shelf / "odd.png").save("cat.jpg")
    found = {}
    exec(re.search(r"```python\n(.*?)```", TEXTS, re.S)[1], found)
    assert found["code"].shape == (1, 8)


# analyze.py: paper B

@pytest.mark.parametrize("full", [64, 1])
def test_jacobian_basis_by_finite_differences(full):
    # eigenvalues, eigenvectors, b, trace or asymmetry of the Jacobian are wrong, by either route
    torch.manual_seed(0)
    network, y = UNet(4, 1, 1).double(), normal(1, 8, 8).double()
    model = SimpleNamespace(denoise=lambda y: y + network.denoise(y))          # a trace far from 0
    f = lambda v: model.denoise(v.view(1, 1, 8, 8)).flatten().detach()
    J = torch.stack([(f(y.flatten() + e) - f(y.flatten() - e)) / 2e-6 for e in 1e-6 * torch.eye(64)], 1)
    values, vectors = (v.flip(-1) for v in torch.linalg.eigh((J + J.T) / 2))
    found = analyze.jacobian_basis(model, y, k=8, full=full, generator=torch.Generator().manual_seed(0))
    assert len(found["values"]) == (64 if full > 1 else 8) and gap(found["values"][:8], values[:8]) < 1e-6
    assert gap((found["vectors"][:, :8] * vectors[:, :8]).sum(0).abs(), torch.ones(8)) < 1e-6
    rough = 1e-6 if full > 1 else 0.1          # 32 random vectors
    assert found["trace"] == pytest.approx(float(J.trace()), rel=rough)
    assert found["asymmetry"] == pytest.approx(float((J - J.T).norm() / J.norm()), rel=rough)
    assert found["bias"] == pytest.approx(float((f(y) - J @ y.flatten()).norm() / f(y).norm()), rel=1e-6)


def test_sure_is_unbiased():
    # SURE is not, in the mean, the squared error that it estimates without x
    A, x, z, sigma = 0.2 * normal(16, 16) + 0.5 * torch.eye(16), torch.rand(16), normal(4000, 16, seed=3), 0.5
    y = x + sigma * z
    x_hat = y @ A.T + 0.3
    estimates = np.array([analyze.sure(a, b, float(A.trace()), sigma) for a, b in zip(y, x_hat)])
    error = estimates.std() / math.sqrt(4000)
    assert abs(estimates.mean() - (x_hat - x).square().sum(1).mean().item()) < 4 * error
    assert estimates.mean() > 8 * error


def test_posterior_mean_against_brute_force():
    # the closed form of memorisation is not the training pictures' mean, weighted by their likelihood
    x, y = torch.rand(5, 1, 2, 3), torch.rand(4, 1, 2, 3)
    for sigma in 0.01, 0.3, 3:
        for i, found in enumerate(analyze.posterior_mean(y, sigma, x)):
            log = [-sum((a - b) ** 2 for a, b in zip(y[i].flatten().tolist(), v.flatten().tolist()))
                   / (2 * sigma ** 2) for v in x]
            weights = [math.exp(v - max(log)) for v in log]
            assert gap(found, sum(w * v for w, v in zip(weights, x)) / sum(weights)) < 1e-6


def test_wiener_filter():
    # the linear null is not m + C(C + σ²)⁻¹(y − m), or not with its eigenvectors
    x, y, sigma = torch.rand(30, 1, 3, 3), torch.rand(4, 1, 3, 3), 0.2
    flat = x.flatten(1).double().numpy()
    mean, C = flat.mean(0), np.cov(flat.T, bias=True)
    J = C @ np.linalg.inv(C + sigma ** 2 * np.eye(9))
    denoise, values, vectors = analyze.wiener(x)
    assert gap(denoise(y, sigma).flatten(1), mean + (y.flatten(1).numpy() - mean) @ J.T) < 1e-5
    assert gap(vectors * values(sigma) @ vectors.T, J) < 1e-5 and (values(sigma).diff() <= 0).all()


def test_slope_and_psnr_curve():
    # no denoising has no slope of 1, a constant none of 0, or PSNR is not −10 log₁₀ of the squared error
    x = torch.rand(64, 1, 16, 16)
    curve = analyze.psnr_curve(lambda y, sigma: y, x, analyze.FIT)
    assert gap(curve, range(0, 21, 2)) < 0.1 and analyze.slope(curve) == pytest.approx(1, abs=0.01)
    constant = analyze.psnr_curve(lambda y, sigma: torch.full_like(y, 0.5), x, analyze.FIT)
    assert abs(analyze.slope(constant)) < 1e-6 and constant[0] == pytest.approx(10 * math.log10(12), abs=0.1)
    assert gap(analyze.psnr_curve(lambda y, sigma: x[:len(y)], x, [0.1]), 100) == 0
    assert gap(analyze.slope(np.array([0.5 * curve, 2 + curve])), [0.5, 1]) < 0.01


def test_regularity(tmp_path):
    # the optimum is not A/(A + 1), or the order of the slopes is another one
    x, found = array(5, 40, 8, 8, 1), []
    for alpha, kept in (1, 0), (2, 0.6), (5, 1):           # denoisers of slope 0, between, and 1
        model = SimpleNamespace(channels=1, denoise=lambda y: 0.5 + kept * (y - 0.5))
        checkpoint = dict(sigma_max=1.0, flags=dict(data=f"calpha:{alpha}"))
        study = analyze.Study(model, checkpoint, x, training=x, held_out=x, out=tmp_path)
        found.append(analyze.regularity(study))
    assert [v["optimum"] for v in found] == pytest.approx([1 / 2, 2 / 3, 5 / 6])
    assert [v["slope"][0] for v in found[::2]] == pytest.approx([0, 1], abs=0.01)
    order = lambda: analyze.claim_on_slopes(found)
    assert order()["verdict"] == "holds" and verdicts(found[0]) + verdicts(found[2]) == "nf"
    found[0]["slope"], found[2]["slope"] = found[2]["slope"], found[0]["slope"]
    assert order()["verdict"] == "fails"


def test_disc_tangents():
    # a disc moved, grown or dimmed a little leaves what should be the tangent space
    place = np.array([0.45, 0.55, 0.2, 0.2, 0.8])
    x, basis = analyze.disc_tangents(16, place)
    assert gap(basis.T @ basis, torch.eye(5)) < 1e-5
    for seed in range(5):
        step = 1e-3 * np.random.default_rng(seed).standard_normal(5)
        moved = torch.from_numpy(train.draw_disc(16, *(place + step))).float().flatten() - x.flatten()
        assert (moved - basis @ (basis.T @ moved)).norm() < 0.03 * moved.norm()
    assert gap(x, train.draw_disc(16, *place)) < 1e-6


def copier(x):
    """A network that has memorised: it answers with the nearest of its training pictures x."""
    denoise = lambda y: x[torch.cdist(y.flatten(1), x.flatten(1)).argmin(1)]
    return SimpleNamespace(denoise=denoise, score=lambda y: denoise(y) - y)


def test_generalisation_of_copies_and_of_networks_that_agree(tmp_path, monkeypatch):
    # copies are not seen to be copies, or two networks that draw the same new pictures pass for copies
    monkeypatch.setattr(analyze, "phi", lambda model, x, *rest: x.flatten(1))
    x = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    held, new = train.to_uint8(x[70:].permute(0, 2, 3, 1).numpy()), copier(x[70:])
    study = analyze.Study(new, dict(sigma_max=1.0, mean=[0.5]), held, out=str(tmp_path))
    copies = [[(copier(a), a), (copier(b), b)] for a, b in ((x[:1], x[1:2]), (x[2:7], x[7:10]))]
    found = analyze.generalisation(study, copies)
    one = found["pairs"][0]["psnr"]
    assert gap(one["training"], one["exact, training"]) < 1e-3
    for v in found["pairs"]:
        assert v["psnr"]["training"][0] == 100
        assert gap(v["psnr"]["held out"][:2], v["psnr"]["exact, held out"][:2]) < 1
        assert v["pixels"]["nearest"].min() > 0.999 and v["pixels"]["held_out"].max() < 0.95
    assert verdicts(found) == "hfff" and (tmp_path / "originals.png").exists()
    agreeing = [(new, x[10:40]), (new, x[40:70])]
    assert verdicts(analyze.generalisation(study, [copies[0], agreeing])) == "hhhh"
    assert verdicts(analyze.generalisation(study, [agreeing])) == "fhhh"


def test_versus_and_harmonics_from_the_command_line(shelf, cli, tmp_path, monkeypatch):
    # pairs whose training sets overlap are compared; or the analyses of paper B do not run at all
    flags = dict(train.COMMON, data=str(shelf / "data"), size=8, width=4, levels=1, batch=8, val=0.4,
                 pictures=16)
    for name, changes in dict(
            first=dict(subset="first"), second=dict(subset="second"), less=dict(subset="first", limit=4),
            more=dict(subset="second", limit=4), disc=dict(data="disc", channels=1, val=0.01)).items():
        train.train({**flags, **changes}, str(tmp_path / f"{name}.pt"))
    a, b, out = tmp_path / "first.pt", tmp_path / "second.pt", tmp_path / "out"
    monkeypatch.setattr(analyze, "sample_unconditional", lambda model, mean, shape, generators, *rest: (
        torch.stack([torch.rand(shape, generator=g) for g in generators]), None))
    code, text = cli(f"analyze.py {a} {tmp_path}/less.pt --versus {b} {tmp_path}/more.pt --out {out}")
    numbers = json.loads((out / "results.json").read_text())["analyses"]["generalisation"]["pairs"]
    assert code == 0 and [v["N"] for v in numbers] == [4, 24]
    assert "originals" in (out / "index.html").read_text()
    assert cli(f"analyze.py {a} --versus {b} --out {out}")[0] == 2
    for line, message in ((f"{a} --versus {tmp_path}/less.pt", "overlap"),
                          (f"{a} {b} --versus {a}", "needs 2"),
                          (f"{a} --versus {tmp_path}/disc.pt", "another kind")):
        code, text = cli(f"analyze.py {line} --out {tmp_path}/none")
        assert code == 2 and message in text and not (tmp_path / "none").exists()
    code, text = cli(f"analyze.py {tmp_path}/disc.pt --only harmonics regularity --draws 1 --images 40 "
                     f"--out {tmp_path}/disc")
    found = json.loads((tmp_path / "disc" / "results.json").read_text())["analyses"]
    assert code == 0 and found["regularity"]["optimum"] == 1 and len(found["regularity"]["eigenvalues"]) == 12
    assert len(found["harmonics"]["effective_rank"]) == 4 and (tmp_path / "disc" / "harmonics.png").exists()


# assets

@pytest.mark.parametrize("name, code_sum, largest, psnr", [
    ("textures", 26.2552, 2.2962, 18.612), ("photos", 22.9689, 1.8278, 21.561),
    ("faces", 30.4214, 1.6298, 19.159)])
def test_golden_weights(name, code_sum, largest, psnr):
    # shipped weights, φ or the network are not what they were when the README's numbers were measured
    model, checkpoint = load_checkpoint(HERE / "assets" / f"{name}.pt")
    x = train.to_batch(train.builtin_pictures(15, 32, model.channels, seed=1)[0], "cpu")
    code = phi(model, x, 0.3, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (model(x + 0.2 * normal(*x.shape, seed=1)) - x).square().mean()
    assert gap(code.sum(1).mean(), code_sum) < 1e-2 and gap(code[0].max(), largest) < 1e-3
    assert gap(-10 * error.log10(), psnr) < 5e-3
    assert "optimizer" not in checkpoint and checkpoint["flags"]["data"] == name
