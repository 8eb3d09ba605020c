"""The figures of both papers for a trained network, with verdicts on claims.

    python analyze.py ckpt.pt                          # -> figures/index.html
    python analyze.py ckpt.pt --data photos --images 5000    # other pictures
    python analyze.py ckpt.pt --only sparsity stability      # two analyses
    python analyze.py a.pt --versus b.pt               # paper B: two networks
    python analyze.py --table a/results.json b/results.json

Measure, judge and draw are three things in three places. A *measure* takes a study and a view of it and gives
numbers; it is called for the trained network and for nulls, which have learnt nothing. (A null that is no
view, such as the Wiener filter, is measured together with the network, in numbers["nulls"].) The *claims* are
one table, a row a sentence of the papers, and `judge` is the only place where a verdict is made: a claim
holds if its number goes the paper's way, and farther than the same number of every null. No claim about φ is
judged unless M is in use (`Study.alive`). A *drawing* makes the figures of an analysis from its numbers.
Sections: paper A, §2.2 to §3 and App. B; paper B; claims; drawings; axes; report; command line.
"""
import functools
import html
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

from unet import (Parser, Progress, Sides, UNet, UserError, check_outputs, choose_device, duration,
                  expectation, font, greek, grid, load_checkpoint, number, phi, picture_rows, printable, run,
                  say, seed_of, seeded, titled, to_batch, to_image, write)
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from kmeans import KMeans, adjusted_rand_index, gaussian_like, pair_separations, tsne
from sample import (STEPS, Memory, Target, around, conditional_distance, estimate_sigma, guidance_step,
                    panel, sample_unconditional, sigma_schedule, told_by)
from train import (divide, draw_disc, evaluate, input_psnr, is_synthetic, known_sigmas, psnr, random_network,
                   training_data, untrained_network, use_of_M, variety)

BATCH = 128               # pictures at a time; their noise depends on it, so it is no flag
DETAIL = 48               # pictures for what needs all blocks at many noise levels
MAPS = 500                # pictures whose maps of M are kept, not only their averages
POOL = 4000               # pictures for what compares all with all
SIGMAS = 0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0        # of Fig. 2
LESS_COLOUR = "pixels minus their mean colour"


# What a measure looks at

class Estimate(NamedTuple):
    """A number and its standard error."""
    value: float
    error: float


UNKNOWN = Estimate(math.nan, math.nan)


class View(NamedTuple):
    """The trained network, or something that has learnt nothing and is measured in the same way."""
    phi: dict                       # {σ: φ (n, d) float32 on the CPU}
    model: UNet = None              # None for φ that belongs to no network
    maps: torch.Tensor = None       # E_z[a_M(x + σz)] at the first σ, of the first pictures (≤ MAPS, d, h, w)

    @property
    def code(self):
        """φ at the first σ, the one that is analysed."""
        return next(iter(self.phi.values()))


class Alive(NamedTuple):
    """Is M in use, so that φ is what denoises?"""
    use: dict                       # {σ: Estimate of the dB lost when M's maps are another picture's}
    cosine: float                   # of φ, the mean between two pictures
    silent: int                     # channels that no picture excites
    why_not: str                    # "" if it is in use


class Skip(Exception):
    """An analysis that these pictures do not allow; the text says why."""


@dataclass(eq=False)
class Study:
    """A network, n pictures, and all that measures share. A picture's index is its row.

    groups: equal numbers for tiles of one picture, which depend on each other: errors are over groups.
    training, held_out: pictures of the two sides of the checkpoint's split, if the study is of its pictures.
    """
    model: UNet
    checkpoint: dict
    x: np.ndarray                   # (n, H, W, C) uint8
    labels: np.ndarray = None       # (n,) class, −1: none
    groups: np.ndarray = None       # (n,)
    training: np.ndarray = None
    held_out: np.ndarray = None
    training_groups: np.ndarray = None
    held_out_groups: np.ndarray = None
    versus: tuple = ()              # pairs of Trained
    sigmas: tuple = (0.3, 0.1)      # noise levels of φ: the first is analysed, the second compared with it
    draws: int = 20
    seed: int = 0
    device: str = "cpu"
    clusters: int = None
    pairs: int = 24
    steps: int = STEPS

    def __post_init__(self):
        if self.labels is None:
            self.labels = np.full(len(self.x), -1)
        if self.groups is None:
            self.groups = np.arange(len(self.x))
        self.sigma, self.sigma_max = self.sigmas[0], self.checkpoint["sigma_max"]

    def batch(self, rows):
        """The pictures of these rows, (len(rows), C, H, W) in [0, 1] on the device."""
        return to_batch(self.x[np.asarray(rows)], self.device)

    def rng(self, *names):
        """A numpy generator that depends on the seed and these names alone: each use of chance has some."""
        return np.random.default_rng(seed_of(self.seed, *names))

    def noise(self, *names):
        """A torch generator on the device that depends on the seed and these names alone."""
        return seeded(self.device, self.seed, *names)

    def choose(self, n, *names):
        """Rows of n different pictures (or all), in a random order."""
        return self.rng(*names).permutation(len(self.x))[:n]

    def known_sigmas(self, *sigmas):
        """Those of these noise levels that the network knows; its largest one if it knows none."""
        return known_sigmas(sigmas, self.sigma_max)

    def draws_at(self, sigma):
        """Noise draws of E_z at σ: below 0.3 the variance of ā falls faster than σ; fewer draws suffice."""
        return max(1, round(self.draws * min(1, sigma / 0.3)))

    @functools.cached_property
    def network(self):
        """The View of the trained network."""
        return look(self, self.model)

    @functools.cached_property
    def untrained(self):
        """Views of the same network before its training, from three seeds."""
        views = []
        for k in range(3):
            x = self.batch(self.choose(64, "start of a null", k))
            model = untrained_network(self.checkpoint, x, seed_of(self.seed, "null", k))
            views.append(look(self, model))
        return views

    def nulls(self, name):
        """The three Views of a null: untrained, shuffled or Gaussian.

        shuffled: every channel of φ is permuted over the pictures, in the same way at all σ: the marginals
        stay, joint structure goes. Gaussian: φ's mean and covariance at the first σ, nothing else.
        """
        if name == "untrained":
            return self.untrained
        network, views = self.network, []
        for k in range(3):
            if name == "Gaussian":
                null = {self.sigma: gaussian_like(network.code, self.seed + k)}
            else:
                order = self.rng("shuffled", k).random(network.code.shape).argsort(0)
                order = torch.from_numpy(order)            # (n, d)
                null = {sigma: code.gather(0, order) for sigma, code in network.phi.items()}
            views.append(View(null))
        return views

    @functools.cached_property
    def alive(self):
        """Is M in use? An Alive; beyond its limits lie networks that did not use M at all (README)."""
        rows, use, why_not = self.choose(256, "use of M"), {}, []
        for sigma, loss in use_of_M(self.model, self.batch(rows)).items():
            use[sigma] = estimate(loss, self.groups[rows])
        code = self.network.code
        cosine, silent = variety(code).values()
        if not use[0.5].value >= 0.1:                      # NaN is no use either
            why_not.append(f"use {use[0.5].value:.2f} dB at σ 0.5")
        if not cosine <= 0.98:
            why_not.append(f"mean cosine {cosine:.4f} between pictures")
        if silent > 0.1 * code.shape[1]:
            why_not.append(f"{silent} of {code.shape[1]} channels silent")
        return Alive(use, cosine, silent, ", ".join(why_not))


@torch.no_grad()
def look(study, model):
    """The View of a network: φ of all pictures at every σ of the study, and M's maps at the first."""
    def maps_of_M(y):
        return model.encode(y)[0]

    codes, maps, n = {}, [], len(study.x)
    for sigma in study.sigmas:
        parts, progress = [], Progress()
        for start in range(0, n, BATCH):
            x = study.batch(range(start, min(start + BATCH, n)))
            generator = study.noise("φ", round(1e6 * sigma), start)
            mean_maps = expectation(maps_of_M, x, sigma, study.draws_at(sigma), generator)
            parts.append(mean_maps.mean((2, 3)).cpu())     # of (≤ BATCH, d, h, w)
            if sigma == study.sigma and start < MAPS:
                maps.append(mean_maps.cpu())
            progress(start / n, f"φ at σ {sigma:g}")
        codes[sigma] = torch.cat(parts)                    # (n, d)
    return View(codes, model, torch.cat(maps)[:MAPS])


# Statistics

def estimate(values, groups=None):
    """Mean of values (n,) and its standard error, an Estimate. Values of one group depend on each other.

    Cluster-robust: the error is of the sums Σ(value − mean) of the groups (n,); NaN if there is only one.
    """
    values = np.asarray(values, float)
    if groups is None:
        groups = np.arange(len(values))
    mean = float(values.mean())
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, values - mean)
    n = len(sums)
    if n < 2:
        return Estimate(mean, math.nan)
    variance = n / (n - 1) * np.square(sums).sum()
    return Estimate(mean, math.sqrt(variance) / len(values))


def bootstrap(statistic, rng, *arrays, samples=300):
    """Estimate of statistic(*arrays); its error is the SD over resamples of their entries, with replacement.

    The arrays are equally long: an entry of one goes with the same entry of the others.
    """
    n = len(arrays[0])
    if n < 2:
        return UNKNOWN
    resampled = []
    for _ in range(samples):
        chosen = rng.integers(n, size=n)
        resampled.append(statistic(*[array[chosen] for array in arrays]))
    return Estimate(float(statistic(*arrays)), float(np.nanstd(resampled)))


def difference(a, b):
    """a − b of two independent Estimates."""
    return Estimate(a.value - b.value, math.hypot(a.error, b.error))


def farthest(number):
    """How far from 0 an Estimate may be, by two standard errors."""
    return abs(number.value) + 2 * number.error


def beyond(number, sign=1, limit=0.0):
    """Is an Estimate above a limit (sign −1: below) by two standard errors? None if its error is unknown."""
    if not math.isfinite(number.error):
        return None
    return bool(sign * (number.value - limit) > 2 * number.error)


def participation_ratio(values, dim=-1):
    """PR(v) = ‖v‖₁² / (d ‖v‖₂²) along `dim` (§2.2), in [1/d, 1]: the share that is active; NaN for v = 0."""
    l1, l2_square = values.abs().sum(dim), values.square().sum(dim)
    return l1.square() / (values.shape[dim] * l2_square)


def kurtosis(values):
    """E[(v − m)⁴] / s⁴ along dimension 0: 3 for a Gaussian, more for heavier tails; NaN for a constant."""
    centred = values - values.mean(0)
    variance = (centred ** 2).mean(0)
    return (centred ** 4).mean(0) / variance ** 2


def otsu(values):
    """Otsu's threshold, which parts values (n,) in two, and the share of their variance between the parts.

    The share is 3/4 for a uniform distribution, 2/π for a Gaussian, 1 for two points; NaN for a constant.
    """
    values = np.sort(values)
    if len(values) < 2 or values[0] == values[-1]:
        return math.nan, math.nan
    n, sums = len(values), np.cumsum(values)
    size = np.arange(1, n)                                 # of the lower part
    low = sums[:-1] / size                                 # the means of the parts
    high = (sums[-1] - sums[:-1]) / (n - size)
    between = size * (n - size) / n ** 2 * (high - low) ** 2
    k = between.argmax()
    return (values[k] + values[k + 1]) / 2, between[k] / values.var()


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, where both are finite; NaN if one is constant."""
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = ranks(a[finite]), ranks(b[finite])
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values):
    """Twice the rank of each value; equal ones share the mean of theirs."""
    ordered = np.sort(values)
    return np.searchsorted(ordered, values) + np.searchsorted(ordered, values, "right")


def less_colour(x):
    """Pictures (n, C, H, W) minus their mean colour, as unit vectors (n, C·H·W)."""
    centred = x - x.mean((2, 3), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1)


# §2.2, Denoising and channel sparsity (Fig. 1, 10)

@functools.cache
@torch.no_grad()
def block_averages(study, model):
    """E_z[ā_j(x + σz)] at both sides of every block, of DETAIL pictures: {σ: {block: Sides of (m, d)}}.

    And a second estimate at σ₁ = 0.5, with noise of its own: {block: Sides}. With fewer draws than φ has, the
    cosine of two estimates is too low, most so for M: by 0.02 with four.
    """
    x = study.batch(study.choose(DETAIL, "detail"))
    sigma_1, = study.known_sigmas(0.5)
    sigmas = sorted({study.sigma, sigma_1, *study.known_sigmas(*SIGMAS)})
    if model is not study.model:                           # of a null only what is judged
        least = min(0.2, sigma_1, study.sigma)
        sigmas = [sigma for sigma in sigmas if sigma == 0 or sigma >= least]
    estimates = []
    for k, sigma in enumerate([*sigmas, sigma_1]):
        is_second = k == len(sigmas)
        generator = study.noise("all blocks", round(1e6 * sigma), is_second)
        draws, mean = study.draws_at(sigma), {}
        for _ in range(draws):
            z = torch.randn(x.shape, generator=generator, device=x.device)
            for block, sides in model.activations(x + sigma * z).items():
                before = mean.get(block, (0, 0))
                mean[block] = Sides(
                    before[0] + sides.input.cpu() / draws,
                    before[1] + sides.output.cpu() / draws)
        estimates.append(mean)
    return dict(zip(sigmas, estimates)), estimates[-1]


def sparsity(study, view):
    """Fig. 1, 10: PR of ā at the input and the output of every block, one value a picture.

    change: from input to output. Of several blocks, decoder and encoder are the one that goes least in the
    paper's direction. E1 and D1, which have a picture at one side, are left out. phi_pr: of φ itself.
    """
    phi_pr = participation_ratio(view.code.double())
    numbers = {"phi_pr": estimate(phi_pr, study.groups)}
    if view.model is None:                                 # shuffled φ has no blocks
        return numbers
    averages, _ = block_averages(study, view.model)
    groups = study.groups[study.choose(DETAIL, "detail")]
    pr, change = {}, {}
    for block, sides in averages[study.sigma].items():
        if block not in ("E1", "D1"):
            before, after = [participation_ratio(side.double()).numpy() for side in sides]
            pr[block] = Sides(before, after)
            change[block] = estimate(after - before, groups)
    decoder = [change[block] for block in change if block.startswith("D")]
    encoder = [change[block] for block in change if block.startswith("E")]
    return numbers | {
        "pr": pr,
        "change": change,
        "M": change["M"],
        "decoder": max(decoder, default=UNKNOWN),
        "encoder": min(encoder, default=UNKNOWN)}


# §2.3, Robustness of representation to noise (Fig. 2, 11)

def stability(study, view):
    """Fig. 2, 11: cos(ā(σ₁ = 0.5), ā(σ₂)) at every block's output against σ₂; at σ₂ = σ₁ the noise differs.

    lead: M's mean cosine over σ₂ ≥ 0.2 minus that of the next best curve, which may be that of M and
    *another* picture: a constant is perfectly stable. fall: M's cosine at σ₂ = σ₁ minus that at 0, minus the
    same of the block that falls most of the others. norm: ‖φ‖ at σ = 0 over that at σ₁. D1, whose output is
    a picture, is left out.
    """
    averages, again = block_averages(study, view.model)
    groups = study.groups[study.choose(DETAIL, "detail")]
    sigmas = list(averages)
    start, at_sigma_1 = [sigmas.index(*study.known_sigmas(sigma)) for sigma in (0.2, 0.5)]

    def cosines(block, shift=0):                           # (σ₂, m)
        curve = []
        for sides in averages.values():
            output = sides[block].output.roll(shift, 0)
            curve.append(F.cosine_similarity(again[block].output, output))
        return torch.stack(curve).numpy()

    curves = {block: cosines(block) for block in again if block != "D1"}
    fall = {block: curve[at_sigma_1] - curve[0] for block, curve in curves.items()}
    curves["M of another picture"] = cosines("M", shift=1)
    mean = {block: curve[start:].mean(0) for block, curve in curves.items()}
    lead, rival = ahead_of_others(mean, groups)
    most_falling, _ = ahead_of_others(fall, groups)
    at_zero, at_one = [averages[sigmas[k]]["M"].output.norm(dim=1) for k in (0, at_sigma_1)]
    return {
        "lead": lead,
        "rival": rival,
        "fall": most_falling,
        "norm": estimate(at_zero / at_one.clamp(min=1e-12), groups),
        "sigma_2": sigmas,
        "curves": curves}


def ahead_of_others(values, groups):
    """M's values (m,) minus those of the block whose mean is next: Estimate, its name. {block: (m,)}."""
    means = {block: values[block].mean() for block in values if block != "M"}
    rival = max(means, key=means.get)
    return estimate(values["M"] - values[rival], groups), rival


# §2.4, Denoising and channel selectivity (Fig. 3, 4, 12)

def channel_selectivity(code):
    """PR of each channel over the pictures of code (n, d), (d,): small if few excite it, NaN if none."""
    return participation_ratio(code.double(), 0).numpy()


def specialised_and_common(code):
    """Channels of code (n, d) whose PR is below, and above, Otsu's threshold; each ordered by PR. Or Skip."""
    pr = channel_selectivity(code)
    order = np.argsort(pr)
    order = order[np.isfinite(pr[order])]
    threshold, _ = otsu(pr[order])
    if math.isnan(threshold):
        raise Skip("all channels of φ are equally selective")
    is_low = pr[order] < threshold
    return order[is_low], order[~is_low]


def top_pictures(code, channel):
    """Rows of the at most nine pictures that excite a channel most, largest first; none that do not."""
    response = code[:, channel]
    excited = int((response > 1e-6).sum())
    return response.topk(min(9, excited)).indices.numpy()


def selectivity(study, view):
    """Fig. 3, 12: PR of every channel over the data set; one that is on in a share p of it has PR p.

    bimodality: the share of PR's variance that lies between two parts (`otsu`). common: the share of
    channels that respond to most pictures, PR > 1/2. uneven: the largest distance of PR's distribution to a
    uniform one.
    """
    every, rng = channel_selectivity(view.code), study.rng("bootstrap of channels")
    pr = every[np.isfinite(every)]
    return {
        "pr": every,
        "threshold": otsu(pr)[0],
        "bimodality": bootstrap(bimodality, rng, pr),
        "common": estimate(pr > 0.5),
        "uneven": bootstrap(unevenness, rng, pr)}


def bimodality(values):
    """The share of the variance of values (n,) that lies between the two parts of `otsu`."""
    return otsu(values)[1]


def unevenness(values):
    """The largest distance between the sorted values (n,) and n that are evenly spread over [0, 1]."""
    uniform = (np.arange(len(values)) + 0.5) / len(values)
    return np.abs(np.sort(values) - uniform).max()


def attributes(study, view):
    """Fig. 4: three pictures, and the three specialised channels that each excites most.

    A channel's response is divided by its root mean square over the data set: channels differ in scale.
    """
    code = view.code
    special, _ = specialised_and_common(code)
    rows = study.choose(3, "attributes")
    relative = code[:, special] / code[:, special].square().mean(0).sqrt()
    strongest = relative[rows].topk(min(3, len(special)))
    return {
        "rows": rows,
        "responses": strongest.values,                     # (3, 3)
        "channels": special[strongest.indices.numpy()]}


# §2.5, Denoising and emergent semantic similarity (Fig. 5, 14)

def nearest(code, rows, k):
    """Rows (q, k) of the k pictures nearest to each of `rows` (q,), by cosine of code (n, d), in order."""
    unit = F.normalize(code, dim=1)
    cosine = unit[rows] @ unit.T                           # (q, n)
    cosine[np.arange(len(rows)), rows] = -2                # not itself
    k = min(k, len(code) - 1)
    return cosine.topk(k, dim=1).indices.numpy()


def chance_agreement(labels):
    """Mean `class_agreement` of neighbours drawn by lot; NaN if nothing could agree, or differ."""
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        return math.nan
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def class_agreement(code, labels):
    """Share of a picture's ten nearest by cosine that are of its class, (N,); all NaN as by chance.

    code: (N, d). labels: (N,), of pictures that have a class.
    """
    if math.isnan(chance_agreement(labels)):
        return np.full(len(labels), math.nan)
    near = nearest(code, np.arange(len(labels)), 10)
    return (labels[near] == labels[:, None]).mean(1)


def neighbourhoods(code, rows, size):
    """Rows (q, size) of pictures: each of `rows` (q,) and the nearest to it."""
    return np.column_stack([rows, nearest(code, rows, size - 1)])


def subspace_gap(code, near, k=3):
    """How much better a neighbourhood's directions explain it than those of the one before, (q,), ≤ 1.

    near: q neighbourhoods, rows (q, size) of code (n, d). Directions: k singular vectors of every second
    member, minus their part along the mean of these: a mean far from 0 makes a cluster, but no subspace.
    Explained: the share of ‖·‖² of the other members, minus the same part, that lies in these directions.
    """
    def share(bases):
        return (others @ bases.mT).square().sum((1, 2)) / total

    members = code[near].double()                          # (q, size, d)
    mean = F.normalize(members[:, ::2].mean(1, keepdim=True), dim=2)           # (q, 1, d)
    members = members - members @ mean.mT * mean
    _, _, directions = torch.linalg.svd(members[:, ::2], full_matrices=False)
    bases = directions[:, :k]                              # (q, k, d)
    others = members[:, 1::2]
    total = others.square().sum((1, 2)).clamp(min=1e-30)
    return (share(bases) - share(bases.roll(1, 0))).numpy()


def neighbours(study, view):
    """Fig. 5, 14: nearest pictures by cosine of φ and of pixels; class agreement; union of subspaces.

    lead, lead_colour: class agreement of φ minus that of pixels, and of pixels minus their mean colour.
    subspaces: `subspace_gap` of twenty neighbourhoods. Shuffled and Gaussian φ ask whether neighbours
    share directions just because they are neighbours; with classes they agree by chance alone.
    """
    rows = study.choose(POOL, "pool")
    x, code, labels = study.batch(rows).cpu(), view.code[rows], study.labels[rows]
    spaces = {"φ": code, "pixels": x.flatten(1), LESS_COLOUR: less_colour(x)}
    size = min(24, len(rows) // 3)
    gaps = subspace_gap(code, neighbourhoods(code, np.arange(20), size))
    unlike = int((F.normalize(code) @ F.normalize(code[:1]).T).argmin())
    pair = [0, unlike]                                     # two pictures, the least alike
    numbers = {
        "chance": chance_agreement(labels),
        "subspaces": estimate(gaps),
        "neighbourhoods": rows[neighbourhoods(code, pair, size)],
        "nearest in φ": rows[nearest(code, pair, 8)],
        "nearest in pixels": rows[nearest(spaces["pixels"], pair, 8)]}
    known = labels >= 0
    if known.any():
        groups, agreement = study.groups[rows][known], {}
        for name, space in spaces.items():
            agreement[name] = class_agreement(space[known], labels[known])
            numbers[f"agreement, {name}"] = estimate(agreement[name], groups)
        numbers["lead"] = estimate(agreement["φ"] - agreement["pixels"], groups)
        numbers["lead_colour"] = estimate(agreement["φ"] - agreement[LESS_COLOUR], groups)
    return numbers


# §2.5, Emergent clusters (Fig. 6, 15, 16)

class Apart(NamedTuple):
    """Fig. 6, of p pairs of clusters, or of classes: distance of centres, SD along their line, mean ratio."""
    distance: np.ndarray            # (p,)
    deviation: np.ndarray           # (p,)
    ratio: Estimate


def pairs_apart(study, code, labels):
    """Apart, of a hundred pairs of labels that five pictures or more have; None if fewer than two have."""
    try:
        apart, pairs = pair_separations(code, labels, study.rng("pairs of groups"))
    except ValueError:
        return None
    distance, deviation = apart.T
    ratio = distance / deviation.clip(1e-12)
    return Apart(distance, deviation, Estimate(ratio.mean(), pairs_error(ratio, pairs)))


def pairs_error(values, pairs):
    """Standard error of the mean of values (p,) of pairs (p, 2); NaN for one pair.

    Two pairs that share a member depend on each other: their product counts in the variance of the sum.
    """
    if len(values) < 2:
        return math.nan
    centred = values - values.mean()
    of_members = np.bincount(pairs.flatten(), centred.repeat(2))               # sums over a member's pairs
    squares = centred @ centred                            # which of_members² counts twice
    variance = max(of_members @ of_members - squares, squares)
    return math.sqrt(variance) / len(values)


def clusters(study, view):
    """Fig. 6, 15, 16: K-means on φ; how far apart clusters are, beside classes; how stable they are.

    K: --clusters, or 100 (the least of the paper's runs), at most a twentieth of the pictures. ratio:
    distance over SD of pairs of clusters. at_next_sigma: adjusted Rand index to the clusters at the next σ,
    mean over two seeds; seeds: between these.
    """
    n = len(study.x)
    K = study.clusters or max(2, min(100, n // 20))
    if K > n // 2:
        raise Skip(f"{n} pictures cannot make {K} clusters; give a smaller --clusters or more --images")
    code, *at_others = view.phi.values()
    labels, again = [k_means(study, code, K, seed) for seed in (0, 1)]
    apart = pairs_apart(study, code, labels)
    if apart is None:
        raise Skip("fewer than two clusters have five pictures")
    numbers = {
        "K": K,
        "apart": apart,
        "ratio": apart.ratio,
        "least": (apart.distance / apart.deviation).min(),
        "seeds": adjusted_rand_index(labels, again)}
    if view is study.network:
        numbers["labels"] = labels
    if at_others:
        other = k_means(study, at_others[0], K, 0)
        indices = [adjusted_rand_index(one, other) for one in (labels, again)]
        numbers["at_next_sigma"] = estimate(indices)
    return numbers | beside_classes(study, code, apart)


def beside_classes(study, code, apart):
    """The part of `clusters` that needs classes; {} without two of five pictures or more.

    lead: ratio of clusters minus that of classes. start: adjusted Rand index of a start from class centroids
    to random starts, mean over two seeds; start_seeds: between these; start_classes: to the classes.
    """
    classes = pairs_apart(study, code, study.labels)
    if classes is None:
        return {}
    known = study.labels >= 0
    centroids = torch.stack([code[study.labels == c].mean(0) for c in np.unique(study.labels[known])])
    K = len(centroids)
    moved = k_means(study, code, K, 0, centroids)
    random = [k_means(study, code, K, seed) for seed in (2, 3)]
    indices = [adjusted_rand_index(moved, labels) for labels in random]
    return {
        "classes": classes,
        "lead": difference(apart.ratio, classes.ratio),
        "start": estimate(indices),
        "start_seeds": adjusted_rand_index(*random),
        "start_classes": adjusted_rand_index(moved[known], study.labels[known])}


def k_means(study, code, K, seed, init="k-means++"):
    """Labels (n,) of K-means on code (n, d), the best of three restarts."""
    model = KMeans(K, init=init, n_init=3, seed=study.seed + seed, device=study.device)
    return model.fit(code).labels_.cpu().numpy()


# App. B.2, Channels (Fig. 13)

def map_statistics(maps):
    """Of M's maps (n, d, h, w): spatial PR (d,), dimension (d,).

    Spatial PR: over the h·w places of a map, averaged over pictures with weight φ[i], since the map of a
    silent channel has no shape. Dimension: of the maps seen as vectors of h·w numbers, (Σλ)²/Σλ² over the
    eigenvalues λ of their covariance.
    """
    maps = maps.flatten(2).double()                        # (n, d, hw)
    weight = maps.mean(2)
    pr = participation_ratio(maps).nan_to_num()            # (n, d)
    spatial = (weight * pr).sum(0) / weight.sum(0)
    centred = maps - maps.mean(0)
    covariance = torch.einsum("ndp,ndq->dpq", centred, centred)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)     # Σλ; Σλ² is the sum of the entries' squares
    dimension = trace.square() / covariance.square().sum((1, 2))
    return spatial.numpy(), dimension.numpy()


def gratings(size, channels, count=8, phases=4):
    """Sinusoids of 1 … size/3 cycles a picture: (frequencies, angles, phases, channels, size, size)."""
    waves, place = [], (torch.arange(size) + 0.5) / size
    for frequency in np.geomspace(1, size / 3, count):
        for angle in np.arange(count) * math.pi / count:
            along = math.cos(angle) * place + math.sin(angle) * place[:, None]
            for phase in np.arange(phases) / phases:
                waves.append(torch.sin(2 * math.pi * (frequency * along + phase)))
    waves = torch.stack(waves).view(count, count, phases, 1, size, size)
    return (0.5 + 0.5 * waves).expand(-1, -1, -1, channels, -1, -1)


def tuning(study, model):
    """Mean φ over the phases of each grating minus φ of a gray field: (d, frequencies, angles)."""
    bank = gratings(study.checkpoint["size"], model.channels).to(study.device)
    gray = torch.full_like(bank[0, 0], 0.5)                # as many as there are phases
    x = torch.cat([gray, bank.flatten(0, 2)])
    draws = math.ceil(study.draws / 4)                     # the mean over phases does the rest
    code = phi(model, x, study.sigma, draws, study.noise("gratings")).cpu()
    of_gray, of_gratings = code.split([len(gray), len(x) - len(gray)])
    response = of_gratings.unflatten(0, bank.shape[:3]).mean(2) - of_gray.mean(0)
    return response.permute(2, 0, 1).numpy()


def channels(study, view):
    """Fig. 13: rank correlation of PR over the pictures with what it goes with, channel by channel.

    PR is of every second picture, kurtosis of the others: both are made by the same few values. tuning: the
    share of 64 gratings that raise a channel above a gray field's value by more than half of what the best
    one does. stability: the correlation over pictures of its values at σ and at the next σ. contrast: by how
    much the median |kurtosis − 3| of specialised channels exceeds that of common ones, `near`.
    """
    code, *at_others = [code.double() for code in view.phi.values()]
    pr, heaviness = channel_selectivity(code[::2]), kurtosis(code[1::2]).numpy()
    spatial_pr, dimension = map_statistics(view.maps)
    response = tuning(study, view.model).clip(0)           # (d, frequencies, angles)
    best = response.max((1, 2), keepdims=True)
    share = (response > best / 2).mean((1, 2))
    properties = {
        "kurtosis": heaviness,
        "spatial PR": spatial_pr,
        "PCA dimension": dimension,
        "tuning": np.where(best[:, 0, 0] > 0, share, math.nan)}
    if at_others:
        a, b = code - code.mean(0), at_others[0] - at_others[0].mean(0)
        is_constant = (a == 0).all(0) | (b == 0).all(0)
        correlation = F.cosine_similarity(a, b, dim=0)
        properties["stability"] = correlation.masked_fill(is_constant, math.nan).numpy()
    rng = study.rng("bootstrap of channels")
    numbers = {
        "pr": pr,
        "properties": properties,
        "near": tails(pr, heaviness)[0],
        "contrast": bootstrap(contrast_of_tails, rng, pr, heaviness, samples=100)}
    for name, values in properties.items():
        numbers[name] = bootstrap(rank_correlation, rng, pr, values)
    return numbers


def tails(pr, heaviness):
    """Median |kurtosis − 3| of common channels; that of specialised ones minus it. NaN without two parts."""
    finite = np.isfinite(pr) & np.isfinite(heaviness)
    pr, away = pr[finite], abs(heaviness[finite] - 3)
    threshold, _ = otsu(pr)
    if math.isnan(threshold):
        return math.nan, math.nan
    common = np.median(away[pr >= threshold])
    return common, np.median(away[pr < threshold]) - common


def contrast_of_tails(pr, heaviness):
    """By how much the tails of specialised channels are heavier than those of common ones."""
    return tails(pr, heaviness)[1]


# §3, Conditional densities (Fig. 8, 14 right, 21)

@functools.cache
def densities(study):
    """Eq. 4 for random pairs: rows (p, 2), the σ of the integral, a `conditional_distance` for each pair.

    The integral runs from σ = 0.2 on, as part of the definition: towards 0 it diverges.
    """
    n = min(study.pairs, len(study.x) // 2)
    pairs = study.choose(2 * n, "pairs").reshape(-1, 2)
    sigmas = np.geomspace(min(0.2, study.sigma_max / 3), study.sigma_max, 5)
    distances, progress = [], Progress()
    for k, pair in enumerate(pairs):
        progress(k / n, f"Eq. 4, pair {k + 1} of {n}")
        x1, x2 = study.batch(pair)
        generator = study.noise("Eq. 4", k)
        distance = conditional_distance(study.model, x1, x2, sigmas, 2, study.draws, generator)
        distances.append(distance)                         # of two draws: d² is then known to some 4 %
    return pairs, sigmas, distances


def embedding(study, view):
    """Fig. 8: Eq. 4, d²(p₁, p₂), of the trained network against ‖φ₁ − φ₂‖² of a view; inequality (3).

    Nulls: does another φ, or the distance of the pixels, predict the same d²?
    """
    pairs, sigmas, distances = densities(study)
    x1, x2 = [study.batch(rows) for rows in pairs.T]
    # φ at the integral's largest σ, where it is all that tells the densities apart: rank correlation .92, .82
    # (textures, photos); with the mean of ‖φ₁ − φ₂‖² over the integral's σ .66, .76, with φ at 0.3 .44, .70
    phi1, phi2 = [phi(view.model, x, sigmas[-1], study.draws, study.noise("Fig. 8")) for x in (x1, x2)]
    d2 = np.array([distance[0] for distance in distances])
    pixels = prediction(study, square_distance(x1, x2), d2)
    return prediction(study, square_distance(phi1, phi2), d2) | {
        "pairs": pairs,
        "sigmas": sigmas,
        "d2": d2,
        "distances": distances,
        "nulls": {"pixels": [pixels]}}


def square_distance(a, b):
    """‖a − b‖² of each row, (n,)."""
    return (a - b).flatten(1).square().sum(1).cpu().numpy()


def prediction(study, square, d2):
    """How well squared distances (p,) predict d2 (p,): rank correlation, and how their ratio varies.

    A, B: the least and the largest d2/square; log_ratio: log B/A, which grows with the number of pairs;
    percentiles: 95th over 5th.
    """
    ratio, rng = d2 / square.clip(1e-30), study.rng("bootstrap of pairs")
    low, high = np.quantile(ratio, [0.05, 0.95])
    return {
        "square": square,
        "A": ratio.min(),
        "B": ratio.max(),
        "percentiles": high / low,
        "rank": bootstrap(rank_correlation, rng, square, d2),
        "log_ratio": bootstrap(log_range, rng, ratio)}


def log_range(values):
    """The logarithm of the largest value over the least."""
    return np.log(values.max() / values.min())


# §3, Stochastic image reconstruction (Fig. 7, 19, 20)

def algorithm_1(study, encoder, x, samples, name, measure_before=False):
    """Algorithm 1 around each of x (k, C, H, W), told φ by `encoder`: [samples (S, C, H, W)], levels."""
    model = told_by(encoder, study.model)
    sigmas = sigma_schedule(study.sigma_max, steps=study.steps)
    targets = [Target(f"picture {k}", picture[None], None) for k, picture in enumerate(x)]
    seed = seed_of(study.seed, name)
    return around(model, study.checkpoint, targets, samples, sigmas, seed, measure_before=measure_before,
                  progress=Progress())


@torch.no_grad()
def match_noisy(study, x, sigma):
    """Fig. 20: by how much σ̂ = ‖s‖/√n of noisy pictures x + σz changes: after / before, three (n,).

    By Algorithm 2, told a picture's own φ and told another one's, and by a random step as long as the latter.
    """
    def level(y):
        return estimate_sigma(study.model.score(y)).cpu().numpy()

    generator = study.noise("Fig. 20", round(1e6 * sigma))
    z, direction = torch.randn(2, *x.shape, generator=generator, device=x.device)
    y = x + sigma * z
    phi_c = phi(study.model, x, sigma, study.draws, generator)
    same, _ = guidance_step(study.model, y, phi_c, memory=Memory())
    other, _ = guidance_step(study.model, y, phi_c.roll(1, 0), memory=Memory())
    length = (other - y).flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
    random = y + length.view(-1, 1, 1, 1) * direction
    return [level(picture) / level(y) for picture in (same, other, random)]


def layout(samples, x):
    """Correlation of pixels (minus mean colour) of samples with their target in x, minus that with others."""
    cosine = less_colour(samples) @ less_colour(x).T       # (k, k)
    with_target = cosine.diagonal()
    with_others = (cosine.sum(1) - with_target) / (len(x) - 1)
    return (with_target - with_others).cpu().numpy()


def matching(study, view, targets=8):
    """Fig. 20, 7: does Algorithm 2 keep σ̂ = ‖s‖/√n, and do samples share their target's layout?

    The largest median |after / before − 1| at any σ ≥ 0.1: in_algorithm_1, from its second noise level on
    (before, x is noise alone); own_phi, of noisy pictures; level, the larger of these two; stress, of those
    told another picture's φ; random, of a random step as long. layout, null: Algorithm 1 told the φ of an
    untrained network, the same targets and noise; the error is that of the difference.
    """
    rows = study.choose(targets, "matching")
    x = study.batch(rows)
    samples, levels = algorithm_1(study, study.model, x, 1, "matching", measure_before=True)
    before = torch.stack([level.sigma_before for level in levels]).cpu().numpy()         # (levels, k)
    after = torch.stack([level.sigma_after for level in levels]).cpu().numpy()
    judged = [k for k, level in enumerate(levels) if k > 0 and level.sigma >= min(0.1, study.sigma_max)]
    in_algorithm_1 = largest_change((after / before)[judged])
    noisy = [match_noisy(study, x, sigma) for sigma in study.known_sigmas(0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
    own_phi, stress, random = [largest_change(ratios) for ratios in zip(*noisy)]
    layouts, controls = layout(torch.cat(samples), x), []
    for null in study.untrained:
        told, _ = algorithm_1(study, null.model, x, 1, "matching")
        controls.append(layout(torch.cat(told), x))
    error = estimate(layouts - np.mean(controls, 0), study.groups[rows]).error
    return {
        "before": before,
        "after": after,
        "in_algorithm_1": in_algorithm_1,
        "own_phi": own_phi,
        "stress": stress,
        "random": random,
        "level": Estimate(max(in_algorithm_1, own_phi), 0.0),
        "layout": Estimate(layouts.mean(), error),
        "nulls": {"untrained": [{"layout": control.mean()} for control in controls]}}


def largest_change(ratios):
    """The largest median |ratio − 1| of ratios, a list of (n,); 0 if it is empty."""
    medians = [float(np.median(abs(ratio - 1))) for ratio in ratios]
    return max(medians, default=0.0)


def reconstruction(study, view, samples=8):
    """Fig. 7, 19: samples around two pictures, as many told an untrained φ, and samples without a target.

    It judges nothing: `matching` does.
    """
    rows = study.choose(2, "reconstruction")
    x = study.batch(rows)
    told, _ = algorithm_1(study, study.model, x, samples, "reconstruction")
    control, _ = algorithm_1(study, study.untrained[0].model, x, samples, "reconstruction")
    generators = [seeded("cpu", study.seed, "unconditional", k) for k in range(16)]
    mean = torch.tensor(study.checkpoint["mean"], device=study.device)
    sigma_end = min(0.04, study.sigma_max / 10)
    free, steps = sample_unconditional(study.model, mean, x.shape[1:], generators, study.sigma_max, sigma_end)
    return {"rows": rows, "steps": steps, "drawing": (x, told, control, free)}


# Paper B, Fig. 1: denoising of pictures that were seen in training, and of others

def denoising(study, view):
    """Paper B, Fig. 1: PSNR {side: [Estimate in dB at each σ]} of training and of held-out pictures.

    gap: training minus held out, at the σ where it may be largest. Errors are over pictures: these are
    independent of one another; tiles of one picture, and noise levels, are not.
    """
    if study.training is None:
        raise Skip("these are not the pictures of its training")
    sigmas = psnr_sigmas(study)

    def psnr_of(x, groups):
        values = evaluate(view.model, to_batch(x, study.device), sigmas, BATCH)
        return [estimate(values[sigma], groups) for sigma in sigmas]

    training = psnr_of(study.training[:512], study.training_groups[:512])
    held_out = psnr_of(study.held_out, study.held_out_groups)
    gaps = map(difference, training, held_out)
    return {
        "sigmas": sigmas,
        "psnr": {"training": training, "held out": held_out},
        "gap": max(gaps, key=farthest)}


def psnr_sigmas(study):
    """The noise levels of Paper B's Fig. 1: from 0.05 on, as far as the network knows them."""
    return [sigma for sigma in SIGMAS if 0.05 <= sigma <= study.sigma_max]


# Paper B, §2: generalisation (its Fig. 1, 2; --versus)

class Trained(NamedTuple):
    """One network of a pair, its training pictures (N, C, H, W) and their groups (N,), those of Pictures."""
    model: UNet
    x: torch.Tensor
    groups: np.ndarray


def load_pairs(paths, others, pictures, device):
    """The networks of --versus: (pairs of Trained, the smallest N first; rows of pictures that all held out).

    Raises UserError if both of a pair have seen a picture, or if networks or pictures are of several kinds.
    """
    networks, held_out_rows, kinds = [], np.arange(len(pictures.x)), []
    for path in [*paths, *others]:
        model, checkpoint = load_checkpoint(path, device)
        kinds.append(checkpoint["model"])
        if checkpoint["model"] != kinds[0] or checkpoint["fingerprint"] != pictures.fingerprint:
            raise UserError(f"{path}: another kind of network, or of other pictures, than {paths[0]}; only "
                            "--subset, --limit and --pictures may differ")
        rows, unseen = divide(pictures, checkpoint["flags"])
        held_out_rows = np.intersect1d(held_out_rows, unseen)
        networks.append(Trained(model, to_batch(pictures.x[rows], device), pictures.groups[rows]))
    if len(held_out_rows) < 20:
        raise UserError("fewer than 20 pictures are held out of all these trainings; a larger --val helps")
    pairs = list(zip(networks, networks[len(others):]))
    for a, b in pairs:
        if np.intersect1d(a.groups, b.groups).size:
            raise UserError("--versus: training pictures overlap; train with --subset first and --subset "
                            "second, and the same --seed")
    order = np.argsort([len(a.x) for a, _ in pairs], kind="stable")
    return [pairs[k] for k in order], held_out_rows


def posterior_mean(y, sigma, x):
    """E[x | y] (B, C, H, W) if x is one of N pictures x (N, C, H, W), equally likely; y: noisy pictures.

    It is the exact minimiser of Eq. 1 on a finite training set: memorisation itself, a softmax of
    −‖y − x_i‖²/2σ². It is told σ; a blind network reads it off y, to one part in √(2D).
    """
    device = y.device
    if device.type == "mps":                               # it has no float64
        device = "cpu"
    noisy = y.flatten(1).to(device).double()
    pictures = x.flatten(1).to(device).double()
    distances = torch.cdist(noisy, pictures)               # (B, N)
    weights = (-distances.square() / (2 * sigma ** 2)).softmax(1)
    return (weights @ pictures).view(y.shape).to(y)


def blind(model):
    """denoise(y, σ) of a network, which is not told σ."""
    def denoise(y, sigma):
        return model.denoise(y)

    return denoise


@torch.no_grad()
def psnr_curve(denoise, x, sigmas):
    """PSNR in dB of denoise(y, σ) for each of x (N, C, H, W): (σ, N). The noise is always the same."""
    curve = []
    for k, sigma in enumerate(sigmas):
        generator = seeded(x.device, "PSNR curve", k)
        y = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        x_hat = torch.cat([denoise(part, sigma) for part in y.split(BATCH)])
        curve.append(psnr(x_hat, x).cpu().numpy())
    return np.stack(curve)


def draw_from(study, model, samples=32):
    """Samples (samples, C, H, W) of a network by paper B's sampler; their noise depends on the seed alone."""
    generators = [seeded("cpu", study.seed, "samples", i) for i in range(samples)]
    x, _ = sample_unconditional(
        model,
        torch.tensor(study.checkpoint["mean"], device=study.device),
        study.batch([0]).shape[1:],
        generators,
        sigma_0=study.sigma_max,
        sigma_end=0.05,
        h_0=0.01,
        beta=0.1,
        max_steps=600)
    return x.clamp(0, 1)


def to_nearest(a, b):
    """The nearest of pictures b to each of a: (cosine of pixels minus mean colour, row), (len(a),) each."""
    unit = less_colour(a)
    cosines = [unit @ less_colour(part).T for part in b.split(POOL)]
    return torch.cat(cosines, 1).cpu().max(1)              # of (len(a), len(b))


class Examined(NamedTuple):
    """What is known of one network of a pair."""
    psnr: dict                      # {of what: dB (σ, pictures)}: of the network and of exact memorisation
    groups: np.ndarray              # of the training pictures in `psnr`
    samples: torch.Tensor           # (32, C, H, W)
    originals: torch.Tensor         # (32, C, H, W), the training picture that is nearest to each sample
    nearest: torch.Tensor           # (32,), the cosine with it
    control: torch.Tensor           # (≤ 32,), the same for held-out pictures instead of samples


def examine(study, trained, k):
    """Examined, of the k-th network of a pair: a Trained."""
    sigmas, held_out = psnr_sigmas(study), study.batch(range(len(study.x)))
    memory = functools.partial(posterior_mean, x=trained.x)
    rows = study.rng("training pictures", k).permutation(len(trained.x))[:512]
    curves = {}
    for side, x in (("training", trained.x[rows]), ("held out", held_out)):
        curves[side] = psnr_curve(blind(trained.model), x, sigmas)
        curves[f"exact, {side}"] = psnr_curve(memory, x, sigmas)
    samples = draw_from(study, trained.model)
    nearest, nearest_rows = to_nearest(samples, trained.x)
    control, _ = to_nearest(held_out[:len(samples)], trained.x)
    return Examined(curves, trained.groups[rows], samples, trained.x[nearest_rows], nearest, control)


def compare_pair(study, pair):
    """Paper B, Fig. 1, 2 for two Trained whose training sets, of N pictures each, have no picture in common.

    psnr: means of both networks, and of exact memorisation. gap (Estimate): on training pictures minus
    held-out ones, in dB, mean over σ. For each of 32 samples: agreement, the cosine with the other network's
    sample from the same noise; nearest, with its nearest training picture. copies: nearest minus control.
    """
    a, b = [examine(study, trained, k) for k, trained in enumerate(pair)]
    curves = {side: np.concatenate([a.psnr[side], b.psnr[side]], 1) for side in a.psnr}  # (σ, pictures)
    on_training = estimate(curves["training"].mean(0), np.concatenate([a.groups, b.groups]))
    on_held_out = estimate(curves["held out"].mean(0), np.tile(study.groups, 2))
    one, two = less_colour(a.samples), less_colour(b.samples)
    agreement = (one * two).sum(1).cpu()
    nearest, control = (a.nearest + b.nearest) / 2, estimate((a.control + b.control) / 2)
    return {
        "N": len(pair[0].x),
        "sigmas": psnr_sigmas(study),
        "psnr": {side: curve.mean(1) for side, curve in curves.items()},
        "gap": difference(on_training, on_held_out),
        "cosines": {"agreement": agreement, "nearest": nearest},
        "agreement": estimate(agreement),
        "nearest": estimate(nearest),
        "control": control,
        "copies": difference(estimate(nearest), control),
        "other_noise": [(one * two.roll(k, 0)).sum(1).mean().item() for k in (1, 2, 3)],
        "drawing": [x[:8] for x in (a.samples, a.originals, b.samples, b.originals)]}


def generalisation(study, view):
    """Paper B, Fig. 1, 2: `compare_pair` of study.versus, pairs of Trained, the smallest N first.

    memorised: `nearest` at the smallest N; the other numbers are those of the largest. Nulls: held-out
    pictures instead of samples, samples from other noise, and the smallest N, if there are several.
    """
    if not study.versus:
        raise Skip("it compares networks: --versus names them")
    pairs = [compare_pair(study, pair) for pair in study.versus]
    nulls = {
        "held-out": [{"memorised": pairs[0]["control"]}],
        "other-noise": [{"agreement": cosine} for cosine in pairs[-1]["other_noise"]],
        "smallest-N": pairs[:-1][:1]}
    return {**pairs[-1], "memorised": pairs[0]["nearest"], "pairs": pairs, "nulls": nulls}


# Paper B, §3: the basis in which a denoiser shrinks (its Fig. 3)

class Basis(NamedTuple):
    """x̂ = Jy + b: eigenvalues λ (m,), falling, and eigenvectors (D, m), in columns, of J's symmetric part.

    They are the m of largest |λ|: 400, or 2 Σλ if that is more, or all D. trace: Σλ over all. x_hat: (D,).
    alignment: uᵀv of J's ten leading singular pairs, 1 if J is symmetric. bias: ‖b‖/‖x̂‖.
    """
    values: torch.Tensor
    vectors: torch.Tensor
    trace: float = None
    x_hat: torch.Tensor = None
    alignment: torch.Tensor = None
    bias: float = 0.0


def wiener(x):
    """The best linear denoiser of pictures like x (n, C, H, W): denoise(y, σ), and its basis(σ).

    λ = v/(v + σ²) for principal components of variance v. It has one basis for every picture: what "adapted
    to the picture" is held against.
    """
    def eigenvalues(sigma):
        return variances / (variances + sigma ** 2)

    def denoise(y, sigma):
        components = (y.flatten(1) - mean) @ vectors       # (B, D)
        x_hat = mean + components * eigenvalues(sigma) @ vectors.T
        return x_hat.view(y.shape)

    def basis(sigma):
        return Basis(eigenvalues(sigma).cpu(), vectors.cpu())

    flat = x.flatten(1)
    mean = flat.mean(0)
    centred = flat - mean
    covariance = centred.T @ centred / len(x)              # (D, D)
    rising, vectors = torch.linalg.eigh(covariance.cpu())  # in two fifths of svd's time
    variances = rising.flip(0).clamp(min=0).to(x.device)   # (D,)
    vectors = vectors.flip(1).to(x.device)
    return denoise, basis


def jacobian(model, y):
    """J (D, D) of x̂ at y (C, H, W): wᵀJ for 64 unit vectors w at a time, from as many copies of y."""
    parts = []
    with torch.enable_grad():
        copies = y.repeat(64, 1, 1, 1).requires_grad_()
        x_hat = model.denoise(copies).flatten(1)           # (64, D), once for all w
        for w in torch.eye(y.numel()).to(y).split(64):
            k = len(w)
            gradient, = torch.autograd.grad(x_hat[:k], copies, w, retain_graph=True)
            parts.append(gradient[:k].flatten(1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def jacobian_basis(model, y):
    """The Basis of a denoiser at y (C, H, W).

    The best denoiser's J is symmetric: σ²J is the covariance of x given y.
    """
    J = jacobian(model, y)
    trace = J.trace().item()
    m = min(len(J), max(400, round(2 * trace)))
    with torch.random.fork_rng(devices=[]):                # of the vectors that both start from
        torch.manual_seed(0)
        vectors, size, V = torch.svd_lowrank((J + J.T) / 2, m, niter=4)        # a quarter of eigh's time
        U, _, V_of_J = torch.svd_lowrank(J, min(100, len(J)), niter=6)         # a thirtieth of svd's time
    sign = (vectors * V).sum(0)                            # of λ: S = UΣVᵀ is symmetric, so u = ±v
    values, order = (sign * size).sort(descending=True)
    x_hat = model.denoise(y[None]).flatten().cpu()
    b = x_hat - J @ y.flatten().cpu()
    return Basis(
        values=values,
        vectors=vectors[:, order],
        trace=trace,
        x_hat=x_hat,
        alignment=(U * V_of_J)[:, :10].sum(0),
        bias=float(b.norm() / x_hat.norm()))


def coefficients(x, basis):
    """⟨x, e_k⟩² (m,) of a picture x (C, H, W), minus its mean colour and of norm 1."""
    unit = less_colour(x[None])[0].cpu()
    return (unit @ basis.vectors).square().numpy()


def compaction(x, bases, leading):
    """How well bases suit their pictures x: two numbers a picture, (2, pictures).

    The share of its contrast in the basis's first `leading` vectors; the rank correlation of λ_k and
    ⟨x, e_k⟩², k ≤ 200.
    """
    shares, decays = [], []
    for picture, basis, count in zip(x, bases, leading):
        squares = coefficients(picture, basis)
        shares.append(squares[:count].sum())
        eigenvalues = basis.values.numpy()
        decays.append(rank_correlation(eigenvalues[:200], squares[:200]))
    return np.array([shares, decays])


def harmonics(study, view, count=3):
    """Paper B, Fig. 3: do eigenvectors of the Jacobian at a noisy picture suit the picture?

    adapted, decay: `compaction` in Σλ vectors minus that of the Wiener filter of the training pictures (or
    of the others); symmetry: mean uᵀv. Of large pictures the central 32×32. Nulls: another picture's basis;
    a network of random weights (the untrained one of the other analyses returns the mean colour: its J is 0).
    """
    def beside_linear(bases):
        adapted, decay = compaction(x, bases, leading) - of_linear
        symmetry = [float(basis.alignment.mean()) for basis in bases]
        return {
            "adapted": estimate(adapted),
            "decay": estimate(decay),
            "symmetry": estimate(symmetry)}

    rows = study.choose(len(study.x), "harmonics")
    sigma = study.sigma or 0.1
    x = central(study.batch(rows[:count]))
    y = x + sigma * torch.randn(x.shape, generator=study.noise("harmonics"), device=x.device)
    bases, progress = [], Progress()
    for i, noisy in enumerate(y):
        progress(i / len(y), f"Jacobian at picture {i + 1}")
        bases.append(jacobian_basis(view.model, noisy))
    leading = [max(1, round(basis.trace)) for basis in bases]
    if study.training is None:
        others = study.batch(rows[count:])
    else:                                                  # these are more
        others = to_batch(study.training, study.device)
    _, linear_basis = wiener(central(others))
    linear = linear_basis(sigma)
    of_linear = compaction(x, [linear for _ in x], leading)
    random = random_network(study.checkpoint, study.seed, study.device)
    random_basis = jacobian_basis(random, y[0])            # which hardly depends on the picture
    return {
        "sigma": sigma,
        **beside_linear(bases),
        "nulls": {
            "other-picture": [beside_linear(bases[k:] + bases[:k]) for k in range(1, len(x))],
            "random-weights": [beside_linear([random_basis for _ in x])]},
        "effective_rank": leading,
        "alignment": [basis.alignment for basis in bases],
        "bias": [basis.bias for basis in bases],
        "drawing": (x, y, bases, linear)}


def central(x, side=32):
    """The central side×side pixels of pictures (N, C, H, W), or all if there are fewer."""
    top = max(0, x.shape[2] - side) // 2
    left = max(0, x.shape[3] - side) // 2
    return x[:, :, top:top + side, left:left + side]


# Paper B, §3: near-optimal denoising of regular pictures (its Fig. 4, 5)

FIT = [10 ** (-dB / 20) for dB in range(0, 21, 2)]         # σ from 1 to 0.1: input PSNR 0 to 20 dB


def slope(psnr):
    """Least-squares slope of output PSNR (len(FIT), …), in dB, against input PSNR."""
    return np.polyfit(input_psnr(FIT), psnr, 1)[0]


def disc_tangents(size, place):
    """(a disc (1, size, size), an orthonormal basis (D, 5) of the tangent space of all discs there).

    place (5,): position, across and down, radius, ground, intensity; by central differences.
    """
    changes = []
    for step in 1e-4 * np.eye(5):
        after = draw_disc(size, *(place + step))
        before = draw_disc(size, *(place - step))
        changes.append((after - before).flatten())
    basis, _ = np.linalg.qr(np.stack(changes, 1))
    disc = draw_disc(size, *place)
    return torch.from_numpy(disc).float(), torch.from_numpy(basis).float()


def disc_jacobian(study, model, discs=4):
    """Paper B, Fig. 5, right: the first 12 λ at noisy discs of at most 32×32 pixels, and tangent_share, the
    share of the tangent space's five dimensions that the first five eigenvectors hold.
    """
    values, shares = [], []
    side = min(32, study.checkpoint["size"])
    rng, generator = study.rng("discs"), study.noise("discs")
    for _ in range(discs):
        across, down = rng.uniform(0.4, 0.6, 2)
        radius = rng.uniform(0.15, 0.25)
        x, tangents = disc_tangents(side, np.array([across, down, radius, 0.2, 0.8]))
        z = torch.randn(x.shape, generator=generator, device=study.device)
        basis = jacobian_basis(model, x.to(study.device) + study.sigma * z)
        values.append(basis.values[:12])
        inside = basis.vectors[:, :5].T @ tangents         # (5, 5)
        shares.append(float(inside.square().sum() / 5))
    return {
        "eigenvalues": torch.stack(values).mean(0).numpy(),
        "tangent_share": estimate(shares)}


def regularity(study, view):
    """Paper B, Fig. 4, 5: slope of output against input PSNR, 0 to 20 dB, for pictures of known regularity.

    Optimal: A/(A + 1) for C^A pictures; 1 for discs, a manifold of five dimensions, whose least error is 5σ².
    At less noise small networks meet their own error. Null: the Wiener filter, which is blind to geometry.
    """
    data = study.checkpoint["flags"]["data"] or ""
    computed = data == "disc" or data.startswith("calpha:")
    if not computed or study.training is None or view.model.channels > 1:
        raise Skip("only for networks trained on --data disc or calpha:A, in gray, and their own pictures")
    optimum, discs = 1.0, {}
    if data == "disc":
        discs = disc_jacobian(study, view.model)
    else:
        alpha = float(data.removeprefix("calpha:"))
        optimum = alpha / (alpha + 1)
    x = to_batch(study.held_out, study.device)
    curve = psnr_curve(blind(view.model), x, FIT)          # (σ, pictures)
    linear, _ = wiener(to_batch(study.training, study.device))
    linear_curve = psnr_curve(linear, x, FIT).mean(1)
    return {
        "data": data,
        "optimum": optimum,
        "slope": estimate(slope(curve)),
        "linear": slope(linear_curve),
        "sigmas": FIT,
        "psnr": curve.mean(1),
        "linear_psnr": linear_curve,
        **discs,
        "nulls": {"Wiener": [{"slope": slope(linear_curve)}]}}


# The claims: the whole court

class Claim(NamedTuple):
    """A sentence of the papers, the number that tests it, and what that number must do."""
    text: str
    place: str
    number: str                     # "analysis.key", an Estimate
    sign: int                       # +1: it should be large, −1: small, 0: only different from the nulls
    effect: float                   # by how much it must differ from the mean of each null at least
    nulls: str = "untrained"
    rule: Callable = None           # a condition of its own: numbers -> True, False, None (cannot be told)
    rule_text: str = ""             # what the number is, and the rule; {key} stands for another number
    only: str = ""                  # the kind of pictures of which the paper says it; of others not counted
    about_phi: bool = True          # not judged if M is not in use


class Verdict(NamedTuple):
    """What became of a claim: "holds", "fails" or "not comparable"."""
    claim: str
    place: str
    only: str
    verdict: str
    value: float
    error: float
    nulls: dict                     # {name: (mean, SD, number of replicates)}
    why: str


def judge(claim, numbers, nulls, why_not_alive=""):
    """The Verdict, from the numbers of the claim's analysis and {null: [the same of each replicate]}.

    A claim holds if its own rule does (without one: if the number is beyond 0 by two standard errors) and if
    the number is beyond each of its nulls. It is not comparable if the number, its error, the rule or a null
    is not known.
    """
    key = claim.number.split(".")[1]
    tested = numbers.get(key, UNKNOWN)
    holds, why, summary = None, "the number was not measured", {}
    if math.isfinite(sum(tested)):
        why = claim.rule_text.format_map(numbers)
        if claim.rule is None:
            holds = beyond(tested, claim.sign)
        else:
            holds = claim.rule(numbers)
    for name in claim.nulls.split():
        values = np.array([value_of(replicate, key) for replicate in nulls[name]], float)
        values = values[np.isfinite(values)]
        if not len(values):
            holds, why = None, f"there is no null to compare with ({name})"
        if holds is not None:
            summary[name] = values.mean(), spread_of(values), len(values)
            holds = holds and beyond_null(claim, tested, values)
    if claim.about_phi and why_not_alive:
        holds, why = None, "M is not in use"
    verdict = {True: "holds", False: "fails", None: "not comparable"}[holds]
    return Verdict(claim.text, claim.place, claim.only, verdict, *tested, summary, why)


def beyond_null(claim, tested, values):
    """Is an Estimate farther in the claim's direction than every replicate of a null, `values` (n,), and than
    their mean by `effect` and by two combined standard deviations?"""
    direction = claim.sign or np.sign(tested.value - values.mean())
    ahead = direction * (tested.value - values)            # (n,)
    least = max(claim.effect, 2 * math.hypot(tested.error, spread_of(values)))
    return bool(ahead.min() > 0 and ahead.mean() >= least)


def spread_of(values):
    """The standard deviation of values (n,), 0 for a single one."""
    return values.std(ddof=1) if len(values) > 1 else 0.0


def value_of(numbers, key):
    """The value of an Estimate or of a plain number; NaN if it was not measured."""
    value = numbers.get(key, UNKNOWN)
    return getattr(value, "value", value)


def above(key, limit):
    """The rule that a number exceeds a limit by two standard errors."""
    def rule(numbers):
        return beyond(numbers[key], 1, limit)

    return rule


def below(key, limit):
    """The rule that a number stays below a limit by two standard errors."""
    def rule(numbers):
        return beyond(numbers[key], -1, limit)

    return rule


def within(key, low, high):
    """The rule that a number, whatever its error, lies in [low, high]."""
    def rule(numbers):
        return low <= value_of(numbers, key) <= high

    return rule


def as_between_seeds(numbers):
    """Do clusters at two σ agree as those of two seeds do, within 0.1?"""
    return numbers["at_next_sigma"].value >= numbers["seeds"] - 0.1


def away_from_classes(numbers):
    """Does a start from classes end where random starts do, and not at the classes?"""
    return numbers["start"].value >= max(numbers["start_seeds"] - 0.1, numbers["start_classes"])


def common_near_gaussian(numbers):
    """Are common channels within 1 of a Gaussian's kurtosis, and specialised ones farther?"""
    return numbers["near"] < 1 and beyond(numbers["contrast"])


def keeps_the_level(numbers):
    """Is the change of σ̂ at most 0.05? It cannot be told where a random step changes it no more."""
    if max(numbers["level"].value, numbers["stress"], numbers["random"]) <= 0.05:
        return None
    return numbers["level"].value <= 0.05


def within_a_tenth(numbers):
    """Is the gap in PSNR, with two errors, within 0.1 dB? None if they reach over the bound."""
    if farthest(numbers["gap"]) <= 0.1:
        return True
    if abs(numbers["gap"].value) - 2 * numbers["gap"].error > 0.1:
        return False
    return None


def near_optimum(numbers):
    """On C^α pictures within 0.1 of the optimum, on discs below by more; None if a linear filter is near."""
    slope, far = numbers["slope"], numbers["optimum"] - 0.1
    if numbers["linear"] >= far:
        return None
    if numbers["data"] == "disc":
        return slope.value + 2 * slope.error < far
    return abs(slope.value - numbers["optimum"]) <= 0.1


ALL = "untrained shuffled Gaussian"
CLAIMS = [
    Claim("PR falls from the input to the output of M", "Fig. 1, 10", "sparsity.M", -1, 0.02,
          rule_text="change of the mean PR"),
    Claim("PR falls in every decoder block", "Fig. 1", "sparsity.decoder", -1, 0.02, about_phi=False,
          rule_text="change of the mean PR in the block where it falls least"),
    Claim("PR rises in every encoder block", "Fig. 1", "sparsity.encoder", 1, 0.02, about_phi=False,
          rule_text="change of the mean PR in the block where it rises least", only="imagenet"),
    Claim("φ's PR lies in 0.2–0.3", "§2.5, Fig. 1", "sparsity.phi_pr", 0, 0.02, "untrained shuffled",
          rule=within("phi_pr", 0.2, 0.3), rule_text="in the range, and not as with shuffled channels",
          only="imagenet"),
    Claim("M is the most stable block", "Fig. 2, 11", "stability.lead", 1, 0.01,
          rule_text="lead in mean cosine over the next: {rival}"),
    Claim("the direction of φ collapses as σ → 0", "Fig. 2", "stability.fall", 1, 0.05,
          rule_text="fall of M's cosine minus that of the other block that falls most"),
    Claim("φ collapses to zero as σ → 0", "App. B.3", "stability.norm", -1, 0.05,
          rule=below("norm", 0.1), rule_text="‖φ‖ at σ = 0 over that at 0.5, below a tenth"),
    Claim("channel selectivity is bimodal", "Fig. 3", "selectivity.bimodality", 1, 0.02,
          rule=above("bimodality", 0.75), only="imagenet",
          rule_text="share of variance between two groups, above a uniform distribution's 3/4"),
    Claim("the vast majority of channels are specialised", "Fig. 12", "selectivity.common", -1, 0.1,
          rule=below("common", 0.25), only="textures",
          rule_text="share of channels that most pictures excite, below 1/4"),
    Claim("most channels respond to most pictures", "Fig. 12", "selectivity.common", 1, 0, nulls="",
          rule=above("common", 0.5), only="faces",
          rule_text="share of channels that most pictures excite, above 1/2"),
    Claim("selectivity is distributed evenly", "Fig. 12", "selectivity.uneven", -1, 0.05,
          rule=within("uneven", 0, 0.2), only="bedrooms",
          rule_text="largest distance to a uniform distribution, at most 0.2"),
    Claim("φ-neighbours agree in class more than pixel-neighbours", "Fig. 5, 14", "neighbours.lead", 1, 0.02,
          rule_text="class agreement of the ten nearest, minus that in pixels"),
    Claim("φ-neighbours agree in class more than those by pixels minus mean colour", "our control",
          "neighbours.lead_colour", 1, 0.02,
          rule_text="class agreement of the ten nearest, minus that in pixels minus mean colour"),
    Claim("φ lies on a union of subspaces", "Fig. 5", "neighbours.subspaces", 1, 0.02, ALL,
          rule_text="energy of neighbours in their own three directions minus that in another group's"),
    Claim("every pair of clusters is more than 2 SD apart", "Fig. 6", "clusters.ratio", 1, 0.25, ALL,
          rule=within("least", 2, math.inf), rule_text="mean distance / SD; the least, {least:.1f}, above 2"),
    Claim("clusters are farther apart than classes", "Fig. 6", "clusters.lead", 1, 0.25, ALL,
          rule_text="mean distance / SD of clusters minus that of classes"),
    Claim("other σ give similar clusters", "App. B.3", "clusters.at_next_sigma", 1, 0.05,
          "untrained shuffled", rule=as_between_seeds,
          rule_text="Rand index; at least that between seeds, {seeds:.2f}, minus 0.1"),
    Claim("a start from class centroids gives similar clusters", "App. B.3", "clusters.start", 1, 0.05, ALL,
          rule=away_from_classes, rule_text="Rand index to random starts; at least that between these, "
          "{start_seeds:.2f}, minus 0.1, and that to the classes, {start_classes:.2f}"),
    Claim("specialised channels have heavier tails", "Fig. 13", "channels.kurtosis", -1, 0.1,
          rule_text="rank correlation of PR and kurtosis"),
    Claim("common channels are near-Gaussian", "§2.4, Fig. 13", "channels.contrast", 1, 0.5,
          rule=common_near_gaussian, rule_text="median |kurtosis − 3| is {near:.2f} for common channels "
          "(below 1), and by how much more for specialised ones"),
    Claim("specialised channels are sparser in space", "Fig. 13", "channels.spatial PR", 1, 0.1,
          rule_text="rank correlation of PR over pictures and over places"),
    Claim("maps of specialised channels have fewer dimensions", "Fig. 13", "channels.PCA dimension", 1, 0.1,
          rule_text="rank correlation of PR and dimension"),
    Claim("common channels are broadly tuned", "§2.4", "channels.tuning", 1, 0.1,
          rule_text="rank correlation of PR and the share of gratings that excite a channel"),
    Claim("common channels are the most stable to σ", "§2.4", "channels.stability", 1, 0.1,
          rule_text="rank correlation of PR and stability"),
    Claim("distance of φ strongly predicts the distance of densities", "Fig. 8", "embedding.rank", 1, 0.1,
          "untrained pixels", rule=above("rank", 0.5), rule_text="rank correlation, above 0.5"),
    Claim("embedding inequality (3) with B/A = 2.9", "Fig. 8", "embedding.log_ratio", -1, 0.2,
          "untrained pixels", rule=within("log_ratio", 0, math.log(2.9)),
          rule_text="log B/A, at most 1.06; 95th over 5th percentile {percentiles:.1f}"),
    Claim("matching keeps the noise level", "Fig. 20", "matching.level", -1, 0, nulls="",
          rule=keeps_the_level, rule_text="median |after / before − 1| of σ̂, at most 0.05; told another "
          "picture's φ {stress:.2f}"),
    Claim("samples share the target's layout", "Fig. 7", "matching.layout", 1, 0.05,
          rule_text="correlation of pixels with the target minus that with others"),
    Claim("training and held-out PSNR agree", "paper B, Fig. 1", "denoising.gap", 0, 0, nulls="",
          rule=within_a_tenth, rule_text="dB at the worst σ; with two errors within 0.1", about_phi=False),
    Claim("a small training set is memorised", "paper B, Fig. 1, 2", "generalisation.memorised", 1, 0.05,
          "held-out", rule=within("memorised", 0.95, 1.01), about_phi=False,
          rule_text="cosine to the nearest training picture at the smallest N, at least 0.95"),
    Claim("with a large training set, training and held-out PSNR agree", "paper B, Fig. 1",
          "generalisation.gap", -1, 0.1, "smallest-N", rule=within("gap", -math.inf, 0.1), about_phi=False,
          rule_text="mean difference in dB at the largest N, at most 0.1"),
    Claim("two networks with large training sets draw the same", "paper B, Fig. 2",
          "generalisation.agreement", 1, 0.05, "other-noise smallest-N",
          rule=within("agreement", 0.8, 1.01), about_phi=False,
          rule_text="cosine of samples from the same noise, at least 0.8"),
    Claim("samples of a network with a large training set are new", "paper B, Fig. 2",
          "generalisation.copies", -1, 0.05, "smallest-N", rule=within("copies", -math.inf, 0.05),
          about_phi=False, rule_text="cosine to the nearest training picture, minus that of held-out "
          "pictures; at most 0.05"),
    Claim("the basis is adapted to the picture", "paper B, Fig. 3", "harmonics.adapted", 1, 0.02,
          "other-picture random-weights", about_phi=False,
          rule_text="share of contrast that Σλ vectors hold, minus the Wiener filter's"),
    Claim("eigenvalues and coefficients decay together", "paper B, Fig. 3", "harmonics.decay", 1, 0.02,
          "other-picture random-weights", about_phi=False,
          rule_text="rank correlation of λ_k and ⟨x, e_k⟩², minus the Wiener filter's"),
    Claim("the Jacobian is nearly symmetric", "paper B, §3", "harmonics.symmetry", 1, 0.1,
          "random-weights", rule=within("symmetry", 0.84, 1.01), about_phi=False,
          rule_text="mean uᵀv of ten singular pairs, at least .84 (the authors': .84 to .98)"),
    Claim("slopes are near the optimum on C^α pictures, below it on discs", "paper B, Fig. 4, 5",
          "regularity.slope", 1, 0.02, "Wiener", rule=near_optimum, about_phi=False,
          rule_text="the optimum is {optimum:.2f}; within (on discs: below by) 0.1, where a linear filter's "
          "is not"),
]


# Drawings: the numbers of an analysis in, {name of a figure: (PIL image, what to see in it)} out

PAGE_WIDE, THIRD = (1600, 800), (528, 420)                 # sizes of plots; a full page is 1600 pixels wide
PSNR_AXES = "input PSNR (dB)", "output PSNR (dB)"


def draw_sparsity(study, numbers):
    """Fig. 1, 10: for each block the histograms of PR at its input and output."""
    plots = []
    for block, (before, after) in numbers["pr"].items():
        span = limits([*before, *after])
        lines = [
            bars(before, 30, span, "input", ORANGE),
            bars(after, 30, span, "output", GREEN)]
        plots.append(plot(THIRD, lines, "participation ratio", "pictures", block))
    text = ("Fig. 1, 10. The share of active channels (PR) before and after each block. Paper: it rises in "
            "the encoder (E), falls in M and in the decoder (D).")
    return {"sparsity": (grid(plots, 3), text)}


def draw_stability(study, numbers):
    """Fig. 2, 11: a curve a block."""
    sigmas = np.maximum(numbers["sigma_2"], 0.01)          # a logarithmic axis has no 0
    lines = []
    for name, curve in numbers["curves"].items():
        mean, sd = curve.mean(1), curve.std(1)
        lines.append(Line(sigmas, mean, name))
        if name == "M":
            lines.append(band(sigmas, mean - sd, mean + sd, GRAY))
    image = plot(PAGE_WIDE, lines, "σ₂ (leftmost point: 0)", "cosine to σ₁ = 0.5", log="x")
    text = ("Fig. 2, 11. How far each block keeps its direction when the noise changes (gray: M's SD). "
            "Paper: M is highest. Stability counts only above the cosine between different pictures.")
    return {"stability": (image, text)}


def draw_selectivity(study, numbers):
    """Fig. 3, 12: the histogram of PR, and the pictures that excite six channels most."""
    pr, threshold = numbers["pr"], numbers["threshold"]
    special, common = specialised_and_common(study.network.code)
    histogram = bars(pr, 40)
    rule = Line([threshold, threshold], [0, max(histogram.y)], "threshold (Otsu)", RED)
    cells = []
    for channel in [*special[:4], *common[:-3:-1]]:
        cells.append(exciting(study, channel, f"channel {channel}, PR {pr[channel]:.2g}", 160))
    image = plot((1600, 480), [histogram, rule], "participation ratio over the pictures", "channels of φ")
    text = ("Fig. 3, 12. Over how many pictures each channel is active (PR). Paper: two groups. Below: what "
            "excites four specialised and two common channels most; do they share anything?")
    return {"selectivity": (grid([image, grid(cells, 3)], 1), text)}


def exciting(study, channel, title, side):
    """The nine pictures that excite a channel most, in a square, with a title."""
    rows = top_pictures(study.network.code, channel)
    return titled(title, panel(study.batch(rows), side=side), 3 * side + 48)


def draw_attributes(study, numbers):
    """Fig. 4: a picture and what else excites its channels, beside one another."""
    cells = []
    for k, x in enumerate(study.batch(numbers["rows"])):
        cells.append(titled("a picture", to_image(x, 352), 400))
        for channel, response in zip(numbers["channels"][k], numbers["responses"][k]):
            cells.append(exciting(study, channel, f"channel {channel}: {response:.1f} r.m.s.", 117))
    columns = 1 + numbers["channels"].shape[1]
    text = ("Fig. 4. Left, a picture; right, what else excites the three specialised channels that it "
            "excites most. Do they show what the picture is made of?")
    return {"attributes": (grid(cells, columns), text)}


def draw_neighbours(study, numbers):
    """Fig. 5, 14: what is nearest to two targets; Fig. 5: three components of φ for their neighbourhoods."""
    sheets, near = [], numbers["neighbourhoods"]
    for k in (0, 1):
        for name in ("nearest in φ", "nearest in pixels"):
            image = panel(study.batch(numbers[name][k]), study.batch(near[k, :1]), side=256)
            sheets.append(titled(f"{name} to the framed picture", image, 790, 24))
    code = study.network.code
    special, common = specialised_and_common(code)
    lead = (code[near[0]].mean(0) - code[near[1]].mean(0))[special]
    first, second, third = special[lead.argmax()], special[lead.argmin()], common[-1]
    plots = []
    for i, j in ((first, second), (first, third), (second, third)):
        points = [dots(code[rows, i], code[rows, j]) for rows in near]
        plots.append(plot(THIRD, points, f"φ[{i}]", f"φ[{j}]"))
    nearest_text = ("Fig. 5, 14. Two pictures (framed) and the eight nearest to each, by the cosine of φ "
                    "(left) and of the pixels (right). Paper: the former share what they show.")
    spaces = (f"Fig. 5. Two specialised channels of φ, {first} and {second}, and a common one, {third}, for "
              "these two pictures and their neighbours, blue and red. Paper: either neighbourhood leaves one "
              "specialised channel (nearly) at zero: a union of planes.")
    return {"neighbours": (grid(sheets, 2), nearest_text), "subspaces": (grid(plots, 3), spaces)}


def draw_clusters(study, numbers):
    """Fig. 6, 15, 16: distances of pairs against SD, t-SNE of seven clusters; members of ten clusters."""
    control, code = numbers["nulls"]["Gaussian"][0], study.network.code
    apart = {"clusters": numbers["apart"], "Gaussian control": control["apart"]}
    labelled = {"clusters": numbers["labels"]}
    if "classes" in numbers:
        apart["classes"], labelled["classes"] = numbers["classes"], study.labels
    plots = []
    for name, pairs in apart.items():
        widest = max(pairs.deviation)
        lines = [
            dots(pairs.deviation, pairs.distance, name),
            Line([0, widest], [0, 2 * widest], "2 SD", RED)]
        plots.append(plot(THIRD, lines, "SD along the line", "centroid distance"))
    for name, labels in labelled.items():
        large = np.flatnonzero(np.bincount(labels[labels >= 0]) >= 5)
        seven = study.rng("seven", name).permutation(large)[:7]
        rows = np.flatnonzero(np.isin(labels, seven))[:1000]
        places = tsne(code[rows])                          # (m, 2)
        points = [dots(*places[labels[rows] == c].T) for c in seven]
        plots.append(plot(THIRD, points, title=f"t-SNE of {len(seven)} {name}"))
    strips, rng = [], study.rng("members")
    for c in np.bincount(numbers["labels"]).argsort()[:-11:-1]:
        members = rng.permutation(np.flatnonzero(numbers["labels"] == c))
        strips.append((f"{c} ({len(members)})", study.batch(members[:12])))
    distances = ("Fig. 6. Distance of two clusters' centres against their width along the line that joins "
                 "them. Paper: all pairs of clusters lie above the line of 2 SD, classes overlap more.")
    members = ("Fig. 6, 15, 16. Random members of the ten largest clusters, one a row (how many there are). "
               "Paper: they share the gist of the scene, not the class.")
    sheet = picture_rows(strips, side=112)
    return {"clusters": (grid(plots, 3), distances), "cluster-members": (sheet, members)}


def draw_channels(study, numbers):
    """Fig. 13: marginals of four specialised and four common channels; every property against PR."""
    code, plots, marginals = study.network.code, [], []
    special, common = specialised_and_common(code)
    for kind, members, color in (("specialised", special[:4], ORANGE), ("common", common[:-5:-1], BLUE)):
        for channel in members:
            histogram = bars(code[:, channel], 40, color=color)
            marginals.append(plot((394, 320), [histogram], f"φ[{channel}]", "pictures", kind))
    for name, values in numbers["properties"].items():
        title = f"rank correlation {numbers[name].value:.2f}"
        plots.append(plot(THIRD, [dots(numbers["pr"], values)], "PR over the pictures", name, title))
    text = ("Fig. 13. Values of eight channels; properties of all against PR. Paper: specialised ones have "
            "heavy tails, are sparse in space and of few dimensions; common ones respond to more.")
    return {"channels": (grid([grid(marginals, 4), grid(plots, 3)], 1), text)}


def draw_embedding(study, numbers):
    """Fig. 8: d² against ‖Δφ‖²; Fig. 21, of the pair in the middle."""
    square, d2 = numbers["square"], numbers["d2"]
    ends = np.array(limits(square, True))
    lines = [
        dots(square, d2, "pairs of pictures", BLUE, 7),
        Line(ends, numbers["A"] * ends, "A", GREEN),
        Line(ends, numbers["B"] * ends, "B", RED)]
    image = plot(PAGE_WIDE, lines, "‖φ₁ − φ₂‖²", "symmetrised KL (nats), Eq. 4", log="xy")
    middle = numbers["pairs"][square.argsort()[len(square) // 2]]
    text = ("Fig. 8. How different the pictures that share φ₁ are from those that share φ₂. "
            f"B/A = {numbers['B'] / numbers['A']:.1f}. Paper: a narrow band, B/A = 2.9.")
    scores = ("Fig. 21. Noisy x₁; the score given φ₁, given φ₂; denoised given φ₁, given φ₂; half the "
              "difference. Paper: the scores differ where the pictures do.")
    return {"embedding": (image, text), "scores": (draw_scores(study, study.batch(middle)), scores)}


@torch.no_grad()
def draw_scores(study, x):
    """Fig. 21, of x = (x₁, x₂), at y = x₁ + σz: σ²·score given φ₁ and given φ₂ (x̂ after matching, − y)."""
    generator, strips = study.noise("Fig. 21"), [("x₁, x₂", x)]
    for sigma in study.known_sigmas(0.1, 0.2, 0.4, 0.7, 1.0):
        y = x[:1] + sigma * torch.randn(x[:1].shape, generator=generator, device=x.device)
        phi_c = phi(study.model, x, sigma, study.draws, generator)
        matched, _ = guidance_step(study.model, y.repeat(2, 1, 1, 1), phi_c, memory=Memory())
        x_hat = study.model.denoise(matched)
        score = 0.5 + (x_hat - y) / (6 * sigma)            # ± 3 σ is black … white
        half = 0.5 + (x_hat[:1] - x_hat[1:]) / 2
        strips.append((f"σ {sigma:g}", torch.cat([y, score, x_hat, half])))
    return picture_rows(strips, side=224)


def draw_matching(study, numbers):
    """Fig. 20: σ̂ after matching against σ̂ before."""
    before, after = numbers["before"].flatten(), numbers["after"].flatten()
    ends = limits([*before, *after], True)
    lines = [
        Line(ends, ends, "unchanged", GRAY),
        dots(before, after, "in Algorithm 1", BLUE)]
    image = plot(PAGE_WIDE, lines, "σ̂ before matching", "σ̂ after matching", log="xy")
    text = "Fig. 20. The noise that the network sees before and after Algorithm 2. Paper: the same."
    return {"matching": (image, text)}


def draw_reconstruction(study, numbers):
    """Fig. 7: samples around two targets, and the control; Fig. 19: unconditional ones."""
    x, told, control, free = numbers["drawing"]
    sheets = []
    for samples, title in ((told, "told φ of the framed picture"),
                           (control, "control: told φ of an untrained network")):
        for k in (0, 1):
            image = panel(samples[k], x[k:k + 1], side=256)
            sheets.append(titled(title, image, 790, 24))
    text = ("Fig. 7, 17, 18. Samples of Algorithm 1 around their target (framed). Paper: they share its "
            "layout and local detail. The control: what a φ makes that has learnt nothing.")
    return {
        "reconstruction": (grid(sheets, 2), text),
        "unconditional": (panel(free, side=390), "Fig. 19. Samples without a target.")}


def draw_denoising(study, numbers):
    """Paper B, Fig. 1: output against input PSNR, training pictures and others."""
    x = input_psnr(numbers["sigmas"])
    lines = [Line(x, x, "no denoising", GRAY)]
    for side, color in (("training", ORANGE), ("held out", BLUE)):
        values, errors = np.transpose(numbers["psnr"][side])
        lines.append(band(x, values - 2 * errors, values + 2 * errors, color))
        lines.append(Line(x, values, side, color, radius=8))
    text = ("Paper B, Fig. 1. Denoising of training pictures and of others (band: two standard errors). A "
            "network that has memorised is better on the former.")
    return {"denoising": (plot(PAGE_WIDE, lines, *PSNR_AXES), text)}


def draw_generalisation(study, numbers):
    """Paper B, Fig. 1: PSNR for every N; Fig. 2: cosines, and samples beside their nearest originals."""
    names = "A's samples", "nearest in training", "B's, same noise", "nearest in training"
    colors = {"training": ORANGE, "held out": BLUE, "exact, training": GRAY, "exact, held out": "#000000"}
    curves, histograms, sheets = [], [], []
    for pair in numbers["pairs"]:
        title = f"N = {pair['N']:,}"
        x = input_psnr(pair["sigmas"])
        lines = [Line(x, pair["psnr"][side], side, color) for side, color in colors.items()]
        curves.append(plot(THIRD, lines, *PSNR_AXES, title, ylim=(5, 45)))
        cosines = [
            bars(pair["cosines"]["agreement"], 30, (-0.2, 1), "the two samples", BLUE),
            bars(pair["cosines"]["nearest"], 30, (-0.2, 1), "sample to training", ORANGE)]
        histograms.append(plot(THIRD, cosines, "cosine", "samples", title))
        sheets.append(titled(title, picture_rows(list(zip(names, pair["drawing"])), 64)))
    plots = grid([grid(curves, 3), grid(histograms, 3)], 1)
    return {
        "generalisation": (plots, "Paper B, Fig. 1, 2. Above: PSNR on training pictures and others, and what "
                           "exact memorisation gives. Below: do two networks with no training picture in "
                           "common draw the same from the same noise?"),
        "originals": (grid(sheets, 2, 24), "Paper B, Fig. 2. Samples of two networks from the same noise, "
                      "and the training picture nearest to each: copies where N is small, the same new "
                      "pictures where it is large enough.")}


def draw_harmonics(study, numbers):
    """Paper B, Fig. 3: a row a picture, with its eigenvectors, and the Wiener filter's; λ_k, ⟨x, e_k⟩²."""
    x, y, bases, linear = numbers["drawing"]
    shape = x.shape[1:]
    places = [k for k in (1, 2, 3, 5, 8, 12, 20, 30, 45) if k <= linear.vectors.shape[1]]

    def eigenvectors(basis):
        vectors = basis.vectors.T[np.array(places) - 1]    # (places, D)
        vectors = vectors / vectors.abs().amax(1, keepdim=True)
        return (0.5 + 0.5 * vectors).view(-1, *shape)

    strips, eigenvalues, squares = [], [], []
    for i, basis in enumerate([*bases, linear]):
        name, pictures = "Wiener", torch.ones(3, *shape)
        if basis is not linear:
            name = f"picture {i + 1}"
            pictures = torch.stack([x[i].cpu(), y[i].cpu(), basis.x_hat.view(shape)])
            mean = np.convolve(coefficients(x[i], basis)[:200], np.ones(5) / 5, "valid")
            squares.append(Line(np.arange(len(mean)) + 3, mean, name))
        values = basis.values[:200]
        eigenvalues.append(Line(np.arange(len(values)) + 1, values, name))
        strips.append((name, torch.cat([pictures, eigenvectors(basis)])))
    plots = [
        plot((796, 500), eigenvalues, "k", "eigenvalue λ_k"),
        plot((796, 500), squares, "k", "⟨x, e_k⟩² (mean of five)", log="y")]
    text = (f"Paper B, Fig. 3. A picture, with noise (σ = {numbers['sigma']:g}), denoised, and eigenvectors "
            f"e_k of the denoiser's Jacobian there, k = {', '.join(map(str, places))}: do they oscillate "
            "along the picture's own contours? Last row: the Wiener filter's, one basis for all. Below: how "
            "much of each eigenvector is kept (λ), and how much of the picture's contrast it holds.")
    return {"harmonics": (grid([picture_rows(strips, 128), grid(plots, 2)], 1), text)}


def draw_regularity(study, numbers):
    """Paper B, Fig. 4, 5: output against input PSNR beside the optimal slope; on discs, eigenvalues of J."""
    x, output = input_psnr(FIT), numbers["psnr"]
    best = output.mean() + numbers["optimum"] * (x - x.mean())
    lines = [
        Line(x, output, numbers["data"], BLUE, radius=8),
        Line(x, numbers["linear_psnr"], "Wiener filter", ORANGE),
        Line(x, best, "optimal slope", GREEN),
        Line(x, x, "no denoising", GRAY)]
    plots = [plot((796, 560), lines, *PSNR_AXES)]
    if "eigenvalues" in numbers:
        lines = [
            Line(np.arange(1, 13), numbers["eigenvalues"], radius=8),
            Line([5.5, 5.5], [0, 1], "dimension of the discs", GRAY)]
        plots.append(plot((796, 560), lines, "k", "eigenvalue λ_k"))
    text = ("Paper B, Fig. 4, 5. Denoising of pictures of known regularity beside the optimal slope; on "
            "discs, eigenvalues of the Jacobian, ideally 0 after the fifth. Slopes in the paper: .46, .61, "
            ".75, .83 for α = 1, 2, 3, 5.")
    return {"regularity": (grid(plots, 2), text)}


# Axes: plots by Pillow alone

BLUE, RED, GREEN, ORANGE, GRAY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#8a8a8a"     # Okabe and Ito
COLORS = BLUE, RED, GREEN, "#cc79a7", ORANGE, "#56b4e9", "#000000", "#8c6d31"


class Line(NamedTuple):
    """A line through points, in pixels `width` wide; a point that is not finite is left out."""
    x: np.ndarray
    y: np.ndarray
    label: str = ""
    color: str = ""                 # by default the next of COLORS
    width: int = 5
    radius: int = 0                 # of discs at the points
    filled: bool = False            # what the line encloses is shaded


def dots(x, y, label="", color="", radius=5):
    """Discs at points, without the line."""
    return Line(x, y, label, color, width=0, radius=radius)


def band(x, low, high, color):
    """The space between two curves, shaded."""
    return Line([*x, *x[::-1]], [*low, *high[::-1]], color=color, width=0, filled=True)


def bars(values, bins, span=None, label="", color=""):
    """The outline of a histogram of the finite values, in equal bins over `span`, with its inside shaded."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins, span or limits(values))
    return Line(edges.repeat(2), [0, *counts.repeat(2), 0], label, color, width=2, filled=True)


class Axis(NamedTuple):
    """A side of a plot's frame: the values low … high lie along its length in pixels; log: as logarithms."""
    low: float
    high: float
    log: bool
    length: int

    def pixels(self, values):
        """How far from the end of `low` these values lie, an array."""
        values, low, high = np.asarray(values, float), self.low, self.high
        if self.log:
            values, low, high = np.log(values), np.log(low), np.log(high)
        return (values - low) / (high - low) * self.length


def limits(values, log=False):
    """(low, high), a little wider than the finite values; 0 if they start there. log: of those above 0."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if log:
        values = values[values > 0]
    if not len(values):
        return 1.0, 2.0
    low, high = values.min(), values.max()
    if log:
        return low / 1.15, high * 1.15
    margin = 0.05 * (high - low) or 0.5
    if low != 0:
        low -= margin
    return low, high + margin


def ticks(axis, text, across=False):
    """Round numbers in an axis' range, as many as have room for their names; across: it is horizontal."""
    low, high = axis.low, axis.high
    steps = 10.0 ** math.floor(math.log10(high - low) - 1) * np.array([1, 2, 5, 10, 20, 50])
    if axis.log:                                           # of the exponent: 1, 2, 3 …; 1, 2, 5, 10; powers
        low, high, steps = math.log10(low), math.log10(high), (1 / 20, 1 / 3, 1, 2, 5)
    for step in steps:
        values = step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)
        if axis.log:
            values = np.unique([float(f"{10.0 ** value:.0e}") for value in values])
            values = values[(values >= axis.low) & (values <= axis.high)]
        room = 1.5 * text.size
        if across:
            room = text.size + max([text.getlength(f"{value:g}") for value in values], default=0)
        if (np.diff(axis.pixels(values)) >= room).all():
            return values


def plot(size, lines, xlabel="", ylabel="", title="", xlim=None, ylim=None, log=""):
    """Lines in a frame, a PIL image of `size` (width, height) in pixels.

    xlim, ylim: (low, high), by default `limits` of the lines. log: "x", "y" or "xy". An axis without a label
    has no numbers (t-SNE has no units). The frame depends on `size` alone: plots stand level in a row.
    """
    width, height = size
    text = font(26 if width > 800 else 22)
    left, top = 9 * text.size // 2, 5 * text.size          # above: two rows of the legend, and a row of names
    right, bottom = width - 2 * text.size, height - 3 * text.size
    xlim = xlim or limits(np.concatenate([line.x for line in lines]), "x" in log)
    ylim = ylim or limits(np.concatenate([line.y for line in lines]), "y" in log)
    across, up = Axis(*xlim, "x" in log, right - left), Axis(*ylim, "y" in log, bottom - top)
    sheet = Image.new("RGB", size, "white")
    inside = Image.new("RGB", (right - left + 1, bottom - top + 1), "white")
    words, pen = ImageDraw.Draw(sheet), ImageDraw.Draw(inside, "RGBA")
    if xlabel:
        for value in ticks(across, text, across=True):
            x = across.pixels(value)
            pen.line([x, 0, x, up.length], "#e4e4e4", 2)
            words.text((left + x, bottom + 8), f"{value:g}", "black", text, "ma")
    if ylabel:
        for value in ticks(up, text):
            y = up.length - up.pixels(value)
            pen.line([0, y, across.length, y], "#e4e4e4", 2)
            words.text((left - 8, top + y), f"{value:g}", "black", text, "rm")
    lines = [line._replace(color=line.color or COLORS[k % 8]) for k, line in enumerate(lines)]
    for line in lines:
        draw_line(pen, across, up, line)
    pen.rectangle([0, 0, across.length, up.length], outline="#444444", width=2)
    sheet.paste(inside, (left, top))
    words.text(((left + right) / 2, height - 4), greek(xlabel), "black", text, "md")
    words.text((8, top - 14), greek(ylabel), "black", text, "ld")
    words.text((right, top - 14), greek(title), "black", text, "rd")
    draw_legend(words, lines, width, text)
    return sheet


def draw_line(pen, across, up, line):
    """A Line inside the frame of two axes."""
    places = np.stack([across.pixels(line.x), up.length - up.pixels(line.y)], 1)
    places = [tuple(place) for place in places if np.isfinite(place).all()]
    if line.filled:
        pen.polygon(places, line.color + "60")
    if line.width:
        pen.line(places, line.color, line.width, joint="curve")
    if line.radius:
        for x, y in places:
            box = x - line.radius, y - line.radius, x + line.radius, y + line.radius
            pen.ellipse(box, line.color + "b0", "white")


def draw_legend(pen, lines, width, text):
    """The labels of lines with their colours, in rows from the top."""
    em, x, y = text.size, 8, 8
    for line in lines:
        if line.label:
            label = greek(line.label)
            length = 1.3 * em + text.getlength(label)
            if x + length > width:
                x, y = 8, y + 1.4 * em
            pen.rectangle([x, y + 0.3 * em, x + em, y + em], line.color)
            pen.text((x + 1.3 * em, y), label, "black", text)
            x += length + em


# Report

def words(verdict):
    """What stands behind a verdict: value, nulls, reasons."""
    text = f"{verdict.value:.3g} ± {verdict.error:.2g}"
    for name, (mean, spread, count) in verdict.nulls.items():
        text += f"; {name} {mean:.3g} ± {spread:.2g} (n = {count})"
    if verdict.only:
        text += f"; the paper says it of {verdict.only}"
    return f"{text}. {verdict.why}"


def alive_line(alive):
    """The first line of every report: may φ be judged at all?"""
    losses = [f"{loss.value:.2f} ± {loss.error:.2f} (σ {sigma:g})" for sigma, loss in alive.use.items()]
    text = (f"use of M {', '.join(losses)} dB; cosine of φ between pictures {alive.cosine:.4f}; "
            f"{alive.silent} channels silent")
    if alive.why_not:
        return f"φ is NOT alive, by {alive.why_not}: no claim on it has a verdict; {text}"
    return f"φ is alive: {text}"


def is_counted(only, kind):
    """Does the paper say it of pictures of this kind?"""
    return only in ("", kind)


def report(verdicts, kind):
    """The verdicts, and how many hold of those that count; a text of many lines."""
    lines, counts = [], {"holds": 0, "fails": 0, "not comparable": 0}
    for verdict in verdicts:
        lines.append(f"{verdict.verdict:14} {verdict.claim} ({verdict.place})")
        lines.append(f"{'':14} {words(verdict)}")
        counts[verdict.verdict] += is_counted(verdict.only, kind)
    total = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([*lines, f"of what the papers say of such pictures: {total}"])


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 17px/1.5 sans-serif; max-width: 1000px; margin: auto }} img {{ width: 100% }}
pre {{ white-space: pre-wrap; font-size: 14px }}</style>
<h1>{title}</h1>
<pre>{text}</pre>
{figures}
</html>
"""


def write_page(path, title, text, captions):
    """index.html: the report's text, and the figures that lie beside it with their captions."""
    figures = []
    for name, seen in captions.items():
        figures.append(f'<h2>{name}</h2><p>{html.escape(seen)}</p><img src="{name}.png" alt="{name}">')
    page = PAGE.format(title=html.escape(title), text=html.escape(text), figures="\n".join(figures))
    with write(path) as file:
        file.write(page.encode())


def plain(value):
    """Numbers, arrays and tensors as JSON has them: six digits, NaN as null; "drawing" is left out."""
    if hasattr(value, "_asdict"):                          # a NamedTuple
        value = value._asdict()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items() if key != "drawing"}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def claims_table(paths):
    """Markdown: claims × networks, from results.json of each; in brackets what does not count."""
    records = [json.loads(Path(path).read_bytes()) for path in paths]
    names = [record["checkpoint"]["name"] for record in records]
    table = [["claim", *names], ["---" for _ in (0, *names)]]
    for claim in CLAIMS:
        signs = [sign_of(claim, record) for record in records]
        if set(signs) != {"–"}:
            table.append([f"{claim.place}: {claim.text}", *signs])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def sign_of(claim, record):
    """✓, ✗ or – for what a results.json, read, says of a claim; in brackets if it does not count there."""
    for verdict in record["verdicts"]:
        if verdict["claim"] == claim.text:
            sign = {"holds": "✓", "fails": "✗", "not comparable": "–"}[verdict["verdict"]]
            return sign if is_counted(claim.only, record["kind"]) else f"({sign})"
    return "–"


# Running

ANALYSES = {                        # {name: (measure, drawing)}
    "sparsity": (sparsity, draw_sparsity),
    "stability": (stability, draw_stability),
    "selectivity": (selectivity, draw_selectivity),
    "attributes": (attributes, draw_attributes),
    "neighbours": (neighbours, draw_neighbours),
    "clusters": (clusters, draw_clusters),
    "channels": (channels, draw_channels),
    "embedding": (embedding, draw_embedding),
    "matching": (matching, draw_matching),
    "reconstruction": (reconstruction, draw_reconstruction),
    "denoising": (denoising, draw_denoising),
    "generalisation": (generalisation, draw_generalisation),
    "harmonics": (harmonics, draw_harmonics),
    "regularity": (regularity, draw_regularity)
}


def claims_of(name):
    """The claims that an analysis decides."""
    return [claim for claim in CLAIMS if claim.number.startswith(f"{name}.")]


def numbers_of(study, name):
    """The numbers of an analysis, of the network; in "nulls" those of the nulls of its claims. Or Skip."""
    measure, _ = ANALYSES[name]
    numbers = measure(study, study.network)
    nulls = numbers.setdefault("nulls", {})
    for claim in claims_of(name):
        for null in claim.nulls.split():
            if null not in nulls:
                nulls[null] = [measure(study, view) for view in study.nulls(null)]
    return numbers


def analyse(study, names, out):
    """The analyses of these names: (verdicts, {analysis: numbers}, {figure: what to see}).

    Writes the figures into the folder `out`.
    """
    verdicts, numbers, captions = [], {}, {}
    for name in names:
        figures, (_, draw), begun = {}, ANALYSES[name], time.monotonic()
        try:
            numbers[name] = numbers_of(study, name)
            for claim in claims_of(name):
                verdicts.append(judge(claim, numbers[name], numbers[name]["nulls"], study.alive.why_not))
            figures = draw(study, numbers[name])
            say(f"{name}: {duration(time.monotonic() - begun)}")
        except Skip as reason:                             # of the measure, or of its drawing alone
            numbers.setdefault(name, {"skipped": str(reason)})
            say(f"{name}: left out: {reason}")
        for figure, (image, text) in figures.items():
            captions[figure] = text
            with write(os.path.join(out, f"{figure}.png")) as file:
                image.save(file, "png")
    return verdicts, numbers, captions


def prepare(flags, model, checkpoint, device):
    """The Study of a command line, the names of its pictures, and what they are. Raises UserError."""
    settings = dict(checkpoint["flags"])
    data = settings["data"]
    if flags.data:
        settings["data"] = flags.data
    elif data and not is_synthetic(data) and not os.path.exists(data):
        raise UserError(f"{data}: the pictures of its training are not here; --data names others")
    pictures, training, held_out = training_data(settings)
    is_known = pictures.fingerprint == checkpoint["fingerprint"]
    if not (is_known or flags.data):
        raise UserError(f"{data}: has changed since the training; --data says which pictures to analyse")
    rows, what, versus, most = held_out, "held out", (), flags.images
    if flags.versus:
        versus, rows = load_pairs(flags.checkpoint, flags.versus, pictures, device)
        most = 512
    elif flags.data:
        rows = np.arange(len(pictures.x))
        what = "training and held-out" if is_known else "other pictures"
    rows = in_random_order(pictures, rows, flags.seed)[:most]
    if len(rows) < 20:
        raise UserError(f"{len(rows)} pictures are too few, 20 are the least; --data names others (if those "
                        "of the training, all are analysed)")
    study = Study(
        model, checkpoint, pictures.x[rows], pictures.labels[rows], pictures.groups[rows], versus=versus,
        sigmas=flags.sigma, draws=flags.draws, seed=flags.seed, device=device, clusters=flags.clusters,
        pairs=flags.pairs, steps=flags.steps)
    if is_known:
        training = in_random_order(pictures, training, flags.seed)[:POOL]
        held_out = in_random_order(pictures, held_out, flags.seed)[:512]
        study.training, study.training_groups = pictures.x[training], pictures.groups[training]
        study.held_out, study.held_out_groups = pictures.x[held_out], pictures.groups[held_out]
    return study, [pictures.paths[row] for row in rows], what


def in_random_order(pictures, rows, seed):
    """These rows, ordered by the pictures' content and the seed: names of files change nothing."""
    by_content = rows[np.argsort(pictures.hashes[rows], kind="stable")]
    return np.random.default_rng(seed_of(seed, "pictures")).permutation(by_content)


def check_folder(out, force, data):
    """--out is a new folder, or an empty one unless --force; never among the pictures. Raises UserError."""
    probe = out
    if os.path.isdir(out):
        probe = os.path.join(out, "results.json")
        if os.listdir(out) and not force:
            raise UserError(f"--out {out}: is not empty; --force writes into it, --out names another")
    check_outputs([probe], force, data)


def arguments():
    """The command line."""
    parser = Parser(usage="python analyze.py ckpt.pt [flags]", description=__doc__.split("\nMeasure")[0])
    add = parser.add_argument
    add("checkpoint", nargs="*", help="written by train.py")
    add("--data", metavar="PATH", help="pictures to analyse (default: its held-out ones)")
    add("--kind", choices=("imagenet", "textures", "faces", "bedrooms"), default="",
        help="count what the paper says of such pictures alone, too")
    add("--versus", nargs="+", default=[], metavar="FILE",
        help="paper B: as many networks, of --subset second")
    add("--only", nargs="+", choices=list(ANALYSES), metavar="NAME", help=f"of: {', '.join(ANALYSES)}")
    add("--images", type=number(int, 20), default=2000, help="pictures at most (default: 2000)")
    add("--draws", type=number(int, 1), default=8, help="noise draws for each φ (default: 8)")
    add("--sigma", nargs="+", type=number(float, 0), default=[0.3, 0.1], metavar="SIGMA",
        help="of φ: the first is analysed (default: 0.3 0.1)")
    add("--clusters", type=number(int, 2), help="K (default: 100, or a 20th of the pictures)")
    add("--pairs", type=number(int, 5), default=24, help="of pictures, for Eq. 4 (default: 24)")
    add("--steps", type=number(int, 3), default=STEPS, help="noise levels of Algorithm 1 (25)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="default: 0")
    add("--out", default="figures", metavar="FOLDER", help="default: figures")
    add("--force", action="store_true", help="write into a folder that is not empty")
    add("--device", help="cpu, cuda, mps (default: the fastest there is)")
    add("--table", nargs="+", metavar="FILE", help="verdicts of several results.json in Markdown")
    flags = parser.parse_args()
    if not flags.table and len(flags.checkpoint) != max(1, len(flags.versus)):
        raise UserError("needs one checkpoint, or as many as --versus (--help lists the flags)")
    return flags


def main():
    """The command line's work."""
    flags = arguments()
    if flags.table:
        print(claims_table(flags.table))
        return
    device, path, out = choose_device(flags.device), flags.checkpoint[0], Path(flags.out)
    model, checkpoint = load_checkpoint(path, device)
    check_folder(flags.out, flags.force, flags.data or checkpoint["flags"]["data"])
    study, paths, what = prepare(flags, model, checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    with write(out / "phi.npz") as file:
        code = study.network.code.numpy()
        np.savez(file, phi=code, sigma=study.sigma, paths=paths, labels=study.labels)
    alive, seen = alive_line(study.alive), checkpoint["training"]["pictures_seen"]
    scale = (f"{len(study.x)} pictures ({what}), width {model.width}, {seen:,} pictures seen in training; "
             f"φ at σ = {study.sigma:g}, {study.draws} draws")
    say(f"{alive}\n{scale}")
    names = flags.only or list(ANALYSES)
    if flags.versus:
        names = ["generalisation"]
    verdicts, numbers, captions = analyse(study, names, out)
    name, text = printable(os.path.basename(path)), report(verdicts, flags.kind)
    record = {
        "checkpoint": {"name": name, "sha256": checkpoint["sha256"], "training": checkpoint["training"]},
        "kind": flags.kind,
        "alive": study.alive,
        "scale": scale,
        "settings": vars(flags),
        "verdicts": verdicts,
        "analyses": numbers}
    with write(out / "results.json") as file:
        file.write(json.dumps(plain(record)).encode())
    write_page(out / "index.html", f"What {name} represents", f"{alive}\n{scale}\n\n{text}", captions)
    say(f"{text}\nwrote {out / 'index.html'}, its figures, results.json and phi.npz")


if __name__ == "__main__":
    run(main)
