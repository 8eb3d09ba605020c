"""Every figure of the paper for a trained network, and a verdict on every claim (paper A: §2.2–3, App. B).

    python analyze.py ckpt.pt                              # the held-out pictures of its training -> figures/
    python analyze.py ckpt.pt --data photos --images 10000
    python analyze.py ckpt.pt --only sparsity stability    # two of the analyses
    python analyze.py ckpt.pt --only attributes --pictures cat.jpg dog.jpg
    torchrun --nproc_per_node=8 analyze.py ckpt.pt --data photos.npy --images 1300000

It writes one PNG a figure, results.json (every number behind them), and phi.npz, which kmeans.py reads.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from kmeans import KMeans, contingency, normalised_mutual_information, purity
from sample import (beside, conditional_distance, guidance_step, panel, reconstruct, sample_unconditional,
                    save_image, similarities, status, target_phi, to_image)
from train import (Parser, checkpoint_pictures, choose_device, duration, evaluate, initialise, load_picture,
                   number, seeded, to_batch)
from unet import UNet, UserError, load_checkpoint, phi

BATCH = 128               # pictures at a time; their noise depends on it, so it is no flag
DETAIL = 256              # pictures for what needs the whole network at many noise levels
POOL = 4000               # pictures for what compares all with all
SIGMAS = 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0            # of Fig. 2


class Skip(Exception):
    """An analysis that these pictures do not allow; the text says why."""


class Study:
    """What every analysis is given: a network, pictures (n of them), and their φ at every noise level.

    x: all pictures of the data set, (N, H, W, C) uint8; rows: (n,) those to analyse; labels: (n,) class or
    −1; phi: {σ: (n, d) float32 on the CPU}; sigma: the noise level of everything that needs just one.
    train, held_out: rows of x on either side of the checkpoint's split, None if these are other pictures.
    """

    def __init__(self, model, checkpoint, x, rows, labels=None, sigmas=(0.3,), draws=20, seed=0, device="cpu",
                 train=None, held_out=None, clusters=None, given=None, steps=40, pairs=40):
        self.model, self.checkpoint, self.x, self.rows = model, checkpoint, x, rows
        self.labels = np.full(len(rows), -1) if labels is None else labels
        self.sigma, self.sigmas, self.draws, self.seed, self.device = sigmas[0], sigmas, draws, seed, device
        self.train, self.held_out, self.clusters, self.given = train, held_out, clusters, given
        self.steps, self.pairs, self.phi = steps, pairs, {}

    def pictures(self, i):
        """Pictures i (indices into `rows`) as (len(i), C, H, W) in [0, 1] on the device."""
        return to_batch(self.x[self.rows[i]], self.device)

    def choose(self, n, *words):
        """n different pictures (or all), drawn from the seed and `words`, in increasing order."""
        rng = np.random.default_rng((self.seed, *words))
        return np.sort(rng.permutation(len(self.rows))[:n])

    def generator(self, *words):
        """Noise on the study's device that depends on the seed and `words` alone."""
        return seeded(self.device, self.seed, *words)

    @functools.cached_property
    def mean(self):
        """The mean colour m of the training pictures, (C,), on the device."""
        return torch.as_tensor(self.checkpoint["mean"], dtype=torch.float32, device=self.device)

    @functools.cached_property
    def blocks(self):
        """{σ: {block: (ā_in, ā_out)}} of DETAIL pictures; σ = "again" is 0.5 with other noise."""
        return block_averages(self, self.choose(DETAIL, 11))

    @functools.cached_property
    def selectivity(self):
        """PR of every channel over the pictures, (d,), NaN if it is always silent (§2.4)."""
        return participation_ratio(self.phi[self.sigma].double(), 0).numpy()

    @functools.cached_property
    def threshold(self):
        """Channels of smaller PR are called specialised, the others common: Otsu's threshold."""
        return otsu(self.selectivity[np.isfinite(self.selectivity)])

    def channels(self):
        """(specialised, common): indices of channels, each from the most to the least selective."""
        order = np.argsort(self.selectivity)
        order = order[np.isfinite(self.selectivity[order])]
        low = self.selectivity[order] < self.threshold
        return order[low], order[~low]


# φ of all pictures, in a stream

def compute_phi(model, x, rows, sigmas, draws, seed, device):
    """φ(x_σ) of pictures `rows` of x (N, H, W, C) uint8: (len(sigmas), n, d) float32 on the CPU, or None.

    Under torchrun every process does a share of the batches and process 0 gathers them; the others get None.
    The noise of a batch depends on the seed, σ and its place alone: any number of processes gives the same φ,
    and memory beyond φ is that of one batch.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(0, len(rows), BATCH)
    first = [len(starts) * r // world for r in range(world + 1)]               # each process's first batch
    room = max(b - a for a, b in zip(first, first[1:])) * BATCH
    mine = torch.zeros(len(sigmas), room, model.width * 2 ** model.levels)
    tick = ticker("phi", (first[rank + 1] - first[rank]) * BATCH, "pictures")
    for k, a in enumerate(starts[first[rank]:first[rank + 1]]):
        batch = to_batch(x[rows[a:a + BATCH]], device)
        for out, sigma in zip(mine, sigmas):
            generator = seeded(device, seed, 5, round(1e6 * sigma), a)
            code = phi(model, batch, sigma, draws if sigma else 1, generator)
            out[k * BATCH:k * BATCH + len(batch)] = code.cpu()
        tick((k + 1) * BATCH)
    if world == 1:
        return mine[:, :len(rows)]
    parts = [torch.empty_like(mine) for _ in range(world)] if rank == 0 else None
    dist.gather(mine, parts)
    if rank:
        return None
    return torch.cat([p[:, :(b - a) * BATCH] for p, a, b in zip(parts, first, first[1:])], 1)[:, :len(rows)]


def cached_phi(path, key, paths, labels, compute):
    """φ from the file `path` if it was made for the same `key` (a dict), else from `compute`, then saved.

    Returns {σ: (n, d)}, or None in the processes other than the first. Raises UserError if the file is not
    one of ours: it is then left alone.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    saved, words = None, json.dumps(key, sort_keys=True)
    if leads and os.path.exists(path):
        try:
            with np.load(path) as file:
                if str(file["key"]) == words:
                    saved = np.concatenate([file["phi"][None], file["other_phi"]])
        except Exception:                      # numpy raises nearly anything for a file that is not its own
            raise UserError(f"{path}: exists, but was not written by analyze.py; --out names another "
                            f"folder") from None
        print(f"{path}: " + ("phi is already there" if saved is not None else
                             "of another network, other pictures or settings; computed anew"))
    found = [saved is not None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0]:
        return dict(zip(key["sigmas"], torch.from_numpy(saved))) if leads else None
    values = compute()
    if not leads:
        return None
    if not values.isfinite().all():
        raise UserError("phi is not finite; is the checkpoint damaged?")
    temporary = path + ".tmp.npz"
    np.savez(temporary, phi=values[0].numpy(), other_phi=values[1:].numpy(), sigma=np.array(key["sigmas"]),
             paths=np.array(paths), labels=labels, checkpoint=key["checkpoint"], key=words)
    os.replace(temporary, path)
    return dict(zip(key["sigmas"], values))


# Measures

def participation_ratio(v, dim=-1):
    """PR(v) = ‖v‖₁² / (d ‖v‖₂²) along `dim` (§2.2), in [1/d, 1]; NaN for v = 0."""
    return v.abs().sum(dim).square() / (v.shape[dim] * v.square().sum(dim))


def kurtosis(v):
    """E[(v − m)⁴] / s⁴ along dimension 0: 3 for a Gaussian, more for heavier tails; NaN for a constant."""
    v = v - v.mean(0)
    return (v ** 4).mean(0) / (v ** 2).mean(0) ** 2


def bimodality(v):
    """Sarle's coefficient (skewness² + 1) / kurtosis: 1 two points, 5/9 uniform, 1/3 Gaussian; 1-D array."""
    m2, m3, m4 = (((v - v.mean()) ** k).mean() for k in (2, 3, 4))
    return float((m3 ** 2 / m2 ** 3 + 1) / (m4 / m2 ** 2)) if m2 > 0 else math.nan


def otsu(v):
    """The threshold between two groups of a 1-D array with the least variance inside the groups (Otsu)."""
    v = np.sort(v)
    n = np.arange(1, len(v))
    low, total = np.cumsum(v)[:-1], v.sum()
    between = n * (len(v) - n) * (low / n - (total - low) / (len(v) - n)) ** 2
    k = int(between.argmax()) if len(n) else 0
    return float((v[k] + v[min(k + 1, len(v) - 1)]) / 2)


def ranks(v):
    """Ranks of a 1-D array, ties sharing their mean rank."""
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, where both are finite; NaN if one is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return math.nan
    return float(np.corrcoef(ranks(a[both]), ranks(b[both]))[0, 1])


def adjusted_rand_index(a, b):
    """Agreement of two partitions (n,): 1 the same, 0 as by chance (Hubert & Arabie 1985)."""
    pairs = lambda counts: float((counts * (counts - 1) / 2).sum())
    table = contingency(a, b)
    both, one, two = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = one * two / pairs(np.array([len(a)]))
    return 1.0 if one == two == chance else (both - chance) / ((one + two) / 2 - chance)


def mean_se(v):
    """(mean, its standard error) of a 1-D array."""
    v = np.asarray(v, float)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan


# §2.2, Denoising and channel sparsity (Fig. 1, 10)

@torch.no_grad()
def block_averages(study, chosen):
    """E_z[ā_j(x + σz)] at the input and output of every block: {σ: {block: ((m, d_in), (m, d_out))}}.

    For every σ of SIGMAS, the study's own, and "again", a second estimate at 0.5 with its own noise.
    """
    levels = sorted({*SIGMAS, *study.sigmas}) + ["again"]
    parts, tick = {level: [] for level in levels}, ticker("blocks", len(chosen) * len(levels), "pictures")
    for a in range(0, len(chosen), BATCH):
        x = study.pictures(chosen[a:a + BATCH])
        for k, level in enumerate(levels):
            sigma, total = 0.5 if level == "again" else level, None
            generator, draws = study.generator(6, k, a), study.draws if sigma else 1
            for _ in range(draws):
                z = torch.randn(x.shape, generator=generator, device=x.device)
                now = study.model.activations(x + sigma * z)
                total = now if total is None else {name: (total[name][0] + i, total[name][1] + o)
                                                   for name, (i, o) in now.items()}
            parts[level].append({name: (i / draws, o / draws) for name, (i, o) in total.items()})
            tick(len(levels) * a + (k + 1) * len(x))
    return {level: {name: tuple(torch.cat([p[name][side] for p in list_]).cpu() for side in (0, 1))
                    for name in list_[0]} for level, list_ in parts.items()}


def inner_blocks(study):
    """The blocks of Fig. 1 and 2 in running order: E1's input and D1's output are pictures, not features."""
    return [name for name in study.model.blocks if name not in ("E1", "D1")]


def sparsity(study, out):
    """Fig. 1, 10: PR of ā at the input and the output of every block, at several σ.

    PR of the mean over draws, one value a picture. The change is output minus input, its standard error over
    pictures. φ's PR is M's output over all pictures.
    """
    names, least = inner_blocks(study), min(0.05, study.sigma)
    levels = [s for s in study.blocks if s != "again" and s >= least]
    pr = {s: {b: [participation_ratio(v.double()).numpy() for v in study.blocks[s][b]] for b in names}
          for s in levels}
    main = pr[study.sigma]
    of_phi = participation_ratio(study.phi[study.sigma].double()).numpy()
    numbers = dict(
        pictures=len(main["M"][0]), sigma=study.sigma, sigmas=levels,
        pr_input={b: main[b][0] for b in names}, pr_output={b: main[b][1] for b in names},
        change={b: mean_se(main[b][1] - main[b][0]) for b in names},
        mean_input={b: [pr[s][b][0].mean() for s in levels] for b in names},
        mean_output={b: [pr[s][b][1].mean() for s in levels] for b in names},
        phi_pr=of_phi, phi_pr_mean=of_phi.mean(), phi_pr_sd=of_phi.std())
    plots = []
    for b in names:
        p = Axes((530, 400), (0, 1), None, "participation ratio", "pictures", b)
        p.histogram(main[b][0], 40, ORANGE, "input")
        p.histogram(main[b][1], 40, GREEN, "output")
        plots.append(p.image())
    span = min(levels), max(levels)
    curve = Axes((790, 560), span, (0, 1), "noise level sigma", "mean PR of the output", xlog=True)
    for b, color in zip(names, COLORS):
        curve.line(levels, numbers["mean_output"][b], color, b)
    change = Axes((790, 560), span, None, "noise level sigma", "PR, output - input", xlog=True)
    for b, color in zip(names, COLORS):
        change.line(levels, np.subtract(numbers["mean_output"][b], numbers["mean_input"][b]), color, b)
    change.line(span, [0, 0], GRAY)
    title = f"PR of the channel averages at sigma = {study.sigma:g}, {numbers['pictures']} pictures"
    save(stack([caption(title), in_rows(plots), in_rows([curve.image(), change.image()])]), out, "sparsity")
    return numbers


# §2.3, Robustness of representation to noise (Fig. 2, 11)

def stability(study, out):
    """Fig. 2, 11: cos(ā(σ₁ = 0.5), ā(σ₂)) at every block's output against σ₂; mean and spread over pictures.

    At σ₂ = 0.5 the two have different noise, so that the cosine shows what the draws leave open. `middle` is
    each picture's mean over σ₂ in [0.2, 2].
    """
    names, levels = inner_blocks(study), list(SIGMAS)
    names = ["E1", *names]
    cosine = {b: np.stack([F.cosine_similarity(
        study.blocks["again"][b][1], study.blocks[s][b][1], dim=1).numpy() for s in levels]) for b in names}
    inside = [0.2 <= s <= 2 for s in levels]
    middle = {b: cosine[b][inside].mean(0) for b in names}
    best = max((b for b in names if b != "M"), key=lambda b: middle[b].mean())
    amplitude = [float(study.blocks[s]["M"][1].norm(dim=1).mean()) for s in levels]
    numbers = dict(pictures=len(middle["M"]), sigma_1=0.5, sigma_2=levels,
                   mean={b: cosine[b].mean(1) for b in names}, sd={b: cosine[b].std(1) for b in names},
                   middle={b: mean_se(middle[b]) for b in names}, next_best=best,
                   lead=mean_se(middle["M"] - middle[best]), norm_of_phi=amplitude,
                   norm_at_0=amplitude[0] / amplitude[levels.index(0.5)])
    place = [max(s, 0.005) for s in levels]    # 0 has no place on a logarithmic axis
    p = Axes((1600, 800), (0.005, 3), (0, 1), "sigma_2 (leftmost point: 0)", "cosine to sigma_1 = 0.5",
             f"Stability of channel averages; band: one SD over {numbers['pictures']} pictures", xlog=True)
    for b, color in zip(names, COLORS):
        m, s = numbers["mean"][b], numbers["sd"][b]
        p.line(place, m, color, b, band=(m - s, m + s) if b == "M" else None, width=8 if b == "M" else 5)
    p.line([study.checkpoint["sigma_max"]] * 2, [0, 1], GRAY, "largest sigma in training")
    save(p.image(), out, "stability")
    return numbers


# §2.4, Denoising and channel selectivity (Fig. 3, 4, 12)

def top_pictures(study, channel, k=9):
    """The k pictures with the largest φ[channel], largest first."""
    v = study.phi[study.sigma][:, channel]
    return v.topk(min(k, len(v))).indices.numpy()


def need_channels(study):
    """(specialised, common), or Skip if all channels are alike."""
    special, common = study.channels()
    if not len(special) or not len(common):
        raise Skip("all channels of phi are equally selective; has the network been trained?")
    return special, common


def selectivity(study, out):
    """Fig. 3, 12: PR of every channel of φ over the data set; what excites the most and the least selective.

    Bimodality is Sarle's coefficient, its spread that of 200 bootstrap samples of the channels; 5/9 is the
    value of a uniform distribution. Specialised: PR below Otsu's threshold.
    """
    pr = study.selectivity[np.isfinite(study.selectivity)]
    special, common = need_channels(study)
    rng = np.random.default_rng((study.seed, 12))
    spread = np.nanstd([bimodality(rng.choice(pr, len(pr))) for _ in range(200)])
    shown = [*special[:4], *common[::-1][:2]]
    numbers = dict(pr=study.selectivity, silent=int(np.isnan(study.selectivity).sum()),
                   threshold=study.threshold, specialised=len(special), common=len(common),
                   bimodality=bimodality(pr), bimodality_sd=spread, shown=shown,
                   top={int(c): top_pictures(study, c) for c in shown})
    p = Axes((1600, 520), (0, 1), None, "participation ratio over the pictures", "channels of phi",
             f"{len(pr)} channels, {len(study.rows)} pictures; bimodality {numbers['bimodality']:.2f}")
    p.histogram(pr, 50, BLUE)
    p.line([study.threshold] * 2, p.ylim, RED, "threshold (Otsu)")
    panels = []
    for c in shown:
        title = f"{'specialised' if c in special else 'common'} {c}: PR {study.selectivity[c]:.2g}"
        pictures = panel(study.pictures(numbers["top"][c]), side=160, gap=4)
        panels.append(stack([caption(title, 24, 520), pictures]))
    save(stack([p.image(), in_rows(panels)]), out, "selectivity")
    return numbers


def attributes(study, out):
    """Fig. 4: pictures, the three specialised channels that each excites most, and what else excites those.

    A channel's response is divided by its root mean square over the data set: channels differ in scale.
    """
    special, _ = need_channels(study)
    code, size = study.phi[study.sigma], study.checkpoint["size"]
    if study.given:
        x = np.stack([load_picture(f, size, study.model.channels) for f in study.given])
        x, names = to_batch(x, study.device), study.given
        own = phi(study.model, x, study.sigma, study.draws, study.generator(13)).cpu()
    else:
        chosen = study.choose(3, 13)
        x, own, names = study.pictures(chosen), code[chosen], [f"picture {i}" for i in chosen]
    relative = (own / code.square().mean(0).sqrt())[:, special.copy()]
    numbers, rows = dict(pictures=[]), []
    for i, name in enumerate(names):
        value, at = relative[i].topk(min(3, len(special)))
        best = special[at.numpy()]
        numbers["pictures"].append(dict(name=str(name), channels=best, response=value,
                                        top=[top_pictures(study, c) for c in best]))
        cells = [stack([caption(os.path.basename(str(name)), 24, 380), to_image(x[i], 330)])]
        cells += [stack([caption(f"channel {c}, PR {study.selectivity[c]:.2g}", 24, 380),
                         panel(study.pictures(top_pictures(study, c)), side=110, gap=4)]) for c in best]
        rows.append(in_rows(cells, 4))
    title = "A picture, and what else excites the specialised channels that it excites most"
    save(stack([caption(title), *rows]), out, "attributes")
    return numbers


# §2.5, Denoising and emergent semantic similarity (Fig. 5, 14)

def nearest(code, queries, k):
    """Indices (q, k) of the k rows of code (n, d) nearest to its rows `queries` by cosine, nearest first."""
    unit = F.normalize(code, dim=1)
    cosine = unit[queries] @ unit.T
    cosine[torch.arange(len(queries)), torch.as_tensor(queries)] = -2          # not itself
    return cosine.topk(min(k, len(code) - 1), dim=1).indices.numpy()


def principal_components(v, k):
    """Coordinates (n, k) of v (n, D) along its k first principal directions, from the smaller Gram matrix."""
    v = (v - v.mean(0)).double()
    if len(v) <= v.shape[1]:
        values, vectors = torch.linalg.eigh(v @ v.T)
        return (vectors * values.clamp(min=0).sqrt())[:, -k:].flip(1).float()
    return (v @ torch.linalg.eigh(v.T @ v)[1][:, -k:].flip(1)).float()


def untrained_phi(study, chosen):
    """φ of the same network before its training (initialised as train.py does), (len(chosen), d)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        model = UNet(**study.checkpoint["model"]).to(study.device).eval()
    if study.checkpoint["flags"]["init"] == "data":
        x = study.pictures(chosen[:BATCH])
        sigma = torch.rand(len(x), 1, 1, 1, generator=seeded("cpu", study.seed, 14)).square().to(x.device)
        z = torch.randn(x.shape, generator=seeded("cpu", study.seed, 15)).to(x.device)
        initialise(model, x + study.checkpoint["sigma_max"] * sigma * z, study.checkpoint["mean"])
    return compute_phi(model, study.x, study.rows[chosen], [study.sigma], study.draws, study.seed,
                       study.device)[0]


def neighbours(study, out, k=10):
    """Fig. 5, 14: nearest pictures by cosine of φ and of pixels; class agreement; union of subspaces.

    Agreement: the share of the k nearest that are of the query's class, for φ, pixels, pixels minus their
    mean colour, PCA of the pixels at φ's dimension, and φ of the untrained network. Two groups: a picture
    drawn by seed with its 24 φ-neighbours, and the same for the picture of least cosine to it. `own` and
    `other` say how much of a group's φ (its energy) lies in the span of the three first singular vectors of
    its own group (without the picture itself) and of the other's.
    """
    if len(study.rows) < 10:
        raise Skip(f"{len(study.rows)} pictures are too few for neighbours")
    chosen = study.choose(POOL, 16)
    pixels = torch.cat([study.pictures(c).cpu() for c in np.array_split(chosen, len(chosen) // BATCH + 1)])
    labels, code, flat = study.labels[chosen], study.phi[study.sigma][chosen], pixels.flatten(1)
    centred = (pixels - pixels.mean((2, 3), keepdim=True)).flatten(1)
    spaces = {"phi": code, "pixels": flat, "pixels - mean colour": centred,
              f"PCA of pixels, {code.shape[1]}": principal_components(flat, code.shape[1])}
    numbers = dict(pool=len(chosen), k=k)
    queries = np.flatnonzero(labels >= 0)[:2000]
    if len(np.unique(labels[queries])) > 1:
        spaces["phi, untrained"] = untrained_phi(study, chosen)
        same = {s: (labels[nearest(v, queries, k)] == labels[queries][:, None]).mean(1)
                for s, v in spaces.items()}
        share = np.bincount(labels[labels >= 0]) / len(labels)
        numbers |= dict(agreement={s: mean_se(v) for s, v in same.items()}, chance=float((share ** 2).sum()),
                        lead={s: mean_se(same["phi"] - v) for s, v in same.items() if s != "phi"})
    unit = F.normalize(code, dim=1)
    first = int(np.random.default_rng((study.seed, 17)).integers(len(chosen)))
    targets = [first, int((unit @ unit[first]).argmin())]
    m = min(24, len(chosen) // 3)
    groups = {s: nearest(spaces[s], targets, m) for s in ("phi", "pixels")}
    members = [np.append(t, g) for t, g in zip(targets, groups["phi"])]
    energy = [[subspace_energy(code[a], code[b], a is b) for b in members] for a in members]
    numbers |= dict(groups=[chosen[g] for g in members], energy_own=[energy[0][0], energy[1][1]],
                    energy_other=[energy[0][1], energy[1][0]])
    special, common = study.channels()
    sheets = [stack([caption(f"nearest in {s}", 26, 780),
                     panel(pixels[groups[s][i]][:8], pixels[[t]], side=250, gap=6)])
              for i, t in enumerate(targets) for s in ("phi", "pixels")]
    rows = [caption("Two pictures (framed) and their nearest by cosine"), in_rows(sheets, 2)]
    if len(special) and len(common):
        scaled = code / code.square().mean(0).sqrt().clamp(min=1e-12)
        contrast = (scaled[members[0]].mean(0) - scaled[members[1]].mean(0)).numpy()[special]
        axes = [int(special[contrast.argmax()]), int(special[contrast.argmin()]), int(common[-1])]
        numbers |= dict(components=axes, phi_components=[code[g][:, axes] for g in members])
        plots = []
        for i, j in (0, 1), (0, 2), (1, 2):
            name = lambda c: f"phi[{axes[c]}] ({'common' if c == 2 else 'specialised'})"
            p = Axes((530, 480), limits(code[np.concatenate(members)][:, axes[i]]),
                     limits(code[np.concatenate(members)][:, axes[j]]), name(i), name(j))
            for g, color, label in zip(members, COLORS, ("first group", "second")):
                p.scatter(code[g][:, axes[i]], code[g][:, axes[j]], color, label)
            plots.append(p.image())
        rows += [caption("Three components of phi for the two groups"), in_rows(plots)]
    if "agreement" in numbers:
        rows.append(bars(numbers["agreement"], numbers["chance"],
                         f"share of the {k} nearest that are of the same class ({len(queries)} pictures)"))
    save(stack(rows), out, "neighbours")
    return numbers


def subspace_energy(a, b, own, k=3):
    """Share of ‖a‖² of rows a (m, d) in the span of the k first singular vectors of b; `own`: less itself."""
    shares = []
    for i, v in enumerate(a.double()):
        rest = torch.cat([b[:i], b[i + 1:]]) if own else b
        basis = torch.linalg.svd(rest.double(), full_matrices=False)[2][:k]
        shares.append(float((basis @ v).square().sum() / v.square().sum()))
    return float(np.mean(shares))


# §2.5, Emergent clusters (Fig. 6, 15, 16)

def separation(a, b):
    """Distance of the means of a (n, d) and b (m, d), and √(mean variance along the line that joins them)."""
    u = (a.mean(0) - b.mean(0)).double()
    distance = u.norm()
    u = u / distance.clamp(min=1e-300)
    variance = ((a.double() @ u).var() + (b.double() @ u).var()) / 2
    return float(distance), float(variance.sqrt())


def pair_separations(code, labels, rng, pairs=100, least=5):
    """`separation` of random pairs of groups of `least` points or more: (pairs, 2). Skip if there is none."""
    sizes = np.bincount(labels[labels >= 0])
    groups = np.flatnonzero(sizes >= least)
    if len(groups) < 2:
        raise Skip(f"fewer than two groups of {least} pictures; --images or --clusters can change that")
    every = np.array([(a, b) for k, a in enumerate(groups) for b in groups[k + 1:]])
    chosen = every[rng.permutation(len(every))[:pairs]]
    return np.array([separation(code[labels == a], code[labels == b]) for a, b in chosen])


def tsne(x, perplexity=30.0, iterations=750):
    """Exact t-SNE (van der Maaten & Hinton 2008) of x (n, d) -> (n, 2), n ≤ 2000 or so; deterministic.

    It starts from the two first principal components, their signs fixed by the largest entry, so that a
    rotation of x changes nothing. Gains, momentum and early exaggeration as in the authors' implementation.
    """
    x = x.double()
    n = len(x)
    d2 = torch.cdist(x, x).square()
    low, high = torch.full((n, 1), -50.0, dtype=x.dtype), torch.full((n, 1), 50.0, dtype=x.dtype)
    d2 = d2 / d2.mean().clamp(min=1e-300)
    off = d2.masked_fill(torch.eye(n, dtype=torch.bool), math.inf)
    goal = math.log(min(perplexity, (n - 1) / 3))
    for _ in range(60):                                    # log β: the entropy of p(j | i) is log perplexity
        beta = (low + high) / 2
        p = torch.softmax(-off * beta.exp(), 1)
        wide = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True) > goal
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12).float()
    y = principal_components(x, 2)
    y = y * y.gather(0, y.abs().argmax(0, keepdim=True)).sign()
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50.0)
    for t in range(iterations):
        q = 1 / (1 + torch.cdist(y, y).square())
        q.fill_diagonal_(0)
        force = ((12 if t < 250 else 1) * p - q / q.sum()) * q                 # (n, n)
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * velocity > 0, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if t < 250 else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def gaussian_like(code, seed):
    """A Gaussian sample with the mean and covariance of code (n, d): as many points, no other structure."""
    code = code.double()
    values, vectors = torch.linalg.eigh(torch.cov(code.T))
    z = torch.randn(code.shape, generator=seeded("cpu", seed, 18), dtype=code.dtype)
    return (code.mean(0) + (z * values.clamp(min=0).sqrt()) @ vectors.T).float()


def clusters(study, out):
    """Fig. 6, 15, 16: K-means on φ; how far apart clusters are, beside classes and a structureless control.

    K: --clusters, or 100 (the paper's least) but at most a twentieth of the pictures. Control: K-means makes
    separated clusters of anything, so it also runs on a Gaussian with φ's mean and covariance. Restarts as
    in the paper (10); other seeds and other σ are compared by the adjusted Rand index.
    """
    code, n, rng = study.phi[study.sigma], len(study.rows), np.random.default_rng((study.seed, 19))
    K = study.clusters or max(2, min(100, n // 20))
    if K > n:
        raise Skip(f"{n} pictures cannot make {K} clusters; give a smaller --clusters or more --images")
    device = study.device if torch.device(study.device).type == "cuda" else "cpu"
    fit = lambda points, seed, init="k-means++": KMeans(len(init) if torch.is_tensor(init) else K, init=init,
                                                        seed=seed, device=device).fit(points)
    tick, found = ticker("clusters", 3 + len(study.sigmas), "fits"), []
    for i, (points, seed) in enumerate([(code, study.seed), (gaussian_like(code, study.seed), study.seed)]
                                       + [(code, study.seed + s) for s in (1, 2)]
                                       + [(study.phi[s], study.seed) for s in study.sigmas[1:]]):
        found.append((points, fit(points, seed)))
        tick(i + 1)
    labels = found[0][1].labels_.cpu().numpy()
    ari = lambda other: adjusted_rand_index(labels, other[1].labels_.cpu().numpy())
    pairs = {"clusters": pair_separations(code, labels, rng),
             "Gaussian control": pair_separations(found[1][0], found[1][1].labels_.cpu().numpy(), rng)}
    numbers = dict(clusters=K, pictures=n, sizes=np.bincount(labels, minlength=K), labels=labels,
                   rand_index_seeds=[ari(f) for f in found[2:4]],
                   rand_index_sigma={f"{s:g}": ari(f) for s, f in zip(study.sigmas[1:], found[4:])})
    known, maps = study.labels >= 0, {"clusters": labels}
    if len(np.unique(study.labels[known])) > 1:
        truth = np.where(known, np.unique(study.labels, return_inverse=True)[1] - int((~known).any()), -1)
        with contextlib.suppress(Skip):        # fewer than two classes of five pictures
            pairs["classes"], maps["classes"] = pair_separations(code, truth, rng), truth
        centroids = torch.stack([code[truth == c].mean(0) for c in range(truth.max() + 1)])
        moved = fit(code, study.seed, centroids).labels_.cpu().numpy()
        numbers |= dict(purity=purity(labels[known], truth[known]),
                        nmi=normalised_mutual_information(labels[known], truth[known]),
                        from_classes=dict(nmi=normalised_mutual_information(moved[known], truth[known]),
                                          rand_index_classes=adjusted_rand_index(moved[known], truth[known]),
                                          rand_index_random_start=adjusted_rand_index(moved, labels),
                                          stayed=float((moved == truth)[known].mean())))
        with contextlib.suppress(Skip):
            own = pair_separations(code, moved, rng)
            numbers["from_classes"]["separation_mean"] = float((own[:, 0] / own[:, 1].clip(1e-12)).mean())
    ratio = {name: v[:, 0] / v[:, 1].clip(1e-12) for name, v in pairs.items()}
    numbers |= dict(separation={name: dict(distance=v[:, 0], sd=v[:, 1], ratio=mean_se(ratio[name]),
                                           least=ratio[name].min(), above_2=float((ratio[name] > 2).mean()))
                                for name, v in pairs.items()})
    largest = np.concatenate(list(pairs.values())).max(0)
    plots = []
    for (name, v), color in zip(pairs.items(), (BLUE, GRAY, ORANGE)):
        p = Axes((530, 460), (0, 1.05 * largest[1]), (0, 1.05 * largest[0]), "SD along the line",
                 "centroid distance", f"{name}: {ratio[name].mean():.1f} SD")
        p.scatter(v[:, 1], v[:, 0], color)
        p.line([0, largest[1]], [0, 2 * largest[1]], RED, "2 SD")
        plots.append(p.image())
    p = Axes((530, 460), (0, 1.02 * max(r.max() for r in ratio.values())), None, "distance / SD", "pairs")
    for (name, r), color in zip(ratio.items(), (BLUE, GRAY, ORANGE)):
        p.histogram(r, 30, color, name)
    drawn = [p.image()]
    for name, groups in maps.items():
        big = np.flatnonzero(np.bincount(groups[groups >= 0]) >= 5)
        seven = rng.permutation(big)[:7]
        rows = np.flatnonzero(np.isin(groups, seven))[:2000]
        y = tsne(code[rows])
        numbers[f"tsne_{name}"] = dict(rows=rows, groups=groups[rows], y=y)
        p = Axes((530, 460), limits(y[:, 0]), limits(y[:, 1]), title=f"t-SNE of {len(seven)} {name}")
        for c, color in zip(seven, COLORS):
            p.scatter(y[groups[rows] == c, 0], y[groups[rows] == c, 1], color)
        drawn.append(p.image())
    title = caption(f"{K} clusters of phi ({n} pictures, sigma = {study.sigma:g})")
    save(stack([title, in_rows(plots), in_rows(drawn)]), out, "clusters")
    shown = rng.permutation(np.flatnonzero(np.bincount(labels) >= 5))[:10]
    members = [rng.permutation(np.flatnonzero(labels == c))[:11] for c in shown]
    save(picture_rows([study.pictures(m) for m in members], [f"{c} ({(labels == c).sum()})" for c in shown],
                      "Random members of ten clusters; cluster (pictures in it)"), out, "cluster-members")
    return numbers


# App. B.2, Channels (Fig. 13)

@torch.no_grad()
def map_statistics(study, chosen):
    """Running sums over E_z[a_M(x + σz)], (m, d, h, w), at the study's σ: (spatial PR (d,), dimension (d,)).

    Spatial PR: over the h·w places of a map, averaged over pictures with weight φ[i], since the map of a
    silent channel has no shape. Dimension: of the maps seen as vectors of h·w numbers, (Σλ)²/Σλ² over the
    eigenvalues λ of their covariance. Only sums are kept: d·(hw)² numbers, however many pictures there are.
    """
    weight = weighted = total = second = 0
    for a in range(0, len(chosen), BATCH):
        x = study.pictures(chosen[a:a + BATCH])
        generator, maps = study.generator(20, a), 0
        for _ in range(study.draws):
            z = torch.randn(x.shape, generator=generator, device=x.device)
            maps = maps + study.model.encode(x + study.sigma * z)[0]
        maps = (maps / study.draws).flatten(2).cpu().double()                  # (m, d, hw)
        size = maps.mean(2)
        weight = weight + size.sum(0)
        weighted = weighted + (size * participation_ratio(maps).nan_to_num()).sum(0)
        total = total + maps.sum(0)
        by_channel = maps.transpose(0, 1)                                      # (d, m, hw)
        second = second + by_channel.mT @ by_channel
    mean = total / len(chosen)
    covariance = second / len(chosen) - mean[:, :, None] * mean[:, None, :]    # (d, hw, hw)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    dimension = trace.square() / covariance.square().sum((1, 2))               # Σλ² is the squared norm
    return (weighted / weight).numpy(), torch.where(trace > 1e-12, dimension, math.nan).numpy()


def gratings(size, channels, frequencies, orientations, phases=4):
    """Sinusoidal gratings 0.5 + 0.5 cos: (frequencies, orientations, phases, channels, size, size).

    frequencies in cycles a picture; orientations in radians.
    """
    grid = (torch.arange(size) + 0.5) / size
    f = torch.as_tensor(frequencies, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    angle = torch.as_tensor(orientations, dtype=torch.float32).view(1, -1, 1, 1, 1)
    turn = 2 * math.pi * torch.arange(phases).view(1, 1, -1, 1, 1) / phases
    wave = 0.5 + 0.5 * torch.cos(2 * math.pi * f * (grid * angle.cos() + grid[:, None] * angle.sin()) + turn)
    return wave[:, :, :, None].expand(-1, -1, -1, channels, -1, -1)


def tuning(study, n_frequencies=8, n_orientations=8):
    """Mean φ over the phases of each grating: (d, frequencies, orientations), and the frequencies."""
    size = study.checkpoint["size"]
    frequencies = np.geomspace(1, size / 3, n_frequencies)
    angles = np.arange(n_orientations) * math.pi / n_orientations
    bank = gratings(size, study.model.channels, frequencies, angles)
    flat = bank.flatten(0, 2).to(study.device)
    code = torch.cat([phi(study.model, part, study.sigma, study.draws, study.generator(21, k))
                      for k, part in enumerate(flat.split(BATCH))])
    return code.cpu().view(*bank.shape[:3], -1).mean(2).permute(2, 0, 1).numpy(), frequencies


def channels(study, out):
    """Fig. 13: what selectivity (PR over the data set) goes with, channel by channel, and rank correlations.

    Tails: kurtosis of φ[i] over pictures. Spatial sparsity and PCA dimension: `map_statistics`. Tuning: the
    share of a bank of gratings (8 frequencies, 8 orientations) that drive the channel above half its maximum.
    Stability: mean cosine, over the other σ asked for, between (φ(x₁)[i] … φ(x_n)[i]) there and at the main σ
    (what the paper measures for blocks); `stability_centred` is the same after subtracting the means, since
    any channel with a large mean has a large cosine.
    """
    need_channels(study)
    pr, code = study.selectivity, study.phi[study.sigma].double()
    spatial, dimension = map_statistics(study, study.choose(1000, 22))
    response, frequencies = tuning(study)
    others = [study.phi[s].double() for s in study.sigmas if s != study.sigma and s > 0]
    cosine = lambda u, v: F.cosine_similarity(u, v, dim=0).numpy()
    each = dict(kurtosis=kurtosis(code).numpy(), spatial_pr=spatial, pca_dimension=dimension,
                tuning=(response > response.max((1, 2), keepdims=True) / 2).mean((1, 2)))
    if others:
        centred = [cosine(code - code.mean(0), o - o.mean(0)) for o in others]
        each |= dict(stability=np.mean([cosine(code, o) for o in others], 0),
                     stability_centred=np.mean(centred, 0))
    alive = int(np.isfinite(pr).sum())
    numbers = dict(pr=pr, **each, channels=alive, frequencies=frequencies, grating_response=response,
                   rank_correlation={name: rank_correlation(pr, v) for name, v in each.items()},
                   chance=2 / math.sqrt(max(alive - 1, 1)))
    special, common = study.channels()
    rows = []
    for name, group, color in ("specialised", special[:4], ORANGE), ("common", common[::-1][:4], BLUE):
        cells = []
        for c in group:
            p = Axes((395, 320), None, None, "phi[i]", "pictures", f"{name} {c}, PR {pr[c]:.2g}")
            p.histogram(code[:, c].numpy(), 40, color)
            cells.append(p.image())
        rows.append(in_rows(cells, 4))
    titles = dict(kurtosis="kurtosis", spatial_pr="spatial PR", pca_dimension="PCA dimension of the maps",
                  tuning="share of gratings", stability="cosine across sigma",
                  stability_centred="the same, centred")
    plots = []
    for name, v in each.items():
        ok = np.isfinite(v) & np.isfinite(pr)
        log = name == "kurtosis"
        p = Axes((530, 420), (0, 1), limits(v[ok], log), "PR over the pictures", titles[name],
                 f"rank correlation {numbers['rank_correlation'][name]:.2f}", ylog=log)
        p.scatter(pr[ok], v[ok], BLUE)
        plots.append(p.image())
    save(stack([caption("Channels of phi: marginals, and what goes with selectivity"), *rows,
                in_rows(plots)]), out, "channels")
    return numbers


# §3, Conditional densities (Fig. 8, 14 right, 21)

def embedding(study, out, draws=2):
    """Fig. 8, 21: Eq. 4, d²(p₁, p₂), against ‖φ₁ − φ₂‖² for random pairs; A and B of inequality (3).

    A and B are the least and the largest ratio d²/‖φ₁ − φ₂‖², φ at the study's σ. The integral runs over 5
    geometric σ from 0.2 to the largest in training, with `draws` pictures of each density and 60 gradients to
    match each. Below 0.2 the integrand would grow as σ⁻³ or so, and most pictures cannot be matched:
    `matched` says which share could. `rank_correlation_sigma`: of the integrand at each σ alone.
    """
    if len(study.rows) < 4:
        raise Skip("fewer than four pictures")
    rng = np.random.default_rng((study.seed, 23))
    chosen = rng.permutation(len(study.rows))[:2 * study.pairs]
    chosen = chosen[:len(chosen) // 2 * 2].reshape(-1, 2)
    sigmas = np.geomspace(0.2, max(study.checkpoint["sigma_max"], 0.3), 5)
    code, tick, values = study.phi[study.sigma].double(), ticker("embedding", len(chosen), "pairs"), []
    for k, (a, b) in enumerate(chosen):
        x1, x2 = study.pictures([a, b])
        values.append(conditional_distance(study.model, x1, x2, sigmas, draws, study.draws,
                                           study.generator(24, k), max_iters=60))
        tick(k + 1)
    d2, error = np.array([v[0] for v in values]), np.array([v[1] for v in values])
    square = (code[chosen[:, 0]] - code[chosen[:, 1]]).square().sum(1).numpy()
    ratio, integrand = d2 / square, torch.stack([v[2] for v in values]).numpy()
    numbers = dict(pairs=chosen, sigmas=sigmas, kl=d2, kl_error=error, phi_squared_distance=square,
                   integrand=integrand, matched=torch.stack([v[3] for v in values]).mean(0),
                   rank_correlation_sigma=[rank_correlation(square, v) for v in integrand.T],
                   A=ratio.min(), B=ratio.max(), B_over_A=ratio.max() / ratio.min(),
                   rank_correlation=rank_correlation(square, d2),
                   ratio_sd=float(np.std(ratio) / np.mean(ratio)), chance=2 / math.sqrt(max(len(d2) - 1, 1)))
    p = Axes((1600, 800), (0, 1.05 * square.max()), (0, 1.1 * (d2 + error).max()),
             "squared distance of phi", "symmetrised KL (nats), Eq. 4",
             f"{len(d2)} pairs: rank correlation {numbers['rank_correlation']:.2f}, B/A = "
             f"{numbers['B_over_A']:.1f}; {numbers['matched'].mean():.0%} of the matchings converged")
    p.line([0, square.max()], [0, numbers["A"] * square.max()], GREEN, "A")
    p.line([0, square.max()], [0, numbers["B"] * square.max()], RED, "B")
    for s, v, e in zip(square, d2, error):
        p.line([s, s], [v - e, v + e], BLUE)
    p.scatter(square, d2, BLUE, "pairs; bar: one standard error")
    save(p.image(), out, "embedding")
    conditional_scores(study, chosen[int(np.argsort(square)[len(square) // 2])], out)
    return numbers


@torch.no_grad()
def conditional_scores(study, pair, out):
    """Fig. 21: at one x_σ, σ²·score given φ₁ and given φ₂ (x̂ after matching, − x_σ); difference."""
    x1, x2 = study.pictures(pair)
    z = torch.randn(x1.shape, generator=study.generator(25), device=x1.device)
    rows, names = [torch.stack([x1, x2])], ["x1, x2"]
    for k, sigma in enumerate((0.1, 0.2, 0.4, 0.7, 1.0)):
        y = (x1 + sigma * z)[None]
        x_hat = []
        for x in x1, x2:
            generator = study.generator(26, k)
            phi_c = target_phi(study.model, x[None], draws=study.draws, generator=generator)(sigma)
            x_hat.append(study.model.denoise(guidance_step(study.model, y, phi_c)[0]))
        scores = [0.5 + (v - y) / (6 * sigma) for v in x_hat]                  # ± 3 σ is black … white
        rows.append(torch.cat([y, *scores, *x_hat, 0.5 + (x_hat[0] - x_hat[1]) / 2]))
        names.append(f"sigma {sigma:g}")
    title = "Noisy x1; score given phi1, given phi2; denoised by each; half their difference"
    save(picture_rows(rows, names, title, side=224), out, "scores")


def run_algorithm_1(study, x, samples, word, report):
    """Algorithm 1 with sample.py's defaults: `samples` for each picture x (k, C, H, W), in this order."""
    targets = [target_phi(study.model, v[None], generator=study.generator(word, 1, j))
               for j, v in enumerate(x)]
    sigmas = np.linspace(study.checkpoint["sigma_max"], 0.03, study.steps).tolist()
    generators = [seeded("cpu", study.seed, word, 2, i) for i in range(samples * len(x))]
    condition = lambda s: torch.cat([t(s) for t in targets]).repeat_interleave(samples, 0)
    return reconstruct(study.model, condition, study.mean, sigmas, x.shape[1:], generators, report=report)


def matching(study, out, m=24):
    """Fig. 20: σ̂ = ‖s‖/√n before and after each matching step of Algorithm 1; m pictures, a sample of each.

    `layout_own`, `layout_other`: correlation of the sample's pixels with its target's and with those of the
    other targets, each picture less its mean colour.
    """
    x = study.pictures(study.choose(m, 27))
    tick, levels = ticker("matching", study.steps, "noise levels"), []

    def report(t, sigma, _, state):
        levels.append((sigma, state["sigma_before"].cpu().numpy(), state["sigma_after"].cpu().numpy(),
                       int((~state["converged"]).sum())))
        tick(t + 1)

    y = run_algorithm_1(study, x, 1, 27, report)
    sigmas, before, after, missed = zip(*levels)
    ratio = np.divide(after, before)
    unit = [F.normalize((v - v.mean((2, 3), keepdim=True)).flatten(1), dim=1) for v in (y, x)]
    layout = (unit[0] @ unit[1].T).cpu().numpy()                               # (samples, targets)
    own = layout.diagonal()
    other = (layout.sum(1) - own) / max(len(x) - 1, 1)
    numbers = dict(pictures=len(x), sigmas=sigmas, before=np.array(before), after=np.array(after),
                   missed=missed, median_ratio=np.median(ratio, 1), least_ratio=ratio.min(1),
                   largest_ratio=ratio.max(1), layout_own=mean_se(own), layout_other=mean_se(other),
                   layout_lead=mean_se(own - other))
    both = np.concatenate([before, after])
    span = 0.9 * both.min(), 1.1 * both.max()
    p = Axes((1600, 800), span, span, "noise level before matching", "after matching",
             f"Norm of the score over sqrt(n) in Algorithm 1, {len(x)} pictures, {len(sigmas)} noise levels",
             True, True)
    p.line(span, span, GRAY, "unchanged")
    p.scatter(np.concatenate(before), np.concatenate(after), BLUE)
    q = Axes((1600, 500), (min(sigmas), max(sigmas)), limits(ratio), "sigma of the schedule",
             "after / before", xlog=True)
    q.line(sigmas, numbers["median_ratio"], BLUE, "median; band: least to largest",
           band=(numbers["least_ratio"], numbers["largest_ratio"]))
    save(stack([p.image(), q.image()]), out, "matching")
    return numbers


def reconstruction(study, out, samples=8):
    """Fig. 7, 19: eight samples around two pictures (Algorithm 1), and 16 unconditional samples.

    Distances and correlations: as sample.py measures them.
    """
    chosen = study.choose(2, 30)
    x, tick = study.pictures(chosen), ticker("reconstruction", study.steps, "noise levels")
    y = run_algorithm_1(study, x, samples, 31, lambda t, *_: tick(t + 1)).split(samples)
    unrelated = study.pictures(study.choose(64, 33))
    scale = None
    if len(unrelated) > 1:
        scale = torch.pdist(phi(study.model, unrelated, 0.3, 20, study.generator(33))).mean()
    numbers = dict(targets=chosen, panels=[
        similarities(study.model, mine, (v[None], None), scale) for v, mine in zip(x, y)])
    generators = [seeded("cpu", study.seed, 34, i) for i in range(16)]
    free, steps = sample_unconditional(study.model, study.mean, x.shape[1:], generators,
                                       study.checkpoint["sigma_max"])
    numbers["unconditional_steps"] = steps
    sheets = [panel(mine, v[None], side=256, gap=6) for v, mine in zip(x, y)]
    save(stack([caption("Framed: the target; around it, samples told its phi"), in_rows(sheets)]), out,
         "reconstruction")
    save(stack([caption("Unconditional samples"), panel(free, side=390, gap=6)]), out, "unconditional")
    return numbers


# Paper B, Fig. 1

def denoising(study, out, most=512, parts=8):
    """Paper B, Fig. 1: PSNR of the output against PSNR of the input, training and held-out pictures.

    Standard errors over 8 parts of the pictures.
    """
    sides = {"training": study.train, "held out": study.held_out}
    if study.train is None:
        sides = {"these pictures": study.rows}
    rng, psnr = np.random.default_rng((study.seed, 35)), {}
    for name, rows in sides.items():
        rows = rng.permutation(rows)[:most]
        psnr[name] = [evaluate(study.model, to_batch(study.x[np.sort(part)], study.device), BATCH,
                               study.checkpoint["sigma_max"])
                      for part in np.array_split(rows, min(parts, len(rows)))]
    sigmas = list(psnr[next(iter(sides))][0])
    curves = {name: np.array([[p[s] for s in sigmas] for p in v]) for name, v in psnr.items()}    # (parts, σ)
    numbers = dict(sigmas=sigmas, input_psnr=[-20 * math.log10(s) for s in sigmas],
                   output_psnr={name: [mean_se(column) for column in v.T] for name, v in curves.items()})
    if study.train is not None:
        a, b = (numbers["output_psnr"][name] for name in sides)
        numbers["gap"] = [(p[0] - q[0], math.hypot(p[1], q[1])) for p, q in zip(a, b)]
    x = numbers["input_psnr"]
    every = np.concatenate([v.ravel() for v in curves.values()] + [x])
    p = Axes((1600, 900), (min(x) - 1, max(x) + 1), limits(every), "input PSNR (dB)", "output PSNR (dB)")
    p.line([min(x), max(x)], [min(x), max(x)], GRAY, "no denoising")
    for (name, v), color in zip(curves.items(), (ORANGE, BLUE)):
        m, s = v.mean(0), v.std(0)
        p.line(x, m, color, name, band=(m - s, m + s))
        p.scatter(x, m, color)
    save(p.image(), out, "denoising")
    return numbers


# The paper's claims

class Claim(NamedTuple):
    """A sentence of the paper and the rule that decides it; the rule was written before it was applied."""
    text: str
    place: str
    paper: str              # what the paper prints
    analysis: str           # whose numbers decide
    rule: str
    judge: callable         # those numbers -> (holds, None if it does not apply; "what came out")


def pm(value, digits=2):
    """(mean, standard error) as text."""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def above(value, sign=1):
    """Whether sign × mean of (mean, standard error) is above two standard errors; None: too few values."""
    return sign * value[0] > 2 * value[1] if math.isfinite(value[1]) else None


def changes(names, sign):
    """A judge: PR changes from input to output in this direction, at every block that `names` picks."""
    def judge(r):
        picked = {b: c for b, c in r["change"].items() if names(b)}
        if not picked:
            return None, "no such block"
        verdicts = [above(c, sign) for c in picked.values()]
        return None if None in verdicts else all(verdicts), ", ".join(
            f"{b} {m:+.3f} ± {e:.3f}" for b, (m, e) in picked.items())
    return judge


def with_selectivity(name, sign):
    """A judge: the rank correlation of a channel's property with its PR has this sign, beyond chance."""
    def judge(r):
        rho = r["rank_correlation"].get(name)
        if rho is None or not math.isfinite(rho):
            return None, "not measured"
        return sign * rho > r["chance"], f"{rho:+.2f} ({r['channels']} channels; chance ± {r['chance']:.2f})"
    return judge


def more_separated(other):
    """A judge: clusters of φ are farther apart, in standard deviations along the line, than `other`."""
    def judge(r):
        if other not in r["separation"]:
            return None, "no classes with five pictures"
        (m, e), (n, f) = r["separation"]["clusters"]["ratio"], r["separation"][other]["ratio"]
        return above((m - n, math.hypot(e, f))), f"{pm((m, e), 1)} against {pm((n, f), 1)} SD"
    return judge


def lead(over):
    """A judge: φ's neighbours agree more in class than those of another space."""
    def judge(r):
        if "agreement" not in r:
            return None, "no class labels"
        (phi_here, _), (theirs, _) = r["agreement"]["phi"], r["agreement"][over]
        here = f"{phi_here:.3f} against {theirs:.3f}, lead {pm(r['lead'][over], 3)}; chance {r['chance']:.3f}"
        return above(r["lead"][over]), here
    return judge


SE = "by more than two standard errors"
CLAIMS = [
    Claim("PR falls from the input to the output of M", "Fig. 1, 10", "falls", "sparsity",
          f"mean change over pictures below 0 {SE}", changes(lambda b: b == "M", -1)),
    Claim("PR falls in the decoder blocks", "Fig. 1", "falls", "sparsity",
          "the same, in every decoder block but D1", changes(lambda b: b[0] == "D", -1)),
    Claim("PR rises in the encoder blocks", "Fig. 1", "rises", "sparsity",
          f"mean change above 0 {SE}, in every encoder block but E1", changes(lambda b: b[0] == "E", 1)),
    Claim("phi's PR lies in 0.2-0.3", "§2.5, Fig. 1", "0.2-0.3", "sparsity",
          "the mean over pictures lies in [0.2, 0.3]",
          lambda r: (0.2 <= r["phi_pr_mean"] <= 0.3, f"{r['phi_pr_mean']:.3f}, SD {r['phi_pr_sd']:.3f}")),
    Claim("M is the most stable block, sigma in 0.2-2", "Fig. 2, 11", "M highest", "stability",
          f"M's mean cosine exceeds that of the next best block {SE}",
          lambda r: (above(r["lead"]), f"M {r['middle']['M'][0]:.3f}, {r['next_best']} "
                     f"{r['middle'][r['next_best']][0]:.3f}, lead {pm(r['lead'], 3)}")),
    Claim("channel averages collapse as sigma -> 0", "Fig. 2", "cosine falls", "stability",
          "M's cosine at sigma_2 = 0 is below its least in [0.2, 2] by more than one SD over pictures",
          lambda r: (r["mean"]["M"][0] + r["sd"]["M"][0] < min(m for s, m in zip(r["sigma_2"], r["mean"]["M"])
                                                               if 0.2 <= s <= 2),
                     f"{r['mean']['M'][0]:.2f} at 0, SD {r['sd']['M'][0]:.2f}; the norm of phi there is "
                     f"{r['norm_at_0']:.2f} of that at 0.5")),
    Claim("channel selectivity is bimodal", "Fig. 3", "bimodal on ImageNet", "selectivity",
          "Sarle's coefficient exceeds 5/9, that of a uniform distribution, by more than two bootstrap SD",
          lambda r: (r["bimodality"] - 2 * r["bimodality_sd"] > 5 / 9,
                     f"{pm((r['bimodality'], r['bimodality_sd']))} ({r['specialised']} specialised, "
                     f"{r['common']} common)")),
    Claim("phi-neighbours agree in class more than pixel-neighbours", "Fig. 5, 14", "stark contrast",
          "neighbours", f"mean lead in ten-neighbour agreement above 0 {SE} over queries", lead("pixels")),
    Claim("... more than phi of an untrained network (our control)", "-", "-", "neighbours",
          "as above", lead("phi, untrained")),
    Claim("... more than pixels less their mean colour (our control)", "-", "-", "neighbours",
          "as above", lead("pixels - mean colour")),
    Claim("phi's lie on a union of subspaces", "Fig. 5", "picture", "neighbours",
          "each group's phi has more energy in its own group's three directions than in the other's",
          lambda r: (all(a > b for a, b in zip(r["energy_own"], r["energy_other"])), "own "
                     + " and ".join(f"{v:.3f}" for v in r["energy_own"]) + ", other "
                     + " and ".join(f"{v:.3f}" for v in r["energy_other"]))),
    Claim("every pair of clusters is more than 2 SD apart", "Fig. 6", "all of 100 pairs", "clusters",
          "the least of up to 100 random pairs exceeds 2",
          lambda r: ((c := r["separation"]["clusters"])["least"] > 2,
                     f"least {c['least']:.1f}; {c['above_2']:.0%} of {len(c['sd'])} pairs")),
    Claim("clusters are farther apart than classes", "Fig. 6", "substantially", "clusters",
          f"mean distance / SD over pairs larger {SE}", more_separated("classes")),
    Claim("... than clusters of a structureless Gaussian (our control)", "-", "-", "clusters", "as above",
          more_separated("Gaussian control")),
    Claim("other sigma give similar clusters", "App. B.3", "similar", "clusters",
          "adjusted Rand index to every other sigma >= 0.1 at least that between seeds, less 0.1",
          lambda r: (None, "one sigma only") if not r["rand_index_sigma"] else
          (all(v >= min(r["rand_index_seeds"]) - 0.1
               for s, v in r["rand_index_sigma"].items() if float(s) >= 0.1),
           ", ".join(f"{v:.2f} at {s}" for s, v in r["rand_index_sigma"].items())
           + f"; seeds {min(r['rand_index_seeds']):.2f}")),
    Claim("started from class centroids, clusters still leave the classes", "App. B.3", "they do", "clusters",
          "fewer than half of the pictures keep their class's cluster",
          lambda r: (None, "no class labels") if "from_classes" not in r else
          ((f := r["from_classes"])["stayed"] < 0.5,
           f"{f['stayed']:.0%} stay; Rand index to the classes {f['rand_index_classes']:.2f}, to the "
           f"random start {f['rand_index_random_start']:.2f}")),
    Claim("specialised channels have heavier tails", "Fig. 13", "heavy tails", "channels",
          "rank correlation of PR and kurtosis below 0 beyond chance, 2 / sqrt(channels - 1)",
          with_selectivity("kurtosis", -1)),
    Claim("... are sparser in space", "Fig. 13", "sparse", "channels",
          "PR and spatial PR: above 0 beyond chance", with_selectivity("spatial_pr", 1)),
    Claim("... have maps of fewer dimensions", "Fig. 13", "few", "channels",
          "PR and PCA dimension: above 0, the same", with_selectivity("pca_dimension", 1)),
    Claim("common channels are broadly tuned", "§2.4", "larger set", "channels",
          "PR and share of gratings: above 0", with_selectivity("tuning", 1)),
    Claim("common channels are the most stable to sigma", "§2.4", "most stable", "channels",
          "PR and cosine: above 0", with_selectivity("stability", 1)),
    Claim("... also after subtracting channel means (our control)", "-", "-", "channels",
          "PR and centred cosine: above 0", with_selectivity("stability_centred", 1)),
    Claim("distance of phi predicts the distance of densities", "Fig. 8", "strongly", "embedding",
          "rank correlation above 0 beyond chance",
          lambda r: (r["rank_correlation"] > r["chance"],
                     f"{r['rank_correlation']:.2f} ({len(r['kl'])} pairs; chance {r['chance']:.2f})")),
    Claim("embedding inequality (3) with B/A = 2.9", "Fig. 8", "2.9", "embedding",
          "largest over least ratio at most the paper's 2.9",
          lambda r: (r["B_over_A"] <= 2.9, f"{r['B_over_A']:.1f} over {len(r['kl'])} pairs; SD of the ratio "
                     f"{r['ratio_sd']:.0%}")),
    Claim("matching keeps the noise level", "Fig. 20", "unchanged", "matching",
          "the median of after / before is within 5 % of 1 at every sigma >= 0.1",
          lambda r: (all(abs(m - 1) <= 0.05 for m, s in zip(r["median_ratio"], r["sigmas"]) if s >= 0.1),
                     ", ".join(f"{m:.2f} [{a:.2f}, {b:.2f}] at {s:.2g}" for s, m, a, b in list(zip(
                         r["sigmas"], r["median_ratio"], r["least_ratio"], r["largest_ratio"]))[::9]))),
    Claim("samples share the target's layout", "Fig. 7", "picture", "matching",
          f"pixels less mean colour correlate with their own target more than with others {SE}",
          lambda r: (None, "one picture only") if r["pictures"] < 2 else
          (above(r["layout_lead"]),
           f"own {pm(r['layout_own'])}, others {pm(r['layout_other'])}")),
    Claim("training and held-out PSNR agree", "B, Fig. 1", "equal at 100,000 pictures", "denoising",
          "their difference is within two standard errors of 0 at every sigma",
          lambda r: (None, "the training pictures are not among these") if "gap" not in r else
          (all(abs(m) <= 2 * e for m, e in r["gap"] if math.isfinite(e)),
           ", ".join(f"{pm(g)} dB at {s:g}" for s, g in list(zip(r["sigmas"], r["gap"]))[::2]))),
]


def judge(results, earlier=()):
    """Every claim whose analysis ran: a list of dicts with claim, what came out, verdict and rule.

    results: {analysis: numbers}. earlier: such a list, for the claims of analyses that are not in `results`.
    """
    table, earlier = [], {row["claim"]: row for row in earlier}
    for claim in CLAIMS:
        numbers = results.get(claim.analysis)
        if numbers is None:
            table += [earlier[claim.text]] if claim.text in earlier else []
            continue
        holds, here = (None, numbers["skipped"]) if "skipped" in numbers else claim.judge(numbers)
        verdict = "not comparable" if holds is None else "holds" if holds else "fails"
        table.append(dict(claim=claim.text, place=claim.place, paper=claim.paper, here=here, verdict=verdict,
                          rule=claim.rule, analysis=claim.analysis))
    return table


# Plots: final pixels are twice those of a README 800 wide

BLUE, ORANGE, GREEN, RED, GRAY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#999999"     # Okabe and Ito
COLORS = (BLUE, RED, GREEN, "#cc79a7", ORANGE, "#56b4e9", "#000000", "#8c6d31")


def font(size=26):
    """Pillow's own font; it has no Greek letters, which is why figures spell them."""
    return ImageFont.load_default(size)


def limits(v, log=False):
    """A range a little wider than the values."""
    v = np.asarray(v, float)
    low, high = (float(v.min()), float(v.max())) if len(v) else (0.0, 1.0)
    if log:
        return low / 1.2, high * 1.2
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def ticks(low, high, log=False, most=6):
    """Round numbers in [low, high]: 1, 2 or 5 times a power of ten, at most `most` or so."""
    if log:
        for steps in (1, 2, 5), (1, 3), (1,):
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [s * 10.0 ** k for k in decades for s in steps]
            found = [v for v in found if low * 0.999 <= v <= high * 1.001]
            if len(found) <= most + 2:
                break
        return found
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(s for s in (1, 2, 5, 10) if (high - low) / (s * step) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axes:
    """One plot: a white image with axes in data units, to which lines, histograms and points are added.

    size: (width, height) in pixels. xlim, ylim: ranges, None: from the data (a histogram always sets ylim).
    image() draws axes and legend and returns a PIL image.
    """

    def __init__(self, size, xlim, ylim, xlabel="", ylabel="", title="", xlog=False, ylog=False):
        self.size, self.xlim, self.ylim, self.xlog, self.ylog = size, xlim, ylim, xlog, ylog
        self.xlabel, self.ylabel, self.title, self.marks, self.legend = xlabel, ylabel, title, [], []

    def line(self, x, y, color, label=None, band=None, width=4):
        """A polyline through the points, with a shaded band (low, high) if given."""
        self.marks.append(("line", x, y, color, band, width))
        self.legend += [(label, color)] if label else []

    def scatter(self, x, y, color, label=None):
        """Points."""
        self.marks.append(("points", x, y, color, None, 0))
        self.legend += [(label, color)] if label else []

    def histogram(self, values, bins, color, label=None):
        """Counts of the values in equal bins over xlim; several histograms show through one another."""
        values = np.asarray(values, float)
        values = values[np.isfinite(values)]
        self.xlim = self.xlim or limits(values)
        counts, edges = np.histogram(values, bins, self.xlim)
        if not any(m[0] == "bars" for m in self.marks) or counts.max() * 1.08 > self.ylim[1]:
            self.ylim = 0, max(1, counts.max() * 1.08)
        self.marks.append(("bars", edges, counts, color, None, 0))
        self.legend += [(label, color)] if label else []

    def image(self):
        """Draw everything."""
        w, h = self.size
        if not self.ylim:
            self.ylim = limits(np.concatenate([np.asarray(m[2], float) for m in self.marks]), self.ylog)
        sheet = Image.new("RGB", self.size, "white")
        draw = ImageDraw.Draw(sheet, "RGBA")
        f = font(26 if w > 600 else 22)
        em = f.size
        bare = not (self.xlabel or self.ylabel)            # t-SNE has no units
        xs, ys = ([], []) if bare else (ticks(*self.xlim, self.xlog, 6 if w > 600 else 4),
                                        ticks(*self.ylim, self.ylog, 6 if h > 350 else 4))
        named = [f"{v:g}" if abs(v) > 1e-12 else "0" for v in ys]
        left = 14 + int(max([draw.textlength(t, f) for t in named], default=0) + 1.5 * em * bool(self.ylabel))
        lines = self.legend_lines(draw, f, w - left - 20)
        top = 8 + int(1.4 * em) * (bool(self.title) + len(lines))
        right, bottom = w - em, h - 8 - (0 if bare else int(2.7 * em))
        scale = lambda v, lim, log: ((np.log(v) - math.log(lim[0])) / math.log(lim[1] / lim[0]) if log else
                                     (np.asarray(v, float) - lim[0]) / (lim[1] - lim[0]))
        px = lambda v: left + scale(v, self.xlim, self.xlog) * (right - left)
        py = lambda v: bottom - scale(v, self.ylim, self.ylog) * (bottom - top)
        for v, name in zip(ys, named):
            draw.line([(left, py(v)), (right, py(v))], "#e4e4e4", 2)
            draw.text((left - 8, py(v)), name, "black", f, anchor="rm")
        for v in xs:
            draw.line([(px(v), top), (px(v), bottom)], "#e4e4e4", 2)
            draw.text((px(v), bottom + 8), f"{v:g}" if abs(v) > 1e-12 else "0", "black", f, anchor="ma")
        inside = Image.new("RGB", self.size, "white")      # marks are cut off at the frame
        inside.paste(sheet)
        pen = ImageDraw.Draw(inside, "RGBA")
        for kind, x, y, color, band, width in self.marks:
            x, y = np.asarray(x, float), np.asarray(y, float)
            if kind == "bars":
                for a, b, n in zip(x, x[1:], y):
                    if n:
                        pen.rectangle([px(a), py(n), px(b), py(0)], color + "90", color)
            elif kind == "line":
                if band:
                    edge = [*zip(px(x), py(band[0])), *zip(px(x[::-1]), py(np.asarray(band[1])[::-1]))]
                    pen.polygon([tuple(map(float, p)) for p in edge], color + "38")
                pen.line([tuple(map(float, p)) for p in zip(px(x), py(y))], color, width, joint="curve")
            else:
                r = 6 if len(x) < 400 else 4
                for a, b in zip(px(x), py(y)):
                    pen.ellipse([a - r, b - r, a + r, b + r], color + "b0", "#ffffff")
        box = (left, top, right, bottom)
        sheet.paste(inside.crop(box), box)
        draw.rectangle(box, outline="#444444", width=2)
        draw.text(((left + right) / 2, 6), self.title, "black", f, anchor="ma")
        draw.text(((left + right) / 2, h - 8), self.xlabel, "black", f, anchor="md")
        for k, line in enumerate(lines):
            x = left
            for label, color in line:
                y = 10 + int(1.4 * em) * (k + bool(self.title)) + em / 2
                draw.rectangle([x, y - 8, x + 24, y + 8], color)
                draw.text((x + 32, y), label, "black", f, anchor="lm")
                x += 60 + draw.textlength(label, f)
        if self.ylabel:
            side = Image.new("RGB", (int(draw.textlength(self.ylabel, f)) + 4, int(1.4 * em)), "white")
            ImageDraw.Draw(side).text((2, 2), self.ylabel, "black", f)
            side = side.rotate(90, expand=True)
            sheet.paste(side, (2, max(0, int((top + bottom - side.height) / 2))))
        return sheet

    def legend_lines(self, draw, f, room):
        """The legend's entries, broken into lines above the frame, where they cover no data."""
        lines, used = [], math.inf
        for label, color in self.legend:
            need = 60 + draw.textlength(label, f)
            if used + need > room:
                lines, used = lines + [[]], 0
            lines[-1].append((label, color))
            used += need
        return lines


def caption(text, size=28, width=1600):
    """A line of text as an image."""
    image = Image.new("RGB", (width, int(1.6 * size)), "white")
    ImageDraw.Draw(image).text((6, size // 4), text, "black", font(size))
    return image


def stack(images, gap=8):
    """Images one above the other, left-aligned, on white."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height + gap for i in images)), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def in_rows(images, columns=3):
    """The images, so many side by side, with the gap that makes three plots of 530 pixels 1600 wide."""
    return beside(images, columns, 5)


def picture_rows(rows, names, title, side=120):
    """Rows of pictures, each (k, C, H, W), with a name in front of each."""
    left = 20 + int(max(font().getlength(n) for n in names))
    lines = [in_rows([caption(n, 26, left), *[to_image(x, side) for x in row]], len(row) + 1)
             for n, row in zip(names, rows)]
    return stack([caption(title), *lines])


def bars(values, chance, title):
    """Horizontal bars {name: (value, standard error)} with a line at chance."""
    w, row, f = 1600, 46, font()
    sheet = Image.new("RGB", (w, row * (len(values) + 2)), "white")
    draw, left = ImageDraw.Draw(sheet), 30 + int(max(f.getlength(n) for n in values))
    draw.text((6, 6), title, "black", f)
    scale = (w - left - 220) / max([chance] + [v for v, _ in values.values()])
    for i, (name, (v, e)) in enumerate(values.items()):
        y = row * (i + 1) + 6
        draw.text((left - 12, y + row / 2 - 6), name, "black", f, anchor="rm")
        draw.rectangle([left, y, left + v * scale, y + row - 12], BLUE if name == "phi" else GRAY)
        draw.text((left + max(v, chance) * scale + 12, y + row / 2 - 6), f"{v:.3f} +- {e:.3f}", "black", f,
                  anchor="lm")
    x = left + chance * scale
    draw.line([x, row, x, row * (len(values) + 1)], RED, 4)
    draw.text((x, row * (len(values) + 1) + 4), f"chance {chance:.3f}", RED, f, anchor="ma")
    return sheet


def save(image, out, name):
    """Write figure `name` into the folder `out`."""
    path = os.path.join(out, name + ".png")
    save_image(image, path)
    print(f"wrote {path}", flush=True)


# Running

ANALYSES = dict(sparsity=sparsity, stability=stability, selectivity=selectivity, attributes=attributes,
                neighbours=neighbours, clusters=clusters, channels=channels, embedding=embedding,
                matching=matching, reconstruction=reconstruction, denoising=denoising)


def ticker(name, total, unit):
    """A function to call with what is done: shows progress, rate and time left, now and then."""
    start, shown, every = time.time(), [time.time()], 0.3 if sys.stdout.isatty() else 10
    quiet = dist.is_initialized() and dist.get_rank() > 0

    def tick(done):
        taken = time.time() - start
        if time.time() - shown[0] > every and not quiet:
            shown[0] = time.time()
            status(f"{name}: {done} of {total} {unit}, {done / taken:.3g}/s, "
                   f"{duration(taken * max(total / done - 1, 0))} left")
    return tick


def plain(value):
    """Numbers, arrays and tensors as JSON has them: floats to six digits, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def print_table(table, scale):
    """The claims, aligned, the verdict first."""
    print("\n" + scale)
    for row in table:
        print(f"{row['verdict']:14} {row['claim']} ({row['place']})\n{'':14} paper: {row['paper']}; "
              f"here: {row['here']}")
    count = {v: sum(r["verdict"] == v for r in table) for v in ("holds", "fails", "not comparable")}
    print("; ".join(f"{n} {v}" for v, n in count.items()))


def arguments():
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="written by train.py")
    add("--data", metavar="PATH", help="pictures to analyse, as for train.py (default: the held-out part of "
        "those of the training)")
    add("--only", nargs="+", choices=list(ANALYSES), metavar="NAME", help=f"some of: {', '.join(ANALYSES)}")
    add("--images", type=number(int, 1), default=2000,
        help="pictures at most, by seed (default: %(default)s)")
    add("--draws", type=number(int, 1), default=20, help="noise draws for each φ (default: %(default)s)")
    add("--sigma", nargs="+", type=number(float, 0, 100), default=[0.3, 0.1, 0.5, 1.0], metavar="SIGMA",
        help="noise levels of φ; the first is the one analysed (default: 0.3 0.1 0.5 1.0)")
    add("--clusters", type=number(int, 2), help="K (default: 100, at most a twentieth of the pictures)")
    add("--pairs", type=number(int, 2), default=40, help="of pictures, for Eq. 4 (default: %(default)s)")
    add("--steps", type=number(int, 2), default=40, help="noise levels of Algorithm 1 (default: %(default)s)")
    add("--pictures", nargs="+", metavar="FILE", help="for `attributes` (default: three, by seed)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="default: %(default)s")
    add("--out", default="figures", metavar="FOLDER", help="default: %(default)s")
    add("--device", help="cpu, cuda, mps (default: the fastest there is)")
    return parser.parse_args()


def open_study(flags, model, checkpoint, device):
    """The Study for the command line's flags, without φ, and the data's fingerprint. Raises UserError."""
    pictures, train, held_out = checkpoint_pictures(checkpoint, flags.data)
    own = pictures.fingerprint == checkpoint["fingerprint"]
    if not own and not flags.data:
        raise UserError("the pictures of the training have changed since; --data says which to analyse")
    rows = np.arange(len(pictures.x)) if flags.data else held_out
    rows = np.sort(np.random.default_rng((flags.seed, 10)).permutation(rows)[:flags.images])
    sigmas = list(dict.fromkeys(flags.sigma))
    study = Study(model, checkpoint, pictures.x, rows, pictures.labels[rows], sigmas, flags.draws, flags.seed,
                  device, train if own else None, held_out if own else None, flags.clusters, flags.pictures,
                  flags.steps, flags.pairs)
    return study, pictures.fingerprint, [pictures.paths[i] for i in rows]


def main():
    """The command line's work; returns the exit code."""
    flags, start = arguments(), time.time()
    device = choose_device(flags.device)
    model, checkpoint = load_checkpoint(flags.checkpoint, device)
    with open(flags.checkpoint, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    for path in flags.pictures or []:
        load_picture(path, checkpoint["size"], model.channels)                 # complain before the work
    if "RANK" in os.environ:                   # started by torchrun; only CPU tensors are exchanged
        dist.init_process_group("gloo")
    study, fingerprint, paths = open_study(flags, model, checkpoint, device)
    try:
        os.makedirs(flags.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {flags.out}: {error.strerror}") from None
    key = dict(checkpoint=digest, data=fingerprint, sigmas=study.sigmas, draws=flags.draws, seed=flags.seed,
               pictures=hashlib.sha256("\n".join(paths).encode()).hexdigest())
    began = time.time()
    values = cached_phi(os.path.join(flags.out, "phi.npz"), key, paths, study.labels, lambda: compute_phi(
        model, study.x, study.rows, study.sigmas, study.draws, study.seed, device))
    if values is None:                         # not the first process: its share is done
        dist.destroy_process_group()
        return 0
    study.phi, seconds = values, {"phi": time.time() - began}
    where = "other pictures" if study.train is None else "training and held-out" if flags.data else "held out"
    seen = checkpoint["training"]["pictures_seen"]
    side = checkpoint["size"]
    scale = (f"{len(study.rows)} pictures ({where}) of {side}×{side}, width {model.width}, {seen:,} pictures "
             f"seen in training, sigma {study.sigma:g}, {flags.draws} draws")
    print(scale, flush=True)
    path, results, kept, claims = os.path.join(flags.out, "results.json"), {}, {}, []
    if flags.only and os.path.exists(path):    # keep what other calls found for the same settings
        try:
            with open(path) as file:
                old = json.load(file)
            if old["key"] == plain(key):
                kept, claims, seconds = old["analyses"], old["claims"], {**old["seconds"], **seconds}
        except (ValueError, KeyError, TypeError):
            pass
    for name in flags.only or ANALYSES:
        began = time.time()
        try:
            results[name] = ANALYSES[name](study, flags.out)
        except Skip as reason:
            results[name] = dict(skipped=str(reason))
            print(f"{name}: left out: {reason}")
        except FloatingPointError as error:
            raise UserError(f"{name}: {error}; is the checkpoint damaged?") from None
        seconds[name] = time.time() - began
        print(f"{name}: {duration(seconds[name])}", flush=True)
        table = judge(results, claims)
        record = dict(key=key, scale=scale, settings=vars(flags), device=str(device), seconds=seconds,
                      data=dict(fingerprint=fingerprint, where=where, pictures=len(study.rows)),
                      training=checkpoint["training"], claims=table, analyses={**kept, **results})
        with open(path + ".tmp", "w") as file:
            json.dump(plain(record), file)
        os.replace(path + ".tmp", path)
    print_table(table, scale)
    print(f"wrote {path}; {duration(time.time() - start)} in all")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        sys.exit(2)
