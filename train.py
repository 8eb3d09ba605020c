"""Train the blind denoiser on a folder of pictures (paper A: Eq. 1, App. A.2, A.3).

    python train.py                                        # built-in pictures, about 10 minutes on a laptop
    python train.py --data photos --size 32 --width 16 --batch 32 --minutes 10  # your pictures, on a laptop
    python train.py --data photos  # the paper's run, one GPU
    torchrun --nproc_per_node=8 train.py --data photos.npy                           # the same run on eight
    python train.py --resume                                                         # go on with ckpt.pt

It writes ckpt.pt, ckpt.jsonl (the curve) and ckpt.png (held-out pictures, denoised) at every evaluation.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from unet import FORMAT, UNet, UserError, load_checkpoint, phi, receptive_field

# A.2, Pictures

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
              ".jp2", ".avif"}


class Pictures(NamedTuple):
    """A data set, decoded once. Everything but `x` is small."""
    x: np.ndarray           # (N, H, W, C) uint8
    paths: list             # N names: the file, and the tile or row in it
    labels: np.ndarray      # (N,) index into `classes`, −1 for none; never used in training
    classes: list           # names of the sub-folders
    groups: np.ndarray      # (N,) pictures of one group stay on one side of every split
    skipped: list           # "file: reason" for each file that could not be used
    fingerprint: str        # hash of the pictures, whatever their order


def flatten_mode(image):
    """A PIL image of any mode, upright, as 8-bit "L" or "RGB": alpha over white, 16 bits reduced to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):             # 16-bit gray; convert("L") would clip it at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def to_pixels(image, size, channels, patches=False):
    """A PIL image -> (k, size, size, channels) uint8.

    k = 1: the central square, resized with antialiasing; or, with `patches`, every non-overlapping size×size
    tile at full resolution. Raises ValueError if the picture is smaller than one tile.
    """
    if not patches:  # a large JPEG is decoded at a fraction of its size, at least 2·size
        image.draft(None, (2 * size, 2 * size))
    image = flatten_mode(image).convert("L" if channels == 1 else "RGB")
    w, h = image.size
    if patches:
        if min(w, h) < size:
            raise ValueError(f"{w}×{h} pixels hold no {size}×{size} tile")
        tiles = np.asarray(image)[:h // size * size, :w // size * size].reshape(
            h // size, size, w // size, size, channels)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, size, size, channels)
    if (w, h) != (size, size):
        s = min(w, h)
        box = ((w - s) / 2, (h - s) / 2, (w + s) / 2, (h + s) / 2)
        image = image.resize((size, size), Image.BICUBIC, box=box)
    return np.asarray(image).reshape(1, size, size, channels)


def load_picture(path, size=None, channels=3):
    """One picture file -> (H, W, channels) uint8: as in training if `size` is given, else at full resolution.

    Raises UserError if the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            if size:
                return to_pixels(image, size, channels)[0]
            image = flatten_mode(image).convert("L" if channels == 1 else "RGB")
            return np.asarray(image).reshape(image.height, image.width, channels)
    except Exception as error:                 # damaged files raise nearly anything, by format
        raise UserError(f"{path}: cannot be read as a picture ({str(error).splitlines()[0]})") from None


def list_files(folder, extensions):
    """All files below a folder with one of the extensions in any case, sorted; links are followed once."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up, or a second link to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders.sort()                         # of two links to one folder, always the same is followed
        found += [os.path.join(root, f) for f in files if os.path.splitext(f)[1].lower() in extensions]
    return sorted(found)


def npz_member(path):
    """The pictures in a .npz: (member's name, shape), by the key `data` or the first of a known shape."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".npy")]
        for name in sorted(names, key=lambda n: n != "data.npy"):
            with archive.open(name) as f:
                shape, fortran, dtype = npy_header(f)
            if dtype == np.uint8 and not fortran and planar_side(shape):
                return name, shape
    raise UserError(f"{path}: holds no uint8 array of shape (N, H, W), (N, H, W, 1), (N, H, W, 3) or "
                    f"(N, 3·side²); it has {', '.join(names) or 'nothing'}")


def npy_header(f):
    """(shape, fortran_order, dtype) of a .npy stream, leaving it at the first byte of the data."""
    if np.lib.format.read_magic(f) == (1, 0):
        return np.lib.format.read_array_header_1_0(f)
    return np.lib.format.read_array_header_2_0(f)


def planar_side(shape):
    """(H, W, C, planar?) of pictures in an array of this shape, or None. ImageNet64: (N, 3·64·64), planar."""
    if len(shape) == 3:
        return shape[1], shape[2], 1, False
    if len(shape) == 4 and shape[3] in (1, 3):
        return *shape[1:], False
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    return (side, side, 3, True) if side and shape[1] == 3 * side * side else None


def array_chunks(path, rows=2048):
    """Yield a .npy's or .npz's pictures as (k, H, W, C) uint8, a few at a time: constant memory."""
    if path.endswith(".npy"):
        array = np.load(path, mmap_mode="r")
        h, w, c, planar = planar_side(array.shape)
        for i in range(0, len(array), rows):
            yield planar_to_last(array[i:i + rows], h, w, c, planar)
        return
    name, shape = npz_member(path)
    h, w, c, planar = planar_side(shape)
    with zipfile.ZipFile(path) as archive, archive.open(name) as f:
        npy_header(f)
        for i in range(0, shape[0], rows):
            k = min(rows, shape[0] - i)
            yield planar_to_last(np.frombuffer(f.read(k * h * w * c), np.uint8), h, w, c, planar)


def planar_to_last(flat, h, w, c, planar):
    """Pictures in any of the layouts of `planar_side` -> (k, H, W, C)."""
    return flat.reshape(-1, c, h, w).transpose(0, 2, 3, 1) if planar else flat.reshape(-1, h, w, c)


def array_shape(path):
    """(N, H, W, C) of the pictures in a .npy or .npz. Raises UserError if there are none."""
    try:
        if path.endswith(".npz"):
            shape = npz_member(path)[1]
        else:
            array = np.load(path, mmap_mode="r")
            shape = array.shape
            if array.dtype != np.uint8 or not planar_side(shape):
                raise UserError(f"{path}: pictures must be uint8 of shape (N, H, W), (N, H, W, 1) or "
                                f"(N, H, W, 3); this is {array.dtype} {shape}")
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        raise UserError(f"{path}: not a whole {path[-4:]} file") from None
    return shape[0], *planar_side(shape)[:3]


def array_labels(path, n):
    """The integer array `labels` of an .npz, as ImageNet64 has it, or −1 for every picture."""
    if path.endswith(".npz"):
        with np.load(path) as archive:
            if "labels" in archive.files and archive["labels"].shape == (n,):
                return archive["labels"].astype(np.int64)
    return np.full(n, -1)


def load_folder(folder, files, size, channels, patches):
    """Decode files in parallel into one uint8 array: (x, paths, labels, classes, source, skipped)."""
    count = np.ones(len(files), int)
    skipped = {}

    def measure(i):                            # tiles per file, from its header alone
        try:
            with Image.open(files[i]) as image:
                count[i] = (image.width // size) * (image.height // size)
        except Exception:                      # decode() below says why
            pass

    def decode(i):
        try:
            with Image.open(files[i]) as image:
                pixels = to_pixels(image, size, channels, patches)
            x[start[i]:start[i] + len(pixels)] = pixels
        except Exception as error:             # damaged files raise nearly anything, by format
            skipped[i] = f"{files[i]}: {(str(error) or type(error).__name__).splitlines()[0]}"

    blocks = [range(i, min(i + 64, len(files))) for i in range(0, len(files), 64)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if patches:
            list(pool.map(lambda block: [measure(i) for i in block], blocks))
        start = np.cumsum(count) - count
        x = np.empty((count.sum(), size, size, channels), np.uint8)
        clock, done = time.time(), 0
        for block in pool.map(lambda block: [decode(i) for i in block], blocks):
            done += len(block)
            if time.time() - clock > 5:
                clock = time.time()
                print(f"reading pictures: {done} of {len(files)}", flush=True)

    source = np.repeat(np.arange(len(files)), count)
    keep = np.flatnonzero(~np.isin(source, list(skipped)))
    for to, row in enumerate(keep):            # in place: a copy would double the memory
        if to != row:
            x[to] = x[row]
    x, source = x[:len(keep)], source[keep]
    parts = [Path(f).relative_to(folder).parts for f in files]
    classes = sorted({p[0] for p in parts if len(p) > 1})
    label = np.array([classes.index(p[0]) if len(p) > 1 else -1 for p in parts], int)
    tile = [f"#{i - start[s]}" if patches else "" for i, s in zip(keep, source)]
    paths = [files[s] + t for s, t in zip(source, tile)]
    return x, paths, label[source], classes, source, [skipped[i] for i in sorted(skipped)]


def load_arrays(files, size, channels, patches):
    """Pictures from .npy and .npz files; as `load_folder`. A .npy of the right shape stays memory-mapped."""
    shapes = [array_shape(f) for f in files]
    tiles = [(h // size) * (w // size) if patches else 1 for _, h, w, _ in shapes]
    for f, (_, h, w, _), t in zip(files, shapes, tiles):
        if t == 0:
            raise UserError(f"{f}: pictures of {w}×{h} hold no {size}×{size} tile; give a smaller --size")
    n = [s[0] for s in shapes]
    names = np.concatenate([array_labels(f, k) for f, k in zip(files, n)])
    values = [int(v) for v in np.unique(names[names >= 0])]
    labels = np.where(names >= 0, np.searchsorted(values, names), -1)
    fits = [s[1:] == (size, size, channels) for s in shapes]
    if len(files) == 1 and files[0].endswith(".npy") and fits[0]:
        x = np.load(files[0], mmap_mode="r").reshape(n[0], size, size, channels)
    else:
        x, row = np.empty((int(np.dot(n, tiles)), size, size, channels), np.uint8), 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for f, ok in zip(files, fits):
                for chunk in array_chunks(f):
                    if not ok:
                        chunk = np.concatenate(list(pool.map(lambda a: to_pixels(
                            Image.fromarray(np.ascontiguousarray(a.squeeze(-1) if a.shape[-1] == 1 else a)),
                            size, channels, patches), chunk)))
                    x[row:row + len(chunk)] = chunk
                    row += len(chunk)
    each = np.repeat(tiles, n)                 # tiles of every picture
    source = np.repeat(np.arange(sum(n)), each)
    paths = [f"{f}#{i}" for f, k, t in zip(files, n, tiles) for i in range(k * t)]
    return x, paths, labels[source], [str(v) for v in values], source, []


def load_pictures(data=None, size=64, channels=3, patches=False):
    """Read a data set: a folder, a .npy/.npz file, "disc", "calpha:A", or None for the built-in pictures.

    Returns Pictures with x (N, size, size, channels) uint8. Raises UserError when there is nothing usable,
    and says what was looked for.
    """
    if data is None or data == "disc" or data.startswith("calpha:"):
        x, labels, classes = builtin_pictures(20_000, size, channels, data)
        paths, source, skipped = [f"{data or 'built-in'}#{i}" for i in range(len(x))], np.arange(len(x)), []
    else:
        if not os.path.exists(data):
            raise UserError(f"--data {data}: no such file or folder")
        if os.path.isdir(data):
            files = list_files(data, EXTENSIONS)
            arrays = [] if files else list_files(data, {".npz"})
        else:
            files, arrays = [], [data] if data.endswith((".npy", ".npz")) else []
        if not files and not arrays:
            raise UserError(f"--data {data}: looked for a folder (searched to any depth) with pictures "
                            f"({' '.join(sorted(EXTENSIONS))}) or .npz batches, or one .npy or .npz file; "
                            f"found none")
        if files:
            x, paths, labels, classes, source, skipped = load_folder(data, files, size, channels, patches)
        else:
            x, paths, labels, classes, source, skipped = load_arrays(arrays, size, channels, patches)
        if not len(x):
            raise UserError(f"--data {data}: none of its {len(skipped)} picture files could be used, "
                            "for instance " + "; ".join(skipped[:3]))
    digest = lambda rows: [hashlib.blake2b(x[i].tobytes(), digest_size=8).digest() for i in rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = [range(i, min(i + 256, len(x))) for i in range(0, len(x), 256)]
        hashes = np.frombuffer(b"".join(d for block in pool.map(digest, blocks) for d in block), np.uint64)
    fingerprint = hashlib.blake2b(np.sort(hashes).tobytes(), digest_size=8).hexdigest()
    return Pictures(x, paths, labels, classes, join_groups(source, hashes), skipped, fingerprint)


def join_groups(source, hashes):
    """Group id of every picture: those cut from one file, and exact duplicates, share one, transitively.

    source: (N,) index of the file; hashes: (N,) uint64. The id is the smallest hash in the group, so that it
    depends on the pictures alone and not on their names or order.
    """
    hashes_of = np.unique(hashes, return_inverse=True)[1]
    parent = list(range(hashes_of.max() + 1))  # union-find over distinct pictures

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for s, h in zip(source.tolist(), hashes_of.tolist()):
        a, b = root(first.setdefault(s, h)), root(h)
        parent[max(a, b)] = min(a, b)  # `unique` sorted the hashes: the root is the smallest of its group
    return np.unique(hashes)[[root(h) for h in hashes_of.tolist()]]


def split(pictures, val=0.05, seed=0):
    """Seeded split into (training, held-out) indices; depends only on the pictures and the seed.

    At most 2,000 and at least one picture are held out. No group (tiles of one picture, exact duplicates) has
    members on both sides; a group larger than what is to be held out stays in training. Raises UserError if
    that leaves none.
    """
    members = group_members(pictures.groups, np.arange(len(pictures.x)), seed)
    room = min(max(1, round(val * len(pictures.x))), 2000)
    held_out, train = [], []
    for group in members:
        if len(group) <= room and len(members) > 1:
            held_out.append(group)
            room -= len(group)
        else:
            train.append(group)
    if not held_out and len(members) > 1:      # every group is larger than asked for: the smallest one, then
        held_out.append(train.pop(min(range(len(train)), key=lambda g: len(train[g]))))
    if not held_out or not train:
        raise UserError("only one distinct picture: nothing to hold out (tiles of one picture stay together)")
    return np.concatenate(train), np.concatenate(held_out)


def group_members(groups, index, seed):
    """The rows `index`, an array a group, in an order drawn from the seed and the pictures alone."""
    order = np.argsort(groups[index], kind="stable")
    ids, start = np.unique(groups[index][order], return_index=True)
    members = np.split(index[order], start[1:])
    return [members[i] for i in np.random.default_rng(seed).permutation(len(ids))]


def training_part(pictures, train, subset=None, limit=None, seed=0):
    """Paper B's training sets: one half of the training rows (no group in both), at most `limit` of them.

    Smaller limits are subsets of larger ones. Raises UserError if nothing is left.
    """
    members = group_members(pictures.groups, train, seed)
    if subset:
        half = np.argmin(abs(np.cumsum([len(m) for m in members]) - len(train) / 2)) + 1
        members = members[:half] if subset == "first" else members[half:]
    if not members:
        raise UserError(f"--subset {subset}: too few distinct pictures for two halves")
    return np.concatenate(members)[:limit]


def checkpoint_pictures(checkpoint, data=None):
    """The data a checkpoint was trained on, split as it was: (Pictures, training rows, held-out rows).

    data: where the pictures are now, if they have moved. With other pictures than the checkpoint's, the split
    is made anew with its seed. Raises UserError as `load_pictures` does.
    """
    return training_data({**checkpoint["flags"], "data": data or checkpoint["flags"]["data"]})


# Built-in pictures, for a machine without any

BUILTIN_CLASSES = ["grating 0°", "grating 45°", "grating 90°", "grating 135°", "checks", "dots", "lattice",
                   "rings", "spokes", "disc", "square", "cross", "edge", "smooth noise", "dead leaves"]


def builtin_pictures(n, size, channels, family=None, seed=0):
    """Deterministic synthetic pictures: (x (n, size, size, channels) uint8, labels (n,), class names).

    family None: fifteen classes of textures and shapes with random phase, scale, position and colours. "disc"
    and "calpha:A": paper B's Fig. 5 and 4. Raises UserError for an A that is not a positive number.
    """
    rng = np.random.default_rng(seed)
    if family:
        draw = disc_pictures if family == "disc" else calpha_pictures
        alpha = () if family == "disc" else (positive_alpha(family),)
        x = np.concatenate([draw(min(500, n - i), size, rng, *alpha) for i in range(0, n, 500)])
        return np.repeat(x, channels, axis=-1), np.full(n, -1), []
    k = len(BUILTIN_CLASSES)
    x = np.empty((n, size, size, channels), np.uint8)
    for c, name in enumerate(BUILTIN_CLASSES):
        m = len(range(c, n, k))
        shape = (m, 1, 1, 3)
        a, b = rng.random(shape), rng.random(shape)        # two colours, at least 0.25 apart on average
        while (near := np.abs(a - b).mean(-1, keepdims=True) < 0.25).any():
            b = np.where(near, rng.random(shape), b)
        if name == "dead leaves":
            rgb = dead_leaves(m, size, rng)
        else:
            mask = pattern(name, m, size, rng)[..., None].astype(np.float32)
            rgb = (a + (b - a) * mask).astype(np.float32)
        x[c::k] = to_uint8(rgb if channels == 3 else rgb.mean(-1, keepdims=True))
    return x, np.arange(n) % k, BUILTIN_CLASSES


def positive_alpha(family):
    """A of "calpha:A"."""
    try:
        alpha = float(family.split(":")[1])
    except ValueError:
        alpha = 0
    if not 0 < alpha < 100:
        raise UserError(f"--data {family}: the A of calpha:A must be a positive number, as in calpha:2")
    return alpha


def to_uint8(x):
    """[0, 1] -> 0 … 255, rounded."""
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def pattern(name, m, size, rng):
    """m masks of one class, antialiased: (m, size, size) in [0, 1]. Lengths: fractions of the side."""
    u = lambda low, high: rng.uniform(low, high, (m, 1, 1)).astype(np.float32)
    pixel = np.float32(1 / size)
    cover = lambda distance: np.clip(0.5 + distance / pixel, 0, 1)     # signed distance, positive inside
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = grid[None, None, :] - u(0.25, 0.75), grid[None, :, None] - u(0.25, 0.75)
    wave = lambda t: np.abs((t - np.floor(t)) - 0.5)  # distance to the middle of a period, ≤ 0.5
    if name == "smooth noise":
        f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) * size
        white = np.fft.rfft2(rng.standard_normal((m, size, size)))
        noise = np.fft.irfft2(white * np.exp(-(f / u(1.5, 4)) ** 2))
        return 0.5 + noise / (4 * noise.std((1, 2), keepdims=True))
    angle = u(0, 2 * np.pi)
    if name.startswith("grating"):
        angle = np.deg2rad(float(name.split()[1][:-1]) + u(-8, 8))
    elif name in ("checks", "lattice", "dots", "cross", "square"):
        angle = u(-0.25, 0.25)
    p, q = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    r, period = np.hypot(x, y), u(0.15, 0.4)
    match name.split()[0]:
        case "grating":
            return 0.5 + 0.5 * np.cos(2 * np.pi * p / u(0.1, 0.35))
        case "checks":
            return 0.5 + 2 * (cover((wave(p / period) - 0.25) * period) - 0.5) * (
                cover((wave(q / period) - 0.25) * period) - 0.5)
        case "dots":
            return cover(period * (u(0.25, 0.38) - np.hypot(wave(p / period), wave(q / period))))
        case "lattice":
            return cover(period * (u(0.1, 0.2) - np.minimum(wave(p / period), wave(q / period))))
        case "rings":
            return 0.5 + 0.5 * np.cos(2 * np.pi * r / u(0.12, 0.35) + angle)
        case "spokes":
            turns = rng.integers(3, 8, (m, 1, 1))
            return cover(r * np.sin(turns * (np.arctan2(y, x) + angle)) / turns)
        case "disc":
            return cover(u(0.12, 0.35) - r)
        case "square":
            return cover(u(0.12, 0.32) - np.maximum(np.abs(p), np.abs(q)))
        case "cross":
            arm, half = u(0.2, 0.4), u(0.04, 0.09)
            return cover(np.maximum(np.minimum(arm - np.abs(p), half - np.abs(q)),
                                    np.minimum(half - np.abs(p), arm - np.abs(q))))
        case "edge":
            return cover(p)


def dead_leaves(m, size, rng, leaves=30):
    """Discs of random colour, each over the earlier ones: (m, size, size, 3) in [0, 1]."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    rgb = np.repeat(rng.random((m, 1, 1, 3), np.float32), size, 1).repeat(size, 2)
    for _ in range(leaves):
        cx, cy, radius = rng.random((3, m, 1, 1), np.float32) * np.float32([[[[1]]], [[[1]]], [[[0.2]]]])
        distance = np.hypot(grid[None, None, :] - cx, grid[None, :, None] - cy)
        mask = np.clip(0.5 + (radius + 0.05 - distance) * size, 0, 1)[..., None]
        rgb += mask * (rng.random((m, 1, 1, 3), np.float32) - rgb)
    return rgb


def disc_pictures(m, size, rng):
    """Paper B, Fig. 5: discs with five degrees of freedom (position 2, radius, two intensities)."""
    u = lambda low, high: rng.uniform(low, high, (m, 1, 1))
    grid = (np.arange(size) + 0.5) / size
    r = np.hypot(grid[None, None, :] - u(0.3, 0.7), grid[None, :, None] - u(0.3, 0.7))
    inside = 1 / (1 + np.exp(-2 * size * (u(0.1, 0.3) - r)))  # an edge two pixels wide: a smooth manifold
    ground = u(0, 1)
    return to_uint8(ground + (u(0, 1) - ground) * inside)[..., None]


def calpha_pictures(m, size, rng, alpha):
    """Paper B, Fig. 4: two C^α regions with a C^α contour between them, slightly blurred."""
    def field(dims):  # Gaussian, spectrum |k|^-(α + dims/2): barely C^α. Twice the size, cropped: no period.
        white = np.fft.rfftn(rng.standard_normal((m, *[2 * size] * dims)), axes=range(1, dims + 1))
        axes = [np.fft.fftfreq(2 * size) * 2 * size] * (dims - 1) + [np.arange(size + 1)]
        k = np.sqrt(sum(np.square(a) for a in np.meshgrid(*axes, indexing="ij")))
        smooth = white / np.maximum(k, 1) ** (alpha + dims / 2) * (k > 0)
        f = np.fft.irfftn(smooth, axes=range(1, dims + 1))[(slice(None), *[slice(size)] * dims)]
        return (f - f.mean(tuple(range(1, dims + 1)), keepdims=True)) / f.std()
    u = lambda low, high: rng.uniform(low, high, (m, 1, 1))
    grid = (np.arange(size) + 0.5) / size
    contour = u(0.3, 0.7) + 0.1 * field(1)[:, None, :]
    mask = np.clip(0.5 + size * (contour - grid[None, :, None]), 0, 1)
    one, two = u(0.2, 0.8) + 0.08 * field(2), u(0.2, 0.8) + 0.08 * field(2)
    x = two + (one - two) * mask
    for axis in 1, 2:                                      # blur with (1 2 1)/4
        edge = [(0, 0)] * 3
        edge[axis] = (1, 1)
        wide = np.pad(x, edge, mode="edge")
        cut = lambda s: np.take(wide, range(s, s + size), axis)
        x = (cut(0) + 2 * cut(1) + cut(2)) / 4
    turn = rng.random((m, 1, 1)) < 0.5                     # contours of every orientation
    return to_uint8(np.where(turn, x.transpose(0, 2, 1), x))[..., None]


# Eq. 1 and A.3, Training

def seeded(device, *words):
    """A torch.Generator on `device` for these integers: no noise depends on what was drawn before."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def draw_sigma(n, sigma_max, generator):
    """σ = σ_max·u², u uniform, one a picture: p(σ) ∝ 1/√σ (A.3). (n, 1, 1, 1) in [0, σ_max]."""
    return sigma_max * torch.rand(n, 1, 1, 1, generator=generator, device=generator.device) ** 2


def to_batch(x, device):
    """(B, H, W, C) uint8 -> (B, C, H, W) float in [0, 1] on `device`, channels-last in memory."""
    return torch.from_numpy(np.array(x, order="C")).to(device).permute(0, 3, 1, 2).float().div_(255)


def noisy_batch(pictures_x, rows, step, seed, sigma_max, device):
    """The clean and noisy pictures of one global batch: x, y (B, C, H, W), sigma (B, 1, 1, 1).

    A function of (seed, step) only, so that a resumed run, another micro-batch or another number of processes
    sees the same noise. Every process draws the whole batch's noise and uses its share.
    """
    x = to_batch(pictures_x[rows], device)
    generator = seeded(device, seed, 1, step)
    sigma = draw_sigma(len(x), sigma_max, generator)
    # drawn with the channels last, as x lies in memory; contiguous normals are several times faster to draw
    z = torch.randn(len(x), *x.shape[2:], x.shape[1], generator=generator, device=device).permute(0, 3, 1, 2)
    return x, torch.addcmul(x, sigma, z), sigma


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The seeded permutation of 0 … n−1 in which an epoch visits the training pictures."""
    return np.random.default_rng((seed, 2, epoch)).permutation(n)


def batch_rows(train, step, batch, seed):
    """Rows of global batch `step`: epochs laid end to end and cut: every picture counts equally."""
    first, rows = step * batch, []
    while len(rows) < batch:
        epoch, offset = divmod(first + len(rows), len(train))
        rows.extend(train[epoch_order(len(train), seed, epoch)[offset:offset + batch - len(rows)]])
    return np.array(rows)


def accumulate_gradient(model, x, y, batch, micro_batch, precision="fp32", stop=lambda: False):
    """Add ∇ of Eq. 1, summed over pixels and averaged over `batch` pictures, micro-batch by micro-batch.

    x, y: (B, C, H, W), this process's share. Returns the loss of each picture (≤ B,) in the unit of pixels²;
    fewer than B if `stop()` became true.
    """
    losses = []
    for i in range(0, len(x), micro_batch):
        if stop():
            break
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            x_hat = model(y[i:i + micro_batch])
        loss = (x_hat.float() - x[i:i + micro_batch]).square().sum((1, 2, 3))      # ‖x − x̂(x_σ)‖², Eq. 1
        (loss.sum() / batch).backward()
        losses.append(loss.detach())
    return torch.cat(losses) if losses else x.new_zeros(0)


def agree(numbers, device, op=dist.ReduceOp.SUM):
    """A few numbers, summed (or by `op`) over all processes, so that all of them decide alike."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def sum_gradients(model):
    """Sum the gradients over all processes, in place and in one message."""
    if dist.is_initialized():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, g, part in zip(model.parameters(), grads, flat.split([g.numel() for g in grads])):
            p.grad = g.copy_(part.view_as(g))


@torch.no_grad()
def initialise(model, y, mean):
    """One data-dependent pass: every LayerNorm scaled and shifted, and x̂ set to the mean colour.

    y: (N, C, H, W), noisy: each channel of each LayerNorm gets mean 0 and variance 1 over it. mean: (C,).
    With PyTorch's own initialisation all channels of M start almost alike, and φ stays a constant for more
    than 100,000 pictures. The output starts at the mean colour because Adam remembers the size of the first
    gradients for a thousand steps: 300 steps of 32 photos then give 21.9 dB at σ = 0.1, and 19.8 dB without.
    """
    def whiten(norm, inputs, _):
        a = F.group_norm(inputs[0], 1, eps=norm.eps)
        norm.weight.copy_(1 / a.std((0, 2, 3)).clamp_min(1e-3))
        norm.bias.copy_(-a.mean((0, 2, 3)) * norm.weight)
        return F.group_norm(inputs[0], 1, norm.weight, norm.bias, norm.eps)

    hooks = [m.register_forward_hook(whiten) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    model(y)
    for hook in hooks:
        hook.remove()
    last = model.blocks["D1"][-1]
    last.weight.zero_()
    last.bias.copy_(torch.as_tensor(mean))


def learning_rate(progress):
    """Adam's step size after a fraction of the run: 1e-3, halved every tenth (A.3: 100 of 1000 epochs)."""
    return 1e-3 * 0.5 ** min(9, int(10 * progress))


SIGMAS = 0.05, 0.1, 0.2, 0.3, 0.5, 1.0         # noise levels of the evaluation


@torch.no_grad()
def evaluate(model, x, micro_batch, sigma_max=1.0, precision="fp32"):
    """Held-out PSNR, 10 log₁₀(1 / mean squared error), at each σ: {σ: dB}. The same noise always.

    x: (N, C, H, W). The mean is over pictures and pixels.
    """
    psnr = {}
    for k, sigma in enumerate(s for s in SIGMAS if s <= sigma_max):
        generator, error = seeded(x.device, 3, k), 0.0
        for i in range(0, len(x), micro_batch):
            clean = x[i:i + micro_batch]
            y = clean + sigma * torch.randn(clean.shape, generator=generator, device=x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                x_hat = model(y)
            error += (x_hat.float() - clean).square().sum().item()
        psnr[sigma] = -10 * math.log10(max(error, 1e-30) / x.numel())
    return psnr


def save_checkpoint(path, checkpoint):
    """Write to a temporary file, then move it into place: a kill leaves the old or the new file whole.

    Raises UserError when the disk is full or the folder is not writable; the old file is intact then.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch's writer turns some failed writes into RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        earlier = "the last save is intact" if os.path.exists(path) else "there is no earlier save"
        raise UserError(f"{path}: could not be saved ({str(error).splitlines()[0]}); {earlier}") from None


# Running

def duration(seconds):
    """45 s, 12.3 min, 5.1 h, 31 days."""
    for unit, length, limit in ("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800):
        if seconds < limit:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def peak_memory(device):
    """Peak memory in GiB: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":
        return math.nan        # no `resource` there, and no other way to ask
    import resource
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20            # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def fitting_micro_batch(flags, device):
    """Pictures whose activations fit: 256 MiB on a CPU (more is no faster), half of a GPU's free memory."""
    width, levels, size = flags["width"], flags["levels"], flags["size"]
    # per level 8 layers, each kept before and after its normalisation, and three maps' worth of concatenation
    layers = sum(19 * width * 2 ** k * (size // 2 ** k) ** 2 for k in range(levels))
    layers += 6 * width * 2 ** levels * (size // 2 ** levels) ** 2
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 ** 28
    return max(1, room // (4 * layers))


class Progress:
    """The status line (rewritten on a terminal, a plain line now and then elsewhere) and what it needs."""

    def __init__(self, flags, pictures, total, limit, seen, device):
        self.flags, self.pictures, self.total, self.limit, self.device = flags, pictures, total, limit, device
        self.first, self.start, self.shown = seen, time.time(), 0.0
        self.loss, self.psnr, self.announced, self.line_open = None, {}, False, False
        self.quiet = dist.is_initialized() and dist.get_rank() > 0

    def rate(self, seen):
        """Images/s since the start of this process."""
        return (seen - self.first) / (time.time() - self.start)

    def left(self, seen, elapsed):
        """Seconds left, by the rate so far."""
        return max(0, min(self.limit - elapsed, (self.total - seen) / max(self.rate(seen), 1e-9)))

    def update(self, seen, elapsed):
        """After every micro-batch: `seen` pictures trained on in all, `elapsed` seconds over all sessions."""
        if self.quiet or seen == self.first:
            return
        if not self.announced and time.time() - self.start > 8:
            self.announced = True
            self.say(f"expected      {duration(self.left(seen, elapsed))} at {self.rate(seen):.1f} images/s")
            if self.left(seen, elapsed) > 86400:
                data = f"--data {self.flags['data']} " if self.flags["data"] else ""
                self.say(f"              this machine in ten minutes: python train.py {data}"
                         f"--size 32 --width 16 --batch 32 --minutes 10 --out small.pt")
        terminal = sys.stdout.isatty()
        if time.time() - self.shown < (0.5 if terminal else 15):
            return
        self.shown = time.time()
        fraction = max(seen / self.total, elapsed / self.limit)
        line = (f"{100 * fraction:5.1f} %  epoch {seen / self.pictures:.2f}  "
                + (f"loss {self.loss:.2f}  held-out PSNR " if self.psnr and self.loss else "")
                + " ".join(f"{v:.1f} dB (σ {k:g})" for k, v in self.psnr.items() if k in (0.1, 0.5))
                + f"  {self.rate(seen):.0f} images/s  {duration(self.left(seen, elapsed))} left  "
                f"{peak_memory(self.device):.1f} GiB")
        columns = shutil.get_terminal_size().columns - 1
        if terminal:
            print("\r" + line[:columns].ljust(columns), end="", flush=True)
        else:
            print(line, flush=True)
        self.line_open = terminal

    def say(self, line):
        """A line that stays."""
        if not self.quiet:
            print(("\n" if self.line_open else "") + line, flush=True)
            self.line_open = False


def training_data(flags):
    """(Pictures, training rows, held-out rows) for the flags of a run. Errors: as `load_pictures`."""
    pictures = load_pictures(flags["data"], flags["size"], flags["channels"], flags["patches"])
    train_rows, held_out = split(pictures, flags["val"], flags["seed"])
    train_rows = training_part(pictures, train_rows, flags["subset"], flags["limit"], flags["seed"])
    return pictures, train_rows, held_out


def train(flags, out, device="cpu", resume=None, micro_batch=None, compiled=False, save_every=None,
          stop=lambda: False):
    """Minimise Eq. 1 as A.3 does; writes `out`, its .jsonl and its .png. Returns True if the run is complete.

    flags: what defines the run, as `resolve` returns it. resume: a checkpoint's dict to go on from.
    save_every: seconds between evaluations, each with a save. stop: asked between micro-batches; the run then
    saves and returns. Raises UserError for unusable data, a loss that is not finite, and a checkpoint that
    cannot be written.
    """
    device, seed, batch, precision = torch.device(device), flags["seed"], flags["batch"], flags["precision"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    architecture = {k: flags[k] for k in ("width", "channels", "levels")}
    pictures, rows, held_out = training_data(flags)
    if resume and resume["fingerprint"] != pictures.fingerprint:
        raise UserError(f"--data {flags['data']}: these are not the pictures that {out} was trained on")
    x_val = to_batch(pictures.x[held_out[:256]], device)
    mean = [float(np.mean([pictures.x[i, :, :, c].mean() for i in rows[:10_000]]) / 255)  # the mean colour m
            for c in range(flags["channels"])]

    torch.manual_seed(seed)                    # the same weights on every process
    model = UNet(**architecture).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=device.type in ("cpu", "cuda"))
    step, elapsed = 0, 0.0
    if resume:
        model.load_state_dict(resume["weights"])
        optimizer.load_state_dict(resume["optimizer"])
        step, elapsed = resume["step"], resume["elapsed"]
    elif flags["init"] == "data":
        first = batch_rows(rows, 0, min(batch, 64), seed)
        initialise(model, noisy_batch(pictures.x, first, 0, seed, flags["sigma_max"], device)[1], mean)
    for p in model.parameters() if world > 1 else ():
        dist.broadcast(p.data, 0)
    forward = torch.compile(model) if compiled else model
    micro = min(batch, micro_batch or fitting_micro_batch(flags, device))

    total = math.inf if flags["epochs"] is None else math.ceil(flags["epochs"] * len(rows) / batch)  # steps
    limit = math.inf if flags["minutes"] is None else 60 * flags["minutes"]  # seconds
    progress = Progress(flags, len(rows), total * batch, limit, step * batch, device)
    if step >= total or elapsed >= limit:
        progress.say(f"{out}: already complete ({step} steps, {duration(elapsed)}); a larger --epochs or "
                     f"--minutes makes it longer")
        return True
    describe(progress, model, pictures, rows, held_out, micro, world, step)
    start, psnr, losses, evaluated, unsaved = time.time() - elapsed, {}, [], time.time(), None
    mode = "a" if resume else "w"              # of the .jsonl
    share = slice(rank * batch // world, (rank + 1) * batch // world)
    while True:
        fraction = max(step / total, elapsed / limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction)
        batch_of_rows = batch_rows(rows, step, batch, seed)
        x, y, sigma = noisy_batch(pictures.x, batch_of_rows, step, seed, flags["sigma_max"], device)
        done = iter(range(0, batch + micro * world, micro * world))

        def between():
            progress.update(step * batch + min(next(done), batch), time.time() - start)
            return stop() or time.time() - start >= limit

        optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradient(forward, x[share], y[share], batch, micro, precision, between)
        total_loss, cut = agree([loss.sum().item(), len(loss) < share.stop - share.start], device)
        if not math.isfinite(total_loss):
            bad = sigma[share].flatten()[:len(loss)][~loss.isfinite()]
            raise UserError(f"the loss is not finite at step {step}"
                            + (f", σ {bad.min():.3f} to {bad.max():.3f}" if len(bad) else "")
                            + f"; the last save of {out} is as it was. Try another --seed or fp32")
        if not cut:                            # a step cut short is dropped, and done again on --resume
            sum_gradients(model)
            optimizer.step()
            step += 1
            losses.append(total_loss / batch)
        elapsed, stopped = agree([time.time() - start, stop()], device, dist.ReduceOp.MAX)
        complete = step >= total or elapsed >= limit
        every = save_every or min(300, max(15, (elapsed + progress.left(step * batch, elapsed)) / 20))
        if not (stopped or complete or time.time() - evaluated > every):
            continue

        if rank == 0:
            if not stopped:                    # Ctrl-C and SIGTERM save at once
                psnr = evaluate(model, x_val, micro, flags["sigma_max"], precision)
            if not all(p.isfinite().all() for p in model.parameters()):
                raise UserError(f"the weights are not finite after step {step}; {out} is as it was")
            progress.loss, progress.psnr = float(np.mean(losses)) if losses else None, psnr
            record = dict(step=step, epoch=step * batch / len(rows), pictures_seen=step * batch,
                          loss=progress.loss, psnr=psnr, lr=learning_rate(fraction), minutes=elapsed / 60,
                          images_per_second=progress.rate(step * batch), memory_gib=peak_memory(device))
            try:
                save_checkpoint(out, dict(
                    format=FORMAT, model=architecture, weights=model.state_dict(),
                    optimizer=optimizer.state_dict(), size=flags["size"], sigma_max=flags["sigma_max"],
                    mean=mean, flags=flags, step=step, elapsed=elapsed, fingerprint=pictures.fingerprint,
                    training={**record, "training_pictures": len(rows), "device": str(device)}))
                with open(Path(out).with_suffix(".jsonl"), mode) as f:
                    f.write(json.dumps(record) + "\n")
                mode = "a"
                if psnr:
                    draw_evaluation(model, x_val[:8], psnr).save(Path(out).with_suffix(".png"))
                unsaved = None
            except (UserError, OSError) as error:          # go on: there may be room at the next save
                unsaved = UserError(error)
                progress.say(str(error))
        losses, evaluated = [], time.time()
        if stopped or complete:
            break
    if unsaved:
        raise unsaved
    progress.say(f"{'complete' if complete else 'stopped'} after {step} steps, {duration(elapsed)}; "
                 "held-out PSNR "
                 + (", ".join(f"{v:.2f} dB (σ {k:g})" for k, v in psnr.items()) or "not measured")
                 + f"\nwrote {out}, {Path(out).with_suffix('.jsonl')}, {Path(out).with_suffix('.png')}"
                 + ("" if complete else f"; go on with: python train.py --out {out} --resume"))
    return complete


def describe(progress, model, pictures, rows, held_out, micro, world, step):
    """Say at the start what will be done, with what."""
    flags, size, sees = progress.flags, progress.flags["size"], receptive_field(model.levels)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    processes = f"{world} process{'es' * (world > 1)}"
    progress.say(f"device        {progress.device}, {processes}, {flags['precision']}\n"
                 f"network       width {model.width}, {model.levels} levels, "
                 f"{parameters:.2f} M parameters; M sees {sees}×{sees} pixels"
                 + ("" if sees >= size else ", less than the picture: φ will be local") +
                 f"\npictures      {len(rows)} to train on, {len(held_out)} held out, {size}×{size}×"
                 f"{model.channels}, {len(pictures.classes)} classes, {len(pictures.skipped)} files skipped")
    for line in pictures.skipped[:3]:
        progress.say(f"  skipped     {line}")
    budget = [f"{flags['epochs']:g} epochs"] if flags["epochs"] else []
    budget += [f"{flags['minutes']:g} minutes"] if flags["minutes"] else []
    progress.say(f"batch         {flags['batch']} in micro-batches of {micro}\n"
                 f"run           {' or '.join(budget)}" + (f", resumed at step {step}" if step else ""))


@torch.no_grad()
def draw_evaluation(model, x, psnr):
    """ckpt.png: held-out pictures clean, noisy and denoised at several σ, and output PSNR against input PSNR.

    x: (8, C, H, W). Returns a PIL image.
    """
    levels = [s for s in (0.1, 0.3, 0.5, 1.0) if s in psnr]
    rows = [("clean", x)]
    for k, sigma in enumerate(levels):
        y = x + sigma * torch.randn(x.shape, generator=seeded(x.device, 4, k), device=x.device)
        rows += [(f"noise {sigma:g}", y), ("denoised", model(y))]
    tile, gap, left, side = 64 * max(1, round(x.shape[2] / 64)), 2, 90, 380
    font = ImageFont.load_default(15)
    height = max(len(rows) * (tile + gap) + 10, side + 20)
    sheet = Image.new("RGB", (left + len(x) * (tile + gap) + side + 20, height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows):
        draw.text((6, 5 + r * (tile + gap) + tile / 2), name, "black", font, anchor="lm")
        for c, picture in enumerate(pictures.float().cpu()):
            pixels = to_uint8(picture.permute(1, 2, 0).numpy())
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
            corner = left + c * (tile + gap), 5 + r * (tile + gap)
            sheet.paste(image.resize((tile, tile), Image.NEAREST), corner)
    curve = [(-20 * math.log10(s), v) for s, v in sorted(psnr.items(), reverse=True)]
    x0, y0, w = left + len(x) * (tile + gap) + 60, 15, side - 70
    top = 5 * math.ceil(max([30] + [v for _, v in curve]) / 5)
    place = lambda a, b: (x0 + a / 30 * w, y0 + w - b / top * w)       # input PSNR 0 … 30 dB
    for v in range(0, 31, 5):
        draw.line([place(v, 0), place(v, top)], "#dddddd")
        draw.text(place(v, 0), str(v), "black", font, anchor="ma")
    for v in range(0, top + 1, 5):
        draw.line([place(0, v), place(30, v)], "#dddddd")
        draw.text((x0 - 6, place(0, v)[1]), str(v), "black", font, anchor="rm")
    draw.line([place(0, 0), place(30, 30)], "#888888")
    draw.text(place(20, 18), "noisy", "#666666", font, anchor="la")
    draw.line([place(a, b) for a, b in curve], "#0072b2", width=3)
    for point in curve:
        px, py = place(*point)
        draw.ellipse([px - 4, py - 4, px + 4, py + 4], "#0072b2")
    draw.text((x0 + w / 2, y0 + w + 24), "input PSNR (dB)", "black", font, anchor="ma")
    draw.text((x0 + 6, y0 + 4), "output PSNR (dB), held out", "black", font)
    return sheet


def bench(flags, micro_batch, device, seconds=20):
    """Print images/s of a training step, of its bare convolutions (both ways), and of φ; and peak memory.

    They are timed in turn, again and again: other work on the machine slows all alike. Printed are medians,
    for the ratios those over the rounds.
    """
    device, size, channels = torch.device(device), flags["size"], flags["channels"]
    model = UNet(flags["width"], channels, flags["levels"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=device.type in ("cpu", "cuda"))
    micro = min(flags["batch"], micro_batch or fitting_micro_batch(flags, device))
    batch = min(flags["batch"], 4 * micro)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, channels), np.uint8)
    calls = []

    def record(conv, inputs, output):          # shapes and memory layout as in the network
        a = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)
        calls.append((conv, a, torch.randn_like(output)))

    hooks = [m.register_forward_hook(record) for m in model.modules()
             if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    model(to_batch(pixels[:micro], device))
    for hook in hooks:
        hook.remove()

    def training_step():
        x, y, _ = noisy_batch(pixels, np.arange(batch), 0, 0, 1.0, device)
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(model, x, y, batch, micro, flags["precision"])
        optimizer.step()

    def bare_convolutions():
        for conv, a, gradient in calls:
            a.grad = None
            with torch.autocast(device.type, torch.bfloat16, enabled=flags["precision"] == "bf16"):
                out = conv(a)
            out.backward(gradient.to(out.dtype))
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward_pass():
        model(x_micro)

    def half_pass():
        phi(model, x_micro, 0.3)

    def repeat(f, n):
        f()                                    # untimed: what ran before has emptied the caches
        start = time.perf_counter()
        for _ in range(n):
            f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / n

    x_micro = to_batch(pixels[:micro], device)
    images = {training_step: batch, bare_convolutions: micro, forward_pass: micro, half_pass: micro}
    turns = {f: max(1, int(0.25 / repeat(f, 1))) for f in images}
    times, end = {f: [] for f in images}, time.time() + seconds
    while time.time() < end or len(times[half_pass]) < 3:
        for f in images:
            times[f].append(repeat(f, turns[f]) / images[f])
    step, convolutions, full, half = (1 / np.median(times[f]) for f in images)
    ratio = lambda f, g: np.median(np.divide(times[g], times[f]))              # round by round
    of_convolutions, of_forward = ratio(training_step, bare_convolutions), ratio(half_pass, forward_pass)
    print(f"width {flags['width']}, {size}×{size}, {flags['levels']} levels, batch {batch}, "
          f"micro-batch {micro}, {flags['precision']}, {device}, {len(times[half_pass])} rounds\n"
          f"training step      {step:10.1f} images/s\n"
          f"bare convolutions  {convolutions:10.1f} images/s   training step / these {of_convolutions:.2f}\n"
          f"full forward pass  {full:10.1f} images/s\n"
          f"phi                {half:10.1f} images/s   phi / forward pass {of_forward:.2f}\n"
          f"peak memory        {peak_memory(device):10.2f} GiB")


# Command line

PAPER = dict(size=64, width=64, batch=1024, epochs=1000.0, minutes=None)              # A.1 – A.3
PRESET = dict(size=32, width=16, batch=32, epochs=None, minutes=10.0)                 # without --data
COMMON = dict(data=None, channels=3, levels=None, patches=False, val=0.05, seed=0, subset=None, limit=None,
              sigma_max=1.0, init="data", precision="fp32")


def number(kind, low, high=math.inf):
    """An argparse type: `kind` in [low, high] (low excluded for floats)."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high) or (kind is float and value == low):
            least = "above" if kind is float else "at least"
            raise argparse.ArgumentTypeError(f"{text}: must be {least} {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))
        return value
    parse.__name__ = "integer" if kind is int else "number"
    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no guessing of shortened flags."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def arguments():
    """The command line. Flags that define the run default to None: --resume must see which were given."""
    parser = Parser(description=__doc__)
    add, whole = parser.add_argument, number(int, 1)
    data = parser.add_argument_group("pictures")
    data.add_argument("--data", metavar="PATH",
                      help="a folder (any depth), a .npy or .npz of uint8 pictures, a "
                      "folder of ImageNet64 .npz batches, disc, or calpha:A (default: built-in pictures)")
    data.add_argument("--size", type=whole,
                      help="side in pixels; a multiple of 2^levels (default: 64; built-in 32)")
    data.add_argument("--channels", type=int, choices=(1, 3),
                      help="gray or colour (default: 3; disc and calpha 1)")
    data.add_argument("--patches", action="store_true", default=None,
                      help="cut each picture into size×size tiles instead of cropping and resizing it")
    data.add_argument("--val", type=number(float, 0, 0.9),
                      help="fraction held out, at most 2000 (default: 0.05)")
    data.add_argument("--subset", choices=("first", "second"),
                      help="one half of the training pictures (paper B)")
    data.add_argument("--limit", type=whole, help="at most this many training pictures (paper B)")
    run = parser.add_argument_group("network and training")
    run.add_argument("--width", type=whole, help="channels of E1 (default: 64; built-in 16)")
    run.add_argument("--levels", type=number(int, 1, 8),
                     help="encoder blocks (default: the smallest number with which M sees the whole picture)")
    run.add_argument("--sigma-max", type=number(float, 0, 100),
                     help="largest σ, pictures in [0, 1] (default: 1)")
    run.add_argument("--batch", type=whole,
                     help="pictures a step, over all processes (default: 1024; built-in 32)")
    run.add_argument("--epochs", type=number(float, 0),
                     help="default: 1000; no limit with --minutes or built-in")
    run.add_argument("--minutes", type=number(float, 0),
                     help="end after so many minutes, the schedule stretched to fit (built-in: 10)")
    run.add_argument("--init", choices=("data", "plain"),
                     help="one data-dependent pass over the normalisations, or PyTorch's (default: data)")
    run.add_argument("--precision", choices=("fp32", "bf16"),
                     help="bf16: automatic mixed precision (default: fp32)")
    run.add_argument("--seed", type=number(int, 0, 2 ** 31),
                     help="of split, order, noise and weights (default: 0)")
    add("--out", default="ckpt.pt", metavar="FILE", help="checkpoint to write (default: ckpt.pt)")
    add("--resume", action="store_true", help="go on with --out exactly where it was saved")
    add("--force", action="store_true", help="overwrite --out")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--micro-batch", type=whole,
        help="pictures at a time; changes nothing but memory and speed (default: what fits)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-every", type=number(float, 0, 300), metavar="SECONDS",
        help="evaluate and save so often (default: a twentieth of the run, 15 to 300)")
    add("--bench", action="store_true", help="only measure speed at this size")
    return parser, vars(parser.parse_args())


def resolve(given, resume=None, path=""):
    """Complete the flags that define a run: those given, then (resuming) the checkpoint's, then the defaults.

    Raises UserError, naming the flag, for one that contradicts the checkpoint or another flag. --epochs and
    --minutes may lengthen a resumed run.
    """
    given = {k: given[k] for k in {**COMMON, **PAPER} if given[k] is not None}
    if resume:
        saved = resume["flags"]
        for key, value in given.items():
            longer = key in ("epochs", "minutes") and (saved[key] or 0) <= value
            moved = key == "data" and saved[key] is not None  # train() compares the pictures themselves
            if value != saved[key] and not longer and not moved:
                raise UserError(f"--{key.replace('_', '-')} {value} contradicts {path}, trained with "
                                f"{saved[key]}; leave it out to go on, or give another --out")
        if given.keys() & {"epochs", "minutes"}:           # the new budget replaces the old one
            saved = {**saved, "epochs": None, "minutes": None}
        return {**saved, **given}
    builtin = given.get("data") is None or given["data"] == "disc" or given["data"].startswith("calpha:")
    flags = {**COMMON, **(PRESET if builtin else PAPER)}
    if builtin and "data" in given:
        flags["channels"] = 1
    if "minutes" in given or "epochs" in given:            # one given budget replaces the default one
        flags |= dict(epochs=None, minutes=None)
    flags |= given
    if flags["levels"] is None:
        flags["levels"] = next(n for n in range(1, 9) if receptive_field(n) >= min(flags["size"], 700))
    if flags["size"] % 2 ** flags["levels"]:
        raise UserError(f"--size {flags['size']}: must be a multiple of {2 ** flags['levels']} "
                        f"(2^levels, levels = {flags['levels']})")
    return flags


def choose_device(name):
    """A torch.device that works: the one named, or CUDA, MPS, CPU in this order. Raises UserError."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here") from None
    return device


def main():
    """The command line's work; returns the exit code."""
    parser, given = arguments()
    out, device = given["out"], choose_device(given["device"])
    if given["bench"]:
        bench(resolve(given), given["micro_batch"], device)
        return 0
    if given["resume"] and given["force"]:
        raise UserError("--resume and --force: choose one")
    if os.path.exists(out) and not (given["resume"] or given["force"]):
        raise UserError(f"{out} exists: --resume goes on with it, --force overwrites it, --out names another")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise UserError(f"--out {out}: no such folder")
    resume = load_checkpoint(out)[1] if given["resume"] else None
    flags = resolve(given, resume, out)
    if "RANK" in os.environ:                               # started by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stop = []

    def on_signal(number, _):
        stop.append(number)
        if "RANK" not in os.environ:           # the second one kills; torchrun itself sends several
            signal.signal(number, signal.SIG_DFL)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, on_signal)
    if int(os.environ.get("RANK", 0)) == 0:
        if given["data"] is None and not resume:
            print("no --data: built-in pictures, small preset (32×32, width 16, batch 32, 10 minutes)")
        if given["levels"] is None and not resume:
            print(f"levels        {flags['levels']}: the fewest with which M sees {flags['size']} pixels")
    train(flags, out, device, resume, given["micro_batch"], given["compile"], given["save_every"],
          stop=lambda: bool(stop))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
