"""K-means by hand in torch, and how far apart clusters are (A: §2.5, App. B.3).

    python kmeans.py figures/phi.npz --K 100     # analyze.py's -> clusters.npz
    python kmeans.py points.npy --K 100          # any (n, d) array

    from kmeans import KMeans
    labels = KMeans(100).fit(x).labels_            # x: (n, d), array or tensor

All but the command line, which needs unet.py, can be copied out alone.
"""
import functools
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # read when torch is imported: idle threads sleep
import numpy as np
import torch

# §2.5, App. B.3: Lloyd's algorithm

CHUNK = 4096                # points at a time, so that what is computed of them stays in a CPU's caches


def nearest(x, centers):
    """Index of the centre (K, d) nearest to each point of x (n, d), (n,)."""
    labels = []
    for part in x.split(CHUNK):
        labels.append(comparable(part, centers).argmin(1))
    return torch.cat(labels)


def comparable(x, centers):
    """‖x − c‖² less ‖x‖², which plays no part in comparisons: ‖c‖² − 2 x·c, (n, K)."""
    norm = centers.square().sum(1)                        # (K,)
    return torch.addmm(norm, x, centers.T, alpha=-2)


def silent(*_):
    """Show no progress."""


def lloyd(x, centers, max_iter=300, tol=0.0, assign=nearest, progress=silent):
    """Lloyd's algorithm (1982): points x (n, d), first centres (K, d) -> centres, labels (n,), iterations.

    It ends when no label changes, when the centres' total squared movement is at most tol and no cluster is
    empty, or after max_iter iterations. assign: `nearest`, or Bounds(x, centers), which is faster. progress:
    called with (iteration, labels changed).
    """
    K = len(centers)
    labels = merge_repeats(centers, assign(x, centers))
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)    # of the points of each cluster
    summed = torch.full_like(labels, -1)                  # the cluster in whose sum a point is
    for iteration in range(1, max_iter + 1):
        # the mean of each cluster; only points that change clusters are added (float64 forgets none of them)
        fill_empty(x, centers, labels)
        for rows in (labels != summed).nonzero()[:, 0].split(1024):
            points = x[rows].double()
            sums.index_add_(0, labels[rows], points)
            if iteration > 1:
                sums.index_add_(0, summed[rows], points, alpha=-1)
        summed = labels
        counts = labels.bincount(minlength=K)[:, None]                         # (K, 1)
        means = (sums / counts).to(x.dtype)                                    # (K, d)
        means = torch.where(counts > 0, means, centers)   # an empty cluster stays where it is
        movement = float((means - centers).square().sum())
        centers = means

        # the nearest mean of each point
        labels = assign(x, centers)
        changed = int((labels != summed).sum())
        progress(iteration, changed)
        if changed == 0:
            break
        if movement <= tol and labels.bincount(minlength=K).all():
            break
    return centers, labels, iteration


def merge_repeats(centers, labels):
    """Labels (n,) with the points of equal centres, which rounding divides among them, all at the first."""
    rows = centers.cpu().numpy()
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    first = torch.from_numpy(first[which.ravel()])        # the first centre equal to each, (K,)
    return first.to(labels.device)[labels]


def fill_empty(x, centers, labels):
    """Give each empty cluster the point farthest from its centre, in place, while there is one to give.

    A point takes its copies along, because two clusters at one place would never part. It stays if its
    cluster has nothing else.
    """
    counts = labels.bincount(minlength=len(centers))
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    distance = square_distances(x, centers, labels)
    distance[distance <= rounding(x)] = 0                 # at its centre
    while empty and distance.any():
        farthest = distance.argmax()
        copies = (x == x[farthest]).all(1)                # (n,)
        distance[copies] = 0
        cluster = labels == labels[farthest]
        copies &= cluster
        if copies.sum() < cluster.sum():
            labels[copies] = empty.pop(0)


def square_distances(x, centers, labels):
    """‖x − c‖² of every point and its own centre, (n,), from differences: nothing cancels."""
    distances = []
    for part, its_labels in zip(x.split(CHUNK), labels.split(CHUNK)):
        distances.append(squares(centers[its_labels] - part))
    return torch.cat(distances)


def squares(x):
    """‖x‖² of each row, (n,), without a copy of x."""
    return torch.linalg.vector_norm(x, dim=1).square_()


def rounding(x):
    """What rounding may add to the squared distance of each point to another, (n,)."""
    return 8 * torch.finfo(x.dtype).eps * squares(x)


# Where it starts: greedy k-means++

def seed_centers(x, K, restarts, seed):
    """(restarts, K, d) starting centres for x (n, d), by greedy k-means++ (Arthur & Vassilvitskii 2007).

    Each next centre is the best of 2 + log K points drawn with probability ∝ D², the squared distance to the
    nearest centre so far. All restarts are seeded side by side: each step then reads x twice, not twice per
    restart. Random numbers come from the CPU: all devices draw the same.
    """
    n, trials = len(x), 2 + int(math.log(K))
    generator = torch.Generator().manual_seed(seed)
    norm, error = squares(x), rounding(x)

    def distances(points):                                # squared, from x[points] to all of x
        d2 = norm[points, None] + norm                    # (len(points), n)
        d2.addmm_(x[points], x.T, alpha=-2)
        return d2.masked_fill_(d2 < error[points, None] + error, 0)            # the same point

    first = torch.randint(n, (restarts,), generator=generator)
    chosen = [first.to(x.device)]                         # a point for every restart, (restarts,), K times
    D2 = distances(chosen[0])                             # (restarts, n)
    for _ in range(K - 1):
        mass = D2.cumsum(1, dtype=torch.float64)
        u = torch.rand(restarts, trials, generator=generator, dtype=torch.float64)
        u = (1 - u.to(x.device)) * mass[:, -1:]           # in (0, ΣD²]
        candidates = torch.searchsorted(mass, u)          # (restarts, trials)
        d2 = distances(candidates.flatten()).view(restarts, trials, n)
        torch.minimum(d2, D2[:, None], out=d2)            # D² if that candidate were taken
        potential = d2.sum(2, dtype=torch.float64)
        best = potential.argmin(1, keepdim=True)
        chosen.append(candidates.gather(1, best)[:, 0])
        D2 = torch.minimum(D2, distances(chosen[-1]))
    return x[torch.stack(chosen, 1)]


@dataclass
class KMeans:
    """K-means: `n_clusters` centres that minimise the sum of squared distances of points to the nearest one.

    n_clusters: K. init: "k-means++", or (K, d) starting centres (App. B.3: class centroids), then without
    restarts. n_init: restarts; the least inertia wins. max_iter, tol: as `lloyd`, tol in units of a column's
    mean variance. device: where to compute; None: where x is (MPS has no float64: the CPU serves it).
    progress: called with (restart, iteration, labels changed). accelerate: with Bounds; equal labels, sooner.

    After `fit`: cluster_centers_ (K, d), labels_ (n,), inertia_ (the sum of squared distances), n_iter_;
    arrays if x was an array, tensors if it was a tensor.
    """
    n_clusters: int
    init: Any = "k-means++"
    n_init: int = 10
    max_iter: int = 300
    tol: float = 1e-4
    seed: int = 0
    device: Any = None
    progress: Callable = silent
    accelerate: bool = True

    def fit(self, x):
        """Cluster x: (n, d), array or tensor, floating or integer. Returns self.

        float64 and integers of 32 bits or more are computed in float64, all else in float32. ValueError for a
        wrong shape, NaN, values whose squares overflow, and n < n_clusters. Warns of empty clusters.
        """
        points, K = as_points(x, self.device), self.n_clusters
        if len(points) < K:
            raise ValueError(f"{len(points)} points cannot make {K} clusters; ask for at most {len(points)}")
        mean = points.mean(0)
        total = float(squares(points - mean).sum(dtype=torch.float64))         # Σ‖x − mean‖²
        tol = self.tol * total / points.numel()
        self.fit_points(points, mean, tol)

        # Rounding costs a point some eps ‖x‖². Where the inertia is not far above that, or all points were
        # rounded to their centres, float64 decides, around the median: no outlier draws that to itself
        lost = self.inertia_ < 1e4 * torch.finfo(points.dtype).eps * total
        if self.inertia_ == 0:
            lost = len(points.unique(dim=0)) > len(self.labels_.unique())
        if lost:
            exact = points.double()
            self.fit_points(exact, exact.median(0).values, tol)

        clusters = len(self.labels_.unique())
        if clusters < K:
            why = "too few points are distinct, or max_iter is too small"
            warnings.warn(f"only {clusters} of {K} clusters have points: {why}")
        self.cluster_centers_ = self.cluster_centers_.to(points.dtype)
        if not torch.is_tensor(x):
            self.cluster_centers_ = self.cluster_centers_.cpu().numpy()
            self.labels_ = self.labels_.cpu().numpy()
        return self

    def fit_points(self, x, origin, tol):
        """The best of all restarts on x (n, d), in x's precision, with `origin` (d,) in the place of 0.

        ‖c‖² − 2 x·c loses few digits to cancellation if the origin lies amid the points.
        """
        x, K = x - origin, self.n_clusters
        self.inertia_ = math.inf
        if isinstance(self.init, str):
            starts = seed_centers(x, K, self.n_init, self.seed)
        else:
            init = as_points(self.init, x.device).to(x.dtype)
            if init.shape != (K, x.shape[1]):
                raise ValueError(f"init has shape {tuple(init.shape)}, not ({K}, {x.shape[1]})")
            starts = [init - origin]
        for restart, centers in enumerate(starts):
            assign = Bounds(x, centers) if self.accelerate else nearest
            progress = functools.partial(self.progress, restart)
            centers, labels, n_iter = lloyd(x, centers, self.max_iter, tol, assign, progress)
            inertia = float(square_distances(x, centers, labels).sum(dtype=torch.float64))
            if inertia < self.inertia_:
                self.inertia_ = inertia
                self.cluster_centers_ = centers + origin
                self.labels_, self.n_iter_ = labels, n_iter


# Faster: most distances need not be computed

class Bounds:
    """A `nearest` that remembers its last call, for Lloyd's algorithm, where soon few centres move at a time.

    For each point it keeps `distance`, the square of that to its centre, and `bound`, below which none of the
    others lies, both less ‖x‖². Centres that stand still are as far as they were: if the nearest of those
    that moved and of the point's last centre is within the bound, it is the nearest of all; for the few other
    points every distance is computed. The labels are those of `nearest`, three to five times as fast at
    K = 1000.
    """

    def __init__(self, x, centers):
        self.centers = torch.full_like(centers, math.nan)                      # NaN differs from every number
        self.labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.distance = x.new_empty(len(x))
        self.bound = x.new_empty(len(x))

    def __call__(self, x, centers):
        """nearest(x, centers), (n,), for the same x in every call."""
        has_moved = (centers != self.centers).any(1)                           # (K,)
        self.centers = centers
        if has_moved.sum() > 0.7 * len(centers):                               # bounds decide little then
            has_moved[:] = True
            self.bound[:] = math.inf
        self.distance[has_moved[self.labels]] = math.inf
        moved = has_moved.nonzero()[:, 0]                                      # (k,)
        if len(moved):
            for start in range(0, len(x), CHUNK):
                self.compare(x, slice(start, start + CHUNK), moved)

        undecided = (self.distance > self.bound).nonzero()[:, 0]
        self.distance[undecided] = math.inf
        self.bound[undecided] = math.inf
        every = torch.arange(len(centers), device=x.device)
        for rows in undecided.split(CHUNK):
            self.compare(x, rows, every)
        return self.labels.clone()

    def compare(self, x, rows, indices):
        """`labels`, `distance` and `bound` of some rows, when these centres (k,) come into play."""
        d2 = comparable(x[rows], self.centers[indices])   # (m, k)
        least, place = d2.min(1)                          # (m,)
        second = d2.scatter_(1, place[:, None], math.inf).amin(1)
        distance = self.distance[rows]
        second = torch.minimum(second, torch.maximum(least, distance))
        self.labels[rows] = torch.where(least < distance, indices[place], self.labels[rows])
        self.bound[rows] = torch.minimum(self.bound[rows], second)
        self.distance[rows] = torch.minimum(least, distance)


# Points

def as_points(x, device=None):
    """A finite (n, d) tensor in float32 or float64. Raises ValueError for another shape and for NaN."""
    if not torch.is_tensor(x):
        x = torch.from_numpy(np.array(x))                 # a list, or an array in any memory order
    device = torch.device(device or x.device)
    if device.type == "mps":
        device = "cpu"
    exact = x.dtype in (torch.float64, torch.int32, torch.int64)
    x = x.detach().to(device).to(torch.float64 if exact else torch.float32)
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"points have shape {tuple(x.shape)}; it must be (points, dimensions)")
    bad = (~(16 * squares(x)).isfinite()).nonzero()       # 16: after centring, distances are squared
    if len(bad):
        raise ValueError(f"NaN, infinite or far too large values, first in row {int(bad[0])}")
    return x


# §2.5, Emergent clusters: how far apart, and how they relate to classes (Fig. 6)

def separation(a, b):
    """Fig. 6: distance of the means of a (n, d), b (m, d), n, m ≥ 2; √(mean variance along their line)."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    line = a.mean(0) - b.mean(0)
    distance = line.norm()
    line = line / distance.clamp(min=1e-300)              # of length 1
    variance = ((a @ line).var() + (b @ line).var()) / 2
    return float(distance), float(variance.sqrt())


def pair_separations(code, labels, rng, pairs=100):
    """`separation` of random pairs of groups of five points or more, no pair twice, and which pairs:
    (at most `pairs`, 2) each.

    code: (n, d). labels: (n,) integers, −1: in no group. rng: a numpy Generator. Raises ValueError if there
    are fewer than two such groups.
    """
    sizes = np.bincount(labels[labels >= 0])
    groups = np.flatnonzero(sizes >= 5)
    if len(groups) < 2:
        raise ValueError("fewer than two groups of five points")
    a, b = np.tril_indices(len(groups), -1)               # all pairs of groups
    chosen = rng.choice(len(a), min(pairs, len(a)), replace=False)
    a, b = groups[a[chosen]], groups[b[chosen]]
    apart = []
    for i, j in zip(a, b):
        apart.append(separation(code[labels == i], code[labels == j]))
    return np.array(apart), np.stack([a, b], 1)


def adjusted_rand_index(a, b):
    """Agreement of two partitions (n,) of n ≥ 1 points: 1 the same, 0 as by chance (Hubert & Arabie 1985)."""
    def pairs(labels):                                    # how many pairs of points have equal labels
        sizes = np.unique(labels, axis=0, return_counts=True)[1]
        return float((sizes * (sizes - 1) / 2).sum())

    in_a, in_b = pairs(a), pairs(b)
    in_both = pairs(np.stack([a, b], 1))
    chance = in_a * in_b / max(math.comb(len(a), 2), 1)
    if in_a == in_b == chance:                            # one group, or every point a group
        return 1.0
    return (in_both - chance) / ((in_a + in_b) / 2 - chance)


def gaussian_like(code, seed):
    """A Gaussian sample with the mean and covariance of code (n, d): as many points, no other structure."""
    code = code.double()
    stream = np.random.SeedSequence((seed, 18)).generate_state(1)[0]           # 18: unlike any other's
    generator = torch.Generator().manual_seed(int(stream))
    z = torch.randn(code.shape, generator=generator, dtype=code.dtype)
    covariance = torch.cov(code.T)                        # (d, d)
    values, vectors = torch.linalg.eigh(covariance)
    z = z * values.clamp(min=0).sqrt()                    # (n, d)
    return (code.mean(0) + z @ vectors.T).float()


# Fig. 6: t-SNE

def tsne(x, perplexity=30.0, iterations=750):
    """Exact t-SNE (van der Maaten & Hinton 2008) of x (n, d) -> (n, 2), d ≥ 2, 2 ≤ n ≤ 2000 or so.

    It starts from the two first principal components, their signs fixed by the largest entry, so that a
    rotation of x changes nothing. Gains, momentum and early exaggeration as in the authors' implementation.
    """
    x = x.double() - x.double().mean(0)
    p = affinities(x, perplexity).float()                 # (n, n)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    y = (u * s)[:, :2].float().contiguous()               # (n, 2)
    y = y * y.gather(0, y.abs().argmax(0, keepdim=True)).sign()
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(x) / 48, 50.0)
    for t in range(iterations):
        exaggeration, momentum = 1, 0.8
        if t < 250:                                       # first, clusters form
            exaggeration, momentum = 12, 0.5
        gradient = divergence_gradient(exaggeration * p, y)
        uphill = gradient * velocity > 0                  # y has overshot
        gain = torch.where(uphill, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = momentum * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def affinities(x, perplexity):
    """t-SNE's p_ij (n, n), Σ = 1: p(j | i) is Gaussian around x_i, exp(its entropy) the perplexity."""
    n = len(x)
    d2 = torch.cdist(x, x).square()
    d2 = d2 / d2.mean().clamp(min=1e-300)
    d2 = d2.fill_diagonal_(math.inf)                      # p(i | i) = 0
    entropy = math.log(min(perplexity, (n - 1) / 3))
    low, high = x.new_full((n, 1), -50.0), x.new_full((n, 1), 50.0)
    for _ in range(60):                                   # p(j | i) ∝ exp(−β d²), log β found by bisection
        log_beta = (low + high) / 2
        p = torch.softmax(-d2 * log_beta.exp(), 1)
        too_wide = torch.special.entr(p).sum(1, keepdim=True) > entropy        # (n, 1)
        low = torch.where(too_wide, log_beta, low)
        high = torch.where(too_wide, high, log_beta)
    return ((p + p.T) / (2 * n)).clamp(min=1e-12)


def divergence_gradient(p, y):
    """∂/∂y of Σ p_ij log(p_ij/q_ij), q_ij ∝ 1/(1 + ‖y_i − y_j‖²); p (n, n), y (n, 2): (n, 2)."""
    d2 = torch.cdist(y, y).square()                       # (n, n)
    q = (1 / (1 + d2)).fill_diagonal_(0)
    force = (p - q / q.sum()) * q
    return 4 * (force.sum(1, keepdim=True) * y - force @ y)


# Command line

def read_points(path):
    """Points (n, d), paths (n,) and labels (n,): `phi`, `paths`, `labels` of a .npz, or the points of a .npy.

    By default paths are "0", "1", … and labels −1, unknown. Nothing in the file is executed. UserError for a
    file that is not whole or holds something else.
    """
    from unet import explain
    with explain(path, "no points (n, d), as a .npy or as phi of a .npz"):
        file = np.load(path)
        if isinstance(file, np.ndarray):
            file = {"phi": file}
        x = as_points(file["phi"]).numpy()
        paths = file.get("paths", np.arange(len(x)))
        labels = file.get("labels", np.full(len(x), -1))
        paths, labels = np.array(paths, str), np.array(labels, float)
        if not paths.shape == labels.shape == x.shape[:1]:
            raise ValueError("paths and labels must be one a point")
    return x, paths, labels


def arguments():
    """The flags, checked before the work. Raises UserError."""
    from unet import Parser, check_outputs, number
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("points", help="phi.npz of analyze.py, or a .npy of shape (n, d)")
    add("--K", "--clusters", type=number(int, 1), default=100, help="clusters (default: 100)")
    add("--n-init", type=number(int, 1), default=10, help="restarts (default: 10)")
    add("--max-iter", type=number(int, 1), default=300, help="iterations at most (default: 300)")
    add("--tol", type=number(float, 0), default=1e-4, help="least movement of the centres (default: 1e-4)")
    add("--seed", type=number(int, 0), default=0, help="of the seeding (default: 0)")
    add("--device", help="cuda, cpu, … (default: CUDA where there is a GPU)")
    add("--out", default="clusters.npz", help="centers, labels, inertia, paths (default: %(default)s)")
    add("--force", action="store_true", help="overwrite --out")
    flags = parser.parse_args()
    check_outputs([flags.out], flags.force)
    return flags


def main():
    """The command line's work."""
    from unet import Progress, UserError, choose_device, say, write
    flags, status = arguments(), Progress()
    x, paths, labels = read_points(flags.points)

    def show(message, *_):
        say(f"warning: {message}")

    def progress(restart, iteration, changed):
        done = (restart + iteration / (iteration + 20)) / flags.n_init         # a restart takes some 40
        status(done, f"restart {restart + 1}/{flags.n_init}, iteration {iteration}, {changed} labels changed")

    warnings.showwarning = show
    model = KMeans(flags.K, n_init=flags.n_init, max_iter=flags.max_iter, tol=flags.tol, seed=flags.seed,
                   device=choose_device(flags.device), progress=progress)
    try:
        model.fit(x)
    except ValueError as error:
        raise UserError(f"{flags.points}: {error}") from None
    sizes = np.bincount(model.labels_, minlength=flags.K)
    say(f"{len(x)} points of {x.shape[1]} dimensions, {flags.K} clusters of {sizes.min()} to {sizes.max()}, "
        f"inertia {model.inertia_:.6g}, {model.n_iter_} iterations")
    known = labels >= 0                                   # NaN, too, is unknown
    if known.any():
        index = adjusted_rand_index(model.labels_[known], labels[known])
        say(f"against {len(np.unique(labels[known]))} classes: adjusted Rand index {index:.3f}")
    with write(flags.out) as file:
        np.savez(file, centers=model.cluster_centers_, labels=model.labels_, inertia=model.inertia_,
                 paths=paths)
    say(f"wrote {flags.out}")


if __name__ == "__main__":
    from unet import run
    run(main)
