"""K-means by hand in torch, exact and fast, and how far apart its clusters are (paper A: §2.5, App. B.3).

    python kmeans.py figures/phi.npz --K 100 --out clusters.npz        # analyze.py's phi.npz; for sample.py
    python kmeans.py points.npy --K 100                                # any (n, d) array

All but the command line, which needs unet.py, can be copied out alone.
"""
import math
import os
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # read when torch is imported: idle threads sleep
import numpy as np
import torch


class KMeans:
    """K-means: `n_clusters` centres that minimise the sum of squared distances of points to the nearest one.

    n_clusters: K. init: "k-means++", or (K, d) starting centres (App. B.3: class centroids), then without
    restarts. n_init: restarts; the least inertia wins. max_iter, tol: as `lloyd`, tol in units of a column's
    mean variance. device: where to compute; None: where x is (MPS has no float64: the CPU serves it).
    progress: called with (restart, iteration, labels changed).

    After `fit`: cluster_centers_ (K, d), labels_ (n,), inertia_ (the sum of squared distances), n_iter_;
    arrays if x was an array, tensors if it was a tensor.
    """

    def __init__(self, n_clusters, init="k-means++", n_init=10, max_iter=300, tol=1e-4, seed=0, device=None,
                 progress=lambda *_: None):
        if min(n_clusters, n_init, max_iter) < 1 or not tol >= 0:
            raise ValueError("n_clusters, n_init and max_iter must be at least 1, tol at least 0")
        self.n_clusters, self.init, self.n_init, self.max_iter = n_clusters, init, n_init, max_iter
        self.tol, self.seed, self.device, self.progress = tol, seed, device, progress

    def fit(self, x):
        """Cluster x: (n, d), array or tensor, floating or integer. Returns self.

        float64 and integers of 32 bits or more are computed in float64; all else in float32, and again in
        float64 if inertia is so small beside Σ‖x − mean‖² that rounding, eps ‖x‖² a point, may have cost some
        of it. ValueError for a wrong shape, NaN, infinite values, n < n_clusters. Warns if some clusters are
        empty, x having fewer distinct points.
        """
        given = (lambda v: v) if torch.is_tensor(x) else (lambda v: v.cpu().numpy())
        x, K = as_points(x, self.device), self.n_clusters
        if len(x) < K:
            raise ValueError(f"{len(x)} points cannot make {K} clusters; ask for at most {len(x)}")
        total = self._fit(x)
        if x.dtype == torch.float32 and 0 < self.inertia_ < 1e4 * torch.finfo(x.dtype).eps * total:
            self._fit(x.double())
        if (found := len(self.labels_.unique())) < K:
            ended = self.n_iter_ < self.max_iter
            why = "fewer distinct points than clusters" if ended else "max_iter too small"
            warnings.warn(f"{found} clusters have points, {K} were asked for: {why}")
        self.cluster_centers_, self.labels_ = given(self.cluster_centers_.to(x.dtype)), given(self.labels_)
        return self

    def _fit(self, x):
        """The best of all restarts on x (n, d), in x's precision; returns Σ‖x − mean‖²."""
        origin = x.mean(0)                     # ‖x‖² − 2x·c + ‖c‖² cancels least around the mean
        x, K = x - origin, self.n_clusters
        total, self.inertia_ = float(squares(x).sum(dtype=torch.float64)), math.inf
        if not math.isfinite(total):
            row = int(x.abs().amax(1).argmax())
            raise ValueError(f"row {row} is so large that its square overflows; scale x down")
        if isinstance(self.init, str) and self.init == "k-means++":
            starts = seed_centers(x, K, self.n_init, self.seed)
        else:
            init = as_points(self.init, x.device, "init").to(x.dtype)
            if init.shape != (K, x.shape[1]):
                raise ValueError(f"init has shape {tuple(init.shape)}; it must be ({K}, {x.shape[1]})")
            starts = [init - origin]
        for restart, centers in enumerate(starts):
            centers, labels, n_iter = lloyd(x, centers, self.max_iter, self.tol * total / x.numel(),
                                            lambda *state: self.progress(restart, *state))
            inertia = float(own_distances(x, centers, labels).sum(dtype=torch.float64))
            if inertia < self.inertia_:
                self.cluster_centers_, self.labels_ = centers + origin, labels
                self.inertia_, self.n_iter_ = inertia, n_iter
        return total


# Lloyd's algorithm

def lloyd(x, c, max_iter, tol, progress=lambda *_: None):
    """Lloyd's algorithm (1982) from centres c (K, d) on x (n, d) -> centres, labels (n,), iterations.

    It ends when no label changes, when the centres' total squared movement is at most tol, or after max_iter
    iterations. progress: called as progress(iteration, labels changed).
    """
    K, assign = len(c), NearestCenters(x, len(c))
    labels = merge_repeats(c, assign(c))
    sums = torch.zeros(K + 1, x.shape[1], dtype=torch.float64, device=x.device)
    summed = torch.full_like(labels, K)        # where each point is summed; row K: nowhere yet
    for n_iter in range(1, max_iter + 1):
        fill_empty(x, c, labels)
        means, moved = update_means(sums, x, summed, labels)
        c, before = c.index_copy(0, moved, means), c
        labels = assign(c, moved)              # the nearest centre, skipping distances that cannot matter
        changed = int((labels != summed).sum())
        progress(n_iter, changed)
        settled = float((c - before).square().sum()) <= tol
        if not changed or settled and labels.bincount(minlength=K).all():
            break
    return c, labels, n_iter


class NearestCenters:
    """The nearest centre of every point, when some centres have moved; skips distances that cannot matter.

    For each point `own` is the squared distance to its centre and `low` a lower bound on those to all others,
    both less ‖x‖², which plays no part in comparisons. Centres that stand still are as far as they were: if
    the nearest of the point's own and the moved ones is below `low`, it is the nearest of all; else, for few
    points, every distance is computed. The labels are exact; a fit takes a fifth of the time.
    """

    def __init__(self, x, K):
        self.x, self.chunks = x, chunks(x, 2 * K)
        self.labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.own, self.low = x.new_empty(2, len(x))

    def __call__(self, c, moved=None):
        """The labels (n,), in place, now that the centres `moved` (k,) of c (K, d) have moved; None: all."""
        every = torch.arange(len(c), device=c.device)
        if moved is None or len(moved) > 0.7 * len(c):                         # then bounds decide little
            moved = every
            self.low.fill_(math.inf)
        gone = torch.zeros_like(every, dtype=torch.bool).index_fill_(0, moved, True)
        self.own[gone[self.labels]] = math.inf
        for i in self.chunks if len(moved) else []:
            unsure = i.start + self.compare(i, c, moved)
            if len(unsure):
                self.own[unsure] = self.low[unsure] = math.inf
                self.compare(unsure, c, every)
        return self.labels

    def compare(self, i, c, moved):
        """`labels`, `own` and `low` of rows i, where own is ∞ if their centre is one of `moved` (k,).

        Returns the places in i that `moved` cannot decide.
        """
        own, low, c = self.own[i], self.low[i], c[moved]
        d2 = torch.addmm((c * c).sum(1), self.x[i], c.T, alpha=-2)             # (m, k)
        near, k = d2.min(1)
        second = d2.scatter_(1, k[:, None], math.inf).amin(1)
        best, closer = torch.minimum(near, own), near < own
        unsure = (best > low).nonzero()[:, 0]
        self.labels[i] = torch.where(closer, moved[k], self.labels[i])
        self.low[i] = torch.minimum(low, torch.where(closer, torch.minimum(own, second), near))
        self.own[i] = best
        return unsure


def update_means(sums, x, summed, labels):
    """Means (k, d) and indices (k,) of the clusters that changed; sums (K + 1, d) and summed (n,) in place.

    Only the points that change clusters are touched; float64 forgets nothing that matters on the way.
    """
    counts, changed = labels.bincount(minlength=len(sums)), (labels != summed).nonzero()[:, 0]
    touched = torch.cat([labels[changed], summed[changed]]).bincount(minlength=len(sums)) > 0
    moved = (touched & (counts > 0)).nonzero()[:, 0]
    for i in changed.split(1024):
        y = x[i].double()
        sums.index_add_(0, labels[i], y).index_add_(0, summed[i], y, alpha=-1)
    summed.copy_(labels)
    return (sums[moved] / counts[moved, None]).to(x.dtype), moved


def merge_repeats(c, labels):
    """Labels (n,), in place, with the points of equal centres, which rounding divides, all in the first."""
    _, first, which = np.unique(c.cpu().numpy(), axis=0, return_index=True, return_inverse=True)
    return labels.copy_(torch.from_numpy(first[which.ravel()]).to(c.device)[labels])


def fill_empty(x, c, labels):
    """Give each empty cluster the point farthest from its centre, in place, while there is one to give."""
    counts = labels.bincount(minlength=len(c))
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    distance = own_distances(x, c, labels)
    distance[distance <= 8 * torch.finfo(x.dtype).eps * squares(x)] = 0        # rounding: at its centre
    while empty and distance.any():
        i = distance.argmax()
        copies = torch.cat([(part == x[i]).all(1) for part in x.split(4096)])
        distance[copies] = 0                   # they go together: two clusters at one point would never part
        copies &= labels == labels[i]
        if copies.sum() < counts[labels[i]]:   # else they are all there is in their cluster
            labels[copies] = empty.pop(0)
            counts = labels.bincount(minlength=len(c))


def own_distances(x, c, labels):
    """Squared distance of every point to its own centre, (n,), from differences: no cancellation."""
    return torch.cat([squares(c[labels[i]] - x[i]) for i in chunks(x, x.shape[1])])


def squares(x):
    """‖x‖² of each row, (n,), without a copy of x."""
    return torch.linalg.vector_norm(x, dim=1).square_()


# Seeding

def seed_centers(x, K, restarts, seed):
    """(restarts, K, d) starting centres, by greedy k-means++ (Arthur & Vassilvitskii 2007).

    Each next centre is the best of 2 + log K points drawn with probability ∝ D², the squared distance to the
    nearest centre so far. All restarts are seeded side by side: each step then reads x twice, not twice per
    restart. Random numbers come from the CPU: all devices draw the same.
    """
    n, L, xx, eps = len(x), 2 + int(math.log(K)), squares(x), torch.finfo(x.dtype).eps
    generator, parts = torch.Generator().manual_seed(seed), chunks(x, 2 * restarts * L)

    def distances(to, i):                      # squared, of the points `to` and rows i: (len(to), m)
        size = xx[to, None] + xx[i]
        d2 = torch.addmm(size, x[to], x[i].T, alpha=-2)
        return d2.masked_fill_(d2 < 8 * eps * size, 0)     # rounding: the same point

    chosen = [torch.randint(n, (restarts,), generator=generator).to(x.device)]
    nearest = x.new_full((restarts, n), math.inf)          # D²
    while len(chosen) < K:
        for i in parts:
            torch.minimum(nearest[:, i], distances(chosen[-1], i), out=nearest[:, i])
        mass = nearest.cumsum(1, dtype=torch.float64)
        u = torch.rand(restarts, L, generator=generator, dtype=torch.float64).to(x.device)
        candidates = torch.searchsorted(mass, (1 - u) * mass[:, -1:]).clamp_(max=n - 1)
        potential = sum(torch.minimum(distances(candidates.flatten(), i).view(restarts, L, -1),
                                      nearest[:, None, i]).sum(2, dtype=torch.float64) for i in parts)
        chosen.append(candidates.gather(1, potential.argmin(1, keepdim=True))[:, 0])
    return x[torch.stack(chosen, 1)]


def as_points(x, device=None, name="x"):
    """A finite (n, d) tensor in float32 or float64. Raises ValueError naming what is wrong and where."""
    if not torch.is_tensor(x):                 # lists; arrays in any byte or memory order, read-only or not
        x = np.asarray(x)
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{name} holds {x.dtype}, not real numbers")
        x = torch.from_numpy(np.require(x, np.float32 if np.can_cast(x.dtype, np.float32) else float, "CW"))
    if x.ndim != 2 or not x.numel() or x.is_complex():
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (points, dimensions), real")
    x = x.to("cpu" if str(device or x.device).startswith("mps") else device)
    x = x.to(torch.float64 if x.dtype in (torch.float64, torch.int32, torch.int64) else torch.float32)
    bad = (~x.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"{name} has NaN or infinite values, first in row {int(bad[0])}")
    return x


def chunks(x, width):
    """Slices of x's rows which, with `width` numbers beside each, fill a CPU's caches (a GPU: 2²⁸ bytes)."""
    rows = 2 ** (24 if x.device.type == "cpu" else 28) // (x.element_size() * (x.shape[1] + width))
    return [slice(a, a + max(1, rows)) for a in range(0, len(x), max(1, rows))]


# §2.5, Emergent clusters: how far apart, and how they relate to classes (Fig. 6)

def adjusted_rand_index(a, b):
    """Agreement of two partitions (n,) of n ≥ 1 points: 1 the same, 0 as by chance (Hubert & Arabie 1985)."""
    a, b = (np.unique(v, return_inverse=True)[1] for v in (a, b))
    if a.shape != b.shape or not a.size:
        raise ValueError(f"labels of {len(a)} and {len(b)} points; they must be of the same, at least one")
    pairs = lambda sizes: float((sizes * (sizes - 1) / 2).sum())               # in groups of these sizes
    both, one, two = (pairs(np.bincount(v)) for v in (a * (b.max() + 1) + b, a, b))
    chance = one * two / max(pairs(np.array(len(a))), 1)
    return 1.0 if one == two == chance else (both - chance) / ((one + two) / 2 - chance)


def separation(a, b):
    """Fig. 6: distance of the means of a (n, d), b (m, d), n, m ≥ 2; √(mean variance along their line)."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    u = a.mean(0) - b.mean(0)
    distance = u.norm()
    u = u / distance.clamp(min=1e-300)
    return float(distance), float((((a @ u).var() + (b @ u).var()) / 2).sqrt())


def pair_separations(code, labels, rng, pairs=100):
    """`separation` of random pairs of groups of five points or more, no pair twice, and which pairs:
    (at most `pairs`, 2) each.

    code: (n, d). labels: (n,) integers, −1: in no group. rng: a numpy Generator. Raises ValueError if there
    are fewer than two such groups.
    """
    groups = np.flatnonzero(np.bincount(labels[labels >= 0]) >= 5)
    if len(groups) < 2:
        raise ValueError("fewer than two groups of five points")
    a, b = np.tril_indices(len(groups), -1)
    chosen = rng.choice(len(a), min(pairs, len(a)), replace=False)
    chosen = groups[np.stack([a[chosen], b[chosen]], 1)]
    return np.array([separation(code[labels == i], code[labels == j]) for i, j in chosen]), chosen


def gaussian_like(code, seed):
    """A Gaussian sample with the mean and covariance of code (n, d): as many points, no other structure."""
    code, seed = code.double(), int(np.random.SeedSequence((seed, 18)).generate_state(1)[0])
    values, vectors = torch.linalg.eigh(torch.cov(code.T))
    z = torch.randn(code.shape, generator=torch.Generator().manual_seed(seed), dtype=code.dtype)
    return (code.mean(0) + (z * values.clamp(min=0).sqrt()) @ vectors.T).float()


def tsne(x, perplexity=30.0, iterations=750):
    """Exact t-SNE (van der Maaten & Hinton 2008) of x (n, d) -> (n, 2), 2 ≤ n ≤ 2000 or so; deterministic.

    It starts from the two first principal components, their signs fixed by the largest entry, so that a
    rotation of x changes nothing. Gains, momentum and early exaggeration as in the authors' implementation.
    """
    x = x.double() - x.double().mean(0)
    n, p = len(x), affinities(x, perplexity).float()
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    y = torch.nn.functional.pad(u * s, (0, 2))[:, :2].float()
    y = y * y.gather(0, y.abs().argmax(0, keepdim=True)).sign()
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    velocity, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50.0)
    for t in range(iterations):
        gradient = divergence_gradient((12 if t < 250 else 1) * p, y)
        gain = torch.where(gradient * velocity > 0, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if t < 250 else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y


def affinities(x, perplexity):
    """t-SNE's p_ij (n, n), Σ = 1: p(j | i) is Gaussian around x_i, exp(its entropy) the perplexity."""
    n, d2 = len(x), torch.cdist(x, x).square()
    d2 = (d2 / d2.mean().clamp(min=1e-300)).fill_diagonal_(math.inf)
    low, high = torch.full((n, 1), -50.0, dtype=x.dtype), torch.full((n, 1), 50.0, dtype=x.dtype)
    for _ in range(60):                        # bisection of log β, p(j | i) ∝ exp(−β d²)
        beta = (low + high) / 2
        p = torch.softmax(-d2 * beta.exp(), 1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(min(perplexity, (n - 1) / 3))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    return ((p + p.T) / (2 * n)).clamp(min=1e-12)


def divergence_gradient(p, y):
    """∂/∂y of Σ p_ij log(p_ij/q_ij), q_ij ∝ 1/(1 + ‖y_i − y_j‖²); p (n, n), y (n, 2): (n, 2)."""
    q = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
    force = (p - q / q.sum()) * q
    return 4 * (force.sum(1, keepdim=True) * y - force @ y)


# Command line

def read_points(path):
    """Points (n, d), paths (n,) and labels (n,): `phi`, `paths`, `labels` of a .npz, or the points of a .npy.

    By default paths are "0", "1", … and labels −1, unknown. Nothing in the file is executed. ValueError for a
    file that is not whole or holds something else.
    """
    try:
        file = np.load(path)
        file = dict(phi=file) if isinstance(file, np.ndarray) else file
        x = file["phi"]
        paths = file.get("paths", np.arange(len(x)).astype(str))
        labels = file.get("labels", np.full(len(x), -1))
    except Exception as error:                 # anything, depending on how the file is damaged
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"not a whole .npy, or .npz with an array phi ({reason})") from None
    for name, v, kinds in ("paths", paths, "US"), ("labels", labels, "USbiuf"):
        if v.shape != x.shape[:1] or v.dtype.kind not in kinds:
            raise ValueError(f"{name} is {v.dtype} {v.shape}; must be one {name[:-1]} a point")
    return x, paths, labels


def arguments():
    """The flags, checked before the work; UserError or one line and exit code 2."""
    from unet import Parser, UserError, check_outputs, number
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("points", help="phi.npz of analyze.py, or a .npy of shape (n, d)")
    add("--K", "--clusters", type=number(int, 1), default=100, help="clusters (default: 100)")
    add("--n-init", type=number(int, 1, 1000), default=10, help="restarts (default: 10)")
    add("--max-iter", type=number(int, 1, 10 ** 6), default=300, help="iterations at most (default: 300)")
    add("--tol", type=number(float, 0, 1), default=1e-4, help="least movement of the centres (default: 1e-4)")
    add("--seed", type=number(int, 0, 2 ** 31), default=0, help="of the seeding (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--out", default="clusters.npz", help="centers, labels, inertia, paths (default: %(default)s)")
    add("--force", action="store_true", help="overwrite --out")
    flags = parser.parse_args()
    try:
        torch.zeros(1, device=flags.device).item()
    except Exception:                          # by device and build: RuntimeError, AssertionError, …
        raise UserError(f"--device {flags.device}: not available here") from None
    check_outputs([flags.out], flags.force)
    if not flags.out.endswith(".npz") or os.path.realpath(flags.out) == os.path.realpath(flags.points):
        raise UserError(f"--out {flags.out}: must be a .npz, and not the file of the points")
    return flags


def main():
    """The command line's work."""
    from unet import Progress, UserError, say, write
    flags, status = arguments(), Progress()
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")

    def progress(restart, iteration, changed):
        done = (restart + iteration / (iteration + 20)) / flags.n_init         # a restart takes some 40
        status(done, f"restart {restart + 1}/{flags.n_init}, iteration {iteration}, {changed} labels changed")

    try:
        x, paths, classes = read_points(flags.points)
        model = KMeans(flags.K, n_init=flags.n_init, max_iter=flags.max_iter, tol=flags.tol, seed=flags.seed,
                       device=flags.device, progress=progress).fit(x)
    except ValueError as error:
        raise UserError(f"{flags.points}: {error}") from None
    sizes = np.bincount(model.labels_, minlength=flags.K)
    say(f"{len(x)} points of {x.shape[1]} dimensions, {flags.K} clusters of {sizes.min()} to {sizes.max()}")
    say(f"inertia {model.inertia_:.6g}, {model.n_iter_} iterations")
    known = classes != "" if classes.dtype.kind in "US" else classes >= 0      # NaN is not known either
    if known.any():
        index = adjusted_rand_index(model.labels_[known], classes[known])
        say(f"against {len(np.unique(classes[known]))} classes: adjusted Rand index {index:.3f}")
    with write(flags.out) as file:
        np.savez(file, centers=model.cluster_centers_, labels=model.labels_, inertia=model.inertia_,
                 paths=paths)
    say(f"wrote {flags.out}")


if __name__ == "__main__":
    from unet import run
    run(main)
