"""Tests: python -m pytest test_all.py (offline, CPU, no data needed).

In the order of the files; the first comment of a test says what would be wrong if it failed.
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
import types
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

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
import unet
from kmeans import KMeans

HERE = Path(__file__).parent


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


def finish(process, timeout=300):
    """(exit code, standard output, standard error)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# unet.py


def test_parameter_count():
    # a layer is lost: A.1 prints ~13 m. Convolutions 9·c·c' + c', transposed ones 4·c·c' + c', norms 2·c'
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
    # the default number of levels leaves a part of the picture unseen
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
    # another network than that of A.1, or the score has another sign
    y = normal(3, 3, 16, 24)
    assert list(UNet().blocks) == ["E1", "E2", "E3", "M", "D3", "D2", "D1"]
    with torch.no_grad():
        x_hat, m = independent_forward(small, y)
        assert max(gap(small.denoise(y), x_hat), gap(small.score(y), x_hat - y)) < 1e-5
        assert gap(small.encode(y)[0], m) < 1e-5


def test_activations_and_nothing_left_behind(small):
    # ā is of another block, or the network keeps a picture's activations
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
    assert all(gap(a, b) < 1e-6 for name in seen for a, b in zip(averages[name], seen[name]))
    assert set(vars(small)) == before and small.training


def test_phi(small):
    # φ is of another layer, its noise is not z·σ, or the whole network runs for it
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
    # a picture of odd sides is refused, or padded with black
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


def checkpoint_of(model, **changes):
    """What train.py would have saved of a model: a dict."""
    made = dict(width=model.width, channels=model.channels, levels=model.levels)
    flags = {**train.COMMON, **made, "size": 16, "batch": 32, "pictures": 64}
    return dict(format=unet.FORMAT, model=made, weights=model.state_dict(), size=16, sigma_max=1.0, step=2,
                flags=flags, mean=[0.5] * model.channels, elapsed=1.0, fingerprint="0", training={}) | changes


GONE, BIAS = object(), "weights blocks.M.0.bias"
DAMAGE = {                 # what the one line says: the entries of a whole checkpoint that make it say so
    "no mean": [("mean", GONE)], "no flags": [("flags", GONE)],
    "size mismatch": [("model width", 5), ("model width", 3000)],
    "damaged": [("model", [1, 2]), ("model channels", "3"), ("model width", 10 ** 9), ("weights", 7)],
    "not finite": [(BIAS, torch.full((16,), float("nan")))],
    "Missing": [(BIAS, GONE)], "Unexpected": [("weights extra", torch.zeros(2))],
    "another version": [("format", "blind-denoiser-1")], "not a checkpoint": [("format", GONE)]}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_checkpoints(tmp_path, small, words):
    # a file that train.py did not write gives a picture, a traceback, gigabytes, or a hang
    for place, value in DAMAGE[words]:
        part = checkpoint = copy.deepcopy(checkpoint_of(small))
        *outer, key = place.split()
        for name in outer:
            part = part[name]
        part[key] = value
        if value is GONE:
            del part[key]
        torch.save(checkpoint, tmp_path / "a.pt")
        with pytest.raises(UserError, match=f"a.pt: .*{words}") as error:
            load_checkpoint(tmp_path / "a.pt")
        assert "\n" not in str(error.value)


def test_load_checkpoint(tmp_path, small):
    # a whole file is refused or changed; a flipped byte loads silently; a malicious one is run
    good = tmp_path / "good.pt"
    torch.save(checkpoint_of(small), good)
    model, checkpoint = load_checkpoint(good)
    assert checkpoint["size"] == 16 and not model.training and next(model.parameters()).requires_grad
    assert checkpoint["sha256"] == hashlib.sha256(good.read_bytes()).hexdigest()
    assert all(gap(a, b) == 0 for a, b in zip(model.state_dict().values(), small.state_dict().values()))
    half = checkpoint_of(small, weights={k: v.half() for k, v in small.state_dict().items()})
    torch.save(half, tmp_path / "half.pt")       # shipped weights: half precision, no optimizer
    assert all(p.dtype == torch.float32 for p in load_checkpoint(tmp_path / "half.pt")[0].parameters())
    torch.save(Malicious(), tmp_path / "malicious.pt")
    torch.save(small.state_dict(), tmp_path / "foreign.pt")
    data = good.read_bytes()
    at = data.index(small.state_dict()["blocks.M.0.weight"].numpy().tobytes()[:40])
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    for name, content in dict(cut=data[:3000], text=b"hello", empty=b"", flipped=flipped).items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    (tmp_path / "folder.pt").mkdir()
    for name in "malicious", "foreign", "cut", "text", "empty", "flipped", "missing", "folder":
        words = "cannot be read" if name in ("missing", "folder") else "not a checkpoint written by train.py"
        with pytest.raises(UserError, match=f"{name}.pt: {words}"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not os.path.exists("owned")


def test_write_is_whole_or_not_at_all(tmp_path):
    # a reader sees a half-written file; a failure leaves a stray file or destroys the old one
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(path)
    with unet.write(link) as file:
        file.write(b"old")
    assert path.read_bytes() == b"old" and link.is_symlink()                   # followed, not replaced
    for trouble in KeyboardInterrupt(), ValueError(), OSError(28, "No space left on device"):
        with pytest.raises(UserError if isinstance(trouble, OSError) else type(trouble)) as error:
            with unet.write(path) as file:
                file.write(b"new")
                raise trouble
        assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["a.json", "link.json"]
    assert str(error.value) == f"{path}: could not be written (no space left on device)"
    process = script("-c", "import sys, unet\nfor i in range(100):\n  with unet.write(sys.argv[1]) as f: "
                           "f.write(bytes([65 + i % 2]) * 100_000)", path)
    sizes = set()
    while process.poll() is None:                # a reader beside a writer
        seen = path.read_bytes()
        sizes.add((len(seen), len(set(seen))))
    assert finish(process)[0] == 0 and sizes <= {(3, 3), (100_000, 1)} and (100_000, 1) in sizes


def test_check_outputs(tmp_path):
    # the user waits an hour and then learns that nothing can be written
    (tmp_path / "there.png").write_text("mine")
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    cases = {"there.png": "exists: --force", "no/where.png": "there is no folder", ".": "must name a file",
             "": "must name a file"} | ({"sealed/a.png": "not writable"} if os.geteuid() else {})
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            unet.check_outputs([os.path.join(tmp_path, name) if name else ""])
    unet.check_outputs([tmp_path / "there.png"], force=True)
    unet.check_outputs([tmp_path / "new.png"])


ENDS = [                   # what main does, the exit code, standard error
    ("raise unet.UserError('--x 3: no')", 2, "-c: --x 3: no\n"), ("return 3", 3, ""), ("pass", 0, ""),
    ("raise KeyboardInterrupt", 130, ""), ("raise ZeroDivisionError", 1, ""),
    ("raise MemoryError('50 GB')", 2, "-c: out of memory; smaller settings need"),
    ("raise OSError(28, 'No space left on device', 'a.png')", 2, "-c: a.png: No space left on device\n"),
    ("torch.empty(10 ** 15)", 2, "-c: out of memory"), ("raise BrokenPipeError", 141, ""),
    ("raise torch.OutOfMemoryError('CUDA out of memory')", 2, "-c: out of memory"),
    ("raise unet.UserError('bad\\nname\\udcff')", 2, "-c: bad\\nname\\udcff\n"),
    ("unet.say('σ and φ'); return 0", 0, ""),
    ("sys.stdout.close(); unet.say('σ'); return 0", 0, "")]


def test_one_way_to_end():
    # a mendable trouble is a traceback, or a bug is not; a console that knows no σ kills the work
    code, out, err = finish(script("-c", f"""import io, sys, torch, unet
for body in {[body for body, _, _ in ENDS]!r}:
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in "12")
    space = dict(unet=unet, torch=torch, sys=sys)
    exec("def main():\\n  " + body, space)
    try:
        unet.run(space["main"])
    except SystemExit as stop:
        code = stop.code
    except ZeroDivisionError:
        code = 1
    text = sys.stderr.buffer.getvalue().decode()
    sys.stdout, sys.stderr = out, err
    print(repr((code, text)))
"""))
    assert code == 0, err
    for (body, code, words), line in zip(ENDS, out.splitlines(), strict=True):
        found, text = eval(line)
        assert found == code and (text == words if words[-1:] in ("\n", "") else text.startswith(words)), body


def test_standard_output_never_kills_work(tmp_path):
    # `| head`, a full disk under a log, or no console at all end a training
    body = ("import unet\ndef main():\n  for i in range(3000): unet.say('line')\n"
            "  open('PATH', 'w').write('done')\n")
    for name, shell in ("head", "| head -1"), ("full", "> /dev/full"), ("none", ">&-"):
        path = tmp_path / name
        source = tmp_path / f"{name}.py"
        source.write_text(body.replace("PATH", str(path)) + "unet.run(main)\n")
        process = subprocess.run(["bash", "-c", f"{sys.executable} {source} {shell}"], cwd=HERE, text=True,
                                 capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
        assert path.read_text() == "done" and process.stderr == "", name


# train.py: pictures


def test_odd_pictures(tmp_path):
    # a format is read with wrong colours, turned, or not at all; a damaged file ends the run
    red, gray, white, size = (200, 40, 40), (51,) * 3, (255,) * 3, (40, 24)
    folder, elsewhere = tmp_path / "in" / "Class A", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    flat, clear = Image.new("RGB", size, red), Image.new("P", size, 0)
    clear.putpalette([0, 0, 0] * 256)
    sixteen_bits = Image.fromarray(np.full(size[::-1], 51 * 257, np.uint16))
    expected = []
    for name, image, colour, options in (
            ("a.JPEG", flat, red, dict(quality=95)), ("b.png", flat.quantize(4), red, {}),
            ("c.Jpg", flat.convert("CMYK"), red, dict(quality=95)),
            ("d.PNG", Image.new("RGBA", size, (*red, 51)), (244, 212, 212), {}),         # a fifth over white
            ("e.gif", clear, white, dict(transparency=0)), ("f.png", sixteen_bits, gray, {}),
            ("g.bmp", Image.new("L", size, 51), gray, {}), ("h.tiff", Image.new("1", size, 1), white, {}),
            ("i.png", Image.new("LA", size, (0, 0)), white, {}),
            ("i2.png", Image.new("RGB", size, (0, 255, 0)), white, dict(transparency=(0, 255, 0)))):
        image.save(folder / name, **options)
        expected.append(colour)
    upright = np.zeros((24, 24, 3), np.uint8)
    upright[:12] = red                                                         # red above black …
    exif = Image.Exif()
    exif[0x0112] = 6                                                           # … stored turned a quarter
    Image.fromarray(np.rot90(upright).copy()).save(folder / "j.png", exif=exif)
    (folder / "k.jpg").write_bytes((folder / "a.JPEG").read_bytes()[:400])     # truncated
    (folder / "l.png").write_text("no picture")
    (folder / "notes.txt").write_text("ignored")
    (folder / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
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
    # what is outside the central square shows, or stripes alias
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, 16:80:2] = 255  # one-pixel stripes in the central square: their average is gray
    stripes[:, :16] = stripes[:, 80:] = (255, 0, 0)                            # outside it
    x = train.to_pixels(Image.fromarray(stripes), 16, 3)
    assert np.abs(x[0, :, 1:-1].astype(int) - 127).max() <= 8                  # no red, no aliasing


def test_patches_stay_together(tmp_path):
    # tiles of one picture stand on both sides of the split
    rng = np.random.default_rng(0)
    tiles = {}
    for k in range(12):
        picture = rng.integers(0, 256, (35, 50), np.uint8)                     # 2 × 3 tiles of 16
        if k == 3:
            picture[:16, :16] = tiles["2.png"][16:32, 32:48]  # shares one tile with its neighbour
        if k > 6:
            picture[16:32, :16] = 255                      # a blank tile, which ties nothing
        tiles[f"{k}.png"] = picture
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    Image.new("L", (10, 40)).save(tmp_path / "tiny.png")
    p = train.load_pictures(str(tmp_path), 16, 1, patches=True)
    assert p.x.shape == (72, 16, 16, 1) and len(p.skipped) == 1 and "no 16×16 tile" in p.skipped[0]
    for path, x in zip(p.paths, p.x):
        name, tile = Path(path).name.split("#")
        i, j = divmod(int(tile), 3)
        assert (tiles[name][16 * i:16 * i + 16, 16 * j:16 * j + 16] == x[..., 0]).all()
    assert p.classes == ["tiny", *map(str, range(12))] and len(set(p.groups)) == 11
    assert [p.classes[k] for k in p.labels] == [Path(f).name.split(".")[0] for f in p.paths]    # its picture
    for seed in range(8):
        train_rows, held_out = train.split(p, 0.2, seed)
        files = [{Path(p.paths[i]).name.split("#")[0] for i in rows} for rows in (train_rows, held_out)]
        assert not files[0] & files[1] and files[1]
        assert len({"2.png", "3.png"} & files[0]) != 1                         # the shared tile ties them


def test_split_depends_on_pictures_and_seed_alone(tmp_path):
    # a renamed folder splits otherwise; a copy is held out
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
    # the layout of an array is mistaken for another
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.save(tmp_path / "colour.npy", x)
    np.save(tmp_path / "gray.npy", x[..., 0])
    np.save(tmp_path / "gray1.npy", x[..., :1])
    np.savez(tmp_path / "pictures.npz", other=np.zeros(3), images=x)
    p = train.load_pictures(str(tmp_path / "colour.npy"), 8)
    assert isinstance(p.x, np.memmap) and (p.x == x).all()
    for name, channels in itertools.product(("gray", "gray1"), (1, 3)):
        assert (train.load_pictures(str(tmp_path / f"{name}.npy"), 8, channels).x == x[..., :1]).all()
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


def test_builtin_pictures():
    # the built-in set changes from run to run, or holds blank pictures
    x, labels, classes = train.builtin_pictures(300, 32, 3)
    assert x.shape == (300, 32, 32, 3) and len(classes) >= 12
    assert np.bincount(labels).tolist() == [300 // len(classes)] * len(classes)
    assert (train.builtin_pictures(300, 32, 3)[0] == x).all()                  # deterministic
    assert min(np.ptp(p) for p in x) > 40        # nothing is blank
    gray = train.builtin_pictures(30, 32, 1)[0]
    assert gray.shape == (30, 32, 32, 1)


def test_disc_pictures_have_five_degrees_of_freedom():
    # a disc is textured, or its ground is: a radial profile about its own centre must describe it
    x = train.builtin_pictures(40, 32, 1, "disc")[0][..., 0].astype(float)
    for p in x:
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
    assert [rate(t, 1000) for t in (0.011, 0.09, 0.1, 0.55, 0.99, 1)] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 1e-3 / 32, 1e-3 / 512, 1e-3 / 512], rel=1e-12)
    assert rate(0.005, 2000) == pytest.approx(5e-4, rel=0.01)
    for epochs in None, 3, 999:
        assert [rate(t, epochs) for t in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx(
            [1e-6, 0.95 * 0.501e-3, 0.9e-3, 0.45e-3, 0], rel=1e-9, abs=1e-15)
    rows = np.arange(100, 110)
    seen = np.concatenate([train.batch_rows(rows, step, 4, 0) for step in range(10)])      # 4 epochs of 10
    for epoch in seen.reshape(4, 10):
        assert sorted(epoch) == list(rows)
    assert list(seen[:10]) != list(seen[10:20])
    assert sorted(train.batch_rows(rows, 0, 25, 0)) == sorted([*rows, *rows, *seen[20:25]])    # batch > data


def test_micro_batches_give_the_same_gradient(small):
    # the gradient depends on the memory there is, or Eq. 1 is a mean over pixels
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


def test_the_start_of_the_network(small):
    # the network starts elsewhere: channels that are on for every picture, open skips, a gray output
    y = normal(16, 3, 16, 16)
    train.initialise(small, y, [0.2, 0.4, 0.6])
    outputs = []
    hooks = [m.register_forward_hook(lambda m, i, o: outputs.append(o.detach().clone()))
             for m in small.modules() if isinstance(m, (nn.GroupNorm, nn.ConvTranspose2d))]
    x_hat = small(y)
    for hook in hooks:
        hook.remove()
    assert gap(x_hat, torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand_as(x_hat)) < 1e-6
    assert len(outputs) == 2 * 2 + 3 + 2 * 6 - 2 + 2
    for a in outputs:
        assert gap(a.mean((0, 2, 3)), torch.zeros(a.shape[1])) < 1e-3
        assert gap(a.std((0, 2, 3)), torch.ones(a.shape[1])) < 1e-2
    maps, skips = small.encode(y)
    nn.init.normal_(small.blocks["D1"][-1].weight)
    assert gap(small.decode(maps, skips), small.decode(maps, [0 * s for s in skips])) == 0
    assert gap(small.decode(maps, skips), small.decode(0 * maps, skips)) > 0.01


def test_training_step_by_hand(small):
    # M dies: filters move with a common sign; or the skips open at once; or a step is not Adam's
    x = torch.rand(4, 3, 16, 16)
    y = x + 0.3 * normal(*x.shape)
    before, twin = copy.deepcopy(small.state_dict()), copy.deepcopy(small)
    adam = torch.optim.Adam(small.parameters(), 1e-3)
    loss = train.training_step(small, adam, x, y, 4, 2, skips_closed=True)
    assert loss == pytest.approx((twin(y) - x).square().sum().item() / 4, rel=1e-5)
    ((twin(y) - x).square().sum() / 4).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in small.named_parameters():
        g = gradients[name]
        if p.ndim == 4 and name.startswith("blocks"):
            g = g - g.mean((1, 2, 3), keepdim=True)        # of one filter, over its inputs and places
        step = before[name] - p.detach()                   # Adam's first: 1e-3 times the sign
        if name in ("blocks.D1.0.weight", "blocks.D2.0.weight"):
            half = g.shape[1] // 2
            assert not step[:, :half].any() and step[:, half:].any()
            g, step = g[:, half:], step[:, half:]
        large = g.abs() > 1e-2 * g.abs().max()
        assert gap(step[large], 1e-3 * g[large].sign()) < 1e-5, name


def listening(to_maps):
    """A hand-made network: M's maps are the noisy picture; its decoder listens to them, or to the skip."""
    return SimpleNamespace(encode=lambda y: (y, [y]),
                           decode=lambda maps, skips: maps if to_maps else skips[0])


def test_use_of_M_in_closed_form():
    # a decoder that ignores M passes for one that uses it, or the other way round
    x, sigmas = torch.rand(40, 1, 16, 16), (0.1, 0.5)
    assert train.use_of_M(listening(False), x, sigmas) == dict.fromkeys(sigmas, 0)
    for micro in 40, 10:
        for sigma, use in train.use_of_M(listening(True), x, sigmas, micro_batch=micro).items():
            swapped = 2 / 12 + sigma ** 2        # two independent uniform pictures, and the noise
            assert use == pytest.approx(10 * math.log10(swapped / sigma ** 2), abs=0.15)
    x = torch.rand(100, 1, 16, 16)
    assert train.evaluate(listening(False), x, 7) == pytest.approx(
        {s: -20 * math.log10(s) for s in train.SIGMAS}, abs=0.15)              # the output is the input
    assert set(train.evaluate(listening(False), x, 7, 0.3)) == {0.05, 0.1, 0.2, 0.3}
    assert set(train.evaluate(listening(False), x, 7, 0.01)) == {0.01}


def test_aliveness_and_class_agreement(small, monkeypatch):
    # a constant φ passes for a code, or silent channels are not counted
    v = torch.tensor([[1., 0, 0, 2], [1, 0, 0, 0], [0, 3, 0, 0]])
    monkeypatch.setattr(train, "code", lambda model, x, draws=20: v)
    found = train.aliveness(small, torch.rand(3, 3, 16, 16))
    assert found["cosine"] == pytest.approx((1 / 5 ** 0.5) / 3) and found["silent"] == 1
    assert list(found["use"]) == [0.1, 0.3, 0.5, 1.0]
    labels, code = np.array([0, 0, 0, 1, 1, 1, -1]), normal(7, 5)
    code[:3, 0] += 50
    code[3:6, 1] += 50
    code[6] = code[0]                            # of no class: no neighbour
    assert train.class_agreement(code, labels, k=2) == 1
    assert train.class_agreement(code, np.array([0, 0, 1, 1, 1, 0, -1]), k=2) == pytest.approx(1 / 3)
    assert train.class_agreement(code, np.full(7, -1)) is None


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
    steps, optimizer = 400, torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3 * train.learning_rate(step / steps)
        x = sample(64)
        y = x + sigma * torch.randn(x.shape, generator=g)
        train.training_step(model, optimizer, x, y, 64, 64, skips_closed=step < steps / 10)
    x = sample(2000)
    y = x + sigma * torch.randn(x.shape, generator=g)
    wiener = torch.fft.ifft2(torch.fft.fft2(y) * spectrum / (spectrum + sigma ** 2)).real
    with torch.no_grad():
        x_hat = model.denoise(y)
    optimum = (spectrum * sigma ** 2 / (spectrum + sigma ** 2)).mean().item()
    assert abs((wiener - x).square().mean().item() / optimum - 1) < 0.03       # the oracle is right
    assert 0.98 < (x_hat - x).square().mean().item() / optimum < 1.25
    assert (x_hat - wiener).square().mean() < 0.06 * (y - wiener).square().mean()


FLAGS = dict(train.COMMON, size=8, width=2, levels=1, channels=1, batch=6)


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
    # a run in two parts differs from one
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
    pictures, rows, held_out = train.training_data(saved["flags"])
    assert len(rows) == 38 and len(held_out) == 2 and pictures.fingerprint == saved["fingerprint"]


def test_killed_process_and_signals(tmp_path):
    # a killed or stopped run cannot go on, or ends elsewhere
    data = tiny_data(tmp_path)
    command = ["train.py", "--data", data, "--size", 8, "--width", 2, "--levels", 1, "--channels", 1,
               "--batch", 8, "--epochs", 60, "--device", "cpu"]
    runs = {name: script(*command, "--out", tmp_path / f"{name}.pt", "--save-every", every)
            for name, every in (("whole", 9), ("killed", 0.05), ("stopped", 0.05))}

    def wait_for_saves(name, lines):
        log = tmp_path / f"{name}.jsonl"
        while not log.exists() or log.read_text().count("\n") < lines:
            assert runs[name].poll() is None

    wait_for_saves("killed", 1)
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


def test_checkpoint_holds_what_it_says(tmp_path):
    # what users read is measured on training pictures, or of another network
    flags, out = {**FLAGS, "data": tiny_data(tmp_path), "pictures": 80, "val": 0.3}, str(tmp_path / "a.pt")
    train.train(flags, out)
    model, saved = load_checkpoint(out)
    pictures, rows, held_out = train.training_data(flags)
    found, held = saved["training"], train.to_batch(pictures.x[held_out], "cpu")
    assert found["pictures_seen"] == 84 and found["training_pictures"] == 28 and found["epoch"] == 3
    held = held[np.random.default_rng((0, 4)).permutation(len(held))]
    assert found["psnr"] == pytest.approx(train.evaluate(model, held, 6), abs=1e-4)
    assert found["use"] == pytest.approx(train.use_of_M(model, held), abs=1e-4)
    assert saved["mean"] == pytest.approx([pictures.x[rows].mean() / 255], abs=1e-6)
    distances = torch.pdist(phi(model, held, 0.3, 20, train.seeded("cpu", 77, 0)))
    assert found["phi_distance"] == pytest.approx(distances.mean().item(), 1e-4)
    first = model.blocks["M"][1].weight          # the data-dependent pass was made: 1 is PyTorch's own start
    assert (first - 1).abs().max() > 0.05
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert line["use"]["0.5"] == found["use"][0.5] and line["cosine"] == found["cosine"]


def test_torchrun_gives_the_same_weights(tmp_path):
    # the global batch depends on the number of processes
    data = tiny_data(tmp_path)
    flags = ["--data", data, "--size", 8, "--width", 2, "--levels", 1, "--channels", 1, "--batch", 7,
             "--epochs", 2, "--device", "cpu", "--out"]
    one = script("train.py", *flags, tmp_path / "one.pt")
    two = script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
                 *flags, tmp_path / "two.pt")
    for process in one, two:
        code, _, err = finish(process)
        assert code == 0, err
    a, b = weights(tmp_path / "one.pt"), weights(tmp_path / "two.pt")
    assert max(gap(a[k], b[k]) for k in a) < 1e-5


def test_minutes_and_lengthening(tmp_path):
    # --minutes does not end a run, or a finished one cannot be lengthened
    flags = {**FLAGS, "data": tiny_data(tmp_path), "minutes": 0.02}
    assert train.train(flags, str(tmp_path / "a.pt"))
    saved = load_checkpoint(tmp_path / "a.pt")[1]
    assert saved["elapsed"] >= 1.2 and saved["training"]["lr"] < 1e-4
    given = {**dict.fromkeys(train.COMMON | train.PAPER), "minutes": 0.04}
    longer = train.complete_flags(given, saved, "a.pt")
    assert train.train(longer, str(tmp_path / "a.pt"), resume=saved)
    again = load_checkpoint(tmp_path / "a.pt")[1]
    assert again["step"] > saved["step"] and again["elapsed"] > saved["elapsed"]
    curve = [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert curve == sorted(set(curve)) and curve[-1] == again["step"] and saved["step"] in curve


def test_defaults_are_the_papers():
    # a user who types no flag does not get A.1 to A.3
    given = dict.fromkeys(train.COMMON | train.PAPER)
    flags = train.complete_flags({**given, "data": "x"})
    assert [flags[k] for k in ("size", "width", "levels", "batch", "epochs", "minutes", "pictures")] == [
        64, 64, 3, 1024, 1000, None, None]
    assert train.complete_flags({**given, "data": "x", "minutes": 5.0})["epochs"] is None
    builtin = train.complete_flags(given)
    assert [builtin[k] for k in ("size", "width", "levels", "batch", "pictures")] == [32, 16, 2, 32, 150_000]
    assert train.complete_flags({**given, "data": "disc"})["channels"] == 1
    assert [train.complete_flags({**given, "size": s})["levels"] for s in (16, 40, 80, 160)] == [1, 2, 3, 4]


def test_one_run_at_a_time(tmp_path):
    # two trainings write one checkpoint in turn
    out = str(tmp_path / "a.pt")
    with train.only_run(out):
        with pytest.raises(UserError, match=f"process {os.getpid()} is training it now"):
            with train.only_run(out):
                pass
    (tmp_path / "a.pt.lock").write_text("1\n")               # left by a killed run: no reason to stop
    with train.only_run(out):
        pass
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with data and checkpoints, good and bad, for the table of command lines."""
    at = tmp_path_factory.mktemp("shelf")
    data = tiny_data(at)
    train.train({**FLAGS, "data": data, "epochs": 1.0}, str(at / "done.pt"))
    done = torch.load(at / "done.pt", weights_only=True)
    torch.save({**done, "fingerprint": "0"}, at / "moved.pt")
    torch.save({k: v for k, v in done.items() if k != "optimizer"}, at / "shipped.pt")
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    for name, array in dict(float=x / 255, short=x.astype(np.uint16), flat=x[0, 0, 0], five=x[..., None],
                            two=x.reshape(20, -1)[:, :7], four=np.repeat(x, 2, -1)[..., :4], none=x[:0],
                            words=np.array(["a"]), complex=x * 1j,
                            dates=np.array(["2026-01-01"], "M8[D]")).items():
        np.save(at / f"{name}.npy", array)
    np.save(at / "object.npy", np.array([None]), allow_pickle=True)
    np.save(at / "single.npy", np.repeat(x[:1], 4, 0))
    np.savez(at / "nothing.npz", a=np.zeros(3))
    for name, labels in dict(wide=np.zeros((20, 2), int), nan=np.full(20, np.nan), few=np.arange(3)).items():
        np.savez(at / f"{name}.npz", data=x, labels=labels)
    np.savez(at / "good.npz", data=np.asfortranarray(x), labels=np.arange(20).astype(">i4"))
    whole = (at / "good.npz").read_bytes()
    (at / "cut.npz").write_bytes(whole[:-200])
    middle = whole.index(b"data.npy") + 400
    (at / "crc.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1:])
    good = Path(data).read_bytes()
    (at / "cut.npy").write_bytes(good[:-100])
    (at / "huge.npy").write_bytes(good.replace(b"(40, 8, 8)", b"(4" + 5 * b"0" + b",8,8)"[-3:]))
    (at / "negative.npy").write_bytes(good.replace(b"(40, 8, 8)", b"(-4, 8, 8)"))
    (at / "empty.npy").write_bytes(b"")
    for name in "empty", "bad":
        (at / name).mkdir()
    (at / "bad" / "x.png").write_text("no picture")
    return at


TINY = "--data tiny.npy --size 8 --width 2 --device cpu --pictures 12"
COMMANDS = {               # what the one line of train.py says: the command lines (" | ") that make it say so
    "nowhere: no such file": "--data nowhere", "none of its 1 pictures": "--data bad --size 8",
    "looked for a folder": "--data empty | --data done.pt", "only one distinct": "--data single.npy --size 8",
    "must be uint8": " | ".join(f"--data {name} --size 8" for name in (
        "float.npy short.npy flat.npy two.npy five.npy four.npy none.npy words.npy complex.npy dates.npy "
        "nothing.npz").split()),
    "not a whole": " | ".join(f"--data {name} --size 8" for name in (
        "object.npy cut.npy negative.npy empty.npy huge.npy cut.npz crc.npz").split()),
    "labels must be 20 integers": " | ".join(f"--data {name}.npz --size 8" for name in (
        "wide nan few".split())),
    "multiple of 2": "--data good.npz --size 9 --levels 1", "multiple of 4": f"{TINY} --size 30",
    "hold no 16×16 tile": "--data good.npz --size 16 --patches",
    "positive number": "--data calpha:-1 | --data calpha: | --data calpha:nan",
    "unrecognized arguments: --widht": f"{TINY} --widht 3", "unrecognized arguments: extra": "extra",
    "--batch: invalid integer": f"{TINY} --batch two",
    "--pictures: invalid integer": f"{TINY} --pictures 1.5",
    "invalid choice": f"{TINY} --channels 2 | {TINY} --subset third | {TINY} --precision fp16",
    "not available": f"{TINY} --device meta | {TINY} --device cuda:99 | {TINY} --device toaster",
    "must end in .pt": f"{TINY} --out x.png | {TINY} --out ''",
    "there is no folder": f"{TINY} --out no/where.pt",
    "--resume goes on with it": f"{TINY} --out done.pt", "cat.png exists": f"{TINY} --out cat.pt",
    "choose one": f"{TINY} --out done.pt --resume --force", "weights only": "--resume --out shipped.pt",
    "--width 3 contradicts": "--resume --out done.pt --width 3",
    "--seed 1 contradicts": "--resume --out done.pt --seed 1",
    "--epochs 0.5 contradicts": "--resume --out done.pt --epochs 0.5",
    "not the pictures": "--resume --out moved.pt | --resume --out done.pt --data good.npz",
    "cannot be read": "--resume --out gone.pt | --resume --out tiny.pt",
    "not a checkpoint": "--resume --out empty.pt"}
OUT_OF_RANGE = """batch 0, batch 1000000000, width -1, width 1000000, levels 9, epochs inf, epochs nan,
epochs 0, minutes -1, pictures 0, val 1, val nan,
sigma-max 0, sigma-max inf, size 0, size 100000, limit 0, seed -1,
seed 99999999999, save-every 0, micro-batch 0"""           # the line says "--batch: 0"


COMMANDS |= {f"--{flag}: {value}": f"{TINY} --{flag} {value}" for flag, value in
             map(str.split, OUT_OF_RANGE.split(","))}


@pytest.mark.parametrize("message", COMMANDS)
def test_train_commands_that_cannot_run(shelf, monkeypatch, capsys, message):
    # a bad flag or file gives a traceback, runs all the same, or leaves something behind
    (shelf / "cat.png").write_text("mine")
    (shelf / "empty.pt").write_text("")
    monkeypatch.chdir(shelf)
    before = {f: f.read_bytes() for f in shelf.glob("*.*")}
    for words in COMMANDS[message].split(" | "):
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        with pytest.raises((UserError, SystemExit)) as error:
            train.main()
        text = capsys.readouterr().err if error.type is SystemExit else str(error.value)
        assert message in text and text.strip().count("\n") == 0, words
        assert getattr(error.value, "code", 2) == 2
        assert {f: f.read_bytes() for f in shelf.glob("*.*")} == before


def test_odd_commands_that_run(shelf, monkeypatch, capsys):
    # what is odd but usable is refused: Fortran order, big-endian labels, a dot in the name, a link
    monkeypatch.chdir(shelf)
    (shelf / "link.pt").symlink_to(shelf / "aim.pt")
    for words in (f"{TINY} --out run.2.pt", f"{TINY} --out link.pt", f"{TINY} --batch 60 --out large.pt",
                  "--data good.npz --size 8 --width 2 --device cpu --epochs 1 --out labels.pt"):
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        assert train.main() == 0
    assert {"run.2.jsonl", "aim.pt"} <= set(os.listdir(shelf)) and (shelf / "link.pt").is_symlink()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY.split(), "--out", "rank.pt"])
    with pytest.raises(UserError, match="RANK is set, but not WORLD_SIZE"):
        train.main()
    assert not list(shelf.glob("*.lock")) and not list(shelf.glob("*.tmp"))


def test_full_disk_and_bad_weights(shelf, monkeypatch):
    # a full disk destroys the last save, or a diverged run overwrites it
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))    # stands for a full disk
    before = (shelf / "done.pt").read_bytes()
    process = script("train.py", "--resume", "--epochs", 2, "--out", shelf / "done.pt", "--device", "cpu",
                     preexec_fn=limit)
    code, _, err = finish(process)
    assert code == 2 and "done.pt: could not be written (file too large)" in err and err.count("\n") == 1
    assert (shelf / "done.pt").read_bytes() == before and not list(shelf.glob("*.tmp"))
    resume = load_checkpoint(shelf / "done.pt")[1]
    resume["weights"]["blocks.M.0.bias"][:] = 1e38
    resume["weights"]["blocks.D1.15.weight"][:] = 1e38
    with pytest.raises(UserError, match="step 7, σ up to .*not finite"):
        train.train({**resume["flags"], "epochs": 3.0}, str(shelf / "done.pt"), resume=resume)
    assert (shelf / "done.pt").read_bytes() == before


def test_help_and_bench(capsys):
    # --help or --bench ends in a traceback
    process = script("train.py", "--help")
    train.bench({**FLAGS, "width": 2, "levels": 1, "batch": 4}, None, torch.device("cpu"), seconds=0.3)
    bench = capsys.readouterr().out
    assert all(float(n) > 0 for n in re.findall(r"([\d.]+) images/s", bench)) and bench.count("images/s") == 4
    code, text, _ = finish(process)
    assert code == 0 and all(words in text for words in ("--minutes", "--resume", "python train.py --data"))


# kmeans.py


# K-means


def plain_lloyd(x, c, iterations):
    """Every distance, in float64; yields (labels, centres, inertia) after each step."""
    x, c = x.astype(np.float64), c.astype(np.float64)
    for _ in range(iterations):
        labels = ((x[:, None] - c) ** 2).sum(2).argmin(1)
        c = np.stack([x[labels == k].mean(0) if (labels == k).any() else c[k] for k in range(len(c))])
        d2 = ((x[:, None] - c) ** 2).sum(2)
        yield d2.argmin(1), c, d2.min(1).sum()


def plain_seeding(x, K, restarts, seed):
    """Greedy k-means++ one restart after the other, from all distances, with the same random numbers."""
    generator, L = torch.Generator().manual_seed(seed), 2 + int(math.log(K))
    chosen = [[int(i)] for i in torch.randint(len(x), (restarts,), generator=generator)]
    d2 = ((x[:, None] - x) ** 2).sum(2)
    for _ in range(K - 1):
        u = 1 - torch.rand(restarts, L, generator=generator, dtype=torch.float64).numpy()
        for mine, row in zip(chosen, u):
            D2 = d2[mine].min(0)
            candidates = [int(np.argmax(D2.cumsum() >= v * D2.sum())) for v in row]
            mine.append(min(candidates, key=lambda i: np.minimum(D2, d2[i]).sum()))
    return x[np.array(chosen)]


def blobs(n=600, d=20, K=12, seed=0):
    """Clustered points (n, d), cut off at 0 as φ is."""
    r = np.random.default_rng(seed)
    return np.maximum(r.normal(size=(K, d))[r.integers(K, size=n)] + 0.5 * r.normal(size=(n, d)), 0)


def test_kmeans_all_partitions():
    # wrong if: the best of fifty restarts is not the best of all partitions
    for seed in range(2):
        x, best = np.random.default_rng(seed).normal(size=(8, 2)), math.inf
        for labels in itertools.product(range(3), repeat=7):
            labels = np.array((0, *labels))
            best = min(best, sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in set(labels)))
        assert abs(KMeans(3, n_init=50, tol=0, seed=seed).fit(x).inertia_ - best) < 1e-9


def test_kmeans_is_plain_lloyd_step_by_step(monkeypatch):
    # wrong if: a skipped distance, a chunk's edge or a running sum changes a label, a centre or the inertia
    for K, d in ((40, 20), (7, 3)):
        x = blobs(d=d)
        init, before = x[np.random.default_rng(1).permutation(len(x))[:K]], math.inf
        for steps, (labels, centers, inertia) in enumerate(plain_lloyd(x, init, 9), 1):
            for rows in (20, 10 ** 6, *[1] * (steps == 3)):
                monkeypatch.setattr(kmeans, "chunk_rows", lambda x, width: rows)
                model = KMeans(K, init, max_iter=steps, tol=0).fit(x)
                assert (model.labels_ == labels).all() and model.n_iter_ <= steps
                assert abs(model.cluster_centers_ - centers).max() < 1e-12
                assert abs(model.inertia_ - inertia) < 1e-9 * inertia
            assert inertia <= before + 1e-9
            before = inertia


def test_kmeans_skipped_distances_cannot_matter(monkeypatch):
    # wrong if: after any centres move, near or far, the labels are not those of all distances
    x, r = torch.from_numpy(blobs(500, 4, 9)), np.random.default_rng(0)
    c, searched = x[:30].clone(), []
    monkeypatch.setattr(kmeans, "chunk_rows", lambda x, width: 8)
    assign = kmeans.NearestCenters(x, 30)
    search = assign.search
    assign.search = lambda i, c: (searched.append(len(x[i])), search(i, c))
    for step in range(40):
        moved = torch.arange(30) if step == 0 else torch.from_numpy(r.permutation(30)[:r.integers(0, 25)])
        c[moved] += float(10 ** r.uniform(-3, 0)) * normal(len(moved), 4, seed=step).double()
        labels = assign(c, moved)
        d2 = ((x[:, None] - c) ** 2).sum(2)
        assert (d2.gather(1, labels[:, None])[:, 0] <= d2.min(1)[0] + 1e-12).all()
    assert sum(searched) < 0.6 * 40 * 500            # and: it skips something


def test_kmeans_seeding_is_greedy_kmeans_plus_plus(monkeypatch):
    # wrong if: D² is not D², candidates are not compared, or restarts or chunks mix
    x = blobs(120, 3, 6)
    for K, restarts, rows in ((1, 2, 200), (2, 1, 200), (30, 4, 6), (9, 3, 1)):
        monkeypatch.setattr(kmeans, "chunk_rows", lambda x, width: rows)
        found = kmeans.seed_centers(torch.from_numpy(x), K, restarts, 5)
        assert found.shape == (restarts, K, 3) and gap(found, plain_seeding(x, K, restarts, 5)) == 0


def test_kmeans_keeps_the_best_restart_and_stops_as_promised():
    # wrong if: a worse restart wins, tol has another scale, progress tells something else
    x, told = blobs(300, 3, 9) + 0.01 * normal(300, 3).numpy(), []             # no two points alike
    centred = torch.from_numpy(x - x.mean(0))
    runs = [kmeans.lloyd(centred, c, 300, 0) for c in kmeans.seed_centers(centred, 9, 6, 3)]
    inertias = [float((centred - c[labels]).square().sum()) for c, labels, _ in runs]
    assert max(inertias) > min(inertias) * 1.001
    model = KMeans(9, n_init=6, tol=0, seed=3, progress=lambda *state: told.append(state)).fit(x)
    assert model.inertia_ == pytest.approx(min(inertias), rel=1e-9)
    assert model.n_iter_ == runs[int(np.argmin(inertias))][2]
    assert sorted({t[0] for t in told}) == list(range(6)) and told[-1][2] == 0 < told[0][2]
    init = x[np.random.default_rng(0).permutation(300)[:9]]
    steps = [init] + [c for _, c, _ in plain_lloyd(x, init, 12)]
    moves = [((b - a) ** 2).sum() / x.var(0).mean() for a, b in zip(steps, steps[1:])]
    for tol in (0.6, 0.15, 0.04):
        assert KMeans(9, init, tol=tol).fit(x).n_iter_ == 1 + next(i for i, m in enumerate(moves) if m <= tol)


def test_kmeans_corners():
    # wrong if: one cluster, as many as points, empty clusters, duplicates, other types are not handled
    x = np.random.default_rng(0).normal(size=(60, 5))
    x[:, 2] = 4                                # a constant column
    one, every = KMeans(1).fit(x), KMeans(60, n_init=1).fit(x)
    assert abs(one.cluster_centers_ - x.mean(0)).max() < 1e-12 and one.inertia_ == pytest.approx(
        ((x - x.mean(0)) ** 2).sum(), rel=1e-12)
    assert every.inertia_ < 1e-20 and sorted(every.labels_) == list(range(60))
    far = np.concatenate([x[:2], x[:1] + 1e3, x[:1] + 2e3, x[:1] + 3e3])       # three empty clusters at first
    first = KMeans(5, far, tol=0, max_iter=1).fit(x)       # they get the three points farthest from x₀ and x₁
    d2 = ((x[:, None] - x[:2]) ** 2).sum(2).min(1)
    assert gap(first.cluster_centers_[2:], x[np.argsort(-d2)[:3]]) < 1e-12
    model = KMeans(5, far, tol=0).fit(x)
    assert set(model.labels_) == set(range(5))
    assert (((x[:, None] - model.cluster_centers_) ** 2).sum(2).argmin(1) == model.labels_).all()
    assert model.inertia_ == pytest.approx(((x - model.cluster_centers_[model.labels_]) ** 2).sum(), rel=1e-9)
    two = np.repeat([[0.0, 1], [3, 4]], 10, 0)
    with pytest.warns(UserWarning, match="2 clusters have points, 4 were asked for: fewer distinct"):
        assert KMeans(4).fit(two).inertia_ == 0
    half = KMeans(3).fit(torch.from_numpy(x).half())
    assert torch.is_tensor(half.labels_) and half.cluster_centers_.dtype == torch.float32
    assert abs(half.inertia_ / KMeans(3).fit(x).inertia_ - 1) < 1e-2
    integers = np.random.default_rng(0).integers(0, 9, (50, 4))
    assert KMeans(4).fit(integers).inertia_ == KMeans(4).fit(integers.astype(np.float64)).inertia_
    a, b, c = (KMeans(6, seed=3).fit(v) for v in (x, x, x + 100))
    assert (a.labels_ == b.labels_).all() and (a.labels_ == c.labels_).all() and a.inertia_ == b.inertia_
    assert kmeans.as_points(x, "mps").device.type == "cpu"                     # MPS has no float64


def test_kmeans_far_from_the_origin(monkeypatch):
    # wrong if: float32 takes near points for one where ‖x‖ is large (landed: 91 clusters, inertia 7514), or
    # every float32 fit is done twice
    blob = np.repeat(np.repeat([-3000.0, 3000], 50)[:, None], 2, 1)
    blob[:, 0] += np.tile(5.0 * np.arange(50), 2)
    x = (np.repeat(blob, 20, 0) + 0.1 * np.random.default_rng(0).normal(size=(2000, 2))).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")         # the landed code warned of too few distinct points
        model = KMeans(100, n_init=2).fit(x)
    exact = ((x.astype(float) - x.reshape(100, 20, 2).astype(float).mean(1).repeat(20, 0)) ** 2).sum()
    assert model.inertia_ == pytest.approx(exact, rel=1e-9) and exact < 45     # each blob is a cluster
    wide = KMeans(100, n_init=2).fit(x.astype(float))
    assert (model.labels_ == wide.labels_).all()
    assert model.cluster_centers_.dtype == np.float32
    dtypes, inner = [], KMeans._fit
    monkeypatch.setattr(KMeans, "_fit", lambda self, x: (dtypes.append(x.dtype), inner(self, x))[1])
    KMeans(8, n_init=1).fit(blobs(300, 6, 5).astype(np.float32))
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kmeans_repeated_starts_on_repeated_points(dtype):
    # wrong if: two centres stay at one point while a cluster holds two (landed: inertia 314 and the like)
    for seed in range(25):
        r = np.random.default_rng(seed)
        points = r.normal(size=(30, 2 if seed % 2 else 6)) * (10 if seed % 3 else 1)
        x = r.permutation(np.repeat(points, r.integers(1, 9, 30), 0).astype(dtype))
        model = KMeans(30, x[r.integers(len(x), size=30)], tol=1e-4 if seed % 2 else 0).fit(x)
        assert model.inertia_ < 1e-9 and len(set(model.labels_)) == 30
    x, c = np.array([[0], [0], [30], [100], [102]], dtype), np.array([[20], [101], [20], [20]], dtype)
    labels = torch.tensor([0, 0, 0, 1, 1])     # the first empty cluster takes both points at 0
    assert kmeans.fill_empty(torch.from_numpy(x), torch.from_numpy(c), labels)
    assert labels.tolist() == [2, 2, 0, 3, 1]
    assert KMeans(4, c).fit(x).inertia_ == 0


@pytest.mark.parametrize("call, message", [
    (lambda x: KMeans(2).fit(np.where(np.arange(20)[:, None] == 7, np.nan, x)), "NaN or infinite.*row 7"),
    (lambda x: KMeans(21).fit(x), "20 points cannot make 21 clusters"),
    (lambda x: KMeans(2).fit(x[0]), r"shape \(3,\)"), (lambda x: KMeans(0), "n_clusters is 0"),
    (lambda x: KMeans(2).fit(x[:, :0]), r"shape \(20, 0\)"), (lambda x: KMeans(2, n_init=0), "n_init is 0"),
    (lambda x: KMeans(2, max_iter=0), "max_iter is 0"), (lambda x: KMeans(2, tol=math.nan), "tol is nan"),
    (lambda x: KMeans(2, init="best"), "k-means"),
    (lambda x: KMeans(2, init=x[:3]).fit(x), r"init has shape \(3, 3\); it must be \(2, 3\)"),
    (lambda x: KMeans(2, init=x[:2] * math.inf).fit(x), "init has NaN or infinite"),
    (lambda x: KMeans(2).fit(x * 1j), "complex128"), (lambda x: KMeans(2).fit(torch.tensor(x) * 1j), "real"),
    (lambda x: KMeans(2).fit(x.astype(str)), "not real numbers"),
    (lambda x: KMeans(2).fit(x * np.eye(20)[4][:, None] * 1e200), "row 4 is so large")])
def test_kmeans_errors(call, message):
    # wrong if: what the caller can mend is not said
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(20, 3)))


# §2.5, Emergent clusters


def test_kmeans_adjusted_rand_index_counts_pairs():
    # wrong if: the index is not (agreeing pairs − expected)/(most − expected), pair by pair
    r = np.random.default_rng(0)
    for n in (2, 3, 7, 12):
        for _ in range(10):
            a, b = r.integers(3, size=n), np.array(list("xyzw"))[r.integers(4, size=n)]
            same = [(a[i] == a[j], b[i] == b[j]) for i in range(n) for j in range(i)]
            both, one, two = sum(p and q for p, q in same), sum(p for p, _ in same), sum(q for _, q in same)
            chance = one * two / len(same)
            if (one + two) / 2 != chance:
                index = (both - chance) / ((one + two) / 2 - chance)
                assert kmeans.adjusted_rand_index(a, b) == pytest.approx(index, abs=1e-12)
            assert kmeans.adjusted_rand_index(b, a) == kmeans.adjusted_rand_index(a, b)
    assert kmeans.adjusted_rand_index([0, 0, 1, 2], [5, 5, 3, 3]) == pytest.approx(4 / 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")         # the landed code divided 0 by 0
        for trivial in ([7], [1, 1, 1], [1, 2, 3]):
            assert kmeans.adjusted_rand_index(trivial, trivial) == 1.0
    for a, b in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="the same, at least one"):
            kmeans.adjusted_rand_index(a, b)


def test_kmeans_separation_of_two_gaussians():
    # wrong if: distance or spread is not that along the line of the means
    shift, scale = torch.tensor([3.0, 4, 0]), torch.tensor([1.0, 2, 9])
    a, b = normal(200_000, 3), normal(200_000, 3, seed=1) * scale + shift
    distance, sd = kmeans.separation(a, b)
    line = shift / 5                           # variances along it: 1 and 0.6²·1 + 0.8²·4
    assert abs(distance - 5) < 0.03 and abs(sd - math.sqrt((1 + (line * scale).square().sum()) / 2)) < 0.01
    found = kmeans.separation(np.array([[0.0], [2]]), np.array([[5.0], [7]]))
    assert found == pytest.approx((5, math.sqrt(2)))
    assert kmeans.separation(a[:9], a[:9]) == (0, 0)


def test_kmeans_pairs_of_groups():
    # wrong if: a pair comes twice, is left out, or joins a group too small or without a label
    place, sizes = 3.0 ** np.arange(7), [5, 6, 4, 9, 5, 5, 2]                  # every difference is another
    labels = np.concatenate([np.repeat(np.arange(7), sizes), [-1] * 8])
    code = torch.from_numpy(np.append(place, 0.5))[labels][:, None] + 1e-3 * normal(len(labels), 1)
    large = place[[0, 1, 3, 4, 5]]
    every = sorted(abs(p - q) for p, q in itertools.combinations(large, 2))
    found = kmeans.pair_separations(code, labels, np.random.default_rng(0))
    assert found.shape == (10, 2) and gap(np.sort(found[:, 0]), every) < 0.01
    few = [kmeans.pair_separations(code, labels, np.random.default_rng(s), 4)[:, 0] for s in range(300)]
    assert all(len(set(f.round(1))) == 4 for f in few)
    times = np.histogram(np.concatenate(few), [0, *(np.array(every[1:]) + every[:-1]) / 2, 1e9])[0]
    assert times.sum() == 1200 and abs(times - 120).max() < 40                 # 120 ± 8.5 each: all alike
    with pytest.raises(ValueError, match="fewer than two groups of 5"):
        kmeans.pair_separations(code[:6], np.array([0, 0, 0, 0, 0, 1]), np.random.default_rng(0))


def test_kmeans_pairs_of_ten_thousand_groups_need_no_list():
    # wrong if: the 5·10⁷ pairs of the paper's K = 10,000 are listed (landed: gigabytes)
    labels, code = np.repeat(np.arange(10_000), 2), torch.arange(20_000.0)[:, None] // 2
    tracemalloc.start()
    found = kmeans.pair_separations(code, labels, np.random.default_rng(0), 300, least=2)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()
    assert found.shape == (300, 2) and 0 < found[:, 0].min() and found[:, 0].max() < 10_000
    assert abs(found[:, 0].mean() - 3333) < 500            # mean distance of two of 0 … 9999, ± 136


def test_kmeans_gaussian_control_has_the_same_moments():
    # wrong if: the control has another mean or covariance, or keeps the clusters
    code = normal(20_000, 3) @ normal(3, 3, seed=1).exp() + 2 + 9 * (torch.arange(20_000) % 2)[:, None]
    twin = kmeans.gaussian_like(code, 0)
    assert twin.dtype == torch.float32 and gap(twin.mean(0), code.mean(0)) < 0.05 * code.std()
    assert gap(torch.cov(twin.T), torch.cov(code.T)) < 0.05 * code.var()
    z = (twin - twin.mean(0)) / twin.std(0)
    assert gap(z.pow(4).mean(0), torch.tensor(3.0)) < 0.2                      # two clusters: far less
    assert gap(twin, kmeans.gaussian_like(code, 0)) == 0 < gap(twin, kmeans.gaussian_like(code, 1))


def test_kmeans_tsne_affinities_and_gradient():
    # wrong if: a point's neighbourhood has another perplexity, or the descent follows another gradient
    x, n = normal(14, 3).double(), 14
    d2 = (x[:, None] - x).square().sum(2)
    conditional = torch.zeros(n, n, dtype=torch.double)
    for i in range(n):
        others = torch.tensor([j for j in range(n) if j != i])
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            p = torch.softmax(-beta * d2[i, others], 0)
            low, high = (beta, high) if torch.special.entr(p).sum().exp() > 4 else (low, beta)
        conditional[i, others] = p
    p = kmeans.affinities(x, 4)
    assert gap(p, (conditional + conditional.T) / (2 * n)) < 1e-9 and abs(p.sum().item() - 1) < 1e-9
    y = normal(n, 2, seed=3).double().requires_grad_()
    q = 1 / (1 + (y[:, None] - y).square().sum(2)) * (1 - torch.eye(n))
    away = ~torch.eye(n, dtype=torch.bool)
    (p[away] * (p[away] / (q / q.sum())[away]).log()).sum().backward()
    assert gap(y.grad, kmeans.divergence_gradient(p, y.detach())) < 1e-6


def test_kmeans_tsne_keeps_neighbours():
    # wrong if: groups mix, neighbours on a curve are torn apart, or a rotation of x matters
    x = torch.cat([normal(20, 5, seed=k) + 20 * k for k in range(3)])
    y = kmeans.tsne(x, iterations=400)
    distance = torch.cdist(y, y).view(3, 20, 3, 20)
    within = max(distance[k, :, k].max() for k in range(3))
    assert min(distance[k, :, j].min() for k in range(3) for j in range(3) if j != k) > within
    turn = torch.linalg.qr(normal(5, 5, seed=9).double())[0]
    turned = kmeans.tsne(x.double() @ turn, iterations=20)             # later, rounding errors grow
    assert gap(turned, kmeans.tsne(x, iterations=20)) < 1e-3 * turned.abs().max()
    t = torch.linspace(0, 6, 80)
    curve = torch.stack([t.cos(), t.sin(), t, t * 0, t.sin() ** 2], 1)
    near = torch.cdist(*2 * [kmeans.tsne(curve, 10.0, 500)]).argsort(1)[:, 1:6]
    assert ((near - torch.arange(80)[:, None]).abs() <= 5).float().mean() > 0.95
    assert kmeans.tsne(torch.ones(5, 1)).isfinite().all() and kmeans.tsne(x[:2]).shape == (2, 2)


# The command line


def command(monkeypatch, capsys, *words):
    """(exit code, what the user sees) of `python kmeans.py …` in process; warnings are errors."""
    monkeypatch.setattr(sys, "argv", ["kmeans.py", *map(str, words)])
    try:
        kmeans.main()
        return 0, capsys.readouterr().out
    except UserError as error:
        return 2, f"{error}\n"
    except SystemExit as exit:
        return exit.code, capsys.readouterr().err


X = blobs(20, 3, 4).round(3)                   # the points of the table below


def npy(a=X, **header):
    """The bytes of a .npy; `header`: what it says (shape, descr, fortran_order), true or not."""
    file = io.BytesIO()
    if header:
        said = dict(descr="<f8", fortran_order=False, shape=X.shape)
        np.lib.format.write_array_header_1_0(file, {**said, **header})
        return file.getvalue() + a.tobytes()
    np.save(file, a, allow_pickle=True)
    return file.getvalue()


def npz(damage=lambda b: b, **members):
    """The bytes of a .npz; members: arrays, or bytes as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, v in members.items():
            archive.writestr(name + ".npy", v if isinstance(v, bytes) else npy(v))
    return damage(file.getvalue())


def flip(b):
    """One byte of the data changed."""
    i = b.index(X.tobytes()[:16])
    return b[:i + 40] + bytes([b[i + 40] ^ 1]) + b[i + 41:]


GOOD_FILES = [
    npy(), npy(np.asfortranarray(X)), npy(X.astype(">f8")), npz(phi=X.astype(">f4")), npy(X > 0.2),
    npy((X * 1000).astype(np.uint16)), npy((X * 1000).astype(">i8")), npy(X.astype(np.longdouble)),
    npy() + b"and more", npz(phi=X, paths=np.array(["a"] * 20), labels=np.arange(20) % 2),
    npz(phi=X, labels=np.where(np.arange(20) % 3, 1.5, np.nan)), npz(phi=X, labels=np.array(["", "é"] * 10)),
    npz(phi=X, key=np.array("{}"), other_phi=X[None])]
BAD_FILES = {                                        # what the line must say: files
    "not a whole": [
        b"", b"hello, world" * 99, npy()[:-8], npy()[:60], npz(phi=X)[:-30], npz(phi=npy()[:-8]),
        npy(shape=(-1, 3)), npy(shape=(-20, -3)), npz(phi=npy(shape=(-20, 3))), npy(shape=(10 ** 9, 10 ** 6)),
        npy(shape=(2 ** 40, 2 ** 40)), npy(shape=(10 ** 30, 3)), npz(phi=npy(shape=(10 ** 9, 10 ** 6))),
        npz(phi=npy(shape=(2 ** 40, 2 ** 40))), npy(descr="|O"), npy(np.array([{}, []], dtype=object))],
    "CRC": [npz(flip, phi=X)],
    "an array phi": [npz(x=X), npz()],
    "not a whole|NoneType|must|not real": [npz(phi=b"no array at all")],
    "allow_pickle=False": [
        npz(phi=np.array([[{}], [[]]], dtype=object)), npz(phi=X, labels=np.array([None] * 20))],
    "not real numbers": [
        npy(X * 1j), npy(X.astype(str)), npy(X.astype("datetime64[s]")), npy(np.zeros(4, "f4,i4"))],
    "NaN or infinite values, .*row 7": [npy(np.where(np.arange(20)[:, None] == 7, np.nan, X))],
    "NaN or infinite values, .*row 0": [npy(np.float32([[np.inf, 1], [2, 3], [4, 5]]))],
    "so large": [npy(X * 1e200)],
    r"x has shape \(": [npy(X[0]), npy(X[None]), npy(np.float64(3))],
    r"shape \(0, 3\)|not a whole": [npy(X[:0])],
    "2 points cannot make 3 clusters": [npy(X[:2])],
    "labels is .*one label a point": [
        npz(phi=X, labels=v) for v in (np.zeros((20, 1)), np.arange(19), np.zeros(20, complex))],
    "paths is .*one path a point": [npz(phi=X, paths=v) for v in (np.arange(20), np.array("a"))]}
FILES = [(v, None) for v in GOOD_FILES] + [(v, message) for message in BAD_FILES for v in BAD_FILES[message]]


@pytest.mark.filterwarnings("ignore:Exception ignored in")                     # numpy leaves a cut zip open
@pytest.mark.parametrize("data, message", FILES, ids=range(len(FILES)))
def test_kmeans_command_line_reads(data, message, tmp_path, monkeypatch, capsys):
    # wrong if: a file is taken for what it is not, or a bad one costs more than one line
    name, out = "x.npz" if data[:2] == b"PK" else "X.NPY", tmp_path / "clusters.npz"
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, text = command(monkeypatch, capsys, tmp_path / name, "--K", 3, "--n-init", 2, "--out", out)
    if message:
        assert code == 2 and text.count("\n") == 1 and name in text and not out.exists()
        assert re.search(message, text), text
    else:
        x = np.load(tmp_path / name)
        x = x["phi"] if name == "x.npz" else x
        with np.load(out) as saved:
            assert code == 0 and (saved["labels"] == KMeans(3, n_init=2).fit(x + np.float32(0)).labels_).all()


KMEANS_FLAGS = """
none.npy: .*No such file | none.npy
directory | .
--K.*at least 1 | x.npy --K 0
--K | x.npy --K -3 | x.npy --K 2.5 | x.npy --K
--clusters | x.npy --clusters 0
x.npy: 20 points cannot make 100 clusters | x.npy --K 100
--n-init.*at most 1000 | x.npy --n-init 1000000000
--n-init | x.npy --n-init 0
--max-iter | x.npy --max-iter 0 | x.npy --max-iter 1e3
--tol | x.npy --tol nan | x.npy --tol -1 | x.npy --tol inf
--seed | x.npy --seed -1 | x.npy --seed 99999999999999999999
--device .*: not available | x.npy --device meta | x.npy --device tpu | x.npy --device cuda:9
--device | x.npy --device=
--out.*must name a file | x.npy --out= | x.npy --out shut
--out.*no folder | x.npy --out none/c.npz
--out.*not writable | x.npy --out shut/c.npz
--out.*a .npz | x.npy --out x.npy --force | x.npy --out c.npy
there.npz exists: --force | x.npy --out there.npz
--out.*not the file of the points | phi.npz --out phi.npz --force | phi.npz --out link.npz --force
no file given |
unrecognized | x.npy y.npy | x.npy --clustres 3 | x.npy --forc
"""                                            # message | command line | command line …
KMEANS_FLAGS = [line.split(" |") for line in KMEANS_FLAGS.strip().split("\n")]
KMEANS_FLAGS = [(words, message) for message, *lines in KMEANS_FLAGS for words in lines]


@pytest.mark.parametrize("words, message", KMEANS_FLAGS)
def test_kmeans_command_line_refuses(words, message, tmp_path, monkeypatch, capsys):
    # wrong if: a flag is found wrong after the work, without its name, in more than a line, or a file is lost
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "phi.npz", phi=X)
    (tmp_path / "link.npz").symlink_to(tmp_path / "phi.npz")
    (tmp_path / "there.npz").write_bytes(b"dear")
    (tmp_path / "shut").mkdir()
    access = os.access                         # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "shut" not in str(path) and access(path, mode))
    monkeypatch.setattr(kmeans, "lloyd", lambda *_: pytest.fail("worked before the flags were checked"))
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    code, text = command(monkeypatch, capsys, *words.split())
    assert code == 2 and text.count("\n") == 1 and re.search(message, text), text
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_kmeans_command_line_writes_what_it_says(tmp_path, monkeypatch, capsys):
    # wrong if: clusters.npz or the printed numbers are not those of KMeans and of the known classes
    x, out = blobs(90, 6, 3).astype(np.float32), tmp_path / "clusters.npz"
    paths, labels = np.array([f"{i}.png" for i in range(90)]), np.arange(90) % 5 - 1.0
    labels[labels == 3] = np.nan               # like −1: unknown
    np.savez(tmp_path / "phi.npz", phi=x, paths=paths, labels=labels)
    out.write_bytes(b"old")
    words = f"{tmp_path}/phi.npz --K 5 --seed 4 --n-init 3 --max-iter 9 --tol 0.01 --out {out}".split()
    assert command(monkeypatch, capsys, *words)[0] == 2 and out.read_bytes() == b"old"
    code, text = command(monkeypatch, capsys, *words, "--force")
    model = KMeans(5, seed=4, n_init=3, max_iter=9, tol=0.01).fit(x)
    with np.load(out) as saved:
        assert sorted(saved) == ["centers", "inertia", "labels", "paths"] and (saved["paths"] == paths).all()
        assert (saved["labels"] == model.labels_).all() and gap(saved["centers"], model.cluster_centers_) == 0
        assert saved["inertia"] == model.inertia_
    sizes, known = np.bincount(model.labels_), labels >= 0
    index = kmeans.adjusted_rand_index(model.labels_[known], labels[known])
    for line in (f"90 points of 6 dimensions, 5 clusters of {sizes.min()} to {sizes.max()}",
                 f"inertia {model.inertia_:.6g}, {model.n_iter_} iterations",
                 f"against 3 classes: adjusted Rand index {index:.3f}", f"wrote {out}"):
        assert line in text.split("\n")
    np.save(tmp_path / "two.npy", np.repeat(X[:2], 5, 0))
    code, text = command(monkeypatch, capsys, tmp_path / "two.npy", "--K", 3, "--out", tmp_path / "two.npz")
    assert code == 0 and "warning: 2 clusters have points, 3 were asked for" in text and "classes" not in text


def test_kmeans_script_ends_with_one_line(tmp_path):
    # wrong if: run as a script it does not end through unet's `run`
    words = ["kmeans.py", tmp_path / "none.npy", "--out", tmp_path / "c.npz"]
    process = subprocess.run([sys.executable, *words],
                             capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 2 and process.stderr.startswith("kmeans.py: ") and process.stdout == ""
    assert process.stderr.count("\n") == 1 and "none.npy" in process.stderr


# sample.py


def generators(n, seed=0):
    """One generator a sample."""
    return [train.seeded("cpu", seed, i) for i in range(n)]


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


@pytest.fixture(scope="module")
def tiny():
    """A small network with random weights that has a φ worth matching."""
    torch.manual_seed(0)
    model = UNet(width=8, channels=3, levels=1).eval()
    train.initialise(model, torch.rand(16, 3, 16, 16) + 0.3 * normal(16, 3, 16, 16), [0.5] * 3)
    with torch.no_grad():                      # `initialise` starts from the mean colour: here x̂ sees y
        model.blocks["D1"][-1].weight.copy_(0.1 * normal(*model.blocks["D1"][-1].weight.shape, seed=1))
    return model


def test_sample_algorithm_1_moments():
    # if it failed, Algorithm 1's mean, noise levels or their order would be wrong
    model, sigmas = GaussianModel(), np.linspace(1, 0.03, 12).tolist()

    def target(sigma):                         # also how the model learns σ; tol switches matching off
        model.sigma = sigma
        return torch.zeros(1, 3)
    mean = torch.full((3,), 0.3)
    x, levels = sample.reconstruct(model, target, mean, sigmas, (3, 32, 32), generators(40), tol=1e9)
    v = sigmas[0] ** 2
    told = [*sigmas[:-1], sigmas[-2]]          # the last step has no matching: the model still believes σ_1
    for t, sigma in enumerate(told):
        s2 = sigmas[t + 1] ** 2 if t + 1 < len(sigmas) else 0
        before = v
        v = (model.lam / (model.lam + sigma ** 2)) ** 2 * v + s2
        if t < len(levels):                    # σ̂ = σ²/(λ + σ²) √v
            expected = sigma ** 2 / (model.lam + sigma ** 2) * before ** 0.5
            assert abs(levels[t]["sigma_after"].mean() / expected - 1) < 0.02
    assert [level["sigma"] for level in levels] == sigmas[:-1]
    assert abs(x.mean() - 0.3) < 5 * (v / x.numel()) ** 0.5
    assert abs(x.var() / v - 1) < 5 * (2 / x.numel()) ** 0.5


def test_sample_unconditional_moments():
    # if it failed, the sampler's step sizes, its noise or its end would be wrong
    model, mean = GaussianModel(), torch.full((3,), 0.3)
    model.sigma = None
    free = lambda most: sample.sample_unconditional(model, mean, (3, 64, 64), generators(8), 1.0, 0.02,
                                                    max_steps=most)
    v = 1.0                                    # v = λ + σ²: v ← (1 − h σ²/v)² v + γ², σ̂² = σ⁴/v
    for t in range(1, 31):
        sigma2, h = v - model.lam, 0.01 * t / (1 + 0.01 * (t - 1))
        v = (1 - h * sigma2 / v) ** 2 * v + ((1 - 0.05 * h) ** 2 - (1 - h) ** 2) * sigma2 ** 2 / v
        if t in (1, 5, 15, 30):
            y, steps = free(t)
            assert abs(((y - 0.3) ** 2).mean() / v - 1) < 0.03 and (steps == t).all()
    x, steps = free(2000)
    assert (steps < 2000).all() and abs(x.var() / model.lam - 1) < 0.1 and abs(x.mean() - 0.3) < 0.01
    assert sample.noise_level(model.score(x)).max() < 0.02          # ended: all of the score was added


def test_sample_guidance_step(tiny):
    # if it failed, Algorithm 2's gradient, step, stop or account would be wrong
    x, model = normal(5, 3, 16, 16).double(), copy.deepcopy(tiny).double().train()
    phi_c = model.encode(normal(1, 3, 16, 16, seed=1).double())[0].mean((2, 3)).detach()
    loss = lambda x: (model.encode(x)[0].mean((2, 3)) - phi_c).square().sum(1).detach()
    model.blocks["M"][0].weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    moved, level = sample.guidance_step(model, x, phi_c, tol=0, max_iters=1, memory=0)
    for i in range(2):                         # the step is L/‖∇L‖² ∇L: against central differences
        step, L = (moved - x)[i], loss(x[i:i + 1]).item()
        for where in [(0, 3, 5), (1, 8, 8), (2, 15, 0), (0, 0, 0)]:
            e = torch.zeros_like(x[:1])
            e[(0, *where)] = 1e-5
            gradient = (loss(x[i:i + 1] + e) - loss(x[i:i + 1] - e)).item() / 2e-5
            assert abs(gradient + step[where] * L / step.square().sum()) < 1e-6 * max(1, L)
    moved, level = sample.guidance_step(model, x, phi_c, tol=0.05, max_iters=300)
    assert level["converged"].all() and gap(level["first"], loss(x)) < 1e-12
    assert gap(level["last"], loss(moved)) < 1e-12 and (level["last"] <= 0.05 * level["first"]).all()
    for i in range(5):                         # each as if it were alone, and not one gradient more
        alone, s = sample.guidance_step(model, x[i:i + 1], phi_c, tol=0.05, max_iters=300)
        assert gap(alone, moved[i:i + 1]) < 1e-9 and s["gradients"][0] == level["gradients"][i]
        n = int(s["gradients"][0])
        assert not sample.guidance_step(model, x[i:i + 1], phi_c, 0.05, n - 1)[1]["converged"].item()
    assert model.training and before == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


def test_sample_memory():
    # if it failed, the memory would not solve a linear problem, be used where it misleads, or step too far
    class Linear:                              # φ(x) = B x
        def encode(self, y):
            return (y.flatten(1) @ B.T)[:, :, None, None], []
    B, x = normal(12, 48).double(), normal(4, 3, 4, 4, seed=1).double()
    near = x + 0.01 * normal(4, 3, 4, 4, seed=2).double()
    phi_c = near.flatten(1) @ B.T
    count = lambda m: sample.guidance_step(Linear(), x, phi_c, 1e-8, 500, m)[1]["gradients"].max()
    assert count(12) <= 25 < count(0)
    far = sample.guidance_step(Linear(), x, phi_c + 1000, 0, 1)[0] - x
    assert gap(far.square().mean((1, 2, 3)).sqrt(), torch.full((4,), 0.1)) < 1e-6
    past, r = sample.Memory(3), phi_c - 1                  # −ΔX c against numpy's ridge regression
    step = past.limit(0.01 * normal(4, 3, 4, 4, seed=3).double(), r, r.square().sum(1), torch.arange(4))
    later = r + step.flatten(1) @ B.T
    jump, rest, share = past.explain(later, torch.tensor([0, 0, 0, 1e9]))
    a = (later - r)[0] / (later - r)[0].norm()
    c = (a @ later[0]) / (1 + 0.01)
    assert gap(rest[0], later[0] - c * a) < 1e-9 and share == 0.3
    assert gap(jump[0], -c / (later - r)[0].norm() * step[0]) < 1e-9
    assert gap(rest[3], later[3]) == 0 and gap(jump[3], 0 * step[3]) == 0


def test_sample_does_not_depend_on_how_many(tiny):
    # if it failed, sample i of a seed would change with --samples or with the targets beside it
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    draw = lambda n, k=1: sample.around(tiny, dict(mean=[0.5] * 3), [(v[None], None) for v in x[:k]], n,
                                        [0.5, 0.3, 0.1], tol=0.05, max_iters=40)[0]
    many = draw(4)[0]
    assert all(torch.equal(draw(n)[0], many[:n]) for n in (1, 2, 3))
    assert gap(many[0], many[1]) > 1e-2
    assert torch.equal(draw(2, 2)[0], many[:2])
    guided = lambda n: [sample.target_phi(tiny, x[:1], generator=g) for g in generators(n, 9)]
    for targets in (lambda n: None), guided:
        free = lambda n: sample.sample_unconditional(tiny, torch.full((3,), 0.5), (3, 16, 16), generators(n),
                                                     max_steps=5, targets=targets(n))[0]
        assert torch.equal(free(3)[:2], free(2)) and torch.equal(free(3)[:1], free(1))


def test_sample_several_targets_keep_their_order():
    # if it failed, samples would stand around another target, or distances and correlations be wrong
    model, x = GaussianModel(), torch.stack([torch.full((3, 16, 16), v) for v in (0.1, 0.9)])
    model.lam, model.sigma, model.m = 1.0, 0.1, 0.5
    x += 0.1 * normal(*x.shape)
    samples, levels = sample.around(model, dict(mean=[0.5] * 3), [(v[None], None) for v in x], 3,
                                    [0.5, 0.2, 0.05], tol=1e-6)
    assert [level["sigma"] for level in levels] == [0.5, 0.2] and levels[0]["first"].shape == (6,)
    for own, other, y in zip(x, x.flip(0), samples):
        found, wrong = (sample.similarities(model, y, (t[None], None), 2.0) for t in (own, other))
        assert max(found["phi_distance"]) < 0.2 < 1 < min(wrong["phi_distance"])
        assert gap(found["phi_distance_relative"], torch.tensor(found["phi_distance"]) / 2) < 1e-6
        z = torch.stack([phi(model, v[None], 0, 1)[0] for v in (*y, own)])   # linear φ: the noise cancels
        assert gap(found["phi_distance"], (z[:3] - z[3]).norm(dim=1)) < 0.05
        correlation = np.corrcoef(torch.cat([y.flatten(1), own.flatten()[None]]))
        assert gap(found["correlation_with_target"], correlation[:3, 3]) < 1e-5
        assert gap(found["correlation_between_samples"], correlation[[0, 0, 1], [1, 2, 2]]) < 1e-5


def test_sample_target_phi_weights():
    # if it failed, --mix would swap or ignore its weights
    x = torch.stack([torch.full((3, 8, 8), v) for v in (0.0, 1.0, 0.5)])
    of = lambda w: sample.target_phi(GaussianModel(), x, w, 50, torch.Generator().manual_seed(0))(0.1)
    assert gap(of(torch.tensor([0.2, 0.7, 0.1])), torch.full((1, 3), 0.75)) < 0.01
    assert gap(of(None), torch.full((1, 3), 0.5)) < 0.01


class ToyDensity:
    """u given v ~ N(v, λ), φ = mean of v; w = 0 in every picture, so that y's third channel tells σ."""
    lam = 0.09

    def encode(self, y):
        return y[:, 1:2], []

    def denoise(self, y):
        u, v = y[:, :1], y[:, 1:2].mean((2, 3), keepdim=True)
        sigma2 = y[:, 2:].square().mean((2, 3), keepdim=True)
        return torch.cat([(self.lam * u + sigma2 * v) / (self.lam + sigma2), 0 * u, 0 * u], 1)


def test_sample_conditional_distance():
    # if it failed, Eq. 4 would not be the symmetrised KL divergence: here ‖v₁ − v₂‖²/λ, in closed form
    model, (x1, x2) = ToyDensity(), torch.zeros(2, 3, 48, 48)
    x2[1] = 0.7
    sigmas = np.geomspace(0.01, 20, 20)
    value, error, integrand, matched = sample.conditional_distance(
        model, x1, x2, sigmas, 8, 4, torch.Generator().manual_seed(0), 1e-10)
    f = 48 * 48 * 0.49
    exact = 2 * f * sigmas / (model.lam + sigmas ** 2) ** 2
    assert max(abs(integrand.numpy() / exact - 1)[sigmas < 0.5]) < 0.1
    assert 0.8 < matched.min() <= matched[-1] == 1
    assert abs(value * model.lam / f - 1) < 0.05 and 0 < error < 0.05 * value
    some = [sample.conditional_distance(model, x1, x2, [0.2, 0.4], 8, 300, torch.Generator().manual_seed(k),
                                        1e-10) for k in range(6)]
    # the error told is the spread of the value over seeds
    assert 0.5 < np.mean([s[1] for s in some]) / np.std([s[0] for s in some]) < 2.5


def test_sample_integrate():
    # if it failed, Eq. 4 would be overestimated where it grows as σ⁻³
    s = torch.linspace(math.log(0.2), 0, 5).double().exp()
    for p in (-3, -1, 0, 2):
        exact = -math.log(0.2) if p == -1 else (1 - 0.2 ** (p + 1)) / (p + 1)
        found = sample.integrate(torch.stack([s ** p, 2 * s ** p], 1), s)
        assert found.tolist() == pytest.approx([exact, 2 * exact])
    assert sample.integrate(torch.zeros(5, 1, dtype=torch.float64), s).item() == pytest.approx(0, abs=1e-200)


def test_sample_panel_geometry():
    # if it failed, samples would be missing, out of order, or the target not in the middle
    samples, target = torch.zeros(8, 3, 8, 8), torch.ones(1, 3, 8, 8)
    samples[:, 0] = torch.linspace(0, 1, 8).view(8, 1, 1)
    sheet = np.asarray(sample.panel(samples, target, side=32, gap=4))
    assert sheet.shape == (120, 120, 3) and (sheet[44:76, 44:76] == 255).all()
    assert (sheet[41, 41:79] == sheet[41, 41]).all() and (sheet[41, 41] != 255).any()         # the frame
    assert [sheet[4 + 40 * (i // 3), 4 + 40 * (i % 3), 0] for i in (0, 1, 2, 3, 5, 6, 7, 8)] == [
        round(255 * k / 7) for k in range(8)]
    assert sample.panel(samples[:5], None, 32).size == (3 * 40, 2 * 40)
    assert sample.panel(samples[[0] * 9], target, 32).size == (5 * 40,) * 2
    halves = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    middle = np.asarray(sample.panel(samples, halves, 32))[52:68, 44:76]       # two conditioners share it
    assert (middle[:, :16] == 0).all() and (middle[:, 16:] == 255).all()
    assert sample.panel(samples, target, 32, labels=["a"] * 8).height > 120


# Command line


def one_picture(path, size=16):
    """The picture in this file, (1, C, H, W); size None: as it is."""
    return train.to_batch(train.load_picture(path, size)[None], "cpu")


def checkpoint_for(tiny, folder, patches=False):
    """A checkpoint of the small network, and its data: twelve pictures of 20×20."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for i in range(12):
        x = np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8) // (1 + i % 3)
        Image.fromarray(x).save(data / f"{i:02d}.png")
    flags = dict(data=str(data), size=16, channels=3, patches=patches, val=0.4, subset=None, limit=None,
                 width=8, levels=1, sigma_max=1.0, batch=4, epochs=1.0, minutes=None, pictures=None,
                 precision="fp32", seed=0)
    saved = dict(format=unet.FORMAT, model=dict(width=8, channels=3, levels=1), weights=tiny.state_dict(),
                 size=16, sigma_max=1.0, mean=[0.5] * 3, flags=flags, step=3, elapsed=1.0,
                 fingerprint=train.load_pictures(str(data), 16, 3, patches).fingerprint,
                 training=dict(phi_distance=0.5))
    torch.save(saved, folder / "c.pt")
    return saved


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a checkpoint and the files that the command lines below name."""
    folder = tmp_path_factory.mktemp("sample")
    saved = checkpoint_for(tiny, folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 23, 3), np.uint8)).save(folder / "odd.png")
    a = np.full((16, 16, 3), 40, np.uint8)
    for name, picture in {"dark.png": a, "light.png": 255 - a, "gray.PNG": a[:, :, 0]}.items():
        Image.fromarray(picture).save(folder / name)
    Image.fromarray(a).convert("P").save(folder / "palette.gif")
    Image.new("RGBA", (30, 20), (10, 200, 30, 128)).save(folder / "alpha.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "odd.png").read_bytes()[:200])
    (folder / "bad.pt").write_bytes(b"x")
    for name in "exists.png", "j.json":
        (folder / name).write_bytes(b"mine")
    (folder / "sub").mkdir()
    paths = np.array([str(folder / "data" / f"{i:02d}.png") for i in range(4)])
    np.savez(folder / "k.npz", centers=np.zeros((2, 16)), labels=np.array([0, 1, 1, 0]), inertia=1.0,
             paths=paths)
    np.savez(folder / "gone.npz", labels=np.array([0]), paths=np.array(["/no/such.png"]))
    np.savez(folder / "pickle.npz", labels=np.array([0]), paths=np.array([None]))
    np.save(folder / "k.npy", np.zeros(3))
    for name, factor in ("nan.pt", math.nan), ("huge.pt", 1e30):
        torch.save({**saved, "weights": {k: v * factor for k, v in saved["weights"].items()}}, folder / name)
    return folder


def call(place, monkeypatch, words, fast="--steps 3 --samples 2 --match-iters 3", out="s.png"):
    """sample.main() in this folder; returns the record."""
    monkeypatch.chdir(place)
    words = f"sample.py c.pt {words} {fast} --device cpu --force --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    sample.main()
    return json.loads((place / out).with_suffix(".json").read_text())


SAMPLE_FLAGS = """
exists: --force | --out exists.png dark.png
j.json exists | --out j.png dark.png
there is no folder | --out none/x.png dark.png
must end in .png | --out sub dark.png | --out x.jpg dark.png | dark.png --out= | --out sub/ dark.png
is also to be read | --out dark.png dark.png --force
--save-each | --save-each dark.png dark.png | --save-each data/../exists.png/x dark.png
--save-each data: is not empty | --save-each data dark.png
none.png | none.png | --mix dark.png none.png | --denoise none.png
cannot be read | text.png | cut.png | sub | dark.png text.png | --denoise text.png
as many numbers | --mix dark.png light.png --weights 1
sum 0 | --mix dark.png light.png --weights 1 -1
--weights | --mix dark.png light.png --weights nan 1 | --mix dark.png light.png --weights a 1
--mix | --mix
or one of | dark.png --mix light.png | dark.png --unconditional 3
--weights has no meaning with targets | dark.png --weights 1
--samples has no meaning with --unconditional | --unconditional 2 --samples 3
--adaptive has no meaning | --unconditional 2 --adaptive
--steps has no meaning with --denoise | --denoise dark.png --steps 7
--sigma-max has no meaning | --denoise dark.png --sigma-max 0.5
--noise has no meaning | dark.png --noise 0.1 | --mix dark.png --noise 0.1 | --unconditional 2 --noise 0.1
--steps has no meaning with --adaptive | dark.png --adaptive --steps 9
--unconditional | --unconditional 0 | --unconditional x
--noise | --denoise dark.png --noise nan | --denoise dark.png --noise -1
none.npz | --cluster none.npz:0
must be FILE:NUMBER | --cluster k.npz | --cluster k.npz:x | --cluster k.npy:0 | --cluster pickle.npz:0
no such cluster | --cluster k.npz:2 | --cluster k.npz:-1
not among | --cluster gone.npz:0
must be below | dark.png --sigma-min 2
--sigma-max | dark.png --sigma-max nan
--sigma-min | dark.png --sigma-min 0
--samples | dark.png --samples 0 | dark.png --samples 1.5 | dark.png --samples 1000000000
--steps | dark.png --steps 1
--draws | dark.png --draws 0
--match-tol | dark.png --match-tol 0 | dark.png --match-tol nan
--match-iters | dark.png --match-iters 0
--seed | dark.png --seed -1
unrecognized | dark.png --stpes 3 | dark.png --schedule linear
not available | dark.png --device tpu | dark.png --device meta
bad.pt | bad.pt: dark.png
none.pt | none.pt: dark.png
nan.pt | nan.pt: dark.png
not finite | huge.pt: dark.png | huge.pt: --denoise dark.png
"""                                            # message | command line | command line …
SAMPLE_FLAGS = [line.split(" | ") for line in SAMPLE_FLAGS.strip().split("\n")]
SAMPLE_FLAGS = [(words, message) for message, *lines in SAMPLE_FLAGS for words in lines]


@pytest.mark.parametrize("words, message", SAMPLE_FLAGS)
def test_sample_bad_command_lines(place, monkeypatch, capsys, words, message):
    # if it failed, what a user can mend would be a traceback, or found out only after the work
    checkpoint, words = words.split(": ") if ".pt: " in words else ("c.pt", words)
    if message != "not finite":
        for name in "around", "sample_unconditional":
            monkeypatch.setattr(sample, name, lambda *a, **k: pytest.fail("worked before the check"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["sample.py", checkpoint, "--device", "cpu", *words.split()])
    with pytest.raises((UserError, SystemExit)) as end:
        sample.main()
    text = str(end.value) if isinstance(end.value, UserError) else capsys.readouterr().err
    assert message in text and text.rstrip("\n").count("\n") == 0
    assert (place / "exists.png").read_bytes() == b"mine" and not list(place.glob("*.tmp"))


@pytest.mark.parametrize("words, panels", [
    ("odd.png", 1), ("gray.PNG palette.gif alpha.png", 3), ("--mix dark.png", 1), ("--cluster k.npz:1", 1),
    ("", 4), ("--samples 2 dark.png", 1), ("dark.png --draws 2 --sigma-max 2", 1)])
def test_sample_odd_but_good(place, monkeypatch, capsys, words, panels):
    # if it failed, a picture or a mode that users have would not be accepted
    record = call(place, monkeypatch, words)
    assert len(record["panels"]) == panels and all(len(p["phi_distance"]) == 2 for p in record["panels"])
    out = capsys.readouterr().out
    assert "φ-distance" in out and ("warning: --sigma-max" in out) == ("--sigma-max 2" in words)


def test_sample_record(place, monkeypatch, capsys):
    # if it failed, numbers in the .json would not be those of the run
    words = f"{place}/dark.png light.png --sigma-min 0.1"
    record = call(place, monkeypatch, words + " --save-each each")
    assert "\ndark.png: φ-distance" in "\n" + capsys.readouterr().out      # the name without its folder
    assert record["sigmas"] == pytest.approx([1, 0.55, 0.1])
    assert [level["sigma"] for level in record["levels"]] == record["sigmas"][:-1]
    assert [p["target"] for p in record["panels"]] == [f"{place}/dark.png", "light.png"]
    for p in record["panels"]:
        assert p["phi_distance_relative"] == pytest.approx([d / 0.5 for d in p["phi_distance"]])
    assert set(record["levels"][0]) == {"first", "last", "gradients", "converged", "sigma", "sigma_before",
                                        "sigma_after"}
    model, saved = unet.load_checkpoint(place / "c.pt")
    assert record["checkpoint_sha256"] == saved["sha256"]
    x = [one_picture(place / f"{n}.png") for n in ("dark", "light")]
    samples = sample.around(model, saved, [(v, None) for v in x], 2, record["sigmas"], max_iters=3)[0]
    for j, i in (0, 0), (0, 1), (1, 0), (1, 1):
        kept = one_picture(place / "each" / f"{j:02d}_{i:03d}.png")
        assert gap(kept[0], samples[j][i].clamp(0, 1)) < 0.6 / 255
    first = (place / "s.png").read_bytes()
    call(place, monkeypatch, words)
    assert (place / "s.png").read_bytes() == first


def test_sample_mix_weights(place, monkeypatch):
    # if it failed, --weights would go to the wrong picture
    one, right, wrong = (call(place, monkeypatch, words)["panels"][0] for words in (
        "light.png", "--mix dark.png light.png --weights 0 2", "--mix dark.png light.png --weights 2 0"))
    assert right["weights"] == [0, 1] and "1.00 φ(light.png)" in right["target"]
    assert gap(one["phi_distance"], wrong["phi_distance"]) > 0
    x, seen = torch.cat([one_picture(place / f"{n}.png") for n in ("dark", "light")]), []
    monkeypatch.setattr(sample, "around",
                        lambda m, c, targets, *a, **k: (seen.extend(targets), ([x[:1]], []))[1])
    call(place, monkeypatch, "--mix dark.png light.png --weights 1 3")
    assert gap(seen[0][0], x) == 0 and gap(seen[0][1], torch.tensor([0.25, 0.75])) < 1e-6


def test_sample_free_and_adaptive(place, monkeypatch):
    # if it failed, samples without a schedule would not be drawn, or their steps not be told
    monkeypatch.setattr(sample, "sample_unconditional",
                        lambda *a, f=sample.sample_unconditional, **k: f(*a, **k, max_steps=3))
    record = call(place, monkeypatch, "--unconditional 3 --sigma-min 0.5", "")
    assert len(record["steps"][0]) == 3 and record["panels"][0]["target"] is None
    record = call(place, monkeypatch, "dark.png light.png --adaptive", "--samples 2 --match-iters 2")
    assert [len(s) for s in record["steps"]] == [2, 2]


def test_sample_denoise_record(place, monkeypatch, capsys):
    # if it failed, the PSNR or the noise level told to the user would be another
    record = call(place, monkeypatch, "--denoise odd.png --noise 0.1 --save-each d", "")
    assert record["psnr_noisy"] == pytest.approx(20, abs=0.5) and "warning" not in capsys.readouterr().out
    model, x = unet.load_checkpoint(place / "c.pt")[0], one_picture(place / "odd.png", None)
    y = x + 0.1 * torch.randn(x.shape, generator=train.seeded("cpu", 0))
    x_hat = model.denoise(y).detach()
    assert record["psnr_denoised"] == pytest.approx(-10 * math.log10((x_hat - x).square().mean()), abs=1e-3)
    assert record["noise_estimated"] == pytest.approx((x_hat - y).square().mean().sqrt().item(), abs=1e-5)
    assert {p.name for p in (place / "d").iterdir()} == {"clean.png", "noisy.png", "denoised.png"}
    assert Image.open(place / "s.png").width >= 3 * 23 * 16
    monkeypatch.setattr(UNet, "denoise", lambda self, y: y + 0.001)
    call(place, monkeypatch, "--denoise odd.png", "")
    assert "hardly any noise" in capsys.readouterr().out


def test_sample_held_out_and_patches(tiny, tmp_path, monkeypatch, capsys):
    # if it failed, targets would be training pictures, or be shrunk where training cut tiles
    saved = checkpoint_for(tiny, tmp_path, patches=True)
    record = call(tmp_path, monkeypatch, "")
    pictures, rows, held = train.training_data(saved["flags"])
    names = [p["target"] for p in record["panels"]]
    assert len(set(names)) == 4 and set(names) <= {pictures.paths[i] for i in held}
    seen = []
    monkeypatch.setattr(sample, "around", lambda m, c, targets, n, *a, **k: (
        seen.extend(targets), ([x.expand(n, -1, -1, -1) for x, _ in targets], []))[1])
    call(tmp_path, monkeypatch, "data/03.png")
    assert "20×20 pixels; the target is its central 16×16 tile" in capsys.readouterr().out
    x = np.asarray(Image.open(tmp_path / "data" / "03.png"))
    assert gap(seen[0][0][0].permute(1, 2, 0) * 255, x[2:18, 2:18].astype(float)) < 1e-3
    member = pictures.paths[int(rows[0])]
    np.savez(tmp_path / "k.npz", labels=np.array([3]), paths=np.array([member]))
    call(tmp_path, monkeypatch, "--cluster k.npz:3")             # a tile, by its name
    assert gap(seen[1][0][0].permute(1, 2, 0) * 255, pictures.x[rows[0]].astype(float)) < 1e-3
    Image.fromarray(x[::-1]).save(tmp_path / "data" / "new.png")         # no longer its own data
    record = call(tmp_path, monkeypatch, "")
    assert all(p["target"].startswith("built-in") for p in record["panels"]) and len(record["panels"]) == 4


# analyze.py


def study_of(out, codes=None, n=8, labels=None, nulls=(), model=None, x=None, **options):
    """A Study of n random 8×8 pictures, φ `codes` ({σ: (n, d)} or (n, d)), whose M counts as in use."""
    codes = codes if isinstance(codes, dict) else {} if codes is None else {0.3: codes}
    n = len(next(iter(codes.values()), np.zeros(n)))
    x = np.random.default_rng(5).integers(0, 256, (n, 8, 8, 1), np.uint8) if x is None else x
    checkpoint = dict(size=8, sigma_max=1.0, mean=[0.5], model=dict(width=2, channels=1, levels=1),
                      flags=dict(patches=False))
    study = analyze.Study(model, checkpoint, x, labels, codes, untrained_phi=nulls, out=str(out), **options)
    study.alive = dict(why="", untrained=[])
    return study


def verdicts(numbers):
    """The verdicts of an analysis, a letter each: h(olds), f(ails), n(ot comparable)."""
    return "".join(c["verdict"][0] for c in numbers["claims"])


def random_codes(n=120, d=12, seeds=(1, 2, 3)):
    """Three {σ: φ} without any structure."""
    return [{s: normal(n, d, seed=100 * k + round(10 * s)).abs() for s in (0.3, 0.1)} for k in seeds]


@pytest.fixture
def quick(monkeypatch):
    """A few gradients and steps where Algorithms 1, 2 and Eq. 4 would make hundreds."""
    for name, limit in (("guidance_step", dict(max_iters=3)), ("around", dict(max_iters=3)),
                        ("sample_unconditional", dict(max_steps=5))):
        monkeypatch.setattr(analyze, name, functools.partial(getattr(analyze, name), **limit))
    monkeypatch.setattr(analyze, "tsne", lambda x: x[:, :2])
    real = analyze.conditional_distance
    monkeypatch.setattr(analyze, "conditional_distance", lambda *words, max_iters: real(*words, max_iters=3))


# Measures and rules


def test_analyze_measures_by_hand():
    """PR, kurtosis, Otsu's threshold, rank correlation, standard errors, or pixels less colour be wrong."""
    v = torch.tensor([[0, 3.0, 0, 0], [2, 2, 2, 2], [1, 3, 0, 0]])
    assert gap(analyze.participation_ratio(v), [1 / 4, 1, 16 / 40]) < 1e-6
    assert analyze.participation_ratio(torch.zeros(3)).isnan()
    v = torch.tensor([0.0, 0, 0, 0, 5])                                # mean 1, second moment 4, fourth 52
    assert abs(analyze.kurtosis(v).item() - 52 / 16) < 1e-6
    assert analyze.otsu(np.array([0.9, 0.1, 0.2, 0.8])) == 0.5
    assert analyze.ranks(np.array([5, 1, 5, 7])).tolist() == [2.5, 1, 2.5, 4]
    assert abs(analyze.rank_correlation(np.array([1.0, 2, 3, 4]), np.array([1, 10, 5, 100.0])) - 0.8) < 1e-9
    assert analyze.mean_se([1, 2, 3]) == (2, 1 / math.sqrt(3)) and analyze.beyond((1, math.nan)) is None
    assert analyze.beyond((-0.3, 0.1), -1) and not analyze.beyond((0.15, 0.1))
    noisy = np.arange(50.0) + 20 * normal(50).numpy()
    rho, sd, low, high = analyze.bootstrap(np.arange(50.0), noisy, np.random.default_rng(0))
    assert 0.3 < low < rho < high and 0.02 < sd < 0.3
    x = torch.rand(2, 3, 4, 4) + torch.tensor([0.0, 5, 9]).view(3, 1, 1)
    flat = analyze.less_colour(x).view(2, 3, 16)                       # of each channel, not of all
    assert gap(flat.mean(2), 0) < 1e-6 and gap(flat.flatten(1).norm(dim=1), 1) < 1e-5


def least_end(low, high, x, d):
    """The least value at the last x of a convex f with low − d ≤ f ≤ high + d; inf if there is none."""
    low, high, end = low - d, high + d, low[-1] - d
    for i, j in itertools.combinations(range(len(x)), 2):
        line = low[j] + (low[j] - high[i]) / (x[j] - x[i]) * (x[j:] - x[j])
        end = max(end, line[-1])
        if (line > high[j:] + 1e-12).any():
            return math.inf
    return end if end <= high[-1] + 1e-12 and (low <= high + 1e-12).all() else math.inf


def dip_by_definition(v):
    """The least d such that a unimodal distribution (convex, then concave) lies within d of that of v."""
    x, n = np.sort(v), len(v)
    at, before = np.arange(1, n + 1) / n, np.arange(n) / n

    def possible(d):
        for m in range(n):         # the mode: what ends below it must not end above what begins there
            left = least_end(np.append(at[:m], before[m]), np.append(before[:m], before[m]), x[:m + 1], d)
            right = least_end(-np.append(before[m + 1:][::-1], at[m]), -np.append(at[m + 1:][::-1], at[m]),
                              -x[m:][::-1], d)
            if left <= -right + 1e-12:
                return True
        return False

    a, b = 0.0, 0.5
    for _ in range(30):
        a, b = (a, (a + b) / 2) if possible((a + b) / 2) else ((a + b) / 2, b)
    return b


def test_analyze_dip():
    """The dip would not be the distance to the nearest unimodal distribution, or its test not tell."""
    r = np.random.default_rng(0)
    for k in range(6):
        v = np.concatenate([r.normal(size=5), r.normal(5 * (k % 2), 1, size=3 + k // 2)])
        assert abs(analyze.dip(v) - dip_by_definition(v)) < 1e-6
    assert abs(analyze.dip(np.arange(10.0)) - 0.05) < 1e-9                      # uniform: 1/(2n)
    null = np.quantile([analyze.dip(r.random(200)) for _ in range(200)], 0.95)
    assert analyze.dip(np.concatenate([r.normal(size=100), r.normal(4, 1, 100)])) > null
    assert all(analyze.dip(r.gamma(0.3, size=200)) < null for _ in range(10))
    assert all(analyze.dip(r.normal(size=200)) < null for _ in range(10))


NULL = [0, 0.1]


@pytest.mark.parametrize("verdict, value, error, nulls, options", [
    ("holds", 1, 0.1, [NULL], {}), ("holds", 1, 0.1, [], {}), ("holds", 1, 0.1, [[math.nan, 0.1]], {}),
    ("fails", -1, 0.1, [NULL], {}), ("fails", 1, 0.1, [NULL], dict(sign=-1)),          # the wrong direction
    ("holds", -1, 0.1, [NULL], dict(sign=-1)), ("fails", 1, 0.1, [NULL], dict(own=False)),
    ("not comparable", 1, 0.1, [NULL], dict(own=None)), ("not comparable", math.nan, 0.1, [[0.0]], {}),
    ("not comparable", 1, math.nan, [[0.0]], {}), ("holds", 1, 0.1, [NULL], dict(effect=0.9)),
    ("fails", 1, 0.1, [NULL], dict(effect=1.1)), ("fails", 1, 0.6, [NULL], {}),        # within two errors,
    ("fails", 1, 0.1, [[0, 1.2]], {}), ("fails", 1, 0.1, [[0, 0.9]], {}),              # or the null's spread
    ("fails", 1, 0.1, [[0.0] * 20 + [1.01]], {}),          # one replicate is ahead
    ("fails", 1, 0.1, [NULL, [2, 2.1]], {}),               # every null counts
    ("holds", 0.2, 0.01, [[0.5, 0.51]], dict(sign=0)), ("fails", 0.2, 0.01, [[0.2, 0.21]], dict(sign=0))])
def test_analyze_verdicts(tmp_path, verdict, value, error, nulls, options):
    """A claim would hold that nothing supports, or not hold that everything does."""
    study, here, nulls = study_of(tmp_path, normal(8, 4).abs()), (value, error), dict(zip("ab", nulls))
    claim = study.claim("text", "Fig. 0", "yes", here, "pictures", nulls, **options)
    assert claim["verdict"] == verdict and set(claim["nulls"]) == set(nulls)
    study.alive = dict(why="use 0.01 dB at σ 0.5")
    dead = study.claim("text", "Fig. 0", "yes", here, "pictures", nulls, **options)
    assert dead["verdict"] == "not comparable" and "M is not in use" in dead["rule"]
    assert study.claim("text", "", "", here, "", nulls, on_phi=False, **options)["verdict"] == verdict


@pytest.mark.parametrize("use, cosine, silent, why", [
    (0.2, 0.9, 0, ""), (0.1, 0.98, 1, ""), (0.09, 0.9, 0, "use"), (math.nan, 0.9, 0, "use"),
    (0.2, 0.981, 0, "cosine"), (0.2, math.nan, 0, "cosine"), (0.2, 0.9, 2, "silent")])
def test_analyze_limits_of_a_living_phi(tmp_path, monkeypatch, use, cosine, silent, why):
    """A dead φ would be judged, or a living one not."""
    study = study_of(tmp_path, normal(30, 12).abs(), labels=np.arange(30) % 2)
    del study.alive
    found = dict(use={0.5: use}, cosine=cosine, silent=silent)
    monkeypatch.setattr(analyze, "aliveness", lambda model, x: found)
    assert (why in study.alive["why"]) and bool(study.alive["why"]) == bool(why)
    assert ("NOT alive" in analyze.alive_line(study.alive)) == bool(why)
    assert 0 < study.alive["agreement"] < 1


def test_analyze_nulls(tmp_path):
    """Shuffled φ would keep joint structure or change marginals; the Gaussian have another covariance."""
    code = normal(2000, 1).abs() * (1 + normal(2000, 3).abs())         # all channels together large or small
    study = study_of(tmp_path, {0.3: code, 0.1: 2 * code})
    shuffled, gaussian = (list(study.replicates(name)) for name in ("shuffled", "Gaussian"))
    assert len(shuffled) == 3 and len(gaussian) == 10
    for replicate in shuffled:
        assert gap(replicate[0.3].sort(0).values, code.sort(0).values) == 0
        assert abs(torch.corrcoef(replicate[0.3].T)[0, 1]) < 0.1 < torch.corrcoef(code.T)[0, 1]
        assert gap(replicate[0.1], 2 * replicate[0.3]) < 1e-6          # alike at all σ
    assert gap(shuffled[0][0.3], shuffled[1][0.3]) > 0.1
    for replicate in gaussian[:2]:
        assert gap(torch.cov(replicate[0.3].T), torch.cov(code.T)) < 0.15 * code.var()


# Analyses: planted φ, numbers and verdicts known


def test_analyze_sparsity_of_a_hand_set_network(tmp_path):
    """PR would be of the wrong side of a block, or the change have the wrong sign."""
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


class Powers:
    """A network whose ā_M is (1, own · mean y, 0.3 mean y²): of y = x + σz, mean y² is σ² + mean x²."""

    def __init__(self, own=30):
        self.own = own

    def activations(self, y):
        power, mean = y.square().mean((1, 2, 3)), y.mean((1, 2, 3))
        M, other = [torch.ones_like(power), self.own * mean, 0.3 * power], [1 + power, power ** 4]
        return {b: 2 * (torch.stack(v, 1),) for b, v in (("E1", other), ("M", M), ("D1", [power]))}


def test_analyze_stability(tmp_path):
    """M's lead would have the wrong sign, a constant count as stable, or σ beyond training be used."""
    black, gray = np.zeros((40, 32, 32, 1), np.uint8), np.linspace(0, 120, 40).astype(np.uint8)
    gray = np.broadcast_to(gray[:, None, None, None], black.shape)
    of = lambda x, **own: study_of(tmp_path, normal(40, 3).abs(), x=x, draws=10, model=Powers(**own))
    out = analyze.stability(of(black, own=0))  # black pictures: ā_M is (1, 0, 0.3 σ²), the same for all
    cosine = [(1 + 0.09 * 0.25 * s * s) / math.sqrt((1 + 0.09 / 16) * (1 + 0.09 * s ** 4))
              for s in out["sigma_2"]]
    assert gap(out["mean"]["M"], cosine) < 0.005 and max(out["sigma_2"]) == 1 and min(out["sigma_2"]) == 0
    assert out["next_best"] == "E1" and out["lead"][0] > 0.01 and "D1" not in out["mean"]
    assert abs(out["apart"][0]) < 0.01 and verdicts(out) == "ff"       # stable, but a constant
    study = of(gray)
    out = analyze.stability(study)
    assert out["apart"][0] > 0.02 and verdicts(out)[0] == "h"
    study.untrained, study.averages = [0], study.averages + study.averages[:1] * 3
    assert verdicts(analyze.stability(study))[0] == "f"                # the untrained network is as stable
    study = of(black)
    study.averages[0][0.0]["M"][1].mul_(0.01)
    assert verdicts(analyze.stability(study))[1] == "h"                # φ collapses to zero


def test_analyze_selectivity(tmp_path):
    """Pictures that do not excite a channel would be shown; threshold or direction of PR be wrong."""
    code = torch.zeros(20, 5)
    code[3, 0], code[[4, 5], 1] = 9, torch.tensor([1.0, 2])        # PR 1/20, 9/(20·5); channel 2 is silent
    code[:, 3], code[:, 4] = 1, 2 - torch.arange(20) / 100
    out = analyze.selectivity(study_of(tmp_path, code))
    assert gap(out["pr"][[0, 1, 3]], [1 / 20, 9 / 100, 1]) < 1e-6
    assert [out[k] for k in ("silent", "specialised", "common")] == [1, 2, 2]
    assert out["shown"][:2] == [0, 1] and set(out["shown"][2:]) == {3, 4}
    assert [out["top"][c].tolist() for c in (0, 1, 4)] == [[3], [5, 4], list(range(9))]    # no ties at zero
    assert out["excited"] == {0: 1, 1: 2, 3: 20, 4: 20}
    with pytest.raises(analyze.Skip):
        analyze.selectivity(study_of(tmp_path, torch.ones(20, 5)))


@pytest.mark.parametrize("two, verdict", [(True, "h"), (False, "f")])
def test_analyze_bimodality(tmp_path, two, verdict):
    """One broad group of channels would count as two, or two as one."""
    r = np.random.default_rng(1)
    pr = np.append(r.normal(0.2, 0.03, 60), r.normal(0.7, 0.03, 60)) if two else r.uniform(0.1, 0.9, 120)
    code = torch.from_numpy((np.arange(400)[:, None] < 400 * pr).astype(np.float32))   # PR of a coin: its p
    study = study_of(tmp_path, code + 1e-3 * normal(400, 120).abs(), nulls=random_codes(400, 120))
    assert verdicts(analyze.selectivity(study)) == verdict


def test_analyze_attributes(tmp_path):
    """A picture would be explained by channels that it excites less, or by pictures without them."""
    code = 0.02 * normal(30, 8).abs()
    code[:, 6:] = 1
    for c in range(6):
        code[[c, c + 10, c + 20], c] = torch.tensor([3.0, 2, 1]) * 10 ** (c % 2)   # scales differ tenfold
    out = analyze.attributes(study_of(tmp_path, code))
    for picture in out["pictures"]:
        response = (code / code.square().mean(0).sqrt())[int(picture["name"].split()[1]), :6]
        c = picture["channels"][0]
        assert c == int(response.argmax()) and len(picture["channels"]) == 3
        assert picture["response"][0] == pytest.approx(float(response.max()))
        assert picture["top"][0][:3].tolist() == [c, c + 10, c + 20]


def test_analyze_class_agreement():
    """Agreement would be counted against the wrong class, or chance include pictures without one."""
    labels = np.repeat([0, 1, -1], 20)
    code = torch.eye(3)[labels] + 0.01 * normal(60, 3).abs()
    same, chance = analyze.class_agreement(code, labels, 10)
    assert (same == 1).all() and len(same) == 40 and chance == pytest.approx(19 / 39)
    other = torch.eye(3)[np.arange(60) % 2]                            # φ knows nothing of the classes
    assert abs(analyze.class_agreement(other + 0.01 * normal(60, 3).abs(), labels)[0].mean() - chance) < 0.15
    assert math.isnan(analyze.class_agreement(code, np.zeros(60, int))[1])
    near = analyze.nearest(torch.tensor([[1.0, 0], [10, 1], [0, 1], [1, 5]]), [0, 2], 2)
    assert near.tolist() == [[1, 3], [3, 1]]                           # by angle, not by length


def groups_of_three(n=120, d=12):
    """φ on a union of three subspaces of two dimensions each, and the class of each row."""
    labels = np.arange(n) % 3
    code = torch.zeros(n, d)
    for c in range(3):
        code[labels == c, 2 * c:2 * c + 2] = 0.5 + normal((labels == c).sum(), 2, seed=c).abs()
    return code + 0.01 * normal(n, d, seed=9).abs(), labels


def test_analyze_neighbours(tmp_path):
    """The lead of φ over pixels, or over nulls, would have the wrong sign; subspaces be found in anything."""
    code, labels = groups_of_three()
    out = analyze.neighbours(study_of(tmp_path, code, labels=labels, nulls=random_codes()))
    assert out["agreement"]["φ"][0] == 1 and out["chance"] == pytest.approx(39 / 119)
    for space in "pixels", "pixels less their mean colour":
        assert abs(out["agreement"][space][0] - 1 / 3) < 0.12
    assert out["subspace_gap"].mean() > 0.8 and verdicts(out) == "hhh"
    same = analyze.neighbours(study_of(tmp_path, code, labels=labels, nulls=[{0.3: code}] * 3))
    assert verdicts(same) == "fff"                                     # the untrained network does as well
    bare = analyze.neighbours(study_of(tmp_path, code, nulls=random_codes()))
    assert verdicts(bare) == "nnh" and "no class labels" in bare["claims"][0]["rule"]
    assert {p.stem for p in tmp_path.glob("*.png")} == {"neighbours", "subspaces"}


def test_analyze_clusters(tmp_path, quick):
    """Clusters would be judged by the wrong ratio, or a start from classes by the classes."""
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
    """A property would have the wrong sign, tuning be inverted, or kurtosis be of the same half."""
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


@pytest.mark.parametrize("shape", ["gamma", "normal"])
def test_analyze_tails_of_channels_that_are_alike(tmp_path, monkeypatch, shape):
    """"Specialised channels have heavier tails" would hold for channels that differ by chance alone."""
    r = np.random.default_rng(2)
    code = r.gamma(0.4, size=(200, 40)) if shape == "gamma" else abs(r.normal(size=(200, 40)))
    code = torch.from_numpy(code).float()
    monkeypatch.setattr(analyze, "map_statistics", lambda *_: (np.zeros(40), np.zeros(40)))
    monkeypatch.setattr(analyze, "tuning", lambda *_: np.zeros((40, 8, 8)))
    out = analyze.channels(study_of(tmp_path, code))
    assert verdicts(out)[:2] == "ff" and abs(out["rank_correlation"]["kurtosis"][0]) < 0.45
    pr, kurtosis = analyze.participation_ratio(code, 0).numpy(), analyze.kurtosis(code).numpy()
    assert analyze.rank_correlation(pr, kurtosis) < -0.3               # of the same pictures it would


def test_analyze_tuning_after_the_gray_field(monkeypatch, tmp_path):
    """A channel that answers to gray as to any grating would count as broadly tuned."""
    def response(model, x, sigma, draws, generator):
        contrast = x.flatten(1).std(1)
        return torch.stack([5 + 0 * contrast, 5 + contrast], 1)
    monkeypatch.setattr(analyze, "phi", response)
    found = analyze.tuning(study_of(tmp_path, normal(8, 2).abs()), types.SimpleNamespace(channels=1))
    assert found.shape == (2, 8, 8) and abs(found[0]).max() < 1e-6 and found[1].min() > 0.2
    bank = analyze.gratings(16, 3, [2, 3], [0, math.pi / 2], phases=2)
    assert bank.shape == (2, 2, 2, 3, 16, 16) and 0 <= bank.min() and bank.max() <= 1
    for (f, cycles), (orientation, turned) in itertools.product(enumerate((2, 3)), enumerate((False, True))):
        spectrum = torch.fft.fft2(bank[f, orientation, 0, 0] - 0.5).abs()[:9, :9]
        assert divmod(int(spectrum.argmax()), 9) == ((cycles, 0) if turned else (0, cycles))


@pytest.mark.parametrize("law, expected", [
    (lambda d: 3 * d, "hh"), (lambda d: 1 / d, "ff"), (lambda d: 3 * d ** 4, "hf")])
def test_analyze_embedding(tmp_path, monkeypatch, law, expected):
    """The rank correlation, or B/A, would be of other pairs, inverted, or of φ₁ + φ₂."""
    code = normal(60, 3).abs() * torch.linspace(0.2, 3, 60)[:, None]
    study = study_of(tmp_path, code, nulls=random_codes(60, 3), pairs=30)
    row = {study.pictures([i]).numpy().tobytes(): i for i in range(60)}

    def distance(model, x1, x2, sigmas, draws, phi_draws, generator, max_iters):
        assert draws >= 8 and min(sigmas) == pytest.approx(0.2) and max(sigmas) == pytest.approx(1)
        i, j = (row[x[None].numpy().tobytes()] for x in (x1, x2))
        d2 = law(float((code[i] - code[j]).square().sum()))
        return d2, 0.1 * d2, torch.ones(5), torch.ones(5)
    monkeypatch.setattr(analyze, "conditional_distance", distance)
    out = analyze.embedding(study)
    assert verdicts(out) == expected and len(out["kl"]) == 30
    assert out["interval"][0] <= out["rank_correlation"] <= out["interval"][1]
    assert (out["B_over_A"] < 1.001) == (expected == "hh") and out["percentiles"] <= out["B_over_A"] + 1e-9


@pytest.mark.parametrize("share, step, expected", [
    (1.0, 1.0, "nh"), (1.03, 1.5, "hh"), (1.2, 1.5, "fh"), (0.8, 1.5, "fh"), (1.03, 1.5, "hf")])
def test_analyze_matching(tmp_path, monkeypatch, share, step, expected):
    """The ratio would be inverted or one-sided; samples be compared with other targets than their own."""
    before, level = np.full((6, 12), 0.5), torch.full((12,), 0.5)
    monkeypatch.setattr(analyze, "match_noisy", lambda study, x, sigmas: np.array(
        [before, share * before, step * before])[:, :len(sigmas)])

    def algorithm_1(study, model, x, *_):
        told = not isinstance(model, analyze.Borrowed) and expected[1] == "h"
        noise = [normal(1, *v.shape, seed=k) for k, v in enumerate(x)]
        return [v[None] + 0.3 * z if told else z for v, z in zip(x, noise)], [
            dict(sigma=0.5, sigma_before=level, sigma_after=level)]
    monkeypatch.setattr(analyze, "algorithm_1", algorithm_1)
    out = analyze.matching(study_of(tmp_path, normal(12, 4).abs(), untrained=[UNet(2, 1, 1)] * 3))
    assert verdicts(out) == expected
    if expected[1] == "h":
        assert out["layout"].mean() > 0.4 and abs(np.mean(out["layout_untrained"])) < 0.2


@pytest.mark.parametrize("held_out, verdict", [(0.0, "h"), (0.3, "f"), (-0.3, "f"), (0.06, "h"), (None, "n")])
def test_analyze_denoising(tmp_path, monkeypatch, held_out, verdict):
    """Training pictures would stand for held-out ones, or a large error for agreement."""
    noise = iter(np.random.default_rng(0).normal(0, 0.01, 100))

    def evaluate(model, x, micro_batch, sigma_max):
        return {s: 20 + s + next(noise) + (held_out or 0) * (x.mean().item() > 0.5) for s in (0.1, 0.5)}
    monkeypatch.setattr(analyze, "evaluate", evaluate)
    dark, bright = np.full((16, 8, 8, 1), 20, np.uint8), np.full((16, 8, 8, 1), 230, np.uint8)
    sides = dict(training=dark, held_out=bright) if held_out is not None else {}
    out = analyze.denoising(study_of(tmp_path, normal(20, 4).abs(), **sides))
    assert verdicts(out) == verdict and out["claims"][0]["on_phi"] is False
    assert out["input_psnr"] == pytest.approx([20, -20 * math.log10(0.5)])
    if sides:
        assert out["gap"][0][0] == pytest.approx(-held_out, abs=0.02)
        assert out["output_psnr"]["held out"][1][0] == pytest.approx(20.5 + held_out, abs=0.02)
        few = analyze.denoising(study_of(tmp_path, normal(20, 4).abs(),
                                training=dark[:1], held_out=bright[:1]))
        assert verdicts(few) == "n"            # no standard error: no verdict


# φ in a stream


def test_analyze_streamed_phi(tmp_path):
    """φ would depend on what was computed before."""
    torch.manual_seed(0)
    model, n = UNet(width=2, channels=1, levels=1), 2 * analyze.BATCH + 6
    study = study_of(tmp_path, normal(n, 4).abs())
    one, two = analyze.compute_phi([model, model], study.x, [[0.3, 0.0], [0.3]], 3, 0, "cpu")
    assert list(one) == [0.3, 0.0] and list(two) == [0.3] and gap(one[0.3], two[0.3]) == 0
    for a in range(0, n, analyze.BATCH):
        batch = train.to_batch(study.x[a:a + analyze.BATCH], "cpu")
        generator = train.seeded("cpu", 0, 5, 300_000, a)
        assert gap(one[0.3][a:a + analyze.BATCH], phi(model, batch, 0.3, 3, generator)) < 1e-6
        assert gap(one[0.0][a:a + analyze.BATCH], model.activations(batch)["M"][1].detach()) < 1e-6


def test_analyze_map_statistics(tmp_path):
    """Running sums over batches would differ from the same of all maps at once."""
    torch.manual_seed(0)
    model, n, maps = UNet(width=2, channels=1, levels=1), analyze.BATCH + 6, []
    study = study_of(tmp_path, normal(n, 4).abs(), draws=3)
    for a in range(0, n, analyze.BATCH):       # all of them at once, with the same noise
        batch, generator = study.pictures(np.arange(n)[a:a + analyze.BATCH]), study.noise(20, a)
        noisy = [batch + 0.3 * torch.randn(batch.shape, generator=generator) for _ in range(3)]
        maps.append(torch.stack([model.encode(y)[0].detach() for y in noisy]).mean(0))
    maps = torch.cat(maps).double().flatten(2)                         # (n, d, hw)
    spatial, dimension = analyze.map_statistics(study, model, np.arange(n))
    for c in range(4):
        size, pr = maps[:, c].mean(1), analyze.participation_ratio(maps[:, c]).nan_to_num()
        eigenvalues = torch.linalg.eigvalsh(torch.cov(maps[:, c].T, correction=0))
        assert abs(spatial[c] - (size * pr).sum() / size.sum()) < 1e-9
        assert abs(dimension[c] - eigenvalues.sum() ** 2 / eigenvalues.square().sum()) < 1e-6


# The command line


def write_checkpoint(path, data, seed=0, **changes):
    """A checkpoint of an untrained 8×8 network, as train.py writes it."""
    flags = dict(data=str(data), size=8, channels=3, patches=False, val=0.4, subset=None, limit=None, width=4,
                 levels=1, sigma_max=1.0, batch=8, epochs=1.0, minutes=None, pictures=None, precision="fp32",
                 seed=seed) | changes
    torch.manual_seed(seed)
    model = UNet(flags["width"], flags["channels"], flags["levels"])
    try:
        fingerprint = train.training_data(flags)[0].fingerprint
    except UserError:
        fingerprint = "none"
    torch.save(dict(
        {k: flags[k] for k in ("size", "sigma_max")}, format=unet.FORMAT, weights=model.state_dict(), step=1,
        model={k: flags[k] for k in ("width", "channels", "levels")}, flags=flags, mean=[0.4] * 3,
        elapsed=1.0, fingerprint=fingerprint, training=dict(pictures_seen=8, psnr={})), path)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with 80 pictures in two classes, checkpoints, and what users get wrong."""
    folder, rng = tmp_path_factory.mktemp("analyze"), np.random.default_rng(0)
    for name in "data/a", "data/b", "few", "empty", "foreign", "own", "sub":
        (folder / name).mkdir(parents=True)
    for i in range(80):
        x = rng.normal(128, 20 + 60 * (i % 2), (8, 8, 3)).clip(0, 255).astype(np.uint8)
        for name in [f"data/{'ab'[i % 2]}", *["few"] * (i < 5)]:
            Image.fromarray(x).save(folder / name / f"{i}.png")
    (folder / "foreign" / "stability.png").write_bytes(b"mine")
    (folder / "own" / "results.json").write_text('{"key": 1}')
    (folder / "file").write_text("text")
    (folder / "picture.png").write_bytes(b"no picture")
    for name, options in dict(a={}, b=dict(seed=1), wide=dict(width=8), low=dict(sigma_max=0.01), moved={},
                              lost=dict(data=folder / "nowhere")).items():
        write_checkpoint(folder / f"{name}.pt", **{"data": folder / "data", **options})
    saved = torch.load(folder / "a.pt", weights_only=True)
    torch.save({**saved, "fingerprint": "other"}, folder / "moved.pt")
    saved["weights"]["blocks.M.0.weight"][0] = math.nan
    torch.save(saved, folder / "nan.pt")
    (folder / "cut.pt").write_bytes((folder / "a.pt").read_bytes()[:3000])
    (folder / "sub" / "a.pt").write_bytes((folder / "b.pt").read_bytes())
    return folder


def call_analyze(monkeypatch, studio, *words):
    """analyze.py in this process, in the folder `studio`."""
    monkeypatch.chdir(studio)
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words)])
    return analyze.main()


TINY_STUDY = "--draws", 2, "--steps", 3, "--pairs", 5, "--device", "cpu"


@pytest.mark.parametrize("words, expected", [
    ("none.pt", "none.pt"), ("file", "file: not a checkpoint"), ("cut.pt", "cut.pt"),
    ("nan.pt", "not finite"), ("data", "data: cannot be read"), ("lost.pt", "nowhere"),
    ("moved.pt", "have changed"), ("a.pt --data nowhere", "nowhere"), ("a.pt --data empty", "empty"),
    ("a.pt --data file", "file"), ("a.pt --data few", "5 pictures are too few"),
    ("a.pt --pictures picture.png", "picture.png"), ("a.pt --pictures no.png", "no.png"),
    ("a.pt --out file", "--out file"), ("a.pt --out file/x", "file"),
    ("a.pt --out own", "results.json exists"), ("a.pt --out foreign", "stability.png exists: --force"),
    ("a.pt --device meta", "--device meta"), ("a.pt --device tpu9", "--device tpu9"),
    ("a.pt wide.pt", "networks of one kind"), ("a.pt low.pt", "networks of one kind"),
    ("a.pt sub/a.pt", "different names"), ("a.pt none.pt", "none.pt"),
    *((words, 2) for words in (
        "", "a.pt --stpes 3", "a.pt --only sparse", "a.pt --only", "a.pt --images 19", "a.pt --images nan",
        "a.pt --draws 0", "a.pt --draws 1000000000", "a.pt --sigma 0", "a.pt --sigma nan", "a.pt --sigma inf",
        "a.pt --sigma -1", "a.pt --clusters 1", "a.pt --pairs 1", "a.pt --steps 1", "a.pt --seed -1",
        "a.pt --seed 1.5", "a.pt --dev cpu"))])
def test_analyze_bad_input(studio, monkeypatch, capsys, words, expected):
    """What the user can mend would be a traceback, found only after the work, or leave something behind."""
    before = {p.name for p in studio.rglob("*")}
    kinds = (SystemExit, None) if expected == 2 else ((UserError, OSError), expected)
    with pytest.raises(kinds[0], match=kinds[1]) as end:
        call_analyze(monkeypatch, studio, *words.split(), *[] if "--device" in words else ["--device", "cpu"])
    out, err = capsys.readouterr()
    assert expected != 2 or end.value.code == 2 and err.count("\n") == 1
    assert "left" not in out and not [p for p in studio.rglob("*.tmp")]
    assert before <= {p.name for p in studio.rglob("*")}
    assert (studio / "foreign" / "stability.png").read_bytes() == b"mine"


def test_analyze_pictures_are_held_out(studio):
    """Training pictures would be analysed as held-out ones, or the two sides of `denoising` be swapped."""
    flags = types.SimpleNamespace(data=None, seed=0, images=1000, draws=2, clusters=None, pairs=5, steps=3,
                                  pictures=None, sigma=[0.3, 0.1, 0.3])
    model, checkpoint = unet.load_checkpoint(studio / "a.pt")
    pictures, rows, held_out = train.training_data(checkpoint["flags"])
    inside = lambda x, i: {v.tobytes() for v in x} <= {v.tobytes() for v in pictures.x[i]}
    study, key, paths, where = analyze.prepare(flags, "a.pt", model, checkpoint, "cpu")
    assert len(study.x) == len(held_out) == 32 and inside(study.x, held_out) and where == "held out"
    assert inside(study.training, rows) and inside(study.held_out, held_out) and len(study.training) == 48
    assert [pictures.labels[pictures.paths.index(p)] for p in paths] == list(study.labels)
    assert key["sigmas"] == [0.3, 0.1]
    flags.data, flags.images = str(studio / "data"), 50
    study, _, _, where = analyze.prepare(flags, "a.pt", model, checkpoint, "cpu")
    assert len(study.x) == 50 and where == "training and held-out"
    flags.data = str(studio / "data" / "a")
    study, _, _, where = analyze.prepare(flags, "a.pt", model, checkpoint, "cpu")
    assert study.training is None and where == "other pictures"


def finite_numbers(value):
    """All numbers of a nested structure are finite; a null must not be there."""
    if isinstance(value, (dict, list)):
        return all(map(finite_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) or value is not None and math.isfinite(value)


def test_analyze_command_line(studio, monkeypatch, capsys, quick):
    """A figure, the page or a number would be missing; an untrained network would confirm the paper."""
    out = studio / "figures"
    words = ["a.pt", *TINY_STUDY, "--out", out, "--data", studio / "data", "--clusters", 4]
    assert call_analyze(monkeypatch, studio, *words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("φ is NOT alive, by use 0.00 dB") and "class agreement" in printed[0]
    record, page = json.loads((out / "results.json").read_text()), (out / "index.html").read_text()
    figures = {name for f in analyze.ANALYSES.values() for name in f.figures}
    assert {p.stem for p in out.glob("*.png")} == set(record["captions"]) == figures
    assert not any("skipped" in v for v in record["analyses"].values())
    claims = [c for v in record["analyses"].values() for c in v.get("claims", [])]
    assert len(claims) == 25 and all(c["verdict"] == "not comparable" for c in claims if c["on_phi"])
    assert {c["verdict"] for c in claims if not c["on_phi"]} <= {"fails", "not comparable"}
    assert finite_numbers(record["analyses"]["matching"]) and finite_numbers(record["analyses"]["denoising"])
    assert all(f"<b>{name}.</b>" in page for name in figures) and page.count("<tr>") == 25
    assert page.count("data:image/png;base64,") == len(figures) and "untrained" in page
    assert "<script" not in page and "http" not in page
    with np.load(out / "phi.npz") as file:     # what kmeans.py reads
        assert [file[k].shape for k in ("phi", "other_phi", "untrained", "paths")] == [
            (80, 8), (1, 80, 8), (3, 2, 80, 8), (80,)] and set(file["labels"]) == {0, 1}

    # a rerun of one analysis: its claims alone are printed, φ is not computed again, the rest is kept
    monkeypatch.setattr(analyze, "compute_phi", None)
    (out / "stability.png").write_bytes(b"kept")
    assert call_analyze(monkeypatch, studio, *words, "--only", "sparsity") == 0
    printed = capsys.readouterr().out
    assert printed.count("paper: ") == 4 and "PR falls" in printed and "clusters" not in printed
    assert (out / "stability.png").read_bytes() == b"kept"
    again = json.loads((out / "results.json").read_text())["analyses"]
    assert set(again) == set(record["analyses"])
    assert again["sparsity"]["change"] == record["analyses"]["sparsity"]["change"]
    with pytest.raises(UserError, match="exists: --force"):            # other settings
        call_analyze(monkeypatch, studio, *words, "--seed", 1)


def test_analyze_several_networks_and_corners(studio, monkeypatch, capsys, quick):
    """Mean and spread over networks would be of other claims; a small σ_max or no classes crash it."""
    call_analyze(monkeypatch, studio, "a.pt", "b.pt", *TINY_STUDY, "--out", "many",
                 "--only", "sparsity", "denoising")
    printed = capsys.readouterr().out
    assert "2 networks: a, b" in printed and "over 2 networks" in printed and "not comparable in 2" in printed
    read = lambda name: json.loads((studio / name).read_text())
    values = [read(f"many/{v}/results.json")["analyses"]["sparsity"]["claims"][0]["value"] for v in "ab"]
    row = read("many/networks.json")["claims"][0]
    assert row["value"] == pytest.approx(np.mean(values), rel=1e-4)
    assert row["error"] == pytest.approx(np.std(values, ddof=1), rel=1e-4)
    assert (studio / "many" / "index.html").exists() and (studio / "many" / "a" / "index.html").exists()
    call_analyze(monkeypatch, studio, "low.pt", *TINY_STUDY, "--out", "low", "--sigma", 0.005,
                 "--data", "data/a",
         "--pictures", "data/a/0.png", "--clusters", 39)
    assert "40 pictures cannot make 39 clusters" in capsys.readouterr().out
    found = read("low/results.json")["analyses"]
    assert found["denoising"]["sigmas"] == [0.01] and found["stability"]["sigma_2"] == [0, 0.01]
    assert found["attributes"]["pictures"][0]["name"] == "0.png"


def test_analyze_structureless_phi_through_the_whole_pipeline(studio, monkeypatch, quick, tmp_path):
    """Independent random rows with random labels would confirm a claim about φ."""
    monkeypatch.chdir(studio)
    flags = types.SimpleNamespace(data=str(studio / "data"), seed=0, images=60, draws=2, clusters=6, pairs=8,
                                  steps=3, pictures=None, sigma=[0.3, 0.1])
    model, checkpoint = unet.load_checkpoint(studio / "a.pt")
    for seed in range(2):
        study, r = analyze.prepare(flags, "a.pt", model, checkpoint, "cpu")[0], np.random.default_rng(seed)
        study.alive, study.out, study.labels = dict(why="", untrained=[]), str(tmp_path), r.integers(0, 4, 60)
        codes = [abs(r.normal(size=(60, 8))) if seed else r.gamma(0.4, size=(60, 8)) for _ in range(2)]
        study.phi = {s: torch.from_numpy(v).float() for s, v in zip((0.3, 0.1), codes)}
        study.untrained = analyze.untrained_networks(study)
        study.untrained_phi = analyze.compute_phi(study.untrained, study.x, 3 * [[0.3, 0.1]], 2, 0, "cpu")
        left_out = {"reconstruction", "denoising", *["matching", "embedding"] * seed}
        claims = [c for name in analyze.ANALYSES.keys() - left_out for c in
                  analyze.ANALYSES[name](study).get("claims", [])]
        assert claims and not [c["claim"] for c in claims if c["on_phi"] and c["verdict"] == "holds"]
