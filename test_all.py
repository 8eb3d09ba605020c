"""Tests: python -m pytest test_all.py (offline, CPU, no data needed).

They stand in the order of the files; the first line of a test says what is true. Oracles are independent:
closed forms, brute force, finite differences, or the same thing computed plainly.
"""

import copy
import functools
import json
import math
import os
import re
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
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def settings_for(data, **changes):
    """The settings of a tiny run on `data`."""
    tiny = dict(
        data=str(data),
        size=8,
        width=2,
        levels=1,
        channels=1,
        batch=7,
        epochs=4.0,
        precision="fp32",
    )
    return {**train.COMMON, **tiny, **changes}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """The folder in which all command lines run: 80 pictures of two classes, a checkpoint, odd files."""
    folder = tmp_path_factory.mktemp("shelf")
    for i in range(80):  # class b has a stronger contrast
        noise = np.random.default_rng(i).normal(128, 20 + 60 * (i % 2), (8, 8, 3))
        path = folder / "data" / "ab"[i % 2] / f"{i:02d}.png"
        save_picture(path, noise.clip(0, 255).astype(np.uint8))
    settings = settings_for(folder / "data", width=4, channels=3, val=0.4, epochs=1.0)
    train.train(settings, str(folder / "c.pt"))
    (folder / "text.png").write_text("mine")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "fifo.png")
    save_picture(folder / "dark.png", np.full((16, 16, 3), 40, np.uint8))
    save_picture(folder / "light.png", np.full((16, 16, 3), 215, np.uint8))
    save_picture(folder / "odd.png", array(0, 37, 23, 3))
    np.save(folder / "tiny.npy", array(0, 40, 8, 8))
    np.save(folder / "float.npy", np.zeros((20, 8, 8, 3)))
    paths = sorted(str(path) for path in (folder / "data").rglob("*.png"))
    np.savez(folder / "k.npz", labels=[0] * 2 + [1] * 78, paths=paths)
    return folder


@pytest.fixture
def cli(shelf, monkeypatch, capsys):
    """cli("train.py --size 8"): (exit code, what the user sees), in this process, in the folder `shelf`."""

    def call(line, folder=shelf):
        words = shlex.split(line)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            unet.run(SCRIPTS[words[0]].main)
        out, err = capsys.readouterr()
        code = ended.value.code or 0
        return code, (err if code == 2 else out)

    return call


# unet.py


@pytest.mark.parametrize("levels, side", [(1, 18), (2, 40), (3, 84)])
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
    rows = y.grad[0, 0].nonzero()[:, 0]
    assert rows.max() - rows.min() + 1 == side == receptive_field(levels)


def independent_forward(model, y):
    """The network of App. A.1 from its weights, with torch.layer_norm over (C, H, W): x̂, M's maps."""
    weights = model.state_dict()

    def parameters(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def block(name, a, layers, without_norm=None, bare=None):
        numbers = {int(key.split(".")[2]) for key in weights if f"blocks.{name}." in key}
        names = iter([f"blocks.{name}.{number}" for number in sorted(numbers)])
        for i in range(layers):
            a = F.conv2d(a, *parameters(next(names)), padding=1)
            if i == bare:
                return a
            if i != without_norm:
                scale, shift = parameters(next(names))
                a = F.layer_norm(a, a.shape[1:]) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
            a = a.clamp(min=0)
        return a

    def up(name, a):
        return F.conv_transpose2d(a, *parameters(f"up.{name}"), stride=2)

    e1 = block("E1", y, 2, without_norm=0)
    e2 = block("E2", F.avg_pool2d(e1, 2), 2)
    m = block("M", F.avg_pool2d(e2, 2), 3)
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


@torch.no_grad()
def test_forward_against_an_independent_one(small):
    # the network is that of A.1; the score is x̂ − y
    y = normal(3, 3, 16, 24)
    assert sum(p.numel() for p in UNet().parameters()) == 13_130_243  # A.1 prints ~13 m
    x_hat, m = independent_forward(small, y)
    assert gap(small.denoise(y), x_hat) < 1e-5
    assert gap(small.score(y), x_hat - y) < 1e-5
    assert gap(small.encode(y)[0], m) < 1e-5
    sides = small.activations(y)["M"]
    assert gap(sides.output, m.mean((2, 3))) < 1e-5
    assert sides.input.shape == (3, 8)


def test_phi_is_the_mean_over_noise_of_the_averages_of_M(small):
    # φ is E_z[ā_M(x + σz)], a σ a picture
    x, sigma = normal(3, 3, 16, 16), torch.tensor([0.1, 0.2, 0.3])
    code = phi(small, x, sigma, draws=5, generator=torch.Generator().manual_seed(1))
    z = normal(5, 3, 16, 16, 3, seed=1).permute(0, 1, 4, 2, 3)
    total = 0
    for noise in z:
        _, m = independent_forward(small, x + sigma.view(3, 1, 1, 1) * noise)
        total = total + m.mean((2, 3))
    assert gap(code, total / 5) < 1e-5
    assert not code.requires_grad


def test_damaged_checkpoints_are_refused(tmp_path, shelf):
    # what train.py did not write is a UserError that names the file; nothing in it is run
    def refuses(name, words=""):
        with pytest.raises(UserError, match=f"{name}: not a checkpoint.*{words}"):
            load_checkpoint(tmp_path / name)

    for words, outer, key, value in (
        ("size mismatch", "model", "width", 5),
        ("not finite", "weights", "blocks.M.0.bias", torch.full((8,), math.nan)),
    ):
        checkpoint = torch.load(shelf / "c.pt", weights_only=True)
        checkpoint[outer][key] = value
        torch.save(checkpoint, tmp_path / "a.pt")
        refuses("a.pt", words)
    data = (shelf / "c.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:3000])
    (tmp_path / "changed.pt").write_bytes(data.replace(b"sigma_max", b"sigma_min"))
    owned = str(tmp_path / "owned")
    malicious = type("Malicious", (), {"__reduce__": lambda self: (os.mkdir, (owned,))})
    torch.save(malicious(), tmp_path / "bad.pt")
    refuses("cut.pt")
    refuses("changed.pt", "is not what was written")
    refuses("bad.pt")
    assert not os.path.exists(owned)


def test_write_is_whole_or_not_at_all(tmp_path):
    # readers see the old file or the new one; a failure leaves nothing in the way
    path = tmp_path / "a.json"
    path.write_bytes(b"older")
    with unet.write(path) as file:
        file.write(b"old")
        file.flush()
        assert path.read_bytes() == b"older"
    with pytest.raises(KeyboardInterrupt), unet.write(path) as file:
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="could not be written .full"), unet.write(path) as file:
        raise OSError(28, "Full")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "trouble, code, words",
    [
        (UserError("--x 3: no"), 2, "x.py: --x 3: no\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left", "a.png"), 2, "x.py: a.png: No space left\n"),
    ],
)
def test_one_way_to_end(trouble, code, words, monkeypatch, capsys):
    # what the user can mend is one line and exit code 2
    def main():
        raise trouble

    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit) as ended:
        unet.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == words


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


@pytest.mark.parametrize("accelerate", [True, False])
def test_kmeans_is_plain_lloyd_step_by_step(accelerate, monkeypatch):
    # labels, centres and inertia are those of brute force after every step
    monkeypatch.setattr(kmeans, "CHUNK", 50)
    x = blobs()
    init = centers = x[100:140]
    labels = pair_distances(x, centers).argmin(1)
    for steps in range(1, 10):
        centers = centers.copy()
        for k in set(labels):
            centers[k] = x[labels == k].mean(0)
        d2 = pair_distances(x, centers)
        labels = d2.argmin(1)
        model = KMeans(40, init, max_iter=steps, tol=0, accelerate=accelerate).fit(x)
        assert (model.labels_ == labels).all()
        assert gap(model.cluster_centers_, centers) < 1e-12
        assert model.inertia_ == pytest.approx(d2.min(1).sum(), rel=1e-9)


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
    fast = kmeans.lloyd(x, x[:80], assign=kmeans.Bounds(x, x[:80]))
    for a, b in zip(fast, textbook):
        assert gap(a, b) == 0
    assert sum(work) < 1.5 * distances


def test_seeding_is_greedy_kmeans_plus_plus():
    # the seeds are brute force's with the same random numbers; of all restarts the best is kept
    x = blobs(120, 3, 6)
    x = x - x.mean(0)
    d2 = pair_distances(x, x)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(120, (3, 1), generator=generator).tolist()
    for _ in range(8):
        u = torch.rand(3, 2 + int(math.log(9)), generator=generator, dtype=torch.float64)
        for points, row in zip(chosen, u.numpy()):
            D2 = d2[points].min(0)
            mass = D2.cumsum()
            drawn = np.searchsorted(mass, (1 - row) * mass[-1])
            potential = np.minimum(D2, d2[drawn]).sum(1)
            points.append(drawn[potential.argmin()])
    starts = kmeans.seed_centers(torch.from_numpy(x), 9, 3, 5)
    assert gap(starts, x[np.array(chosen)]) == 0
    inertias = [KMeans(9, start.numpy(), tol=0).fit(x).inertia_ for start in starts]
    best = KMeans(9, n_init=3, tol=0, seed=5).fit(x)
    assert best.inertia_ == pytest.approx(min(inertias), rel=1e-9)
    assert min(inertias) < max(inertias)


def test_adjusted_rand_index_counts_pairs():
    # the index is (agreeing pairs − expected)/(most − expected), pair by pair
    rng = np.random.default_rng(0)
    for n in [7, 8, 12] * 10:
        a = rng.integers(3, size=n)
        b = rng.integers(4, size=n)
        i, j = np.tril_indices(n, -1)
        in_a = a[i] == a[j]
        in_b = b[i] == b[j]
        agreeing = (in_a & in_b).sum()
        most = (in_a.sum() + in_b.sum()) / 2
        chance = in_a.sum() * in_b.sum() / len(i)
        index = (agreeing - chance) / (most - chance)
        assert abs(kmeans.adjusted_rand_index(a, b) - index) < 1e-12


def test_separation_of_two_gaussians():
    # distance and spread are those along the line of the means
    a = normal(200_000, 3)
    b = normal(200_000, 3, seed=1)
    b = b * torch.tensor([1, 2, 9]) + torch.tensor([3, 4, 0])
    distance, sd = kmeans.separation(a, b)
    variance = 0.6**2 * 1 + 0.8**2 * 4  # of b along (0.6, 0.8, 0); that of a is 1
    assert abs(distance - 5) < 0.03
    assert abs(sd - math.sqrt((1 + variance) / 2)) < 0.01


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
    assert gap(p, (conditional + conditional.T) / (2 * n)) < 1e-9
    y = normal(n, 2, seed=3).double().requires_grad_()
    divergence(p, y).backward()
    gradient = kmeans.divergence_gradient(p, y.detach())
    assert gap(y.grad, gradient) < 1e-6


def test_tsne_separates_clusters():
    # the divergence falls far below its start's, and clusters along sixteen axes come apart
    labels = torch.arange(160) % 16
    x = 5 * torch.eye(16)[labels] + 0.5 * normal(160, 16)
    p = kmeans.affinities(x, 8)
    start, y = kmeans.tsne(x, 8, 0), kmeans.tsne(x, 8, 500)
    assert divergence(p, y) < divergence(p, start) / 15
    neighbours = torch.cdist(y, y).argsort(1)[:, 1:6]
    assert (labels[neighbours] == labels[:, None]).double().mean() > 0.99


def test_kmeans_command_line(tmp_path, cli):
    # clusters.npz holds what KMeans gives
    x = blobs(90, 6, 3).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    line = f"kmeans.py {tmp_path}/x.npy --K 5 --seed 4 --n-init 3 --out {tmp_path}/k.npz"
    assert cli(line)[0] == 0
    model = KMeans(5, seed=4, n_init=3).fit(x)
    saved = np.load(tmp_path / "k.npz")
    assert (saved["labels"] == model.labels_).all()
    assert gap(saved["centers"], model.cluster_centers_) == 0


# train.py: training


def test_sigma_distribution():
    # p(σ) ∝ 1/√σ on [0, σ_max]; the noise is σz, another one at every step and for every seed
    def batch(n, side, step=7, seed=0):
        pictures = np.full((n, side, side, 3), 51, np.uint8)
        return train.noisy_batch(pictures, np.arange(n), step, seed, 0.8, "cpu")

    n = 100_000
    _, _, sigma = batch(n, 1)
    cdf = (sigma / 0.8).sqrt().flatten().sort().values
    assert gap(cdf, (torch.arange(n) + 0.5) / n) < 0.006  # Kolmogorov–Smirnov, p < 0.001
    x, y, sigma = batch(64, 16)
    z = (y - x) / sigma
    assert gap(x, torch.full_like(x, 0.2)) < 1e-6
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    for step, seed in (8, 0), (7, 1):
        _, another_y, another_sigma = batch(64, 16, step, seed)
        assert gap(another_sigma, sigma) > 0.1
        assert gap((another_y - x) / another_sigma, z) > 1


def test_learning_rate_and_data_order():
    # the paper's halving for its 1000 epochs, a linear end for less; an epoch visits every picture once
    paper = [train.learning_rate(t, 1000) for t in (0.005, 0.011, 0.1, 0.55, 0.99)]
    assert paper == pytest.approx([5e-4, 1e-3, 5e-4, 1e-3 / 32, 1e-3 / 512], rel=0.01)
    short = [train.learning_rate(t, 3) for t in (0, 0.05, 0.1, 0.55, 1)]
    assert short == pytest.approx([1e-6, 0.95 * 0.501e-3, 0.9e-3, 0.45e-3, 0], rel=1e-9)
    rows = np.arange(100, 110)
    batches = [train.batch_rows(rows, step, 4, 0) for step in range(10)]
    epochs = np.concatenate(batches).reshape(4, 10)
    assert (np.sort(epochs) == rows).all()
    assert (epochs[0] != epochs[1]).any()


def test_the_network_starts_with_closed_skips_and_the_mean_colour(small):
    # every channel of every norm and up-convolution has mean 0 and variance 1; M is heard, the skips are not
    y, outputs, mean = normal(16, 3, 16, 16), [], torch.tensor([0.2, 0.4, 0.6])

    def record(module, inputs, output):
        outputs.append(output.detach().clone())

    train.initialise(small, y, mean)
    for module in small.modules():
        if isinstance(module, (nn.GroupNorm, nn.ConvTranspose2d)):
            module.register_forward_hook(record)
    assert gap(small(y) - mean.view(3, 1, 1), 0) < 1e-6
    assert len(outputs) == 2 * 2 + 3 + 2 * 6 - 2 + 2
    for a in outputs:
        assert gap(a.mean((0, 2, 3)), 0) < 1e-3
        assert gap(a.std((0, 2, 3)), 1) < 1e-2
    maps, skips = small.encode(y)
    nn.init.normal_(small.blocks["D1"][-1].weight)
    x_hat = small.decode(maps, skips)
    assert gap(x_hat, small.decode(maps, [0 * skip for skip in skips])) == 0
    assert gap(x_hat, small.decode(0 * maps, skips)) > 0.01


def test_training_step_by_hand(small):
    # a step is Adam's on Eq. 1's sum over pixels, filters centred, skips closed, whatever the micro-batch
    x = torch.rand(5, 3, 16, 16)
    y = x + 0.3 * normal(*x.shape)
    before, twin = copy.deepcopy(small.state_dict()), copy.deepcopy(small)
    adam = torch.optim.Adam(small.parameters(), 1e-3)
    loss = train.training_step(small, adam, x, y, 5, micro_batch=2, skips_closed=True)
    direct = (twin(y) - x).square().sum() / 5
    direct.backward()
    assert loss == pytest.approx(direct.item(), rel=1e-5)
    for (name, p), twin_p in zip(small.named_parameters(), twin.parameters()):
        gradient = twin_p.grad
        if p.ndim == 4 and name.startswith(
            "blocks"
        ):  # of one filter, over its inputs and places
            gradient -= gradient.mean((1, 2, 3), keepdim=True)
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

    torch.manual_seed(0)
    model = UNet(width=8, channels=1, levels=1)
    train.initialise(model, pair(64)[1], [0.0])
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5 * train.learning_rate(step / 150, 1)
        train.training_step(model, optimizer, *pair(32), 32, 32, skips_closed=step < 15)
    _, y = pair(1000)
    best, x_hat = filtered(y, spectrum / (spectrum + sigma**2)), model.denoise(y).detach()
    assert F.mse_loss(x_hat, best) < 0.08 * F.mse_loss(y, best)


def test_use_of_M_in_closed_form():
    # M's maps and the skip are the noisy picture: the use is 0 if the decoder listens to the skip alone, and
    # what another picture costs if it listens to M
    def encode(y):
        return y, [y]

    def from_skip(maps, skips):
        return skips[0]

    def from_M(maps, skips):
        return maps

    x = torch.rand(100, 1, 16, 16)
    deaf = SimpleNamespace(encode=encode, decode=from_skip)
    for sigma, values in train.evaluate(deaf, x, micro_batch=7).items():
        assert values.mean() == pytest.approx(train.input_psnr(sigma), abs=0.15)
    assert not any(use.any() for use in train.use_of_M(deaf, x).values())
    listening = SimpleNamespace(encode=encode, decode=from_M)
    for sigma, use in train.use_of_M(listening, x, micro_batch=7).items():
        swapped = 2 / 12 + sigma**2  # two independent uniform pictures, and the noise
        assert use.mean() == pytest.approx(10 * math.log10(swapped / sigma**2), abs=0.15)


# train.py: the loop

RUN = "--size 8 --width 2 --levels 1 --channels 1 --batch 7 --epochs 4 --device cpu --out"


def weights(path):
    """The weights in a checkpoint and the roots of Adam's second moments, one vector."""
    saved = torch.load(path, weights_only=True)
    moments = [state["exp_avg_sq"].sqrt() for state in saved["optimizer"]["state"].values()]
    return torch.cat([value.flatten() for value in [*saved["weights"].values(), *moments]])


@pytest.fixture(scope="module")
def whole(shelf):
    """The checkpoint of RUN, never interrupted."""
    train.train(settings_for(shelf / "tiny.npy"), str(shelf / "whole.pt"))
    return shelf / "whole.pt"


KILLED = """import os, sys, train
replace, times = os.replace, iter([4, 3, 2, 1])
def dying(*paths):
    if next(times) == 1:                       # the second save's checkpoint is written, but not in place
        os.kill(os.getpid(), 9)
    replace(*paths)
os.replace, sys.argv = dying, sys.argv[1:]
train.main()"""


def test_resume_after_a_kill_is_exact(shelf, whole, tmp_path):
    # a killed and a stopped run go on, and end where an uninterrupted one does, bit for bit; the skips stay
    # closed during the warm-up; a run that is made longer starts as gently as the first time
    out = str(tmp_path / "a.pt")
    line = f"train.py --data {shelf}/tiny.npy {RUN} {out} --save-every 1e-9"
    assert python("-c", KILLED, *line.split())[0] == -signal.SIGKILL
    settings = settings_for(shelf / "tiny.npy")
    _, killed = load_checkpoint(out)
    assert killed["step"] == 1
    assert not train.train(settings, out, resume=killed, stop_requested=lambda: True)
    model, stopped = load_checkpoint(out)
    assert stopped["step"] == 2
    assert train.skips_are_closed(model)
    assert train.train(settings, out, resume=stopped)
    assert gap(weights(whole), weights(out)) == 0
    model, ended = load_checkpoint(out)
    assert not train.skips_are_closed(model)
    train.train(settings | {"epochs": 90}, out, resume=ended, stop_requested=lambda: True)
    _, longer = load_checkpoint(out)
    assert longer["optimizer"]["param_groups"][0]["lr"] < 2e-4


def test_torchrun_gives_the_same_weights(shelf, whole, tmp_path):
    # the global batch does not depend on the number of processes
    line = f"train.py --data {shelf}/tiny.npy {RUN} {tmp_path}/two.pt"
    torchrun = "torch.distributed.run --nproc_per_node=2 --standalone"
    code, err = python("-m", *torchrun.split(), *line.split())
    assert code == 0, err
    assert gap(weights(whole), weights(tmp_path / "two.pt")) < 1e-5


def test_checkpoint_holds_what_it_says(shelf, whole):
    # its numbers are those of its own weights on held-out pictures
    settings = settings_for(shelf / "tiny.npy")
    model, saved = load_checkpoint(whole)
    pictures, rows, held_out = train.training_data(settings)
    numbers = saved["training"]
    order = np.random.default_rng((0, train.HELD_OUT)).permutation(held_out)
    x = train.to_batch(pictures.x[order], "cpu")
    for name, measured in (
        ("psnr", train.evaluate(model, x)),
        ("use", train.use_of_M(model, x)),
    ):
        for sigma, values in measured.items():
            assert numbers[name][sigma] == pytest.approx(values.mean(), abs=1e-4)
    assert saved["mean"] == pytest.approx([pictures.x[rows].mean() / 255], abs=1e-6)
    distance = torch.pdist(unet.fixed_phi(model, x)).mean().item()
    assert numbers["phi_distance"] == pytest.approx(distance, 1e-4)


def test_files_of_others_are_never_replaced(shelf, tmp_path, cli):
    # a copied checkpoint does not take the user's pictures; a run that was stopped early takes its files
    own = str(tmp_path / "own.pt")
    train.train(settings_for(shelf / "tiny.npy"), own, stop_requested=lambda: True)
    train.check_out(own, load_checkpoint(own)[1], False, None)
    out, cat = tmp_path / "cat.pt", tmp_path / "cat.png"
    out.write_bytes((shelf / "c.pt").read_bytes())
    cat.write_text("a picture of a cat")
    code, text = cli(f"train.py --resume --epochs 2 --out {out} --device cpu")
    assert code == 2 and "cat.png: exists" in text
    assert cat.read_text() == "a picture of a cat"


# train.py: pictures


def test_settings_fit_the_machine():
    # without a GPU the small preset, with one the paper's; a flag overrides either
    def shape(device, **flags):
        given = dict.fromkeys(["preset", *train.COMMON, *train.PAPER]) | {"data": "x"} | flags
        settings = train.complete_settings(given, torch.device(device))
        names = "size", "width", "levels", "batch", "epochs", "pictures"
        return [settings[name] for name in names]

    paper, small = [64, 64, 3, 1024, 1000, None], [32, 16, 2, 32, None, 300_000]
    assert shape("cpu") == shape("cuda", data=None, precision="fp32") == small
    assert shape("cuda", precision="fp32") == shape("cpu", preset="paper") == paper
    assert shape("cpu", epochs=5.0) == [32, 16, 2, 32, 5.0, None]


def test_odd_pictures(tmp_path, capsys):
    # modes, transparency, orientation: right colours; what cannot be used is told
    red, size = (200, 40, 40), (40, 24)
    flat, exif = Image.new("RGB", size, red), Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter
    upright = np.zeros((24, 24, 3), np.uint8)
    upright[:12] = red
    fifth_over_white = Image.new("RGBA", size, (*red, 51))
    flat.quantize(4).save(tmp_path / "a.png")
    flat.save(tmp_path / "b.Jpg", quality=95)
    fifth_over_white.save(tmp_path / "c.PNG")
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "e.png", exif=exif)
    (tmp_path / "f.jpg").write_text("no picture")
    x = train.load_pictures(str(tmp_path), size=16).x.astype(int)
    for picture, colour in zip(x, (red, red, (244, 212, 212))):
        assert np.abs(picture - colour).max() <= 6
    assert np.abs(x[3, :7] - red).max() <= 3
    assert x[3, 9:].max() <= 3
    said = capsys.readouterr().out
    assert "skipped 1 of 5" in said and "f.jpg" in said


def test_classes_are_what_tells_pictures_apart(tmp_path):
    # train, val and images are no classes, nor is a folder in which all files lie
    for name in "train/cat/images/1.png", "train/dog/images/2.png", "val/cat/3.png", ".x/4.png":
        save_picture(tmp_path / "all" / name, array(len(name), 8, 8))
    pictures = train.load_pictures(str(tmp_path), 8)
    assert pictures.classes == ["cat", "dog"]
    assert pictures.labels.tolist() == [0, 1, 0]


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
    pictures = train.load_pictures(str(tmp_path), 16, 1, patches=True)
    tiles = x[:32, :48].reshape(2, 16, 3, 16).swapaxes(1, 2).reshape(6, 16, 16)
    assert (pictures.x[..., 0] == tiles).all()
    assert len(set(pictures.groups)) == 1
    assert pictures.classes == ["one"]
    assert pictures.paths[4] == f"{tmp_path}/one.png#4"


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
    # renamed files are split alike; no copy is on both sides; halves share nothing, limits are nested
    x = array(0, 60, 8, 8, 3)
    x[10:14], x[50], x[20:24] = x[0], x[49], 7  # copies
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x[np.random.default_rng(1).permutation(60)])

    def contents(pictures, rows):
        return [pictures.x[i].tobytes() for i in rows]

    for seed in range(20):
        settings = settings_for(tmp_path / "a.npy", channels=3, val=0.1, seed=seed)
        a, rows, held_out = train.training_data(settings)
        renamed = {**settings, "data": str(tmp_path / "b.npy")}
        b, _, same = train.training_data(renamed)
        assert contents(a, held_out) == contents(b, same)
        assert sorted([*rows, *held_out]) == list(range(60))
        assert not set(contents(a, rows)) & set(contents(a, held_out))
        first = train.training_part(a, rows, "first", None, seed)
        second = train.training_part(a, rows, "second", None, seed)
        assert sorted([*first, *second]) == sorted(rows)
        assert not set(contents(a, first)) & set(contents(a, second))
        few = train.training_part(a, rows, "first", 5, seed)
        assert list(few) == list(first[:5])
    assert a.fingerprint == b.fingerprint


def test_arrays(tmp_path):
    # every layout is read as what it is; of several arrays the right one is taken
    x = array(0, 20, 8, 8, 3)

    def load(name, *options):
        return train.load_pictures(str(tmp_path / name), *options)

    np.save(tmp_path / "colour.npy", x)
    assert (load("colour.npy", 8).x == x).all()
    assert load("colour.npy", 4).x.shape == (20, 4, 4, 3)
    np.savez(tmp_path / "several.npz", x_test=x[:3], x_train=x)
    assert (load("several.npz", 8).x == x).all()
    planar = x.transpose(0, 3, 1, 2).reshape(20, -1)  # all red, then all green, then all blue
    np.savez(tmp_path / "imagenet.npz", labels=np.arange(20) % 5, data=planar)
    pictures = load("imagenet.npz", 8)
    assert (pictures.x == x).all()
    assert pictures.labels.tolist() == [0, 1, 2, 3, 4] * 4


def test_builtin_pictures():
    # they are the same in every run, none is blank, all classes are as frequent
    x, labels, _ = train.builtin_pictures(100, 32, 3)
    assert len(set(np.bincount(labels))) == 1
    assert (train.builtin_pictures(100, 32, 3)[0] == x).all()
    assert min(np.ptp(picture) for picture in x) > 40


def test_calpha_fields_have_the_spectrum_of_the_authors():
    # their amplitude falls as |k|^−α
    window = np.hanning(32)  # they are cut from larger ones
    for alpha in 1.0, 2.0:
        field = train.random_spectrum(400, 2, 32, np.random.default_rng(0), alpha)
        spectrum = np.fft.fft2(field * window[:, None] * window)
        amplitude = np.sqrt((np.abs(spectrum) ** 2).mean(0))
        k = np.arange(4, 12)
        slope, _ = np.polyfit(np.log(k), np.log(amplitude[k, 0]), 1)
        assert slope == pytest.approx(-alpha, abs=0.2)


def test_disc_pictures():
    # a disc of five numbers: place, radius, the ground's and its own intensity
    disc = train.draw_disc(64, 0.5, 0.25, 0.2, 0.1, 0.9)[0]
    assert [disc[16, 32], disc[60, 4]] == pytest.approx([0.9, 0.1], abs=1e-6)
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


@pytest.fixture
def task(small):
    """A network in double precision, pictures, the φ of another picture, and L(x) = ‖φ(x) − φ_c‖²."""
    model = small.double()
    x, other = normal(5, 3, 16, 16).double(), normal(1, 3, 16, 16, seed=1).double()
    phi_c = phi(model, other, 0)

    def loss_of(x):
        return (phi(model, x, 0) - phi_c).square().sum(1)

    return model, x, phi_c, loss_of


def test_guidance_step_goes_down_the_gradient(task):
    # its step is −L/‖∇L‖² ∇L, by central differences
    model, x, phi_c, loss_of = task
    moved, _ = sample.guidance_step(model, x, phi_c, 0, 1)
    step = moved - x
    eta = loss_of(x) / step.square().sum((1, 2, 3))
    for place in [(0, 3, 5), (1, 8, 8), (2, 15, 0)]:
        e = torch.zeros(1, 3, 16, 16).double()
        e[(0, *place)] = 1e-5
        change = (loss_of(x + e) - loss_of(x - e)) / 2e-5
        assert gap(change, -step[(..., *place)] * eta) < 1e-6


def test_guidance_step_returns_the_best_picture():
    # φ = x² cannot be −1: steps of 0.1 lead from 0.27 to −0.03 and back again
    def encode(y):
        return y.square(), []

    x, model = torch.full((1, 1, 1, 1), 0.27), SimpleNamespace(encode=encode)
    for gradients in 3, 4, 5:
        moved, matching = sample.guidance_step(model, x, -1, 0, gradients)
        assert moved.item() == pytest.approx(-0.03)
        assert matching.least.item() == pytest.approx(1.0009**2)


def test_guidance_step_says_what_it_did(task):
    # L, its first value and the gradients are each picture's own
    model, x, phi_c, loss_of = task

    def match(x):
        return sample.guidance_step(model, x, phi_c, 0.05, 300, sample.Memory())

    moved, matching = match(x)
    assert (matching.least <= 0.05 * matching.first).all()
    assert gap(matching.first, loss_of(x)) < 1e-12
    assert gap(matching.least, loss_of(moved)) < 1e-12
    alone, counted = match(x[1:2])
    assert gap(alone[0], moved[1]) < 1e-9
    assert counted.gradients == matching.gradients[1]


def test_memory_reaches_the_same_goal_sooner():
    # a linear φ(x) = Bx is matched by the same picture, in two thirds of the gradients
    B = normal(24, 48).double()
    x = normal(4, 3, 4, 4, seed=1).double()

    def encode(y):
        code = y.flatten(1) @ B.T
        return code[:, :, None, None], []

    model = SimpleNamespace(encode=encode)
    phi_c = phi(model, x + 0.01 * normal(4, 3, 4, 4, seed=2), 0)
    plain, slow = sample.guidance_step(model, x, phi_c, 1e-8, 500)
    moved, fast = sample.guidance_step(model, x, phi_c, 1e-8, 500, sample.Memory())
    assert gap(plain, moved) < 1e-4 < 1e-2 < gap(plain, x)
    assert fast.gradients.max() < 0.67 * slow.gradients.max()


def test_algorithm_1_has_the_moments_of_its_closed_form():
    # without matching, Gaussian data obey v ← (λ/(λ + σ_t²))² v + σ²_{t−1}
    model, sigmas = GaussianModel(), sample.sigma_schedule(1, 0.03, 12)
    assert sigmas == pytest.approx([1 - 0.97 * t / 11 for t in range(12)])

    def target(sigma):  # also how the model learns σ
        model.sigma = sigma
        return torch.zeros(1, 3)

    mean, shape = torch.full((3,), 0.3), (3, 32, 32)
    x, levels = sample.reconstruct(model, target, mean, sigmas, shape, generators(40), tol=1e9)
    v = 1
    for level, sigma_next in zip(levels, sigmas[1:]):  # σ̂ = σ²/(λ + σ²) √v
        factor = model.lam / (model.lam + level.sigma**2)
        expected = (1 - factor) * v**0.5
        assert level.sigma_after.mean() == pytest.approx(expected, rel=0.02)
        v = factor**2 * v + sigma_next**2
    v = factor**2 * v  # the last step comes without matching
    assert abs(x.mean() - 0.3) < 5 * (v / x.numel()) ** 0.5
    assert len(levels) == 11
    assert abs(x.var() / v - 1) < 5 * (2 / x.numel()) ** 0.5


def test_unconditional_sampler_has_the_moments_of_its_closed_form():
    # v = λ + σ² obeys v ← (1 − h σ²/v)² v + γ², γ² = ((1 − βh)² − (1 − h)²) σ̂², σ̂² = σ⁴/v
    model, mean, v = GaussianModel(), torch.full((3,), 0.3), 1.0
    model.sigma = None

    def draw(steps):
        shape = 3, 64, 64
        return sample.sample_unconditional(
            model, mean, shape, generators(8), 1.0, 0.02, max_steps=steps
        )

    for t in range(1, 31):
        sigma2, h = v - model.lam, 0.01 * t / (1 + 0.01 * (t - 1))
        gamma2 = ((1 - 0.05 * h) ** 2 - (1 - h) ** 2) * sigma2**2 / v
        v = (1 - h * sigma2 / v) ** 2 * v + gamma2
        if t in (1, 15, 30):
            y, _ = draw(t)
            assert abs(((y - 0.3) ** 2).mean() / v - 1) < 0.03
    x, steps = draw(2000)
    assert (steps < 2000).all()
    assert abs(x.var() / model.lam - 1) < 0.1
    assert abs(x.mean() - 0.3) < 0.01


def test_samples_stand_around_their_target():
    # each has a noise of its own, which the seed repeats; φ-distances are numpy's
    model, x = GaussianModel(), torch.tensor([0.1, 0.9]).view(2, 1, 1, 1) + 0.1 * normal(
        2, 3, 16, 16
    )
    model.lam, model.sigma = 1.0, 0.1
    targets = [sample.Target("a", x[:1]), sample.Target("b", x[1:])]

    def draw(seed):
        checkpoint = dict(mean=[0.5] * 3)
        return sample.around(model, checkpoint, targets, 3, [0.5, 0.2, 0.05], seed, tol=1e-6)[0]

    samples = draw(0)
    assert gap(samples[0][0], samples[0][1]) > 1e-2
    assert gap(draw(0)[1], samples[1]) == 0
    for y, target in zip(samples, targets):
        shared = sample.similarities(model, y, target)
        distance = (y - target.pictures).mean((2, 3)).norm(dim=1)
        assert max(shared["phi_distance"]) < 0.2  # to the other one it is 1.4
        assert gap(shared["phi_distance"], distance) < 0.05


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

    sigmas, square = np.geomspace(0.01, 20, 20), 48 * 48 * 0.49
    model, generator = SimpleNamespace(denoise=denoise, encode=encode), generators(1)[0]
    value, error, integrand, _ = sample.conditional_distance(
        model, x1, x2, sigmas, 8, 4, generator, 1e-8, 60
    )
    exact = 2 * square * sigmas / (lam + sigmas**2) ** 2
    assert max(abs(integrand.numpy() / exact - 1)[sigmas < 0.5]) < 0.1
    assert abs(value * lam / square - 1) < 0.05
    assert 0 < error < 0.05 * value


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


def test_sample_record(shelf, record, tmp_path):
    # the .json tells φ-distances of `around`; samples are saved singly, too
    numbers, _ = record(f"dark.png {FAST} --save-each {tmp_path}")
    target = sample.Target("", one_picture(shelf / "dark.png"))
    model, checkpoint = load_checkpoint(shelf / "c.pt")
    sigmas = numbers["sigmas"]
    (x,), _ = sample.around(model, checkpoint, [target], 2, sigmas, max_gradients=3)
    distances = sample.similarities(model, x, target)["phi_distance"]
    assert numbers["panels"][0]["phi_distance"] == pytest.approx(distances)
    assert gap(one_picture(tmp_path / "00_001.png")[0], x[1].clamp(0, 1)) < 0.6 / 255


def test_sample_targets_are_held_out(shelf, record):
    # without a target: four held-out pictures; unconditional samples need none
    settings = load_checkpoint(shelf / "c.pt")[1]["flags"]
    pictures, _, held_out = train.training_data(settings)
    panels = record(FAST)[0]["panels"]
    names = {panel["target"] for panel in panels}
    assert len(names) == 4
    assert names <= {pictures.paths[i] for i in held_out}
    assert len(record(f"--unconditional 3 {FAST}")[0]["panels"]) == 1


def test_sample_mix_weights(shelf, record, monkeypatch):
    # φ_c is the mean by --weights divided by their sum, or that of a cluster's members
    model, conditions = load_checkpoint(shelf / "c.pt")[0], []

    def reconstruct(model, target, *rest, **options):
        conditions.append(target(0))
        return torch.rand(8, 3, 8, 8), []

    def code(name):
        return phi(model, one_picture(shelf / name), 0)

    monkeypatch.setattr(sample, "reconstruct", reconstruct)
    record("--mix dark.png light.png --weights 1 3")
    record("--cluster k.npz:0")
    dark, light = code("dark.png"), code("light.png")
    assert gap(conditions[0], 0.25 * dark + 0.75 * light) < 1e-6 < 1e-3 < gap(dark, light)
    assert gap(conditions[1], (code("data/a/00.png") + code("data/a/02.png")) / 2) < 1e-6


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


def verdicts_of(name, numbers, nulls=None):
    """{key of a claim: its verdict} of an analysis."""
    verdicts = {}
    if nulls is None:
        nulls = numbers.get("nulls", {})
    for claim in analyze.claims_of(name):
        key = claim.number.split(".")[1]
        if claim.only in ("textures", "faces"):  # two claims on one number
            key = claim.only
        verdicts[key] = analyze.judge(claim, numbers, nulls).verdict
    return verdicts


def judged(study, name):
    """The verdicts and the numbers of an analysis."""
    numbers = analyze.numbers_of(study, name)
    return verdicts_of(name, numbers), numbers


def random_codes(n=120, d=12):
    """Three {σ: φ} without any structure."""
    codes = []
    for k in (1, 2, 3):
        codes.append({0.3: normal(n, d, seed=k).abs(), 0.1: normal(n, d, seed=9 + k).abs()})
    return codes


def test_statistics_by_hand():
    # PR, kurtosis, Otsu's threshold and ranks are those of a calculation by hand
    v = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    assert gap(analyze.participation_ratio(v), [1 / 4, 1, 16 / 40]) < 1e-6
    v = torch.tensor([0.0, 0, 0, 0, 5])  # mean 1, second moment 4, fourth 52
    assert analyze.kurtosis(v).item() == pytest.approx(52 / 16)
    four = np.array([0.9, 0.1, 0.2, 0.8])
    assert analyze.otsu(four) == pytest.approx((0.5, 0.35**2 / 0.125))
    a, b = np.array([[1, 2, 3, 4], [1, 9, 5, 99]])
    assert analyze.rank_correlation(a, b) == pytest.approx(0.8)


def test_standard_errors():
    # errors are over groups, over pairs that share members, and a bootstrap's are those of theory
    expected = pytest.approx((2, 1 / math.sqrt(3)))
    assert analyze.estimate([1, 2, 3]) == expected
    assert analyze.estimate([1, 2, 3] * 2, [7, 5, 6] * 2) == expected
    members, pairs = normal(4000, 15).numpy(), np.transpose(np.tril_indices(15, -1))
    sums = members[:, pairs].sum(2)  # 4000 draws of 105 pairs
    errors = np.array([analyze.pairs_error(values, pairs) for values in sums[:200]])
    assert np.sqrt((errors**2).mean()) == pytest.approx(sums.mean(1).std(), rel=0.15)

    resampled = analyze.bootstrap(np.mean, np.random.default_rng(0), members[:400, 0])
    assert resampled == pytest.approx(analyze.estimate(members[:400, 0]), rel=0.15)


@pytest.mark.parametrize(
    "verdict, value, error, nulls, options",
    [
        ("holds", 1, 0.1, [[0, 0.1]], {}),
        ("holds", -1, 0.1, [[0, 0.1]], {"sign": -1}),
        ("fails", 1, 0.1, [[0, 0.1]], {"sign": -1}),
        ("fails", 0.1, 0.1, [], {}),  # within two errors of 0
        ("holds", 0.1, 0.1, [], {"rule": True}),
        ("fails", 1, 0.1, [[0, 0.1]], {"rule": False}),
        ("not comparable", 1, 0.1, [[0, 0.1]], {"rule": None}),
        ("not comparable", 1, math.nan, [[0]], {}),
        ("not comparable", 1, 0.1, [[0], [math.nan]], {}),
        ("fails", 1, 0.1, [[0, 0.1]], {"effect": 1.1}),
        ("fails", 1, 0.6, [[0, 0.1]], {"rule": True}),  # within two errors of the null
        ("fails", 1, 0.1, [[0, 0.9]], {}),  # within its spread
        ("fails", 1, 0.1, [[0.0] * 20 + [1.01]], {}),  # one replicate is ahead
        ("fails", 1, 0.1, [[0, 0.1], [2, 2.1]], {}),  # every null counts
    ],
)
def test_a_claim_holds_beyond_every_null(verdict, value, error, nulls, options):
    # the verdict is that of the number, its error, its own rule and all replicates of all nulls
    def rule(numbers):
        return options["rule"]

    names, replicates = "ab"[: len(nulls)], {}
    for name, values in zip(names, nulls):
        replicates[name] = [{"key": null} for null in values]
    sign, effect = options.get("sign", 1), options.get("effect", 0)
    claim = analyze.Claim("", "", "any.key", sign, effect, " ".join(names))
    if "rule" in options:
        claim = claim._replace(rule=rule)
    numbers = {"key": analyze.Estimate(value, error)}
    assert analyze.judge(claim, numbers, replicates).verdict == verdict
    assert analyze.judge(claim, numbers, replicates, "M is dead").verdict == "not comparable"


@pytest.mark.parametrize(
    "use, cosine, silent, why",
    [
        (0.1, 0.98, 1, ""),
        (0.09, 0.9, 0, "use"),
        (0.2, 0.981, 0, "cosine"),
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


def test_nulls_keep_what_they_say():
    # shuffled φ keeps the marginals and loses joint structure; the Gaussian keeps mean and covariance
    code = normal(2000, 1).abs() * (1 + normal(2000, 3).abs())  # channels are large together
    study = study_of({0.3: code, 0.1: 2 * code})
    for view in study.nulls("shuffled"):
        assert gap(view.phi[0.3].sort(0).values, code.sort(0).values) == 0
        assert abs(torch.corrcoef(view.phi[0.3].T)[0, 1]) < 0.1 < torch.corrcoef(code.T)[0, 1]
        assert gap(view.phi[0.1], 2 * view.phi[0.3]) < 1e-6  # in the same order at all σ
    for view in study.nulls("Gaussian"):
        twin = view.phi[0.3]
        assert gap(torch.cov(twin.T), torch.cov(code.T)) < 0.15 * code.var()
        assert gap(twin.mean(0), code.mean(0)) < 0.1


# analyze.py: each analysis of a planted φ, its numbers and verdicts known


class Blocks:
    """A network of which only averages are known: so many of four channels speak before and after a block."""

    active = {"E2": (1, 2), "E3": (1, 4), "M": (4, 1), "D3": (2, 1), "D2": (4, 1)}

    def activations(self, y):
        sides = {}
        for block, counts in self.active.items():
            rows = [(torch.arange(4) < n).float().expand(len(y), 4) for n in counts]
            sides[block] = unet.Sides(*rows)
        return sides


def test_sparsity_of_known_blocks():
    # change is from input to output; of several blocks the one that goes least counts
    study = study_of(torch.tensor([[1.0, 0, 0, 0]] * 8), model=Blocks(), draws=1)
    study.untrained = [
        study.network
    ] * 3  # the same network "before training": nothing was learnt
    verdicts, numbers = judged(study, "sparsity")
    assert gap(numbers["pr"]["M"].input, 1) < 1e-6
    assert gap(numbers["pr"]["M"].output, 1 / 4) < 1e-6
    for key, change in {
        "M": -3 / 4,
        "decoder": -1 / 4,
        "encoder": 1 / 4,
        "phi_pr": 1 / 4,
    }.items():
        assert numbers[key].value == pytest.approx(change)
    assert set(verdicts.values()) == {"fails"}
    nothing = {null: [dict.fromkeys(numbers, 0.0)] * 2 for null in ("untrained", "shuffled")}
    assert set(verdicts_of("sparsity", numbers, nothing).values()) == {"holds"}


class Powers:
    """ā_M is (1, 0.3 mean y²), and mean y² is σ² + mean x²."""

    def activations(self, y):
        power = y.square().mean((1, 2, 3))
        outputs = {
            "E1": torch.stack([1 + power, power**4], 1),
            "M": torch.stack([torch.ones_like(power), 0.3 * power], 1),
        }
        return {block: analyze.Sides(output, output) for block, output in outputs.items()}


def test_stability_in_closed_form():
    # cosines are those of the formula, and a constant is not stable
    black = np.zeros((40, 32, 32, 1), np.uint8)
    study = study_of(normal(40, 3), x=black, model=Powers())
    numbers = analyze.stability(study, study.network)  # ā_M is (1, 0.3 σ²) for every picture
    sigma = np.array(numbers["sigma_2"])
    lengths = np.sqrt((1 + 0.09 / 16) * (1 + 0.09 * sigma**4))
    M, E1 = numbers["curves"]["M"], numbers["curves"]["E1"]
    assert gap(M.mean(1), (1 + 0.09 * 0.25 * sigma**2) / lengths) < 0.005
    assert abs(numbers["lead"].value) < 0.01
    assert numbers["rival"] == "M of another picture"
    assert numbers["norm"].value == pytest.approx((1 + 0.09 / 16) ** -0.5, abs=1e-3)
    ahead = M - E1
    fall = ahead[list(sigma).index(0.5)] - ahead[0]
    assert numbers["fall"].value == pytest.approx(fall.mean(), abs=1e-6)


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
    same = study_of(
        code, [{0.3: code}] * 3, labels=labels
    )  # the untrained network does as well
    assert set(judged(same, "neighbours")[0].values()) == {"fails"}
    code = 3 * normal(5, 12, seed=3).abs()[np.arange(120) % 5] + 0.3 * normal(120, 12, seed=4)
    verdicts, _ = judged(study_of(code, random_codes()), "neighbours")
    assert verdicts["subspaces"] == "fails"  # five clusters that spread alike in all directions
    assert verdicts["lead"] == "not comparable"  # without classes


def test_clusters_beside_classes():
    # clusters are judged by their distance in SD, and a start from the classes by where it ends
    code = (8 * torch.eye(12)[:6]).repeat(20, 1) + normal(120, 12) + 5
    codes = {0.3: code, 0.1: code + 0.1 * normal(120, 12, seed=7)}
    across = study_of(codes, random_codes(), clusters=6, labels=np.arange(120) // 6 % 6)
    verdicts, numbers = judged(across, "clusters")
    assert np.bincount(numbers["labels"]).tolist() == [20] * 6
    assert numbers["seeds"] == numbers["at_next_sigma"].value == 1
    assert numbers["ratio"].value == pytest.approx(8 * 2**0.5, 0.15)
    assert numbers["classes"].ratio.value < 1
    assert list(verdicts.values())[:3] == ["holds"] * 3
    same = study_of(codes, random_codes(), clusters=6, labels=np.arange(120) % 6)
    verdicts, numbers = judged(same, "clusters")  # classes are clusters
    assert numbers["start_classes"] == 1
    assert list(verdicts.values()) == ["holds", "fails", "holds", "holds"]


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
    assert gap(numbers["properties"]["tuning"], 2 * on / 64) < 1e-9
    assert numbers["spatial PR"].value == pytest.approx(1)
    assert numbers["PCA dimension"].value == pytest.approx(-1)
    nothing = {"untrained": [dict.fromkeys(numbers, 0.0)] * 2}
    verdicts = verdicts_of("channels", numbers, nothing)
    failing = [key for key, verdict in verdicts.items() if verdict == "fails"]
    assert failing == ["contrast", "PCA dimension"]  # a coin is far from Gaussian


def test_map_statistics_of_all_maps():
    # spatial PR and dimension of a channel are those of its maps, one by one
    maps = normal(50, 3, 4, 5).abs() * torch.tensor([1.0, 2, 5]).view(3, 1, 1)
    spatial, dimension = analyze.map_statistics(maps)
    for c, v in enumerate(maps.double().flatten(2).unbind(1)):  # (n, hw)
        size, pr = v.mean(1), v.sum(1).square() / (20 * v.square().sum(1))
        assert spatial[c] == pytest.approx((size * pr).sum() / size.sum())
        values = torch.linalg.eigvalsh(torch.cov(v.T))
        assert dimension[c] == pytest.approx(values.sum() ** 2 / values.square().sum())


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
        one, two = mean_and_contrast(None, torch.stack([x1, x2]), 1)
        return 3 * float((one - two).square().sum()) ** power, 0.0

    monkeypatch.setattr(analyze, "conditional_distance", distance)
    monkeypatch.setattr(analyze, "phi", mean_and_contrast)
    study = study_of(normal(60, 3), pairs=30)
    numbers = analyze.embedding(study, study.network)
    nulls = {"untrained": [{"rank": 0.1, "log_ratio": 9.0}], **numbers["nulls"]}
    verdicts = verdicts_of("embedding", numbers, nulls)
    assert verdicts == {"rank": rank, "log_ratio": log_ratio}
    assert numbers["rank"].value == pytest.approx(np.sign(power))


@pytest.mark.parametrize(
    "inside, own, random, verdict",
    [
        (1.03, 0.97, 2, "holds"),
        (1.03, 0.97, 1, "not comparable"),  # any step would keep the level
        (0.8, 1.0, 1, "fails"),
        (1.0, 1.2, 2, "fails"),
    ],
)
def test_matching_and_layout(monkeypatch, inside, own, random, verdict):
    # the first level and small noise do not count; samples share their target's layout, the control's do not
    def match_noisy(study, x, sigma):
        return np.full((3, len(x)), [[own], [1.0], [random]])

    def algorithm_1(study, encoder, x, samples, name, **options):
        pictures = normal(len(x), 1, *x.shape[1:])
        if encoder is study.model:
            pictures = x[:, None] + 0.3 * pictures
        before, levels = torch.ones(len(x)), []
        for sigma, ratio in ((1.0, 2), (0.5, inside), (0.05, 2)):
            levels.append(sample.Level(sigma, before, ratio * before, *[None] * 4))
        return list(pictures), levels

    monkeypatch.setattr(analyze, "match_noisy", match_noisy)
    monkeypatch.setattr(analyze, "algorithm_1", algorithm_1)
    study = study_of(normal(12, 4), model=UNet(2, 1, 1))
    study.untrained = [analyze.View({}, UNet(2, 1, 1))] * 3
    verdicts, _ = judged(study, "matching")
    assert verdicts == {"level": verdict, "layout": "holds"}


# analyze.py: the command line

TINY = "--draws 2 --steps 3 --pairs 5 --device cpu"


@pytest.fixture
def quick(monkeypatch):
    """A few gradients and steps where Algorithms 1, 2 and Eq. 4 would make many; no t-SNE."""

    def first_dimensions(x):
        return x[:, :2]

    for name in "guidance_step", "around", "conditional_distance":
        limited = functools.partial(getattr(analyze, name), max_gradients=3)
        monkeypatch.setattr(analyze, name, limited)
    freely = functools.partial(analyze.sample_unconditional, max_steps=5)
    monkeypatch.setattr(analyze, "sample_unconditional", freely)
    monkeypatch.setattr(analyze, "tsne", first_dimensions)


def prepared(line, checkpoint, monkeypatch):
    """What `prepare` makes of a command line."""
    monkeypatch.setattr("sys.argv", ["analyze.py", "c.pt", *line.split()])
    torch.manual_seed(0)
    return analyze.prepare(analyze.arguments(), UNet(4, 3, 1), checkpoint, "cpu")


def test_analysed_pictures_are_held_out(shelf, monkeypatch):
    # and both sides of the split are themselves
    def contents(x):
        return {picture.tobytes() for picture in x}

    _, checkpoint = load_checkpoint(shelf / "c.pt")
    pictures, training, held_out = train.training_data(checkpoint["flags"])
    study, paths, what = prepared("", checkpoint, monkeypatch)
    assert len(study.x) == len(paths) == 32
    assert what == "held out"
    assert contents(study.x) == contents(study.held_out) == contents(pictures.x[held_out])
    assert contents(study.training) == contents(pictures.x[training])


def test_analyze_from_the_command_line(cli, tmp_path, quick):
    # every figure, number and verdict is there, and an untrained network confirms nothing about φ
    out = tmp_path / "out"
    line = f"analyze.py c.pt {TINY} --out {out} --data data --clusters 4"
    code, text = cli(line)
    assert code == 0 and "φ is NOT alive, by use" in text
    record = json.loads((out / "results.json").read_text())
    skipped = [name for name, numbers in record["analyses"].items() if "skipped" in numbers]
    assert skipped == ["generalisation", "regularity"]
    figures, page = {path.name for path in out.glob("*.png")}, (out / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in figures)
    assert len(figures) == 16
    about_phi = [claim.text for claim in analyze.CLAIMS if claim.about_phi]
    for verdict in record["verdicts"]:
        assert verdict["claim"] not in about_phi or verdict["verdict"] == "not comparable"
    assert cli(f"kmeans.py {out}/phi.npz --K 3 --out {out}/k.npz")[0] == 0  # its reader


def test_phi_without_structure_confirms_nothing(shelf, quick, monkeypatch, tmp_path):
    # independent random rows with random labels hold no claim about φ, through the whole pipeline
    _, checkpoint = load_checkpoint(shelf / "c.pt")
    study, _, _ = prepared(f"{TINY} --data {shelf}/data --clusters 6", checkpoint, monkeypatch)
    study.alive = analyze.Alive({}, 0.5, 0, "")
    rng = np.random.default_rng(0)
    study.labels = rng.integers(0, 4, 80)
    codes = rng.gamma(0.4, size=(2, 80, 8)).astype(np.float32)
    codes = dict(zip((0.3, 0.1), torch.from_numpy(codes)))
    study.network = study.network._replace(phi=codes)
    names = list(analyze.ANALYSES)
    names = names[: names.index("reconstruction")]
    verdicts, _, _ = analyze.analyse(study, names, tmp_path)
    holding = [verdict.claim for verdict in verdicts if verdict.verdict == "holds"]
    assert len(verdicts) > 20
    for claim in analyze.CLAIMS:
        assert claim.text not in holding or claim.only or not claim.about_phi


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
    # the gap is that of training and held-out PSNR
    def evaluate(model, x, sigmas, micro_batch):
        psnr = 20 + spread * normal(len(x)).numpy()
        if x.mean() > 0.5:
            psnr += lead
        return {sigma: psnr + sigma for sigma in sigmas}

    monkeypatch.setattr(analyze, "evaluate", evaluate)
    study = paper_b(np.full((40, 8, 8, 1), 20, np.uint8))
    study.training = study.x + 200
    numbers = analyze.denoising(study, view_of(None))
    assert verdicts_of("denoising", numbers) == {"gap": verdict}
    assert numbers["gap"].value == pytest.approx(lead, abs=1e-5)


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
    linear, _ = analyze.wiener(study.batch(range(120)))
    numbers = analyze.harmonics(study, view_of(denoise))
    assert abs(numbers["adapted"].value) < 1e-3
    assert abs(numbers["decay"].value) < 1e-3
    assert numbers["symmetry"].value == pytest.approx(1, abs=1e-4)
    verdicts = verdicts_of("harmonics", numbers)
    assert verdicts == {"adapted": "fails", "decay": "fails", "symmetry": "holds"}


def test_table_of_claims_from_results(tmp_path):
    # a sign a network; brackets where the paper speaks of other pictures
    verdicts = {"Fig. 1, 10": "holds", "Fig. 20": "fails", "Fig. 3": "holds"}
    record = {"checkpoint": {"name": "a.pt"}, "kind": "faces", "verdicts": []}
    for claim in analyze.CLAIMS:
        if claim.place in verdicts:
            record["verdicts"].append({"claim": claim.text, "verdict": verdicts[claim.place]})
    (tmp_path / "results.json").write_text(json.dumps(record))
    table = analyze.claims_table([tmp_path / "results.json"]).splitlines()
    signs = [row.split(" | ")[1].strip("| ") for row in table[2:]]
    assert signs == ["✓", "(✓)", "✗"]
    assert "a.pt" in table[0]


def test_posterior_mean_against_brute_force():
    # the closed form of memorisation is the training pictures' mean, weighted by their likelihood
    x = torch.rand(5, 1, 2, 3).double()
    y = torch.rand(4, 1, 2, 3).double()
    for sigma in 0.05, 0.3, 3:
        d2 = pair_distances(y.flatten(1), x.flatten(1))
        weights = torch.exp(-d2 / (2 * sigma**2))
        mean = weights @ x.flatten(1) / weights.sum(1, keepdim=True)
        found = analyze.posterior_mean(y.float(), sigma, x.float())
        assert gap(found.flatten(1), mean) < 1e-5


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


@pytest.mark.parametrize("strength", [0, 1])
def test_slope_of_the_psnr_curve(strength):
    # no denoising has a slope of 1, a constant one of 0
    def denoise(y, sigma):
        return strength * y

    x = torch.rand(64, 1, 16, 16)
    curve = analyze.psnr_curve(denoise, x, analyze.FIT)  # (11, 64)
    assert analyze.slope(curve).mean() == pytest.approx(strength, abs=0.01)


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
    assert verdicts_of("regularity", numbers) == {"slope": verdict}
    if data == "disc":
        assert gap(numbers["eigenvalues"], [strength] * 12) < 1e-4


def test_disc_tangents():
    # a disc that is moved, grown or dimmed a little stays in the tangent space
    place = np.array([0.45, 0.55, 0.2, 0.2, 0.8])
    x, basis = analyze.disc_tangents(16, place)
    assert gap(basis.T @ basis, torch.eye(5)) < 1e-5
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
    verdicts = verdicts_of("generalisation", numbers)
    assert list(verdicts.values()) == ["holds", "fails", "fails", "fails"]
    for pair in numbers["pairs"]:
        psnr = pair["psnr"]
        assert gap(psnr["held out"][:2], psnr["exact, held out"][:2]) < 1
        assert pair["cosines"]["nearest"].min() > 0.999
    study.versus[1] = agreeing(10, 40), agreeing(40, 70)
    numbers = analyze.generalisation(study, None)
    assert set(verdicts_of("generalisation", numbers).values()) == {"holds"}


# analyze.py: axes and marks


def inside_of(marks, **options):
    """What the frame of a plot, found by its pixels, encloses: RGB (height, width, 3)."""
    image = analyze.plot((500, 400), marks, "x", "y", **options)
    pixels = np.asarray(image).astype(int)
    gray = (pixels == 0x44).all(2)
    (rows,) = (gray.sum(1) > 100).nonzero()
    (columns,) = (gray.sum(0) > 100).nonzero()
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def is_red(pixels):
    """Which pixels are red, (height, width)."""
    red, green, _ = np.moveaxis(pixels, 2, 0)
    return red > green + 80


@pytest.mark.parametrize(
    "log, across, up",
    [
        ("", 0.2, 0.9),
        ("xy", 0.4582, 0.9774),  # log 3 / log 11, log 91 / log 101
    ],
)
def test_plot_puts_a_dot_at_its_pixel(log, across, up):
    # x grows to the right and y upwards, from one edge of the frame to the other
    dot = analyze.dots([3], [91], "a dot", "#ff0000")
    pixels = inside_of([dot], xlim=(1, 11), ylim=(1, 101), log=log)
    height, width, _ = pixels.shape
    rows, columns = is_red(pixels).nonzero()
    assert columns.mean() == pytest.approx(across * width, abs=1.5)
    assert rows.mean() == pytest.approx((1 - up) * height, abs=1.5)


def test_plot_draws_bars_to_scale():
    # bars are as high as their counts
    bars = analyze.bars([0.1, 0.2, 0.3, 0.9], 2, (0, 1), color="#ff0000")
    pixels = inside_of([bars], xlim=(0, 1), ylim=(0, 4))
    quarter, width, _ = np.array(pixels.shape) // 4
    tops = is_red(pixels).argmax(0)
    assert tops[width] == pytest.approx(quarter, abs=2)
    assert tops[3 * width] == pytest.approx(3 * quarter, abs=4)


@pytest.mark.parametrize("size", [(390, 360), (1600, 800)])
@pytest.mark.parametrize(
    "xlim, ylim, log",
    [
        ((0, 1.01e6), (-1e-5, 1e-5), ""),
        ((1, 3e6), (1e-9, 1), "xy"),
        ((-3, 3), (99.9995, 100), ""),
    ],
)
def test_plot_labels_do_not_overlap(monkeypatch, size, xlim, ylim, log):
    # no words stand over others
    def text(pen, place, words, fill, font, anchor="la"):
        if words:
            boxes.append(pen.textbbox(place, words, font, anchor))

    boxes = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    marks = [analyze.dots([0.1], [0.1], name) for name in ("one", "another", "exact, training")]
    analyze.plot(size, marks, "x", "y", "title", xlim, ylim, log)
    assert len(boxes) >= 5 + 4  # two numbers on each axis, or more
    written = np.zeros(size, int)
    for left, top, right, bottom in np.rint(boxes).astype(int):
        written[left:right, top:bottom] += 1
    assert written.max() == 1


# All scripts: what cannot run


@pytest.mark.parametrize(
    "message, line",
    [
        ("there is no such file or folder", "train.py --data nowhere"),
        ("holds no pictures", "train.py --data empty"),
        ("must be uint8", "train.py --data float.npy"),
        ("unrecognized", "train.py --widht 3"),
        ("--resume goes on with it", "train.py --data tiny.npy --out c.pt"),
        ("contradicts", "train.py --resume --out c.pt --width 3"),
        ("not a checkpoint", "sample.py text.png dark.png"),
        ("cannot be read as a picture", "sample.py c.pt text.png"),
        ("not a regular file", "sample.py c.pt fifo.png"),
        ("is also to be read", "sample.py c.pt dark.png --out dark.png --force"),
        ("no such cluster", "sample.py c.pt --cluster k.npz:7"),
        ("no such file", "analyze.py c.pt --data nowhere --out none"),
        ("among the pictures", "analyze.py c.pt --out data/figures"),
        ("no points", "kmeans.py none.npy --K 3"),
    ],
)
def test_refused_command_lines(cli, shelf, message, line):
    # a mistake is one line and exit code 2, and no file is written, changed or lost
    def files():
        return {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()}

    before = files()
    code, text = cli(line + " --device cpu")
    assert code == 2
    assert message in text and text.count("\n") == 1
    assert files() == before


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_is_one_screen(name, capsys, monkeypatch):
    # it fits a terminal of 80 columns and 40 rows
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        SCRIPTS[name].arguments()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


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
    # at most 2,400 words (the bars of tables are none)
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) <= 2400


# assets


@pytest.mark.parametrize(
    "name, code_sum, largest, psnr",
    [
        ("builtin", 24.3682, 3.2114, 25.4012),
        ("textures", 26.7802, 1.9741, 18.8928),
        ("photos", 37.0419, 1.3265, 22.0760),
        ("faces", 54.7771, 1.1246, 23.3133),
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
    assert gap(code.sum(1).mean(), code_sum) < 1e-2
    assert gap(code[0].max(), largest) < 1e-3
    assert gap(train.psnr(x_hat, x).mean(), psnr) < 5e-3
    assert "optimizer" not in checkpoint
