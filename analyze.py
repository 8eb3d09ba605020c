"""The figures of both papers for a trained network, with a verdict on every claim (A: §2.2–3, App. B, C).

    python analyze.py ckpt.pt                              # the held-out pictures of its training -> figures/
    python analyze.py ckpt.pt --data photos --images 10000
    python analyze.py ckpt.pt --only sparsity stability    # two of the analyses
    python analyze.py ckpt.pt --only attributes --pictures cat.jpg dog.jpg
    python analyze.py a.pt b.pt c.pt                       # networks of one kind: other seeds, or other times
    python analyze.py a.pt --versus b.pt                   # paper B: training sets without a common picture
    torchrun --nproc_per_node=8 analyze.py ckpt.pt --data photos.npy --images 1300000

It writes one PNG a figure, index.html (figures and claims on one page), results.json (every number) and
phi.npz, which kmeans.py reads. A verdict can fail: no claim about φ is judged unless M is in use
(`Study.alive`), and it holds only against nulls, which have learnt nothing (`Study.replicates`).
"""
import base64
import contextlib
import datetime
import functools
import hashlib
import html
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from unet import (Parser, Progress, UNet, UserError, check_outputs, load_checkpoint, number, phi, printable,
                  run, say, write)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kmeans import KMeans, adjusted_rand_index, gaussian_like, pair_separations, tsne
from sample import around, conditional_distance, guidance_step, noise_level, panel, sample_unconditional
from train import (BLUE, GRAY, GREEN, ORANGE, RED, aliveness, bars, caption, choose_device, dots, draw_disc,
                   evaluate, grid, initialise, input_psnr, is_synthetic, join_processes, limits, line,
                   load_picture, nearest, own_class, picture_rows, plot, rule, seeded, split, to_batch,
                   to_image, training_data, training_part)

BATCH = 128               # pictures at a time; their noise depends on it, so it is no flag
DETAIL = 96               # pictures for what needs the whole network at many noise levels
POOL = 4000               # pictures for what compares all with all
SIGMAS = 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0            # of Fig. 2
LESS_COLOUR = "pixels less their mean colour"
NOTHING = math.nan, math.nan                               # a value and its error, not measured
ANALYSES = {}


class Skip(Exception):
    """An analysis that these pictures do not allow; the text says why."""


def analysis(share, *figures):
    """Registers an analysis: its share of the whole time (default settings), and the figures it draws."""
    def register(function):
        function.share, function.figures = share, figures
        ANALYSES[function.__name__] = function
        return function
    return register


# What every analysis is given, and what every verdict is made of

@dataclass(eq=False)
class Study:
    """A network, n pictures and their φ, and the same for networks that have learnt nothing.

    x: (n, H, W, C) uint8. labels: (n,) class, −1: none. phi: {σ: (n, d) float32, CPU}, the σ that is analysed
    first. groups: (n,), alike for tiles of one picture: errors are over these. untrained: the network before
    training, from several seeds; untrained_phi: their φ at the first two σ. training, held_out: pictures of
    either side of the checkpoint's split, if these are its pictures.
    """
    model: UNet
    checkpoint: dict
    x: np.ndarray
    labels: np.ndarray = None
    phi: dict = None
    untrained: list = ()
    untrained_phi: list = ()
    groups: np.ndarray = None
    training: np.ndarray = None
    held_out: np.ndarray = None
    draws: int = 20
    seed: int = 0
    device: str = "cpu"
    clusters: int = None
    pairs: int = 24
    steps: int = 40
    given: list = ()
    out: str = "."
    progress: callable = lambda fraction, text: None
    captions: dict = field(default_factory=dict)           # {figure: what to see in it}

    def __post_init__(self):
        self.labels = np.full(len(self.x), -1) if self.labels is None else self.labels
        self.groups = np.arange(len(self.x)) if self.groups is None else self.groups
        self.sigma_max = self.checkpoint["sigma_max"]
        self.sigma_1 = min(0.5, self.sigma_max)            # σ₁ of Fig. 2, as far as the network knows it

    @property
    def sigma(self):
        """The noise level of everything that needs just one."""
        return next(iter(self.phi))

    @property
    def code(self):
        """φ at that noise level, (n, d)."""
        return self.phi[self.sigma]

    def pictures(self, i):
        """Pictures i as (len(i), C, H, W) in [0, 1] on the device."""
        return to_batch(self.x[np.asarray(i)], self.device)

    def rng(self, *words):
        """A numpy generator that depends on the seed and `words` alone."""
        return np.random.default_rng((self.seed, *words))

    def noise(self, *words):
        """A torch generator on the device that depends on the seed and `words` alone."""
        return seeded(self.device, self.seed, *words)

    def choose(self, n, *words):
        """n different pictures (or all), in a random order."""
        return self.rng(*words).permutation(len(self.x))[:n]

    @property
    def detail(self):
        """The pictures of `averages`."""
        return self.choose(DETAIL, 11)

    @functools.cached_property
    def averages(self):
        """`block_averages` of DETAIL pictures: of the network at all σ, of the untrained ones at fewer."""
        levels = sorted({*(s for s in SIGMAS if s <= self.sigma_max), self.sigma, self.sigma_1})
        fewer = [s for s in levels if s in (0, self.sigma, self.sigma_1) or s >= min(0.2, self.sigma_max)]
        chosen, out = self.detail, []
        for k, model in enumerate([self.model, *self.untrained]):
            self.progress((k + 0.3) / (1 + len(self.untrained)), f"all blocks of network {k + 1}")
            out.append(block_averages(self, model, chosen, fewer if k else levels))
        return out

    @functools.cached_property
    def channel_pr(self):
        """`channel_selectivity` of φ, (d,)."""
        return channel_selectivity(self.code)

    def channels(self):
        """(specialised, common) channels, most selective first: PR below, above Otsu's threshold; or Skip."""
        order = np.argsort(self.channel_pr)
        order = order[np.isfinite(self.channel_pr[order])]
        if len(order) < 4 or np.ptp(self.channel_pr[order]) == 0:
            raise Skip("all channels of φ are equally selective")
        low = self.channel_pr[order] < otsu(self.channel_pr[order])
        return order[low], order[~low]

    @functools.cached_property
    def alive(self):
        """Is M in use? `use` {σ: dB lost with another picture's M-maps}, mean `cosine` between pictures,
        `silent` channels, class agreement, and `why` not, "" if it is: φ is then not what denoises.
        """
        found, d = aliveness(self.model, self.pictures(self.choose(256, 9))), self.code.shape[1]
        rules = {f"use {found['use'][0.5]:.2f} dB at σ 0.5": found["use"][0.5] >= 0.1,
                 f"mean cosine {found['cosine']:.4f} between pictures": found["cosine"] <= 0.98,
                 f"{found['silent']} of {d} channels silent": found["silent"] <= 0.1 * d}
        chosen = self.choose(POOL, 16)
        agreement = [own_class(v[self.sigma][chosen], self.labels[chosen]).mean()
                     for v in (self.phi, *self.untrained_phi)]
        return dict(found, channels=d, agreement=agreement[0], untrained=agreement[1:],
                    why=", ".join(text for text, kept in rules.items() if not kept))

    def replicates(self, null):
        """The {σ: φ} of a null, one after the other.

        untrained: the same network and initialisation before training, three seeds. shuffled: every channel
        permuted over the pictures (alike at all σ), three times: the marginals stay, all joint structure
        goes. Gaussian: φ's mean and covariance at the main σ, nothing else, ten draws.
        """
        if null == "untrained":
            yield from self.untrained_phi
        elif null == "Gaussian":
            yield from ({self.sigma: gaussian_like(self.code, self.seed + k)} for k in range(10))
        else:
            for rng in (self.rng(40, k) for k in range(3)):
                order = torch.from_numpy(np.stack([rng.permutation(len(self.x)) for _ in self.code.T], 1))
                yield {s: v.gather(0, order) for s, v in self.phi.items()}

    def nulls(self, measure, *names):
        """`measure` of every replicate of these nulls: {name: [result]}."""
        return {name: [measure(phis) for phis in self.replicates(name)] for name in names}

    def claim(self, *sentence, on_phi=True, **options):
        """`claim`; on_phi: of φ, so that there is no verdict if M is not in use."""
        why = "M is not in use" if on_phi and self.alive["why"] else ""
        return claim(*sentence, **options, on_phi=on_phi, why=why)

    def figure(self, name, image, text):
        """Write a figure; `text` says what to see in it."""
        with write(os.path.join(self.out, name + ".png")) as file:
            image.save(file, "png")
        self.captions[name] = text


def claim(text, place, paper, here, over, nulls, *, sign=1, effect=0.0, own=True, rule="", on_phi=False,
          why=""):
    """A sentence of the paper and its verdict: dict(claim, verdict, value, error, nulls, …).

    paper: what it says, in a word. here: (value, standard error over what `over` names). nulls: {name: values
    of its replicates, computed alike}, not all of them NaN. own: whether the claim's own rule holds, None:
    cannot be told; `rule` says it in words. It holds if `own` does and, for each null, the value is farther
    in the direction `sign` (0: in either) than the null's mean, by `effect` and by two combined standard
    deviations, and than each replicate.
    on_phi: it says something about φ. why: the reason if it is not to be judged at all.
    """
    (value, error), ahead, shown, unknown = map(float, here), [], {}, own is None
    for name, v in nulls.items():
        v = np.asarray(v, float)
        unknown = unknown or len(v) > 0 and not np.isfinite(v).any()
        v = v[np.isfinite(v)]
        if len(v):
            spread = float(v.std(ddof=1)) if len(v) > 1 else 0.0
            shown[name] = [float(v.mean()), spread, len(v)]
            gaps = (sign or np.sign(value - v.mean())) * (value - v)
            ahead.append(gaps.mean() >= effect and gaps.mean() > 2 * math.hypot(error, spread)
                         and gaps.min() > 0)
    verdict = "holds" if own and all(ahead) else "fails"
    if unknown or not math.isfinite(value + error):
        verdict = "not comparable"
    if why:
        verdict, rule = "not comparable", why
    return dict(claim=text, place=place, paper=paper, verdict=verdict, value=value, error=error, over=over,
                nulls=shown, effect=effect, rule=rule, on_phi=on_phi)


# Measures: PR (§2.2), kurtosis, the dip, correlations

def participation_ratio(v, dim=-1):
    """PR(v) = ‖v‖₁² / (d ‖v‖₂²) along `dim` (§2.2), in [1/d, 1]; NaN for v = 0."""
    return v.abs().sum(dim).square() / (v.shape[dim] * v.square().sum(dim))


def kurtosis(v):
    """E[(v − m)⁴] / s⁴ along dimension 0: 3 for a Gaussian, more for heavier tails; NaN for a constant."""
    v = v - v.mean(0)
    return (v ** 4).mean(0) / (v ** 2).mean(0) ** 2


def minorant(x, y):
    """Indices of the vertices of the greatest convex minorant of the points (x increasing, y)."""
    hull = []
    for i in range(len(x)):
        while len(hull) > 1 and ((y[hull[-1]] - y[hull[-2]]) * (x[i] - x[hull[-1]])
                                 >= (y[i] - y[hull[-1]]) * (x[hull[-1]] - x[hull[-2]])):
            hull.pop()
        hull.append(i)
    return np.array(hull)


def dip(v):
    """Hartigan & Hartigan's dip (1985): the distance of the distribution of v to the nearest unimodal one.

    v: (n,) values, distinct. The interval [a, b] of the mode shrinks: its next ends lie where the concave
    majorant and convex minorant over [a, b] are farthest apart, until distances outside are as large.
    """
    x, counts = np.unique(v, return_counts=True)
    at, a, b, worst = np.cumsum(counts) / len(v), 0, len(x) - 1, 1 / len(v)    # the distribution at a value,
    before = at - counts / len(v)                                              # and just below it
    while True:
        convex, concave = (a + minorant(x[a:b + 1], y[a:b + 1]) for y in (before, -at))
        G, L = np.interp(x, x[convex], before[convex]), np.interp(x, x[concave], at[concave])
        i, j = convex[(L - G)[convex].argmax()], concave[(L - G)[concave].argmax()]
        ends = (i, concave[concave >= i][0]) if (L - G)[i] >= (L - G)[j] else (convex[convex <= j][-1], j)
        size = max((L - G)[i], (L - G)[j])
        if size <= worst:
            return worst / 2
        worst = max(worst, (at - G)[a:ends[0] + 1].max(), (L - before)[ends[1]:b + 1].max())
        if ends == (a, b):
            return worst / 2
        a, b = ends


def otsu(v):
    """The threshold between two groups of a 1-D array with the least variance inside the groups (Otsu)."""
    v = np.sort(v)
    n = np.arange(1, len(v))
    low, total = np.cumsum(v)[:-1], v.sum()
    k = (n * (len(v) - n) * (low / n - (total - low) / (len(v) - n)) ** 2).argmax()    # between the groups
    return float((v[k] + v[k + 1]) / 2)


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, where both are finite; NaN if one is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return math.nan
    ranks = []
    for v in a[both], b[both]:
        ordered = np.sort(v)
        ranks.append(np.searchsorted(ordered, v) + np.searchsorted(ordered, v, "right"))     # ties: the mean
    return float(np.corrcoef(ranks)[0, 1])


def bootstrap(a, b, rng, samples=300):
    """(rank correlation, its bootstrap SD, the 2.5 % and 97.5 % quantiles) of paired 1-D arrays."""
    rho = rank_correlation(a, b)
    found = [rank_correlation(a[i], b[i]) for i in rng.integers(len(a), size=(samples, len(a)))]
    if not math.isfinite(rho):
        return 2 * NOTHING
    return rho, float(np.nanstd(found)), *np.nanquantile(found, [0.025, 0.975]).tolist()


def mean_se(v, groups=None):
    """(mean, its standard error) of a 1-D array; groups: (len(v),), alike for values that depend on another.

    Then the cluster-robust error, of the sums Σ(v − mean) of the groups; NaN if there is only one.
    """
    v = np.asarray(v, float)
    groups = np.unique(np.arange(len(v)) if groups is None else groups, return_inverse=True)[1]
    sums, mean = np.bincount(groups, v - v.mean()), float(v.mean())
    n = len(sums)
    return mean, float(math.sqrt(n / (n - 1) * np.square(sums).sum()) / len(v)) if n > 1 else math.nan


def pairs_error(v, pairs):
    """Standard error of the mean of v (p,), of pairs (p, 2): two that share a member depend on each other."""
    shared = (pairs[:, :, None, None] == pairs.T[None, None]).any((1, 2))                      # (p, p)
    v = v - v.mean()
    return float(math.sqrt(max(v @ shared @ v, v @ v)) / len(v)) if len(v) > 1 else math.nan


def beyond(pair, sign=1):
    """Whether sign × mean of (mean, standard error) is above two standard errors; None: no error known."""
    return bool(sign * pair[0] > 2 * pair[1]) if math.isfinite(pair[1]) else None


def less_colour(x):
    """Pictures (n, C, H, W) less their mean colour, as unit vectors (n, C·H·W)."""
    return F.normalize((x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def off_mps(v):
    """v on a device that has float64 and eigenvalues: MPS has neither."""
    return v.cpu() if v.device.type == "mps" else v


def titled(text, image, width, size=22):
    """A picture with its title above."""
    return grid([caption(text, size, width), image], 1, 2)


# §2.2, Denoising and channel sparsity (Fig. 1, 10)

@torch.no_grad()
def block_averages(study, model, chosen, levels):
    """E_z[ā_j(x + σz)] at the input and output of every block: {σ: {block: [(m, d_in), (m, d_out)]}}.

    For each σ of `levels` and "again", a second estimate at σ₁ with its own noise; at most ten draws.
    """
    x, out = study.pictures(chosen), {}
    for k, level in enumerate([*levels, "again"]):
        sigma, generator, total = study.sigma_1 if level == "again" else level, study.noise(6, k, 0), {}
        draws = min(10, study.draws) if sigma else 1
        for _ in range(draws):
            z = torch.randn(x.shape, generator=generator, device=x.device)
            for name, sides in model.activations(x + sigma * z).items():
                total[name] = [t + v.cpu() / draws for t, v in zip(total.get(name, (0, 0)), sides)]
        out[level] = total
    return out


@analysis(18, "sparsity")
def sparsity(study):
    """Fig. 1, 10: PR of ā at the input and the output of every block, at several σ.

    One value a picture; E1 and D1, with a picture at one side, are left out. Claims about several blocks are
    judged by the one in which the change is least in their direction.
    Nulls: the untrained network, since random filters and ReLUs change the PR too; for φ's PR shuffling as
    well: is a picture sparser than its channels taken one by one?
    """
    names = [b for b in study.averages[0][study.sigma] if b not in ("E1", "D1")]
    levels = [s for s in study.averages[0] if s != "again" and s >= min(0.05, study.sigma)]
    ratio = lambda v: participation_ratio(v.double()).numpy()
    sides = lambda averages, s: {b: [ratio(v) for v in averages[s][b]] for b in names}
    groups = study.groups[study.detail]
    changes = [{b: mean_se(after - before, groups) for b, (before, after) in sides(v, study.sigma).items()}
               for v in study.averages]
    here, of_phi = sides(study.averages[0], study.sigma), ratio(study.code)

    def moves(text, place, kind, sign):
        picked = [b for b in names if b[0] == kind]
        worst = [min((v[b] for b in picked), key=lambda c: sign * c[0], default=NOTHING) for v in changes]
        each = ", ".join(f"{b} {changes[0][b][0]:+.3f}" for b in picked) or "no such block"
        return study.claim(text, place, "falls" if sign < 0 else "rises", worst[0], "pictures",
                           dict(untrained=[m for m, _ in worst[1:]]), sign=sign, effect=0.02,
                           own=beyond(worst[0], sign), rule=f"change of PR, {each}", on_phi=kind == "M")

    claims = [
        moves("PR falls from the input to the output of M", "Fig. 1, 10", "M", -1),
        moves("PR falls in the decoder blocks", "Fig. 1", "D", -1),
        moves("PR rises in the encoder blocks", "Fig. 1", "E", 1),
        study.claim("φ's PR lies in 0.2–0.3", "§2.5, Fig. 1", "0.2–0.3",
                    mean_se(of_phi, study.groups), "pictures",
                    study.nulls(lambda v: ratio(v[study.sigma]).mean(), "untrained", "shuffled"), sign=0,
                    effect=0.02, own=0.2 <= of_phi.mean() <= 0.3,
                    rule="in the range, and not as with shuffled channels")]
    plots = [plot((530, 400), [bars(v, 30, limits(np.concatenate(here[b])), name, color) for v, name, color in
                          zip(here[b], ("input", "output"), (ORANGE, GREEN))],
                  "participation ratio", "pictures", b) for b in names]
    at = [sides(study.averages[0], s) for s in levels]
    mean = {b: np.transpose([np.mean(v[b], 1) for v in at]) for b in names}        # (2, levels)
    outputs = [line(levels, after, b, points=True) for b, (_, after) in mean.items()]
    changed = [line(levels, after - before, b, points=True) for b, (before, after) in mean.items()]
    wide = [plot((796, 520), outputs, "noise level σ", "mean PR of the output", log="x"),
            plot((796, 520), [*changed, rule(y=0)], "noise level σ", "PR, output − input", log="x")]
    study.figure("sparsity", grid([grid(plots, 3, 5), grid(wide, 2)], 1),
                 "Fig. 1, 10. The share of active channels (PR) before and after each block; below, against "
                 "the noise. Paper: it rises in the encoder (E), falls in M and in the decoder (D).")
    return dict(change=changes[0], phi_pr=of_phi, pr_input={b: v[0] for b, v in here.items()},
                pr_output={b: v[1] for b, v in here.items()}, claims=claims)


# §2.3, Robustness of representation to noise (Fig. 2, 11)

@analysis(1, "stability")
def stability(study):
    """Fig. 2, 11: cos(ā(σ₁ = 0.5), ā(σ₂)) at every block's output against σ₂ ≤ σ_max; means over pictures.

    At σ₂ = σ₁ the two have different noise. D1, whose output is a picture, is left out. A constant is
    perfectly stable, so M's cosine must also exceed that between *different* pictures: `apart`.
    Nulls: the untrained network (its M is stable too, by averaging). The others say nothing of other blocks.
    """
    names = [b for b in study.averages[0]["again"] if b != "D1"]
    levels = [s for s in study.averages[0] if s in SIGMAS]
    inside = [s for s in levels if s >= 0.2] or [s for s in levels if s]
    order = study.rng(8).permutation(len(study.averages[0]["again"]["M"][1]))
    other_one = np.roll(order, 1)[order.argsort()]         # a random cycle: each picture's is another one
    cosines = lambda v, b, s, rows=...: F.cosine_similarity(v["again"][b][1], v[s][b][1][rows]).numpy()

    def measure(averages):
        same = {b: np.mean([cosines(averages, b, s) for s in inside], 0) for b in names}
        other = np.mean([cosines(averages, "M", s, other_one) for s in inside], 0)
        best = max((b for b in names if b != "M"), key=lambda b: same[b].mean())
        norm = [averages[s]["M"][1].norm(dim=1).numpy() for s in (0.0, study.sigma_1)]
        mean = lambda v: mean_se(v, study.groups[study.detail])
        return dict(mean_cosine={b: mean(v) for b, v in same.items()}, next_best=best,
                    lead=mean(same["M"] - same[best]), apart=mean(same["M"] - other),
                    norm_at_0=mean(norm[0] / norm[1].clip(1e-12)))

    here, *untrained = (measure(v) for v in study.averages)
    mean, sd = ({b: np.array([f(cosines(study.averages[0], b, s)) for s in levels]) for b in names}
                for f in (np.mean, np.std))
    lead, apart, norm = here["lead"], here["apart"], here["norm_at_0"]
    nulls = lambda key: dict(untrained=[v[key][0] for v in untrained])
    claims = [
        study.claim(f"M is the most stable block, σ in {inside[0]:g}–{inside[-1]:g}", "Fig. 2, 11",
                    "M highest", lead, "pictures", nulls("lead"), effect=0.01,
                    own=beyond(lead) and beyond(apart) and apart[0] > 0.02,
                    rule=f"lead over {here['next_best']} in mean cosine; above the cosine of different "
                    f"pictures by {apart[0]:.3f} (at least 0.02)"),
        study.claim("φ collapses to zero as σ → 0", "Fig. 2, App. B.3", "collapses", norm, "pictures",
                    nulls("norm_at_0"), sign=-1, effect=0.05, own=norm[0] < 0.1,
                    rule=f"‖φ‖ at σ = 0 over that at {study.sigma_1:g}, below a tenth")]
    place = np.maximum(levels, 0.005)                      # 0 has no place on a logarithmic axis
    marks = [line(place, m, b, band=(m - sd[b], m + sd[b]) if b == "M" else None, width=9 if b == "M" else 5)
             for b, m in mean.items()]
    marks.append(rule(y=here["mean_cosine"]["M"][0] - apart[0], label="M, between different pictures"))
    study.figure("stability", plot((1600, 800), marks, "σ₂ (leftmost point: 0)",
                                   f"cosine to σ₁ = {study.sigma_1:g}", log="x"),
                 "Fig. 2, 11. How far each block keeps its direction when the noise changes (band: one SD). "
                 "Paper: M is highest. Stability counts only above the gray line.")
    return dict(here, sigma_2=levels, mean=mean, sd=sd, claims=claims)


# §2.4, Denoising and channel selectivity (Fig. 3, 4, 12)

def channel_selectivity(code):
    """PR of each channel over the pictures of code (n, d), (d,): small if few excite it, NaN if none does."""
    return participation_ratio(code.double(), 0).numpy()


def top_pictures(code, channel, k=9):
    """The at most k pictures that excite a channel most, largest first, and how many excite it at all."""
    v = code[:, channel]
    excited = int((v > 1e-6).sum())
    return v.topk(min(k, excited)).indices.numpy(), excited


@analysis(1, "selectivity")
def selectivity(study):
    """Fig. 3, 12: PR of every channel of φ over the data set; what excites the most and the least selective.

    Bimodality: Hartigan's dip test, p from 500 uniform samples of as many channels; one skewed mode does not
    pass. Error: bootstrap over channels. Null: the untrained network's dip (shuffling keeps every channel's
    PR over the pictures, and so does a Gaussian's mean and variance).
    """
    every, code, rng = study.channel_pr, study.code, study.rng(12)
    finite = lambda v: v[np.isfinite(v)]
    pr, (special, common) = finite(every), study.channels()
    found, threshold = dip(pr), otsu(pr)
    p = float(np.mean([dip(rng.random(len(pr))) >= found for _ in range(500)]))
    error = float(np.std([dip(rng.choice(pr, len(pr))) for _ in range(50)]))
    claims = [study.claim(
        "channel selectivity is bimodal", "Fig. 3", "bimodal on ImageNet", (found, error), "channels",
        study.nulls(lambda v: dip(finite(channel_selectivity(v[study.sigma]))), "untrained"),
        effect=0.01, own=p < 0.05,
        rule=f"Hartigan's dip, p = {p:.3f}, below 0.05; {len(special)} specialised, {len(common)} common")]
    histogram = plot((1600, 480), [bars(pr, 40), rule(x=threshold, label="threshold (Otsu)", color=RED)],
                     "participation ratio over the pictures", "channels of φ")
    shown, top, excited, cells = [*special[:4], *common[::-1][:2]], {}, {}, []
    for c in shown:
        top[int(c)], excited[int(c)] = top_pictures(code, c)
        title = (f"{'specialised' if c in special else 'common'} {c}, PR {every[c]:.2g}; excited by "
                 f"{excited[c]} of {len(code)}")
        cells.append(titled(title, panel(study.pictures(top[c]), side=170), 528))
    study.figure("selectivity", grid([histogram, grid(cells, 3)], 1),
                 "Fig. 3, 12. Over how many pictures each channel is active (PR). Paper: two groups. Below: "
                 "what excites four specialised and two common channels most; do they share anything?")
    return dict(pr=every, silent=int(np.isnan(every).sum()), threshold=threshold, specialised=len(special),
                common=len(common), dip=found, p=p, shown=shown, top=top, excited=excited, claims=claims)


@analysis(1, "attributes")
def attributes(study):
    """Fig. 4: pictures, the three specialised channels that each excites most, and what else excites those.

    A channel's response is divided by its root mean square over the data set: channels differ in scale.
    """
    (special, _), code, cells, numbers = study.channels(), study.code, [], []
    if study.given:
        shape = study.checkpoint["size"], study.model.channels, study.checkpoint["flags"]["patches"]
        x = to_batch(np.stack([load_picture(file, *shape) for file in study.given]), study.device)
        names = [os.path.basename(str(file)) for file in study.given]
        own = phi(study.model, x, study.sigma, study.draws, study.noise(13)).cpu()
    else:
        chosen = study.choose(3, 13)
        x, own, names = study.pictures(chosen), code[chosen], [f"picture {i}" for i in chosen]
    relative = (own / code.square().mean(0).sqrt())[:, special.copy()].nan_to_num()
    for name, picture, responses in zip(names, x, relative):
        values, at = responses.topk(min(3, len(special)))
        numbers.append(dict(name=name, channels=special[at.numpy()], response=values))
        cells.append(titled(name, to_image(picture, 380), 392))
        for c, v in zip(special[at.numpy()], values):
            title = f"channel {c}, PR {study.channel_pr[c]:.2g}; {v:.1f} r.m.s."
            cells.append(titled(title, panel(study.pictures(top_pictures(code, c)[0]), side=122), 392))
    study.figure("attributes", grid(cells, 1 + min(3, len(special))),
                 "Fig. 4. Left, a picture; right, what else excites the three specialised channels that "
                 "it excites most. Do they show what the picture is made of?")
    return dict(pictures=numbers)


# §2.5, Denoising and emergent semantic similarity (Fig. 5, 14)

def chance_agreement(labels):
    """What `own_class` is in the mean if neighbours are drawn by lot; NaN without two classes."""
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    n = counts.sum()
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if len(counts) > 1 else math.nan


def two_groups(code, target, size):
    """[rows (size,): a picture and its nearest ones, the same for the picture of least cosine to it]."""
    unit = F.normalize(code, dim=1)
    targets = [target, int((unit @ unit[target]).argmin())]
    return [np.append(t, g) for t, g in zip(targets, nearest(code, targets, size - 1))]


def subspace_gap(code, targets, k=3):
    """How much better a group's own directions explain it than those of the group before, (targets,), ≤ 1.

    Groups: each target and its nearest, 24 in all. Directions: k singular vectors of every second member,
    less their part along the mean of these: that a group has a mean of its own makes a cluster, no subspace.
    Explained: the share of ‖·‖² of the remaining members, less the same part, that lies in these directions.
    """
    near, halves, bases = nearest(code, targets, min(24, len(code) // 3) - 1), [], []
    for group in (code[np.append(t, g)].double() for t, g in zip(targets, near)):
        mean = F.normalize(group[::2].mean(0), dim=0)
        beyond_mean = group - (group @ mean)[:, None] * mean
        bases.append(torch.linalg.svd(beyond_mean[::2], full_matrices=False)[2][:k])
        halves.append(beyond_mean[1::2])
    share = lambda v, basis: float((v @ basis.T).square().sum() / v.square().sum().clamp_min(1e-30))
    return np.array([share(v, bases[i]) - share(v, bases[i - 1]) for i, v in enumerate(halves)])


@analysis(1, "neighbours", "subspaces")
def neighbours(study):
    """Fig. 5, 14: nearest pictures by cosine of φ and of pixels; class agreement; union of subspaces.

    Nulls: the untrained network's lead; shuffled φ, which agrees with the classes by chance alone. A
    Gaussian's rows belong to no picture: it applies to the subspaces only, where it and shuffling ask whether
    neighbours share directions just because they are neighbours.
    """
    chosen = study.choose(POOL, 16)
    pixels, code = to_batch(study.x[chosen], "cpu"), study.code[chosen]
    labels, groups = study.labels[chosen], study.groups[chosen]
    targets = study.rng(17).permutation(len(chosen))[:20]
    spaces = {"φ": code, "pixels": pixels.flatten(1), LESS_COLOUR: less_colour(pixels)}
    same, chance = {s: own_class(v, labels) for s, v in spaces.items()}, chance_agreement(labels)
    nulls = study.nulls(lambda v: own_class(v[study.sigma][chosen], labels).mean(), "untrained", "shuffled")
    gaps = subspace_gap(code, targets)

    def more_than(space, text, paper):
        lead, means = same["φ"] - same[space], {s: v.mean() for s, v in same.items()}
        here = mean_se(lead, groups[labels >= 0] if len(lead) > 1 else None)
        rule = (f"lead in class agreement: φ {means['φ']:.3f}, {space} {means[space]:.3f}, chance "
                f"{chance:.3f}" if math.isfinite(chance) else "no class labels")
        leads = {name: np.subtract(v, means[space]) for name, v in nulls.items()}
        return study.claim(text, "Fig. 5, 14", paper, here, "queries", leads, effect=0.02, own=beyond(here),
                           rule=rule)

    claims = [
        more_than("pixels", "φ-neighbours agree in class more than pixel-neighbours", "stark contrast"),
        more_than(LESS_COLOUR, "… than pixels less their mean colour (our control)", "–"),
        study.claim("φ lies on a union of subspaces", "Fig. 5", "picture", mean_se(gaps), "groups",
                    study.nulls(lambda v: subspace_gap(v[study.sigma][chosen], targets).mean(), "untrained",
                                "shuffled", "Gaussian"), effect=0.02, own=beyond(mean_se(gaps)),
                    rule="energy of neighbours, beyond their mean, in their own three directions, less that "
                    "in another group's")]
    sheets = [titled(f"nearest in {s} to the framed picture", panel(
        pixels[nearest(spaces[s], [query], 8)[0]], pixels[query, None], side=256), 790, 24)
              for query, _ in two_groups(code, targets[0], 2) for s in ("φ", "pixels")]
    study.figure("neighbours", grid(sheets, 2),
                 "Fig. 5, 14. Two pictures (framed) and the eight nearest to each, by the cosine of φ "
                 "(left) and of the pixels (right). Paper: the former share what they show.")
    return dict(draw_subspaces(study, code, targets[0]), chance=chance, subspace_gap=gaps,
                agreement={s: mean_se(v) for s, v in same.items()}, claims=claims)


def draw_subspaces(study, code, target):
    """Fig. 5, middle and right: three components of φ for two groups of neighbours; returns both."""
    members, (special, common) = two_groups(code, target, min(24, len(code) // 3)), study.channels()
    scaled = code / code.square().mean(0).sqrt().clamp(min=1e-12)
    contrast = (scaled[members[0]].mean(0) - scaled[members[1]].mean(0)).numpy()[special]
    axes = [int(special[contrast.argmax()]), int(special[contrast.argmin()]), int(common[-1])]
    groups = [code[rows][:, axes] for rows in members]
    names = [f"φ[{c}], {kind}" for c, kind in zip(axes, ("specialised", "specialised", "common"))]
    plots = [plot((530, 480), [dots(groups[0][:, i], groups[0][:, j], "first group"),
                               dots(groups[1][:, i], groups[1][:, j], "second group")], names[i], names[j])
             for i, j in ((0, 1), (0, 2), (1, 2))]
    study.figure("subspaces", grid(plots, 3, 5),
                 "Fig. 5. Three components of φ for two groups of neighbours. Paper: either group leaves one "
                 "specialised channel (nearly) at zero: a union of planes.")
    return dict(components=axes, phi_components=groups)


# §2.5, Emergent clusters (Fig. 6, 15, 16)

def spaced(code, labels, rng):
    """`pair_separations`, (pairs, 2), their ratios, and the mean of these with its error; NaN if there are
    no two groups of five."""
    try:
        apart, pairs = pair_separations(code, labels, rng)
    except ValueError:
        apart, pairs = np.array([[math.nan, 1.0]]), np.array([[0, 1]])
    ratio = apart[:, 0] / apart[:, 1].clip(1e-12)
    return apart, ratio, (float(ratio.mean()), pairs_error(ratio, pairs))


def clustering(study, phis, K, truth):
    """What the claims on clusters need, of one {σ: φ}, ours or a null's; three restarts of K-means each.

    labels: (n,). Distance / SD: ratio, of pairs of clusters, (mean, error); least of them; classes, of pairs
    of classes; lead, ratio less classes. Adjusted Rand indices, (mean, error) over two seeds: sigma, to the
    clusters at the next σ; start, of a start from class centroids to random ones. Between two seeds: seeds,
    start_seeds. start_classes: of the start from class centroids, to the classes themselves.
    """
    device = study.device if torch.device(study.device).type == "cuda" else "cpu"
    fit = lambda points, seed, K, init="k-means++": KMeans(
        K, init=init, n_init=3, seed=study.seed + seed, device=device).fit(points).labels_.cpu().numpy()
    code, ari = phis[study.sigma], adjusted_rand_index
    labels, again = fit(code, 0, K), fit(code, 1, K)
    _, ratio, mean = spaced(code, labels, study.rng(19))
    out = dict(labels=labels, ratio=mean, least=ratio.min(), seeds=ari(labels, again),
               classes=NOTHING, sigma=NOTHING, start=NOTHING, start_seeds=math.nan, start_classes=math.nan)
    for other in (fit(v, 0, K) for v in list(phis.values())[1:2]):
        out["sigma"] = mean_se([ari(labels, other), ari(again, other)])
    if truth.max() > 0:
        known, count = truth >= 0, truth.max() + 1
        moved = fit(code, 0, count, torch.stack([code[truth == c].mean(0) for c in range(count)]))
        one, two = fit(code, 2, count), fit(code, 3, count)
        out |= dict(classes=spaced(code, truth, study.rng(19))[2], start_seeds=ari(one, two),
                    start=mean_se([ari(moved, one), ari(moved, two)]),
                    start_classes=ari(moved[known], truth[known]))
    (ratio, error), (other, other_error) = out["ratio"], out["classes"]
    return dict(out, lead=(ratio - other, math.hypot(error, other_error)))


@analysis(4, "clusters", "cluster-members")
def clusters(study):
    """Fig. 6, 15, 16: K-means on φ; how far apart clusters are, beside classes; how stable the clusters are.

    K: --clusters, or 100 (the least of the paper's runs), at most a twentieth of the pictures. Nulls: all
    three, because K-means makes separated clusters of anything; rows of the Gaussian and shuffled ones keep
    the labels, which then mean nothing. The Gaussian has no second σ.
    """
    n, known, done = len(study.x), study.labels >= 0, iter(range(1, 100))
    K = study.clusters or max(2, min(100, n // 20))
    if K > n // 2:
        raise Skip(f"{n} pictures cannot make {K} clusters; give a smaller --clusters or more --images")
    truth = np.full(n, -1)
    truth[known] = np.unique(study.labels[known], return_inverse=True)[1]

    def measure(phis):
        study.progress(next(done) / (14 + len(study.untrained_phi)), f"K-means, K = {K}")
        return clustering(study, phis, K, truth)

    here, nulls = measure(study.phi), study.nulls(measure, "untrained", "shuffled", "Gaussian")

    def judge(text, place, paper, key, over, effect, own, rule):
        means = {name: [v[key][0] for v in values] for name, values in nulls.items()
                 if (key, name) != ("sigma", "Gaussian")}
        return study.claim(text, place, paper, here[key], over, means, effect=effect, own=own, rule=rule)

    seeds, start_seeds, classes = here["seeds"], here["start_seeds"], here["start_classes"]
    claims = [
        judge("every pair of clusters is more than 2 SD apart", "Fig. 6", "all of 100 pairs", "ratio",
              "pairs of clusters", 0.25, here["least"] > 2,
              f"mean distance / SD; the least, {here['least']:.1f}, above 2"),
        judge("clusters are farther apart than classes", "Fig. 6", "substantially", "lead", "pairs", 0.25,
              beyond(here["lead"]), f"mean distance / SD less that of classes, {here['classes'][0]:.2f}"),
        judge("other σ give similar clusters", "App. B.3", "similar", "sigma", "two seeds", 0.05,
              here["sigma"][0] >= seeds - 0.1,
              f"Rand index to the next σ; at least that between seeds, {seeds:.2f}, less 0.1"),
        judge("a start from class centroids gives similar clusters", "App. B.3", "similar", "start",
              "two seeds", 0.05, here["start"][0] >= max(start_seeds - 0.1, classes),
              f"Rand index to random starts; at least that between these, {start_seeds:.2f}, less 0.1, and "
              f"that to the classes, {classes:.2f}")]
    gaussian = next(study.replicates("Gaussian"))[study.sigma]
    maps = draw_clusters(study, {"clusters": (study.code, here["labels"]),
                                 "Gaussian control": (gaussian, nulls["Gaussian"][0]["labels"]),
                                 "classes": (study.code, truth)})
    return dict(here, **maps, clusters=K, sizes=np.bincount(here["labels"], minlength=K), claims=claims)


def draw_clusters(study, groups):
    """Fig. 6, of {name: (φ (n, d), labels (n,))}: distances of pairs against SD, their ratio, t-SNE of seven
    groups; members of ten clusters. Returns the t-SNEs."""
    size, rng, labels, maps = (530, 440), study.rng(20), groups["clusters"][1], {}
    found = {name: (*spaced(v, of, study.rng(19))[:2], color) for (name, (v, of)), color in
             zip(groups.items(), (BLUE, GRAY, ORANGE))}
    found = {name: v for name, v in found.items() if np.isfinite(v[1]).all()}
    top = 1.05 * np.concatenate([np.zeros((1, 2)), *(pairs for pairs, _, _ in found.values())]).max(0)
    two = line([0, top[1]], [0, 2 * top[1]], "2 SD", RED)
    plots = [plot(size, [dots(pairs[:, 1], pairs[:, 0], name, color), two], "SD along the line",
                  "centroid distance", xlim=(0, top[1]), ylim=(0, top[0])) for name, (pairs, _, color) in
             found.items()]
    if found:
        span = limits(np.concatenate([ratio for _, ratio, _ in found.values()]))
        plots.append(plot(size, [bars(ratio, 30, span, name, color) for name, (_, ratio, color) in
                                 found.items()], "distance / SD", "pairs"))
    for name, (v, of) in groups.items():
        seven = rng.permutation(np.flatnonzero(np.bincount(of[of >= 0], minlength=1) >= 5))[:7]
        rows = np.flatnonzero(np.isin(of, seven))[:1000]
        if name != "Gaussian control" and len(rows) > 3:
            y = tsne(v[rows])
            maps[f"tsne_{name}"] = dict(rows=rows, groups=of[rows], y=y)
            plots.append(plot(size, [dots(*y[of[rows] == c].T) for c in seven],
                              title=f"t-SNE of {len(seven)} {name}"))
    study.figure("clusters", grid(plots or [caption("too few pictures for pairs of clusters")], 3, 5),
                 "Fig. 6. Distance of two clusters' centres against their width along the line that joins "
                 "them. Paper: all pairs of clusters lie above the line of 2 SD, classes overlap more.")
    members = [(c, rng.permutation(np.flatnonzero(labels == c)))
               for c in rng.permutation(np.argsort(-np.bincount(labels))[:10])]
    study.figure("cluster-members", picture_rows([(f"{c} ({len(m)})", study.pictures(m[:12]))
                                                  for c, m in members], side=112),
                 "Fig. 6, 15, 16. Random members of ten large clusters, one a row (how many there are). "
                 "Paper: they share the gist of the scene, not the class.")
    return maps


# App. B.2, Channels (Fig. 13)

@torch.no_grad()
def map_statistics(study, model, chosen):
    """Of E_z[a_M(x + σz)] at the study's σ: (spatial PR (d,), dimension (d,)).

    Spatial PR: over the h·w places of a map, averaged over pictures with weight φ[i], since the map of a
    silent channel has no shape. Dimension: of the maps seen as vectors of h·w numbers, (Σλ)²/Σλ² over the
    eigenvalues λ of their covariance.
    """
    maps = []
    for a in range(0, len(chosen), BATCH):
        x, generator, total = study.pictures(chosen[a:a + BATCH]), study.noise(20, a), 0
        for _ in range(study.draws):
            z = torch.randn(x.shape, generator=generator, device=x.device)
            total = total + model.encode(x + study.sigma * z)[0]
        maps.append((total / study.draws).flatten(2).cpu().double())
    maps = torch.cat(maps)                                                     # (n, d, hw)
    size, centred = maps.mean(2), maps - maps.mean(0)
    spatial = (size * participation_ratio(maps).nan_to_num()).sum(0) / size.sum(0)
    covariance = torch.einsum("ndp,ndq->dpq", centred, centred) / len(maps)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    return spatial.numpy(), (trace.square() / covariance.square().sum((1, 2))).numpy()


def gratings(size, channels, frequencies, angles, phases=4):
    """Sinusoids around 0.5: (frequencies, orientations, phases, channels, size, size); cycles a picture."""
    place = (torch.arange(size) + 0.5) / size
    f, angle, turn = (v[..., None, None, None] for v in torch.meshgrid(
        *(torch.as_tensor(np.asarray(v), dtype=torch.float32) for v in (frequencies, angles)),
        2 * math.pi * torch.arange(phases) / phases, indexing="ij"))
    along = angle.cos() * place + angle.sin() * place[:, None]
    return (0.5 + 0.5 * torch.sin(2 * math.pi * f * along + turn)).expand(-1, -1, -1, channels, -1, -1)


def tuning(study, model, count=8):
    """Mean φ over the phases of each grating less φ of a gray field: (d, frequencies, orientations)."""
    size, angles = study.checkpoint["size"], np.arange(count) * math.pi / count
    bank = gratings(size, model.channels, np.geomspace(1, size / 3, count), angles)
    flat = torch.cat([bank.flatten(0, 2), torch.full((8, *bank.shape[3:]), 0.5)]).to(study.device)
    code = torch.cat([phi(model, part, study.sigma, study.draws, study.noise(21, k))
                      for k, part in enumerate(flat.split(BATCH))]).cpu()
    response = code[:-8].view(*bank.shape[:3], -1).mean(2) - code[-8:].mean(0)
    return response.permute(2, 0, 1).numpy()


def channel_properties(study, model, phis, chosen):
    """Of every channel, (d,) each: pr of every second picture; kurtosis of the others; spatial_pr and
    pca_dimension (`map_statistics`); tuning: the share of 64 gratings that raise it above a gray field's
    value by more than half of what the best one does; stability: the correlation over pictures of its values
    at σ and at the next σ.
    """
    code, response = phis[study.sigma].double(), tuning(study, model).clip(0)
    spatial, dimension = map_statistics(study, model, chosen)
    best = response.max((1, 2), keepdims=True)
    out = dict(pr=channel_selectivity(code[::2]), kurtosis=kurtosis(code[1::2]).numpy(),
               spatial_pr=spatial, pca_dimension=dimension,
               tuning=np.where(best[:, 0, 0] > 0, (response > best / 2).mean((1, 2)), math.nan))
    for other in (v.double() for v in list(phis.values())[1:2]):
        cos = F.cosine_similarity(code - code.mean(0), other - other.mean(0), dim=0)
        out["stability"] = np.where((code.std(0) > 0) & (other.std(0) > 0), cos, math.nan)
    return out


def tails(pr, kurtosis):
    """(median |kurtosis − 3| of the common channels, that of the specialised ones less it)."""
    ok = np.isfinite(pr) & np.isfinite(kurtosis)
    pr, away = pr[ok], abs(kurtosis[ok] - 3)
    low = pr < otsu(pr) if len(pr) > 3 else np.zeros(len(pr), bool)
    if low.all() or not low.any():
        return NOTHING
    return float(np.median(away[~low])), float(np.median(away[low]) - np.median(away[~low]))


@analysis(11, "channels")
def channels(study):
    """Fig. 13: what selectivity (PR over the pictures) goes with, channel by channel: rank correlations.

    PR and kurtosis come from different pictures, because both are made by the same few values. Null: the
    untrained network, whose maps, tuning and stability go with PR as well. (Shuffling changes no channel's
    values and no map, a Gaussian has no maps and kurtosis 3.)
    """
    chosen, every = study.choose(500, 22), []
    for k, (model, phis) in enumerate([(study.model, study.phi), *zip(study.untrained, study.untrained_phi)]):
        study.progress((k + 0.3) / (1 + len(study.untrained)), f"network {k + 1}")
        every.append(channel_properties(study, model, phis, chosen))
    found, *untrained = every
    correlation = {k: bootstrap(found["pr"], v, study.rng(23)) for k, v in found.items() if k != "pr"}
    chance = 2 / math.sqrt(max(np.isfinite(found["pr"]).sum() - 1, 1))

    def goes(text, place, paper, name, sign):
        rho, sd, low, high = correlation.get(name, 2 * NOTHING)
        nulls = [rank_correlation(v["pr"], v[name]) for v in untrained if name in v]
        return study.claim(
            text, place, paper, (rho, sd), "channels", dict(untrained=nulls), sign=sign, effect=0.1,
            own=sign * rho > chance,
            rule=f"rank correlation with PR, 95 % in [{low:.2f}, {high:.2f}], beyond chance, {chance:.2f}")

    (near, contrast), *others = (tails(v["pr"], v["kurtosis"]) for v in every)
    samples = study.rng(24).integers(len(found["pr"]), size=(100, len(found["pr"])))
    spread = [tails(found["pr"][i], found["kurtosis"][i])[1] for i in samples]
    further = (contrast, np.nanstd(spread) if math.isfinite(contrast) else math.nan)
    claims = [
        goes("specialised channels have heavier tails", "Fig. 13", "heavy tails", "kurtosis", -1),
        study.claim("… and common channels are near-Gaussian", "§2.4, Fig. 13", "closer to Gaussian",
                    further, "channels", dict(untrained=[v[1] for v in others]), effect=0.5,
                    own=near < 1 and beyond(further),
                    rule=f"median |kurtosis − 3| is {near:.2f} for common channels (below 1), and by how "
                    "much more for specialised ones"),
        goes("specialised channels are sparser in space", "Fig. 13", "sparse", "spatial_pr", 1),
        goes("… and their maps have fewer dimensions", "Fig. 13", "few", "pca_dimension", 1),
        goes("common channels are broadly tuned", "§2.4", "larger set", "tuning", 1),
        goes("common channels are the most stable to σ", "§2.4", "most stable", "stability", 1)]
    draw_channels(study, found, correlation)
    return dict(found, chance=chance, rank_correlation=correlation, claims=claims)


def draw_channels(study, found, correlation):
    """Fig. 13: marginals of four specialised and four common channels; every property against PR."""
    code, pr, (special, common) = study.code.numpy(), found["pr"], study.channels()
    marginals = [plot((395, 300), [bars(code[:, c], 40, color=color)], f"φ[{c}]", "pictures",
                      f"{name}, PR {study.channel_pr[c]:.2g}") for name, group, color in
                 (("specialised", special[:4], ORANGE), ("common", common[::-1][:4], BLUE)) for c in group]
    titles = dict(kurtosis="kurtosis", spatial_pr="spatial PR of the maps", stability="correlation across σ",
                  pca_dimension="PCA dimension of the maps", tuning="share of gratings")
    plots = [plot((530, 400), [bars(pr, 30)], "PR over the pictures", "channels", f"{len(pr)} channels")]
    plots += [plot((530, 400), [dots(np.where(np.isfinite(found[k]), pr, math.nan), found[k])],
                   "PR over the pictures", titles[k], f"rank correlation {rho:.2f}", log="y" * (
                       k == "kurtosis")) for k, (rho, *_) in correlation.items()]
    study.figure("channels", grid([grid(marginals, 4, 5), grid(plots, 3, 5)], 1),
                 "Fig. 13. Values of eight channels; properties of all against PR. Paper: specialised ones "
                 "have heavy tails, are sparse in space and of few dimensions; common ones respond to more.")


# §3, Conditional densities (Fig. 8, 14 right, 21)

@analysis(20, "embedding", "scores")
def embedding(study, draws=8):
    """Fig. 8, 21: Eq. 4, d²(p₁, p₂) in nats, against ‖φ₁ − φ₂‖² for random pairs; inequality (3).

    The integral runs over 5 geometric σ from 0.2 to σ_max, as part of the definition: towards 0 it diverges.
    A, B: least and largest d²/‖φ₁ − φ₂‖², which grow apart with the number of pairs: so percentiles as well.
    Nulls: does another φ, the untrained network's or shuffled, predict the same d²?
    """
    n = min(study.pairs, len(study.x) // 2)
    pairs, values = study.choose(2 * n, 23).reshape(-1, 2), []
    sigmas = np.geomspace(min(0.2, study.sigma_max / 3), study.sigma_max, 5)
    for k, pair in enumerate(pairs):
        values.append(conditional_distance(study.model, *study.pictures(pair), sigmas, draws, study.draws,
                                           study.noise(24, k), max_iters=60))
        study.progress((k + 1) / n, f"Eq. 4, pair {k + 1} of {n}")
    d2, error, integrand, matched = (np.array([np.asarray(v, float) for v in part]) for part in zip(*values))
    square = lambda phis: (phis[study.sigma][pairs[:, 0]] - phis[study.sigma][pairs[:, 1]]
                           ).double().square().sum(1).numpy().clip(1e-30)
    span = lambda ratio: float(np.log(ratio.max() / ratio.min())) if ratio.min() > 0 else math.nan
    here = square(study.phi)
    ratio, (rho, sd, low, high) = d2 / here, bootstrap(here, d2, study.rng(25))
    spread = np.std([span(ratio[i]) for i in study.rng(26).integers(n, size=(200, n))])
    largest, percentiles = math.exp(span(ratio)), np.divide(*np.quantile(ratio, [0.95, 0.05]))
    nulls = lambda measure: study.nulls(measure, "untrained", "shuffled")
    claims = [
        study.claim("distance of φ strongly predicts the distance of densities", "Fig. 8", "strongly",
                    (rho, sd), "pairs", nulls(lambda v: rank_correlation(square(v), d2)), effect=0.1,
                    own=rho > 0.5 and low > 0,
                    rule=f"rank correlation of {n} pairs, above 0.5; 95 % in [{low:.2f}, {high:.2f}]; "
                    f"{matched.mean():.0%} of the y could be matched"),
        study.claim("embedding inequality (3) with B/A = 2.9", "Fig. 8", "log 2.9 = 1.06",
                    (span(ratio), spread), "pairs", nulls(lambda v: span(d2 / square(v))), sign=-1,
                    effect=0.2, own=largest <= 2.9,
                    rule=f"log B/A; B/A = {largest:.1f} over {n} pairs, 95th over 5th percentile "
                    f"{percentiles:.1f}")]
    ends = np.array(limits(here, True))
    marks = [dots(here, d2, "pairs; bar: one standard error", BLUE, 7),
             *(line([s, s], [max(v - e, v / 100), v + e], None, BLUE, width=3)
               for s, v, e in zip(here, d2, error)),
             line(ends, ratio.min() * ends, "A", GREEN), line(ends, ratio.max() * ends, "B", RED)]
    study.figure("embedding", plot((1600, 800), marks, "‖φ₁ − φ₂‖²", "symmetrised KL (nats), Eq. 4",
                                   log="xy"),
                 "Fig. 8. How different the pictures that share φ₁ are from those that share φ₂. "
                 f"B/A = {largest:.1f}. Paper: a narrow band, B/A = 2.9.")
    draw_scores(study, pairs[int(np.argsort(here)[n // 2])])
    return dict(pairs=pairs, sigmas=sigmas, kl=d2, kl_error=error, phi_squared_distance=here,
                matched=matched.mean(0), integrand=integrand, rank_correlation=rho, A=ratio.min(),
                B=ratio.max(), B_over_A=largest, percentiles=percentiles, claims=claims)


@torch.no_grad()
def draw_scores(study, pair):
    """Fig. 21: at one x_σ, σ²·score given φ₁ and given φ₂ (x̂ after matching, − x_σ); difference."""
    x = study.pictures(pair)
    z = torch.randn(x[0].shape, generator=study.noise(25), device=x.device)
    rows = [("x₁, x₂", x)]
    for k, sigma in enumerate(s for s in (0.1, 0.2, 0.4, 0.7, 1.0) if s <= max(0.1, study.sigma_max)):
        y = x[:1] + sigma * z
        phi_c = phi(study.model, x, sigma, study.draws, study.noise(26, k))
        x_hat = study.model.denoise(guidance_step(study.model, y.repeat(2, 1, 1, 1), phi_c)[0])
        scores = 0.5 + (x_hat - y) / (6 * sigma)                               # ± 3 σ is black … white
        rows.append((f"σ {sigma:g}", torch.cat([y, scores, x_hat, 0.5 + (x_hat[:1] - x_hat[1:]) / 2])))
    study.figure("scores", picture_rows(rows, side=224),
                 "Fig. 21. Noisy x₁; the score given φ₁, given φ₂; denoised given φ₁, given φ₂; half the "
                 "difference. Paper: the scores differ where the pictures do.")


def borrowed(denoiser, encoder):
    """A denoiser told φ by another network: `encode`, and so φ and Algorithm 2, are the other's."""
    return SimpleNamespace(encode=encoder.encode, score=denoiser.score)


def algorithm_1(study, model, x, samples, word, begin, end):
    """sample.py's Algorithm 1 around each picture of x (k, C, H, W): ([samples (S, C, H, W)], levels)."""
    sigmas = np.linspace(study.sigma_max, min(0.03, study.sigma_max / 10), study.steps).tolist()
    return around(model, study.checkpoint, [(v[None], None) for v in x], samples, sigmas, study.seed + word,
                  progress=lambda f, text: study.progress(begin + (end - begin) * f, f"Algorithm 1, {text}"))


@torch.no_grad()
def match_noisy(study, x, sigmas):
    """Fig. 20: pictures x with noise σ are given the φ of the picture before them. σ̂ = ‖s‖/√n before, after
    Algorithm 2, and after a step as long in a random direction instead: (3, len(sigmas), n)."""
    found, size = [], lambda v: v.square().mean((1, 2, 3), keepdim=True).sqrt()
    for k, sigma in enumerate(sigmas):
        z, step = (torch.randn(x.shape, generator=study.noise(28, k, i), device=x.device) for i in (0, 1))
        y, phi_c = x + sigma * z, phi(study.model, x, sigma, study.draws, study.noise(29, k)).roll(1, 0)
        matched = guidance_step(study.model, y, phi_c)[0]
        random = y + step / size(step) * size(matched - y)
        found.append([noise_level(study.model.score(v)).cpu().numpy() for v in (y, matched, random)])
    return np.array(found).transpose(1, 0, 2)


@analysis(25, "matching")
def matching(study, m=16):
    """Fig. 20: σ̂ = ‖s‖/√n before and after matching, on noisy test pictures (its caption's; given another
    one's φ: it names none) and inside Algorithm 1; and do samples share their target's layout (Fig. 7)?

    Layout: the correlation of pixels less their mean colour with the own target, less that with the others.
    Nulls. Layout: Algorithm 1 told the φ of an untrained network, three seeds, the same eight targets and
    noise; the error is that of the difference. Noise level: a random step as long as matching's; comparable
    only where one of the two steps changes σ̂.
    """
    chosen = study.choose(m, 27)
    x = study.pictures(chosen)
    sigmas = [s for s in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0) if s <= study.sigma_max] or [study.sigma_max]
    before, after, random = match_noisy(study, x, sigmas)
    samples, levels = algorithm_1(study, study.model, x, 1, 27, 0, 0.4)
    inside = [np.array([v[key].cpu().numpy() for v in levels]) for key in ("sigma_before", "sigma_after")]
    high = [float(v["sigma"]) >= min(0.1, study.sigma_max) for v in levels]

    def layout(found):
        cosine = (less_colour(torch.cat(found)) @ less_colour(x[:len(found)]).T).cpu().numpy()
        own = cosine.diagonal()
        return own - (cosine.sum(1) - own) / (len(found) - 1)

    own = layout(samples[:8])                              # of as many as the controls, and of the same
    controls = np.array([layout(algorithm_1(study, borrowed(study.model, network), x[:8], 1, 27, begin,
                                            begin + 0.2)[0])
                         for begin, network in zip((0.4, 0.6, 0.8), study.untrained)])         # (3, 8)
    shared, (_, error) = (mean_se(v, study.groups[chosen[:8]]) for v in (own, own - controls.mean(0)))
    change = {name: np.median(np.abs(b / a - 1), 1) for name, a, b in (
        ("noisy pictures", before, after), ("random step", before, random),
        ("Algorithm 1", inside[0][high], inside[1][high]))}
    worst = {name: float(v.max()) for name, v in change.items()}
    largest = max(worst["noisy pictures"], worst["Algorithm 1"])
    claims = [
        study.claim("matching keeps the noise level", "Fig. 20", "unchanged", (largest, 0.0),
                    "medians of pictures", {}, own=largest <= 0.05 if max(worst.values()) > 0.05 else None,
                    rule="median |after / before − 1| of ‖s‖/√n at most 0.05 at all σ ≥ 0.1: "
                    + ", ".join(f"{v:.3f} ({name})" for name, v in worst.items())),
        study.claim("samples share the target's layout", "Fig. 7", "picture", (shared[0], error), "targets",
                    dict(untrained=controls.mean(1)), effect=0.05, own=beyond(shared),
                    rule="correlation of pixels with the own target less that with others")]
    ends = np.array(limits(np.concatenate([v.ravel() for v in (before, after, *inside)]), True))
    marks = [dots(*(v.ravel() for v in inside), "in Algorithm 1", ORANGE),
             dots(before.ravel(), after.ravel(), "noisy pictures, another one's φ", BLUE),
             line(ends, ends, "unchanged", GRAY)]
    study.figure("matching", plot((1600, 800), marks, "σ̂ before matching", "σ̂ after matching", log="xy"),
                 "Fig. 20. The noise that the network sees before and after Algorithm 2. Paper: the same.")
    return dict(sigmas=sigmas, before=before, after=after, random=random, change=change, layout=own,
                layout_untrained=controls, algorithm_1=inside,
                algorithm_1_sigmas=[v["sigma"] for v in levels], claims=claims)


@analysis(14, "reconstruction", "unconditional")
def reconstruction(study, samples=8):
    """Fig. 7, 19: eight samples around two pictures (of two classes, if there are) by Algorithm 1, as many
    told the φ of an untrained network, and 16 unconditional samples. It judges nothing: `matching` does.
    """
    first, *others = study.choose(len(study.x), 30)
    second = next((i for i in others if study.labels[i] != study.labels[first]), others[0])
    x, sheets = study.pictures([first, second]), []
    for begin, model, text in ((0, study.model, "told φ of the framed picture"), (
            0.4, borrowed(study.model, study.untrained[0]), "control: told φ of an untrained network")):
        found = algorithm_1(study, model, x, samples, 31, begin, begin + 0.4)[0]
        sheets += [titled(text, panel(v, target[None], side=256), 790, 24) for v, target in zip(found, x)]
    generators = [seeded("cpu", study.seed, 34, i) for i in range(16)]
    mean = torch.tensor(study.checkpoint["mean"], device=study.device)
    free, steps = sample_unconditional(study.model, mean, x.shape[1:], generators, study.sigma_max,
                                       min(0.04, study.sigma_max / 10))
    study.figure("reconstruction", grid(sheets, 2),
                 "Fig. 7, 17, 18. Samples of Algorithm 1 around their target (framed). Paper: they share its "
                 "layout and local detail. The control: what a φ makes that has learnt nothing.")
    study.figure("unconditional", panel(free, side=390), "Fig. 19. Samples without a target.")
    return dict(unconditional_steps=steps)


# Paper B, Fig. 1

@analysis(5, "denoising")
def denoising(study, parts=8):
    """Paper B, Fig. 1: PSNR of the output against PSNR of the input (dB), training and held-out pictures.

    Errors over 8 parts of up to 512 pictures. Agreement: difference and two standard errors within 0.1 dB at
    every σ. It is a claim about the network, not about φ: no null applies.
    """
    sides, curves = {"these pictures": study.x[study.choose(512, 35)]}, {}
    if study.training is not None:
        sides = {"training": study.training[:512], "held out": study.held_out}
    for name, x in sides.items():
        study.progress(len(curves) / len(sides), f"PSNR, {name}")
        found = [evaluate(study.model, to_batch(part, study.device), BATCH, study.sigma_max)
                 for part in np.array_split(x, min(parts, len(x)))]
        curves[name] = np.array([list(v.values()) for v in found])             # (parts, σ)
    sigmas, means = list(found[0]), {name: [mean_se(v) for v in curve.T] for name, curve in curves.items()}
    gap = [(p[0] - q[0], math.hypot(p[1], q[1])) for p, q in zip(*means.values())] if len(sides) == 2 else []
    difference, error = max(gap, key=lambda gap: abs(gap[0]) + 2 * gap[1], default=NOTHING)
    claims = [claim(
        "training and held-out PSNR agree", "paper B, Fig. 1", "equal at 100,000 pictures",
        (difference, error), "parts", {}, own=abs(difference) + 2 * error <= 0.1,
        rule="largest difference in dB at any σ; with two errors within 0.1" if math.isfinite(error) else
        "no training pictures among these, or too few for an error")]
    x = input_psnr(sigmas)
    marks = [line(x, v.mean(0), name, color, True, (v.mean(0) - v.std(0), v.mean(0) + v.std(0)))
             for (name, v), color in zip(curves.items(), (ORANGE, BLUE))]
    study.figure("denoising", plot((1600, 800), [*marks, line(x, x, "no denoising", GRAY)], "input PSNR (dB)",
                                   "output PSNR (dB)"),
                 "Paper B, Fig. 1. Denoising of training pictures and of others (band: one SD over parts). "
                 "A network that has memorised is better on the former.")
    return dict(sigmas=sigmas, input_psnr=x, output_psnr=means, gap=gap, claims=claims)


# Paper B, §2, Generalisation (its Fig. 1, 2; --versus)

def posterior_mean(y, sigma, x):
    """E[x | y] (B, C, H, W) if x is one of N pictures x (N, C, H, W), all alike likely; y: their noisy ones.

    The exact minimiser of Eq. 1 on a finite training set, a softmax of −‖y − x_i‖²/2σ²: memorisation itself.
    It is told σ; a blind network reads it off y, to one part in √(2D).
    """
    flat, pictures = (off_mps(v.flatten(1)).double() for v in (y, x))
    weights = (-torch.cdist(flat, pictures).square() / (2 * sigma ** 2)).softmax(1)            # (B, N)
    return (weights @ pictures).view(y.shape).to(y)


@torch.no_grad()
def psnr_curve(denoise, x, sigmas):
    """PSNR in dB, (len(sigmas),), 100 at most, of denoise(y, σ) on pictures x, always with the same noise."""
    found = []
    for k, sigma in enumerate(sigmas):
        y = x + sigma * torch.randn(x.shape, generator=seeded(x.device, 57, k), device=x.device)
        error = torch.cat([denoise(part, sigma) for part in y.split(BATCH)]) - x
        found.append(-10 * math.log10(max(1e-10, float(error.square().mean()))))
    return np.array(found)


def to_nearest(a, b):
    """For each row of a (n, d): its cosine to the nearest row of b (N, d), (n,), and which row that is."""
    best = (F.normalize(a.flatten(1), dim=1) @ F.normalize(b.flatten(1), dim=1).T).max(1)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()


def compare_pair(study, pair, samples=32):
    """Fig. 1, 2 for two networks with disjoint training sets, pair [(model, training pictures)] * 2.

    Returns (numbers, four rows of eight pictures: A's samples, the nearest in A's training set, and B's).
    PSNR: means of both networks. Cosines, in pixels, pixels less their mean colour and φ: agreement of the
    two samples from the same noise; shuffled, from other noise; nearest, of a sample to its training set (at
    most POOL of it); held_out, of held-out pictures to the same.
    """
    held, N, curves, drawn = study.pictures(range(len(study.x))), len(pair[0][1]), {}, []
    sigmas = [s for s in SIGMAS if 0.05 <= s <= study.sigma_max]
    mean = torch.tensor(study.checkpoint["mean"], device=study.device)
    for k, (model, x) in enumerate(pair):
        study.progress(k / 2, f"N = {N:,}")
        chosen = torch.randperm(len(x), generator=seeded("cpu", study.seed, 58))[:512]
        sides = {"training": x[chosen], "held out": held}
        for side, pictures in sides.items():
            ours = psnr_curve(lambda y, sigma: model.denoise(y), pictures, sigmas)
            exact = psnr_curve(lambda y, sigma: posterior_mean(y, sigma, x), pictures, sigmas)
            curves.setdefault(side, []).append(ours)
            curves.setdefault(f"exact, {side}", []).append(exact)
        generators = [seeded("cpu", study.seed, 59, i) for i in range(samples)]
        drawn.append(sample_unconditional(model, mean, held.shape[1:], generators, study.sigma_max, 0.05,
                                          0.01, 0.1, 600)[0].clamp(0, 1))      # paper B's h₀, β and σ_end
    out = dict(N=N, sigmas=sigmas, psnr={name: np.mean(v, 0) for name, v in curves.items()})
    noise = study.noise(61)                                # never twice the same: it would make φ alike
    code = lambda model, v: torch.cat([phi(model, part, 0.3, 4, noise) for part in v.split(BATCH)])
    spaces = {"pixels": lambda model, v: v, LESS_COLOUR: lambda model, v: less_colour(v), "φ": code}
    for name, space in spaces.items():
        a, b = (space(pair[0][0], v).flatten(1) for v in drawn)
        sets = [space(model, x[:POOL]) for model, x in pair]
        own = [to_nearest(space(m, v), t) for v, (m, _), t in zip(drawn, pair, sets)]
        control = [to_nearest(space(m, held[:samples]), t)[0] for (m, _), t in zip(pair, sets)]
        out[name] = dict(agreement=F.cosine_similarity(a, b).cpu().numpy(),
                         shuffled=[float(F.cosine_similarity(a, b.roll(k, 0)).mean()) for k in (1, 2, 3)],
                         nearest=np.mean([v for v, _ in own], 0), held_out=np.mean(control, 0))
        if name == LESS_COLOUR:
            rows = [part for v, (_, at), (_, x) in zip(drawn, own, pair) for part in (v[:8], x[at[:8]])]
    return out, rows


def generalisation(study, pairs):
    """Paper B, Fig. 1, 2: the numbers of `compare_pair` for every pair, by N, figures and claims.

    Nulls: samples from other noise; the smallest N. Control: held-out pictures instead of samples.
    """
    found, rows = zip(*(compare_pair(study, pair) for pair in pairs))
    least, most = found[0], found[-1]
    small = lambda value: {f"N = {least['N']:,}": [value]} if len(found) > 1 else {}
    gap = lambda v: v["psnr"]["training"] - v["psnr"]["held out"]
    cosine = lambda v, key: mean_se(v[LESS_COLOUR][key])
    lead = lambda v: cosine(v, "nearest")[0] - cosine(v, "held_out")[0]
    error = math.hypot(cosine(most, "nearest")[1], cosine(most, "held_out")[1])
    claims = [
        claim(f"memorised at N = {least['N']:,}", "paper B, Fig. 1, 2", "copies", cosine(least, "nearest"),
              "samples", {"held-out pictures": [cosine(least, "held_out")[0]]}, effect=0.05,
              own=cosine(least, "nearest")[0] >= 0.95,
              rule=f"cosine ({LESS_COLOUR}) to the nearest training picture, at least 0.95"),
        claim(f"training and held-out PSNR agree at N = {most['N']:,}", "paper B, Fig. 1", "equal at 100,000",
              mean_se(gap(most)), "noise levels", small(gap(least).mean()), sign=-1, effect=0.1,
              own=gap(most).mean() <= 0.1, rule="mean difference in dB, at most 0.1"),
        claim(f"two networks draw the same at N = {most['N']:,}", "paper B, Fig. 2", "same at 100,000",
              cosine(most, "agreement"), "samples", {"other noise": most[LESS_COLOUR]["shuffled"],
                                                     **small(cosine(least, "agreement")[0])}, effect=0.05,
              own=cosine(most, "agreement")[0] >= 0.8,
              rule=f"cosine ({LESS_COLOUR}) of samples from the same noise, at least 0.8"),
        claim(f"these are new at N = {most['N']:,}", "paper B, Fig. 2", "new at 100,000", (lead(most), error),
              "samples", small(lead(least)), sign=-1, effect=0.05, own=lead(most) <= 0.05,
              rule="cosine to the nearest training picture, less that of held-out pictures; at most 0.05")]
    study.figure("generalisation", draw_generalisation(found),
                 "Paper B, Fig. 1, 2. Above: PSNR on training pictures (orange) and others (blue), and what "
                 "exact memorisation gives (black; gray: on its own pictures, mostly far above). Below: do "
                 "two networks with no training picture in common draw the same from the same noise?")
    names = "A's samples", "nearest in training", "B's, same noise", "nearest in training"
    sheets = [titled(f"N = {v['N']:,}", picture_rows(list(zip(names, four)), 80), 900, 26)
              for v, four in zip(found, rows)]
    study.figure("originals", grid(sheets, 2, 24),
                 "Paper B, Fig. 2. Samples of two networks from the same noise, and the training picture "
                 "nearest to each: copies where N is small, the same new pictures where it is large enough.")
    return dict(pairs=found, claims=claims)


def draw_generalisation(found):
    """For every N (at most six) a plot of PSNR and the histograms of cosines; mean cosines against N."""
    shown = [found[i] for i in sorted({round(v) for v in np.linspace(0, len(found) - 1, 6)})]
    x, N = input_psnr(found[0]["sigmas"]), [v["N"] for v in found]
    top = max(max(v["psnr"]["training"].max(), v["psnr"]["held out"].max()) for v in found) + 3
    colors = {"training": ORANGE, "held out": BLUE, "exact, training": GRAY, "exact, held out": "#000000"}
    columns = 2 if len(shown) in (2, 4) else 3
    size = (1600 - 8 * columns) // columns
    psnr = [plot((size, 460), [line(x, v["psnr"][k], k, c) for k, c in colors.items()], "input PSNR (dB)",
                 "output PSNR (dB)", f"N = {v['N']:,}", ylim=(5, top)) for v in shown]
    kinds = {"agreement": ("the two samples", BLUE), "nearest": ("sample to training", ORANGE),
             "shuffled": ("other noise", GRAY), "held_out": ("held out to training", GREEN)}
    histograms = [plot((size, 360), [bars(v[LESS_COLOUR][k], 30, (-0.2, 1), *kinds[k]) for k in (
        "agreement", "nearest")], "cosine", "samples", f"N = {v['N']:,}") for v in shown]
    against_N = [plot((530, 460), [line(N, [np.mean(v[space][k]) for v in found], *kinds[k], True)
                                   for k in kinds], "N", "mean cosine", space, log="x")
                 for space in ("pixels", LESS_COLOUR, "φ")]
    return grid([grid(psnr, columns, 5), grid(histograms, columns, 5), grid(against_N, 3, 5)], 1)


# Paper B, §3, Inductive biases: the Jacobian's basis (its Fig. 3)

def wiener(x):
    """The best linear denoiser of pictures like x (n, C, H, W): (denoise(y, σ), λ(σ) (m,), vectors (D, m)).

    λ = v/(v + σ²), falling, and vectors are its J's: x's principal components and their variances v. It has
    one basis for every picture: what "adapted to the picture" is held against.
    """
    mean = x.flatten(1).mean(0)
    _, s, V = torch.linalg.svd(x.flatten(1) - mean, full_matrices=False)                       # V: (m, D)
    kept = lambda sigma: 1 / (1 + sigma ** 2 * len(x) / s.square().clamp_min(1e-12))
    return lambda y, sigma: (mean + ((y.flatten(1) - mean) @ V.T * kept(sigma)) @ V).view(y.shape), kept, V.T


def falling_eigh(S):
    """Eigenvalues (m,), falling, and eigenvectors (m, m), in columns, of a symmetric S (m, m)."""
    return tuple(v.flip(-1).to(S.device) for v in torch.linalg.eigh(off_mps(S)))


def ritz(product, start, k):
    """The k largest eigenvalues, falling, and eigenvectors (D, k) of a symmetric operator, product(v (D,)).

    Rayleigh and Ritz's, on the Krylov space of `start` (D,) of dimension 2k + 20.
    """
    m, v = min(len(start), 2 * k + 20), start
    Q, SQ = start.new_zeros(m, len(start)), start.new_zeros(m, len(start))
    for j in range(m):
        for fresh in (v, start.roll(j)):                   # the second: where the space is exhausted
            for _ in range(2):                             # twice is enough against rounding
                v = fresh = fresh - (fresh @ Q[:j].T) @ Q[:j]
            if v.norm() > 1e-6 * SQ.norm():
                break
        Q[j] = v / v.norm()
        SQ[j] = v = product(Q[j])
    values, vectors = falling_eigh((SQ @ Q.T + Q @ SQ.T) / 2)
    return values[:k], Q.T @ vectors[:, :k]


def rows_of_jacobian(model, y, weights):
    """Jᵀw at y (C, H, W) for each row w of `weights` (n, D), (n, D), from n copies of y.

    (torch.func.jacrev is no substitute: under no_grad its vmap fails at the channels-last copy in `encode`.)
    """
    with torch.enable_grad():
        copies = y.expand(len(weights), *y.shape).clone().requires_grad_()
        return torch.autograd.grad(model.denoise(copies).flatten(1), copies, weights)[0].flatten(1)


@torch.no_grad()
def jacobian_basis(model, y, k=64, full=1024, generator=None):
    """How x̂ depends on y (C, H, W), of D values: x̂ = Jy + b, and the eigenvectors of J's symmetric part.

    (An optimal denoiser's J is symmetric: σ²J is the covariance of x given y.) Returns dict(x_hat (D,),
    values λ (m,), falling, vectors (D, m), trace Σλ, the effective rank, asymmetry ‖J − Jᵀ‖/‖J‖, bias
    ‖b‖/‖x̂‖). For D ≤ `full` from all of J, m = D; beyond, m = k by products alone, trace and asymmetry from
    32 random v = ±1: E[vᵀJv] = Σλ, E‖Jv‖² = ‖J‖².
    """
    flat, D = y.flatten(), y.numel()
    f = lambda v: model.denoise(v.view(1, *y.shape)).flatten()
    if D <= full:
        J = torch.cat([rows_of_jacobian(model, y, part) for part in torch.eye(D).to(y).split(64)])
        values, vectors = falling_eigh((J + J.T) / 2)
        trace, asymmetry, x_hat, Jy = J.trace(), (J - J.T).norm() / J.norm(), f(flat), J @ flat
    else:
        x_hat, pull = torch.func.vjp(f, flat)
        _, push = torch.func.vjp(lambda u: torch.func.vjp(f, flat)[1](u)[0], torch.zeros_like(flat))
        J_times, JT_times = lambda v: push(v)[0], lambda v: pull(v)[0]         # torch's jvp: not in GroupNorm
        signs = torch.randint(0, 2, (32, D), generator=generator, device=y.device).to(y) * 2 - 1
        Jv, JTv = (torch.stack([product(v) for v in signs]) for product in (J_times, JT_times))
        trace, asymmetry = (signs * Jv).sum(1).mean(), (Jv - JTv).norm() / Jv.norm()
        values, vectors = ritz(lambda v: (J_times(v) + JT_times(v)) / 2, Jv[0], k)
        Jy = J_times(flat)
    return dict(x_hat=x_hat, values=values, vectors=vectors, trace=float(trace), asymmetry=float(asymmetry),
                bias=float((x_hat - Jy).norm() / x_hat.norm()))


def sure(y, x_hat, trace, sigma):
    """Stein's unbiased estimate of ‖x̂ − x‖² (pixels²), from y alone: ‖y − x̂‖² + σ² (2 tr J − D)."""
    return float((y.flatten() - x_hat.flatten()).square().sum() + sigma ** 2 * (2 * trace - y.numel()))


def coefficients(x, basis):
    """⟨x, e_k⟩² (m,) in a basis dict(vectors (D, m)), of x (C, H, W) less its mean colour and of norm 1."""
    return (less_colour(x[None])[0] @ basis["vectors"]).square().cpu().numpy()


@analysis(12, "harmonics")
def harmonics(study, pictures=4):
    """Paper B, Fig. 3: the basis in which the network shrinks a noisy picture, at the σ that is analysed.

    Adapted: share of the contrast ‖x − its mean colour‖² in the first Σλ vectors. Decay: rank correlation of
    λ_k with ⟨x, e_k⟩², k ≤ 200. Both less the same in the Wiener filter's basis; beyond 1,024 values both of
    the 64 vectors that are computed.
    Nulls: the basis of another picture; a network of random weights. (The untrained network of the other
    analyses returns the mean colour: its J is 0.)
    """
    chosen, sigma, found = study.choose(pictures, 50), study.sigma or 0.1, []
    x = study.pictures(chosen)
    y = x + sigma * torch.randn(x.shape, generator=study.noise(51), device=x.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        random = UNet(**study.checkpoint["model"]).to(study.device).eval()
    for i, noisy in enumerate(y):
        study.progress(i / len(y), f"Jacobian at picture {i + 1}")
        generator = study.noise(52, i)
        found.append([jacobian_basis(model, noisy, generator=generator) for model in (study.model, random)])
    here, untrained = zip(*found)
    _, kept, basis = wiener(to_batch(np.delete(study.x, chosen, 0), study.device))
    linear = dict(values=kept(sigma), vectors=basis)
    ranks_, most = [max(1, round(v["trace"])) for v in here], min(len(v["values"]) for v in (*here, linear))

    def measured(bases):                                   # one a picture -> (2, pictures)
        squares = [coefficients(u, basis)[:most] for u, basis in zip(x, bases)]
        return np.array([[c[:k].sum() for c, k in zip(squares, ranks_)],
                         [rank_correlation(basis["values"][:most][:200].cpu().numpy(), c[:200])
                          for c, basis in zip(squares, bases)]])

    own, fixed = measured(here), measured([linear] * len(x))
    claims = claims_on_basis(own - fixed, {
        "another picture's": [measured(here[s:] + here[:s]) - fixed for s in range(1, len(x))],
        "untrained": [measured(untrained) - fixed]}, here, untrained)
    study.figure("harmonics", draw_harmonics(study, x, y, here, linear),
                 f"Paper B, Fig. 3. A picture, with noise (σ = {sigma:g}), denoised, and eigenvectors e_k of "
                 "the denoiser's Jacobian there: do they oscillate along the picture's own contours? Below: "
                 "how much of each is kept (λ), and how much of the picture's contrast it holds.")
    return dict(sigma=sigma, claims=claims, compaction=own[0], decay=own[1], compaction_Wiener=fixed[0],
                decay_Wiener=fixed[1], values=[v["values"][:200] for v in here],
                effective_rank=[v["trace"] for v in here], asymmetry=[v["asymmetry"] for v in here],
                bias=[v["bias"] for v in here],
                sure=[sure(v, f["x_hat"], f["trace"], sigma) for v, f in zip(y, here)],
                squared_error=[(f["x_hat"].view(u.shape) - u).square().sum() for u, f in zip(x, here)])


def claims_on_basis(lead, nulls, here, untrained):
    """The claims of `harmonics`: its leads over the Wiener filter's basis, (2, pictures); J's asymmetry."""
    asymmetry = mean_se([v["asymmetry"] for v in here])
    return [*(claim(text, "paper B, Fig. 3", "picture", mean_se(lead[i]), "pictures",
                    {name: [v[i].mean() for v in null] for name, null in nulls.items()}, effect=0.02,
                    own=beyond(mean_se(lead[i])), rule=f"{rule}, less that of the Wiener filter")
              for i, text, rule in (
                  (0, "the basis is adapted to the picture", "share of its contrast that Σλ vectors hold"),
                  (1, "eigenvalues and coefficients decay together", "rank correlation of λ_k, ⟨x, e_k⟩²"))),
            claim("the Jacobian is nearly symmetric", "paper B, §3", "an optimal one is", asymmetry,
                  "pictures", dict(untrained=[v["asymmetry"] for v in untrained]), sign=-1, effect=0.1,
                  own=asymmetry[0] <= 0.3, rule="‖J − Jᵀ‖/‖J‖, at most 0.3")]


def draw_harmonics(study, x, y, here, linear):
    """Eigenvectors as pictures, a row a picture, the Wiener filter's below; eigenvalues and coefficients."""
    most = min(v["vectors"].shape[1] for v in (here[0], linear))
    places = [k for k in (1, 2, 3, 5, 8, 12, 20, 30, 45) if k <= most]

    def row(first, basis):
        vectors = basis["vectors"][:, [k - 1 for k in places]].T.reshape(-1, *x.shape[1:])
        return grid([*first, *[to_image(0.5 + 0.5 * v / v.abs().max(), 128) for v in vectors]], 12, 4)

    head = [caption(name, 22, 128) for name in ("x", "y", "x̂", *(f"e {k}" for k in places))]
    rows = [row([to_image(v, 128) for v in (u, noisy, f["x_hat"].view(u.shape))], f) for u, noisy, f in
            zip(x, y, here)]
    rows.append(row([caption("Wiener: one basis for all", 22, 260), to_image(study.pictures(
        range(len(study.x))).mean(0), 128)], linear))
    names = [*(f"picture {i + 1}" for i in range(len(x))), "Wiener"]
    values = [line(range(1, 1 + len(v)), v, n) for n, v in zip(names, (
        basis["values"][:200].cpu() for basis in (*here, linear)))]
    means = [np.convolve(coefficients(u, basis)[:200], np.ones(5) / 5, "valid") for u, basis in zip(x, here)]
    squares = [line(range(3, 3 + len(v)), v.clip(1e-7), n) for n, v in zip(names, means)]
    plots = [plot((796, 500), values, "k", "eigenvalue λ_k"),
             plot((796, 500), squares, "k", "⟨x, e_k⟩² (mean of five)", log="y")]
    return grid([grid(head, 12, 4), *rows, grid(plots, 2)], 1)


# Paper B, §3, Near-optimal denoising of regular pictures (its Fig. 4, 5)

FIT = [10 ** (-psnr / 20) for psnr in range(0, 21, 2)]     # σ of the fit: 1 to 0.1, input PSNR 0 to 20 dB


def slope(psnr):
    """Least-squares slope of output PSNR (…, len(FIT)), in dB, against input PSNR."""
    return np.polyfit(input_psnr(FIT), np.transpose(psnr), 1)[0]


def disc_tangents(size, place):
    """(a disc (1, size, size), an orthonormal basis (D, 5) of the tangent space of all discs there).

    place (5,): position, across and down, radius, ground, intensity; by central differences.
    """
    steps = 1e-4 * np.concatenate([np.eye(5), -np.eye(5)])
    ends = np.stack([draw_disc(size, *(place + step)) for step in steps])      # (10, 1, size, size)
    basis = torch.linalg.qr(torch.from_numpy(ends[:5] - ends[5:]).flatten(1).T)[0]
    return torch.from_numpy(draw_disc(size, *place)).float(), basis.float()


def disc_jacobian(study, discs=4):
    """Fig. 5, right: the first 12 λ at noisy discs, (mean (12,), how many exceed 1/2); and the share of the
    tangent space's five dimensions that the first five eigenvectors hold, (mean, error)."""
    values, held = [], []
    for i in range(discs):
        rng, generator = study.rng(55, i), study.noise(56, i)
        place = np.array([*rng.uniform(0.4, 0.6, 2), rng.uniform(0.15, 0.25), 0.2, 0.8])
        x, tangents = (v.to(study.device) for v in disc_tangents(study.checkpoint["size"], place))
        y = x + study.sigma * torch.randn(x.shape, generator=generator, device=study.device)
        found = jacobian_basis(study.model, y, full=4096)
        values.append(found["values"][:12].cpu().numpy())
        held.append(float((found["vectors"][:, :5].T @ tangents).square().sum() / 5))
    return dict(eigenvalues=np.mean(values, 0), above_half=float(np.mean([(v > 0.5).sum() for v in values])),
                tangent_share=mean_se(held))


@analysis(3, "regularity")
def regularity(study, parts=8):
    """Paper B, Fig. 4, 5: slope of output against input PSNR, for networks trained on calpha:A or disc.

    Optimal: A/(A + 1) for C^A pictures; 1 for discs, a manifold of five dimensions, whose least error is 5σ².
    Fitted over input PSNR 0 to 20 dB: at less noise small networks meet their own error. Error over parts of
    the held-out pictures, and with several networks over these. Claims: near the optimum (within 0.1); on
    discs below it (by more), since the paper's networks do not shrink all but the five dimensions to nothing.
    Null: the Wiener filter of 4,000 training pictures, which is blind to geometry; where it is itself near
    the optimum (α = 1), there is nothing to tell.
    """
    data, channels = study.checkpoint["flags"]["data"] or "", study.model.channels
    if not data.startswith(("calpha", "disc")) or study.training is None or channels > 1:
        raise Skip("only for networks trained on --data disc or calpha:A, in gray, and their own pictures")
    alpha = float(data[7:]) if data != "disc" else 1e9     # calpha:A
    best, x = alpha / (alpha + 1), to_batch(study.held_out, study.device)
    psnr = [psnr_curve(lambda y, s: study.model.denoise(y), part, FIT) for part in x.tensor_split(parts)]
    linear = psnr_curve(wiener(to_batch(study.training, study.device))[0], x, FIT)
    found, far = mean_se(slope(psnr)), best - 0.1
    own = found[0] + 2 * found[1] < far if data == "disc" else abs(found[0] - best) <= 0.1
    claims = [claim(
        f"slope on {data} is {'below' if data == 'disc' else 'near'} the optimum {best:.2f}",
        "paper B, Fig. 4, 5", {1: ".46", 2: ".61", 3: ".75", 5: ".83", 1e9: "below 1"}.get(alpha, "–"), found,
        "parts", dict(Wiener=[float(slope(linear))]), effect=0.02, own=own if slope(linear) < far else None,
        rule=f"dB of output per dB of input; {'by' if data == 'disc' else 'within'} 0.1, and above the "
        "linear filter's, if that is not as near the optimum")]
    numbers = dict(data=data, slope=found, optimum=best, linear=float(slope(linear)), sigmas=FIT,
                   psnr=np.mean(psnr, 0), linear_psnr=linear, claims=claims,
                   **(disc_jacobian(study) if data == "disc" else {}))
    study.figure("regularity", draw_regularity([numbers]), REGULARITY)
    return numbers


def claim_on_slopes(found):
    """The claim on the slopes of several networks; found: their numbers of `regularity`."""
    if not all("slope" in v for v in found):
        raise UserError("regularity is for networks trained on --data disc or calpha:A")
    best = sorted({v["optimum"] for v in found})
    mean = lambda value: np.array([np.mean([value(v) for v in found if v["optimum"] == b]) for b in best])
    here, error = mean(lambda v: v["slope"][0]), mean(lambda v: v["slope"][1])
    linear = mean(lambda v: v["linear"])
    each = ", ".join(f"{a:.2f} (optimum {b:.2f}, Wiener {c:.2f})" for a, b, c in zip(here, best, linear))
    order = rank_correlation(np.array(best), np.array(here)), 0.0
    return claim("slopes rise with the regularity of the pictures", "paper B, Fig. 4, 5", "in order", order,
                 "kinds of pictures", {}, own=(np.diff(here) > 2 * np.hypot(error[1:], error[:-1])).all(),
                 rule=f"rank correlation, of three kinds or more; each step beyond two errors; {each}")


REGULARITY = ("Paper B, Fig. 4, 5. Denoising of pictures of known regularity; slopes of these curves against "
              "the optimum (line); on discs, eigenvalues of the Jacobian, after the fifth ideally 0.")


def draw_regularity(results):
    """Curves and slopes of several networks' `regularity`; for discs, the Jacobian's eigenvalues."""
    x, kinds = input_psnr(FIT), list(dict.fromkeys(v["data"] for v in results))
    curves = [line(x, np.mean([v["psnr"] for v in results if v["data"] == kind], 0), kind, points=True)
              for kind in kinds]
    on_discs = [v["eigenvalues"] for v in results if "eigenvalues" in v]
    size, best = ((530, 500) if on_discs else (796, 560)), [v["optimum"] for v in results]
    plots = [plot(size, [*curves, line(x, x, "no denoising", GRAY)], "input PSNR (dB)", "output PSNR (dB)"),
             plot(size, [line([0.4, 1.05], [0.4, 1.05], "optimal"),
                         dots(best, [v["linear"] for v in results], "Wiener filter", GRAY, 8),
                         dots(best, [v["slope"][0] for v in results], "networks", ORANGE, 10)],
                  "optimal slope", "slope")]
    if on_discs:
        mean = line(range(1, 13), np.mean(on_discs, 0), "on discs", points=True)
        plots.append(plot(size, [mean, rule(x=5.5)], "k", "eigenvalue λ_k"))
    return grid(plots, 3, 5)


# φ during training (ours)

def draw_emergence(found):
    """Use of M, class agreement, PR around M and selectivity against pictures seen: found [results.json].

    Networks that have seen as many pictures (seeds) are one point, with a band of one SD. What was not
    measured (no classes) is left out. None if all have seen as many, or an analysis that it needs is missing.
    """
    seen = sorted({v["training"]["pictures_seen"] for v in found})
    done = [{name for name, numbers in v["analyses"].items() if "skipped" not in numbers} for v in found]
    if len(seen) < 2 or not {"neighbours", "sparsity", "selectivity"} <= set.intersection(*done):
        return None

    def curve(label, value):
        y = [[np.array(value(v), float).mean() for v in found if v["training"]["pictures_seen"] == n]
             for n in seen]
        mean, sd = (np.array([f(v) for v in y]) for f in (np.mean, np.std))
        return line(seen, mean, label, points=True, band=(mean - sd, mean + sd))

    marks = {
        "use of M (dB)": [curve(f"σ {s}", lambda v, s=s: v["alive"]["use"][s])
                          for s in found[0]["alive"]["use"]],
        "class agreement": [
            *(curve(k, lambda v, k=k: v["analyses"]["neighbours"]["agreement"][k][0])
              for k in ("φ", "pixels", LESS_COLOUR)),
            curve("φ, untrained", lambda v: v["alive"]["untrained"])],
        "participation ratio": [curve(f"M's {k}", lambda v, k=k: v["analyses"]["sparsity"][f"pr_{k}"]["M"])
                                for k in ("input", "output")],
        "channels' PR over pictures": [curve(f"{q:.0%} below", lambda v, q=q: np.nanquantile(np.array(
            v["analyses"]["selectivity"]["pr"], float), q)) for q in (0.1, 0.5, 0.9)]}
    plots = [plot((796, 520), each, "pictures seen", label, log="x") for label, each in marks.items()
             if np.isfinite(np.concatenate([mark.y for mark in each])).any()]
    return grid(plots, 2)


# Claims and the page

def words(claim):
    """What a claim's row says behind its verdict: paper; here; nulls and effect size; rule."""
    known = None not in (claim["value"], claim["error"]) and math.isfinite(claim["value"] + claim["error"])
    here = f"{claim['value']:.3g} ± {claim['error']:.2g} over {claim['over']}" if known else "not measured"
    nulls = "".join(f"; {name} {m:.3g} ± {s:.2g} (n = {n})" for name, (m, s, n) in claim["nulls"].items())
    effect = f", to differ by {claim['effect']:g}" * bool(nulls and claim["effect"])
    return f"paper: {claim['paper']}; here: {here}{nulls}{effect}. {claim['rule']}"


def alive_line(alive):
    """The first line of every analysis: may φ be judged at all?"""
    use = ", ".join(f"{v:.2f} (σ {s:g})" for s, v in alive["use"].items())
    dead = f"φ is NOT alive, by {alive['why']}: no claim on it has a verdict." if alive["why"] else ""
    text = (f"{dead or 'φ is alive:'} use of M {use} dB; cosine of φ between pictures {alive['cosine']:.4f}; "
            f"{alive['silent']} of {alive['channels']} channels silent")
    untrained = ", ".join(f"{v:.3f}" for v in alive["untrained"])
    classes = f"; class agreement {alive['agreement']:.3f}, untrained {untrained}"
    return text + classes * math.isfinite(alive["agreement"])


def over_networks(tables):
    """Every claim over several networks, a list of claims whose value and error are mean and SD over them."""
    rows = []
    for name in dict.fromkeys(c["claim"] for table in tables for c in table):
        same = [c for table in tables for c in table if c["claim"] == name]
        values, verdicts = np.array([c["value"] for c in same], float), [c["verdict"] for c in same]
        nulls = {k: [c["nulls"][k][0] for c in same if k in c["nulls"]] for k in same[0]["nulls"]}
        rows.append(dict(
            same[0], value=values.mean(), error=values.std(ddof=1) if len(values) > 1 else math.nan,
            over=f"{len(same)} networks", rule="each: " + ", ".join(f"{v:.3g}" for v in values),
            nulls={k: [np.mean(v), np.std(v, ddof=int(len(v) > 1)), len(v)] for k, v in nulls.items()},
            verdict=", ".join(f"{v} in {n}" for v, n in Counter(verdicts).most_common())))
    return rows


def say_claims(claims):
    """The claims, the verdict first, and how many hold."""
    for c in claims:
        say(f"{c['verdict']:14} {c['claim']} ({c['place']})")
        say(f"{'':14} {words(c)}")
    verdicts = [c["verdict"].split(" in ")[0] for c in claims]
    say("; ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "fails", "not comparable")))


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ color: #1a1a1a; background: #fff; font: 17px/1.5 system-ui, sans-serif; max-width: 1000px;
margin: 0 auto; padding: 12px; overflow-wrap: anywhere }} img {{ width: 100% }} figure {{ margin: 28px 0 }}
table {{ border-spacing: 0 }} td {{ vertical-align: top; padding: 8px 9px 8px 0; border-top: 1px solid #ccc }}
.holds {{ color: #006644; font-weight: bold }} .fails {{ color: #a33300; font-weight: bold }}
td:first-child {{ min-width: 4.6em; overflow-wrap: normal }}</style>
<h1>{title}</h1><p>{scale}</p><p><b>{alive}</b></p><h2>Claims</h2>
<p>A claim holds if ours differs from every null, networks and codes that have learnt nothing, as it says.</p>
<table>{rows}</table><h2>Figures</h2>{figures}<h2>Settings</h2><p>{settings}</p></html>
"""


def write_page(out, title, scale, alive, claims, captions, settings):
    """index.html in the folder `out`: claims, figures and settings; one page that needs no other file."""
    safe = lambda v: html.escape(printable(str(v)))
    encoded = lambda name: base64.b64encode(Path(out, f"{name}.png").read_bytes()).decode()
    figures = [f'<figure><figcaption><b>{name}.</b> {safe(text)}</figcaption><img alt="{name}" '
               f'src="data:image/png;base64,{encoded(name)}"></figure>' for name, text in captions.items()]
    rows = [f'<tr><td class="{c["verdict"].split()[0]}">{c["verdict"]}<td><b>{safe(c["claim"])}</b> '
            f'({safe(c["place"])})<br>{safe(words(c))}' for c in claims]
    page = PAGE.format(title=safe(title), scale=safe(scale), alive=safe(alive), rows="\n".join(rows),
                       figures="\n".join(figures),
                       settings=safe("; ".join(f"{k} {v}" for k, v in settings.items())))
    with write(os.path.join(out, "index.html")) as file:
        file.write(page.encode())


def plain(value):
    """Numbers, arrays and tensors as JSON has them: floats to six digits, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(path, value):
    """Write `plain` of a value, whole or not at all."""
    with write(path) as file:
        file.write(json.dumps(plain(value)).encode())


# Running

def compute_phi(models, x, sigmas, draws, seed, device, progress=lambda fraction, text: None):
    """φ(x_σ) of the pictures x (n, H, W, C) uint8 by every network: [{σ: (n, d) float32 on the CPU}].

    sigmas: a list of σ for each network. Under torchrun each process computes every world-th batch, and
    process 0 has the sum: the same φ, since a batch's noise depends on the seed, σ and its place alone.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found, done, whole = [{} for _ in models], 0, sum(map(len, sigmas)) * len(x)
    for model, levels, codes in zip(models, sigmas, found):
        for sigma in levels:
            codes[sigma] = torch.zeros(len(x), model.width * 2 ** model.levels)
            for a in range(rank * BATCH, len(x), world * BATCH):
                batch = to_batch(x[a:a + BATCH], device)
                generator = seeded(device, seed, 5, round(1e6 * sigma), a)
                codes[sigma][a:a + BATCH] = phi(model, batch, sigma, draws if sigma else 1, generator).cpu()
                progress((done + a + len(batch)) / whole, f"{a + len(batch)} pictures at σ {sigma:g}")
            if world > 1:
                dist.reduce(codes[sigma], 0)
            done += len(x)
    return found


def untrained_networks(study, seeds=3):
    """The same network before its training, initialised as train.py does, from several seeds."""
    networks = []
    for k in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(study.seed + 1000 + k)
            model = UNet(**study.checkpoint["model"]).to(study.device).eval()
        x, generator = study.pictures(study.choose(64, 14, k)), seeded("cpu", study.seed, 15, k)
        sigma = study.sigma_max * torch.rand(len(x), 1, 1, 1, generator=generator).square()
        z = torch.randn(x.shape, generator=generator)
        initialise(model, x + (sigma * z).to(x.device), study.checkpoint["mean"])
        networks.append(model)
    return networks


def add_phi(study, sigmas, key, paths):
    """Gives the study its φ and those of untrained networks: from phi.npz if of the same key, or computed.

    Returns whether this process goes on: under torchrun, only the first one does.
    """
    path, name, codes = os.path.join(study.out, "phi.npz"), json.dumps(key, sort_keys=True), []
    study.untrained = untrained_networks(study)
    with contextlib.suppress(Exception):       # none, or not whole, or not ours: then --force was given
        with np.load(path) as file:
            if str(file["key"]) == name:
                codes = [np.concatenate([file["phi"][None], file["other_phi"]]), *file["untrained"]]
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not codes:
        found = compute_phi([study.model, *study.untrained], study.x, [sigmas] + 3 * [sigmas[:2]],
                            study.draws, study.seed, study.device, study.progress)
        codes = [np.stack([v.numpy() for v in phis.values()]) for phis in found]   # (σ, n, d) a network
        if not first:                          # the sum over processes is the first one's alone
            return False
        if not all(np.isfinite(v).all() for v in codes):
            raise UserError("φ is not finite; is the checkpoint damaged?")
        with write(path) as file:
            np.savez(file, phi=codes[0][0], other_phi=codes[0][1:], untrained=np.array(codes[1:]),
                     paths=np.array(paths), sigma=np.array(sigmas), labels=study.labels,
                     checkpoint=key["checkpoint"], key=name)
    study.phi, *study.untrained_phi = [dict(zip(sigmas, map(torch.from_numpy, v))) for v in codes]
    return first


def arguments():
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="written by train.py; several: networks of one kind, other seeds")
    add("--data", metavar="PATH", help="pictures to analyse, as for train.py (default: the held-out part of "
        "those of the training)")
    add("--versus", nargs="+", default=[], metavar="FILE", help="paper B: checkpoints trained on other "
        "pictures (--subset second) than those before (--subset first), one for one; draws its Fig. 1, 2")
    add("--only", nargs="+", choices=list(ANALYSES), metavar="NAME", help=f"some of: {', '.join(ANALYSES)}")
    add("--images", type=number(int, 20), default=2000, help="pictures at most, by seed (default: 2000)")
    add("--draws", type=number(int, 1, 10 ** 6), default=20, help="noise draws for each φ (default: 20)")
    add("--sigma", nargs="+", type=number(float, 0, 100), default=[0.3, 0.1], metavar="SIGMA",
        help="noise levels of φ: the first is analysed, the second compared with it (default: 0.3 0.1)")
    add("--clusters", type=number(int, 2), help="K (default: 100, at most a twentieth of the pictures)")
    add("--pairs", type=number(int, 5, 10 ** 6), default=24, help="of pictures, for Eq. 4 (default: 24)")
    add("--steps", type=number(int, 3, 10 ** 5), default=40, help="noise levels of Algorithm 1 (default: 40)")
    add("--pictures", nargs="+", metavar="FILE", help="for `attributes` (default: three, by seed)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="default: %(default)s")
    add("--out", default="figures", metavar="FOLDER", help="default: %(default)s")
    add("--force", action="store_true", help="replace results of other settings, and foreign files, in --out")
    add("--device", help="cpu, cuda, mps (default: the fastest there is)")
    return parser.parse_args()


def prepare(flags, path, model, checkpoint, device):
    """(the Study without φ, what its results depend on, names of the pictures, what they are). UserError."""
    data = flags.data or checkpoint["flags"]["data"]
    gone = data and not flags.data and not (is_synthetic(data) or os.path.exists(data))
    if gone:
        say(f"{data}, of its training, is not here: built-in pictures instead; --data names others")
    pictures, train, held_out = training_data({**checkpoint["flags"], "data": None if gone else data})
    own = pictures.fingerprint == checkpoint["fingerprint"]
    if not (own or flags.data or gone):
        raise UserError(f"{path}: the pictures of its training have changed; --data says which to analyse")
    rows = held_out if own and not flags.data else np.arange(len(pictures.x))
    rows = np.sort(np.random.default_rng((flags.seed, 10)).permutation(rows)[:flags.images])
    if len(rows) < 20:
        raise UserError(f"{len(rows)} {'' if flags.data else 'held-out '}pictures are too few, 20 are the "
                        "least; --data names others (if those of the training, all are analysed)")
    rng = np.random.default_rng((flags.seed, 35))
    training, test = (pictures.x[rng.permutation(side)[:n]] if own else None
                      for side, n in ((train, POOL), (held_out, 512)))
    study = Study(model, checkpoint, pictures.x[rows], pictures.labels[rows], device=device,
                  groups=pictures.groups[rows], training=training, held_out=test, given=flags.pictures or (),
                  **{k: getattr(flags, k) for k in ("draws", "seed", "clusters", "pairs", "steps")})
    digest = hashlib.sha256(np.ascontiguousarray(study.x))
    digest.update(np.ascontiguousarray(study.labels))
    key = dict(checkpoint=checkpoint["sha256"], pictures=digest.hexdigest(), draws=flags.draws,
               seed=flags.seed, sigmas=list(dict.fromkeys(flags.sigma)))
    where = "training and held-out" if flags.data else "held out"
    where = where if own else "built-in" if gone else "other pictures"
    return study, key, [pictures.paths[i] for i in rows], where


def earlier_results(out, names, same, force):
    """The JSON of the first of these files of an earlier call, if its entries `same` are equal, else {}.

    Makes the folder `out`. UserError if there are other results in it.
    """
    found = {}
    try:
        os.makedirs(out, exist_ok=True)
        found = json.loads(Path(out, names[0]).read_bytes())
    except FileExistsError:
        raise UserError(f"--out {out}: is a file, must be a folder") from None
    except (FileNotFoundError, ValueError):
        pass                                               # no results, or not ours: check_outputs says so
    ours = isinstance(found, dict) and {k: found.get(k) for k in same} == plain(same)
    check_outputs([os.path.join(out, name) for name in names], force or ours)
    return found if ours else {}


def analyse(flags, path, model, checkpoint, out, device, progress):
    """All that is asked of one network, in the folder `out`: (its claims, what results.json holds), or None
    in all processes but the first."""
    study, key, paths, where = prepare(flags, path, model, checkpoint, device)
    figures = [f"{name}.png" for function in ANALYSES.values() for name in function.figures]
    names = ["results.json", "phi.npz", "index.html", *figures]
    old = earlier_results(out, names, dict(key=key), flags.force)
    study.out = out
    wanted = {name: f for name, f in ANALYSES.items() if not flags.only or name in flags.only}
    done, whole = 60, 60 + sum(f.share for f in wanted.values())
    study.progress = lambda f, text: progress(60 * f / whole, f"φ: {text}")
    if not add_phi(study, key["sigmas"], key, paths):
        return None
    side, seen = checkpoint["size"], checkpoint["training"]["pictures_seen"]
    scale = (f"{len(study.x)} pictures ({where}) of {side}×{side}, width {model.width}, {seen:,} pictures "
             f"seen in training; φ at σ = {study.sigma:g}, {flags.draws} draws")
    say(alive_line(study.alive))
    say(scale)
    record = dict(key=key, scale=scale, settings=vars(flags), device=str(device),
                  training=checkpoint["training"], alive=study.alive,
                  analyses=old.get("analyses", {}), captions=old.get("captions", {}))
    for name, function in wanted.items():
        study.progress = lambda f, text: progress((done + function.share * f) / whole, f"{name}: {text}")
        try:
            record["analyses"][name] = function(study)
        except Skip as reason:
            record["analyses"][name] = dict(skipped=str(reason))
            say(f"{name}: left out: {reason}")
        done += function.share
        record["captions"] |= study.captions
        write_json(os.path.join(out, "results.json"), record)
    drawn = lambda name: os.path.exists(os.path.join(out, name + ".png"))      # not deleted since
    record["captions"] = {name: text for name, text in record["captions"].items() if drawn(name)}
    claims = lambda names: [c for name in names for c in record["analyses"].get(name, {}).get("claims", [])]
    write_page(out, f"What {os.path.basename(path)} represents", scale, alive_line(study.alive),
               claims(ANALYSES), record["captions"], dict(vars(flags), device=device))
    say_claims(claims(wanted))
    judged = [c["verdict"] for c in claims(ANALYSES) if c["verdict"] != "not comparable"]
    say(f"for a table: | {path} | {seen:,} | {checkpoint['training'].get('minutes', math.nan):.0f} | "
        f"{judged.count('holds')} of {len(judged)} | "
        + " / ".join(f"{v:.1f}" for v in checkpoint["training"].get("psnr", {}).values()) + " |")
    say(f"wrote {os.path.join(out, 'index.html')}, its figures, results.json and phi.npz")
    return claims(wanted), plain(record)


def load_pairs(flags, networks, device):
    """(a Study of held-out pictures, pairs of (model, training pictures) by N) of --versus, or UserError."""
    (first_path, _, first), rows, pairs = networks[0], {}, []
    if 2 * len(flags.checkpoint) != len(networks):
        raise UserError(f"--versus: needs {len(flags.checkpoint)} checkpoints, one for each before it")
    pictures = training_data({**first["flags"], "subset": None, "limit": None})[0]
    held_out = np.arange(len(pictures.x))
    for path, _, checkpoint in networks:
        if checkpoint["fingerprint"] != pictures.fingerprint or checkpoint["model"] != first["model"]:
            raise UserError(f"{path}: another kind of network, or of other pictures, than {first_path}; "
                            "only --subset, --limit and --pictures may differ")
        val, subset, limit, seed = (checkpoint["flags"][k] for k in ("val", "subset", "limit", "seed"))
        train, held = split(pictures, val, seed)
        held_out = np.intersect1d(held_out, held)
        rows[path] = training_part(pictures, train, subset, limit, seed)
    for (a, model_a, _), (b, model_b, _) in zip(networks, networks[len(networks) // 2:]):
        if np.intersect1d(pictures.groups[rows[a]], pictures.groups[rows[b]]).size:
            raise UserError(f"{a}, {b}: their training pictures overlap; train with --subset first and "
                            "--subset second, and the same --seed")
        pairs.append([(model, to_batch(pictures.x[rows[path]], device)) for path, model in (
            (a, model_a), (b, model_b))])
    if len(held_out) < 20:
        raise UserError("fewer than 20 pictures are held out of all these trainings; a larger --val helps")
    held = pictures.x[np.random.default_rng((flags.seed, 60)).permutation(held_out)[:512]]
    study = Study(networks[0][1], first, held, device=device, seed=flags.seed, out=flags.out)
    return study, sorted(pairs, key=lambda pair: len(pair[0][1]))


def compare(flags, networks, device, progress):
    """--versus: `generalisation`, results.json and the page."""
    study, pairs = load_pairs(flags, networks, device)
    names = "results.json", "index.html", "generalisation.png", "originals.png"
    same = dict(settings=vars(flags), checkpoints=[checkpoint["sha256"] for _, _, checkpoint in networks])
    earlier_results(flags.out, names, same, flags.force)
    study.progress = progress
    found = generalisation(study, pairs)
    write_json(os.path.join(flags.out, "results.json"), dict(same, analyses=dict(generalisation=found)))
    write_page(flags.out, "Memorisation and generalisation", f"{len(pairs)} pairs of networks, "
               f"{len(study.x)} held-out pictures", "", found["claims"], study.captions, vars(flags))
    say_claims(found["claims"])
    say(f"wrote {os.path.join(flags.out, 'index.html')}, its figures and results.json")


def summarise(flags, names, tables, found):
    """Claims over several networks, by name, the figures that compare these, networks.json and the page."""
    rows, captions = over_networks(tables), {}
    if flags.only == ["regularity"]:
        slopes = [v["analyses"]["regularity"] for v in found]
        rows, image, captions = [*rows, claim_on_slopes(slopes)], draw_regularity(slopes), {
            "regularity": REGULARITY}
    elif image := draw_emergence(found):
        captions["emergence"] = "φ during training. Is M in use, and when does φ know classes?"
    for name in captions:                      # one at most
        with write(os.path.join(flags.out, name + ".png")) as file:
            image.save(file, "png")
    say(f"{len(names)} networks: {', '.join(names)}")
    say_claims(rows)
    write_json(os.path.join(flags.out, "networks.json"), dict(checkpoints=flags.checkpoint, claims=rows))
    write_page(flags.out, f"{len(names)} networks", "mean ± SD over networks", ", ".join(names), rows,
               captions, vars(flags))


def main():
    """The command line's work."""
    flags, progress, results = arguments(), Progress(), []
    device = choose_device(flags.device)
    networks = [(path, *load_checkpoint(path, device)) for path in [*flags.checkpoint, *flags.versus]]
    if flags.versus:
        return compare(flags, networks, device, progress)
    stems = [os.path.splitext(os.path.basename(path))[0] for path in flags.checkpoint]
    free = ["seed"] + ["data"] * (flags.only == ["regularity"])
    kinds = {json.dumps([c["size"], {k: v for k, v in c["flags"].items() if k not in free}], sort_keys=True)
             for _, _, c in networks}
    if len(kinds) > 1 or len(set(stems)) < len(stems):
        raise UserError("several checkpoints must be networks of one kind (trained with the same flags but "
                        "--seed), in files of different names")
    for path in flags.pictures or []:          # complain before the work
        load_picture(path, *(networks[0][2]["flags"][k] for k in ("size", "channels", "patches")))
    if len(networks) > 1:
        earlier_results(flags.out, ["networks.json", "index.html", "emergence.png", "regularity.png"],
                        dict(checkpoints=flags.checkpoint), flags.force)
    if "RANK" in os.environ:                   # started by torchrun; only CPU tensors are exchanged
        join_processes(torch.device("cpu"), timeout=datetime.timedelta(days=7))
    for k, network in enumerate(networks):
        out = os.path.join(flags.out, stems[k] if len(networks) > 1 else "")
        results.append(analyse(flags, *network, out, device,
                               lambda f, text: progress((k + f) / len(networks), text)))
    if len(networks) > 1 and results[0]:
        summarise(flags, stems, *zip(*results))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run(main)
