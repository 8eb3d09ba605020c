"""Tests: python -m pytest test_all.py (offline, CPU, no data needed).

They stand in the order of the files; the first line of a test says what is true. Oracles are independent:
closed forms, brute force, finite differences, or the same thing computed plainly.
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
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import unet
from unet import UNet, UserError, load_checkpoint, phi, receptive_field
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import analyze
import kmeans
import sample
import train
from kmeans import KMeans

HERE = Path(__file__).parent
SCRIPTS = {"train.py": train, "sample.py": sample, "kmeans.py": kmeans, "analyze.py": analyze}
torch.set_num_threads(1)  # as in `python` below: sums are rounded by their number


def gap(a, b):
    """Maximum absolute difference."""
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def normal(*shape, seed=0):
    """Standard normal numbers of this shape, from their own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(seed, *shape):
    """Random uint8 of this shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save_picture(path, x):
    """Write x (H, W, C) or (H, W) as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


def python(*words):
    """Run `python …` in the repository's folder: (exit code, standard error)."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr


def settings_for(data, **changes):
    """The settings of a tiny run on `data`."""
    tiny = dict(
        data=str(data),
        size=8,
        width=4,
        levels=1,
        batch=8,
        val=0.4,
        pictures=16,
        precision="fp32",
    )
    return {**train.COMMON, **tiny, **changes}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """The folder in which all command lines run: 80 pictures of two classes, a checkpoint, odd files."""
    folder = tmp_path_factory.mktemp("shelf")
    for i in range(80):  # class b has a stronger contrast
        noise = np.random.default_rng(i).normal(128, 20 + 60 * (i % 2), (8, 8, 3))
        save_picture(
            folder / "data" / "ab"[i % 2] / f"{i:02d}.png", noise.clip(0, 255).astype(np.uint8)
        )
    train.train(settings_for(folder / "data"), str(folder / "c.pt"))
    (folder / "text.png").write_text("mine")
    (folder / "cut.pt").write_bytes((folder / "c.pt").read_bytes()[:3000])
    os.mkfifo(folder / "fifo.png")
    save_picture(folder / "dark.png", np.full((16, 16, 3), 40, np.uint8))
    save_picture(folder / "light.png", np.full((16, 16, 3), 215, np.uint8))
    save_picture(folder / "odd.png", array(0, 37, 23, 3))
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    np.save(folder / "tiny.npy", array(0, 40, 8, 8))
    np.save(folder / "float.npy", np.zeros((20, 8, 8, 3)))
    np.save(folder / "single.npy", array(1, 1, 8, 8, 3).repeat(4, axis=0))
    paths = np.array([str(folder / "data" / "ab"[i % 2] / f"{i:02d}.png") for i in range(4)])
    np.savez(folder / "k.npz", labels=np.array([0, 1, 1, 0]), paths=paths)
    np.savez(folder / "words.npz", data=array(0, 20, 8, 8, 3), labels=np.array(["a"] * 20))
    return folder


@pytest.fixture
def cli(shelf, monkeypatch, capsys):
    """cli("train.py --size 8"): (exit code, what the user sees), in this process, in the folder `shelf`."""

    def call(line, folder=shelf):
        words = shlex.split(line)
        handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            unet.run(SCRIPTS[words[0]].main)
        for number, handler in handlers.items():  # train.py sets its own
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        code = ended.value.code or 0
        return code, (err if code == 2 else out)

    return call


# unet.py


@pytest.mark.parametrize("levels, side", [(1, 18), (2, 40), (3, 84), (4, 172)])
def test_receptive_field_from_gradients(levels, side, monkeypatch):
    # one value of M has a gradient in exactly as many pixels
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, a: a)  # it mixes all places
    model = UNet(1, 1, levels).double()
    for p in model.parameters():
        p.data.abs_()  # no path is cut by a ReLU
    n = 2**levels * (side // 2**levels + 3)
    y = torch.rand(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    maps, _ = model.encode(y)
    maps[0, 0, maps.shape[2] // 2, maps.shape[3] // 2].backward()
    rows, columns = y.grad[0, 0].nonzero(as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side
    assert receptive_field(levels) == side


def independent_forward(model, y):
    """The network of App. A.1 from its weights, with torch.layer_norm over (C, H, W): x̂, M's maps."""
    weights = model.state_dict()

    def parameters(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def block(name, a, layers, without_norm=None, bare=None):
        numbers = sorted(
            {int(key.split(".")[2]) for key in weights if key.startswith(f"blocks.{name}.")}
        )
        names = iter([f"blocks.{name}.{number}" for number in numbers])
        for i in range(layers):
            a = F.conv2d(F.pad(a, (1, 1, 1, 1)), *parameters(next(names)))
            if i == bare:
                return a
            if i != without_norm:
                scale, shift = parameters(next(names))
                a = F.layer_norm(a, a.shape[1:]) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
            a = a.clamp(min=0)
        return a

    def up(name, a):
        weight, bias = parameters(f"up.{name}")
        a_up = torch.einsum("nchw,cdij->ndhiwj", a, weight)
        return a_up.reshape(len(a), -1, 2 * a.shape[2], 2 * a.shape[3]) + bias.view(-1, 1, 1)

    def half(a):
        return F.interpolate(a, scale_factor=0.5, mode="area")

    e1 = block("E1", y, 2, without_norm=0)
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
        p.data += 0.1 * normal(*p.shape)  # norms that are not the identity
    return model


def test_forward_against_an_independent_one(small):
    # the network is that of A.1; the score is x̂ − y
    y = normal(3, 3, 16, 24)
    assert list(UNet().blocks) == ["E1", "E2", "E3", "M", "D3", "D2", "D1"]
    assert sum(p.numel() for p in UNet().parameters()) == 13_130_243  # A.1 prints ~13 m
    with torch.no_grad():
        x_hat, m = independent_forward(small, y)
        assert gap(small.denoise(y), x_hat) < 1e-5 and gap(small.score(y), x_hat - y) < 1e-5
        assert gap(small.encode(y)[0], m) < 1e-5
        sides = small.activations(y)["M"]
        assert gap(sides.output, m.mean((2, 3))) < 1e-5 and sides.input.shape == (3, 8)


def test_phi_is_the_mean_over_noise_of_the_averages_of_M(small):
    # φ is E_z[ā_M(x + σz)], a σ a picture
    x, generator, sigma = normal(3, 3, 16, 16), torch.Generator(), torch.tensor([0.1, 0.2, 0.3])
    code = phi(small, x, sigma, draws=5, generator=generator.manual_seed(1))
    generator.manual_seed(1)
    total = 0
    for _ in range(5):
        z = torch.randn(3, 16, 16, 3, generator=generator).permute(0, 3, 1, 2)
        total = (
            total
            + independent_forward(small, x + sigma.view(3, 1, 1, 1) * z)[1].mean((2, 3)) / 5
        )
    assert code.shape == (3, 16) and not code.requires_grad and gap(code, total) < 1e-5


@pytest.mark.parametrize(
    "words, place, value",
    [
        ("mean is missing", "mean", None),
        ("size mismatch", "model width", 5),
        ("step is missing or not of type int", "step", "7"),
        ("val is missing", "flags val", "x"),
        ("Storage size", "model width", 10**9),
        ("weights is missing", "weights", 7),
        ("not finite", "weights blocks.M.0.bias", torch.full((8,), math.nan)),
        ("Missing", "weights blocks.M.0.bias", None),
        ("its format is None", "format", None),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, shelf, words, place, value):
    # what train.py did not write is a UserError that names the file
    part = checkpoint = torch.load(shelf / "c.pt", weights_only=True)
    *outer, key = place.split()
    for name in outer:
        part = part[name]
    part[key] = value
    if value is None:
        del part[key]
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: not a checkpoint") as trouble:
        load_checkpoint(tmp_path / "a.pt")
    assert words in str(trouble.value) and "\n" not in str(trouble.value)


def test_load_checkpoint(tmp_path, shelf):
    # half precision loads; a cut, empty or changed file is refused, a malicious one is not run
    saved = torch.load(shelf / "c.pt", weights_only=True)
    half = {name: weight.half() for name, weight in saved["weights"].items()}
    torch.save({**saved, "weights": half}, tmp_path / "half.pt")
    data = (tmp_path / "half.pt").read_bytes()
    model, checkpoint = load_checkpoint(tmp_path / "half.pt")
    assert not model.training and checkpoint["sha256"] == hashlib.sha256(data).hexdigest()
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and gap(p, half[name]) == 0
    owned = str(tmp_path / "owned")
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, (owned,))})
    torch.save(malicious(), tmp_path / "bad.pt")
    place = data.index(half["blocks.M.0.weight"].numpy().tobytes()[:40])
    (tmp_path / "flipped.pt").write_bytes(
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    )
    (tmp_path / "cut.pt").write_bytes(data[:3000])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "another.pt")
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("bad", "flipped", "cut", "empty", "another", "fifo"):
        with pytest.raises(UserError, match=f"{name}.pt: not a checkpoint written by train.py"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not os.path.exists(owned)


def test_write_is_whole_or_not_at_all(tmp_path):
    # readers see the old file or the new one; a failure, or one killed before, leaves nothing in the way
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_bytes(b"older")
    link.symlink_to(path)
    (tmp_path / "a.json.tmp").write_bytes(b"left by a killed process")
    with unet.write(link) as file:
        file.write(b"old")
        file.flush()
        assert path.read_bytes() == b"older"
    with pytest.raises(KeyboardInterrupt), unet.write(path) as file:
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="could not be written .full"), unet.write(path) as file:
        raise OSError(28, "Full")
    assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == [
        "a.json",
        "link.json",
    ]
    assert link.is_symlink()  # followed, not replaced


@pytest.mark.parametrize(
    "trouble, code, words",
    [
        (UserError("--x 3: no\udcff"), 2, "--x 3: no\\udcff\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError("50 GB"), 2, "out of memory; smaller settings need less (50 GB)\n"),
        (
            OSError(28, "No space left on device", "a.png"),
            2,
            "a.png: No space left on device\n",
        ),
    ],
)
def test_one_way_to_end(trouble, code, words, monkeypatch, capsys):
    # what the user can mend is one line and exit code 2; our own mistakes keep their traceback
    def main():
        raise trouble

    def mistake():
        return 1 / 0

    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as ended:
        unet.run(main)
    shown = capsys.readouterr().err
    assert (
        ended.value.code == code
        and shown in ("", f"x.py: {words}")
        and bool(shown) == bool(words)
    )
    with pytest.raises(ZeroDivisionError):
        unet.run(mistake)


@pytest.mark.parametrize("console", ["full disk", "| head", "closed", "ascii"])
def test_standard_output_never_ends_the_work(console, monkeypatch):
    # a full disk under a log, `| head`, `>&-` and a console that knows no σ: the work is done, the code is 0
    read, written = os.pipe()
    os.close(read)
    streams = {
        "full disk": open("/dev/full", "w"),
        "| head": open(written, "w", closefd=False),
        "closed": None,
        "ascii": io.TextIOWrapper(io.BytesIO(), "ascii"),
    }
    monkeypatch.setattr(sys, "stdout", streams[console])
    done = []

    def main():
        for _ in range(3000):
            unet.say("σ and φ")
        done.append(True)

    with pytest.raises(SystemExit) as ended:
        unet.run(main)
    assert done and ended.value.code == 0


def test_closed_standard_output_of_a_process():
    # python train.py >&- ends with 0
    line = f"{sys.executable} train.py --help >&-"
    assert subprocess.run(line, shell=True, cwd=HERE, stderr=subprocess.DEVNULL).returncode == 0


def test_old_packages_are_told_in_one_line(monkeypatch):
    # the package, the least version and the one that is there
    unet.check_versions()
    monkeypatch.setattr(unet.PIL, "__version__", "9.4.0")
    with pytest.raises(SystemExit, match="^pillow 10.1 or later is needed; this is 9.4.0$"):
        unet.check_versions()


def test_random_streams_have_names():
    # equal words give equal noise, others do not
    numbers = [
        torch.rand(1, generator=unet.seeded("cpu", *words)).item()
        for words in ((0, "a"), (0, "a"), (0, "b"), (1, "a"), (0, 1))
    ]
    assert numbers[0] == numbers[1] and len(set(numbers)) == 4


def test_outputs_are_refused_among_the_pictures(tmp_path):
    # what would overwrite something, or join the data, is refused; a folder beside the data is not
    (tmp_path / "data").mkdir()
    (tmp_path / "there.png").write_text("mine")
    data = str(tmp_path / "data")
    unet.check_outputs([tmp_path / "new.png"], data=data)
    unet.check_outputs([tmp_path / "there.png"], force=True, data=data)
    for path, words in (
        (tmp_path / "data" / "x.png", "among the pictures"),
        (tmp_path / "there.png", "exists"),
        (tmp_path / "no" / "x.png", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            unet.check_outputs([path], data=data)


# kmeans.py


def blobs(n=600, d=20, K=12):
    """Clustered points (n, d), cut off at 0 as φ is."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(K, d))
    labels = rng.integers(K, size=n)
    noise = rng.normal(size=(n, d))
    return np.maximum(centers[labels] + 0.5 * noise, 0)


def pair_distances(a, b):
    """Squared distances of a (n, d) to b (m, d), (n, m), from differences."""
    return ((a[:, None] - b) ** 2).sum(2)


def plain_lloyd(x, centers, iterations):
    """Every distance, in float64; yields (labels, centres, inertia) after each step."""
    for _ in range(iterations):
        labels = pair_distances(x, centers).argmin(1)
        centers = centers.copy()
        for k in set(labels):
            centers[k] = x[labels == k].mean(0)
        d2 = pair_distances(x, centers)
        yield d2.argmin(1), centers, d2.min(1).sum()


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("chunk", [50, 4096])
@pytest.mark.parametrize("K, d", [(40, 20), (7, 3)])
def test_kmeans_is_plain_lloyd_step_by_step(K, d, chunk, accelerate, monkeypatch):
    # labels, centres and inertia are those of brute force after every step
    monkeypatch.setattr(kmeans, "CHUNK", chunk)
    x = blobs(d=d)
    init = x[100 : 100 + K]  # no two alike
    for steps, (labels, centers, inertia) in enumerate(plain_lloyd(x, init, 9), 1):
        model = KMeans(K, init, max_iter=steps, tol=0, accelerate=accelerate)
        model.fit(x)
        assert (model.labels_ == labels).all()
        assert gap(model.cluster_centers_, centers) < 1e-12
        assert model.inertia_ == pytest.approx(inertia, rel=1e-9)
        assert model.n_iter_ <= steps


def test_bounds_save_work_and_change_nothing(monkeypatch):
    # with bounds, labels and centres are the textbook's, for half the distances
    x, work = normal(4000, 4).double(), []
    comparable = kmeans.comparable

    def counted(points, centers):
        work.append(len(points) * len(centers))
        return comparable(points, centers)

    monkeypatch.setattr(kmeans, "comparable", counted)
    textbook = kmeans.lloyd(x, x[:80])
    distances = sum(work)
    work.clear()
    fast = kmeans.lloyd(x, x[:80], assign=kmeans.Bounds(x, x[:80]))
    for a, b in zip(fast, textbook):
        assert gap(a, b) == 0
    assert sum(work) < distances / 2


@pytest.mark.parametrize("K, restarts", [(1, 2), (2, 1), (9, 3), (30, 4)])
def test_seeding_is_greedy_kmeans_plus_plus(K, restarts):
    # the seeds are brute force's with the same random numbers, one restart after the other
    x = blobs(120, 3, 6)
    d2 = pair_distances(x, x)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(120, (restarts, 1), generator=generator).tolist()
    for _ in range(K - 1):
        trials = 2 + int(math.log(K))
        u = torch.rand(restarts, trials, generator=generator, dtype=torch.float64)
        for points, row in zip(chosen, u.numpy()):
            D2 = d2[points].min(0)
            mass = D2.cumsum()
            drawn = np.searchsorted(mass, (1 - row) * mass[-1])
            potential = np.minimum(D2, d2[drawn]).sum(1)
            best = potential.argmin()
            points.append(drawn[best])
    starts = kmeans.seed_centers(torch.from_numpy(x), K, restarts, 5)
    assert gap(starts, x[np.array(chosen)]) == 0


def test_the_best_restart_wins():
    # the inertia of six restarts is the least of the six
    x = blobs(300, 3, 9)
    centred = torch.from_numpy(x - x.mean(0))
    inertias = []
    for start in kmeans.seed_centers(centred, 9, 6, 3):
        model = KMeans(9, start, tol=0).fit(centred)
        inertias.append(model.inertia_)
    least = min(inertias)
    assert least == min(inertias[1:-1]) < inertias[0] / 1.001
    model = KMeans(9, n_init=6, tol=0, seed=3).fit(x)
    assert model.inertia_ == pytest.approx(least, rel=1e-9)


def test_tol_is_a_movement_in_units_of_the_mean_variance():
    # the last step is the first whose centres move by no more than tol
    x = blobs(300, 3, 9)
    centers, moves = x[:9], []
    for _, means, _ in plain_lloyd(x, x[:9], 12):
        square = ((means - centers) ** 2).sum()
        moves.append(square / x.var(0).mean())
        centers = means
    for tol in 0.6, 0.15, 0.04:
        step = KMeans(9, x[:9], tol=tol).fit(x).n_iter_
        assert moves[step - 1] <= tol < min(moves[: step - 1])


def test_kmeans_far_from_the_origin():
    # near points far from the origin are told apart in float32
    i = torch.arange(100)
    places = 5 * i + 6000 * (i > 49)
    groups = places[:, None] + 0.1 * normal(100, 20)  # float32
    model = KMeans(100).fit(groups.reshape(-1, 1))
    exact = groups.double().var(1).sum() * 19
    assert model.inertia_ == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("distance", [1e3, 1e5, 1e7, 1e10])
def test_one_far_outlier(distance):
    # the labels in float32 are those in float64, without a warning
    x = np.array([0, 1, 10, 11, distance])[:, None]
    double = KMeans(3).fit(x)
    single = KMeans(3).fit(x.astype(np.float32))
    assert (single.labels_ == double.labels_).all()
    assert kmeans.adjusted_rand_index(single.labels_, [0, 0, 1, 1, 2]) == 1


def test_empty_clusters_and_repeats():
    # an empty cluster takes the farthest point and its copies; the first of equal starts takes all points
    x = normal(60, 5).numpy()
    starts = x[:5] + [[0], [0], [1e3], [1e3], [1e3]]
    model = KMeans(5, starts, max_iter=1).fit(x)
    order = pair_distances(x, x[:2]).min(1).argsort()
    farthest = x[order[:-4:-1]]
    assert gap(model.cluster_centers_[2:], farthest) < 1e-6

    points = np.array([0.0, 0, 30, 100, 102])[:, None]
    starts = np.array([20, 101, 20, 20])[:, None]
    for dtype in np.float32, np.float64:
        model = KMeans(4, starts).fit(points.astype(dtype))
        assert model.inertia_ == 0
    model = KMeans(3, starts[:3], max_iter=1).fit(points)
    assert model.cluster_centers_[:, 0].tolist() == [30, 101, 0]
    centers = torch.from_numpy(starts)
    labels = kmeans.merge_repeats(centers, torch.arange(4))
    assert labels.tolist() == [0, 1, 0, 0]
    with pytest.warns(UserWarning, match="only 2 of 4 clusters"):
        KMeans(4).fit(points[[0, 1, 0, 3, 3]])


def test_kmeans_takes_and_gives():
    # arrays give arrays and tensors tensors, without a gradient; a shift changes no label
    x = normal(60, 5).double()
    one = KMeans(1).fit(x)
    assert gap(one.cluster_centers_[0], x.mean(0)) < 1e-12
    model = KMeans(3).fit(x.numpy())
    shifted = KMeans(3).fit(x.numpy() + 100)
    assert (shifted.labels_ == model.labels_).all()
    learnt = KMeans(3).fit(nn.Parameter(x))
    assert (learnt.labels_.numpy() == model.labels_).all()
    assert not learnt.cluster_centers_.requires_grad
    half = KMeans(3).fit(x.half())
    assert half.inertia_ == pytest.approx(model.inertia_, rel=1e-2)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ([[1.0], [math.nan]], "row 1"),
        ([1, 2], "shape"),
        ([[1]], "1 points"),
    ],
)
def test_what_is_no_set_of_points(wrong, words):
    # NaN, another shape and too few points are refused, and the message says which
    with pytest.raises(ValueError, match=words):
        KMeans(2).fit(wrong)


def test_adjusted_rand_index_counts_pairs():
    # the index is (agreeing pairs − expected)/(most − expected), pair by pair
    rng = np.random.default_rng(0)
    for n in [7, 8, 12] * 10:
        a = rng.integers(3, size=n)
        b = np.array(["w", "x", "y", "z"])[rng.integers(4, size=n)]
        i, j = np.tril_indices(n, -1)
        in_a = a[i] == a[j]
        in_b = b[i] == b[j]
        agreeing = (in_a & in_b).sum()
        most = (in_a.sum() + in_b.sum()) / 2
        chance = in_a.sum() * in_b.sum() / len(i)
        index = (agreeing - chance) / (most - chance)
        assert abs(kmeans.adjusted_rand_index(a, b) - index) < 1e-12
    for labels in [7], [1, 1, 1], [1, 2, 3]:
        assert kmeans.adjusted_rand_index(labels, labels) == 1


def test_separation_of_two_gaussians():
    # distance and spread are those along the line of the means
    a = normal(200_000, 3)
    b = normal(200_000, 3, seed=1)
    b = b * torch.tensor([1, 2, 9]) + torch.tensor([3, 4, 0])
    distance, sd = kmeans.separation(a, b)
    variance = 0.6**2 * 1 + 0.8**2 * 4  # of b along (0.6, 0.8, 0); that of a is 1
    expected = math.sqrt((1 + variance) / 2)
    assert abs(distance - 5) < 0.03
    assert abs(sd - expected) < 0.01


def test_pairs_of_groups():
    # every pair of the five groups of five points or more comes once; four are drawn evenly
    labels = np.arange(-1, 7).repeat([8, 5, 6, 4, 9, 5, 5, 2])
    place = 3.0 ** np.arange(8)
    noise = 1e-3 * normal(len(labels), 1)
    code = noise + torch.from_numpy(place[labels, None])
    pairs = list(itertools.combinations([0, 1, 3, 4, 5], 2))

    def drawn(seed, *count):
        rng = np.random.default_rng(seed)
        apart, groups = kmeans.pair_separations(code, labels, rng, *count)
        a, b = np.sort(groups).T
        assert gap(apart[:, 0], place[b] - place[a]) < 0.01
        return sorted(zip(a, b))

    assert drawn(0) == pairs
    times = np.zeros(len(pairs))
    for seed in range(100):
        four = [pairs.index(pair) for pair in drawn(seed, 4)]
        assert len(set(four)) == 4
        times[four] += 1
    assert abs(times - 40).max() < 22  # 40 ± 4.9 each


def divergence(p, y):
    """KL(p ‖ q) of t-SNE, q_ij ∝ 1/(1 + ‖y_i − y_j‖²), over i ≠ j."""
    away = ~torch.eye(len(y), dtype=torch.bool)
    d2 = (y[:, None] - y).square().sum(2)
    q = 1 / (1 + d2[away])
    ratio = p[away] / (q / q.sum())
    return (p[away] * ratio.log()).sum()


def test_tsne_affinities_and_gradient():
    # every neighbourhood has the perplexity asked for, and the gradient is autograd's
    n, x = 14, normal(14, 3).double()
    conditional = torch.zeros(n, n).double()
    for i in range(n):
        others = torch.arange(n) != i
        d2 = (x[others] - x[i]).square().sum(1)
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            p = torch.softmax(-beta * d2, 0)
            if torch.special.entr(p).sum().exp() > 4:
                low = beta
            else:
                high = beta
        conditional[i, others] = p
    p = kmeans.affinities(x, 4)
    symmetric = (conditional + conditional.T) / (2 * n)
    assert gap(p, symmetric) < 1e-9
    y = normal(n, 2, seed=3).double().requires_grad_()
    divergence(p, y).backward()
    gradient = kmeans.divergence_gradient(p, y.detach())
    assert gap(y.grad, gradient) < 1e-6


def test_tsne_separates_what_two_components_do_not():
    # the divergence falls far below its start's, and clusters along sixteen axes come apart
    labels = torch.arange(160) % 16
    x = 5 * torch.eye(16)[labels] + 0.5 * normal(160, 16)
    p = kmeans.affinities(x, 8)
    divergences, shares = [], []
    for iterations in 0, 750:
        y = kmeans.tsne(x, 8, iterations)
        neighbours = torch.cdist(y, y).argsort(1)[:, 1:6]
        same = labels[neighbours] == labels[:, None]
        shares.append(same.double().mean())
        divergences.append(divergence(p, y))
    assert shares[0] < 0.5 and shares[1] > 0.99
    assert divergences[1] < divergences[0] / 20


def test_kmeans_command_line(tmp_path, cli):
    # clusters.npz and the printed numbers are those of KMeans and of the known classes
    x = blobs(90, 6, 3).astype(np.float32)
    paths = [f"{i}.png" for i in range(90)]
    classes = np.array([-1, 0, 1, np.nan, 3] * 18)  # −1 and NaN: unknown
    np.savez(tmp_path / "phi.npz", phi=x, paths=paths, labels=classes)
    line = f"kmeans.py {tmp_path}/phi.npz --K 5 --seed 4 --n-init 3 --out {tmp_path}/k.npz"
    code, text = cli(line)
    model = KMeans(5, seed=4, n_init=3).fit(x)
    saved = np.load(tmp_path / "k.npz")
    assert code == 0 and saved["paths"].tolist() == paths
    assert (saved["labels"] == model.labels_).all()
    assert gap(saved["centers"], model.cluster_centers_) == 0
    known = classes >= 0
    index = kmeans.adjusted_rand_index(model.labels_[known], classes[known])
    assert f"inertia {model.inertia_:.6g}" in text
    assert f"3 classes: adjusted Rand index {index:.3f}" in text


@pytest.mark.parametrize("member", ["phi", "labels", "paths"])
def test_a_text_in_the_place_of_an_array(member, tmp_path, cli):
    # one line names the file
    import zipfile

    arrays = {"phi": blobs(20), "labels": np.zeros(20), "paths": np.arange(20)}
    del arrays[member]
    np.savez(tmp_path / "mixed.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "mixed.npz", "a") as archive:
        archive.writestr(member, "a text")
    code, text = cli(f"kmeans.py {tmp_path}/mixed.npz --K 3 --out {tmp_path}/k.npz")
    assert code == 2 and text.count("\n") == 1 and "mixed.npz" in text


# train.py: training


def test_sigma_distribution():
    # p(σ) ∝ 1/√σ on [0, σ_max]; the noise is σz, the pictures are in [0, 1]
    n = 100_000
    _, _, sigma = train.noisy_batch(
        np.zeros((n, 1, 1, 1), np.uint8), np.arange(n), 7, 0, 0.8, "cpu"
    )
    cdf = (sigma / 0.8).sqrt().flatten().sort().values
    assert gap(cdf, (torch.arange(n) + 0.5) / n) < 0.006  # Kolmogorov–Smirnov, p < 0.001
    x, y, sigma = train.noisy_batch(
        np.full((64, 16, 16, 3), 51, np.uint8), np.arange(64), 7, 0, 0.8, "cpu"
    )
    z = (y - x) / sigma
    assert (
        gap(x, torch.full_like(x, 0.2)) < 1e-6
        and abs(z.mean()) < 0.02
        and abs(z.std() - 1) < 0.02
    )
    for step, seed in ((8, 0), (7, 1)):  # every step, and every seed, has noise of its own
        _, another_y, another_sigma = train.noisy_batch(
            np.full((64, 16, 16, 3), 51, np.uint8), np.arange(64), step, seed, 0.8, "cpu"
        )
        assert gap(another_sigma, sigma) > 0.1 and gap((another_y - x) / another_sigma, z) > 1


def test_learning_rate_and_data_order():
    # the paper's halving for its 1000 epochs, a linear end for less; an epoch visits every picture once
    paper = [train.learning_rate(t, 1000) for t in (0.005, 0.011, 0.09, 0.1, 0.55, 0.99)]
    assert paper == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1e-3 / 32, 1e-3 / 512], rel=0.01)
    for epochs in (3, 999):
        short = [train.learning_rate(t, epochs) for t in (0, 0.05, 0.1, 0.55, 1)]
        assert short == pytest.approx(
            [1e-6, 0.95 * 0.501e-3, 0.9e-3, 0.45e-3, 0], rel=1e-9, abs=1e-15
        )
    rows = np.arange(100, 110)
    seen = np.concatenate(
        [train.batch_rows(rows, step, 4, 0) for step in range(10)]
    )  # 4 epochs of 10
    assert all(sorted(epoch) == list(rows) for epoch in seen.reshape(4, 10))
    assert list(seen[:10]) != list(seen[10:20])


def test_the_network_starts_with_closed_skips_and_the_mean_colour(small):
    # every channel of every norm and up-convolution has mean 0 and variance 1; M is heard, the skips are not
    y, outputs = normal(16, 3, 16, 16), []

    def record(module, inputs, output):
        outputs.append(output.detach().clone())

    train.initialise(small, y, [0.2, 0.4, 0.6])
    for module in small.modules():
        if isinstance(module, (nn.GroupNorm, nn.ConvTranspose2d)):
            module.register_forward_hook(record)
    x_hat = small(y)
    assert gap(x_hat, torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand_as(x_hat)) < 1e-6
    assert len(outputs) == 2 * 2 + 3 + 2 * 6 - 2 + 2
    for a in outputs:
        assert gap(a.mean((0, 2, 3)), 0) < 1e-3 and gap(a.std((0, 2, 3)), 1) < 1e-2
    maps, skips = small.encode(y)
    nn.init.normal_(small.blocks["D1"][-1].weight)
    assert gap(small.decode(maps, skips), small.decode(maps, [0 * skip for skip in skips])) == 0
    assert gap(small.decode(maps, skips), small.decode(0 * maps, skips)) > 0.01
    assert train.skips_are_closed(small)
    small.blocks["D2"][0].weight.data += 1
    assert not train.skips_are_closed(small)


def test_training_step_by_hand(small):
    # a step is Adam's on Eq. 1's sum over pixels, filters centred, skips closed, whatever the micro-batch
    x = torch.rand(5, 3, 16, 16)
    y = x + 0.3 * normal(*x.shape)
    before, twin = copy.deepcopy(small.state_dict()), copy.deepcopy(small)
    adam = torch.optim.Adam(small.parameters(), 1e-3)
    loss = train.training_step(
        small, adam, x, y, 5, 2, skips_closed=True
    )  # micro-batches of 2, 2 and 1
    direct = (twin(y) - x).square().sum() / 5
    direct.backward()
    assert loss == pytest.approx(direct.item(), rel=1e-5)
    for (name, p), twin_p in zip(small.named_parameters(), twin.parameters()):
        gradient = twin_p.grad
        if p.ndim == 4 and name.startswith("blocks"):
            gradient -= gradient.mean(
                (1, 2, 3), keepdim=True
            )  # of one filter, over its inputs and places
        if name in ("blocks.D1.0.weight", "blocks.D2.0.weight"):
            gradient[:, : gradient.shape[1] // 2] = 0
        first_moment, step = adam.state[p]["exp_avg"], before[name] - p.detach()
        large = gradient.abs() > 1e-3 * gradient.abs().max()
        assert gap(10 * first_moment, gradient) < 1e-4 * gradient.abs().max(), name
        assert gap(step[large], 1e-3 * gradient[large].sign()) < 1e-5, name  # Adam's first step


def test_training_reaches_the_wiener_solution():
    # the minimiser of Eq. 1 is E[x | y]: for Gaussian pictures Wiener's linear filter
    n, sigma, generator = 8, 0.5, torch.Generator().manual_seed(0)
    f = torch.fft.fftfreq(n)
    spectrum = 2 * torch.exp(-40 * (f[:, None] ** 2 + f[None] ** 2))  # λ_k: smooth, periodic

    def filtered(x, gain):
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real

    def pair(m):
        x, z = torch.randn(2, m, 1, n, n, generator=generator)
        x = filtered(x, spectrum.sqrt())
        return x, x + sigma * z

    def squared_error(a, b):
        return (a - b).square().mean()

    torch.manual_seed(0)
    model = UNet(width=8, channels=1, levels=1)
    train.initialise(model, pair(64)[1], [0.0])
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5 * train.learning_rate(step / 150, 1)
        train.training_step(model, optimizer, *pair(32), 32, 32, skips_closed=step < 15)
    x, y = pair(1000)
    best, x_hat = filtered(y, spectrum / (spectrum + sigma**2)), model.denoise(y).detach()
    assert squared_error(x_hat, best) < 0.08 * squared_error(y, best)
    assert squared_error(best, x) < squared_error(x_hat, x)


def test_psnr_is_the_mean_over_pictures():
    # a picture that is denoised far better counts once, not by its squared error
    x = torch.zeros(2, 1, 4, 4)
    x_hat = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    assert train.psnr(x_hat, x).tolist() == pytest.approx([20, 40], abs=1e-4)
    assert train.psnr(x, x).tolist() == [100, 100]


def test_use_of_M_in_closed_form():
    # M's maps and the skip are the noisy picture: the use is 0 if the decoder listens to the skip alone, and
    # what another picture costs if it listens to M
    def network(listens_to_M):
        def decode(maps, skips):
            return maps if listens_to_M else skips[0]

        return SimpleNamespace(encode=lambda y: (y, [y]), decode=decode)

    x = torch.rand(100, 1, 16, 16)
    for sigma, values in train.evaluate(network(False), x, micro_batch=7).items():
        assert values.mean() == pytest.approx(train.input_psnr(sigma), abs=0.15)
    assert all(not use.any() for use in train.use_of_M(network(False), x).values())
    for sigma, use in train.use_of_M(network(True), x, micro_batch=7).items():
        swapped = 2 / 12 + sigma**2  # two independent uniform pictures, and the noise
        assert use.mean() == pytest.approx(10 * math.log10(swapped / sigma**2), abs=0.15)
    mean, error = train.mean_error([1.0, 2, 3])
    assert (mean, error) == pytest.approx((2, 1 / math.sqrt(3)))


def test_variety_of_a_code():
    # the mean cosine between pictures, and the channels that are 0 for all
    numbers = train.variety(torch.tensor([[1.0, 0, 0, 2], [1, 0, 0, 0], [0, 3, 0, 0]]))
    assert numbers["cosine"] == pytest.approx((1 / 5**0.5) / 3) and numbers["silent"] == 1


# train.py: the loop

RUN = "train.py --data tiny.npy --size 8 --width 2 --levels 1 --channels 1 --batch 7 --epochs 4 --device cpu"


def run_settings(shelf, **changes):
    """The settings of RUN."""
    settings = settings_for(shelf / "tiny.npy", width=2, channels=1, batch=7, val=0.05)
    return {**settings, "pictures": None, "epochs": 4.0, **changes}


def weights(path):
    """The weights in a checkpoint and the roots of Adam's second moments, one vector."""
    saved = torch.load(path, weights_only=True)
    moments = [state["exp_avg_sq"].sqrt() for state in saved["optimizer"]["state"].values()]
    return torch.cat([value.flatten() for value in [*saved["weights"].values(), *moments]])


@pytest.fixture(scope="module")
def whole(shelf):
    """The checkpoint of RUN, never interrupted."""
    train.train(run_settings(shelf), str(shelf / "whole.pt"))
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
    # a killed and a stopped run go on, and end where an uninterrupted one does, bit for bit
    words = f"{RUN} --data {shelf}/tiny.npy --save-every 1e-9 --out {tmp_path}/"
    assert python("-c", KILLED, *(words + "killed.pt").split())[0] == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "killed.pt")[1]["step"] == 1
    real_rate, calls = train.learning_rate, itertools.count(1)

    def rate(*arguments):
        if next(calls) == 10:  # a signal in the tenth step
            os.kill(os.getpid(), signal.SIGTERM)
        return real_rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", rate)
        code, text = cli(words + "stopped.pt")
    assert (
        code == 128 + signal.SIGTERM and "stopped after 10 steps" in text and "--resume" in text
    )
    for name in ("killed", "stopped"):
        resume = f"train.py --out {tmp_path}/{name}.pt --resume --device cpu"
        assert (
            "complete after 22 steps" in cli(resume)[1] and "already complete" in cli(resume)[1]
        )
        assert gap(weights(whole), weights(tmp_path / f"{name}.pt")) == 0
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["step"] == 1 and json.loads(lines[-1])["step"] == 22
    assert np.ptp(np.asarray(Image.open(tmp_path / "stopped.png"))) == 255


def test_the_first_step_is_saved_if_the_run_is_stopped_in_it(shelf, tmp_path, capsys):
    # Ctrl-C in the first step loses nothing
    train.train(run_settings(shelf), str(tmp_path / "a.pt"), stop_requested=lambda: True)
    assert load_checkpoint(tmp_path / "a.pt")[1]["step"] == 1
    assert "stopped after 1 steps, 7 pictures; go on with" in capsys.readouterr().out


def test_skips_stay_closed_during_the_warm_up(shelf, tmp_path):
    # after two steps of 22 the decoder sees nothing but M; at the end it sees the skips
    stops = iter([False, True])
    train.train(run_settings(shelf), str(tmp_path / "a.pt"), stop_requested=lambda: next(stops))
    model, checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["step"] == 2 and train.skips_are_closed(model)
    train.train(run_settings(shelf), str(tmp_path / "b.pt"))
    assert not train.skips_are_closed(load_checkpoint(tmp_path / "b.pt")[0])


LEAVING = """import sys, weakref, train
leave, sys.argv = train.dist.destroy_process_group, sys.argv[1:]
def leaving():
    group = weakref.ref(train.dist.group.WORLD)
    leave()
    assert group() is None                     # else its threads may abort the process as it ends
train.dist.destroy_process_group = leaving
train.run(train.main)"""


def test_torchrun_gives_the_same_weights(shelf, whole, tmp_path):
    # the global batch does not depend on the number of processes, and all of them end well
    code, err = python(
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "--no-python",
        sys.executable,
        "-c",
        LEAVING,
        *f"{RUN} --data {shelf}/tiny.npy --out {tmp_path}/two.pt".split(),
    )
    assert code == 0, err
    assert gap(weights(whole), weights(tmp_path / "two.pt")) < 1e-5


def test_checkpoint_holds_what_it_says(shelf, tmp_path):
    # its numbers are those of its own weights on held-out pictures
    settings, out = run_settings(shelf, val=0.3, epochs=3.0), str(tmp_path / "a.pt")
    train.train(settings, out)
    model, saved = load_checkpoint(out)
    pictures, rows, held_out = train.training_data(settings)
    numbers = saved["training"]
    assert numbers["pictures_seen"] == 84 and numbers["training_pictures"] == 28
    order = np.random.default_rng((0, train.HELD_OUT)).permutation(held_out)
    x = train.to_batch(pictures.x[order], "cpu")
    for sigma, values in train.evaluate(model, x).items():
        assert numbers["psnr"][sigma] == pytest.approx(values.mean(), abs=1e-4)
    for sigma, values in train.use_of_M(model, x).items():
        assert numbers["use"][sigma] == pytest.approx(values.mean(), abs=1e-4)
    assert saved["mean"] == pytest.approx([pictures.x[rows].mean() / 255], abs=1e-6)
    distance = torch.pdist(unet.fixed_phi(model, x)).mean().item()
    assert numbers["phi_distance"] == pytest.approx(distance, 1e-4)
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert line["use"]["0.5"] == numbers["use"][0.5] and line["cosine"] == numbers["cosine"]
    first = model.blocks["M"][
        1
    ].weight  # the data-dependent pass was made: 1 is PyTorch's own start
    assert (first - 1).abs().max() > 0.05 and not train.skips_are_closed(model)


def test_files_of_others_are_never_replaced(shelf, tmp_path, cli):
    # a copied checkpoint does not take the user's pictures; a second run on the same file stops
    for name in ("cat.pt", "cat.jsonl", "cat.png"):
        (tmp_path / name).write_bytes((shelf / "c.pt").read_bytes())
    (tmp_path / "cat.png").write_bytes(b"a picture of a cat")
    code, text = cli(f"train.py --resume --pictures 24 --out {tmp_path}/cat.pt --device cpu")
    assert (
        code == 2
        and "cat." in text
        and (tmp_path / "cat.png").read_bytes() == b"a picture of a cat"
    )
    out = tmp_path / "a.pt"

    def another_run_saves():
        out.write_bytes(b"of another run")
        return False

    with pytest.raises(UserError, match="a.pt: another run has written it meanwhile"):
        train.train(
            run_settings(shelf), str(out), save_every=1e-9, stop_requested=another_run_saves
        )
    assert out.read_bytes() == b"of another run"


def test_a_run_of_older_make_replaces_nothing_without_force(shelf, tmp_path, cli):
    # its checkpoint holds no name of the run, so no file beside it is known to be its own
    saved = torch.load(shelf / "c.pt", weights_only=True)
    del saved["run"]
    torch.save(saved, tmp_path / "old.pt")
    (tmp_path / "old.jsonl").write_text("of unknown make")
    code, text = cli(f"train.py --resume --pictures 24 --out {tmp_path}/old.pt --device cpu")
    assert code == 2 and "old.jsonl: exists" in text
    assert (tmp_path / "old.jsonl").read_text() == "of unknown make"


def test_ctrl_c_ends_the_reading_of_pictures_at_once(cli, tmp_path, monkeypatch):
    # signals are caught only once there is a step to finish
    handlers, real = [], train.training_data

    def training_data(settings):
        handlers.append(signal.getsignal(signal.SIGINT))
        return real(settings)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "training_data", training_data)
    assert cli(f"{RUN} --out {tmp_path}/a.pt")[0] == 0
    assert handlers == [before]


def test_a_run_can_be_made_longer(shelf, tmp_path):
    # --resume with a larger budget goes on; a smaller one, or another width, contradicts the checkpoint
    out = str(tmp_path / "a.pt")
    train.train(run_settings(shelf), out)
    resume = load_checkpoint(out)[1]
    given = dict.fromkeys(["preset", *train.COMMON, *train.PAPER])

    def complete(**flags):
        return train.complete_settings(given | flags, torch.device("cpu"), resume, out)

    for flags in ({"epochs": 3.0}, {"width": 3}, {"seed": 1}):
        with pytest.raises(UserError, match="contradicts"):
            complete(**flags)
    assert train.train(complete(epochs=6.0), out, resume=resume)
    assert load_checkpoint(out)[1]["step"] == 33


def test_settings_fit_the_machine():
    # without a GPU the small preset, with one the paper's A.1 to A.3; single flags and the computed pictures
    def of(device, **flags):
        given = dict.fromkeys(["preset", *train.COMMON, *train.PAPER]) | {"data": "x"} | flags
        return train.complete_settings(given, torch.device(device))

    def shape(settings):
        return [
            settings[name]
            for name in ("size", "width", "levels", "batch", "epochs", "pictures")
        ]

    paper, small = [64, 64, 3, 1024, 1000, None], [32, 16, 2, 32, None, 300_000]
    assert shape(of("cpu")) == shape(of("cpu", data=None, preset="small")) == small
    assert shape(of("cuda", precision="fp32")) == shape(of("cpu", preset="paper")) == paper
    assert of("cpu", epochs=5.0)["pictures"] is None and of("cpu", data="disc")["channels"] == 1
    assert [of("cpu", size=size)["levels"] for size in (16, 40, 80, 160)] == [1, 2, 3, 4]
    assert of("cpu", precision="auto")["precision"] in ("fp32", "bf16")
    assert [train.equal_parts(n, most) for n, most in ((32, 30), (32, 32), (7, 2), (0, 4))] == [
        16,
        32,
        2,
        1,
    ]


def test_full_disk_and_bad_weights(shelf, tmp_path, cli):
    # a full disk and a diverged run leave the last save as it was
    out, before = tmp_path / "a.pt", (shelf / "c.pt").read_bytes()
    out.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # stands for a full disk
    try:
        code, text = cli(f"train.py --resume --pictures 24 --out {out} --device cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        code == 2
        and f"{out}: could not be written (file too large)" in text
        and text.count("\n") == 1
    )
    resume = load_checkpoint(out)[1]
    resume["weights"]["blocks.M.0.bias"][:] = resume["weights"]["blocks.D1.15.weight"][:] = 1e38
    with pytest.raises(UserError, match="step 3: the loss is not finite"):
        train.train({**resume["flags"], "pictures": 80}, str(out), resume=resume)
    resume = load_checkpoint(out)[1]
    resume["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(UserError, match="Adam's state is another network's"):
        train.train({**resume["flags"], "pictures": 80}, str(out), resume=resume)
    assert out.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_the_untrained_network_is_the_start_of_a_training(shelf):
    # it answers with the mean colour, is of the same shape, and is another one for another seed
    checkpoint, x = load_checkpoint(shelf / "c.pt")[1], torch.rand(8, 3, 8, 8)
    one, two = (train.untrained_network(checkpoint, x, seed) for seed in (0, 1))
    assert gap(one(x), torch.tensor(checkpoint["mean"]).view(1, 3, 1, 1).expand_as(x)) < 1e-5
    assert train.skips_are_closed(one) and gap(one.encode(x)[0], two.encode(x)[0]) > 0.1


# train.py: pictures


def test_odd_pictures(tmp_path, capsys):
    # formats, modes, transparency, orientation: right colours; what cannot be used is told in a line
    red, gray, white, size = (200, 40, 40), (51,) * 3, (255,) * 3, (40, 24)
    folder, flat, clear = (
        tmp_path / "Class A",
        Image.new("RGB", size, red),
        Image.new("P", size, 0),
    )
    folder.mkdir()
    clear.putpalette([0, 0, 0] * 256)
    upright, exif, bad_exif = (
        np.zeros((24, 24, 3), np.uint8),
        Image.Exif(),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    )
    upright[:12], exif[0x0112] = red, 6  # red above black, stored turned a quarter
    sixteen_bits = Image.fromarray(np.full(size[::-1], 51 * 257, np.uint16))
    files = {
        "a.JPEG": (flat, red, dict(quality=95)),
        "b.png": (flat.quantize(4), red, {}),
        "c.Jpg": (flat.convert("CMYK"), red, dict(quality=95)),
        "d.PNG": (
            Image.new("RGBA", size, (*red, 51)),
            (244, 212, 212),
            {},
        ),  # a fifth over white
        "e.gif": (clear, white, dict(transparency=0)),
        "f.png": (sixteen_bits, gray, {}),
        "g.jfif": (Image.new("L", size, 51), gray, dict(format="jpeg")),
        "h.tiff": (Image.new("1", size, 1), white, dict(save_all=True, append_images=[clear])),
        "i.png": (flat, red, dict(exif=bad_exif)),
        "j.png": (Image.fromarray(np.rot90(upright).copy()), None, dict(exif=exif)),
    }
    for name, (image, _, options) in files.items():
        image.save(folder / name, **options)
    (folder / "k.jpg").write_bytes((folder / "a.JPEG").read_bytes()[:400])  # truncated
    for name in ("notes.txt", "photo.HEIC", "plain", ".hidden.png", "@eaDir/thumb.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("passed over")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "loop").symlink_to(tmp_path, target_is_directory=True)
    save_picture(tmp_path / "B" / "m.webp", np.full((7, 9, 3), (0, 0, 255), np.uint8))
    pictures = train.load_pictures(str(tmp_path), size=16)
    said = capsys.readouterr().out
    assert pictures.x.shape == (11, 16, 16, 3) and pictures.classes == ["B", "Class A"]
    assert pictures.labels.tolist() == [0] + [1] * 10
    colours = [(0, 0, 255), *(colour for _, colour, _ in files.values() if colour)]
    for x, colour, path in zip(pictures.x, colours, pictures.paths):
        assert np.abs(x.astype(int) - np.array(colour)).max() <= 6, path
    assert (
        np.abs(pictures.x[10][:7].astype(int) - red).max() <= 3
        and pictures.x[10][9:].max() <= 3
    )
    for words in (
        "1 .txt",
        "1 .HEIC",
        "1 without an extension",
        "1 no regular file",
        "skipped 1 of 12",
        "k.jpg",
        "1 files have several pages",
    ):
        assert words in said, words
    assert train.load_picture(folder / "i.png", 16).shape == (16, 16, 3)
    one_channel = train.load_pictures(str(tmp_path), size=16, channels=1).x
    assert (
        one_channel.shape == (11, 16, 16, 1)
        and np.abs(one_channel[6].astype(int) - 51).max() <= 1
    )


@pytest.mark.parametrize("largest, warned", [(4095, True), (65535, False), (70000, True)])
def test_pictures_of_12_and_of_32_bits_are_noticed(tmp_path, capsys, largest, warned):
    # their largest value is named, and what to do
    x = np.linspace(0, largest, 64).reshape(8, 8).astype(np.int32)
    Image.fromarray(x).save(tmp_path / "a.tiff")
    train.load_pictures(str(tmp_path), 8)
    assert (
        f"largest value of the 16-bit pictures in {tmp_path} is {largest}"
        in capsys.readouterr().out
    ) == warned


def test_classes_are_what_tells_pictures_apart(tmp_path):
    # train, val and images are no classes, nor is a folder in which all files lie
    for name in (
        "train/cat/images/1.png",
        "train/dog/images/2.png",
        "val/cat/3.png",
        ".x/4.png",
    ):
        save_picture(tmp_path / "all" / name, array(len(name), 8, 8))
    pictures = train.load_pictures(str(tmp_path), 8)
    assert pictures.classes == ["cat", "dog"] and pictures.labels.tolist() == [0, 1, 0]
    assert train.load_pictures(str(tmp_path / "all" / "val"), 8).classes == []


def test_what_exists_on_the_disk_is_read(tmp_path, monkeypatch):
    # a folder named disc is a folder; stray pictures beside batches are an error, not a data set
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "disc" / "a.png", array(0, 8, 8))
    assert train.is_synthetic("calpha:2") and not train.is_synthetic("disc")
    assert len(train.load_pictures("disc", 8).x) == 1
    np.savez(tmp_path / "disc" / "train_data_batch_1.npz", data=array(0, 5, 8, 8))
    with pytest.raises(UserError, match="1 picture files and 1 .npz files"):
        train.load_pictures("disc", 8)


def test_centre_crop_and_antialiasing():
    # what is outside the central square does not show, and stripes become gray
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, 16:80:2] = 255  # one-pixel stripes in the central square: their average is gray
    stripes[:, :16] = stripes[:, 80:] = (255, 0, 0)  # outside it
    x = train.to_pixels(Image.fromarray(stripes), 16, 3)
    assert np.abs(x[0, :, 1:-1].astype(int) - 127).max() <= 8  # no red, no aliasing


def test_patches(tmp_path):
    # every tile is cut where it should be; its class is its picture
    x = array(0, 35, 50)  # 2 × 3 tiles of 16
    save_picture(tmp_path / "one.png", x)
    save_picture(tmp_path / "small.png", array(1, 40, 10))
    pictures = train.load_pictures(str(tmp_path), 16, 1, patches=True)
    tiles = [x[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] for i in range(2) for j in range(3)]
    assert (pictures.x[..., 0] == tiles).all() and len(set(pictures.groups)) == 1
    assert [pictures.classes[k] for k in pictures.labels] == ["one"] * 6
    assert pictures.paths[4] == f"{tmp_path}/one.png#4"


def test_reading_takes_hardly_more_memory_than_the_pictures(tmp_path):
    # the array is filled directly: the peak is below 1.2 times the data
    for i in range(60):
        save_picture(tmp_path / f"{i}.png", array(i, 8, 8, 3))
    train.load_pictures(
        str(tmp_path), 8
    )  # Pillow's own modules are loaded once, and are no pictures
    tracemalloc.start()
    x = train.load_pictures(str(tmp_path), 256).x
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes


def test_pictures_are_decoded_by_eight_threads_at_most(tmp_path, monkeypatch):
    # by as many as there are CPUs for this process, and no more than eight
    threads, pool = [], train.ThreadPoolExecutor

    def counted(n):
        threads.append(n)
        return pool(n)

    save_picture(tmp_path / "a.png", array(0, 8, 8))
    monkeypatch.setattr(train, "ThreadPoolExecutor", counted)
    for cpus in (1, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cpus), raising=False)
        train.load_pictures(str(tmp_path), 8)
    assert threads == [1, 8]


def test_groups_against_a_graph_search():
    # two tiles of one picture, or two copies of one picture, are in one group, transitively
    for seed in range(30):
        rng = np.random.default_rng(seed)
        source, content = rng.integers(0, 12, 30), rng.integers(0, 25, 30)
        joins = content >= 4
        groups = train.join_groups(source, content.astype(np.uint64) * 977, joins)
        copies = (content[:, None] == content) & joins
        joined = (source[:, None] == source) | copies | np.eye(30, dtype=bool)
        for _ in range(5):
            joined = joined @ joined
        assert (joined == (groups[:, None] == groups)).all()


def test_split_depends_on_pictures_and_seed_alone(tmp_path):
    # renamed files are split alike; no copy, also of one colour, is on both sides; halves share nothing
    x, held = array(0, 60, 8, 8, 3), set()
    x[10:14], x[50], x[20:24] = x[0], x[49], 7  # exact duplicates; four of one colour
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[np.random.default_rng(1).permutation(60)])
    a, b = (train.load_pictures(str(tmp_path / f"{name}.npy"), 8) for name in "ab")

    def content(pictures, rows):
        return sorted(pictures.x[i].tobytes() for i in rows)

    for seed in range(20):
        rows, held_out = train.split(a, 0.1, seed)
        assert sorted([*rows, *held_out]) == list(range(60)) and 1 <= len(held_out) <= 6
        assert not set(content(a, rows)) & set(content(a, held_out))
        assert content(a, held_out) == content(b, train.split(b, 0.1, seed)[1])
        held.add(tuple(sorted(held_out)))
        first, second = (
            train.training_part(a, rows, half, None, seed) for half in ("first", "second")
        )
        assert sorted([*first, *second]) == sorted(rows) and abs(len(first) - len(second)) <= 6
        assert not set(content(a, first)) & set(content(a, second))
        few, more = (train.training_part(a, rows, "first", limit, seed) for limit in (5, 9))
        assert len(few) == 5 and list(more[:5]) == list(few)
    assert a.fingerprint == b.fingerprint and len(held) > 10  # the seed matters


def test_held_out_pictures_come_in_the_order_of_their_content(tmp_path):
    # the names of files change no number
    x = array(0, 40, 8, 8, 3)
    for name, order in (("a", range(40)), ("b", np.random.default_rng(1).permutation(40))):
        np.save(tmp_path / f"{name}.npy", x[np.array(order)])
    sides = []
    for name in "ab":
        pictures, _, held_out = train.training_data(settings_for(tmp_path / f"{name}.npy"))
        sides.append(pictures.x[held_out])
    assert (sides[0] == sides[1]).all()


def test_arrays(tmp_path, capsys):
    # every layout is read as what it is; of several arrays the right one is taken, or the user is asked
    x = array(0, 20, 8, 8, 3)

    def load(name, *options):
        return train.load_pictures(str(tmp_path / name), *options)

    np.save(tmp_path / "colour.npy", x)
    assert (
        isinstance(load("colour.npy", 8).x, np.memmap) and (load("colour.npy", 8).x == x).all()
    )
    assert (
        load("colour.npy", 4).x.shape == (20, 4, 4, 3)
        and len(load("colour.npy", 4, 3, True).x) == 80
    )
    for gray, channels in itertools.product((x[..., 0], x[..., :1]), (1, 3)):
        np.save(tmp_path / "gray.npy", gray)
        assert (load("gray.npy", 8, channels).x == x[..., :1]).all()
    np.savez(tmp_path / "several.npz", x_test=x[:3], masks=x[:3, ..., 0], x_train=x)
    assert (
        load("several.npz", 8).x == x
    ).all() and "reading x_train" in capsys.readouterr().out
    np.savez(tmp_path / "unclear.npz", one=x, two=x)
    np.save(tmp_path / "picture.npy", x[0])
    for name, words in (
        ("unclear.npz", "one, two: name one of them `data`"),
        ("picture.npy", "not uint8 .8, 8, 3"),
    ):
        with pytest.raises(UserError, match=words):
            load(name, 8)
    (tmp_path / "batches").mkdir()
    planar = array(1, 10, 3, 64, 64)  # ImageNet64: all red, then all green, then all blue
    for k in range(2):
        np.savez(
            tmp_path / "batches" / f"train_data_batch_{k + 1}.npz",
            mean=np.zeros(12288),
            labels=np.arange(5) + 1,
            data=planar[5 * k : 5 * k + 5].reshape(5, -1),
        )
    pictures = load("batches", 64)
    assert (pictures.x == planar.transpose(0, 2, 3, 1)).all() and pictures.labels.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ] * 2


def test_builtin_pictures():
    # they are the same in every run, none is blank, all classes are as frequent
    x, labels, classes = train.builtin_pictures(100, 32, 3)
    assert len(x) == 100 and np.bincount(labels).tolist() == [100 // len(classes)] * len(
        classes
    )
    assert (train.builtin_pictures(100, 32, 3)[0] == x).all() and min(
        np.ptp(picture) for picture in x
    ) > 40
    assert train.builtin_pictures(3, 16, 1)[0].shape == (3, 16, 16, 1)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_calpha_fields_have_the_spectrum_of_the_authors(dimensions):
    # their amplitude falls as |k|^−α
    slopes, axes = [], tuple(range(1, dimensions + 1))
    for alpha in (1.0, 2.0):
        field = train.random_spectrum(400, dimensions, 32, np.random.default_rng(0), alpha)
        for axis in axes:  # they are cut from larger ones: a window
            field = field * np.hanning(32).reshape(
                [-1 if axis == k else 1 for k in range(dimensions + 1)]
            )
        amplitude = np.sqrt((np.abs(np.fft.fftn(field, axes=axes)) ** 2).mean(0))
        k = np.arange(4, 12)
        along_one_axis = amplitude[(k, *[0] * (dimensions - 1))]
        slopes.append(np.polyfit(np.log(k), np.log(along_one_axis), 1)[0])
    assert slopes == pytest.approx([-1, -2], abs=0.2)


def test_calpha_and_disc_pictures():
    # two regions, over [0, a] and [b, 1], whose contour is smoother for a larger α; discs of five numbers
    x = train.calpha_pictures(60, 32, np.random.default_rng(0), 3.0)[..., 0] / 255.0
    assert x.shape == (60, 32, 32) and x.min() < 0.02 and x.max() > 0.98
    rough = train.calpha_pictures(60, 32, np.random.default_rng(0), 1.0)[..., 0] / 255.0
    assert np.abs(np.diff(x, axis=1)).mean() < 0.7 * np.abs(np.diff(rough, axis=1)).mean()
    discs = train.disc_pictures(200, 32, np.random.default_rng(0))[..., 0]
    assert all(len(np.unique(disc[::31, ::31])) >= 1 for disc in discs)
    disc = train.draw_disc(64, 0.5, 0.25, 0.2, 0.1, 0.9)[0]
    assert disc[16, 32] == pytest.approx(0.9, abs=1e-6) and disc[60, 4] == pytest.approx(
        0.1, abs=1e-6
    )
    assert (disc > 0.5).mean() == pytest.approx(math.pi * 0.2**2, rel=0.03)


# sample.py


class GaussianModel:
    """The exact denoiser of N(m, λ), x̂ = m + λ/(λ + σ²)(y − m); σ is set, or None: measured in y."""

    lam, m, sigma = 0.04, 0.3, 1.0

    def encode(self, y):
        return y, []

    def denoise(self, y):
        variance = ((y - self.m) ** 2).mean((1, 2, 3), keepdim=True)
        if self.sigma is not None:
            variance = torch.tensor(self.lam + self.sigma**2)
        return self.m + (self.lam / variance).clamp(max=1) * (y - self.m)

    def score(self, y):
        return self.denoise(y) - y


def generators(n):
    """One a sample."""
    return [unet.seeded("cpu", 0, i) for i in range(n)]


def loss_of(model, x, phi_c):
    """‖φ(x) − φ_c‖² of each picture."""
    code = model.encode(x)[0].mean((2, 3)).detach()
    return (code - phi_c).square().sum(1)


@pytest.fixture
def task(small):
    """A network in double precision, pictures, and the φ of another picture."""
    model = small.double()
    x = normal(5, 3, 16, 16).double()
    other = normal(1, 3, 16, 16, seed=1).double()
    return model, x, model.encode(other)[0].mean((2, 3)).detach()


def test_guidance_step_goes_down_the_gradient(task):
    # its step is −L/‖∇L‖² ∇L, by central differences
    model, x, phi_c = task
    moved, _ = sample.guidance_step(model, x, phi_c, tol=0, max_gradients=1)
    step = moved - x
    eta = loss_of(model, x, phi_c) / step.square().sum((1, 2, 3))
    for place in [(0, 3, 5), (1, 8, 8), (2, 15, 0), (0, 0, 0)]:
        e = torch.zeros(1, 3, 16, 16).double()
        e[(0, *place)] = 1e-5
        change = loss_of(model, x + e, phi_c) - loss_of(model, x - e, phi_c)
        assert gap(change[:2] / 2e-5, -(step[(..., *place)] * eta)[:2]) < 1e-6


def test_guidance_step_returns_the_best_picture():
    # φ = x² cannot be −1: steps of 0.1 lead from 0.27 to −0.03 and back again
    def encode(y):
        return y.square(), []

    x = torch.full((1, 1, 1, 1), 0.27)
    for gradients in 3, 4, 5:
        moved, matching = sample.guidance_step(
            SimpleNamespace(encode=encode), x, -1, 0, gradients
        )
        assert moved.item() == pytest.approx(-0.03)
        assert matching.least.item() == pytest.approx(1.0009**2)


def test_guidance_step_says_what_it_did(task):
    # L, its first value and the gradients are each picture's own
    model, x, phi_c = task

    def match(x, tol, max_gradients):
        return sample.guidance_step(model, x, phi_c, tol, max_gradients, sample.Memory())

    moved, matching = match(x, 0.05, 300)
    assert matching.converged.all()
    assert (matching.least <= 0.05 * matching.first).all()
    assert gap(matching.first, loss_of(model, x, phi_c)) < 1e-12
    assert gap(matching.least, loss_of(model, moved, phi_c)) < 1e-12
    for i, n in enumerate(matching.gradients.tolist()):
        alone, counted = match(x[i : i + 1], 0.05, 300)
        assert gap(alone[0], moved[i]) < 1e-9
        assert counted.gradients.item() == n
        assert not match(x[i : i + 1], 0.05, n - 1)[1].converged.item()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_memory_reaches_the_same_goal_sooner():
    # a linear φ(x) = Bx is matched by the same picture, in two thirds of the gradients; no step is above 0.1
    B = normal(24, 48).double()
    x = normal(4, 3, 4, 4, seed=1).double()

    def encode(y):
        code = y.flatten(1) @ B.T
        return code[:, :, None, None], []

    model = SimpleNamespace(encode=encode)
    phi_c = encode(x + 0.01 * normal(4, 3, 4, 4, seed=2))[0][:, :, 0, 0]
    plain, slow = sample.guidance_step(model, x, phi_c, 1e-8, 500)
    moved, fast = sample.guidance_step(model, x, phi_c, 1e-8, 500, sample.Memory())
    assert slow.converged.all() and fast.converged.all()
    assert gap(plain, moved) < 1e-4 < 1e-2 < gap(plain, x)
    assert fast.gradients.max() < 0.67 * slow.gradients.max()
    far, _ = sample.guidance_step(model, x, phi_c + 1000, 0, 1)
    length = (far - x).square().mean((1, 2, 3)).sqrt()
    assert gap(length, torch.full((4,), 0.1)) < 1e-6


def test_memory_weighs_the_residual_against_the_walk():
    # after one step ΔX that changed r by ΔΦ: c = ΔΦ·r / (‖ΔΦ‖² (1 + WALK)); none if it led away
    memory = sample.Memory()
    step = normal(1, 3, 2, 2).double()
    before, r = normal(2, 1, 5, seed=1).double()
    change = r / 2 - before
    memory.remember(step, before)
    jump, left = memory.extrapolate(r / 2)
    c = (change * r / 2).sum() / change.square().sum() / (1 + 1.001 * memory.WALK)
    assert gap(jump, -c * step) < 1e-9
    assert gap(left, memory.CAUTION * (r / 2 - c * change)) < 1e-9
    memory.remember(step, r / 2)
    jump, left = memory.extrapolate(r)
    assert gap(jump, 0 * step) == 0
    assert gap(left, memory.CAUTION * r) < 1e-9


def test_algorithm_1_has_the_moments_of_its_closed_form():
    # without matching, Gaussian data obey v ← (λ/(λ + σ_t²))² v + σ²_{t−1}
    model, sigmas = GaussianModel(), sample.noise_levels(1, 0.03, 12)
    assert sigmas == pytest.approx([1 - 0.97 * t / 11 for t in range(12)])

    def target(sigma):  # also how the model learns σ
        model.sigma = sigma
        return torch.zeros(1, 3)

    mean = torch.full((3,), 0.3)
    x, levels = sample.reconstruct(
        model, target, mean, sigmas, (3, 32, 32), generators(40), tol=1e9
    )
    v, believed = 1, [*sigmas[:-1], sigmas[-2]]  # the last step comes without matching
    for t, sigma in enumerate(believed):
        if t < len(levels):  # σ̂ = σ²/(λ + σ²) √v
            expected = sigma**2 / (model.lam + sigma**2) * v**0.5
            assert levels[t].sigma == sigma
            assert levels[t].sigma_after.mean() == pytest.approx(expected, rel=0.02)
        sigma_next = [*sigmas[1:], 0][t]
        v = (model.lam / (model.lam + sigma**2)) ** 2 * v + sigma_next**2
    assert abs(x.mean() - 0.3) < 5 * (v / x.numel()) ** 0.5 and len(levels) == 11
    assert abs(x.var() / v - 1) < 5 * (2 / x.numel()) ** 0.5


def test_unconditional_sampler_has_the_moments_of_its_closed_form():
    # v = λ + σ² obeys v ← (1 − h σ²/v)² v + γ², γ² = ((1 − βh)² − (1 − h)²) σ̂², σ̂² = σ⁴/v
    model, mean, v = GaussianModel(), torch.full((3,), 0.3), 1.0
    model.sigma = None

    def draw(max_steps):
        return sample.sample_unconditional(
            model, mean, (3, 64, 64), generators(8), 1.0, 0.02, max_steps=max_steps
        )

    for t in range(1, 31):
        sigma2, h = v - model.lam, 0.01 * t / (1 + 0.01 * (t - 1))
        gamma2 = ((1 - 0.05 * h) ** 2 - (1 - h) ** 2) * sigma2**2 / v
        v = (1 - h * sigma2 / v) ** 2 * v + gamma2
        if t in (1, 5, 15, 30):
            y, steps = draw(t)
            assert abs(((y - 0.3) ** 2).mean() / v - 1) < 0.03 and (steps == t).all()
    x, steps = draw(2000)
    assert (steps < 2000).all()
    assert abs(x.var() / model.lam - 1) < 0.1 and abs(x.mean() - 0.3) < 0.01
    assert (
        sample.noise_level(model.score(x)).max() < 0.02
    )  # at the end all of the score was added


def test_unconditional_samples_end_by_themselves():
    # the first to end stays as it is while others go on
    def score(y):
        return -y / 2

    def draw(max_steps):
        model = SimpleNamespace(score=score)
        return sample.sample_unconditional(
            model, torch.zeros(3), (3, 4, 4), generators(8), max_steps=max_steps
        )

    x, steps = draw(2000)
    first = steps.argmin()
    y, _ = draw(steps[first])
    assert steps[first] < steps.max() < 2000
    assert gap(y[first], x[first]) < 1e-6 < 1e-3 < gap(y, x)


def test_samples_stand_around_their_target():
    # φ-distances and correlations are numpy's; each target has samples of its own
    model, x = GaussianModel(), torch.tensor([0.1, 0.9]).view(2, 1, 1, 1) + 0.1 * normal(
        2, 3, 16, 16
    )
    model.lam, model.sigma, model.m = 1.0, 0.1, 0.5
    targets = [sample.Target("a", x[:1]), sample.Target("b", x[1:])]
    samples, levels = sample.around(
        model, dict(mean=[0.5] * 3), targets, 3, [0.5, 0.2, 0.05], tol=1e-6
    )
    assert levels[0].converged.shape == (6,)
    assert gap(samples[0][0], samples[0][1]) > 1e-2
    for y, target in zip(samples, targets):
        shared = sample.similarities(model, y, target, scale=2.0)
        distance = (y - target.pictures).mean((2, 3)).norm(dim=1)
        assert max(shared["phi_distance"]) < 0.2  # to the other one it is 1.4
        assert gap(shared["phi_distance"], distance) < 0.05
        assert (
            gap(shared["phi_distance"], 2 * torch.tensor(shared["phi_distance_relative"]))
            < 1e-6
        )
        correlation = np.corrcoef(torch.cat([y, target.pictures]).flatten(1))
        assert gap(shared["correlation_with_target"], correlation[:3, 3]) < 1e-5
        assert (
            gap(shared["correlation_between_samples"], correlation[[0, 0, 1], [1, 2, 2]]) < 1e-5
        )


def test_a_sample_depends_on_its_seed(small):
    # a seed gives the same samples again, and nearly the same among others; σ̂ before matching is that of x_T
    target = sample.Target("", torch.rand(1, 3, 16, 16, generator=unet.seeded("cpu", 5)))
    checkpoint = dict(mean=[0.5] * 3)

    def draw(n, seed=0):
        return sample.around(
            small, checkpoint, [target], n, [0.5, 0.3, 0.1], seed, max_gradients=3
        )

    (x,), levels = draw(2)
    assert torch.equal(draw(2)[0][0], x)
    assert gap(draw(4)[0][0][:2], x) < 1e-3 < 1e-2 < gap(draw(2, seed=1)[0][0], x)
    start = 0.5 + 0.5 * torch.randn(3, 16, 16, generator=unet.seeded("cpu", 0, 1, 0, 0))
    before = sample.noise_level(small.score(start[None]))
    assert gap(levels[0].sigma_before[0], before) < 1e-5 < gap(levels[0].sigma_after[0], before)


def test_conditional_distance_is_the_closed_form_of_eq_4():
    # for u given v ~ N(v, λ) the symmetrised KL divergence is ‖v₁ − v₂‖²/λ
    lam, (x1, x2) = 0.09, torch.zeros(2, 3, 48, 48)
    x2[1] = 0.7

    def denoise(y):  # y = (u, v, w); w = 0 in every picture: it tells σ
        v = y[:, 1:2].mean((2, 3), keepdim=True)
        sigma2 = y[:, 2:].square().mean((2, 3), keepdim=True)
        u_hat = (lam * y[:, :1] + sigma2 * v) / (lam + sigma2)
        return torch.cat([u_hat, 0 * u_hat, 0 * u_hat], 1)

    def encode(y):  # φ is the mean of v
        return y[:, 1:2], []

    def distance(sigmas, phi_draws, seed):
        generator = torch.Generator().manual_seed(seed)
        model = SimpleNamespace(denoise=denoise, encode=encode)
        return sample.conditional_distance(
            model, x1, x2, sigmas, 8, phi_draws, generator, 1e-8, 60
        )

    sigmas, square = np.geomspace(0.01, 20, 20), 48 * 48 * 0.49
    value, error, integrand, matched = distance(sigmas, 4, 0)
    exact = 2 * square * sigmas / (lam + sigmas**2) ** 2
    assert max(abs(integrand.numpy() / exact - 1)[sigmas < 0.5]) < 0.1
    assert 0.8 < matched.min() <= matched[-1] == 1
    assert abs(value * lam / square - 1) < 0.05 and 0 < error < 0.05 * value
    several = [
        distance([0.2, 0.4], 100, seed) for seed in range(6)
    ]  # the error is the spread over seeds
    values, errors = [d[0] for d in several], [d[1] for d in several]
    assert 0.5 < np.mean(errors) / np.std(values) < 1.4


def test_integrate_is_exact_for_powers():
    # also where Eq. 4 grows as σ⁻³
    s = torch.linspace(math.log(0.2), 0, 5).double().exp()
    exact = {-3: 12, -1: -math.log(0.2), 0: 0.8, 2: (1 - 0.2**3) / 3}
    for p, area in exact.items():
        v = torch.stack([s**p, 2 * s**p, 0 * s], 1)
        assert sample.integrate(v, s).tolist() == pytest.approx([area, 2 * area, 0])


def test_panel_has_the_target_in_its_middle():
    # samples stand around it in their order; four pictures of a target share the middle
    samples = torch.linspace(0, 1, 8).view(8, 1, 1, 1).expand(8, 3, 8, 8)
    gray = [round(255 * k / 7) for k in range(8)]
    sheet = sample.panel(samples, torch.ones(1, 3, 8, 8), side=32)
    middles = np.asarray(sheet)[20::40, 20::40, 0].flatten()
    assert middles.tolist() == [*gray[:4], 255, *gray[4:]]
    sheet = sample.panel(samples[:4], samples[4:], side=32)
    quarters = np.asarray(sheet)[52:80:16, 52:80:16, 0].flatten()
    assert quarters.tolist() == gray[4:]


# sample.py: the command line

FAST = "--steps 3 --samples 2 --max-gradients 3"


def one_picture(path, size=8):
    """A picture as a target, (1, 3, size, size)."""
    return unet.to_batch(train.load_picture(path, size)[None])


@pytest.fixture
def record(cli, tmp_path):
    """record("dark.png --seed 1"): what `python sample.py c.pt …` writes to its .json, and what it prints."""

    def call(words):
        code, text = cli(f"sample.py c.pt {words} --device cpu --force --out {tmp_path}/s.png")
        assert code == 0
        return json.loads((tmp_path / "s.json").read_text()), text

    return call


@pytest.mark.parametrize(
    "words, panels",
    [
        ("dark.png odd.png light.png", 3),
        ("--cluster k.npz:1", 1),
        ("", 4),
        ("--unconditional 3", 1),
    ],
)
def test_sample_modes_run(record, words, panels):
    # each gives its panels; device and threads, on which last digits depend, are in the .json
    numbers, _ = record(f"{words} {FAST}")
    assert len(numbers["panels"]) == panels
    assert numbers["device"] == "cpu"
    assert numbers["threads"] == torch.get_num_threads()


def test_sample_record(shelf, record, tmp_path):
    # the .json and the pictures saved singly are those of `around`; a run can be repeated
    words = f"{shelf}/dark.png light.png {FAST} --save-each {tmp_path}/each"
    numbers, text = record(words)
    sheet = (tmp_path / "s.png").read_bytes()
    assert numbers["sigmas"] == pytest.approx([1, 0.515, 0.03])
    assert [level["sigma"] for level in numbers["levels"]] == numbers["sigmas"][:-1]
    model, checkpoint = load_checkpoint(shelf / "c.pt")
    names, unit = ["dark.png", "light.png"], checkpoint["training"]["phi_distance"]
    targets = [sample.Target(name, one_picture(shelf / name)) for name in names]
    samples, _ = sample.around(
        model, checkpoint, targets, 2, numbers["sigmas"], max_gradients=3
    )
    for j, shared in enumerate(numbers["panels"]):
        distances = np.array(shared["phi_distance"])
        assert shared["target"].endswith(names[j])
        assert shared["phi_distance_relative"] == pytest.approx(distances / unit)
        assert f"{distances.mean() / unit:.0%} of that between two" in text
        for i in range(2):
            saved = one_picture(tmp_path / "each" / f"{j:02d}_{i:03d}.png")
            assert gap(saved[0], samples[j][i].clamp(0, 1)) < 0.6 / 255
    record(words)
    assert (tmp_path / "s.png").read_bytes() == sheet


def test_sample_mix_weights(shelf, record, monkeypatch):
    # φ_c is the mean by --weights divided by their sum, or that of a cluster's members
    model, conditions = load_checkpoint(shelf / "c.pt")[0], []

    def reconstruct(model, target, *rest, **options):
        conditions.append(target(0))
        return torch.rand(8, 3, 8, 8), []

    def code(name):
        return phi(model, one_picture(shelf / name), 0)

    monkeypatch.setattr(sample, "reconstruct", reconstruct)
    panel = record("--mix dark.png light.png --weights 1 3")[0]["panels"][0]
    record("--cluster k.npz:0")
    record("--mix dark.png light.png")
    dark, light = code("dark.png"), code("light.png")
    assert gap(conditions[0], 0.25 * dark + 0.75 * light) < 1e-6 < 1e-3 < gap(dark, light)
    assert gap(conditions[1], (code("data/a/00.png") + code("data/b/03.png")) / 2) < 1e-6
    assert gap(conditions[2], (dark + light) / 2) < 1e-6
    assert panel["weights"] == [0.25, 0.75] and "0.75 φ(light.png)" in panel["target"]


def test_sample_denoise_record(shelf, record, monkeypatch):
    # PSNR and noise level are those of x + σz and of x̂; a picture without noise gets a warning
    numbers, text = record("--denoise odd.png --noise 0.1")
    assert numbers["psnr_noisy"] == pytest.approx(20, abs=0.5) and "warning" not in text
    model, x = load_checkpoint(shelf / "c.pt")[0], one_picture(shelf / "odd.png", None)
    y = x + 0.1 * torch.randn(x.shape, generator=unet.seeded("cpu", 0))
    x_hat = model.denoise(y).detach()
    psnr = -10 * math.log10((x_hat - x).square().mean())
    assert numbers["psnr_denoised"] == pytest.approx(psnr, abs=1e-3)
    assert numbers["noise_estimated"] == pytest.approx(
        (x_hat - y).square().mean().sqrt().item(), abs=1e-5
    )
    monkeypatch.setattr(UNet, "denoise", lambda self, y: y + 0.001)
    assert "hardly any noise" in record("--denoise odd.png")[1]


def test_sample_control_is_told_an_untrained_phi(shelf, record, monkeypatch):
    # --control: the same denoiser, targets and noise, another encoder
    calls = []

    def around(told, checkpoint, targets, samples, sigmas, seed, **options):
        y = one_picture(shelf / "odd.png")
        calls.append((told.encode(y)[0], told.score(y), targets, seed))
        return [torch.rand(samples, 3, 8, 8)], []

    monkeypatch.setattr(sample, "around", around)
    record(f"dark.png {FAST} --control --seed 5")
    (phi_1, score_1, *rest_1), (phi_2, score_2, *rest_2) = calls
    assert gap(score_1, score_2) == 0 and rest_1 == rest_2
    assert gap(phi_1, phi_2) > 1e-3


@pytest.fixture
def tiles(shelf, cli, tmp_path, monkeypatch):
    """Larger pictures, of which a network saw tiles; tiles.targets(words): (code, text, targets)."""
    checkpoint, drawn = torch.load(shelf / "c.pt", weights_only=True), []
    for i in range(12):
        save_picture(tmp_path / "data" / f"{i:02d}.png", array(i, 20, 20, 3))
    settings = {**checkpoint["flags"], "data": str(tmp_path / "data"), "patches": True}
    pictures, training_rows, held_out_rows = train.training_data(settings)

    def around(model, checkpoint, targets, samples, *rest, **options):
        drawn[:] = targets
        return [target.pictures.expand(samples, -1, -1, -1) for target in targets], []

    def targets(words, fingerprint=pictures.fingerprint, **changes):
        changed = dict(checkpoint, flags={**settings, **changes}, fingerprint=fingerprint)
        torch.save(changed, tmp_path / "c.pt")
        code, text = cli(f"sample.py c.pt {words} --force", tmp_path)
        return code, text, drawn

    monkeypatch.setattr(sample, "around", around)
    return SimpleNamespace(
        targets=targets, pictures=pictures, training=training_rows, held_out=held_out_rows
    )


def test_sample_targets_are_held_out(tiles):
    # without a target: four held-out pictures, built-in ones for a network of these, else a line
    _, _, drawn = tiles.targets("")
    names = {target.name for target in drawn}
    assert len(names) == 4
    assert names <= {tiles.pictures.paths[i] for i in tiles.held_out}
    _, _, drawn = tiles.targets("", data=None, patches=False)
    assert all(target.name.startswith("built-in") for target in drawn)
    assert "name a target" in tiles.targets("", fingerprint="0")[1]
    code, text, _ = tiles.targets("", data="no/such")
    assert code == 2 and "name a target" in text and "are not here" in text


def test_sample_targets_are_cut_as_in_training(tiles, tmp_path):
    # where training cut tiles, the target is the central one, or the one that a cluster names
    row, x = tiles.training[0], np.asarray(Image.open(tmp_path / "data" / "03.png"))
    np.savez(
        tmp_path / "k.npz", labels=np.array([3]), paths=np.array([tiles.pictures.paths[row]])
    )
    for words, tile in ("data/03.png", x[6:14, 6:14]), (
        "--cluster k.npz:3",
        tiles.pictures.x[row],
    ):
        _, _, drawn = tiles.targets(words)
        assert gap(drawn[0].pictures[0].permute(1, 2, 0) * 255, tile.astype(float)) < 1e-3
    code, text, _ = tiles.targets("data/03.png --out data/new.png")
    assert code == 2 and "lies among the pictures" in text
    assert not (tmp_path / "data" / "new.png").exists()


@pytest.mark.parametrize(
    "line",
    [
        "cannot be read as a picture | c.pt text.png",
        "cannot be read as a picture | c.pt none.png",
        "not a regular file | c.pt fifo.png",
        "not a checkpoint | cut.pt dark.png",
        "must end in .png | c.pt --out x.jpg",
        "is also to be read | c.pt dark.png --out dark.png --force",
        "exists | c.pt --out dark.png",
        "or one of | c.pt dark.png --mix light.png",
        "as many numbers | c.pt --mix dark.png odd.png --weights 1 -1",
        "no such cluster | c.pt --cluster k.npz:7",
        "--noise is for | c.pt dark.png --noise 1",
    ],
)
def test_sample_refuses(cli, line):
    # a line that names the trouble, exit code 2
    words, command = line.split(" | ")
    code, text = cli(f"sample.py {command}")
    assert code == 2 and words in text and text.count("\n") == 1


# analyze.py: statistics and verdicts


def study_of(codes, nulls=(), model=None, x=None, **options):
    """A Study of random 8×8 pictures whose φ is `codes`, (n, d) or {σ: (n, d)}; its M counts as in use."""
    if torch.is_tensor(codes):
        codes = {0.3: codes}
    if x is None:
        x = array(5, len(codes[0.3]), 8, 8, 1)
    checkpoint = {"size": 8, "sigma_max": 1.0, "mean": [0.5]}
    study = analyze.Study(model, checkpoint, x, **options)
    study.network = analyze.View(codes, model)
    study.untrained = [analyze.View(null, model) for null in nulls]
    study.alive = analyze.Alive({}, 0.5, 0, "")
    return study


def judged(study, name):
    """{key of a claim: its verdict} and the numbers of an analysis."""
    numbers = analyze.measure(study, name)
    return verdicts_by_key(name, numbers, numbers["nulls"]), numbers


def verdicts_by_key(name, numbers, nulls):
    """{key of a claim: its verdict} of an analysis."""
    verdicts = {}
    for claim in analyze.claims_of(name):
        key = claim.number.split(".")[1]
        if claim.only in ("textures", "faces"):  # two claims on one number
            key = claim.only
        verdicts[key] = analyze.judge(claim, numbers, nulls).verdict
    return verdicts


def random_codes(n=120, d=12):
    """Three {σ: φ} without any structure."""
    codes = []
    for k in (1, 2, 3):
        codes.append({0.3: normal(n, d, seed=k).abs(), 0.1: normal(n, d, seed=9 + k).abs()})
    return codes


def first_dimensions(x):
    """In place of t-SNE, which takes long."""
    return x[:, :2]


@pytest.fixture
def quick(monkeypatch):
    """A few gradients and steps where Algorithms 1, 2 and Eq. 4 would make many."""
    for name, limit in (
        ("guidance_step", {"max_gradients": 3}),
        ("around", {"max_gradients": 3}),
        ("conditional_distance", {"max_gradients": 3}),
        ("sample_unconditional", {"max_steps": 5}),
    ):
        limited = functools.partial(getattr(analyze, name), **limit)
        monkeypatch.setattr(analyze, name, limited)
    monkeypatch.setattr(analyze, "tsne", first_dimensions)


def test_statistics_by_hand():
    # PR, kurtosis, Otsu's threshold, ranks and colourless pictures are those of a calculation by hand
    v = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    assert gap(analyze.participation_ratio(v), [1 / 4, 1, 16 / 40]) < 1e-6
    assert analyze.participation_ratio(torch.zeros(3)).isnan()
    v = torch.tensor([0.0, 0, 0, 0, 5])  # mean 1, second moment 4, fourth 52
    assert analyze.kurtosis(v).item() == pytest.approx(52 / 16)
    four = np.array([0.9, 0.1, 0.2, 0.8])
    assert analyze.otsu(four) == pytest.approx((0.5, 0.35**2 / 0.125))
    uniform = np.arange(1000.0)
    assert analyze.otsu(uniform)[1] == pytest.approx(3 / 4, abs=1e-3)
    a, b, c = np.array([[1, 2, 2, 4], [1, 9, 9, 99], [1, 9, 5, 99]])
    assert analyze.rank_correlation(a, b) == pytest.approx(1)
    assert analyze.rank_correlation(uniform[:4], c) == pytest.approx(0.8)
    assert math.isnan(analyze.rank_correlation(a, 0 * a))
    x = torch.rand(2, 3, 4, 4) + torch.tensor([0.0, 5, 9]).view(3, 1, 1)
    flat = analyze.less_colour(x)
    assert gap(flat.view(2, 3, 16).mean(2), 0) < 1e-6
    assert gap(flat.norm(dim=1), 1) < 1e-5


def test_standard_errors():
    # errors are over groups, over pairs that share members, and a bootstrap's are those of theory
    assert analyze.estimate([1, 2, 3]) == pytest.approx((2, 1 / math.sqrt(3)))
    assert analyze.estimate([1, 2, 3] * 2, [7, 5, 6] * 2) == pytest.approx(
        (2, 1 / math.sqrt(3))
    )
    assert math.isnan(analyze.estimate([1, 2], [0, 0]).error)
    members, pairs = normal(4000, 15).numpy(), np.transpose(np.tril_indices(15, -1))
    sums = members[:, pairs].sum(
        2
    )  # 4000 draws of 105 pairs, each the sum of its members' values
    errors = np.array([analyze.pairs_error(values, pairs) for values in sums[:200]])
    assert np.sqrt((errors**2).mean()) == pytest.approx(sums.mean(1).std(), rel=0.15)

    def mean(rows):
        return members[rows, 0].mean()

    resampled = analyze.bootstrap(mean, 400, np.random.default_rng(0))
    assert resampled == pytest.approx(analyze.estimate(members[:400, 0]), rel=0.15)


@pytest.mark.parametrize(
    "verdict, value, error, nulls, options",
    [
        ("holds", 1, 0.1, [[0, 0.1]], {}),
        ("holds", 1, 0.1, [], {}),
        ("fails", 0.1, 0.1, [], {}),  # within two errors of 0
        ("holds", 0.1, 0.1, [], {"rule": True}),
        ("holds", 1, 0.1, [[math.nan, 0.1]], {}),
        ("not comparable", 1, 0.1, [[0], []], {}),
        ("fails", -1, 0.1, [[0, 0.1]], {}),
        ("fails", 1, 0.1, [[0, 0.1]], {"sign": -1}),
        ("holds", -1, 0.1, [[0, 0.1]], {"sign": -1}),
        ("fails", 1, 0.1, [[0, 0.1]], {"rule": False}),
        ("not comparable", 1, 0.1, [[0, 0.1]], {"rule": None}),
        ("not comparable", math.nan, 0.1, [[0]], {}),
        ("not comparable", 1, math.nan, [[0]], {}),
        ("not comparable", 1, 0.1, [[0], [math.nan]], {}),
        ("holds", 1, 0.1, [[0, 0.1]], {"effect": 0.9}),
        ("fails", 1, 0.1, [[0, 0.1]], {"effect": 1.1}),
        ("fails", 1, 0.6, [[0, 0.1]], {"rule": True}),  # within two errors of the null
        ("fails", 1, 0.1, [[0, 0.9]], {}),  # within its spread
        ("fails", 1, 0.1, [[0.0] * 20 + [1.01]], {}),  # one replicate is ahead
        ("fails", 1, 0.1, [[0, 0.1], [2, 2.1]], {}),  # every null counts
        ("holds", 0.2, 0.01, [[0.5, 0.51]], {"sign": 0, "rule": True}),
        ("fails", 0.2, 0.01, [[0.2, 0.21]], {"sign": 0, "rule": True}),
    ],
)
def test_a_claim_holds_beyond_every_null(verdict, value, error, nulls, options):
    # the verdict is that of the number, its error, its own rule and all replicates of all nulls
    def rule(numbers):
        return options["rule"]

    names, replicates = "ab"[: len(nulls)], {}
    for name, values in zip(names, nulls):
        replicates[name] = [{"key": null} for null in values]
    claim = analyze.Claim(
        "", "", "any.key", options.get("sign", 1), options.get("effect", 0), " ".join(names)
    )
    if "rule" in options:
        claim = claim._replace(rule=rule)
    numbers = {"key": analyze.Estimate(value, error)}
    assert analyze.judge(claim, numbers, replicates).verdict == verdict
    assert analyze.judge(claim, numbers, replicates, "M is dead").verdict == "not comparable"
    claim = claim._replace(about_phi=False)
    assert analyze.judge(claim, numbers, replicates, "M is dead").verdict == verdict


@pytest.mark.parametrize(
    "use, cosine, silent, why",
    [
        (0.2, 0.9, 0, ""),
        (0.1, 0.98, 1, ""),
        (0.09, 0.9, 0, "use"),
        (math.nan, 0.9, 0, "use"),
        (0.2, 0.981, 0, "cosine"),
        (0.2, math.nan, 0, "cosine"),
        (0.2, 0.9, 2, "silent"),
    ],
)
def test_limits_of_a_living_phi(monkeypatch, use, cosine, silent, why):
    # φ counts as alive if M is in use, pictures differ and channels speak
    def use_of_M(model, x):
        return {0.5: np.full(len(x), use)}

    def variety(code):
        return {"cosine": cosine, "silent": silent}

    study = study_of(normal(30, 12).abs())
    del study.alive
    monkeypatch.setattr(analyze, "use_of_M", use_of_M)
    monkeypatch.setattr(analyze, "variety", variety)
    assert why in study.alive.why_not
    assert bool(study.alive.why_not) == bool(why)
    assert ("NOT alive" in analyze.alive_line(study.alive)) == bool(why)


def test_nulls_keep_what_they_say():
    # shuffled φ keeps the marginals and loses joint structure; the Gaussian keeps mean and covariance
    code = normal(2000, 1).abs() * (
        1 + normal(2000, 3).abs()
    )  # all channels together large or small
    study = study_of({0.3: code, 0.1: 2 * code})
    shuffled = [view.phi for view in study.nulls("shuffled")]
    assert len(shuffled) == 3 and gap(shuffled[0][0.3], shuffled[1][0.3]) > 0.1
    for phis in shuffled:
        assert gap(phis[0.3].sort(0).values, code.sort(0).values) == 0
        assert abs(torch.corrcoef(phis[0.3].T)[0, 1]) < 0.1 < torch.corrcoef(code.T)[0, 1]
        assert gap(phis[0.1], 2 * phis[0.3]) < 1e-6  # in the same order at all σ
    for view in study.nulls("Gaussian"):
        twin = view.phi[0.3]
        assert gap(torch.cov(twin.T), torch.cov(code.T)) < 0.15 * code.var()
        assert gap(twin.mean(0), code.mean(0)) < 0.1
        assert gap(analyze.kurtosis(twin), 3) < 0.5


# analyze.py: each analysis of a planted φ, its numbers and verdicts known


def test_look_is_phi_in_batches_and_keeps_maps():
    # φ of a picture is that of its batch alone, and the maps' averages are φ
    torch.manual_seed(0)
    model, n = UNet(width=2, channels=1, levels=1), analyze.BATCH + 6
    study = study_of(normal(n, 4), model=model, sigmas=(0.3, 0.15, 0.0), draws=4)
    view = analyze.look(study, model)
    for (sigma, code), draws in zip(view.phi.items(), (4, 2, 1)):
        for rows in (range(analyze.BATCH), range(analyze.BATCH, n)):
            generator = study.noise("φ", round(1e6 * sigma), rows.start)
            alone = phi(model, study.pictures(rows), sigma, draws, generator)
            assert gap(code[rows], alone) < 1e-5
    assert gap(view.maps.mean((2, 3)), view.phi[0.3]) < 1e-6


def test_sparsity_of_a_hand_set_network():
    # PR is that of either side of a block, and its change is from the input to the output
    model = UNet(width=2, channels=1, levels=2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # every layer then puts out ReLU(its bias), whatever goes in
    model.blocks["E1"][-2].bias.data = torch.tensor([1.0, 0])
    model.blocks["E2"][-2].bias.data = torch.tensor([1.0, 1, 1, 1])
    model.blocks["M"][-2].bias.data = torch.tensor([0, 0, 7.0, 0, 0, 0, 0, 0])
    model.up["D2"].bias.data = torch.tensor([2.0, 2, 2, 2])
    model.blocks["D2"][-2].bias.data = torch.tensor([3.0, 1, 0, 0])
    study = study_of(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]] * 8), model=model, draws=2)
    study.untrained = [
        study.network
    ] * 3  # the same network "before training": nothing was learnt
    verdicts, numbers = judged(study, "sparsity")
    for block, before, after in (
        ("E2", 1 / 2, 1),
        ("M", 1, 1 / 8),
        ("D2", 12**2 / 8 / 20, 16 / 40),
    ):
        assert gap(numbers["pr"][block].input, before) < 1e-6
        assert gap(numbers["pr"][block].output, after) < 1e-6
        assert numbers["change"][block].value == pytest.approx(after - before)
    assert numbers["M"] == numbers["change"]["M"]
    assert numbers["decoder"] == numbers["change"]["D2"]
    assert numbers["encoder"] == numbers["change"]["E2"]
    assert numbers["phi_pr"].value == pytest.approx(1 / 4)
    assert set(verdicts.values()) == {"fails"}
    nothing = {null: [dict.fromkeys(numbers, 0.0)] * 2 for null in ("untrained", "shuffled")}
    assert set(verdicts_by_key("sparsity", numbers, nothing).values()) == {"holds"}


def test_sparsity_of_several_blocks_is_that_of_the_one_that_goes_least():
    # of decoder blocks the one that falls least counts, of encoder blocks the one that rises least
    active = {
        "E2": (1, 2),
        "E3": (1, 4),
        "M": (4, 1),
        "D3": (2, 1),
        "D2": (4, 1),
    }  # of four channels

    class Blocks:
        """A network of which only these averages are known."""

        def activations(self, y):
            sides = {}
            for block, (before, after) in active.items():
                rows = [
                    (torch.arange(4) < n).float().expand(len(y), 4) for n in (before, after)
                ]
                sides[block] = unet.Sides(*rows)
            return sides

    study = study_of(normal(8, 4).abs(), model=Blocks(), draws=1)
    numbers = analyze.sparsity(study, study.network)
    assert numbers["decoder"].value == pytest.approx(-1 / 4)
    assert numbers["encoder"].value == pytest.approx(1 / 4)


class Powers:
    """ā_M is (1, gain · mean y, 0.3 mean y²), and mean y² is σ² + mean x²."""

    def __init__(self, gain):
        self.gain = gain

    def activations(self, y):
        power, mean = y.square().mean((1, 2, 3)), y.mean((1, 2, 3))
        outputs = {
            "E1": torch.stack([1 + power, power**4], 1),
            "M": torch.stack([torch.ones_like(power), self.gain * mean, 0.3 * power], 1),
            "D1": power[:, None],
        }
        return {block: analyze.Sides(output, output) for block, output in outputs.items()}


def test_stability_in_closed_form():
    # cosines are those of the formula, a constant is not stable, and the lead is over the next block
    black = np.zeros((40, 32, 32, 1), np.uint8)
    study = study_of(normal(40, 3), x=black, model=Powers(0))
    numbers = analyze.stability(study, study.network)  # ā_M is (1, 0, 0.3 σ²) for every picture
    sigma = np.array(numbers["sigma_2"])
    lengths = np.sqrt((1 + 0.09 / 16) * (1 + 0.09 * sigma**4))
    cosine = (1 + 0.09 * 0.25 * sigma**2) / lengths
    curves = numbers["curves"]
    assert gap(curves["M"].mean(1), cosine) < 0.005
    assert sigma.min() == 0 and sigma.max() == 1 and "D1" not in curves
    assert abs(numbers["lead"].value) < 0.01
    assert numbers["rival"] == "M of another picture"
    assert numbers["norm"].value == pytest.approx(1 / math.sqrt(1 + 0.09 / 16), abs=1e-3)
    k = list(sigma).index(0.5)
    fall = (curves["M"] - curves["E1"])[k] - (curves["M"] - curves["E1"])[0]
    assert numbers["fall"].value == pytest.approx(fall.mean(), abs=1e-6)

    gray = black + np.linspace(0, 120, 40).astype(np.uint8)[:, None, None, None]
    study = study_of(normal(40, 3), x=gray, model=Powers(30))
    study.untrained = [analyze.View({}, Powers(0)), analyze.View({}, Powers(1))]
    verdicts, numbers = judged(study, "stability")
    assert verdicts["lead"] == "holds" and numbers["rival"] == "E1"
    study.untrained = [study.network] * 3
    assert judged(study, "stability")[0]["lead"] == "fails"


def test_selectivity_of_planted_channels():
    # PR of a channel is the share of pictures that excite it, and only these are shown
    code = torch.zeros(20, 5)
    code[3, 0], code[[4, 5], 1] = 9, torch.tensor(
        [1.0, 2]
    )  # PR 1/20, 9/(20·5); channel 2 is silent
    code[:, 3], code[:, 4] = 1, 2 - torch.arange(20) / 100
    numbers = analyze.selectivity(study_of(code), analyze.View({0.3: code}))
    assert gap(numbers["pr"][[0, 1, 3]], [1 / 20, 9 / 100, 1]) < 1e-6
    assert np.isnan(numbers["pr"][2]) and numbers["common"].value == 1 / 2
    special, common = analyze.channel_groups(code)
    assert list(special) == [0, 1] and sorted(common) == [3, 4]
    assert list(analyze.top_pictures(code, 1)) == [5, 4]  # no ties at zero
    assert list(analyze.top_pictures(code, 4)) == list(range(9))


@pytest.mark.parametrize(
    "holding, low, high",
    [
        ("uneven", [0, 0.5], [0.5, 1]),
        ("bimodality", [0.1, 0.7], [0.2, 0.8]),
        ("textures", [0.05, 0.05], [0.3, 0.3]),
        ("faces", [0.6, 0.6], [0.95, 0.95]),
    ],
)
def test_selectivity_of_four_data_sets(holding, low, high):
    # the paper's sentence on each of its data sets holds for channels spread as it says, and no other does
    pr = np.linspace(low, high, 60).flatten()  # of two groups of channels
    code = np.arange(200)[:, None] < 200 * pr  # PR of a coin is its probability
    nulls = [{0.3: 1 + 0.1 * normal(200, 120, seed=k).abs()} for k in (1, 2)]
    verdicts, _ = judged(study_of(torch.from_numpy(code).float(), nulls), "selectivity")
    assert [key for key, verdict in verdicts.items() if verdict == "holds"] == [holding]


def test_neighbours_of_planted_subspaces():
    # φ's lead over pixels is seen, and subspaces are found where they are and not in clusters
    labels, code = np.arange(120) % 3, 0.01 * normal(120, 12, seed=9).abs()
    for c in range(3):  # a union of three subspaces of two dimensions each
        code[c::3, 2 * c : 2 * c + 2] += 0.5 + normal(40, 2, seed=c).abs()
    verdicts, numbers = judged(study_of(code, random_codes(), labels=labels), "neighbours")
    assert set(verdicts.values()) == {"holds"}
    assert numbers["agreement, φ"].value == 1
    assert numbers["chance"] == pytest.approx(39 / 119)
    assert abs(numbers["agreement, pixels"].value - 1 / 3) < 0.12
    assert set(labels[numbers["nearest in φ"][0]]) == {labels[numbers["groups"][0, 0]]}
    same = study_of(
        code, [{0.3: code}] * 3, labels=labels
    )  # the untrained network does as well
    assert set(judged(same, "neighbours")[0].values()) == {"fails"}
    for labels in (
        None,
        np.arange(120),
        np.zeros(120, int),
    ):  # no classes, of one picture each, one class
        verdicts, _ = judged(study_of(code, random_codes(), labels=labels), "neighbours")
        assert list(verdicts.values()) == ["holds", "not comparable", "not comparable"][::-1]
    code = 3 * normal(5, 12, seed=3).abs()[np.arange(120) % 5] + 0.3 * normal(120, 12, seed=4)
    verdicts, _ = judged(study_of(code, random_codes()), "neighbours")
    assert verdicts["subspaces"] == "fails"  # five clusters that spread alike in all directions


def test_clusters_beside_classes():
    # clusters are judged by their distance in SD, and a start from the classes by where it ends
    code = (8 * torch.eye(12)[:6]).repeat(20, 1) + normal(120, 12) + 5
    codes = {0.3: code, 0.1: code + 0.1 * normal(120, 12, seed=7)}
    across = study_of(codes, random_codes(), clusters=6, labels=np.arange(120) // 6 % 6)
    verdicts, numbers = judged(across, "clusters")
    assert np.bincount(numbers["labels"]).tolist() == [20] * 6
    assert numbers["seeds"] == numbers["at_next_sigma"].value == 1
    assert numbers["ratio"].value == pytest.approx(8 * 2**0.5, 0.15)
    assert numbers["least"] > 4 and numbers["classes"].ratio.value < 1
    assert (
        numbers["start"].value > 0.3 > numbers["start_classes"] + 0.2
    )  # away from the classes
    assert list(verdicts.values())[:3] == ["holds"] * 3
    same = study_of(codes, random_codes(), clusters=6, labels=np.arange(120) % 6)
    verdicts, numbers = judged(same, "clusters")  # classes are clusters
    assert numbers["start_classes"] == 1 and numbers["classes"].ratio.value > 4
    assert list(verdicts.values()) == ["holds", "fails", "holds", "holds"]
    bare = study_of(code, random_codes(), clusters=6)  # without classes and a second σ
    assert list(judged(bare, "clusters")[0].values()) == ["holds", *["not comparable"] * 3]
    with pytest.raises(analyze.Skip, match="120 pictures cannot make 90 clusters"):
        analyze.clusters(study_of(codes, clusters=90), analyze.View(codes))


def test_channels_of_planted_correlations(monkeypatch):
    # a property that rises with PR has correlation +1, one that falls −1, and each claim has its own sign
    on = torch.arange(1, 21)
    order = torch.from_numpy(np.random.default_rng(3).permutation(80))
    code = (order[:, None] < 2 * on).float()  # channel c is 1 for 2 (c + 1) of 80 pictures
    best = np.arange(64).reshape(8, 8) < 2 * on[:, None, None].numpy()
    pr = analyze.channel_selectivity(code[::2])

    def map_statistics(maps):
        return pr, -pr

    def tuning(study, model):
        return best.astype(float)

    monkeypatch.setattr(analyze, "map_statistics", map_statistics)
    monkeypatch.setattr(analyze, "tuning", tuning)
    codes = {0.3: code, 0.1: code + torch.linspace(2, 0.05, 20) * normal(80, 20)}
    numbers = analyze.channels(study_of(codes), analyze.View(codes))
    assert gap(numbers["pr"], pr) < 1e-9
    assert gap(numbers["properties"]["tuning"], 2 * on / 64) < 1e-9
    p = code[1::2].double().mean(0).numpy()  # of a coin
    kurtosis = ((1 - p) ** 3 + p**3) / (p * (1 - p))
    assert np.nanmax(abs(numbers["properties"]["kurtosis"] - kurtosis)) < 1e-6
    assert numbers["spatial PR"].value == pytest.approx(1)
    assert numbers["PCA dimension"].value == pytest.approx(-1)
    assert numbers["tuning"].value > 0.99 and numbers["kurtosis"].value < -0.8
    nothing = {"untrained": [dict.fromkeys(numbers, 0.0)] * 2}
    verdicts = verdicts_by_key("channels", numbers, nothing)
    failing = [key for key, verdict in verdicts.items() if verdict == "fails"]
    assert failing == ["contrast", "PCA dimension"]  # a coin is far from Gaussian
    heaviness = np.array([9.0, 8, 7, 9, 8, 3.5, 2.5, 3.2, 3, 3])
    assert analyze.tails(np.arange(10), heaviness) == pytest.approx((0.2, 5 - 0.2))


def test_map_statistics_of_all_maps():
    # spatial PR and dimension of a channel are those of its maps, one by one
    maps = normal(50, 3, 4, 5).abs() * torch.tensor([1.0, 2, 5]).view(3, 1, 1)
    spatial, dimension = analyze.map_statistics(maps)
    for c, v in enumerate(maps.double().flatten(2).unbind(1)):  # (n, hw)
        size, pr = v.mean(1), v.sum(1).square() / (20 * v.square().sum(1))
        assert spatial[c] == pytest.approx((size * pr).sum() / size.sum())
        eigenvalues = torch.linalg.eigvalsh(torch.cov(v.T))
        assert dimension[c] == pytest.approx(
            eigenvalues.sum() ** 2 / eigenvalues.square().sum()
        )


def test_tuning_is_beyond_a_gray_field(monkeypatch):
    # a channel that answers to gray as to any grating is not tuned; gratings have their frequency and angle
    def contrast(model, x, *options):
        return 5 + x.flatten(1).std(1)[:, None] * torch.tensor([0.0, 1])

    monkeypatch.setattr(analyze, "phi", contrast)
    response = analyze.tuning(study_of(normal(8, 2)), SimpleNamespace(channels=1))
    assert response.shape == (2, 8, 8)
    assert abs(response[0]).max() < 1e-6 and response[1].min() > 0.2
    bank = analyze.gratings(24, 3)  # 1 to 8 cycles a picture
    assert bank.shape == (8, 8, 4, 3, 24, 24)
    for frequency, cycles in ((0, 1), (7, 8)):
        for angle, place in ((0, (0, cycles)), (4, (cycles, 0))):  # 4: a quarter turn
            spectrum = torch.fft.fft2(bank[frequency, angle, 0, 0] - 0.5).abs()
            peak = int(spectrum[:12, :12].argmax())
            assert divmod(peak, 12) == place


@pytest.mark.parametrize(
    "power, rank, log_ratio",
    [(1, "holds", "holds"), (4, "holds", "fails"), (-1, "fails", "fails")],
)
def test_embedding_of_known_laws(monkeypatch, power, rank, log_ratio):
    # d² is compared with the distance of φ of the same pair, at the largest σ
    def mean_and_contrast(model, x, sigma, *options):
        assert sigma == 1
        flat = 20 * x.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1)], 1)

    def distance(model, x1, x2, sigmas, *options):
        assert (min(sigmas), max(sigmas)) == pytest.approx((0.2, 1))
        one, two = mean_and_contrast(None, torch.stack([x1, x2]), 1)
        return 3 * float((one - two).square().sum()) ** power, 0.0

    monkeypatch.setattr(analyze, "conditional_distance", distance)
    monkeypatch.setattr(analyze, "phi", mean_and_contrast)
    study = study_of(normal(60, 3), pairs=30)
    numbers = analyze.embedding(study, study.network)
    nulls = {"untrained": [{"rank": 0.1, "log_ratio": 9.0}], **numbers["nulls"]}
    assert verdicts_by_key("embedding", numbers, nulls) == {
        "rank": rank,
        "log_ratio": log_ratio,
    }
    assert numbers["rank"].value == pytest.approx(np.sign(power))
    assert numbers["percentiles"] <= numbers["B"] / numbers["A"] + 1e-9


def test_noise_level_of_a_known_matching(monkeypatch):
    # told its own φ, then another picture's, the ratio is the level after matching over that before
    def phi_of(*options):
        return factors

    def guidance_step(model, y, phi_c, memory):
        return y * phi_c.view(-1, 1, 1, 1), None

    factors = torch.tensor([[1.0], [1.1], [1.2], [1.5]])
    monkeypatch.setattr(analyze, "guidance_step", guidance_step)
    monkeypatch.setattr(analyze, "phi", phi_of)
    study = study_of(normal(4, 3), model=SimpleNamespace(score=torch.neg))
    own, other, random = analyze.match_noisy(study, study.pictures(range(4)), 0.3)
    assert gap(own, factors[:, 0]) < 1e-5
    assert gap(other, [1.5, 1.0, 1.1, 1.2]) < 1e-5
    assert gap(random[1], 1) < 1e-5 and 1 < random[0] < 1.5  # as long: 0 and half of y


@pytest.mark.parametrize(
    "inside, own, random, verdict",
    [
        (1.03, 0.97, 2, "holds"),
        (1.03, 0.97, 1, "not comparable"),  # any step would keep the level
        (1.2, 1.0, 2, "fails"),
        (0.8, 1.0, 1, "fails"),
        (1.0, 1.2, 2, "fails"),
    ],
)
def test_matching_and_layout(monkeypatch, inside, own, random, verdict):
    # the first level and small noise do not count; samples share their target's layout, the control's do not
    def match_noisy(study, x, sigma):
        return np.full((3, len(x)), [[own], [1.0], [random]])

    def algorithm_1(study, encoder, x, samples, name):
        pictures = normal(len(x), 1, *x.shape[1:])
        if encoder is study.model:
            pictures = x[:, None] + 0.3 * pictures
        before, levels = torch.ones(len(x)), []
        for sigma, ratio in ((1.0, 2), (0.5, inside), (0.05, 2)):
            levels.append(
                SimpleNamespace(sigma=sigma, sigma_before=before, sigma_after=ratio * before)
            )
        return list(pictures), levels

    monkeypatch.setattr(analyze, "match_noisy", match_noisy)
    monkeypatch.setattr(analyze, "algorithm_1", algorithm_1)
    study = study_of(normal(12, 4), model=UNet(2, 1, 1))
    study.untrained = [analyze.View({}, UNet(2, 1, 1))] * 3
    verdicts, numbers = judged(study, "matching")
    assert verdicts == {"level": verdict, "layout": "holds"}
    assert numbers["random"] == random - 1
    x = study.pictures(range(8))
    assert analyze.layout(x, x).mean() > 0.9 > 0 > analyze.layout(x.roll(1, 0), x).mean()


# analyze.py: the command line

TINY = "--draws 2 --steps 3 --pairs 5 --device cpu"


def prepared(line, checkpoint, monkeypatch):
    """What `prepare` makes of a command line."""
    monkeypatch.setattr("sys.argv", ["analyze.py", "c.pt", *line.split()])
    return analyze.prepare(analyze.arguments(), UNet(4, 3, 1), checkpoint, "cpu")


def test_analysed_pictures(shelf, monkeypatch, tmp_path):
    # they are held out, both sides of the split are themselves, and names of files change nothing
    def contents(x):
        return {picture.tobytes() for picture in x}

    _, checkpoint = load_checkpoint(shelf / "c.pt")
    pictures, training, held_out = train.training_data(checkpoint["flags"])
    study, paths, what = prepared("", checkpoint, monkeypatch)
    assert len(study.x) == len(paths) == 32 and what == "held out"
    assert contents(study.x) == contents(study.held_out) == contents(pictures.x[held_out])
    assert contents(study.training) == contents(pictures.x[training])
    for i, path in enumerate((shelf / "data").rglob("*.png")):
        renamed = tmp_path / "data" / path.parent.name / f"{7 * i % 80}.png"
        renamed.parent.mkdir(parents=True, exist_ok=True)
        renamed.write_bytes(path.read_bytes())
    one, _, what = prepared(f"--data {shelf}/data --images 60", checkpoint, monkeypatch)
    two, _, _ = prepared(f"--data {tmp_path}/data --images 60", checkpoint, monkeypatch)
    assert gap(one.x, two.x) == 0 and len(one.x) == 60 and what == "training and held-out"
    other, _, what = prepared(f"--data {shelf}/data/a", checkpoint, monkeypatch)
    assert what == "other pictures" and other.training is None
    checkpoint["flags"]["data"] = "gone"
    with pytest.raises(UserError, match="gone: .* --data names others"):
        prepared("", checkpoint, monkeypatch)


def test_analyze_from_the_command_line(cli, shelf, tmp_path, quick):
    # every figure, number and verdict is there, and an untrained network confirms nothing about φ
    out = tmp_path / "out"
    code, text = cli(
        f"analyze.py c.pt {TINY} --out {out} --data data --clusters 4 --pictures dark.png"
    )
    assert code == 0 and "φ is NOT alive, by use" in text and "clusters: " in text
    record = json.loads((out / "results.json").read_text())
    skipped = [name for name, numbers in record["analyses"].items() if "skipped" in numbers]
    assert skipped == ["generalisation", "regularity"]
    figures, page = {path.stem for path in out.glob("*.png")}, (out / "index.html").read_text()
    assert {
        "sparsity",
        "attributes",
        "subspaces",
        "cluster-members",
        "scores",
        "unconditional",
    } <= figures
    assert all(f'src="{name}.png"' in page for name in figures) and len(figures) == 16
    about_phi = [claim.text for claim in analyze.CLAIMS if claim.about_phi]
    for verdict in record["verdicts"]:
        assert verdict["claim"] not in about_phi or verdict["verdict"] == "not comparable"
    with np.load(out / "phi.npz") as file:
        assert file["phi"].shape == (80, 8) and set(file["labels"]) == {0, 1}
    assert cli(f"kmeans.py {out}/phi.npz --K 3 --out {out}/k.npz")[0] == 0  # its reader
    code, text = cli(f"analyze.py --table {out}/results.json {out}/results.json")
    assert code == 0 and "| claim | c.pt | c.pt |" in text and "| (–) | (–) |" in text
    assert "is not empty" in cli(f"analyze.py c.pt --out {out}")[1]
    code, text = cli("analyze.py c.pt --out data/figures")
    assert code == 2 and "among the pictures" in text and not (shelf / "data/figures").exists()


def test_phi_without_structure_confirms_nothing(shelf, quick, monkeypatch, tmp_path):
    # independent random rows with random labels hold no claim about φ, through the whole pipeline
    model, checkpoint = load_checkpoint(shelf / "c.pt")
    study, _, _ = prepared(f"{TINY} --data {shelf}/data --clusters 6", checkpoint, monkeypatch)
    study.out, study.alive = str(tmp_path), analyze.Alive({}, 0.5, 0, "")
    rng = np.random.default_rng(0)
    study.labels = rng.integers(0, 4, 80)
    codes = {
        sigma: torch.from_numpy(rng.gamma(0.4, size=(80, 8))).float() for sigma in (0.3, 0.1)
    }
    study.network = study.network._replace(phi=codes)
    names = list(analyze.ANALYSES)
    names = names[: names.index("reconstruction")]
    verdicts, _, _ = analyze.analyse(study, names, study.progress)
    about_phi = [claim.text for claim in analyze.CLAIMS if claim.about_phi and not claim.only]
    holding = [verdict.claim for verdict in verdicts if verdict.verdict == "holds"]
    assert len(verdicts) > 20
    assert not set(holding) & set(about_phi)


# analyze.py: paper B


def paper_b(x, data=None):
    """A Study of pictures x (n, 8, 8, 1) uint8, which are held-out and training pictures, too."""
    checkpoint = {
        "size": 8,
        "sigma_max": 1.0,
        "mean": [0.5],
        "flags": {"data": data},
        "model": {"width": 2, "channels": 1, "levels": 1},
    }
    study = analyze.Study(None, checkpoint, x, training=x, held_out=x)
    study.training_groups = study.held_out_groups = study.groups
    return study


def view_of(denoise):
    """The view of a denoiser that is a function."""
    return analyze.View({}, SimpleNamespace(denoise=denoise, channels=1))


def list_of_verdicts(analysis, numbers):
    """The verdicts on an analysis, in the order of its claims."""
    verdicts = []
    for claim in analyze.CLAIMS:
        if claim.number.startswith(analysis):
            verdict = analyze.judge(claim, numbers, numbers.get("nulls", {}))
            verdicts.append(verdict.verdict)
    return verdicts


@pytest.mark.parametrize(
    "lead, spread, verdict",
    [
        (0.0, 0.01, "holds"),
        (0.3, 0.01, "fails"),
        (-0.3, 0.01, "fails"),
        (0.3, 1, "not comparable"),
    ],
)
def test_denoising_of_training_and_held_out_pictures(monkeypatch, lead, spread, verdict):
    # the gap is that of training and held-out PSNR; its error counts groups, not tiles
    def evaluate(model, x, sigmas, micro_batch):
        psnr = 20 + spread * normal(len(x)).numpy()
        if x.mean() > 0.5:
            psnr += lead
        return {sigma: psnr + sigma for sigma in sigmas}

    monkeypatch.setattr(analyze, "evaluate", evaluate)
    study = paper_b(np.full((40, 8, 8, 1), 20, np.uint8))
    study.training = study.x + 200
    numbers = analyze.denoising(study, view_of(None))
    assert list_of_verdicts("denoising", numbers) == [verdict]
    assert numbers["gap"].value == pytest.approx(lead, abs=1e-5)
    study.training_groups = study.groups // 20
    of_groups = analyze.denoising(study, view_of(None))
    assert of_groups["gap"].error != numbers["gap"].error


def test_jacobian_basis_by_finite_differences():
    # eigenvalues, eigenvectors, singular pairs and b are those of the Jacobian by finite differences
    def denoise(y):
        return y + network.denoise(y)

    def f(y):
        return denoise(y.view(1, 1, 8, 8)).flatten().detach()

    torch.manual_seed(0)
    network = UNet(4, 1, 1).double()
    y = normal(64).double()
    steps = 1e-6 * torch.eye(64)
    columns = [f(y + step) - f(y - step) for step in steps]
    J = torch.stack(columns, 1) / 2e-6
    b = f(y) - J @ y
    values, vectors = torch.linalg.eigh((J + J.T) / 2)
    U, _, Vt = torch.linalg.svd(J)
    model = SimpleNamespace(denoise=denoise)
    basis = analyze.jacobian_basis(model, y.view(1, 8, 8))
    assert gap(basis.values, values.flip(0)) < 1e-6
    cosines = (basis.vectors * vectors.flip(1)).sum(0)
    assert gap(cosines.abs(), torch.ones(64)) < 1e-6
    products = (U.T * Vt).sum(1)
    assert gap(basis.alignment, products[:10]) < 1e-6
    assert gap(basis.bias, b.norm() / f(y).norm()) < 1e-6


def test_harmonics_of_the_wiener_filter():
    # a linear denoiser has no lead over itself and is symmetric; random weights are not
    def denoise(y):
        return linear(y, study.sigma)

    study = paper_b(array(5, 120, 8, 8, 1))
    order = study.choose(120, "harmonics")
    linear, _ = analyze.wiener(study.pictures(order[3:]))
    numbers = analyze.harmonics(study, view_of(denoise))
    assert abs(numbers["adapted"].value) < 1e-3
    assert abs(numbers["decay"].value) < 1e-3
    assert numbers["symmetry"].value == pytest.approx(1, abs=1e-4)
    assert list_of_verdicts("harmonics", numbers) == ["fails", "fails", "holds"]
    assert len(numbers["nulls"]["other-picture"]) == 2
    assert set(analyze.draw_harmonics(study, numbers)) == {"harmonics"}
    x = normal(1, 1, 40, 33)
    assert gap(analyze.central(x), x[:, :, 4:36, :32]) == 0


def test_table_of_claims_from_results(tmp_path):
    # a sign a network; brackets where the paper speaks of other pictures; no row that nobody has measured
    verdicts = {
        "Fig. 1, 10": "holds",
        "Fig. 20": "fails",
        "Fig. 7": "not comparable",
        "Fig. 3": "holds",
    }
    record = {"checkpoint": {"name": "a.pt"}, "kind": "faces", "verdicts": []}
    for claim in analyze.CLAIMS:
        if claim.place in verdicts:
            record["verdicts"].append({"claim": claim.text, "verdict": verdicts[claim.place]})
    (tmp_path / "results.json").write_text(json.dumps(record))
    table = analyze.claims_table([tmp_path / "results.json"])
    signs = [row.split(" | ")[1].strip("| ") for row in table.splitlines()[2:]]
    assert signs == ["✓", "(✓)", "✗"] and "a.pt" in table.splitlines()[0]


def test_posterior_mean_against_brute_force():
    # the closed form of memorisation is the training pictures' mean, weighted by their likelihood
    x = torch.rand(5, 1, 2, 3)
    y = torch.rand(4, 1, 2, 3)
    for sigma in 0.05, 0.3, 3:
        means = analyze.posterior_mean(y, sigma, x)
        for noisy, mean in zip(y.double(), means):
            total, weights = 0, 0
            for picture in x.double():
                distance = (noisy - picture).norm().item()
                weight = math.exp(-(distance**2) / (2 * sigma**2))
                total += weight * picture
                weights += weight
            assert gap(mean, total / weights) < 1e-5


def test_wiener_filter():
    # the linear null is m + C(C + σ²)⁻¹(y − m), and its basis has the eigenvectors of this matrix
    x = torch.rand(30, 1, 3, 3)
    y = torch.rand(4, 1, 3, 3)
    flat = x.flatten(1)
    mean = flat.mean(0)
    C = flat.T.cov(correction=0)
    J = C @ (C + 0.04 * torch.eye(9)).inverse()
    denoise, basis_at = analyze.wiener(x)
    x_hat = denoise(y, 0.2).flatten(1)
    assert gap(x_hat, mean + (y.flatten(1) - mean) @ J.T) < 1e-5
    values, vectors = basis_at(0.2)[:2]
    assert gap(vectors * values @ vectors.T, J) < 1e-5
    assert (values.diff() <= 0).all()


def test_slope_and_psnr_curve():
    # no denoising has a slope of 1, a constant one of 0; there is a PSNR for each picture
    x = torch.rand(64, 1, 16, 16)
    for strength in 0, 1:

        def denoise(y, sigma):
            return strength * y

        curve = analyze.psnr_curve(denoise, x, analyze.FIT)  # (11, 64)
        slopes = analyze.slope(curve)
        assert slopes.mean() == pytest.approx(strength, abs=0.01)
        if strength:
            assert gap(curve.mean(1), range(0, 21, 2)) < 0.15
        else:
            errors = x.square().mean((1, 2, 3))
            assert gap(curve[0], -10 * errors.log10()) < 1e-4


@pytest.mark.parametrize(
    "data, strength, optimum, verdict",
    [
        ("calpha:1", 0.6, 1 / 2, "not comparable"),  # the Wiener filter's slope is 0.56
        ("calpha:2", 0.6, 2 / 3, "holds"),  # this one's is 0.65
        ("calpha:5", 0.6, 5 / 6, "fails"),
        ("disc", 0.6, 1, "holds"),
        ("disc", 1, 1, "fails"),
    ],
)
def test_regularity(data, strength, optimum, verdict):
    # the slope is held against A/(A + 1), and on discs it is below 1
    def denoise(y):
        return 0.5 + strength * (y - 0.5)

    study = paper_b(array(5, 40, 8, 8, 1), data)
    numbers = analyze.regularity(study, view_of(denoise))
    assert numbers["optimum"] == pytest.approx(optimum)
    assert list_of_verdicts("regularity", numbers) == [verdict]
    if data == "disc":
        assert gap(numbers["eigenvalues"], [strength] * 12) < 1e-4
    assert set(analyze.draw_regularity(study, numbers)) == {"regularity"}


def test_disc_tangents():
    # a disc that is moved, grown or dimmed a little stays in the tangent space
    place = np.array([0.45, 0.55, 0.2, 0.2, 0.8])
    x, basis = analyze.disc_tangents(16, place)
    assert gap(basis.T @ basis, torch.eye(5)) < 1e-5
    assert gap(x, train.draw_disc(16, *place)) < 1e-6
    for step in 1e-5 * array(0, 5, 5):
        moved = train.draw_disc(16, *(place + step))
        change = (torch.from_numpy(moved) - x).flatten().float()
        outside = change - basis @ (basis.T @ change)
        assert outside.norm() < 0.03 * change.norm()


def copier(x):
    """A network that has memorised: it answers with the nearest of its training pictures x."""

    def denoise(y):
        return x[torch.cdist(y.flatten(1), x.flatten(1)).argmin(1)]

    def score(y):
        return denoise(y) - y

    return SimpleNamespace(denoise=denoise, score=score)


def test_generalisation_of_copies_and_of_networks_that_agree():
    # copies are seen to be copies; two networks that draw the same new pictures have generalised
    def copies(first, last):
        rows = np.arange(first, last)
        return analyze.Trained(copier(x[rows]), x[rows], rows)

    def agreeing(first, last):
        return copies(first, last)._replace(model=copier(x[70:]))

    pictures = array(0, 90, 8, 8, 1)
    x = analyze.to_batch(pictures)
    study = paper_b(pictures[70:])
    study.versus = [(copies(0, 1), copies(1, 2)), (copies(2, 7), copies(7, 10))]
    numbers = analyze.generalisation(study, None)
    assert list_of_verdicts("generalisation", numbers) == ["holds", "fails", "fails", "fails"]
    for pair in numbers["pairs"]:
        psnr = pair["psnr"]
        assert psnr["training"][0] == pytest.approx(100)
        assert gap(psnr["held out"][:2], psnr["exact, held out"][:2]) < 1
        assert pair["cosines"]["nearest"].min() > 0.999
        samples, nearest_pictures = pair["pictures"][:2]
        assert gap(samples, nearest_pictures) < 1e-5
        assert pair["held_out"].value < 0.95
    figures = analyze.draw_generalisation(study, numbers)
    assert set(figures) == {"generalisation", "originals"}
    study.versus[1] = agreeing(10, 40), agreeing(40, 70)
    numbers = analyze.generalisation(study, None)
    assert list_of_verdicts("generalisation", numbers) == ["holds"] * 4


def test_pairs_of_networks_without_a_common_picture(shelf, tmp_path):
    # pairs are ordered by N, and networks that have seen the same pictures are refused
    _, checkpoint = analyze.load_checkpoint(shelf / "c.pt")
    paths = []
    for subset, limit in ("first", None), ("second", None), ("first", 4), ("second", 4):
        checkpoint["flags"] |= {"subset": subset, "limit": limit}
        paths.append(tmp_path / f"{len(paths)}.pt")
        torch.save(checkpoint, paths[-1])
    first, second, less, fewer = paths
    pairs, _, held_out_rows = analyze.load_pairs([first, less], [second, fewer], "cpu")
    assert [len(a.x) for a, _ in pairs] == [4, 24]
    assert len(held_out_rows) >= 20
    for others, message in ([less], "overlap"), ([], "needs 1"):
        with pytest.raises(UserError, match=message):
            analyze.load_pairs([first], others, "cpu")


# analyze.py: axes and marks


def inside_of(marks, **options):
    """What the frame of a plot, found by its pixels, encloses: RGB (height, width, 3); and its place."""
    image = analyze.plot((500, 400), marks, "x", "y", **options)
    pixels = np.asarray(image).astype(int)
    gray = (pixels == 0x44).all(2)
    (rows,) = (gray.sum(1) > 100).nonzero()
    (columns,) = (gray.sum(0) > 100).nonzero()
    place = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inside = pixels[slice(*place[:2]), slice(*place[2:])]
    return inside, place


def is_red(pixels):
    """Which pixels are red, (height, width)."""
    red, green, _ = np.moveaxis(pixels, 2, 0)
    return red > green + 80


@pytest.mark.parametrize(
    "log, across, up",
    [("", 0.2, 0.9), ("x", 0.4582, 0.9), ("xy", 0.4582, 0.9774)],  # log 3 / log 11
)  # log 91 / log 101
def test_plot_puts_a_dot_at_its_pixel(log, across, up):
    # x grows to the right and y upwards, from one edge of the frame to the other
    dot = analyze.dots([3], [91], "a dot", "#ff0000")
    pixels, _ = inside_of([dot], xlim=(1, 11), ylim=(1, 101), log=log)
    height, width, _ = pixels.shape
    rows, columns = is_red(pixels).nonzero()
    assert columns.mean() == pytest.approx(across * width, abs=1.5)
    assert rows.mean() == pytest.approx((1 - up) * height, abs=1.5)


def test_plot_draws_bars_and_rules_to_scale():
    # bars are as high as their counts, and a rule crosses the frame at its value
    bars = analyze.bars([0.1, 0.2, 0.3, 0.9], 2, (0, 1), color="#ff0000")
    rule = analyze.rule(y=2)
    pixels, _ = inside_of([bars, rule], xlim=(0, 1), ylim=(0, 4))
    quarter, width, _ = np.array(pixels.shape) // 4
    tops = is_red(pixels).argmax(0)
    rows, _ = (pixels == 0x8A).all(2).nonzero()
    assert tops[width] == pytest.approx(quarter, abs=2)
    assert rows.mean() == pytest.approx(2 * quarter, abs=3)
    assert tops[3 * width] == pytest.approx(3 * quarter, abs=4)


@pytest.mark.parametrize("size", [(530, 400), (390, 360), (1600, 800)])
@pytest.mark.parametrize(
    "xlim, ylim, log",
    [
        ((0.0004, 0.0021), (0, 1), ""),
        ((0, 1.01e6), (-1e-5, 1e-5), ""),
        ((1, 3e6), (1e-9, 1), "xy"),
        ((0.05, 0.09), (1, 3), "xy"),
        ((-3, 3), (99.9995, 100), ""),
    ],
)
def test_plot_labels_do_not_overlap(monkeypatch, size, xlim, ylim, log):
    # no words stand over others
    def text(pen, place, words, fill, font, anchor="la"):
        if words and pen.im.size == size:  # the vertical axis' name is turned later
            boxes.append(pen.textbbox(place, words, font, anchor))

    boxes = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    marks = [analyze.dots([0.1], [0.1], name) for name in ("one", "another", "exact, training")]
    analyze.plot(size, marks, "x", "y", "title", xlim, ylim, log)
    assert len(boxes) >= 5 + 4  # two numbers on each axis, or more
    written = np.zeros(size, int)
    for left, top, right, bottom in np.rint(boxes).astype(int):
        assert left >= 0 and top >= 0
        written[left:right, top:bottom] += 1
    assert written.max() == 1


def test_plots_of_equal_limits_have_equal_frames():
    # the title and the legend change nothing about the frame: panels of one row stand level
    places = set()
    for title, label in ("", None), ("N = 10", None), ("", "training"), ("N = 10", "training"):
        diagonal = analyze.line([0, 1], [0, 1], label)
        _, place = inside_of([diagonal], title=title)
        places.add(place)
    assert len(places) == 1


# All scripts: what cannot run


@pytest.mark.parametrize(
    "message, line",
    [
        ("there is no such file or folder", "train.py --data nowhere"),
        ("holds no pictures", "train.py --data empty"),
        ("only one distinct", "train.py --data single.npy --size 8"),
        ("must be uint8", "train.py --data float.npy"),
        ("labels must be 20 integers", "train.py --data words.npz --size 8"),
        ("multiple of 2", "train.py --data tiny.npy --size 9 --levels 1"),
        ("unrecognized", "train.py --widht 3"),
        ("--resume goes on with it", "train.py --data tiny.npy --out c.pt"),
        ("among the pictures", "train.py --data data --out data/a.pt"),
        ("contradicts", "train.py --resume --out c.pt --width 3"),
        ("not a checkpoint", "train.py --resume --out cut.pt"),
        ("not a checkpoint", "sample.py text.png dark.png"),
        ("not available", "sample.py c.pt dark.png --device meta"),
        ("cannot be read as a picture", "sample.py c.pt text.png"),
        ("cannot be read as a picture", "sample.py c.pt fifo.png"),
        ("must end in .png", "sample.py c.pt dark.png --out x.jpg"),
        ("not a checkpoint", "analyze.py cut.pt"),
        ("no such file", "analyze.py c.pt --data nowhere --out none"),
        ("points", "kmeans.py text.png"),
        ("there is no folder", "kmeans.py x.npy --K 3 --out no/c.npz"),
    ],
)
def test_refused_command_lines(cli, shelf, message, line):
    # a mistake is one line and exit code 2, and no file is written, changed or lost
    def files():
        return {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()}

    (shelf / "empty").mkdir(exist_ok=True)
    if "--device" not in line:
        line += " --device cpu"
    before = files()
    code, text = cli(line)
    assert code == 2 and message in text.splitlines()[-1] and "Traceback" not in text, text
    assert text.count("\n") == 1 and files() == before


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_is_one_screen(name, capsys, monkeypatch):
    # it fits a terminal of 80 columns and 40 rows
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        SCRIPTS[name].arguments()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(len(line) for line in lines) <= 80


# README.md

README = (HERE / "README.md").read_text("utf-8")
COMMAND = re.compile(r"^    (?:python|torchrun \S+) (\w+\.py.*?)(?: +#.*)?$", re.M)
TEXTS = README + "".join(module.__doc__ for module in SCRIPTS.values())


@pytest.mark.parametrize("line", sorted(set(COMMAND.findall(TEXTS))))
def test_commands_that_we_print(line, monkeypatch):
    # every command of the README and of a script's description is understood
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", words)
    assert SCRIPTS[words[0]].arguments()


def test_python_of_the_readme(shelf, tmp_path, monkeypatch):
    # it runs, on a user's checkpoint and picture
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pt").write_bytes((shelf / "c.pt").read_bytes())
    Image.open(shelf / "odd.png").save("cat.jpg")
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert names["code"].shape == (1, 8)


def test_readme_is_short():
    # at most 2,400 words (the bars of tables are none), and no paragraph above 100
    def words(text):
        return len([word for word in text.split() if re.search(r"\w", word)])

    assert words(README) <= 2400
    paragraphs = [
        text for text in README.split("\n\n") if not text.startswith(("|", "    ", "```"))
    ]
    assert max(map(words, paragraphs)) <= 100


# assets


@pytest.mark.parametrize(
    "name, code_sum, largest, psnr",
    [
        ("builtin", 25.8694, 3.6439, 25.1410),
        ("textures", 26.7802, 1.9741, 18.8928),
        ("photos", 37.0419, 1.3265, 22.0760),
        ("faces", 54.6726, 1.1326, 22.8321),
    ],
)
def test_golden_weights(name, code_sum, largest, psnr):
    # shipped weights, φ and the network are what they were when the README's numbers were measured
    model, checkpoint = load_checkpoint(HERE / "assets" / f"{name}.pt")
    pictures, _, _ = train.builtin_pictures(15, checkpoint["size"], model.channels, seed=1)
    x = unet.to_batch(pictures)
    code = phi(model, x, 0.3, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_hat = model(x + 0.2 * normal(*x.shape, seed=1))
    assert gap(code.sum(1).mean(), code_sum) < 1e-2 and gap(code[0].max(), largest) < 1e-3
    assert gap(train.psnr(x_hat, x).mean(), psnr) < 5e-3
    assert "optimizer" not in checkpoint and checkpoint["flags"]["data"] in (name, None)
